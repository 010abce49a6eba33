"""`EvictingCache`: what all policies have in common."""

import numpy as np
import pytest

import longattn as la
from eviction import cache_of, decode, sequence
from longattn.kv import EvictingCache, evict
from longattn.kv.evict import HeavyHitter, LazyEviction, StreamingLLM
from random_arrays import BF16, F32


def test_stats(rng):
    q, k, v = sequence(rng, dtype=BF16, dim=32)
    cache = cache_of(HeavyHitter(5, 3), k, v, residual="mean")
    empty = cache.stats
    assert (empty.appended, empty.live, empty.nbytes, empty.full_nbytes) == (0, [0, 0], 0, 0)
    decode(cache, q, k, v, prompt=20)
    stats = cache.stats
    assert (stats.appended, stats.live, stats.evicted, stats.folded) == (60, [8, 8], 104, 104)
    assert stats.full_nbytes == 60 * 2 * 2 * 32 * 2
    assert stats.nbytes == 8 * 2 * 2 * 32 * 2 + 2 * 65 * 8
    assert stats.attended == 9 and stats.policy_nbytes == 2 * 9 * 16


def test_keys_and_values_of_other_sizes_and_dtypes(rng):
    q, k, v = sequence(rng, value_dim=40)
    cache = EvictingCache(StreamingLLM(1, 9), 2, 16, 40, dtype="float16")
    assert cache.prefill(q[:, :30], k[:, :30], v[:, :30]).shape == (4, 30, 40)
    assert cache.store.dtype == np.float16 and cache.store.value_dim == 40


def test_chunks_of_a_prompt(rng):
    """Rows that come several at a time see each other; what goes, goes after them."""
    q, k, v = sequence(rng)
    cache = cache_of(LazyEviction(30, window=10, alpha=0.01), k, v, slots=60)
    out = []
    for first in range(0, 60, 20):
        rows = slice(first, first + 20)
        cache.append(k[:, rows], v[:, rows])
        out.append(cache.attend(q[:, rows]))
    whole = la.attention(q, k, v, causal=True)
    np.testing.assert_allclose(np.concatenate(out, axis=1)[:, :20], whole[:, :20], atol=1e-5)
    assert cache.stats.live == [60, 60], "no last row of a chunk was a multiple of the window"


def test_an_empty_step(rng):
    q, k, v = sequence(rng)
    cache = cache_of(HeavyHitter(5, 3), k, v)
    cache.append(k[:, :1], v[:, :1])
    assert cache.attend(q[:, :0]).shape == (4, 0, 16)
    cache.append(k[:, :0], v[:, :0])
    assert cache.stats.appended == 1


def test_a_mean_row_keeps_the_mass_of_flat_heads(rng):
    """Where all logits are about equal, dropped rows matter, and their mean is what they give."""
    q, k, v = sequence(rng, spread=0.02, length=200)
    whole = la.attention(q, k, v, causal=True)
    errors = []
    for residual in (None, "mean"):
        out, _ = decode(cache_of(StreamingLLM(4, 20), k, v, residual=residual), q, k, v)
        errors.append(np.abs(out - whole)[:, 100:].mean())
    assert errors[1] < errors[0] / 20


def test_torch(rng):
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in sequence(rng))
    cache = EvictingCache(HeavyHitter(5, 3), 2, 16, dtype="float32")
    assert isinstance(cache.prefill(q[:, :30], k[:, :30], v[:, :30]), torch.Tensor)
    cache.append(k[:, 30:31], v[:, 30:31])
    assert isinstance(cache.attend(q[:, 30:31]), torch.Tensor)


