"""Tokens of a large image kept region by region, by what regions, tokens and an instruction make of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array
from longattn._checks import finite, integer, real
from longattn.methods import Method
from longattn.pictures import kept_pairs
from longattn.reference import vision as reference
from longattn.vision.token_budgets import budgeted_topk, scores, split_budget


def pyramid_token_pruning(
    region_scores: Array,
    token_scores: Array,
    instruction_scores: Array | None = None,
    *,
    keep: float,
    alpha: float = 0.5,
    tau: float = 1.0,
) -> NDArray[np.int64]:
    """The tokens of an image's sub-images to keep: a budget for each region, filled by the weight of tokens.

    Budgets are shares of the whole by `softmax(region_scores / tau)`, rounded so that none is larger than a region and
    all are used (`split_budget`). In a region the tokens of largest `alpha * s + (1 - alpha) * t` stay, `s` being their
    weight in the image encoder and `t` that of the instruction, each divided by its sum over the region: as far as
    the paper is clear about the norms and `alpha`.

    Args:
        region_scores: floating `[n]`: how each of `n` sub-images resembles the whole (cosine of class tokens), or the
            attention of the whole image's class token inside it.
        token_scores: floating `[n, N]`, not negative: attention of the class token to the region's tokens
            (`cls_attention`), or what they receive from all (`token_mass`).
        instruction_scores: floating `[n, N]`, not negative: what they receive from the rows of the instruction in an
            early layer of the language model; `None` leaves it out.
        keep: share of all tokens that stays, 0 to 1; the number is rounded.
        alpha: how much the image counts against the instruction, 0 to 1.
        tau: temperature of the regions' shares, above 0.

    Returns:
        Int64, ascending: numbers of kept tokens, `region * N + token`; of equal ones the first. Tokens of the
        thumbnail are the caller's to keep.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        A sort of the tokens.

    References:
        "Pyramid Token Pruning for High-Resolution Large Vision-Language Models via Region, Token, and
        Instruction-Guided Importance", 2025, arXiv:2509.15704.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> kept = longattn.vision.pyramid_token_pruning(rng.random(4), rng.random((4, 36)), keep=0.25)
        >>> kept.shape
        (36,)
    """
    regions = scores(region_scores, "region_scores", (None,))
    if not regions.size:
        raise ValueError("region_scores: got none, expected a number for each sub-image")
    own = scores(token_scores, "token_scores", (regions.size, None))
    told = None if instruction_scores is None else scores(instruction_scores, "instruction_scores", own.shape)
    for x, name in ((own, "token_scores"), (told, "instruction_scores")):
        if x is not None and x.size and x.min() < 0:
            raise ValueError(f"{name}: got {x.min()}, expected numbers of at least 0")
    share, mix, heat = real(keep, "keep"), finite(alpha, "alpha"), real(tau, "tau")
    for value, name in ((share, "keep"), (mix, "alpha")):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: got {value}, expected 0 to 1")
    if not heat > 0:
        raise ValueError(f"tau: got {tau}, expected above 0")
    count, tokens = own.shape
    shares = np.exp((regions - regions.max()) / heat)
    budgets = split_budget(shares / shares.sum(), integer(round(share * own.size), "keep"), capacity=tokens)
    mixed = _shares(own)
    if told is not None:
        mixed = mix * mixed + (1 - mix) * _shares(told)
    return budgeted_topk(mixed.ravel(), np.repeat(np.arange(count), tokens), budgets)


def _shares(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each row's sum; zeros where that is 0."""
    total = x.sum(axis=1, keepdims=True)
    shares: NDArray[np.float64] = np.divide(x, total, out=np.zeros_like(x), where=total > 0)
    return shares


def _example() -> NDArray[np.bool_]:
    """Tokens of four regions of 16 that stay."""
    rng = np.random.default_rng(0)
    return kept_pairs(pyramid_token_pruning(rng.random(4), rng.random((4, 16)), keep=0.4, tau=0.5), 64)


METHOD = Method(
    name="pyramid_token_pruning",
    family="vision",
    title="Pyramid Token Pruning for High-Resolution Large Vision-Language Models via Region, Token, and "
    "Instruction-Guided Importance",
    year=2025,
    arxiv="2509.15704",
    function=pyramid_token_pruning,
    reference=reference.pyramid_token_pruning,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=True,
    dtypes=("float32", "float16", "bfloat16", "float64"),
    step=False,
    checks=(
        "Keeping everything is the identity.",
        "With `alpha` 1 the instruction does not matter.",
        "Equal regions have equal budgets, and budgets add up.",
        "One region with `alpha` 1 keeps its tokens of most weight.",
    ),
    tests="tests/vision/test_pyramid_token_pruning.py",
    cost="A sort of the tokens.",
    mask=_example,
)
