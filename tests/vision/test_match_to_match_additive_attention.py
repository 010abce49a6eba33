"""`match_to_match_additive_attention`: a global query and a global key."""

import numpy as np
import pytest

from longattn.vision import match_to_match_additive_attention
from longattn.vision.match_to_match_additive_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def arguments(rng, tokens=20, paired=True, bias=True):
    inner = 4 if paired else 8
    q, k, v = (normal(rng, (2, 3, tokens, 8)) for _ in range(3))
    return q, k, v, normal(rng, (3, 8)), normal(rng, (3, inner)), weights(rng, inner, 8, bias)


def rotary(tokens=20):
    angle = np.arange(tokens)[:, None] * np.linspace(0.1, 1.3, 4)
    return {"cos": np.cos(angle), "sin": np.sin(angle)}


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_reference(rng, isa, threads, paired, turned):
    options = rotary() if turned else {}
    check(METHOD, *arguments(rng, paired=paired), pair_reduce=paired, mask=rng.random((2, 1, 20)) < 0.8, **options)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng))


def test_one_token(rng):
    q, k, v, w_q, w_k, w_r = arguments(rng, tokens=1, bias=False)
    turn = rotary(1)
    u = v * k  # angles of token 0 are 0
    expected = (u[..., ::2] + u[..., 1::2]) @ w_r + q
    out = match_to_match_additive_attention(q, k, v, w_q, w_k, w_r, **turn)
    same(METHOD, out, expected, q, k, v, w_q, w_k, w_r, **turn)


def test_permuted_tokens(rng):
    q, k, v, *w = arguments(rng)
    order = rng.permutation(20)
    out, moved = (match_to_match_additive_attention(*(x[:, :, o] for x in (q, k, v)), *w) for o in (slice(None), order))
    same(METHOD, moved, out[:, :, order], q, k, v, *w)


def test_the_mean_query(rng):
    q, k, v, w_q, _, _ = arguments(rng, paired=False)
    eye = np.eye(8, dtype=F32)
    zero = np.zeros((3, 8), F32)
    out = match_to_match_additive_attention(q, k, v, 0 * w_q, zero, eye, pair_reduce=False)
    # With w_k = 0 as well, the global key is the mean key.
    same(METHOD, out, v * k.mean(axis=2, keepdims=True) + q, q, k, v, 0 * w_q, zero, eye, pair_reduce=False)


def test_masked_tokens(rng):
    q, k, v, *w = arguments(rng)
    mask = np.arange(20) < 13
    out = match_to_match_additive_attention(q, k, v, *w, mask=mask)
    alone = match_to_match_additive_attention(*(x[:, :, :13] for x in (q, k, v)), *w)
    np.testing.assert_allclose(out[:, :, :13], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": np.zeros((2, 3, 19, 8), F32)}, ValueError, r"k: got shapes \(2, 3, 19, 8\)"),
        ({"w_k": np.zeros((3, 8))}, ValueError, r"w_k: got shape \(3, 8\), expected \[3, 4\]"),
        ({"cos": np.zeros((20, 4))}, ValueError, r"cos: got one of cos and sin"),
        ({"cos": np.zeros((20, 3)), "sin": np.zeros((20, 4))}, ValueError, r"cos: got shape \(20, 3\)"),
        ({"mask": np.ones(20)}, TypeError, r"mask: got dtype float64"),
        ({"mask": True}, TypeError, r"mask: got bool"),
        ({"mask": np.ones((), bool)}, ValueError, r"mask: got shape \(\)"),
        ({"pair_reduce": 0}, TypeError, r"pair_reduce: got 0"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    names = ("q", "k", "v", "w_q", "w_k", "w_r")
    raises(METHOD, error, message, dict(zip(names, arguments(rng), strict=True)), **change)
