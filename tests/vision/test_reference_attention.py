"""`reference_attention`: text, image and condition."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.vision import reference_attention
from longattn.vision.reference_attention import METHOD
from random_arrays import DTYPES, F32, qkv
from vision_checks import cast, close, raises, tensors, weights


def groups(rng, counts=(4, 9, 6)):
    return [qkv(rng, batch=2, heads=4, kv_heads=2, rows=n, keys=n, dim=8, value_dim=6) for n in counts]


def agree(given, options, dtype=F32):
    for n, found in enumerate(METHOD.function(*given, **options)):

        def one(*a, n=n, **o):
            return METHOD.reference(*a, **o)[n]

        assert found.dtype == dtype
        close(found, *tolerances.perturbed(one, given, options, dtype))


@pytest.mark.parametrize(("joint", "projected"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("with_text", [False, True])
def test_reference(rng, isa, joint, projected, with_text):
    w = weights(rng, 24, 24, True) if projected else None
    agree(groups(rng), {"joint": joint, "w_zero": w, "text_to_condition": with_text, "scale": 0.5})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, threads, dtype):
    agree(cast(groups(rng), dtype), {}, dtype)


def test_tensors(rng):
    torch = pytest.importorskip("torch")
    given = groups(rng)
    for a, b in zip(reference_attention(*tensors(given, torch)), reference_attention(*given), strict=True):
        np.testing.assert_array_equal(a.numpy(), b)


def test_zero_weights(rng):
    given = groups(rng)
    text, image, _ = reference_attention(*given, w_zero=np.zeros((24, 24), F32))
    k, v = (np.concatenate([given[0][n], given[1][n]], axis=2) for n in (1, 2))
    np.testing.assert_array_equal(text, la.attention(given[0][0], k, v))
    np.testing.assert_array_equal(image, la.attention(given[1][0], k, v))


def test_no_condition(rng):
    given = groups(rng, (4, 9, 0))
    k, v = (np.concatenate([given[0][n], given[1][n]], axis=2) for n in (1, 2))
    for joint in (False, True):
        _, image, none = reference_attention(*given, joint=joint)
        np.testing.assert_allclose(image, la.attention(given[1][0], k, v), atol=1e-6)
        assert none.shape == (2, 4, 0, 6)


def test_joint_is_one_softmax(rng):
    given = groups(rng)
    k, v = (np.concatenate([g[n] for g in given], axis=2) for n in (1, 2))
    _, image, _ = reference_attention(*given, joint=True)
    q = given[1][0]
    tolerances.same_storage(q, k, v).check(image, la.attention(q, k, v))


def test_the_condition_does_not_see_the_image(rng):
    text, image, condition = groups(rng)
    one, two = (reference_attention(text, i, condition)[2] for i in (image, [x + 1 for x in image]))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": (1, 2)}, TypeError, r"image: got tuple, expected \(q, k, v\)"),
        (
            {"image": (np.zeros((2, 4, 9, 8), F32), np.zeros((2, 2, 8, 8), F32), np.zeros((2, 2, 8, 6), F32))},
            ValueError,
            r"image: got 9 queries and 8 keys",
        ),
        ({"w_zero": np.zeros((24, 23))}, ValueError, r"w_zero: got shape \(24, 23\)"),
        ({"w_zero": np.zeros((24, 24)), "joint": True}, ValueError, r"w_zero: got weights with joint=True"),
        ({"text": (np.zeros((4, 9, 8), F32),) * 3}, ValueError, r"text: got ranks \[3, 3, 3\]"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    names = ("text", "image", "condition")
    raises(METHOD, error, message, dict(zip(names, groups(rng), strict=True)), **change)


def test_other_widths(rng):
    text, image, _ = groups(rng)
    other = qkv(rng, batch=2, heads=4, kv_heads=2, rows=3, keys=3, dim=8, value_dim=5)
    with pytest.raises(ValueError, match=r"condition: got \(2, 2, 3, 5\) float32"):
        reference_attention(text, image, other)
