"""Attention with a generalised Gaussian prior over relative position."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import check_floating, flag, real, scale_factor, shape_of, window_sides
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.reference import dense as reference

#: No prior is below this, so that a row whose keys are all penalised without bound still has weights.
LOWEST = -1e9


def generalized_gaussian_bias_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    inverse_scale: float | Array | None = None,
    shape: float | Array = 1.0,
    loc: float | Array = 0.0,
    eps: float = 1e-5,
    table: Array | None = None,
    ssmax: float | Array | None = None,
    visible: Array | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    **options: Any,
) -> Any:
    """Attention with a learned log-prior over relative position, per head.

    For query position `i` and key position `j`,

        B_h(i, j) = -(|(j - i - loc_h) * inverse_scale_h| + eps) ** shape_h,    at least -1e9
        logit     = scale * q . k + B_h(i, j)

    `shape = 1` is ALiBi, `shape = 2` a Gaussian window, `shape = 0` or `inverse_scale = 0` no positions at all. A
    negative shape penalises near keys and leaves far ones alone: such heads retrieve. With `ssmax`, the content part
    is `scale * ssmax_h * ln(n_i) * q . k` with `n_i` the keys that query `i` sees, so that attention does not spread
    as contexts grow; the prior is not scaled by it. The prior's normaliser is the same for all keys and cancels.

    `loc` is in positions, before the scale. (The authors' first model adds it after the scale: divide such a `loc`
    by minus `inverse_scale`.)

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes; not rotated.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        inverse_scale: one over the prior's width, in positions; floating `[Hq]` or one number. `None` is ALiBi's
            slopes, `2 ** (-8 * (h + 1) / Hq)`.
        shape: the prior's exponent; floating `[Hq]` or one number.
        loc: the prior's centre, relative to the query; floating `[Hq]` or one number.
        eps: added under the exponent, at least 0.
        table: what `generalized_gaussian_table` made of these parameters for at least `Lk` positions, instead of the
            parameters: a decode loop makes it once. Causal attention only.
        ssmax: factor of `ln(n_i)`; floating `[Hq]` or one number; `None` leaves the content part as it is.
        visible: integers `[Lq]` or `[B, Lq]`, the `n_i` of `ssmax`; `None` counts what `causal` and `window` leave.
            Needed with `ssmax` where `mask`, `segments` or `visible_until` hide further keys.
        causal: as in `longattn.attention`.
        window: as in `longattn.attention`.
        scale: factor on the dot products; `None` is `D ** -0.5`.
        options: other options of `longattn.attention`, such as `mask`, `segments`, `return_lse` and `out`.

    Returns:
        As `longattn.attention`: the output in the kind and dtype of `q`, with `return_lse` the pair with lse.

    Raises:
        TypeError: as `longattn.attention`.
        ValueError: as `longattn.attention`; parameters of another shape or not finite; a table beside parameters,
            without `causal` or too short; counts that are missing.

    Cost:
        That of `longattn.attention`, and a table of `Hq * Lk` powers (`Hq * (Lq + Lk)` if not causal) unless one is
        given.

    References:
        A. Bianchessi et al., "Bayesian Attention Mechanism: A Probabilistic Framework for Positional Encoding and
        Context Length Extrapolation", 2025, arXiv:2505.22842.

    Example:
        >>> import numpy as np, longattn as la
        >>> q = k = v = np.ones((1, 2, 10, 64), np.float32)
        >>> la.dense.generalized_gaussian_bias_attention(q, k, v, shape=np.array([1.0, -0.5]), ssmax=1.0).shape
        (1, 2, 10, 64)
    """
    causal = flag(causal, "causal")
    q_shape, k_shape = shape_of(q, "q"), shape_of(k, "k")
    if len(q_shape) not in (3, 4):
        raise ValueError(f"q: got shape {q_shape}, expected rank 3 or 4")
    if len(k_shape) != len(q_shape):
        raise ValueError(f"k: got shape {k_shape}, expected rank {len(q_shape)} as q")
    *_, heads, rows, dim = q_shape
    keys = k_shape[-2]
    if table is None:
        ahead = 0 if causal else max(rows - 1, 0)
        made = _prior(heads, max(keys, 1), ahead, inverse_scale, shape, loc, eps)
        zero = made.shape[1] - 1 - ahead
    else:
        made = _checked_table(table, heads, keys, causal)
        if inverse_scale is not None or any(
            np.ndim(given) or given != default for given, default in ((shape, 1.0), (loc, 0.0), (eps, 1e-5))
        ):
            raise ValueError("table: got one beside the prior's parameters, expected the one or the others")
        zero = made.shape[1] - 1
    content: float | NDArray[np.float32] = scale_factor(scale, max(1, dim))
    if ssmax is not None:
        hidden = [name for name in ("mask", "segments", "visible_until") if options.get(name) is not None]
        if visible is None and hidden:
            raise ValueError(f"visible: got None beside ssmax and {hidden[0]}, expected the keys that each query sees")
        counts = _counts(visible, q_shape, keys, causal, window)
        logs = np.log(np.maximum(counts, 1)).astype(np.float32)
        content = content * _per_head(ssmax, "ssmax", heads)[:, None].astype(np.float32) * logs[..., None, :]
    return attention(
        q,
        k,
        v,
        causal=causal,
        window=window,
        scale=content,
        relative_bias=made,
        relative_zero=zero,
        **options,
    )


def generalized_gaussian_table(
    heads: int,
    length: int,
    *,
    inverse_scale: float | Array | None = None,
    shape: float | Array = 1.0,
    loc: float | Array = 0.0,
    eps: float = 1e-5,
) -> NDArray[np.float32]:
    """The prior of `generalized_gaussian_bias_attention` for causal attention over up to `length` positions.

    Args:
        heads: query heads, `Hq`.
        length: positions, at least 1.
        inverse_scale: as there.
        shape: as there.
        loc: as there.
        eps: as there.

    Returns:
        float32 `[heads, length]`: entry `length - 1 - d` is the prior of the key `d` positions back.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: an argument of another shape, not finite, or out of range.
    """
    for name, value in (("heads", heads), ("length", length)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name}: got {value!r}, expected an integer")
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    return _prior(heads, length, 0, inverse_scale, shape, loc, eps)


def _prior(
    heads: int,
    back: int,
    ahead: int,
    inverse_scale: float | Array | None,
    shape: float | Array,
    loc: float | Array,
    eps: float,
) -> NDArray[np.float32]:
    """The prior of keys from `back - 1` positions before the query to `ahead` after it."""
    if inverse_scale is None:
        inverse_scale = 2.0 ** (-8 * np.arange(1, heads + 1) / heads)
    factor = _per_head(inverse_scale, "inverse_scale", heads)
    exponent, centre = _per_head(shape, "shape", heads), _per_head(loc, "loc", heads)
    if not 0 <= real(eps, "eps") < np.inf:
        raise ValueError(f"eps: got {eps}, expected a finite number of at least 0")
    relative = np.arange(1 - back, ahead + 1)
    with np.errstate(divide="ignore", over="ignore"):
        prior = -((np.abs((relative - centre[:, None]) * factor[:, None]) + eps) ** exponent[:, None])
    return np.maximum(prior, LOWEST).astype(np.float32)


def _checked_table(table: Array, heads: int, keys: int, causal: bool) -> NDArray[np.float32]:
    if not causal:
        raise ValueError("table: got one without causal, expected none: it holds the prior of earlier keys only")
    x = as_numpy(table, "table")
    check_floating(x, "table")
    if x.ndim != 2 or x.shape[0] != heads or x.shape[1] < max(keys, 1):
        raise ValueError(f"table: got shape {x.shape}, expected [{heads}, n] with n at least {max(keys, 1)}")
    return x.astype(np.float32, copy=False)


def _counts(
    visible: Array | None, q_shape: tuple[int, ...], keys: int, causal: bool, window: tuple[int, int]
) -> NDArray[np.int64]:
    """Keys that each query sees, `[Lq]` or `[B, Lq]`."""
    rows = q_shape[-2]
    if visible is not None:
        x = as_numpy(visible, "visible")
        if x.dtype.kind not in "iu":
            raise TypeError(f"visible: got dtype {x.dtype}, expected integers")
        if x.shape not in ((rows,), (*q_shape[:-3], rows)):
            raise ValueError(f"visible: got shape {x.shape}, expected {(rows,)} or {(*q_shape[:-3], rows)}")
        if (x < 0).any():
            raise ValueError(f"visible: got {x.min()}, expected at least 0")
        return x.astype(np.int64)
    left, right = window_sides(window, rows + keys)
    position = np.arange(keys - rows, keys)
    first = np.maximum(position - left, 0) if left >= 0 else np.zeros_like(position)
    last = position + right if right >= 0 else np.full_like(position, keys - 1)
    if causal:
        last = np.minimum(last, position)
    return np.maximum(np.minimum(last, keys - 1) - first + 1, 0)


def _per_head(values: float | Array, name: str, heads: int) -> NDArray[np.float64]:
    """A parameter as float64 `[Hq]`; the powers of a prior deserve more than float32."""
    if np.ndim(values) == 0:
        x = np.full(heads, real(values, name))
    else:
        x = as_numpy(values, name)
        check_floating(x, name)
        if x.shape != (heads,):
            raise ValueError(f"{name}: got shape {x.shape}, expected {(heads,)}, one per query head, or a number")
    if not np.isfinite(x).all():
        raise ValueError(f"{name}: got {x}, expected finite numbers")
    return x.astype(np.float64)


METHOD = Method(
    name="generalized_gaussian_bias_attention",
    family="position",
    title=(
        "Bayesian Attention Mechanism: A Probabilistic Framework for Positional Encoding and Context Length "
        "Extrapolation"
    ),
    year=2025,
    arxiv="2505.22842",
    function=generalized_gaussian_bias_attention,
    reference=reference.generalized_gaussian_bias_attention,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    checks=(
        "`shape = 1`, `loc = 0`, `eps = 0` and ALiBi's slopes are ALiBi.",
        "`shape = 0` is attention without positions.",
        "`shape = 2` is the Gaussian window `exp(-(d * inverse_scale)^2)`.",
        "`inverse_scale = 0` is attention without positions.",
        "`ssmax` with its `ssmax_h * ln(n_i)` replaced by 1 is the plain method.",
        "Decode steps, from a table made once, give the rows of the prefill.",
    ),
    tests="tests/dense/test_generalized_gaussian_bias_attention.py",
    cost="That of attention, and `Hq * Lk` powers for the table unless one is given.",
)
