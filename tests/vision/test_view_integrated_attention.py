"""`view_integrated_attention`: over views, frames and places."""

import numpy as np
import pytest

from longattn.vision import attend_over, view_integrated_attention
from longattn.vision.view_integrated_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def arguments(rng, shape=(2, 2, 3, 4, 12), bias=True):
    return normal(rng, shape), tuple(weights(rng, 12, 12, bias) for _ in range(4))


def over(x, w, axes):
    return attend_over(x @ w[0], x @ w[1], x @ w[2], "bvfn", axes, heads=3) @ w[3]


@pytest.mark.parametrize("kind", ["view", "frame", "spatial", "temporal"])
def test_reference(rng, isa, kind):
    check(METHOD, *arguments(rng), heads=3, kind=kind)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng), heads=3)


@pytest.mark.parametrize(("shape", "kind"), [((2, 1, 3, 4, 12), "view"), ((2, 2, 1, 4, 12), "frame")])
def test_one_view_or_one_frame(rng, shape, kind):
    x, w = arguments(rng, shape, bias=False)
    same(METHOD, view_integrated_attention(x, w, heads=3, kind=kind), over(x, w, "n"), x, w, heads=3, kind=kind)


def test_one_frame_across_views(rng):
    """All places of a frame of all views, by hand."""
    x, w = arguments(rng, (1, 2, 1, 4, 12), bias=False)
    joined = x.reshape(1, 1, 1, 8, 12)
    out = view_integrated_attention(x, w, heads=3)
    same(METHOD, out, over(joined, w, "n").reshape(x.shape), x, w, heads=3)


def test_one_place(rng):
    x, w = arguments(rng, (2, 2, 5, 1, 12), bias=False)
    out = view_integrated_attention(x, w, heads=3, kind="frame")
    same(METHOD, out, over(x, w, "f"), x, w, heads=3, kind="frame")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((2, 3, 4, 12), F32)}, ValueError, r"x: got shape \(2, 3, 4, 12\)"),
        ({"kind": "time"}, ValueError, r"kind: got 'time'"),
        ({"heads": 5}, ValueError, r"heads: got 5"),
        ({"weights": None}, TypeError, r"weights: got NoneType"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    x, w = arguments(rng)
    raises(METHOD, error, message, {"x": x, "weights": w, "heads": 3}, **change)
