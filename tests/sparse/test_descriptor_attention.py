"""`descriptor_attention` against its float64 reference, and its identities."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from longattn.sparse import DescriptorAttention, descriptor_attention, pick_keyframes, resize_patches
from random_arrays import DTYPES

GRID, SPECIAL, CHANNELS = (6, 8), 3, 16
SMALL = {"heads": 2, "grid": GRID, "special": SPECIAL, "down": 2}


def layer(rng, *, batch=2, frames=4, dtype=np.float32):
    """Tokens and the four projections."""
    x = rng.standard_normal((batch, frames, SPECIAL + 48, CHANNELS)).astype(dtype)
    return x, [(rng.standard_normal((CHANNELS, CHANNELS)) / 4).astype(np.float32) for _ in range(4)]


def close(out, expected, x, weights):
    """Projections, their attention and the output's projection, in float32."""
    allowed = tolerances.added_branches(
        np.asarray(x, np.float64).reshape(1, -1, CHANNELS), *weights, heads=2, branches=1
    )
    # Descriptors are sums of a few numbers.
    np.testing.assert_allclose(out, expected, atol=4 * allowed.atol, rtol=4 * allowed.rtol)


@pytest.mark.parametrize("mode", ["bilinear", "mean", "dwconv"])
@pytest.mark.parametrize("down", [1, 2, 3, 4])
def test_reference(rng, isa, mode, down):
    x, weights = layer(rng)
    kernel = rng.standard_normal((down, down, CHANNELS)).astype(np.float32) / down if mode == "dwconv" else None
    options = {**SMALL, "down": down, "mode": mode, "kernel": kernel, "keyframes": [0, 2]}
    options["biases"] = [rng.standard_normal(CHANNELS).astype(np.float32), None, None, None]
    close(
        descriptor_attention(x, *weights, **options),
        reference.descriptor_attention(x, *weights, **options),
        x,
        weights,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, dtype):
    x, weights = layer(rng, dtype=dtype)
    out = descriptor_attention(x, *weights, **SMALL, keyframes=[0])
    assert out.dtype == np.float32
    close(out, reference.descriptor_attention(x, *weights, **SMALL), x, weights)


def test_any_number_of_threads(rng, threads):
    x, weights = layer(rng)
    close(
        descriptor_attention(x, *weights, **SMALL, keyframes=[0]),
        reference.descriptor_attention(x, *weights, **SMALL),
        x,
        weights,
    )


def test_rows_can_be_turned(rng):
    x, weights = layer(rng)
    seen = []

    def turn(rows, places):
        seen.append((rows.shape, places))
        return 2 * rows

    out = descriptor_attention(x, *weights, **SMALL, keyframes=[0], turn=turn)
    close(out, descriptor_attention(x, *weights, **SMALL, keyframes=[0], scale=4 * 8**-0.5), x, weights)
    for shape, places in seen:
        assert shape == (2, 2, len(places), 8) and places.max(axis=0).tolist() in ([6, 8], [5, 7])
    assert (seen[1][1][:SPECIAL] == 0).all()


# Identities


def test_a_grid_as_large_and_no_key_frames_is_attention_over_all(rng, isa):
    x, weights = layer(rng)
    out = descriptor_attention(x, *weights, **SMALL | {"down": 1}, keyframes=[])
    rows = x.reshape(2, -1, CHANNELS)
    q, k, v = ((rows @ w).reshape(2, -1, 2, 8).swapaxes(1, 2) for w in weights[:3])
    expected = la.attention(q, k, v).swapaxes(1, 2).reshape(x.shape) @ weights[3]
    close(out, expected, x, weights)


def test_one_chunk_is_the_call_with_frame_0(rng, isa):
    x, weights = layer(rng)
    out = DescriptorAttention(*weights, **SMALL).chunk(x)
    close(out, descriptor_attention(x, *weights, **SMALL, keyframes=[0]), x, weights)


