"""`strip_self_attention`: reduced keys and narrow queries."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import strip_self_attention
from longattn.vision.strip_self_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def arguments(rng, shape=(2, 6, 8, 12), r=2, width=3, bias=True):
    kernel = normal(rng, (r, r, 12)) / r
    return normal(rng, shape), kernel, *(weights(rng, 12, n, bias) for n in (width, width, 12))


@pytest.mark.parametrize(
    ("shape", "r", "width"), [((2, 6, 8, 12), 2, 3), ((1, 7, 5, 12), 3, 12), ((1, 3, 3, 12), 3, 3)]
)
def test_reference(rng, isa, shape, r, width):
    check(METHOD, *arguments(rng, shape, r, width), heads=3, wo=weights(rng, 12, 5, True), scale=0.8)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng), heads=3)


def test_without_reduction(rng):
    x, _, wq, wk, wv = arguments(rng, width=12, bias=False)
    kernel = np.ones((1, 1, 12), F32)
    rows = [(x @ w).reshape(2, 48, 3, 4).swapaxes(1, 2) for w in (wq, wk, wv)]
    expected = la.attention(*rows, scale=0.5).swapaxes(1, 2).reshape(x.shape)
    out = strip_self_attention(x, kernel, wq, wk, wv, heads=3, scale=0.5)
    same(METHOD, out, expected, x, kernel, wq, wk, wv, heads=3, scale=0.5)


@pytest.mark.parametrize("zeroed", ["wq", "wk"])
def test_equal_logits_give_the_mean(rng, zeroed):
    x, kernel, wq, wk, wv = arguments(rng)
    given = {"wq": wq, "wk": wk, "wv": wv} | {zeroed: (np.zeros((12, 3), F32), wk[1])}
    reduced = np.einsum("byixjc,ijc->byxc", x.reshape(2, 3, 2, 4, 2, 12), kernel)
    expected = (reduced @ wv[0] + wv[1]).mean(axis=(1, 2), keepdims=True)
    out = strip_self_attention(x, kernel, **given, heads=3)
    if zeroed == "wq":  # logits are constant with zero queries only where these are zero altogether
        given["wq"] = np.zeros((12, 3), F32)
        out = strip_self_attention(x, kernel, **given, heads=3)
    same(METHOD, out, np.broadcast_to(expected, x.shape), x, kernel, **given, heads=3)


def test_one_channel_is_an_outer_product(rng):
    x, kernel, wq, wk, wv = arguments(rng, r=1, bias=False)
    kernel = np.ones((1, 1, 12), F32)
    out = strip_self_attention(x, kernel, wq, wk, wv, heads=3)
    s = np.exp(np.einsum("bnh,bmh->bhnm", *((x @ w).reshape(2, 48, 3) for w in (wq, wk))))
    v = (x @ wv).reshape(2, 48, 3, 4)
    expected = np.einsum("bhnm,bmhd->bnhd", s / s.sum(axis=-1, keepdims=True), v).reshape(x.shape)
    same(METHOD, out, expected, x, kernel, wq, wk, wv, heads=3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernel": np.zeros((2, 3, 12))}, ValueError, r"kernel: got shape \(2, 3, 12\)"),
        ({"kernel": np.zeros((7, 7, 12))}, ValueError, r"kernel: got 7, expected 1 to 6"),
        ({"wk": np.zeros((12, 6))}, ValueError, r"wk: got shape \(12, 6\)"),
        ({"heads": 2}, ValueError, r"heads: got 2"),
        ({"scale": None}, TypeError, r"scale: got None"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    x, kernel, wq, wk, wv = arguments(rng)
    raises(METHOD, error, message, {"x": x, "kernel": kernel, "wq": wq, "wk": wk, "wv": wv, "heads": 3}, **change)
