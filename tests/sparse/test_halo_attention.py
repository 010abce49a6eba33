"""HaloNet's attention: blocks of queries with a rim of keys, on one to three axes."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from random_arrays import DTYPES, F32, LAYOUTS, normal

halo_attention = la.sparse.halo_attention


def image(rng, shape=(16, 16), *, batch=1, heads=4, kv_heads=2, dim=16, value_dim=12, dtype=F32, layout="contiguous"):
    q = normal(rng, (batch, heads, *shape, dim), dtype, layout)
    k = normal(rng, (batch, kv_heads, *shape, dim), dtype, layout)
    return q, k, normal(rng, (batch, kv_heads, *shape, value_dim), dtype, layout)


def tables(rng, shape, block, halo, dim=16):
    sizes = np.broadcast_to(block, len(shape)) + np.broadcast_to(halo, len(shape))
    return [0.3 * rng.standard_normal((2 * size - 1, dim)).astype(np.float32) for size in sizes]


def tokens(x):
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def check(q, k, v, **options):
    out, lse = halo_attention(q, k, v, return_lse=True, **options)
    expected, expected_lse = reference.halo_attention(q, k, v, return_lse=True, **options)
    # The relative part is at most this; its products err like the logits' own.
    norms = [np.linalg.norm(t, axis=-1).max() for t in options.get("relative", ())]
    offset = 2 * sum(norms) * np.linalg.norm(q.astype(np.float64), axis=-1).max() if norms else 0.0
    tolerances.attention(tokens(q), tokens(k), tokens(v), offset=offset).check(out, expected, lse, expected_lse)
    assert out.dtype == q.dtype
    return out


@pytest.mark.parametrize("mask_pad", [True, False])
@pytest.mark.parametrize(
    ("shape", "block", "halo", "stride"),
    [
        ((16, 16), 8, 3, 1),
        ((16, 24), 8, 3, 2),
        ((13, 10), 4, 2, 1),
        ((13, 10), 4, 5, 2),
        ((9, 9), 3, 0, 3),
        ((13, 10), (4, 3), (2, 5), (2, 3)),
        ((70,), 16, 5, 1),
        ((70,), 12, 20, 4),
        ((5, 6, 7), 3, 2, 1),
        ((4, 9, 6), (2, 4, 3), (1, 0, 4), (2, 2, 1)),
    ],
)
@pytest.mark.parametrize("relative", [False, True])
def test_reference(rng, isa, shape, block, halo, stride, mask_pad, relative):
    q, k, v = image(rng, shape)
    given = {"relative": tables(rng, shape, block, halo)} if relative else {}
    check(q, k, v, block=block, halo=halo, stride=stride, mask_pad=mask_pad, **given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, dtype, layout):
    q, k, v = image(rng, (9, 10), batch=2, dtype=dtype, layout=layout)
    check(q, k, v, block=4, halo=2, relative=tables(rng, (9, 10), 4, 2), scale_rel=True, scale=0.3)


def test_no_halo_is_window_attention(rng, isa):
    q, k, v = image(rng, (12, 15), kv_heads=4)
    out = halo_attention(q, k, v, block=3, halo=0)
    expected = la.sparse.generalized_neighborhood_attention(q, k, v, window=3, stride=3)
    tolerances.same_storage(tokens(q), tokens(k), tokens(v)).check(out, expected)


def test_blocks_of_one_are_neighbourhood_attention_inside(rng, isa):
    q, k, v = image(rng, (11, 12))
    out = halo_attention(q, k, v, block=1, halo=2)
    expected = la.sparse.generalized_neighborhood_attention(q, k, v, window=5)
    inside = (..., slice(2, -2), slice(2, -2), slice(None))
    tolerances.same_storage(tokens(q), tokens(k), tokens(v)).check(out[inside], expected[inside])


def test_block_of_the_image_is_dense(rng, isa):
    q, k, v = image(rng, (9, 9))
    expected = la.attention(tokens(q), tokens(k), tokens(v)).reshape(1, 4, 9, 9, 12)
    tolerances.same_storage(tokens(q), tokens(k), tokens(v)).check(halo_attention(q, k, v, block=9, halo=0), expected)


def test_stride_leaves_out_rows(rng, isa):
    q, k, v = image(rng, (16, 18))
    one, other = (halo_attention(q, k, v, block=6, halo=2, stride=stride) for stride in (1, 3))
    tolerances.same_storage(tokens(q), tokens(k), tokens(v)).check(other, one[:, :, ::3, ::3])


def test_axes_of_one_place_change_nothing(rng, isa):
    q, k, v = image(rng, (40,))
    first = tables(rng, (40,), 8, 3)[0]
    expected = halo_attention(q, k, v, block=8, halo=3, relative=[first])
    none = np.zeros((1, 16), np.float32)
    for shape in ((1, 40), (40, 1), (1, 40, 1)):
        parts = (x.reshape(*x.shape[:2], *shape, x.shape[-1]) for x in (q, k, v))
        block, halo = (tuple(n if length > 1 else m for length in shape) for n, m in ((8, 1), (3, 0)))
        given = [first if length > 1 else none for length in shape]
        out = halo_attention(*parts, block=block, halo=halo, relative=given)
        np.testing.assert_allclose(tokens(out), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"stride": 3}, ValueError, "stride: got 3, expected a divisor of the block 8"),
        ({"block": 0}, ValueError, "block: got 0"),
        ({"halo": -1}, ValueError, "halo: got -1"),
        ({"relative": [np.zeros((21, 4), np.float32)]}, ValueError, "relative: got 1 tables, expected 2"),
        ({"relative": [np.zeros((21, 4)), np.zeros((20, 4))]}, ValueError, r"relative\[1\]: got shape"),
        ({"relative": 3}, TypeError, "relative: got int"),
        ({"block": (8, 8, 8)}, ValueError, "block: got 3 numbers, expected 2"),
        ({"q": np.zeros((1, 1, 8, 4), np.float32)}, ValueError, "k: got shape"),
        ({"mask_pad": 1}, TypeError, "mask_pad: got 1"),
    ],
)
def test_bad_input(change, error, words):
    given = {name: np.zeros((1, 1, 8, 8, 4), np.float32) for name in "qkv"} | change
    with pytest.raises(error, match=words):
        halo_attention(**given)
