"""`integrative_feature_cost_attention`: features and costs refined by the same weights."""

from types import SimpleNamespace

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import vision as reference
from longattn.vision import feature_cost_cross_attention, integrative_feature_cost_attention
from longattn.vision.integrative_feature_cost_attention import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, close, raises, weights

#: The method with the result for its first argument: the features, or the costs where the two come in the other order.
PARTS = [
    SimpleNamespace(
        function=lambda x, cost, *more, **options: METHOD.function(x, cost, *more, **options)[0],
        reference=lambda x, cost, *more, **options: METHOD.reference(x, cost, *more, **options)[0],
    ),
    SimpleNamespace(
        function=lambda cost, x, *more, **options: METHOD.function(x, cost, *more, **options)[1],
        reference=lambda cost, x, *more, **options: METHOD.reference(x, cost, *more, **options)[1],
    ),
]


def of_part(part, x, cost, *more):
    """Arguments in the order that a part takes."""
    return (cost, x, *more) if part else (x, cost, *more)


def arguments(rng, places=11, others=17):
    x, cost = normal(rng, (2, places, 8)), normal(rng, (2, places, others))
    return x, cost, *(weights(rng, 8 + others, 6, True) for _ in range(2)), weights(rng, 8, 8, True)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize(("places", "others"), [(11, 17), (70, 3), (1, 1)])
def test_reference(rng, isa, places, others, part):
    check(PARTS[part], *of_part(part, *arguments(rng, places, others)))
    check(PARTS[part], *of_part(part, *arguments(rng, places, others)), scale=0.2)


@pytest.mark.parametrize("part", [0, 1])
def test_kinds(rng, part):
    check_kinds(PARTS[part], *of_part(part, *arguments(rng)))


def test_without_costs(rng):
    x, wq, wk, wv = normal(rng, (2, 11, 8)), weights(rng, 8, 6), weights(rng, 8, 6), weights(rng, 8, 8)
    out, cost = integrative_feature_cost_attention(x, None, wq, wk, wv)
    assert cost is None
    np.testing.assert_allclose(
        out, x + la.attention(*((x @ w)[:, None] for w in (wq, wk, wv)))[:, 0], rtol=1e-5, atol=1e-5
    )


def test_sharp_weights_double(rng):
    x, cost = np.eye(8, dtype=F32)[None], normal(rng, (1, 8, 5))
    sharp = np.concatenate([100 * np.eye(8), np.zeros((5, 8))])
    out, costs = integrative_feature_cost_attention(x, cost, sharp, sharp, np.eye(8))
    np.testing.assert_allclose(out, 2 * x, atol=1e-5)
    np.testing.assert_allclose(costs, 2 * cost, rtol=1e-5)


def cross(rng, cost=True):
    a, b = normal(rng, (2, 11, 8)), normal(rng, (2, 17, 8))
    wq, wk = (weights(rng, 8 + n * cost, 6, True) for n in (17, 11))
    return a, b, normal(rng, (2, 11, 17)) if cost else None, wq, wk, weights(rng, 8, 8, True)


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("cost", [True, False])
def test_cross_reference(rng, isa, cost, part):
    given = cross(rng, cost)
    out = feature_cost_cross_attention(*given)[part]
    expected = tolerances.perturbed(lambda *x: reference.feature_cost_cross_attention(*x)[part], given, {}, out.dtype)
    close(out, *expected)


def test_cross_without_costs_is_cross_attention(rng):
    a, b, _, *of = cross(rng, False)
    out, back, logits = feature_cost_cross_attention(a, b, None, *of)
    q, k = (x @ w + bias for x, (w, bias) in zip((a, b), of[:2], strict=True))
    values = [x @ of[2][0] + of[2][1] for x in (a, b)]
    np.testing.assert_allclose(
        out, a + la.attention(*(x[:, None] for x in (q, k, values[1])))[:, 0], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        back, b + la.attention(*(x[:, None] for x in (k, q, values[0])))[:, 0], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(logits, 6**-0.5 * q @ k.swapaxes(1, 2), rtol=1e-5, atol=1e-5)


def test_features_of_zeros_leave_costs(rng):
    a, b, cost, *_ = cross(rng)
    of_features = [np.concatenate([weights(rng, 8, 6), np.zeros((n, 6), F32)]) for n in (17, 11)]
    _, _, refined = feature_cost_cross_attention(0 * a, 0 * b, cost, *of_features, np.eye(8))
    np.testing.assert_array_equal(refined, cost)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cost": np.zeros((2, 10, 17), F32)}, ValueError, r"cost: got shape \(2, 10, 17\)"),
        ({"wq": np.zeros((8, 6))}, ValueError, r"wq: got shape \(8, 6\)"),
        ({"wv": np.zeros((8, 6))}, ValueError, r"wv: got shape \(8, 6\)"),
        ({"x": np.zeros((2, 11, 8), int)}, TypeError, r"x: got dtype int64"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    names = ("x", "cost", "wq", "wk", "wv")
    raises(METHOD, error, message, dict(zip(names, arguments(rng), strict=True)), **change)


def test_bad_cross(rng):
    a, b, cost, *of = cross(rng)
    with pytest.raises(ValueError, match="target: got shape"):
        feature_cost_cross_attention(a, b[..., :5], cost, *of)
    with pytest.raises(ValueError, match="cost: got shape"):
        feature_cost_cross_attention(a, b, cost[:, :, :3], *of)
