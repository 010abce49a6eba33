"""`power_of_two_attention` against its float64 reference, and its identities."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from longattn.sparse import PowerOfTwo, power_of_two_attention
from random_arrays import DTYPES, LAYOUTS, qkv


def check(q, k, v, **options):
    out, lse = power_of_two_attention(q, k, v, return_lse=True, **options)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    expected, expected_lse = reference.power_of_two_attention(q, k, v, return_lse=True, **options)
    tolerances.attention(q, k, v, scale=options.get("scale")).check(out, expected, lse, expected_lse)
    return out


@pytest.mark.parametrize(("rows", "keys"), [(200, 200), (1, 300), (50, 299), (7, 3), (64, 64)])
@pytest.mark.parametrize("block", [1, 8, 20, 1000])
def test_reference(rng, isa, rows, keys, block):
    q, k, v = qkv(rng, batch=2, heads=4, kv_heads=2, rows=rows, keys=keys, dim=24, value_dim=20)
    check(q, k, v, block=block, n_window=2, scale=0.3)
    check(q, k, v, block=block, n_window=3, n_sink=0, powers=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, isa, dtype, layout):
    check(*qkv(rng, rows=100, keys=130, q_dtype=dtype, layout=layout), block=8, n_window=1)


def test_any_number_of_threads(rng, threads):
    check(*qkv(rng, rows=300, keys=300), block=16)


def test_statistics(rng):
    q, k, v = qkv(rng, heads=4, kv_heads=2, rows=128, keys=128)
    _, stats = power_of_two_attention(q, k, v, block=16, n_window=1, return_stats=True)
    mask = reference.power_of_two_mask(128, 128, block=16, n_window=1) & np.tri(128, dtype=bool)
    assert stats.attended == mask.sum() and stats.scored == 0
    assert stats.density == pytest.approx(mask.sum() / np.tri(128).sum())


# Identities


def test_with_all_blocks_near_it_is_causal_attention(rng, isa):
    q, k, v = qkv(rng, rows=100, keys=150)
    expected = la.attention(q, k, v, causal=True)
    tolerances.same_storage(q, k, v).check(power_of_two_attention(q, k, v, block=16, n_window=10), expected)


def test_without_powers_it_is_first_and_near_blocks(rng, isa):
    q, k, v = qkv(rng, rows=100, keys=100)
    own, other = np.arange(100)[:, None] // 10, np.arange(100) // 10
    mask = (other < 2) | (own - other < 3)
    expected = la.attention(q, k, v, mask=mask, causal=True)
    out = power_of_two_attention(q, k, v, block=10, n_window=3, n_sink=2, powers=False)
    tolerances.same_storage(q, k, v).check(out, expected)


@pytest.mark.parametrize("blocks", [1, 2, 9, 64, 100])
def test_every_earlier_block_is_reached(rng, blocks):
    q = np.zeros((1, 1, 2 * blocks, 4), np.float32)
    mask = PowerOfTwo(block=2, n_window=1, n_sink=0)(q, q).blocks()[0, 0]
    reached = np.eye(blocks, dtype=bool)
    for _ in range(int(np.ceil(np.log2(blocks))) + 1):
        reached = (reached.astype(int) @ mask) > 0
    np.testing.assert_array_equal(reached, np.tri(blocks, dtype=bool))


def test_it_is_dense_attention_with_its_mask(rng, isa):
    q, k, v = qkv(rng, rows=90, keys=130)
    mask = PowerOfTwo(block=16, n_window=1)(q, k)
    expected = la.attention(q, k, v, mask=mask.to_dense_mask(), causal=True)
    tolerances.same_storage(q, k, v).check(power_of_two_attention(q, k, v, block=16, n_window=1), expected)


def test_steps_are_the_prefill(rng, isa):
    q, k, v = qkv(rng, rows=60, keys=60)
    options = {"block": 8, "n_window": 2}
    whole, tolerance = power_of_two_attention(q, k, v, **options), tolerances.same_storage(q, k, v)
    for n in (1, 8, 9, 33, 60):
        step = power_of_two_attention(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], **options)
        tolerance.check(step, whole[:, :, n - 1 : n])
    part = power_of_two_attention(q[:, :, 21:50], k[:, :, :50], v[:, :, :50], **options)
    tolerance.check(part, whole[:, :, 21:50])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block": 0}, ValueError, r"block: got 0, expected at least 1"),
        ({"n_window": 0}, ValueError, r"n_window: got 0"),
        ({"n_sink": -1}, ValueError, r"n_sink: got -1"),
        ({"powers": 1}, TypeError, r"powers: got 1, expected True or False"),
        ({"k": np.zeros((1, 3, 9, 16), np.float32)}, ValueError, r"q: got 4 heads"),
        ({"q": np.zeros((1, 4, 9, 16))}, TypeError, r"q: got dtype float64"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=9, keys=9)
    with pytest.raises(error, match=message):
        power_of_two_attention(**({"q": q, "k": k, "v": v} | change))


def test_the_mask_looks_back_only(rng):
    q, k, v = qkv(rng, rows=9, keys=9)
    with pytest.raises(ValueError, match=r"causal: got False, expected True"):
        la.sparse_attention(q, k, v, PowerOfTwo())


# Selectors in general


def test_a_function_is_a_selector(rng):
    q, k, v = qkv(rng, rows=20, keys=20)
    mask = la.BlockMask.from_blocks(np.ones((2, 2), bool), lengths=(20, 20), block_q=10, block_k=10)
    out, lse, stats = la.sparse_attention(q, k, v, lambda q, k, causal, scale: mask, return_lse=True, return_stats=True)
    tolerances.same_storage(q, k, v).check(out, *la.attention(q, k, v, return_lse=True)[:1])
    assert stats.density == 1 and lse.shape == (1, 4, 20)
    np.testing.assert_array_equal(la.sparse_attention(q, k, v, mask), out)


def test_bad_selectors(rng):
    q, k, v = qkv(rng, rows=9, keys=9)
    with pytest.raises(TypeError, match=r"selector: got int, expected a selector, a BlockMask or RowLists"):
        la.sparse_attention(q, k, v, 3)
    with pytest.raises(TypeError, match=r"selector: got int from it, expected a BlockMask or RowLists"):
        la.sparse_attention(q, k, v, lambda q, k, causal, scale: 3)
