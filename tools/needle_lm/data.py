"""Training sequences: standard library text with needles and later repeats of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longattn.demo import text

TEXT, STATEMENT, ANSWER = 0, 1, 2  # what a token is: haystack, needle line, a digit that can be recalled


@dataclass(frozen=True)
class Shape:
    """What the sequences of a phase look like. Ranges are inclusive."""

    length: int
    needles: tuple[int, int]
    repeats: tuple[int, int]
    digits: int = text.CODE_DIGITS
    letters: tuple[int, int] | None = None  # random words of so many letters; None: the mixture of `pick_words`
    near_words: float = 0.15  # share of words that are another one with a letter changed
    near_codes: float = 0.0  # share of codes that are another one with one or two digits changed


def pick_words(rng: np.random.Generator, count: int, shape: Shape) -> list[bytes]:
    """Distinct words: near misses, random letters (40 %) and training words."""
    known = text.common_words("train", "train")
    words: list[bytes] = []
    while len(words) < count:
        kind = rng.random()
        low, high = shape.letters or (4, 10)
        if shape.letters or shape.near_words <= kind < shape.near_words + 0.4:
            word = rng.integers(97, 123, rng.integers(low, high + 1)).astype(np.uint8).tobytes()
        elif words and kind < shape.near_words:
            changed = bytearray(words[rng.integers(len(words))])
            changed[rng.integers(len(changed))] = 97 + rng.integers(26)
            word = bytes(changed)
        else:
            word = known[rng.integers(len(known))]
        if word not in words:
            words.append(word)
    return words


def pick_codes(rng: np.random.Generator, count: int, shape: Shape) -> list[bytes]:
    codes: list[bytes] = []
    for _ in range(count):
        code = rng.integers(48, 58, shape.digits).astype(np.uint8)
        if codes and rng.random() < shape.near_codes:
            code = np.frombuffer(codes[rng.integers(len(codes))], np.uint8).copy()
            places = rng.choice(shape.digits, rng.integers(1, 3), replace=False)
            code[places] = rng.integers(48, 58, len(places))
        codes.append(code.tobytes())
    return codes


def sequence(rng: np.random.Generator, shape: Shape) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Tokens [length + 1] and what each of them is; the last repeat is at the very end, as in the demo."""
    count = int(rng.integers(shape.needles[0], shape.needles[1] + 1))
    repeats = int(rng.integers(shape.repeats[0], shape.repeats[1] + 1))
    words, codes = pick_words(rng, count, shape), pick_codes(rng, count, shape)
    order = rng.permutation(np.concatenate((np.arange(count), rng.integers(0, count, repeats - 1))))
    order = np.append(order, rng.integers(count))

    lines, kinds, stated = [], [], set()
    for i in order:
        line = text.tokens(text.statement(words[i], codes[i]))
        kind = np.full(len(line), STATEMENT, np.uint8)
        if i in stated:
            kind[-1 - shape.digits : -1] = ANSWER
        stated.add(i)
        lines.append(line)
        kinds.append(kind)

    source = text.corpus("train")
    length = shape.length - sum(map(len, lines))
    start = int(rng.integers(0, len(source) - length))
    hay = source[start : start + length].astype(np.int64)
    line_starts = np.append(np.flatnonzero(hay == 10) + 1, 0)
    cuts = np.append(np.sort(rng.choice(line_starts, len(lines) - 1)), length)
    parts, part_kinds, before = [np.array([text.BOS])], [np.array([STATEMENT], np.uint8)], 0
    for cut, line, kind in zip(cuts, lines, kinds, strict=True):
        parts += [hay[before:cut], line]
        part_kinds += [np.full(cut - before, TEXT, np.uint8), kind]
        before = cut
    return np.concatenate(parts), np.concatenate(part_kinds)


def batch(rng: np.random.Generator, size: int, shape: Shape) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    rows = [sequence(rng, shape) for _ in range(size)]
    return np.stack([tokens for tokens, _ in rows]), np.stack([kind for _, kind in rows])
