"""`global_query_window_attention`: windows read by their own queries or by one block."""

import numpy as np
import pytest

import longattn as la
from longattn import vision
from longattn.vision import global_query_window_attention
from longattn.vision.global_query_window_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def arguments(rng, shape=(2, 6, 9, 12), bias=True):
    return normal(rng, shape), weights(rng, 12, 12, bias), weights(rng, 12, 12, bias)


@pytest.mark.parametrize("shape", [(2, 6, 9, 12), (1, 4, 7, 12), (1, 2, 2, 12)])
@pytest.mark.parametrize("local", [True, False])
def test_reference(rng, isa, shape, local):
    options = {"wq": weights(rng, 12, 12, True)} if local else {"queries": normal(rng, (shape[0], 9, 12))}
    options |= {"table": normal(rng, (25, 3)), "wo": weights(rng, 12, 5, True), "scale": 0.4}
    check(METHOD, *arguments(rng, shape), heads=3, window=3, **options)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng), heads=3, window=3, queries=normal(rng, (2, 9, 12)))


def test_one_window(rng):
    x, wk, wv = arguments(rng, (2, 3, 3, 12))
    wq = weights(rng, 12, 12)
    queries = (x @ wq).reshape(2, 9, 12)
    out, local = (
        global_query_window_attention(x, wk, wv, heads=3, window=3, **q) for q in ({"queries": queries}, {"wq": wq})
    )
    same(METHOD, out, local, x, wk, wv, heads=3, window=3, wq=wq)


def test_windows_that_are_alike(rng):
    x, wk, wv = arguments(rng, (1, 3, 3, 12))
    out = global_query_window_attention(
        np.tile(x, (1, 2, 3, 1)), wk, wv, heads=3, window=3, queries=normal(rng, (1, 9, 12))
    )
    np.testing.assert_array_equal(out, np.tile(out[:, :3, :3], (1, 2, 3, 1)))


def test_a_window_of_the_image(rng):
    x, wk, wv = arguments(rng, (2, 4, 4, 12), bias=False)
    wq, table = weights(rng, 12, 12), normal(rng, (49, 3))
    out = global_query_window_attention(x, wk, wv, heads=3, window=4, wq=wq, table=table)
    rows = [(x @ w).reshape(2, 16, 3, 4).swapaxes(1, 2) for w in (wq, wk, wv)]
    expected = la.attention(*rows, bias=vision.relative_position_bias(table, (4, 4))).swapaxes(1, 2).reshape(x.shape)
    same(METHOD, out, expected, x, wk, wv, heads=3, window=4, wq=wq, table=table)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": None}, ValueError, r"queries: got both or none"),
        ({"wq": np.eye(12, dtype=F32)}, ValueError, r"queries: got both or none"),
        ({"queries": np.zeros((2, 8, 12), F32)}, ValueError, r"queries: got shape \(2, 8, 12\)"),
        ({"window": 0}, ValueError, r"window: got 0"),
        ({"table": np.zeros((5, 3))}, ValueError, r"table: got shape \(5, 3\), expected \(25, 3\)"),
        ({"wk": np.zeros((12, 9), F32)}, ValueError, r"queries: got shape \(2, 9, 12\)"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    x, wk, wv = arguments(rng)
    given = {"x": x, "wk": wk, "wv": wv, "heads": 3, "window": 3, "queries": normal(rng, (2, 9, 12))}
    raises(METHOD, error, message, given, **change)
