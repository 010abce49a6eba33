"""Attention over the scales of each patch, then over the patches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array
from longattn._checks import integer
from longattn.methods import Method
from longattn.reference import vision as reference
from longattn.vision._blocks import Block
from longattn.vision._inputs import Weights, features, head_count, layer_norm, norm_weights, returned


def scale_patch_attention(
    x: Array,
    scale_weights: tuple[Weights, Weights, Weights, Weights | None],
    patch_weights: tuple[Weights, Weights, Weights, Weights | None],
    *,
    heads: int,
    scale_norm: tuple[Array, Array] | None = None,
    patch_norm: tuple[Array, Array] | None = None,
    class_tokens: int = 0,
) -> Array:
    """One block: attention inside each patch over its tokens of all scales, then of the patches' scale tokens.

    Token 0 of a patch is its scale token, the others come from feature maps of different resolutions. Both steps add
    their output to what they read. How scale tokens are made and that the steps alternate in this order in every block
    is not stated precisely; this is the plain reading.

    Args:
        x: tokens `[B, N, S + 1, C]` of `N` patches; float32, float16 or bfloat16.
        scale_weights: `(wq, wk, wv, wo)` of the first step, `[C, C]` each, or pairs with biases; `wo` may be `None`.
        patch_weights: those of the second.
        heads: heads.
        scale_norm: `(weight, bias)` of a layer norm before the first step; `None` is none.
        patch_norm: of one before the second.
        class_tokens: so many leading "patches" are class tokens: they take part in the second step only, with their
            token 0.

    Returns:
        `[B, N, S + 1, C]` in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * N * ((S + 1) ** 2 + N) * C` multiply-adds, and the projections.

    References:
        "DuoFormer: Leveraging Hierarchical Representations by Local and Global Attention Vision Transformer", 2025.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal((1, 4, 6, 16), dtype=np.float32)
        >>> w = tuple(rng.standard_normal((4, 16, 16), dtype=np.float32))
        >>> longattn.vision.scale_patch_attention(x, w, w, heads=2).shape
        (1, 4, 6, 16)
    """
    xn = features(x, "x", 4, "[B, N, S + 1, C]")
    _, patches, tokens, channels = xn.shape
    if tokens == 0:
        raise ValueError(f"x: got shape {xn.shape}, expected at least one token per patch")
    number = head_count(heads, {"x": channels})
    leading = integer(class_tokens, "class_tokens", 0, patches)
    first = Block.of(scale_weights, "scale_weights", channels, number)
    second = Block.of(patch_weights, "patch_weights", channels, number)
    norms = [
        None if norm is None else norm_weights(norm, name, channels)
        for norm, name in ((scale_norm, "scale_norm"), (patch_norm, "patch_norm"))
    ]
    out = np.array(xn)
    own = out[:, leading:]
    rows = own.reshape(-1, tokens, channels)
    own += first(rows if norms[0] is None else layer_norm(rows, *norms[0])).reshape(own.shape)
    across = np.ascontiguousarray(out[:, :, 0])
    out[:, :, 0] += second(across if norms[1] is None else layer_norm(across, *norms[1]))
    return returned(x, out)


def _example() -> NDArray[np.bool_]:
    """What the 6 tokens of each of 20 patches see: the first of them is the scale token."""
    x, rng = np.eye(120, dtype=np.float32), np.random.default_rng(0)
    wq, wk = 0.3 * rng.standard_normal((2, 120, 120), dtype=np.float32)
    out = scale_patch_attention(x.reshape(1, 20, 6, 120), (wq, wk, x, None), (wq, wk, x, None), heads=1)
    mask: NDArray[np.bool_] = np.asarray(out).reshape(120, 120) != 0
    return mask


METHOD = Method(
    name="scale_patch_attention",
    family="vision",
    title="DuoFormer: Leveraging Hierarchical Representations by Local and Global Attention Vision Transformer",
    year=2025,
    arxiv="2506.12982",
    function=scale_patch_attention,
    reference=reference.scale_patch_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "Without tokens besides the scale tokens the second step is attention of patches.",
        "With one patch the first step is attention over its tokens.",
        "Patches do not see each other in the first step.",
    ),
    tests="tests/vision/test_scale_patch_attention.py",
    cost="`2 * N * ((S + 1) ** 2 + N) * C` multiply-adds, and the projections.",
    mask=_example,
)
