"""Verified sparse attention from its formulas: float64 numpy, one KV head and position after another.

A row of the candidates has the weight `e` and value `v`; an index estimates them as `w` and `u`. Rows are drawn
independently, row i with probability `p_i`, and correct the output `c` and mass of the estimate:

    r = e (v - c) - w (u - c),   y = e - w
    mass = estimated mass + sum y / p,   output = c + (sum r / p) / mass
    variance = sum (1 - p) / p^2 |r - (output - c) y|^2 / mass^2

The random numbers are those of the library, so that both draw the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longattn.reference.retrieval.retrieval_attention import candidates
from longattn.reference.retrieval.signatures import Codes, estimate, unread_log_weights

Float64 = NDArray[np.float64]
Rows = NDArray[np.int64]
Bits = NDArray[np.uint32]

#: Share of the probabilities that does not follow the weights.
UNIFORM = 0.2
#: Size of a first sample, and how many sizes are tried.
PILOT, ROUNDS = 1024.0, 5
#: A sample of more than this part of the candidates is not taken.
LARGEST = 1 / 3
#: Growth from one sample to the next: times what the error calls for, and at least.
GROWTH = (1.1, 1.3)
#: Deviations by which an unread row's logit may be too low without using up epsilon alone.
UNDERESTIMATE = 3.0
#: Directions that an error is taken to have, of those it seems to.
DIRECTIONS = 1 / 1.5
#: Sums with random signs that tell in how many directions the error points.
SKETCHES = 16


# Random numbers


def _mix64(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def key(seed: int, position: int, head: int) -> tuple[int, int]:
    """What the random numbers of one position and KV head are made of."""
    step = 0x9E3779B97F4A7C15
    z = _mix64((seed + step * (position + 1)) % 2**64)
    z = _mix64((z + step * (head + 1)) % 2**64)
    return z % 2**32, z >> 32


def hashes(of: tuple[int, int], rows: ArrayLike) -> Bits:
    """32 random bits of each row."""

    def mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return x ^ (x >> np.uint32(16))

    return mix(mix(np.asarray(rows, np.uint32) ^ np.uint32(of[0])) + np.uint32(of[1]))


def uniforms(of: tuple[int, int], rows: ArrayLike) -> Float64:
    """A number of 0 to 1 for each row: the upper 24 of its bits."""
    return (hashes(of, rows) >> np.uint32(8)).astype(np.float64) / 2**24


# Sampling


def probabilities(shares: ArrayLike, size: float) -> Float64:
    """Chance of each candidate to be drawn, by its share `[n]` of the mass."""
    shares = np.asarray(shares, np.float64)
    even = 1 / shares.size
    chances: Float64 = (1 - UNIFORM) * shares / shares.sum() + UNIFORM * even if shares.sum() > 0 else shares + even
    return np.minimum(1, size * chances)


@dataclass(frozen=True)
class Correction:
    """What a sample says about an estimate, for the heads of a group.

    Attributes:
        out: `[G, Dv]`, corrected outputs.
        certain: `[G, Dv]`, outputs of the estimate corrected by the rows alone that were certain to be drawn.
        mass: `[G]`, corrected mass of all rows.
        sd: `[G]`, root of the expected squared norm of the error of `out`.
        directions: `[G]`, how many directions of equal variance the error is like.
        freedom: `[G]`, how many squared normal numbers the estimate of the variance is like.
    """

    out: Float64
    certain: Float64
    mass: Float64
    sd: Float64
    directions: Float64
    freedom: Float64

    @property
    def shrunken(self) -> Float64:
        """Outputs that take of the correction what its noise does not explain (James and Stein)."""
        shift = self.out - self.certain
        square = (shift**2).sum(axis=-1)
        keep = np.maximum(0, 1 - np.divide(self.sd**2, square, out=np.ones_like(square), where=square > 0))
        shrunken: Float64 = self.certain + keep[:, None] * shift
        return shrunken


def correct(
    weights: ArrayLike,
    values: ArrayLike,
    estimated_weights: ArrayLike,
    estimated_values: ArrayLike,
    chances: ArrayLike,
    signs: Bits,
    steady: tuple[ArrayLike, ArrayLike],
    rest: tuple[ArrayLike, ArrayLike],
) -> Correction:
    """Corrects an estimate by the rows of a sample.

    Args:
        weights: exact weights of the sampled rows, `[G, S]`, in any unit.
        values: `[S, Dv]`.
        estimated_weights: those of the estimate, `[G, S]`.
        estimated_values: `[S, Dv]`.
        chances: the probability each was drawn with, `[S]`.
        signs: `hashes` of the rows.
        steady: mass `[G]` of the rows that are read in any case, and the sums `[G, Dv]` of their weighted values.
        rest: the same of all candidates by the estimate.
    """
    e, v, w, u, p = (np.asarray(x, np.float64) for x in (weights, values, estimated_weights, estimated_values, chances))
    known = np.asarray(steady[0], np.float64) + np.asarray(rest[0], np.float64)
    centre = (np.asarray(steady[1], np.float64) + np.asarray(rest[1], np.float64)) / known[:, None]
    r = e[..., None] * (v - centre[:, None]) - w[..., None] * (u - centre[:, None])
    y = e - w
    mass = known + (y / p).sum(axis=-1)
    shift = (r / p[:, None]).sum(axis=1) / mass[:, None]
    b = (1 - p) / p**2
    error = (r - shift[:, None] * y[..., None]) / mass[:, None, None]
    variance = (b * (error**2).sum(axis=-1)).sum(axis=-1)
    terms = b * (r**2).sum(axis=-1)
    fourth = ((1 - p) * terms**2).sum(axis=-1)
    freedom = np.divide(2 * terms.sum(axis=-1) ** 2, fourth, out=np.full(len(e), np.inf), where=fourth > 0)
    signed = np.where(signs & np.uint32(SKETCHES) == 0, 1, -1) * np.sqrt(b)
    of = np.arange(SKETCHES)[:, None] == signs % np.uint32(SKETCHES)
    sketches = np.einsum("ks,gsd->gkd", of * signed, error)
    products = np.einsum("gkd,gld->gkl", sketches, sketches) ** 2
    squares = (products.sum(axis=(1, 2)) - np.einsum("gkk->g", products)) * SKETCHES / (SKETCHES - 1)
    directions = np.divide(variance**2, squares, out=np.ones(len(e)), where=squares > 0)
    sure = p == 1
    certain = centre + r[:, sure].sum(axis=1) / (known + y[:, sure].sum(axis=-1))[:, None]
    return Correction(centre + shift, certain, mass, np.sqrt(variance), np.maximum(1, directions), freedom)


def deviations(delta: float, directions: ArrayLike, freedom: ArrayLike) -> Float64:
    """Within how many `sd` the norm of an error stays, but for a chance of `delta`.

    The squared norm is like a chi-squared number of `directions` degrees of freedom (Wilson and Hilferty); where the
    variance is estimated from little, Student's t widens it (expanded in the degrees of freedom).
    """
    normal = NormalDist()
    one, z = normal.inv_cdf(1 - delta), normal.inv_cdf(1 - delta / 2)
    d = np.maximum(1, np.asarray(directions, np.float64) * DIRECTIONS)
    norm = np.maximum(0, 1 - 2 / (9 * d) + one * np.sqrt(2 / (9 * d))) ** 1.5
    n = np.maximum(2, np.asarray(freedom, np.float64))
    t = (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )
    widened: Float64 = np.maximum(1, norm) * np.maximum(1, t / z)
    return widened


# Attention


@dataclass(frozen=True)
class HeadEstimates:
    """What an index of codes knows of one KV head.

    Attributes:
        codes: of the keys.
        coded: rows that have a code.
        value_ids: `[coded]`, value cluster of each row.
        value_means: `[clusters, Dv]`.
        value_norm: root mean square norm of the values.
    """

    codes: Codes
    coded: int
    value_ids: NDArray[np.integer]
    value_means: Float64
    value_norm: float


@dataclass(frozen=True)
class Verified:
    """Result of `verified_sparse_attention`.

    Attributes:
        out: `[Hq, Lq, Dv]`.
        lse: `[Hq, Lq]`.
        error_estimate: `[Hq, Lq]`, expected norm of the error, in the unit that was asked for.
        sampled: `[Hkv][Lq]`, rows of the sample, or `None` where all rows are read.
        sizes: `[Hkv, Lq]`, size of the last sample.
    """

    out: Float64
    lse: Float64
    error_estimate: Float64
    sampled: list[list[Rows | None]]
    sizes: Float64


class Group:
    """One KV head's query group at one position, over `total` rows."""

    def __init__(
        self,
        q: ArrayLike,
        keys: ArrayLike,
        values: ArrayLike,
        head: HeadEstimates,
        *,
        sinks: int = 4,
        window: int = 512,
        scale: float | None = None,
        sink_logits: ArrayLike | None = None,
    ) -> None:
        """For queries `[G, D]`, keys `[N, D]`, values `[N, Dv]`, all of which they see, and sink logits `[G]`."""
        q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
        q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
        self.total, self.head, self.values = len(keys), head, values
        self.candidates = candidates(self.total, head.coded, sinks, window)
        self.logits = q @ keys.T
        estimates = np.stack([estimate(x, head.codes)[self.candidates] for x in q])
        self.sigma = head.codes.sigma * np.linalg.norm(q, axis=-1)
        steady = np.ones(self.total, bool)
        steady[self.candidates] = False
        top = np.maximum(self.logits.max(axis=-1), estimates.max(axis=-1, initial=-np.inf))
        self.unit = top
        self.weights = np.exp(self.logits - top[:, None])
        sink = 0.0 if sink_logits is None else np.exp(np.asarray(sink_logits, np.float64) - top)
        self.steady = self.weights[:, steady].sum(axis=-1) + sink, self.weights[:, steady] @ values[steady]
        shares = np.exp(estimates - top[:, None])
        seen = self.steady[0] - sink
        self.shares = (shares / (seen + shares.sum(axis=-1))[:, None]).mean(axis=0)
        log_weights = [unread_log_weights(s, sigma) for s, sigma in zip(estimates, self.sigma, strict=True)]
        self.estimated = np.exp(np.stack(log_weights) - top[:, None])
        self.stand_ins = head.value_means[head.value_ids[self.candidates]]
        self.rest = self.estimated.sum(axis=-1), self.estimated @ self.stand_ins

    def exact(self) -> tuple[Float64, Float64]:
        """Output and lse over all rows."""
        mass = self.steady[0] + self.weights[:, self.candidates].sum(axis=-1)
        numerator = self.steady[1] + self.weights[:, self.candidates] @ self.values[self.candidates]
        return numerator / mass[:, None], self.unit + np.log(mass)

    def correct(self, rows: Rows, chances: Float64, signs: Bits) -> Correction:
        """The correction by these rows; `chances` and `signs` are theirs."""
        at = rows - self.candidates[0]
        return correct(
            self.weights[:, rows],
            self.values[rows],
            self.estimated[:, at],
            self.stand_ins[at],
            chances,
            signs,
            self.steady,
            self.rest,
        )

    def wanted(self, correction: Correction, size: float, epsilon: float, delta: float, relative_to: str) -> float:
        """Size of a sample that keeps every head within epsilon."""
        norm = np.linalg.norm(correction.out, axis=-1)
        allowed = epsilon * self.head.value_norm if relative_to == "values" else epsilon / (1 + epsilon) * norm
        by_variance = (
            size * (deviations(delta, correction.directions, correction.freedom) * correction.sd / allowed) ** 2
        )
        slope = (1 - UNIFORM) / self.shares.sum()
        by_row = len(norm) * np.exp(UNDERESTIMATE * self.sigma) / slope * self.head.value_norm / allowed
        return float(np.maximum(by_variance, by_row).max())


