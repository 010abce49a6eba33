"""ReGLA: gated linear attention with exponential features, refined gates and a norm in place of a divisor."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import FLOAT64, FLOATS, Array, as_numpy, as_output, like
from longattn._checks import batched, check_floating, finite, one_of, result_array
from longattn.linear._documented import documented
from longattn.linear._recurrence import CHUNK, Common, checked, recurrence, states_before
from longattn.linear.feature_map import FeatureMap
from longattn.methods import Method
from longattn.reference import linear as reference

#: What a gate is at least.
FLOOR = 1e-6
#: The largest logarithm of what is returned as it is: float32 ends at 88.7, and values and sums of rows come on top.
LARGEST = 80.0
#: Features of keys, whose factors per row are factors of updates.
KEYS = {"map": "exp", "norm": "largest"}


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
    log_scale: Array | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """ReGLA, `S_t = Diag(F_t) S_(t-1) + e^k_t v_t^T`, `o_t = norm(s * phi(q_t)^T S_t)`.

    `F = (1 - r) g^2 + r (1 - (1 - g)^2)`, which moves faster than the gate `g` where that is near 0 or 1; `phi(q) =
    softmax(q)` and `s = 1 / (e sqrt(D (e^2 - 1)))`. The paper takes features less their maxima, of keys over all
    positions, which a causal form does not know: `e^k` is taken as it is, and the norm makes factors of a head vanish
    where `eps` is 0. Keys may be of any size: states are computed less a scale that follows the largest key so far and
    decays as they do; what is below `e^-87` of it counts as 0. UNSURE in the paper: whether keys' channels decay, or
    those of values, and whether the norm is per head; `gate_axis` says the former, and the latter is taken.

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`, after their learned map; float32, float16 or bfloat16.
        k: keys `[B, Hk, L, D]`, likewise; any of the three dtypes.
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
        log_scale: float64 `[N, H]`, logarithms of what states are to be multiplied by: holds those of `initial_state`,
            and receives those of the final states. -inf is a state of zeros. `None`: states are as they are, and `k`
            may not leave them above `e^80`.
        chunk_size: {chunk_size}
        cu_seqlens: {cu_seqlens}
        out: array for the output.

    Returns:
        `(output, states)`: the output in the kind and dtype of `q`, and float32 `[N, H, D, Dv]`, the states after the
        last rows. A call of one row with `initial_state` is the decode step. A row of zeros stays one under the norm.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, a gate outside 0 to 1, states without `log_scale` or outputs without a norm
            of more than about `e^80`.

    Cost:
        `2 * Hq * L * D * Dv` multiply-adds of states, and of rows of a chunk `C` with each other `Hq * L * C * (D +
        Dv) / 2`; memory beyond inputs and outputs are the logarithms of `F`, three numbers per row and state and,
        before it is scaled, the output.

    References:
        P. Lu et al., "ReGLA: Refining Gated Linear Attention", 2025, arXiv:2502.01578.
    """
    one_of(gate_axis, "gate_axis", ("key", "value"))
    one_of(norm, "norm", ("rms", "layer", "none"))
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
    by_key, normed = gate_axis == "key", norm != "none"
    common = Common(scale, initial_state, out_state, chunk_size, cu_seqlens)
    inputs = checked(qn, k, v, common, g=logs, g_name="gate", channels=by_key, columns=not by_key)
    assert inputs.k is not None
    given, scales = _scales(log_scale, q, inputs.states[:-2], initial_state)
    if given is not None and np.isneginf(scales).any():
        first = states_before(initial_state, inputs.states)
        if first is not None:
            # The core forgets the scale of such a state, not the numbers that stand there.
            first = np.where(np.isneginf(scales)[..., None, None], np.float32(0), first)
            common = common._replace(initial_state=first)
    made = result_array(out, q, inputs.outputs, qn.dtype, {"q": qn})
    factors, summands = (_of_heads(x, name, inputs.outputs) for x, name in ((gain, "gain"), (shift, "shift")))
    rows, beta = np.empty(shape[:-1]), np.empty(shape[:-1], np.float32)
    _core.key_scales(batched(inputs.k, 4), batched(logs, 4), inputs.bounds, scales.ravel(), beta.ravel(), rows.ravel())
    if given is None:
        _check_size(scales, "states", "log_scale")
    if not normed:
        _check_size(rows, "outputs", "a norm")
    result, states = recurrence(
        q, k, v, common, g=logs, g_name="gate", channels=by_key, columns=None if by_key else False, beta=beta,
        dtype=np.dtype(np.float32), maps=(FeatureMap(kind="softmax"), KEYS),
    )  # fmt: skip
    raw, last = (batched(as_numpy(x, name), 4) for x, name in ((result, "output"), (states, "states")))
    if given is None:
        _core.scaled_rows(last, np.repeat(scales, last.shape[-2]), last)
    else:
        given[...] = scales
    if normed:
        _core.normalised_rows(raw, norm == "layer", least, factors, summands, rows.ravel(), batched(made, 4))
    else:
        _core.scaled_rows(raw, rows.ravel(), batched(made, 4))
    returned: Any = like(q, made) if out is None else out
    return returned, states


def _scales(
    log_scale: Array | None, q: Array, shape: tuple[int, ...], initial_state: Array | None
) -> tuple[NDArray[np.float64] | None, NDArray[np.float64]]:
    """The array of the caller, and the scales of the states before the first row."""
    given = None
    if log_scale is not None:
        given = as_output(log_scale, like=q, shape=shape, dtype=FLOAT64, inputs={}, name="log_scale")
    if initial_state is None:
        return given, np.full(shape, -np.inf)
    if given is None:
        return given, np.zeros(shape)
    if not (given < np.inf).all():
        raise ValueError("log_scale: got NaN or infinity, expected finite numbers or -inf")
    return given, np.array(given, order="C")


def _check_size(scales: NDArray[np.float64], where: str, remedy: str) -> None:
    most = scales.max(initial=-np.inf)
    if most > LARGEST:
        raise ValueError(f"k: got terms of e^{most:.0f} in {where}, expected at most e^{LARGEST:.0f} (or {remedy})")


def _floats(x: Array, name: str) -> NDArray[Any]:
    xn = as_numpy(x, name)
    check_floating(xn, name)
    return xn if xn.dtype in FLOATS else xn.astype(np.float32)


def _of_heads(x: Array | None, name: str, outputs: tuple[int, ...]) -> NDArray[np.float32]:
    """Numbers of the heads' channels, flat; none is none."""
    if x is None:
        return np.zeros(0, np.float32)
    heads, width = outputs[-3], outputs[-1]
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
    "`Hq * L * C * (D + Dv) / 2`; memory beyond inputs and outputs are the logarithms of `F`, three numbers per row "
    "and state and, before it is scaled, the output.",
)
