"""`ltri_span_attention`: spans found in attention maps, retrieved, attended to; and the cache that streams."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import retrieval as reference
from longattn.retrieval import (
    LtriCache,
    discover_spans,
    ltri_span_attention,
    span_representatives,
    triangle_scores,
)
from random_arrays import DTYPES, F32, normal, qkv


def check(q, k, v, spans, representatives, **options):
    out, lse = ltri_span_attention(q, k, v, spans, representatives, return_lse=True, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    expected, expected_lse = reference.ltri_span_attention(q, k, v, spans, representatives, return_lse=True, **options)
    tolerances.attention(q, k, v, scale=options.get("scale")).check(out, expected, lse, expected_lse)


def inputs(rng, rows=5, keys=60, **options):
    return tuple(x[0] for x in qkv(rng, rows=rows, keys=keys, **options))


def tiled(rng, stop, n_rep=2):
    """Spans of random lengths up to row `stop`, and rows of each."""
    ends = np.unique(np.concatenate([[0, stop], rng.integers(1, stop, 6)]))
    spans = np.stack([ends[:-1], ends[1:]], axis=1)
    return spans, np.array([rng.integers(start, end, n_rep) for start, end in spans])


def causal_map(rng, n):
    weights = np.tril(rng.random((n, n)) ** 4)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("block", [1, 2, 5])
@pytest.mark.parametrize(("group_reduce", "row_reduce"), [("max", "max"), ("sum", "mean")])
@pytest.mark.parametrize("budget", [0, 15, 100])
def test_reference(rng, isa, block, group_reduce, row_reduce, budget):
    q, k, v = inputs(rng, heads=6, kv_heads=2, value_dim=12)
    options = {"block": block, "group_reduce": group_reduce, "row_reduce": row_reduce, "budget": budget}
    check(q, k, v, *tiled(rng, 50), sinks=3, window=8, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, dtype):
    check(*inputs(rng, dim=32, q_dtype=dtype), *tiled(rng, 48), sinks=2, window=8, budget=20, scale=0.3)


@pytest.mark.parametrize("sinks", [0, 7, 100])
@pytest.mark.parametrize("window", [1, 8, 55, 100])
def test_spans_that_sinks_and_window_cut(rng, sinks, window):
    check(*inputs(rng), *tiled(rng, 60), sinks=sinks, window=window, budget=30)
    check(*inputs(rng), np.zeros((0, 2), int), np.zeros((0, 2), int), sinks=sinks, window=window)


def test_stats_and_torch(rng):
    q, k, v = inputs(rng)
    spans, representatives = tiled(rng, 50)
    options = {"sinks": 3, "window": 8, "budget": 20, "block": 2}
    out, stats = ltri_span_attention(q, k, v, spans, representatives, return_stats=True, **options)
    np.testing.assert_array_equal(stats.keys_total, [57, 59, 60])
    np.testing.assert_array_equal(stats.keys_scored, [representatives.size] * 3)
    assert stats.keys_attended.shape == (2, 3) and (stats.keys_attended <= 3 + 20 + 18).all()
    for h in range(2):
        for numbers in stats.spans[h]:
            assert list(numbers) == sorted(set(numbers))
    torch = pytest.importorskip("torch")
    tensors = (torch.from_numpy(np.ascontiguousarray(x)) for x in (q, k, v))
    np.testing.assert_array_equal(ltri_span_attention(*tensors, spans, representatives, **options).numpy(), out)


@pytest.mark.parametrize("n", [1, 2, 12, 25])
@pytest.mark.parametrize(("min_len", "max_len", "iou"), [(1, 6, 0.3), (3, 25, 0.0), (2, 8, 0.9)])
def test_discovery(rng, n, min_len, max_len, iou):
    attn = causal_map(rng, n)
    theta = 0.0371  # the default makes exact ties, that of the whole segment with all but its last token
    found = discover_spans(attn, min_len=min_len, max_len=max_len, theta=theta, iou=iou)
    assert [tuple(pair) for pair in found] == reference.discover_spans(attn, min_len, max_len, theta, iou)


def test_dense_triangles_are_found():
    """Blocks of tokens that look at each other."""
    attn = np.full((30, 30), 1e-3)
    for start, stop in ((2, 9), (9, 20), (24, 30)):
        attn[start:stop, start:stop] = 0.2
    assert discover_spans(np.tril(attn), theta=0.15).tolist() == [[0, 2], [2, 9], [9, 20], [20, 24], [24, 30]]


def test_representatives(rng):
    attn = causal_map(rng, 20)
    spans = np.array([[0, 9], [9, 11], [11, 20]])
    rows = span_representatives(attn, spans, n_rep=3)
    for (start, stop), own in zip(spans, rows, strict=True):
        mass = [sum(attn[i, j] for i in range(j, stop)) for j in range(start, stop)]
        order = start + np.argsort(-np.array(mass), kind="stable")[:3]
        np.testing.assert_array_equal(own, np.concatenate([order, np.full(3 - len(order), order[0])]))


# Identities


@pytest.mark.parametrize("block", [1, 3])
def test_a_budget_of_everything_is_causal_attention(rng, isa, block):
    q, k, v = inputs(rng)
    spans, representatives = tiled(rng, 52)
    out, lse = ltri_span_attention(
        q, k, v, spans, representatives, sinks=2, window=4, budget=60, block=block, return_lse=True
    )
    expected, expected_lse = la.attention(q, k, v, causal=True, return_lse=True)
    tolerances.same_storage(q, k, v).check(out, expected, lse, expected_lse)


def test_no_budget_is_sinks_and_window(rng, isa):
    q, k, v = inputs(rng)
    out, lse = ltri_span_attention(q, k, v, *tiled(rng, 60), sinks=3, window=8, budget=0, return_lse=True)
    j, i = np.arange(60), np.arange(55, 60)[:, None]
    mask = ((j < 3) | (j > i - 8)) & (j <= i)
    expected, expected_lse = la.attention(q, k, v, mask=mask, return_lse=True)
    tolerances.same_storage(q, k, v).check(out, expected, lse, expected_lse)


@pytest.mark.parametrize("n", [1, 7, 100, 300])
def test_spans_tile_their_segment(rng, n):
    spans = discover_spans(causal_map(rng, n), min_len=2, max_len=40)
    assert spans[0, 0] == 0 and spans[-1, 1] == n
    np.testing.assert_array_equal(spans[1:, 0], spans[:-1, 1])
    assert (spans[:, 1] > spans[:, 0]).all()


def test_scores_are_the_sums_of_triangles(rng):
    attn = causal_map(rng, 14) + np.triu(rng.random((14, 14)), 1)  # what lies above the diagonal does not count
    for theta in (None, 0.2):
        scores = triangle_scores(attn, max_len=20, theta=theta)
        for x in range(14):
            for size in range(1, 21):
                if x + size > 14:
                    assert scores[x, size - 1] == -np.inf
                else:
                    exact = reference.triangle_score(attn, x, x + size - 1, 1 / 14 if theta is None else theta)
                    assert abs(scores[x, size - 1] - exact) < 1e-12


def test_a_constant_map_is_one_span():
    attn = np.tril(np.full((40, 40), 0.25))
    assert (triangle_scores(attn, max_len=5, theta=0.25)[:36] == 0).all()
    assert discover_spans(attn, theta=0.25).tolist() == [[0, 40]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_are_the_function_with_the_same_spans(rng, dtype):
    q, k, v = inputs(rng, rows=75, keys=75, q_dtype=dtype)
    options = {"sinks": 3, "window": 20, "budget": 16}
    cache = LtriCache(2, 16, dtype=dtype, segment=20, max_len=8, n_rep=2, **options)
    at = 0
    for new in (7, 1, 30, 1, 36):
        rows = slice(at, at + new)
        cache.append(q[:, rows], k[:, rows], v[:, rows])
        at += new
        step, lse, stats = cache.attend(q[:, at - 1 : at], return_lse=True, return_stats=True)
        assert cache.indexed == at // 20 * 20 and len(cache) == at
        spans = cache.spans
        every = np.zeros((0, 2), int)
        for a in range(0, cache.indexed, 20):
            own = slice(a, a + 20)
            weights = la.dense.attention_weights(q[:, own].astype(F32), k[:, own], range(20), causal=True).mean(
                axis=0, dtype=np.float64
            )
            part = spans[(spans[:, 0] >= a) & (spans[:, 1] <= a + 20)]
            reps = span_representatives(weights, part - a, n_rep=2) + a
            every = np.concatenate([every, reps])
        expected, expected_lse, theirs = ltri_span_attention(
            q[:, at - 1 : at], k[:, :at], v[:, :at], spans, every, return_lse=True, return_stats=True, **options
        )
        tolerances.same_storage(q, k, v).check(step, np.asarray(expected, np.float64), lse, expected_lse)
        assert [list(x[0]) for x in stats.spans] == [list(x[0]) for x in theirs.spans]
    assert cache.index_nbytes == len(spans) * (16 + 2 * 2 * 16 * 4) and cache.nbytes > cache.index_nbytes


# The cache's own


def filled(rng, **options):
    q, k, v = inputs(rng, rows=70, keys=70)
    cache = LtriCache(2, 16, dtype=F32, **({"segment": 16, "max_len": 6, "window": 16, "budget": 12} | options))
    cache.append(q, k, v)
    return cache, q, k, v


def test_positions_in_the_cache(rng):
    """Rows that are read get the positions 0, 1, ...; which they are, products without positions say."""
    cache, q, k, v = filled(rng, positions="cache", rope_base=50.0, n_rep=1)
    out, lse, stats = cache.attend(q[:, -3:], return_lse=True, return_stats=True)
    spans = cache.spans
    rows = np.array([np.flatnonzero((k[0] == vector).all(axis=1))[0] for vector in cache._vectors[0, :, 0]])
    options = {"sinks": 4, "window": 16, "budget": 12, "block": 3, "rope_base": 50.0}
    expected, expected_lse = reference.span_attention(q[:, -3:], k, v, spans, rows[:, None], return_lse=True, **options)
    tolerances.two_levels(q, k, v).check(out, expected, lse, expected_lse)
    assert stats.keys_total[0] == 70


def test_votes_of_some_heads_rule(rng):
    cache, q, *_ = filled(rng)
    votes = cache.votes(q[:, -1:], np.array([1]))
    _, stats = cache.attend(q[:, -1:], votes=votes, return_stats=True)
    assert list(stats.spans[0][0]) == list(stats.spans[1][0])
    np.testing.assert_array_equal(cache.votes(q[:, -1:]), sum(cache.votes(q[:, -1:], np.array([h])) for h in range(4)))


def test_what_was_found_stays_a_candidate(rng):
    cache, q, *_ = filled(rng, persist=1)
    plenty = np.zeros(len(cache.spans), F32)
    plenty[2] = 1e6
    cache.attend(q[:, -1:], votes=plenty)
    for kept in (True, False):
        _, stats = cache.attend(q[:, -1:], votes=-np.arange(len(plenty), dtype=F32) - 1, return_stats=True)
        best_alone = int(np.flatnonzero(cache.spans[:, 1] > 4)[0])
        assert best_alone != 2
        assert (2 in stats.spans[0][0]) is (kept or 2 in expected_without(cache))


def expected_without(cache):
    """Spans that falling votes take by themselves."""
    left, found = 12, []
    for n, (start, stop) in enumerate(cache.spans):
        size = min(stop, 55) - max(start, 4)
        if 0 < size <= left:
            left -= size
            found.append(n)
    return found


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"spans": np.zeros((2, 3), int)}, ValueError, r"spans: got shape \(2, 3\), expected \[m, 2\]"),
        ({"spans": np.array([[0, 5], [6, 9]])}, ValueError, r"spans: got spans that do not tile"),
        ({"spans": np.array([[0, 5], [5, 99]])}, ValueError, r"spans: got spans that do not tile"),
        ({"spans": np.zeros((2, 2))}, TypeError, r"spans: got dtype float64"),
        ({"representatives": np.zeros((3, 2), int)}, ValueError, r"representatives: got shape \(3, 2\)"),
        ({"representatives": np.array([[0], [4]])}, ValueError, r"representatives: got rows outside of their spans"),
        ({"window": 0}, ValueError, r"window: got 0"),
        ({"budget": -1}, ValueError, r"budget: got -1"),
        ({"block": 0}, ValueError, r"block: got 0"),
        ({"group_reduce": "mean"}, ValueError, r"group_reduce: got 'mean', expected 'sum' or 'max'"),
        ({"row_reduce": "sum"}, ValueError, r"row_reduce: got 'sum', expected 'mean' or 'max'"),
        ({"q": np.zeros((4, 61, 16), F32)}, ValueError, r"q: got 61 queries"),
        ({"q": np.zeros((1, 4, 5, 16), F32)}, ValueError, r"k: got shape"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = inputs(rng)
    arguments = {"q": q, "k": k, "v": v, "spans": np.array([[0, 5], [5, 9]]), "representatives": np.array([[1], [6]])}
    with pytest.raises(error, match=message):
        ltri_span_attention(**(arguments | change))


def test_bad_maps():
    for call in (discover_spans, lambda attn: triangle_scores(attn, max_len=3)):
        with pytest.raises(ValueError, match=r"attn: got shape \(3, 4\), expected \[n, n\]"):
            call(np.zeros((3, 4)))
        with pytest.raises(ValueError, match=r"attn: got NaN or infinity"):
            call(np.full((3, 3), np.nan))
    for change, message in (
        ({"iou": 1.0}, r"iou: got 1.0"),
        ({"min_len": 0}, r"min_len: got 0"),
        ({"max_len": 2}, r"max_len: got 2, expected at least 4"),
        ({"theta": np.inf}, r"theta: got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            discover_spans(np.zeros((3, 3)), **change)


def test_bad_cache_arguments(rng):
    for change, message in (
        ({"positions": "slots"}, r"positions: got 'slots'"),
        ({"positions": "cache"}, r"rope_base: got None with positions='cache'"),
        ({"rope_base": 10.0}, r"rope_base: got 10.0 with positions='true'"),
        ({"segment": 0}, r"segment: got 0"),
        ({"iou": 2.0}, r"iou: got 2.0"),
        ({"persist": -1}, r"persist: got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            LtriCache(**({"kv_heads": 2, "head_dim": 16} | change))
    cache, q, k, v = filled(rng)
    with pytest.raises(ValueError, match=r"q: got shape \(4, 69, 16\), expected \[Hq, 70, D\]"):
        cache.append(q[:, 1:], k, v)
    with pytest.raises(ValueError, match=r"votes: got shape \(1,\)"):
        cache.attend(q[:, -1:], votes=np.zeros(1))
    with pytest.raises(ValueError, match=r"heads: got \[4\], expected numbers from 0 to 3"):
        cache.votes(q[:, -1:], np.array([4]))
    with pytest.raises(ValueError, match=r"q: got 71 queries"):
        cache.attend(normal(rng, (4, 71, 16)))
