"""`hyper_attention` against its float64 reference, and its identities."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from longattn.sparse import hyper_attention
from random_arrays import BF16, DTYPES, LAYOUTS, qkv
from running import on_threads

SMALL = {"block_size": 16, "sample_size": 12, "lsh_num_projs": 4, "min_seq_len": 30}


def check(q, k, v, **options):
    options = SMALL | options
    out, lse = hyper_attention(q, k, v, return_lse=True, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    expected, expected_lse = reference.hyper_attention(q, k, v, return_lse=True, **options)
    depth = 1 if not options.get("causal") else 6  # parts that are rounded to storage before they are merged
    tolerance = tolerances.attention(q, k, v, scale=options.get("scale"), offset=6.0)
    roundoff, _ = tolerances.ROUNDOFF[q.dtype]
    atol = depth * (tolerance.atol + roundoff * float(np.abs(v.astype(np.float64)).max()))
    wide = tolerances.Tolerance(atol=atol, rtol=depth * tolerance.rtol, lse_atol=depth * tolerance.lse_atol)
    wide.check(out, expected, lse, expected_lse)
    return out, lse


@pytest.mark.parametrize("order", ["inverse_gray", "reference"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2)])
@pytest.mark.parametrize(("rows", "keys"), [(100, 100), (40, 203), (203, 40), (31, 500), (500, 17)])
def test_reference(rng, isa, order, heads, kv_heads, rows, keys):
    q, k, v = qkv(rng, batch=2, heads=heads, kv_heads=kv_heads, rows=rows, keys=keys, dim=24, value_dim=20)
    check(q, k, v, order=order, seed=3)


@pytest.mark.parametrize(("rows", "keys"), [(100, 100), (255, 255), (61, 130), (1, 90), (30, 30)])
def test_causal(rng, isa, rows, keys):
    check(*qkv(rng, batch=2, rows=rows, keys=keys), causal=True, scale=0.4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [False, True])
def test_dtypes_and_layouts(rng, isa, dtype, layout, causal):
    check(*qkv(rng, rows=90, keys=90, q_dtype=dtype, layout=layout), causal=causal)


def test_no_samples(rng, isa):
    check(*qkv(rng, rows=90, keys=120), sample_size=0)
    check(*qkv(rng, rows=90, keys=90), sample_size=0, causal=True)


def test_it_comes_near_attention(rng):
    """Where keys lie in clusters, own blocks find most of the mass, and samples the rest."""
    centres = rng.standard_normal((16, 32))
    member = rng.integers(0, 16, 2048)
    k = (centres[member] + 0.1 * rng.standard_normal((2048, 32)))[None, None].astype(np.float32)
    q = (3 * centres[rng.integers(0, 16, 2048)])[None, None].astype(np.float32)
    v = rng.standard_normal((16, 32), dtype=np.float32)[member][None, None]
    exact = la.attention(q, k, v)
    both = hyper_attention(q, k, v, min_seq_len=256)
    alone, shuffled = (
        hyper_attention(q, x, y, min_seq_len=256, sample_size=0)
        for x, y in ((k, v), (rng.permutation(k, axis=3), v))  # keys whose hashes say nothing
    )
    missed, of_shuffled, of_both = (np.linalg.norm(x - exact) / np.linalg.norm(exact) for x in (alone, shuffled, both))
    assert of_both < 0.01 and missed < 0.5 < of_shuffled


def test_torch_rank_3_and_out(rng):
    torch = pytest.importorskip("torch")
    q, k, v = (x[0] for x in qkv(rng, rows=90, keys=90, q_dtype=BF16))
    tensors = [torch.from_numpy(x.astype(np.float32)).bfloat16() for x in (q, k, v)]
    out = torch.empty(4, 90, 16, dtype=torch.bfloat16)
    given, lse = hyper_attention(*tensors, **SMALL, out=out, return_lse=True)
    assert given is out and lse.shape == (4, 90)
    expected = hyper_attention(q, k, v, **SMALL).astype(np.float32)
    np.testing.assert_array_equal(out.float().numpy(), expected)


# Identities


@pytest.mark.parametrize("order", ["inverse_gray", "reference"])
def test_one_block_is_dense_attention(rng, isa, order):
    q, k, v = qkv(rng, rows=90, keys=120)
    out, lse = hyper_attention(q, k, v, block_size=120, min_seq_len=10, order=order, return_lse=True)
    expected, expected_lse = la.attention(q, k, v, return_lse=True)
    tolerances.same_storage(q, k, v).check(out, expected, lse, expected_lse)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("min_seq_len", [90, 1000])
def test_short_sequences_are_exact(rng, isa, causal, min_seq_len):
    q, k, v = qkv(rng, rows=90, keys=90)
    out = hyper_attention(q, k, v, causal=causal, min_seq_len=min_seq_len, block_size=8, sample_size=3)
    np.testing.assert_array_equal(out, la.attention(q, k, v, causal=causal))


def test_the_mass_is_unbiased(rng):
    """`exp(lse)` over seeds: within 5 standard errors of its mean, which is small."""
    q, k, v = qkv(rng, heads=1, kv_heads=1, rows=64, keys=128, dim=8)
    _, exact = la.attention(q, k, v, return_lse=True)
    options = {"block_size": 16, "sample_size": 16, "min_seq_len": 8, "lsh_num_projs": 3}
    ratios = np.stack(
        [np.exp(hyper_attention(q, k, v, seed=s, return_lse=True, **options)[1] - exact) for s in range(1500)]
    ).astype(np.float64)
    mean, error = ratios.mean(axis=0), ratios.std(axis=0) / np.sqrt(len(ratios))
    assert (np.abs(mean - 1) < 5 * error).all() and error.max() < 0.03


def test_the_order_of_keys_does_not_matter(rng, isa):
    q, k, v = qkv(rng, rows=90, keys=60, dim=64)
    order = rng.permutation(60)
    options = {**SMALL, "sample_size": 0, "lsh_num_projs": 16}
    one = hyper_attention(q, k, v, **options)
    other = hyper_attention(q, k[:, :, order], v[:, :, order], **options)
    # No two keys have one hash, so there are no ties.
    assert all(len(np.unique(h)) == len(h) for h in _hashes(k, 16)[0])
    tolerances.same_storage(q, k, v).check(one, other)


def _hashes(x, bits):
    directions = np.random.default_rng(0).standard_normal((bits, x.shape[-1]), np.float32)
    return ((x @ directions.T > 0) << np.arange(bits)).sum(axis=-1)


@pytest.mark.parametrize("causal", [False, True])
def test_a_seed_gives_the_same_bits(rng, causal):
    q, k, v = qkv(rng, rows=300, keys=300)
    results = on_threads(lambda: hyper_attention(q, k, v, causal=causal, seed=5, **SMALL))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    assert not np.array_equal(results[0], hyper_attention(q, k, v, causal=causal, seed=6, **SMALL))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block_size": 0}, ValueError, r"block_size: got 0"),
        ({"sample_size": -1}, ValueError, r"sample_size: got -1"),
        ({"lsh_num_projs": 17}, ValueError, r"lsh_num_projs: got 17, expected 1 to 16"),
        ({"min_seq_len": 0}, ValueError, r"min_seq_len: got 0"),
        ({"order": "gray"}, ValueError, r"order: got 'gray', expected 'inverse_gray' or 'reference'"),
        ({"seed": 1.5}, TypeError, r"seed: got 1.5"),
        ({"causal": True, "k": np.zeros((1, 2, 8, 16), np.float32), "v": np.zeros((1, 2, 8, 16), np.float32)},
         ValueError, r"q: got 9 queries, expected at most the 8 keys"),
    ],
)  # fmt: skip
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=9, keys=9)
    with pytest.raises(error, match=message):
        hyper_attention(**({"q": q, "k": k, "v": v} | change))


@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_nothing(rng, rows, keys):
    q, k, v = qkv(rng, rows=rows, keys=keys)
    out, lse = hyper_attention(q, k, v, min_seq_len=1, return_lse=True)
    assert out.shape == q.shape and (out == 0).all() and (lse == -np.inf).all()