def started(k):
    cache = cache_of(HeavyHitter(5, 3), k, k)
    cache.append(k[:, :1], k[:, :1])
    return cache


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, k: EvictingCache("h2o", 2, 16), TypeError, "policy: got str, expected a policy"),
        (lambda q, k: EvictingCache(started(k).policy, 2, 16), ValueError, "policy: got one that serves another"),
        (lambda q, k: cache_of(HeavyHitter(1, 1), k, k, residual="sum"), ValueError, "residual: got 'sum'"),
        (lambda q, k: cache_of(HeavyHitter(1, 1), k, k, scale=np.inf), ValueError, "scale: got inf"),
        (lambda q, k: cache_of(HeavyHitter(1, 1), k, k, slots=0), ValueError, "slots: got 0"),
        (lambda q, k: started(k).prefill(q, k, k), ValueError, "prefill: got a prompt after 1 rows"),
        (lambda q, k: cache_of(HeavyHitter(1, 1), k, k).prefill(q[:, 1:], k, k), ValueError, "q: got 59 rows with 60"),
        (lambda q, k: cache_of(HeavyHitter(1, 1), k, k).prefill(q, k[:1], k[:1]), ValueError, "k, v: got shapes"),
        (
            lambda q, k: cache_of(HeavyHitter(1, 1), k, k).prefill(q[:, :0], k[:, :0], k[:, :0]),
            ValueError,
            "at least 1",
        ),
        (
            lambda q, k: cache_of(HeavyHitter(9, 9), k, k, slots=9).prefill(q, k, k),
            ValueError,
            "slots: got 9, expected",
        ),
        (lambda q, k: cache_of(HeavyHitter(1, 1), k, k).attend(q), ValueError, "q: got queries on an empty cache"),
        (lambda q, k: started(k).attend(q), ValueError, "q: got 60 queries, expected at most the 1 rows"),
        (lambda q, k: started(k).append(k, k), ValueError, "no more than its 8 free slots of 9"),
        (lambda q, k: cache_of(HeavyHitter(1, 1), k, k).store, ValueError, "store: got an empty cache"),
    ],
)
def test_bad_input(rng, call, error, message):
    q, k, _ = sequence(rng)
    with pytest.raises(error, match=message):
        call(q, k)


def test_more_slots_than_there_can_be(rng):
    q, k, v = sequence(rng)
    for policy, made in ((StreamingLLM(4, 2**40), 2**40 + 4), (HeavyHitter(2**63 - 1, 1), 2**63 + 1)):
        cache = cache_of(policy, k, v)
        for _ in range(2):
            with pytest.raises(ValueError, match=f"slots: got None, which is {made} for this {type(policy).__name__}"):
                cache.prefill(q, k, v)
            assert cache.stats.appended == 0
    out = cache_of(StreamingLLM(4, 2**40), k, v, slots=60).prefill(q, k, v)
    np.testing.assert_array_equal(out, cache_of(StreamingLLM(4, 60), k, v).prefill(q, k, v))


@pytest.mark.parametrize("where", ["prompt", "step"])
@pytest.mark.parametrize(
    "kind", ["heavy_hitter", "a_vl_cache", "selective_attention_budget", "snap_kv", "lazy_eviction"]
)
def test_a_key_of_nan_does_not_stop_the_window(rng, kind, where):
    """Weights that are NaN count as 0: the newest row stays, and so do the heads without such a key."""
    q, k, v = sequence(rng)
    bad = k.copy()
    bad[0, 17 if where == "prompt" else 43] = np.nan
    kept = []
    for keys in (k, bad):
        policy = evict.make(kind, 16, kv_heads=2, sinks=2, window=6)
        kept.append(decode(cache_of(policy, keys, v), q, keys, v, prompt=40)[1])
    for step, (good, heads) in enumerate(zip(*kept, strict=True), start=39):
        assert all(rows[-1] == step for rows in heads)
        assert [len(rows) for rows in heads] == [len(rows) for rows in good]
        if kind != "selective_attention_budget":  # there all heads keep the same rows
            assert heads[1] == good[1]


def test_a_failed_append_changes_nothing(rng):
    q, k, v = sequence(rng)
    cache = started(k)
    with pytest.raises(ValueError, match="free slots"):
        cache.append(k, v)
    assert cache.stats.appended == 1 and [rows.tolist() for rows in cache.kept] == [[0], [0]]
    assert np.isfinite(cache.attend(q[:, :1])).all()
    assert cache_of(HeavyHitter(1, 1), k, v).kept[0].dtype == np.int64
    assert cache.store.dtype == F32
