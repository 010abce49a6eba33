"""Dilated neighbourhood attention and the schedule of its dilations."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from random_arrays import DTYPES, F32, normal

dilated = la.sparse.dilated_neighborhood_attention


def grid_qkv(rng, shape, *, dim=16, dtype=F32):
    return tuple(normal(rng, (1, heads, *shape, dim), dtype) for heads in (4, 2, 2))


def tokens(x):
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "window", "dilation"),
    [((23,), 5, 4), ((22, 15), 7, 2), ((22, 15), (3, 5), (7, 3)), ((7, 8, 9), 3, (2, 1, 3))],
)
def test_reference(rng, isa, dtype, shape, window, dilation):
    q, k, v = grid_qkv(rng, shape, dtype=dtype)
    table = rng.standard_normal((4, *(2 * w - 1 for w in reference.spread(window, len(shape)))))
    rule = {"window": window, "dilation": dilation, "bias": table}
    out, lse = dilated(q, k, v, return_lse=True, **rule)
    expected, expected_lse = reference.dilated_neighborhood_attention(q, k, v, return_lse=True, **rule)
    tolerances.attention(tokens(q), tokens(k), tokens(v), offset=4.0, together=8).check(
        out, expected, lse, expected_lse
    )


def test_no_dilation_is_neighbourhood_attention(rng):
    q, k, v = grid_qkv(rng, (15, 16))
    expected = la.sparse.generalized_neighborhood_attention(q, k, v, window=7)
    np.testing.assert_array_equal(dilated(q, k, v), expected)


def test_window_that_spans_the_axis_is_dense_inside_classes(rng, isa):
    q, k, v = grid_qkv(rng, (12, 15))
    out = dilated(q, k, v, window=(3, 5), dilation=(4, 3))
    for y in range(4):
        for x in range(3):
            own = [np.ascontiguousarray(a[:, :, y::4, x::3]) for a in (q, k, v)]
            expected = la.attention(*map(tokens, own)).reshape(own[0].shape)
            tolerances.same_storage(*map(tokens, own)).check(out[:, :, y::4, x::3], expected)


def test_window_of_one_gives_values(rng, isa):
    q, k, v = grid_qkv(rng, (9, 8))
    np.testing.assert_array_equal(dilated(q, k, v, window=1, dilation=(3, 2)), np.repeat(v, 2, axis=1))


def test_permuting_residue_classes(rng):
    q, k, v = grid_qkv(rng, (20,))
    order = np.concatenate([np.arange(20).reshape(5, 4)[:, [2, 0, 3, 1]].ravel()])
    out = dilated(q, k, v, window=3, dilation=4)
    permuted = dilated(q[:, :, order], k[:, :, order], v[:, :, order], window=3, dilation=4)
    tolerances.same_storage(q, k, v).check(permuted, out[:, :, order])


def test_schedule():
    assert la.sparse.dinat_dilations(4, 56) == (1, 8, 1, 8)
    assert la.sparse.dinat_dilations(3, 28, dilation=2) == (1, 2, 1)
    assert la.sparse.dinat_dilations(0, 28) == ()
    assert la.sparse.receptive_field([1] * 4, window=3) == 9
    assert la.sparse.receptive_field([3**layer for layer in range(4)], window=3) == 3**4


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: dilated(x, x, x, window=4), "window: got 4 on axis 0, expected an odd number"),
        (lambda x: dilated(x, x, x, window=(3, 2)), "window: got 2 on axis 1"),
        (lambda x: dilated(x, x, x, window=3, dilation=3), "window: got 3 with dilation 3"),
        (lambda x: la.sparse.dinat_dilations(2, 5), "window: got 7, expected at most the length 5"),
        (lambda x: la.sparse.dinat_dilations(2, 20, dilation=3), "dilation: got 3"),
        (lambda x: la.sparse.receptive_field([1], window=2), "window: got 2"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(np.zeros((1, 1, 8, 8, 4), np.float32))
