"""Image tokens kept by the attention of a middle layer, with their neighbours, and by that of a deep one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array
from longattn._checks import finite, integer, items_of
from longattn.methods import Method
from longattn.pictures import example, kept_pairs
from longattn.reference import vision as reference
from longattn.vision.token_budgets import scores, token_mass


def hierarchical_attention_pruning(
    object_layer: tuple[Array, Array],
    deep_layer: tuple[Array, Array],
    *,
    budget: int,
    width: int,
    alpha: float = 0.1,
    prefix: int = 1,
    scale: float | None = None,
) -> NDArray[np.int64]:
    """The image tokens to keep, by the weights that they receive in two layers of the image encoder.

    Middle layers look at objects: the `alpha / 5` of the budget that receive most weight there are anchors, and their
    four neighbours stay with them. Deep layers look at everything: what is left of the budget goes to the tokens that
    receive most there. `pick_hierarchical` is the choice from weights.

    Args:
        object_layer: `(q, k)` of the middle layer, `[B, h, N + prefix, D]` each; float32, float16 or bfloat16. Layer 9
            of 24, or 16 of 32, in the paper.
        deep_layer: `(q, k)` of the last layer that is used, likewise.
        budget: tokens that stay, at most `N`.
        width: tokens of a line of the image.
        alpha: share of the budget for anchors and their neighbours, 0 to 5.
        prefix: tokens before those of the image (the class token), which do not count as keys but do as rows.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        Int64 `[B, budget]`: numbers of image tokens, ascending.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `4 * h * N ** 2 * D` multiply-adds; no weights are stored.

    References:
        J. Liu et al., "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language
        Models", 2025, arXiv:2508.00553.

    Example:
        >>> import numpy as np, longattn.vision
        >>> layer = np.random.default_rng(0).standard_normal((2, 1, 4, 65, 16), dtype=np.float32)
        >>> longattn.vision.hierarchical_attention_pruning(layer, layer, budget=20, width=8).shape
        (1, 20)
    """
    first = integer(prefix, "prefix", 0)
    found = []
    for layer, name in ((object_layer, "object_layer"), (deep_layer, "deep_layer")):
        if len(items_of(layer, name, "q and k")) != 2:
            raise TypeError(f"{name}: got {type(layer).__name__}, expected a pair (q, k)")
        found.append(np.asarray(token_mass(layer[0], layer[1], scale=scale))[:, first:])
    middle, deep = found
    if middle.shape != deep.shape:
        raise ValueError(f"deep_layer: got {deep.shape} sequences and tokens, expected {middle.shape}")
    kept = [
        pick_hierarchical(*pair, budget=budget, width=width, alpha=alpha) for pair in zip(middle, deep, strict=True)
    ]
    return np.stack(kept) if kept else np.zeros((0, integer(budget, "budget", 0)), np.int64)


def pick_hierarchical(
    object_weights: Array, deep_weights: Array, *, budget: int, width: int, alpha: float = 0.1
) -> NDArray[np.int64]:
    """Anchors, their neighbours, and the tokens of most weight besides.

    A token's neighbours are those before and after it and a line above and below, as far as the image has them; at an
    end of a line the next one is of another line. Where anchors and neighbours are more than the budget, anchors stay
    before neighbours.

    Args:
        object_weights: floating `[N]`, by which anchors are chosen.
        deep_weights: floating `[N]`, by which the others are.
        budget: as in `hierarchical_attention_pruning`.
        width: as there.
        alpha: as there.

    Returns:
        Int64 `[budget]`, ascending; of equal weights the first.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Two sorts.
    """
    middle = scores(object_weights, "object_weights", (None,))
    deep = scores(deep_weights, "deep_weights", middle.shape)
    tokens, count, line = middle.size, integer(budget, "budget", 0, middle.size), integer(width, "width", 1)
    share = finite(alpha, "alpha")
    if not 0 <= share <= 5:
        raise ValueError(f"alpha: got {alpha}, expected 0 to 5")
    order = np.argsort(-middle, kind="stable")
    anchors = order[: min(round(count * share / 5), tokens)]
    around = np.clip(anchors[:, None] + np.array([-1, 1, -line, line]), 0, max(tokens - 1, 0))
    # 2 of an anchor, 1 of a neighbour: what stays where not all of them can.
    level = np.zeros(tokens, np.int64)
    level[around] = 1
    level[anchors] = 2
    if np.count_nonzero(level) >= count:
        return np.sort(order[np.argsort(-level[order], kind="stable")][:count])
    held = np.flatnonzero(level)
    others = np.argsort(-np.where(level > 0, -np.inf, deep), kind="stable")[: count - len(held)]
    return np.sort(np.concatenate([held, others]))


METHOD = Method(
    name="hierarchical_attention_pruning",
    family="vision",
    title="HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
    year=2025,
    arxiv="2508.00553",
    function=hierarchical_attention_pruning,
    reference=reference.hierarchical_attention_pruning,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "Without anchors the tokens of most weight in the deep layer stay.",
        "A budget of all tokens keeps all.",
        "As many tokens stay as the budget says.",
        "Of equal weights the first tokens stay.",
    ),
    tests="tests/vision/test_hierarchical_attention_pruning.py",
    cost="`4 * h * N ** 2 * D` multiply-adds; no weights are stored.",
    mask=lambda: kept_pairs(
        hierarchical_attention_pruning(example(64), example(64, heads=2), budget=24, width=8, alpha=1.0, prefix=0)[0],
        64,
    ),
)
