"""Local attention over long text in overlapped windows, and kernel pooling of its terms."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import batched, check_float_storage, check_floating, dense_inputs, flag, integer, scale_factor
from longattn.dense.attention import attention
from longattn.dense.attention_varlen import attention_varlen
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._lengths import sequence_lengths

#: Below this a kernel's sum is not raised to a power.
SMALLEST_SUM = 1e-10


def overlapped_chunk_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    chunk: int = 40,
    overlap: int = 5,
    scale: float | None = None,
    lengths: Array | None = None,
    packed: bool = True,
) -> Array:
    """Attention inside windows of `chunk + 2 * overlap` terms, of whose outputs the middle `chunk` are kept.

    Window `n` begins `overlap` terms before term `n * chunk`, and windows end where the text does. Every term is kept
    from one window, and sees at least `overlap` neighbours on both sides where the text has them. Both directions are
    seen.

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, L, D]`, or `[Hkv, L, D]`; any of the three dtypes.
        v: values `[B, Hkv, L, Dv]`, or `[Hkv, L, Dv]`; dtype of `k`.
        chunk: terms that a window is there for.
        overlap: terms that it sees to both sides.
        scale: factor on the logits; `None` is `D ** -0.5`.
        lengths: terms of each text, integers `[B]` (`[1]` without a batch axis); those after them are padding, which no
            term sees and whose output is 0. `None`: all are terms.
        packed: windows are sequences of one packed call, and windows of padding are none; otherwise each is a call of
            its own. The result is the same.

    Returns:
        The output in the shape, kind and dtype of `q` (but for `Dv`). A layer mixes it with its input as
        `m * x + (1 - m) * out`, `m` learned.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `Hq * L * (chunk + 2 * overlap) * (D + Dv)` multiply-adds: only the middle queries are computed. Packed, a copy
        of keys and values of all windows, `(chunk + 2 * overlap) / chunk` times theirs.

    References:
        S. Hofstätter et al., "Local Self-Attention over Long Text for Efficient Document Retrieval", 2020,
        arXiv:2005.04908.

    Example:
        >>> import numpy as np, longattn.sparse
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 4, 203, 16), dtype=np.float32)
        >>> longattn.sparse.overlapped_chunk_attention(q, k, v).shape
        (4, 203, 16)
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    if qn.shape[-2] != kn.shape[-2]:
        raise ValueError(f"k: got length {kn.shape[-2]}, expected {qn.shape[-2]} as in q")
    width, extra = integer(chunk, "chunk", 1), integer(overlap, "overlap", 0)
    factor, packed = scale_factor(scale, qn.shape[-1]), flag(packed, "packed")
    q4, k4, v4 = (batched(x, 4) for x in (qn, kn, vn))
    batch, heads, longest, _ = q4.shape
    texts = sequence_lengths(lengths, batch, longest)
    out = np.zeros((batch, heads, longest, v4.shape[3]), qn.dtype)
    for b, length in enumerate(texts):
        starts = np.arange(0, length, width)
        windows = [
            (
                slice(int(a), min(int(a) + width, int(length))),
                slice(max(int(a) - extra, 0), min(int(a) + width + extra, int(length))),
            )
            for a in starts
        ]
        if not windows:
            continue
        if not packed:
            for kept, seen in windows:
                attention(q4[b, :, kept], k4[b, :, seen], v4[b, :, seen], scale=factor, out=out[b, :, kept])
            continue
        seen_rows = np.concatenate([np.arange(seen.start, seen.stop) for _, seen in windows])
        bounds = np.cumsum([0, *(seen.stop - seen.start for _, seen in windows)])
        result = out[b].swapaxes(0, 1)[:length]
        attention_varlen(
            q4[b].swapaxes(0, 1)[:length],
            k4[b].swapaxes(0, 1)[seen_rows],
            v4[b].swapaxes(0, 1)[seen_rows],
            np.append(starts, length),
            bounds,
            scale=factor,
            out=result,
        )
    return like(q, out if qn.ndim == 4 else out[0])


def kernel_pool(
    query: Array,
    document: Array,
    mu: Array,
    sigma: Array,
    kernel_weights: Array,
    *,
    saturation: Array | None = None,
    query_salience: Array | None = None,
    region_weights: Array | None = None,
    region: int = 30,
    stride: int = 2,
    best: int = 3,
) -> tuple[float, NDArray[np.float64]]:
    """Relevance of a document by how its terms lie around those of a query, region by region.

    Of the cosine `C` of each query term and document term, kernels `exp(-(C - mu)^2 / (2 sigma^2))` are summed over a
    region of the document for each query term, saturated, summed over query terms and weighted by kernel. The score is
    that of the best regions that do not overlap, and of their two neighbours to either side, weighted.

    Args:
        query: query terms `[Q, E]`; float32, float16 or bfloat16.
        document: document terms `[L, E]`, likewise.
        mu: centres of the kernels, floating `[K]`.
        sigma: their widths, floating `[K]`, positive.
        kernel_weights: floating `[K]`.
        saturation: floating `[3, 3]`: rows give `a`, `b` and `c` of `a * x ** (1 / b) - c` as linear functions of a
            query term's salience, the region's terms, and 1 (sums below 1e-10 count as that). `None` leaves sums as
            they are, as `a = b = 1`, `c = 0` do.
        query_salience: a learned number per query term, floating `[Q]`; `None` is zeros.
        region_weights: floating `[best, 5]`: weights of the neighbours -2 to 2 of each of the best regions; `None` is
            1.
        region: terms of a region.
        stride: terms from one region to the next.
        best: regions that count.

    Returns:
        The document's score, and those of its regions, float64. A document shorter than a region is one region.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `Q * L * (E + K)`, in float32 for the products, by numpy; a pass over regions.
    """
    q, d = as_numpy(query, "query"), as_numpy(document, "document")
    for x, name in ((q, "query"), (d, "document")):
        check_float_storage(x, name)
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(f"{name}: got shape {x.shape}, expected [terms, E]")
    if d.shape[1] != q.shape[1]:
        raise ValueError(f"document: got width {d.shape[1]}, expected {q.shape[1]} as in query")
    centres, count = _numbers(mu, "mu", None), None
    if centres.ndim != 1 or not centres.size:
        raise ValueError(f"mu: got shape {centres.shape}, expected [K]")
    count = len(centres)
    widths, weights = _numbers(sigma, "sigma", (count,)), _numbers(kernel_weights, "kernel_weights", (count,))
    if not (widths > 0).all():
        raise ValueError("sigma: got numbers of at most 0, expected positive ones")
    size, step, most = integer(region, "region", 1), integer(stride, "stride", 1), integer(best, "best", 1)
    linear = None if saturation is None else _numbers(saturation, "saturation", (3, 3))
    salience = np.zeros(len(q)) if query_salience is None else _numbers(query_salience, "query_salience", (len(q),))
    mixing = np.ones((most, 5)) if region_weights is None else _numbers(region_weights, "region_weights", (most, 5))

    unit_q, unit_d = (_unit(np.asarray(x, np.float32)) for x in (q, d))
    cosine = (unit_q @ unit_d.T).astype(np.float64)
    terms = d.shape[0]
    starts = np.arange(0, max(terms - size, 0) + 1, step) if terms else np.zeros(0, np.int64)
    stops = np.minimum(starts + size, terms)
    per_term = np.zeros((len(q), len(starts)))
    for centre, width, weight in zip(centres, widths, weights, strict=True):
        sums = np.zeros((len(q), terms + 1))
        np.cumsum(np.exp(-((cosine - centre) ** 2) / (2 * width**2)), axis=1, out=sums[:, 1:])
        inside = sums[:, stops] - sums[:, starts]
        if linear is not None:
            features = np.stack(
                [*np.broadcast_arrays(salience[:, None], (stops - starts)[None], np.ones((1, 1)))], axis=-1
            )
            a, b, c = np.moveaxis(features @ linear.T, -1, 0)
            inside = a * np.maximum(inside, SMALLEST_SUM) ** (1 / b) - c
        per_term += weight * inside
    scores = per_term.sum(axis=0)
    return _best_regions(scores, -(-size // step), mixing), scores


def _best_regions(scores: NDArray[np.float64], apart: int, mixing: NDArray[np.float64]) -> float:
    """The weighted sum of the best regions, each with its neighbours; regions less than `apart` away overlap."""
    left, total = scores.copy(), 0.0
    for weights in mixing:
        if not (left > -np.inf).any():
            break
        top = int(left.argmax())
        for offset, weight in zip(range(-2, 3), weights, strict=True):
            if 0 <= top + offset < len(scores):
                total += float(weight * scores[top + offset])
        left[max(top - apart + 1, 0) : top + apart] = -np.inf
    return total


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of norm 1; rows of zeros stay."""
    norms = np.sqrt(np.square(x, dtype=np.float64).sum(axis=1, keepdims=True))
    unit: NDArray[np.float32] = (x / np.maximum(norms, 1e-12)).astype(np.float32)
    return unit


def _numbers(x: Array, name: str, shape: tuple[int, ...] | None) -> NDArray[np.float64]:
    a: NDArray[Any] = as_numpy(x, name, any_strides=True)
    check_floating(a, name)
    if shape is not None and a.shape != shape:
        raise ValueError(f"{name}: got shape {a.shape}, expected {shape}")
    wide = a.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError(f"{name}: got NaN or infinity, expected finite numbers")
    return wide


METHOD = Method(
    name="overlapped_chunk_attention",
    family="sparse",
    title="Local Self-Attention over Long Text for Efficient Document Retrieval",
    year=2020,
    arxiv="2005.04908",
    function=overlapped_chunk_attention,
    reference=reference.overlapped_chunk_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "Without overlap it is attention inside blocks.",
        "A chunk of the whole text gives attention.",
        "Packed windows give what windows one by one give.",
        "A saturation of `a = b = 1`, `c = 0` changes nothing.",
    ),
    tests="tests/sparse/test_overlapped_chunk_attention.py",
    cost="`Hq * L * (chunk + 2 * overlap) * (D + Dv)` multiply-adds, and a copy of keys and values by window.",
    mask=lambda: seen(overlapped_chunk_attention, *example(), chunk=16, overlap=4),
)
