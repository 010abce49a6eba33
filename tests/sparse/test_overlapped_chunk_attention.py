"""`overlapped_chunk_attention` and `kernel_pool`: local attention over long text, and relevance by region."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from longattn.sparse import kernel_pool, overlapped_chunk_attention
from random_arrays import DTYPES, F32, LAYOUTS, normal, qkv


def check(q, k, v, **options):
    out = overlapped_chunk_attention(q, k, v, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    expected = reference.overlapped_chunk_attention(q, k, v, **options)
    tolerances.attention(q, k, v, scale=options.get("scale")).check(out, expected)


@pytest.mark.parametrize("length", [1, 4, 5, 9, 47])
@pytest.mark.parametrize(("chunk", "overlap"), [(1, 0), (4, 1), (5, 7), (60, 3)])
@pytest.mark.parametrize("packed", [True, False])
def test_reference(rng, isa, length, chunk, overlap, packed):
    q, k, v = qkv(rng, batch=2, heads=4, kv_heads=2, rows=length, keys=length, value_dim=12)
    check(q, k, v, chunk=chunk, overlap=overlap, packed=packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, dtype):
    q, k, v = qkv(rng, heads=6, kv_heads=2, rows=50, keys=50, dim=32, q_dtype=dtype)
    check(q, k, v, chunk=8, overlap=3, scale=0.3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout):
    check(*qkv(rng, rows=50, keys=50, layout=layout), chunk=8, overlap=3)


def test_ragged_texts(rng):
    q, k, v = qkv(rng, batch=4, rows=50, keys=50)
    lengths = np.array([50, 0, 8, 21])
    check(q, k, v, chunk=8, overlap=3, lengths=lengths)
    out = overlapped_chunk_attention(q, k, v, chunk=8, overlap=3, lengths=lengths)
    alone = overlapped_chunk_attention(q[3:, :, :21], k[3:, :, :21], v[3:, :, :21], chunk=8, overlap=3)
    np.testing.assert_array_equal(out[3:, :, :21], alone)
    assert (out[3, :, 21:] == 0).all() and (out[1] == 0).all()


def test_rank_3_and_torch(rng):
    q, k, v = (x[0] for x in qkv(rng, rows=50, keys=50))
    out = overlapped_chunk_attention(q, k, v, chunk=8, overlap=3)
    np.testing.assert_array_equal(out, overlapped_chunk_attention(q[None], k[None], v[None], chunk=8, overlap=3)[0])
    torch = pytest.importorskip("torch")
    tensors = (torch.from_numpy(x) for x in (q, k, v))
    np.testing.assert_array_equal(overlapped_chunk_attention(*tensors, chunk=8, overlap=3).numpy(), out)


def pooled(rng, query_terms=5, terms=80, width=12, kernels=4):
    arguments = {
        "query": normal(rng, (query_terms, width)),
        "document": normal(rng, (terms, width)),
        "mu": np.linspace(-0.8, 0.8, kernels),
        "sigma": np.full(kernels, 0.2),
        "kernel_weights": rng.standard_normal(kernels),
    }
    saturation = np.array([[0.1, 0.01, 1.0], [0.05, 0.0, 2.0], [0.02, 0.001, 0.3]])
    more = {"saturation": saturation, "query_salience": rng.random(query_terms), "region_weights": rng.random((3, 5))}
    return arguments, more


def same_score(found, expected, weights):
    """Kernels of cosines in float32: slopes of at most `1 / sigma`, at most a region of them, weighted."""
    allowed = tolerances.SAFETY * tolerances.U * 30 * 12 * np.abs(weights).sum() * 5 / 0.2
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=allowed)
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=15 * allowed)


@pytest.mark.parametrize("terms", [1, 12, 29, 30, 31, 80])
@pytest.mark.parametrize("saturated", [False, True])
def test_kernel_pool(rng, terms, saturated):
    arguments, more = pooled(rng, terms=terms)
    arguments |= more if saturated else {}
    found, expected = kernel_pool(**arguments), reference.kernel_pool(**arguments)
    assert len(found[1]) == max(terms - 30, 0) // 2 + 1
    same_score(found, expected, arguments["kernel_weights"])


@pytest.mark.parametrize(("region", "stride", "best"), [(1, 1, 1), (7, 3, 2), (10, 10, 20)])
def test_regions(rng, region, stride, best):
    arguments, _ = pooled(rng)
    arguments |= {"region": region, "stride": stride, "best": best}
    same_score(kernel_pool(**arguments), reference.kernel_pool(**arguments), arguments["kernel_weights"])


def test_nothing_to_pool(rng):
    arguments, _ = pooled(rng, terms=0)
    score, regions = kernel_pool(**arguments)
    assert score == 0 and regions.shape == (0,)


# Identities


@pytest.mark.parametrize("length", [48, 50])
def test_without_overlap_it_is_attention_inside_blocks(rng, isa, length):
    q, k, v = qkv(rng, rows=length, keys=length)
    block = np.arange(length) // 8
    expected = la.attention(q, k, v, segments=(block, block))
    tolerances.same_storage(q, k, v).check(overlapped_chunk_attention(q, k, v, chunk=8, overlap=0), expected)


@pytest.mark.parametrize("overlap", [0, 5])
def test_a_chunk_of_everything_is_attention(rng, isa, overlap):
    q, k, v = qkv(rng, rows=50, keys=50)
    expected = la.attention(q, k, v)
    tolerances.same_storage(q, k, v).check(overlapped_chunk_attention(q, k, v, chunk=50, overlap=overlap), expected)


def test_packed_is_window_by_window(rng, isa):
    q, k, v = qkv(rng, batch=2, rows=50, keys=50)
    packed, single = (overlapped_chunk_attention(q, k, v, chunk=7, packed=p) for p in (True, False))
    tolerances.same_storage(q, k, v).check(packed, single)


def test_a_plain_saturation_changes_nothing(rng):
    arguments, _ = pooled(rng)
    plain = kernel_pool(**arguments)
    one = kernel_pool(**arguments, saturation=np.array([[0.0, 0, 1], [0, 0, 1], [0, 0, 0]]))
    same_score(one, plain, arguments["kernel_weights"])


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"chunk": 0}, ValueError, r"chunk: got 0"),
        ({"overlap": -1}, ValueError, r"overlap: got -1"),
        ({"packed": 1}, TypeError, r"packed: got 1"),
        ({"lengths": np.array([31])}, ValueError, r"lengths: got \[31\], expected 1 numbers from 0 to 30"),
        ({"q": np.zeros((1, 4, 29, 16), F32)}, ValueError, r"k: got length 30, expected 29 as in q"),
        ({"q": np.zeros((1, 4, 30, 16))}, TypeError, r"q: got dtype float64"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=30, keys=30)
    with pytest.raises(error, match=message):
        overlapped_chunk_attention(**({"q": q, "k": k, "v": v} | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": np.zeros((5, 11), F32)}, ValueError, r"document: got width 12, expected 11"),
        ({"document": np.zeros(5, F32)}, ValueError, r"document: got shape \(5,\)"),
        ({"mu": np.zeros((2, 2))}, ValueError, r"mu: got shape \(2, 2\)"),
        ({"sigma": np.zeros(4)}, ValueError, r"sigma: got numbers of at most 0"),
        ({"kernel_weights": np.zeros(3)}, ValueError, r"kernel_weights: got shape \(3,\), expected \(4,\)"),
        ({"saturation": np.zeros((3, 2))}, ValueError, r"saturation: got shape \(3, 2\)"),
        ({"query_salience": np.zeros(4)}, ValueError, r"query_salience: got shape \(4,\)"),
        ({"region_weights": np.zeros((2, 5))}, ValueError, r"region_weights: got shape \(2, 5\)"),
        ({"region": 0}, ValueError, r"region: got 0"),
    ],
)
def test_bad_pools(rng, change, error, message):
    with pytest.raises(error, match=message):
        kernel_pool(**(pooled(rng)[0] | change))
