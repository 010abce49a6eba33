"""Attention of the patches of a video along the paths of their motion."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import dense_inputs, integer, scale_factor
from longattn.methods import Method
from longattn.pictures import example, seen
from longattn.reference import vision as reference
from longattn.sparse.index_sparse_attention import index_sparse_attention
from longattn.sparse.row_lists import RowLists


def trajectory_attention(
    q: Array, k: Array, v: Array, flow: Array, *, scale: float | None = None, seed: int | None = None
) -> Array:
    """Attention of each patch to itself and to the patches that the optical flow links it with.

    Paths are those of `flow_paths`; each patch is on one, with one patch per frame at most. In the paper this follows
    attention over all frames, whose output becomes the values here.

    Args:
        q: queries `[B, Hq, F * H * W, D]`, frame by frame, row by row; float32, float16 or bfloat16.
        k: keys `[B, Hkv, F * H * W, D]`; any of the three dtypes.
        v: values `[B, Hkv, F * H * W, Dv]`; dtype of `k`.
        flow: floating `[F - 1, 2, H, W]`, or `[B, F - 1, 2, H, W]`: motion in x, then in y, in patches, from each frame
            to the next; rounded to whole patches.
        scale: factor on the logits; `None` is `D ** -0.5`.
        seed: as in `flow_paths`.

    Returns:
        `[B, Hq, F * H * W, Dv]`, in the kind and dtype of `q`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        At most `F` keys per query: `Hq * F * H * W * F * (D + Dv)` multiply-adds; making the lists is a pass over the
        patches.

    References:
        Y. Cong et al., "FLATTEN: optical FLow-guided ATTENtion for consistent text-to-video editing", 2023,
        arXiv:2310.05922.

    Example:
        >>> import numpy as np, longattn.vision
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 48, 8), dtype=np.float32)
        >>> longattn.vision.trajectory_attention(q, k, v, np.zeros((2, 2, 4, 4))).shape
        (1, 2, 48, 8)
    """
    qn, kn, vn = dense_inputs(q, k, v, double=False)
    if qn.ndim != 4:
        raise ValueError(f"q: got shape {qn.shape}, expected [B, Hq, F * H * W, D]")
    motion = _motion(flow)
    if motion.ndim == 5 and len(motion) != len(qn):
        raise ValueError(f"flow: got batch {len(motion)}, expected {len(qn)} as in q")
    factor, lists = scale_factor(scale, qn.shape[-1]), trajectory_lists(motion, seed=seed)
    patches = lists.lengths[0]
    if qn.shape[2] != patches or kn.shape[2] != patches:
        raise ValueError(f"q: got {qn.shape[2]} rows and {kn.shape[2]} keys, expected {patches} as in flow")
    return like(q, index_sparse_attention(qn, kn, vn, lists, scale=factor))


def trajectory_lists(flow: Array, *, seed: int | None = None) -> RowLists:
    """What `trajectory_attention` attends over: for each patch those of its path, to be put together with others.

    Args:
        flow: as in `trajectory_attention`.
        seed: as in `flow_paths`.

    Returns:
        The lists, of one head for all, one for each patch, `F * H * W` patches.

    Raises:
        TypeError: no floating array.
        ValueError: another shape, or motion that is not finite.

    Cost:
        A sort of each frame's patches, and one of all.

    Example:
        >>> import numpy as np, longattn.vision
        >>> longattn.vision.trajectory_lists(np.zeros((2, 2, 4, 4))).density()  # 3 frames of 16 patches
        0.0625
    """
    motion = _motion(flow)
    return _lists([_path_numbers(one, seed) for one in (motion if motion.ndim == 5 else motion[None])])


def flow_paths(flow: Array, *, seed: int | None = None) -> NDArray[np.int64]:
    """Paths of patches through a video, by its optical flow.

    A patch leads to the patch of the next frame that it moves to, if that is inside the image. Where several lead to
    one, the path of one of them goes on and the others end. Patches that none leads to begin a path.

    Args:
        flow: floating `[F - 1, 2, H, W]`: motion in x, then in y, in patches; rounded to whole ones.
        seed: of several patches that lead to one, draw the one that goes on; `None` takes the first by row and column.

    Returns:
        Int64 `[F, H, W]`: the number of each patch's path; a path is numbered by its first patch.

    Raises:
        TypeError: no floating array.
        ValueError: another shape, or motion that is not finite.

    Cost:
        A sort of each frame's patches.
    """
    motion = _motion(flow)
    if motion.ndim != 4:
        raise ValueError(f"flow: got shape {motion.shape}, expected [F - 1, 2, H, W]")
    return _path_numbers(motion, seed)


def _motion(flow: Array) -> NDArray[np.float64]:
    a = as_numpy(flow, "flow", any_strides=True)
    if a.dtype.kind != "f" and a.dtype.name != "bfloat16":
        raise TypeError(f"flow: got dtype {a.dtype}, expected a floating dtype")
    if a.ndim not in (4, 5) or a.shape[-3] != 2 or 0 in a.shape[-2:]:
        raise ValueError(f"flow: got shape {a.shape}, expected [F - 1, 2, H, W] or [B, F - 1, 2, H, W]")
    wide = a.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError("flow: got NaN or infinity, expected finite motion")
    return wide


def _path_numbers(flow: NDArray[np.float64], seed: int | None) -> NDArray[np.int64]:
    generator = None if seed is None else np.random.default_rng(integer(seed, "seed", 0))
    steps, _, height, width = flow.shape
    area = height * width
    rows, columns = np.divmod(np.arange(area), width)
    numbers = np.arange((steps + 1) * area).reshape(steps + 1, area)
    for t in range(steps):
        # Beyond twice the image it does not matter how far.
        moved = np.rint(np.clip(flow[t], -2 * area - 2, 2 * area + 2)).astype(np.int64).reshape(2, area)
        x, y = columns + moved[0], rows + moved[1]
        order = np.arange(area) if generator is None else generator.permutation(area)
        source = order[((x >= 0) & (x < width) & (y >= 0) & (y < height))[order]]
        target = y[source] * width + x[source]
        hit, first = np.unique(target, return_index=True)
        numbers[t + 1, hit] = numbers[t, source[first]]
    return numbers.reshape(steps + 1, height, width)


def _lists(each: list[NDArray[np.int64]]) -> RowLists:
    """For each patch those of its path, ascending, as rows are numbered by frames."""
    counts, indices = [], []
    for numbers in each:
        flat = numbers.reshape(-1)
        order = np.argsort(flat, kind="stable")
        _, place, lengths = np.unique(flat[order], return_index=True, return_counts=True)
        path = np.searchsorted(flat[order][place], flat)
        size = lengths[path]
        within = np.arange(int(size.sum())) - np.repeat(np.cumsum(size) - size, size)
        indices.append(order[np.repeat(place[path], size) + within])
        counts.append(size)
    patches = each[0].size
    bounds = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    indptr = np.stack([bounds[b * patches : (b + 1) * patches + 1] for b in range(len(each))])
    return RowLists(
        indptr=indptr[:, None],
        indices=np.concatenate(indices).astype(np.uint32),
        lengths=(patches, patches),
        block_q=1,
    )


METHOD = Method(
    name="trajectory_attention",
    family="vision",
    title="FLATTEN: optical FLow-guided ATTENtion for consistent text-to-video editing",
    year=2023,
    arxiv="2310.05922",
    function=trajectory_attention,
    reference=reference.trajectory_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "Without motion it is attention over the frames of each place.",
        "One frame returns the values.",
        "Where all motion leaves the image it returns the values.",
        "Every patch is on one path, with one patch per frame at most.",
    ),
    tests="tests/vision/test_trajectory_attention.py",
    cost="`Hq * F * H * W * F * (D + Dv)` multiply-adds at most, and a pass over the patches.",
    mask=lambda: seen(
        trajectory_attention, *example(144), np.broadcast_to(np.array([1, 0], np.float32)[:, None, None], (3, 2, 6, 6))
    ),
)
