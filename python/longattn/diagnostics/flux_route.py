"""Flux attention: a small router decides for a whole layer whether its attention is full or sparse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import check_float_storage, check_floating, dense_inputs, flag, function, integer
from longattn.dense.attention import attention
from longattn.kv.evict.streaming_llm import sink_window_attention
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import diagnostics as reference

#: Outputs of the router's layers, as multiples of `head_dim`; the last has two.
WIDTHS = (8, 2, 4, 1)

Attention = Callable[[Array, Array, Array], Array]


def flux_route(
    q: Array, weights: Sequence[tuple[Array, Array]], *, pool: int = 100, return_logits: bool = False
) -> Any:
    """Which sequences of a batch get full attention in a layer: 1 for full, 0 for sparse.

    The mean of the first and of the last `pool` queries, over positions and heads, goes through five linear layers:
    `D -> 8D`, SiLU, `8D -> 2D`; then `2D -> 4D`, SiLU, `4D -> D`, SiLU, `D -> 2`. The larger of the two decides, the
    first (sparse) where they are equal. Of a text of at most `2 * pool` tokens all queries count once.

    Args:
        q: queries of the prompt `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16.
        weights: five pairs `(weight [out, in], bias [out])`, floating.
        pool: positions at either end.
        return_logits: also return the two logits.

    Returns:
        Gates, int64 `[B]` (a number without a batch axis); with `return_logits` a pair with float64 `[B, 2]` (`[2]`).

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or an empty prompt.

    Cost:
        `2 * pool * Hq * D` additions and about `30 * D**2` multiply-adds for each sequence, once for a prompt.

    References:
        "Flux Attention: Context-Aware Hybrid Attention for Efficient LLMs Inference", 2026.
    """
    qn = as_numpy(q, "q")
    check_float_storage(qn, "q")
    if qn.ndim not in (3, 4) or 0 in qn.shape:
        raise ValueError(f"q: got shape {qn.shape}, expected [B, Hq, L, D] or [Hq, L, D], none of them 0")
    layers = _layers(weights, qn.shape[-1])
    pool, return_logits = integer(pool, "pool", 1), flag(return_logits, "return_logits")
    q4 = qn if qn.ndim == 4 else qn[None]
    ends = q4 if q4.shape[2] <= 2 * pool else np.concatenate([q4[:, :, :pool], q4[:, :, -pool:]], axis=2)
    x = ends.astype(np.float64).mean(axis=(1, 2))
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight.T + bias
        if i not in (1, 4):
            x = _silu(x)
    gates: NDArray[np.int64] = x.argmax(axis=-1)
    gate = gates if qn.ndim == 4 else int(gates[0])
    return (gate, x if qn.ndim == 4 else x[0]) if return_logits else gate


def routed_attention(
    q: Array,
    k: Array,
    v: Array,
    gate: Array | int,
    *,
    sparse: str | Attention = "streaming",
    full: Attention | None = None,
    sinks: int = 128,
    window: int = 4096,
) -> Array:
    """Full or sparse causal attention of each sequence of a batch, as its gate says.

    Sequences of equal gate go in one call.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`, those of the last `Lq` keys; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; likewise.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        gate: integers `[B]`, or a number for all: 1 full, 0 sparse.
        sparse: "streaming" (the first `sinks` keys and the last `window`), "window" (the last `window` keys), or a
            function of `q`, `k` and `v` with a batch axis.
        full: such a function for full attention; `None` is `longattn.attention`, causal.
        sinks: first keys of "streaming".
        window: last keys of "streaming" and "window".

    Returns:
        The output, in the shape, kind and dtype of `q` (last axis `Dv`).

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        That of the chosen operators.

    References:
        "Flux Attention: Context-Aware Hybrid Attention for Efficient LLMs Inference", 2026.
    """
    qn, kn, vn = dense_inputs(q, k, v)
    batch = qn.shape[0] if qn.ndim == 4 else 1
    gates = np.asarray(gate) if isinstance(gate, int) else as_numpy(gate, "gate")
    if gates.dtype.kind not in "iub":
        raise TypeError(f"gate: got dtype {gates.dtype}, expected integers")
    if gates.shape not in ((), (batch,)):
        raise ValueError(f"gate: got shape {gates.shape}, expected ({batch},), one for each sequence")
    if gates.size and not np.isin(gates, (0, 1)).all():
        raise ValueError(f"gate: got {gates.tolist()}, expected 0 (sparse) and 1 (full)")
    sinks, window = integer(sinks, "sinks", 0), integer(window, "window", 1)
    if isinstance(sparse, str) and sparse not in ("streaming", "window"):
        raise ValueError(f"sparse: got {sparse!r}, expected 'streaming', 'window' or a function")
    for given, name in ((sparse, "sparse"), (full, "full")):
        if given is not None and not (name == "sparse" and isinstance(given, str)):
            function(given, name)

    def few(q: Array, k: Array, v: Array) -> Array:
        if callable(sparse):
            return sparse(q, k, v)
        if sparse == "window":
            return attention(q, k, v, causal=True, window=(window - 1, -1))
        return sink_window_attention(q, k, v, sinks, window)

    def all_of_it(q: Array, k: Array, v: Array) -> Array:
        return attention(q, k, v, causal=True) if full is None else full(q, k, v)

    q4, k4, v4 = (x if x.ndim == 4 else x[None] for x in (qn, kn, vn))
    out = np.empty((*q4.shape[:-1], v4.shape[-1]), qn.dtype)
    routes = np.broadcast_to(gates.astype(bool), (batch,))
    for rows, operator in ((np.flatnonzero(~routes), few), (np.flatnonzero(routes), all_of_it)):
        if len(rows) == batch:
            out[...] = as_numpy(operator(q4, k4, v4), "out")
        elif len(rows):
            out[rows] = as_numpy(operator(q4[rows], k4[rows], v4[rows]), "out")
    return like(q, out if qn.ndim == 4 else out[0])


def _layers(weights: Any, dim: int) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    sizes = [dim, *(width * dim for width in WIDTHS), 2]
    if not isinstance(weights, list | tuple) or len(weights) != len(sizes) - 1:
        raise ValueError(f"weights: got {type(weights).__name__}, expected {len(sizes) - 1} pairs (weight, bias)")
    layers = []
    for i, pair in enumerate(weights):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise TypeError(f"weights[{i}]: got {type(pair).__name__}, expected a pair (weight, bias)")
        arrays = []
        for x, shape in zip(pair, ((sizes[i + 1], sizes[i]), (sizes[i + 1],)), strict=True):
            xn = as_numpy(x, f"weights[{i}]")
            check_floating(xn, f"weights[{i}]")
            if xn.shape != shape:
                raise ValueError(f"weights[{i}]: got shape {xn.shape}, expected {shape}")
            arrays.append(xn.astype(np.float64))
        layers.append((arrays[0], arrays[1]))
    return layers


def _silu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        gated: NDArray[np.float64] = x / (1 + np.exp(-x))
        return gated


METHOD = Method(
    name="flux_route",
    family="sparse",
    title="Flux Attention: Context-Aware Hybrid Attention for Efficient LLMs Inference",
    year=2026,
    arxiv=None,
    function=routed_attention,
    reference=reference.routed_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Gates of 1 give dense attention.",
        "Gates of 0 give the sparse operator.",
        "Rows of a mixed batch are those of each sequence alone.",
    ),
    tests="tests/diagnostics/test_flux_route.py",
    cost="That of the chosen operators; the router `2 * pool * Hq * D + 30 * D**2`, once for a prompt.",
    mask=lambda: seen(routed_attention, *example(), 0, sinks=4, window=24),
)
