"""The Mamba block: projection, short convolution, selective scan, gate, projection."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, like
from longattn._checks import all_within
from longattn.linear._channels import Float32, optional, parameter, product, storage_rows
from longattn.linear.convolution import causal_conv1d
from longattn.linear.selective_scan import selective_scan
from longattn.methods import Method
from longattn.reference import linear as reference


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MambaWeights:
    """Weights of one Mamba block, any floating dtype.

    Attributes:
        w_in: input projection `[C, E]`.
        w_gate: projection of the gate `[C, E]`; `None` is no gate.
        conv: causal depthwise convolution `[E, K]`; `None` is none, and no activation after it.
        conv_bias: `[E]`.
        w_dt: projection to the step sizes, one matrix `[E, E]` or two `([E, R], [R, E])`.
        dt_bias: `[E]`.
        w_b: projection to the input weights `[E, N]`.
        w_c: projection to the output weights `[E, N]`.
        a: rates `[E, N]`, at most 0.
        skip: `[E]`.
        w_out: output projection `[E, Co]`; `None` leaves the E channels.
    """

    w_in: Array
    w_gate: Array | None = None
    conv: Array | None = None
    conv_bias: Array | None = None
    w_dt: Array | tuple[Array, Array]
    dt_bias: Array | None = None
    w_b: Array
    w_c: Array
    a: Array
    skip: Array | None = None
    w_out: Array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class MambaState:
    """What a Mamba block carries from token to token.

    Attributes:
        conv: the last inputs of the convolution, float32 `[B, K - 1, E]`.
        scan: states of the scan, float32 `[B, E, N]`.
    """

    conv: NDArray[np.float32]
    scan: NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.conv.nbytes + self.scan.nbytes


def mamba_mixer(
    x: Array, weights: MambaWeights, *, initial_state: MambaState | None = None
) -> tuple[Array, MambaState]:
    """A Mamba block: `h = silu(conv(x w_in))`, a scan of `h` whose weights are projections of `h`, a gate, `w_out`.

    Step sizes are `softplus(h w_dt + dt_bias)`, and the gate is `silu(x w_gate)`. A call with one token and the state
    before it is the decode step.

    Args:
        x: `[B, L, C]`; float32, float16 or bfloat16.
        weights: of the block.
        initial_state: what a call on the tokens before returned.

    Returns:
        `[B, L, Co]` (or `[B, L, E]`) in the kind and dtype of `x`, and the state after the last token.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `B * L * E * (2 C + Co + 2 R + 2 N)` multiply-adds of projections, and the scan's `B * L * E * N` exponentials.

    References:
        A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv:2312.00752.
    """
    xn = storage_rows(x, "x", (None, None, None), "[B, L, C]")
    layer = checked(weights, "weights", xn.shape[2])
    if initial_state is not None and not isinstance(initial_state, MambaState):
        raise TypeError(f"initial_state: got {type(initial_state).__name__}, expected a MambaState")
    gate = None if layer.w_gate is None else product(xn, layer.w_gate)
    y, state = branch(product(xn, layer.w_in), layer, gate, initial_state)
    result = y if layer.w_out is None else y @ layer.w_out
    return like(x, result.astype(xn.dtype, copy=False)), state


def checked(weights: object, name: str, width: int) -> Any:
    """The same weights in float32, checked, for inputs of `width` channels."""
    if not isinstance(weights, MambaWeights):
        raise TypeError(f"{name}: got {type(weights).__name__}, expected MambaWeights")
    w_in = parameter(weights.w_in, f"{name}.w_in", (width, None), "[C, E]")
    inner = w_in.shape[1]
    a = parameter(weights.a, f"{name}.a", (inner, None), "[E, N]")
    states = a.shape[1]
    found: dict[str, Any] = {"w_in": w_in, "a": a}
    if isinstance(weights.w_dt, tuple | list):
        if len(weights.w_dt) != 2:
            raise ValueError(f"{name}.w_dt: got {len(weights.w_dt)} matrices, expected one or two")
        down = parameter(weights.w_dt[0], f"{name}.w_dt[0]", (inner, None), "[E, R]")
        found["w_dt"] = down, parameter(weights.w_dt[1], f"{name}.w_dt[1]", (down.shape[1], inner), "[R, E]")
    else:
        found["w_dt"] = parameter(weights.w_dt, f"{name}.w_dt", (inner, inner), "[E, E]")
    shapes: dict[str, tuple[tuple[int | None, ...], str]] = {
        "w_gate": ((width, inner), "[C, E]"),
        "conv": ((inner, None), "[E, K]"),
        "conv_bias": ((inner,), "[E]"),
        "dt_bias": ((inner,), "[E]"),
        "w_b": ((inner, states), "[E, N]"),
        "w_c": ((inner, states), "[E, N]"),
        "skip": ((inner,), "[E]"),
        "w_out": ((inner, None), "[E, Co]"),
    }
    for key, (shape, expected) in shapes.items():
        found[key] = optional(getattr(weights, key), f"{name}.{key}", shape, expected)
    for key in ("w_b", "w_c"):
        if found[key] is None:
            raise TypeError(f"{name}.{key}: got None, expected a matrix")
    return MambaWeights(**{field.name: found[field.name] for field in fields(MambaWeights)})


def activated(h: Float32, layer: MambaWeights, before: Float32 | None = None) -> tuple[Float32, Float32]:
    """The convolution and its activation, and the rows that it needs of these for the next."""
    if layer.conv is None:
        return h, np.zeros((len(h), 0, h.shape[2]), np.float32)
    out, state = causal_conv1d(h, layer.conv, layer.conv_bias, silu=True, initial_state=before)
    return np.asarray(out), state


def scanned(
    h: NDArray[Any], layer: MambaWeights, gate: NDArray[Any] | None = None, before: Float32 | None = None
) -> tuple[Float32, Float32]:
    """The scan of rows `[B, L, E]` with weights that are projections of them."""
    dt = product(h, layer.w_dt[0]) @ layer.w_dt[1] if isinstance(layer.w_dt, tuple) else product(h, layer.w_dt)
    if not all_within(dt, -np.inf, float(np.finfo(np.float32).max)):
        # The scan would name an argument of its own.
        raise ValueError("x: got rows whose step sizes are NaN or infinite, expected rows that make them finite")
    out, state = selective_scan(
        h, dt, layer.a, product(h, layer.w_b), product(h, layer.w_c), skip=layer.skip, dt_bias=layer.dt_bias,
        softplus=True, z=gate, initial_state=before,
    )  # fmt: skip
    return np.asarray(out), state


def branch(
    h: Float32, layer: MambaWeights, gate: Float32 | None = None, state: MambaState | None = None
) -> tuple[Float32, MambaState]:
    """Convolution and scan of projected rows `[B, L, E]`."""
    h, conv = activated(h, layer, None if state is None else state.conv)
    y, scan = scanned(h, layer, gate, None if state is None else state.scan)
    return y, MambaState(conv, scan)


METHOD = Method(
    name="mamba_mixer",
    family="recurrent",
    title="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    year=2023,
    arxiv="2312.00752",
    function=mamba_mixer,
    reference=reference.mamba_mixer,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=False,
    checks=(
        "Steps give the rows of the whole.",
        "It is the forward half of a bidirectional block whose backward weights are zeros.",
    ),
    tests="tests/linear/test_mamba_mixer.py",
    cost="`B * L * E * (2 C + Co + 2 R + 2 N)` multiply-adds of projections, and the scan's `B * L * E * N` "
    "exponentials.",
)
