"""Kernelised attention with a relative bias inside the exponent: a product of Toeplitz matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, like
from longattn._checks import attention_inputs, check_heads, finite, flag
from longattn.linear._channels import Float32, map_size, parameter
from longattn.linear.feature_map import FeatureMap
from longattn.linear.feature_map import features as mapped
from longattn.linear.toeplitz import Precision, Way, is_direct, is_double, on_lines
from longattn.methods import Method
from longattn.reference import linear as reference


def kernelized_rpe_attention(
    q: Array,
    k: Array,
    v: Array,
    rpe: Array,
    features: Array | FeatureMap | Callable[[NDArray[np.float32]], NDArray[Any]],
    *,
    causal: bool = False,
    size: tuple[int, int] | None = None,
    qk_norm: bool = True,
    scale: float = 1.0,
    method: Way = "auto",
    precision: Precision = "float64",
) -> Array:
    """Attention with the kernel `exp(b[j - i]) phi(q_i) . phi(k_j)` in place of an exponential, normalised.

    By default `phi(x)_r = exp(w_r . x - |x|^2 / 2)`, positive random features (a factor, such as the paper's `1 /
    sqrt(m)`, cancels), of queries and keys that are divided by their norms first (the stabiliser of the paper; queries
    are then multiplied by `scale`, which the paper leaves open). The bias is a Toeplitz matrix, so transforms multiply
    by it.

    Args:
        q: queries `[B, Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`; dtype of `k`.
        rpe: biases `b`, floating `[Hq, 2 M - 1]`, entry `j - i + M - 1` for a key at j and a query at i, M at least
            both lengths; with `size` `[Hq, 2 h - 1, 2 w - 1]` likewise. -inf hides a distance.
        features: directions `w`, floating `[m, D]`; a `FeatureMap` (exponents of "gaussian" are taken as they are); or
            a function that takes float32 rows `[.., D]` and returns `[.., m]`. Features must not be negative.
        causal: a query sees keys up to its own place. Where there are fewer queries than keys, these are the last rows
            (without `causal`, the first). One is a decode step: there is no state of fixed size, but features of keys
            may be kept and given for `k`, with those of the query for `q`, `qk_norm=False` and a function that returns
            what it takes. Not with `size`.
        size: height and width of a map whose places, row by row, are both queries and keys.
        qk_norm: whether queries and keys are divided by their norms (rows of zeros stay so).
        scale: factor of the queries after that.
        method: `"fft"` transforms, `"direct"` multiplies every pair, `"auto"` takes the faster.
        precision: of the transforms. Sums of tiny terms beside large ones need float64.

    Returns:
        `[B, Hq, Lq, Dv]` in the kind and dtype of `q`. Denominators are at least 1e-6 of the head's largest; a query
        that sees no key gets zeros.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or features that are negative or not finite.

    Cost:
        `B * Hq * m * (Dv + 1)` pairs of transforms of about `2 L` numbers; or `B * Hq * Lq * Lk * (m + Dv)`
        multiply-adds, blocks of 256 queries at a time.

    References:
        S. Luo, S. Li, T. Cai, D. He, D. Peng, S. Zheng, G. Ke, L. Wang, T.-Y. Liu, "Stable, Fast and Accurate:
        Kernelized Attention with Relative Positional Encoding", 2021, arXiv:2106.12566.
    """
    qn, kn, vn = attention_inputs(q, k, v, ranks=(4,))
    (batch, heads, rows, dim), (kv_heads, keys) = qn.shape, kn.shape[1:3]
    check_heads(heads, kv_heads, vn.shape[1])
    if kn.shape[0] != batch or vn.shape[0] != batch or vn.shape[2] != keys:
        raise ValueError(f"v: got shapes {kn.shape} and {vn.shape} of k and v, expected those of q's batch and of k")
    hides, normed = flag(causal, "causal"), flag(qk_norm, "qk_norm")
    if size is not None and rows != keys:
        raise ValueError(f"q: got {rows} queries and {keys} keys, expected as many with size")
    if hides and rows > keys:
        raise ValueError(f"q: got {rows} queries and {keys} keys, expected at most as many with causal")
    first = keys - rows if hides else 0
    factor = finite(scale, "scale")
    phi = _feature_map(features, dim)
    is_direct(method, 0, 0)  # a bad one is found before any work
    double = is_double(precision)
    if size is None:
        table = parameter(rpe, "rpe", (heads, None), "[Hq, 2 M - 1]", np.float64)[:, None]
        height, width = 1, max(rows, keys)
    else:
        height, width = map_size(size, rows, "queries")
        if hides:
            raise ValueError("causal: got True with size, expected False")
        table = parameter(rpe, "rpe", (heads, 2 * height - 1, 2 * width - 1), "[Hq, 2 h - 1, 2 w - 1]", np.float64)
    reach = table.shape[2] // 2
    if table.shape[2] % 2 == 0 or reach + 1 < width:
        raise ValueError(f"rpe: got shape {table.shape}, expected an odd number of biases, at least {2 * width - 1}")
    if np.isnan(table).any() or (table == np.inf).any():
        raise ValueError("rpe: got NaN or infinity, expected finite numbers or -inf")
    kernel = _kernel(table, reach, width, hides)
    norm = "length" if normed else "none"
    wide_q, wide_k = (mapped(x, FeatureMap(norm=norm)) for x in (qn, kn))
    wide_q *= np.float32(factor)
    phi_q, phi_k = _features(phi, wide_q, "q"), _features(phi, wide_k, "k")
    values = np.ascontiguousarray(vn, np.float32)
    sums = np.zeros((batch, heads, rows, vn.shape[3] + 1), np.float32)
    if rows and keys:
        # Measured: pairs cost less up to as many rows as there are transforms.
        if is_direct(method, min(rows, keys), phi_k.shape[3] * sums.shape[3]):
            _multiply(phi_q, phi_k, values, kernel, (height, width), first, sums)
        else:
            _transform(phi_q, phi_k, values, kernel, (height, width), first, double, sums)
    den = sums[..., -1:]
    least = 1e-6 * den.max(axis=2, keepdims=True, initial=0.0)
    seen = least > 0
    result = np.where(seen, sums[..., :-1] / np.where(seen, np.maximum(den, least), 1), 0).astype(np.float32)
    return like(q, result.astype(qn.dtype, copy=False))


def _kernel(table: NDArray[np.float64], reach: int, width: int, causal: bool) -> NDArray[np.float64]:
    """Factors `[Hq, 2 h - 1, 2 w - 1]` by the distance of the query from the key: the bias has it the other way."""
    near = table[:, ::-1, ::-1][:, :, reach - width + 1 : reach + width] if width else table[:, :, :0]
    if causal:
        near = np.where(np.arange(near.shape[2]) < width - 1, -np.inf, near)
    highest = near.max(axis=(1, 2), keepdims=True, initial=-np.inf)
    kernel: NDArray[np.float64] = np.exp(near - np.where(np.isfinite(highest), highest, 0.0))
    return kernel


def _transform(
    phi_q: Float32,
    phi_k: Float32,
    v: Float32,
    kernel: NDArray[np.float64],
    size: tuple[int, int],
    first: int,
    double: bool,
    sums: Float32,
) -> None:
    """Sums over the keys by transforms; the lines of a map with gaps, so that distances along them tell all.

    The first query is at place `first`.
    """
    height, width = size
    if height == 1:
        flat = np.ascontiguousarray(kernel[:, 0])
        _core.toeplitz_attention(phi_q, phi_k, v, flat, width - 1 + first, double, sums)
        return
    stride = 2 * width - 1
    phi_q, phi_k, v = (on_lines(x.reshape(*x.shape[:2], height, width, -1), stride) for x in (phi_q, phi_k, v))
    flat = np.ascontiguousarray(kernel.reshape(len(kernel), -1))
    found = np.empty((*phi_q.shape[:3], sums.shape[3]), np.float32)
    # Gaps hold no features, so the ones beside their values count nothing.
    _core.toeplitz_attention(phi_q, phi_k, v, flat, (height - 1) * stride + width - 1, double, found)
    sums[...] = found.reshape(*found.shape[:2], height, stride, -1)[:, :, :, :width].reshape(sums.shape)


def _multiply(
    phi_q: Float32,
    phi_k: Float32,
    v: Float32,
    kernel: NDArray[np.float64],
    size: tuple[int, int],
    begin: int,
    sums: Float32,
) -> None:
    """Sums over the keys from every pair, a block of queries at a time; the first is at place `begin`."""
    (batch, heads, rows, _), keys, (_, width) = phi_q.shape, phi_k.shape[2], size
    group = heads // phi_k.shape[1]
    narrow = kernel.astype(np.float32)
    values = np.concatenate([v, np.ones((*v.shape[:3], 1), np.float32)], axis=3)
    places = np.divmod(np.arange(max(rows, keys)), width)
    for b in range(batch):
        for h in range(heads):
            for first in range(0, rows, 256):
                part = slice(first, min(first + 256, rows))
                down, across = (p[begin:][part, None] - p[:keys] for p in places)
                near = narrow[h, down + kernel.shape[1] // 2, across + kernel.shape[2] // 2]
                weights = (phi_q[b, h, part] @ phi_k[b, h // group].T) * near
                sums[b, h, part] = weights @ values[b, h // group]


def _feature_map(features: Any, dim: int) -> FeatureMap | Callable[[Float32], NDArray[Any]]:
    if isinstance(features, FeatureMap):
        return features
    if callable(features):
        found: Callable[[Float32], NDArray[Any]] = features
        return found
    directions = parameter(features, "features", (None, dim), "[m, D], a FeatureMap or a function")
    if len(directions) == 0:
        raise ValueError(f"features: got shape {directions.shape}, expected at least one direction")
    return FeatureMap(kind="gaussian", projection=directions)


def _features(phi: FeatureMap | Callable[[Float32], NDArray[Any]], rows: Float32, name: str) -> Float32:
    """Features of the rows of `name`, none of them negative."""
    found = mapped(rows, phi, keys=name == "k") if isinstance(phi, FeatureMap) else phi(rows)
    found = np.ascontiguousarray(found, np.float32)
    if not (np.isfinite(found) & (found >= 0)).all():
        raise ValueError(f"features: got features of {name} that are negative or not finite, expected neither")
    return found


METHOD = Method(
    name="kernelized_rpe_attention",
    family="linear",
    title="Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding",
    year=2021,
    arxiv="2106.12566",
    function=kernelized_rpe_attention,
    reference=reference.kernelized_rpe_attention,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    checks=(
        "Biases of 0 give linear attention with the same features.",
        "Transforms and the direct product agree, causal or not.",
        "A bias that falls by the same with every token gives linear attention with a scalar decay.",
        "A single token returns its value.",
        "Causal, the last queries alone give their rows, and so does one from features that were kept.",
    ),
    tests="tests/linear/test_kernelized_rpe_attention.py",
    cost="`B * Hq * m * (Dv + 1)` pairs of transforms of about `2 L` numbers.",
)
