"""Attention across the views of a scene, and across the frames of each view."""

from __future__ import annotations

from typing import Any

from longattn._arrays import Array
from longattn._checks import one_of
from longattn.methods import Method
from longattn.pictures import layer_seen
from longattn.reference import vision as reference
from longattn.vision._blocks import Block
from longattn.vision._inputs import features, head_count, returned
from longattn.vision.partition import attend_over

#: Which axes of `[B, V, F, N]` each kind joins.
KINDS = {"view": "vn", "frame": "fn", "spatial": "n", "temporal": "f"}


def view_integrated_attention(x: Array, weights: Any, *, heads: int, kind: str = "view") -> Array:
    """Self-attention of tokens of several views and frames, over some of these axes.

    "view" joins views and places of each frame, which makes views agree; "frame" joins frames and places of each view.
    A model's weights for attention inside frames ("spatial") or along time ("temporal") are used as they are. Which
    axes the paper's temporal module joins is not stated beyond doubt: "frame" is how it is read here.

    Args:
        x: tokens `[B, V, F, N, C]` of views, frames and places; float32, float16 or bfloat16.
        weights: `(wq, wk, wv, wo)`, `[C, C]` each, pairs `(matrix, bias)`, or `None`.
        heads: heads.
        kind: "view", "frame", "spatial" or "temporal".

    Returns:
        The tokens, in the shape, kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * F * (V * N) ** 2 * C` multiply-adds for "view", `2 * V * (F * N) ** 2 * C` for "frame", and the
        projections.

    References:
        D. Xu et al., "Cavia: Camera-controllable Multi-view Video Diffusion with View-Integrated Attention", 2024,
        arXiv:2410.10774.

    Example:
        >>> import numpy as np, longattn.vision
        >>> x = np.random.default_rng(0).standard_normal((1, 2, 3, 9, 16), dtype=np.float32)
        >>> longattn.vision.view_integrated_attention(x, (None,) * 4, heads=2).shape
        (1, 2, 3, 9, 16)
    """
    xn = features(x, "x", 5, "[B, V, F, N, C]")
    block = Block.of(weights, "weights", xn.shape[-1], head_count(heads, {"x": xn.shape[-1]}))
    one_of(kind, "kind", KINDS)
    out = attend_over(block.q(xn), block.k(xn), block.v(xn), "bvfn", KINDS[kind], heads=block.heads)
    return returned(x, block.o(out))


METHOD = Method(
    name="view_integrated_attention",
    family="vision",
    title="Cavia: Camera-controllable Multi-view Video Diffusion with View-Integrated Attention",
    year=2024,
    arxiv="2410.10774",
    function=view_integrated_attention,
    reference=reference.view_integrated_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "One view gives attention inside frames.",
        "One frame gives attention inside frames.",
        "One place gives attention over time.",
    ),
    tests="tests/vision/test_view_integrated_attention.py",
    cost="`2 * F * (V * N) ** 2 * C` multiply-adds across views, `2 * V * (F * N) ** 2 * C` across frames.",
    mask=lambda: layer_seen(lambda x, wq, wk, wv: view_integrated_attention(x, (wq, wk, wv, None), heads=1), (2, 4, 9)),
)
