"""DiffuSSM's mixer of tokens: diagonal state space models in both directions, and a gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, like
from longattn._checks import check_floating, one_of
from longattn.linear._channels import check_shape, parameter, pointwise, product, storage_rows
from longattn.linear.diagonal_scan import diagonal_scan
from longattn.methods import Method
from longattn.reference import linear as reference

Activation = Literal["silu", "sigmoid", "none"]
Complex128 = NDArray[np.complex128]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DiagonalSsm:
    """A diagonal state space model of each channel, in continuous time.

    Attributes:
        a: rates, complex or floating `[C, N]`, real parts at most 0.
        b: input weights, complex or floating `[C, N]`.
        c: output weights, complex or floating `[C, N]`.
        dt: step sizes, floating `[C]`, above 0.
        skip: weight of the input in the output, floating `[C]`.
    """

    a: Any
    b: Any
    c: Any
    dt: Array
    skip: Array


def bidirectional_gated_ssm(
    x: Array,
    forward: DiagonalSsm,
    backward: DiagonalSsm,
    w_y: Array,
    w_g: Array,
    w_o: Array,
    *,
    activation: Activation = "silu",
) -> Array:
    """`([y_f ; y_b] w_y * act(x w_g)) w_o`: outputs of two state space models side by side, gated.

    `y_f` is that of `forward` and `y_b` that of `backward` over the reversed sequence, put back. With
    `d = exp(dt a)` per channel and state, and `x` the input,

        h = d h + (d - 1) / a * b x,   y = 2 Re(sum_n c h) + skip x

    which is the convolution with `2 Re(sum_n c (d - 1) / a * d ** l * b)`. Where exactly the paper puts the gate and
    its activation is not said; this is the plain reading. The layers around it, which shorten and widen the sequence,
    are not part.

    Args:
        x: `[B, L, C]`; float32, float16 or bfloat16.
        forward: the model that goes forward.
        backward: the model that goes backward.
        w_y: floating `[2 C, E]`.
        w_g: floating `[C, E]`.
        w_o: floating `[E, Co]`.
        activation: of the gate.

    Returns:
        `[B, L, Co]` in the kind and dtype of `x`. Arithmetic is float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `16 * B * L * C * N` multiply-adds of complex states, and the projections.

    References:
        J. N. Yan, J. Gu, A. M. Rush, "Diffusion Models Without Attention", 2023, arXiv:2311.18257.
    """
    xn = storage_rows(x, "x", (None, None, None), "[B, L, C]")
    channels = xn.shape[2]
    mixing = parameter(w_y, "w_y", (2 * channels, None), "[2 C, E]")
    gating = parameter(w_g, "w_g", (channels, mixing.shape[1]), "[C, E]")
    projection = parameter(w_o, "w_o", (mixing.shape[1], None), "[E, Co]")
    one_of(activation, "activation", get_args(Activation))
    one, two = _discrete(forward, "forward", channels), _discrete(backward, "backward", channels)
    wide = np.ascontiguousarray(xn, np.float32)
    both = np.empty((*xn.shape[:2], 2 * channels), np.float32)
    diagonal_scan(wide, *one[:3], skip=one[3], out=both[..., :channels])
    diagonal_scan(wide[:, ::-1], *two[:3], skip=two[3], out=both[:, ::-1, channels:])
    gate = product(wide, gating)
    gate = gate if activation == "none" else pointwise(activation, gate)
    result = (both @ mixing * gate) @ projection
    return like(x, result.astype(xn.dtype, copy=False))


def _discrete(model: Any, name: str, channels: int) -> tuple[Complex128, Complex128, Complex128, NDArray[np.float32]]:
    """Decay, input weights, output weights and skip of a step."""
    if not isinstance(model, DiagonalSsm):
        raise TypeError(f"{name}: got {type(model).__name__}, expected a DiagonalSsm")
    a = _numbers(model.a, f"{name}.a")
    check_shape(a, f"{name}.a", (channels, None), "[C, N]")
    b, c = (_numbers(w, f"{name}.{key}") for key, w in (("b", model.b), ("c", model.c)))
    for w, key in ((b, "b"), (c, "c")):
        check_shape(w, f"{name}.{key}", a.shape, "[C, N]")
    dt = parameter(model.dt, f"{name}.dt", (channels,), "[C]", np.float64)
    if not (np.isfinite(a) & (a.real <= 0)).all():
        raise ValueError(f"{name}.a: got a rate whose real part is above 0 or not finite, expected at most 0")
    if not (np.isfinite(dt) & (dt > 0)).all():
        raise ValueError(f"{name}.dt: got a step size that is not above 0 and finite, expected one")
    z = a * dt[:, None]
    grown = np.expm1(z)
    # (exp(dt a) - 1) / a, which is dt where a is 0.
    held = np.where(a == 0, dt[:, None], grown / np.where(a == 0, 1, a))
    skip = parameter(model.skip, f"{name}.skip", (channels,), "[C]")
    return np.exp(z), held * b, 2 * c, skip


def _numbers(x: Any, name: str) -> Complex128:
    values = np.asarray(x)
    if not np.iscomplexobj(values):
        check_floating(values, name)
    return values.astype(np.complex128)


METHOD = Method(
    name="bidirectional_gated_ssm",
    family="recurrent",
    title="Diffusion Models Without Attention",
    year=2023,
    arxiv="2311.18257",
    function=bidirectional_gated_ssm,
    reference=reference.bidirectional_gated_ssm,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "The convolution with the models' kernels gives the same.",
        "Without the backward model and with a gate of 1 it is a causal model.",
        "Output weights of 0 leave the skipped inputs.",
    ),
    tests="tests/linear/test_bidirectional_gated_ssm.py",
    cost="`16 * B * L * C * N` multiply-adds of complex states, and the projections.",
)
