"""`distributed_progressive_attention`: a key per region, and the best region."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import distributed_progressive_attention
from longattn.vision.distributed_progressive_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights

NONE = (*(np.zeros((12, 12), F32) for _ in range(3)), None)


def branch(rng, bias=True, wo=True):
    return (*(weights(rng, 12, 12, bias) for _ in range(3)), weights(rng, 12, 12, bias) if wo else None)


def arguments(rng, content=(2, 4, 6, 12), style=(2, 6, 4, 12)):
    return normal(rng, content), normal(rng, style), branch(rng), branch(rng)


def normed(x):
    x = x.astype(np.float64)
    return ((x - x.mean((1, 2), keepdims=True)) / np.sqrt(x.var((1, 2), keepdims=True, ddof=1) + 1e-5)).astype(F32)


def heads_of(x, w, heads=3):
    return (x @ w).reshape(len(x), -1, heads, 12 // heads).swapaxes(1, 2)


@pytest.mark.parametrize(
    ("content", "style", "region"),
    [((2, 4, 6, 12), (2, 6, 4, 12), 2), ((1, 3, 3, 12), (1, 6, 3, 12), 3), ((1, 2, 3, 12), (1, 4, 2, 12), 1)],
)
def test_reference(rng, isa, content, style, region):
    check(METHOD, *arguments(rng, content, style), heads=3, region=region, alpha=0.7, beta=-0.2, scale=0.5)


def test_kinds(rng):
    content, style, one, _ = arguments(rng)
    check_kinds(METHOD, content, style, one, NONE, heads=3, region=2)


def test_regions_of_one_place(rng):
    """Gates of 1 leave the keys and values of the places."""
    content, style, *_ = arguments(rng)
    w = branch(rng, bias=False, wo=False)
    q, k = heads_of(normed(content), w[0]), heads_of(normed(style), w[1])
    expected = content + la.attention(q, k, heads_of(style, w[2]), scale=1.0).swapaxes(1, 2).reshape(content.shape)
    options = {"heads": 3, "region": 1, "alpha": 0.0, "beta": 50.0}
    out = distributed_progressive_attention(content, style, w, NONE, **options)
    same(METHOD, out, expected, content, style, w, NONE, **options)


def test_the_most_alike_place(rng):
    content, style, *_ = arguments(rng)
    w = branch(rng, bias=False, wo=False)
    q, k, v = heads_of(normed(content), w[0]), heads_of(normed(style), w[1]), heads_of(style, w[2])
    best = (q @ k.swapaxes(-1, -2)).argmax(axis=-1)
    found = np.take_along_axis(v, best[..., None], axis=2).swapaxes(1, 2).reshape(content.shape)
    out = distributed_progressive_attention(content, style, NONE, w, heads=3, region=1)
    np.testing.assert_allclose(out, content + found, atol=2e-6)


@pytest.mark.parametrize("own", [False, True])
def test_one_region(rng, own):
    content = normal(rng, (2, 4, 4, 12))
    style = content if own else normal(rng, (2, 4, 4, 12))
    w = branch(rng, bias=False, wo=False)
    rows = heads_of(normed(content), w[0]), heads_of(normed(style), w[1]), heads_of(style, w[2])
    expected = content + la.attention(*rows, scale=1.0).swapaxes(1, 2).reshape(content.shape)
    out = distributed_progressive_attention(content, style, NONE, w, heads=3, region=4)
    same(METHOD, out, expected, content, style, NONE, w, heads=3, region=4)
    added = distributed_progressive_attention(content, style, w, NONE, heads=3, region=4) - content
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1, :1], added.shape), atol=2e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"region": 3},
            ValueError,
            r"content: got shape \(2, 4, 6, 12\), expected axes that are multiples of region 3",
        ),
        ({"style": np.zeros((1, 4, 6, 12), F32)}, ValueError, r"style: got shape \(1, 4, 6, 12\)"),
        ({"distributed": 1}, TypeError, r"distributed: got int"),
        ({"heads": 5}, ValueError, r"heads: got 5"),
        ({"alpha": None}, TypeError, r"alpha: got None"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    content, style, one, two = arguments(rng)
    given = {"content": content, "style": style, "distributed": one, "progressive": two, "heads": 3, "region": 2}
    raises(METHOD, error, message, given, **change)
