"""Attention in windows, whose result a selective scan carries over the whole image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, reshaped
from longattn._checks import one_of
from longattn.linear.mamba_mixer import MambaWeights, checked
from longattn.linear.selective_token_channel_mixer import ORDERS, Directions, mix
from longattn.methods import Method
from longattn.pictures import changed
from longattn.reference import vision as reference
from longattn.vision._blocks import Block
from longattn.vision._inputs import Float32, grid, head_count, returned, window_sizes
from longattn.vision.partition import grouped_attention


def local_attention_mamba(
    x: Array,
    attention: tuple[Any, Any, Any, Any],
    scan: MambaWeights,
    *,
    window: int | tuple[int, int],
    heads: int,
    directions: Directions = "cross",
    bias: Array | None = None,
    scale: float | None = None,
) -> Array:
    """Attention in windows that do not overlap, then a Mamba block over all tokens in several directions.

    The paper's order of the two and its directions are not stated beyond doubt: here the block reads what the windows
    gave, and scans of all directions are added up. Norms and residuals are the caller's.

    Args:
        x: grid `[B, H, W, C]`; float32, float16 or bfloat16. Windows at its ends may be cut.
        attention: `(wq, wk, wv, wo)` of the windows, each `[C, C]`, a pair with the bias, or `None` for no change.
        scan: weights of the Mamba block, from `C` channels.
        window: places of a window along each axis.
        heads: heads of the windows.
        directions: "forward", "both" (along the rows and back) or "cross" (along the columns and back, too).
        bias: floating, broadcastable to `[heads, tokens, tokens]` of a window.
        scale: factor on the logits; `None` is `(C / heads) ** -0.5`.

    Returns:
        `[B, H, W, Co]` as the block's output projection has it, in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * H * W * tokens of a window * C` multiply-adds, the projections, and `H * W * E * N` exponentials for each
        direction: linear in the number of tokens.

    References:
        Y. Fu, C. Chen, Y. Yu, "LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and
        Mamba", 2024, arXiv:2408.02615.

    Example:
        >>> import numpy as np, longattn.vision
        >>> from longattn.linear import MambaWeights
        >>> rng = np.random.default_rng(0)
        >>> x, w = rng.standard_normal((1, 8, 8, 4), dtype=np.float32), rng.standard_normal((4, 4), dtype=np.float32)
        >>> scan = MambaWeights(w_in=w, w_dt=w, w_b=w, w_c=w, a=-np.ones((4, 4)))
        >>> longattn.vision.local_attention_mamba(x, (w, w, w, w), scan, window=4, heads=2).shape
        (1, 8, 8, 4)
    """
    xn = grid(x, "x")
    batch, height, width, channels = xn.shape
    block = Block.of(attention, "attention", channels, head_count(heads, {"x": channels}))
    layer = checked(scan, "scan", channels)
    one_of(directions, "directions", ORDERS)
    sizes = window_sizes(window, 2)
    local: Any = grouped_attention(
        block.q(xn), block.k(xn), block.v(xn), sizes, heads=block.heads, scale=scale, bias=bias
    )
    rows = np.ascontiguousarray(block.o(local).reshape(batch, height * width, channels))
    out = mix(rows, layer, ORDERS[directions], (height, width))
    return returned(x, reshaped(out, batch, height, width, -1))


def _example() -> NDArray[np.bool_]:
    """What a scan in one direction carries on from the windows; in all directions every place sees every other."""
    wq, wk, wv, w_in, w_dt, w_b, w_c = 0.5 * np.random.default_rng(0).standard_normal((7, 4, 4))
    scan = MambaWeights(w_in=w_in, w_dt=w_dt, w_b=w_b, w_c=w_c, a=np.full((4, 4), -0.01))

    def layer(x: Float32) -> Float32:
        image, local = x.reshape(1, 12, 12, 4), (wq, wk, wv, None)
        out = local_attention_mamba(image, local, scan, window=4, heads=1, directions="forward")
        return np.asarray(out).reshape(144, 4)

    return changed(layer, 144)


METHOD = Method(
    name="local_attention_mamba",
    family="vision",
    title="LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and Mamba",
    year=2024,
    arxiv="2408.02615",
    function=local_attention_mamba,
    reference=reference.local_attention_mamba,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "Steps of 0 leave the skipped part of what the windows gave.",
        "One state with constant step and weights is an exponential moving sum.",
        "A window of the whole image is attention of all places.",
    ),
    tests="tests/vision/test_local_attention_mamba.py",
    cost="`2 * H * W * tokens of a window * C` multiply-adds and a selective scan for each direction.",
    mask=_example,
    axes=("places", "places"),
    shown="scans in one direction",
)
