"""Groups of grids, samples between their places, convolutions and biases."""

import itertools

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn import vision
from longattn.reference.vision import layers
from longattn.vision.convolution import convolution, gelu
from random_arrays import BF16, DTYPES, F16, F32, normal
from vision_checks import close, weights


def random_points(rng, shape):
    """Coordinates inside and outside of the grid, none close to where neighbours change."""
    return (rng.uniform(-1.4, 1.4, shape)).astype(F32)


@pytest.mark.parametrize(
    ("shape", "size", "interval"),
    [((6, 8), (3, 2), 1), ((6, 8), (3, 2), (2, 4)), ((4, 6, 8), (2, 3, 2), (2, 1, 2)), ((12,), 3, 2), ((5,), 5, 1)],
)
def test_partition(rng, shape, size, interval):
    x = rng.standard_normal((2, *shape, 3))
    groups = vision.partition(x, size, interval=interval)
    sizes = (size,) if isinstance(size, int) else size
    steps = (interval,) * len(sizes) if isinstance(interval, int) else interval
    same_group = layers.group_mask(shape, sizes, steps)
    inner = layers.inner_places(shape, sizes, steps)
    numbers = vision.partition(np.arange(np.prod(shape)).reshape(1, *shape), size, interval=interval)[0]
    for row in numbers:
        assert same_group[np.ix_(row, row)].all() and (inner[row] == np.arange(len(row))).all()
        assert same_group[row[0]].sum() == len(row)
    np.testing.assert_array_equal(groups, x.reshape(2, -1, 3)[:, numbers])
    np.testing.assert_array_equal(vision.unpartition(groups, shape, size, interval=interval), x)
    view = vision.partition(x, size, interval=interval, flat=False)
    assert np.shares_memory(view, x)
    np.testing.assert_array_equal(view.reshape(groups.shape), groups)


def test_partition_of_other_axes_and_kinds(rng):
    x = rng.integers(0, 9, (6, 4, 2))
    np.testing.assert_array_equal(vision.partition(x, (3, 2), first=0), vision.partition(x[None], (3, 2))[0])
    torch = pytest.importorskip("torch")
    parts = vision.partition(torch.from_numpy(x), (3, 2), first=0)
    assert isinstance(parts, torch.Tensor) and torch.equal(
        vision.unpartition(parts, (6, 4), (3, 2), first=0), torch.from_numpy(x)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: vision.partition(x, (4, 2)), r"x: got axis 1 of 6, expected a multiple of 4"),
        (lambda x: vision.partition(x, (3, 2, 2, 1)), r"size: got 4 numbers"),
        (lambda x: vision.partition(x, (3, 2), interval=(1,)), r"interval: got 1 numbers"),
        (lambda x: vision.partition(x, (3, 0)), r"size: got 0"),
        (lambda x: vision.unpartition(x, (6, 4), (3, 2)), r"y: got shape \(2, 6, 4, 3\), expected 4 groups of 6"),
        (lambda x: vision.unpartition(x, (6, 5), (3, 2)), r"shape: got \(6, 5\)"),
    ],
)
def test_bad_partitions(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.zeros((2, 6, 4, 3)))


def masked(q, k, v, heads, mask, bias=0.0, scale=None):
    parts = (layers.flat(np.asarray(x, np.float64)) for x in (q, k, v))
    return layers.attend(*parts, heads, scale, bias, mask).reshape(*q.shape[:-1], v.shape[-1])


@pytest.mark.parametrize(
    ("shape", "size", "interval"),
    [((7, 9), (3, 4), 1), ((6, 8), (3, 2), (2, 4)), ((5, 7), (2, 3), 2), ((3, 5, 4), (2, 3, 2), 1), ((11,), (4,), 1)],
)
def test_grouped_attention(rng, isa, threads, shape, size, interval):
    q, k, v = (normal(rng, (2, *shape, c)) for c in (12, 12, 6))
    table = normal(rng, (3, np.prod(size), np.prod(size)))
    inner = layers.inner_places(shape, size, interval)
    mask, bias = layers.group_mask(shape, size, interval), table[:, inner[:, None], inner[None]]

    def reference(q, k, v):
        return masked(q, k, v, 3, mask, bias, 0.4)

    out = vision.grouped_attention(q, k, v, size, heads=3, interval=interval, bias=table, scale=0.4)
    close(out, *tolerances.perturbed(reference, (q, k, v), {}, F32))


