"""One row per sparse method, at one length or size of image or video, beside masked torch where that is natural."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import sparse
from longattn.bench.each_method import COLUMNS, Arguments, EachMethod
from longattn.bench.each_method import call_with as _a
from longattn.bench.peers import tensor
from longattn.bench.sections import Section, whole

__all__ = ["COLUMNS", "SECTIONS", "SUMMARY", "add_arguments", "measure", "panels"]

SUMMARY = "every sparse method at one length, beside torch's masked attention"
#: Rows of a text, places of a side of an image, frames of a video of 16 x 16 places, heads, dimensions.
LENGTH, SIDE, FRAMES, HEADS, DIM = 4096, 56, 16, 8, 64
QUICK_LENGTH, QUICK_SIDE, QUICK_FRAMES = 512, 16, 4
PLACES = 16


class Inputs:
    """Random queries, keys and values of a size."""

    def __init__(self, quick: bool) -> None:
        self.rng = np.random.default_rng(0)
        self.places, self.side, self.frames = (
            (QUICK_LENGTH, QUICK_SIDE, QUICK_FRAMES) if quick else (LENGTH, SIDE, FRAMES)
        )
        self.size = f"{self.places} rows, {self.side}x{self.side} or {self.frames} frames of {PLACES}x{PLACES} places"

    def x(self, *shape: int) -> NDArray[np.float32]:
        """Features."""
        return self.rng.standard_normal(shape, dtype=np.float32)

    def w(self, inputs: int, outputs: int) -> NDArray[np.float32]:
        """Weights that keep the size of numbers."""
        return np.asarray(self.rng.standard_normal((inputs, outputs)) / np.sqrt(inputs), np.float32)

    def text(self) -> list[NDArray[np.float32]]:
        """Queries, keys and values of a text, `[1, H, L, D]`."""
        return [self.x(1, HEADS, self.places, DIM) for _ in "qkv"]

    def image(self) -> list[NDArray[np.float32]]:
        """Those of an image, `[1, H, side, side, D]`."""
        return [self.x(1, HEADS, self.side, self.side, DIM) for _ in "qkv"]

    def video(self, more: int = 0) -> list[NDArray[np.float32]]:
        """Those of a video with `more` rows for each frame, `[1, H, L, D]`."""
        return [self.x(1, HEADS, self.frames * (PLACES**2 + more), DIM) for _ in "qkv"]

    def lists(self) -> sparse.RowLists:
        """The best keys of each row, by narrow projections."""
        x = self.x(1, self.places, DIM)
        return sparse.lightweight_topk_select(x, x, self.w(DIM, 8), self.w(DIM, 8), rho=0.05)

    def blocks(self) -> sparse.BlockMask:
        """Blocks of 64 keys, a tenth of them."""
        shape = 2 * (-(-self.places // 64),)
        lengths = (self.places, self.places)
        return sparse.BlockMask.from_blocks(self.rng.random(shape) < 0.1, lengths=lengths, block_q=64, block_k=64)

    def centres(self) -> NDArray[np.int64]:
        """Centres of windows near a place that drifts from the rows' own."""
        rows = np.arange(self.places)
        return rows // 2 + self.places // 4


