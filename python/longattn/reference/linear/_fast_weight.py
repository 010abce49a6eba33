"""Memories that learn while they read, token by token in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Matrices = list[Float64]


def _phi(x: Float64) -> Float64:
    """The normal distribution."""
    from math import erf

    found: Float64 = np.vectorize(lambda t: 0.5 * (1 + erf(t / 2**0.5)), otypes=[np.float64])(x)
    return found


ACTIVATIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "silu": (
        lambda x: x / (1 + np.exp(-x)),
        lambda x: (1 + x * (1 - 1 / (1 + np.exp(-x)))) / (1 + np.exp(-x)),
    ),
    "gelu": (
        lambda x: x * _phi(x),
        lambda x: _phi(x) + x * np.exp(-(x**2) / 2) / (2 * np.pi) ** 0.5,
    ),
}


class Network:
    """A network of a few matrices `[inputs, outputs]`, perhaps inside `x + norm(..)`."""

    def __init__(self, activation: str, bias: bool, residual: tuple[Float64, Float64, float] | None) -> None:
        self.act, self.slope = ACTIVATIONS[activation]
        self.bias = bias
        self.residual = residual

    def inputs(self, x: Float64) -> Float64:
        return np.append(x, 1.0) if self.bias else x

    def forward(self, weights: Matrices, x: Float64) -> tuple[Float64, list[tuple[Float64, Float64]]]:
        """What it says, and inputs and sums of each layer."""
        kept, at = [], x
        for i, w in enumerate(weights):
            given = self.inputs(at)
            sums = given @ w
            kept.append((given, sums))
            at = sums if i + 1 == len(weights) else self.act(sums)
        if self.residual is not None:
            gain, shift, eps = self.residual
            at = x + gain * (at - at.mean()) / np.sqrt(at.var() + eps) + shift
        return at, kept

    def gradients(self, weights: Matrices, kept: list[tuple[Float64, Float64]], d: Float64) -> Matrices:
        """Gradients with respect to the matrices, `d` being that with respect to what was said."""
        if self.residual is not None:
            gain, _, eps = self.residual
            sums = kept[-1][1]
            inverse = 1 / np.sqrt(sums.var() + eps)
            standard = (sums - sums.mean()) * inverse
            d = d * gain
            d = (d - d.mean() - standard * (d * standard).mean()) * inverse
        found: Matrices = []
        for i in range(len(weights) - 1, -1, -1):
            given, _ = kept[i]
            found.insert(0, np.outer(given, d))
            if i:
                back = (weights[i] @ d)[: len(given) - self.bias]
                d = back * self.slope(kept[i - 1][1])
        return found


def fast_weight(
    q: Any,
    k: Any,
    v: Any,
    rate: Any,
    weights: Sequence[Any] | None,
    *,
    descend: Callable[[Float64, float], Float64],
    keep: Any = 1.0,
    momentum: Any = 0.0,
    threshold: Any = 0.0,
    read_out: Callable[[Float64], Float64] = lambda w: w,
    inside: str = "token",
    update: str = "per_token",
    activation: str = "silu",
    bias: bool = False,
    residual: tuple[Any, Any, float] | None = None,
    before: bool = False,
    unit: float | None = None,
    scale: float = 1.0,
    chunk_size: int = 16,
) -> tuple[Float64, Matrices]:
    """Outputs, and the matrices `[B, H, inputs, outputs]` after the last row.

    `descend` makes the gradient of an error and a threshold; `read_out` what is read of a matrix. `inside` a chunk,
    tokens read their own ("token"), the matrices themselves over the chunk's start's norm ("norm", by the ratio of
    what is read to what there is), or those of the start ("chunk"). With `update="per_chunk"` there is one step per
    chunk, at its last row and with that row's gates, and tokens read the weights with which their chunk began.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    one = q.ndim == 3
    if one:
        q, k, v = q[None], k[None], v[None]
    batch, heads, length, dim = k.shape
    gates = [np.asarray(x, np.float64) for x in (rate, keep, momentum, threshold)]
    theta, kept_share, eta, limit = (np.broadcast_to(x, k.shape[:-1]) for x in gates)
    if unit is not None:
        q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + unit) for x in (q, k))
    q = q * scale
    group = q.shape[1] // heads
    first = [np.zeros((dim + bias, v.shape[-1]))] if weights is None else [np.asarray(w, np.float64) for w in weights]
    first = [np.array(np.broadcast_to(w, (batch, heads, *w.shape[-2:]))) for w in first]
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    for b in range(batch):
        for h in range(heads):
            around = None
            if residual is not None:
                rows = [np.asarray(x, np.float64) for x in residual[:2]]
                rows = [np.broadcast_to(x, (heads, v.shape[-1]))[h] for x in rows]
                around = (rows[0], rows[1], float(residual[2]))
            network = Network(activation, bias, around)
            live = [w[b, h].copy() for w in first]
            step = [np.zeros_like(w) for w in live]
            frozen = [w.copy() for w in live]
            held = [np.zeros_like(w) for w in live]
            for t in range(length):
                if t % chunk_size == 0:
                    frozen = [w.copy() for w in live]
                used = [read_out(w) for w in frozen]
                readers = range(h * group, (h + 1) * group)

                def seen(live: Matrices = live, used: Matrices = used, frozen: Matrices = frozen) -> Matrices:
                    if inside == "chunk":
                        return used
                    if inside == "norm":
                        factors = [
                            np.abs(u).max() / (np.abs(f).max() or 1.0) for u, f in zip(used, frozen, strict=True)
                        ]
                        return [w * (f or 1.0) for w, f in zip(live, factors, strict=True)]
                    return [read_out(w) for w in live]

                if before:
                    for reader in readers:
                        out[b, reader, t] = network.forward(seen(live), q[b, reader, t])[0]
                said, kept = network.forward(used, k[b, h, t])
                gradients = network.gradients(used, kept, descend(said - v[b, h, t], float(limit[b, h, t])))
                if update == "per_chunk":
                    for reader in readers:
                        out[b, reader, t] = network.forward(frozen, q[b, reader, t])[0]
                    held = [x + theta[b, h, t] * gradient for x, gradient in zip(held, gradients, strict=True)]
                    if t % chunk_size == chunk_size - 1:
                        step = [eta[b, h, t] * s - x for s, x in zip(step, held, strict=True)]
                        live = [kept_share[b, h, t] * w + s for w, s in zip(frozen, step, strict=True)]
                        held = [np.zeros_like(w) for w in live]
                    elif t == length - 1:  # what a state within a chunk holds
                        live = [w - x for w, x in zip(frozen, held, strict=True)]
                    continue
                for i, gradient in enumerate(gradients):
                    step[i] = eta[b, h, t] * step[i] - theta[b, h, t] * gradient
                    live[i] = kept_share[b, h, t] * live[i] + step[i]
                if not before:
                    for reader in readers:
                        out[b, reader, t] = network.forward(seen(live), q[b, reader, t])[0]
            for w, last in zip(first, live, strict=True):
                w[b, h] = last
    return (out[0] if one else out), first
