"""`hierarchical_global_local_attention`: tiles, and the whole at a lower resolution."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import hierarchical_global_local_attention
from longattn.vision.hierarchical_global_local_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights

NONE = (None, None, None, np.zeros((12, 12), F32))


def block(rng, bias=True):
    return tuple(weights(rng, 12, 12, bias) for _ in range(4))


def arguments(rng, shape=(2, 2, 4, 6, 12)):
    return normal(rng, shape), block(rng), block(rng)


def dense(x, w):
    rows = [(x @ m).reshape(len(x), -1, 3, 4).swapaxes(1, 2) for m in w[:3]]
    return la.attention(*rows).swapaxes(1, 2).reshape(x.shape) @ w[3]


@pytest.mark.parametrize(("shape", "tiles"), [((2, 2, 4, 6, 12), 2), ((1, 1, 6, 3, 12), 3), ((1, 2, 3, 2, 12), 1)])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
def test_reference(rng, isa, shape, tiles, shifted, kernels):
    options = {}
    if kernels:
        options = {"down": normal(rng, (1, tiles, tiles, 12, 12)) / 6, "up": normal(rng, (1, 3, 3, 12, 12)) / 10}
    check(METHOD, *arguments(rng, shape), heads=3, tiles=tiles, shifted=shifted, alpha=0.6, **options)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng), heads=3, tiles=2)


def test_one_tile(rng):
    x = normal(rng, (2, 2, 3, 4, 12))
    w = block(rng, bias=False)
    out = hierarchical_global_local_attention(x, w, NONE, heads=3, tiles=1, alpha=0.0)
    same(METHOD, out, dense(x, w), x, w, NONE, heads=3, tiles=1, alpha=0.0)


def test_alpha_of_zero(rng):
    x, w, far = arguments(rng)
    one, other = (hierarchical_global_local_attention(x, w, f, heads=3, tiles=2, alpha=0.0) for f in (far, NONE))
    np.testing.assert_array_equal(one, other)


def test_without_reduction(rng):
    x, near = normal(rng, (1, 2, 3, 4, 12)), block(rng, bias=False)
    w = block(rng, bias=False)
    local, both = (hierarchical_global_local_attention(x, near, w, heads=3, tiles=1, alpha=a) for a in (0.0, 1.0))
    same(METHOD, both - local, dense(x, w), x, near, w, heads=3, tiles=1)


def test_tiles_do_not_see_each_other(rng):
    x, w, _ = arguments(rng, (1, 2, 4, 4, 12))
    other = x.copy()
    other[0, 0, 1, 1] += 1
    changed = []
    for shifted in (False, True):
        one, two = (
            hierarchical_global_local_attention(a, w, NONE, heads=3, tiles=2, alpha=0.0, shifted=shifted)
            for a in (x, other)
        )
        changed.append((one != two).any(axis=-1).all(axis=(0, 1)))
    tile = np.zeros((4, 4), bool)
    tile[:2, :2] = True
    np.testing.assert_array_equal(changed[0], tile)
    np.testing.assert_array_equal(changed[1], np.roll(tile, (1, 1), axis=(0, 1)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tiles": 4}, ValueError, r"tiles: got 4, expected a divisor of 4 and 6"),
        ({"local": ()}, TypeError, r"local: got tuple, expected \(wq, wk, wv, wo\)"),
        ({"up": np.zeros((1, 2, 3, 12, 12))}, ValueError, r"up: got shape \(1, 2, 3, 12, 12\), expected odd"),
        ({"down": np.zeros((1, 3, 3, 12, 12))}, ValueError, r"down: got shape"),
        ({"x": np.zeros((2, 4, 6, 12), F32)}, ValueError, r"x: got shape \(2, 4, 6, 12\)"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    x, near, far = arguments(rng)
    raises(METHOD, error, message, {"x": x, "local": near, "coarse": far, "heads": 3, "tiles": 2}, **change)
