"""Cross-attention of the same queries to two streams."""

from __future__ import annotations

from longattn._arrays import Array
from longattn._checks import flag, mask_scores, scale_factor
from longattn.dense.merge import merge
from longattn.methods import Method
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, Linear, Weights, features, head_count, optional_linear, returned
from longattn.vision.partition import attend


def query_shared_cross_attention(
    x: Array,
    first: Array,
    second: Array,
    wq: Weights,
    first_weights: tuple[Weights, Weights],
    second_weights: tuple[Weights, Weights],
    *,
    heads: int,
    wo: Weights | None = None,
    joint: bool = False,
    scale: float | None = None,
    first_mask: Array | None = None,
    second_mask: Array | None = None,
) -> Array:
    """One projection of queries reads two streams (camera poses and rendered frames, say), each with its own weights.

    The outputs of the two softmaxes are added; with `joint` there is one softmax over the keys of both. Which of these
    the paper has is not stated beyond doubt. The residual is the caller's.

    Args:
        x: tokens `[B, N, C]`; float32, float16 or bfloat16.
        first: tokens of the first stream `[B, N1, C1]`, likewise.
        second: tokens of the second `[B, N2, C2]`.
        wq: query weights `[C, heads * D]`, or a pair `(matrix, bias)`.
        first_weights: `(wk, wv)` of the first stream, `[C1, heads * D]` and `[C1, heads * Dv]`, or pairs.
        second_weights: those of the second.
        heads: heads.
        wo: output projection, or `None`.
        joint: one softmax.
        scale: factor on the logits; `None` is `D ** -0.5`.
        first_mask: booleans, broadcastable to `[B, heads, N, N1]`: what is seen of the first stream.
        second_mask: of the second. Rows that see nothing of a stream get zeros from it.

    Returns:
        `[B, N, heads * Dv]`, or as `wo` has it, in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `N * (N1 + N2) * heads * (D + Dv)` multiply-adds, and the projections.

    References:
        "PostCam: Camera-Controllable Novel-View Video Generation with Query-Shared Cross-Attention", 2025.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> x, poses, frames = (rng.standard_normal((1, n, 8), dtype=np.float32) for n in (10, 3, 12))
        >>> wq, wk, wv = rng.standard_normal((3, 8, 8), dtype=np.float32)
        >>> longattn.vision.query_shared_cross_attention(x, poses, frames, wq, (wk, wv), (wk, wv), heads=2).shape
        (1, 10, 8)
    """
    xn = features(x, "x", 3, "[B, N, C]")
    q_of = Linear.of(wq, "wq", xn.shape[-1])
    streams: list[tuple[Linear, Linear, Float32]] = []
    for source, given, name in ((first, first_weights, "first"), (second, second_weights, "second")):
        rows = features(source, name, 3, f"[B, N, C] of {name}", (len(xn), None, None))
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise TypeError(f"{name}_weights: got {type(given).__name__}, expected a pair (wk, wv)")
        k_of = Linear.of(given[0], f"{name}_weights wk", rows.shape[-1], q_of.outputs)
        width = None if not streams else streams[0][1].outputs
        streams.append((k_of, Linear.of(given[1], f"{name}_weights wv", rows.shape[-1], width), rows))
    number = head_count(heads, {"wq": q_of.outputs, "wv": streams[0][1].outputs})
    project = optional_linear(wo, "wo", streams[0][1].outputs)
    together, factor = flag(joint, "joint"), scale_factor(scale, q_of.outputs // number)
    q = q_of(xn)
    parts = []
    masks = ((first_mask, "first_mask"), (second_mask, "second_mask"))
    for (k_of, v_of, rows), (mask, name) in zip(streams, masks, strict=True):
        seen = None if mask is None else mask_scores(mask, (len(xn), number, xn.shape[1], rows.shape[1]), name)
        parts.append(attend(q, k_of(rows), v_of(rows), heads=number, scale=factor, mask=seen, return_lse=True))
    out = _merged(parts, number) if together else parts[0][0] + parts[1][0]
    return returned(x, out if project is None else project(out))


def _merged(parts: list[tuple[Float32, Float32]], heads: int) -> Float32:
    """One softmax over the keys of both parts."""
    shape = parts[0][0].shape
    split = [(o.reshape(*shape[:2], heads, shape[2] // heads).swapaxes(1, 2), lse) for o, lse in parts]
    out: Float32 = merge(split)[0].swapaxes(1, 2).reshape(shape)
    return out


METHOD = Method(
    name="query_shared_cross_attention",
    family="vision",
    title="PostCam: Camera-Controllable Novel-View Video Generation with Query-Shared Cross-Attention",
    year=2025,
    arxiv="2511.17185",
    function=query_shared_cross_attention,
    reference=reference.query_shared_cross_attention,
    exact=True,
    modes=frozenset({"non-causal", "cross"}),
    gqa=False,
    step=False,
    checks=(
        "With one stream masked it is cross-attention to the other.",
        "Joint, it is attention to the keys of both.",
    ),
    tests="tests/vision/test_query_shared_cross_attention.py",
    cost="`N * (N1 + N2) * heads * (D + Dv)` multiply-adds, and the projections.",
)