@pytest.mark.parametrize(
    ("shape", "size", "shift"), [((8, 6), (4, 3), (2, 1)), ((7, 5), (4, 3), (1, 2)), ((4, 6), (4, 3), (2, 1))]
)
def test_shifted_windows(rng, isa, shape, size, shift):
    """Windows of the rolled, padded grid; places from opposite ends are apart."""
    q, k, v = (normal(rng, (2, *shape, 8)) for _ in range(3))
    rolls = [0 if s >= x else r for r, s, x in zip(shift, size, shape, strict=True)]
    full = [-(-x // s) * s for x, s in zip(shape, size, strict=True)]
    at = layers.places(shape)
    rolled = (at - rolls) % full
    ids = np.concatenate([rolled // size, at < rolls], axis=1)
    mask = (ids[:, None] == ids[None]).all(axis=-1)
    out = vision.grouped_attention(q, k, v, size, heads=2, shift=shift)
    close(out, *tolerances.perturbed(lambda *a: masked(*a, 2, mask), (q, k, v), {}, F32))


def test_padded_keys_of_zeros(rng, isa):
    q, k, v = (normal(rng, (1, 5, 4)) for _ in range(3))
    out = vision.grouped_attention(q, k, v, 3, mask_pad=False)
    zeros = np.concatenate([k[:, 3:], np.zeros((1, 1, 4), F32)], axis=1)
    last = la.attention(
        q[:, None, 3:], zeros[:, None], np.concatenate([v[:, 3:], np.zeros((1, 1, 4), F32)], axis=1)[:, None]
    )
    np.testing.assert_allclose(out[:, 3:], last[:, 0], atol=1e-6)


@pytest.mark.parametrize("over", ["n", "fn", "vn", "vfn", "nf"])
def test_attend_over(rng, isa, over):
    q, k, v = (normal(rng, (2, 3, 4, 5, 8)) for _ in range(3))
    others = [i for i, name in enumerate("bvfn") if name not in over]
    at = layers.places((2, 3, 4, 5))[:, others]
    mask = (at[:, None] == at[None]).all(axis=-1)

    def reference(q, k, v):
        rows = (np.asarray(x, np.float64).reshape(1, -1, 8) for x in (q, k, v))
        return layers.attend(*rows, 2, mask=mask).reshape(q.shape)

    out, lse = vision.attend_over(q, k, v, "bvfn", over, heads=2, return_lse=True)
    assert lse.shape == (2, 3, 4, 5, 2)
    close(out, *tolerances.perturbed(reference, (q, k, v), {}, F32))
    np.testing.assert_array_equal(vision.attend_over(q, k, v, "bvfn", over, heads=2), out)


def test_attend_over_other_keys(rng):
    q, k, v = normal(rng, (2, 3, 4, 8)), normal(rng, (2, 3, 6, 8)), normal(rng, (2, 3, 6, 10))
    expected = la.attention(*(x.reshape(6, -1, 2, x.shape[-1] // 2).swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)
    np.testing.assert_array_equal(vision.attend_over(q, k, v, "bfn", "n", heads=2), expected.reshape(2, 3, 4, 10))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"axes": "bvn"}, ValueError, r"q: got shape .* expected axes 'bvn' and channels"),
        ({"over": "x"}, ValueError, r"over: got 'x', expected letters of 'bvfn'"),
        ({"over": "nn"}, ValueError, r"over: got 'nn', expected different letters"),
        ({"over": 1}, TypeError, r"over: got 1"),
        ({"k": np.zeros((2, 2, 4, 5, 8), F32)}, ValueError, r"k: got shape \(2, 2, 4, 5, 8\), expected"),
        ({"heads": 3}, ValueError, r"heads: got 3"),
    ],
)
def test_bad_axes(rng, change, error, message):
    x = normal(rng, (2, 3, 4, 5, 8))
    with pytest.raises(error, match=message):
        vision.attend_over(**({"q": x, "k": x, "v": x, "axes": "bvfn", "over": "n", "heads": 2} | change))


@pytest.mark.parametrize("shape", [(7,), (5, 6), (3, 4, 5), (1, 6), (4, 1)])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("coordinates", ["unit", "pixel"])
def test_sample(rng, isa, threads, shape, align_corners, padding, coordinates):
    x = normal(rng, (2, *shape, 19))
    at = random_points(rng, (2, 9, len(shape)))
    at = at if coordinates == "unit" else ((at + 1) / 2 * (np.array(shape) - 1)).astype(F32)
    options = {"coordinates": coordinates, "align_corners": align_corners, "padding": padding}
    out = vision.sample(x, at, **options)
    close(
        out,
        *tolerances.perturbed(lambda x, at: layers.sample(np.asarray(x, np.float64), at, **options), (x, at), {}, F32),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 5)])
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("align_corners", [True, False])
def test_sample_is_grid_sample(rng, dtype, shape, padding, align_corners):
    torch = pytest.importorskip("torch")
    x = normal(rng, (2, *shape, 19), dtype)
    at = random_points(rng, (2, *(3 for _ in shape), len(shape)))
    out = vision.sample(x, at, padding=padding, align_corners=align_corners)
    assert out.dtype == dtype
    image = torch.from_numpy(np.moveaxis(x.astype(np.float64), -1, 1).copy())
    theirs = torch.nn.functional.grid_sample(
        image, torch.from_numpy(at[..., ::-1].astype(np.float64)), padding_mode=padding, align_corners=align_corners
    )
    expected = np.moveaxis(theirs.numpy(), 1, -1)
    allowed = 64 * tolerances.U * np.abs(x.astype(np.float64)).max() + tolerances.ROUNDOFF[dtype][0] * np.abs(expected)
    close(out, expected, allowed + tolerances.ROUNDOFF[dtype][1])


def test_groups_and_weighted_sums(rng, isa):
    x, at = normal(rng, (2, 5, 6, 12)), random_points(rng, (2, 7, 3, 4, 2))
    factors = normal(rng, (2, 7, 3, 4))
    out = vision.sample(x, at, weights=factors, groups=4)
    parts = [vision.sample(x[..., 3 * g : 3 * g + 3], at[:, :, :, g]) for g in range(4)]
    expected = np.concatenate([(p * factors[:, :, :, g, None]).sum(axis=2) for g, p in enumerate(parts)], axis=-1)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    one = vision.sample(x[:1], at, weights=factors, groups=4)
    np.testing.assert_array_equal(one, vision.sample(np.repeat(x[:1], 2, axis=0), at, weights=factors, groups=4))


def test_places_without_a_share_are_not_read(rng):
    x = normal(rng, (1, 3, 3, 4))
    x[0, 2] = np.nan
    out = vision.sample(x, np.array([[[1.0, 0.5], [1.5, 0.5]]]), coordinates="pixel")
    assert np.isfinite(out[0, 0]).all() and np.isnan(out[0, 1]).all()


def test_strided_grids_and_tensors(rng):
    x, at = normal(rng, (2, 3, 4, 5, 12)), random_points(rng, (2, 9, 3))
    out = vision.sample(x, at)
    for other in (
        np.moveaxis(np.moveaxis(x, 1, 3).copy(), 3, 1),
        np.repeat(x, 2, axis=2)[:, :, ::2],
        np.repeat(x, 2, axis=4)[..., ::2],
    ):
        np.testing.assert_array_equal(vision.sample(other, at), out)
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(vision.sample(torch.from_numpy(x), torch.from_numpy(at)).numpy(), out)
    assert vision.sample(torch.from_numpy(x).bfloat16(), torch.from_numpy(at)).dtype == torch.bfloat16
    assert vision.sample(x, at[:, :0]).shape == (2, 0, 12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"coords": np.zeros((2, 9, 3), F32)}, ValueError, r"coords: got shape \(2, 9, 3\), expected \[B, ..., 2\]"),
        ({"coords": np.full((2, 9, 2), np.nan)}, ValueError, r"coords: got NaN or infinity"),
        ({"coords": np.zeros((3, 9, 2))}, ValueError, r"x: got batch 2, expected 3"),
        ({"coords": np.zeros((2, 9, 2), np.int64)}, TypeError, r"coords: got dtype int64"),
        ({"x": np.zeros((2, 12), F32)}, ValueError, r"x: got shape \(2, 12\)"),
        ({"x": np.zeros((2, 4, 4, 12))}, TypeError, r"x: got dtype float64"),
        ({"x": np.zeros((2, 0, 4, 12), F32)}, ValueError, r"x: got an empty axis"),
        ({"groups": 5}, ValueError, r"groups: got 5, expected a divisor of 12"),
        ({"weights": np.zeros((2, 8))}, ValueError, r"weights: got shape \(2, 8\)"),
        ({"padding": "reflect"}, ValueError, r"padding: got 'reflect'"),
        ({"coordinates": "metre"}, ValueError, r"coordinates: got 'metre'"),
        ({"align_corners": 1}, TypeError, r"align_corners: got 1"),
    ],
)
def test_bad_samples(rng, change, error, message):
    with pytest.raises(error, match=message):
        vision.sample(**({"x": normal(rng, (2, 4, 4, 12)), "coords": np.zeros((2, 9, 2), F32)} | change))


