"""Tokens of a denoising step ranked by a random walk along attention, and copies of the kept ones for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like, reshaped
from longattn._checks import flag, integer, real, scale_factor
from longattn.dense._query_key import query_key_inputs
from longattn.dense.attention import attention
from longattn.dense.attention_weights import attention_weights
from longattn.dense.prob_reduce import prob_reduce
from longattn.methods import Method
from longattn.pictures import example, kept_pairs
from longattn.reference import vision as reference
from longattn.vision.token_budgets import scores

#: Rows of weights that are looked at together.
_ROWS = 128


@dataclass(frozen=True, slots=True)
class TokenRanking:
    """Ranked tokens.

    Attributes:
        importance: float32 `[B, Nq]`, in the kind of `q`; each row sums to 1.
        kept: int64 `[B, count]`: the tokens that stay, ascending.
        source: int64 `[B, Nq]`: the kept token whose result each token takes, its place among `kept`; kept tokens take
            their own: `out[b, source[b]]` puts results of the kept tokens back in all places.
    """

    importance: Array
    kept: NDArray[np.int64]
    source: NDArray[np.int64]


def gwpr_token_ranking(
    q: Array,
    k: Array,
    *,
    ratio: float,
    iterations: int = 10,
    tol: float = 1e-4,
    damping: float = 1.0,
    head_weights: Array | None = None,
    cross: bool = False,
    scale: float | None = None,
) -> TokenRanking:
    """Importance of tokens by a weighted page rank of their attention, the tokens to keep, and copies for the rest.

    With `A` the weights averaged over heads, importance starts equal and becomes `A^T s`, the weight that each token
    receives from the others by their own importance, until it changes by less than `tol` in all or `iterations` times;
    no matrix is stored. With `cross`, keys are those of a text: their importance is `A^T s`, and that of queries the
    normalised `A s_k` (as far as the paper is clear about it). Of the tokens, the most important stay. Each of the
    others copies the kept token that it attends to most, before convolutions need all places.

    Args:
        q: queries `[B, Hq, Nq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Nk, D]`; any of the three dtypes. Without `cross`, `Nk` is `Nq`.
        ratio: share of the tokens that goes, at least 0 and below 1.
        iterations: most steps, at least 1; 1 is how much weight each token receives in all.
        tol: sum of changes below which it stops.
        damping: `d` in `s = d A^T s + (1 - d) / N`, above 0 and at most 1; 1 is none.
        head_weights: floating `[Hq]`, not negative: how much each head counts; `None` is equally.
        cross: see there; tokens copy by cosine of their queries then, all heads side by side.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        A `TokenRanking`; of equal ones the first tokens stay.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `(iterations + 1) * Hq * Nq * Nk * D` multiply-adds and a pass over the weights of those that go.

    References:
        H. Wang et al., "Attention-Driven Training-Free Efficiency Enhancement of Diffusion Models", 2024,
        arXiv:2405.05252.

    Example:
        >>> import numpy as np, longattn.vision
        >>> q, k = np.random.default_rng(0).standard_normal((2, 1, 2, 64, 16), dtype=np.float32)
        >>> found = longattn.vision.gwpr_token_ranking(q, k, ratio=0.5)
        >>> found.kept.shape, bool((found.kept[0, found.source[0, found.kept[0]]] == found.kept[0]).all())
        ((1, 32), True)
    """
    qn, kn = query_key_inputs(q, k)
    if qn.ndim != 4 or 0 in qn.shape[2:3] + kn.shape[2:3]:
        raise ValueError(f"q: got shapes {qn.shape} and {kn.shape}, expected [B, H, N, D] with at least 1 token")
    if not flag(cross, "cross") and kn.shape[2] != qn.shape[2]:
        raise ValueError(f"k: got {kn.shape[2]} tokens, expected {qn.shape[2]} as in q; keys of others go with cross")
    batch, heads, tokens, dim = qn.shape
    share, most, small = real(ratio, "ratio"), integer(iterations, "iterations", 1), real(tol, "tol")
    if not 0 <= share < 1:
        raise ValueError(f"ratio: got {ratio}, expected at least 0 and below 1")
    rest = real(damping, "damping")
    if not 0 < rest <= 1:
        raise ValueError(f"damping: got {damping}, expected above 0 and at most 1")
    factor = scale_factor(scale, dim)
    shares = np.full(heads, 1 / heads)
    if head_weights is not None:
        shares = scores(head_weights, "head_weights", (heads,))
        if shares.min() < 0 or not shares.sum() > 0:
            raise ValueError(f"head_weights: got {shares.tolist()}, expected numbers of at least 0, one above 0")
        shares = shares / shares.sum()
    importance = np.full((batch, tokens), 1 / tokens)
    lse: Any = None
    for _ in range(most):
        rows = (importance[:, None] * shares[:, None]).astype(np.float32)
        found = prob_reduce(qn, kn, column_mass=True, query_weights=rows, lse=lse, scale=factor)
        lse = found.lse
        after = np.asarray(found.column_mass).sum(axis=1, dtype=np.float64)
        if cross:
            values = np.repeat(after[:, None, :, None], kn.shape[1], axis=1).astype(np.float32)
            seen = attention(qn.astype(np.float32), kn.astype(np.float32), values, scale=factor)
            after = np.einsum("bhq,h->bq", seen[..., 0].astype(np.float64), shares)
        after = rest * after / after.sum(axis=1, keepdims=True) + (1 - rest) / tokens
        change = np.abs(after - importance).sum(axis=1).max(initial=0)
        importance = after
        if change < small:
            break
    kept = np.sort(np.argsort(-importance, axis=1, kind="stable")[:, : tokens - int(share * tokens)], axis=1)
    copied = [_sources(qn[b], kn[b], kept[b], shares, cross, factor) for b in range(batch)]
    source = np.array(copied, np.int64).reshape(batch, tokens)
    return TokenRanking(like(q, importance.astype(np.float32)), kept, source)


def pruned_blocks(steps: int, blocks: int, *, early_steps: float = 0.3, early_blocks: float = 0.5) -> NDArray[np.bool_]:
    """Which attention blocks drop tokens in which denoising step: early steps leave the first blocks whole.

    What the early steps decide is the layout, which needs all tokens; how many steps and blocks that are is not clear
    from the paper.

    Args:
        steps: denoising steps.
        blocks: attention blocks of the network, in their order.
        early_steps: share of the steps that is early, rounded: 15 of 50.
        early_blocks: share of the blocks that stay whole in these, rounded.

    Returns:
        Booleans `[steps, blocks]`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a share below 0 or above 1, or negative numbers.

    Cost:
        The result.
    """
    rows, columns = integer(steps, "steps", 0), integer(blocks, "blocks", 0)
    shares = real(early_steps, "early_steps"), real(early_blocks, "early_blocks")
    for share, name in zip(shares, ("early_steps", "early_blocks"), strict=True):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: got {share}, expected 0 to 1")
    pruned = np.ones((rows, columns), bool)
    pruned[: round(shares[0] * rows), : round(shares[1] * columns)] = False
    return pruned


def _sources(
    q: NDArray[Any],
    k: NDArray[Any],
    kept: NDArray[np.int64],
    shares: NDArray[np.float64],
    cross: bool,
    scale: float,
) -> NDArray[np.int64]:
    """Place among the kept tokens of the one that each token copies."""
    tokens = q.shape[1]
    source = np.empty(tokens, np.int64)
    source[kept] = np.arange(len(kept))
    gone = np.setdiff1d(np.arange(tokens), kept)
    if cross:
        x = reshaped(q.astype(np.float32).swapaxes(0, 1), tokens, -1)
        unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        source[gone] = np.argmax(unit[gone] @ unit[kept].T, axis=1)
        return source
    weights = shares.astype(np.float32)
    for start in range(0, len(gone), _ROWS):
        rows = gone[start : start + _ROWS]
        seen = as_numpy(attention_weights(q, k, rows, scale=scale), "weights")[:, :, kept]
        source[rows] = np.argmax(np.tensordot(weights, seen, axes=1), axis=1)
    return source


METHOD = Method(
    name="gwpr_token_ranking",
    family="vision",
    title="Attention-Driven Training-Free Efficiency Enhancement of Diffusion Models",
    year=2024,
    arxiv="2405.05252",
    function=gwpr_token_ranking,
    reference=reference.gwpr_token_ranking,
    exact=True,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=True,
    step=False,
    checks=(
        "One step from equal importance is the mean weight that tokens receive.",
        "Weights whose columns sum to 1 leave importance equal, and the first tokens stay.",
        "With a ratio of 0 every token takes its own result.",
        "Kept tokens get their own results back.",
        "What it ends in hardly changes by another step.",
    ),
    tests="tests/vision/test_gwpr_token_ranking.py",
    cost="`(iterations + 1) * Hq * Nq * Nk * D` multiply-adds and a pass over the weights of those that go.",
    mask=lambda: kept_pairs(gwpr_token_ranking(*example(64), ratio=0.5).kept[0], 64),
)
