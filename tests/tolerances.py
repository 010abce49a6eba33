"""How far a result may be from its float64 reference: the one place where tolerances are stated.

Kernels read storage dtypes exactly and compute in float32, whose unit roundoff is `U` (float64 arrays in float64,
where `U_DOUBLE` stands in its place). Rounding errors have
either sign and mostly cancel, so sums are held to what their terms' size allows, not to the worst case:

- A logit is a sum of products that never exceeds `S`, the largest `scale * |q| |k|`, and errs by `U * S`;
  what is added to it, and `exp`, err by `U` of their own size.
- An error `e` of the logits changes softmax weights by a factor within `1 +- 2 e`, hence the output by at
  most `2 e * max |v|`.
- Sums over `n` keys, of weights and of weighted values, err by `sqrt(n) * U` of the result.
- Rounding to the output's dtype comes on top.

`SAFETY` covers what this leaves out.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

U = 2.0**-24
U_DOUBLE = 2.0**-53
SAFETY = 4.0

#: Unit roundoff and half the smallest subnormal of each storage dtype.
ROUNDOFF = {
    np.dtype(np.float32): (2.0**-24, 2.0**-150),
    np.dtype(np.float16): (2.0**-11, 2.0**-25),
    np.dtype(ml_dtypes.bfloat16): (2.0**-8, 2.0**-134),
    np.dtype(np.float64): (2.0**-53, 0.0),
}


def unit(dtype):
    """Unit roundoff of the arithmetic that inputs of this dtype get."""
    return U_DOUBLE if dtype == np.float64 else U


@dataclass(frozen=True)
class Tolerance:
    """Allowed `|actual - expected| <= atol + rtol * |expected|` of an output and of its lse."""

    atol: float
    rtol: float
    lse_atol: float
    lse_rtol: float = 2 * U

    def check(self, actual, expected, actual_lse=None, expected_lse=None):
        """Assert that an output and, where given, its lse are close; NaN and infinities must be the same."""
        actual = np.asarray(actual, np.float64)
        np.testing.assert_allclose(actual, expected, rtol=self.rtol, atol=self.atol, err_msg="output")
        if actual_lse is not None:
            actual_lse = np.asarray(actual_lse, np.float64)
            np.testing.assert_allclose(actual_lse, expected_lse, rtol=self.lse_rtol, atol=self.lse_atol, err_msg="lse")


def attention(q, k, v, *, scale=None, offset=0.0):
    """Tolerance of attention over these numpy arrays.

    Args:
        q: queries `[..., D]`.
        k: keys `[..., Lk, D]`.
        v: values.
        scale: as in the call.
        offset: the largest magnitude of what is added to the logits (bias, ALiBi).
    """
    u = unit(q.dtype)
    logit, summed = _logit(q, k, scale, offset), SAFETY * u * np.sqrt(k.shape[-2])
    roundoff, smallest = ROUNDOFF[q.dtype]
    atol, rtol = 2 * logit * _largest(v) + smallest, roundoff + summed + 2 * u
    return Tolerance(atol=atol, rtol=rtol, lse_atol=logit + summed, lse_rtol=2 * u)


def device_attention(q, k, v, *, scale=None, offset=0.0):
    """Tolerance of attention by the kernels of `longattn.gpu`.

    Beside what holds on a CPU: softmax weights of 16-bit inputs are rounded to that dtype for the matrix product, and
    the device's `exp2` and `log2` err by two units in the last place.
    """
    on_cpu = attention(q, k, v, scale=scale, offset=offset)
    weights = ROUNDOFF[q.dtype][0] * _largest(v) if q.dtype.itemsize == 2 else 0.0
    return Tolerance(
        atol=on_cpu.atol + weights + 4 * U * _largest(v),
        rtol=on_cpu.rtol,
        lse_atol=on_cpu.lse_atol + 4 * U,
        lse_rtol=4 * U,
    )


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


def device_recurrence(actual, expected, actual_state, expected_state):
    """Assert that an output and a final state of `longattn.gpu.chunked_recurrence` are close.

    A state is a sum over the rows, of numbers of the size of its largest, each rounded to float32 some times on the way
    (64 covers the solve of a chunk); outputs are read from states and rounded to their dtype. With 16-bit inputs what
    goes into a product is rounded to that dtype before: the decayed keys twice, the update, the solve, the state as it
    is read, of either sign in every chunk of 16 rows.
    """
    size = max(1.0, np.abs(expected_state).max())
    roundoff, smallest = ROUNDOFF[actual.dtype]
    rows = max(expected.shape[2], 1)
    products = 2 * roundoff * np.sqrt(-(-rows // 16)) if actual.dtype.itemsize == 2 else 0.0
    allowed = (64 * U * np.sqrt(rows) + products) * size
    np.testing.assert_allclose(actual_state, expected_state, atol=allowed, err_msg="state")
    actual = np.asarray(actual, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=roundoff, atol=allowed + smallest, err_msg="output")


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


def check_features(actual, expected, q, k, w_enc, bias=0.0, layers=1):
    """Assert that scores by features are close, whose activations are float32 sums and, of keys, rounded to float16.

    An activation is at most the norms' product, plus the bias; a score has as many terms as there are features.
    """
    terms = w_enc.shape[-1]
    longest = _row_norm(np.swapaxes(w_enc, -1, -2))
    of_query, of_key = (_row_norm(x) * longest + bias for x in (q, k))
    rarity = np.log(2 * k.shape[-2] + 2)
    size = layers * rarity * q.shape[-2] * of_query * np.sqrt(terms) * of_key
    np.testing.assert_allclose(actual, expected, rtol=0, atol=(2.0**-11 + SAFETY * U * np.sqrt(terms)) * size)


def check_linear(actual, expected, size, terms):
    """Assert that sums of products, without a softmax, are close.

    Args:
        actual: sums that were computed in float32.
        expected: their references.
        size: sums of the terms' magnitudes.
        terms: how many numbers are added one after another, products of a few factors each.
    """
    actual = np.asarray(actual)
    roundoff, smallest = ROUNDOFF[actual.dtype]
    allowed = SAFETY * U * (np.sqrt(terms) + 8) * np.asarray(size) + roundoff * np.abs(expected) + smallest + 1e-37
    error = np.abs(actual.astype(np.float64) - expected)
    assert (error <= allowed).all(), f"{(error / allowed).max():.2f} times the error that is allowed"


def check_layer(actual, expected, depth=1):
    """Assert that the output of a layer of a few float32 products, gates and scans is close.

    Each of them errs by some `U` of the size of its terms, which for random weights is that of the outputs, and passes
    on what came before; `SAFETY` times 64 of those to a layer leaves room for sums that cancel.

    Args:
        actual: outputs in any storage dtype.
        expected: their references.
        depth: layers, one after another.
    """
    actual = np.asarray(actual)
    roundoff, smallest = ROUNDOFF[actual.dtype]
    assert actual.shape == expected.shape
    allowed = 64 * SAFETY * depth * U * (1 + _largest(expected)) + roundoff * np.abs(expected) + smallest
    error = np.abs(actual.astype(np.float64) - expected)
    assert (error <= allowed).all(), f"{(error / allowed).max():.2f} times the error that is allowed"


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


def stored(tolerance, dtype):
    """`tolerance` of a float32 result that is then rounded to `dtype`."""
    roundoff, smallest = ROUNDOFF[np.dtype(dtype)]
    return Tolerance(atol=tolerance.atol + smallest, rtol=tolerance.rtol + roundoff, lse_atol=tolerance.lse_atol)


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


def same_storage(q, k, v, **options):
    """Tolerance between two results of ours for one formula: each has its own rounding."""
    one = attention(q, k, v, **options)
    roundoff, _ = ROUNDOFF[q.dtype]
    return Tolerance(atol=2 * one.atol + 2 * roundoff * _largest(v), rtol=2 * one.rtol, lse_atol=2 * one.lse_atol)


def _row_norm(x):
    x = np.asarray(x, np.float64)
    return float(np.sqrt((_finite(x) ** 2).sum(axis=-1)).max(initial=0.0))


def _largest(x):
    return float(np.abs(_finite(np.asarray(x, np.float64))).max(initial=0.0))


def _finite(x):
    return np.where(np.isfinite(x), x, 0.0)


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

    expected = np.asarray(reference(*arguments, **options), np.float64)
    changes = [np.abs(reference(*off(tuple(arguments)), **off(options)) - expected) for _ in range(3)]
    change = max(float(c.max(initial=0.0)) for c in changes)
    roundoff, smallest = ROUNDOFF[np.dtype(dtype)]
    own = roundoff + SAFETY * U * np.sqrt(terms)
    return expected, SAFETY * change + own * np.abs(expected) + SAFETY * U * _largest(expected) + smallest


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
