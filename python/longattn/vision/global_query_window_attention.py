"""Window attention with queries of the windows' own places, or one block of queries for all windows."""

from __future__ import annotations

import numpy as np

from longattn._arrays import Array, reshaped
from longattn._checks import integer, scale_factor
from longattn.methods import Method
from longattn.pictures import layer_seen
from longattn.reference import vision as reference
from longattn.vision._inputs import Linear, Weights, features, grid, head_count, optional_linear, returned
from longattn.vision.partition import attend, pad_ends, padded_to, partition, unpartition
from longattn.vision.positions import optional_bias


def global_query_window_attention(
    x: Array,
    wk: Weights,
    wv: Weights,
    *,
    heads: int,
    window: int = 7,
    queries: Array | None = None,
    wq: Weights | None = None,
    wo: Weights | None = None,
    table: Array | None = None,
    scale: float | None = None,
) -> Array:
    """Attention in windows of `window` x `window` places, with global or local queries.

    Given `queries`, every window's keys and values are read by the same block of queries, which stands for the whole
    image and has no projection of its own here. Given `wq`, it is ordinary window attention, the other step of the
    paper's pair. An image is padded with zeros after its ends; padding is not seen.

    Args:
        x: grid `[B, H, W, C]`; float32, float16 or bfloat16.
        wk: key weights `[C, heads * D]`, or a pair `(matrix, bias)`.
        wv: value weights `[C, heads * Dv]`, or a pair.
        heads: heads.
        window: places of a window per axis.
        queries: the global block `[B, window ** 2, heads * D]`: any features of the image reduced to a window's
            places, floating as `x`.
        wq: query weights `[C, heads * D]`, or a pair. Exactly one of `queries` and `wq`.
        wo: output projection, or `None`.
        table: bias by the difference of places, floating `[(2 * window - 1) ** 2, heads]`; `None` is none.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        `[B, H, W, heads * Dv]`, or as `wo` has it, in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or both or none of `queries` and `wq`.

    Cost:
        `H * W * window ** 2 * heads * (D + Dv)` multiply-adds, and the projections; copies by windows, of the global
        queries too.

    References:
        A. Hatamizadeh et al., "Global Context Vision Transformers", 2022, arXiv:2206.09959.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal((1, 14, 14, 16), dtype=np.float32)
        >>> wk, wv = rng.standard_normal((2, 16, 16), dtype=np.float32)
        >>> queries = rng.standard_normal((1, 49, 16), dtype=np.float32)
        >>> longattn.vision.global_query_window_attention(x, wk, wv, heads=2, queries=queries).shape
        (1, 14, 14, 16)
    """
    xn = grid(x, "x")
    batch, height, width, channels = xn.shape
    k_of, v_of = Linear.of(wk, "wk", channels), Linear.of(wv, "wv", channels)
    number = head_count(heads, {"wk": k_of.outputs, "wv": v_of.outputs})
    side = integer(window, "window", 1)
    q_of = optional_linear(wq, "wq", channels, k_of.outputs)
    if (queries is None) == (q_of is None):
        raise ValueError("queries: got both or none of queries and wq, expected one of them")
    block = None
    if queries is not None:
        block = features(queries, "queries", 3, "[B, window ** 2, heads * D]", (batch, side * side, k_of.outputs))
    project = optional_linear(wo, "wo", v_of.outputs)
    factor = scale_factor(scale, k_of.outputs // number)
    bias = optional_bias(table, "table", (side, side), number)
    padded = pad_ends(xn, padded_to((height, width), (side, side)))
    groups = partition(padded, (side, side))
    tokens = groups.reshape(-1, side * side, channels)
    if q_of is not None:
        q = q_of(tokens)
    else:
        q = reshaped(np.broadcast_to(block[:, None], (*groups.shape[:3], k_of.outputs)), *tokens.shape[:2], -1)  # type: ignore[index]
    mask = None
    if padded.shape != xn.shape:
        inside = pad_ends(np.ones((1, height, width, 1), bool), padded.shape[1:3])
        seen = np.broadcast_to(partition(inside, (side, side))[..., 0], groups.shape[:3])
        mask = seen.reshape(-1, 1, 1, side * side)
    out = attend(q, k_of(tokens), v_of(tokens), heads=number, scale=factor, bias=bias, mask=mask)
    whole = unpartition(reshaped(out, *groups.shape[:3], -1), padded.shape[1:3], (side, side))[:, :height, :width]
    return returned(x, whole if project is None else project(whole))


METHOD = Method(
    name="global_query_window_attention",
    family="vision",
    title="Global Context Vision Transformers",
    year=2022,
    arxiv="2206.09959",
    function=global_query_window_attention,
    reference=reference.global_query_window_attention,
    exact=True,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=False,
    step=False,
    checks=(
        "One window whose projected places are the queries gives the local step.",
        "Windows that hold the same give the same.",
        "A window of the whole image is attention with the bias.",
    ),
    tests="tests/vision/test_global_query_window_attention.py",
    cost="`H * W * window ** 2 * heads * (D + Dv)` multiply-adds, and the projections.",
    mask=lambda: layer_seen(
        lambda x, wq, wk, wv: global_query_window_attention(x, wk, wv, heads=1, window=4, wq=wq), (12, 12)
    ),
)
