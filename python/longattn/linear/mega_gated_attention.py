"""Mega: gated attention of one head whose queries and keys are moving averages of the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, like
from longattn._checks import flag, integer, one_of
from longattn.dense.attention import attention
from longattn.linear._channels import Float32, optional, parameter, pointwise, product, storage_rows
from longattn.linear.multi_dim_damped_ema import Parameters, multi_dim_damped_ema
from longattn.methods import Method
from longattn.reference import linear as reference

Function = Literal["softmax", "laplace", "relu2"]
#: Rows whose scores are held at once by the functions that are no softmax.
_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MegaWeights:
    """Weights of a layer, any floating dtype.

    Attributes:
        ema: `(alpha, delta, beta, gamma)` of the moving averages, each `[C, N]`.
        ema_backward: of those of what comes after, for a layer that is not causal.
        omega: weight of the input beside the averages `[C]`.
        w_v: projection to the values `[C, Dv]`.
        w_m: projection of the averages `[C, C + Dz + Dv + C]`, to the update gate, the shared base of queries and keys,
            the reset gate and the candidate.
        b_m: `[C + Dz + Dv + C]`.
        gamma_q: factor of the queries `[Dz]`.
        beta_q: `[Dz]`.
        gamma_k: factor of the keys `[Dz]`.
        beta_k: `[Dz]`.
        w_h: projection of the gated output `[Dv, C]`.
    """

    ema: Parameters
    ema_backward: Parameters | None = None
    omega: Array
    w_v: Array
    w_m: Array
    b_m: Array
    gamma_q: Array
    beta_q: Array
    gamma_k: Array
    beta_k: Array
    w_h: Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MegaState:
    """What a causal layer needs to go on after any row, float32.

    Attributes:
        averages: states of the moving averages `[B, C, N]`.
        keys: keys of the block at hand `[B, n, Dz]`; of all rows, where there are no blocks.
        values: their values `[B, n, Dv]`.
    """

    averages: Float32
    keys: Float32
    values: Float32


def mega_gated_attention(
    x: Array,
    weights: MegaWeights,
    *,
    residual: Array | None = None,
    function: Function = "softmax",
    relative_bias: Array | None = None,
    chunk: int | None = None,
    causal: bool = True,
    initial_state: MegaState | None = None,
    return_state: bool = False,
) -> Any:
    """Gated attention of one head: moving averages carry what is near, attention what is far.

    With `x'` the averages of `multi_dim_damped_ema` through `silu`, and `v = silu(x w_v)`,

        u, z, r, hx = split(x' w_m + b_m);  u = sigmoid(u);  z, r = silu(z), silu(r)
        q = z * gamma_q + beta_q,  k = z * gamma_k + beta_k,  O = f(q k^T) v
        h = silu(hx + (O * r) w_h),  out = residual + u * (h - residual)

    `f` is the softmax of `Dz ** -0.5 * q k^T + bias`; or, of `s = q k^T / n + bias` with n the number of keys that the
    row sees, `(1 + erf((s - mu) / (sigma sqrt 2))) / 2` with `mu = sqrt(1 / 2)`, `sigma = sqrt(1 / (4 pi))`, or
    `max(s, 0) ** 2`; the last two are not normalised.

    Args:
        x: input after its norm `[B, L, C]`; float32, float16 or bfloat16.
        weights: of the layer.
        residual: input before its norm, any of the three dtypes `[B, L, C]`; `None` is `x`.
        function: `f`.
        relative_bias: floating `[2 M - 1]`, entry `j - i + M - 1` for key j and row i, with M at least the length,
            that of earlier calls included (or the chunk).
        chunk: rows see the keys of their own block of so many rows only; a last block may be shorter. `None` is all.
            Blocks are counted from the first row of all, over all calls.
        causal: rows see keys up to their own.
        initial_state: what a call with the rows before returned; with `causal` only.
        return_state: also return the state after the last row; with `causal` only.

    Returns:
        `[B, L, C]` in the kind and dtype of `x`, or with `return_state` the pair of this and `MegaState`; a call of one
        row is then the decode step. Arithmetic is float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, averages of what comes after with `causal`, or a state without.

    Cost:
        `B * L * c * (Dz + Dv)` multiply-adds of attention for chunks of c (L without), halved where causal, and
        projections of `B * L * C * (2 C + Dz + 3 Dv)`.

    References:
        X. Ma, C. Zhou, X. Kong, J. He, L. Gui, G. Neubig, J. May, L. Zettlemoyer, "Mega: Moving Average Equipped Gated
        Attention", 2022, arXiv:2209.10655.
    """
    xn = storage_rows(x, "x", (None, None, None), "[B, L, C]")
    batch, length, channels = xn.shape
    if not isinstance(weights, MegaWeights):
        raise TypeError(f"weights: got {type(weights).__name__}, expected MegaWeights")
    before = xn if residual is None else storage_rows(residual, "residual", xn.shape, "[B, L, C]")
    one_of(function, "function", get_args(Function))
    back = flag(causal, "causal")
    if back and weights.ema_backward is not None:
        raise ValueError("weights.ema_backward: got averages of what comes after with causal, expected None")
    handed = flag(return_state, "return_state")
    if not back and (handed or initial_state is not None):
        raise ValueError("causal: got False with a state, expected True")
    begun = _begun(initial_state)
    size = begun + length + 1 if chunk is None else integer(chunk, "chunk", 1)
    table = _table(relative_bias, min(size, max(begun + length, 1)))
    gamma_q = parameter(weights.gamma_q, "weights.gamma_q", (None,), "[Dz]")
    dim = len(gamma_q)
    beta_q, gamma_k, beta_k = (
        parameter(getattr(weights, name), f"weights.{name}", (dim,), "[Dz]") for name in ("beta_q", "gamma_k", "beta_k")
    )
    w_v = parameter(weights.w_v, "weights.w_v", (channels, None), "[C, Dv]")
    value_dim = w_v.shape[1]
    columns = 2 * channels + dim + value_dim
    w_m = parameter(weights.w_m, "weights.w_m", (channels, columns), "[C, C + Dz + Dv + C]")
    b_m = parameter(weights.b_m, "weights.b_m", (columns,), "[C + Dz + Dv + C]")
    w_h = parameter(weights.w_h, "weights.w_h", (value_dim, channels), "[Dv, C]")
    state = _start(initial_state, weights, (batch, channels), (dim, value_dim), size)
    wide = np.ascontiguousarray(xn, np.float32)
    averages, after = multi_dim_damped_ema(
        wide, *weights.ema, omega=weights.omega, silu=True, backward=weights.ema_backward,
        initial_state=None if state is None else state.averages,
    )  # fmt: skip
    v = pointwise("silu", product(wide, w_v))
    base = product(averages, w_m) + b_m
    u, z, r, hx = np.split(base, np.cumsum([channels, dim, value_dim]), axis=2)
    z = pointwise("silu", z)
    q, k = z * gamma_q + beta_q, z * gamma_k + beta_k
    if state is not None:
        k, v = np.concatenate([state.keys, k], axis=1), np.concatenate([state.values, v], axis=1)
    attended = np.zeros((batch, length, value_dim), np.float32)
    for first, last in _blocks(begun + length, size) if length else ():
        rows, part = slice(max(first - begun, 0), last - begun), slice(first, last)
        attended[:, rows] = _attend(q[:, rows], k[:, part], v[:, part], function, table, back)
    h = pointwise("silu", hx + product(pointwise("silu", r, attended), w_h))
    kept = np.ascontiguousarray(before, np.float32)
    result = kept + pointwise("sigmoid", u, h - kept)
    out = like(x, result.astype(xn.dtype, copy=False))
    if not handed:
        return out
    whole = 0 if chunk is None else (begun + length) // size * size
    return out, MegaState(averages=after, keys=k[:, whole:].copy(), values=v[:, whole:].copy())


def _begun(state: object) -> int:
    """Rows of the block at hand before the first."""
    if state is None:
        return 0
    if not isinstance(state, MegaState):
        raise TypeError(f"initial_state: got {type(state).__name__}, expected a MegaState")
    return state.keys.shape[1] if state.keys.ndim > 1 else 0


def _start(
    state: MegaState | None, weights: MegaWeights, rows: tuple[int, int], dims: tuple[int, int], size: int
) -> MegaState | None:
    """The state before the first row, checked."""
    if state is None:
        return None
    begun = _begun(state)
    if begun >= size:
        raise ValueError(f"initial_state: got keys of {begun} rows, expected fewer than the {size} of a chunk")
    (batch, channels), (dim, value_dim) = rows, dims
    states = np.shape(weights.ema[0])[-1:]
    shapes = {"averages": (batch, channels, *states), "keys": (batch, begun, dim), "values": (batch, begun, value_dim)}
    for name, shape in shapes.items():
        got = getattr(state, name)
        if got.shape != shape or got.dtype != np.float32:
            raise ValueError(f"initial_state: got {name} {got.dtype} {got.shape}, expected float32 {shape}")
    return state


def _blocks(length: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def _table(relative_bias: Array | None, most: int) -> Float32 | None:
    table = optional(relative_bias, "relative_bias", (None,), "[2 M - 1]")
    if table is not None and (len(table) % 2 == 0 or len(table) < 2 * most - 1):
        raise ValueError(f"relative_bias: got {len(table)} entries, expected an odd number of at least {2 * most - 1}")
    return table


def _attend(q: Float32, k: Float32, v: Float32, function: str, table: Float32 | None, causal: bool) -> NDArray[Any]:
    """Rows `[B, n, Dv]` at the end of one block."""
    if function == "softmax":
        bias: dict[str, Any] = {}
        if table is not None:
            bias = {"relative_bias": table[None], "relative_zero": len(table) // 2}
        out: NDArray[Any] = attention(q[:, None], k[:, None], v[:, None], causal=causal, **bias)
        return out[:, 0]
    keys, before = k.shape[1], k.shape[1] - q.shape[1]
    found = np.empty((*q.shape[:2], v.shape[2]), np.float32)
    for first, last in _blocks(q.shape[1], _ROWS):
        rows = before + np.arange(first, last)
        seen = before + last if causal else keys
        counts = (rows + 1 if causal else np.full(len(rows), keys)).astype(np.float32)
        scores = q[:, first:last] @ k[:, :seen].swapaxes(1, 2) / counts[:, None]
        if table is not None:
            scores += table[np.arange(seen) - rows[:, None] + len(table) // 2]
        visible = np.arange(seen) <= rows[:, None] if causal else None
        found[:, first:last] = pointwise(function, scores, visible) @ v[:, :seen]
    return found


METHOD = Method(
    name="mega_gated_attention",
    family="recurrent",
    title="Mega: Moving Average Equipped Gated Attention",
    year=2022,
    arxiv="2209.10655",
    function=mega_gated_attention,
    reference=reference.mega_gated_attention,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self"}),
    gqa=False,
    checks=(
        "Steps and parts that hand the state on give the rows of one call.",
        "A chunk of the whole sequence changes nothing.",
        "An update gate of 0 returns the residual.",
        "Gates of 1 give `silu(O w_h)` with plain attention O of one head.",
    ),
    tests="tests/linear/test_mega_gated_attention.py",
    cost="`B * L * c * (Dz + Dv)` multiply-adds of attention for chunks of c, moving averages, and the projections.",
)
