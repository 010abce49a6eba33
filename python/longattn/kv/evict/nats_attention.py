"""Neural attention search: each token has a type, which says how long it is seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import flag, integer
from longattn.kv.evict.expiry import FOREVER, expiring_attention
from longattn.kv.evict.policy import Mask, Policy
from longattn.methods import Method
from longattn.reference import kv as reference

#: The types, in the order of their logits.
GLOBAL, LOCAL, WINDOW = 0, 1, 2


def nats_types(logits: Array) -> NDArray[np.int64]:
    """Types of tokens from their logits, as inference has them.

    Args:
        logits: floating `[L, Hkv, 3]` (any leading axes): of global, local and window.

    Returns:
        Types `[Hkv, L]`: 0 global, 1 local, 2 window; ties to the first.

    Raises:
        TypeError: no array.
        ValueError: another last axis.
    """
    x = as_numpy(logits, "logits")
    if x.ndim < 2 or x.shape[-1] != 3:
        raise ValueError(f"logits: got shape {x.shape}, expected [..., L, Hkv, 3]")
    types: NDArray[np.int64] = x.argmax(axis=-1).swapaxes(-1, -2)
    return types


def nats_visibility(types: Array, window: int = 256, *, window_for_all: bool = False) -> NDArray[np.int64]:
    """The last position that sees each key: key `j` is seen from `i` iff `j <= i <= last_visible[j]`.

    A global token is seen for ever, a local one up to the next global token (that one included), a window token from
    `window` positions, its own among them.

    Args:
        types: integers `[..., L]`, 0 global, 1 local, 2 window.
        window: positions that see a window token.
        window_for_all: whether every token is seen from `window` positions at least.

    Returns:
        int64 `[..., L]`; `2**62` stands for ever.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: other types, or a window below 1.

    Cost:
        A few operations per token.
    """
    x = _types(types)
    window = _positions(window)
    j = np.arange(x.shape[-1])
    # The next global token at or after each one: the running minimum from the right.
    own = np.where(x == GLOBAL, j, FOREVER)
    upcoming = np.minimum.accumulate(own[..., ::-1], axis=-1)[..., ::-1]
    last = np.where(x == GLOBAL, FOREVER, np.where(x == LOCAL, upcoming, j + window - 1))
    return np.maximum(last, j + window - 1) if flag(window_for_all, "window_for_all") else last


def nats_attention(
    q: Array,
    k: Array,
    v: Array,
    types: Array,
    *,
    window: int = 256,
    window_for_all: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Array | None = None,
    return_lse: bool = False,
) -> Any:
    """Causal attention in which the type of each key says how long it is seen; one type map per KV head.

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, L, D]`, or `[Hkv, L, D]`; likewise.
        v: values `[B, Hkv, L, Dv]`, or `[Hkv, L, Dv]`; dtype of `k`.
        types: integers `[B, Hkv, L]`, or `[Hkv, L]`: 0 global (seen for ever), 1 local (seen up to the next global
            token, that one included), 2 window (seen from `window` positions).
        window: positions that see a window token, its own among them (256 is this library's choice).
        window_for_all: whether every token is seen from `window` positions at least.
        scale: factor of the dot products; `None` is `D ** -0.5`.
        softcap: as in `longattn.attention`.
        sinks: floating `[Hq]`, as in `longattn.attention`.
        return_lse: also return the log-sum-exp.

    Returns:
        The output, in the shape, kind and dtype of `q` (last axis `Dv`); with `return_lse` a pair with float32 lse.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        That of `attention` with `visible_until`: hidden scores are computed.

    References:
        D. Deng, M. Lindauer, "Neural Attention Search", 2025, arXiv:2502.13251.
    """
    last = nats_visibility(types, window, window_for_all=window_for_all)
    options = {"scale": scale, "softcap": softcap, "sinks": sinks, "return_lse": return_lse}
    return expiring_attention(q, k, v, last, options, "types")


class Nats(Policy):
    """The cache of `nats_attention`: rows go when their type says that no later query sees them.

    `EvictingCache.prefill` and `append` take `types`, integers `[Hkv, T]`. Steps give the rows of the prefill.

    Args:
        window: positions that see a window token.
        window_for_all: whether every token is seen from `window` positions at least.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a window below 1.
    """

    def __init__(self, window: int = 256, *, window_for_all: bool = False) -> None:
        self.window = _positions(window)
        self.window_for_all = flag(window_for_all, "window_for_all")

    def capacity(self, prompt: int) -> None:
        """No limit: global tokens stay."""
        return

    def check(self, kv_heads: int, rows: int, **info: Any) -> dict[str, Any]:
        """The types of the rows."""
        if set(info) != {"types"}:
            raise TypeError(f"types: got arguments {sorted(info)}, expected the types of the rows and nothing else")
        types = _types(info["types"])
        if types.shape != (kv_heads, rows):
            raise ValueError(f"types: got shape {types.shape}, expected {(kv_heads, rows)}")
        return {"types": types}

    def prefill(self, q: Array, k: Array, v: Array, options: dict[str, Any], **info: Any) -> tuple[Array, Mask | None]:
        """Attention by types; rows stay that the next query may see."""
        last = nats_visibility(info["types"], self.window, window_for_all=self.window_for_all)
        return expiring_attention(q, k, v, last, options, "types"), last >= k.shape[1]

    def judge(
        self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], options: dict[str, Any], **info: Any
    ) -> Mask | None:
        """Rows that the next query may see."""
        last = nats_visibility(info["types"], self.window, window_for_all=self.window_for_all)
        return np.asarray(last >= k.shape[1])

    def start(self, kv_heads: int, slots: int) -> None:
        """Nothing is seen."""
        super().start(kv_heads, slots)
        self.last_visible = np.zeros((kv_heads, slots), np.int64)
        self.local = np.zeros((kv_heads, slots), bool)

    def admit(self, slots: NDArray[np.int64], first: int, **info: Any) -> None:
        """Rows are seen as long as their types and those after them say; a global one ends all local ones before."""
        types = info["types"]
        last = nats_visibility(types, self.window, window_for_all=self.window_for_all)
        ends = types == GLOBAL
        first_global = first + ends.argmax(axis=1)[:, None]
        if self.window_for_all:
            first_global = np.maximum(first_global, self.positions + self.window - 1)
        closed = self.local & ends.any(axis=1, keepdims=True)
        self.last_visible = np.where(closed, first_global, self.last_visible)
        self.local &= ~closed
        super().admit(slots, first)
        endless = last >= FOREVER
        self.put(self.last_visible, slots, np.where(endless, FOREVER, last + first))
        self.put(self.local, slots, (types == LOCAL) & endless)

    def choose(self, step: int) -> Mask | None:
        """Rows that the next query does not see."""
        return self.live & (self.last_visible <= step)


def _positions(window: object) -> int:
    """A window; no longer than what sums with positions do not wrap around of."""
    return min(integer(window, "window", 1), FOREVER)


def _types(types: Array) -> NDArray[np.int64]:
    x = as_numpy(types, "types")
    if x.dtype.kind not in "iu":
        raise TypeError(f"types: got dtype {x.dtype}, expected integers")
    if not x.ndim:
        raise ValueError("types: got shape (), expected one for each key")
    if x.size and not (int(x.min()) >= 0 and int(x.max()) <= WINDOW):
        raise ValueError(f"types: got numbers from {x.min()} to {x.max()}, expected 0 to {WINDOW}")
    return x.astype(np.int64)


METHOD = Method(
    name="nats_attention",
    family="kv",
    title="Neural Attention Search",
    year=2025,
    arxiv="2502.13251",
    function=nats_attention,
    reference=reference.nats_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Global tokens only give causal attention.",
        "Window tokens only give a sliding window.",
        "Local tokens only, without a global one, give causal attention.",
        "Steps over the cache of live rows give the rows of the prefill.",
    ),
    tests="tests/kv/test_nats_attention.py",
    cost="That of attention; a step reads the rows that are alive. 17 bytes per slot.",
)
