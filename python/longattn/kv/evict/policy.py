"""What an eviction policy is: it sees weights, and says which rows go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array
from longattn.dense.attention import attention

Mask = NDArray[np.bool_]

_LATEST = np.iinfo(np.int64).max


class Policy(ABC):
    """Decides which rows of an `EvictingCache` go. One policy object serves one cache.

    The cache calls, in this order: `check` and `prefill` once for a prompt, `start`, `admit` for rows that enter their
    slots; then for every step `check`, `admit`, `within` and `bias`, `observe`, `choose` and `discard`. A step's number
    is the position of its query. A policy keeps a few numbers per slot in arrays `[kv_heads, slots]`.

    Attributes:
        observes: what `observe` is given: "max", "mean" or "sum" of the weights over a group's query heads, "logits" of
            one query head (`logits_of`), or `None`, then it is not called.
        residual: "mean" where evicted rows enter a mean row unless the cache says otherwise, else `None`.
        single: whether steps must come one query at a time, because what is read depends on the step before.
    """

    observes: str | None = None
    residual: str | None = None
    single: bool = False
    logits_of: int | None = None

    #: Whether a cache has it.
    taken: bool = False
    #: Position of the row in each slot, -1 where there is none.
    positions: NDArray[np.int64]

    @abstractmethod
    def capacity(self, prompt: int) -> int | None:
        """Most rows that a head has at once when `prompt` rows are kept of a prompt and later ones come one at a time.

        `None` has no limit.
        """

    def check(self, kv_heads: int, rows: int, **info: Any) -> dict[str, Any]:
        """What came with `rows` rows, checked, before anything is done with them.

        Raises:
            TypeError: something that this policy does not take.
        """
        if info:
            raise TypeError(f"{next(iter(info))}: got an argument that {type(self).__name__} does not take")
        return {}

    def prefill(self, q: Array, k: Array, v: Array, options: dict[str, Any], **info: Any) -> tuple[Array, Mask | None]:
        """Attends to a prompt and says which of its rows each head keeps.

        Args:
            q: queries `[Hq, L, D]` of the whole prompt.
            k: keys `[Hkv, L, D]`.
            v: values `[Hkv, L, Dv]`.
            options: `scale`, `softcap` and `sinks` of the cache.
            info: what the policy wants to know of the rows, as it came to `EvictingCache.prefill`.

        Returns:
            The output `[Hq, L, Dv]` and a boolean `[Hkv, L]`, `None` for all rows.
        """
        return attention(q, k, v, causal=True, **options), self.keep(q, k, options, **info)

    def keep(self, q: Array, k: Array, options: dict[str, Any]) -> Mask | None:
        """Which rows of a prompt each head keeps, `[Hkv, L]`; `None` is all."""
        return None

    def judge(
        self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], options: dict[str, Any], **info: Any
    ) -> Mask | None:
        """Which rows of a prompt each head keeps, `[Hkv, L]`, where only some of its queries are known.

        Args:
            q: `[Hq, m, D]`, taken for the queries of the last `m` rows.
            k: keys `[Hkv, L, D]` of the whole prompt.
            v: values `[Hkv, L, Dv]`.
            options: as of `prefill`.
            info: likewise.
        """
        return self.keep(q, k, options, **info)

    def start(self, kv_heads: int, slots: int) -> None:
        """Makes room for what is known of `slots` rows of each head."""
        self.positions = np.full((kv_heads, slots), -1, np.int64)

    def admit(self, slots: NDArray[np.int64], first: int, **info: Any) -> None:
        """Rows `first, first + 1, ...` entered `slots` `[Hkv, T]`, -1 where a head does not keep one."""
        self.put(self.positions, slots, np.broadcast_to(first + np.arange(slots.shape[1]), slots.shape))

    def within(self, step: int) -> Mask | None:
        """Which slots are read in this step, `[Hkv, slots]`; `None` is all."""
        return None

    def bias(self) -> NDArray[np.float32] | None:
        """What is added to the logits of the slots, `[Hkv, slots]`."""
        return None

    def observe(self, seen: NDArray[np.float32], step: int) -> None:
        """Takes note of a step's weights `[Hkv, slots]` (or logits `[slots]`), 0 where nothing was read."""
        raise NotImplementedError

    @abstractmethod
    def choose(self, step: int) -> Mask | None:
        """Which slots go after this step, `[Hkv, slots]`; `None` is none."""

    def discard(self, mask: Mask) -> None:
        """Rows of these slots are gone."""
        self.positions[mask] = -1

    @property
    def live(self) -> Mask:
        """Slots with rows."""
        return self.positions >= 0

    @property
    def nbytes(self) -> int:
        """Bytes of what the policy keeps."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, np.ndarray))

    @staticmethod
    def put(array: NDArray[Any], slots: NDArray[np.int64], values: Any) -> None:
        """Writes `values` `[Hkv, T]`, or one for all, to the slots of `array` `[Hkv, slots]` that rows entered."""
        if slots.shape[1] == 1 and slots.min(initial=0) >= 0:
            array[np.arange(len(slots)), slots[:, 0]] = np.broadcast_to(values, slots.shape)[:, 0]
            return
        heads, rows = np.nonzero(slots >= 0)
        array[heads, slots[heads, rows]] = np.broadcast_to(values, slots.shape)[heads, rows]


def weakest(scores: NDArray[Any], candidates: Mask, counts: NDArray[np.int64], ages: NDArray[np.int64]) -> Mask | None:
    """The `counts[h]` candidates of lowest score of each row `h`; among equals those of lower age number go first.

    Args:
        scores: numbers `[H, S]`.
        candidates: where they count, `[H, S]`, at least `counts` of them.
        counts: integers `[H]`; below 1 takes none.
        ages: integers `[H, S]`, positions of the rows.

    Returns:
        A boolean `[H, S]`, `None` where it would be all False.
    """
    most = counts.max(initial=0)
    if most <= 0:
        return None
    mask = np.zeros(scores.shape, bool)
    if most == 1:
        # The step of a full cache: one row of each head.
        low = np.where(candidates, scores, np.inf).min(axis=1, keepdims=True)
        oldest = np.where(candidates & (scores <= low), ages, _LATEST).argmin(axis=1)
        mask[np.arange(len(mask)), oldest] = counts == 1
        return mask
    for h in np.flatnonzero(counts > 0):
        at = np.flatnonzero(candidates[h])
        order = np.lexsort((ages[h, at], scores[h, at]))
        mask[h, at[order[: counts[h]]]] = True
    return mask


def best(scores: NDArray[Any], count: int) -> Mask:
    """The `count` largest of each row of scores `[..., L]`, ties to the lower index, as a boolean `[..., L]`."""
    mask = np.zeros(scores.shape, bool)
    order = np.argsort(-scores, axis=-1, kind="stable")[..., : max(count, 0)]
    np.put_along_axis(mask, order, True, axis=-1)
    return mask


def over_group(x: NDArray[Any], kv_heads: int, how: str) -> NDArray[Any]:
    """Numbers of query heads `[Hq, ...]` as one per KV head `[Hkv, ...]`: their "max", "mean" or "sum"."""
    grouped = x.reshape(kv_heads, -1, *x.shape[1:])
    reduced: NDArray[Any] = getattr(grouped, how)(axis=1)
    return reduced
