"""`kernelized_rpe_attention`."""

import numpy as np
import pytest

import tolerances
from longattn.linear import FeatureMap, kernelized_rpe_attention
from longattn.reference import linear as reference
from random_arrays import DTYPES, F32, LAYOUTS, normal

check = tolerances.check_layer


def inputs(rng, batch=2, heads=4, kv_heads=2, rows=23, keys=None, dim=5, value_dim=6, count=7, dtype=F32,
           layout="contiguous"):  # fmt: skip
    keys = rows if keys is None else keys
    return {
        "q": normal(rng, (batch, heads, rows, dim), dtype, layout),
        "k": normal(rng, (batch, kv_heads, keys, dim), dtype, layout),
        "v": normal(rng, (batch, kv_heads, keys, value_dim), dtype, layout),
        "rpe": normal(rng, (heads, 2 * max(rows, keys, 1) - 1)),
        "features": normal(rng, (count, dim)),
    }


ways = pytest.mark.parametrize("method", ["fft", "direct"])


@ways
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"qk_norm": False, "scale": 0.4}], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 23])
def test_reference(rng, isa, method, options, rows):
    given = inputs(rng, rows=rows)
    check(kernelized_rpe_attention(**given, **options, method=method),
          reference.kernelized_rpe_attention(**given, **options))  # fmt: skip


@ways
@pytest.mark.parametrize(("rows", "keys"), [(5, 17), (17, 5)])
def test_cross(rng, method, rows, keys):
    given = inputs(rng, rows=rows, keys=keys)
    check(kernelized_rpe_attention(**given, method=method), reference.kernelized_rpe_attention(**given))


@ways
@pytest.mark.parametrize("size", [(4, 5), (1, 20), (20, 1)])
def test_maps(rng, threads, method, size):
    given = inputs(rng, rows=20)
    given["rpe"] = normal(rng, (4, 2 * size[0] - 1, 2 * size[1] - 1))
    check(kernelized_rpe_attention(**given, size=size, method=method),
          reference.kernelized_rpe_attention(**given, size=size))  # fmt: skip


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, method, dtype, layout):
    given = inputs(rng, dtype=dtype, layout=layout)
    y = kernelized_rpe_attention(**given, method=method)
    assert y.dtype == dtype
    check(y, reference.kernelized_rpe_attention(**given))


def test_several_blocks_of_queries(rng):
    given = inputs(rng, batch=1, heads=2, rows=600)
    both = [kernelized_rpe_attention(**given, causal=True, method=method) for method in ("fft", "direct")]
    check(both[1], both[0].astype(np.float64))


@ways
def test_a_function_of_features(rng, method):
    given = inputs(rng) | {"features": lambda x: np.maximum(x, 0) + 0.1}
    check(kernelized_rpe_attention(**given, method=method), reference.kernelized_rpe_attention(**given))


@ways
@pytest.mark.parametrize("kind", ["relu", "exp", "taylor"])
def test_a_feature_map(rng, method, kind):
    given = inputs(rng, count=5)
    phi = FeatureMap(kind=kind, offset=0.1) if kind != "taylor" else FeatureMap(kind="taylor")
    if kind == "taylor":  # features of one sign are those of channels of one sign
        given["q"], given["k"] = abs(given["q"]), abs(given["k"])
    given["features"] = phi
    check(kernelized_rpe_attention(**given, method=method), reference.kernelized_rpe_attention(**given))


# Identities


