"""Product codes: logits estimated from them, and attention that ranks or weighs rows by those. Nothing is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.retrieval.retrieval_attention import candidates

Float64 = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class ProductCodes:
    """Codes of one head.

    Attributes:
        centre: `[D]`, subtracted from keys.
        codebooks: `[subvectors, centroids, width]`.
        residuals: `[subvectors, width, width]`, covariance of what the codes leave.
        codes: `[N, subvectors]`.
        value_ids: `[N]`, cluster of each row's value.
        key_basis: `[D, D]` that centred keys were multiplied by, `None` for none.
        query_basis: likewise of queries.
    """

    centre: Float64
    codebooks: Float64
    residuals: Float64
    codes: Rows
    value_ids: Rows
    key_basis: Float64 | None = None
    query_basis: Float64 | None = None


@dataclass(frozen=True)
class ProductAttention:
    """Output `[Hq, Lq, Dv]`, lse `[Hq, Lq]` and selected rows `[Hkv][Lq]`."""

    out: Float64
    lse: Float64
    selected: list[list[Rows]]


def nearest(keys: ArrayLike, of: ProductCodes) -> Rows:
    """The nearest centroid of each subvector of keys `[n, D]`: `[n, subvectors]`."""
    x = np.asarray(keys, np.float64) - of.centre
    if of.key_basis is not None:
        x = x @ of.key_basis.T
    parts = x.reshape(len(x), len(of.codebooks), 1, -1)
    distances = ((parts - of.codebooks[None]) ** 2).sum(-1)
    found: Rows = distances.argmin(-1)
    return found


def product_logits(q: ArrayLike, of: ProductCodes) -> Float64:
    """Estimated logits of the coded rows for scaled queries: `[n, N]`.

    With 16 centroids the query's tables are rounded: to 255 steps of the widest of them, from the least entry of each.
    """
    q = np.asarray(q, np.float64)
    turned = q if of.query_basis is None else q @ of.query_basis.T
    parts = turned.reshape(len(q), len(of.codebooks), -1)
    tables = np.einsum("nmw,mcw->nmc", parts, of.codebooks)
    if tables.shape[-1] == 16:
        low = tables.min(-1, keepdims=True)
        step = (tables.max(-1, keepdims=True) - low).max(axis=(-1, -2), keepdims=True) / 255
        step = np.where(step > 0, step, 1.0)
        tables = low + step * np.round((tables - low) / step)
    logits: Float64 = (q @ of.centre)[:, None] + sum(tables[:, j, of.codes[:, j]] for j in range(of.codes.shape[1]))
    return logits


def product_error(q: ArrayLike, of: ProductCodes) -> Float64:
    """Standard deviation of the logits around their estimates for scaled queries: `[n]`."""
    q = np.asarray(q, np.float64)
    turned = q if of.query_basis is None else q @ of.query_basis.T
    parts = turned.reshape(len(q), len(of.codebooks), -1)
    deviations: Float64 = np.sqrt(np.einsum("nmw,mwv,nmv->n", parts, of.residuals, parts))
    return deviations


def product_attention(
    q: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    codes: Sequence[ProductCodes],
    *,
    top_k: int,
    sinks: int = 4,
    window: int = 512,
    scale: float | None = None,
    rest: bool = True,
    selected: Sequence[Sequence[ArrayLike]] | None = None,
) -> ProductAttention:
    """Exact attention to sinks, window, rows without a code and the best rows, with an estimate of the others.

    Rows are ranked by the mean over the group of `e^s` as a share of all mass, `s` the estimated logit. A row left
    unread has the weight `e^(s + min(sigma^2 / 2, ln n))`, n the number of candidates, and the mean value of its value
    cluster.

    Args:
        q: queries `[Hq, Lq, D]`, the last positions of the sequence.
        keys: `[Hkv, N, D]`.
        values: `[Hkv, N, Dv]`.
        codes: of each KV head.
        top_k: rows selected.
        sinks: first rows, always read.
        window: last rows, always read.
        scale: factor of the logits; `None` is `D ** -0.5`.
        rest: whether rows left unread take part, as estimated.
        selected: `[Hkv][Lq]`, rows to read instead of the best ones.
    """
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    heads, rows, dim = q.shape
    kv_heads, length, _ = keys.shape
    group = heads // kv_heads
    q = q * (dim**-0.5 if scale is None else scale)
    out, lse = np.zeros((heads, rows, values.shape[-1])), np.zeros((heads, rows))
    read_rows: list[list[Rows]] = []
    for h, of in enumerate(codes):
        coded = len(of.codes)
        means = np.stack(
            [
                values[h, :coded][of.value_ids == c].mean(0) if (of.value_ids == c).any() else values[h, 0] * 0
                for c in range(of.value_ids.max(initial=0) + 1)
            ]
        )
        of_head = []
        for i in range(rows):
            total, qs = length - rows + i + 1, q[h * group : (h + 1) * group, i]
            among = candidates(total, coded, sinks, window)
            scores, errors = product_logits(qs, of)[:, among], product_error(qs, of)
            logits = qs @ keys[h, :total].T
            read = np.ones(total, bool)
            read[among] = False
            top = np.maximum(logits[:, read].max(-1, initial=-np.inf), scores.max(-1, initial=-np.inf))
            mass = np.exp(logits[:, read] - top[:, None]).sum(-1) + np.exp(scores - top[:, None]).sum(-1)
            share = (np.exp(scores - top[:, None]) / mass[:, None]).mean(0)
            picked = np.sort(among[np.argsort(-share, kind="stable")[:top_k]])
            if selected is not None:
                picked = np.asarray(selected[h][i], np.int64)
            of_head.append(picked)
            read[picked] = True
            unread = ~read[among]
            for g in range(group):
                head = h * group + g
                exact = np.exp(logits[g, read] - top[g])
                shift = min(errors[g] ** 2 / 2, np.log(max(len(among), 1)))
                others = np.exp(scores[g, unread] + shift - top[g]) if rest else np.zeros(unread.sum())
                both = exact.sum() + others.sum()
                lse[head, i] = top[g] + np.log(both)
                clusters = means[of.value_ids[among[unread]]]
                out[head, i] = (exact @ values[h, :total][read] + others @ clusters) / both
        read_rows.append(of_head)
    return ProductAttention(out, lse, read_rows)
