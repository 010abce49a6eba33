"""SRMA-Mamba's gate that looks away from what is found, and scans of a volume along its planes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like, reshaped
from longattn._checks import check_float_storage, flag, integers, items_of
from longattn.linear._channels import Float32, optional, pointwise
from longattn.linear.mamba_mixer import MambaWeights, mamba_mixer
from longattn.methods import Method
from longattn.reference import linear as reference


def reverse_attention_gate(
    f: Array, logits: Array, *, weight: Array | None = None, residual: Array | None = None
) -> tuple[Array, Array]:
    """Features times `1 - sigmoid(m)`, `m` being coarse logits resized to the features' size.

    Features where the coarse prediction is sure are left out, so that what follows refines what it missed. With
    `weight` the gated features go through a 1 x 1 convolution, and `residual` is added at the end. A stage of the
    paper is this gate between two blocks, and a projection of the outcome added to the returned `m`.

    Args:
        f: features `[B, .., C]` with one to three axes of places; float32, float16 or bfloat16.
        logits: coarse logits `[B, ..]` or `[B, .., 1]` of the same number of axes of places, any sizes; any of the
            three dtypes.
        weight: floating `[C, Co]`.
        residual: `[B, .., Co]`, any of the three dtypes.

    Returns:
        Gated features `[B, .., Co]` in the kind and dtype of `f`, and the resized logits, float32 `[B, .., 1]`.
        Resizing is linear along each axis, with corners not aligned.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit.

    Cost:
        A sigmoid for each place and a product for each number; `C * Co` for each place with `weight`.

    References:
        J. Zeng et al., "SRMA-Mamba: Spatial Reverse Mamba Attention Network for Pathological Liver Segmentation in MRI
        Volumes", 2025, arXiv:2508.12410.
    """
    fn, coarse = as_numpy(f, "f"), as_numpy(logits, "logits", any_strides=True)
    check_float_storage(fn, "f")
    check_float_storage(coarse, "logits")
    axes = fn.ndim - 2
    if not 1 <= axes <= 3:
        raise ValueError(f"f: got shape {fn.shape}, expected [B, .., C] with one to three axes of places")
    if coarse.ndim == fn.ndim and coarse.shape[-1] == 1:
        coarse = coarse[..., 0]
    if coarse.ndim != fn.ndim - 1 or coarse.shape[0] != fn.shape[0] or 0 in coarse.shape[1:]:
        raise ValueError(f"logits: got shape {np.shape(logits)}, expected {axes} axes of places for {fn.shape[0]} maps")
    mixing = optional(weight, "weight", (fn.shape[-1], None), "[C, Co]")
    width = fn.shape[-1] if mixing is None else mixing.shape[1]
    kept = None
    if residual is not None:
        kept = as_numpy(residual, "residual")
        check_float_storage(kept, "residual")
        if kept.shape != (*fn.shape[:-1], width):
            raise ValueError(f"residual: got shape {kept.shape}, expected {(*fn.shape[:-1], width)}")
    resized = _resized(np.ascontiguousarray(coarse, np.float32), fn.shape[1:-1])
    gate = pointwise("sigmoid", -resized)[..., None]
    gated = np.ascontiguousarray(fn, np.float32) * gate
    result = gated if mixing is None else gated @ mixing
    result = result if kept is None else result + kept
    return like(f, result.astype(fn.dtype, copy=False)), like(f, np.ascontiguousarray(resized[..., None]))


def tri_plane_scan(
    f: Array,
    mixer: MambaWeights | Sequence[MambaWeights] | Callable[[Array], Array],
    *,
    planes: Sequence[tuple[int, int, int]] = ((0, 1, 2), (1, 0, 2), (2, 0, 1)),
    reverse: bool = True,
) -> Array:
    """A volume flattened along its planes, forward and backward, scanned, put back and added up.

    The paper flattens along the three anatomical planes; which directions, and how many, is not said. Here each plane
    is a permutation of the axes, of which the last varies fastest.

    Args:
        f: features `[B, Z, Y, X, C]`; float32, float16 or bfloat16.
        mixer: weights of a Mamba block that keeps the width, for all orders or one for each; or a function of rows
            `[B, L, C]` that keeps their shape.
        planes: orders of the axes.
        reverse: each order backward as well, after it.

    Returns:
        `[B, Z, Y, X, C]` in the kind and dtype of `f`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or planes that are no permutations.

    Cost:
        A block of `Z * Y * X` rows per order.
    """
    fn = as_numpy(f, "f")
    check_float_storage(fn, "f")
    if fn.ndim != 5:
        raise ValueError(f"f: got shape {fn.shape}, expected [B, Z, Y, X, C]")
    if not fn.shape[4]:
        raise ValueError(f"f: got no channels in shape {fn.shape}, expected at least 1")
    every = [integers(plane, "planes") for plane in items_of(planes, "planes", "permutations of (0, 1, 2)")]
    if not every or any(sorted(plane) != [0, 1, 2] for plane in every):
        raise ValueError(f"planes: got {planes!r}, expected permutations of (0, 1, 2)")
    both = flag(reverse, "reverse")
    orders = [(plane, back) for plane in every for back in ((False, True) if both else (False,))]
    if isinstance(mixer, tuple | list):
        if len(mixer) != len(orders):
            raise ValueError(f"mixer: got {len(mixer)} weights, expected {len(orders)}, one for each order")
        mixers = list(mixer)
    else:
        mixers = [mixer] * len(orders)
    batch, channels = fn.shape[0], fn.shape[4]
    total = np.zeros(fn.shape, np.float32)
    for (plane, back), one in zip(orders, mixers, strict=True):
        axes = (0, *(axis + 1 for axis in plane), 4)
        laid = np.ascontiguousarray(fn.transpose(axes))
        rows = reshaped(laid, batch, -1, channels)
        rows = rows[:, ::-1] if back else rows
        y: Any = one(rows) if callable(one) else mamba_mixer(rows, one)[0]
        y = as_numpy(y, "mixer")
        if y.shape != rows.shape:
            raise ValueError(f"mixer: got rows of shape {y.shape} from it, expected {rows.shape}")
        y = y[:, ::-1] if back else y
        total.transpose(axes)[...] += y.reshape(laid.shape)
    return like(f, total.astype(fn.dtype, copy=False))


def _resized(x: Float32, size: Sequence[int]) -> Float32:
    """Linear interpolation of `[B, ..]` to another size, axis by axis."""
    for axis, (n, new) in enumerate(zip(x.shape[1:], size, strict=True), 1):
        if n != new:
            x = np.moveaxis(np.moveaxis(x, axis, -1) @ _interpolation(n, new), -1, axis)
    return np.ascontiguousarray(x)


def _interpolation(n: int, new: int) -> NDArray[np.float32]:
    """Weights `[n, new]` of linear interpolation, corners not aligned."""
    at = np.maximum((np.arange(new) + 0.5) * n / new - 0.5, 0)
    low = np.minimum(at.astype(np.int64), n - 1)
    high = np.minimum(low + 1, n - 1)
    weights = np.zeros((n, new))
    weights[low, np.arange(new)] += 1 - (at - low)
    weights[high, np.arange(new)] += at - low
    return weights.astype(np.float32)


METHOD = Method(
    name="reverse_attention_gate",
    family="recurrent",
    title="SRMA-Mamba: Spatial Reverse Mamba Attention Network for Pathological Liver Segmentation in MRI Volumes",
    year=2025,
    arxiv="2508.12410",
    function=reverse_attention_gate,
    reference=reference.reverse_attention_gate,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "Logits of -inf leave the features.",
        "Logits of inf leave nothing.",
        "Orders that are scanned by the identity add up to as many times the volume.",
    ),
    tests="tests/linear/test_reverse_attention_gate.py",
    cost="A sigmoid for each place and a product for each number.",
)
