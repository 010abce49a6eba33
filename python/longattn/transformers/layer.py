"""The layers of a `LongAttnCache`: one `KVStore` per sequence of the batch, rows appended as they arrive.

Padding. A sequence's store holds its own tokens only; padded positions are never stored. Causal order then is
right without a mask, whatever the padding (left, right, or in the middle after a second prompt), retrieval
can select no padding, and no memory is spent on it. Positions are in the keys already (RoPE is applied before
the cache), so leaving rows out moves nothing. A sequence in a padded batch computes exactly what it computes
alone, windows included: where padding lies in the middle of a sequence, transformers' own sliding layers
count it as part of the window, and these do not.

`get_seq_length` still counts arrivals, padding included, as transformers requires; the layer remembers which
arrivals were tokens, to crop the right rows and to refuse a later `attention_mask` that tells another story
about the past.

Storing happens when the layer attends, not in `update`: only then is the padding known. A forward pass that
fails in between (for instance because the model runs another attention implementation) leaves the layer as it
was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

import longattn as la
from longattn.transformers.device import DeviceConfig, DeviceSequence, in_turns
from longattn.transformers.eviction import EvictedSequence, EvictionConfig
from longattn.transformers.masks import MaskSpec
from longattn.transformers.retrieval import RetrievalConfig
from longattn.transformers.routing import Lists, RoutingConfig
from longattn.transformers.sequence import ReadCounts, ScoreOptions, Sequence
from longattn.transformers.sparse import SparsePrefill

_STORE_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class HostKV(torch.Tensor):
    """New keys or values of a layer whose past lies in host memory.

    Models pass what `Cache.update` returns on to the attention function. That function finds the layer here;
    any other one would take the new rows for all rows and compute wrong tokens, so arithmetic on this tensor
    is an error.
    """

    longattn_layer: HostLayer

    # What models look at on the way to the attention function. `__get__` reads attributes such as `shape`.
    _HARMLESS = frozenset({"__get__", "size", "dim", "stride", "numel", "is_contiguous", "__repr__"})

    @classmethod
    def wrap(cls, rows: torch.Tensor, layer: HostLayer) -> HostKV:
        """`rows`, sharing memory, with `layer` attached."""
        wrapped: HostKV = rows.as_subclass(cls)
        wrapped.longattn_layer = layer
        return wrapped

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in cls._HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **(kwargs or {}))
            if not isinstance(result, torch.Tensor):  # an attribute may be a tensor, as `mT` is
                return result
        raise RuntimeError(
            f"{name} was called on keys or values that live in a LongAttnCache. Load the model with "
            "attn_implementation='longattn' (or model.set_attn_implementation('longattn')), or give it "
            "another cache. If it is loaded so, its layers compute with the keys themselves and cannot use "
            "this cache."
        )


class HostLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types to check against
    """Keys and values of one decoder layer in host memory, a `Sequence` for every one in the batch.

    Args:
        sliding_window: keys a query sees at most, its own included; `None` for full attention.
        dtype: storage dtype; `None` for the dtype of the first keys.
        capacity: rows per sequence that address space is reserved for.
        retrieval: how decoding reads a part of the keys; `None` to read all.
        eviction: how a part of the keys is kept; `None` to keep all.
        decode_length: new tokens per forward pass up to which it counts as a decoding step.
        prefill: how prompts attend to a part of the keys; `None` to all.
        on_device: how a model on a GPU keeps its keys; `None` for a model on the CPU.
        routing: what decides whether few keys are read; `None` to decide nothing.
        lists: by sequence, what layers with routing tell each other; one for all layers of a cache.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        *,
        sliding_window: int | None,
        dtype: torch.dtype | None,
        capacity: int,
        retrieval: RetrievalConfig | None,
        eviction: EvictionConfig | None = None,
        decode_length: int,
        prefill: SparsePrefill | None = None,
        on_device: DeviceConfig | None = None,
        routing: RoutingConfig | None = None,
        lists: defaultdict[int, Lists] | None = None,
    ) -> None:
        super().__init__()
        self.is_sliding = sliding_window is not None
        self.sliding_window = sliding_window
        self.store_dtype = dtype
        self.capacity = capacity
        self.retrieval = retrieval
        self.eviction = eviction
        self.decode_length = decode_length
        self.prefill = prefill
        self.on_device = on_device
        self.routing = routing
        self._lists = defaultdict(Lists) if lists is None else lists
        self.reset()

    def reset(self) -> None:
        """Forgets all sequences and returns their memory."""
        self.sequences: list[Sequence | EvictedSequence | DeviceSequence] = []
        self.counts = ReadCounts()
        self._arrived = 0
        # bool [B, arrived], False for padding; None when nothing is padded
        self._padding: torch.Tensor | None = None
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None
        self.is_initialized = False

    # What transformers asks of a layer.

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes an empty store for every sequence of the batch."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, kv_heads, _, head_dim = key_states.shape
        if self.eviction is not None:
            heads = {"kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_states.shape[-1]}
            dtype = _STORE_DTYPES[self.store_dtype or self.dtype]
            self.sequences = [EvictedSequence(self.eviction, dtype=dtype, **heads) for _ in range(batch)]
            self.is_initialized = True
            return
        if self.on_device is not None:
            if value_states.shape[-1] != head_dim or self.store_dtype not in (None, self.dtype):
                raise ValueError(
                    f"device: got values of width {value_states.shape[-1]} and dtype {self.store_dtype or self.dtype}, "
                    f"expected those of the keys, {head_dim} and {self.dtype}"
                )
            heads = {"kv_heads": kv_heads, "head_dim": head_dim, "capacity": self.capacity}
            name = _STORE_DTYPES[self.dtype]
            self.sequences = [
                DeviceSequence(self.on_device, self.sliding_window, dtype=name, **heads) for _ in range(batch)
            ]
            self.is_initialized = True
            return
        self.sequences = [
            Sequence(
                la.KVStore(
                    kv_heads=kv_heads,
                    head_dim=head_dim,
                    value_dim=value_states.shape[-1],
                    dtype=_STORE_DTYPES[self.store_dtype or self.dtype],
                    capacity=self.capacity,
                ),
                self.sliding_window,
                self.retrieval,
                self.prefill,
                None if self.routing is None else self.routing.router(),
            )
            for _ in range(batch)
        ]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the new rows `[B, Hkv, L, D]` and gives them back marked as this layer's.

        They are stored by `attend`.

        Raises:
            ValueError: not on the CPU, not float32, float16 or bfloat16, or another batch size than the cache
                holds.
        """
        if self.on_device is None and {key_states.device.type, value_states.device.type} != {"cpu"}:
            raise ValueError(
                f"key_states: got a tensor on {key_states.device}, expected a model on the CPU, or a cache with a "
                "DeviceConfig"
            )
        if key_states.dtype not in _STORE_DTYPES or value_states.dtype != key_states.dtype:
            raise ValueError(
                f"key_states, value_states: got dtypes {key_states.dtype} and {value_states.dtype}, expected "
                "float32, float16 or bfloat16 for both"
            )
        if self.sequences and key_states.shape[0] != len(self.sequences):
            raise ValueError(
                f"key_states: got batch size {key_states.shape[0]}, expected {len(self.sequences)} as in the "
                "cache (cache.reset() empties it)"
            )
        self._new = (key_states, value_states)
        return HostKV.wrap(key_states, self), HostKV.wrap(value_states, self)

    def get_seq_length(self) -> int:
        """Tokens that arrived, padding included."""
        return self._arrived

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys in the forward pass that is about to add `query_length` tokens."""
        return self._arrived + query_length, 0

    def get_max_length(self) -> int:
        """-1: no length at which the cache wraps around."""
        return -1

    def offload(self) -> None:
        """Nothing to do: the rows are in host memory."""

    def prefetch(self) -> None:
        """Nothing to do: the rows are read where they lie."""

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises what `crop` would raise, and changes nothing."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove: got {tokens_to_remove}, expected a negative count, as in transformers 5"
            )
        if -tokens_to_remove > self._arrived:
            raise ValueError(
                f"tokens_to_remove: got {tokens_to_remove}, expected at most {self._arrived} as in the cache"
            )
        if not all(s.can_crop(n) for s, n in zip(self.sequences, self._rows_of_last(-tokens_to_remove), strict=True)):
            why = f"a layer with a sliding window of {self.sliding_window} has let go of the rows before"
            if self.eviction is not None:
                why = "a layer with an eviction policy cannot go back"
            if self.on_device is not None:
                why = "a layer with rows on a device cannot go back"
            raise ValueError(f"tokens_to_remove: got {tokens_to_remove}, expected fewer: {why}")

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` arrivals of every sequence (a count <= 0).

        Raises:
            ValueError: a positive count, more than arrived, or back to where a sliding layer has dropped
                rows.
        """
        self.check_crop(tokens_to_remove)
        for sequence, rows in zip(self.sequences, self._rows_of_last(-tokens_to_remove), strict=True):
            sequence.crop(rows)
        self._arrived += tokens_to_remove
        if self._padding is not None:
            self._padding = _unless_all(self._padding[:, : self._arrived])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequence `i` becomes a continuation of the present sequence `beam_idx[i]`."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, side by side."""
        self._select([i for i in range(len(self.sequences)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the sequences `indices` (numbers or a bool mask), in that order."""
        self._select(torch.arange(len(self.sequences))[indices].tolist())

    # Attention.

    def attend(self, query: torch.Tensor, mask: MaskSpec | torch.Tensor | None, options: ScoreOptions) -> torch.Tensor:
        """Stores the rows of the last `update` and attends to all rows of each sequence.

        Args:
            query: `[B, Hq, L, D]`, the queries of those rows.
            mask: what `longattn_mask` gave, or the caller's own 4-D mask `[B or 1, 1 or Hq, L, arrived + L]`.
            options: scale, softcap and sinks.

        Returns:
            `[B, L, Hq, Dv]` in the dtype of `query`; zeros for padding.

        Raises:
            ValueError: the mask does not fit the cache.
            RuntimeError: no `update` came before.
        """
        if self._new is None:
            raise RuntimeError(
                "attention to a LongAttnCache layer without an update before it: layers that share the keys "
                "of another layer are not supported"
            )
        key, value = self._new
        if query.shape[0] != key.shape[0] or query.shape[2] != key.shape[2]:
            raise ValueError(
                f"query: got shape {tuple(query.shape)}, expected the batch and length of the new keys "
                f"{tuple(key.shape)}"
            )
        if self.retrieval is not None and options["softcap"]:
            raise ValueError(
                f"retrieval: got softcap {options['softcap']} from the model, expected none: retrieval does "
                "not cap logits; give the cache retrieval=None for this layer"
            )
        if self.routing is not None:
            self.routing.refuse(options)
        padding = self._padding_of(mask, query.shape[2])
        tokens = _token_rows(padding, self._arrived, len(query))
        decode = self._arrived > 0 and query.shape[2] <= self.decode_length
        self._store(key, value, tokens)
        self._padding = padding
        self._new = None

        dense = None if mask is None or isinstance(mask, MaskSpec) else mask.expand(len(query), -1, -1, -1)
        out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        parts, steps = [], []
        for b, sequence in enumerate(self.sequences):
            rows = tokens[b]
            q = query[b] if rows is None else query[b][:, rows]
            # Written in place, except around padding, where the rows are gathered and scattered.
            o = out[b] if rows is None else out.new_empty(len(rows), *out.shape[2:])
            row_mask = None if dense is None else dense[b]
            given: dict[str, Any] = {
                "decode": decode,
                "dense": row_mask,
                "counts": self.counts,
                "out": o.transpose(0, 1),
            }
            if self.routing is not None:
                given["lists"] = self._lists[b]
            parts.append(o)
            if isinstance(sequence, DeviceSequence):
                steps.append(sequence.attend(q, options, **given))
            else:
                sequence.attend(q, options, **given)
        in_turns(steps)
        for b, (rows, o) in enumerate(zip(tokens, parts, strict=True)):
            if rows is not None:
                out[b, rows] = o
        return out

    def _padding_of(self, mask: MaskSpec | torch.Tensor | None, new: int) -> torch.Tensor | None:
        """Which arrivals are tokens, past and `new` ones, bool `[B, arrived + new]`; `None` for all.

        Refuses a mask that does not fit the cache or is at odds with its past.
        """
        total = self._arrived + new
        if not isinstance(mask, MaskSpec):
            if self._padding is not None:
                raise ValueError(
                    "attention_mask: got a 4-D mask or none, expected the 2-D mask that tells the padding in this cache"
                )
            if mask is not None and mask.shape[-1] != total:
                raise ValueError(
                    f"attention_mask: got shape {tuple(mask.shape)}, expected {total} keys: {self._arrived} "
                    f"in the cache and {new} new ones"
                )
            if mask is not None and (self.eviction is not None or self.on_device is not None):
                why = "eviction selects its own keys" if self.on_device is None else "rows lie in two memories"
                raise ValueError(f"attention_mask: got a 4-D mask, expected a 2-D one: {why}")
            chooses = self.retrieval is not None or self.routing is not None
            if mask is not None and chooses and self._arrived and new <= self.decode_length:
                what = "retrieval" if self.routing is None else "routing"
                raise ValueError(f"attention_mask: got a 4-D mask, expected a 2-D one: {what} selects its own keys")
            return None
        if not mask.causal or mask.kv_offset != 0 or mask.q_offset != self._arrived or mask.kv_length != total:
            raise ValueError(
                f"attention_mask: got a mask for {mask.kv_length} keys (causal: {mask.causal}), expected a "
                f"causal one for {self._arrived} in the cache and {new} new ones"
            )
        if mask.window != self.sliding_window:
            raise ValueError(
                f"attention_mask: got a window of {mask.window}, expected {self.sliding_window} as in the "
                "config the cache was made for"
            )
        padding = mask.padding
        if padding is None and self._padding is not None:
            raise ValueError(
                "attention_mask: got none or only ones, but the cache holds padded sequences: pass the mask "
                "of all tokens, past ones included"
            )
        if padding is not None:
            past = padding[:, : self._arrived]
            if not (bool(past.all()) if self._padding is None else torch.equal(past, self._padding)):
                raise ValueError("attention_mask: got other padding for tokens in the cache than when they came")
        return padding

    def _store(self, key: torch.Tensor, value: torch.Tensor, tokens: list[torch.Tensor | None]) -> None:
        appended: list[tuple[Sequence | EvictedSequence | DeviceSequence, int]] = []
        try:
            if not self.is_initialized:
                self.lazy_initialization(key, value)
            for k, v, rows, sequence in zip(key, value, tokens, self.sequences, strict=True):
                sequence.drop_old_rows()
                if rows is not None:
                    k, v = k[:, rows], v[:, rows]  # noqa: PLW2901  # the tokens among them
                if k.shape[1]:
                    sequence.append(k, v)
                    appended.append((sequence, k.shape[1]))
        except BaseException:  # all sequences of the batch or none
            for sequence, count in appended:
                sequence.crop(count)
            if self._arrived == 0:
                self.sequences, self.is_initialized = [], False
            raise
        self._arrived += key.shape[2]

    def _rows_of_last(self, arrivals: int) -> list[int]:
        """Stored rows of each sequence among its last `arrivals` arrivals."""
        if self._padding is None:
            return [arrivals] * len(self.sequences)
        counts: list[int] = self._padding[:, self._arrived - arrivals :].sum(dim=1).tolist()
        return counts

    def _select(self, sources: list[int]) -> None:
        """Sequence `i` becomes the present `sources[i]`: moved at its first use, copied at later ones."""
        used: set[int] = set()
        chosen: list[Sequence | EvictedSequence | DeviceSequence] = []
        for source in sources:
            chosen.append(self.sequences[source].fork() if source in used else self.sequences[source])
            used.add(source)
        self.sequences = chosen
        if self._padding is not None:
            self._padding = _unless_all(self._padding[sources])


def _token_rows(padding: torch.Tensor | None, start: int, batch: int) -> list[torch.Tensor | None]:
    """Per sequence the numbers of its tokens among the arrivals from `start` on; `None` where all are."""
    if padding is None:
        return [None] * batch
    return [None if bool(new.all()) else new.nonzero().squeeze(1) for new in padding[:, start:]]


def _unless_all(padding: torch.Tensor) -> torch.Tensor | None:
    return None if bool(padding.all()) else padding
