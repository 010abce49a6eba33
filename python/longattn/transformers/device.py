"""Layers of a model on a GPU: the newest rows on the device, all others in host memory behind an index."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

import longattn as la
from longattn import gpu
from longattn._checks import one_of
from longattn.index import by_name
from longattn.transformers._onward import OnwardSequence
from longattn.transformers.sequence import ReadCounts, ScoreOptions

# Rows in host memory that a later part of a prompt has on the device at a time.
_BLOCK = 8192


@dataclass(frozen=True)
class DeviceConfig:
    """How the attention layers of a model on a GPU keep their keys: the arguments of `longattn.gpu.HostKVCache`.

    Args:
        sinks: first tokens of a sequence that stay on the device.
        window: last tokens that are on the device.
        top_k: keys selected per KV head among those in host memory; `None` for 1 % of them, at least 64.
        index: kind of the index over them, one of `longattn.index.KINDS` that learns from keys alone.
        parameters: of the index.
        reads: how selected rows are read: `"host"`, `"gather"` or `"auto"`; the last two need `top_k`.
        codes: "int8" or "int4": rows in host memory are kept as codes, without an index; the device chooses `top_k` of
            them, `None` reads all. `None` keeps the numbers.
        costs: of both ways, for `reads="auto"`; `None` measures them in the first step that has a choice, once for all
            layers and sequences.
        device: back end of `longattn.gpu`; `None` is that of the keys.

    Raises:
        TypeError: a parameter that the index does not have; `costs` of another kind.
        ValueError: a value outside the range stated above.
    """

    sinks: int = 4
    window: int = 512
    top_k: int | None = None
    index: str = "signatures"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    reads: Literal["host", "gather", "auto"] = "host"
    codes: Literal["int8", "int4"] | None = None
    costs: gpu.Costs | None = None
    device: gpu.Device | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        for name, least in (("sinks", 0), ("window", 1), ("top_k", 1)):
            value = getattr(self, name)
            if not (name == "top_k" and value is None) and not (isinstance(value, int) and value >= least):
                raise ValueError(f"{name}: got {value!r}, expected an integer >= {least}")
        one_of(self.reads, "reads", ("host", "gather", "auto"))
        if self.reads != "host" and self.top_k is None:
            raise ValueError(f"top_k: got None with reads={self.reads!r}, expected a number of rows")
        one_of(self.codes, "codes", ("int8", "int4", None))
        if self.codes and self.reads != "host":
            raise ValueError(f"reads: got {self.reads!r} with codes={self.codes!r}, expected 'host'")
        if self.costs is not None and not isinstance(self.costs, gpu.Costs):
            raise TypeError(f"costs: got {type(self.costs).__name__}, expected gpu.Costs or None")
        one_of(self.index, "index", [kind for kind in by_name.KINDS if not by_name.learns_from_queries(kind)])
        by_name.check(self.index, dict(self.parameters))


class DeviceSequence(OnwardSequence):
    """Keys and values of one sequence in one layer, padding left out.

    A layer with a sliding window keeps its last rows on the device, as many as its window needs; any other layer has a
    `longattn.gpu.HostKVCache`. Prompts are attended to exactly.

    Args:
        how: the sizes.
        window: sliding window of the layer, `None` for full attention.
        kv_heads: heads of keys and values.
        head_dim: width of both.
        dtype: of both.
        capacity: rows that host memory is reserved for.
    """

    REFUSAL = "device: got a copy of a sequence (beam search, say), expected none for rows on a device"

    def __init__(
        self, how: DeviceConfig, window: int | None, *, kv_heads: int, head_dim: int, dtype: str, capacity: int
    ) -> None:
        super().__init__()
        self._how, self._window, self._kv_heads = how, window, kv_heads
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None  # of a sliding window
        self._cache: gpu.HostKVCache | None = None
        if window is None:
            store = la.KVStore(kv_heads=kv_heads, head_dim=head_dim, dtype=how.codes or dtype, capacity=capacity)
            index = None if how.codes else la.index.make(how.index, store, queries=None, **how.parameters)
            self._cache = gpu.HostKVCache(
                store,
                index,
                sinks=how.sinks,
                window=how.window,
                reads=how.reads,
                costs=how.costs,
                device=how.device,
            )

    @property
    def nbytes(self) -> int:
        """Host memory of the rows."""
        return 0 if self._cache is None else self._cache.store.nbytes

    @property
    def index_nbytes(self) -> int:
        """Host memory of the index."""
        return 0 if self._cache is None or self._cache.index is None else self._cache.index.nbytes

    def attend(
        self,
        query: torch.Tensor,
        options: ScoreOptions,
        *,
        decode: bool,
        dense: torch.Tensor | None,
        counts: ReadCounts,
        out: torch.Tensor,
    ) -> Iterator[None]:
        """Attention of the rows that came last; `Sequence.attend` says more.

        Gives way where a step is under way, so that others may start theirs: the device attends to its rows, and the
        query is on its way to the host. `in_turns` goes on with it.

        Raises:
            ValueError: a softcap over rows in host memory, whose logits retrieval does not cap.
        """
        if query.shape[1] == 0 or self._new is None:  # nothing but padding arrived
            return
        assert dense is None  # the layer refuses such masks
        (k, v), self._new = (self._new[0][None], self._new[1][None]), None
        q, sinks = query[None], options["sinks"]
        given = {"scale": options["scale"], "sinks": None if sinks is None else sinks.float()}
        if self._cache is None:
            self._attend_in_window(q, k, v, {**given, "softcap": options["softcap"]}, out)
            if decode:
                visible = sum(min(self._arrived - i, self._window or 0) for i in range(k.shape[2])) * self._kv_heads
                counts.add(visible, visible, 0.0, q.shape[1] * q.shape[2])
            return
        if options["softcap"]:
            raise ValueError(
                f"device: got softcap {options['softcap']} from the model, expected none: retrieval does not cap logits"
            )
        if decode:
            yield from self._steps(self._cache, q, k, v, given, counts, out)
            return
        out.copy_(self._prompt(self._cache, q, k, v, given)[0])
        self._cache.append(k, v)

    def _attend_in_window(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any], out: torch.Tensor
    ) -> None:
        assert self._window is not None
        if self._kept is not None:
            k, v = (torch.cat([old, new], dim=2) for old, new in zip(self._kept, (k, v), strict=True))
        window = (self._window - 1, 0)
        out.copy_(gpu.attention(q, k, v, window=window, device=self._how.device, **options)[0])
        first = max(k.shape[2] - self._window + 1, 0)  # what the next query sees
        self._kept = k[:, :, first:].clone(), v[:, :, first:].clone()

    def _steps(
        self,
        cache: gpu.HostKVCache,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        options: dict[str, Any],
        counts: ReadCounts,
        out: torch.Tensor,
    ) -> Iterator[None]:
        """Decoding, one row after another, each first as far as the device's part."""
        for row in range(k.shape[2]):
            one = slice(row, row + 1)
            cache.append(k[:, :, one], v[:, :, one])
            finish = cache.start(
                q[:, :, one].contiguous(),
                top_k=self._how.top_k,
                scale=options["scale"],
                sink_logits=options["sinks"],
                return_stats=True,
            )
            yield
            attended, stats = finish()
            out[:, one] = attended[0]
            read, missed = (cache.resident + stats.gathered + stats.listed) * self._kv_heads, 0.0
            if stats.retrieval is not None:
                read += int(stats.retrieval.keys_attended.sum())
                missed = float(stats.retrieval.missed_mass.sum())
            counts.add(len(cache) * self._kv_heads, read, missed, q.shape[1])

    def _prompt(
        self, cache: gpu.HostKVCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        """Exact attention to new rows and all before them; those in host memory come to the device block by block."""
        device = self._how.device
        attended: torch.Tensor
        if len(cache) == 0:
            attended = gpu.attention(q, k, v, causal=True, device=device, **options)
            return attended
        parts = [gpu.attention(q, k, v, causal=True, return_lse=True, device=device, **options)]
        for keys, values in cache.rows_on_device(q, _BLOCK):
            parts.append(gpu.attention(q, keys, values, scale=options["scale"], return_lse=True, device=device))
        parts = [(o.float(), lse) for o, lse in parts]
        attended, _ = gpu.merge(parts, dtype=str(q.dtype).removeprefix("torch."), device=device)
        return attended


def in_turns(steps: Iterable[Iterator[None]]) -> None:
    """Runs sequences side by side: all start their steps before the host does its part of the first.

    So the device always has work, and the host finds each query there when its turn comes.
    """
    under_way = deque(steps)
    while under_way:
        one = under_way.popleft()
        for _ in one:
            under_way.append(one)
            break
