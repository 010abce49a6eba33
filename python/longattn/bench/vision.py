"""One row per vision method, at one size of image or video, beside a plain torch formulation where one is natural."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import vision
from longattn.bench.each_method import COLUMNS, Arguments, EachMethod
from longattn.bench.each_method import call_with as _a
from longattn.bench.sections import Section, whole
from longattn.bench.vision_torch import PLAIN
from longattn.linear import MambaWeights

__all__ = ["COLUMNS", "SECTIONS", "SUMMARY", "add_arguments", "measure", "panels"]

SUMMARY = "every vision method at one size, beside plain torch formulations"
#: Places of a side of an image, frames of a video, channels, heads.
SIDE, FRAMES, CHANNELS, HEADS = 48, 4, 64, 4
QUICK_SIDE, QUICK_FRAMES = 12, 2


class Inputs:
    """Random features and weights of a size."""

    def __init__(self, quick: bool) -> None:
        self.rng = np.random.default_rng(0)
        self.side, self.frames = (QUICK_SIDE, QUICK_FRAMES) if quick else (SIDE, FRAMES)
        self.places, self.size = self.side**2, f"{self.frames} frames of {self.side}x{self.side}"

    def x(self, *shape: int) -> NDArray[np.float32]:
        """Features."""
        return self.rng.standard_normal(shape, dtype=np.float32)

    def image(self, channels: int = CHANNELS) -> NDArray[np.float32]:
        """A grid `[1, H, W, C]`."""
        return self.x(1, self.side, self.side, channels)

    def video(self, channels: int = CHANNELS) -> NDArray[np.float32]:
        """A grid `[1, T, H, W, C]`."""
        return self.x(1, self.frames, self.side, self.side, channels)

    def rows(self, channels: int = CHANNELS) -> NDArray[np.float32]:
        """An image's places `[1, L, C]`."""
        return self.x(1, self.side**2, channels)

    def heads(self, dim: int = CHANNELS // HEADS) -> NDArray[np.float32]:
        """An image's places by heads, `[1, H, L, D]`."""
        return self.x(1, HEADS, self.side**2, dim)

    def w(self, inputs: int = CHANNELS, outputs: int = CHANNELS) -> NDArray[np.float32]:
        """Weights that keep the size of numbers."""
        return np.asarray(self.rng.standard_normal((inputs, outputs)) / np.sqrt(inputs), np.float32)

    def layer(self, n: int = 3) -> list[NDArray[np.float32]]:
        """Projections."""
        return [self.w() for _ in range(n)]

    def taps(self, *shape: int) -> NDArray[np.float32]:
        """A convolution."""
        made: NDArray[np.float32] = self.x(*shape) / np.float32(np.sqrt(np.prod(shape[:-1])))
        return made

    def members(self) -> NDArray[Any]:
        """Proxies of windows of a video."""
        return vision.window_members((self.frames, self.side, self.side), (1, 4, 4), seed=0)

    def scores(self, *shape: int) -> NDArray[np.float64]:
        """Positive numbers."""
        return self.rng.random(shape)

    def prompts(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values of twenty prompts of a token."""
        return self.x(HEADS, 20, 1, 16), self.x(HEADS, 20, 1, 16)

    def chosen(self, *shape: int) -> NDArray[np.int64]:
        """Nine of them."""
        return np.argsort(self.rng.random((*shape, 20)), axis=-1)[..., :9]

    def regions(self) -> NDArray[np.int64]:
        """Regions of an image by two boxes."""
        return vision.box_regions(np.array([[0.0, 0.0, 0.6, 0.7], [0.4, 0.3, 1.0, 1.0]]), (self.side, self.side))[0]

    def mamba(self) -> MambaWeights:
        """A Mamba block of 16 states."""
        n, states = CHANNELS, 16
        return MambaWeights(
            w_in=self.w(), w_gate=self.w(), w_dt=(self.w(n, 4), self.w(4, n)), w_b=self.w(n, states),
            w_c=self.w(n, states), a=-np.exp(self.x(n, states)), skip=self.x(n), w_out=self.w(),
        )  # fmt: skip


#: Arguments of each method.
CASES: dict[str, Callable[[Inputs], Arguments]] = {
    "adaptive_cross_layer_attention": lambda i: _a(
        i.image(), [i.image(), i.image()], i.w(), i.w(CHANNELS, 12), i.w(CHANNELS, 6), i.taps(3, 3, CHANNELS)
    ),
    "asymmetric_mixed_attention": lambda i: _a(
        i.image(), [i.x(1, 12, 12, CHANNELS)], tuple(i.taps(3, 3, CHANNELS) for _ in "qkv"), *i.layer(), heads=HEADS
    ),
    "attention_adaptive_pooling": lambda i: _a(
        i.scores(i.places + 1, i.places + 1), *(2 * ((i.heads()[0], i.heads()[0]),) for _ in range(2)), least=0
    ),
    "attention_guided_crop": lambda i: _a(
        vision.cls_attention(i.x(1, HEADS, 1, 16), i.x(1, HEADS, i.side**2 + 1, 16)), (i.side, i.side),
        crops=60, top=20,
    ),
    "attention_rollout_select": lambda i: _a([(i.heads(), i.heads())] * 3, i.heads(), i.heads(), i.heads()),
    "cascaded_group_attention": lambda i: _a(
        i.image(), [i.w(16, 48) for _ in range(HEADS)], [i.taps(5, 5, 16) for _ in range(HEADS)], i.w(),
        key_dim=16, window=12,
    ),
    "channel_group_attention": lambda i: _a(i.rows(), *i.layer(), groups=HEADS),
    "compositional_quasi_attention": lambda i: _a(i.heads(), i.heads(), i.heads()),
    "criss_cross_attention": lambda i: _a(i.image(), i.w(CHANNELS, 8), i.w(CHANNELS, 8), i.w()),
    "cross_image_attention": lambda i: _a(i.heads(), i.heads(), i.heads()),
    "deformable_kv_attention_2d": lambda i: _a(
        i.image(), *i.layer(), heads=HEADS, offset_kernel=i.taps(5, 5, CHANNELS), offset_weights=i.w(CHANNELS, 2),
        stride=4,
    ),
    "deformable_kv_attention_3d": lambda i: _a(
        i.video(), *i.layer(), heads=HEADS, offset_kernel=i.taps(3, 3, 3, CHANNELS), offset_weights=i.w(CHANNELS, 3),
        stride=4,
    ),
    "deformable_token_merging": lambda i: _a(
        i.image(), i.w(4 * CHANNELS, 2 * CHANNELS), offset_kernel=i.x(2, 2, CHANNELS, 8) / 16
    ),
    "distributed_progressive_attention": lambda i: _a(
        i.image(), i.image(), tuple(i.layer(4)), tuple(i.layer(4)), heads=HEADS, region=4
    ),
    "embedding_free_attention": lambda i: _a(i.image(), i.w(), heads=HEADS, reduction=4),
    "extended_frame_attention": lambda i: _a(
        *(i.x(1, i.frames, i.side**2, CHANNELS) for _ in "qkv"), heads=HEADS
    ),
    "feature_cluster_attention": lambda i: _a(i.heads(), i.heads(), i.heads(), cluster=i.side**2 // 16, overlap=8),
    "focal_modulation": lambda i: _a(
        i.image(), i.w(CHANNELS, 2 * CHANNELS + 3), [i.taps(3, 3, CHANNELS), i.taps(5, 5, CHANNELS)], i.w(), i.w()
    ),
    "forward_cross_attention": lambda i: _a(i.image(), i.x(1, 64, CHANNELS), *i.layer(), heads=HEADS),
    "global_query_window_attention": lambda i: _a(i.image(), i.w(), i.w(), heads=HEADS, window=12, wq=i.w()),
    "gwpr_token_ranking": lambda i: _a(i.heads(), i.heads(), ratio=0.5),
    "hierarchical_attention_pruning": lambda i: _a(
        *((i.heads(), i.heads()) for _ in range(2)), budget=i.places // 4, width=i.side, prefix=0
    ),
    "hierarchical_global_local_attention": lambda i: _a(
        i.video(), tuple(i.layer(4)), tuple(i.layer(4)), heads=HEADS, tiles=2
    ),
    "integrative_feature_cost_attention": lambda i: _a(
        i.rows(), i.rows(i.side**2), i.w(CHANNELS + i.side**2), i.w(CHANNELS + i.side**2), i.w()
    ),
    "layer_and_channel_spatial_attention": lambda i: _a(i.x(1, 8, i.side, i.side, CHANNELS) / i.side),
    "local_attention_mamba": lambda i: _a(i.image(), tuple(i.layer(4)), i.mamba(), window=12, heads=HEADS),
    "long_short_distance_attention": lambda i: _a(i.image(), *i.layer(), heads=HEADS, group=12, interval=1),
    "match_to_match_additive_attention": lambda i: _a(
        i.heads(), i.heads(), i.heads(), i.x(HEADS, 16), i.x(HEADS, 8), i.w(8, 16)
    ),
    "mediator_attention": lambda i: _a(i.heads(), i.heads(), i.heads(), (i.side, i.side), mediators=36),
    "nested_attention": lambda i: _a(
        i.heads(), i.x(1, HEADS, 77, 16), i.x(1, HEADS, 77, 16), {5: (i.x(1, HEADS, 16, 16), i.x(1, HEADS, 16, 16))}
    ),
    "overlapping_cross_attention": lambda i: _a(i.image(), *i.layer(), heads=HEADS, window=12, overlap=0.5),
    "parallel_self_cross_attention": lambda i: _a(
        i.rows(), i.rows(), *i.layer(), [i.w(2 * CHANNELS, CHANNELS)], heads=HEADS
    ),
    "partial_visual_attention": lambda i: _a(
        i.image(), CHANNELS // 4, "attention", tuple(i.w(CHANNELS * 3 // 4, CHANNELS * 3 // 4) for _ in "qkv"),
        kernel=i.x(3, 3, CHANNELS // 4, CHANNELS // 4) / 12, heads=HEADS,
    ),
    "polyline_path_masked_attention": lambda i: _a(
        *(i.x(1, HEADS, i.side, i.side, 16) for _ in "qkv"),
        *(-i.rng.random((1, i.side, i.side, HEADS), dtype=np.float32) for _ in "xy"),
    ),
    "proxy_token_attention": lambda i: _a(
        i.video(), tuple(i.layer(4)), tuple(i.layer(4)), heads=HEADS, windows=(1, 4, 4), index=i.members()
    ),
    "pyramid_token_pruning": lambda i: _a(
        i.scores(i.frames), *(i.scores(i.frames, i.places) for _ in range(2)), keep=0.25
    ),
    "query_shared_cross_attention": lambda i: _a(
        i.rows(), i.rows(), i.rows(), i.w(), (i.w(), i.w()), (i.w(), i.w()), heads=HEADS
    ),
    "reference_attention": lambda i: _a(
        tuple(i.x(1, HEADS, 77, 16) for _ in "qkv"), (i.heads(), i.heads(), i.heads()),
        (i.heads(), i.heads(), i.heads()),
    ),
    "regional_cross_attention": lambda i: _a(
        i.x(1, HEADS, i.side, i.side, 16), *(i.x(1, HEADS, 3, 77, 16) for _ in "kv"), i.regions()
    ),
    "scale_patch_attention": lambda i: _a(
        i.x(1, i.side**2 // 4, 5, CHANNELS), tuple(i.layer(4)), tuple(i.layer(4)), heads=HEADS
    ),
    "stacked_temporal_attention": lambda i: _a(
        i.x(1, i.frames, i.side**2, CHANNELS), tuple(i.layer(4)), heads=HEADS
    ),
    "strip_self_attention": lambda i: _a(
        i.image(), i.taps(4, 4, CHANNELS), i.w(CHANNELS, HEADS), i.w(CHANNELS, HEADS), i.w(), heads=HEADS
    ),
    "super_token_attention": lambda i: _a(i.image(), *i.layer(), heads=HEADS, cell=6),
    "swapped_window_cross_attention": lambda i: _a(
        i.video(), i.video(), tuple(i.layer(4)), heads=HEADS, windows=(1, 4, 4)
    ),
    "text_guided_vision_pruning": lambda i: _a(
        i.heads(), i.heads(), np.arange(i.places - i.places // 8, i.places), np.arange(i.places - i.places // 8),
        keep=i.places // 4,
    ),
    "token_coordinated_prompt_attention": lambda i: _a(
        *(i.heads() for _ in "qkv"), i.prompts(), i.prompts(), i.chosen(1), i.chosen(1, i.places - 1)
    ),
    "trajectory_attention": lambda i: _a(
        *(i.x(1, HEADS, i.frames * i.side**2, 16) for _ in "qkv"), i.x(i.frames - 1, 2, i.side, i.side)
    ),
    "view_integrated_attention": lambda i: _a(i.x(1, 2, i.frames, i.side**2, CHANNELS), tuple(i.layer(4)), heads=HEADS),
    "zeroth_order_token_pruning": lambda i: _a(i.rows(), i.layer(2), keep=i.places // 8),
}  # fmt: skip


_EVERY = EachMethod("vision", ("vision",), Inputs, CASES, PLAIN)
add_arguments, measure, panels = _EVERY.add_arguments, _EVERY.measure, _EVERY.panels

SECTIONS = (
    Section(
        "sparse",
        "vision",
        "Methods over images and videos",
        f"Random features and weights, {CHANNELS} channels, {HEADS} heads, float32. `× torch` of torch's row: its time "
        "over ours; `error`: the largest difference of the two results.",
        _EVERY.tables,
        whole("vision", panels),
    ),
)
