"""Named ways to read few rows of a store: indexes and eviction policies, with the parameters of published methods.

Policies keep the same few rows for all queries.

`longattn compare` measures them beside each other, `longattn demo --ways` asks a model through them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array
from longattn.index import Index, by_name
from longattn.kv import KVStore, evict
from longattn.kv.evict.compressed import CompressedPrompt
from longattn.kv.evict.heavy_hitter import prompt_scores
from longattn.kv.evict.policy import best


@dataclass(frozen=True)
class Way:
    """One way to pick rows.

    Attributes:
        name: what tables call it.
        kind: of index.
        parameters: of the index.
        queries: whether the index is given queries of the prefill.
        rest: whether its estimate of the rest takes part, and whether a sample corrects it; `None` for wherever it has
            one.
        epsilon: largest error, in place of a budget of rows.
        relative_to: what it is a share of.
        features: of the random encoder that stands for a trained one, for the index that needs one.
    """

    name: str
    kind: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    queries: bool = False
    rest: Literal["values", "none", "sampled"] | None = None
    epsilon: float | None = None
    relative_to: Literal["output", "values"] | None = None
    features: int = 0

    def index(self, store: KVStore, queries: Array | None) -> Index:
        """Its index over a store; `queries` of the prefill, `[Hq, n, D]`, are used by the ways that learn from them."""
        parameters = dict(self.parameters)
        if self.features:
            shape = store.head_dim, self.features
            parameters["w_enc"] = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        return by_name.make(self.kind, store, queries=queries if self.queries else None, **parameters)

    def budget(self, top_k: int) -> dict[str, Any]:
        """Options of `retrieval_attention`: `top_k` rows, or as many as keep its promise."""
        if self.epsilon is not None:
            return {"epsilon": self.epsilon, "relative_to": self.relative_to}
        return {"top_k": top_k, "rest": self.rest}


WAYS: tuple[Way, ...] = (
    Way("signatures, 4 bits", "signatures", {"bits": 4}),
    Way("signatures, 4 bits, rows only", "signatures", {"bits": 4}, rest="none"),
    Way("signatures, 2 bits", "signatures", {"bits": 2}),
    Way("signatures, 1 bit", "signatures", {"bits": 1}),
    Way("exact scan", "flat"),
    Way("inverted lists", "inverted_lists"),
    Way("graph around queries", "graph", queries=True),
    Way("graph of keys", "graph"),
    Way("product codes, 4 bits", "product_quantisation", {"bits": 4}),
    Way("product codes, 4 bits, by queries", "product_quantisation", {"bits": 4}, queries=True),
    Way("product codes, 8 bits", "product_quantisation", {"bits": 8}),
    Way("PQCache", "product_quantisation", {"bits": 8}, rest="none"),
    Way("pages of 16, means", "pages", {"page_size": 16, "score": "mean_variance"}),
    Way("Quest", "pages", {"page_size": 16, "score": "bounds"}),
    Way("clusters of 16", "clusters", {"keys_per_cluster": 16, "score": "mean_variance"}),
    Way(
        "clusters of 16, bytes",
        "clusters",
        {"keys_per_cluster": 16, "score": "mean_variance", "tables": "int8"},
    ),
    Way("clusters of 64", "clusters", {"keys_per_cluster": 64, "score": "mean_variance"}),
    Way("RetroInfer", "clusters", {"keys_per_cluster": 16, "iterations": 10, "spherical": True}),
    Way("hashes, random", "hashes"),
    Way("hashes, learned", "hashes", queries=True),
    Way("hashes, random, by norm", "hashes", {"use_norm": True}),
    Way("LSH tables, sampled", "lsh"),
    Way("collisions", "collisions"),
)

#: Further ways for comparisons over one store: samples, promises instead of budgets, other scores of pages, features
#: of an encoder that nobody trained.
FURTHER: tuple[Way, ...] = (
    Way("signatures, sampled", "signatures", rest="sampled"),
    Way("verified, 0.1 of the output", "signatures", epsilon=0.1, relative_to="output"),
    Way("verified, 0.05 of the values", "signatures", epsilon=0.05, relative_to="values"),
    Way("pages of 16, radius", "pages", {"page_size": 16, "score": "radius"}),
    Way("pages of 16, landmarks", "pages", {"page_size": 16, "score": "landmark"}),
    Way("S3 features, random encoder", "features", features=2048),
)


@dataclass(frozen=True)
class Kept:
    """One way to keep rows, the same for all queries.

    Attributes:
        name: what tables call it.
        policy: kind of eviction policy.
        parameters: of the policy.
    """

    name: str
    policy: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def compressed(
        self, k: Array, v: Array, queries: Array, *, rows: int, sinks: int, window: int, room: int = 1024
    ) -> CompressedPrompt:
        """What it keeps of a prompt: `rows` rows of each KV head, the first `sinks` and last `window` among them.

        Policies that are told what to keep are told so by weight: the rows that the sample of queries gives the most.
        """
        kind = evict.KINDS[self.policy]
        given = 0 if kind.keeps_sinks else sinks
        given += 0 if kind.keeps_window else window
        own = max(rows - given, 1)
        policy = evict.make(self.policy, own, kv_heads=k.shape[0], sinks=sinks, window=window, **self.parameters)
        info: dict[str, Any] = {}
        if kind.needs is not None:
            beside = max(rows - sinks - window, 0)
            wanted = heaviest(k, queries, beside, sinks, window, shared=kind.needs == "flags")
            info[kind.needs] = wanted if kind.needs == "flags" else np.where(wanted, 0, 2)  # global, window
        return CompressedPrompt(policy, k, v, queries, sinks=sinks, window=window, room=room, **info)


def heaviest(k: Array, queries: Array, rows: int, sinks: int, window: int, *, shared: bool) -> NDArray[np.bool_]:
    """The rows between sinks and window that a sample of queries gives the most weight, `[Hkv, L]`.

    Args:
        k: keys `[Hkv, L, D]`.
        queries: `[Hq, m, D]`, taken for those of the last rows.
        rows: how many of each head.
        sinks: first rows, which are left out.
        window: last rows, likewise.
        shared: whether the rows of all heads compete: some keep more than others.
    """
    scores = prompt_scores(queries, k, {})
    scores[:, :sinks] = scores[:, scores.shape[1] - window :] = -1
    if shared:
        return best(scores.reshape(1, -1), rows * len(scores)).reshape(scores.shape)
    return best(scores, rows)


POLICIES: tuple[Kept, ...] = (
    Kept("StreamingLLM", "streaming_llm"),
    Kept("H2O", "heavy_hitter"),
    Kept("SnapKV", "snap_kv"),
    Kept("RazorAttention without retrieval heads", "razor_attention"),
    Kept("LazyEviction", "lazy_eviction"),
    Kept("selective attention's budget", "selective_attention_budget"),
    Kept("A-VL, text", "a_vl_cache"),
    Kept("Attention-Gate, flags by weight", "attention_gate_evict"),
    Kept("NAtS, types by weight", "nats_attention"),
)

Named = TypeVar("Named", Way, Kept)


def chosen(parts: str) -> Sequence[Way]:
    """The ways over an index whose names contain one of the comma-separated `parts`; all of them for `"all"`.

    Raises:
        ValueError: there is none.
    """
    found = named(parts, WAYS)
    if not found:
        raise ValueError(f"ways: got {parts!r}, expected part of one of {'; '.join(way.name for way in WAYS)}")
    return found


def chosen_of_all(parts: str) -> tuple[Sequence[Way], Sequence[Kept]]:
    """As `chosen`, with `FURTHER` ways and the policies.

    Raises:
        ValueError: there is neither a way nor a policy of such a name.
    """
    ways = *WAYS, *FURTHER
    found = named(parts, ways), named(parts, POLICIES)
    if not any(found):
        known = "; ".join([*(way.name for way in ways), *(way.name for way in POLICIES)])
        raise ValueError(f"ways: got {parts!r}, expected part of one of {known}")
    return found


def named(parts: str, among: Sequence[Named]) -> Sequence[Named]:
    """Those whose names contain one of the comma-separated `parts`."""
    return among if parts == "all" else [way for way in among if any(part in way.name for part in parts.split(","))]
