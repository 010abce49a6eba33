"""Haystacks for the demo: Python's own standard library with short facts ("needles") hidden in it.

The text is on every machine that runs Python. Files are split by a hash of their relative path into a
training part and a held-out part, so that the model in `longattn/demo/model` never saw what the demo
searches. Words likewise. Tokens are bytes (0..255) and `BOS`.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "held_out"]

BOS = 256
CODE_DIGITS = 5
SMALLEST_FILE, LARGEST_FILE = 200, 400_000


@dataclass(frozen=True)
class Needle:
    """One hidden fact: asked for `word`, the model should say `code`; `depth` is its place, 0..1."""

    word: bytes
    code: bytes
    depth: float

    @property
    def question(self) -> NDArray[np.int64]:
        """Tokens that the answer follows."""
        return tokens(question(self.word))


@dataclass(frozen=True)
class Haystack:
    """`tokens` int64 [context], its needles in random order, and the copies of held-out text it took."""

    tokens: NDArray[np.int64]
    needles: list[Needle]
    copies: int


def question(word: bytes) -> bytes:
    return b"# code for " + word + b" is "


def statement(word: bytes, code: bytes) -> bytes:
    return question(word) + code + b"\n"


def tokens(text: bytes) -> NDArray[np.int64]:
    return np.frombuffer(text, np.uint8).astype(np.int64)


def in_held_out(name: bytes) -> bool:
    """One name in eight, the same on every machine."""
    return hashlib.sha1(name, usedforsecurity=False).digest()[0] < 32


def source_files(split: Split) -> list[Path]:
    """The standard library's *.py files of one split, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    relative = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    ours = (name for name in relative if "site-packages" not in name and "dist-packages" not in name)
    return [root / name for name in ours if in_held_out(name.encode()) == (split == "held_out")]


@cache
def corpus(split: Split) -> NDArray[np.uint8]:
    """All text of one split as bytes.

    Raises:
        RuntimeError: this Python comes without the sources of its standard library.
    """
    texts = (path.read_bytes().replace(b"\r", b"") for path in source_files(split))
    parts = [text.rstrip(b"\n") + b"\n\n" for text in texts if SMALLEST_FILE < len(text) < LARGEST_FILE]
    if not parts:
        where = sysconfig.get_path("stdlib")
        raise RuntimeError(f"no standard library sources (*.py) under {where}: the haystack is made of them")
    return np.frombuffer(b"".join(parts), np.uint8)


@cache
def common_words(source: Split, split: Split) -> tuple[bytes, ...]:
    """Words of 4-10 letters of `split` among the 4,000 most frequent of the `source` text, sorted."""
    counts = Counter(re.findall(rb"\b[a-z]{4,10}\b", corpus(source).tobytes()))
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[:4000]
    return tuple(sorted(word for word in frequent if in_held_out(word) == (split == "held_out")))


def near_miss(a: bytes, b: bytes) -> bool:
    """Whether the words differ in one letter only."""
    return len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1


def haystack(context: int, needles: int, *, seed: int = 0, clear_head: int = 0, clear_tail: int = 0) -> Haystack:
    """`context` tokens of held-out text with `needles` statements at evenly spread depths.

    Args:
        context: tokens, `BOS` included.
        needles: how many; their words were not used in training and no two are near misses of each other.
        seed: the same seed gives the same haystack on the same Python version.
        clear_head: no needle begins in the first tokens, nor
        clear_tail: ends in the last ones, where sinks and a sliding window would find it.

    Raises:
        ValueError: the needles do not fit into the context, or there are not so many words.
        RuntimeError: no source text on this machine.
    """
    rng = np.random.default_rng([seed, context])
    pool = common_words("held_out", "held_out")
    words: list[bytes] = []
    for i in rng.permutation(len(pool)):
        if len(words) < needles and not any(near_miss(pool[i], word) for word in words):
            words.append(pool[i])
    if len(words) < needles:
        raise ValueError(f"needles: {needles} asked for, but there are words for {len(words)} only")
    codes = [rng.integers(48, 58, CODE_DIGITS).astype(np.uint8).tobytes() for _ in words]
    lines = [statement(word, code) for word, code in zip(words, codes, strict=True)]

    length = context - 1 - sum(map(len, lines))
    if length - clear_head - clear_tail < 16 * needles:
        raise ValueError(f"context: {context} tokens are too few for {needles} needles outside the last {clear_tail}")
    source = corpus("held_out")
    copies = -(-length // len(source))
    source = np.tile(source, copies)
    ends = np.flatnonzero(source == 10) + 1
    end = int(rng.choice(ends[ends >= length]))
    text = source[end - length : end]  # ends with a line; the question starts on a line of its own

    starts = np.flatnonzero(text == 10) + 1
    starts = starts[(starts >= clear_head) & (starts <= length - clear_tail)]
    depths = (np.arange(needles) + rng.random(needles)) / needles
    aims = clear_head + depths * (length - clear_head - clear_tail)
    cuts = starts[np.minimum(np.searchsorted(starts, aims), len(starts) - 1)]
    pieces, hidden, before = [np.array([BOS])], [], 0
    for cut, i in zip(cuts, rng.permutation(needles), strict=True):
        pieces += [text[before:cut].astype(np.int64), tokens(lines[i])]
        hidden.append(Needle(words[i], codes[i], cut / length))
        before = cut
    pieces.append(text[before:].astype(np.int64))
    return Haystack(np.concatenate(pieces), [hidden[i] for i in rng.permutation(needles)], copies)
