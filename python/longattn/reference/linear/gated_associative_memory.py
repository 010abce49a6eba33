"""GAM from its formula, float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.linear.selective_scan import sigmoid

Float64 = NDArray[np.float64]


def gated_associative_memory(
    x: ArrayLike,
    conv: ArrayLike,
    bank: ArrayLike,
    w_gate: ArrayLike,
    *,
    conv_bias: ArrayLike | None = None,
    gate_bias: ArrayLike | None = None,
    bank_values: ArrayLike | None = None,
    heads: int = 1,
    scale: float = 1.0,
    residual: ArrayLike | None = None,
    initial_state: ArrayLike | None = None,
) -> tuple[Float64, Float64]:
    """Output and last inputs; see `longattn.linear.gated_associative_memory`."""
    x, conv, bank, w_gate = (np.asarray(w, np.float64) for w in (x, conv, bank, w_gate))
    values = bank if bank_values is None else np.asarray(bank_values, np.float64)
    taps, width = conv.shape[1], x.shape[2] // heads
    before = np.zeros((len(x), taps - 1, x.shape[2])) if initial_state is None else np.asarray(initial_state)
    rows = np.concatenate([before, x], axis=1)
    local = np.zeros_like(x) if conv_bias is None else np.zeros_like(x) + np.asarray(conv_bias, np.float64)
    for t in range(x.shape[1]):
        for j in range(taps):
            local[:, t] += conv[:, taps - 1 - j] * rows[:, t + taps - 1 - j]
    read = np.zeros_like(x)
    for h in range(heads):
        own = slice(h * width, (h + 1) * width)
        s = scale * x[..., own] @ bank[:, own].T
        e = np.exp(s - s.max(axis=-1, keepdims=True))
        read[..., own] = e / e.sum(axis=-1, keepdims=True) @ values[:, own]
    logits = x @ w_gate
    logits = logits if gate_bias is None else logits + np.asarray(gate_bias, np.float64)
    y = sigmoid(logits[..., : x.shape[2]]) * local + sigmoid(logits[..., x.shape[2] :]) * read
    return (y if residual is None else y + np.asarray(residual, np.float64)), rows[:, x.shape[1] :]
