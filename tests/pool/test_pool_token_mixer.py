"""`pool_token_mixer`."""

import numpy as np
import pytest

import tolerances
from longattn import attention
from longattn.pool import pool_token_mixer
from longattn.reference import pool as reference
from random_arrays import DTYPES, F32, LAYOUTS, normal

check = tolerances.check_layer


@pytest.mark.parametrize("size", [1, 3, 5, 31])
@pytest.mark.parametrize("shape", [(2, 7, 9, 5), (1, 1, 1, 1), (1, 3, 70, 65), (2, 0, 4, 3)])
def test_reference(rng, isa, threads, size, shape):
    x = normal(rng, shape)
    check(pool_token_mixer(x, size=size), reference.pool_token_mixer(x, size=size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, dtype, layout):
    x = normal(rng, (2, 7, 9, 5), dtype, layout)
    out = np.empty(x.shape, dtype)
    assert pool_token_mixer(x, out=out) is out
    check(out, reference.pool_token_mixer(x))


def test_a_constant_map_gives_zeros_everywhere(isa):
    assert not pool_token_mixer(np.full((2, 7, 9, 5), 0.1, F32)).any()


def test_a_square_of_one_place_gives_zeros(rng, isa):
    assert not pool_token_mixer(normal(rng, (2, 7, 9, 5)), size=1).any()


def test_it_is_attention_in_a_window_without_scores(rng, isa):
    x = normal(rng, (1, 1, 40, 5))
    rows = np.zeros_like(x)
    check(pool_token_mixer(x) + x, attention(rows, rows, x, window=(1, 1)).astype(np.float64))
    square = normal(rng, (1, 6, 7, 5))
    row, column = np.divmod(np.arange(42), 7)
    near = (np.abs(row[:, None] - row) <= 1) & (np.abs(column[:, None] - column) <= 1)
    flat = square.reshape(1, 1, 42, 5)
    expected = attention(np.zeros_like(flat), np.zeros_like(flat), flat, mask=near).reshape(square.shape)
    check(pool_token_mixer(square) + square, expected.astype(np.float64))


@pytest.mark.parametrize(
    ("x", "size", "error", "message"),
    [
        (np.zeros((7, 9, 5), F32), 3, ValueError, r"x: got shape \(7, 9, 5\)"),
        (np.zeros((1, 7, 9, 5)), 3, TypeError, "x: got dtype float64"),
        (np.zeros((1, 7, 9, 5), F32), 4, ValueError, "size: got 4, expected an odd number"),
        (np.zeros((1, 7, 9, 5), F32), 0, ValueError, "size: got 0"),
    ],
)
def test_bad_arguments(x, size, error, message):
    with pytest.raises(error, match=message):
        pool_token_mixer(x, size=size)