def test_a_chunk_does_not_depend_on_later_ones(rng, isa):
    x, weights = layer(rng, frames=5)
    stream = DescriptorAttention(*weights, **SMALL)
    parts = [stream.chunk(x[:, :2]), stream.chunk(x[:, 2:3]), stream.chunk(x[:, 3:])]
    for part, first, last in zip(parts, (0, 2, 3), (2, 3, 5), strict=True):
        expected = descriptor_attention(x[:, :last], *weights, **SMALL, keyframes=[0])[:, first:]
        close(part, expected, x, weights)
    assert stream.nbytes == 2 * (48 + 5 * (SPECIAL + 12)) * 2 * CHANNELS * 4


def test_equal_patches_have_their_mean_as_descriptor(rng):
    x = np.broadcast_to(rng.standard_normal((2, 1, CHANNELS)), (2, 48, CHANNELS)).astype(np.float32)
    for down in (2, 3, 4):
        one, other = (resize_patches(x, GRID, down=down, mode=mode) for mode in ("bilinear", "mean"))
        np.testing.assert_allclose(one, other, rtol=1e-6)
        np.testing.assert_allclose(one, np.broadcast_to(x[:, :1], one.shape), rtol=1e-6)


def test_bilinear_by_four_is_the_middle():
    x = np.arange(64, dtype=np.float32).reshape(64, 1)
    small = resize_patches(x, (8, 8), down=4, mode="bilinear").reshape(2, 2)
    cut = x.reshape(8, 8)
    assert small[1, 0] == cut[5:7, 1:3].mean()


def test_key_frames(rng):
    x = np.repeat(rng.standard_normal((3, 1, 1, 4)), 10, axis=1).reshape(30, 1, 4)
    x = np.broadcast_to(x + 1e-3 * rng.standard_normal((30, 1, 4)), (30, 5, 4))
    picked = pick_keyframes(x, every=10, seed=3)
    assert picked[0] == 0 and len(picked) == 4 and set(picked[1:] // 10) <= {0, 1, 2}
    np.testing.assert_array_equal(pick_keyframes(x[:19]), [0])


def test_a_frame_that_is_picked_twice(rng):
    x, weights = layer(rng)
    once = descriptor_attention(x, *weights, **SMALL, keyframes=[0, 0])
    close(once, descriptor_attention(x, *weights, **SMALL, keyframes=[0]), x, weights)
    twice = descriptor_attention(x, *weights, **SMALL, keyframes=[0, 0], keep_duplicates=True)
    close(twice, reference.descriptor_attention(x, *weights, **SMALL, keyframes=[0, 0]), x, weights)


def test_frames_can_be_thinned(rng):
    x, weights = layer(rng)
    stream = DescriptorAttention(*weights, **SMALL)
    stream.chunk(x, keep_every=2)
    assert stream.nbytes == 2 * (48 + 2 * (SPECIAL + 12)) * 2 * CHANNELS * 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"heads": 3}, ValueError, r"heads: got 3, expected a divisor of 16"),
        ({"grid": (6,)}, TypeError, r"grid: got \(6,\)"),
        ({"grid": (6, 7)}, ValueError, r"x: got shape"),
        ({"down": 7}, ValueError, r"down: got 7"),
        ({"mode": "max"}, ValueError, r"mode: got 'max'"),
        ({"mode": "dwconv"}, ValueError, r"kernel: got None"),
        ({"kernel": np.zeros((2, 2, 16))}, ValueError, r"kernel: got one"),
        ({"keyframes": [4]}, ValueError, r"keyframes: got 4"),
        ({"biases": [None] * 3}, ValueError, r"biases: got 3"),
        ({"wk": np.zeros((16, 8))}, ValueError, r"wk: got shape \(16, 8\)"),
        ({"x": np.zeros((2, 4, 51, 16), int)}, TypeError, r"x: got dtype int64"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    x, weights = layer(rng)
    given = {"x": x, **dict(zip(("wq", "wk", "wv", "wo"), weights, strict=True)), **SMALL, "keyframes": [0]} | change
    with pytest.raises(error, match=message):
        descriptor_attention(**given)
