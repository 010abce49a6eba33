"""Dilated neighbourhood attention, and the dilations that DiNAT gives its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longattn._arrays import Array
from longattn._checks import integer, integers, shape_of
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._grid import per_axis
from longattn.sparse.generalized_neighborhood_attention import generalized_neighborhood_attention


def dilated_neighborhood_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    window: int | tuple[int, ...] = 7,
    dilation: int | tuple[int, ...] = 1,
    bias: Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of tokens on a grid to the `window` nearest tokens along each axis, `dilation` apart.

    Token `x` sees tokens of its group `x % dilation` only: those around it, or at a border the first or last `window`
    of the group. Where the dilation does not divide the length, the first groups have one token more; nothing is
    padded. Windows are odd, for a token to be in the middle of its own.

    Args:
        q: queries `[B, Hq, X1.., D]`, one to three axes; float32, float16 or bfloat16.
        k: keys `[B, Hkv, X1.., D]`; any of the three dtypes.
        v: values `[B, Hkv, X1.., Dv]`; dtype of `k`.
        window: tokens of a window along each axis, odd.
        dilation: distance between neighbouring tokens of a window; `window * dilation` is at most the length.
        bias: floating `[Hq, 2 w1 - 1, ..]`, added to the logits: entry `key - query + w - 1` along each axis, in units
            of the dilation.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        The output `[B, Hq, X1.., Dv]`, in the kind and dtype of `q`. With `return_lse`, the pair with the lse, float32
        `[B, Hq, X1..]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: an even window, shapes that do not fit, or a window times its dilation that is longer than the axis.

    Cost:
        As `generalized_neighborhood_attention`; the dilation costs nothing.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 9, 9, 16), dtype=np.float32)
        >>> la.sparse.dilated_neighborhood_attention(q, k, v, window=3, dilation=3).shape
        (1, 2, 9, 9, 16)
    """
    odd_windows(window, max(len(shape_of(q, "q")) - 3, 1))
    return generalized_neighborhood_attention(
        q, k, v, window=window, dilation=dilation, bias=bias, scale=scale, return_lse=return_lse
    )


def odd_windows(window: object, axes: int) -> tuple[int, ...]:
    """One odd size per axis."""
    sizes = per_axis(window, "window", axes, 1)
    for a, size in enumerate(sizes):
        if size % 2 == 0:
            raise ValueError(f"window: got {size} on axis {a}, expected an odd number")
    return sizes


def dinat_dilations(depth: int, length: int, *, window: int = 7, dilation: int | None = None) -> tuple[int, ...]:
    """Dilations of the layers of a DiNAT stage: 1 and the stage's own by turns.

    Args:
        depth: layers of the stage.
        length: tokens along the shorter axis.
        window: tokens of a window.
        dilation: the stage's dilation; `None` is the largest, `length // window`, with which a window spans the axis.

    Returns:
        One dilation per layer.

    Raises:
        TypeError: an argument that is no integer.
        ValueError: an even window, one that is longer than the axis, or a dilation that is too large for it.
    """
    depth, length = integer(depth, "depth", 0), integer(length, "length", 1)
    (size,) = odd_windows(integer(window, "window", 1), 1)
    if size > length:
        raise ValueError(f"window: got {size}, expected at most the length {length}")
    own = length // size if dilation is None else integer(dilation, "dilation", 1, length // size)
    return tuple(own if layer % 2 else 1 for layer in range(depth))


def receptive_field(dilations: Sequence[int], *, window: int = 7) -> int:
    """How many tokens along an axis reach a token through layers of these dilations, away from borders.

    Each layer adds `dilation * (window - 1)`: with a dilation of 1 it grows linearly, with those of `window ** layer`
    as `window ** layers`.

    Args:
        dilations: one per layer.
        window: tokens of a window.

    Returns:
        Tokens from the first to the last that is reached.

    Raises:
        TypeError: an argument that is no integer.
        ValueError: an even window, or a dilation below 1.
    """
    (size,) = odd_windows(integer(window, "window", 1), 1)
    return 1 + sum(integers(dilations, "dilations", 1)) * (size - 1)


METHOD = Method(
    name="dilated_neighborhood_attention",
    family="sparse",
    title="Dilated Neighborhood Attention Transformer",
    year=2022,
    arxiv="2209.15001",
    function=dilated_neighborhood_attention,
    reference=reference.dilated_neighborhood_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "A dilation of 1 is neighbourhood attention.",
        "A window that spans the axis, where the dilation divides it, is dense attention inside residue classes.",
        "A window of 1 gives the values.",
        "Permuting whole residue classes permutes the result.",
    ),
    tests="tests/sparse/test_dilated_neighborhood_attention.py",
    cost="About `2 * prod(X) * prod(window) * (D + Dv)` multiply-adds per query head, whatever the dilation.",
    mask=lambda: seen(dilated_neighborhood_attention, *example(144), shape=(12, 12), window=3, dilation=3),
)
