"""Tolerances of codes, and of attention over them."""

import numpy as np

from tolerances.arithmetic import ROUNDOFF, SAFETY, Tolerance, U, _finite, _largest


def device_coded_attention(q, k, v, *, offset=0.0):
    """Tolerance of attention by the kernels of `longattn.gpu` over the keys and values that codes stand for.

    As `coded_attention`; a value's scale times its weight is rounded to the queries' dtype, and multiplied by codes
    that are at most half a range from the middle.
    """
    on_cpu = coded_attention(q, k[0], v[0], offset=offset)
    weights = ROUNDOFF[q.dtype][0] * _largest(v)
    return Tolerance(
        atol=on_cpu.atol + weights + 4 * U * _largest(v), rtol=on_cpu.rtol, lse_atol=on_cpu.lse_atol + 4 * U
    )


def stored(tolerance, dtype):
    """`tolerance` of a float32 result that is then rounded to `dtype`."""
    roundoff, smallest = ROUNDOFF[np.dtype(dtype)]
    return Tolerance(atol=tolerance.atol + smallest, rtol=tolerance.rtol + roundoff, lse_atol=tolerance.lse_atol)


def coded_rows(x, bits, group_size=None, channels=None):
    """Tolerance of rows that were coded and decoded in float32, by number.

    Within a group whose numbers are at most `m`, with a range of `codes` scales: dividing by the channel's factor errs
    by `2 U m`, the offset and the ends of the range likewise; their quotients by `codes` and the difference of these
    add `4 U m` to `codes * scale`; decoding and multiplying by the factor round twice. Before rounding to a code, the
    subtraction, the inverse of the scale, the product and the sum with 1/2 add `4 U codes` of a code. A range of less
    than `2 ** -120` may have a scale without a finite inverse, and then decodes to its offset.

    Args:
        x: rows `[..., D]` as they were appended, finite.
        bits: bits of a code.
        group_size: channels per scale, or all.
        channels: what was divided by, `[..., D]`.

    Returns:
        `(scale, slack, atol)`, each like `x`: the scale of the number's group, in its unit; how near to the border
        between two codes, in codes, it may fall on the wrong side; and how far the decoded number may be off where the
        code is right.
    """
    x = np.asarray(x, np.float64)
    factors = np.ones_like(x) if channels is None else np.broadcast_to(np.asarray(channels, np.float64), x.shape)
    group_size, codes = group_size or x.shape[-1], 2**bits - 1
    span, largest = np.empty_like(x), np.empty_like(x)
    for first in range(0, x.shape[-1], group_size):
        part = (..., slice(first, first + group_size))
        group = x[part] / factors[part]
        span[part] = np.ptp(group, axis=-1, keepdims=True)
        largest[part] = np.abs(group).max(axis=-1, keepdims=True)
    scale = span / codes
    with np.errstate(divide="ignore", invalid="ignore"):
        slack = np.where(span > 2.0**-120, 16 * U * largest / scale + 4 * U * codes, np.inf)
    return scale * factors, slack, (12 * U * largest + 2.0**-120) * factors


def coded_attention(q, k, v, *, channels=None, integers=False, scale=None, offset=0.0):
    """Tolerance of attention over the keys and values that codes stand for.

    Kernels may sum `offset * sum(q)` and `scale * sum(q * code)` of a group apart. For numbers up to `m` an offset is
    at most `m` and a scale times a code at most `2 m`, so terms sum up to `S = 3 m * sum |q|`, and weighted
    values to `3 max |v|`. Kernels with products of integers round each query to 15 bits of its largest magnitude, where
    it meets the codes: that shifts a logit by at most `max |q| / (2 * 127 * 128) * sum(k - offset)`, and the sums that
    follow are exact.

    Args:
        q: queries `[..., D]`.
        k: decoded keys `[Hkv, Lk, D]`.
        v: decoded values.
        channels: what the keys were divided by, `[Hkv, D]`; it is multiplied into the queries.
        integers: whether products are of integers, which takes keys with one scale each.
        scale: as in the call.
        offset: as in `attention`.
    """
    dim = q.shape[-1]
    scale = dim**-0.5 if scale is None else abs(scale)
    size, keys = np.abs(_finite(np.asarray(q, np.float64))), _finite(np.asarray(k, np.float64))
    if channels is not None:
        groups = len(size) // len(channels)
        size = size * np.repeat(channels, groups, axis=0)[:, None]
        keys = keys / np.asarray(channels, np.float64)[:, None]
    largest = 3 * scale * _largest(keys) * size.sum(axis=-1).max(initial=0.0)
    logit = SAFETY * U * (largest + 2 * offset + 4)
    if integers:
        above = (keys - keys.min(axis=-1, keepdims=True)).sum(axis=-1)
        logit += scale * _largest(size) / (2 * 127 * 128) * above.max(initial=0.0)
    summed = SAFETY * U * np.sqrt(k.shape[-2])
    roundoff, smallest = ROUNDOFF[q.dtype]
    atol = (2 * logit + 3 * summed) * _largest(v) + smallest
    return Tolerance(atol=atol, rtol=roundoff + summed + 2 * U, lse_atol=logit + summed)


def code_error(q, k, v, bits, group_size=None, channels=None):
    """What the rounding of keys and values to codes may change in an output and its lse.

    A number is off by half a scale at most, hence a logit by `e = D ** -0.5 * sum |q| scale / 2`, and the lse by no
    more. Where no logit moves by more than `e`, at most `tanh(e / 2)` of the mass moves from some keys to others (half
    of it raised by `e`, half lowered), which changes an output by that times the values' range. The values' own half
    scale comes on top.

    Args:
        q: queries `[Hq, Lq, D]`.
        k: keys `[Hkv, Lk, D]` as they were appended.
        v: values `[Hkv, Lk, Dv]` likewise.
        bits: as in `coded_rows`.
        group_size: as in `coded_rows`.
        channels: of keys, `[Hkv, D]`.

    Returns:
        `(output, lse)`: bounds `[Hq, Lq, Dv]` and `[Hq, Lq]`.
    """
    groups = len(q) // len(k)
    k_scale, _, k_atol = coded_rows(k, bits, group_size, None if channels is None else channels[:, None])
    v_scale, _, v_atol = coded_rows(v, bits, group_size)
    k_error, v_error = (np.repeat(s / 2 + atol, groups, axis=0) for s, atol in ((k_scale, k_atol), (v_scale, v_atol)))
    size = np.abs(np.asarray(q, np.float64))
    logit = q.shape[-1] ** -0.5 * (size @ k_error.swapaxes(-1, -2)).max(axis=-1)
    span = np.repeat(np.ptp(np.asarray(v, np.float64), axis=-2), groups, axis=0)
    return np.tanh(logit / 2)[..., None] * span[:, None] + v_error.max(axis=-2)[:, None], logit
