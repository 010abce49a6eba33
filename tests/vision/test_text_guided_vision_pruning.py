"""`text_guided_vision_pruning`: image tokens by what words attend to, each word by what words attend to."""

import itertools

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import vision as reference
from longattn.vision.text_guided_vision_pruning import (
    METHOD,
    attention_shift,
    text_guided_vision_pruning,
    vision_scores,
)
from random_arrays import DTYPES, F32, qkv
from vision_checks import close

TEXT, IMAGE = np.concatenate([np.arange(3, 7), np.arange(45, 60)]), np.arange(7, 43)


def case(rng, dtype=F32):
    return qkv(rng, batch=2, heads=4, kv_heads=2, rows=60, keys=60, q_dtype=dtype, spread=2.0)[:2]


@pytest.mark.parametrize("options", [{}, {"softmax": True}, {"scale": 0.4}])
def test_reference(rng, isa, threads, options):
    given = (*case(rng), TEXT, IMAGE)
    scores = vision_scores(*given, **options)
    close(scores, *tolerances.perturbed(reference.vision_scores, given, options, F32))
    for keep in (0, 1, 12):
        found = text_guided_vision_pruning(*given, keep=keep, **options)
        np.testing.assert_array_equal(found, METHOD.reference(*given, keep=keep, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    given = (*case(rng, dtype), TEXT, IMAGE)
    np.testing.assert_array_equal(text_guided_vision_pruning(*given, keep=9), METHOD.reference(*given, keep=9))


def test_all_of_them(rng):
    found = text_guided_vision_pruning(*case(rng), TEXT, IMAGE, keep=36)
    np.testing.assert_array_equal(found, [IMAGE] * 2)


def test_equal_words_are_the_mean_attention(rng, isa):
    q, k = case(rng)
    scores = vision_scores(q, k, TEXT, IMAGE, prior=np.full((2, len(TEXT)), 1 / len(TEXT)))
    weights = la.dense.attention_weights(q, k, TEXT, causal=True).astype(np.float64)
    np.testing.assert_allclose(scores, weights.mean(axis=(1, 2))[:, IMAGE], rtol=1e-5, atol=1e-7)


def test_one_word_is_the_last_token(rng, isa):
    q, k = case(rng)
    scores = vision_scores(q, k, np.array([59]), IMAGE)
    weights = la.dense.attention_weights(q, k, [59], causal=True).astype(np.float64)
    np.testing.assert_allclose(scores, weights.mean(axis=1)[:, 0, IMAGE], rtol=1e-5, atol=1e-7)


def test_torch(rng):
    torch = pytest.importorskip("torch")
    q, k = case(rng)
    scores = vision_scores(torch.from_numpy(q), torch.from_numpy(k), TEXT, IMAGE)
    np.testing.assert_array_equal(scores.numpy(), vision_scores(q, k, TEXT, IMAGE))


def test_attention_shift(rng):
    x = rng.random((4, 3, 10))
    expected = [np.abs(b - a).sum() / 3 for a, b in itertools.pairwise(x)]
    np.testing.assert_allclose(attention_shift(x), expected)
    with pytest.raises(ValueError, match=r"layer_scores: got shape \(1, 3, 10\)"):
        attention_shift(x[:1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keep": 37}, ValueError, r"keep: got 37, expected 0 to 36"),
        ({"text": np.array([3, 3])}, ValueError, r"text: got \[3, 3\], expected ascending"),
        ({"text": np.array([7, 8])}, ValueError, r"text: got places that image has, too"),
        ({"image": np.array([60])}, ValueError, r"image: got \[60\]"),
        ({"image": np.array([1.0])}, TypeError, r"image: got dtype float64"),
        ({"prior": np.ones((2, 4))}, ValueError, r"prior: got shape \(2, 4\)"),
        ({"k": np.zeros((2, 2, 59, 16), F32)}, ValueError, r"q: got shapes"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    q, k = case(rng)
    with pytest.raises(error, match=message):
        text_guided_vision_pruning(**({"q": q, "k": k, "text": TEXT, "image": IMAGE, "keep": 5} | change))
