"""`attention_varlen`: the same as `attention` sequence by sequence."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import dense as reference
from random_arrays import BF16, DTYPES, normal

LENGTHS = {
    "one": ([7], [7]),
    "prefill": ([1, 17, 64, 3, 130], [1, 17, 64, 3, 130]),
    "decode": ([1, 1, 1, 1], [300, 1, 65, 16]),
    "chunk": ([5, 1, 40], [90, 33, 300]),
    "longer queries": ([20, 3], [4, 2]),
    "empty ones": ([0, 5, 0, 3, 4, 0], [0, 5, 9, 0, 6, 0]),
    "no sequences": ([], []),
    "nothing": ([0, 0], [0, 0]),
}


def packed(rng, lengths, *, heads=4, kv_heads=2, dim=24, value_dim=16, dtype=np.float32, kv_dtype=None):
    """Packed q, k, v `[T, H, D]` and their bounds."""
    lengths_q, lengths_k = LENGTHS[lengths]
    cu_q, cu_k = (np.cumsum([0, *n], dtype=np.int32) for n in (lengths_q, lengths_k))
    q = normal(rng, (cu_q[-1], heads, dim), dtype)
    k = normal(rng, (cu_k[-1], kv_heads, dim), kv_dtype or dtype)
    v = normal(rng, (cu_k[-1], kv_heads, value_dim), kv_dtype or dtype)
    return q, k, v, cu_q, cu_k


def tolerance_of(q, k, v, **options):
    return tolerances.attention(*(x.swapaxes(0, 1) for x in (q, k, v)), together=8, **options)


def check(q, k, v, cu_q, cu_k, *, offset=0.0, **options):
    out, lse = la.attention_varlen(q, k, v, cu_q, cu_k, return_lse=True, **options)
    assert out.shape == (*q.shape[:2], v.shape[2]) and out.dtype == q.dtype
    assert lse.shape == q.shape[1::-1] and lse.dtype == np.float32
    expected, expected_lse = reference.attention_varlen(q, k, v, cu_q, cu_k, return_lse=True, **options)
    tolerance = tolerance_of(q, k, v, scale=options.get("scale"), offset=offset)
    tolerance.check(out, expected, lse, expected_lse)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(rng, isa, lengths, causal):
    check(*packed(rng, lengths), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, dtype, kv_dtype):
    check(*packed(rng, "chunk", dtype=dtype, kv_dtype=kv_dtype), causal=True)


@pytest.mark.parametrize("lengths", ["prefill", "decode", "chunk", "empty ones"])
@pytest.mark.parametrize(
    "options",
    [
        {"window": (10, 0)},
        {"window": (3, 4)},
        {"scale": 1.3},
        {"softcap": 5.0},
        {"alibi_slopes": np.array([0.5, 0.25, 0.125, 1.0], np.float32), "offset": 300.0},
        {"sinks": np.array([0.0, 3.0, -1.0, 9.0], np.float32), "offset": 9.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(rng, isa, lengths, options):
    check(*packed(rng, lengths), **options)
    check(*packed(rng, lengths), causal=True, **options)


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=str)
def test_equals_attention_on_equal_lengths(rng, isa, dtype):
    q, k, v = (normal(rng, (3, heads, n, 32), dtype) for heads, n in ((6, 20), (2, 50), (2, 50)))
    whole, whole_lse = la.attention(q, k, v, causal=True, return_lse=True)
    pack = [np.ascontiguousarray(x.swapaxes(1, 2)).reshape(-1, x.shape[1], 32) for x in (q, k, v)]
    cu_q, cu_k = np.arange(4) * 20, np.arange(4) * 50
    out, lse = la.attention_varlen(*pack, cu_q, cu_k, causal=True, return_lse=True)
    tolerances.same_storage(q, k, v).check(
        out.reshape(3, 20, 6, 32).swapaxes(1, 2), np.asarray(whole, np.float64),
        lse.reshape(6, 3, 20).swapaxes(0, 1), whole_lse,
    )  # fmt: skip


def test_sequences_do_not_see_each_other(rng, isa):
    q, k, v, cu_q, cu_k = packed(rng, "chunk")
    before = la.attention_varlen(q, k, v, cu_q, cu_k)
    k[cu_k[1] : cu_k[2]] = v[cu_k[1] : cu_k[2]] = np.nan
    after = la.attention_varlen(q, k, v, cu_q, cu_k)
    other = np.r_[0 : cu_q[1], cu_q[2] : cu_q[3]]
    np.testing.assert_array_equal(after[other], before[other])
    assert np.isnan(after[cu_q[1] : cu_q[2]]).all()


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_dtypes_of_bounds(rng, dtype):
    q, k, v, cu_q, cu_k = packed(rng, "prefill")
    expected = la.attention_varlen(q, k, v, cu_q, cu_k)
    np.testing.assert_array_equal(la.attention_varlen(q, k, v, cu_q.astype(dtype), cu_k.astype(dtype)), expected)


def test_strides_and_out(rng, isa):
    q, k, v, cu_q, cu_k = packed(rng, "prefill", kv_heads=4, value_dim=24)
    fused = np.concatenate([q, k, v], axis=1)  # [T, 3 H, D], as a projection writes it
    out = np.full((215, 8, 24), np.nan, np.float32)[:, 2:6]
    parts = fused[:, :4], fused[:, 4:8], fused[:, 8:]
    returned = la.attention_varlen(*parts, cu_q, cu_k, causal=True, out=out)
    assert returned is out
    np.testing.assert_array_equal(out, la.attention_varlen(q, k, v, cu_q, cu_k, causal=True))
