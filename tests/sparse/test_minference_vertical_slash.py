"""`minference_vertical_slash` against its float64 reference, and its identities."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from longattn.sparse import VerticalSlash, minference_vertical_slash
from random_arrays import DTYPES, LAYOUTS, qkv

SMALL = {"last_q": 16, "vertical": 20, "slash": 12, "n_sink": 4, "local": 6, "block_q": 16}


def agrees(q, k, **options):
    """Lists are those of the reference, as far as causality leaves them."""
    lists = VerticalSlash(**SMALL | options)(q, k)
    ours = lists.to_dense_mask()
    past = np.tri(q.shape[2], k.shape[2], k.shape[2] - q.shape[2], dtype=bool)
    np.testing.assert_array_equal(ours & past, reference.vertical_slash_mask(q, k, **SMALL | options) & past)
    return lists


@pytest.mark.parametrize(("heads", "kv_heads", "rows", "keys"), [(1, 1, 64, 64), (6, 2, 90, 130), (4, 4, 100, 100)])
def test_lists(rng, isa, heads, kv_heads, rows, keys):
    q, k, _ = qkv(rng, batch=2, heads=heads, kv_heads=kv_heads, rows=rows, keys=keys, spread=3.0)
    for options in ({}, {"vertical": 0, "n_sink": 0}, {"slash": 0, "local": 1}, {"block_q": 1}, {"last_q": 1000}):
        lists = agrees(q, k, **options)
    assert 0.02 < lists.density(causal=True) < 0.98


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, isa, dtype, layout):
    q, k, v = qkv(rng, rows=70, keys=90, dim=20, q_dtype=dtype, layout=layout, spread=2.0)
    out, lse = minference_vertical_slash(q, k, v, **SMALL, scale=0.3, return_lse=True)
    expected, expected_lse = reference.minference_vertical_slash(q, k, v, **SMALL, scale=0.3, return_lse=True)
    tolerances.attention(q, k, v, scale=0.3).check(out, expected, lse, expected_lse)


def test_any_number_of_threads(rng, threads):
    agrees(*qkv(rng, rows=300, keys=300)[:2])


@pytest.mark.parametrize(("rows", "keys"), [(1, 100), (5, 100), (100, 5), (3, 0), (0, 3)])
def test_few_rows(rng, isa, rows, keys):
    q, k, v = qkv(rng, rows=rows, keys=keys)
    out = minference_vertical_slash(q, k, v, **SMALL)
    assert out.shape == q.shape and np.isfinite(out).all()


# Identities


@pytest.mark.parametrize("lines", [{"vertical": 150, "slash": 0}, {"vertical": 0, "slash": 150}], ids=str)
def test_all_lines_give_causal_attention(rng, isa, lines):
    q, k, v = qkv(rng, rows=100, keys=150)
    out = minference_vertical_slash(q, k, v, **SMALL | lines)
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=True))


def test_forced_lines_alone_are_a_window_and_sinks(rng, isa):
    q, k, v = qkv(rng, rows=80, keys=100)
    out = minference_vertical_slash(q, k, v, vertical=0, slash=0, n_sink=5, local=9, block_q=1)
    i, j = np.arange(80)[:, None] + 20, np.arange(100)
    expected = la.attention(q, k, v, mask=(j < 5) | (i - j < 9), causal=True)
    tolerances.same_storage(q, k, v).check(out, expected)


def test_keys_that_carry_the_weights_are_found(rng, isa):
    q, k, _ = qkv(rng, heads=2, kv_heads=2, rows=200, keys=200)
    chosen = np.array([11, 57, 90, 133])
    k[:, :, chosen] = 4 * q.mean(axis=2, keepdims=True) / np.linalg.norm(q.mean(axis=2, keepdims=True)) ** 2
    q += 10 * q.mean(axis=2, keepdims=True)
    mask = VerticalSlash(vertical=4, slash=1, n_sink=0, local=1, block_q=1, last_q=32)(q, k).to_dense_mask()
    assert mask[:, :, 150:, chosen].all() and mask[:, :, 150:].sum(axis=-1).max() == 5


def test_it_is_dense_attention_with_its_mask(rng, isa):
    q, k, v = qkv(rng, rows=90, keys=130)
    lists = VerticalSlash(**SMALL)(q, k)
    expected = la.attention(q, k, v, mask=lists.to_dense_mask(), causal=True)
    out, stats = minference_vertical_slash(q, k, v, **SMALL, return_stats=True)
    tolerances.same_storage(q, k, v).check(out, expected)
    assert stats.density == pytest.approx(lists.density(causal=True)) and stats.scored == 4 * 16 * 130


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"last_q": 0}, ValueError, r"last_q: got 0"),
        ({"vertical": -1}, ValueError, r"vertical: got -1"),
        ({"slash": 1.0}, TypeError, r"slash: got 1.0"),
        ({"local": 0}, ValueError, r"local: got 0"),
        ({"block_q": 0}, ValueError, r"block_q: got 0"),
        ({"k": np.zeros((1, 3, 9, 16), np.float32)}, ValueError, r"q: got 4 heads"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = qkv(rng, rows=9, keys=9)
    with pytest.raises(error, match=message):
        minference_vertical_slash(**({"q": q, "k": k, "v": v} | change))


def test_it_looks_back_only(rng):
    q, k, v = qkv(rng, rows=9, keys=9)
    with pytest.raises(ValueError, match=r"causal: got False, expected True"):
        la.sparse_attention(q, k, v, VerticalSlash())
