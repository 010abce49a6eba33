"""Verified sparse attention: as few rows as keep the output's error below a bound with some confidence."""

from __future__ import annotations

from typing import Literal

from longattn._arrays import Array
from longattn.index import Index
from longattn.kv import KVStore
from longattn.methods import Method
from longattn.reference.retrieval import verified as reference
from longattn.retrieval.retrieval_attention import RetrievalResult, retrieval_attention


def verified_sparse_attention(
    q: Array,
    store: KVStore,
    index: Index,
    *,
    epsilon: float = 0.1,
    delta: float = 0.05,
    relative_to: Literal["output", "values"] = "output",
    sinks: int = 4,
    window: int = 512,
    scale: float | None = None,
    seed: int = 0,
    sink_logits: Array | None = None,
    return_stats: bool = True,
    return_selected: bool = False,
) -> RetrievalResult:
    """Causal attention that reads rows until the output's error is at most `epsilon`, except with chance `delta`.

    The first `sinks` and the last `window` rows are read exactly. Of the rows between them, those of much weight are
    read for certain, the others with a chance that follows the index's estimate of their weight, so that nothing is
    out of reach. What the rows read differ by from the index's estimate corrects it without bias, and their spread
    tells how large the error still is. From a first sample of about 1,024 rows follows the size of the next, which
    contains it; where more than a third of the rows would be needed, all are read.

    The error of a sample is taken to be normal. That holds where the index weighs rows well: with `Signatures` of 4
    bits. The number of rows that the estimate of the error rests on widens it (Student's t), and no sample is so
    small that one unread row, its logit underestimated by three standard deviations, could use up `epsilon` alone.
    Codes of 1 or 2 bits on keys of large norm therefore end in reading everything.

    The paper reads the rows of most weight and a uniform sample of the others, whose weights it does not estimate.
    This function differs in both: rows are drawn by their estimated weights, and correct that estimate.

    Args:
        q: queries `[Hq, Lq, D]` or `[1, Hq, Lq, D]`; float32, float16 or bfloat16; at most 64 query heads per KV
            head.
        store: keys and values; at least `Lq` rows.
        index: an index of that store that weighs rows, such as `Signatures`.
        epsilon: largest norm of the error, in units of `relative_to`, between 0 and 1.
        delta: chance of a larger error, between 0 and 1, for each query head and position.
        relative_to: `"output"`: the norm of the exact output. `"values"`: the root mean square norm of the head's
            values.
        sinks: first rows that are always read.
        window: last rows that are always read.
        scale: factor of the logits; `None` is `D ** -0.5`.
        seed: of the random numbers.
        sink_logits: floating `[Hq]`: an extra logit per head that takes part in the denominator only.
        return_stats: return what was read: `keys_sampled`, `error_estimate` and `verified` say how it ended.
        return_selected: also list the sampled rows.

    Returns:
        A `RetrievalResult`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: as `retrieval_attention`, and an `epsilon` or `delta` outside 0 to 1, or an index that weighs no
            single rows.

    Cost:
        The scan of the index, and the rows of the last sample and of those before it. Rows grow with
        `1 / epsilon ** 2`.

    References:
        A. Desai et al., "vAttention: Verified Sparse Attention", 2025 (arXiv 2510.05688).
    """
    return retrieval_attention(
        q,
        store,
        index,
        epsilon=epsilon,
        delta=delta,
        relative_to=relative_to,
        sinks=sinks,
        window=window,
        scale=scale,
        seed=seed,
        sink_logits=sink_logits,
        return_stats=return_stats,
        return_selected=return_selected,
    )


METHOD = Method(
    name="verified_sparse_attention",
    family="retrieval",
    title="vAttention: Verified Sparse Attention",
    year=2025,
    arxiv="2510.05688",
    function=verified_sparse_attention,
    reference=reference.verified_sparse_attention,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "A sample's correction is unbiased: its mean over seeds is exact attention.",
        "The estimated error is the root mean square of the error over seeds.",
        "At most a share `delta` of the outputs is off by more than `epsilon`.",
        "Where `epsilon` is too small for a sample, the result is exact attention.",
    ),
    tests="tests/retrieval/test_verified_sparse_attention.py",
    cost="The scan of the index, and the rows of the samples, which grow with `1 / epsilon ** 2`.",
)
