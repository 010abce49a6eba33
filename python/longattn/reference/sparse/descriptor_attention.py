"""Descriptor attention from its formulas: float64 numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.dense import attention


def resize_patches(
    x: NDArray[np.float64], grid: tuple[int, int], *, down: int, mode: str, kernel: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Patches `[h * w, C]` of one frame on the smaller grid."""
    height, width = grid
    cut = x.reshape(height, width, -1)
    rows, columns = height // down, width // down
    out = np.zeros((rows, columns, x.shape[-1]))
    weights = np.full((down, down, x.shape[-1]), 1 / down**2) if kernel is None else np.asarray(kernel, np.float64)
    for i, j in np.ndindex(rows, columns):
        if mode != "bilinear":
            out[i, j] = (cut[i * down : (i + 1) * down, j * down : (j + 1) * down] * weights).sum(axis=(0, 1))
            continue
        y = min(max((i + 0.5) * height / rows - 0.5, 0), height - 1)
        z = min(max((j + 0.5) * width / columns - 0.5, 0), width - 1)
        for a in (int(y), min(int(y) + 1, height - 1)):
            for b in (int(z), min(int(z) + 1, width - 1)):
                share_y = (1 - (y - int(y)) if a == int(y) else y - int(y)) if int(y) + 1 < height else 0.5
                share_z = (1 - (z - int(z)) if b == int(z) else z - int(z)) if int(z) + 1 < width else 0.5
                out[i, j] += share_y * share_z * cut[a, b]
    return out.reshape(rows * columns, -1)


def descriptor_attention(
    x: ArrayLike,
    wq: ArrayLike,
    wk: ArrayLike,
    wv: ArrayLike,
    wo: ArrayLike,
    *,
    heads: int,
    grid: tuple[int, int],
    special: int = 5,
    down: int = 4,
    mode: str = "bilinear",
    kernel: ArrayLike | None = None,
    keyframes: Sequence[int] | None = None,
    every: int = 10,
    biases: Sequence[ArrayLike | None] = (None, None, None, None),
    scale: float | None = None,
) -> NDArray[np.float64]:
    """See `longattn.sparse.descriptor_attention`; key frames are given where there are clusters to pick them from."""
    x, wq, wk, wv, wo = (np.asarray(a, np.float64) for a in (x, wq, wk, wv, wo))
    batch, frames, tokens, channels = x.shape
    if keyframes is None:
        if frames // every > 1:
            raise ValueError("keyframes: got None, expected frames: the reference does not cluster")
        keyframes = [0]
    bias: list[Any] = [0.0 if b is None else np.asarray(b, np.float64) for b in biases]
    sources = []
    for b in range(batch):
        rows = [x[b, f, special:] for f in keyframes]
        for f in range(frames):
            rows.append(x[b, f, :special])
            rows.append(resize_patches(x[b, f, special:], grid, down=down, mode=mode, kernel=kernel))
        sources.append(np.concatenate(rows))
    source = np.stack(sources)

    def split(y: NDArray[np.float64], w: NDArray[np.float64], c: Any) -> NDArray[np.float64]:
        projected: NDArray[np.float64] = y @ w + c
        return projected.reshape(batch, y.shape[1], heads, -1).swapaxes(1, 2)

    q = split(x.reshape(batch, -1, channels), wq, bias[0])
    out = attention(q, split(source, wk, bias[1]), split(source, wv, bias[2]), scale=scale)
    found: NDArray[np.float64] = out.swapaxes(1, 2).reshape(batch, frames, tokens, -1) @ wo + bias[3]
    return found
