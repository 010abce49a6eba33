"""The ways of Miras to keep a memory's weights, as single steps over arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import check_floating, one_of, real

KINDS = ("l2", "elastic_net", "sigmoid", "lq")


def miras_retention(
    weights: Array,
    gradient: Array,
    rate: float,
    *,
    kind: str = "l2",
    keep: float = 1.0,
    threshold: float = 0.0,
    exponent: float = 4.0,
) -> Any:
    """One step of a memory's weights, by how it keeps what it holds.

    - "l2": `keep W - rate G`, decay of all weights alike
    - "elastic_net": `soft(keep W - rate G)`, `soft(x) = sign(x) max(|x| - threshold, 0)`: small weights are forgotten
    - "sigmoid": `sigmoid(logit(W) - rate G)`, weights between 0 and 1 (a Bregman divergence's step)
    - "lq": `A / |A|_r^(r - 2)` of `A = keep W - rate G`, `r` being `exponent`; `weights` and result are `A`, which
      the next step goes on from, and `read_lq` makes the weights

    `miras_memory` runs the first, the last and a softmax over sequences; these are for memories of one's own.

    Args:
        weights: floating `[..]`.
        gradient: of the loss by the weights, floating, in their shape.
        rate: step size, at least 0.
        kind: one of those above.
        keep: what is kept, 0 to 1; not of "sigmoid".
        threshold: of "elastic_net", at least 0.
        exponent: of "lq", at least 2.

    Returns:
        The weights after the step (for "lq" `A`), in the kind, shape and dtype of `weights`; float64 arithmetic.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        A few operations per weight.

    References:
        A. Behrouz et al., "It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention,
        and Online Optimization", 2025, arXiv:2504.13173.
    """
    one_of(kind, "kind", KINDS)
    given, steps = as_numpy(weights, "weights", any_strides=True), as_numpy(gradient, "gradient", any_strides=True)
    check_floating(given, "weights")
    check_floating(steps, "gradient")
    if steps.shape != given.shape:
        raise ValueError(f"gradient: got shape {steps.shape}, expected {given.shape}")
    size, kept = _between(rate, "rate", 0.0), _between(keep, "keep", 0.0, 1.0)
    least = _between(threshold, "threshold", 0.0)
    _between(exponent, "exponent", 2.0)
    old = given.astype(np.float64)
    if kind == "sigmoid":
        if not ((old > 0) & (old < 1)).all():
            raise ValueError("weights: got a number outside 0 to 1, expected numbers between them")
        # sigmoid(logit(w) - d) without the logarithm.
        moved = old / (old + (1 - old) * np.exp(size * steps.astype(np.float64)))
    else:
        moved = kept * old - size * steps.astype(np.float64)
        if kind == "elastic_net":
            moved = np.sign(moved) * np.maximum(np.abs(moved) - least, 0)
    result: NDArray[Any] = moved.astype(given.dtype)
    return like(weights, result)


def read_lq(weights: Array, *, exponent: float = 4.0) -> Any:
    """`A / |A|_r^(r - 2)` over the last two axes: the weights that a memory with "lq" retention reads.

    Args:
        weights: `A`, floating `[.., D, Dv]`.
        exponent: `r`, at least 2, where nothing is divided.

    Returns:
        The weights, in the kind, shape and dtype of `weights`; zeros where all of `A` is.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        A power per weight.
    """
    given, r = as_numpy(weights, "weights", any_strides=True), _between(exponent, "exponent", 2.0)
    check_floating(given, "weights")
    if given.ndim < 2:
        raise ValueError(f"weights: got shape {given.shape}, expected [.., D, Dv]")
    old = given.astype(np.float64)
    norm = (np.abs(old) ** r).sum(axis=(-2, -1), keepdims=True) ** ((r - 2) / r)
    result: NDArray[Any] = np.divide(old, norm, out=np.zeros_like(old), where=norm != 0).astype(given.dtype)
    return like(weights, result)


def _between(value: object, name: str, least: float, most: float = 1e30) -> float:
    number = real(value, name)
    if not least <= number <= most:
        raise ValueError(f"{name}: got {value}, expected {least:g} to {most:g}")
    return number
