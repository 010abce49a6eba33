"""Exact attention in float64, head by head, and how much of its softmax mass a retrieval kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Exact:
    """Attention of some rows over one KV head: weights `[rows, N]`, lse `[rows]`, output `[rows, Dv]`."""

    weights: Float64
    lse: Float64
    out: Float64


def exact(q: NDArray[Any], keys: NDArray[Any], values: NDArray[Any]) -> Exact:
    """Attention of q `[rows, D]` over all keys `[N, D]`, values `[N, Dv]`; logits take 1/sqrt(D)."""
    logits = q.astype(np.float64) @ keys.astype(np.float64).T * q.shape[-1] ** -0.5
    top = logits.max(-1, keepdims=True)
    weights = np.exp(logits - top, out=logits)
    total = weights.sum(-1, keepdims=True)
    weights /= total
    return Exact(weights, (top + np.log(total))[:, 0], weights @ values.astype(np.float64))


def exact_decode(q: NDArray[Any], keys: NDArray[Any], values: NDArray[Any]) -> Float64:
    """Attention of q `[Hq, D]` over keys `[Hkv, N, D]`, values `[Hkv, N, Dv]` -> `[Hq, Dv]`."""
    grouped = q.reshape(len(keys), -1, q.shape[-1])
    return np.concatenate([exact(*head).out for head in zip(grouped, keys, values, strict=True)])


@dataclass(frozen=True)
class Retrieved:
    """What one retrieval of one query gave.

    Attributes:
        out: `[Hq, Dv]`.
        out_rows_only: `[Hq, Dv]`, without an estimate of the rest.
        selected: per KV head, rows read beside sinks and window.
        missed: `[Hq]`, estimated mass outside the rows read.
        missed_bound: `[Hq]`, its upper bound.
    """

    out: NDArray[Any]
    out_rows_only: NDArray[Any]
    selected: Sequence[NDArray[np.integer[Any]]]
    missed: NDArray[np.float32]
    missed_bound: NDArray[np.float32]


def assess(
    queries: NDArray[np.float32],
    keys: NDArray[Any],
    values: NDArray[Any],
    found: Mapping[str, Sequence[Retrieved]],
    *,
    sinks: int,
    window: int,
    heads: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Retrievals of the same queries, by method, against exact attention.

    The mass kept is what the rows read exactly hold, divided by what the best set of as many rows holds:
    `kept_*` against the best rows anywhere; `selected_kept_*` leaves sinks and window out on both sides;
    `kept_*_beside` counts them on both sides. `*_shared` compares with the best set for the whole query group
    (largest mean mass), `*_own` with the best set of each query head alone, which rows that a group shares
    cannot reach. `recall` is the share of the group's best rows, as many as were selected, that are among them.

    Args:
        queries: `[n, Hq, D]`, rounded to what the methods saw.
        keys: `[Hkv, N, D]`, as stored.
        values: `[Hkv, N, Dv]`, as stored.
        found: of each method, what it gave for every query.
        sinks: first rows, always read.
        window: last rows, always read.
        heads: names of the KV heads.

    Returns:
        For each method the means over all query groups (`kept` also 5th percentiles, `error_*` also 95th), and
        per KV head. `error_o` is relative to the norm of the exact output, `error_v` to the rms row norm of the
        values.

    Cost: 8 * n * group * N bytes, and exact attention in float64 of every query.
    """
    _, query_heads, dim = queries.shape
    group = query_heads // len(keys)
    per_head: dict[str, list[dict[str, Float64]]] = {name: [] for name in found}
    for h in range(len(heads)):
        mine = slice(h * group, (h + 1) * group)
        truth = exact(queries[:, mine].reshape(-1, dim), keys[h], values[h])
        value_norm = float(np.sqrt(np.mean(np.sum(values[h].astype(np.float64) ** 2, -1))))
        for name, results in found.items():
            groups = []
            for i, result in enumerate(results):
                rows = slice(i * group, (i + 1) * group)
                one = Exact(truth.weights[rows], truth.lse[rows], truth.out[rows])
                kept = _kept(one.weights, result.selected[h], sinks, window)
                groups.append(kept | _errors(one, result, mine, 1 - kept["mass_read"], value_norm))
            per_head[name].append({key: np.concatenate([one[key] for one in groups]) for key in groups[0]})
    return {name: _summarise(of_heads, heads) for name, of_heads in per_head.items()}


