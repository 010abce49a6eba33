"""Agent attention: a few agents gather from the keys, and queries read the agents."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy
from longattn._checks import (
    batched,
    broadcast_scores,
    check_float_storage,
    check_floating,
    finite,
    integer,
    integers,
    result_array,
    returned,
    scale_factor,
)
from longattn.dense.attention import attention
from longattn.linear._global import inputs, map_size
from longattn.linear.focused_linear_attention import local_part
from longattn.methods import Method
from longattn.reference import linear as reference

Float32 = NDArray[np.float32]


def agent_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    agents: Array | int | tuple[int, int] = (7, 7),
    size: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
    scale: float | None = None,
    query_scale: float | None = None,
    agent_bias: Array | None = None,
    query_bias: Array | None = None,
    shortcut: float = 0.0,
    dwc_weight: Array | None = None,
    dwc_bias: Array | None = None,
    out: Array | None = None,
) -> Any:
    """`V_A = softmax_j(s A K^T + B1) V`, then `softmax_a(s2 Q A^T + B2) V_A`, `A` being a few agents.

    Agents are given, or are means of queries over the bins of a map (`size`, bins `agents`) or of the sequence (a
    number of bins).

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        agents: an array `[B, Hq, n, D]` (or `[Hq, n, D]`), any of the three dtypes; a number of bins of the sequence;
            or the bins of a map, `(rows, columns)`, which takes `size`.
        size: height and width of the map that the tokens are.
        prefix_tokens: tokens in front of the map (a class token), which are in no bin and not in the convolution.
        scale: the factor `s`; `None` is `D ** -0.5`.
        query_scale: the factor `s2`; `None` is `scale`. The training-free form for diffusion has `D ** -0.15`.
        agent_bias: `B1`, floating, broadcastable to `[B, Hq, n, Lk]`; `agent_biases` makes it.
        query_bias: `B2`, floating, broadcastable to `[B, Hq, Lq, n]`.
        shortcut: this times the values is added (0.075 in the training-free form); takes as many queries and query
            heads as keys and KV heads.
        dwc_weight: floating `[H * Dv, 1, kh, kw]`, or `[Dv, 1, kh, kw]` shared by the heads: a depthwise convolution
            of the values is added. Takes `size`, and as `shortcut`.
        dwc_bias: floating, one number per channel of `dwc_weight`.
        out: array of the result's shape, kind and dtype that receives it.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `n * Hq * (Lq + Lk) * (D + Dv)` multiply-adds; memory for `n * Hq * Dv` numbers.

    References:
        D. Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", 2023, arXiv:2312.08874.
    """
    qn, kn, vn = arrays = inputs(q, k, v)
    factor = scale_factor(scale, qn.shape[3])
    second = factor if query_scale is None else scale_factor(query_scale, qn.shape[3], "query_scale")
    direct = finite(shortcut, "shortcut")
    first = integer(prefix_tokens, "prefix_tokens", 0, min(qn.shape[2], kn.shape[2]))
    a4 = _agents(agents, qn, size, first)
    biases = []
    for bias, name, shape in (
        (agent_bias, "agent_bias", (*a4.shape[:3], kn.shape[2])),
        (query_bias, "query_bias", (*qn.shape[:3], a4.shape[2])),
    ):
        biases.append(None if bias is None else _bias(bias, name, shape))
    if direct and qn.shape[1:3] != kn.shape[1:3]:
        raise ValueError(
            f"shortcut: got {shortcut} with queries {qn.shape[1:3]}, expected as many as keys {kn.shape[1:3]}"
        )
    local = None
    if dwc_weight is not None or dwc_bias is not None:
        local = local_part(arrays, dwc_weight, dwc_bias, size, first)
    result = result_array(
        out, q, (*qn.shape[:3], vn.shape[3])[4 - len(q.shape) :], qn.dtype, {"q": qn, "k": kn, "v": vn}
    )
    out4 = batched(result, 4)
    gathered = attention(a4, kn, vn, scale=factor, bias=biases[0])
    if local is None and not direct:
        attention(qn, a4, gathered, scale=second, bias=biases[1], out=out4)
        return returned(out, q, result, None)
    wide = attention(qn, a4, gathered, scale=second, bias=biases[1]).astype(np.float32, copy=False)
    if direct:
        wide += np.float32(direct) * vn.astype(np.float32, copy=False)
    if local is not None:
        wide += local
    out4[...] = wide
    return returned(out, q, result, None)


def agent_biases(
    block: Array, rows: Array, columns: Array, size: tuple[int, int], *, first: Array | None = None
) -> Float32:
    """The bias between agents and the tokens of a map: a small map enlarged, plus one number per row and per column.

    Args:
        block: floating `[H, n, h0, w0]`, enlarged to the map by bilinear interpolation (corners not aligned).
        rows: floating `[H, n, h]`, or `[H, n, h, 1]`.
        columns: floating `[H, n, w]`, or `[H, n, 1, w]`.
        size: height and width of the map.
        first: floating `[H, n, p]`: the numbers of `p` tokens in front of the map.

    Returns:
        float32 `[H, n, p + h * w]`: the `agent_bias` of `agent_attention`; its last two axes swapped, a `query_bias`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit.

    Cost:
        `H * n * h * w` numbers.
    """
    small = as_numpy(block, "block")
    check_floating(small, "block")
    if small.ndim != 4 or 0 in small.shape:
        raise ValueError(f"block: got shape {small.shape}, expected [H, n, h0, w0]")
    height, width = map_size(size, int(np.prod(integers(size, "size", 1), dtype=np.int64)))
    heads, n = small.shape[:2]
    down, across = _interpolation(small.shape[2], height), _interpolation(small.shape[3], width)
    found = np.einsum("hnij,yi,xj->hnyx", small.astype(np.float64), down, across, optimize=True)
    for x, name, shape in ((rows, "rows", (heads, n, height, 1)), (columns, "columns", (heads, n, 1, width))):
        a = as_numpy(x, name)
        check_floating(a, name)
        if a.shape not in (shape, (heads, n, max(shape[2:]))):
            raise ValueError(f"{name}: got shape {a.shape}, expected {shape}")
        found += a.astype(np.float64).reshape(shape)
    flat = found.reshape(heads, n, height * width)
    if first is not None:
        a = as_numpy(first, "first")
        check_floating(a, "first")
        if a.ndim != 3 or a.shape[:2] != (heads, n):
            raise ValueError(f"first: got shape {a.shape}, expected [{heads}, {n}, tokens]")
        flat = np.concatenate([a.astype(np.float64), flat], axis=2)
    whole: Float32 = flat.astype(np.float32)
    return whole


def pooled_agents(q: NDArray[Any], bins: tuple[int, int], size: tuple[int, int], first: int = 0) -> Float32:
    """Means of queries `[B, H, first + h * w, D]` over bins of the map, `i h // m` to `ceil((i + 1) h / m)`."""
    batch, heads, _, dim = q.shape
    lists = []
    for y in range(bins[0]):
        top, bottom = y * size[0] // bins[0], -(-(y + 1) * size[0] // bins[0])
        for x in range(bins[1]):
            left, right = x * size[1] // bins[1], -(-(x + 1) * size[1] // bins[1])
            rows = np.arange(top, bottom)[:, None] * size[1] + np.arange(left, right)
            lists.append(rows.reshape(-1) + first)
    bounds = np.concatenate([[0], np.cumsum([len(rows) for rows in lists])]).astype(np.int64)
    means: Float32 = _core.listed_means(q, bounds, np.concatenate(lists).astype(np.uint32))
    return means.reshape(batch, heads, len(lists), dim)


def _bias(bias: Array, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """A bias as float32 of this shape."""
    x = as_numpy(bias, name, any_strides=True)
    check_floating(x, name)
    return broadcast_scores(x.astype(np.float32, copy=False), name, shape)


def _agents(agents: Any, q: NDArray[Any], size: tuple[int, int] | None, first: int) -> NDArray[Any]:
    """Agents `[B, Hq, n, D]`, float32."""
    tokens = q.shape[2] - first
    if isinstance(agents, tuple | list):
        if len(agents) != 2:
            raise ValueError(f"agents: got {agents!r}, expected bins (rows, columns), a number, or an array")
        rows, columns = (integer(n, "agents", 1) for n in agents)
        if size is None:
            raise ValueError("size: got None with agents that are bins of a map, expected its height and width")
        whole = map_size(size, tokens, "queries")
        if rows > whole[0] or columns > whole[1]:
            raise ValueError(f"agents: got {rows} x {columns} bins, expected at most the map's {whole[0]} x {whole[1]}")
        return pooled_agents(q, (rows, columns), whole, first)
    if not hasattr(agents, "shape"):
        return pooled_agents(q, (1, integer(agents, "agents", 1, tokens)), (1, tokens), first)
    a = as_numpy(agents, "agents")
    check_float_storage(a, "agents")
    a4 = a[None] if a.ndim == 3 else a
    if a4.ndim != 4 or a4.shape[:2] != q.shape[:2] or a4.shape[3] != q.shape[3] or a4.shape[2] == 0:
        raise ValueError(f"agents: got shape {a.shape}, expected [{q.shape[0]}, {q.shape[1]}, n, {q.shape[3]}]")
    return a4.astype(np.float32, copy=False)


def _interpolation(small: int, large: int) -> NDArray[np.float64]:
    """The matrix `[large, small]` of linear interpolation, corners not aligned."""
    at = np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0, None)
    low = np.minimum(at.astype(np.int64), small - 1)
    high = np.minimum(low + 1, small - 1)
    share = at - low
    matrix = np.zeros((large, small))
    np.add.at(matrix, (np.arange(large), low), 1 - share)
    np.add.at(matrix, (np.arange(large), high), share)
    return matrix


METHOD = Method(
    name="agent_attention",
    family="linear",
    title="Agent Attention: On the Integration of Softmax and Linear Attention",
    year=2023,
    arxiv="2312.08874",
    function=agent_attention,
    reference=reference.agent_attention,
    exact=True,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=True,
    step=False,
    checks=(
        "Equal values return that value.",
        "With one agent every query gets what it gathered.",
        "It is linear attention with the softmax over agents and that over keys as features.",
        "The order of the agents does not matter.",
    ),
    tests="tests/linear/test_agent_attention.py",
    cost="`n * Hq * (Lq + Lk) * (D + Dv)` multiply-adds.",
)
