"""`FeatureMap`, `key_statistics` and `read_statistics`."""

import numpy as np
import pytest

import tolerances
from longattn.linear import FeatureMap, key_statistics, read_statistics
from longattn.linear.feature_map import KINDS
from longattn.reference.linear import features
from random_arrays import BF16, F16, normal, qkv

MAPS = [FeatureMap(kind=kind) for kind in KINDS if kind not in ("gaussian", "taylor")]
MAPS += [
    FeatureMap(kind="relu", norm="length", scale=2.0, offset=0.1),
    FeatureMap(kind="silu", norm="standard"),
    FeatureMap(kind="exp", projection=np.linspace(-1, 1, 9 * 20, dtype=np.float32).reshape(9, 20)),
    FeatureMap(kind="softmax_pair", projection=np.linspace(-1, 1, 7 * 20, dtype=np.float32).reshape(7, 20)),
    FeatureMap(kind="relu", projection=np.linspace(-1, 1, 2 * 9 * 20, dtype=np.float32).reshape(2, 9, 20)),
]


@pytest.mark.parametrize("phi", MAPS, ids=lambda phi: phi.kind)
@pytest.mark.parametrize("keys", [1, 70, 700])
def test_sums(rng, isa, phi, keys):
    _, k, v = qkv(rng, batch=2, keys=keys, dim=20, value_dim=37)
    found = key_statistics(k, v, phi=phi)
    mapped, wide = features(k, phi), v.astype(np.float64)
    slack = 60  # an exponential errs by its argument's error
    size = slack * np.abs(mapped).swapaxes(-1, -2) @ np.abs(wide)
    tolerances.check_linear(found.sums, mapped.swapaxes(-1, -2) @ wide, size, keys + 60)
    tolerances.check_linear(found.totals, mapped.sum(axis=2), slack * np.abs(mapped).sum(axis=2), keys + 60)
    tolerances.check_linear(found.values, wide.sum(axis=2), np.abs(wide).sum(axis=2), keys)
    np.testing.assert_array_equal(found.counts, [keys, keys])


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_storage(rng, dtype):
    """Read exactly, and summed up in float32."""
    _, k, v = qkv(rng, keys=90, q_dtype=dtype)
    found = key_statistics(k, v, phi="relu")
    again = key_statistics(k.astype(np.float32), v.astype(np.float32), phi="relu")
    np.testing.assert_array_equal(found.sums, again.sums)


READ = {
    "plain": lambda p, t, u, n: 0.3 * p,
    "plain_means": lambda p, t, u, n: 0.3 * p / n,
    "divide": lambda p, t, u, n: p / (t + 0.2),
    "divide_means": lambda p, t, u, n: p / n / (t / n + 0.2),
    "clamp": lambda p, t, u, n: p / np.maximum(t, 0.2),
    "subtract": lambda p, t, u, n: 0.3 * p / n + (1 - 0.3 * t / n) * u / n,
    "magnitude": lambda p, t, u, n: (1 + 1 / (0.3 * t / n + 0.2)) * 0.3 * p / n - 0.3 * t / n * u / n,
}


@pytest.mark.parametrize("read_out", READ)
def test_read_outs(rng, isa, read_out):
    q, k, v = (x.astype(np.float64) for x in qkv(rng, heads=2, rows=130, keys=60))
    statistics = key_statistics(*(x.astype(np.float32) for x in (k, v)), phi="relu")
    phi = [np.maximum(x, 0) for x in (q, k)]
    p, t = phi[0] @ phi[1].swapaxes(-1, -2) @ v, (phi[0] @ phi[1].swapaxes(-1, -2)).sum(axis=-1, keepdims=True)
    expected = READ[read_out](p, t, v.sum(axis=2, keepdims=True), 60)
    size = np.abs(READ[read_out](t * np.abs(v).max(), t, np.abs(v).sum(axis=2, keepdims=True), 60)) + 20
    out = read_statistics(q.astype(np.float32), statistics, read_out=read_out, eps=0.2, scale=0.3)
    tolerances.check_linear(out, expected, 4 * size, 120)


def test_parts_of_the_keys_add_up(rng):
    _, k, v = qkv(rng, keys=100)
    whole = key_statistics(k, v, phi="elu1")
    halves = [key_statistics(k[:, :, n], v[:, :, n], phi="elu1") for n in (slice(0, 37), slice(37, 100))]
    np.testing.assert_allclose(whole.sums, halves[0].sums + halves[1].sums, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(whole.counts, halves[0].counts + halves[1].counts)


def test_bad_input(rng):
    q, k, v = qkv(rng)
    statistics = key_statistics(k, v)
    for call, match in (
        (lambda: FeatureMap(kind="cos"), "kind: got 'cos', expected 'identity', "),
        (lambda: FeatureMap(kind=["relu"]), r"kind: got \['relu'\], expected 'identity', "),
        (lambda: FeatureMap(norm="most"), "norm: got 'most', expected 'none', 'length' or 'standard'"),
        (lambda: FeatureMap(kind="gaussian"), "projection: got None"),
        (lambda: FeatureMap(scale=float("inf")), "scale: got inf"),
        (lambda: key_statistics(k, v, phi=FeatureMap(projection=normal(rng, (3, 15)))), "projection: got shape"),
        (lambda: key_statistics(k, v[:, :, 1:]), "v: got shape"),
        (lambda: read_statistics(q, statistics, read_out="most"), "read_out: got 'most'"),
        (lambda: read_statistics(q[..., :8], statistics), "q: got 8 features"),
        (lambda: read_statistics(q[:, :3], statistics), "q: got 3 heads"),
        (lambda: read_statistics(np.concatenate([q, q]), statistics), "q: got batch 2"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="statistics: got int"):
        read_statistics(q, 3)
