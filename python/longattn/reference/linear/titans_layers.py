"""Titans' memory beside attention, from the formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn.reference.linear.titans_neural_memory import titans_neural_memory

Float64 = NDArray[np.float64]


def _split(x: Float64, w: Any, heads: int) -> Float64:
    made: Float64 = x @ np.asarray(w, np.float64)
    return made.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _joined(x: Float64) -> Float64:
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def _remember(layer: Any, heads: int, asking: Float64, x: Float64, theta: Any, **options: Any) -> tuple[Float64, Any]:
    q, k, v = (_split(y, w, heads) for y, w in zip((asking, x, x), layer.memory, strict=True))
    said, last = titans_neural_memory(q, k, v, theta, **options)
    return _joined(said), last


def _attend(weights: Any, heads: int, asking: Float64, before: Float64, x: Float64, window: int | None) -> Float64:
    rows = np.concatenate([before, x], axis=1)
    q, k, v = (_split(y, w, heads) for y, w in zip((asking, rows, rows), weights.attention, strict=False))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    i, j = np.arange(x.shape[1])[:, None], np.arange(rows.shape[1]) - before.shape[1]
    seen = (j < 0) | ((j <= i) & (j > i - (window or rows.shape[1])))
    e = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    found: Float64 = _joined(e / e.sum(-1, keepdims=True) @ v) @ np.asarray(weights.attention[3], np.float64)
    return found


def _start(x: Any, weights: Any) -> tuple[Float64, Float64]:
    x = np.asarray(x, np.float64)
    first = np.zeros((0, x.shape[2])) if weights.persistent is None else np.asarray(weights.persistent, np.float64)
    return x, np.broadcast_to(first, (len(x), *first.shape))


def titans_memory_as_context(
    x: Any, theta: Any, weights: Any, *, heads: int, segment: int, memory_weights: Any = None, **options: Any
) -> tuple[Float64, Any]:
    """See `longattn.linear`; segments are chunks of the memory, which starts anew at each with all rows so far."""
    x, first = _start(x, weights)
    theta = np.broadcast_to(np.asarray(theta, np.float64), (len(x), heads, x.shape[1]))
    gates = {"theta": theta} | {n: options.pop(n) for n in ("alpha", "eta") if options.get(n) is not None}
    out, learnt, last = [], x[:, :0], memory_weights
    for at in range(0, x.shape[1], segment):
        here = x[:, at : at + segment]
        h, _ = _remember(weights, heads, here, here, 0.0, weights=last, **options)
        y = _attend(weights, heads, here, np.concatenate([first, h], axis=1), here, None)
        learnt = np.concatenate([learnt, y], axis=1)
        part = {n: g if np.ndim(g) == 0 else g[..., : learnt.shape[1]] for n, g in gates.items()}
        said, last = _remember(weights, heads, learnt, learnt, **part, weights=memory_weights, **options)
        out.append(y * said[:, at:])
    return np.concatenate(out, axis=1), last


def titans_memory_as_gate(
    x: Any,
    theta: Any,
    weights: Any,
    *,
    heads: int,
    window: int,
    norms: Any = None,
    gate: str = "sigmoid",
    eps: float = 1e-6,
    memory_weights: Any = None,
    **options: Any,
) -> tuple[Float64, Any]:
    """See `longattn.linear`."""
    x, first = _start(x, weights)
    said, last = _remember(weights, heads, x, x, theta, weights=memory_weights, **options)
    seen = _attend(weights, heads, x, first, x, window)
    factors: Any = (1.0, 1.0) if norms is None else [np.asarray(w, np.float64) for w in norms]
    seen, said = (
        w * y / np.sqrt((y**2).mean(-1, keepdims=True) + eps) for y, w in zip((seen, said), factors, strict=True)
    )
    return seen * (1 if gate == "sigmoid" else said) / (1 + np.exp(-said)), last


def titans_memory_as_layer(
    x: Any, theta: Any, weights: Any, *, heads: int, window: int, memory_weights: Any = None, **options: Any
) -> tuple[Float64, Any]:
    """See `longattn.linear`."""
    x, first = _start(x, weights)
    whole = np.concatenate([first, x], axis=1)
    said, last = _remember(weights, heads, whole, whole, theta, weights=memory_weights, **options)
    p = first.shape[1]
    return _attend(weights, heads, said[:, p:], said[:, :p], said[:, p:], window), last
