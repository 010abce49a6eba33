"""MagicPIG's sampling by hash tables: float64 numpy, from the formulas. Nothing is checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.retrieval.retrieval_attention import candidates
from longattn.reference.retrieval.signatures import normals

Float64 = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class SampledAttention:
    """Output `[Hq, Lq, Dv]`, lse `[Hq, Lq]` and the rows that each query head met `[Hq][Lq]`."""

    out: Float64
    lse: Float64
    met: list[list[Rows]]


def buckets(x: ArrayLike, tables: int, bits: int, seed: int) -> NDArray[np.int64]:
    """Buckets `[..., tables]` of vectors `[..., D]`: bit t of table l is the sign of a product with direction l, t."""
    x = np.asarray(x, np.float64)
    directions = normals(tables * bits * x.shape[-1], seed).reshape(tables, bits, x.shape[-1])
    signs = np.einsum("...d,ltd->...lt", x, directions) > 0
    numbers: NDArray[np.int64] = (signs * 2 ** np.arange(bits)).sum(axis=-1)
    return numbers


def inclusion(cosine: ArrayLike, tables: int, bits: int) -> Float64:
    """Chance that two vectors share the bucket of at least two tables."""
    one = (1 - np.arccos(np.clip(np.asarray(cosine, np.float64), -1, 1)) / np.pi) ** bits
    chance: Float64 = 1 - (1 - one) ** tables - tables * one * (1 - one) ** (tables - 1)
    return chance


def magicpig_attention(
    q: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    tables: int,
    bits: int,
    seed: int = 0,
    coded: int | None = None,
    *,
    sinks: int = 4,
    window: int = 64,
    scale: float | None = None,
) -> SampledAttention:
    """Self-normalised importance sampling over the rows that share at least two buckets with a query.

    Args:
        q: queries `[Hq, Lq, D]`, the last positions of the sequence.
        keys: `[Hkv, N, D]`.
        values: `[Hkv, N, Dv]`.
        tables: hash tables.
        bits: bits of a bucket's number.
        seed: seed of the directions.
        coded: rows that are in the tables, whose mean key is subtracted; others are always read; default all.
        sinks: first rows, always read.
        window: last rows, always read.
        scale: factor of the logits; `None` is `D ** -0.5`.
    """
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    heads, rows, dim = q.shape
    kv_heads, length, _ = keys.shape
    coded = length if coded is None else coded
    factor = dim**-0.5 if scale is None else scale
    out, lse = np.zeros((heads, rows, values.shape[-1])), np.full((heads, rows), -np.inf)
    met: list[list[Rows]] = []
    for h in range(heads):
        k, v = keys[h * kv_heads // heads], values[h * kv_heads // heads]
        moved = k - (k[:coded].mean(axis=0) if coded else 0)
        of_keys, of_head = buckets(moved, tables, bits, seed), []
        for i in range(rows):
            total = length - rows + i + 1
            scaled = factor * q[h, i]
            among = candidates(total, coded, sinks, window)
            collisions = (of_keys[among] == buckets(scaled, tables, bits, seed)).sum(axis=-1)
            drawn = among[collisions >= 2]
            lengths = np.linalg.norm(moved[drawn], axis=-1) * np.linalg.norm(scaled)
            cosine = np.divide(moved[drawn] @ scaled, lengths, out=np.zeros(len(drawn)), where=lengths > 0)
            # Two zero vectors are in the same buckets in any case.
            cosine[(np.linalg.norm(moved[drawn], axis=-1) == 0) & (np.linalg.norm(scaled) == 0)] = 1
            steady = np.setdiff1d(np.arange(total), among)
            read = np.concatenate([steady, drawn])
            chance = np.concatenate([np.ones(len(steady)), inclusion(cosine, tables, bits)])
            of_head.append(drawn)
            if len(read):
                logits = k[read] @ scaled - np.log(chance)
                lse[h, i] = np.logaddexp.reduce(logits)
                out[h, i] = np.exp(logits - lse[h, i]) @ v[read]
        met.append(of_head)
    return SampledAttention(out, lse, met)
