"""HaloNet's attention: blocks of queries, and keys of the block with a rim around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longattn._arrays import Array
from longattn._checks import flag, returned
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import sparse as reference
from longattn.sparse._grid import attend, grid_options
from longattn.sparse._halo import halo_inputs


def halo_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    block: int | Sequence[int] = 8,
    halo: int | Sequence[int] = 3,
    relative: Sequence[Array] | None = None,
    scale_rel: bool = False,
    mask_pad: bool = True,
    stride: int | Sequence[int] = 1,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of a block of a grid to the block's keys and those of a rim of `halo` places around it.

    The grid is a text, an image or a video: one to three axes. The logit of a query and a key that lies `d_a` behind it
    on axis `a` is `scale * q . k + q . sum_a relative[a][d_a]`, distances from `-(block + halo - 1)` to
    `block + halo - 1`. An axis that is no multiple of the block ends in a short one.

    Implementations differ in two points, for which the original is not known: whether the relative part is multiplied
    by the scale too (`scale_rel`), and whether what lies outside the grid is hidden, or zeros that take part in the
    softmax with the logit of the relative part (`mask_pad`).

    Args:
        q: queries `[B, Hq, X1.., D]`, one to three axes (the paper's images are `[B, Hq, Y, X, D]`); float32, float16
            or bfloat16.
        k: keys `[B, Hkv, X1.., D]`; any of the three dtypes.
        v: values `[B, Hkv, X1.., Dv]`; dtype of `k`.
        block: places of a block, one number or one per axis.
        halo: width of the rim, likewise.
        relative: for each axis floating `[2 (block + halo) - 1, D]`: vectors by distance, key less query; `None`: none.
        scale_rel: multiply the relative part by the scale as well.
        mask_pad: hide what lies outside the grid; else it is zeros (a padded copy of `k` and `v`).
        stride: only every `stride`-th query of each axis is computed, one number or one per axis; it divides the block.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        The output `[B, Hq, ceil(X1 / stride).., Dv]`, in the kind and dtype of `q`. With `return_lse`, the pair with
        the lse, float32 of the same shape without `Dv`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, a stride that does not divide the block, or more zeros around the grid than
            kernels count.

    Cost:
        `prod(X / stride) * prod(block + 2 * halo) * (D + Dv)` multiply-adds per query head; the relative part is one
        number per query, distance and axis.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 16, 16, 8), dtype=np.float32)
        >>> la.sparse.halo_attention(q, k, v, block=8, halo=3, stride=2).shape
        (1, 2, 8, 8, 8)
    """
    x = halo_inputs(
        q, k, v, block=block, halo=halo, relative=relative, scale_rel=scale_rel, mask_pad=mask_pad, stride=stride,
        scale=scale,
    )  # fmt: skip
    return_lse = flag(return_lse, "return_lse")
    x = x.laid_out()
    options = grid_options(x.q.shape, x.scale, 0.0, None)
    result, lse = attend(x.q, x.k, x.v, x.axes, options, bias=x.bias())
    return returned(None, q, result, lse if return_lse else None)


METHOD = Method(
    name="halo_attention",
    family="sparse",
    title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    year=2021,
    arxiv="2103.12731",
    function=halo_attention,
    reference=reference.halo_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "Without a halo it is attention inside windows.",
        "Blocks of one place are neighbourhood attention away from borders.",
        "A block as large as the grid, without a halo, is dense attention.",
        "A stride leaves out rows of the result without it.",
        "An axis of one place changes nothing.",
    ),
    tests="tests/sparse/test_halo_attention.py",
    cost="`prod(X / stride) * prod(block + 2 * halo) * (D + Dv)` multiply-adds per query head.",
    mask=lambda: seen(halo_attention, *example(144), shape=(12, 12), block=4, halo=1),
)
