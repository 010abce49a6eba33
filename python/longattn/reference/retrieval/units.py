"""Attention that reads whole units of keys (pages, clusters) and weighs the others as a whole. Nothing is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.retrieval.retrieval_attention import candidates

Float64 = NDArray[np.float64]
Rows = NDArray[np.int64]

#: Part of the variance of a unit's logits that the score "mean_variance" adds.
VARIANCE = 0.25


@dataclass(frozen=True)
class UnitAttention:
    """Result of `unit_attention`.

    Attributes:
        out: `[Hq, Lq, Dv]`.
        lse: `[Hq, Lq]`, log of the denominator, with the estimate of the rest where that takes part.
        selected: `[Hkv][Lq]`, rows of the units that were picked, ascending.
        missed_mass: `[Hq, Lq]`, share of the candidates left unread, each by its unit's score, of all mass.
    """

    out: Float64
    lse: Float64
    selected: list[list[Rows]]
    missed_mass: Float64


def page_rows(covered: int, page_size: int) -> list[Rows]:
    """Rows of the pages of the first `covered` rows."""
    return [np.arange(at, at + page_size) for at in range(0, covered, page_size)]


def unit_scores(
    q: ArrayLike, keys: ArrayLike, unit: ArrayLike, inside: ArrayLike, score: str, landmark: int = -1
) -> Float64:
    """Score of one unit for queries `[n, D]` that are scaled already.

    Args:
        q: queries.
        keys: `[N, D]`, keys of the head.
        unit: rows of the unit.
        inside: those of them that are candidates; means are theirs alone.
        score: "mean", "mean_variance", "bounds", "radius" or "landmark".
        landmark: the place in the unit of the row that scores it.
    """
    q, keys = np.asarray(q, np.float64), np.asarray(keys, np.float64)
    whole = keys[np.asarray(unit)]
    scores: Float64
    if score == "bounds":
        scores = np.maximum(q[:, None] * whole.min(0), q[:, None] * whole.max(0)).sum(-1)[:, 0]
    elif score == "radius":
        centre = whole.mean(0)
        scores = q @ centre + np.linalg.norm(q, axis=-1) * np.linalg.norm(whole - centre, axis=-1).max()
    elif score == "landmark":
        scores = q @ whole[landmark]
    else:
        scores = q @ keys[np.asarray(inside)].mean(0)
        if score == "mean_variance":
            scores = scores + VARIANCE * q**2 @ whole.var(0)
    return scores


def unit_attention(
    q: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    units: Sequence[Sequence[ArrayLike]],
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    score: str = "mean",
    landmark: int = -1,
    sinks: int = 4,
    window: int = 512,
    scale: float | None = None,
    rest: bool = True,
    sink_logits: ArrayLike | None = None,
    selected: Sequence[Sequence[ArrayLike]] | None = None,
) -> UnitAttention:
    """Exact attention to sinks, window, rows of no unit and the units picked, with an estimate of the others.

    With `S_gu` the score of unit u for head g of a group and `n_u` its candidates, the share of one of its rows is
    `p_gu = e^S_gu / (steady_g + sum_w n_w e^S_gw)`. Units are picked by the mean of `p_gu` over g, ties to the lower
    unit: until they have `top_k` candidates, of the last unit the first rows, or until the steady rows and they have
    the share `top_p` of every head. A row left unread has the logit `S_gu` and the mean value of its unit's
    candidates left unread.

    Args:
        q: queries `[Hq, Lq, D]`, the last positions of the sequence.
        keys: `[Hkv, N, D]`.
        values: `[Hkv, N, Dv]`.
        units: `[Hkv]` lists of units: their rows. Together they are the first rows of the store.
        top_k: rows to pick.
        top_p: or the share of the mass to reach.
        score: see `unit_scores`.
        landmark: likewise.
        sinks: first rows, always read.
        window: last rows, always read.
        scale: factor of the logits; `None` is `D ** -0.5`.
        rest: whether rows left unread take part, as estimated.
        sink_logits: `[Hq]`, in the denominator only.
        selected: `[Hkv][Lq]`, rows to read instead of those of the best units.
    """
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    heads, rows, dim = q.shape
    kv_heads, length, _ = keys.shape
    group = heads // kv_heads
    q = q * (dim**-0.5 if scale is None else scale)
    out, lse, missed = np.zeros((heads, rows, values.shape[-1])), np.zeros((heads, rows)), np.zeros((heads, rows))
    chosen_rows: list[list[Rows]] = []
    for h in range(kv_heads):
        own = [np.sort(np.asarray(unit, np.int64)) for unit in units[h]]
        covered = sum(len(unit) for unit in own)
        of_head = []
        for i in range(rows):
            total, qs = length - rows + i + 1, q[h * group : (h + 1) * group, i]
            among = candidates(total, covered, sinks, window)
            parts_of = [unit[np.isin(unit, among)] for unit in own]
            logits = qs @ keys[h, :total].T
            steady = np.ones(total, bool)
            steady[among] = False
            steady_mass = _log_sum(logits[:, steady])
            # Each unit as its score and its candidates.
            found = [
                (unit_scores(qs, keys[h], unit, part, score, landmark), part)
                for unit, part in zip(own, parts_of, strict=True)
                if len(part)
            ]
            scores = np.stack([of_unit for of_unit, _ in found] or [np.zeros(group)], axis=1)
            inside = [part for _, part in found]
            sizes = np.array([len(part) for part in inside] or [0])
            mass = _log_sum(np.concatenate([logits[:, steady], scores + np.log(np.maximum(sizes, 1))], axis=1))
            if not inside:
                mass = _log_sum(logits)
            picked_units = _in_order(scores - mass[:, None], sizes, np.exp(steady_mass - mass), top_k, top_p)
            read = steady.copy()
            picked, left = [], top_k
            for u in picked_units if inside else []:
                picked.append(inside[u][:left])
                left = None if left is None else left - len(picked[-1])
            chosen = np.sort(np.concatenate([*picked, np.zeros(0, np.int64)]))
            if selected is not None:
                chosen = np.asarray(selected[h][i], np.int64)
            read[chosen] = True
            of_head.append(chosen)
            for g in range(group):
                parts = [part[~read[part]] for part in inside]
                log_masses = np.array(
                    [scores[g, u] + np.log(len(part)) if len(part) else -np.inf for u, part in enumerate(parts)]
                )
                means = np.array(
                    [values[h, part].mean(0) if len(part) else np.zeros(values.shape[-1]) for part in parts]
                ).reshape(-1, values.shape[-1])
                exact = _log_sum(logits[g : g + 1, read])[0]
                unread = _log_sum(log_masses[None])[0] if len(log_masses) else -np.inf
                missed[h * group + g, i] = np.exp(unread - np.logaddexp(exact, unread))
                head = h * group + g
                sink = -np.inf if sink_logits is None else float(np.asarray(sink_logits, np.float64)[head])
                taken = np.logaddexp(exact, unread) if rest else exact
                lse[head, i] = np.logaddexp(taken, sink)
                out[head, i] = np.exp(logits[g, read] - lse[head, i]) @ values[h, :total][read]
                if rest:
                    out[head, i] += np.exp(log_masses - lse[head, i]) @ means
        chosen_rows.append(of_head)
    return UnitAttention(out, lse, chosen_rows, missed)


def _in_order(shares: Float64, sizes: Rows, held: Float64, top_k: int | None, top_p: float | None) -> list[int]:
    """Units in the order of their mean share until a budget is reached.

    Args:
        shares: `[G, units]`, log of the share of a row of each.
        sizes: rows of each.
        held: `[G]`, share of the mass that is there already.
        top_k: rows, or
        top_p: share of the mass to reach.
    """
    rank = np.exp(shares).mean(0)
    # Where shares underflow they keep the order themselves.
    order = np.lexsort((np.arange(len(rank)), -shares.max(0), -rank))
    picked: list[int] = []
    left = top_k
    for u in order:
        if left == 0 or (top_p is not None and (held >= top_p).all()):
            break
        picked.append(int(u))
        left = None if left is None else max(left - int(sizes[u]), 0)
        held = held + sizes[u] * np.exp(shares[:, u])
    return picked


def _log_sum(logits: Float64) -> Float64:
    """Log of the sum of `e^logit` along the last axis; minus infinity for none."""
    if logits.shape[-1] == 0:
        return np.full(logits.shape[:-1], -np.inf)
    top = logits.max(-1)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        sums: Float64 = safe + np.log(np.exp(logits - safe[..., None]).sum(-1))
    return sums
