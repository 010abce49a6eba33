"""Tolerances of attention and of layers around it."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from longattn import _core
from tolerances.arithmetic import ROUNDOFF, SAFETY, Tolerance, U, _largest, _row_norm, unit

#: Instruction sets that multiply bytes; others compute with float32.
MULTIPLY_BYTES = ("scalar", "avx512vnni", "avx512bf16", "amx")

#: Rows of a KV head that go through its keys together: few, whose weights pairs round, and many.
_FEW_TOGETHER, _MANY_TOGETHER = 8, 192


def attention(q, k, v, *, scale=None, offset=0.0, together=None):
    """Tolerance of attention over these numpy arrays, computed by the instruction set of the moment.

    Args:
        q: queries `[..., D]`.
        k: keys `[..., Lk, D]`.
        v: values.
        scale: as in the call.
        offset: the largest magnitude of what is added to the logits (bias, ALiBi).
        together: query rows that share keys; `None`: those of a KV head's group, as in `longattn.attention`. Packed and
            branching sequences, lists, grids and retrieval put others together, eight at times.
    """
    u = unit(q.dtype)
    logit, summed = _logit(q, k, scale, offset), SAFETY * u * np.sqrt(k.shape[-2])
    roundoff, smallest = ROUNDOFF[q.dtype]
    atol, rtol = 2 * logit * _largest(v) + smallest, roundoff + summed + 2 * u
    if _in_pairs(q, k, v, together):
        atol += roundoff * _largest(v)
    return Tolerance(atol=atol, rtol=rtol, lse_atol=logit + summed, lse_rtol=2 * u)


def _in_pairs(q, k, v, together):
    """Whether weights are rounded to bf16: where the CPU multiplies pairs of bf16.

    Pairs alone are used for just eight rows. Rows that share keys are cut into blocks of 192, the last of which may
    have eight. Matrix registers are used for more than eight.
    """
    isa = _core.isa()
    if isa not in ("avx512bf16", "amx") or not all(x.dtype == ml_dtypes.bfloat16 for x in (q, k, v)):
        return False
    least = _FEW_TOGETHER
    if together is None:
        heads, kv_heads = (x.shape[-3] if x.ndim > 2 else 1 for x in (q, k))
        together, least = heads // kv_heads * q.shape[-2], _FEW_TOGETHER + 1
    return together >= least if isa == "amx" else together % _MANY_TOGETHER == _FEW_TOGETHER


def device_attention(q, k, v, *, scale=None, offset=0.0):
    """Tolerance of attention by the kernels of `longattn.gpu`.

    Beside what holds on a CPU: softmax weights of 16-bit inputs are rounded to that dtype for the matrix product, and
    the device's `exp2` and `log2` err by two units in the last place.
    """
    on_cpu = attention(q, k, v, scale=scale, offset=offset, together=1)
    weights = ROUNDOFF[q.dtype][0] * _largest(v) if q.dtype.itemsize == 2 else 0.0
    return Tolerance(
        atol=on_cpu.atol + weights + 4 * U * _largest(v),
        rtol=on_cpu.rtol,
        lse_atol=on_cpu.lse_atol + 4 * U,
        lse_rtol=4 * U,
    )


def _logit(q, k, scale, offset):
    """Error of a logit."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(np.max(np.abs(scale)))
    return SAFETY * unit(q.dtype) * (scale * _row_norm(q) * _row_norm(k) + 2 * offset + 4)


