"""Attention over a prefix tree from its formula: a dictionary of sequences, each attended to by itself.

Arguments are those of `longattn.kv.PrefixTree` and `longattn.kv.chunk_attention`, as numpy arrays (bfloat16 by
ml_dtypes); results are float64. Nothing is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense.attention import attention


class PrefixTree:
    """Sequences that share nothing, with the counts that a tree of them would have."""

    def __init__(self, kv_heads: int, head_dim: int, value_dim: int | None = None, chunk_size: int = 64) -> None:
        self.chunk_size = chunk_size
        self.empty = (
            np.zeros((kv_heads, 0, head_dim)),
            np.zeros((kv_heads, 0, head_dim if value_dim is None else value_dim)),
        )
        self.tokens: dict[int, list[int]] = {}
        self.rows: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}
        self.next = 0

    def add_seq(self, tokens: Sequence[int], k: ArrayLike, v: ArrayLike) -> int:
        """A sequence of its own."""
        return self._new([*tokens], (np.asarray(k), np.asarray(v)))

    def extend(self, sequence: int, tokens: Sequence[int], k: ArrayLike, v: ArrayLike) -> None:
        """More rows of one sequence."""
        self.tokens[sequence] += tokens
        pairs = zip(self.rows[sequence], (k, v), strict=True)
        self.rows[sequence] = tuple(np.concatenate([a, np.asarray(b)], axis=1) for a, b in pairs)  # type: ignore[assignment]

    def append(
        self, tokens: Sequence[int], k: ArrayLike, v: ArrayLike, *, sequences: Sequence[int] | None = None
    ) -> None:
        """One row more of each sequence."""
        k, v = np.asarray(k), np.asarray(v)
        for i, sequence in enumerate(self.sequences if sequences is None else sequences):
            self.extend(sequence, [tokens[i]], k[i][:, None], v[i][:, None])

    def fork(self, sequence: int, n: int = 1) -> list[int]:
        """Copies."""
        return [self._new([*self.tokens[sequence]], self.rows[sequence]) for _ in range(n)]

    def remove(self, sequence: int) -> None:
        """Forgets a sequence."""
        del self.tokens[sequence], self.rows[sequence]

    @property
    def sequences(self) -> list[int]:
        """Numbers of all sequences."""
        return sorted(self.tokens)

    @property
    def whole_chunks(self) -> set[tuple[int, ...]]:
        """The distinct beginnings of sequences that are a whole number of chunks."""
        size = self.chunk_size
        return {tuple(tokens[:end]) for tokens in self.tokens.values() for end in range(size, len(tokens) + 1, size)}

    @property
    def tokens_stored(self) -> int:
        """Whole chunks, once for each distinct beginning, and what of each sequence is left over."""
        return len(self.whole_chunks) * self.chunk_size + sum(len(t) % self.chunk_size for t in self.tokens.values())

    @property
    def chunks(self) -> int:
        """Chunks that hold them."""
        return len(self.whole_chunks) + sum(len(t) % self.chunk_size > 0 for t in self.tokens.values())

    def _new(self, tokens: list[int], rows: tuple[NDArray[Any], NDArray[Any]]) -> int:
        number = self.next
        self.next += 1
        self.tokens[number], self.rows[number] = tokens, rows
        return number


def chunk_attention(
    q: ArrayLike,
    tree: PrefixTree,
    *,
    sequences: Sequence[int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: ArrayLike | None = None,
    return_lse: bool = False,
) -> Any:
    """Dense attention of row i of `q` `[n, Hq, D]` over all rows of sequence `sequences[i]`.

    Returns:
        Output `[n, Hq, Dv]`, with `return_lse` the pair with lse `[n, Hq]`.
    """
    q = np.asarray(q, np.float64)
    dim = tree.empty[1].shape[-1]
    out, lse = np.empty((*q.shape[:2], dim)), np.empty(q.shape[:2])
    for i, sequence in enumerate(tree.sequences if sequences is None else sequences):
        k, v = tree.rows[sequence]
        one = attention(q[i][:, None], k, v, scale=scale, softcap=softcap, sinks=sinks, return_lse=True)
        out[i], lse[i] = one[0][:, 0], one[1][:, 0]
    return (out, lse) if return_lse else out
