"""Causal forms of the methods over all keys: each row by the form over all keys of the rows up to it."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn.reference.linear.efficient_attention import efficient_attention
from longattn.reference.linear.features import Float64
from longattn.reference.linear.focused_linear_attention import focused_linear_attention
from longattn.reference.linear.inline_attention import inline_attention
from longattn.reference.linear.l2vit_linear_attention import l2vit_linear_attention
from longattn.reference.linear.magnitude_aware_linear_attention import magnitude_aware_linear_attention
from longattn.reference.linear.simplified_linear_attention import simplified_linear_attention


def causal(form: Any, q: Any, k: Any, v: Any, **options: Any) -> Float64:
    """Row `t` of `form`, an oracle over all keys, of the first `t + 1` rows."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    rows = [form(q[..., t : t + 1, :], k[..., : t + 1, :], v[..., : t + 1, :], **options) for t in range(q.shape[-2])]
    found: Float64 = np.concatenate(rows, axis=-2)
    return found


def causal_convolution(v: Any, weight: Any, group: int = 1) -> Float64:
    """`sum_s w[:, s] v_(t - s)` for each head of the queries, `weight` `[Dv, K]`."""
    v, w = np.asarray(v, np.float64), np.asarray(weight, np.float64)
    found: Float64 = np.zeros(v.shape)
    for s in range(min(w.shape[1], v.shape[-2])):
        found[..., s:, :] += w[:, s] * v[..., : v.shape[-2] - s, :]
    return np.repeat(found, group, axis=-3)


def _local(rows: Float64, v: Any, weight: Any) -> Float64:
    """Rows, with the convolution of values where there is one."""
    return rows if weight is None else rows + causal_convolution(v, weight, rows.shape[-3] // np.shape(v)[-3])


def causal_efficient_attention(q: Any, k: Any, v: Any, *, norm: str = "softmax") -> Float64:
    """See `longattn.linear`; the output alone, as with all of these."""
    return causal(efficient_attention, q, k, v, norm=norm)


def causal_focused_linear_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    power: float = 3.0,
    channel_scale: Any = None,
    norm_scope: str = "all",
    eps: float = 1e-6,
    weight: Any = None,
) -> Float64:
    """See `longattn.linear`."""

    def form(q: Any, k: Any, v: Any) -> Float64:
        # Over all keys, eps is added to the mean of weights; here, to their sum.
        options = {"power": power, "channel_scale": channel_scale, "norm_scope": norm_scope}
        return focused_linear_attention(q, k, v, eps=eps / k.shape[-2], **options)

    return _local(causal(form, q, k, v), v, weight)


def causal_simplified_linear_attention(q: Any, k: Any, v: Any, *, eps: float = 1e-6, weight: Any = None) -> Float64:
    """See `longattn.linear`."""
    return _local(causal(simplified_linear_attention, q, k, v, eps=eps), v, weight)


def causal_magnitude_aware_linear_attention(
    q: Any, k: Any, v: Any, *, phi: Any = "elu1", scale: float | None = None, eps: float = 1e-6
) -> Float64:
    """See `longattn.linear`."""
    return causal(magnitude_aware_linear_attention, q, k, v, phi=phi, scale=scale, eps=eps)


def causal_inline_attention(q: Any, k: Any, v: Any, *, phi: Any = "identity", scale: float | None = None) -> Float64:
    """See `longattn.linear`."""
    return causal(inline_attention, q, k, v, phi=phi, scale=scale)


def causal_l2vit_linear_attention(q: Any, k: Any, v: Any, *, tau: Any = None, den_min: float = 100.0) -> Float64:
    """See `longattn.linear`."""
    return causal(l2vit_linear_attention, q, k, v, tau=tau, den_min=den_min)
