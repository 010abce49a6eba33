"""`nested_attention`: keys whose values depend on the query."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import nested_attention
from longattn.vision.nested_attention import METHOD
from random_arrays import F32, normal, qkv
from vision_checks import check, check_kinds, raises, same


def arguments(rng, special=(2, 5)):
    q, k, v = qkv(rng, batch=2, heads=4, kv_heads=2, rows=9, keys=7, dim=8, value_dim=6)
    more = {s: (normal(rng, (2, 2, 3 + s, 8)), normal(rng, (2, 2, 3 + s, 6))) for s in special}
    return q, k, v, more


@pytest.mark.parametrize("special", [(), (0,), (2, 5)])
@pytest.mark.parametrize("value_norm", [None, 1.5])
def test_reference(rng, isa, threads, special, value_norm):
    mask = rng.random((9, 7)) < 0.8
    mask[:, 1] = True
    check(METHOD, *arguments(rng, special), scale=0.5, mask=mask, value_norm=value_norm)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng))


def test_a_set_of_one(rng):
    q, k, v, _ = arguments(rng)
    nested = {s: (normal(rng, (2, 2, 1, 8)), v[:, :, s : s + 1]) for s in (1, 4)}
    same(METHOD, nested_attention(q, k, v, nested), la.attention(q, k, v), q, k, v, nested)


def test_equal_nested_values(rng):
    q, k, v, nested = arguments(rng, (3,))
    keys, values = nested[3]
    values = np.broadcast_to(values[:, :, :1], values.shape)
    other = v.copy()
    other[:, :, 3] = values[:, :, 0]
    out = nested_attention(q, k, v, {3: (keys, values)})
    same(METHOD, out, la.attention(q, k, other), q, k, v, {3: (keys, values)})


def test_without_special_keys(rng):
    q, k, v, _ = arguments(rng)
    np.testing.assert_array_equal(nested_attention(q, k, v, {}), la.attention(q, k, v))


def test_masked_special_keys(rng):
    q, k, v, nested = arguments(rng)
    mask = np.ones((9, 7), bool)
    mask[:, [2, 5]] = False
    np.testing.assert_array_equal(nested_attention(q, k, v, nested, mask=mask), la.attention(q, k, v, mask=mask))
    assert (nested_attention(q, k, v, nested, mask=np.zeros((9, 7), bool)) == 0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"nested": {6: ()}}, TypeError, r"nested\[6\]: got tuple"),
        ({"nested": [1]}, TypeError, r"nested: got list"),
        (
            {"nested": {1: (np.zeros((2, 2, 0, 8), F32), np.zeros((2, 2, 0, 6), F32))}},
            ValueError,
            r"nested\[1\]: got shapes",
        ),
        ({"nested": {9: (np.zeros((2, 2, 1, 8), F32), np.zeros((2, 2, 1, 6), F32))}}, ValueError, r"nested: got 9"),
        ({"mask": np.ones((9, 6), bool)}, ValueError, r"mask: got shape \(9, 6\)"),
        ({"value_norm": "1"}, TypeError, r"value_norm: got '1'"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v, nested = arguments(rng)
    raises(METHOD, error, message, {"q": q, "k": k, "v": v, "nested": nested}, **change)