def verified_sparse_attention(
    q: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    heads: Sequence[HeadEstimates],
    *,
    epsilon: float = 0.1,
    delta: float = 0.05,
    relative_to: str = "output",
    sinks: int = 4,
    window: int = 512,
    scale: float | None = None,
    seed: int = 0,
    sink_logits: ArrayLike | None = None,
) -> Verified:
    """Samples rows until the error is within epsilon, or reads all.

    Args:
        q: queries `[Hq, Lq, D]`, the last positions of the sequence.
        keys: `[Hkv, N, D]`.
        values: `[Hkv, N, Dv]`.
        heads: what the index knows of each KV head.
        epsilon: largest norm of the error, in units of `relative_to`.
        delta: chance of a larger one.
        relative_to: `"output"` or `"values"`.
        sinks: first rows, always read.
        window: last rows, always read.
        scale: factor of the logits; `None` is `D ** -0.5`.
        seed: of the random numbers.
        sink_logits: `[Hq]`, in the denominator only.

    References:
        A. Desai et al., "vAttention: Verified Sparse Attention", 2025 (arXiv 2510.05688).
    """
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    size, rows = len(q) // len(keys), q.shape[1]
    out, lse = np.zeros((*q.shape[:2], values.shape[-1])), np.zeros(q.shape[:2])
    errors, sizes = np.zeros(q.shape[:2]), np.zeros((len(keys), rows))
    sampled: list[list[Rows | None]] = []
    for h, head in enumerate(heads):
        mine = slice(h * size, (h + 1) * size)
        sinks_of = None if sink_logits is None else np.asarray(sink_logits)[mine]
        of_head: list[Rows | None] = []
        for i in range(rows):
            total = keys.shape[1] - rows + i + 1
            group = Group(
                q[mine, i],
                keys[h, :total],
                values[h, :total],
                head,
                sinks=sinks,
                window=window,
                scale=scale,
                sink_logits=sinks_of,
            )
            found = _sampled(group, key(seed, total - 1, h), epsilon, delta, relative_to)
            if found is None:
                out[mine, i], lse[mine, i] = group.exact()
                of_head.append(None)
                continue
            correction, drawn, sizes[h, i] = found
            out[mine, i], lse[mine, i] = correction.out, group.unit + np.log(correction.mass)
            unit = head.value_norm if relative_to == "values" else np.linalg.norm(correction.out, axis=-1)
            errors[mine, i] = correction.sd / unit
            of_head.append(drawn)
        sampled.append(of_head)
    return Verified(out, lse, errors, sampled, sizes)


def _sampled(
    group: Group, of: tuple[int, int], epsilon: float, delta: float, relative_to: str
) -> tuple[Correction, Rows, float] | None:
    """The first sample that is good enough: its correction, its rows, its size."""
    numbers = uniforms(of, group.candidates)
    size = PILOT
    for _ in range(ROUNDS):
        chances = probabilities(group.shares, size)
        drawn = numbers < chances
        if drawn.sum() > int(len(drawn) * LARGEST):
            return None
        rows = group.candidates[drawn]
        found = group.correct(rows, chances[drawn], hashes(of, rows))
        wanted = group.wanted(found, size, epsilon, delta, relative_to)
        if wanted <= size:
            return found, rows, size
        if not np.isfinite(wanted):
            return None
        size = max(GROWTH[0] * wanted, GROWTH[1] * size)
    return None
