"""`block_sparse_attention` and `BlockMask` against dense attention with the mask they stand for."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import longattn as la
import tolerances
from longattn import _core
from longattn.reference import dense as reference
from longattn.sparse.block_sparse_attention import METHOD
from random_arrays import BF16, DTYPES, F16, F32, LAYOUTS, normal, qkv
from random_lists import over_heads, random_mask
from running import on_threads, running_on
from score_options import options_for


def check(q, k, v, blocks, *, offset=0.0, **options):
    out, lse = la.block_sparse_attention(q, k, v, blocks, return_lse=True, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    dense = over_heads(blocks.to_dense_mask(), q.shape[0], q.shape[1])
    if "mask" in options:
        dense = dense & options.pop("mask")
    expected, expected_lse = reference.attention(q, k, v, mask=dense, return_lse=True, **options)
    tolerance = tolerances.attention(q, k, v, scale=options.get("scale"), offset=offset, together=8)
    tolerance.check(out, expected, lse, expected_lse)
    return out, lse


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (64, 32), (50, 7), (1, 8), (100, 1), (500, 200)])
def test_reference(rng, isa, heads, block_q, block_k):
    q, k, v = qkv(rng, batch=2, heads=8, kv_heads=2, rows=130, keys=170, dim=24, value_dim=20)
    mask = random_mask(rng, batch=2, heads=heads, lengths=(130, 170), block_q=block_q, block_k=block_k)
    check(q, k, v, mask)
    check(q, k, v, mask, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, isa, dtype, layout):
    q, k, v = qkv(rng, batch=2, rows=70, keys=90, dim=24, q_dtype=dtype, layout=layout)
    check(q, k, v, random_mask(rng, heads=4, lengths=(70, 90)), causal=True)


@pytest.mark.parametrize("dim", [1, 5, 64, 128, 200])
def test_dims(rng, isa, dim):
    q, k, v = qkv(rng, heads=2, kv_heads=1, rows=200, keys=600, dim=dim, q_dtype=BF16)
    check(q, k, v, random_mask(rng, heads=2, lengths=(200, 600), block_q=64, block_k=64), causal=True)


@pytest.mark.parametrize("first_q", [1, 7, 16])
def test_first_block(rng, isa, first_q):
    q, k, v = qkv(rng, rows=60, keys=60)
    check(q, k, v, random_mask(rng, lengths=(60, 60), first_q=first_q), causal=True)


@settings(max_examples=12 * len(_core.available_isas()))
@given(
    problem=options_for(), seed=st.integers(0, 2**32 - 1), block_q=st.integers(1, 80), block_k=st.integers(1, 80),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]), per=st.sampled_from(["one", "kv", "query"]),
    isa=st.sampled_from(_core.available_isas()),
)  # fmt: skip
def test_any_problem(*, problem, seed, block_q, block_k, density, per, isa):
    """With every option of dense attention."""
    q, k, options, offset = problem
    rng = np.random.default_rng(seed)
    v = normal(rng, (*k.shape[:-1], 8), k.dtype)
    heads = {"one": 1, "kv": k.shape[1], "query": q.shape[1]}[per]
    lengths = (q.shape[2], k.shape[2])
    mask = random_mask(rng, heads=heads, lengths=lengths, block_q=block_q, block_k=block_k, density=density)
    with running_on(isa):
        check(q, k, v, mask, offset=offset, **options)


BOUNDS_Q, BOUNDS_K = np.array([0, 40, 40, 41, 150]), np.array([0, 45, 50, 60, 170])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [(1, 8), (16, 16), (33, 20), (150, 64)])
def test_packed_sequences(rng, isa, causal, block):
    q, k, v = qkv(rng, heads=4, kv_heads=2, rows=150, keys=170, value_dim=12)
    mask = random_mask(rng, heads=2, lengths=(150, 170), block_q=block[0], block_k=block[1])
    options = {"cu_seqlens_q": BOUNDS_Q, "cu_seqlens_k": BOUNDS_K, "causal": causal}
    options |= {"scale": rng.random(4).astype(F32), "sinks": rng.standard_normal(4).astype(F32), "softcap": 3.0}
    out, lse = la.block_sparse_attention(q, k, v, mask, return_lse=True, **options)
    given = options | {"scale": options["scale"][:, None]}
    expected = METHOD.reference(q, k, v, mask, return_lse=True, **given)
    tolerances.attention(q, k, v, scale=1.0, offset=4.0).check(out, expected[0], lse, expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences_are_sequences_by_themselves(rng, isa, dtype):
    q, k, v = (x[0] for x in qkv(rng, rows=160, keys=160, q_dtype=dtype))
    mask = random_mask(rng, lengths=(160, 160), block_q=16, block_k=16)
    bounds = np.array([0, 48, 160])
    out = la.block_sparse_attention(q, k, v, mask, causal=True, window=(40, -1), cu_seqlens_q=bounds)
    for first, last in ((0, 48), (48, 160)):
        blocks = mask.blocks()[..., first // 16 : last // 16, first // 16 : last // 16]
        part = la.BlockMask.from_blocks(blocks, lengths=(last - first,) * 2, block_q=16, block_k=16)
        own = [x[:, first:last] for x in (q, k, v)]
        expected = la.block_sparse_attention(*own, part, causal=True, window=(40, -1))
        tolerances.same_storage(*own).check(out[:, first:last], expected)


def test_all_blocks_are_dense_attention(rng, isa):
    q, k, v = qkv(rng, batch=2, rows=130, keys=170)
    for block in (16, 100):
        every = np.ones((-(-130 // block), -(-170 // block)), bool)
        mask = la.BlockMask.from_blocks(every, lengths=(130, 170), block_q=block, block_k=block)
        for causal in (False, True):
            out = la.block_sparse_attention(q, k, v, mask, causal=causal)
            tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=causal))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cut_masks_give_the_same_bits(rng, isa, dtype):
    """Neighbours with the same list go together: how finely a mask is cut does not matter."""
    q, k, v = qkv(rng, heads=4, kv_heads=2, rows=512, keys=512, dim=24, q_dtype=dtype)
    mask = random_mask(rng, heads=4, lengths=(512, 512), block_q=64, block_k=64)
    for q_parts, k_parts in ((4, 1), (4, 4), (1, 2)):
        fine = np.repeat(np.repeat(mask.blocks(), q_parts, axis=2), k_parts, axis=3)
        sizes = {"block_q": 64 // q_parts, "block_k": 64 // k_parts}
        cut = la.BlockMask.from_blocks(fine, lengths=(512, 512), **sizes)
        for options in ({}, {"causal": True}):
            results = (la.block_sparse_attention(q, k, v, x, return_lse=True, **options) for x in (mask, cut))
            for ours, theirs in zip(*results, strict=True):
                np.testing.assert_array_equal(ours, theirs)
        # Where a window cuts lists elsewhere, sums are of other pieces.
        check(q, k, v, cut, causal=True, window=(100, -1))


@pytest.mark.parametrize("sizes", [((64, 64), (96, 32)), ((64, 16), (48, 48)), ((100, 70), (64, 128))])
def test_mixed_block_sizes(rng, isa, sizes):
    """A union of masks of different blocks, and heads with masks of different blocks, in one call."""
    q, k, v = qkv(rng, heads=4, kv_heads=2, rows=384, keys=384, dim=24)
    masks = [random_mask(rng, lengths=(384, 384), block_q=a, block_k=b, density=0.3) for a, b in sizes]
    check(q, k, v, masks[0] | masks[1], causal=True)
    which = [0, 1, 1, 0]
    heads = la.sparse.PerHead([lambda *_, causal, scale, m=m: m for m in masks], which)(q, k)
    check(q, k, v, heads)
    dense = np.concatenate([masks[w].to_dense_mask() for w in which], axis=1)
    np.testing.assert_array_equal(heads.to_dense_mask(), dense)


def test_state(rng, isa):
    q, k, v = qkv(rng, rows=40, keys=80)
    earlier = la.attention(q, *(normal(rng, (1, 2, 9, 16)) for _ in range(2)), return_lse=True)
    check(q, k, v, random_mask(rng, lengths=(40, 80)), state=earlier)


def test_parts_continue_one_another(rng, isa):
    q, k, v = qkv(rng, rows=100, keys=130)
    mask, other = random_mask(rng), random_mask(rng)
    rest = la.BlockMask.from_blocks(other.blocks() & ~mask.blocks(), lengths=(100, 130), block_q=16, block_k=8)
    first = la.block_sparse_attention(q, k, v, mask, return_lse=True)
    second = la.block_sparse_attention(q, k, v, rest, state=first)
    tolerances.same_storage(q, k, v).check(second, la.block_sparse_attention(q, k, v, mask | other))


def test_skipping_is_bounded(rng, isa):
    q, k, v = qkv(rng, rows=64, keys=1024)
    q[..., 0], q[..., 1:] = 4.0, 0.3 * q[..., 1:]
    k[..., 0] = np.repeat(np.float32([0, -3, -10, -8]), 256) + 0.3 * k[..., 0]
    mask = random_mask(rng, lengths=(64, 1024), block_q=64, block_k=32)
    exact, lse = la.block_sparse_attention(q, k, v, mask, return_lse=True)
    out, less = la.block_sparse_attention(q, k, v, mask, skip_threshold=1e-3, return_lse=True)
    assert (np.abs(out - exact) <= 2 * 1024 * 1e-3 * np.abs(v).max()).all() and (less <= lse + 1e-5).all()
    assert (out != exact).any()


@pytest.mark.parametrize("rows", [4, 64, 200])
def test_what_lies_below_the_threshold_is_skipped(rng, isa, rows):
    """Keys of a hundredth of the largest weight count for a threshold below that, and for one above they do not."""
    q, k, v = qkv(rng, rows=rows, keys=1024, dim=16)
    q[:], k[:] = 0.0, 0.01 * k
    q[..., 0] = 4.0  # logits are the keys' first numbers, but for a little
    k[..., 0] -= np.where(np.arange(1024) < 256, 0, np.log(100)).astype(np.float32)
    v[:, :, 256:] += 50.0
    mask = la.BlockMask.from_blocks(np.ones((1, 4), bool), lengths=(rows, 1024), block_q=rows, block_k=256)
    first = la.BlockMask.from_blocks(np.eye(1, 4, dtype=bool), lengths=(rows, 1024), block_q=rows, block_k=256)
    every, near = (la.block_sparse_attention(q, k, v, x, return_lse=True) for x in (mask, first))
    assert np.abs(every[0] - near[0]).min() > 0.5 and (every[1] - near[1] > 0.02).all()
    for threshold, (expected, expected_lse) in ((0.05, near), (0.002, every)):
        out, lse = la.block_sparse_attention(q, k, v, mask, skip_threshold=threshold, return_lse=True)
        tolerances.same_storage(q, k, v).check(out, expected, lse, expected_lse)


def test_codes(rng, isa):
    q, k, v = (x[0] for x in qkv(rng, rows=40, keys=60, dim=32))
    store = la.KVStore(2, 32, dtype="int8", capacity=64)
    store.append(k, v)
    mask = random_mask(rng, lengths=(40, 60))
    out = la.block_sparse_attention(q, store.keys, store.values, mask, causal=True)
    decoded = [np.asarray(x) for x in (store.keys, store.values)]
    tolerances.same_storage(q, *decoded).check(out, la.block_sparse_attention(q, *decoded, mask, causal=True))


def test_hidden_nan_stays_hidden(rng, isa):
    q, k, v = qkv(rng, rows=64, keys=64)
    mask = random_mask(rng, lengths=(64, 64), block_q=16, block_k=16, density=0.5)
    expected = la.block_sparse_attention(q, k, v, mask, causal=True)
    hidden = ~(mask.to_dense_mask()[0, 0] & np.tri(64, dtype=bool))
    key = int(np.argmax(hidden.sum(axis=0)))
    k[:, :, key], v[:, :, key] = np.nan, np.inf
    out = la.block_sparse_attention(q, k, v, mask, causal=True)
    rows = hidden[:, key]
    tolerances.same_storage(q, np.nan_to_num(k), np.ones_like(v)).check(out[:, :, rows], expected[:, :, rows])
    assert np.isnan(out[:, :, ~rows]).all()


@pytest.mark.parametrize(
    ("heads", "block_q", "dtype"), [(1, 1, F32), (2, 1, BF16), (4, 1, F16), (4, 5, F32), (2, 11, BF16)]
)
def test_lists_of_few_queries(rng, isa, heads, block_q, dtype):
    q, k, v = qkv(rng, batch=2, rows=140, keys=150, dim=24, value_dim=20, q_dtype=dtype)
    mask = random_mask(rng, heads=heads, lengths=(140, 150), block_q=block_q, block_k=30)
    check(q, k, v, mask)
    check(q, k, v, mask, causal=True, softcap=2.0)
    check(q, k, v, random_mask(rng, batch=2, lengths=(140, 150), block_q=1, block_k=7), window=(90, 40))


def test_lists_of_few_queries_hide_nan(rng, isa):
    q, k, v = qkv(rng, rows=64, keys=64)
    mask = random_mask(rng, lengths=(64, 64), block_q=1, block_k=8, density=0.6)
    clean = la.block_sparse_attention(q, k, v, mask, causal=True)
    v[:, :, 40] = np.nan
    out = la.block_sparse_attention(q, k, v, mask, causal=True)
    sees = mask.to_dense_mask()[0, 0, :, 40] & (np.arange(64) >= 40)
    assert np.isnan(out[:, :, sees]).all() and sees.any()
    tolerances.same_storage(q, k, np.nan_to_num(v)).check(out[:, :, ~sees], clean[:, :, ~sees])


def test_lists_of_few_queries_on_any_number_of_threads(rng):
    q, k, v = qkv(rng, rows=3000, keys=3000)
    mask = random_mask(rng, lengths=(3000, 3000), block_q=1, block_k=100)
    found = on_threads(lambda: la.block_sparse_attention(q, k, v, mask, causal=True), (1, 2))
    np.testing.assert_array_equal(*found)


def test_any_number_of_threads(rng):
    q, k, v = qkv(rng, heads=2, kv_heads=1, rows=20, keys=9000, dim=32)
    mask = random_mask(rng, heads=2, lengths=(20, 9000), block_q=20, block_k=100)
    results = on_threads(lambda: la.block_sparse_attention(q, k, v, mask))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    check(q, k, v, mask)


def test_calls_at_the_same_time(rng):
    """Packed heads have memory that stays from call to call."""
    cases = []
    for dim in (16, 40, 64):
        q, k, v = qkv(rng, rows=768, keys=768, dim=dim)
        cases.append((q, k, v, random_mask(rng, lengths=(768, 768), block_q=64, block_k=64)))
    expected = [la.block_sparse_attention(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: la.block_sparse_attention(*cases[i % 3]), range(24)))
    for i, out in enumerate(found):
        np.testing.assert_array_equal(out, expected[i % 3])


def test_empty_lists_and_no_rows():
    q, k = np.ones((1, 2, 4, 8), np.float32), np.ones((1, 1, 6, 8), np.float32)
    none = la.BlockMask.from_blocks(np.zeros((2, 3), bool), lengths=(4, 6), block_q=2, block_k=2)
    out, lse = la.block_sparse_attention(q, k, k, none, return_lse=True)
    assert (out == 0).all() and (lse == -np.inf).all()
    empty = la.BlockMask.from_blocks(np.zeros((0, 3), bool), lengths=(0, 6), block_q=2, block_k=2)
    assert la.block_sparse_attention(q[:, :, :0], k, k, empty).shape == (1, 2, 0, 8)
    assert empty.density() == 0 and (empty | empty).indices.size == 0


def test_torch_tensors_rank_3_and_out(rng):
    torch = pytest.importorskip("torch")
    q, k, v = (x[0] for x in qkv(rng, rows=20, keys=30, q_dtype=F16))
    mask = random_mask(rng, lengths=(20, 30))
    expected = la.block_sparse_attention(q, k, v, mask)
    out = torch.empty(4, 20, 16, dtype=torch.float16)
    given, lse = la.block_sparse_attention(*map(torch.from_numpy, (q, k, v)), mask, out=out, return_lse=True)
    assert given is out and lse.shape == (4, 20)
    np.testing.assert_array_equal(out.numpy(), expected)


# Masks


def test_blocks_and_back(rng):
    mask = random_mask(rng, batch=2, heads=3, lengths=(50, 61), block_q=8, block_k=10)
    assert mask.shape == (2, 3, 7)
    again = la.BlockMask.from_blocks(mask.blocks(), lengths=(50, 61), block_q=8, block_k=10)
    np.testing.assert_array_equal(again.indptr, mask.indptr)
    np.testing.assert_array_equal(again.indices, mask.indices)
    dense = mask.to_dense_mask()
    assert dense.shape == (2, 3, 50, 61)
    assert dense[1, 2, 49, 60] == mask.blocks()[1, 2, 6, 6]


@pytest.mark.parametrize("lengths", [(50, 61), (61, 50), (1, 40), (33, 33)])
def test_density_counts_pairs(rng, lengths):
    mask = random_mask(rng, heads=2, lengths=lengths, block_q=8, block_k=10, first_q=3)
    dense, seen = mask.to_dense_mask(), np.tri(*lengths, lengths[1] - lengths[0], dtype=bool)
    assert mask.pairs() == dense.sum() and mask.pairs(causal=True) == (dense & seen).sum()
    assert mask.density() == pytest.approx(dense.mean())
    assert mask.density(causal=True) == pytest.approx((dense & seen).sum() / (2 * seen.sum()))


def test_union_and_intersection(rng):
    one, other = (random_mask(rng, batch=2, heads=3) for _ in range(2))
    np.testing.assert_array_equal((one | other).blocks(), one.blocks() | other.blocks())
    np.testing.assert_array_equal((one & other).blocks(), one.blocks() & other.blocks())


def test_plot(rng):
    pytest.importorskip("matplotlib").use("Agg")
    mask = random_mask(rng, batch=2, heads=2)
    ax = mask.plot(batch=1, head=1)
    (drawn,) = ax.collections
    np.testing.assert_array_equal(drawn.get_array(), mask.blocks()[1, 1])
    places = drawn.get_coordinates()
    np.testing.assert_array_equal(places[0, :, 0], mask.key_bounds)
    np.testing.assert_array_equal(places[:, 0, 1], mask.query_bounds)
    assert ax.get_xlim() == (0, 130) and ax.get_ylim() == (100, 0)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")


def fields(**change):
    return {
        "indptr": np.array([[[0, 1, 3]]]), "indices": np.array([0, 1, 2]), "lengths": (8, 12), "block_q": 4,
        "block_k": 4,
    } | change  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": np.array([0, 2, 1])}, ValueError, r"indices: got 2, then 1 in one list, expected each list asc"),
        ({"indices": np.array([0, 1, 1])}, ValueError, r"indices: got 1, then 1 in one list"),
        ({"indices": np.array([0, 1, 3])}, ValueError, r"indices: got numbers from 0 to 3, expected 0 to 2"),
        ({"indices": np.array([-1, 1, 2])}, ValueError, r"indices: got numbers from -1 to 2"),
        ({"indices": np.array([0.0, 1.0, 2.0])}, TypeError, r"indices: got dtype float64, expected integers"),
        ({"indices": np.array([[0, 1, 2]])}, ValueError, r"indices: got shape \(1, 3\), expected rank 1"),
        ({"indptr": np.array([[[0, 2, 1]]])}, ValueError, r"indptr: got bounds that leave gaps, fall or"),
        ({"indptr": np.array([[[0, 1, 2]]])}, ValueError, r"indptr: got bounds that .* do not end at the 3 indices"),
        ({"indptr": np.array([[[1, 1, 3]]])}, ValueError, r"indptr: got bounds"),
        ({"indptr": np.array([0, 1, 3])}, ValueError, r"indptr: got shape \(3,\), expected \[B, H, 3\]"),
        ({"lengths": (13, 12)}, ValueError, r"indptr: got shape \(1, 1, 3\), expected \[B, H, 5\] for 13 queries"),
        ({"lengths": 8}, TypeError, r"lengths: got 8, expected a pair"),
        ({"lengths": (8, -1)}, ValueError, r"lengths\[1\]: got -1, expected at least 0"),
        ({"block_q": 0}, ValueError, r"block_q: got 0, expected at least 1"),
        ({"block_k": 0}, ValueError, r"block_k: got 0, expected at least 1"),
        ({"first_q": 5}, ValueError, r"first_q: got 5, expected 1 to 4"),
        ({"block_q": 9}, ValueError, r"block_q: got 9, expected at most the length, 8"),
        ({"block_k": 13}, ValueError, r"block_k: got 13, expected at most the length, 12"),
        ({"block_k": 2.0}, TypeError, r"block_k: got 2.0, expected an integer"),
    ],
)
def test_bad_masks(change, error, message):
    assert la.BlockMask(**fields()).density() == 0.5
    with pytest.raises(error, match=message):
        la.BlockMask(**fields(**change))


def test_bad_combinations_and_blocks():
    mask = la.BlockMask(**fields())
    with pytest.raises(TypeError, match=r"other: got int, expected a BlockMask"):
        mask & 3
    with pytest.raises(ValueError, match=r"blocks: got 4 key blocks, expected 3"):
        la.BlockMask.from_blocks(np.ones((2, 4), bool), lengths=(8, 12), block_q=4, block_k=4)
    with pytest.raises(TypeError, match=r"blocks: got dtype float64, expected bool"):
        la.BlockMask.from_blocks(np.ones((2, 3)), lengths=(8, 12), block_q=4, block_k=4)
    large = la.BlockMask.from_blocks(np.ones((1, 1), bool), lengths=(2**15, 2**15), block_q=2**15, block_k=2**15)
    with pytest.raises(ValueError, match=r"to_dense_mask: got 1073741824 entries, expected at most"):
        large.to_dense_mask()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block_mask": np.ones((8, 12), bool)}, TypeError, r"block_mask: got ndarray, expected a BlockMask"),
        ({"q": np.ones((1, 4, 9, 16), F32)}, ValueError, r"block_mask: got lengths \(8, 12\), expected \(9, 12\)"),
        ({"q": np.ones((1, 3, 8, 16), F32)}, ValueError, r"q: got 3 heads, expected a positive multiple of the 2"),
        ({"qk_int8": True}, TypeError, r"qk_int8"),
        ({"causal": 1}, TypeError, r"causal: got 1"),
        ({"bias": np.zeros((3, 3))}, ValueError, r"bias: got shape \(3, 3\)"),
        ({"out": np.zeros(3, F32)}, ValueError, r"out: got shape"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=8, keys=12)
    arguments = {"q": q, "k": k, "v": v, "block_mask": la.BlockMask(**fields())} | change
    with pytest.raises(error, match=message):
        la.block_sparse_attention(**arguments)


def test_masks_of_another_number_of_heads(rng):
    q, k, v = qkv(rng, batch=3, heads=12, kv_heads=4, rows=8, keys=12)
    sizes = {"lengths": (8, 12), "block_q": 4, "block_k": 4}
    for heads in (1, 2, 4, 12):
        check(q, k, v, random_mask(rng, heads=heads, **sizes))
    for heads in (3, 5, 6, 24):
        with pytest.raises(ValueError, match=rf"block_mask: got {heads} heads, expected 12 query heads"):
            la.block_sparse_attention(q, k, v, random_mask(rng, heads=heads, **sizes))
    with pytest.raises(ValueError, match=r"block_mask: got batch 2, expected 1 or 3"):
        la.block_sparse_attention(q, k, v, random_mask(rng, batch=2, **sizes))
    with pytest.raises(TypeError, match=r"q: got dtype float64"):
        la.block_sparse_attention(*(x.astype(np.float64) for x in (q, k, v)), random_mask(rng, **sizes))
