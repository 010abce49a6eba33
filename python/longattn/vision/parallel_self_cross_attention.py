"""Self- and cross-attention of two sets of descriptors side by side, and pooling by the attention they receive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import check_floating, flag, integer, real, scale_factor
from longattn.dense.prob_reduce import prob_reduce
from longattn.methods import Method
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, Linear, Weights, features, projections, returned
from longattn.vision.partition import attend


def parallel_self_cross_attention(
    a: Array,
    b: Array,
    wq: Weights,
    wk: Weights,
    wv: Weights,
    fuse: Sequence[Weights],
    *,
    heads: int,
    update: Sequence[Weights] | None = None,
    scale: float | None = None,
) -> tuple[Array, Array]:
    """Both sets attend to themselves and to each other with one set of projections; a network fuses the two results.

    `m_aa = attention(q_a, k_a, v_a)`, `m_ab = attention(q_a, k_b, v_b)`, `f = fuse([m_aa ; m_ab])` and
    `a + update([a ; f])`; the same for `b`. The layers of the two networks are not stated beyond doubt: both follow
    what is passed, with a relu between layers.

    Args:
        a: descriptors `[B, N, C]`; float32, float16 or bfloat16.
        b: descriptors of the other image `[B, M, C]`.
        wq: query weights `[C, heads * D]`, or a pair `(matrix, bias)`.
        wk: key weights, likewise.
        wv: value weights `[C, heads * Dv]`, likewise.
        fuse: layers from `2 * heads * Dv` channels.
        heads: heads.
        update: layers from `C` and what `fuse` gives to `C`; `None` adds what `fuse` gives, of `C` channels then.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        New descriptors `[B, N, C]` and `[B, M, C]`, in the kinds and dtypes of `a` and `b`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `(N + M) ** 2 * heads * (D + Dv)` multiply-adds, and the projections, once for both attentions.

    References:
        X. Lu et al., "ParaFormer: Parallel Attention Transformer for Efficient Feature Matching", 2023,
        arXiv:2303.00941.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> a, b = (rng.standard_normal((1, n, 8), dtype=np.float32) for n in (10, 12))
        >>> wq, wk, wv = rng.standard_normal((3, 8, 8), dtype=np.float32)
        >>> fuse = [rng.standard_normal((16, 8), dtype=np.float32)]
        >>> x, y = longattn.vision.parallel_self_cross_attention(a, b, wq, wk, wv, fuse, heads=2)
        >>> x.shape, y.shape
        ((1, 10, 8), (1, 12, 8))
    """
    an = features(a, "a", 3, "[B, N, C]")
    channels = an.shape[-1]
    bn = features(b, "b", 3, "[B, M, C]", (len(an), None, channels))
    q_of, k_of, v_of, number = projections(channels, wq, wk, wv, heads)
    fused = _layers(fuse, "fuse", 2 * v_of.outputs, None if update is not None else channels)
    updated = None if update is None else _layers(update, "update", channels + fused[-1].outputs, channels)
    factor = scale_factor(scale, q_of.outputs // number)
    (q, k, v), (q2, k2, v2) = ((q_of(x), k_of(x), v_of(x)) for x in (an, bn))
    new = []
    for x, queries, own, other in ((an, q, (k, v), (k2, v2)), (bn, q2, (k2, v2), (k, v))):
        both = [attend(queries, *rows, heads=number, scale=factor) for rows in (own, other)]
        f = _run(fused, np.concatenate(both, axis=-1))
        new.append(x + (f if updated is None else _run(updated, np.concatenate([x, f], axis=-1))))
    return returned(a, new[0]), returned(b, new[1])


def wave_position_encoding(
    x: Array, positions: Array, amplitude: Sequence[Weights], phase: Sequence[Weights], combine: Sequence[Weights]
) -> Array:
    """`x + combine([a * cos(t) ; a * sin(t)])`, amplitudes `a = amplitude(x)` and phases `t = phase(positions)`.

    Args:
        x: descriptors `[B, N, C]`; float32, float16 or bfloat16.
        positions: floating `[B, N, P]`.
        amplitude: layers from `C` channels, with a relu between layers.
        phase: layers from `P` numbers to as many channels.
        combine: layers from twice as many channels to `C`.

    Returns:
        Descriptors in the shape, kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        The layers' multiply-adds, and a sine and a cosine per descriptor and channel.
    """
    xn = features(x, "x", 3, "[B, N, C]")
    at = as_numpy(positions, "positions")
    check_floating(at, "positions")
    if at.ndim != 3 or at.shape[:2] != xn.shape[:2]:
        raise ValueError(f"positions: got shape {at.shape}, expected {xn.shape[:2]} and P")
    amplitudes = _layers(amplitude, "amplitude", xn.shape[-1])
    width = amplitudes[-1].outputs
    phases = _layers(phase, "phase", at.shape[-1], width)
    last = _layers(combine, "combine", 2 * width, xn.shape[-1])
    a, t = _run(amplitudes, xn), _run(phases, np.asarray(at, np.float32))
    return returned(x, xn + _run(last, np.concatenate([a * np.cos(t), a * np.sin(t)], axis=-1)))


def attentional_pool(
    x: Array, q: Array, k: Array, *, ratio: float, gate: bool = False, scale: float | None = None
) -> tuple[Array, NDArray[np.int64]]:
    """The descriptors that receive the most attention, in their order.

    A descriptor's score is its column's sum of the attention weights, averaged over heads and times the number of
    keys, less 1: 0 for uniform weights. How the paper normalises it is not stated beyond doubt.

    Args:
        x: descriptors `[B, N, C]`; float32, float16 or bfloat16.
        q: queries `[B, Hq, Lq, D]`; any of the three dtypes.
        k: keys `[B, Hkv, N, D]` of the descriptors.
        ratio: share that is kept, rounded, at least one; above 0 and at most 1.
        gate: multiply descriptors by the sigmoid of their scores.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        Descriptors `[B, K, C]` in the kind and dtype of `x`, and their numbers, int64 `[B, K]`, ascending; of equal
        scores the first is kept.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * Hq * Lq * N * D` multiply-adds and a sort.
    """
    xn = features(x, "x", 3, "[B, N, C]")
    share = real(ratio, "ratio")
    if not 0 < share <= 1:
        raise ValueError(f"ratio: got {ratio}, expected above 0 and at most 1")
    gated, total = flag(gate, "gate"), xn.shape[1]
    reduced = prob_reduce(q, k, column_mass=True, scale=scale)
    mass = np.asarray(reduced.column_mass)
    if mass.ndim != 3 or (mass.shape[0], mass.shape[2]) != xn.shape[:2]:
        raise ValueError(f"k: got weights of {mass.shape}, expected batch {len(xn)} and {total} keys as descriptors")
    rows = max(as_numpy(q, "q").shape[-2], 1)
    score = mass.mean(axis=1) * np.float32(total / rows) - np.float32(1)
    count = max(1, round(share * total)) if total else 0
    kept = np.sort(np.argsort(-score, axis=1, kind="stable")[:, :count], axis=1)
    rows_kept = np.take_along_axis(xn, kept[..., None], axis=1)
    if gated:
        rows_kept = rows_kept / (1 + np.exp(-np.take_along_axis(score, kept, axis=1)))[..., None]
    return returned(x, rows_kept), kept


def attentional_unpool(y: Array, index: Array, length: int) -> Array:
    """Rows at the places that `attentional_pool` took them from, zeros elsewhere.

    Args:
        y: `[B, K, C]`; float32, float16 or bfloat16.
        index: integers `[B, K]`, below `length`.
        length: places.

    Returns:
        `[B, length, C]` in the kind and dtype of `y`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        One copy.
    """
    yn, at = as_numpy(y, "y"), as_numpy(index, "index")
    if at.dtype.kind not in "iu":
        raise TypeError(f"index: got dtype {at.dtype}, expected integers")
    if yn.ndim != 3 or at.shape != yn.shape[:2]:
        raise ValueError(f"index: got shape {at.shape}, expected {yn.shape[:2]} as y")
    length = integer(length, "length", 0)
    if at.size and not (at.min() >= 0 and at.max() < length):
        raise ValueError(f"index: got {at.min()} to {at.max()}, expected 0 to {length - 1}, as length is {length}")
    out = np.zeros((len(yn), length, yn.shape[2]), yn.dtype)
    np.put_along_axis(out, at[..., None].astype(np.int64), yn, axis=1)
    return like(y, out)


def _layers(given: Any, name: str, inputs: int, outputs: int | None = None) -> list[Linear]:
    """A network's layers; the last has `outputs` channels."""
    if not isinstance(given, tuple | list) or not given:
        raise TypeError(f"{name}: got {type(given).__name__}, expected a sequence of layers")
    layers: list[Linear] = []
    for n, w in enumerate(given):
        wanted = outputs if n == len(given) - 1 else None
        layers.append(Linear.of(w, f"{name}[{n}]", layers[-1].outputs if layers else inputs, wanted))
    return layers


def _run(layers: list[Linear], x: Float32) -> Float32:
    for n, layer in enumerate(layers):
        x = layer(x if n == 0 else np.maximum(x, 0))
    return x


METHOD = Method(
    name="parallel_self_cross_attention",
    family="vision",
    title="ParaFormer: Parallel Attention Transformer for Efficient Feature Matching",
    year=2023,
    arxiv="2303.00941",
    function=parallel_self_cross_attention,
    reference=reference.parallel_self_cross_attention,
    exact=True,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=False,
    step=False,
    checks=(
        "Equal sets give equal results of both attentions.",
        "Pooling that keeps all changes nothing, and unpooling puts rows back in their places.",
        "A phase of zeros adds a network of the descriptors alone.",
    ),
    tests="tests/vision/test_parallel_self_cross_attention.py",
    cost="`(N + M) ** 2 * heads * (D + Dv)` multiply-adds, and the projections.",
)
