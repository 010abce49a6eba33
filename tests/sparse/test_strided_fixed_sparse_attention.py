"""`strided_fixed_sparse_attention` against its float64 reference, and its identities."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from longattn.sparse import DynamicBlocks, StridedFixed, fixed_lists, strided_fixed_sparse_attention
from longattn.sparse.strided_fixed_sparse_attention import PATTERNS
from random_arrays import DTYPES, LAYOUTS, qkv


def check(q, k, v, **options):
    out, lse = strided_fixed_sparse_attention(q, k, v, return_lse=True, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    expected, expected_lse = reference.strided_fixed_sparse_attention(q, k, v, return_lse=True, **options)
    tolerances.attention(q, k, v).check(out, expected, lse, expected_lse)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("rows", "keys"), [(100, 100), (50, 131), (1, 90), (7, 3)])
def test_reference(rng, isa, pattern, rows, keys):
    q, k, v = qkv(rng, batch=2, heads=6, kv_heads=2, rows=rows, keys=keys, value_dim=12)
    check(q, k, v, stride=12, pattern=pattern, summary=3)
    check(q, k, v, stride=10, pattern=pattern, window=13, summary=2, slots=3)


def test_patterns_per_head(rng, isa):
    q, k, v = qkv(rng, heads=6, rows=90, keys=90)
    check(q, k, v, stride=12, pattern=PATTERNS, summary=4, slots=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_dtypes_and_layouts(rng, isa, dtype, layout, pattern):
    check(*qkv(rng, rows=60, keys=90, q_dtype=dtype, layout=layout), stride=9, pattern=pattern)


def test_any_number_of_threads(rng, threads):
    check(*qkv(rng, rows=300, keys=300), stride=16)


# Identities


def test_a_window_of_all_keys_is_causal_attention(rng, isa):
    q, k, v = qkv(rng, rows=90, keys=90)
    out = strided_fixed_sparse_attention(q, k, v, stride=90, pattern="local")
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=True))


def test_a_stride_of_one_is_causal_attention(rng, isa):
    q, k, v = qkv(rng, rows=90, keys=120)
    out = strided_fixed_sparse_attention(q, k, v, stride=1, pattern="strided")
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=True))


def test_a_summary_of_the_whole_block_is_causal_attention(rng, isa):
    q, k, v = qkv(rng, rows=90, keys=120)
    for pattern in ("fixed", "fixed_summary"):
        out = strided_fixed_sparse_attention(q, k, v, stride=16, pattern=pattern, summary=16)
        tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=True))


def test_strided_is_causal_attention_of_residues(rng, isa):
    q, k, v = qkv(rng, rows=96, keys=96)
    out = strided_fixed_sparse_attention(q, k, v, stride=8, pattern="strided")
    for r in range(8):
        expected = la.attention(*(x[:, :, r::8] for x in (q, k, v)), causal=True)
        tolerances.same_storage(q, k, v).check(out[:, :, r::8], expected)


@pytest.mark.parametrize("hops", [("local", "strided"), ("fixed_local", "fixed_summary")])
def test_two_hops_reach_every_position(hops):
    near, far = (reference.strided_fixed_mask(60, 60, name, stride=8, summary=1).astype(int) for name in hops)
    reached = (near + far + near @ far + far @ near) > 0
    np.testing.assert_array_equal(reached, np.tri(60, dtype=bool))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_steps_are_the_prefill(rng, isa, pattern):
    q, k, v = qkv(rng, rows=50, keys=50)
    options = {"stride": 8, "pattern": pattern, "summary": 2}
    whole, tolerance = strided_fixed_sparse_attention(q, k, v, **options), tolerances.same_storage(q, k, v)
    for n in (1, 8, 9, 33, 50):
        step = strided_fixed_sparse_attention(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], **options)
        tolerance.check(step, whole[:, :, n - 1 : n])


@pytest.mark.parametrize("pattern", [*PATTERNS, ("fixed", "local", "fixed", "strided", "fixed_summary", "fixed")])
@pytest.mark.parametrize(("rows", "keys"), [(90, 90), (50, 131), (1, 90), (7, 3)])
def test_a_selector_of_the_same(rng, isa, pattern, rows, keys):
    q, k, v = qkv(rng, batch=2, heads=6, kv_heads=2, rows=rows, keys=keys)
    for options in ({"stride": 12, "summary": 3}, {"stride": 10, "window": 13, "summary": 2, "slots": 3}):
        out, stats = la.sparse_attention(
            q, k, v, StridedFixed(pattern=pattern, **options), causal=True, return_stats=True
        )
        expected = strided_fixed_sparse_attention(q, k, v, pattern=pattern, **options)
        tolerances.same_storage(q, k, v).check(out, expected)
        mask = [
            reference.strided_fixed_mask(rows, keys, name, **({"window": None, "slots": 1} | options), head=h)
            for h, name in enumerate([pattern] * 6 if isinstance(pattern, str) else pattern)
        ]
        chosen = StridedFixed(pattern=pattern, **options)(q, k).to_dense_mask()
        causal = np.arange(keys) <= np.arange(keys - rows, keys)[:, None]
        np.testing.assert_array_equal(np.broadcast_to(chosen, (1, 6, rows, keys))[0] & causal, mask)
        visible = max(int(causal.sum()), 1)
        assert stats.density == pytest.approx((chosen & causal).sum() / chosen.shape[1] / visible)


def test_the_selector_goes_together_with_others(rng):
    q, k, v = qkv(rng, rows=96, keys=96)
    strided, blocks = StridedFixed(stride=10, pattern="strided"), DynamicBlocks(top_k=1, block=16)
    one, other = (x(q, k, causal=True).to_dense_mask() for x in (strided, blocks))
    for made, expected in ((strided | blocks, one | other), (strided & blocks, one & other)):
        np.testing.assert_array_equal(made(q, k, causal=True).to_dense_mask(), expected)
        out = la.sparse_attention(q, k, v, made, causal=True)
        tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, mask=expected, causal=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stride": 0}, ValueError, r"stride: got 0"),
        ({"window": 0}, ValueError, r"window: got 0"),
        ({"pattern": "dense"}, ValueError, r"pattern: got 'dense'"),
        ({"pattern": ("local", 3)}, ValueError, r"pattern: got 3"),
        ({"pattern": 3}, TypeError, r"pattern: got int, expected a sequence"),
        ({"summary": 9, "pattern": "fixed"}, ValueError, r"summary: got 1 slots of 9 keys"),
    ],
)
def test_bad_selectors(options, error, message):
    with pytest.raises(error, match=message):
        StridedFixed(**{"stride": 8, "summary": 2} | options)


def test_a_selector_for_other_heads(rng):
    q, k, _ = qkv(rng, rows=9, keys=9)
    with pytest.raises(ValueError, match=r"pattern: got 2 names, expected one, or 4 of them"):
        StridedFixed(stride=4, summary=1, pattern=("local", "fixed"))(q, k)
    with pytest.raises(ValueError, match=r"causal: got False"):
        StridedFixed(stride=4)(q, k, causal=False)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_stride_may_be_any_integer(rng, pattern):
    """Beyond the length it does not matter how large it is."""
    q, k, v = qkv(rng, rows=50, keys=70)
    options = {"pattern": pattern, "summary": 1, "window": 3}
    out, expected = (strided_fixed_sparse_attention(q, k, v, stride=n, **options) for n in (2**62, 71))
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("pattern", ["fixed", "fixed_summary"])
def test_lists_of_slots_that_do_not_fit_are_refused(pattern):
    with pytest.raises(ValueError, match=r"summary: got 1 slots of 9 keys, expected at most 8 keys together"):
        fixed_lists((50, 50), 8, summary=9, pattern=pattern)
    with pytest.raises(ValueError, match=r"summary: got 3 slots of 4 keys, expected at most 8 keys together"):
        fixed_lists((50, 50), 8, summary=4, slots=3, heads=3, pattern=pattern)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stride": 0}, ValueError, r"stride: got 0"),
        ({"pattern": "dense"}, ValueError, r"pattern: got 'dense'"),
        ({"pattern": ["local"] * 3}, ValueError, r"pattern: got \['local', 'local', 'local'\]"),
        ({"window": 0}, ValueError, r"window: got 0"),
        ({"summary": 0}, ValueError, r"summary: got 0"),
        ({"summary": 9, "pattern": "fixed"}, ValueError, r"summary: got 1 slots of 9 keys, expected at most 8"),
        ({"slots": 3, "summary": 4, "pattern": "fixed_summary"}, ValueError, r"summary: got 3 slots of 4 keys"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=9, keys=9)
    with pytest.raises(error, match=message):
        strided_fixed_sparse_attention(q, k, v, **{"stride": 8, "summary": 2} | change)
