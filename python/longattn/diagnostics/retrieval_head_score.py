"""Retrieval heads: how often a head attends to the token that is being copied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import flag, integer, integers, real
from longattn.dense.attention_weights import attention_weights
from longattn.dense.prob_reduce import prob_reduce
from longattn.methods import Method
from longattn.reference import diagnostics as reference


def top_keys(q: Array, k: Array, *, count: int = 1, **options: Any) -> NDArray[np.int64]:
    """The keys that each query weighs most.

    Args:
        q: queries `[Hq, Lq, D]`, those of the last `Lq` keys; float32, float16 or bfloat16.
        k: keys `[Hkv, Lk, D]`, or the `keys` of a `KVStore` of codes.
        count: how many keys.
        options: those of `longattn.attention` that say what the weights are; `causal` is set unless it is given.

    Returns:
        Keys by falling weight, ties to the lower, int64 `[Lq, Hq]`, with `count` above 1 `[Lq, Hq, count]`; -1 where a
        query sees fewer.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        For one key, two passes over queries and keys; for more, the weights of one query row after another.
    """
    options = {"causal": True, **options}
    if integer(count, "count", 1) == 1:
        keys = prob_reduce(q, k, row_max=True, **options).row_max_key
        return as_numpy(keys, "keys").T
    rows = as_numpy(q, "q").shape[-2]
    found = []
    for row in range(rows):
        weights = as_numpy(attention_weights(q, k, rows=[row], **options), "weights")[:, 0]
        order = np.argsort(-weights, axis=-1, kind="stable")[:, :count]
        seen = np.take_along_axis(weights, order, axis=-1) > 0
        found.append(np.pad(np.where(seen, order, -1), ((0, 0), (0, count - order.shape[1])), constant_values=-1))
    return np.array(found, np.int64).reshape(rows, -1, count)


def retrieval_head_score(
    top: Array, tokens: Array, emitted: Array, needle: tuple[int, int], *, unique: bool = True
) -> NDArray[np.float64]:
    """How much of a needle each head copied, in one sample.

    At a step that emits token `y`, a head hits where one of its top keys lies in the needle and holds `y`. With
    `unique`, the score is the share of the needle's distinct tokens that the head hit; else the number of hits over the
    needle's length, in which repeats count.

    Args:
        top: integers `[T, H]` or `[T, L, H]`, the key of most weight of each step and head (and layer), negative for
            none, as `top_keys` gives them; `[T, L, H, n]` are the `n` best keys.
        tokens: integers `[N]`, the tokens of the context.
        emitted: integers `[T]`, the tokens that the steps emitted.
        needle: `(n0, n1)`, the positions of the needle are `n0 <= j < n1`.
        unique: whether repeats count once.

    Returns:
        Scores, float64, of the shape of `top` without its first axis; for `[T, L, H, n]` also without its last.

    Raises:
        TypeError: an argument of another kind.
        ValueError: shapes that do not fit, or a needle outside the context.

    Cost:
        A few operations per step and head.

    References:
        W. Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality", 2024, arXiv:2404.15574.

    Example:
        >>> import longattn as la
        >>> la.diagnostics.retrieval_head_score([[2, 0], [3, 3]], [5, 6, 7, 8], [7, 8], (2, 4))
        array([1. , 0.5])
    """
    keys, context, answer = (_integers(x, name) for x, name in ((top, "top"), (tokens, "tokens"), (emitted, "emitted")))
    if context.ndim != 1 or answer.ndim != 1:
        raise ValueError(f"tokens, emitted: got shapes {context.shape} and {answer.shape}, expected [N] and [T]")
    if keys.ndim < 2 or keys.shape[0] != len(answer):
        raise ValueError(f"top: got shape {keys.shape}, expected ({len(answer)}, ...), the keys of each step")
    if not isinstance(needle, tuple | list) or len(needle) != 2:
        raise TypeError(f"needle: got {needle!r}, expected a pair (first, end)")
    first = integer(needle[0], "needle", 0, max(len(context) - 1, 0))
    end = integer(needle[1], "needle", first + 1, len(context))
    if keys.size and int(keys.max()) >= len(context):
        raise ValueError(f"top: got key {keys.max()}, expected keys below {len(context)}")
    unique = flag(unique, "unique")
    inside = (keys >= first) & (keys < end)
    hits = inside & (context[np.where(inside, keys, 0)] == answer.reshape(-1, *[1] * (keys.ndim - 1)))
    if keys.ndim == 4:
        hits = hits.any(axis=-1)
    if not unique:
        counted: NDArray[np.float64] = hits.sum(axis=0) / (end - first)
        return counted
    distinct = np.unique(context[first:end])
    copied = np.zeros(hits.shape[1:])
    for token in np.intersect1d(distinct, answer):
        copied += hits[answer == token].any(axis=0)
    return copied / len(distinct)


class RetrievalScores:
    """Mean scores of heads over samples.

    Args:
        layers: layers of the model.
        heads: query heads of a layer.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size below 1.
    """

    def __init__(self, layers: int, heads: int) -> None:
        self._sums = np.zeros((integer(layers, "layers", 1), integer(heads, "heads", 1)))
        self._samples = 0

    def add(self, scores: Array) -> None:
        """Counts one sample's scores `[layers, heads]`. Leave out samples whose answer is wrong.

        Raises:
            TypeError: no array of numbers.
            ValueError: another shape, or numbers that are not finite.
        """
        x = as_numpy(scores, "scores")
        if x.shape != self._sums.shape:
            raise ValueError(f"scores: got shape {x.shape}, expected {self._sums.shape}")
        if not np.isfinite(x).all():
            raise ValueError("scores: got numbers that are not finite, expected finite ones")
        self._sums += x
        self._samples += 1

    @property
    def samples(self) -> int:
        """Samples counted."""
        return self._samples

    @property
    def scores(self) -> NDArray[np.float64]:
        """Mean scores `[layers, heads]`, 0 before the first sample."""
        return self._sums / max(self._samples, 1)

    def heads(self, threshold: float = 0.1) -> list[tuple[int, int]]:
        """The retrieval heads: `(layer, head)` of those that score at least `threshold`, best first.

        Raises:
            TypeError: the threshold is no number.
        """
        scores, least = self.scores, real(threshold, "threshold")
        order = np.argsort(-scores, axis=None, kind="stable")
        pairs = (divmod(int(i), scores.shape[1]) for i in order)
        return [(layer, head) for layer, head in pairs if scores[layer, head] >= least]


def mask_heads(out: Array, heads: Iterable[int]) -> Array:
    """An attention output with some heads set to 0, to see what a model does without them.

    Args:
        out: floating `[..., Hq, Lq, Dv]`.
        heads: numbers of query heads.

    Returns:
        A copy, in the kind and dtype of `out`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: another rank, or no such head.
    """
    x = as_numpy(out, "out")
    if x.ndim < 3:
        raise ValueError(f"out: got shape {x.shape}, expected [..., Hq, Lq, Dv]")
    numbers = list(integers(heads, "heads", 0, x.shape[-3] - 1))
    masked = x.copy()
    masked[..., numbers, :, :] = 0
    return like(out, masked)


def _integers(values: Any, name: str) -> NDArray[np.int64]:
    x = np.asarray(values) if isinstance(values, list | tuple) else as_numpy(values, name)
    if x.dtype.kind not in "iu":
        raise TypeError(f"{name}: got dtype {x.dtype}, expected integers")
    return x.astype(np.int64)


METHOD = Method(
    name="retrieval_head_score",
    family="diagnostics",
    title="Retrieval Head Mechanistically Explains Long-Context Factuality",
    year=2024,
    arxiv="2404.15574",
    function=retrieval_head_score,
    reference=reference.retrieval_head_score,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "A head whose weights are one-hot on the copied token scores 1 on a needle that is copied whole.",
        "A head that never looks inside the needle scores 0.",
        "A score of distinct tokens lies between 0 and 1.",
        "The keys from the fused pass are those of explicit weights.",
    ),
    tests="tests/diagnostics/test_retrieval_head_score.py",
    cost="Two passes over the step's keys for the largest weights; a few operations per step and head.",
)
