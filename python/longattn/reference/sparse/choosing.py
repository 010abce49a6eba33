"""The best entries of rows of scores, as several selectors take them: float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def fewest(
    scores: NDArray[np.float64],
    share: Any,
    forced: NDArray[np.bool_],
    *,
    counts: bool = True,
    least: int = 0,
    most: int | None = None,
) -> NDArray[np.bool_]:
    """The forced entries and the fewest best others with a share of the sum; equal ones by number.

    Args:
        scores: of the entries that may be taken.
        share: from 1 on, all are taken.
        forced: what is taken whatever it scores.
        counts: whether the forced ones count to the share and the numbers, or come on top.
        least: entries that are taken at least.
        most: and at most.
    """
    order = [i for i in np.argsort(-scores, kind="stable") if not (counts and forced[i])]
    have, sum_ = (int(forced.sum()), float(scores[forced].sum())) if counts else (0, 0.0)
    most = max(len(scores) if most is None else most, least)
    taken = forced.copy()
    for i in order:
        reached = share <= 0 or (share < 1 and sum_ >= share * scores.sum())
        if have >= most or (reached and have >= least):
            break
        taken[i] = True
        have, sum_ = have + 1, sum_ + float(scores[i])
    return taken


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Softmax of the last axis; zeros for a row without finite logits."""
    top = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    weights: NDArray[np.float64] = np.exp(logits - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    shares: NDArray[np.float64] = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return shares


def spans(length: int, block: int) -> list[slice]:
    """Blocks of a length, the last what is left."""
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]


def over_tokens(blocks: NDArray[np.bool_], rows: int, keys: int, block_q: int, block_k: int) -> NDArray[np.bool_]:
    """A mask over blocks as one over queries and keys."""
    mask: NDArray[np.bool_] = np.repeat(np.repeat(blocks, block_q, axis=-2), block_k, axis=-1)[..., :rows, :keys]
    return mask


def means(x: ArrayLike, block: int) -> NDArray[np.float64]:
    """Means of blocks of rows, `[B, H, blocks, D]`."""
    x = np.asarray(x, np.float64)
    found: NDArray[np.float64] = np.stack([x[:, :, part].mean(axis=2) for part in spans(x.shape[2], block)], axis=2)
    return found


def pooled(q: ArrayLike, k: ArrayLike, block_q: int, block_k: int, scale: float) -> NDArray[np.float64]:
    """Scaled products of the means of blocks of queries and of keys."""
    of_q, of_k = means(q, block_q), means(k, block_k)
    of_k = np.repeat(of_k, of_q.shape[1] // of_k.shape[1], axis=1)
    scores: NDArray[np.float64] = scale * of_q @ of_k.swapaxes(-1, -2)
    return scores
