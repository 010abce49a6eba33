"""MambaMixer: selective scans along tokens, and selective scans along channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, like
from longattn._checks import items_of, one_of
from longattn.linear._channels import Float32, map_size, parameter, product, storage_rows
from longattn.linear.mamba_mixer import MambaWeights, activated, checked, scanned
from longattn.methods import Method
from longattn.reference import linear as reference

Directions = Literal["forward", "both", "cross"]
#: Orders of the scans of each choice of directions.
ORDERS = {"forward": ("forward",), "both": ("forward", "back"), "cross": ("forward", "back", "down", "up")}


def selective_token_channel_mixer(
    x: Array,
    layers: Sequence[tuple[MambaWeights, MambaWeights]],
    *,
    averaging: tuple[Array, Array, Array, Array] | None = None,
    directions: Directions = "forward",
    size: tuple[int, int] | None = None,
) -> Array:
    """Layers of a selective mixer of tokens and one of channels, whose inputs are weighted sums of earlier outputs.

    A mixer projects, convolves along its axis and scans in one or more orders, whose results are added up, gated and
    projected back. That of channels is the same on the transposed array (its rows are channels, its features the L
    tokens), forward and backward, as channels have no order. Layer `l` of 1, 2, ... reads, with `y^(0)` the input,

        x_tok(l) = sum_{i < l} a[l, i] y_tok(i) + sum_{i < l} b[l, i] y_ch(i)
        x_ch(l) = sum_{i <= l} c[l, i] y_tok(i) + sum_{i < l} d[l, i] y_ch(i)

    All orders of a mixer share one convolution, along the rows as they lie, and one set of weights, `skip` in each.

    Args:
        x: `[B, L, C]`; float32, float16 or bfloat16.
        layers: pairs of weights, of the mixer of tokens (width C, to C) and of the mixer of channels (width L, to L).
        averaging: `(a, b, c, d)`, floating `[M, M]`, `[M, M]`, `[M, M + 1]`, `[M, M]` for M layers, row `l - 1` for
            layer `l`; what lies past the sums is ignored. `None` is a plain stack: each mixer reads the one before.
        directions: orders of the scans of tokens: forward; both ways; or, of a map, both ways along its rows and both
            ways along its columns.
        size: height and width of the map, with `directions="cross"`.

    Returns:
        Output of the last mixer of channels, `[B, L, C]` in the kind and dtype of `x`. Arithmetic is float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Per layer the projections, `B * L * E * N` exponentials per order of tokens and `2 * B * C * E' * N'` for the
        channels.

    References:
        A. Behrouz, M. Santacatterina, R. Zabih, "MambaMixer: Efficient Selective State Space Models with Dual Token
        and Channel Selection", 2024, arXiv:2403.19888.
    """
    xn = storage_rows(x, "x", (None, None, None), "[B, L, C]")
    _, length, channels = xn.shape
    layers = items_of(layers, "layers", "pairs (token, channel) of MambaWeights")
    if not layers or any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in layers):
        came = [type(pair).__name__ for pair in layers]
        raise TypeError(f"layers: got {came}, expected at least one pair (token, channel) of MambaWeights")
    mixers = []
    for number, (token, channel) in enumerate(layers):
        pair = []
        for one, which, width in ((token, "token", channels), (channel, "channel", length)):
            name = f"layers[{number}] {which}"
            found = checked(one, name, width)
            columns = (found.w_in if found.w_out is None else found.w_out).shape[1]
            if columns != width:
                raise ValueError(f"{name}: got outputs of width {columns}, expected {width}")
            pair.append(found)
        mixers.append(pair)
    one_of(directions, "directions", ORDERS)
    shape = map_size(size, length, "rows of x") if directions == "cross" else None
    shares = _shares(averaging, len(mixers))
    wide = np.ascontiguousarray(xn, np.float32)
    tokens, mixed = [wide], [wide]
    for number, (token, channel) in enumerate(mixers):
        source = mixed[-1] if shares is None else _sum(shares[0][number], tokens) + _sum(shares[1][number], mixed)
        tokens.append(mix(source, token, ORDERS[directions], shape))
        source = tokens[-1] if shares is None else _sum(shares[2][number], tokens) + _sum(shares[3][number], mixed)
        across = np.ascontiguousarray(source.swapaxes(1, 2))
        mixed.append(mix(across, channel, ORDERS["both"], None).swapaxes(1, 2))
    return like(x, np.ascontiguousarray(mixed[-1]).astype(xn.dtype, copy=False))


def mix(x: Float32, layer: MambaWeights, orders: tuple[str, ...], size: tuple[int, int] | None) -> Float32:
    """Scans of rows `[B, L, C]` in several orders, added up, between the block's projections."""
    h, _ = activated(product(x, layer.w_in), layer)
    gate = None if layer.w_gate is None else product(x, layer.w_gate)
    total = np.zeros_like(h)
    for order in orders:
        total += _back(scanned(_order(h, order, size), layer, None if gate is None else _order(gate, order, size))[0],
                       order, size)  # fmt: skip
    return total if layer.w_out is None else total @ layer.w_out


def _order(x: Float32, order: str, size: tuple[int, int] | None) -> Float32:
    """Rows in another order."""
    if order in {"down", "up"} and size is not None:
        x = x.reshape(len(x), *size, x.shape[2]).swapaxes(1, 2).reshape(x.shape)
    return x[:, ::-1] if order in {"back", "up"} else x


def _back(x: Float32, order: str, size: tuple[int, int] | None) -> Float32:
    """Rows in their own order again."""
    x = x[:, ::-1] if order in {"back", "up"} else x
    if order in {"down", "up"} and size is not None:
        x = x.reshape(len(x), size[1], size[0], x.shape[2]).swapaxes(1, 2).reshape(x.shape)
    return x


def _sum(shares: NDArray[np.float32], outputs: list[Float32]) -> Float32:
    total = np.zeros_like(outputs[0])
    for share, y in zip(shares, outputs, strict=False):
        if share:
            total += share * y
    return total


def _shares(averaging: object, layers: int) -> tuple[NDArray[np.float32], ...] | None:
    if averaging is None:
        return None
    if not isinstance(averaging, tuple | list) or len(averaging) != 4:
        raise TypeError(f"averaging: got {type(averaging).__name__}, expected (a, b, c, d)")
    shapes = ((layers, layers), (layers, layers), (layers, layers + 1), (layers, layers))
    names = ("averaging[0]", "averaging[1]", "averaging[2]", "averaging[3]")
    return tuple(parameter(w, name, shape, "[M, M]") for w, name, shape in zip(averaging, names, shapes, strict=True))


METHOD = Method(
    name="selective_token_channel_mixer",
    family="recurrent",
    title="MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection",
    year=2024,
    arxiv="2403.19888",
    function=selective_token_channel_mixer,
    reference=reference.selective_token_channel_mixer,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "Without averaging it is a plain stack of mixers.",
        "Averages that pass on the mixer of tokens before are a stack of mixers of tokens.",
        "Scanning the transposed map swaps rows and columns.",
    ),
    tests="tests/linear/test_mamba_mixer.py",
    cost="Per layer the projections and a selective scan per order, along tokens and along channels.",
)
