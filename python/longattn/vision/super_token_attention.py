"""Super token attention: places gather into a few tokens, which attend to each other and are spread back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, reshaped
from longattn._checks import integer, one_of
from longattn.dense.attention_weights import attention_weights
from longattn.methods import Method
from longattn.pictures import example
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, Weights, grid, optional_linear, projections, returned, window_sizes
from longattn.vision.convolution import mean_pool_cells
from longattn.vision.partition import attend, pad_ends, padded_to, partition, unpartition

#: What cells outside the grid are to places at its border.
BORDERS = ("mask", "zero")
#: Cells around a cell, itself included.
NEIGHBOURS = 9


def super_token_attention(
    x: Array,
    wq: Weights,
    wk: Weights,
    wv: Weights,
    *,
    heads: int,
    cell: int | Sequence[int] = 8,
    rounds: int = 1,
    border: str = "mask",
    wo: Weights | None = None,
) -> Array:
    """Attention between super tokens, one for each cell of a grid, with soft memberships of the places.

    Super tokens `S` start as means of their cells. In each round every place spreads itself over the 3 x 3 cells around
    its own, `Q = softmax(x . S / sqrt(C))`, and `S` becomes the mean of places weighted by `Q`. The super tokens attend
    to each other, and every place receives the sum of their outputs by its last `Q`. With cells of one place it is
    plain attention. An image is padded with zeros after its ends to whole cells; padding takes part.

    Args:
        x: grid `[B, H, W, C]`; float32, float16 or bfloat16.
        wq: query weights `[C, heads * D]`, or a pair `(matrix, bias)`.
        wk: key weights, likewise.
        wv: value weights `[C, heads * Dv]`, likewise.
        heads: heads.
        cell: places of a cell per axis.
        rounds: updates of the super tokens, at least 1.
        border: "mask": there are no cells outside the grid; "zero": their super tokens are zeros, which take a share of
            `Q` and give nothing, as in the published code.
        wo: output projection of the super tokens, or `None`.

    Returns:
        `[B, H, W, heads * Dv]`, or as `wo` has it, in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `9 * H * W * C * (2 * rounds + 1)` multiply-adds and attention of `H * W / cell` tokens. Memberships are kept,
        9 numbers per place.

    References:
        H. Huang et al., "Vision Transformer with Super Token Sampling", 2022, arXiv:2211.11167.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal((1, 16, 16, 16), dtype=np.float32)
        >>> wq, wk, wv = rng.standard_normal((3, 16, 16), dtype=np.float32)
        >>> longattn.vision.super_token_attention(x, wq, wk, wv, heads=2, cell=4).shape
        (1, 16, 16, 16)
    """
    xn = grid(x, "x")
    batch, height, width, channels = xn.shape
    q_of, k_of, v_of, number = projections(channels, wq, wk, wv, heads)
    sizes = window_sizes(cell, 2, "cell")
    times = integer(rounds, "rounds", 1)
    one_of(border, "border", BORDERS)
    project = optional_linear(wo, "wo", v_of.outputs)

    def between(tokens: Float32) -> Float32:
        rows = reshaped(tokens, batch, -1, channels)
        out = attend(q_of(rows), k_of(rows), v_of(rows), heads=number)
        refined = out if project is None else project(out)
        return reshaped(refined, *tokens.shape[:3], -1)

    if sizes == (1, 1):
        return returned(x, between(xn))
    padded = pad_ends(xn, padded_to((height, width), sizes))
    members, tokens = _gathered(padded, sizes, times, border == "mask")
    return returned(x, _spread(members, between(tokens), padded.shape[1:3], sizes)[:, :height, :width])


def _gathered(x: Float32, sizes: tuple[int, ...], rounds: int, masked: bool) -> tuple[Float32, Float32]:
    """Memberships of the places `[B, cells, cells, places, 9]` and super tokens `[B, cells, cells, C]`."""
    tokens = mean_pool_cells(x, sizes)
    cells = tokens.shape[1:3]
    places = partition(x, sizes).reshape(len(x), *cells, math.prod(sizes), x.shape[-1])
    outside = _around(np.ones((1, *cells, 1), np.float32))[..., 0] == 0
    for _ in range(rounds):
        members = _memberships(places, tokens, outside if masked else None)
        sums = _back(members.swapaxes(-1, -2) @ places)
        mass = _back(members.sum(axis=-2)[..., None])
        tokens = sums / (mass + np.float32(1e-12))
    return members, tokens


def _spread(members: Float32, tokens: Float32, extents: tuple[int, ...], sizes: tuple[int, ...]) -> Float32:
    """What places receive of super tokens, a grid of `extents`."""
    parts = members @ _around(tokens)
    whole: Float32 = unpartition(reshaped(parts, len(parts), -1, math.prod(sizes), parts.shape[-1]), extents, sizes)
    return whole


def _memberships(places: Float32, tokens: Float32, outside: NDArray[np.bool_] | None) -> Float32:
    """Shares of each place in the 9 cells around its own, `[B, cells, cells, places, 9]`."""
    lead, (inside, channels) = places.shape[:3], places.shape[3:]
    keys = _around(tokens).reshape(-1, 1, NEIGHBOURS, channels)
    mask = None
    if outside is not None and outside.any():
        mask = np.broadcast_to(~outside, (*lead, NEIGHBOURS)).reshape(-1, 1, 1, NEIGHBOURS)
    found = attention_weights(places.reshape(-1, 1, inside, channels), keys, range(inside), mask=mask)
    members: Float32 = found.reshape(*lead, inside, NEIGHBOURS)
    return members


def _around(tokens: NDArray[np.float32]) -> Float32:
    """Those of the 9 cells around each, zeros outside the grid, `[B, cells, cells, 9, C]`."""
    _, rows, columns, _ = tokens.shape
    wide = np.pad(tokens, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return np.stack([wide[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)], axis=3)


def _back(parts: Float32) -> Float32:
    """Sums for each cell of what places around it gave it, from `[B, cells, cells, 9, C]`."""
    batch, rows, columns, _, channels = parts.shape
    wide = np.zeros((batch, rows + 2, columns + 2, channels), np.float32)
    for n in range(NEIGHBOURS):
        i, j = divmod(n, 3)
        wide[:, i : i + rows, j : j + columns] += parts[:, :, :, n]
    return wide[:, 1:-1, 1:-1]


def _example() -> NDArray[np.bool_]:
    """Super tokens that places are members of; among each other these see all."""
    x = example(144)[0].reshape(1, 12, 12, -1)
    members, tokens = _gathered(x, (3, 3), 1, True)
    whole = _spread(members, np.eye(16, dtype=np.float32).reshape(*tokens.shape[:3], 16), (12, 12), (3, 3))
    mask: NDArray[np.bool_] = whole.reshape(144, 16) != 0
    return mask


METHOD = Method(
    name="super_token_attention",
    family="vision",
    title="Vision Transformer with Super Token Sampling",
    year=2022,
    arxiv="2211.11167",
    function=super_token_attention,
    reference=reference.super_token_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "Cells of one place give attention.",
        "Memberships sum to 1: a constant image gives a constant.",
        "More rounds change numbers, not shapes.",
        "One cell gives every place the output of its one super token.",
    ),
    tests="tests/vision/test_super_token_attention.py",
    cost="`9 * H * W * C * (2 * rounds + 1)` multiply-adds and attention of `H * W / cell` tokens.",
    mask=_example,
    axes=("places", "super tokens"),
    shown="memberships",
)
