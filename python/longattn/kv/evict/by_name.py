"""Eviction policies by the name of their kind and a budget of rows, for settings that are data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from longattn._checks import integer, one_of
from longattn.kv.evict.a_vl_cache import AVLCache
from longattn.kv.evict.attention_gate import AttentionGate
from longattn.kv.evict.heavy_hitter import HeavyHitter
from longattn.kv.evict.lazy_eviction import LazyEviction
from longattn.kv.evict.nats_attention import Nats
from longattn.kv.evict.policy import Policy
from longattn.kv.evict.razor_attention import RazorAttention
from longattn.kv.evict.selective_attention import SelectiveBudget
from longattn.kv.evict.snap_kv import SnapKV
from longattn.kv.evict.streaming_llm import StreamingLLM

_UNBOUNDED = 1 << 40


@dataclass(frozen=True)
class Kind:
    """One kind of policy.

    Attributes:
        policy: its class.
        arguments: what a budget of rows, sinks, a window and a number of KV heads are to the class.
        keeps_sinks: whether the first rows are kept whatever their score.
        keeps_window: whether the last ones are.
        needs: what must come with the rows, if anything.
    """

    policy: type[Policy]
    arguments: Callable[[int, int, int, int], dict[str, Any]]
    keeps_sinks: bool = True
    keeps_window: bool = True
    needs: str | None = None


#: Every kind by its name, that of its method.
KINDS: Mapping[str, Kind] = {
    "streaming_llm": Kind(
        StreamingLLM, lambda rows, sinks, window, heads: {"sinks": sinks, "window": max(rows - sinks, 1)}
    ),
    "heavy_hitter": Kind(
        HeavyHitter,
        lambda rows, sinks, window, heads: {"heavy": max(rows - max(window, 1), 0), "recent": max(window, 1)},
        keeps_sinks=False,
    ),
    "snap_kv": Kind(
        SnapKV,
        lambda rows, sinks, window, heads: {"budget": max(rows, 2), "window": max(min(window, rows - 1), 1)},
        keeps_sinks=False,
    ),
    "lazy_eviction": Kind(
        LazyEviction,
        lambda rows, sinks, window, heads: {"budget": rows, "window": max(min(window, rows), 1)},
        keeps_sinks=False,
    ),
    "selective_attention_budget": Kind(
        SelectiveBudget,
        lambda rows, sinks, window, heads: {"budget": rows, "protect_first": min(sinks, rows - 1)},
        keeps_window=False,
    ),
    "razor_attention": Kind(
        RazorAttention,
        # No retrieval head unless the caller knows of one: those keep everything.
        lambda rows, sinks, window, heads: {
            "retrieval_heads": np.zeros(heads, bool),
            "sinks": sinks,
            "window": max(rows - sinks, 1),
            "ratio": _UNBOUNDED,
        },
    ),
    "a_vl_cache": Kind(AVLCache, lambda rows, sinks, window, heads: {"text_budget": rows}, keeps_sinks=False),
    "attention_gate_evict": Kind(
        AttentionGate, lambda rows, sinks, window, heads: {}, keeps_sinks=False, keeps_window=False, needs="flags"
    ),
    "nats_attention": Kind(
        Nats, lambda rows, sinks, window, heads: {"window": max(window, 1)}, keeps_sinks=False, needs="types"
    ),
}


def make(kind: str, rows: int, *, kv_heads: int, sinks: int = 4, window: int = 64, **parameters: Any) -> Policy:
    """A fresh policy of a kind given by its name, which keeps so many rows.

    Args:
        kind: one of `KINDS`.
        rows: rows that a KV head keeps (razor attention: a head that is no retrieval head; SnapKV: of the prompt). The
            kinds that are told what to keep (`needs`) have no budget.
        kv_heads: KV heads of the cache.
        sinks: first rows that are kept, by the kinds that have such.
        window: last rows that are kept, likewise; those with nothing else take all of the budget.
        parameters: the kind's own arguments, in place of what the budget gives.

    Raises:
        TypeError: a parameter that the kind does not have.
        ValueError: an unknown kind, numbers below 1 (sinks, window: below 0), or what the kind refuses.

    Example:
        policy = la.kv.evict.make("heavy_hitter", 4096, kv_heads=8)
    """
    check(kind, parameters)
    rows, sinks, window = integer(rows, "rows", 1), integer(sinks, "sinks", 0), integer(window, "window", 0)
    given = KINDS[kind].arguments(rows, sinks, window, integer(kv_heads, "kv_heads", 1)) | parameters
    constructor: Any = KINDS[kind].policy
    policy: Policy = constructor(**given)
    return policy


def check(kind: str, parameters: Mapping[str, Any]) -> None:
    """Refuses an unknown kind, and parameters that it does not have."""
    one_of(kind, "kind", KINDS)
    known = list(inspect.signature(KINDS[kind].policy).parameters)
    for name in parameters:
        if name not in known:
            raise TypeError(f"{name}: no parameter of {kind}, which has {', '.join(known) or 'none'}")
