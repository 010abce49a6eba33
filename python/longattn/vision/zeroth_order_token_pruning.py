"""Image tokens to whose small changes a projector answers most, and that differ from one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, reshaped
from longattn._checks import integer, real
from longattn.methods import Method
from longattn.pictures import kept_pairs
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, Linear, Weights, features
from longattn.vision.convolution import gelu
from longattn.vision.token_budgets import diverse_topk

#: Directions for which both ends are projected in one go.
_TOGETHER = 4


def zeroth_order_token_pruning(
    x: Array,
    projector: Callable[[Float32], Any] | Sequence[Weights],
    *,
    keep: int,
    directions: int = 16,
    step: float = 0.01,
    power: float = 1.0,
    seed: int = 0,
) -> NDArray[np.int64]:
    """The image tokens to keep: those that the projector is sensitive to, as far as they differ.

    A token's sensitivity is estimated from differences along random directions (`projector_sensitivity`). Tokens are
    chosen one by one by `sensitivity ** power * (1 - max(cosine with those chosen))` of their projections
    (`diverse_topk`), the most sensitive first. No attention is needed.

    Args:
        x: tokens of the image encoder `[B, N, C]`; float32, float16 or bfloat16.
        projector: a function of float32 `[..., C]` that gives `[..., C']`, or weights of layers with GELU between them,
            each a matrix `[inputs, outputs]` or a pair with the bias.
        keep: tokens that stay, at most `N`.
        directions: random directions, the same for all tokens.
        step: length of a change, relative to the token's.
        power: how much sensitivity counts against diversity, at least 0.
        seed: of the directions.

    Returns:
        Int64 `[B, keep]`: numbers of tokens, ascending.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * directions + 1` runs of the projector, and `keep * N * C'` multiply-adds by numpy.

    References:
        Y. Kim et al., "Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models",
        2025, arXiv:2509.24837.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> x, w = rng.standard_normal((1, 64, 16), dtype=np.float32), rng.standard_normal((2, 16, 16))
        >>> longattn.vision.zeroth_order_token_pruning(x, list(w), keep=10).shape
        (1, 10)
    """
    tokens = features(x, "x", 3, "[B, N, C]")
    count = integer(keep, "keep", 0, tokens.shape[1])
    run = _run(projector, tokens.shape[2])
    sensitivity = projector_sensitivity(tokens, run, directions=directions, step=step, seed=seed)
    projected = _projected(run, tokens)
    kept = [
        diverse_topk(s, rows, count, power=power)
        for s, rows in zip(sensitivity, reshaped(projected, *tokens.shape[:2], -1), strict=True)
    ]
    return np.stack(kept) if kept else np.zeros((0, count), np.int64)


def projector_sensitivity(
    x: Array,
    projector: Callable[[Float32], Any] | Sequence[Weights],
    *,
    directions: int = 16,
    step: float = 0.01,
    seed: int = 0,
) -> NDArray[np.float64]:
    """How much a projector's result changes with each token, along random directions.

    With normal directions `u_r` and `h = step * |x| / sqrt(C)` (`step` for a token of zeros), the mean over `r` of
    `|f(x + h u_r) - f(x - h u_r)| / (2 h)`.

    Args:
        x: tokens `[B, N, C]`; float32, float16 or bfloat16.
        projector: as in `zeroth_order_token_pruning`.
        directions: as there.
        step: as there.
        seed: as there.

    Returns:
        Float64 `[B, N]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * directions` runs of the projector.
    """
    tokens = features(x, "x", 3, "[B, N, C]")
    channels = tokens.shape[2]
    run = _run(projector, channels)
    number, length = integer(directions, "directions", 1), real(step, "step")
    if not 0 < length < np.inf:
        raise ValueError(f"step: got {step}, expected a finite number above 0")
    drawn = np.random.default_rng(integer(seed, "seed", 0)).standard_normal((number, channels)).astype(np.float32)
    norm = np.sqrt(np.square(tokens, dtype=np.float64).mean(axis=2, keepdims=True))
    h = (length * np.where(norm > 0, norm, 1.0)).astype(np.float32)
    total = np.zeros(tokens.shape[:2])
    for first in range(0, number, _TOGETHER):
        moved = h * drawn[first : first + _TOGETHER, None, None]
        change = _projected(run, tokens + moved) - _projected(run, tokens - moved)
        total += np.sqrt(np.square(change, dtype=np.float64).sum(axis=-1)).sum(axis=0)
    return total / (2 * number * h[..., 0].astype(np.float64))


def _run(projector: Callable[[Float32], Any] | Sequence[Weights], channels: int) -> Callable[[Float32], Any]:
    """The projector as a function."""
    if callable(projector):
        return projector
    if not isinstance(projector, list | tuple) or not projector:
        raise TypeError(f"projector: got {type(projector).__name__}, expected a function, or weights of layers")
    layers: list[Linear] = []
    for n, weights in enumerate(projector):
        layers.append(Linear.of(weights, f"projector[{n}]", layers[-1].outputs if layers else channels))

    def run(x: Float32) -> Float32:
        y = layers[0](x)
        for layer in layers[1:]:
            y = layer(gelu(y))
        return y

    return run


def _projected(run: Callable[[Float32], Any], x: Float32) -> Float32:
    y = np.asarray(run(x), np.float32)
    if y.ndim != x.ndim or y.shape[:-1] != x.shape[:-1] or not y.shape[-1]:
        raise ValueError(f"projector: got a result of shape {y.shape}, expected {x.shape[:-1]} and channels")
    if not np.isfinite(y).all():
        raise ValueError("projector: got a result that is not finite")
    return y


def _example() -> NDArray[np.bool_]:
    """Tokens of a few kinds of which some stay."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 16)).astype(np.float32)[np.arange(64) // 16][None]
    x = x + 0.3 * rng.standard_normal(x.shape).astype(np.float32)
    weights = [0.3 * rng.standard_normal((16, 16)).astype(np.float32) for _ in range(2)]
    return kept_pairs(zeroth_order_token_pruning(x, weights, keep=24)[0], 64)


METHOD = Method(
    name="zeroth_order_token_pruning",
    family="vision",
    title="Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models",
    year=2025,
    arxiv="2509.24837",
    function=zeroth_order_token_pruning,
    reference=reference.zeroth_order_token_pruning,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "A linear projector is as sensitive to every token, whatever the step.",
        "A budget of all tokens keeps all.",
        "A large power leaves only sensitivity.",
        "A copy of a chosen token has nothing to add.",
    ),
    tests="tests/vision/test_zeroth_order_token_pruning.py",
    cost="`2 * directions + 1` runs of the projector, and `keep * N * C'` multiply-adds.",
    mask=_example,
)
