"""`KVStore`: keys and values of one sequence in host memory, in rows that never move; as numbers, or as codes."""

from __future__ import annotations

import os
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from longattn import _core
from longattn._arrays import BFLOAT16, CODES, FLOATS, Array, CodedRows, as_numpy
from longattn._checks import check_floating, size
from longattn.kv._sizes import Sizes


class KVStore(Sizes):
    """Keys and values of one sequence, `[kv_heads, len, dim]` each, in host memory.

    Address space is reserved once for the whole capacity, and memory is committed as the sequence grows: no
    append copies what is there, and the arrays `keys` and `values` never move, so that one taken earlier
    stays valid. A generous capacity costs nothing until it is used.

    A store may be shared by threads. Appends take turns; an array taken before or during an append shows
    whole rows only, those that were there when it was taken. After `truncate`, an array taken before it stays
    readable, but the rows that were dropped hold arbitrary numbers: do not truncate a store while another
    thread reads its arrays.

    Memory is committed per head, keys and values each, in steps of 2 MiB (in one step, where the head's whole
    capacity is smaller: rounded up to a page), which gives `nbytes` beforehand.

    Args:
        kv_heads: heads of keys and values.
        head_dim: width of a key.
        value_dim: width of a value; `None` is `head_dim`.
        dtype: storage dtype: float32, float16 or bfloat16 (a name, or a numpy or ml_dtypes type), or "int8" or
            "int4" for codes (see below).
        capacity: most rows the store will hold.
        group_size: for codes: channels that share a scale, a power of two of at least 32; `None` is the whole row.
        channel_scales: for codes: True brings the channels of keys to one size before they are coded: each is
            divided by its largest magnitude among the rows of the first append. Or the factors themselves,
            floating `[kv_heads, head_dim]`, positive. They are multiplied back into queries, and stay for the
            life of the store.

    Codes are made as rows are appended: `x = offset + scale * code` with 8 or 4 bits per code and a float32 scale
    and offset per group, so that a row takes `head_dim + 8 * groups` bytes (int8; head_dim rounded up to a multiple
    of 32) or `head_dim / 2 + 8 * groups` (int4). A number is off by at most half a scale, which is the group's range
    over 255 or 15. A group with a NaN or an infinity becomes NaN. `keys` and `values` of such a store are
    `CodedRows`, which `longattn.attention` takes and `numpy.asarray` decodes to float32.

    Raises:
        TypeError: a size is no integer, or another dtype.
        ValueError: a size below 1, sizes beyond any address space, or options of codes for another dtype.
        MemoryError: the system refuses that much address space.
    """

    __slots__ = ("_handle",)

    _handle: _core.KVStore

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: DTypeLike = "bfloat16",
        capacity: int = 1 << 20,
        *,
        group_size: int | None = None,
        channel_scales: bool | Array = False,
    ) -> None:
        heads, dim = size(kv_heads, "kv_heads"), size(head_dim, "head_dim")
        storage = _storage(dtype)
        plain = isinstance(channel_scales, bool)
        if storage not in CODES:
            if group_size is not None:
                raise ValueError(f"group_size: got {group_size} with dtype {storage}, expected None: it has no scales")
            if not plain or channel_scales:
                raise ValueError(f"channel_scales: got them with dtype {storage}, expected none: it has no scales")
        self._handle = _core.KVStore(
            heads,
            dim,
            size(head_dim if value_dim is None else value_dim, "value_dim"),
            storage,
            size(capacity, "capacity"),
            None if group_size is None else size(group_size, "group_size"),
            plain and bool(channel_scales),
            None if plain else _channels(channel_scales, (heads, dim)),
        )

    @classmethod
    def _around(cls, handle: _core.KVStore) -> Self:
        store = cls.__new__(cls)
        store._handle = handle
        return store

    def append(self, k: Array, v: Array) -> None:
        """Appends `T` rows; all of them, or on an error none.

        The rows are converted to the store's dtype (rounded to nearest even, so that a float32 beyond the
        range of float16 becomes infinite). Costs one copy of the new rows, whatever the length of the store.

        Args:
            k: keys `[kv_heads, T, head_dim]` or `[1, kv_heads, T, head_dim]`; float32, float16 or bfloat16,
                a numpy array, torch CPU tensor or other DLPack CPU array with any strides.
            v: values `[kv_heads, T, value_dim]`, likewise, not necessarily in the dtype of `k`.

        Raises:
            TypeError: not an array, or another dtype.
            ValueError: another shape, more rows than the capacity leaves, a tensor that is not on the CPU, or
                an array of the store's own rows from before they were truncated.
            MemoryError: the system refuses the memory.
        """
        self._handle.append(as_numpy(k, "k"), as_numpy(v, "v"))

    def truncate(self, length: int) -> None:
        """Drops all rows from row `length` on; nothing if there are none.

        Memory that lies more than a step above the new length goes back to the system (on Linux).

        Raises:
            TypeError: `length` is no integer.
            ValueError: it is negative.
        """
        self._handle.truncate(size(length, "length", least=0))

    def clear(self) -> None:
        """Drops all rows."""
        self._handle.truncate(0)

    def fork(self) -> Self:
        """A store of its own with the same rows, dtype and capacity.

        The rows are copied: the two share nothing, and the new one commits as much memory as this one needs.

        Raises:
            MemoryError: the system refuses the memory.
        """
        return self._around(self._handle.fork())

    def __copy__(self) -> Self:
        """As `fork`: two stores never share rows."""
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """As `fork`."""
        return self.fork()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the rows to a file, which appears under its name complete or not at all.

        The file is a safetensors file with the tensors `keys` `[kv_heads, len, head_dim]` and `values`
        `[kv_heads, len, value_dim]` and a checksum of all of it. It is written beside `path` and renamed; no
        second copy of the store is made in memory. Appends by other threads may go on and are not part of it.

        Raises:
            OSError: the file cannot be written, or `path` is a device or a pipe.
        """
        self._handle.save(os.fsdecode(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str], capacity: int | None = None) -> Self:
        """Reads a store from a file that `save` wrote.

        Args:
            path: the file.
            capacity: most rows the store will hold; `None` is the capacity of the store that was saved.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is cut off, altered or of another kind (the message says which), or has more
                rows than `capacity`.
            MemoryError: the system refuses the memory.
        """
        rows = None if capacity is None else size(capacity, "capacity")
        return cls._around(_core.KVStore.load(os.fsdecode(path), rows))

    def __len__(self) -> int:
        """Rows stored."""
        return len(self._handle)

    @property
    def keys(self) -> Any:
        """The keys stored now, `[kv_heads, len, head_dim]`.

        An array, read-only, zero-copy, which keeps the memory alive; `CodedRows` where the store keeps codes.
        """
        return self._rows(self._handle.keys)

    @property
    def values(self) -> Any:
        """The values stored now, `[kv_heads, len, value_dim]`, likewise."""
        return self._rows(self._handle.values)

    def _rows(self, rows: _core.Rows | _core.CodedRows) -> NDArray[Any] | CodedRows:
        if isinstance(rows, _core.CodedRows):
            return CodedRows(rows)
        array: NDArray[Any] = np.asarray(rows)
        # The bits of bfloat16 come as uint16, as numpy's array interface has no name for it.
        return array.view(BFLOAT16) if array.dtype == np.uint16 else array

    @property
    def dtype(self) -> np.dtype[Any] | str:
        """Storage dtype; "int8" or "int4" for codes."""
        name = self._handle.dtype
        return name if name in CODES else np.dtype(name)

    @property
    def channel_scales(self) -> NDArray[np.float32] | None:
        """What the channels of keys were divided by, `[kv_heads, head_dim]`; None where nothing (yet)."""
        scales = self._handle.channel_scales
        return None if scales is None else np.array(scales, np.float32).reshape(self.kv_heads, self.head_dim)

    @property
    def capacity(self) -> int:
        """Most rows the store can hold."""
        return self._handle.capacity

    @property
    def nbytes(self) -> int:
        """Committed bytes."""
        return self._handle.nbytes

    def __repr__(self) -> str:
        """Sizes, dtype and length."""
        return (
            f"KVStore(kv_heads={self.kv_heads}, head_dim={self.head_dim}, value_dim={self.value_dim}, "
            f"dtype={self._handle.dtype!r}, capacity={self.capacity}, len={len(self)})"
        )


def _storage(dtype: DTypeLike) -> str:
    if isinstance(dtype, str) and dtype in CODES:
        return dtype
    try:
        storage: np.dtype[Any] | None = np.dtype(dtype)
    except TypeError:
        storage = None
    if storage is None or storage not in FLOATS:
        raise TypeError(f'dtype: got {dtype!r}, expected float32, float16, bfloat16, "int8" or "int4"')
    return storage.name


def _channels(scales: Array, shape: tuple[int, int]) -> NDArray[np.float32]:
    x = as_numpy(scales, "channel_scales")
    check_floating(x, "channel_scales")
    if x.shape != shape:
        raise ValueError(f"channel_scales: got shape {x.shape}, expected {shape}")
    return np.ascontiguousarray(x, np.float32).reshape(-1)
