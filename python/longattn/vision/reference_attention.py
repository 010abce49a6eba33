"""Attention of text, image and condition tokens in which the condition does not see the image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, reshaped
from longattn._checks import check_heads, dense_inputs, flag, scale_factor
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.pictures import example
from longattn.reference import vision as reference
from longattn.vision._inputs import Float32, Weights, optional_linear, returned

#: Queries, keys and values of one group of tokens.
Group = tuple[Array, Array, Array]


def reference_attention(
    text: Group,
    image: Group,
    condition: Group,
    *,
    w_zero: Weights | None = None,
    joint: bool = False,
    text_to_condition: bool = True,
    scale: float | None = None,
) -> tuple[Array, Array, Array]:
    """Attention of three groups of tokens, for a generator that is steered by a condition image.

    Text and image attend to each other as in the model before. The condition's queries see the condition (and the
    text), never the image, so its keys and values are the same at all steps and scales of generation. The image reads
    the condition in a softmax of its own, whose output goes through `w_zero`, which is zero at the start of training,
    and is added; with `joint` the image's softmax is over all three groups instead. Which of these the paper has is not
    stated beyond doubt.

    Args:
        text: `(q, k, v)`, `[B, Hq, Nt, D]`, `[B, Hkv, Nt, D]` and `[B, Hkv, Nt, Dv]`; float32, float16 or bfloat16.
        image: those of the image tokens.
        condition: those of the condition tokens, of which there may be none.
        w_zero: weights `[Hq * Dv, Hq * Dv]` of what the image reads from the condition, or a pair `(matrix, bias)`;
            `None` is no change. Not with `joint`.
        joint: one softmax.
        text_to_condition: the condition's queries see the text, too.
        scale: factor on the logits; `None` is `D ** -0.5`.

    Returns:
        The outputs of text, image and condition, `[B, Hq, N, Dv]` each, in the kind and dtype of their queries.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `(Nt + Ni + Nc) ** 2 - Ni * Nc - Nt * Nc` pairs of a query and a key per head, `D + Dv` multiply-adds each.

    References:
        "ScaleWeaver: Weaving Efficient Controllable T2I Generation with Multi-Scale Reference Attention", 2025.

    Example:
        >>> import numpy as np, longattn.vision
        >>> rng = np.random.default_rng(0)
        >>> groups = [tuple(rng.standard_normal((3, 1, 2, n, 8), dtype=np.float32)) for n in (3, 10, 10)]
        >>> [x.shape for x in longattn.vision.reference_attention(*groups)]
        [(1, 2, 3, 8), (1, 2, 10, 8), (1, 2, 10, 8)]
    """
    groups = [_group(g, name) for g, name in ((text, "text"), (image, "image"), (condition, "condition"))]
    first = groups[0]
    for (q, k, v), name in zip(groups[1:], ("image", "condition"), strict=True):
        for own, known in ((q, first[0]), (k, first[1]), (v, first[2])):
            if own.shape[:2] + own.shape[3:] != known.shape[:2] + known.shape[3:] or own.dtype != known.dtype:
                raise ValueError(f"{name}: got {own.shape} {own.dtype}, expected {known.shape} {known.dtype} but for N")
    together, with_text = flag(joint, "joint"), flag(text_to_condition, "text_to_condition")
    width = first[0].shape[1] * first[2].shape[3]
    project = optional_linear(w_zero, "w_zero", width, width)
    if together and project is not None:
        raise ValueError("w_zero: got weights with joint=True, expected None")
    factor = scale_factor(scale, first[0].shape[-1])
    (qt, kt, vt), (qi, ki, vi), (qc, kc, vc) = groups
    base_keys, base_values = np.concatenate([kt, ki], axis=2), np.concatenate([vt, vi], axis=2)
    of_text: Any = attention(np.asarray(qt, np.float32), base_keys, base_values, scale=factor)
    rows = np.asarray(qi, np.float32)
    plain: Any = attention(rows, base_keys, base_values, scale=factor, return_lse=together)
    if together:
        of_image = attention(rows, kc, vc, scale=factor, state=plain)
    else:
        read = attention(rows, kc, vc, scale=factor)
        of_image = plain + (read if project is None else _mixed(project, read))
    if with_text:
        kc, vc = np.concatenate([kt, kc], axis=2), np.concatenate([vt, vc], axis=2)
    of_condition = attention(np.asarray(qc, np.float32), kc, vc, scale=factor)
    return returned(text[0], of_text), returned(image[0], of_image), returned(condition[0], of_condition)


def _group(given: Any, name: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    if not isinstance(given, tuple | list) or len(given) != 3:
        raise TypeError(f"{name}: got {type(given).__name__}, expected (q, k, v)")
    shapes = [as_numpy(x, name).ndim for x in given]
    if shapes != [4, 4, 4]:
        raise ValueError(f"{name}: got ranks {shapes}, expected [B, H, N, D] each")
    q, k, v = dense_inputs(*given, double=False)
    check_heads(q.shape[1], k.shape[1], v.shape[1])
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"{name}: got {q.shape[2]} queries and {k.shape[2]} keys, expected as many")
    return q, k, v


def _mixed(project: Any, x: Float32) -> Float32:
    """A projection over the heads' channels side by side."""
    batch, heads, tokens, width = x.shape
    flat = project(reshaped(np.ascontiguousarray(x.swapaxes(1, 2)), batch, tokens, -1))
    out: Float32 = flat.reshape(batch, tokens, heads, width).swapaxes(1, 2)
    return out


def _example() -> NDArray[np.bool_]:
    """What 16 tokens of text, 56 of the image and 56 of the condition see."""
    (q, k), values = example(), np.eye(128, dtype=np.float32)[None, None]
    parts = [slice(0, 16), slice(16, 72), slice(72, 128)]
    outs = reference_attention(*((q[:, :, part], k[:, :, part], values[:, :, part]) for part in parts), joint=True)
    mask: NDArray[np.bool_] = np.concatenate([np.asarray(out)[0, 0] for out in outs]) != 0
    return mask


METHOD = Method(
    name="reference_attention",
    family="vision",
    title="ScaleWeaver: Weaving Efficient Controllable T2I Generation with Multi-Scale Reference Attention",
    year=2025,
    arxiv="2510.14882",
    function=reference_attention,
    reference=reference.reference_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "With `w_zero = 0` text and image are as without the condition.",
        "Without condition tokens it is attention of text and image.",
        "Joint, the image's output is attention to all three groups.",
    ),
    tests="tests/vision/test_reference_attention.py",
    cost="`(Nt + Ni + Nc) ** 2 - Ni * Nc - Nt * Nc` pairs per head, `D + Dv` multiply-adds each.",
    mask=_example,
)
