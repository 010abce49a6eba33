"""`CompressedPrompt`: what a policy keeps of a prompt that is there already, judged by a sample of its queries."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import check_float_storage, size, storage
from longattn.kv.evict.policy import Mask, Policy
from longattn.kv.slot_store import SlotStore


class CompressedPrompt:
    """The rows that a policy keeps of a prompt, and all rows that come after it.

    An `EvictingCache` sees every query of the prompt. Here the prompt's keys and values are given, in a `KVStore` for
    instance, and some of its queries, which count as those of its last rows: so policies are compared on a store that
    other ways read, too.

    Args:
        policy: a fresh policy.
        k: keys `[Hkv, L, D]`; float32, float16 or bfloat16.
        v: values `[Hkv, L, Dv]`; likewise.
        queries: `[Hq, m, D]`, at most `L` of them; likewise.
        dtype: storage dtype; `None` is that of `k`.
        sinks: first rows that are kept whatever the policy says.
        window: last rows that are kept likewise.
        room: rows that may come after the prompt.
        info: what the policy wants to know of the rows.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or a policy that serves a cache already.

    Cost:
        What the policy takes to look at the sample, and a copy of the rows that it keeps.
    """

    def __init__(
        self,
        policy: Policy,
        k: Array,
        v: Array,
        queries: Array,
        *,
        dtype: DTypeLike | None = None,
        sinks: int = 0,
        window: int = 0,
        room: int = 1024,
        **info: Any,
    ) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"policy: got {type(policy).__name__}, expected a policy of longattn.kv.evict")
        if policy.taken:
            raise ValueError("policy: got one that serves a cache, expected a fresh one")
        kn, vn, qn = as_numpy(k, "k"), as_numpy(v, "v"), as_numpy(queries, "queries")
        for x, name in ((kn, "k"), (vn, "v"), (qn, "queries")):
            check_float_storage(x, name)
            if x.ndim != 3 or 0 in x.shape:
                raise ValueError(f"{name}: got shape {x.shape}, expected [heads, rows, dim], none of them 0")
        heads, length, dim = kn.shape
        if vn.shape[:2] != (heads, length):
            raise ValueError(f"v: got shape {vn.shape}, expected ({heads}, {length}, Dv)")
        if qn.shape[0] % heads or qn.shape[1] > length or qn.shape[2] != dim:
            expected = f"(a multiple of {heads}, at most {length}, {dim})"
            raise ValueError(f"queries: got shape {qn.shape}, expected {expected}")
        info = policy.check(heads, length, **info)
        policy.taken = True
        judged = policy.judge(qn, kn, vn, {}, **info)
        keep = np.ones((heads, length), bool) if judged is None else np.array(judged)
        keep[:, :sinks] = True
        keep[:, max(length - window, 0) :] = True
        self._prompt, self._keep = length, keep
        most = int(keep.sum(axis=1).max()) + size(room, "room")
        self.store = SlotStore(heads, dim, vn.shape[2], kn.dtype if dtype is None else storage(dtype), slots=most)
        self.store.append(kn, vn, keep=keep, fold=policy.residual == "mean")

    @property
    def kept(self) -> Mask:
        """Which rows of the prompt each head keeps, `[Hkv, L]`."""
        return self._keep

    @property
    def rows(self) -> list[NDArray[np.int64]]:
        """Positions of the rows of the prompt that each head keeps, ascending."""
        return [np.flatnonzero(of_head) for of_head in self._keep]

    def append(self, k: Array, v: Array) -> None:
        """Appends rows behind the prompt, `[Hkv, T, D]` and `[Hkv, T, Dv]`; all are kept.

        Raises:
            TypeError: not an array, or another dtype.
            ValueError: another shape, or more rows than there is room for.
        """
        self.store.append(k, v)

    def rewind(self) -> None:
        """Forgets what came behind the prompt."""
        later = self.store.positions >= self._prompt
        if later.any():
            self.store.evict(later)

    def attend(self, q: Array) -> Array:
        """Attention of queries `[Hq, T, D]`, those of the last `T` rows that came, over what is kept.

        Returns:
            `[Hq, T, Dv]` in the kind and dtype of `q`.

        Raises:
            TypeError: an argument of another kind or dtype.
            ValueError: shapes that do not fit.
        """
        return self.store.attend(q).out
