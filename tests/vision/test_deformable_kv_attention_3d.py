"""`deformable_kv_attention_3d` and `point_attention`: sampled places of videos."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import vision as reference
from longattn.vision import deformable_kv_attention_2d, deformable_kv_attention_3d, point_attention
from longattn.vision.deformable_kv_attention_3d import METHOD
from random_arrays import F32, normal
from vision_checks import check, check_kinds, close, raises, same, weights


def arguments(rng, shape=(2, 3, 4, 5, 12), bias=True):
    return normal(rng, shape), *(weights(rng, 12, 12, bias) for _ in range(3))


def network(rng, k=3):
    return {"offset_kernel": normal(rng, (k, k, k, 12)) / k, "offset_weights": 0.3 * normal(rng, (12, 3))}


@pytest.mark.parametrize(("stride", "factor", "ref"), [(1, 2.0, "corners"), (2, 1.0, "code"), (2, -1.0, "symmetric")])
@pytest.mark.parametrize("tokens", [0, 3])
def test_reference(rng, isa, stride, factor, ref, tokens):
    options = network(rng) | {"stride": stride, "range_factor": factor, "reference": ref}
    options |= {"modality": normal(rng, (2, tokens, 12)) if tokens else None, "wo": weights(rng, 12, 5, True)}
    options |= {"offset_norm": (normal(rng, (12,)), normal(rng, (12,)))} if stride == 2 else {}
    check(METHOD, *arguments(rng), heads=3, **options)


def test_kinds(rng):
    check_kinds(METHOD, *arguments(rng), heads=3, modality=normal(rng, (2, 2, 12)), **network(rng))


def test_zero_offsets_give_attention(rng):
    z, *w = arguments(rng, bias=False)
    options = network(rng) | {"offset_weights": np.zeros((12, 3), F32)}
    rows = [(z @ m).reshape(2, 60, 3, 4).swapaxes(1, 2) for m in w]
    expected = la.attention(*rows).swapaxes(1, 2).reshape(2, 60, 12)
    same(METHOD, deformable_kv_attention_3d(z, *w, heads=3, **options), expected, z, *w, heads=3, **options)


def test_one_frame_is_an_image(rng):
    z, _, wk, wv = arguments(rng, (2, 1, 4, 5, 12))
    eye = np.eye(12, dtype=F32)
    kernel, to = normal(rng, (1, 3, 3, 12)), 0.3 * normal(rng, (12, 3))
    options = {"offset_kernel": kernel[:, :1, :1], "offset_weights": to}
    image = deformable_kv_attention_2d(
        z[:, 0], eye, wk, wv, heads=3, offset_kernel=kernel[0, :1, :1], offset_weights=to[:, 1:], reference="corners"
    )
    # The offset in time leads nowhere: an axis of one place is the same at all coordinates but for its share of zeros.
    still = to.copy()
    still[:, 0] = 0
    options["offset_weights"] = still
    video = deformable_kv_attention_3d(z, eye, wk, wv, heads=3, **options)
    same(
        METHOD,
        video.reshape(image.shape).reshape(2, 20, 12),
        image.reshape(2, 20, 12),
        z,
        eye,
        wk,
        wv,
        heads=3,
        **options,
    )


def points(rng, shape=(2, 3, 4, 12), heads=3, count=4):
    n = len(shape) - 2
    return (
        normal(rng, shape), weights(rng, 12, 12, True), weights(rng, 12, count * heads * n, True),
        weights(rng, 12, count * heads, True),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "heads", "count"), [((2, 3, 4, 12), 3, 4), ((1, 2, 3, 4, 12), 2, 3), ((2, 6, 12), 1, 2)]
)
def test_point_attention(rng, isa, shape, heads, count):
    given, options = points(rng, shape, heads, count), {"heads": heads, "points": count, "wo": weights(rng, 12, 5)}
    out = point_attention(*given, **options)
    close(out, *tolerances.perturbed(reference.point_attention, given, options, F32))


def test_one_point_without_offset(rng):
    z, wv, _, to = points(rng, count=1)
    out = point_attention(z, wv, np.zeros((12, 6), F32), to, heads=3, points=1)
    np.testing.assert_array_equal(out, z @ wv[0] + wv[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z": np.zeros((2, 4, 5, 12), F32)}, ValueError, r"z: got shape \(2, 4, 5, 12\), expected \[B, T, H, W, C\]"),
        ({"offset_kernel": np.zeros((3, 3, 12))}, ValueError, r"offset_kernel: got shape \(3, 3, 12\)"),
        ({"offset_weights": np.zeros((12, 2))}, ValueError, r"offset_weights: got shape \(12, 2\)"),
        ({"modality": np.zeros((1, 2, 12), F32)}, ValueError, r"modality: got shape \(1, 2, 12\)"),
        ({"stride": 0}, ValueError, r"stride: got 0"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    z, wq, wk, wv = arguments(rng)
    raises(METHOD, error, message, {"z": z, "wq": wq, "wk": wk, "wv": wv, "heads": 3, **network(rng)}, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": np.zeros((12, 23))}, r"offsets: got shape \(12, 23\)"),
        ({"weights": np.zeros((12, 11))}, r"weights: got shape"),
        ({"points": 0}, r"points: got 0"),
    ],
)
def test_bad_points(rng, change, message):
    z, wv, offsets, to = points(rng)
    with pytest.raises(ValueError, match=message):
        point_attention(**({"z": z, "wv": wv, "offsets": offsets, "weights": to, "heads": 3} | change))
