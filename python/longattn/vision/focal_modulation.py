"""Focal modulation: a query times gated context from convolutions of growing reach, without softmax."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array
from longattn._checks import flag
from longattn.methods import Method
from longattn.pictures import changed
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, Linear, Weights, grid, layer_norm, norm_weights, odd_kernel, returned
from longattn.vision.convolution import depthwise_convolution, gelu


def focal_modulation(
    x: Array,
    wf: Weights,
    kernels: Sequence[Array],
    wh: Weights,
    wo: Weights,
    *,
    shift: Weights | None = None,
    normalize_modulator: bool = False,
    norm: tuple[Array, Array] | None = None,
    causal: bool = False,
) -> Array:
    """Each place's query times a modulator that gathers context from near to far.

    `[q | z_0 | g] = x wf`. For each of `L` levels `z_l = gelu(convolution of z_(l-1))`, depth-wise, with growing
    kernels, and a last level is `gelu` of the mean of `z_L` over all places. With the gates `g`, numbers that go
    through no activation, the context is `sum_l g_l z_l`; the output is `(q * (context wh)) wo`.

    Args:
        x: grid `[B, X1, .., Xn, C]`, n = 1 to 3; float32, float16 or bfloat16.
        wf: weights `[C, 2 * C + L + 1]`, or a pair `(matrix, bias)`: queries, first context, gates.
        kernels: `L` arrays, floating `[k, .., k, C]`, odd `k` (the paper's grow by 2 from level to level); may be none.
        wh: weights `[C, C]`, or a pair, of the context.
        wo: output weights `[C, Co]`, or a pair.
        shift: a second projection of the context `[C, C]`, or a pair, which is added to `q * modulator`.
        normalize_modulator: divide the context by `L + 1`.
        norm: `(weight, bias)` of a layer norm before `wo`; `None` is none.
        causal: for n = 1: convolutions and the mean look back only. Ours, not the paper's.

    Returns:
        `[B, X1, .., Xn, Co]` in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `N * C * (3 * C + sum of k ** n)` multiply-adds for `N` places: linear in `N`.

    References:
        J. Yang et al., "Focal Modulation Networks", 2022, arXiv:2203.11926.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal((1, 9, 9, 8), dtype=np.float32)
        >>> wf, kernels = rng.standard_normal((8, 19)), [np.ones((3, 3, 8)), np.ones((5, 5, 8))]
        >>> longattn.vision.focal_modulation(x, wf, kernels, np.eye(8), np.eye(8)).shape
        (1, 9, 9, 8)
    """
    xn = grid(x, "x", (1, 2, 3))
    channels, dims = xn.shape[-1], xn.ndim - 2
    if not isinstance(kernels, Sequence):
        raise TypeError(f"kernels: got {type(kernels).__name__}, expected a sequence of arrays")
    levels = len(kernels)
    f_of = Linear.of(wf, "wf", channels, 2 * channels + levels + 1)
    taps = [odd_kernel(k, f"kernels[{n}]", (*(None,) * dims, channels)) for n, k in enumerate(kernels)]
    h_of, o_of = Linear.of(wh, "wh", channels, channels), Linear.of(wo, "wo", channels)
    s_of = None if shift is None else Linear.of(shift, "shift", channels, channels)
    normed = None if norm is None else norm_weights(norm, "norm", channels)
    backwards, averaged = flag(causal, "causal"), flag(normalize_modulator, "normalize_modulator")
    if backwards and dims != 1:
        raise ValueError(f"causal: got True for {dims} dimensions, expected 1")
    every = f_of(xn)
    q, z, gates = every[..., :channels], every[..., channels : 2 * channels], every[..., 2 * channels :]
    context = np.zeros_like(xn)
    for level, kernel in enumerate(taps):
        z = gelu(_convolved(z, kernel, backwards))
        context += gates[..., level : level + 1] * z
    context += gates[..., levels:] * gelu(_mean(z, backwards))
    if averaged:
        context /= np.float32(levels + 1)
    out = q * h_of(context)
    if s_of is not None:
        out += s_of(context)
    return returned(x, o_of(out if normed is None else layer_norm(out, *normed)))


def _convolved(z: Float32, kernel: Float32, causal: bool) -> Float32:
    """The convolution of the grid's shape; causal, all of the padding lies before the start."""
    if causal:
        before = np.pad(z, ((0, 0), (len(kernel) - 1, 0), (0, 0)))
        out: Float32 = depthwise_convolution(before, kernel, padding=0)
    else:
        out = depthwise_convolution(z, kernel)
    return out


def _mean(z: Float32, causal: bool) -> Float32:
    """Over all places, or over those up to each."""
    if causal:
        sums = np.cumsum(z, axis=1, dtype=np.float64)
        running: Float32 = (sums / np.arange(1, z.shape[1] + 1)[:, None]).astype(np.float32)
        return running
    whole: Float32 = z.mean(axis=tuple(range(1, z.ndim - 1)), keepdims=True, dtype=np.float64).astype(np.float32)
    return whole


def _example() -> NDArray[np.bool_]:
    """What the convolutions reach, without the mean of all places."""
    wf = np.random.default_rng(0).standard_normal((4, 11))
    wf[:, -1] = 0
    kernels = [np.ones((k, k, 4)) for k in (3, 5)]

    def layer(x: Float32) -> Float32:
        out = focal_modulation(x.reshape(1, 12, 12, 4), wf, kernels, np.eye(4), np.eye(4))
        return np.asarray(out).reshape(144, 4)

    return changed(layer, 144)


METHOD = Method(
    name="focal_modulation",
    family="vision",
    title="Focal Modulation Networks",
    year=2022,
    arxiv="2203.11926",
    function=focal_modulation,
    reference=reference.focal_modulation,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "Without levels the context is the gated gelu of the mean.",
        "Gates of 0 leave the queries times the bias of `wh`.",
        "Kernels that change nothing give repeated gelus.",
        "With a global gate of 0, shifted images give shifted outputs away from the borders.",
        "Causal, later places change nothing.",
    ),
    tests="tests/vision/test_focal_modulation.py",
    cost="`N * C * (3 * C + sum of k ** n)` multiply-adds for `N` places: linear in `N`.",
    mask=_example,
    axes=("places", "places"),
    shown="without the mean of all places",
)