def _summarise(per_head: list[dict[str, Float64]], heads: Sequence[str]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for key in per_head[0]:
        summary |= _summary(key, np.concatenate([head[key] for head in per_head]))
    brief = ("selected_kept_shared", "selected_kept_own", "mass_read", "error_o", "error_v")
    summary["per_head"] = [
        {"head": name, **{key: float(head[key].mean()) for key in brief}}
        for name, head in zip(heads, per_head, strict=True)
    ]
    return summary


def _kept(weights: Float64, selected: NDArray[np.integer[Any]], sinks: int, window: int) -> dict[str, Float64]:
    """Mass figures of a group with `weights` `[group, N]` that read sinks, window and `selected`."""
    keys = weights.shape[-1]
    between = weights[:, sinks : keys - window]
    forced = weights.sum(-1) - between.sum(-1)
    found = weights[:, selected].sum(-1)
    if len(selected) == 0:  # sinks and window alone
        nothing = np.ones(len(weights))
        shared, own = best_mass(weights, sinks + window)
        beside = {"kept_shared_beside": np.ones(1), "kept_own_beside": nothing}
        return {
            "rows": np.array([(sinks + window) / keys]),
            "mass_read": forced,
            "kept_shared": np.array([forced.mean() / shared.mean()]),
            "kept_own": forced / own,
            "selected_kept_shared": np.ones(1),
            "selected_kept_own": nothing,
            "recall": np.ones(1),
            **beside,
        }
    mass = forced + found
    rows = sinks + window + len(selected)
    shared, own = best_mass(weights, rows)
    free_shared, free_own = best_mass(between, len(selected))
    best = sinks + np.argpartition(between.mean(0), -len(selected))[-len(selected) :]
    return {
        "rows": np.array([rows / keys]),
        "mass_read": mass,
        "kept_shared": np.array([mass.mean() / shared.mean()]),
        "kept_own": mass / own,
        "kept_shared_beside": np.array([mass.mean() / (forced + free_shared).mean()]),
        "kept_own_beside": mass / (forced + free_own),
        "selected_kept_shared": np.array([found.mean() / free_shared.mean()]),
        "selected_kept_own": found / free_own,
        "recall": np.array([np.isin(best, selected, assume_unique=True).mean()]),
    }


def best_mass(weights: Float64, count: int) -> tuple[Float64, Float64]:
    """Mass `[group]` of the `count` > 0 keys of largest mean weight, and of each row's own best `count`."""
    count = min(count, weights.shape[-1])
    best = np.argpartition(weights.mean(0), -count)[-count:]
    return weights[:, best].sum(-1), np.partition(weights, -count, -1)[:, -count:].sum(-1)


def _errors(exact: Exact, result: Retrieved, mine: slice, missed: Float64, value_norm: float) -> dict[str, Float64]:
    size = np.linalg.norm(exact.out, axis=-1)
    error = np.linalg.norm(result.out[mine].astype(np.float64) - exact.out, axis=-1)
    rows_only = np.linalg.norm(result.out_rows_only[mine].astype(np.float64) - exact.out, axis=-1)
    return {
        "error_o": error / size,
        "error_v": error / value_norm,
        "error_o_rows_only": rows_only / size,
        "missed": missed,
        "missed_estimate": result.missed[mine].astype(np.float64),
        "missed_estimate_error": np.abs(result.missed[mine] - missed),
        # The bound is float32.
        "bound_violated": (missed > result.missed_bound[mine] * (1 + 1e-6) + 1e-7).astype(np.float64),
    }


def _summary(key: str, values: Float64) -> dict[str, float]:
    found = {key: float(values.mean())}
    if "kept" in key:
        found[f"{key}_p5"] = float(np.percentile(values, 5))
    if key.startswith("error"):
        found[f"{key}_p95"] = float(np.percentile(values, 95))
    return found
