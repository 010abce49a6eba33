"""Tolerances of gradients."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from longattn import _core
from tolerances.arithmetic import ROUNDOFF, SAFETY, U, _finite, _largest, unit
from tolerances.exact import _logit


@dataclass(frozen=True)
class Gradients:
    """Allowed `|actual - expected|` of each element of the gradients, but for the rounding of the result."""

    allowed: tuple[np.ndarray, ...]
    roundoff: tuple[float, ...]

    def check(self, actual, expected):
        """Assert that gradients `(dq, dk, dv)`, and `d_sinks` where there is one, are close; NaN must be the same."""
        names = ("dq", "dk", "dv", "d_sinks")
        for name, x, y, atol, rtol in zip(names, actual, expected, self.allowed, self.roundoff, strict=False):
            error, allowed = np.abs(np.asarray(x, np.float64) - y), atol + rtol * np.abs(y)
            far = ~(error <= allowed) & ~(np.isnan(x) & np.isnan(y))
            if far.any():
                at = np.unravel_index(np.argmax(np.where(far, error / allowed, 0.0)), error.shape)
                raise AssertionError(
                    f"{name}: {far.sum()} of {far.size} elements are off, {at} is {x[at]} for {y[at]}, "
                    f"allowed {allowed[at]:.2e}"
                )


def attention_backward(q, k, v, d_out, *, weights, sink_weights=None, d_lse=None, scale=None, offset=0.0):
    """Tolerance of the gradients by `q`, `k`, `v` and the sink logits.

    A weight `p` errs by a factor within `1 +- w`, `w` the error of logit and lse and of the sums it goes into.
    `d_out . v` errs by `e`, the rounding of a product, and `delta = d_out . out` by `f`, which has the rounding of
    the stored output as well. So a score's gradient errs by `p (w |d_out . v - delta| + e + f)`. `f` is one number
    per row and adds up along it; all other errors have either sign, so that of a sum is the root of their squares.

    Args:
        q: queries `[..., Hq, Lq, D]`.
        k: keys `[..., Hkv, Lk, D]`.
        v: values.
        d_out: gradient of the output.
        weights: the softmax weights, `[..., Hq, Lq, Lk]`, of the reference.
        sink_weights: those of the sinks, `[..., Hq, Lq]`.
        d_lse: gradient of the lse.
        scale: as in the call; the largest counts.
        offset: as in `attention`.
    """
    u, dtypes = (
        unit(q.dtype),
        (q.dtype, k.dtype, v.dtype, np.dtype(np.float64 if q.dtype == np.float64 else np.float32)),
    )
    factor = q.shape[-1] ** -0.5 if scale is None else float(np.max(np.abs(scale)))
    group = q.shape[-3] // k.shape[-3]
    most = max(group * q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1])
    w = 2 * _logit(q, k, scale, offset) + SAFETY * u * np.sqrt(most)
    q, k, v, d_out = (_finite(np.asarray(x, np.float64)) for x in (q, k, v, d_out))
    k, v = (np.repeat(x, group, axis=-3) for x in (k, v))
    out = weights @ v
    lse = np.zeros(q.shape[:-1]) if d_lse is None else _finite(np.asarray(d_lse, np.float64))
    delta = (d_out * out).sum(axis=-1) - lse
    long, across = np.linalg.norm(d_out, axis=-1), v.swapaxes(-1, -2)
    e = SAFETY * u * long[..., None] * np.linalg.norm(v, axis=-1)[..., None, :]
    f = SAFETY * (u * (long * np.linalg.norm(out, axis=-1) + np.abs(lse)))
    f = f + SAFETY * ROUNDOFF[dtypes[0]][0] * np.linalg.norm(d_out * out, axis=-1)
    change = d_out @ across - delta[..., None]
    own, common = weights * (w * np.abs(change) + e), weights * f[..., None]

    def over_group(x):
        return x.reshape(*x.shape[:-3], -1, group, *x.shape[-2:]).sum(axis=-3)

    dq = factor * (np.sqrt(own**2 @ k**2) + common @ np.abs(k))
    dk = factor * np.sqrt(over_group(((own + common) ** 2).swapaxes(-1, -2) @ q**2))
    dv = np.sqrt(over_group(((w * weights) ** 2).swapaxes(-1, -2) @ d_out**2))
    allowed = [dq, dk, dv]
    if sink_weights is not None:
        shares = sink_weights * (w * np.abs(delta) + f)
        axes = tuple(n for n in range(shares.ndim) if n != shares.ndim - 2)
        allowed.append(np.sqrt((shares**2).sum(axis=axes)))
    # Weights that underflow in float32, and results that do in storage.
    tiny = 0.0 if dtypes[0] == np.float64 else 1e-37
    floors = (x + tiny + ROUNDOFF[dtype][1] for x, dtype in zip(allowed, dtypes, strict=False))
    return Gradients(tuple(floors), tuple(ROUNDOFF[dtype][0] for dtype in dtypes))


def perturbed(reference, arguments, options, dtype, terms=64):
    """The reference's result, and how far one in float32 may be from it, element by element.

    Float32 arithmetic in a well-ordered way gives the exact result for inputs that are off by a few `U` of their
    largest number, `sqrt(terms)` of them where sums of so many terms are taken. So the reference is computed again for
    inputs off by that much, at random, and what changes most is allowed, times `SAFETY`, besides rounding to `dtype`.

    Args:
        reference: a function of the arguments and options.
        arguments: positional arguments; arrays of floats, also inside tuples and dicts, are perturbed.
        options: keyword arguments, likewise.
        dtype: of the result.
        terms: the longest sum.
    """
    generator = np.random.default_rng(7)

    def off(x):
        if isinstance(x, np.ndarray) and (x.dtype.kind == "f" or x.dtype == ml_dtypes.bfloat16):
            wide = np.asarray(x, np.float64)
            return wide + SAFETY * U * np.sqrt(terms) * _largest(x) * generator.uniform(-1, 1, x.shape)
        if isinstance(x, tuple | list):
            return type(x)(off(one) for one in x)
        if isinstance(x, dict):
            return {name: off(one) for name, one in x.items()}
        return x

    def largest(x):
        if isinstance(x, np.ndarray) and (x.dtype.kind == "f" or x.dtype == ml_dtypes.bfloat16):
            return float(_largest(x))
        if isinstance(x, dict):
            x = tuple(x.values())
        return max(map(largest, x), default=0.0) if isinstance(x, tuple | list) else 0.0

    expected = np.asarray(reference(*arguments, **options), np.float64)
    changes = [np.abs(reference(*off(tuple(arguments)), **off(options)) - expected) for _ in range(3)]
    change = max(float(c.max(initial=0.0)) for c in changes)
    roundoff, smallest = ROUNDOFF[np.dtype(dtype)]
    own = roundoff + SAFETY * U * np.sqrt(terms)
    allowed = SAFETY * change + own * np.abs(expected) + SAFETY * U * _largest(expected) + smallest
    if np.dtype(dtype) == ml_dtypes.bfloat16 and _core.isa() == "amx":
        # Weights of attention over bf16 are rounded to bf16: by as much of the largest value.
        allowed = allowed + roundoff * max(largest(tuple(arguments)), largest(tuple(options.values())))
    return expected, allowed


def check_gradients(actual, expected, terms, of=None):
    """Assert that gradients of a recurrence are close.

    Each is a sum of about `terms` products, some of which are sums themselves, and errs by `U` of the largest of them,
    whose size is that of the largest gradient of its kind; `SAFETY` times 32 of those leaves room for sums that cancel.

    Args:
        actual: a gradient in any storage dtype.
        expected: its reference.
        terms: how many numbers are added one after another.
        of: gradients whose largest number counts as well; a sum of numbers that cancel says little about them.
    """
    actual = np.asarray(actual)
    roundoff, smallest = ROUNDOFF[actual.dtype]
    assert actual.shape == expected.shape
    largest = max(_largest(expected), 0.0 if of is None else _largest(of))
    allowed = SAFETY * U * (np.sqrt(terms) + 32) * largest + roundoff * np.abs(expected) + smallest
    error = np.abs(actual.astype(np.float64) - expected)
    assert (error <= allowed).all(), f"{(error / np.maximum(allowed, 1e-300)).max():.2f} times the error allowed"
