"""One sequence of the batch in one layer: its rows in host memory and how a query reads them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

import longattn as la
from longattn.index import by_name
from longattn.transformers.retrieval import RetrievalConfig
from longattn.transformers.routing import Lists, Pass, Router
from longattn.transformers.sparse import SparsePrefill

# Rows a sliding layer keeps beyond its window, so that rejected candidate tokens can be cropped.
_CROP_MARGIN = 1024

# Queries of a prefill that an index learns from.
_SAMPLE = 512

# Last queries of a prefill that budgets are chosen by, and the least that choose.
_PROBE, _LEAST_PROBE = 64, 16


class ScoreOptions(TypedDict):
    """How the attention module turns inner products into logits."""

    scale: float
    softcap: float
    sinks: torch.Tensor | None


@dataclass
class ReadCounts:
    """What decoding has read so far, summed over query rows and KV heads, and pairs that sparse prefills attended."""

    keys_visible: int = 0
    keys_read: int = 0
    missed_mass: float = 0.0
    query_rows: int = 0
    prompt_pairs: int = 0
    prompt_attended: float = 0.0

    def add(self, visible: int, read: int, missed_mass: float, query_rows: int) -> None:
        """Adds one call. `missed_mass` is the sum over its `query_rows` (rows x query heads)."""
        self.keys_visible += visible
        self.keys_read += read
        self.missed_mass += missed_mass
        self.query_rows += query_rows


@dataclass
class Sequence:
    """Keys and values of one sequence in one layer, padding left out.

    Args:
        store: the rows.
        window: sliding window of the layer, `None` for full attention.
        retrieval: how to decode without reading all rows, `None` to read them all.
        prefill: how to attend from prompts to a part of the rows, `None` to attend to all.
        router: what decides whether to read few rows, `None` without routing.
        dropped: rows a sliding layer has let go of, in front of the stored ones.
        index: over the stored keys, made as soon as the sequence is long enough for retrieval.
        sample: queries `[Hq, n, D]` of the last prefill, for an index that learns from them.
        budgets: rows to select for each KV head, where a prefill has chosen them.
    """

    store: la.KVStore
    window: int | None
    retrieval: RetrievalConfig | None
    prefill: SparsePrefill | None = None
    router: Router | None = field(default=None, repr=False)
    dropped: int = 0
    index: la.index.Index | None = field(default=None, repr=False)
    sample: NDArray[np.float32] | None = field(default=None, repr=False)
    budgets: list[int] | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Host memory of the rows."""
        return self.store.nbytes

    @property
    def index_nbytes(self) -> int:
        """Host memory of the index."""
        return 0 if self.index is None else self.index.nbytes

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Appends rows `[Hkv, L, D]` and `[Hkv, L, Dv]`."""
        self.store.append(k, v)

    def __len__(self) -> int:
        """Tokens of this sequence, rows that were dropped included."""
        return self.dropped + len(self.store)

    def drop_old_rows(self) -> None:
        """Lets go of rows no later query can see. To be called between forward passes only.

        A store frees no rows in front, so the ones to keep move to a new store, once they are less than half:
        every row moves about once.
        """
        if self.window is None:
            return
        keep = self.window + _CROP_MARGIN
        if len(self.store) <= 2 * keep:
            return
        fresh = _empty_like(self.store)
        fresh.append(self.store.keys[:, -keep:], self.store.values[:, -keep:])
        self.dropped += len(self.store) - keep
        self.store = fresh

    def can_crop(self, rows: int) -> bool:
        """Whether `rows` may go from the end with every row that later queries see still there."""
        return self.dropped == 0 or self.window is None or len(self.store) - rows >= self.window - 1

    def crop(self, rows: int) -> None:
        """Removes the last `rows` rows."""
        self.store.truncate(len(self.store) - rows)
        if self.router is not None:
            self.router.crop(len(self.store))

    def fork(self) -> Sequence:
        """A copy of its own, with the codes made so far."""
        store = self.store.fork()
        index = None if self.index is None else self.index.fork(store)
        return replace(self, store=store, index=index, router=None if self.router is None else self.router.fork())

    def __deepcopy__(self, memo: dict[int, Any]) -> Sequence:
        return self.fork()

    def attend(
        self,
        query: torch.Tensor,
        options: ScoreOptions,
        *,
        decode: bool,
        dense: torch.Tensor | None,
        counts: ReadCounts,
        out: torch.Tensor,
        lists: Lists | None = None,
    ) -> None:
        """Attention of the last rows of the sequence to all of it.

        Args:
            query: `[Hq, L, D]`; row `i` belongs to stored row `len(store) - L + i`.
            options: scale, softcap and sinks.
            decode: whether this is a decoding step: counted, and by retrieval where the layer is set up for
                it.
            dense: a mask of the caller's own instead of causal and window: bool, or float to add,
                broadcastable to `[Hq, L, len(self)]`.
            counts: where decoding steps are counted.
            out: `[Hq, L, Dv]`, written in place.
            lists: what layers with routing tell each other of this sequence; needed with a router.
        """
        if query.shape[1] == 0:  # nothing but padding arrived
            return
        if (
            self.router is not None
            and lists is not None
            and dense is None
            and self.router.attend(Pass(query, self.store, options, decode, lists, counts, out))
        ):
            return
        how = self.retrieval
        if how is not None and not decode and self.index is None and by_name.learns_from_queries(how.index):
            step = -(-query.shape[1] // _SAMPLE)
            self.sample = query[:, ::step].float().numpy()
        index = None if how is None or len(self.store) < how.min_length else self._index(how)
        if decode and how is not None and index is not None:
            out.copy_(self._retrieve(query, index, how, options, counts))
            return
        if not decode and dense is None and self._chooses():
            self._attend_sparsely(query, options, counts, out)
            if index is not None:
                self._prefilled(query, index, options)
            return
        if dense is not None:
            dense = dense[..., self.dropped :]
        window = (-1, -1) if self.window is None or dense is not None else (self.window - 1, 0)
        la.attention(
            query,
            self.store.keys,
            self.store.values,
            causal=dense is None,
            window=window,
            out=out,
            mask=dense if dense is not None and dense.dtype == torch.bool else None,
            bias=dense if dense is not None and dense.dtype != torch.bool else None,
            **options,
        )
        if decode:
            rows, end = query.shape[1], len(self.store)
            most = end if window[0] < 0 else window[0] + 1
            visible = sum(min(end - i, most) for i in range(rows)) * self.store.kv_heads
            counts.add(visible, visible, 0.0, rows * query.shape[0])
        elif index is not None:
            self._prefilled(query, index, options)

    def _chooses(self) -> bool:
        return self.prefill is not None and self.window is None and len(self.store) >= self.prefill.min_length

    def _attend_sparsely(
        self, query: torch.Tensor, options: ScoreOptions, counts: ReadCounts, out: torch.Tensor
    ) -> None:
        assert self.prefill is not None  # `_chooses` has said so
        _, stats = la.sparse_attention(
            query,
            self.store.keys,
            self.store.values,
            self.prefill.made,
            causal=True,
            out=out,
            return_stats=True,
            **options,
        )
        rows, end = query.shape[1], len(self.store)
        pairs = sum(range(end - rows + 1, end + 1)) * query.shape[0]
        counts.prompt_pairs += pairs
        counts.prompt_attended += stats.density * pairs

    def _index(self, how: RetrievalConfig) -> la.index.Index:
        if self.index is None:
            self.index = la.index.make(how.index, self.store, queries=self.sample, **how.parameters)
        return self.index

    def _prefilled(self, query: torch.Tensor, index: la.index.Index, options: ScoreOptions) -> None:
        """Brings the index up to date: a part of the prefill's time, not of the first decoding step's."""
        index.update()
        how = self.retrieval
        if how is None or how.error is None or query.shape[1] < _LEAST_PROBE:
            return
        found = la.retrieval.probe_budgets(
            query[:, -_PROBE:],
            self.store,
            index,
            error=how.error,
            sinks=how.sinks,
            window=how.window,
            scale=options["scale"],
            rest=how.rest,
            sink_logits=options["sinks"],
        )
        self.budgets = found.top_k

    def _retrieve(
        self,
        query: torch.Tensor,
        index: la.index.Index,
        how: RetrievalConfig,
        options: ScoreOptions,
        counts: ReadCounts,
    ) -> torch.Tensor:
        result = la.retrieval_attention(
            query,
            self.store,
            index,
            top_k=how.top_k if self.budgets is None else self.budgets,
            top_p=how.top_p,
            sinks=how.sinks,
            window=how.window,
            rest=how.rest,
            epsilon=how.epsilon,
            delta=how.delta,
            relative_to=how.relative_to,
            seed=how.seed,
            scale=options["scale"],
            sink_logits=options["sinks"],
            return_stats=True,
        )
        stats = result.stats
        assert stats is not None  # asked for above
        counts.add(
            int(stats.keys_total.sum()),
            int(stats.keys_attended.sum()),
            float(stats.missed_mass.sum()),
            int(stats.missed_mass.size),
        )
        out: torch.Tensor = result.out
        return out


def _empty_like(store: la.KVStore) -> la.KVStore:
    return la.KVStore(
        kv_heads=store.kv_heads,
        head_dim=store.head_dim,
        value_dim=store.value_dim,
        dtype=store.dtype,
        capacity=store.capacity,
    )