@pytest.mark.parametrize(
    ("shape", "taps", "stride", "padding"),
    [
        ((5, 6), (3, 3), 1, "same"),
        ((5, 6), (2, 3), 2, 0),
        ((4, 5, 6), (3, 1, 2), (1, 2, 2), (1, 0, 1)),
        ((9,), (4,), 3, 2),
    ],
)
def test_depthwise_convolution(rng, isa, threads, shape, taps, stride, padding):
    x, kernel = normal(rng, (2, *shape, 21)), normal(rng, (*taps, 21))
    out = vision.depthwise_convolution(x, kernel, stride=stride, padding=padding, bias=normal(rng, (21,)) * 0)
    dense = np.zeros((*taps, 21, 21), F32)
    dense[..., np.arange(21), np.arange(21)] = kernel
    np.testing.assert_allclose(out, convolution(x, dense, stride=stride, padding=padding), atol=1e-4)
    if isinstance(stride, int) and isinstance(padding, int):
        close(
            out,
            *tolerances.perturbed(
                lambda x, k: layers.depthwise(np.asarray(x, np.float64), k, stride, padding), (x, kernel), {}, F32
            ),
        )


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_convolutions_of_halves(rng, dtype):
    x, kernel = normal(rng, (1, 5, 6, 21), dtype), normal(rng, (3, 3, 21))
    out = vision.depthwise_convolution(x, kernel)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, vision.depthwise_convolution(x.astype(F32), kernel).astype(dtype))


