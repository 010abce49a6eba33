"""`EvictingCache`: a slot store and a policy that keeps it small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import dense_inputs, one_of, per_head, scale_factor, size, softcap_value, storage
from longattn.kv.evict.policy import Policy
from longattn.kv.slot_store import SlotStore

_MOST_SLOTS = 2**32 - 1


@dataclass(frozen=True, slots=True)
class EvictionStats:
    """What an `EvictingCache` holds.

    Attributes:
        appended: rows that came.
        live: rows that each KV head keeps.
        evicted: rows that went, over all KV heads.
        folded: of those, rows that entered a mean row.
        nbytes: bytes of the rows that are kept, and of the mean rows.
        full_nbytes: bytes that all rows would take.
        policy_nbytes: bytes of what the policy keeps.
        attended: rows read by the last query, the mean of the KV heads.
    """

    appended: int
    live: list[int]
    evicted: int
    folded: int
    nbytes: int
    full_nbytes: int
    policy_nbytes: int
    attended: float


class EvictingCache:
    """Keys and values of one sequence of which a policy keeps a part.

    Every step appends rows, attends, shows the policy the weights that the kept rows received, and drops what the
    policy gives up. The last query of a step sees every row that was kept before it and its own; keys stay at their
    own (rotary) positions. A weight that is NaN counts as 0 in the policy's books.

    Args:
        policy: an object of one of the classes of `longattn.kv.evict`, fresh: its books are those of one cache.
        kv_heads: heads of keys and values.
        head_dim: width of a key.
        value_dim: width of a value; `None` is `head_dim`.
        dtype: storage dtype: float32, float16 or bfloat16.
        slots: most rows that a KV head keeps at once; `None` is what the policy needs for rows that come one at a
            time. Appending several rows at once needs slots for them all.
        room: slots beyond the prompt, where the policy sets no limit and `slots` is `None`.
        residual: "mean" folds what goes into a mean row, which stands in for it in attention as so many copies of
            it; `None` drops it (a policy may say otherwise: razor attention folds).
        scale: factor of the dot products; `None` is `head_dim ** -0.5`.
        softcap: `c > 0` turns each scaled logit `s` into `c * tanh(s / c)`; 0 is off.
        sinks: floating `[Hq]`; a logit of each query head that takes part in the denominator only.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: sizes that do not fit, or a policy that serves another cache.

    Example:
        >>> import numpy as np, longattn as la
        >>> cache = la.kv.EvictingCache(la.kv.evict.HeavyHitter(6, 2), 2, 16, dtype="float32")
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 100, 16), dtype=np.float32)
        >>> cache.prefill(q, k, v).shape
        (2, 100, 16)
        >>> cache.append(k[:, :1], v[:, :1])
        >>> cache.attend(q[:, :1]).shape, cache.stats.live
        ((2, 1, 16), [8, 8])
    """

    def __init__(
        self,
        policy: Policy,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: DTypeLike = "bfloat16",
        *,
        slots: int | None = None,
        room: int = 4096,
        residual: str | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Array | None = None,
    ) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"policy: got {type(policy).__name__}, expected a policy of longattn.kv.evict")
        if policy.taken:
            raise ValueError("policy: got one that serves another cache, expected a fresh one")
        one_of(residual, "residual", (None, "mean"))
        self._kv_heads = size(kv_heads, "kv_heads")
        self._dims = size(head_dim, "head_dim"), size(head_dim if value_dim is None else value_dim, "value_dim")
        self._dtype = storage(dtype)
        self._slots = None if slots is None else size(slots, "slots")
        self._room = size(room, "room")
        self._fold = (residual or policy.residual) == "mean"
        scale_factor(scale, self._dims[0])
        self._options: dict[str, Any] = {"scale": scale, "softcap": softcap_value(softcap)}
        if sinks is not None:
            self._options["sinks"] = per_head(sinks, "sinks", as_numpy(sinks, "sinks").size)
        self._policy = policy
        policy.taken = True
        self._store: SlotStore | None = None
        self._attended = 0.0

    def prefill(self, q: Array, k: Array, v: Array, **info: Any) -> Array:
        """Attends to a prompt, all rows at once, and keeps of it what the policy says.

        Args:
            q: queries `[Hq, L, D]`; float32, float16 or bfloat16.
            k: keys `[Hkv, L, D]`; likewise.
            v: values `[Hkv, L, Dv]`; dtype of `k`.
            info: what the policy wants to know of the rows; its class says what that is.

        Returns:
            The output `[Hq, L, Dv]`, in the kind and dtype of `q`.

        Raises:
            TypeError: an argument of another kind or dtype.
            ValueError: shapes that do not fit, an empty prompt, a cache that is not empty, or more rows to keep than
                there are slots.
        """
        qn, kn, vn = dense_inputs(q, k, v)
        if qn.ndim != 3 or (kn.shape[0], kn.shape[2], vn.shape[2]) != (self._kv_heads, *self._dims):
            expected = f"({self._kv_heads}, L, {self._dims[0]}) and ({self._kv_heads}, L, {self._dims[1]})"
            raise ValueError(f"k, v: got shapes {kn.shape} and {vn.shape}, expected {expected}")
        if qn.shape[1] != kn.shape[1] or qn.shape[1] == 0:
            raise ValueError(
                f"q: got {qn.shape[1]} rows with {kn.shape[1]} keys, expected one for each key, at least 1"
            )
        if self._store is not None:
            raise ValueError(f"prefill: got a prompt after {self._store.appended} rows, expected an empty cache")
        info = self._policy.check(self._kv_heads, qn.shape[1], **info)
        out, keep = self._policy.prefill(q, k, v, self._options, **info)
        length = qn.shape[1]
        kept = length if keep is None else int(keep.sum(axis=1).max())
        self._start(kept)
        self._enter(k, v, keep, info)
        self._attended = float(length)
        self._drop(length - 1)
        return out

    def append(self, k: Array, v: Array, **info: Any) -> None:
        """Appends the rows of a step.

        Args:
            k: keys `[Hkv, T, D]`.
            v: values `[Hkv, T, Dv]`.
            info: what the policy wants to know of the rows.

        Raises:
            TypeError: an argument of another kind or dtype.
            ValueError: shapes that do not fit, or more rows than there are free slots.
        """
        kn = as_numpy(k, "k")
        info = self._policy.check(self._kv_heads, kn.shape[1] if kn.ndim == 3 else 0, **info)
        if self._store is None:
            self._start(0)
        self._enter(k, v, None, info)

    def attend(self, q: Array) -> Array:
        """Attends from the last rows appended; then evicts.

        Args:
            q: queries `[Hq, Lq, D]` of the last `Lq` rows.

        Returns:
            The output `[Hq, Lq, Dv]`, in the kind and dtype of `q`.

        Raises:
            TypeError: an argument of another kind or dtype.
            ValueError: shapes that do not fit, more queries than rows, or several where the policy takes one.
        """
        if self._store is None:
            raise ValueError("q: got queries on an empty cache, expected rows to be appended first")
        store, policy = self._store, self._policy
        qn = as_numpy(q, "q")
        rows = qn.shape[1] if qn.ndim == 3 else 0
        if policy.single and rows > 1:
            raise ValueError(f"q: got {rows} queries, expected one: what {type(policy).__name__} reads changes by step")
        first = store.appended - rows
        watched = policy.observes
        within = policy.within(first)
        result = store.attend(
            q,
            **self._options,
            within=within,
            bias=policy.bias(),
            weights=None if watched == "logits" else watched,
            logits_of=policy.logits_of if watched == "logits" else None,
        )
        read = policy.live if within is None else within
        self._attended = float(read.sum()) / self._kv_heads
        seen = result.weights.swapaxes(0, 1) if result.weights is not None else result.logits
        if seen is not None:
            seen[np.isnan(seen)] = 0
            for row in range(rows):
                policy.observe(seen[row], first + row)
        if rows:
            self._drop(store.appended - 1)
        return result.out

    @property
    def policy(self) -> Policy:
        """The policy."""
        return self._policy

    @property
    def store(self) -> SlotStore:
        """The slot store.

        Raises:
            ValueError: nothing came yet, so that it is not made.
        """
        if self._store is None:
            raise ValueError("store: got an empty cache, expected rows to have come")
        return self._store

    @property
    def kept(self) -> list[NDArray[np.int64]]:
        """Positions of the rows that each KV head keeps, ascending."""
        if self._store is None:
            return [np.empty(0, np.int64) for _ in range(self._kv_heads)]
        return [np.sort(of_head[of_head >= 0]) for of_head in self._policy.positions]

    @property
    def stats(self) -> EvictionStats:
        """What the cache holds now."""
        row = sum(self._dims) * self._dtype.itemsize
        store = self._store
        appended = 0 if store is None else store.appended
        live = [0] * self._kv_heads if store is None else store.live
        return EvictionStats(
            appended=appended,
            live=live,
            evicted=appended * self._kv_heads - sum(live),
            folded=0 if store is None else sum(store.folded),
            nbytes=0 if store is None else store.live_bytes,
            full_nbytes=appended * self._kv_heads * row,
            policy_nbytes=self._policy.nbytes,
            attended=self._attended,
        )

    def _start(self, kept: int) -> None:
        slots = self._slots
        if slots is None:
            capacity = self._policy.capacity(kept)
            slots = kept + self._room if capacity is None else capacity
            if slots > _MOST_SLOTS:
                name = type(self._policy).__name__
                raise ValueError(f"slots: got None, which is {slots} for this {name}, expected at most {_MOST_SLOTS}")
        if kept > slots:
            raise ValueError(f"slots: got {slots}, expected at least the {kept} rows that are kept of the prompt")
        store = SlotStore(self._kv_heads, *self._dims, dtype=self._dtype, slots=slots)
        self._policy.start(self._kv_heads, slots)
        self._store = store

    def _enter(self, k: Array, v: Array, keep: NDArray[np.bool_] | None, info: dict[str, Any]) -> None:
        store = self.store
        first = store.appended
        slots = store.append(k, v, keep=keep, fold=self._fold)
        self._policy.admit(slots, first, **info)

    def _drop(self, step: int) -> None:
        mask = self._policy.choose(step)
        if mask is not None and mask.any():
            self.store.evict(mask, fold=self._fold)
            self._policy.discard(mask)
