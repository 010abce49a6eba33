"""The haystack: held-out text only, needles where the questions can find them and the window cannot."""

from __future__ import annotations

import numpy as np
import pytest

from longattn.demo import text


def test_files_of_the_splits_are_disjoint_and_both_there() -> None:
    train, held_out = text.source_files("train"), text.source_files("held_out")
    assert len(train) > 3 * len(held_out) > 0
    assert not set(train) & set(held_out)
    assert not any("site-packages" in str(path) for path in train + held_out)


def test_words_of_the_splits_are_disjoint() -> None:
    assert not set(text.common_words("held_out", "held_out")) & set(text.common_words("train", "train"))


def test_split_does_not_depend_on_the_machine() -> None:
    names = (b"abc.py", b"copy.py", b"email/parser.py", b"os.py", b"argparse.py")
    assert [text.in_held_out(name) for name in names] == [False, True, True, False, False]


def test_haystack_is_reproducible_and_seeds_differ() -> None:
    first, again, other = (text.haystack(4096, 16, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.needles == again.needles
    assert not np.array_equal(first.tokens, other.tokens)


@pytest.mark.parametrize(("context", "needles"), [(1024, 1), (4096, 16), (65536, 64)])
def test_needles_lie_where_promised(context: int, needles: int) -> None:
    head, tail = 64, 320
    hay = text.haystack(context, needles, seed=1, clear_head=head, clear_tail=tail)
    assert hay.tokens.shape == (context,)
    assert hay.tokens[0] == text.BOS
    assert np.all(hay.tokens[1:] < 256)
    assert hay.tokens[-1] == ord("\n")
    content = hay.tokens[1:].astype(np.uint8).tobytes()
    lines = [text.statement(needle.word, needle.code) for needle in hay.needles]
    starts = [content.index(b"\n" + line) + 1 for line in lines]
    assert min(starts) >= head
    assert max(start + len(line) for start, line in zip(starts, lines, strict=True)) <= len(content) - tail
    for needle in hay.needles:
        assert content.count(text.question(needle.word)) == 1
        assert bytes(needle.question.astype(np.uint8)) == text.question(needle.word)


def test_needle_words_are_no_near_misses_of_each_other() -> None:
    words = [needle.word for needle in text.haystack(16384, 128).needles]
    assert not any(text.near_miss(a, b) for i, a in enumerate(words) for b in words[:i])
    assert text.near_miss(b"color", b"colon")
    assert not text.near_miss(b"color", b"colors")


def test_haystack_without_its_needles_is_held_out_text() -> None:
    hay = text.haystack(4096, 8, seed=2)
    content = hay.tokens[1:].astype(np.uint8).tobytes()
    for needle in hay.needles:
        content = content.replace(text.statement(needle.word, needle.code), b"")
    assert content in text.corpus("held_out").tobytes()
    assert hay.copies == 1


def test_little_text_is_repeated_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    little = text.corpus("held_out")[:3000]
    monkeypatch.setattr(text, "corpus", lambda split: np.append(little, np.uint8(10)))
    hay = text.haystack(8192, 8)
    assert hay.tokens.shape == (8192,)
    assert hay.copies == 3


def test_no_text_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "source_files", lambda split: [])
    with pytest.raises(RuntimeError, match="standard library"):
        text.corpus.__wrapped__("held_out")


@pytest.mark.parametrize(("context", "needles", "message"), [(512, 64, "context: 512"), (10**6, 5000, "needles: 5000")])
def test_needles_that_do_not_fit_are_refused(context: int, needles: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text.haystack(context, needles, clear_tail=256)
