"""Decoding over a cache that a policy keeps small, step by step: dictionaries and sets, float64.

A policy is an object of one of the reference classes beside this module. It plays one decode.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense.attention import attention
from longattn.reference.dense.attention_weights import attention_weights

Float64 = NDArray[np.float64]


class Policy:
    """Keeps everything, observes nothing."""

    def prompt(self, q: Float64, k: Float64, v: Float64, **options: Any) -> tuple[Float64, list[set[int]]]:
        """Attention over the prompt, and the rows that each head keeps of it."""
        length = k.shape[1]
        return attention(q, k, v, causal=True, **options), [set(range(length)) for _ in k]

    def reads(self, step: int, head: int, alive: set[int]) -> set[int]:
        """The rows that a head reads in a step."""
        return alive

    def lowered(self, row: int) -> float:
        """What is taken off the logits of a row."""
        return 0.0

    def observe(self, step: int, weights: list[dict[int, Float64]], logits: dict[int, Float64]) -> None:
        """Sees, per KV head, the weights of each row from the heads of the group; and logits from all query heads."""

    def drop(self, step: int, alive: list[set[int]]) -> list[set[int]]:
        """The rows that go after a step."""
        return [set() for _ in alive]


def decode(
    policy: Policy,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    prompt: int = 0,
    residual: str | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: ArrayLike | None = None,
    **info: Any,
) -> tuple[Float64, list[list[list[int]]]]:
    """Attention of every row of a sequence.

    Args:
        policy: decides.
        q: queries `[Hq, L, D]`.
        k: keys `[Hkv, L, D]`.
        v: values `[Hkv, L, Dv]`.
        prompt: rows that come at once.
        residual: "mean" has the mean of the dropped rows stand in for them.
        scale: as in `longattn.attention`.
        softcap: likewise.
        sinks: likewise.
        info: what the policy wants to know of the prompt.

    Returns:
        Output `[Hq, L, Dv]`, and for each step from the prompt's last on the positions that each head keeps after it.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    heads, length, dim = q.shape
    kv_heads = len(k)
    group = heads // kv_heads
    factor = dim**-0.5 if scale is None else scale
    out = np.zeros((heads, length, v.shape[2]))
    alive: list[set[int]] = [set() for _ in range(kv_heads)]
    kept = []

    def gone(step: int) -> list[set[int]]:
        return [set(range(step + 1)) - rows for rows in alive]

    def settle(step: int) -> None:
        for rows, away in zip(alive, policy.drop(step, [set(rows) for rows in alive]), strict=True):
            rows.difference_update(away)
        kept.append([sorted(rows) for rows in alive])

    if prompt:
        options: dict[str, Any] = {"scale": scale, "softcap": softcap}
        if sinks is not None:
            options["sinks"] = sinks
        out[:, :prompt], alive = policy.prompt(q[:, :prompt], k[:, :prompt], v[:, :prompt], **options, **info)
        settle(prompt - 1)
    for step in range(prompt, length):
        dropped = gone(step - 1) if step else [set() for _ in alive]
        for rows in alive:
            rows.add(step)
        weights: list[dict[int, Float64]] = [{} for _ in alive]
        logits: dict[int, Float64] = {}
        for h, rows in enumerate(alive):
            read = sorted(policy.reads(step, h, set(rows)))
            keys, values, extra = k[h, read], v[h, read], np.zeros(len(read))
            if residual == "mean" and dropped[h]:
                away = sorted(dropped[h])
                keys = np.concatenate([keys, k[h, away].mean(axis=0, keepdims=True)])
                values = np.concatenate([values, v[h, away].mean(axis=0, keepdims=True)])
                extra = np.append(extra, np.log(len(away)))
            for g in range(group):
                s = factor * keys @ q[h * group + g, step]
                if softcap:
                    s = softcap * np.tanh(s / softcap)
                for i, row in enumerate(read):
                    logits.setdefault(row, np.zeros(heads))[h * group + g] = s[i]
                s = s + extra - np.array([policy.lowered(row) for row in read] + [0.0] * (len(s) - len(read)))
                top = s.max()
                e = np.exp(s - top)
                total = e.sum() + (0 if sinks is None else np.exp(np.asarray(sinks, np.float64)[h * group + g] - top))
                out[h * group + g, step] = e @ values / total
                for i, row in enumerate(read):
                    weights[h].setdefault(row, np.zeros(group))[g] = e[i] / total
        policy.observe(step, weights, logits)
        settle(step)
    return out, kept


def causal_mass(q: Float64, k: Float64, rows: range | None = None, **options: Any) -> Float64:
    """Weight that each key receives from the given rows of a prompt, all if none, `[Hq, L]`."""
    length = k.shape[1]
    every = attention_weights(q, k, range(length) if rows is None else rows, causal=True, **options)
    mass: Float64 = every.sum(axis=1)
    return mass


def of_group(x: Float64, kv_heads: int, how: str) -> Float64:
    """`[Hq, ...]` as `[Hkv, ...]`."""
    grouped: Float64 = getattr(x.reshape(kv_heads, -1, *x.shape[1:]), how)(axis=1)
    return grouped


def lowest(scores: dict[int, float], count: int) -> set[int]:
    """The rows of lowest score, of equal ones the older."""
    return set(sorted(scores, key=lambda row: (scores[row], row))[: max(count, 0)])
