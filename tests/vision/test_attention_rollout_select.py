"""`attention_rollout_select`: relevance through all layers, and attention of the relevant."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import vision as reference
from longattn.vision import (
    attention_rollout,
    attention_rollout_select,
    pair_wise_cross_attention,
    relevant_tokens,
)
from longattn.vision.attention_rollout_select import METHOD
from random_arrays import F32, normal, qkv
from vision_checks import close, raises, same


def layers(rng, count=3, tokens=20, spread=3.0):
    return [tuple(spread * normal(rng, (2, 2, tokens, 8)) for _ in range(2)) for _ in range(count)]


def last(rng, tokens=20):
    return qkv(rng, batch=2, heads=4, kv_heads=2, rows=tokens, keys=tokens, dim=8, value_dim=6)


@pytest.mark.parametrize("options", [{}, {"count": 0}, {"count": 19}, {"ratio": 0.3, "scale": 0.4}])
def test_reference(rng, isa, threads, options):
    out = attention_rollout_select(layers(rng), *last(rng), **options)
    assert out.dtype == F32
    given = (layers(np.random.default_rng(5)), *last(rng))
    found = METHOD.function(*given, **options)
    close(found, *tolerances.perturbed(METHOD.reference, given, options, F32))


def test_rollout(rng, isa, threads):
    given = layers(rng)
    row = attention_rollout(given)
    np.testing.assert_allclose(row.sum(axis=1), 1, rtol=1e-5)
    close(row, *tolerances.perturbed(reference.attention_rollout, (given,), {}, F32))


def test_kinds(rng):
    torch = pytest.importorskip("torch")
    given, (q, k, v) = layers(rng), last(rng)
    out = attention_rollout_select(given, q, k, v)
    tensors = [tuple(torch.from_numpy(x) for x in pair) for pair in given]
    np.testing.assert_array_equal(
        attention_rollout_select(tensors, *(torch.from_numpy(x) for x in (q, k, v))).numpy(), out
    )
    half = attention_rollout_select(given, *(torch.from_numpy(x).bfloat16() for x in (q, k, v)))
    assert half.dtype == torch.bfloat16 and half.shape == out.shape


def test_one_layer(rng):
    ((q, k),) = layers(rng, 1)
    weights = la.dense.attention_weights(q, k, [0]).mean(axis=1)[:, 0]
    expected = 0.5 * weights
    expected[:, 0] += 0.5
    np.testing.assert_allclose(attention_rollout([(q, k)]), expected, rtol=1e-5, atol=1e-7)


def test_layers_that_see_themselves(rng):
    same_rows = 30 * np.eye(20, dtype=F32)[None, None]
    row = attention_rollout([(same_rows, same_rows)] * 3)
    np.testing.assert_allclose(row[0], np.eye(20)[0], atol=1e-6)


def test_all_tokens(rng):
    given, (q, k, v) = layers(rng), last(rng)
    out = attention_rollout_select(given, q, k, v, count=19)
    same(METHOD, out, la.attention(q, k, v), given, q, k, v, count=19)


def test_partners(rng, isa):
    q, k, v = (np.repeat(x[:1], 2, axis=0) for x in last(rng))
    np.testing.assert_allclose(pair_wise_cross_attention(q, k, v), la.attention(q, k, v), atol=2e-6)
    q, k, v = last(rng)
    close(
        pair_wise_cross_attention(q, k, v),
        *tolerances.perturbed(reference.pair_wise_cross_attention, (q, k, v), {}, F32),
    )
    # Keys far below all others do not count.
    q, k = np.abs(q), np.concatenate([k[:1], np.full_like(k[1:], -300)])
    np.testing.assert_allclose(pair_wise_cross_attention(q, k, v)[0], la.attention(q[:1], k[:1], v[:1])[0], atol=2e-6)


def test_relevant_tokens():
    relevance = np.array([[0.5, 0.1, 0.2, 0.1, 0.1]])
    assert relevant_tokens(relevance, count=2).tolist() == [[0, 1, 2]]
    assert relevant_tokens(relevance, ratio=0.1).tolist() == [[0, 2]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layers": []}, ValueError, r"layers: got none"),
        ({"layers": [3]}, TypeError, r"layers\[0\]: got int"),
        ({"layers": [(np.zeros((2, 2, 19, 8), F32),) * 2]}, ValueError, r"layers: got relevance of shape \(2, 19\)"),
        (
            {"layers": [(np.zeros((2, 2, 19, 8), F32), np.zeros((2, 2, 20, 8), F32))]},
            ValueError,
            r"layers\[0\]: got shapes",
        ),
        ({"count": 20}, ValueError, r"count: got 20, expected 0 to 19"),
        ({"ratio": 0.0}, ValueError, r"ratio: got 0.0"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k, v = last(rng)
    raises(METHOD, error, message, {"layers": layers(rng), "q": q, "k": k, "v": v}, **change)


def test_bad_partners(rng):
    q, k, v = (x[:1] for x in last(rng))
    with pytest.raises(ValueError, match=r"q: got shape .* even number"):
        pair_wise_cross_attention(q, k, v)
