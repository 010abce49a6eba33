"""QAdA: whether a head needs more than its local keys, from mean and covariance of the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import attention_inputs, check_float_storage, check_heads, flag, integer, real, scale_factor
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.reference import diagnostics as reference

Float64 = NDArray[np.float64]

#: Rows whose moments are taken together.
_PART = 4096


class KeyMoments:
    """Mean and covariance of the keys of each head, which follow keys that come and go.

    Appended keys enter by Welford's update, keys that leave are taken out by its inverse; both are exact but for
    rounding (float64). With `rank`, `quadratic` uses the diagonal and the `rank` largest eigenvectors of the rest.

    Args:
        k: keys `[Hkv, T, D]` to begin with; float32, float16 or bfloat16. `T` may be 0.
        rank: number of eigenvectors; `None` uses the whole covariance.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: another shape, or a rank above `D`.

    Attributes:
        mu: means, float64 `[Hkv, D]`, 0 without keys.
        count: number of keys of each head.
    """

    def __init__(self, k: Array, *, rank: int | None = None) -> None:
        kn = as_numpy(k, "k")
        check_float_storage(kn, "k")
        if kn.ndim != 3 or kn.shape[0] == 0 or kn.shape[2] == 0:
            raise ValueError(f"k: got shape {kn.shape}, expected [Hkv, T, D]")
        heads, _, dim = kn.shape
        self._rank = None if rank is None else integer(rank, "rank", 0, dim)
        self.mu: Float64 = np.zeros((heads, dim))
        self.count = 0
        self._squares = np.zeros((heads, dim, dim))
        self._factors: tuple[Float64, Float64] | None = None
        self.add(kn)

    @property
    def sigma(self) -> Float64:
        """Population covariances, float64 `[Hkv, D, D]`, 0 without keys."""
        covariance: Float64 = self._squares / max(self.count, 1)
        return covariance

    def add(self, k: Array) -> None:
        """Keys `[Hkv, T, D]` come.

        Raises:
            TypeError: an argument of another kind or dtype.
            ValueError: another shape.

        Cost:
            `Hkv * T * D**2` multiply-adds.
        """
        kn = self._keys(k)
        for first in range(0, kn.shape[1], _PART):
            part = kn[:, first : first + _PART].astype(np.float64)
            self._join(part, 1)
        self._factors = None

    def remove(self, k: Array) -> None:
        """Keys `[Hkv, T, D]` that came before leave.

        Raises:
            TypeError: an argument of another kind or dtype.
            ValueError: another shape, or more keys than there are.
        """
        kn = self._keys(k)
        if kn.shape[1] > self.count:
            raise ValueError(f"k: got {kn.shape[1]} keys to remove, expected at most {self.count}")
        for first in range(0, kn.shape[1], _PART):
            self._join(kn[:, first : first + _PART].astype(np.float64), -1)
        self._factors = None

    def quadratic(self, q: Float64) -> Float64:
        """`q^T Sigma q` of rows `[Hkv, G, D]`, float64 `[Hkv, G]`, never negative."""
        if self._rank is None:
            whole: Float64 = np.einsum("hgd,hde,hge->hg", q, self.sigma, q)
            return np.maximum(whole, 0.0)
        diagonal, vectors = self._low_rank()
        inside = np.einsum("hgd,hdr->hgr", q, vectors)
        form = np.einsum("hgd,hd->hg", q**2, diagonal) + (inside**2).sum(axis=-1)
        positive: Float64 = np.maximum(form, 0.0)
        return positive

    @property
    def nbytes(self) -> int:
        """Bytes of the moments."""
        return self.mu.nbytes + self._squares.nbytes

    def _low_rank(self) -> tuple[Float64, Float64]:
        if self._factors is None:
            rank = self._rank or 0
            values, vectors = np.linalg.eigh(self.sigma)
            first = values.shape[1] - rank
            top = np.sqrt(np.maximum(values[:, None, first:], 0)) * vectors[:, :, first:]
            # What the eigenvectors leave of the diagonal, so that the trace stays.
            rest = np.einsum("hdd->hd", self.sigma) - (top**2).sum(axis=-1)
            self._factors = np.maximum(rest, 0.0), top
        return self._factors

    def _keys(self, k: Array) -> NDArray[Any]:
        kn = as_numpy(k, "k")
        check_float_storage(kn, "k")
        if kn.ndim != 3 or (kn.shape[0], kn.shape[2]) != self.mu.shape:
            raise ValueError(f"k: got shape {kn.shape}, expected ({self.mu.shape[0]}, T, {self.mu.shape[1]})")
        return kn

    def _join(self, part: Float64, sign: int) -> None:
        """Adds the moments of a part, or takes them out."""
        n = part.shape[1]
        total = self.count + sign * n
        if n == 0:
            return
        mean = part.mean(axis=1)
        centred = part - mean[:, None]
        squares = centred.swapaxes(-1, -2) @ centred
        if total == 0:
            self.mu, self._squares, self.count = np.zeros_like(self.mu), np.zeros_like(squares), 0
            return
        if sign > 0:
            shift = mean - self.mu
            weight = self.count * n / total
        else:
            # The mean of what stays, to which the part is joined the other way round.
            shift = mean - (self.count * self.mu - n * mean) / total
            weight = -total * n / self.count
        self._squares = self._squares + sign * squares + weight * shift[:, :, None] * shift[:, None, :]
        self.mu = (self.count * self.mu + sign * n * mean) / total
        self.count = total


def key_moments(k: Array) -> tuple[Float64, Float64]:
    """Mean and population covariance of each head's keys.

    Args:
        k: keys `[Hkv, T, D]`; float32, float16 or bfloat16.

    Returns:
        Means, float64 `[Hkv, D]`, and covariances, float64 `[Hkv, D, D]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: another shape.

    Cost:
        `Hkv * T * D**2` multiply-adds.
    """
    moments = KeyMoments(k)
    return moments.mu, moments.sigma


def qada_gate(
    q: Array,
    k_local: Array,
    moments: KeyMoments,
    *,
    tau: float = 0.9,
    scale: float | None = None,
) -> tuple[NDArray[np.bool_], Float64]:
    """Whether the local keys have at least the share `tau` of a query's softmax, by an estimate of the others' mass.

    `p = 1 / (1 + exp(A_bulk - A_local))` with the exact log-sum-exp `A_local` of the local logits, and `A_bulk = ln T +
    s q.mu + s^2 q^T Sigma q / 2`, the log-sum-exp of `T` other keys if they are Gaussian.

    Args:
        q: queries `[Hq, D]` of one position; float32, float16 or bfloat16.
        k_local: local keys `[Hkv, n, D]`, likewise.
        moments: of the other keys, or of keys like them.
        tau: share from which on a head counts as local; above 1 none does.
        scale: factor `s` of the dot products; `None` is `D ** -0.5`.

    Returns:
        bool `[Hq]`, whether the head is local, and the estimated share `p`, float64 `[Hq]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `Hq * (n * D + D**2)` multiply-adds, whatever the number of other keys.
    """
    qn, kn = as_numpy(q, "q"), as_numpy(k_local, "k_local")
    for x, name in ((qn, "q"), (kn, "k_local")):
        check_float_storage(x, name)
    if not isinstance(moments, KeyMoments):
        raise TypeError(f"moments: got {type(moments).__name__}, expected KeyMoments")
    heads, dim = moments.mu.shape
    if qn.ndim != 2 or qn.shape[1] != dim or not len(qn) or len(qn) % heads:
        raise ValueError(f"q: got shape {qn.shape}, expected (a multiple of {heads}, {dim})")
    if kn.ndim != 3 or (kn.shape[0], kn.shape[2]) != (heads, dim):
        raise ValueError(f"k_local: got shape {kn.shape}, expected ({heads}, n, {dim})")
    factor = scale_factor(scale, dim)
    _, lse = attention(qn[:, None], kn, kn[..., :1], scale=factor, return_lse=True)
    share = _share(qn, lse[:, 0], moments, factor)
    return share >= real(tau, "tau"), share


def _share(q: NDArray[Any], local: NDArray[Any], moments: KeyMoments, factor: float) -> Float64:
    """Estimated share of the local keys, from their log-sum-exp, `[Hq]`."""
    if moments.count == 0:
        return np.ones(len(q))
    grouped = q.astype(np.float64).reshape(len(moments.mu), -1, q.shape[-1])
    linear = np.einsum("hgd,hd->hg", grouped, moments.mu)
    bulk = math.log(moments.count) + factor * linear + 0.5 * factor**2 * moments.quadratic(grouped)
    with np.errstate(over="ignore"):
        share: Float64 = 1 / (1 + np.exp(bulk.reshape(-1) - local.astype(np.float64)))
    return share


@dataclass(frozen=True, slots=True)
class QadaStats:
    """What `qada_attention` did.

    Attributes:
        local: bool `[Hq]`: heads that were left with the local keys.
        share: float64 `[Hq]`: the estimated share of the local keys.
        true_share: float64 `[Hq]`: the true one, for heads whose other keys were read; NaN elsewhere.
        keys_total: keys that there are.
        keys_read: keys that were read, the mean of the KV heads.
    """

    local: NDArray[np.bool_]
    share: Float64
    true_share: Float64
    keys_total: int
    keys_read: float


def qada_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    tau: float = 0.9,
    sinks: int = 16,
    local: int = 1024,
    moments: KeyMoments | None = None,
    any_of_group: bool = True,
    scale: float | None = None,
    return_stats: bool = False,
) -> Any:
    """A decode step in which heads whose local keys suffice, by an estimate, read no others.

    Local keys are the first `sinks` and the last `local` (1,024 is this library's choice). What the others would add is
    estimated from their mean and covariance (`qada_gate`); where the local share is below `tau`, they are read and
    the result is exact.

    Args:
        q: queries `[Hq, 1, D]` of the last position; float32, float16 or bfloat16.
        k: keys `[Hkv, L, D]`; likewise.
        v: values `[Hkv, L, Dv]`; dtype of `k`.
        tau: share from which on a head counts as local.
        sinks: first keys that are local.
        local: last keys that are local.
        moments: of the other keys, `k[:, sinks : L - local]`, kept by the caller from step to step (one key leaves the
            window with each), or of a calibration text; `None` computes them, which reads all keys.
        any_of_group: whether the heads of a group all use the other keys where one needs them; else those that do not
            keep the local result, though the keys were read.
        scale: factor of the dot products; `None` is `D ** -0.5`.
        return_stats: also return `QadaStats`.

    Returns:
        The output `[Hq, 1, Dv]`, in the kind and dtype of `q`; with `return_stats` a pair.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `sinks + local` keys and `Hq * D**2` multiply-adds; all keys for KV heads with a head that needs them.

    References:
        K. Donhauser et al., "Unveiling Simplicities of Attention: Adaptive Long-Context Head Identification", 2025,
        arXiv:2502.09647.
    """
    qn, kn, vn = attention_inputs(q, k, v, ranks=(3,))
    check_heads(qn.shape[0], kn.shape[0], vn.shape[0])
    if vn.shape[1] != kn.shape[1]:
        raise ValueError(f"v: got length {vn.shape[1]}, expected {kn.shape[1]} as in k")
    if qn.shape[1] != 1 or kn.shape[1] == 0:
        raise ValueError(f"q: got shape {qn.shape} with {kn.shape[1]} keys, expected one query on at least one key")
    sinks, local = integer(sinks, "sinks", 0), integer(local, "local", 0 if sinks else 1)
    factor, tau = scale_factor(scale, qn.shape[2]), real(tau, "tau")
    any_of_group, return_stats = flag(any_of_group, "any_of_group"), flag(return_stats, "return_stats")
    if moments is not None and not isinstance(moments, KeyMoments):
        raise TypeError(f"moments: got {type(moments).__name__}, expected KeyMoments")
    (heads, length), group = kn.shape[:2], len(qn) // len(kn)
    first = min(sinks, length)
    last = max(length - local, first)
    wide = qn.astype(np.float32)
    state = None
    if first:
        state = attention(wide, kn[:, :first], vn[:, :first], scale=factor, return_lse=True)
    if last < length:
        state = attention(wide, kn[:, last:], vn[:, last:], scale=factor, state=state, return_lse=True)
    assert state is not None
    out, lse = state
    if last == first:
        share = np.ones(len(qn))
    else:
        known = KeyMoments(kn[:, first:last]) if moments is None else moments
        if known.mu.shape != (heads, qn.shape[2]):
            raise ValueError(f"moments: got those of {known.mu.shape}, expected ({heads}, {qn.shape[2]})")
        share = _share(qn[:, 0], lse[:, 0], known, factor)
    is_local = share >= tau
    true_share = np.full(len(qn), np.nan)
    needed = np.flatnonzero(~is_local.reshape(heads, group).all(axis=1)) if last > first else np.zeros(0, int)
    result = out.copy()
    for head in needed:
        mine = slice(head * group, (head + 1) * group)
        more, total = attention(
            wide[mine],
            kn[head : head + 1, first:last],
            vn[head : head + 1, first:last],
            scale=factor,
            state=(out[mine], lse[mine]),
            return_lse=True,
        )
        true_share[mine] = np.exp(lse[mine, 0].astype(np.float64) - total[:, 0])
        if any_of_group:
            is_local[mine] = False
        result[mine] = np.where(is_local[mine, None, None], out[mine], more)
    answer = like(q, result.astype(qn.dtype))
    if not return_stats:
        return answer
    read = first + length - last + (last - first) * len(needed) / heads
    return answer, QadaStats(is_local, share, true_share, length, float(read))


METHOD = Method(
    name="qada_head_gate",
    family="diagnostics",
    title="Unveiling Simplicities of Attention: Adaptive Long-Context Head Identification",
    year=2025,
    arxiv="2502.09647",
    function=qada_attention,
    reference=reference.qada_attention,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    prefill=False,
    checks=(
        "A threshold of 0 gives attention to the local keys, one above 1 dense attention.",
        "Where the other keys are all equal the estimate is exact.",
        "Without other keys the local share is 1.",
        "For Gaussian keys the estimate approaches the true log-sum-exp.",
        "Moments that follow keys that come and go are those of the keys that are there.",
    ),
    tests="tests/diagnostics/test_qada_head_gate.py",
    cost="`sinks + local` keys and `Hq * D**2` multiply-adds; all keys where a head needs them. `Hkv * D**2` float64.",
)
