"""`SlotStore`: the rows of one sequence that are worth keeping, in a fixed number of slots per KV head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy, like
from longattn._checks import (
    check_float_storage,
    check_floating,
    flag,
    integer,
    one_of,
    per_head,
    result_array,
    scale_factor,
    size,
    softcap_value,
    storage,
)
from longattn.kv._sizes import Sizes

#: How the weights of a group's query heads become one.
REDUCTIONS = ("max", "mean", "sum")


@dataclass(frozen=True, slots=True)
class Attended:
    """What `SlotStore.attend` computed, in the kind of `q`; `None` where it was not asked for.

    Attributes:
        out: the output `[Hq, Lq, Dv]`.
        lse: float32 `[Hq, Lq]`: log-sum-exp of each row's logits, mean row and sink included.
        weights: float32 `[Hkv, Lq, slots]`: softmax weight of the row in each slot, over the group's query heads; 0
            where no row was read.
        logits: float32 `[Lq, slots]`: logits of one query head, before a bias; 0 where no row was read.
    """

    out: Array
    lse: Array
    weights: NDArray[np.float32] | None = None
    logits: NDArray[np.float32] | None = None


class SlotStore(Sizes):
    """Keys and values of the kept rows of one sequence, a fixed number of slots per KV head.

    Rows have positions, counted from 0 in the order they were appended, whether they were kept or not. Each KV head
    keeps a row in its lowest free slot until it is evicted; heads may keep different rows. Keys are stored as they
    come, rotated for their own positions where a model rotates them; positions do not change when others go.

    Rows that go may be folded into their head's mean row: running means of keys and of values (float64), and their
    number `N`. In attention it is one more key, with a logit of `ln N` more than its own: `N` copies of the mean pair.

    Methods may be called from several threads; those that change the store wait for those that read it.

    Args:
        kv_heads: heads of keys and values.
        head_dim: width of a key.
        value_dim: width of a value; `None` is `head_dim`.
        dtype: storage dtype: float32, float16 or bfloat16 (a name, or a numpy or ml_dtypes type).
        slots: most rows that a KV head keeps. Address space is reserved for them; memory is committed as slots are
            first used.

    Raises:
        TypeError: a size is no integer, or another dtype.
        ValueError: a size below 1, or sizes beyond any address space.
        MemoryError: the system refuses that much address space.

    Example:
        >>> import numpy as np, longattn as la
        >>> store = la.kv.SlotStore(kv_heads=1, head_dim=4, dtype="float32", slots=3)
        >>> rows = np.ones((1, 3, 4), np.float32)
        >>> store.append(rows, rows)
        array([[0, 1, 2]])
        >>> store.evict(np.array([[False, True, False]]), fold=True)
        [1]
        >>> store.append(rows[:, :1], rows[:, :1]), store.positions
        (array([[1]]), array([[0, 3, 2]]))
    """

    __slots__ = ("_handle",)

    _handle: _core.SlotStore

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: DTypeLike = "bfloat16",
        *,
        slots: int,
    ) -> None:
        self._handle = _core.SlotStore(
            size(kv_heads, "kv_heads"),
            size(head_dim, "head_dim"),
            size(head_dim if value_dim is None else value_dim, "value_dim"),
            storage(dtype).name,
            size(slots, "slots"),
        )

    def append(self, k: Array, v: Array, *, keep: Array | None = None, fold: bool = False) -> NDArray[np.int64]:
        """Appends `T` rows; all of them, or on an error none.

        Args:
            k: keys `[kv_heads, T, head_dim]`; float32, float16 or bfloat16, converted to the store's dtype.
            v: values `[kv_heads, T, value_dim]`, likewise.
            keep: boolean `[kv_heads, T]`: which rows a head keeps; `None` is all. The others count as appended.
            fold: whether rows that are not kept enter the head's mean row.

        Returns:
            The slots they went to, int64 `[kv_heads, T]`, -1 for rows that are not kept.

        Raises:
            TypeError: not an array, or another dtype.
            ValueError: another shape, or more rows than a head has free slots.
            MemoryError: the system refuses the memory.

        Cost:
            One copy of the rows.
        """
        kn, vn = as_numpy(k, "k"), as_numpy(v, "v")
        for x, name, dim in ((kn, "k", self.head_dim), (vn, "v", self.value_dim)):
            check_float_storage(x, name)
            if x.ndim != 3 or (x.shape[0], x.shape[2]) != (self.kv_heads, dim):
                raise ValueError(f"{name}: got shape {x.shape}, expected ({self.kv_heads}, T, {dim})")
        kept = None if keep is None else _flags(keep, "keep", (self.kv_heads, kn.shape[1]))
        slots = np.empty(self.kv_heads * kn.shape[1], np.int64)
        self._handle.append(kn, vn, kept, flag(fold, "fold"), slots)
        return slots.reshape(self.kv_heads, -1) if kn.shape[1] else slots.reshape(self.kv_heads, 0)

    def evict(self, mask: Array, *, fold: bool = False) -> list[int]:
        """Frees slots.

        Args:
            mask: boolean `[kv_heads, slots]`, True where the row goes.
            fold: whether the rows enter their head's mean row first.

        Returns:
            How many rows each head gave up.

        Raises:
            TypeError: no boolean array.
            ValueError: another shape, or a slot without a row; nothing has changed then.

        Cost:
            A few bytes per slot, and with `fold` one pass over the rows that go.
        """
        return self._handle.evict(_flags(mask, "mask", (self.kv_heads, self.slots)), flag(fold, "fold"))

    def attend(
        self,
        q: Array,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Array | None = None,
        within: Array | None = None,
        bias: Array | None = None,
        weights: str | None = None,
        logits_of: int | None = None,
        out: Array | None = None,
    ) -> Attended:
        """Softmax attention of the last rows appended over what is kept, and over the mean rows of what was folded.

        Args:
            q: queries `[Hq, Lq, head_dim]`, those of the last `Lq` rows appended: each sees the kept rows up to its
                own position. float32, float16 or bfloat16. Query head h reads KV head `h // (Hq // kv_heads)`.
            scale: factor of the dot products; `None` is `head_dim ** -0.5`.
            softcap: `c > 0` turns each scaled logit `s` into `c * tanh(s / c)`; 0 is off.
            sinks: floating `[Hq]`; a logit of each head that takes part in the denominator only.
            within: boolean `[kv_heads, slots]`: only rows are read where it is True; `None` is everywhere.
            bias: floating `[kv_heads, slots]`, added to the logits.
            weights: "max", "mean" or "sum": also return the softmax weight of every row, over the group's query heads.
            logits_of: a query head, whose logits to return; not together with `weights`.
            out: array `[Hq, Lq, value_dim]` of the kind and dtype of `q` that receives the result.

        Returns:
            Output, log-sum-exp and what was asked for.

        Raises:
            TypeError: an argument of another kind or dtype.
            ValueError: shapes or values that do not fit, or more queries than rows appended.

        Cost:
            `Hq * (head_dim + value_dim)` multiply-adds per row read; each row is read once per query group. Weights
            come from the same pass.
        """
        qn = as_numpy(q, "q")
        check_float_storage(qn, "q")
        if qn.ndim != 3 or qn.shape[2] != self.head_dim or not qn.shape[0] or qn.shape[0] % self.kv_heads:
            expected = f"(a multiple of {self.kv_heads}, Lq, {self.head_dim})"
            raise ValueError(f"q: got shape {qn.shape}, expected {expected}")
        heads, rows, dim = qn.shape
        if rows > self.appended:
            raise ValueError(f"q: got {rows} queries, expected at most the {self.appended} rows appended")
        one_of(weights, "weights", (*REDUCTIONS, None))
        if logits_of is not None:
            logits_of = integer(logits_of, "logits_of", 0, heads - 1)
            if weights is not None:
                raise ValueError("logits_of: got a head together with weights, expected one of the two")
        shape = (self.kv_heads, self.slots)
        read = None if within is None else _flags(within, "within", shape)
        added = None
        if bias is not None:
            x = as_numpy(bias, "bias")
            check_floating(x, "bias")
            if x.shape != shape:
                raise ValueError(f"bias: got shape {x.shape}, expected {shape}")
            added = np.ascontiguousarray(x, np.float32).reshape(-1)
        result = result_array(out, q, (heads, rows, self.value_dim), qn.dtype, {"q": qn})
        lse = np.empty((heads, rows), np.float32)
        told = (self.kv_heads, rows, self.slots) if weights else (rows, self.slots) if logits_of is not None else (0,)
        observed = np.zeros(told, np.float32)
        given_sinks = None if sinks is None else per_head(sinks, "sinks", heads)
        factor, cap = scale_factor(scale, dim), softcap_value(softcap)
        if rows:
            self._handle.attend(
                qn, result, lse, factor, cap, given_sinks, read, added, weights, logits_of, observed.reshape(-1)
            )
        return Attended(
            like(q, result) if out is None else out,
            like(q, lse),
            observed if weights else None,
            observed if logits_of is not None else None,
        )

    def clear(self) -> None:
        """Forgets all rows, positions and means."""
        self._handle.clear()

    def rows(self, head: int) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]]:
        """Copies of what a KV head keeps, oldest first.

        Positions `[live]`, keys `[live, head_dim]` and values `[live, value_dim]`, in the store's dtype.

        Raises:
            TypeError: the head is no integer.
            ValueError: no such head.
        """
        head = integer(head, "head", 0, self.kv_heads - 1)
        live = self._handle.live[head]
        k, v = (np.empty((1, live, dim), self.dtype) for dim in (self.head_dim, self.value_dim))
        positions = self._handle.copy_rows(head, k, v)
        return np.array(positions, np.int64), k[0], v[0]

    def mean_row(self, head: int) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
        """Mean key `[head_dim]`, mean value `[value_dim]` and number of the rows that a KV head folded.

        Raises:
            TypeError: the head is no integer.
            ValueError: no such head.
        """
        head = integer(head, "head", 0, self.kv_heads - 1)
        key, value = np.empty(self.head_dim), np.empty(self.value_dim)
        return key, value, self._handle.copy_mean(head, key, value)

    @property
    def positions(self) -> NDArray[np.int64]:
        """Position of the row in each slot, `[kv_heads, slots]`, -1 where there is none."""
        to = np.empty(self.kv_heads * self.slots, np.int64)
        self._handle.positions(to)
        return to.reshape(self.kv_heads, self.slots)

    @property
    def appended(self) -> int:
        """Rows appended so far, kept or not: the position of the next one."""
        return self._handle.appended

    @property
    def live(self) -> list[int]:
        """Rows that each KV head keeps."""
        return self._handle.live

    @property
    def folded(self) -> list[int]:
        """Rows that each KV head folded into its mean row."""
        return self._handle.folded

    @property
    def slots(self) -> int:
        """Slots of each KV head."""
        return self._handle.slots

    @property
    def dtype(self) -> np.dtype[Any]:
        """Storage dtype."""
        return np.dtype(self._handle.dtype)

    @property
    def nbytes(self) -> int:
        """Committed bytes: per head, keys and values each in steps of 2 MiB (all slots if they take less)."""
        return self._handle.nbytes

    @property
    def live_bytes(self) -> int:
        """Bytes of the rows that are kept and of the mean rows."""
        return self._handle.live_bytes

    def __repr__(self) -> str:
        """Sizes, dtype and what is kept."""
        return (
            f"SlotStore(kv_heads={self.kv_heads}, head_dim={self.head_dim}, value_dim={self.value_dim}, "
            f"dtype={self.dtype.name!r}, slots={self.slots}, appended={self.appended}, live={self.live})"
        )


def _flags(values: Array, name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    x = as_numpy(values, name, any_strides=True)
    if x.dtype != np.bool_:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected bool")
    if x.shape != shape:
        raise ValueError(f"{name}: got shape {x.shape}, expected {shape}")
    return np.ascontiguousarray(x).view(np.uint8).reshape(-1)
