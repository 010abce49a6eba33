"""A virtual store from its rules: a dictionary of arrays, and counted bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray


class VirtualKVStore:
    """Arrays by request and layer; see `longattn.kv.VirtualKVStore`. Knows neither `eager` nor `background`."""

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: DTypeLike = "bfloat16",
        *,
        max_requests: int,
        max_tokens: int,
        granule: int = 2 << 20,
        deferred_reclaim: bool = False,
    ) -> None:
        dims = head_dim, head_dim if value_dim is None else value_dim
        self.rows = [(kv_heads, dim) for _ in range(layers) for dim in dims]
        self.dtype = np.dtype(dtype)
        self.max_tokens, self.granule, self.deferred_reclaim = max_tokens, granule, deferred_reclaim
        #: The back goes first.
        self.free_slots = list(reversed(range(max_requests)))
        #: Rows of each live request, keys and values layer by layer.
        self.live: dict[int, list[NDArray[Any]]] = {}
        #: The most rows that a slot's memory was ever asked for since it was last given back.
        self.committed_tokens: dict[int, int] = {}

    def alloc(self) -> int:
        """A request without rows."""
        request = self.free_slots.pop()
        self.live[request] = [np.zeros((0, *row), self.dtype) for row in self.rows]
        return request

    def ensure(self, request: int, n_tokens: int) -> None:
        """Zero rows up to `n_tokens`."""
        for plane, rows in enumerate(self.live[request]):
            more = np.zeros((max(n_tokens - len(rows), 0), *rows.shape[1:]), self.dtype)
            self.live[request][plane] = np.concatenate([rows, more])
        self.committed_tokens[request] = max(self.committed_tokens.get(request, 0), n_tokens)

    def view(self, request: int, layer: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Keys and values of a layer."""
        k, v = self.live[request][2 * layer : 2 * layer + 2]
        return k, v

    def write(self, request: int, layer: int, start: int, k: ArrayLike, v: ArrayLike) -> None:
        """Rows from `start` on."""
        for rows, new in zip(self.view(request, layer), (np.asarray(k), np.asarray(v)), strict=True):
            rows[start : start + len(new)] = new.astype(self.dtype)

    def free(self, request: int) -> None:
        """Forgets a request."""
        del self.live[request]
        if not self.deferred_reclaim:
            self.committed_tokens.pop(request, None)
        if self.committed_tokens.get(request):
            self.free_slots.append(request)
        else:  # behind the slots that have memory
            behind = sum(not self.committed_tokens.get(slot) for slot in self.free_slots)
            self.free_slots.insert(behind, request)

    def reclaim(self) -> None:
        """Gives the memory of free slots back, the next one to go first."""
        kept = [slot for slot in self.free_slots if self.committed_tokens.pop(slot, 0)]
        self.free_slots = [slot for slot in self.free_slots if slot not in kept] + kept

    @property
    def committed_bytes(self) -> int:
        """Granules of live and of deferred slots."""
        total = 0
        for tokens in self.committed_tokens.values():
            for row in self.rows:
                total += math.ceil(tokens * math.prod(row) * self.dtype.itemsize / self.granule) * self.granule
        return total
