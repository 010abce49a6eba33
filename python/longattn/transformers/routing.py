"""Layers whose heads, or which as a whole, read few keys or all, by a rule."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

import longattn as la
from longattn._arrays import Array, as_numpy
from longattn._checks import flag, integer, one_of, real
from longattn.diagnostics import KeyMoments, flux_route, less_is_more_select, qada_attention
from longattn.kv.evict import sink_window_attention

if TYPE_CHECKING:
    from longattn.transformers.sequence import ReadCounts, ScoreOptions


@dataclass
class Lists:
    """The keys that a layer chose for all layers after it, in the present step of one sequence.

    Attributes:
        length: keys of the sequence in that step.
        of_rows: positions for each query row.
    """

    length: int = -1
    of_rows: list[NDArray[np.int64]] = field(default_factory=list)


@dataclass(frozen=True)
class Pass:
    """One forward pass of one sequence through a layer: its last rows attend to all of it.

    Attributes:
        query: `[Hq, L, D]`.
        store: keys and values, those of the queries included.
        options: scale, softcap and sinks.
        decode: whether this is a decoding step.
        lists: of this sequence, shared by all layers.
        counts: where decoding steps are counted.
        out: `[Hq, L, Dv]`, written in place.
    """

    query: torch.Tensor
    store: la.KVStore
    options: ScoreOptions
    decode: bool
    lists: Lists
    counts: ReadCounts
    out: torch.Tensor

    @property
    def ends(self) -> range:
        """How many keys each row sees."""
        return range(len(self.store) - self.query.shape[1] + 1, len(self.store) + 1)

    def count(self, end: int, read: int, missed: float = 0.0) -> None:
        """Counts a row that saw `end` keys of every KV head: keys read, all KV heads together, and mass missed."""
        self.counts.add(end * self.store.kv_heads, read, missed, self.query.shape[0])

    def count_all(self, local: int, keys: int) -> None:
        """Counts a step in which `local` KV heads read `keys` keys and the others all."""
        for end in self.ends:
            self.count(end, (self.store.kv_heads - local) * end + local * min(end, keys))


class Router:
    """What decides, for one sequence of one layer: a route overrides `prompt`, `step` or `row`."""

    #: Options of the model's attention that it cannot honour.
    REFUSES: ClassVar[tuple[str, ...]] = ()

    def attend(self, call: Pass) -> bool:
        """Attends with the last rows of the store, or leaves that to the layer.

        Returns:
            Whether `call.out` is written.
        """
        return self.step(call) if call.decode else self.prompt(call)

    def prompt(self, call: Pass) -> bool:
        """A prompt, or part of one; what `attend` returns."""
        return False

    def step(self, call: Pass) -> bool:
        """A decoding step; what `attend` returns."""
        for i, end in enumerate(call.ends):
            self.row(call, slice(i, i + 1), end)
        return True

    def row(self, call: Pass, one: slice, end: int) -> None:
        """One row of a decoding step, `query[:, one]`, which sees the first `end` keys; for routes without a `step`."""
        raise NotImplementedError

    def crop(self, length: int) -> None:
        """The sequence goes back to `length` rows."""

    def fork(self) -> Router:
        """A copy of its own."""
        return copy.copy(self)


class QadaHeads(Router):
    """Heads whose sinks and last keys hold enough of the softmax, by an estimate of the others, read no others.

    Decoding steps only, by `longattn.diagnostics.qada_attention`; moments of the other keys follow the sequence.

    Args:
        tau: share of the softmax from which on local keys are enough.
        sinks: first keys that are local.
        local: last keys that are local.
        rank: of the moments' covariance, as for `KeyMoments`.
        any_of_group: whether all heads of a group read the other keys where one needs them.
    """

    REFUSES = ("softcap", "sinks")

    def __init__(
        self,
        *,
        tau: float = 0.9,
        sinks: int = 16,
        local: int = 1024,
        rank: int | None = None,
        any_of_group: bool = True,
    ) -> None:
        self._tau, self._any = real(tau, "tau"), flag(any_of_group, "any_of_group")
        self._sinks = integer(sinks, "sinks", 0)
        self._local = integer(local, "local", 0 if sinks else 1)
        self._rank = None if rank is None else integer(rank, "rank", 0)
        self._moments: KeyMoments | None = None

    def row(self, call: Pass, one: slice, end: int) -> None:
        """Local keys, or all, head by head."""
        store = call.store
        call.out[:, one], stats = qada_attention(
            call.query[:, one],
            store.keys[:, :end],
            store.values[:, :end],
            tau=self._tau,
            sinks=self._sinks,
            local=self._local,
            moments=self._of(store, max(end - self._local - self._sinks, 0)),
            any_of_group=self._any,
            scale=call.options["scale"],
            return_stats=True,
        )
        call.count(end, round(stats.keys_read * store.kv_heads), float((1 - stats.share[stats.local]).sum()))

    def _of(self, store: la.KVStore, keys: int) -> KeyMoments:
        """Moments of that many keys after the sinks."""
        if self._moments is None or self._moments.count > keys:  # the sequence went back
            self._moments = KeyMoments(store.keys[:, :0], rank=self._rank)
        had = self._moments.count
        if had < keys:
            self._moments.add(store.keys[:, self._sinks + had : self._sinks + keys])
        return self._moments

    def crop(self, length: int) -> None:
        """Forgets moments of keys that go."""
        if self._moments is not None and self._sinks + self._moments.count > length:
            self._moments = None

    def fork(self) -> Router:
        """A copy of its own, moments included."""
        return copy.deepcopy(self)


class FluxLayer(Router):
    """A small network reads the queries of a prompt and decides for the layer: all keys, or sinks and a window.

    Each prompt, or part of one where it is cut, decides for itself and the decoding steps after it
    (`longattn.diagnostics.flux_route`). All keys means what the layer does otherwise, its `SparsePrefill` included.

    Args:
        weights: of the network, as for `flux_route`.
        pool: positions at either end that it reads.
        sparse: `"streaming"` (sinks and window) or `"window"`.
        sinks: first keys of "streaming".
        window: last keys of both.
    """

    def __init__(
        self,
        *,
        weights: Sequence[tuple[Array, Array]],
        pool: int = 100,
        sparse: Literal["streaming", "window"] = "streaming",
        sinks: int = 128,
        window: int = 4096,
    ) -> None:
        width = as_numpy(weights[-1][0], "weights").shape[-1] if weights else 1
        flux_route(np.zeros((1, 1, width), np.float32), weights)  # which refuses what does not fit
        one_of(sparse, "sparse", ("streaming", "window"))
        self._weights, self._pool = weights, integer(pool, "pool", 1)
        self._sinks = integer(sinks, "sinks", 0) if sparse == "streaming" else 0
        self._window = integer(window, "window", 1)
        self._full = True

    def prompt(self, call: Pass) -> bool:
        """Prompts decide."""
        self._full = bool(flux_route(call.query, self._weights, pool=self._pool))
        return self._read_few(call)

    def step(self, call: Pass) -> bool:
        """As the prompt decided."""
        few = self._read_few(call)
        if few:
            call.count_all(call.store.kv_heads, self._sinks + self._window)
        return few

    def _read_few(self, call: Pass) -> bool:
        if self._full:
            return False
        store = call.store
        call.out.copy_(_few(call.query, store.keys, store.values, self._sinks, self._window, call.options))
        return True


class RetrievalHeads(Router):
    """Only some heads read all keys, the others sinks and a window.

    Decoding steps only. `longattn.diagnostics.RetrievalScores.heads` finds such heads, as pairs of layer and head.

    Args:
        heads: query heads of this layer that read all keys; those of their group do, too.
        sinks: first keys that the others read.
        window: last keys that the others read.
    """

    def __init__(self, *, heads: Iterable[int], sinks: int = 4, window: int = 1024) -> None:
        self._heads = sorted({integer(head, "heads", 0) for head in heads})
        self._sinks, self._window = integer(sinks, "sinks", 0), integer(window, "window", 1)

    def step(self, call: Pass) -> bool:
        """A KV head at a time."""
        query, store, options = call.query, call.store, call.options
        if self._heads and self._heads[-1] >= query.shape[0]:
            raise ValueError(f"heads: got {self._heads[-1]}, expected heads below {query.shape[0]}")
        group = query.shape[0] // store.kv_heads
        wide = {head // group for head in self._heads}
        for head in range(store.kv_heads):
            mine = slice(head * group, (head + 1) * group)
            of_head = options.copy()
            if options["sinks"] is not None:
                of_head["sinks"] = options["sinks"][mine]
            q, k, v = query[mine], store.keys[head : head + 1], store.values[head : head + 1]
            if head in wide:
                call.out[mine] = la.attention(q, k, v, causal=True, **of_head)
            else:
                call.out[mine] = _few(q, k, v, self._sinks, self._window, of_head)
        call.count_all(store.kv_heads - len(wide), self._sinks + self._window)
        return True


class LessIsMore(Router):
    """Layers that select read all keys in decoding steps, and choose one list for those after them.

    `longattn.diagnostics.less_is_more_select` makes the lists.

    Args:
        selects: whether this layer chooses; else it reads the list of the last layer before it that did.
        budget: keys of a list.
        recent_ratio: share of the budget for sinks and recent keys.
        sinks: first keys that are in every list.
    """

    def __init__(self, *, selects: bool, budget: int = 2048, recent_ratio: float = 0.25, sinks: int = 4) -> None:
        self.selects = flag(selects, "selects")
        self._how: dict[str, Any] = {"recent_ratio": real(recent_ratio, "recent_ratio"), "sinks": sinks}
        self._budget = integer(budget, "budget", 1)
        # What only depends on parameters is refused here; two keys are longer than a budget of one.
        less_is_more_select(np.zeros((1, self._budget + 1), np.float32), self._budget, **self._how)

    def step(self, call: Pass) -> bool:
        """All keys and a list of each row, or the keys of the lists."""
        query, store, lists = call.query, call.store, call.lists
        rows = len(call.ends)
        if not self.selects:
            if lists.length != len(store) or len(lists.of_rows) != rows:
                raise RuntimeError(
                    "attention to a layer without a list: the layer that selects was not called before it"
                )
            return super().step(call)
        la.attention(query, store.keys, store.values, causal=True, out=call.out, **call.options)
        weights = as_numpy(
            la.dense.attention_weights(query, store.keys, rows=range(rows), causal=True, **call.options), "weights"
        )
        lists.length = len(store)
        lists.of_rows = [
            less_is_more_select(weights[:, i, :end], self._budget, **self._how) for i, end in enumerate(call.ends)
        ]
        call.count_all(0, 0)
        return True

    def row(self, call: Pass, one: slice, end: int) -> None:
        """The keys of the row's list."""
        store, listed = call.store, call.lists.of_rows[one.start]
        call.out[:, one] = la.dense.listed_attention(
            call.query[:, one], store.keys, store.values, listed, **call.options
        )
        call.count(end, len(listed) * store.kv_heads)


