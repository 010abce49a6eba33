"""MambAttention: one attention along time and along frequency, each followed by Mamba in both directions."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn._arrays import Array, like
from longattn._checks import flag, integer
from longattn.dense.attention import attention
from longattn.linear._channels import Float32, parameter, storage_rows
from longattn.linear.bidirectional_mamba import bidirectional_mamba
from longattn.linear.hyena_pixel_conv import layer_norm
from longattn.linear.mamba_mixer import MambaWeights
from longattn.methods import Method
from longattn.reference import linear as reference

Both = tuple[MambaWeights, MambaWeights, Array]


def shared_time_frequency_attention(
    x: Array,
    norm: tuple[Array, Array],
    wq: Array,
    wk: Array,
    wv: Array,
    wo: Array,
    *,
    heads: int = 8,
    time: Both | None = None,
    frequency: Both | None = None,
    frequency_first: bool = False,
) -> Array:
    """One attention, the same weights, along time and then along frequency, with residuals.

    Each is followed by Mamba in both directions along the same axis, its outputs side by side and projected back, with
    a residual of its own; without weights for it that part is left out. Attention has no mask and no positions, and a
    layer norm before it.

    Args:
        x: `[B, T, F, C]`; float32, float16 or bfloat16.
        norm: `(weight, bias)`, floating `[C]`, of the layer norm.
        wq: query projection, floating `[C, heads * D]`.
        wk: key projection, floating `[C, heads * D]`.
        wv: value projection, floating `[C, heads * Dv]`.
        wo: output projection, floating `[heads * Dv, C]`.
        heads: attention heads.
        time: `(forward, backward, w_merge)` of Mamba along time, `w_merge` floating `[2 Co, C]`.
        frequency: of Mamba along frequency.
        frequency_first: the other order of the two axes.

    Returns:
        `[B, T, F, C]` in the kind and dtype of `x`. Arithmetic is float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `B * T * F * (T + F) * heads * (D + Dv)` multiply-adds of attention, projections, and two scans per axis.

    References:
        N. L. Kühne, J. Jensen, J. Østergaard, Z.-H. Tan, "MambAttention: Mamba with Multi-Head Attention for
        Generalizable Single-Channel Speech Enhancement", 2025, arXiv:2507.00966.
    """
    xn = storage_rows(x, "x", (None, None, None, None), "[B, T, F, C]")
    channels, number = xn.shape[3], integer(heads, "heads", 1)
    if not isinstance(norm, tuple | list) or len(norm) != 2:
        raise TypeError(f"norm: got {type(norm).__name__}, expected (weight, bias)")
    scales = [parameter(w, f"norm[{i}]", (channels,), "[C]") for i, w in enumerate(norm)]
    query = parameter(wq, "wq", (channels, None), "[C, heads * D]")
    key = parameter(wk, "wk", (channels, query.shape[1]), "[C, heads * D]")
    value = parameter(wv, "wv", (channels, None), "[C, heads * Dv]")
    for w, name in ((query, "wq"), (value, "wv")):
        if w.shape[1] % number or not w.shape[1]:
            raise ValueError(f"{name}: got shape {w.shape}, expected [C, heads * D] with {number} heads")
    out = parameter(wo, "wo", (value.shape[1], channels), "[heads * Dv, C]")
    for both, name in ((time, "time"), (frequency, "frequency")):
        if both is not None and (not isinstance(both, tuple | list) or len(both) != 3):
            raise TypeError(f"{name}: got {type(both).__name__}, expected (forward, backward, w_merge)")
    later = flag(frequency_first, "frequency_first")
    y = np.ascontiguousarray(xn, np.float32)
    for along_time in (not later, later):
        lines = y.swapaxes(1, 2) if along_time else y  # [B, other axis, axis, C]
        lines = lines + _attend(layer_norm(lines, scales[0], scales[1]), query, key, value, out, number)
        mamba = time if along_time else frequency
        if mamba is not None:
            rows = np.ascontiguousarray(lines).reshape(-1, *lines.shape[2:])
            mixed = bidirectional_mamba(rows, mamba[0], mamba[1], merge="concat", w_merge=mamba[2])
            if mixed.shape != rows.shape:
                raise ValueError(f"w_merge: got outputs of width {mixed.shape[2]}, expected {channels}")
            lines = lines + mixed.reshape(lines.shape)
        y = lines.swapaxes(1, 2) if along_time else lines
    return like(x, np.ascontiguousarray(y).astype(xn.dtype, copy=False))


def _attend(x: Float32, wq: Float32, wk: Float32, wv: Float32, wo: Float32, heads: int) -> Float32:
    """Attention along the last axis but one of `[B, lines, n, C]`."""
    q, k, v = ((x @ w).reshape(*x.shape[:3], heads, w.shape[1] // heads) for w in (wq, wk, wv))
    rows = np.empty((*x.shape[:3], heads, v.shape[4]), np.float32)
    for b in range(len(x)):  # heads beside rows are read, and written, where they lie
        own: Any = tuple(part[b].swapaxes(1, 2) for part in (q, k, v))
        attention(*own, out=rows[b].swapaxes(1, 2))
    result: Float32 = rows.reshape(*x.shape[:3], -1 if rows.size else wo.shape[0]) @ wo
    return result


METHOD = Method(
    name="shared_time_frequency_attention",
    family="exact",
    title="MambAttention: Mamba with Multi-Head Attention for Generalizable Single-Channel Speech Enhancement",
    year=2025,
    arxiv="2507.00966",
    function=shared_time_frequency_attention,
    reference=reference.shared_time_frequency_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "A single frame makes attention along time a linear map of each place.",
        "Without Mamba, swapped axes in the other order give swapped outputs.",
        "Both axes go through the same weights.",
    ),
    tests="tests/linear/test_shared_time_frequency_attention.py",
    cost="`B * T * F * (T + F) * heads * (D + Dv)` multiply-adds of attention, and two scans per axis.",
)
