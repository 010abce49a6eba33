"""`index_sparse_attention` and `RowLists` against dense attention with the mask and bias they stand for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import longattn as la
import tolerances
from longattn import _core
from longattn.reference import dense as reference
from longattn.sparse.index_sparse_attention import METHOD
from random_arrays import BF16, DTYPES, F32, LAYOUTS, normal, qkv
from random_lists import over_heads, random_lists
from running import on_threads, running_on
from score_options import options_for


def check(q, k, v, lists, *, offset=0.0, **options):
    out, lse = la.index_sparse_attention(q, k, v, lists, return_lse=True, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    dense = over_heads(lists.to_dense_mask(), q.shape[0], q.shape[1])
    bias = over_heads(np.where(lists.to_dense_mask(), lists.to_dense_bias(), 0), q.shape[0], q.shape[1])
    given = dict(options)
    if "mask" in options:
        dense = dense & given.pop("mask")
    if "bias" in options:
        bias = bias + given.pop("bias").astype(np.float64)
    expected, expected_lse = reference.attention(q, k, v, mask=dense, bias=bias, return_lse=True, **given)
    largest = 0.0 if lists.bias is None else float(np.abs(lists.bias[np.isfinite(lists.bias)]).max(initial=0.0))
    tolerance = tolerances.attention(q, k, v, scale=options.get("scale"), offset=offset + largest, together=8)
    tolerance.check(out, expected, lse, expected_lse)
    return out, lse


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("block_q", [1, 2, 16, 100, 500])
@pytest.mark.parametrize("bias", [False, True])
def test_reference(rng, isa, heads, block_q, bias):
    q, k, v = qkv(rng, batch=2, heads=8, kv_heads=2, rows=130, keys=170, dim=24, value_dim=20)
    lists = random_lists(rng, batch=2, heads=heads, lengths=(130, 170), block_q=block_q, bias=bias)
    check(q, k, v, lists)
    check(q, k, v, lists, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_q", [1, 16])
def test_dtypes_and_layouts(rng, isa, dtype, layout, block_q):
    q, k, v = qkv(rng, batch=2, rows=70, keys=90, dim=24, q_dtype=dtype, layout=layout)
    check(q, k, v, random_lists(rng, heads=4, lengths=(70, 90), block_q=block_q, bias=True), causal=True)


@pytest.mark.parametrize("dim", [1, 5, 64, 128, 200])
def test_dims(rng, isa, dim):
    q, k, v = qkv(rng, heads=2, kv_heads=1, rows=200, keys=600, dim=dim, q_dtype=BF16)
    check(q, k, v, random_lists(rng, heads=2, lengths=(200, 600), block_q=64), causal=True)


@settings(max_examples=12 * len(_core.available_isas()))
@given(
    problem=options_for(), seed=st.integers(0, 2**32 - 1), block_q=st.integers(1, 80), bias=st.booleans(),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]), per=st.sampled_from(["one", "kv", "query"]),
    isa=st.sampled_from(_core.available_isas()),
)  # fmt: skip
def test_any_problem(*, problem, seed, block_q, bias, density, per, isa):
    """With every option of dense attention."""
    q, k, options, offset = problem
    rng = np.random.default_rng(seed)
    v = normal(rng, (*k.shape[:-1], 8), k.dtype)
    heads = {"one": 1, "kv": k.shape[1], "query": q.shape[1]}[per]
    lists = random_lists(
        rng, heads=heads, lengths=(q.shape[2], k.shape[2]), block_q=block_q, density=density, bias=bias
    )
    with running_on(isa):
        check(q, k, v, lists, offset=offset, **options)


@pytest.mark.parametrize("block_q", [1, 40])
def test_state(rng, isa, block_q):
    q, k, v = qkv(rng, rows=40, keys=80)
    earlier = la.attention(q, *(normal(rng, (1, 2, 9, 16)) for _ in range(2)), return_lse=True)
    check(q, k, v, random_lists(rng, lengths=(40, 80), block_q=block_q), state=earlier)


def test_every_key_is_dense_attention(rng, isa):
    q, k, v = qkv(rng, rows=50, keys=300, dim=32)
    lists = random_lists(rng, lengths=(50, 300), density=2.0)
    out, lse = la.index_sparse_attention(q, k, v, lists, causal=True, return_lse=True)
    tolerances.same_storage(q, k, v).check(out, *la.attention(q, k, v, causal=True, return_lse=True)[:1])
    assert lists.density() == 1 and np.isfinite(lse).all()


def test_one_key_gives_its_value(rng, isa):
    q, k, v = qkv(rng, rows=30, keys=40)
    one = rng.integers(0, 40, 30)
    lists = la.RowLists(indptr=np.arange(31)[None, None], indices=one, lengths=(30, 40), block_q=1)
    out = la.index_sparse_attention(q, k, v, lists)
    np.testing.assert_allclose(out, np.repeat(v, 2, axis=1)[:, :, one], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bias", [False, True])
def test_the_method_reference(rng, bias):
    q, k, v = qkv(rng, batch=2, rows=30, keys=40)
    lists = random_lists(rng, heads=2, lengths=(30, 40), block_q=4, first_q=3, bias=bias)
    options = {"causal": True, "scale": 0.5, "bias": rng.standard_normal((30, 40)).astype(F32)}
    out, lse = la.index_sparse_attention(q, k, v, lists, return_lse=True, **options)
    expected = METHOD.reference(q, k, v, lists, return_lse=True, **options)
    tolerances.attention(q, k, v, scale=0.5, offset=8.0).check(out, expected[0], lse, expected[1])


def test_log_counts_are_repeated_keys(rng, isa):
    q, k, v = qkv(rng, rows=6, keys=4)
    lists = la.RowLists(
        indptr=np.array([[[0, 3]]]),
        indices=np.array([0, 1, 3]),
        bias=np.log([2.0, 1.0, 3.0]),
        lengths=(6, 4),
        block_q=6,
    )
    repeated = [x[:, :, [0, 0, 1, 3, 3, 3]] for x in (k, v)]
    out = la.index_sparse_attention(q, k, v, lists)
    tolerances.same_storage(q, k, v, offset=2).check(out, la.attention(q, *repeated))


def test_hidden_nan_stays_hidden(rng, isa):
    q, k, v = qkv(rng, rows=64, keys=64)
    for block_q in (1, 16):
        lists = random_lists(rng, lengths=(64, 64), block_q=block_q)
        expected = la.index_sparse_attention(q, k, v, lists, causal=True)
        hidden = ~(lists.to_dense_mask()[0, 0] & np.tri(64, dtype=bool))
        key = int(np.argmax(hidden.sum(axis=0)))
        bad_k, bad_v = k.copy(), v.copy()
        bad_k[:, :, key], bad_v[:, :, key] = np.nan, np.inf
        out = la.index_sparse_attention(q, bad_k, bad_v, lists, causal=True)
        rows = hidden[:, key]
        tolerances.same_storage(q, k, v).check(out[:, :, rows], expected[:, :, rows])
        assert np.isnan(out[:, :, ~rows]).all()


@pytest.mark.parametrize("rows", [1, 20])
def test_any_number_of_threads(rng, rows):
    q, k, v = qkv(rng, heads=2, kv_heads=1, rows=rows, keys=9000, dim=32)
    lists = random_lists(rng, heads=2, lengths=(rows, 9000), block_q=20, bias=True)
    results = on_threads(lambda: la.index_sparse_attention(q, k, v, lists))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    check(q, k, v, lists)


def test_empty_lists():
    q, k = np.ones((1, 2, 4, 8), np.float32), np.ones((1, 1, 6, 8), np.float32)
    none = la.RowLists(indptr=np.zeros((1, 2, 5), np.int64), indices=np.zeros(0, np.int64), lengths=(4, 6), block_q=1)
    out, lse = la.index_sparse_attention(q, k, k, none, return_lse=True)
    assert (out == 0).all() and (lse == -np.inf).all() and none.density() == 0


# Lists


@pytest.mark.parametrize("lengths", [(50, 61), (61, 50), (1, 40), (33, 33)])
def test_density_counts_pairs(rng, lengths):
    lists = random_lists(rng, heads=2, lengths=lengths, block_q=8, first_q=3)
    dense, seen = lists.to_dense_mask(), np.tri(*lengths, lengths[1] - lengths[0], dtype=bool)
    assert lists.pairs() == dense.sum() and lists.pairs(causal=True) == (dense & seen).sum()
    assert lists.density() == pytest.approx(dense.mean())
    assert lists.density(causal=True) == pytest.approx((dense & seen).sum() / (2 * seen.sum()))


def test_union_and_intersection(rng):
    one, other = (random_lists(rng, batch=2, heads=3) for _ in range(2))
    np.testing.assert_array_equal((one | other).to_dense_mask(), one.to_dense_mask() | other.to_dense_mask())
    np.testing.assert_array_equal((one & other).to_dense_mask(), one.to_dense_mask() & other.to_dense_mask())
    with pytest.raises(ValueError, match=r"other: got lists with a bias, expected none"):
        one | random_lists(rng, batch=2, heads=3, bias=True)
    with pytest.raises(TypeError, match=r"other: got NoneType, expected RowLists"):
        one & None


def fields(**change):
    return {"indptr": np.array([[[0, 1, 3]]]), "indices": np.array([0, 1, 5]), "lengths": (8, 6), "block_q": 4} | change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": np.array([0, 5, 1])}, ValueError, r"indices: got 5, then 1 in one list"),
        ({"indices": np.array([0, 1, 6])}, ValueError, r"indices: got numbers from 0 to 6, expected 0 to 5"),
        ({"indptr": np.array([[[0, 2, 1]]])}, ValueError, r"indptr: got bounds that leave gaps, fall or"),
        ({"bias": np.zeros(2, F32)}, ValueError, r"bias: got shape \(2,\), expected \(3,\) as indices"),
        ({"bias": np.zeros(3, int)}, TypeError, r"bias: got dtype int64"),
        ({"block_q": 0}, ValueError, r"block_q: got 0, expected at least 1"),
    ],
)
def test_bad_lists(change, error, message):
    la.RowLists(**fields())
    with pytest.raises(error, match=message):
        la.RowLists(**fields(**change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lists": [1, 2]}, TypeError, r"lists: got list, expected RowLists"),
        ({"q": np.ones((1, 4, 9, 16), F32)}, ValueError, r"lists: got lengths \(8, 6\), expected \(9, 6\)"),
        ({"return_lse": 1}, TypeError, r"return_lse: got 1"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=8, keys=6)
    arguments = {"q": q, "k": k, "v": v, "lists": la.RowLists(**fields())} | change
    with pytest.raises(error, match=message):
        la.index_sparse_attention(**arguments)
