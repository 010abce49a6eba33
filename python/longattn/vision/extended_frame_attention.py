"""Attention of each frame to a set of frames."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longattn._arrays import Array, as_numpy, reshaped
from longattn._checks import integer, integers, items_of
from longattn.methods import Method
from longattn.pictures import layer_seen
from longattn.reference import vision as reference
from longattn.sparse.block_mask import BlockMask
from longattn.sparse.block_sparse_attention import block_sparse_attention
from longattn.vision._inputs import features, head_count, returned, same_shape


def extended_frame_attention(
    q: Array,
    k: Array,
    v: Array,
    frames: Sequence[Sequence[int]] | None = None,
    *,
    heads: int = 1,
    scale: float | None = None,
    kept: Array | None = None,
) -> Array:
    """Attention in which frame `i` sees the tokens of the frames in a set `S(i)`, in one softmax.

    A model's self-attention of single frames becomes consistent over time that way, with the weights it has. Which
    sets the paper takes is not stated beyond doubt; `frames` says them, all of them without it, and
    `anchored_frames` gives an anchor, the frame before and the frame itself.

    Args:
        q: queries `[B, F, N, heads * D]`; float32, float16 or bfloat16.
        k: keys, likewise.
        v: values, likewise.
        frames: for each of `F` frames the numbers of those it sees, ascending; `None` is all for all.
        heads: heads, side by side in the channels.
        scale: factor on the logits; `None` is `D ** -0.5`.
        kept: booleans `[B, F, N]`: the tokens that are seen (those outside a mask for inpainting, say); `None` is all.

    Returns:
        `[B, F, N, heads * D]` in the kind and dtype of `q`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * F * N * |S| * N * heads * D` multiply-adds: a block of `N` keys for each pair of frames.

    References:
        "Temporally Consistent Object Editing in Videos using Extended Attention", 2024.

    Example:
        >>> import numpy as np, longattn.vision
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 4, 9, 16), dtype=np.float32)
        >>> sets = longattn.vision.anchored_frames(4)
        >>> longattn.vision.extended_frame_attention(q, k, v, sets, heads=2).shape
        (1, 4, 9, 16)
    """
    qn = features(q, "q", 4, "[B, F, N, heads * D]")
    kn, vn = same_shape(k, "k", qn, "q"), same_shape(v, "v", qn, "q")
    batch, count, tokens, channels = qn.shape
    number = head_count(heads, {"q": channels})
    if 0 in qn.shape[1:3]:
        raise ValueError(f"q: got shape {qn.shape}, expected at least one frame and token")
    sets: list[Sequence[int]] = [range(count)] * count
    if frames is not None:
        sets = [_set(one, n, count) for n, one in enumerate(items_of(frames, "frames", "sets"))]
    if len(sets) != count:
        raise ValueError(f"frames: got {len(sets)} sets, expected {count}, one for each frame")
    mask = BlockMask(
        indptr=np.cumsum([0, *(len(one) for one in sets)])[None, None],
        indices=np.concatenate([np.asarray(one, np.uint32) for one in sets]),
        lengths=(count * tokens, count * tokens),
        block_q=tokens,
        block_k=tokens,
    )
    rows = (reshaped(x, batch, count * tokens, number, -1).swapaxes(1, 2) for x in (qn, kn, vn))
    options = {} if kept is None else {"mask": _kept(kept, qn.shape[:3])}
    queries, keys, values = rows
    out = block_sparse_attention(queries, keys, values, mask, scale=scale, **options)
    return returned(q, out.swapaxes(1, 2).reshape(qn.shape))


def anchored_frames(count: int, *, anchor: int = 0) -> list[list[int]]:
    """Sets of an anchor, the frame before and the frame itself.

    Args:
        count: frames.
        anchor: the frame that all see.

    Returns:
        A set for each frame, for `extended_frame_attention`.

    Raises:
        TypeError: no integers.
        ValueError: an anchor that is no frame.

    Cost:
        The result.
    """
    frames = integer(count, "count", 1)
    fixed = integer(anchor, "anchor", 0, frames - 1)
    return [sorted({fixed, max(i - 1, 0), i}) for i in range(frames)]


def _set(given: Sequence[int], n: int, count: int) -> list[int]:
    found = list(integers(given, f"frames[{n}]", 0, count - 1))
    if sorted(set(found)) != found:
        raise ValueError(f"frames[{n}]: got {found}, expected ascending numbers without repetition")
    return found


def _kept(kept: Array, shape: tuple[int, ...]) -> Array:
    a = as_numpy(kept, "kept")
    if a.dtype != np.bool_:
        raise TypeError(f"kept: got dtype {a.dtype}, expected bool")
    if a.shape != shape:
        raise ValueError(f"kept: got shape {a.shape}, expected {shape}")
    return reshaped(a, shape[0], 1, 1, -1)


METHOD = Method(
    name="extended_frame_attention",
    family="vision",
    title="Temporally Consistent Object Editing in Videos using Extended Attention",
    year=2024,
    arxiv="2406.00272",
    function=extended_frame_attention,
    reference=reference.extended_frame_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "Frames that see themselves give attention inside frames.",
        "Sets of all frames give attention.",
        "Frames that are all equal give what each gives alone.",
    ),
    tests="tests/vision/test_extended_frame_attention.py",
    cost="`2 * F * N * |S| * N * heads * D` multiply-adds.",
    mask=lambda: layer_seen(
        lambda x, wq, wk, wv: extended_frame_attention(x @ wq, x @ wk, (x @ wv).astype(np.float32), anchored_frames(6)),
        (6, 12),
    ),
)