def latent_attention(q_nope, q_rope, latent, k_rope, w_uk, w_uv, *, scale=None, offset=0.0):
    """Tolerance of multi-head latent attention, in either form.

    Logits are sums of `R + Dr` products in the one form and of `Dn + Dr` in the other; each form's queries or keys
    are float32 results that err by `U` of their terms. The output's terms are at most a latent's norm times that of
    a column of `w_uv`.
    """
    q_nope, q_rope, latent, k_rope, w_uk, w_uv = (
        np.asarray(x, np.float64) for x in (q_nope, q_rope, latent, k_rope, w_uk, w_uv)
    )
    scale = (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5 if scale is None else abs(scale)
    absorbed = _row_norm(q_nope @ w_uk) * _row_norm(latent)
    expanded = _row_norm(q_nope) * _row_norm(latent[:, None] @ w_uk.swapaxes(-1, -2))
    positions = _row_norm(q_rope) * _row_norm(k_rope)
    logit = SAFETY * U * (scale * (2 * (absorbed + expanded) + positions) + 2 * offset + 4)
    summed = SAFETY * U * np.sqrt(latent.shape[-2])
    value = _row_norm(latent) * _row_norm(w_uv.swapaxes(-1, -2))
    return Tolerance(atol=(2 * logit + summed + SAFETY * U) * value, rtol=4 * U, lse_atol=logit + summed)


def projected_attention(x, wq, wk, wv, wo, *, heads, context=None, scale=None):
    """Tolerance of attention between projections that are computed in float32.

    A projected number errs by `U` of its terms' norms, which adds to what `attention` allows; the output sums
    `heads` of them times columns of `wo`.
    """
    x, wq, wk, wv, wo = (np.asarray(a, np.float64) for a in (x, wq, wk, wv, wo))
    source = x if context is None else np.asarray(context, np.float64)
    dim = wq.shape[1] // heads
    scale = dim**-0.5 if scale is None else abs(scale)
    q, k, v = ((rows @ w).astype(np.float32) for rows, w in ((x, wq), (source, wk), (source, wv)))
    one = attention(q, k, v, scale=scale)
    terms = scale * _row_norm(x) * _row_norm(source) * _row_norm(wq.T) * _row_norm(wk.T) * dim
    value = _row_norm(source) * _row_norm(wv.T)
    wide = (one.atol + SAFETY * U * (4 * terms + 2) * value) * np.abs(wo).sum(axis=0).max()
    return Tolerance(atol=float(wide), rtol=4 * U, lse_atol=one.lse_atol)


def core_context(q, k, v, *, scale=None, count_bias=0.0):
    """Tolerance of core context attention.

    Cores are attention outputs in float32. What a core key errs by shifts its logit, what a core value errs by
    shifts the output.
    """
    wide = [np.asarray(x, np.float32) for x in (q, k, v)]
    factor = q.shape[-1] ** -0.5 if scale is None else abs(scale)
    one = attention(q, k, v, scale=scale, offset=abs(count_bias))
    keys, values = (attention(wide[0], wide[1], x, scale=scale) for x in wide[1:])
    key = np.sqrt(q.shape[-1]) * (keys.atol + keys.rtol * _largest(k))
    logit, value = factor * _row_norm(q) * key, values.atol + values.rtol * _largest(v)
    atol = one.atol + 2 * logit * _largest(v) + value
    return Tolerance(atol=atol, rtol=one.rtol, lse_atol=one.lse_atol + logit)


def summarised(tolerance, x, wq, wk, wv, g_weight, wo=None, *, heads):
    """`tolerance` of attention whose queries, keys and values are float32 projections of `x` and of normed summaries.

    A projected number errs by `U` of its terms' norms, and summaries by a few `U` of numbers that are at most
    `sqrt(E) * g_weight`.
    """
    x, wq, wk, wv, g_weight = (np.asarray(a, np.float64) for a in (x, wq, wk, wv, g_weight))
    dim = wq.shape[1] // heads
    source = max(_row_norm(x), np.sqrt(x.shape[-1]) * _largest(g_weight))
    terms = _row_norm(x) * source * _row_norm(wq.T) * _row_norm(wk.T) * dim
    value = source * _row_norm(wv.T)
    atol = tolerance.atol + SAFETY * U * (8 * terms + 8) * value
    if wo is not None:
        atol *= np.abs(np.asarray(wo, np.float64)).sum(axis=0).max()
    return Tolerance(
        atol=float(atol), rtol=tolerance.rtol + 4 * U, lse_atol=tolerance.lse_atol + SAFETY * U * 8 * terms
    )


def two_levels(q, k, v, *, scale=None):
    """Tolerance of a softmax over parts of softmaxes, the queries or keys of which were turned by a float32 rotation.

    Both levels err as attention does, and a turned number by a few `U` of the largest.
    """
    one = attention(q, k, v, scale=scale)
    return Tolerance(atol=3 * one.atol, rtol=one.rtol, lse_atol=3 * one.lse_atol)


def added_branches(x, wq, wk, wv, wo=None, *, heads, branches, scale=None):
    """Tolerance of the sum of a few attentions between float32 projections of the same rows.

    A projected row errs by `U` of the norms of its terms, in each of its numbers; that times the norm of the other row
    is what it adds to a logit, and a projected value adds its own.
    """
    x, wq, wk, wv = (np.asarray(a, np.float64) for a in (x, wq, wk, wv))
    dim = wq.shape[1] // heads
    kv_heads = wk.shape[1] // dim
    scale = dim**-0.5 if scale is None else abs(scale)

    def rows(w, parts):
        return _row_norm((x @ w).reshape(-1, w.shape[1] // parts))

    q, k, v = rows(wq, heads), rows(wk, kv_heads), rows(wv, kv_heads)
    error_q, error_k, error_v = (SAFETY * U * np.sqrt(dim) * _row_norm(x) * _row_norm(w.T) for w in (wq, wk, wv))
    logit = scale * (error_q * k + error_k * q) + SAFETY * U * (scale * q * k + 4)
    atol = branches * (2 * logit * v + error_v + SAFETY * U * np.sqrt(x.shape[-2]) * v)
    if wo is not None:
        atol *= np.abs(np.asarray(wo, np.float64)).sum(axis=0).max()
    return Tolerance(atol=float(atol), rtol=4 * U, lse_atol=0.0)


@dataclass(frozen=True)
class Weights:
    """Allowed error of softmax weights, relative to each, and of sums over them, relative to the terms' sizes."""

    rtol: float

    #: Weights below `e^-87` may come out as 0.
    SMALLEST = 2.0**-124
    #: The most terms that are added in float32, the rest being float64: keys of a block.
    BLOCK = 256

    def check(self, actual, expected):
        """Assert that weights, or the largest of some, are close."""
        actual = np.asarray(actual, np.float64)
        np.testing.assert_allclose(actual, expected, rtol=self.rtol, atol=self.SMALLEST, err_msg="weights")

    def check_sums(self, actual, expected, size, factor_errors=0):
        """Assert that sums over weights are close.

        Args:
            actual: sums.
            expected: their references.
            size: sums of the terms' magnitudes.
            factor_errors: roundings that each weight's factor went through.
        """
        rtol = self.rtol + SAFETY * U * (np.sqrt(self.BLOCK) + factor_errors) + U
        error = np.abs(np.asarray(actual, np.float64) - expected)
        allowed = rtol * np.asarray(size) + self.SMALLEST
        worst = (error / allowed).max(initial=0.0)
        assert worst <= 1, f"{worst:.2f} times the error that is allowed"


def weights(q, k, *, scale=None, offset=0.0):
    """Tolerance of softmax weights `exp(logit - lse)` over these arrays, and of sums of them.

    A weight errs by what its logit and its row's lse err by; a float32 lse that is given is rounded itself.

    Args:
        q: queries `[..., D]`.
        k: keys `[..., Lk, D]`.
        scale: as in the call.
        offset: the largest magnitude of what is added to the logits (bias, ALiBi, sinks).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else abs(scale)
    largest = scale * _row_norm(q) * _row_norm(k)
    keys = k.shape[-2]
    logit = SAFETY * U * (largest + 2 * offset + 4)
    lse = logit + SAFETY * U * (np.sqrt(keys) + np.log(keys + 1))
    return Weights(rtol=logit + lse + 8 * U)


def selective(q, k, v, *, scale=None, state=0.0):
    """Tolerance of selective attention, and that of its `F`.

    `F` is a float32 sum of one selection per row. Each errs as its logit does, and each addition by `U` of the
    sum so far, all of either sign: `sqrt(rows)` times both. In the output, `F` counts like a part of the logit
    until `e^-F` makes the key's weight vanish, wherefore its own rounding matters up to `F = 104 + 2 * largest`.

    Args:
        q: queries.
        k: keys.
        v: values.
        scale: as in the call.
        state: the largest number in the state that was given.

    Returns:
        The pair of the output's tolerance and the absolute one of `F`.
    """
    dim, rows = q.shape[-1], q.shape[-2]
    factor = dim**-0.5 if scale is None else abs(scale)
    largest = factor * _row_norm(q) * _row_norm(k)
    most = state + rows * largest
    summed = np.sqrt(rows + 1) * SAFETY * U  # the state that was given is rounded, too
    mattering = min(most, 104 + 2 * largest)
    one = attention(q, k, v, scale=scale, offset=mattering)
    logit = summed * (largest + 4 + mattering)
    output = Tolerance(atol=one.atol + 2 * logit * _largest(v), rtol=one.rtol, lse_atol=one.lse_atol + logit)
    return output, summed * (largest + 4 + most)


def merge(outs, lses):
    """Tolerance of merging parts: storage rounding and a few float32 operations per part."""
    roundoff, smallest = ROUNDOFF[outs[0].dtype]
    weight = SAFETY * U * (4 + len(outs) + max(_largest(lse) for lse in lses))
    largest = max(_largest(o) for o in outs)
    return Tolerance(atol=2 * weight * largest + smallest, rtol=roundoff + 2 * U, lse_atol=weight)


def same_storage(q, k, v, **options):
    """Tolerance between two results of ours for one formula: each has its own rounding."""
    one = attention(q, k, v, **options)
    roundoff, _ = ROUNDOFF[q.dtype]
    return Tolerance(atol=2 * one.atol + 2 * roundoff * _largest(v), rtol=2 * one.rtol, lse_atol=2 * one.lse_atol)


def sampled(q, k, v, *, spread, scale=None, offset=0.0):
    """Tolerance of an estimate corrected by a sample.

    The correction is a sum of differences between exact and estimated terms, each over the chance that its row was
    drawn with. Every weight in it errs by twice its logit's error, exact or estimated, and the chance by as much.

    Args:
        q: queries `[..., D]`.
        k: keys `[..., Lk, D]`.
        v: values.
        spread: the largest sum, over a sample and a query's mass, of exact and estimated weights over their chances.
        scale: as in the call.
        offset: as in `attention`.
    """
    one = attention(q, k, v, scale=scale, offset=offset)
    return Tolerance(
        atol=one.atol * (1 + 4 * spread), rtol=one.rtol, lse_atol=one.lse_atol * (1 + 4 * spread), lse_rtol=2 * U
    )