def test_strides_beyond_the_grid_need_no_memory(rng):
    x, kernel = normal(rng, (1, 5, 6, 3)), normal(rng, (3, 2, 3))
    for stride in (50, 2**31, 2**62):
        out = vision.depthwise_convolution(x, kernel, stride=stride)
        np.testing.assert_array_equal(out, vision.depthwise_convolution(x, kernel)[:, :1, :1])
        assert convolution(x, normal(rng, (3, 2, 3, 4)), stride=stride, padding=0).shape == (1, 1, 1, 4)


def test_convolution_is_torchs(rng):
    torch = pytest.importorskip("torch")
    x, kernel = normal(rng, (2, 7, 6, 5)), normal(rng, (3, 3, 5, 4))
    image, taps = (torch.from_numpy(np.moveaxis(a, (-1,), (1,)).copy()) for a in (x, kernel))
    taps = torch.from_numpy(np.transpose(kernel, (3, 2, 0, 1)).copy())
    theirs = torch.nn.functional.conv2d(image, taps, stride=2, padding=1).numpy()
    np.testing.assert_allclose(convolution(x, kernel, stride=2, padding=1), np.moveaxis(theirs, 1, -1), atol=1e-4)


def test_gelu(rng, isa, threads):
    x = np.linspace(-9, 9, 40_001, dtype=F32).reshape(-1, 1)
    expected = layers.gelu(x.astype(np.float64))
    np.testing.assert_array_less(np.abs(gelu(x) - expected), 4e-7 * (1 + np.abs(x)))
    assert gelu(np.zeros((0, 3), F32)).shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernel": np.zeros((3, 3, 20), F32)}, ValueError, r"kernel: got shape \(3, 3, 20\)"),
        ({"kernel": np.zeros((7, 3, 21), F32), "padding": 0}, ValueError, r"kernel: got \(7, 3\) taps"),
        ({"kernel": np.zeros((0, 3, 21), F32)}, ValueError, r"kernel: got \(0, 3\) taps"),
        ({"stride": 0}, ValueError, r"stride: got 0"),
        ({"stride": (1,)}, ValueError, r"stride: got 1 numbers"),
        ({"padding": "valid"}, ValueError, r"padding: got 'valid'"),
        ({"bias": np.zeros(4)}, ValueError, r"bias: got shape \(4,\)"),
        ({"x": np.zeros((5, 21), F32)}, ValueError, r"x: got shape \(5, 21\)"),
    ],
)
def test_bad_convolutions(rng, change, error, message):
    with pytest.raises(error, match=message):
        vision.depthwise_convolution(**({"x": normal(rng, (1, 5, 6, 21)), "kernel": normal(rng, (3, 3, 21))} | change))


