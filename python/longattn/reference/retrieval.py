"""Retrieval attention from its formulas: float64 numpy, one query row after another.

Three parts: exact attention over the rows that a call read, the codes of `longattn.index.Signatures` with what
is estimated from them, and HATA's attention over plain hash codes. Nothing is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]
Rows = NDArray[np.int64]

#: Grid steps that a code may choose from, relative to the root mean square of the key's coordinates.
STEPS = {1: (1.0,), 2: (0.6, 0.8, 1.0, 1.2, 1.45, 1.7), 4: (0.22, 0.27, 0.32, 0.37, 0.42)}

#: Keys are coded in blocks; an incomplete block has no code yet.
BLOCK = 16


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


# Codes


def rotation(dim: int, seed: int) -> Float64:
    """The random orthogonal matrix `[dim, dim]` of a seed: Gram-Schmidt on rows of normal numbers.

    The numbers come from SplitMix64 by Box and Muller's formula, two draws each, so that a seed means the same
    matrix everywhere.
    """
    normals = np.empty(dim * dim)
    state = seed
    for i in range(dim * dim):
        draws = []
        for _ in range(2):
            state = (state + 0x9E3779B97F4A7C15) % 2**64
            z = state
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            draws.append(((z ^ (z >> 31)) >> 11) / 2**53)  # uniform in [0, 1)
        normals[i] = np.sqrt(-2 * np.log(1 - draws[0])) * np.cos(2 * np.pi * draws[1])
    matrix = normals.reshape(dim, dim)
    for i in range(dim):
        for _ in range(2):  # the second pass removes what rounding left
            matrix[i] -= matrix[:i].T @ (matrix[:i] @ matrix[i])
        matrix[i] /= np.linalg.norm(matrix[i])
    return matrix


@dataclass(frozen=True)
class Codes:
    """Codes of one head's keys.

    Attributes:
        points: `[N, D]`, grid points: multiples of 1/2 from `-(2**bits - 1) / 2` up, 1 apart.
        factors: `[N]`, what makes `factor * <q, point>` unbiased: `|x|^2 / <point, x>`.
        deviations: `[N]`, standard deviation of that estimate for a query of norm 1: `|x| tan(angle) / sqrt(D - 1)`.
        centre: `[D]`, what was subtracted from the keys.
        rotation: `[D, D]`, what they were multiplied by then.
    """

    points: Float64
    factors: Float64
    deviations: Float64
    centre: Float64
    rotation: Float64

    @property
    def sigma(self) -> float:
        """Root mean square error for a query of norm 1."""
        return float(np.sqrt(np.mean(self.deviations**2)))


def encode(keys: ArrayLike, bits: int, seed: int = 0) -> Codes:
    """Codes of the keys `[N, D]` of one head, fitted on these keys.

    A key, less the mean key and rotated, becomes the grid point nearest to it in angle: of the points that plain
    rounding gives for each step in `STEPS`, the one with the largest cosine.
    """
    keys = np.asarray(keys, np.float64)
    dim = keys.shape[-1]
    centre, turn = keys.mean(axis=0), rotation(dim, seed)
    x = (keys - centre) @ turn.T
    norm = np.linalg.norm(x, axis=-1)
    unit = np.divide(np.sqrt(dim), norm, out=np.zeros_like(norm), where=norm > 0)[:, None]
    top = (2**bits - 1) / 2
    points = np.full_like(x, 0.5)
    best = np.full(len(x), -1.0)
    for step in STEPS[bits]:
        # To the nearest odd multiple of 1/2; between two of them to the one whose lower neighbour is even.
        tried = np.clip(np.round(x * unit / step - 0.5) + 0.5, -top, top)
        cosine = (tried * x).sum(axis=-1) / np.linalg.norm(tried, axis=-1) / np.where(norm > 0, norm, 1)
        better = cosine > best
        points[better], best[better] = tried[better], cosine[better]
    product = (points * x).sum(axis=-1)
    factors = np.divide(norm**2, product, out=np.zeros_like(norm), where=norm > 0)
    tangent = np.sqrt(np.maximum(0, 1 - best**2)) / np.where(best > 0, best, 1)
    deviations = np.where(norm > 0, norm * tangent / np.sqrt(max(dim, 2) - 1), 0)
    return Codes(points, factors, deviations, centre, turn)


def estimate(q: ArrayLike, codes: Codes) -> Float64:
    """Estimated `<q, k>` `[N]` of every coded key for a query `[D]`, whose rotation is rounded to signed bytes."""
    q = np.asarray(q, np.float64)
    turned = codes.rotation @ q
    step = np.abs(turned).max() / 127 or 1.0
    rounded = step * np.round(turned / step)
    estimates: Float64 = codes.factors * (codes.points @ rounded) + codes.centre @ q
    return estimates


def unread_log_weights(logits: ArrayLike, sigma: float) -> Float64:
    """Log of what a row that is not read weighs, from the estimated logits `[n]` of all candidates.

    With an error `sigma` below a third of a nat it is `s - sigma^2 / 2`. Above that it is the logarithm of the
    mean of `exp(true logit)` given the estimate, the true logits being normal with the estimates' mean and their
    variance less `sigma^2`: rows are unread because their estimate is low, which does not bias this mean.
    """
    s = np.asarray(logits, np.float64)
    noise = sigma**2
    if noise < 0.11:
        return s - noise / 2
    signal = max(s.var() - noise, 0.05 * s.var())
    slope = signal / (signal + noise)
    # Above ln n the correction would stand for errors rarer than one row in n.
    weights: Float64 = slope * s + s.mean() * (1 - slope) + min(slope * noise / 2, np.log(s.size))
    return weights


# Plain hash codes


@dataclass(frozen=True)
class HashAttention:
    """Output `[Hq, Lq, Dv]`, lse `[Hq, Lq]` and selected rows `[Hkv][Lq]` of `hata_topk_attention`."""

    out: Float64
    lse: Float64
    selected: list[list[Rows]]


def hata_topk_attention(
    q: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    weights: ArrayLike,
    *,
    top_k: int,
    sinks: int = 4,
    window: int = 512,
    use_norm: bool = False,
    scale: float | None = None,
    coded: int | None = None,
) -> HashAttention:
    """Attention over the keys whose hash codes are nearest to those of the query group.

    Bit t of a vector x is `(x W)_t > 0`. A KV head ranks its keys by the sum of the Hamming distances to the
    codes of its query heads, or with `use_norm` by `(1 - 2 distance / code_bits)`, summed over the heads, times
    the norm of the key as float16. Ties go to the lower row.

    Args:
        q: queries `[Hq, Lq, D]`, the last positions of the sequence.
        keys: `[Hkv, N, D]`.
        values: `[Hkv, N, Dv]`.
        weights: W, `[Hkv, D, code_bits]`.
        top_k: rows selected per KV head, beside sinks and window.
        sinks: first rows, always read.
        window: last rows, always read.
        use_norm: rank by the estimated cosine times the norm.
        scale: factor of the logits; `None` is `D ** -0.5`.
        coded: rows that have a code, others are always read; default all.

    References:
        P. Gong et al., "HATA: Trainable and Hardware-Efficient Hash-Aware Top-k Attention for Scalable Large Model
        Inference", 2025.
    """
    q, keys, values, weights = (np.asarray(x, np.float64) for x in (q, keys, values, weights))
    heads, rows, _ = q.shape
    kv_heads, length, _ = keys.shape
    group, code_bits = heads // kv_heads, weights.shape[-1]
    coded = length if coded is None else coded
    selected: list[list[Rows]] = []
    for h in range(kv_heads):
        key_bits = keys[h] @ weights[h] > 0
        norms = np.linalg.norm(keys[h], axis=-1).astype(np.float16).astype(np.float64)
        of_head = []
        for i in range(rows):
            query_bits = q[h * group : (h + 1) * group, i] @ weights[h] > 0
            distance = (query_bits[:, None] != key_bits[None]).sum(axis=-1).sum(axis=0)
            score = (group * code_bits - 2 * distance) * norms if use_norm else -distance
            among = candidates(length - rows + i + 1, coded, sinks, window)
            best = among[np.argsort(-score[among], kind="stable")][:top_k]
            of_head.append(np.sort(best))
        selected.append(of_head)
    exact = attention(q, keys, values, selected, coded, sinks=sinks, window=window, scale=scale)
    return HashAttention(exact.out, exact.lse, selected)