@ways
@pytest.mark.parametrize("causal", [False, True])
def test_biases_of_0_give_linear_attention(rng, isa, method, causal):
    given = inputs(rng, kv_heads=4)
    given["rpe"][:] = 0
    q, k = (x.astype(np.float64) / np.linalg.norm(x, axis=-1, keepdims=True) for x in (given["q"], given["k"]))
    phi_q, phi_k = (np.exp(x @ given["features"].T.astype(np.float64) - 0.5) for x in (q, k))
    s = (phi_q @ phi_k.swapaxes(2, 3)) * (np.tri(23) if causal else 1)
    expected = s @ given["v"] / s.sum(axis=-1, keepdims=True)
    check(kernelized_rpe_attention(**given, causal=causal, method=method), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_transforms_and_the_direct_product_agree(rng, isa, causal):
    given = inputs(rng, rows=60)
    given["rpe"] *= 4  # factors over more than six orders of magnitude
    check(kernelized_rpe_attention(**given, causal=causal, method="fft"),
          reference.kernelized_rpe_attention(**given, causal=causal))  # fmt: skip


@ways
def test_a_linear_bias_is_a_scalar_decay(rng, isa, method):
    given = inputs(rng, kv_heads=4)
    slope = 0.3
    given["rpe"] = np.broadcast_to(np.where(np.arange(-22, 23) <= 0, slope * np.arange(-22, 23), -np.inf), (4, 45))
    q, k = (x.astype(np.float64) / np.linalg.norm(x, axis=-1, keepdims=True) for x in (given["q"], given["k"]))
    phi_q, phi_k = (np.exp(x @ given["features"].T.astype(np.float64) - 0.5) for x in (q, k))
    state, total = np.zeros((2, 4, 7, 6)), np.zeros((2, 4, 7))
    expected = np.zeros((2, 4, 23, 6))
    for t in range(23):
        state = np.exp(-slope) * state + phi_k[:, :, t, :, None] * given["v"][:, :, t, None]
        total = np.exp(-slope) * total + phi_k[:, :, t]
        expected[:, :, t] = np.einsum("bhr,bhrd->bhd", phi_q[:, :, t], state)
        expected[:, :, t] /= (phi_q[:, :, t] * total).sum(axis=-1, keepdims=True)
    check(kernelized_rpe_attention(**given, method=method), expected)


@ways
def test_a_single_token_returns_its_value(rng, isa, method):
    given = inputs(rng, rows=1)
    check(kernelized_rpe_attention(**given, method=method), np.repeat(given["v"], 2, axis=1).astype(np.float64))


@ways
@pytest.mark.parametrize("rows", [1, 5, 22])
def test_the_last_queries_alone_give_their_rows(rng, isa, method, rows):
    given = inputs(rng)
    expected = reference.kernelized_rpe_attention(**given, causal=True)[:, :, -rows:]
    given["q"] = np.ascontiguousarray(given["q"][:, :, -rows:])
    y = kernelized_rpe_attention(**given, causal=True, method=method)
    check(y, reference.kernelized_rpe_attention(**given, causal=True))
    check(y, expected)


def test_steps_read_features_that_were_kept(rng):
    given = inputs(rng, rows=30)
    expected = reference.kernelized_rpe_attention(**given, causal=True)
    unit = {n: given[n] / np.linalg.norm(given[n], axis=-1, keepdims=True) for n in "qk"}
    q, k = (np.exp(x @ given["features"].T - 0.5) for x in unit.values())
    for t in (0, 1, 29):
        y = kernelized_rpe_attention(
            q[:, :, t : t + 1], k[:, :, : t + 1], given["v"][:, :, : t + 1], given["rpe"], lambda x: x, causal=True,
            qk_norm=False,
        )  # fmt: skip
        check(y, expected[:, :, t : t + 1])


@ways
def test_a_query_that_sees_nothing_gets_zeros(rng, method):
    given = inputs(rng)
    given["rpe"][:] = -np.inf
    assert not kernelized_rpe_attention(**given, method=method).any()
    empty = inputs(rng, rows=4, keys=0)
    assert not kernelized_rpe_attention(**empty, method=method).any()
    assert kernelized_rpe_attention(**inputs(rng, rows=0, keys=4), method=method).shape == (2, 4, 0, 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rpe": np.zeros((4, 44))}, ValueError, r"rpe: got shape \(4, 1, 44\), expected an odd number"),
        ({"rpe": np.zeros((4, 43))}, ValueError, "rpe: got shape"),
        ({"rpe": np.zeros((2, 45))}, ValueError, r"rpe: got shape \(2, 45\)"),
        ({"rpe": np.full((4, 45), np.nan)}, ValueError, "rpe: got NaN or infinity"),
        ({"features": np.zeros((7, 4))}, ValueError, r"features: got shape \(7, 4\)"),
        ({"features": np.zeros((0, 5))}, ValueError, "expected at least one direction"),
        ({"features": lambda x: x}, ValueError, "features: got features of q that are negative"),
        ({"v": np.zeros((2, 2, 22, 6), F32)}, ValueError, "v: got shapes"),
        ({"size": (4, 5)}, ValueError, "size: got 4 x 5"),
        ({"causal": 1}, TypeError, "causal: got 1"),
        (
            {"causal": True, "k": np.ones((2, 2, 22, 5), F32), "v": np.ones((2, 2, 22, 6), F32)},
            ValueError,
            "q: got 23 queries and 22 keys, expected at most as many with causal",
        ),
        ({"method": "quick"}, ValueError, "method: got 'quick'"),
        ({"precision": "half"}, ValueError, "precision: got 'half'"),
    ],
)
def test_bad_arguments(rng, change, error, message):
    with pytest.raises(error, match=message):
        kernelized_rpe_attention(**(inputs(rng) | change))
