"""ReGLA: gated linear attention with exponential features, refined gates and a norm in place of a divisor."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import FLOATS, Array, as_numpy, like
from longattn._checks import batched, check_floating, finite, result_array
from longattn.linear._documented import documented
from longattn.linear._recurrence import CHUNK, Common, recurrence
from longattn.linear.feature_map import FeatureMap
from longattn.methods import Method
from longattn.reference import linear as reference

#: What a gate is at least.
FLOOR = 1e-6


@documented
def regla(
    q: Array,
    k: Array,
    v: Array,
    gate: Array,
    refine: Array,
    *,
    gate_axis: str = "key",
    norm: str = "rms",
    gain: Array | None = None,
    shift: Array | None = None,
    eps: float = 0.0,
    initial_state: Array | None = None,
    out_state: Array | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """ReGLA, `S_t = Diag(F_t) S_(t-1) + e^k_t v_t^T`, `o_t = norm(s * phi(q_t)^T S_t)`.

    `F = (1 - r) g^2 + r (1 - (1 - g)^2)`, which moves faster than the gate `g` where that is near 0 or 1; `phi(q) =
    softmax(q)` and `s = 1 / (e sqrt(D (e^2 - 1)))`. The paper takes features less their maxima, of keys over all
    positions, which a causal form does not know: `e^k` is taken as it is, and the norm makes factors of a head vanish
    where `eps` is 0. UNSURE in the paper: whether keys' channels decay, or those of values, and whether the norm is per
    head; `gate_axis` says the former, and the latter is taken.

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`, after their learned map; float32, float16 or bfloat16.
        k: keys `[B, Hk, L, D]`, likewise; any of the three dtypes. Numbers of more than about 80 overflow.
        v: {values}
        gate: `g`, 0 to 1, floating `[B, H, L, D]`, or `[B, H, L, Dv]` with `gate_axis="value"`. `F` is at least 1e-6.
        refine: `r`, 0 to 1, in the shape of `gate`.
        gate_axis: "key": rows of the state decay, "value": columns.
        norm: "rms" or "layer" (less the mean), per head and row, or "none".
        gain: factors of the norm, floating `[Hq, Dv]` or `[Dv]` (heads of the output).
        shift: summands of the norm, likewise.
        eps: added to the mean of squares.
        initial_state: {initial_state}
        out_state: {out_state}
        chunk_size: {chunk_size}
        cu_seqlens: {cu_seqlens}
        out: array for the output.

    Returns:
        `(output, states)`: the output in the kind and dtype of `q`, and float32 `[N, H, D, Dv]`, the states after the
        last rows. A call of one row with `initial_state` is the decode step. A row of zeros stays one under the norm.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, a gate outside 0 to 1.

    Cost:
        `2 * Hq * L * D * Dv` multiply-adds of states, and of rows of a chunk `C` with each other `Hq * L * C * (D +
        Dv) / 2`; memory beyond inputs and outputs are the logarithms of `F` and, before the norm, the output.

    References:
        P. Lu et al., "ReGLA: Refining Gated Linear Attention", 2025, arXiv:2502.01578.
    """
    if gate_axis not in ("key", "value"):
        raise ValueError(f"gate_axis: got {gate_axis!r}, expected 'key' or 'value'")
    if norm not in ("rms", "layer", "none"):
        raise ValueError(f"norm: got {norm!r}, expected 'rms', 'layer' or 'none'")
    least = finite(eps, "eps", 0)
    if not 0 <= least < math.inf:
        raise ValueError(f"eps: got {eps}, expected at least 0")
    if norm == "none" and (gain is not None or shift is not None):
        raise ValueError("norm: got 'none' with gain or shift, expected a norm that they belong to")
    qn, vn = as_numpy(q, "q"), as_numpy(v, "v")
    gates = [_floats(x, name) for x, name in ((gate, "gate"), (refine, "refine"))]
    if vn.ndim not in (3, 4) or qn.ndim != vn.ndim:
        raise ValueError(f"v: got shape {vn.shape}, expected rank 3 or 4 as q, which has {qn.shape}")
    shape = (*vn.shape[:-1], (qn if gate_axis == "key" else vn).shape[-1])
    for x, name in zip(gates, ("gate", "refine"), strict=True):
        if x.shape != shape:
            raise ValueError(f"{name}: got shape {x.shape}, expected {shape}")
    logs = np.empty(gates[0].shape, np.float32)
    _core.refined_gates(batched(gates[0], 4), batched(gates[1], 4), FLOOR, batched(logs, 4))
    dim = max(qn.shape[-1], 1) if qn.ndim else 1
    scale = finite(1 / (math.e * math.sqrt(dim * (math.e**2 - 1))), "scale")
    normed = norm != "none"
    common = Common(scale, initial_state, out_state, chunk_size, cu_seqlens, None if normed else out)
    result, states = recurrence(
        qn, k, v, common, g=logs, g_name="gate", channels=gate_axis == "key",
        columns=False if gate_axis == "value" else None, dtype=np.dtype(np.float32) if normed else None,
        maps=(FeatureMap(kind="softmax"), FeatureMap(kind="exp")),
    )  # fmt: skip
    final: Any = like(q, as_numpy(states, "states")) if out_state is None else states
    raw = as_numpy(result, "output")
    if normed:
        heads, width = raw.shape[-3], raw.shape[-1]
        factors, summands = (_of_heads(x, name, heads, width) for x, name in ((gain, "gain"), (shift, "shift")))
        made = result_array(out, q, raw.shape, qn.dtype, {"q": qn})
        _core.normalised_rows(batched(raw, 4), norm == "layer", least, factors, summands, batched(made, 4))
        raw = made
    returned: Any = like(q, raw) if out is None else out
    return returned, final


def _floats(x: Array, name: str) -> NDArray[Any]:
    xn = as_numpy(x, name)
    check_floating(xn, name)
    return xn if xn.dtype in FLOATS else xn.astype(np.float32)


def _of_heads(x: Array | None, name: str, heads: int, width: int) -> NDArray[np.float32]:
    """Numbers of the heads' channels, flat; none is none."""
    if x is None:
        return np.zeros(0, np.float32)
    xn = as_numpy(x, name, any_strides=True)
    check_floating(xn, name)
    if xn.shape not in ((width,), (heads, width)):
        raise ValueError(f"{name}: got shape {xn.shape}, expected {(heads, width)} or {(width,)}")
    return np.ascontiguousarray(np.broadcast_to(xn, (heads, width)), np.float32).ravel()


METHOD = Method(
    name="regla",
    family="linear",
    title="ReGLA: Refining Gated Linear Attention",
    year=2025,
    arxiv="2502.01578",
    function=regla,
    reference=reference.regla,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Chunks of any size and steps give the rows of the recurrence.",
        "With `r` of 1/2 gates are what they were, with 0 their squares.",
        "A constant added to all keys changes nothing.",
        "Gates of 1 give linear attention with exponential features.",
    ),
    tests="tests/linear/test_regla.py",
    cost="`2 * Hq * L * D * Dv` multiply-adds of states, and of rows of a chunk `C` with each other "
    "`Hq * L * C * (D + Dv) / 2`; memory beyond inputs and outputs are the logarithms of `F` and, before the norm, "
    "the output.",
)