@pytest.mark.parametrize(("size", "keys"), [((3, 4), None), ((2, 3), (5, 4)), ((2, 3, 2), None), ((6,), (3,))])
def test_relative_position_bias(rng, size, keys):
    spans = [a + b - 1 for a, b in zip(size, keys or size, strict=True)]
    table = normal(rng, (int(np.prod(spans)), 3))
    np.testing.assert_array_equal(
        vision.relative_position_bias(table, size, keys), layers.relative_bias(table, size, keys).astype(F32)
    )


def test_absolute_offset_bias(rng):
    """The table's order is the one in which a scan of all pairs meets the offsets."""
    table = normal(rng, (2, 12))
    found, index = {}, np.zeros((12, 12), int)
    at = list(itertools.product(range(3), range(4)))
    for (i, a), (j, b) in itertools.product(enumerate(at), enumerate(at)):
        index[i, j] = found.setdefault((abs(a[0] - b[0]), abs(a[1] - b[1])), len(found))
    np.testing.assert_array_equal(vision.absolute_offset_bias(table, (3, 4)), table[:, index])


@pytest.mark.parametrize("residual", [False, True])
def test_dynamic_position_bias(rng, residual):
    norm = (normal(rng, (5,)), normal(rng, (5,)))
    first = weights(rng, 2, 5, True)
    middle, last = weights(rng, 5, 5, True), weights(rng, 5, 3, True)
    table = vision.dynamic_position_bias((3, 4), first, [(norm, middle), (norm, last)], residual=residual)
    p = layers.linear((layers.places((5, 7)) - [2, 3]).astype(float), first)
    more = layers.linear(np.maximum(layers.layer_norm(p, *norm), 0), middle)
    p = p + more if residual else more
    expected = layers.linear(np.maximum(layers.layer_norm(p, *norm), 0), last)
    np.testing.assert_allclose(table, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vision.relative_position_bias(np.zeros((5, 2)), (2, 2)), ValueError, r"table: got shape \(5, 2\)"),
        (lambda: vision.relative_position_bias(np.zeros((9, 2)), (2, 2), (2,)), ValueError, r"key_size: got 1"),
        (lambda: vision.absolute_offset_bias(np.zeros((2, 5)), (2, 2)), ValueError, r"table: got shape \(2, 5\)"),
        (lambda: vision.dynamic_position_bias((2, 2), np.zeros((2, 4)), []), ValueError, r"layers: got none"),
        (lambda: vision.dynamic_position_bias((2, 2), np.zeros((2, 4)), [3]), TypeError, r"layers\[0\]: got int"),
        (
            lambda: vision.dynamic_position_bias((2, 2), np.zeros((2, 4)), [(3, 4)]),
            TypeError,
            r"layers\[0\] norm: got int",
        ),
    ],
)
def test_bad_biases(call, error, message):
    with pytest.raises(error, match=message):
        call()
