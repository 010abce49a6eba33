"""`VirtualKVStore`: keys and values of a batch of requests in all layers, in contiguous arrays that never move."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from longattn import _core
from longattn._arrays import BFLOAT16, Array, as_numpy
from longattn._checks import flag, size, storage
from longattn.methods import Method
from longattn.reference.kv import VirtualKVStore as Reference


class VirtualKVStore:
    """Keys and values of a batch of requests in all layers of a model, contiguous at constant addresses.

    For every layer, keys and values each have address space for `max_requests` slots of `max_tokens` rows. A request
    owns a slot; memory is committed at the front of its `2 * layers` pieces, in granules, as it grows. So kernels
    that know nothing of paging run on its arrays, and no growth copies what is there. vAttention: Dynamic Memory
    Management for Serving LLMs without PagedAttention (2024, arXiv 2405.04437).

    `alloc` hands out slots as numbers `r` below `max_requests`. Views are read-only arrays, which keep the memory
    mapped as long as they live: one that outlives `free(r)` stays readable, but then holds arbitrary numbers. A view
    holds the rows that `ensure` had asked for when it was taken. Do not write rows while another thread reads them.

    Methods may be called from several threads.

    Args:
        layers: layers of the model.
        kv_heads: heads of keys and values.
        head_dim: width of a key.
        value_dim: width of a value; `None` is `head_dim`.
        dtype: storage dtype: float32, float16 or bfloat16 (a name, or a numpy or ml_dtypes type).
        max_requests: most requests at a time.
        max_tokens: most tokens of a request.
        granule: bytes of one commit, a power of two from a page (4 KiB on most machines) to 2 MiB. Large ones are
            huge pages where the system has them; small ones waste less.
        deferred_reclaim: a freed slot keeps its memory and is handed first to the next request, whose rows hold what
            the earlier one left until they are written. Otherwise memory goes back at once and rows start as zeros.
        eager: so many free slots are kept with memory in advance: a granule of each piece, or what deferred reclaim
            left there.
        background: a thread commits one granule more than `ensure` asked for, so that the next step need not wait
            for it, and prepares `eager` slots.

    Raises:
        TypeError: a size is no integer, or another dtype.
        ValueError: a size below 1, another granule, or sizes beyond any address space.
        MemoryError: the system refuses the address space, or the memory for `eager` slots.

    Cost:
        `2 * layers * kv_heads * head_dim` numbers per token (with `head_dim == value_dim`); at most a granule unused
        per request and piece. One system call per granule.

    Example:
        >>> import numpy as np, longattn as la
        >>> store = la.kv.VirtualKVStore(2, 1, 4, dtype="float32", max_requests=8, max_tokens=1000, granule=65536)
        >>> r = store.alloc()
        >>> store.ensure(r, 3)
        >>> store.write(r, 0, 0, np.ones((3, 1, 4), np.float32), np.ones((3, 1, 4), np.float32))
        >>> keys, values = store.view(r, 0)
        >>> keys.shape, store.committed_bytes
        ((3, 1, 4), 262144)
        >>> q = np.ones((1, 1, 4), np.float32)
        >>> la.attention(q, keys.swapaxes(0, 1), values.swapaxes(0, 1)).shape
        (1, 1, 4)
    """

    __slots__ = ("_handle", "_sizes")

    _handle: _core.VirtualKVStore
    _sizes: dict[str, Any]

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
        eager: int = 0,
        background: bool = False,
    ) -> None:
        self._sizes = {
            "layers": size(layers, "layers"),
            "kv_heads": size(kv_heads, "kv_heads"),
            "head_dim": size(head_dim, "head_dim"),
            "value_dim": size(head_dim if value_dim is None else value_dim, "value_dim"),
            "dtype": storage(dtype).name,
            "max_requests": size(max_requests, "max_requests"),
            "max_tokens": size(max_tokens, "max_tokens"),
            "granule": size(granule, "granule"),
            "deferred_reclaim": flag(deferred_reclaim, "deferred_reclaim"),
            "eager": size(eager, "eager", least=0),
            "background": flag(background, "background"),
        }
        self._handle = _core.VirtualKVStore(**self._sizes)

    def alloc(self) -> int:
        """Gives a new request a slot, without rows; returns its number.

        Slots with memory go first, the latest freed before all others.

        Raises:
            ValueError: every slot has a request.
        """
        return self._handle.alloc()

    def free(self, r: int) -> None:
        """Takes the slot of a request back.

        Raises:
            TypeError: `r` is no integer.
            ValueError: no such request.
        """
        self._handle.free(_request(r))

    def ensure(self, r: int, n_tokens: int) -> None:
        """Commits memory for `n_tokens` rows of a request in every layer. Less than it has changes nothing.

        Raises:
            TypeError: a number is no integer.
            ValueError: no such request, or more than `max_tokens`.
            MemoryError: the system refuses the memory; the request is as before.
        """
        self._handle.ensure(_request(r), size(n_tokens, "n_tokens", least=0))

    def view(self, r: int, layer: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The keys `[n, kv_heads, head_dim]` and values `[n, kv_heads, value_dim]` of a request in one layer.

        Read-only and zero-copy, without gaps, `n` the tokens ensured; at the same address as long as the request lives.
        `swapaxes(0, 1)` makes them `k` and `v` of `longattn.attention`.

        Raises:
            TypeError: a number is no integer.
            ValueError: no such request or layer.
        """
        keys, values = self._handle.view(_request(r), _layer(layer))
        return _array(keys), _array(values)

    def write(self, r: int, layer: int, start: int, k: Array, v: Array) -> None:
        """Writes `T` rows of a request in one layer, from row `start` on.

        Args:
            r: the request.
            layer: the layer.
            start: first row; `start + T` must not exceed the tokens ensured.
            k: keys `[T, kv_heads, head_dim]`; float32, float16 or bfloat16, converted to the store's dtype.
            v: values `[T, kv_heads, value_dim]`, likewise.

        Raises:
            TypeError: a number is no integer, not an array, or another dtype.
            ValueError: another shape, no such request or layer, rows beyond those ensured, or an array that overlaps
                the rows written. Nothing is written then.
        """
        k, v = as_numpy(k, "k"), as_numpy(v, "v")
        for rows, name in ((k, "k"), (v, "v")):
            if rows.ndim != 3:
                raise ValueError(f"{name}: got shape {rows.shape}, expected [tokens, heads, dim]")
        self._handle.write(_request(r), _layer(layer), size(start, "start", least=0), k, v)

    def tokens(self, r: int) -> int:
        """Rows that `ensure` has asked for.

        Raises:
            TypeError: `r` is no integer.
            ValueError: no such request.
        """
        return self._handle.tokens(_request(r))

    def reclaim(self) -> None:
        """Gives the memory of all free slots back to the system, also what was kept there in advance."""
        self._handle.reclaim()

    def settle(self) -> None:
        """Waits until the background thread has nothing left to do; returns at once where there is none."""
        self._handle.settle()

    @property
    def committed_bytes(self) -> int:
        """Committed bytes of all requests and free slots.

        Without `eager` and `background`: over requests and slots that kept their memory, keys and values and all
        layers, the sum of `n * heads * dim * itemsize` rounded up to granules.
        """
        return self._handle.committed_bytes

    @property
    def reserved_bytes(self) -> int:
        """Reserved bytes of address space."""
        return self._handle.reserved_bytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers."""
        row = self._sizes["kv_heads"] * (self._sizes["head_dim"] + self._sizes["value_dim"])
        return int(self._sizes["layers"] * row * np.dtype(self._sizes["dtype"]).itemsize)

    @property
    def free_slots(self) -> int:
        """Slots without a request."""
        return self._handle.slots()[1]

    def __len__(self) -> int:
        """Number of requests."""
        return self._handle.slots()[0]

    def __repr__(self) -> str:
        """Sizes, policies and what is stored."""
        sizes = ", ".join(f"{name}={value!r}" for name, value in self._sizes.items())
        return f"VirtualKVStore({sizes}, len={len(self)})"


def _array(rows: _core.Rows) -> NDArray[Any]:
    array: NDArray[Any] = np.asarray(rows)
    # The bits of bfloat16 come as uint16, as numpy's array interface has no name for it.
    return array.view(BFLOAT16) if array.dtype == np.uint16 else array


def _request(r: int) -> int:
    return size(r, "r", least=0)


def _layer(layer: int) -> int:
    return size(layer, "layer", least=0)


METHOD = Method(
    name="virtual_kv_store",
    family="kv",
    title="vAttention: Dynamic Memory Management for Serving LLMs without PagedAttention",
    year=2024,
    arxiv="2405.04437",
    function=VirtualKVStore,
    reference=Reference,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    checks=(
        "Attention over a view has the bits of attention over a contiguous copy.",
        "Addresses of views do not change as a request grows.",
        "Committed bytes are the rows of requests and kept slots, rounded up to granules.",
        "Without deferred reclaim a slot that is used again reads as zeros.",
    ),
    tests="tests/kv/test_virtual_kv_store.py",
    cost="One copy of each row written; one system call per granule and array; waste of at most a granule each.",
)
