"""Memories of the Miras framework, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from longattn.reference.linear._fast_weight import Float64, fast_weight
from longattn.reference.linear.features import softmax


def miras_memory(
    q: Any,
    k: Any,
    v: Any,
    eta: Any,
    *,
    variant: str,
    alpha: Any = None,
    delta: Any = None,
    weights: Any = None,
    loss_exponent: float = 3.0,
    norm_exponent: float = 4.0,
    steepness: float = 10.0,
    huber: str = "signs",
    read: str = "token",
    total: float = 1.0,
    residual: Any = None,
    activation: str = "gelu",
    normalize_qk: bool = True,
    scale: float = 1.0,
    chunk_size: int = 16,
) -> tuple[Float64, list[Float64]]:
    """See `longattn.linear`; returns the matrices after the last row in place of a state."""

    def power(e: Float64, _: float) -> Float64:
        found: Float64 = loss_exponent * np.tanh(steepness * e) * (e**2 + 1e-6) ** ((loss_exponent - 1) / 2)
        return found

    def cut(e: Float64, limit: float) -> Float64:
        if huber == "each":
            return np.clip(e, -limit, limit)
        length = np.linalg.norm(e)
        if length <= limit:
            return e
        found: Float64 = limit * (np.sign(e) if huber == "signs" else e / length)
        return found

    def over_norm(a: Float64) -> Float64:
        norm = (np.abs(a) ** norm_exponent).sum() ** (1 / norm_exponent)
        found: Float64 = a if norm == 0 else a / norm ** (norm_exponent - 2)
        return found

    ways: dict[str, tuple[Callable[[Float64, float], Float64], Callable[[Float64], Float64], str]] = {
        "moneta": (power, over_norm, "norm" if read == "chunk" else "token"),
        "yaad": (cut, lambda w: w, "token"),
        "memora": (lambda e, _: e, lambda z: total * softmax(z, axis=0), read),
    }
    descend, read_out, inside = ways[variant]
    return fast_weight(
        q,
        k,
        v,
        eta,
        weights,
        descend=descend,
        keep=1.0 if alpha is None else alpha,
        threshold=0.0 if delta is None else delta,
        read_out=read_out,
        inside=inside,
        activation=activation,
        residual=residual,
        unit=1e-6 if normalize_qk else None,
        scale=scale,
        chunk_size=chunk_size,
    )
