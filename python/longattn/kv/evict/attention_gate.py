"""Attention-Gate: a small attention over the layer's input says which rows are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like, reshaped
from longattn._checks import check_floating, flag, integer, real, shape_of
from longattn.dense.attention import attention
from longattn.kv.evict.expiry import FOREVER, as_flags, expiring_attention
from longattn.kv.evict.policy import Mask, Policy
from longattn.methods import Method
from longattn.reference import kv as reference


def attention_gate(
    x: Array, wq: Array, wk: Array, wv: Array, wo: Array, *, heads: int, tau: float = 0.5, causal: bool = False
) -> tuple[Array, Array]:
    """Keep probabilities and flags of every token for every KV head, from the input of a layer.

    `p = sigmoid(O' wo)` with `O'` the concatenated heads of a small attention over `x`; a token is kept where
    `p >= tau`. Sizes of the paper's gate are not certain; here they are those of the weights.

    Args:
        x: layer input `[B, L, E]`, or `[L, E]`; float32, float16 or bfloat16.
        wq: query weights `[E, heads * d]`, floating.
        wk: key weights, likewise.
        wv: value weights, likewise.
        wo: output weights `[heads * d, Hkv]`, floating.
        heads: heads of the gate.
        tau: threshold of the flags, 0 to 1.
        causal: whether a token's gate sees earlier tokens only; the default sees the whole prompt.

    Returns:
        Flags, bool `[B, Hkv, L]` (or `[Hkv, L]`), and `p`, float32, likewise, in the kind of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Attention of `heads` heads of width `d`, and four matrix products.
    """
    xn = as_numpy(x, "x")
    check_floating(xn, "x")
    if xn.ndim not in (2, 3) or xn.shape[-1] == 0:
        raise ValueError(f"x: got shape {xn.shape}, expected [B, L, E] or [L, E]")
    heads, tau = integer(heads, "heads", 1), real(tau, "tau")
    if not 0 <= tau <= 1:
        raise ValueError(f"tau: got {tau}, expected 0 to 1")
    if len(shape_of(wq, "wq")) != 2:
        raise ValueError(f"wq: got shape {shape_of(wq, 'wq')}, expected [{xn.shape[-1]}, width]")
    width = shape_of(wq, "wq")[1]
    shapes = {"wq": (xn.shape[-1], width), "wk": (xn.shape[-1], width), "wv": (xn.shape[-1], width)}
    weights = {}
    for name, w in (("wq", wq), ("wk", wk), ("wv", wv), ("wo", wo)):
        wn = as_numpy(w, name)
        check_floating(wn, name)
        expected = shapes.get(name, (width, wn.shape[-1] if wn.ndim == 2 else 0))
        if wn.shape != expected or 0 in wn.shape:
            raise ValueError(f"{name}: got shape {wn.shape}, expected {expected}")
        weights[name] = wn.astype(np.float32)
    if width % heads:
        raise ValueError(f"wq: got {width} columns, expected a multiple of the {heads} heads")
    rows = xn.astype(np.float32)
    q, k, v = (_heads(rows @ weights[name], heads) for name in ("wq", "wk", "wv"))
    mixed = attention(q, k, v, causal=flag(causal, "causal")).swapaxes(-3, -2).reshape(*xn.shape[:-1], width)
    logits = (mixed @ weights["wo"]).swapaxes(-1, -2)
    with np.errstate(over="ignore"):
        p = np.ascontiguousarray(1 / (1 + np.exp(-logits)), np.float32)
    return like(x, p >= tau), like(x, p)


def gated_attention(
    q: Array,
    k: Array,
    v: Array,
    flags: Array,
    *,
    keep_self: bool = True,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Array | None = None,
    return_lse: bool = False,
) -> Any:
    """Causal attention to kept keys only: query `i` sees key `j <= i` iff its flag is set, or `j` is its own.

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, L, D]`, or `[Hkv, L, D]`; likewise.
        v: values `[B, Hkv, L, Dv]`, or `[Hkv, L, Dv]`; dtype of `k`.
        flags: boolean `[B, Hkv, L]`, or `[Hkv, L]`: the keys that are kept.
        keep_self: whether a token sees itself in any case. Without it, rows before the first kept key are empty.
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
        That of `attention`: hidden scores are computed. A prompt that is compacted first costs only what is kept.

    References:
        Z. Zeng et al., "In-context KV-Cache Eviction for LLMs via Attention-Gate", 2024, arXiv:2410.12876.
    """
    last = _last_visible(as_flags(flags, "flags"), flag(keep_self, "keep_self"))
    options = {"scale": scale, "softcap": softcap, "sinks": sinks, "return_lse": return_lse}
    return expiring_attention(q, k, v, last, options, "flags")


class AttentionGate(Policy):
    """The cache of `gated_attention`: rows without a flag go after their own step.

    `EvictingCache.prefill` and `append` take `flags`, boolean `[Hkv, T]`, as `attention_gate` gives them; without them
    rows are kept (the paper does not say what becomes of generated tokens; here they stay until `regate` says
    otherwise). Steps give the rows of `gated_attention`.

    Raises:
        TypeError: flags of another kind.
    """

    def __init__(self) -> None:
        pass

    def capacity(self, prompt: int) -> None:
        """No limit: what has a flag stays."""
        return

    def check(self, kv_heads: int, rows: int, **info: Any) -> dict[str, Any]:
        """The flags of the rows."""
        unknown = set(info) - {"flags"}
        if unknown:
            raise TypeError(f"{min(unknown)}: got an argument that AttentionGate does not take, expected flags")
        if info.get("flags") is None:
            return {"flags": np.ones((kv_heads, rows), bool)}
        flags = as_flags(info["flags"], "flags")
        if flags.shape != (kv_heads, rows):
            raise ValueError(f"flags: got shape {flags.shape}, expected {(kv_heads, rows)}")
        return {"flags": flags}

    def prefill(self, q: Array, k: Array, v: Array, options: dict[str, Any], **info: Any) -> tuple[Array, Mask | None]:
        """Attention by flags; rows with flags stay."""
        flags = info["flags"]
        return expiring_attention(q, k, v, _last_visible(flags, True), options, "flags"), flags

    def judge(
        self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], options: dict[str, Any], **info: Any
    ) -> Mask | None:
        """Rows with flags."""
        flags: Mask = info["flags"]
        return flags

    def start(self, kv_heads: int, slots: int) -> None:
        """No flags."""
        super().start(kv_heads, slots)
        self.flags = np.zeros((kv_heads, slots), bool)

    def admit(self, slots: NDArray[np.int64], first: int, **info: Any) -> None:
        """Rows come with their flags."""
        super().admit(slots, first)
        self.put(self.flags, slots, info["flags"])

    def regate(self, first: int, flags: Array) -> None:
        """New flags for rows that are kept, as for a complete segment; rows without one go after the next step.

        Args:
            first: position of the first of them.
            flags: boolean `[Hkv, T]` of the rows `first` to `first + T - 1`; those that went already stay gone.

        Raises:
            TypeError: an argument of another kind.
            ValueError: another shape, or a policy whose cache is empty.
        """
        x, first = as_flags(flags, "flags"), integer(first, "first", 0)
        if not hasattr(self, "positions"):
            raise ValueError("flags: got flags for an empty cache, expected rows to have come")
        if x.ndim != 2 or x.shape[0] != len(self.positions):
            raise ValueError(f"flags: got shape {x.shape}, expected ({len(self.positions)}, T)")
        heads, slots = np.nonzero((self.positions >= first) & (self.positions < first + x.shape[1]))
        self.flags[heads, slots] = x[heads, self.positions[heads, slots] - first]

    def choose(self, step: int) -> Mask | None:
        """Rows without a flag."""
        return self.live & ~self.flags


def _heads(x: NDArray[Any], heads: int) -> NDArray[Any]:
    return reshaped(x, *x.shape[:-1], heads, -1).swapaxes(-3, -2)


def _last_visible(flags: NDArray[np.bool_], keep_self: bool) -> NDArray[np.int64]:
    own = np.arange(flags.shape[-1]) if keep_self else -1
    return np.where(flags, FOREVER, own)


METHOD = Method(
    name="attention_gate_evict",
    family="kv",
    title="In-context KV-Cache Eviction for LLMs via Attention-Gate",
    year=2024,
    arxiv="2410.12876",
    function=gated_attention,
    reference=reference.gated_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "A threshold of 0 gives causal attention.",
        "Without any flag each row gets its own value.",
        "Steps over the compacted cache give the rows of the masked prefill.",
    ),
    tests="tests/kv/test_attention_gate.py",
    cost="That of attention; a step reads the rows that are kept. 9 bytes per slot.",
)
