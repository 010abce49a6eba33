"""Attention through mediators: a few tokens that read all keys and that all queries read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from longattn._arrays import Array, as_numpy, reshaped
from longattn._checks import check_float_storage, dense_inputs, integer, items_of, real, scale_factor
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, numbers, odd_kernel, returned
from longattn.vision.convolution import adaptive_pool, depthwise_convolution
from longattn.vision.sample import resize

#: A bias of mediators and places: a coarse map, and a term for each row and each column.
BiasParts = tuple[Array, Array, Array]


def mediator_attention(
    q: Array,
    k: Array,
    v: Array,
    shape: Sequence[int],
    *,
    mediators: int = 49,
    t: Array | None = None,
    scale: float | None = None,
    gather_bias: BiasParts | None = None,
    spread_bias: BiasParts | None = None,
    v_kernel: Array | None = None,
) -> Array:
    """Two attentions in a row: mediators read the keys, `U = softmax(t k^T) v`, and queries read the mediators.

    The mediators are means of the queries over cells of the image, or given. What comes out is `A2 A1 v`, with
    `A2 A1` of rank `mediators` at most. Agent attention is the same.

    Args:
        q: queries `[B, h, N, D]` of the places of an image, row by row; float32, float16 or bfloat16.
        k: keys `[B, h, N, D]`; dtype as for `q`.
        v: values `[B, h, N, Dv]`; dtype of `k`.
        shape: `(H, W)` of the image; `H * W = N`.
        mediators: how many, a square number; the image is pooled to as many cells. Not used with `t`.
        t: the mediators `[B, h, m, D]`.
        scale: factor on the logits of both; `None` is `D ** -0.5`.
        gather_bias: of mediators and places: floating `[h, m, a, a]`, which is resized to `[H, W]`, `[h, m, H, 1]` and
            `[h, m, 1, W]`, added up. `None` is none.
        spread_bias: of places and mediators, likewise.
        v_kernel: floating `[k, k, h * Dv]`, odd `k`: a depth-wise convolution of the values' image that is added.

    Returns:
        `[B, h, N, Dv]`, in the kind and dtype of `q`. Float32 in between.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * N * m * (D + Dv)` multiply-adds per head: linear in `N`.

    References:
        Y. Pu et al., "Efficient Diffusion Transformer with Step-wise Dynamic Attention Mediators", 2024,
        arXiv:2408.05710.

    Example:
        >>> import numpy as np, longattn.vision
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 64, 16), dtype=np.float32)
        >>> longattn.vision.mediator_attention(q, k, v, (8, 8), mediators=9).shape
        (1, 2, 64, 16)
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    if qn.ndim != 4:
        raise ValueError(f"q: got shape {qn.shape}, expected [B, h, N, D]")
    height, width = (integer(n, "shape", 1) for n in _two(shape))
    batch, heads, places, dim = qn.shape
    if places != height * width or kn.shape[2] != places:
        raise ValueError(f"shape: got {(height, width)}, expected H * W = {places} as in q, and as many keys")
    if kn.shape[1] != heads:
        raise ValueError(f"k: got {kn.shape[1]} heads, expected {heads} as in q")
    factor = scale_factor(scale, dim)
    tokens = _mediators(qn, (height, width), mediators) if t is None else _given(t, qn.shape)
    count = tokens.shape[2]
    biases: list[Float32 | None] = []
    for parts, name in ((gather_bias, "gather_bias"), (spread_bias, "spread_bias")):
        biases.append(None if parts is None else _bias(parts, name, heads, count, (height, width)))
    kernel = None if v_kernel is None else odd_kernel(v_kernel, "v_kernel", (None, None, heads * vn.shape[3]))
    read = attention(tokens, kn, vn, scale=factor, bias=biases[0])
    spread = None if biases[1] is None else biases[1].swapaxes(1, 2)
    out = attention(np.asarray(qn, np.float32), tokens, read, scale=factor, bias=spread)
    if kernel is not None:
        image = reshaped(np.asarray(vn.swapaxes(1, 2), np.float32), batch, height, width, -1)
        local = reshaped(depthwise_convolution(image, kernel), batch, places, heads, -1)
        out = out + local.swapaxes(1, 2)
    return returned(q, out)


def mediator_schedule(step: float, segments: Sequence[tuple[float, int]]) -> int:
    """The number of mediators at a step of a diffusion, from segments `(until, mediators)` that ascend.

    Args:
        step: the step, from the noisy end; in the units of the segments.
        segments: pairs: steps below `until` have that many mediators. Late steps have those of the last.

    Returns:
        A number of mediators.

    Raises:
        TypeError: no numbers.
        ValueError: no segments, or ends that do not rise.

    Cost:
        A pass over the segments.
    """
    pairs = [items_of(pair, "segments", "pairs (until, mediators)") for pair in items_of(segments, "segments", "pairs")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"segments: got {segments!r}, expected pairs (until, mediators)")
    at, ends = real(step, "step"), [real(until, "segments") for until, _ in pairs]
    if not ends or any(b <= a for a, b in itertools.pairwise(ends)):
        raise ValueError(f"segments: got ends {ends}, expected at least one, rising")
    counts = [integer(count, "segments", 1) for _, count in pairs]
    return next((count for until, count in zip(ends, counts, strict=True) if at < until), counts[-1])


def _two(shape: Any) -> Sequence[int]:
    if not isinstance(shape, Sequence) or len(shape) != 2:
        raise TypeError(f"shape: got {shape!r}, expected a pair (H, W)")
    return shape


def _mediators(q: Any, shape: tuple[int, int], mediators: object) -> Float32:
    side = math.isqrt(integer(mediators, "mediators", 1))
    if side * side != mediators or side > min(shape):
        raise ValueError(f"mediators: got {mediators}, expected a square of at most {min(shape) ** 2}")
    batch, heads, _, dim = q.shape
    image = np.asarray(q, np.float32).reshape(batch * heads, *shape, dim)
    return adaptive_pool(image, (side, side)).reshape(batch, heads, side * side, dim)


def _given(t: Array, q: tuple[int, ...]) -> Float32:
    a = as_numpy(t, "t")
    check_float_storage(a, "t")
    if a.ndim != 4 or a.shape[:2] != q[:2] or a.shape[3] != q[3] or a.shape[2] == 0:
        raise ValueError(f"t: got shape {a.shape}, expected {(*q[:2], 'm', q[3])}")
    return np.asarray(a, np.float32)


def _bias(parts: Any, name: str, heads: int, count: int, shape: tuple[int, int]) -> Float32:
    """`[h, m, N]`."""
    if not isinstance(parts, tuple | list) or len(parts) != 3:
        raise TypeError(f"{name}: got {type(parts).__name__}, expected three arrays")
    coarse = numbers(parts[0], name, (heads, count, None, None))
    rows = numbers(parts[1], f"{name} rows", (heads, count, shape[0], 1))
    columns = numbers(parts[2], f"{name} columns", (heads, count, 1, shape[1]))
    image = np.moveaxis(coarse.reshape(1, heads * count, *coarse.shape[2:]), 1, -1)
    fine = np.moveaxis(resize(np.ascontiguousarray(image), shape), -1, 1).reshape(heads, count, *shape)
    added: Float32 = reshaped((fine + rows + columns), heads, count, -1)
    return added


METHOD = Method(
    name="mediator_attention",
    family="vision",
    title="Efficient Diffusion Transformer with Step-wise Dynamic Attention Mediators",
    year=2024,
    arxiv="2408.05710",
    function=mediator_attention,
    reference=reference.mediator_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "One mediator gives every query the same vector.",
        "Equal keys give the mean value.",
        "The matrix between values and output has rows that sum to 1, and at most the rank of the mediators.",
        "It is two calls of attention.",
    ),
    tests="tests/vision/test_mediator_attention.py",
    cost="`2 * N * m * (D + Dv)` multiply-adds per head: linear in `N`.",
)
