"""Vision methods as a few lines of torch, for those that are natural to write so: arguments as of ours, a call back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from longattn.bench.peers import tensor

Call = Callable[[], Any]


def _tensors(*arrays: Any) -> list[Any]:
    return [tensor(np.ascontiguousarray(x)) for x in arrays]


def _split(x: Any, heads: int) -> Any:
    """Rows `[.., L, heads * D]` as `[.., heads, L, D]`."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def _join(x: Any) -> Any:
    return x.transpose(-2, -3).flatten(-2)


def _attend(rows: list[Any], heads: int, scale: float | None = None) -> Any:
    """Attention of queries, keys and values whose heads lie side by side."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    q, k, v = (_split(x, heads) for x in rows)
    return _join(sdpa(q, k, v, scale=scale))


def _windows(x: Any, size: int) -> Any:
    """A grid `[B, H, W, C]` as `[B, H / size, W / size, size * size, C]`."""
    return x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3, 4)


def _whole(x: Any, size: int) -> Any:
    return x.unflatten(3, (size, size)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _channel_groups(x: Any, wq: Any, wk: Any, wv: Any, *, groups: int) -> Call:
    x, wq, wk, wv = _tensors(x, wq, wk, wv)

    def call() -> Any:
        # Channels of a group are the rows of attention: queries, keys and values transposed.
        q, k, v = (_split(x @ w, groups) for w in (wq, wk, wv))
        weights = (q.mT @ k * q.shape[-1] ** -0.5).softmax(-1)
        return _join(v @ weights.mT)

    return call


def _quasi(q: Any, k: Any, v: Any) -> Call:
    import torch

    q, k, v = _tensors(q, k, v)

    def call() -> Any:
        scale = q.shape[-1] ** -0.5
        return (torch.tanh(scale * q @ k.mT) * torch.sigmoid(-scale * torch.cdist(q, k, p=1.0))) @ v

    return call


def _contrast(q: Any, k: Any, v: Any) -> Call:
    q, k, v = _tensors(q, k, v)

    def call() -> Any:
        weights = (q.shape[-1] ** -0.5 * q @ k.mT).softmax(-1)
        mean = weights.mean(-1, keepdim=True)
        return (mean + 1.67 * (weights - mean)).clip(0, 1) @ v

    return call


def _long_short(x: Any, wq: Any, wk: Any, wv: Any, *, heads: int, group: int, interval: int) -> Call:
    x, wq, wk, wv = _tensors(x, wq, wk, wv)
    return lambda: _whole(_attend([_windows(x @ w, group) for w in (wq, wk, wv)], heads), group)


def _overlapping(x: Any, wq: Any, wk: Any, wv: Any, *, heads: int, window: int, overlap: float) -> Call:
    import torch

    x, wq, wk, wv = _tensors(x, wq, wk, wv)
    size = int(window * (1 + overlap))

    def wide(w: Any) -> Any:
        rim = (size - window) // 2
        padded = torch.nn.functional.pad(x @ w, (0, 0, rim, rim, rim, rim))
        # [B, H / w, W / w, C, size, size] -> [.., size * size, C]
        return padded.unfold(1, size, window).unfold(2, size, window).flatten(-2).mT

    return lambda: _whole(_attend([_windows(x @ wq, window), wide(wk), wide(wv)], heads), window)


def _frames(q: Any, k: Any, v: Any, *, heads: int) -> Call:
    q, k, v = _tensors(q, k, v)
    return lambda: _attend([x.flatten(1, 2) for x in (q, k, v)], heads).reshape(q.shape)


def _two_streams(x: Any, first: Any, second: Any, wq: Any, one: Any, two: Any, *, heads: int) -> Call:
    x, first, second, wq, *pairs = _tensors(x, first, second, wq, *one, *two)

    def call() -> Any:
        q = x @ wq
        one = _attend([q, first @ pairs[0], first @ pairs[1]], heads)
        return one + _attend([q, second @ pairs[2], second @ pairs[3]], heads)

    return call


def _self_and_cross(a: Any, b: Any, wq: Any, wk: Any, wv: Any, fuse: Any, *, heads: int) -> Call:
    import torch

    a, b, wq, wk, wv, w = _tensors(a, b, wq, wk, wv, fuse[0])

    def call() -> Any:
        of = [[x @ m for m in (wq, wk, wv)] for x in (a, b)]
        new = []
        for x, (q, k, v), (_, k2, v2) in ((a, *of), (b, *reversed(of))):
            new.append(x + torch.cat([_attend([q, k, v], heads), _attend([q, k2, v2], heads)], -1) @ w)
        return new[0]

    return call


def _features_and_costs(x: Any, cost: Any, wq: Any, wk: Any, wv: Any) -> Call:
    import torch

    x, cost, wq, wk, wv = _tensors(x, cost, wq, wk, wv)

    def call() -> Any:
        both = torch.cat([x, cost], -1)
        out = _attend([both @ wq, both @ wk, torch.cat([x @ wv, cost], -1)], 1)
        return x + out[..., : x.shape[-1]]

    return call


def _partial(x: Any, split: int, _mode: str, weights: Any, *, kernel: Any, heads: int) -> Call:
    import torch

    x, kernel, *w = _tensors(x, kernel, *weights)
    taps = kernel.permute(3, 2, 0, 1).contiguous()

    def call() -> Any:
        one = torch.nn.functional.conv2d(x[..., :split].permute(0, 3, 1, 2), taps, padding=1).permute(0, 2, 3, 1)
        rows = x[..., split:].flatten(1, 2)
        two = _attend([rows @ m for m in w], heads).reshape(*x.shape[:3], -1)
        return torch.cat([one, two], -1)

    return call


def _strip(x: Any, kernel: Any, wq: Any, wk: Any, wv: Any, *, heads: int) -> Call:
    import torch

    x, kernel, wq, wk, wv = _tensors(x, kernel, wq, wk, wv)
    taps, step = kernel.permute(2, 0, 1)[:, None].contiguous(), kernel.shape[0]

    def call() -> Any:
        grid = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), taps, stride=step, groups=x.shape[-1])
        reduced = grid.flatten(2).mT
        return _attend([x.flatten(1, 2) @ wq, reduced @ wk, reduced @ wv], heads, 1.0).reshape(*x.shape[:3], -1)

    return call


#: What can be written so, by the method's name: a function of its arguments in the benchmark.
PLAIN: dict[str, Callable[..., Call]] = {
    "channel_group_attention": _channel_groups,
    "compositional_quasi_attention": _quasi,
    "cross_image_attention": _contrast,
    "extended_frame_attention": _frames,
    "integrative_feature_cost_attention": _features_and_costs,
    "long_short_distance_attention": _long_short,
    "overlapping_cross_attention": _overlapping,
    "parallel_self_cross_attention": _self_and_cross,
    "partial_visual_attention": _partial,
    "query_shared_cross_attention": _two_streams,
    "strip_self_attention": _strip,
}
