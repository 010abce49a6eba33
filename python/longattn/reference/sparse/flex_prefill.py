"""FlexPrefill from its formulas: float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense import attention
from longattn.reference.sparse.choosing import fewest, means, softmax, spans


def _last_weights(q: NDArray[np.float64], k: NDArray[np.float64], block: int, scale: float) -> NDArray[np.float64]:
    """Causal weights of the last queries of one head, `[queries, keys]`."""
    rows = min(block, len(q), len(k))
    seen = np.arange(len(k)) <= np.arange(len(k) - rows, len(k))[:, None]
    return softmax(np.where(seen, scale * q[len(q) - rows :] @ k.T, -np.inf))


def flex_divergence(q: ArrayLike, k: ArrayLike, *, block: int = 128, scale: float | None = None) -> NDArray[np.float64]:
    """Root of the Jensen-Shannon divergence of predicted and true weights over blocks, `[B, Hq]`."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    found = np.zeros(q.shape[:2])
    group = q.shape[1] // k.shape[1]
    for b, h in np.ndindex(*q.shape[:2]):
        one = k[b, h // group]
        weights = _last_weights(q[b, h], one, block, factor)
        p = np.array([weights[:, part].sum(axis=1).mean() for part in spans(len(one), block)])
        mean_q = q[b, h, q.shape[2] - len(weights) :].mean(axis=0)
        guess = softmax(factor * means(one[None, None], block)[0, 0] @ mean_q)
        middle = (p + guess) / 2
        parts = [np.where(x > 0, x * np.log(np.where(x > 0, x, 1) / middle), 0.0).sum() for x in (p, guess)]
        found[b, h] = np.sqrt(max(sum(parts) / 2, 0.0))
    return found


def flex_blocks(
    q: ArrayLike,
    k: ArrayLike,
    *,
    gamma: ArrayLike = 0.9,
    tau: float = 0.1,
    block: int = 128,
    min_budget: int = 1024,
    scale: float | None = None,
) -> NDArray[np.bool_]:
    """Which keys each query's block takes, `[B, Hq, Lq, Lk]`, before causality."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    batch, heads, rows, dim = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    factor = dim**-0.5 if scale is None else scale
    shares = np.broadcast_to(np.asarray(gamma, np.float64), heads)
    aware = flex_divergence(q, k, block=block, scale=factor) < tau
    positions = np.arange(rows) + keys - rows
    numbers = positions // block
    least, n = -(-min_budget // block), -(-keys // block)
    kept = np.zeros((batch, heads, rows, keys), bool)
    for b, h in np.ndindex(batch, heads):
        one, groups = k[b, h // group], np.unique(numbers)
        of_k = means(one[None, None], block)[0, 0]
        logits = factor * np.array([q[b, h, numbers == i].mean(axis=0) for i in groups]) @ of_k.T
        eligible = np.arange(n) <= groups[:, None]
        predicted = softmax(np.where(eligible, logits, -np.inf))
        first_or_own = (np.arange(n) == 0) | (np.arange(n) == groups[:, None])
        weights = _last_weights(q[b, h], one, block, factor)
        distance = np.arange(keys - len(weights), keys)[:, None] - np.arange(keys)
        lines = []
        for line in (np.broadcast_to(np.arange(keys), weights.shape) // block, distance // block):
            mass = np.array([weights[line == i].sum() for i in range(n)])
            lines.append(fewest(mass, shares[h], np.arange(n) == 0, counts=False, least=min(least, n)))
        back = groups[:, None] - np.arange(n)
        on_lines = lines[0] | ((back >= 0) & lines[1][np.maximum(back, 0)])
        if aware[b, h]:
            chosen = np.zeros_like(eligible)
            chosen[eligible] = fewest(predicted[eligible], shares[h], first_or_own[eligible], counts=False)
        else:
            chosen = on_lines & eligible
        for row, i in enumerate(groups):
            some = fewest(predicted[row, : i + 1], 0.0, first_or_own[row, : i + 1], least=least, most=least)
            chosen[row, : i + 1] |= some
            kept[b, h, numbers == i] = np.repeat(chosen[row], block)[:keys]
    return kept


def flex_prefill(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, scale: float | None = None, return_lse: bool = False, **choice: Any
) -> Any:
    """See `longattn.sparse.flex_prefill`."""
    mask = flex_blocks(q, k, scale=scale, **choice)
    return attention(q, k, v, mask=mask, causal=True, scale=scale, return_lse=return_lse)
