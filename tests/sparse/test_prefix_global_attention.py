"""`prefix_global_attention`: a global prefix and windows in one softmax."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.sparse import prefix_global_attention, t5_relative_table
from longattn.sparse.prefix_global_attention import METHOD
from random_arrays import DTYPES, F32, LAYOUTS, qkv


def check(q, k, v, **options):
    out, lse = prefix_global_attention(q, k, v, return_lse=True, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    expected = METHOD.reference(q, k, v, return_lse=True, **options)
    table = options.get("relative_bias")
    offset = 0.0 if table is None else float(np.abs(table).max())
    tolerance = tolerances.attention(q, k, v, scale=options.get("scale"), offset=offset)
    tolerance.check(out, expected[0], lse, expected[1])
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("prefix", "radius"), [(0, 5), (7, 0), (16, 9), (70, 3), (90, 90)])
def test_reference(rng, isa, prefix, radius, causal, biased):
    q, k, v = qkv(rng, batch=2, heads=4, kv_heads=2, rows=70, keys=70, value_dim=12)
    table = 0.5 * rng.standard_normal((4, 41)).astype(F32) if biased else None
    check(q, k, v, prefix=prefix, radius=radius, causal=causal, relative_bias=table)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, dtype, layout):
    q, k, v = qkv(rng, batch=2, heads=6, kv_heads=2, rows=50, keys=50, dim=32, q_dtype=dtype, layout=layout)
    check(q, k, v, prefix=8, radius=6, scale=0.3)


def test_t5_buckets(rng, isa):
    q, k, v = qkv(rng, rows=90, keys=90)
    table = t5_relative_table(rng.standard_normal((32, 4)), max_distance=40)
    check(q, k, v, prefix=9, radius=12, relative_bias=table, scale=1.0)


def test_rank_3_and_torch(rng):
    q, k, v = (x[0] for x in qkv(rng, rows=50, keys=50))
    out, lse = prefix_global_attention(q, k, v, prefix=8, radius=6, return_lse=True)
    np.testing.assert_array_equal(out, prefix_global_attention(q[None], k[None], v[None], prefix=8, radius=6)[0])
    assert lse.shape == (4, 50)
    torch = pytest.importorskip("torch")
    tensors = (torch.from_numpy(x) for x in (q, k, v))
    np.testing.assert_array_equal(prefix_global_attention(*tensors, prefix=8, radius=6).numpy(), out)


# Identities


@pytest.mark.parametrize(("prefix", "radius"), [(50, 0), (60, 2), (0, 50), (3, 49)])
def test_all_global_or_all_near_is_dense(rng, isa, prefix, radius):
    q, k, v = qkv(rng, rows=50, keys=50)
    out = prefix_global_attention(q, k, v, prefix=prefix, radius=radius)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v))


def test_no_prefix_is_a_window(rng, isa):
    q, k, v = qkv(rng, rows=50, keys=50)
    out = prefix_global_attention(q, k, v, prefix=0, radius=7)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, window=(7, 7)))


def test_causal_is_sinks_and_a_window(rng, isa):
    q, k, v = qkv(rng, rows=60, keys=60)
    out = prefix_global_attention(q, k, v, prefix=4, radius=10, causal=True)
    at = np.arange(60)
    seen = (at < 4) | (at >= at[:, None] - 10)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=True, mask=seen))


def test_sequences_of_other_lengths_and_prefixes(rng):
    q, k, v = qkv(rng, batch=5, rows=50, keys=50)
    lengths, prefix = np.array([50, 20, 0, 20, 7]), np.array([8, 8, 3, 8, 9])
    out = check(q, k, v, prefix=prefix, radius=6, lengths=lengths)
    alone = prefix_global_attention(q[3:4, :, :20], k[3:4, :, :20], v[3:4, :, :20], prefix=8, radius=6)
    np.testing.assert_array_equal(out[3:4, :, :20], alone)
    assert (out[2] == 0).all() and (out[1, :, 20:] == 0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prefix": -1}, ValueError, r"prefix: got -1"),
        ({"prefix": np.array([1, 2])}, ValueError, r"prefix: got \[1, 2\], expected 1 numbers"),
        ({"prefix": np.array([1.0])}, TypeError, r"prefix: got dtype float64"),
        ({"radius": -1}, ValueError, r"radius: got -1"),
        ({"causal": 1}, TypeError, r"causal: got 1"),
        ({"relative_bias": np.zeros((4, 8), F32)}, ValueError, r"relative_bias: got shape \(4, 8\)"),
        ({"lengths": np.array([31])}, ValueError, r"lengths: got \[31\]"),
        ({"q": np.zeros((1, 4, 29, 16), F32)}, ValueError, r"k: got length 30, expected 29 as in q"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=30, keys=30)
    with pytest.raises(error, match=message):
        prefix_global_attention(**({"q": q, "k": k, "v": v, "prefix": 4} | change))
