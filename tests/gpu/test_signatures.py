"""Codes of 4 bits on a GPU: those of the reference, in the CPU's format, and the rows that they rank first."""

import numpy as np
import pytest

from emu.device import EmulatorDevice
from gpu.conftest import get, put
from longattn import gpu
from longattn.reference.retrieval import signatures as reference
from random_arrays import BF16, DTYPES, F16, F32


def decoded(codes, dim):
    """Grid points `[.., n, D]` and factors `[.., n]` of blocks in the format of the CPU."""
    *outer, blocks, _ = codes.shape
    groups = codes[..., : 8 * dim].reshape(*outer, blocks, dim // 8, 16, 4)
    levels = np.stack([groups & 15, groups >> 4], axis=-2)  # [.., group, key, half, t]
    points = np.moveaxis(levels, -3, -4).reshape(*outer, 16 * blocks, dim) - 7.5
    factors = np.ascontiguousarray(codes[..., 8 * dim :]).view(np.float16).reshape(*outer, 16 * blocks)
    return points, factors.astype(np.float64)


def keys_of(rng, dtype, shape):
    return (rng.standard_normal(shape) * rng.uniform(0.2, 4, (*shape[:-1], 1)) + rng.standard_normal(shape[-1])).astype(
        dtype
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_codes_are_those_of_the_reference(rng, device, dtype, dim):
    keys = keys_of(rng, dtype, (1, 2, 37, dim))
    made = gpu.signatures_encode(put(device, keys), seed=3, device=device)
    points, factors = decoded(get(made.codes), dim)
    assert points.shape == (1, 2, 32, dim)
    np.testing.assert_allclose(get(made.centre), keys.astype(np.float64).mean(2), atol=1e-6)
    for head in range(2):
        # The CPU fits on all rows and codes whole blocks.
        expected = reference.encode(keys[0, head], 4, 3)
        same = points[0, head] == expected.points[:32]
        # Where a coordinate lies between two levels, or two grids are as good, rounding decides.
        assert same.mean() > 0.99 and (same.all(axis=-1)).mean() > 0.7
        whole = same.all(axis=-1)
        np.testing.assert_allclose(factors[0, head][whole], expected.factors[:32][whole], rtol=2.0**-10)


def test_constant_keys_have_no_factor(device):
    keys = np.full((1, 1, 16, 64), 0.5, np.float32)
    _, factors = decoded(get(gpu.signatures_encode(put(device, keys), device=device).codes), 64)
    assert (factors == 0).all()


def estimates(q, made, dim):
    """Estimated logits `[B, H, G, n]` from codes and the query rounded to bytes, in float64."""
    points, factors = decoded(get(made.codes), dim)
    scaled = q.astype(np.float64) * dim**-0.5
    turned = scaled @ get(made.turned).astype(np.float64)
    step = np.abs(turned).max(-1, keepdims=True) / 127
    rounded = step * np.round(turned / step)
    centre = np.einsum("bhgd,bhd->bhg", scaled, get(made.centre).astype(np.float64))
    return np.einsum("bhgd,bhnd->bhgn", rounded, points * factors[..., None]) + centre[..., None]


@pytest.mark.parametrize(
    ("dtype", "dim", "group", "rows"),
    [
        (F16, 64, 4, 4500),
        *((dtype, *sizes) for dtype in DTYPES for sizes in ((64, 1, 304), (128, 8, 160), (256, 11, 160))),
    ],
)
def test_rows_have_the_largest_estimates(rng, device, dtype, dim, group, rows):
    keys, q = keys_of(rng, dtype, (1, 2, rows, dim)), rng.standard_normal((1, 2, group, dim)).astype(dtype)
    made = gpu.signatures_encode(put(device, keys), device=device)
    best = estimates(q, made, dim).max(axis=2)
    for k in (1, 40):
        chosen = get(gpu.signatures_topk(put(device, q), made, k, device=device))
        assert chosen.shape == (1, 2, k) and (np.diff(chosen) > 0).all()
        for head in range(2):
            order = np.sort(best[0, head])
            taken = np.zeros(best.shape[-1], bool)
            taken[chosen[0, head]] = True
            slack = 1e-2 * np.abs(order).max() / 127  # a byte of a query that lies between two
            assert best[0, head][taken].min() >= order[-k] - slack
            assert best[0, head][~taken].max() <= order[-k] + slack


def test_ties_go_to_the_lower_rows(rng, device):
    keys = np.repeat(rng.standard_normal((1, 1, 4, 64)), 40, axis=2).astype(F32)
    q = rng.standard_normal((1, 1, 2, 64)).astype(F32)
    made = gpu.signatures_encode(put(device, keys), device=device)
    best = np.argmax(estimates(q, made, 64).max(axis=2)[0, 0]) // 40
    chosen = get(gpu.signatures_topk(put(device, q), made, 25, device=device))[0, 0]
    np.testing.assert_array_equal(chosen, 40 * best + np.arange(25))


def test_all_rows_and_rows_coded_later(rng, device):
    keys, q = keys_of(rng, BF16, (2, 1, 96, 64)), rng.standard_normal((2, 1, 1, 64)).astype(BF16)
    first = gpu.signatures_encode(put(device, keys[:, :, :48]), device=device)
    later = gpu.signatures_encode(put(device, keys[:, :, 48:]), fitted=first, device=device)
    np.testing.assert_array_equal(get(later.centre), get(first.centre))
    chosen = get(gpu.signatures_topk(put(device, q), first, 48, device=device))
    np.testing.assert_array_equal(chosen, np.broadcast_to(np.arange(48), (2, 1, 48)))


def test_most_of_the_true_top_is_found(rng, device):
    keys, q = rng.standard_normal((1, 1, 640, 128)).astype(F16), rng.standard_normal((1, 1, 1, 128)).astype(F16)
    made = gpu.signatures_encode(put(device, keys), device=device)
    chosen = get(gpu.signatures_topk(put(device, q), made, 40, device=device))[0, 0]
    true = np.argsort(keys[0, 0].astype(np.float64) @ q[0, 0, 0].astype(np.float64))[-20:]
    assert np.isin(true, chosen).mean() >= 0.95


def test_bad_input(rng):
    device = EmulatorDevice()
    keys = rng.standard_normal((1, 1, 32, 64)).astype(F32)
    with pytest.raises(ValueError, match="keys: got 15 rows"):
        gpu.signatures_encode(keys[:, :, :15], device=device)
    made = gpu.signatures_encode(keys, device=device)
    started = list(device.started)
    for k in (0, 33):
        with pytest.raises(ValueError, match=f"k: got {k}, expected 1 to the 32 coded rows"):
            gpu.signatures_topk(keys[:, :, :1], made, k, device=device)
    for wrong in (np.zeros((1, 2, 1, 64), F32), np.zeros((1, 1, 1, 128), F32)):
        with pytest.raises(ValueError, match="queries: got shape"):
            gpu.signatures_topk(wrong, made, 4, device=device)
    with pytest.raises(ValueError, match="fitted: got a centre"):
        gpu.signatures_encode(np.zeros((1, 2, 16, 64), F32), fitted=made, device=device)
    assert device.started == started
