"""The codes of `longattn.index.Signatures`, and what is estimated from them. Nothing is checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]

#: Grid steps that a code may choose from, relative to the root mean square of the key's coordinates.
STEPS = {1: (1.0,), 2: (0.6, 0.8, 1.0, 1.2, 1.45, 1.7), 4: (0.22, 0.27, 0.32, 0.37, 0.42)}

#: Keys are coded in blocks; an incomplete block has no code yet.
BLOCK = 16


def normals(count: int, seed: int) -> Float64:
    """The first normal numbers of a seed.

    They come from SplitMix64 by Box and Muller's formula, two draws each, so that a seed means the same numbers
    everywhere.
    """
    # The state grows by a constant from draw to draw, modulo 2**64, as all of this.
    z = np.arange(1, 2 * count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform = ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53
    numbers: Float64 = np.sqrt(-2 * np.log(1 - uniform[::2])) * np.cos(2 * np.pi * uniform[1::2])
    return numbers


def rotation(dim: int, seed: int) -> Float64:
    """The random orthogonal matrix `[dim, dim]` of a seed: Gram-Schmidt on rows of normal numbers."""
    matrix = normals(dim * dim, seed).reshape(dim, dim)
    for i in range(dim):
        for _ in range(2):  # the second pass removes what rounding left
            matrix[i] -= matrix[:i].T @ (matrix[:i] @ matrix[i])
        matrix[i] /= np.linalg.norm(matrix[i])
    return matrix


@dataclass(frozen=True)
class Codes:
    """Codes of one head's keys.

    Attributes:
        points: `[N, D]`, grid points: multiples of 1/2 from `-(2**bits - 1) / 2` up, 1 apart.
        factors: `[N]`, what makes `factor * <q, point>` unbiased: `|x|^2 / <point, x>`.
        deviations: `[N]`, standard deviation of that estimate for a query of norm 1: `|x| tan(angle) / sqrt(D - 1)`.
        centre: `[D]`, what was subtracted from the keys.
        rotation: `[D, D]`, what they were multiplied by then.
    """

    points: Float64
    factors: Float64
    deviations: Float64
    centre: Float64
    rotation: Float64

    @property
    def sigma(self) -> float:
        """Root mean square error for a query of norm 1."""
        return float(np.sqrt(np.mean(self.deviations**2)))


def encode(keys: ArrayLike, bits: int, seed: int = 0, centred: bool = True) -> Codes:
    """Codes of the keys `[N, D]` of one head, fitted on these keys.

    A key, less the mean key (if `centred`) and rotated, becomes the grid point nearest to it in angle: of the points
    that plain rounding gives for each step in `STEPS`, the one with the largest cosine.
    """
    keys = np.asarray(keys, np.float64)
    dim = keys.shape[-1]
    centre, turn = keys.mean(axis=0) if centred else np.zeros(dim), rotation(dim, seed)
    x = (keys - centre) @ turn.T
    norm = np.linalg.norm(x, axis=-1)
    unit = np.divide(np.sqrt(dim), norm, out=np.zeros_like(norm), where=norm > 0)[:, None]
    top = (2**bits - 1) / 2
    points = np.full_like(x, 0.5)
    best = np.full(len(x), -1.0)
    for step in STEPS[bits]:
        # To the nearest odd multiple of 1/2; between two of them to the one whose lower neighbour is even.
        tried = np.clip(np.round(x * unit / step - 0.5) + 0.5, -top, top)
        cosine = (tried * x).sum(axis=-1) / np.linalg.norm(tried, axis=-1) / np.where(norm > 0, norm, 1)
        better = cosine > best
        points[better], best[better] = tried[better], cosine[better]
    product = (points * x).sum(axis=-1)
    factors = np.divide(norm**2, product, out=np.zeros_like(norm), where=norm > 0)
    tangent = np.sqrt(np.maximum(0, 1 - best**2)) / np.where(best > 0, best, 1)
    deviations = np.where(norm > 0, norm * tangent / np.sqrt(max(dim, 2) - 1), 0)
    return Codes(points, factors, deviations, centre, turn)


def estimate(q: ArrayLike, codes: Codes) -> Float64:
    """Estimated `<q, k>` `[N]` of every coded key for a query `[D]`, whose rotation is rounded to signed bytes."""
    q = np.asarray(q, np.float64)
    turned = codes.rotation @ q
    step = np.abs(turned).max() / 127 or 1.0
    rounded = step * np.round(turned / step)
    estimates: Float64 = codes.factors * (codes.points @ rounded) + codes.centre @ q
    return estimates


def unread_log_weights(logits: ArrayLike, sigma: float) -> Float64:
    """Log of what a row that is not read weighs, from the estimated logits `[n]` of all candidates.

    With an error `sigma` below half a nat it is `s - sigma^2 / 2`. Above that it is the logarithm of the
    mean of `exp(true logit)` given the estimate, the true logits being normal with the estimates' mean and their
    variance less `sigma^2`: rows are unread because their estimate is low, which does not bias this mean.
    """
    s = np.asarray(logits, np.float64)
    noise = sigma**2
    if noise < 0.25:
        return s - noise / 2
    signal = max(s.var() - noise, 0.05 * s.var())
    slope = signal / (signal + noise)
    # Above ln n the correction would stand for errors rarer than one row in n.
    weights: Float64 = slope * s + s.mean() * (1 - slope) + min(slope * noise / 2, np.log(s.size))
    return weights