#: Arguments of each method.
CASES: dict[str, Callable[[Inputs], Arguments]] = {
    "anchor_attention": lambda i: _a(*i.text(), theta=2.0),
    "block_sparse_attention": lambda i: _a(*i.text(), i.blocks(), causal=True),
    "descriptor_attention": lambda i: _a(
        i.x(1, i.frames, PLACES**2 + 5, HEADS * DIM), *(i.w(HEADS * DIM, HEADS * DIM) for _ in "qkvo"),
        heads=HEADS, grid=(PLACES, PLACES),
    ),
    "dhsa_select": lambda i: _a(*i.text()[:2], budget=i.places // 8),
    "dilated_neighborhood_attention": lambda i: _a(*i.image(), window=7, dilation=2),
    "dynamic_block_topk": lambda i: _a(*i.text(), top_k=max(1, i.places // 640), causal=True),
    "flex_prefill": lambda i: _a(*i.text(), gamma=0.5),
    "flux_route": lambda i: _a(*i.text(), 0, window=i.places // 8),
    "generalized_neighborhood_attention": lambda i: _a(*i.image(), window=8, stride=4),
    "halo_attention": lambda i: _a(*i.image(), block=8, halo=3),
    "hyper_attention": lambda i: _a(*i.text(), min_seq_len=i.places // 4),
    "index_sparse_attention": lambda i: _a(*i.text(), i.lists()),
    "less_is_more_select": lambda i: _a(i.rng.random((HEADS, i.places), dtype=np.float32), i.places // 16),
    "lightweight_topk_attention": lambda i: _a(*i.text(), lists=i.lists()),
    "minference_vertical_slash": lambda i: _a(*i.text(), vertical=i.places // 32, slash=i.places // 32),
    "moba_select": lambda i: _a(*i.text()[:2], block=i.places // 16),
    "native_sparse_attention": lambda i: _a(
        *i.text(), i.rng.random((1, HEADS, i.places, 3), dtype=np.float32), n_select=8, window=i.places // 16
    ),
    "neighborhood_attention_unfused": lambda i: _a(*i.image(), window=7),
    "overlapped_chunk_attention": lambda i: _a(*i.text()),
    "pooled_block_select_cdf": lambda i: _a(*i.video(5), frames=i.frames, tau=0.5, rho=0.5),
    "power_of_two_attention": lambda i: _a(*i.text(), block=i.places // 64, n_window=4),
    "prefix_global_attention": lambda i: _a(*i.text(), prefix=i.places // 8, radius=i.places // 32),
    "rectified_block_sparse": lambda i: _a(*i.video(4), text=4 * i.frames, tau=0.3),
    "sale_select": lambda i: _a(*i.text()[:2], tau=1.0, min_length=i.places // 2),
    "sparge_attention": lambda i: _a(*i.text(), theta=-0.5, cdf=0.5, causal=True),
    "strided_fixed_sparse_attention": lambda i: _a(*i.text(), stride=int(i.places**0.5)),
    "transient_global_attention": lambda i: _a(
        i.x(1, i.places, HEADS * DIM), *(i.w(HEADS * DIM, HEADS * DIM) for _ in "qkv"),
        np.ones(HEADS * DIM, np.float32), heads=HEADS,
    ),
    "vmoba_select": lambda i: _a(*i.video(), grid=(i.frames, PLACES, PLACES), partition=(2, 4, 4)),
    "windowed_attention": lambda i: _a(
        *i.text(), radius=i.places // 64 * np.arange(1, HEADS + 1), centre=i.centres()
    ),
    "xattention": lambda i: _a(*i.text(), threshold=0.5, causal=True),
}  # fmt: skip


def _masked(q: Any, k: Any, v: Any, mask: NDArray[np.bool_]) -> Callable[[], Any]:
    """Torch's attention with a mask of all pairs, which is made beforehand."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    tq, tk, tv, seen = tensor(q), tensor(k), tensor(v), torch.from_numpy(np.ascontiguousarray(mask))
    return lambda: sdpa(tq, tk, tv, attn_mask=seen)


def _powers(q: Any, k: Any, v: Any, **options: Any) -> Callable[[], Any]:
    mask = sparse.PowerOfTwo(**options)(q[:, :1], k[:, :1]).to_dense_mask()
    return _masked(q, k, v, mask & np.tri(q.shape[2], dtype=bool))


def _windows(q: Any, k: Any, v: Any, *, radius: NDArray[np.int64], centre: NDArray[np.int64]) -> Callable[[], Any]:
    far = np.abs(np.arange(k.shape[2]) - centre[:, None])
    return _masked(q, k, v, (far <= radius[:, None, None])[None])


def _chunks(q: Any, k: Any, v: Any, chunk: int = 40, overlap: int = 5) -> Callable[[], Any]:
    rows, own = np.arange(q.shape[2]), np.arange(q.shape[2])[:, None] // chunk * chunk
    return _masked(q, k, v, (rows >= own - overlap) & (rows < own + chunk + overlap))


def _blocks(q: Any, k: Any, v: Any, block_mask: sparse.BlockMask, *, causal: bool) -> Callable[[], Any]:
    mask = block_mask.to_dense_mask()
    return _masked(q, k, v, np.tril(mask) if causal else mask)


def _lists(q: Any, k: Any, v: Any, lists: sparse.RowLists) -> Callable[[], Any]:
    return _masked(q, k, v, lists.to_dense_mask())


def _prefix(q: Any, k: Any, v: Any, *, prefix: int, radius: int) -> Callable[[], Any]:
    rows = np.arange(q.shape[2])
    first = (rows < prefix) | (rows < prefix)[:, None]
    return _masked(q, k, v, first | (np.abs(rows - rows[:, None]) <= radius))


#: Those whose mask does not depend on the queries, or is given.
PLAIN: dict[str, Callable[..., Callable[[], Any]]] = {
    "block_sparse_attention": _blocks,
    "index_sparse_attention": _lists,
    "lightweight_topk_attention": _lists,
    "overlapped_chunk_attention": _chunks,
    "power_of_two_attention": _powers,
    "prefix_global_attention": _prefix,
    "windowed_attention": _windows,
}

#: Methods of `longattn.sparse` that the registry has in other families.
FURTHER = ("hyper_attention", "descriptor_attention")

_EVERY = EachMethod("sparse-methods", ("sparse",), Inputs, CASES, PLAIN, dict.fromkeys(FURTHER))
add_arguments, measure, panels = _EVERY.add_arguments, _EVERY.measure, _EVERY.panels

SECTIONS = (
    Section(
        "sparse",
        "sparse-methods",
        "Sparse methods",
        f"Random vectors, {HEADS} heads of {DIM} dimensions, float32; methods that only choose are timed choosing. "
        "`× torch` of torch's row: the time of its attention with a mask of all pairs over ours; `error`: the largest "
        "difference of the two results.",
        _EVERY.tables,
        whole("sparse-methods", panels),
    ),
)
