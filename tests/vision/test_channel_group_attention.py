"""`channel_group_attention`: channels as tokens."""

import numpy as np
import pytest

import longattn as la
from longattn.vision import channel_group_attention, grouped_attention
from longattn.vision.channel_group_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, raises, same, weights


def arguments(rng, batch=2, tokens=30, c=12, bias=True):
    return normal(rng, (batch, tokens, c)), *(weights(rng, c, c, bias) for _ in range(3))


@pytest.mark.parametrize(("tokens", "groups"), [(30, 3), (1, 2), (70, 1), (9, 12)])
@pytest.mark.parametrize("roles", ["paper", "release"])
def test_reference(rng, isa, tokens, groups, roles):
    options = {"wo": weights(rng, 12, 7, True), "roles": roles, "scale": None if groups == 3 else tokens**-0.5}
    check(METHOD, *arguments(rng, tokens=tokens), groups=groups, **options)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng), groups=3, scale=0.1)


def test_groups_of_one_channel(rng):
    x, wq, wk, wv = arguments(rng)
    out = channel_group_attention(x, wq, wk, wv, groups=12)
    same(METHOD, out, x @ wv[0] + wv[1], x, wq, wk, wv, groups=12)


def test_permuted_tokens(rng):
    x, *rest = arguments(rng)
    order = rng.permutation(30)
    out, moved = (channel_group_attention(a, *rest, groups=3) for a in (x, x[:, order]))
    same(METHOD, moved, out[:, order], x, *rest, groups=3)


def test_pieces_of_the_tokens(rng):
    """Scores are sums over tokens: values of some tokens depend on the others by the sums only."""
    x, wq, wk, wv = arguments(rng, batch=1, bias=False)
    q, k, v = ((x @ w)[0] for w in (wq, wk, wv))
    s = sum(q[part].T @ k[part] for part in (slice(0, 11), slice(11, 30))) * 12**-0.5
    p = np.exp(s - s.max(axis=1, keepdims=True))
    expected = v @ (p / p.sum(axis=1, keepdims=True)).T
    same(METHOD, channel_group_attention(x, wq, wk, wv, groups=1), expected[None], x, wq, wk, wv, groups=1)


def test_a_window_of_the_whole_image(rng):
    q, k, v = (normal(rng, (2, 5, 6, 12)) for _ in range(3))
    rows = [x.reshape(2, 30, 3, 4).swapaxes(1, 2) for x in (q, k, v)]
    expected = la.attention(*rows).swapaxes(1, 2).reshape(2, 5, 6, 12)
    np.testing.assert_allclose(grouped_attention(q, k, v, (7, 8), heads=3), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((2, 3, 4, 12), F32)}, ValueError, r"x: got shape \(2, 3, 4, 12\), expected \[B, N, C\]"),
        ({"wk": np.zeros((12, 6), F32)}, ValueError, r"wk: got shape \(12, 6\)"),
        ({"groups": 5}, ValueError, r"groups: got 5, expected a divisor of the 12 channels of x"),
        ({"roles": "other"}, ValueError, r"roles: got 'other'"),
        ({"wo": np.zeros((5, 5), F32)}, ValueError, r"wo: got shape \(5, 5\)"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    x, wq, wk, wv = arguments(rng)
    raises(METHOD, error, message, {"x": x, "wq": wq, "wk": wk, "wv": wv, "groups": 3}, **change)