#: Every kind of router by the name of its method.
ROUTES: Mapping[str, type[Router]] = {
    "qada_head_gate": QadaHeads,
    "flux_route": FluxLayer,
    "retrieval_head_score": RetrievalHeads,
    "less_is_more_select": LessIsMore,
}


@dataclass(frozen=True)
class RoutingConfig:
    """How one layer decides which of its heads, or whether all of them, read few keys.

    Nothing is evicted: sequences may be cropped and copied. Numbers of heads and of layers are the model's.

    Args:
        route: one of `ROUTES`: `"qada_head_gate"`, `"flux_route"`, `"retrieval_head_score"` (heads that read all keys)
            or `"less_is_more_select"`.
        parameters: its own arguments: those of `QadaHeads`, `FluxLayer`, `RetrievalHeads` and `LessIsMore`.

    Raises:
        TypeError: a parameter that the route does not have, one that it needs and that is not given, or a value of
            another kind.
        ValueError: an unknown route, or a value out of range.

    Example:
        routing = {
            0: RoutingConfig("less_is_more_select", {"selects": True, "budget": 1024}),
            **{layer: RoutingConfig("less_is_more_select", {"selects": False}) for layer in range(1, 8)},
        }
    """

    route: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the values."""
        one_of(self.route, "route", ROUTES)
        known = inspect.signature(ROUTES[self.route]).parameters
        for name in self.parameters:
            if name not in known:
                raise TypeError(f"{name}: no parameter of {self.route}, which has {', '.join(known)}")
        for name, parameter in known.items():
            if parameter.default is parameter.empty and name not in self.parameters:
                raise TypeError(f"{name}: got none, expected the parameter that {self.route} needs")
        self.router()

    def router(self) -> Router:
        """A fresh router, for one sequence."""
        made: Any = ROUTES[self.route]
        router: Router = made(**self.parameters)
        return router

    def refuse(self, options: ScoreOptions) -> None:
        """Raises a ValueError for a model whose attention the route cannot honour."""
        given = {"softcap": bool(options["softcap"]), "sinks": options["sinks"] is not None}
        for name in ROUTES[self.route].REFUSES:
            if given[name]:
                raise ValueError(f"routing: got {name} from the model, expected none with {self.route}")


def check_lists(routing: Mapping[int, RoutingConfig | None]) -> None:
    """Refuses layers that read lists which no layer before them makes."""
    made = False
    for layer_idx, how in sorted(routing.items()):
        router = None if how is None else how.router()
        if isinstance(router, LessIsMore):
            made = made or router.selects
            if not made:
                raise ValueError(
                    f"routing: got layer {layer_idx} that reads a list, expected a layer before it that selects"
                )


def _few(query: Any, k: Any, v: Any, sinks: int, window: int, options: ScoreOptions) -> Any:
    scores: dict[str, Any] = {"scale": options["scale"], "softcap": options["softcap"]}
    return sink_window_attention(query, k, v, sinks, window, sink_logits=options["sinks"], **scores)
