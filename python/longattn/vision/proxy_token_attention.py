"""Attention through proxies: one token for each window, and windows for detail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, reshaped
from longattn._checks import flag, integer, integers
from longattn.methods import Method
from longattn.pictures import layer_seen
from longattn.reference import vision as reference
from longattn.vision._blocks import Block
from longattn.vision._inputs import Float32, grid, head_count, returned, window_sizes
from longattn.vision.partition import attend_in_groups, partition

#: Names of the four steps' weights.
STEPS = ("proxies", "spread", "window", "shifted")


def proxy_token_attention(
    x: Array,
    proxies: Any,
    spread: Any,
    *,
    heads: int,
    windows: Sequence[int],
    index: Array,
    window: Any = None,
    shifted: Any = None,
    shift: bool = True,
) -> Array:
    """Attention between one token per window, from there to all tokens, and attention in windows.

    The proxies, a member of each window, attend to each other; every token then attends to them and adds what comes
    out. Two steps of window attention follow, where their weights are given, the second in windows shifted by half
    their size; each adds its output, too. That the step from the proxies has an output projection of its own (zero at
    the start of training) is how the paper is read here.

    Args:
        x: latent tokens `[B, T, H, W, C]`, axes multiples of `windows`; float32, float16 or bfloat16. Positions
            (rotary ones, say) are to be in the tokens already.
        proxies: `(wq, wk, wv, wo)` of the proxies' attention, `[C, C]` or pairs `(matrix, bias)`; `wo` may be `None`;
            `None` for all four is attention without projections.
        spread: `(wq, wk, wv, wo)` of the step from proxies to all tokens.
        heads: heads of every step.
        windows: places of a window `(t, h, w)`.
        index: which token of its window is each window's proxy, integers `[windows]` or `[B, windows]`, in the order of
            `partition`; `window_members` draws them.
        window: `(wq, wk, wv, wo)` of the window step; `None` is no such step.
        shifted: those of the step in shifted windows; `None` is no such step.
        shift: whether the last step is shifted.

    Returns:
        The tokens in the shape, kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * (n ** 2 + N * n + 2 * N * p) * C` multiply-adds for `N` tokens in `n` windows of `p`, and the projections.

    References:
        J. Wang et al., "Qihoo-T2X: An Efficient Proxy-Tokenized Diffusion Transformer for Text-to-Any-Task", 2024,
        arXiv:2409.04005.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal((1, 2, 4, 4, 8), dtype=np.float32)
        >>> w = tuple(rng.standard_normal((4, 8, 8), dtype=np.float32))
        >>> index = longattn.vision.window_members((2, 4, 4), (1, 2, 2), seed=0)
        >>> longattn.vision.proxy_token_attention(x, w, w, heads=2, windows=(1, 2, 2), index=index).shape
        (1, 2, 4, 4, 8)
    """
    xn = grid(x, "x", 3)
    batch, channels = len(xn), xn.shape[-1]
    number = head_count(heads, {"x": channels})
    sizes = window_sizes(windows, 3, "windows")
    extents = xn.shape[1:4]
    count = _windows(extents, sizes)
    plain = (None,) * 4
    steps = [
        Block.of(plain if w is None else w, name, channels, number)
        for w, name in zip((proxies, spread, window, shifted), STEPS, strict=True)
    ]
    members = _members(index, batch, count, math.prod(sizes))
    rolled = flag(shift, "shift")
    tokens = np.take_along_axis(partition(xn, sizes), members[..., None, None], axis=2)[:, :, 0]
    seen = steps[0](tokens)
    out = xn + steps[1](reshaped(xn, batch, -1, channels), seen).reshape(xn.shape)
    for w, block, moved in ((window, steps[2], False), (shifted, steps[3], rolled)):
        if w is not None:
            out = out + _in_windows(out, block, sizes, moved)
    return returned(x, out)


def window_members(
    shape: Sequence[int], windows: Sequence[int], *, seed: int, batch: int | None = None
) -> NDArray[Any]:
    """A token drawn from each window, for `index` of `proxy_token_attention`.

    Args:
        shape: `(T, H, W)` of the tokens.
        windows: places of a window.
        seed: the same seed draws the same tokens.
        batch: draw for so many entries of a batch; `None` is one draw for all.

    Returns:
        Int64 `[windows]`, or `[batch, windows]`.

    Raises:
        TypeError: no integers.
        ValueError: windows that do not divide the shape.

    Cost:
        The result.
    """
    sizes = window_sizes(windows, 3, "windows")
    count = _windows(integers(shape, "shape", 1), sizes)
    lead = () if batch is None else (integer(batch, "batch", 0),)
    drawn = np.random.default_rng(integer(seed, "seed", 0)).integers(0, math.prod(sizes), (*lead, count))
    return np.asarray(drawn, np.int64)


def _windows(extents: tuple[int, ...], sizes: tuple[int, ...]) -> int:
    if len(extents) != len(sizes) or any(n % s for n, s in zip(extents, sizes, strict=True)):
        raise ValueError(f"windows: got {sizes}, expected divisors of {extents}")
    return math.prod(extents) // math.prod(sizes)


def _members(index: Array, batch: int, count: int, size: int) -> NDArray[np.int64]:
    a = as_numpy(index, "index")
    if a.dtype.kind not in "iu":
        raise TypeError(f"index: got dtype {a.dtype}, expected integers")
    if a.shape not in ((count,), (1, count), (batch, count)):
        raise ValueError(f"index: got shape {a.shape}, expected {(count,)} or {(batch, count)}")
    if a.size and not (int(a.min()) >= 0 and int(a.max()) < size):
        raise ValueError(f"index: got numbers from {a.min()} to {a.max()}, expected 0 to {size - 1}")
    return np.broadcast_to(a, (batch, count)).astype(np.int64)


def _in_windows(x: Float32, block: Block, sizes: tuple[int, ...], shifted: bool) -> Float32:
    """Attention in windows, or in windows shifted by half their size."""
    rolls = tuple(s // 2 if shifted and s < n else 0 for s, n in zip(sizes, x.shape[1:4], strict=True))
    return block.o(attend_in_groups(block.q(x), block.k(x), block.v(x), sizes, heads=block.heads, rolls=rolls))


def _example() -> NDArray[np.bool_]:
    """Two frames: each token sees the proxies of all windows and its own window."""
    shape, windows = (2, 8, 8), (1, 2, 4)
    index = window_members(shape, windows, seed=0)

    def layer(x: Array, wq: Float32, wk: Float32, wv: Float32) -> Array:
        w = wq, wk, wv, None
        return proxy_token_attention(x, w, w, heads=1, windows=windows, index=index, window=w)

    return layer_seen(layer, shape)


METHOD = Method(
    name="proxy_token_attention",
    family="vision",
    title="Qihoo-T2X: An Efficient Proxy-Tokenized Diffusion Transformer for Text-to-Any-Task",
    year=2024,
    arxiv="2409.04005",
    function=proxy_token_attention,
    reference=reference.proxy_token_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "In windows of one token all tokens are proxies.",
        "The same index gives the same output, and the same seed the same index.",
        "A window of everything adds the same vector to every token.",
        "Without the shift the last step is the window step again.",
    ),
    tests="tests/vision/test_proxy_token_attention.py",
    cost="`2 * (n ** 2 + N * n + 2 * N * p) * C` multiply-adds for `N` tokens in `n` windows of `p`.",
    mask=_example,
    shown="without shifted windows",
)
