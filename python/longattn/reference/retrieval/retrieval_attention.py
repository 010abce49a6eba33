"""Retrieval attention over the rows that a call read: float64 numpy, one query row after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class ReadAttention:
    """Attention over the rows that were read.

    Attributes:
        out: `[Hq, Lq, Dv]`, softmax over those rows alone.
        lse: `[Hq, Lq]`, log of their softmax denominator.
        missed_mass: `[Hq, Lq]`, true share of the softmax mass of all visible rows that lies in the others.
    """

    out: Float64
    lse: Float64
    missed_mass: Float64


def candidates(total: int, coded: int, sinks: int, window: int) -> Rows:
    """Rows among which a query that sees `total` rows selects; it reads the others.

    Args:
        total: rows that the query sees.
        coded: rows of the store that have a code.
        sinks: first rows, always read.
        window: last rows, always read.
    """
    return np.arange(min(sinks, total), min(max(total - window, 0), coded), dtype=np.int64)


def attention(
    q: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    selected: Sequence[Sequence[ArrayLike]],
    coded: int,
    *,
    sinks: int = 4,
    window: int = 512,
    scale: float | None = None,
    sink_logits: ArrayLike | None = None,
) -> ReadAttention:
    """Exact attention over sinks, window, rows without a code and the selected rows.

    Args:
        q: queries `[Hq, Lq, D]`, the last positions of the sequence.
        keys: `[Hkv, N, D]`.
        values: `[Hkv, N, Dv]`.
        selected: `[Hkv][Lq]` lists of rows, as in `RetrievalStats.selected`.
        coded: rows that have a code.
        sinks: first rows, always read.
        window: last rows, always read.
        scale: factor of the logits; `None` is `D ** -0.5`.
        sink_logits: `[Hq]`, in the denominator only.
    """
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    heads, rows, dim = q.shape
    group = heads // len(keys)
    out, lse = np.zeros((heads, rows, values.shape[-1])), np.zeros((heads, rows))
    missed = np.zeros((heads, rows))
    for h in range(heads):
        for i in range(rows):
            total = keys.shape[1] - rows + i + 1
            logits = (dim**-0.5 if scale is None else scale) * (keys[h // group, :total] @ q[h, i])
            read = np.ones(total, bool)
            read[candidates(total, coded, sinks, window)] = False
            read[np.asarray(selected[h // group][i], np.int64)] = True
            top = logits.max()
            weights = np.exp(logits - top)
            held = weights[read].sum()
            missed[h, i] = weights[~read].sum() / weights.sum()
            sink = 0.0 if sink_logits is None else np.exp(np.asarray(sink_logits, np.float64)[h] - top)
            out[h, i] = weights[read] @ values[h // group, :total][read] / (held + sink)
            lse[h, i] = top + np.log(held + sink)
    return ReadAttention(out, lse, missed)


def best_rows(
    q: ArrayLike,
    keys: ArrayLike,
    top_k: int,
    *,
    sinks: int = 4,
    window: int = 512,
    scale: float | None = None,
) -> list[list[Rows]]:
    """Rows that an exact scan selects: by the mean over a KV head's queries of each row's share of the softmax.

    Args:
        q: queries `[Hq, Lq, D]`, the last positions of the sequence.
        keys: `[Hkv, N, D]`.
        top_k: rows per KV head, beside sinks and window.
        sinks: first rows, always read.
        window: last rows, always read.
        scale: factor of the logits; `None` is `D ** -0.5`.

    Returns:
        `[Hkv][Lq]` ascending lists; ties go to the lower row.
    """
    q, keys = np.asarray(q, np.float64), np.asarray(keys, np.float64)
    heads, rows, dim = q.shape
    group, length = heads // len(keys), keys.shape[1]
    selected: list[list[Rows]] = []
    for h, of_head in enumerate(keys):
        lists = []
        for i in range(rows):
            total = length - rows + i + 1
            logits = (dim**-0.5 if scale is None else scale) * (q[h * group : (h + 1) * group, i] @ of_head[:total].T)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            share = (weights / weights.sum(-1, keepdims=True)).mean(0)
            among = candidates(total, total, sinks, window)
            lists.append(np.sort(among[np.argsort(-share[among], kind="stable")][:top_k]))
        selected.append(lists)
    return selected
