"""One layer's KV cache over two memories: the newest tokens on the device, all others on the host behind an index."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import CodedRows
from longattn._checks import one_of
from longattn._score_options import check_names
from longattn.gpu._checks import heads_view
from longattn.gpu._costs import Costs, costs_of
from longattn.gpu._device import Device, device_of
from longattn.gpu._staging import staging_of
from longattn.gpu.attention import attention
from longattn.gpu.merge import merge
from longattn.gpu.signatures import BLOCK, SignatureCodes, signatures_encode, signatures_topk

if TYPE_CHECKING:
    from longattn.index import Index
    from longattn.kv import KVStore
    from longattn.retrieval import RetrievalStats

#: Rows that the store must have before the first codes are made on the device; fewer are all read.
_FIRST_FIT = 512
#: All codes are made anew, about the mean key of that time, when the store has grown by this factor since.
_REFIT_GROWTH = 4


@dataclass(frozen=True, slots=True)
class StepStats:
    """What a decode step read.

    Attributes:
        way: where rows in host memory were read: "host", "gather" for their way over the bus, "device" where there
            were none.
        gathered: rows per KV head that went over the bus.
        retrieval: what the host read by its index.
        listed: rows per KV head that the host read without one.
    """

    way: Literal["host", "gather", "device"]
    gathered: int
    retrieval: RetrievalStats | None
    listed: int = 0


class RetrievalBudget(TypedDict, total=False):
    """What beside a number of rows says how much the host reads, as of `longattn.retrieval_attention`."""

    top_p: float | None
    rest: Literal["values", "none", "sampled"] | None
    epsilon: float | None
    delta: float | None
    relative_to: Literal["output", "values"] | None
    seed: int


class StepOptions(RetrievalBudget, total=False):
    """Options of a decode step.

    Attributes:
        top_k: rows that are selected on the host, as of `longattn.retrieval_attention`; without an index, on the
            device, or all of them for `None`, which it is by default.
        scale: factor on the dot products; `None`, the default, is `D ** -0.5`.
        sink_logits: float32 `[Hq]` on the device: an extra logit per head, which takes its share of the softmax.
        return_stats: also return what was read; not by default.
    """

    top_k: int | None
    scale: float | None
    sink_logits: Any
    return_stats: bool


@dataclass(slots=True)
class _Arriving:
    """Rows on their way to the host."""

    keys: Callable[[], NDArray[Any]]
    values: Callable[[], NDArray[Any]]
    first: int  # position of the first row
    count: int
    taken: int = 0  # rows that the store has got


class HostKVCache:
    """Keys and values of one sequence: `sinks` first and `window` last tokens on the device, the others in host memory.

    A decode step reads both at once: the device attends to its rows while threads of the host look for the rows that
    matter in theirs and attend to them. Of the host's part only an output row and its log-sum-exp per query head go
    back, and a merge puts both into one softmax. Keys and values never cross the bus again.

    A token is copied to the host when it is appended and enters the store when it leaves the window, so that no token
    is counted twice.

    Or rows go over the bus: codes of 4 bits of the rows in host memory stay on the device (`gather`), which chooses
    rows by them; the host collects these and copies them to the device, which attends to them. That takes a budget
    `top_k` and leaves the other rows out. Which of the two ways is faster depends on the machine: with `"auto"` each
    step takes the one that `Costs` say, which are measured at the first step that has a choice.

    A store of codes ("int8", say) takes half the memory or a quarter, and the host reads its rows as they are. It has
    no index: the device chooses `top_k` rows by its codes of 4 bits, and the host attends to these; or to all of them.

    Codes on the device are made of the rows that have entered the store since, 16 at a time, which cross the bus once
    more for that; when the store has grown fourfold since the last fit, all are made anew about the mean key of then.

    Args:
        store: host store of the layer, empty; what it holds later is read through `index`.
        index: an index of that store; `None` for the choice by codes on the device, and for stores of codes.
        sinks: first tokens that stay on the device, at least 0.
        window: last tokens that are on the device, at least 1.
        reads: how rows in host memory are read: `"host"`, `"gather"` or `"auto"`; `"host"` for stores of codes.
        costs: of both ways, for `"auto"`; `None` measures them.
        device: the back end; `None` is that of the first arrays.

    Raises:
        TypeError: `costs` of another kind.
        ValueError: a store that is not empty, an index of another store, counts out of range, an unknown way, or one
            that a store of codes does not have.
    """

    def __init__(
        self,
        store: KVStore,
        index: Index | None,
        *,
        sinks: int = 4,
        window: int = 512,
        reads: Literal["host", "gather", "auto"] = "host",
        costs: Costs | None = None,
        device: Device | None = None,
    ) -> None:
        if len(store):
            raise ValueError(f"store: got {len(store)} rows, expected an empty store")
        if index is not None and index.store is not store:
            raise ValueError("index: got the index of another store")
        if sinks < 0 or window < 1:
            raise ValueError(f"sinks, window: got {sinks} and {window}, expected at least 0 and 1")
        one_of(reads, "reads", ("host", "gather", "auto"))
        if reads != "host" and isinstance(store.dtype, str):
            raise ValueError(f"reads: got {reads!r} with a store of {store.dtype}, expected 'host'")
        if costs is not None and not isinstance(costs, Costs):
            raise TypeError(f"costs: got {type(costs).__name__}, expected Costs or None")
        self.store, self.index, self.sinks, self.window = store, index, sinks, window
        self.reads, self.costs = reads, costs
        self._codes: SignatureCodes | None = None
        self._coded = 0  # rows of the store with codes on the device
        self._fitted = 0  # rows whose mean key the codes are about
        #: Of the rows on the device; with a store of codes that of the first to come.
        self._dtype = None if isinstance(store.dtype, str) else str(store.dtype)
        self._device = device
        self._keys: Any = None
        self._values: Any = None
        self._length = 0
        self._arriving: deque[_Arriving] = deque()
        self._under_way = 0  # steps that were started and not finished

    def __len__(self) -> int:
        """Tokens in both memories."""
        return self._length

    @property
    def resident(self) -> int:
        """Tokens on the device."""
        return min(self._length, self.sinks + self.window)

    def rows_on_device(self, like: Any, block: int) -> Iterator[tuple[Any, Any]]:
        """All keys and values so far `[1, Hkv, n, D]` on the device, `block` rows of the host's at a time.

        Their order is not that of the sequence. A block's arrays are copies that the caller may keep.
        """
        if self._length == 0:
            return
        device = self._device
        assert device is not None
        yield self._keys[:, :, : self.resident], self._values[:, :, : self.resident]
        for first in range(0, len(self.store), block):
            rows = first, min(first + block, len(self.store))
            keys, values = (_range(x, rows, self._dtype) for x in (self.store.keys, self.store.values))
            yield device.upload(keys[None], like), device.upload(values[None], like)

    def append(self, k: Any, v: Any) -> None:
        """Adds tokens: rows go to the device's window, and a copy of them starts on its way to the host.

        Args:
            k: keys `[1, Hkv, n, D]` on the device, in the store's dtype, for a store of codes in that of the first.
            v: values, the shape of `k`.

        Raises:
            TypeError: arrays of no GPU, or of another dtype than the store's.
            ValueError: shapes that do not fit the store; more tokens than its capacity; a step that was started and
                not finished.
        """
        if self._under_way:
            raise ValueError("append: got tokens while a step is under way, expected its result to be taken before")
        device = self._device = self._device or device_of(k, "k")
        keys = heads_view(device, k, "k", self._dtype)
        values = heads_view(device, v, "v", keys.dtype)
        _, heads, count, dim = keys.shape
        expected = (1, self.store.kv_heads, count, self.store.head_dim)
        for name, view in (("k", keys), ("v", values)):
            if view.shape != expected:
                raise ValueError(f"{name}: got shape {view.shape}, expected {expected}")
        on_host = max(self._length + count - self.window - self.sinks, 0)
        if on_host > self.store.capacity:
            raise ValueError(
                f"k: got {count} tokens, {on_host} would be on the host, whose store holds {self.store.capacity}"
            )
        if count == 0:
            return
        self._dtype = keys.dtype
        if self._keys is None:
            shape = (1, heads, self.sinks + self.window, dim)
            self._keys, self._values = (device.empty(shape, keys.dtype, k) for _ in range(2))
        self._arriving.append(_Arriving(device.download(k), device.download(v), self._length, count))
        self._write(k, v, count)
        self._length += count
        self._hand_over()

    def _write(self, k: Any, v: Any, count: int) -> None:
        """The sinks and the last of the window among `count` new rows, into their places on the device."""
        first, end, device = self._length, self._length + count, self._device
        assert device is not None
        pieces = []
        if first < self.sinks:
            pieces.append((first, min(end, self.sinks), first))
        at = max(first, self.sinks, end - self.window)
        while at < end:  # the window is a ring: at most two pieces
            place = (at - self.sinks) % self.window
            until = min(end, at + self.window - place)
            pieces.append((at, until, self.sinks + place))
            at = until
        for start, until, place in pieces:
            rows, places = slice(start - first, until - first), slice(place, place + until - start)
            with device.used():
                self._keys[:, :, places] = k[:, :, rows]
                self._values[:, :, places] = v[:, :, rows]

    def _hand_over(self) -> None:
        """Rows that have left the window enter the store; only for those does the host wait."""
        until = self._length - self.window
        while self._arriving:
            part = self._arriving[0]
            first = max(part.taken, self.sinks - part.first)
            end = min(part.count, until - part.first)
            if end > first:
                self.store.append(part.keys()[0, :, first:end], part.values()[0, :, first:end])
                part.taken = end
            if end < part.count:
                return
            part.keys(), part.values()  # sinks alone were not waited for, and their copies' memory is free after this
            self._arriving.popleft()

    def attend(self, q: Any, **options: Unpack[StepOptions]) -> Any:
        """Attention of the newest token.

        Args:
            q: queries `[1, Hq, 1, D]` on the device.
            options: `top_k`, `scale`, `sink_logits`, `return_stats` (`StepOptions` says more), and further arguments of
                `longattn.retrieval_attention`: `top_p`, `rest`, `epsilon`, `delta`, `relative_to`, `seed`. With these
                the host reads, whatever `reads` says; they need an index.

        Returns:
            The output `[1, Hq, 1, D]` in the kind and dtype of `q`, or the pair with `StepStats`.

        Raises:
            TypeError: as of `append`; an option that does not exist.
            ValueError: no token yet; shapes that do not fit; what `retrieval_attention` refuses; `reads="gather"`
                without `top_k`; further arguments without an index.

        Cost: the longer of the device's pass over `sinks + window` rows and the host's retrieval, and a merge.
            Gathered: a scan of the codes on the device, the chosen rows' way over the bus, and attention to them.
        """
        return self.start(q, **options)()

    def start(self, q: Any, **options: Unpack[StepOptions]) -> Callable[[], Any]:
        """Starts `attend`, whose arguments these are: the query's way to the host, and the device's part.

        What it returns does the host's part and the merge, once, and gives the result of `attend`. Until then other
        layers and sequences may start theirs: neither their queries nor what the host sends back waits for this one.
        Nothing may be appended meanwhile.

        Raises:
            TypeError: as of `attend`.
            ValueError: as of `attend`, at once or when the result is asked for.
        """
        check_names(options, StepOptions)
        if self._length == 0:
            raise ValueError("attend: got a cache without tokens")
        device = self._device
        assert device is not None
        queries = heads_view(device, q, "q", self._dtype)
        if queries.shape[0] != 1 or queries.shape[2] != 1:
            raise ValueError(f"q: got shape {queries.shape}, expected [1, heads, 1, {self.store.head_dim}]")
        top_k, scale, return_stats = options.get("top_k"), options.get("scale"), options.get("return_stats", False)
        budget = {name: value for name, value in options.items() if name in RetrievalBudget.__annotations__}
        if self.reads == "gather" and (top_k is None or budget):
            raise ValueError(f"top_k: got {top_k} with {sorted(budget)}, expected top_k alone where rows are gathered")
        if self.index is None and (budget or (top_k is not None and top_k < 1)):
            raise ValueError(f"top_k: got {top_k} with {sorted(budget)}, expected at least 1, alone, without an index")
        gathers = self._gathers(q, top_k, bool(budget))
        staging = staging_of(device)
        arriving = None if gathers or len(self.store) == 0 else staging.fetch(device, q)
        by_codes = gathers or (self.index is None and len(self.store) > 0)
        chosen = self._chosen(q, top_k, scale) if by_codes and top_k is not None else None
        here = attention(
            q,
            self._keys[:, :, : self.resident],
            self._values[:, :, : self.resident],
            scale=scale,
            sinks=options.get("sink_logits"),
            return_lse=True,
            out_dtype="float32",
            device=device,
        )
        self._under_way += 1
        taken = False

        def finish() -> Any:
            nonlocal taken
            if taken:
                raise ValueError("start: got a second call of what it returned, expected one")
            taken = True
            self._under_way -= 1
            parts, stats, sent = [here], StepStats("device", 0, None), None
            if gathers and chosen is not None:
                k, v = self._gathered(chosen())
                gathered = attention(
                    q,
                    device.upload(k, q),
                    device.upload(v, q),
                    scale=scale,
                    return_lse=True,
                    out_dtype="float32",
                    device=device,
                )
                parts.append(gathered)
                stats = StepStats("gather", k.shape[2], None)
            elif arriving is not None:
                rows = None if chosen is None else chosen()
                out, lse, stats = self._on_host(arriving()[0], rows, top_k, scale, return_stats, budget)
                sent = staging.send(device, out[None], lse[None], q)
                parts.append((sent.out, sent.lse))
            out, _ = merge(parts, dtype=queries.dtype, device=device)
            if sent is not None:
                sent.done()
            return (out, stats) if return_stats else out

        return finish

    def _on_host(
        self,
        q: NDArray[np.float32],
        rows: NDArray[Any] | None,
        top_k: int | None,
        scale: float | None,
        return_stats: bool,
        budget: dict[str, Any],
    ) -> tuple[NDArray[Any], NDArray[Any], StepStats]:
        """The host's part: the rows between sinks and window, which are all that the store holds."""
        if self.index is None:
            return self._listed(q, rows, scale)
        from longattn.retrieval import retrieval_attention

        found = retrieval_attention(
            q,
            self.store,
            self.index,
            top_k=top_k,
            sinks=0,
            window=0,
            scale=scale,
            return_stats=return_stats,
            **budget,
        )
        return found.out, found.lse, StepStats("host", 0, found.stats)

    def _listed(
        self, q: NDArray[Any], rows: NDArray[Any] | None, scale: float | None
    ) -> tuple[NDArray[Any], NDArray[Any], StepStats]:
        """The host's part without an index: over rows `[Hkv, n]` of the store, or all."""
        from longattn.dense import attention as over_all
        from longattn.dense import listed_attention

        keys, values = self.store.keys, self.store.values
        if rows is None:
            out, lse = over_all(q, keys, values, scale=scale, return_lse=True)
        else:
            out, lse = listed_attention(q, keys, values, rows, scale=scale, return_lse=True)
        return out, lse, StepStats("host", 0, None, len(self.store) if rows is None else rows.shape[1])

    def _gathers(self, q: Any, top_k: int | None, other_budget: bool) -> bool:
        """Whether this step's rows go over the bus."""
        rows = len(self.store)
        if self.reads == "host" or rows == 0 or top_k is None or other_budget:
            return False
        if self.reads == "gather":
            return True
        assert self._device is not None
        if self.costs is None:
            self.costs = costs_of(self._device, q, self._keys)
        heads, dim = self.store.kv_heads, self.store.head_dim
        row_bytes = 2 * heads * dim * np.dtype(self.store.dtype).itemsize
        return self.costs.prefers_gather(rows, min(top_k, rows), row_bytes, heads * (dim / 2 + 2))

    def _chosen(self, q: Any, top_k: int, scale: float | None) -> Callable[[], NDArray[Any]]:
        """Starts the choice of rows by codes on the device; gives their numbers `[Hkv, n]`."""
        device = self._device
        assert device is not None
        self._code_rows(q)
        left = np.arange(self._coded, len(self.store))  # without codes, and so read in any case
        heads = self.store.kv_heads
        if self._codes is None or self._coded == 0:
            return lambda: np.tile(left, (heads, 1))
        blocks = self._coded // BLOCK
        codes = replace(self._codes, codes=self._codes.codes[:, :, :blocks])
        asked = q.reshape(1, heads, -1, q.shape[3])
        rows = signatures_topk(asked, codes, min(top_k, self._coded), scale=scale, device=device)
        arriving = device.download(rows)
        return lambda: np.concatenate([arriving()[0], np.tile(left, (heads, 1))], axis=1)

    def _code_rows(self, like: Any) -> None:
        """Codes for whole blocks of rows that the store has got since, or for all where it is time to fit anew."""
        device, rows = self._device, len(self.store) // BLOCK * BLOCK
        assert device is not None
        if rows == self._coded or (self._codes is None and rows < _FIRST_FIT):
            return
        fits = rows >= _REFIT_GROWTH * self._fitted
        first = 0 if fits else self._coded
        new = device.upload(_range(self.store.keys, (first, rows))[None], like)
        made = signatures_encode(new, fitted=None if fits else self._codes, device=device)
        at, blocks = first // BLOCK, rows // BLOCK
        held = None if self._codes is None else self._codes.codes
        with device.used():
            if held is None or held.shape[2] < blocks:
                _, heads, _, size = made.codes.shape
                room = device.empty((1, heads, max(2 * blocks, 64), size), "uint8", like)
                if held is not None:
                    room[:, :, :at] = held[:, :, :at]
                held = room
            held[:, :, at:blocks] = made.codes
        self._codes = replace(made, codes=held)
        self._coded, self._fitted = rows, rows if fits else self._fitted

    def _gathered(self, rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Keys and values `[1, Hkv, n, D]` of rows `[Hkv, n]`."""
        k, v = (np.take_along_axis(x, rows[..., None], axis=1)[None] for x in (self.store.keys, self.store.values))
        return k, v


def _range(rows: Any, places: tuple[int, int], dtype: str | None = None) -> NDArray[Any]:
    """Rows of a store `[Hkv, n, D]`; of one of codes their numbers, in a dtype."""
    if not isinstance(rows, CodedRows):
        found: NDArray[Any] = rows[:, slice(*places)]
        return found
    return rows.rows(slice(*places)).astype(np.dtype(dtype or "float32"), copy=False)
