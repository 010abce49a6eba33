"""Selective attention of Taipan: a gate says which tokens attend, and only these are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import check_float_storage, check_floating, dense_inputs, integer, items_of, one_of, scale_factor
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.reference import linear as reference

SCOPES = ("selected", "all")

#: Keys `[Hkv, n, D]` and values `[Hkv, n, Dv]` of one sequence, the last `window - 1` that count.
State = tuple[NDArray[Any], NDArray[Any]]


def taipan_selective_attention(
    h: Array,
    q: Array,
    k: Array,
    v: Array,
    scores: Array,
    *,
    alpha: Array | None = None,
    w_o: Array | None = None,
    window: int = 2048,
    kv_scope: str = "selected",
    scale: float | None = None,
    initial_state: Sequence[State] | None = None,
) -> tuple[Array, list[State]]:
    """Tokens whose second score is the larger attend, `(1 - alpha_i) h_i + alpha_i o_i`; the others pass unchanged.

    `o_i` is causal softmax attention within a window, without positions. A call with one token and the state before it
    is the decode step; a token that is not selected costs nothing and leaves the state as it is.

    Args:
        h: hidden states `[B, L, C]`; float32, float16 or bfloat16.
        q: queries `[B, Hq, L, D]`; any of the three dtypes. Rows of tokens that are not selected are not read.
        k: keys `[B, Hkv, L, D]`; likewise.
        v: values `[B, Hkv, L, Dv]`; dtype of `k`.
        scores: floating `[B, L, 2]`: the gate's. A token is selected if its second score is larger than its first.
        alpha: floating `[B, L]`, 0 to 1; `None` is the second entry of the softmax of `scores` (the paper does not say
            which entry it is).
        w_o: floating `[Hq * Dv, C]`: projects `o`; `None` takes `Hq * Dv = C`.
        window: keys that a token sees, its own among them.
        kv_scope: "selected": keys are those of selected tokens, and the window counts these; "all": keys are all
            tokens.
        scale: factor on the logits; `None` is `D ** -0.5`.
        initial_state: the state of an earlier call with the same `window` and `kv_scope`.

    Returns:
        The new hidden states, an array like `h`, and the state: for each sequence the last `window - 1` keys and
        values that count.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `n * min(n, window) * Hq * (D + Dv)` multiply-adds for `n` selected tokens of a sequence; with "all", for all of
        its tokens. A state does not grow beyond the window.

    References:
        C. V. Nguyen et al., "Taipan: Efficient and Expressive State Space Language Models with Selective Attention",
        2024, arXiv:2410.18572.
    """
    hn = as_numpy(h, "h")
    check_float_storage(hn, "h")
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    if hn.ndim != 3 or qn.ndim != 4 or (hn.shape[0], hn.shape[1]) != (qn.shape[0], qn.shape[2]):
        raise ValueError(f"h: got shape {hn.shape}, expected [B, L, C] of queries [B, Hq, L, D], which are {qn.shape}")
    if kn.shape[2] != qn.shape[2]:
        raise ValueError(f"k: got length {kn.shape[2]}, expected {qn.shape[2]} as in q")
    batch, length, channels = hn.shape
    gate = as_numpy(scores, "scores")
    check_floating(gate, "scores")
    if gate.shape != (batch, length, 2):
        raise ValueError(f"scores: got shape {gate.shape}, expected {(batch, length, 2)}")
    gate = gate.astype(np.float32)
    span, factor = integer(window, "window", 1), scale_factor(scale, qn.shape[3])
    one_of(kv_scope, "kv_scope", SCOPES)
    shares = _shares(alpha, gate)
    width = qn.shape[1] * vn.shape[3]
    projection = None
    if w_o is not None:
        projection = as_numpy(w_o, "w_o")
        check_floating(projection, "w_o")
        projection = projection.astype(np.float32, copy=False)
    if (width, channels) != ((channels, width) if projection is None else projection.shape):
        got = f"none for {width} channels" if projection is None else f"shape {projection.shape}"
        raise ValueError(f"w_o: got {got}, expected {(width, channels)}")
    if initial_state is not None:
        initial_state = list(items_of(initial_state, "initial_state", "states"))
    if initial_state is not None and len(initial_state) != batch:
        raise ValueError(f"initial_state: got {len(initial_state)} states, expected {batch}, one per sequence")

    selected = gate[..., 1] > gate[..., 0]
    out = hn.copy()
    state: list[State] = []
    for b in range(batch):
        rows = np.flatnonzero(selected[b])
        counted = rows if kv_scope == "selected" else np.arange(length)
        keys, values = kn[b][:, counted], vn[b][:, counted]
        if initial_state is not None:
            keys, values = _after(initial_state[b], keys, values)
        if len(rows):
            queries = qn[b][:, counted]
            attended = attention(queries, keys, values, causal=True, window=(span - 1, 0), scale=factor)
            if kv_scope == "all":
                attended = attended[:, rows]
            o = attended.astype(np.float32, copy=False).swapaxes(0, 1).reshape(len(rows), width)
            if projection is not None:
                o = o @ projection
            share = shares[b, rows, None]
            out[b, rows] = (1 - share) * hn[b, rows].astype(np.float32, copy=False) + share * o
        kept = max(keys.shape[1] - (span - 1), 0)
        state.append((keys[:, kept:].copy(), values[:, kept:].copy()))
    return like(h, out), state


def _shares(alpha: Array | None, gate: NDArray[np.float32]) -> NDArray[np.float32]:
    """`alpha` of every token."""
    if alpha is None:
        found: NDArray[np.float32] = 1 / (1 + np.exp(np.clip(gate[..., 0] - gate[..., 1], -80, 80)))
        return found
    x = as_numpy(alpha, "alpha")
    check_floating(x, "alpha")
    if x.shape != gate.shape[:2]:
        raise ValueError(f"alpha: got shape {x.shape}, expected {gate.shape[:2]}")
    x = x.astype(np.float32)
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError("alpha: got numbers outside 0 to 1, expected shares")
    return x


def _after(state: State, keys: NDArray[Any], values: NDArray[Any]) -> State:
    """Keys and values behind those of a state."""
    joined: list[NDArray[Any]] = []
    for given, own, name in zip(state, (keys, values), ("keys", "values"), strict=True):
        if given.ndim != 3 or given.shape[::2] != own.shape[::2] or given.dtype != own.dtype:
            raise ValueError(
                f"initial_state: got {name} of shape {given.shape} and dtype {given.dtype}, expected "
                f"[{own.shape[0]}, n, {own.shape[2]}] and {own.dtype}"
            )
        joined.append(np.concatenate([given, own], axis=1))
    return joined[0], joined[1]


METHOD = Method(
    name="taipan_selective_attention",
    family="linear",
    title="Taipan: Efficient and Expressive State Space Language Models with Selective Attention",
    year=2024,
    arxiv="2410.18572",
    function=taipan_selective_attention,
    reference=reference.taipan_selective_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "With all tokens selected, `alpha` 1 and a wide window it is causal attention.",
        "With no token selected the hidden states are returned.",
        "Over selected tokens it is attention of the sequence without the others.",
        "A window of 1 returns the values.",
        "Steps give the rows of the whole.",
    ),
    tests="tests/linear/test_taipan_selective_attention.py",
    cost="`n * min(n, window) * Hq * (D + Dv)` multiply-adds for `n` selected tokens.",
)
