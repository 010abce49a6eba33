"""A prefix of global tokens, which attend to all and which all attend to, and windows for the others."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import batched, dense_inputs, flag, integer, returned, scale_factor
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._lengths import sequence_lengths
from longattn.sparse.transient_global_attention import centred_table


def prefix_global_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    prefix: int | Array,
    radius: int = 127,
    causal: bool = False,
    relative_bias: Array | None = None,
    lengths: Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of an encoder whose first tokens are global: they see all tokens, and all tokens see them.

    Every other token sees the prefix and the tokens within `radius` of it, in one softmax. The prefix is chosen by
    the structure of the text (title, headings, images), which stands first.

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, L, D]`, or `[Hkv, L, D]`; any of the three dtypes.
        v: values `[B, Hkv, L, Dv]`, or `[Hkv, L, Dv]`; dtype of `k`.
        prefix: global tokens, one number or integers `[B]` (`[1]` without a batch axis); 512 in the paper.
        radius: how far the others see to either side.
        causal: no token sees those after it. The prefix is then that of a prompt, kept for good, as sinks are.
        relative_bias: floating `[Hq, 2 * n + 1]`: entry `n + d`, or the nearest there is, is added to the logit of the
            key at distance `d` after the query; `longattn.sparse.t5_relative_table` makes it of T5's buckets.
        lengths: tokens of each sequence, integers `[B]`; those after them are padding, which no token sees and whose
            output is 0. `None`: all are tokens.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        The output `[B, Hq, L, Dv]` (or `[Hq, L, Dv]`) in the kind and dtype of `q`; with `return_lse` the pair with
        lse, float32 without the last axis.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `Hq * (G * L + (L - G) * (G + 2 * radius + 1)) * (D + Dv)` multiply-adds, `G` being the prefix. Beside the
        output a float32 copy of the queries and of the part that comes from the prefix.

    References:
        A. Burns et al., "A Suite of Generative Tasks for Multi-Level Multimodal Webpage Understanding", 2023,
        arXiv:2305.03668.

    Example:
        >>> import numpy as np, longattn.sparse
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 4, 200, 16), dtype=np.float32)
        >>> longattn.sparse.prefix_global_attention(q, k, v, prefix=16, radius=20).shape
        (4, 200, 16)
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    heads, rows, dim = qn.shape[-3:]
    if kn.shape[-2] != rows:
        raise ValueError(f"k: got length {kn.shape[-2]}, expected {rows} as in q")
    q4, k4, v4 = (batched(x, 4) for x in (qn, kn, vn))
    batch = len(q4)
    tokens = sequence_lengths(lengths, batch, rows)
    first = np.minimum(_prefixes(prefix, batch), tokens)
    far, hidden = integer(radius, "radius", 0), flag(causal, "causal")
    factor, return_lse = scale_factor(scale, dim), flag(return_lse, "return_lse")
    table = None if relative_bias is None else centred_table(relative_bias, "relative_bias", heads)
    out = np.zeros((batch, heads, rows, v4.shape[3]), qn.dtype)
    lse = np.full((batch, heads, rows), -np.inf, np.float32)
    for count, length in sorted(set(zip(first.tolist(), tokens.tolist(), strict=True))):
        chosen = np.flatnonzero((first == count) & (tokens == length))
        # One sequence alone, or all of them, is a view.
        of = slice(None) if len(chosen) == batch else chosen
        one = _one(q4[of, :, :length], k4[of, :, :length], v4[of, :, :length], count, far, hidden, table, factor)
        out[of, :, :length], lse[of, :, :length] = one
    if qn.ndim == 3:
        out, lse = out[0], lse[0]
    return returned(None, q, out, lse if return_lse else None)


def _one(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    prefix: int,
    radius: int,
    causal: bool,
    table: NDArray[np.float32] | None,
    scale: float,
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Sequences of one length with as many global tokens; `table` has its zero in the middle."""
    length = q.shape[2]
    out, lse = np.empty((*q.shape[:3], v.shape[3]), q.dtype), np.empty(q.shape[:3], np.float32)
    zero = 0 if table is None else table.shape[1] // 2

    def bias(queries: int, keys: int, position: int) -> dict[str, Any]:
        """The bias where the first query is at `position` among the keys, though the last counts as the last key."""
        if table is None:
            return {}
        # A query at `position + i` counts as one at `keys - queries + i`.
        shift = keys - queries - position
        entries = np.clip(zero + shift + np.arange(1 - queries - keys, queries + keys), 0, table.shape[1] - 1)
        return {"relative_bias": table[:, entries], "relative_zero": queries + keys - 1}

    if prefix:
        seen = prefix if causal else length
        out[:, :, :prefix], lse[:, :, :prefix] = attention(
            q[:, :, :prefix], k[:, :, :seen], v[:, :, :seen],
            causal=causal, scale=scale, return_lse=True, **bias(prefix, seen, 0),
        )  # fmt: skip
    if length > prefix:
        # The softmax goes on from the prefix, whose part is therefore not rounded to the dtype of q.
        rest, state = q[:, :, prefix:], None
        if prefix:
            wide = rest.astype(np.float32)
            more = bias(length - prefix, prefix, prefix)
            state = attention(wide, k[:, :, :prefix], v[:, :, :prefix], scale=scale, return_lse=True, **more)
        out[:, :, prefix:], lse[:, :, prefix:] = attention(
            rest, k[:, :, prefix:], v[:, :, prefix:],
            window=(radius, 0 if causal else radius), scale=scale, state=state, return_lse=True,
            **bias(length - prefix, length - prefix, 0),
        )  # fmt: skip
    return out, lse


def _prefixes(prefix: int | Array, batch: int) -> NDArray[np.int64]:
    """Global tokens of each sequence."""
    if not hasattr(prefix, "shape"):
        return np.full(batch, integer(prefix, "prefix", 0))
    x = as_numpy(prefix, "prefix", any_strides=True)
    if x.dtype.kind not in "iu":
        raise TypeError(f"prefix: got dtype {x.dtype}, expected integers")
    if x.shape != (batch,) or (x.size and x.min() < 0):
        raise ValueError(f"prefix: got {x.tolist()}, expected {batch} numbers of at least 0")
    return x.astype(np.int64)


METHOD = Method(
    name="prefix_global_attention",
    family="sparse",
    title="A Suite of Generative Tasks for Multi-Level Multimodal Webpage Understanding",
    year=2023,
    arxiv="2305.03668",
    function=prefix_global_attention,
    reference=reference.prefix_global_attention,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "A prefix of everything is dense attention, and so is a radius as large as the length.",
        "Without a prefix it is attention with a window.",
        "Causal, it is attention to sinks and a window.",
        "A sequence among others of other lengths and prefixes is that sequence alone.",
    ),
    tests="tests/sparse/test_prefix_global_attention.py",
    cost="`Hq * (G * L + (L - G) * (G + 2 * radius + 1)) * (D + Dv)` multiply-adds, `G` being the prefix.",
    mask=lambda: seen(prefix_global_attention, *example(), prefix=16, radius=12),
)
