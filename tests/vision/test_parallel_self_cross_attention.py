"""`parallel_self_cross_attention`, its positions and its pooling."""

from types import SimpleNamespace

import numpy as np
import pytest

import tolerances
from longattn.reference import vision as reference
from longattn.vision import (
    attentional_pool,
    attentional_unpool,
    parallel_self_cross_attention,
    wave_position_encoding,
)
from longattn.vision.parallel_self_cross_attention import METHOD
from random_arrays import DTYPES, F32, normal
from vision_checks import check, check_kinds, close, raises, weights

#: The method with the result for its first argument: `a`, or `b` where the two come in the other order.
SIDES = [
    SimpleNamespace(
        function=lambda a, b, *more, **options: METHOD.function(a, b, *more, **options)[0],
        reference=lambda a, b, *more, **options: METHOD.reference(a, b, *more, **options)[0],
    ),
    SimpleNamespace(
        function=lambda b, a, *more, **options: METHOD.function(a, b, *more, **options)[1],
        reference=lambda b, a, *more, **options: METHOD.reference(a, b, *more, **options)[1],
    ),
]


def arguments(rng, counts=(11, 14)):
    a, b = (normal(rng, (2, n, 12)) for n in counts)
    return a, b, *(weights(rng, 12, n, True) for n in (9, 9, 6)), [weights(rng, 12, 16, True), weights(rng, 16, 12)]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("counts", [(11, 14), (1, 70), (9, 9)])
def test_reference(rng, isa, counts, side):
    *rest, fuse = arguments(rng, counts)
    check(SIDES[side], *rest, fuse, heads=3)
    check(SIDES[side], *rest, fuse[:1], heads=3, update=[weights(rng, 28, 12, True)], scale=0.4)


@pytest.mark.parametrize("side", [0, 1])
def test_kinds(rng, side):
    check_kinds(SIDES[side], *arguments(rng), heads=3)


def test_equal_sets_give_equal_results(rng):
    a, _, wq, wk, wv, _ = arguments(rng)
    apart = np.concatenate([np.eye(6), -np.eye(6)]) @ rng.standard_normal((6, 12))
    x, y = parallel_self_cross_attention(a, a, wq, wk, wv, [apart], heads=3)
    np.testing.assert_allclose(x, a, atol=1e-6)
    np.testing.assert_allclose(y, a, atol=1e-6)


def test_sides_change_places(rng):
    a, b, *rest = arguments(rng)
    x, y = parallel_self_cross_attention(a, b, *rest, heads=3)
    y2, x2 = parallel_self_cross_attention(b, a, *rest, heads=3)
    np.testing.assert_array_equal(x, x2)
    np.testing.assert_array_equal(y, y2)


def networks(rng):
    return (
        [weights(rng, 12, 7, True), weights(rng, 7, 5, True)],
        [weights(rng, 2, 5, True)],
        [weights(rng, 10, 12, True)],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_positions_reference(rng, dtype):
    given = (normal(rng, (2, 11, 12), dtype), normal(rng, (2, 11, 2)), *networks(rng))
    out = wave_position_encoding(*given)
    assert out.dtype == dtype
    close(out, *tolerances.perturbed(reference.wave_position_encoding, given, {}, dtype))


def test_a_phase_of_zeros(rng):
    x, positions = normal(rng, (2, 11, 12)), normal(rng, (2, 11, 2))
    amplitude, _, combine = networks(rng)
    out = wave_position_encoding(x, positions, amplitude, [np.zeros((2, 5), F32)], combine)
    h = np.maximum(x @ amplitude[0][0] + amplitude[0][1], 0) @ amplitude[1][0] + amplitude[1][1]
    np.testing.assert_allclose(out, x + h @ combine[0][0][:5] + combine[0][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("ratio", [0.05, 0.5, 1.0])
def test_pool_reference(rng, ratio, gate):
    x, q, k = normal(rng, (2, 14, 12)), normal(rng, (2, 4, 9, 8)), normal(rng, (2, 2, 14, 8))
    options = {"ratio": ratio, "gate": gate, "scale": 0.7}
    out, index = attentional_pool(x, q, k, **options)
    expected = reference.attentional_pool(x, q, k, **options)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert (np.diff(index, axis=1) > 0).all() and index.shape == out.shape[:2]


def test_pool_that_keeps_all_and_unpool(rng):
    x, q, k = normal(rng, (2, 14, 12)), normal(rng, (2, 4, 9, 8)), normal(rng, (2, 4, 14, 8))
    out, index = attentional_pool(x, q, k, ratio=1.0)
    np.testing.assert_array_equal(out, x)
    part, index = attentional_pool(x, q, k, ratio=0.4)
    back = attentional_unpool(part, index, 14)
    kept = np.zeros((2, 14), bool)
    np.put_along_axis(kept, index, True, axis=1)
    np.testing.assert_array_equal(back, np.where(kept[..., None], x, 0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"heads": 2}, ValueError, r"heads: got 2"),
        ({"b": np.zeros((2, 14, 11), F32)}, ValueError, r"b: got shape \(2, 14, 11\)"),
        ({"fuse": []}, TypeError, r"fuse: got list"),
        ({"fuse": [np.zeros((12, 5))]}, ValueError, r"fuse\[0\]: got shape \(12, 5\)"),
        ({"update": [np.zeros((9, 12))]}, ValueError, r"update\[0\]: got shape \(9, 12\)"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    names = ("a", "b", "wq", "wk", "wv", "fuse")
    raises(METHOD, error, message, dict(zip(names, arguments(rng), strict=True)) | {"heads": 3}, **change)


def test_bad_pools(rng):
    x, q, k = normal(rng, (2, 14, 12)), normal(rng, (2, 4, 9, 8)), normal(rng, (2, 4, 14, 8))
    with pytest.raises(ValueError, match="ratio: got 0"):
        attentional_pool(x, q, k, ratio=0.0)
    with pytest.raises(ValueError, match="k: got weights"):
        attentional_pool(x[:, :3], q, k, ratio=0.5)
    with pytest.raises(ValueError, match="index: got 0 to 3"):
        attentional_unpool(x[:, :4], np.arange(4)[None].repeat(2, 0), 3)
    with pytest.raises(TypeError, match="index: got dtype float64"):
        attentional_unpool(x[:, :4], np.zeros((2, 4)), 3)
    with pytest.raises(ValueError, match="positions: got shape"):
        wave_position_encoding(x, x[:, :3], *networks(rng))
