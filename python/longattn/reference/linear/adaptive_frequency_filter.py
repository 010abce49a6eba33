"""AFFNet's filter from its formula, float64, transforms as sums."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def adaptive_frequency_filter(
    x: ArrayLike,
    w1: ArrayLike,
    w2: ArrayLike,
    *,
    b1: ArrayLike | None = None,
    b2: ArrayLike | None = None,
    threshold: float = 0.01,
) -> Float64:
    """Output `[B, C, H, W]`; see `longattn.linear.adaptive_frequency_filter`."""
    x = np.asarray(x, np.float64)
    height, width = x.shape[2:]
    rows, columns = (np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n) for n in (height, width))
    spectrum = np.einsum("ph,bchw,wq->bcpq", rows, x, columns) / np.sqrt(height * width)
    mask = frequency_mask(spectrum[..., : width // 2 + 1], w1, w2, b1, b2, threshold)
    # What the inverse of a real transform makes of the lower half: the upper half is its mirror image.
    lower = mask * spectrum[..., : width // 2 + 1]
    full = np.zeros_like(spectrum)
    for p in range(height):
        for q in range(width):
            mirrored = q > width // 2
            value = lower[:, :, -p % height, width - q].conj() if mirrored else lower[:, :, p, q]
            if q in {0, width - q}:  # its own mirror image along the columns: rows are mirrored, too
                value = (lower[:, :, p, q] + lower[:, :, -p % height, q].conj()) / 2
            full[:, :, p, q] = value
    y = np.einsum("ph,bcpq,wq->bchw", rows.conj(), full, columns.conj()) / np.sqrt(height * width)
    result: Float64 = y.real + x
    return result


def frequency_mask(
    spectrum: NDArray[np.complex128],
    w1: ArrayLike,
    w2: ArrayLike,
    b1: ArrayLike | None,
    b2: ArrayLike | None,
    threshold: float,
) -> NDArray[np.complex128]:
    """The mask of a spectrum `[B, C, H, F]`."""
    w1, w2 = np.asarray(w1, np.float64), np.asarray(w2, np.float64)
    blocks = spectrum.reshape(len(spectrum), w1.shape[1], -1, *spectrum.shape[2:])
    real, imaginary = blocks.real, blocks.imag
    zero = np.zeros(2)
    added = zero if b1 is None else np.asarray(b1, np.float64)[..., None, None]
    after = zero if b2 is None else np.asarray(b2, np.float64)[..., None, None]

    def layer(r: Float64, i: Float64, w: Float64) -> tuple[Float64, Float64]:
        def by(x: Float64, part: int) -> Float64:
            y: Float64 = np.einsum("bkihf,kio->bkohf", x, w[part])
            return y

        return by(r, 0) - by(i, 1), by(i, 0) + by(r, 1)

    r, i = layer(real, imaginary, w1)
    r, i = np.maximum(r + added[0], 0), np.maximum(i + added[1], 0)
    r, i = layer(r, i, w2)
    r, i = r + after[0], i + after[1]
    shrunk = [np.sign(o) * np.maximum(np.abs(o) - threshold, 0) for o in (r, i)]
    mask: NDArray[np.complex128] = (shrunk[0] + 1j * shrunk[1]).reshape(spectrum.shape)
    return mask
