"""`attention_guided_crop`, the weights it reads, crops of features and the soft match."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import vision as reference
from longattn.vision import attention_guided_crop, cls_attention, crop_features, soft_match
from longattn.vision.attention_guided_crop import METHOD
from random_arrays import DTYPES, F32, normal
from vision_checks import close, raises

OPTIONS = {"crops": 7, "top": 5}


def heat(rng, batch=2, patches=30):
    x = np.exp(2 * normal(rng, (batch, patches)))
    return x / x.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("top", [1, 5, 30])
@pytest.mark.parametrize("temperature", [0.03, 1.0])
def test_reference(rng, top, temperature):
    weights, options = heat(rng), {"crops": 9, "top": top, "temperature": temperature, "seed": 3, "ratio": (0.2, 0.6)}
    boxes = attention_guided_crop(weights, (5, 6), **options)
    np.testing.assert_allclose(boxes, reference.attention_guided_crop(weights, (5, 6), **options), rtol=1e-12)
    assert (boxes[..., :2] < boxes[..., 2:]).all() and (boxes >= 0).all() and (boxes <= [5, 6, 5, 6]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, dtype):
    weights = heat(rng).astype(dtype)
    boxes = attention_guided_crop(weights, (5, 6), **OPTIONS)
    np.testing.assert_allclose(boxes, reference.attention_guided_crop(weights, (5, 6), **OPTIONS), rtol=1e-12)


def test_one_patch_is_the_largest(rng):
    weights = heat(rng)
    boxes = attention_guided_crop(weights, (5, 6), crops=20, top=1, ratio=(1 / 30, 1 / 30))
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2 - 0.5
    expected = np.stack(np.divmod(weights.argmax(axis=1), 6), axis=-1)
    np.testing.assert_allclose(centres, np.broadcast_to(expected[:, None], centres.shape), atol=1e-12)


def test_high_temperature_is_uniform(rng):
    options = {"crops": 4000, "top": 5, "ratio": (0.01, 0.01)}
    boxes = attention_guided_crop(heat(rng, 1), (5, 6), temperature=1e6, **options)
    _, counts = np.unique(np.floor(boxes[0, :, :2]), axis=0, return_counts=True)
    # Five standard deviations of a binomial count.
    assert counts.size == 5 and (np.abs(counts - 800) < 5 * np.sqrt(800 * 0.8)).all()


def test_seeds(rng):
    weights = heat(rng)
    one, two, three = (attention_guided_crop(weights, (5, 6), **OPTIONS, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert (one != three).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cls_attention(rng, isa, dtype):
    q, k = normal(rng, (2, 4, 31, 16), dtype), normal(rng, (2, 2, 31, 16), dtype)
    out = cls_attention(q, k)
    close(out, *tolerances.perturbed(reference.cls_attention, (q, k), {}, F32))
    np.testing.assert_array_equal(cls_attention(q[:, :, :1], k), out)
    whole = la.dense.attention_weights(q, k, range(31))
    np.testing.assert_allclose(out, whole[:, :, 0, 1:].mean(axis=1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (8, 2)])
def test_crop_features(rng, shape, dtype):
    x = normal(rng, (2, 5, 6, 3), dtype)
    boxes = attention_guided_crop(heat(rng), (5, 6), **OPTIONS)
    out = crop_features(x, boxes, shape)
    assert out.dtype == dtype
    close(out, *tolerances.perturbed(lambda x: reference.crop_features(x, boxes, shape), (x,), {}, dtype))


def test_a_crop_of_all_is_the_image(rng):
    x = normal(rng, (2, 5, 6, 3))
    out = crop_features(x, np.broadcast_to([0.0, 0, 5, 6], (2, 1, 4)), (5, 6))
    np.testing.assert_allclose(out[:, 0], x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lead", [(), (3,)])
def test_soft_match(rng, lead):
    s, classes = normal(rng, (*lead, 7, 12), spread=0.2), np.array([0, 0, 1, 2, 2, 2, 3, 1, 3, 0, 1, 2])
    close(
        soft_match(s, classes),
        *tolerances.perturbed(lambda x: reference.soft_match(x, classes), (s,), {}, F32),
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"shape": (5, 5)}, ValueError, r"weights: got shape \(2, 30\), expected \[B, 25\]"),
        ({"top": 31}, ValueError, r"top: got 31, expected 1 to 30"),
        ({"ratio": (0.5, 0.4)}, ValueError, r"ratio: got \(0.5, 0.4\)"),
        ({"ratio": 0.5}, TypeError, r"ratio: got 0.5"),
        ({"temperature": 0.0}, ValueError, r"temperature: got 0.0"),
        ({"crops": 0}, ValueError, r"crops: got 0"),
        ({"weights": np.full((2, 30), np.nan)}, ValueError, r"weights: got numbers that are not finite"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    raises(METHOD, error, message, {"weights": heat(rng), "shape": (5, 6), **OPTIONS}, **change)


def test_other_bad_arguments(rng):
    with pytest.raises(ValueError, match="boxes: got shape"):
        crop_features(normal(rng, (2, 5, 6, 3)), np.zeros((1, 3, 4)), (2, 2))
    with pytest.raises(ValueError, match="classes: got shape"):
        soft_match(np.zeros((3, 4)), np.zeros(3, int))
    with pytest.raises(TypeError, match="classes: got dtype float64"):
        soft_match(np.zeros((3, 4)), np.zeros(4))
    with pytest.raises(ValueError, match="q: got shape"):
        cls_attention(np.zeros((2, 3, 4), F32), np.zeros((2, 3, 4), F32))
