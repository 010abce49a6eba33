"""`super_token_attention`: soft cells that attend to each other."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import super_token_attention
from longattn.vision.super_token_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def arguments(rng, shape=(2, 8, 9, 12), bias=True):
    return normal(rng, shape), *(weights(rng, 12, 12, bias) for _ in range(3))


@pytest.mark.parametrize(
    ("shape", "cell"), [((2, 8, 9, 12), (2, 3)), ((1, 7, 5, 12), 3), ((1, 3, 3, 12), 8), ((1, 4, 5, 12), 1)]
)
@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("rounds", [1, 2])
def test_reference(rng, isa, shape, cell, border, rounds):
    check(
        METHOD, *arguments(rng, shape), heads=3, cell=cell, border=border, rounds=rounds, wo=weights(rng, 12, 5, True)
    )


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng), heads=3, cell=3)


def test_cells_of_one_place(rng):
    x, *w = arguments(rng, bias=False)
    rows = [(x @ m).reshape(2, 72, 3, 4).swapaxes(1, 2) for m in w]
    expected = la.attention(*rows).swapaxes(1, 2).reshape(x.shape)
    same(METHOD, super_token_attention(x, *w, heads=3, cell=1), expected, x, *w, heads=3, cell=1)


def test_a_constant_image(rng):
    x, *w = arguments(rng, (1, 6, 9, 12))
    x = np.broadcast_to(x[:, :1, :1], x.shape)
    out = super_token_attention(x, *w, heads=3, cell=3)
    expected = np.broadcast_to(x @ w[2][0] + w[2][1], x.shape)
    same(METHOD, out, expected, x, *w, heads=3, cell=3)


def test_rounds(rng):
    x, *w = arguments(rng)
    one, two = (super_token_attention(x, *w, heads=3, cell=3, rounds=n) for n in (1, 2))
    assert one.shape == two.shape and (one != two).any()


def test_one_cell(rng):
    x, *w = arguments(rng, (2, 4, 4, 12))
    out = super_token_attention(x, *w, heads=3, cell=4)
    expected = np.broadcast_to(x.mean(axis=(1, 2), keepdims=True) @ w[2][0] + w[2][1], x.shape)
    same(METHOD, out, expected, x, *w, heads=3, cell=4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cell": 0}, ValueError, r"cell: got 0"),
        ({"cell": (2, 2, 2)}, ValueError, r"cell: got 3 numbers, expected 2"),
        ({"rounds": 0}, ValueError, r"rounds: got 0"),
        ({"border": "wrap"}, ValueError, r"border: got 'wrap'"),
        ({"wv": np.zeros((11, 12), F32)}, ValueError, r"wv: got shape \(11, 12\)"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    x, wq, wk, wv = arguments(rng)
    raises(METHOD, error, message, {"x": x, "wq": wq, "wk": wk, "wv": wv, "heads": 3, "cell": 3}, **change)
