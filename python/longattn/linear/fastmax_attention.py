"""Fastmax: attention whose kernel is a polynomial of the score, and therefore factors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array
from longattn._checks import finite, integer, one_of
from longattn.linear._global import attend, inputs
from longattn.methods import Method
from longattn.reference import linear as reference

QK_NORMS = ("standardise", "maxnorm", "none")


def fastmax_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    order: int = 2,
    coefficients: tuple[float, float, float] = (1.0, 1.0, 0.5),
    qk_norm: str = "standardise",
    temperature: float = 1.0,
    mask: Array | None = None,
    out: Array | None = None,
) -> Any:
    """Weights `f(s_ij) / sum_j f(s_ij)`, `f(s) = c0 + c1 s + c2 s^2`, in time linear in the length.

    `s` is the product of normalised queries and keys, over the temperature. Features are made block by block and never
    stored. With the default coefficients of order 2, `f` is at least 1/2; with order 1 denominators may come near 0 or
    below unless all `|s|` are below 1, and outputs are what the division gives.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`; any of the three dtypes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        order: 1 or 2.
        coefficients: `(c0, c1, c2)`; `c2` is not read with order 1.
        qk_norm: "standardise": rows less their mean over the channels, over their standard deviation (the paper);
            "maxnorm": all rows of a head over the length of its longest one; "none": as they are, products over
            `sqrt(D)`. Which one is canonical is not clear: the published code offers the latter two.
        temperature: divides the products, above 0.
        mask: boolean `[Lk]` or `[B, Lk]`; True lets the key count (also in "maxnorm", where all keys are looked at).
        out: array of the result's shape, kind and dtype that receives it.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`; zeros where a denominator is 0.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `(Hq * Lq + Hkv * Lk) * F * Dv` multiply-adds, `F = 1 + D` or `1 + D + D (D + 1) / 2`; memory for some `F * Dv`
        numbers per head.

    References:
        A. Gerami et al., "FAST: Factorizable Attention for Speeding up Transformers", 2024, arXiv:2402.07901.
    """
    qn, kn, _ = arrays = inputs(q, k, v)
    degree = integer(order, "order", 1, 2)
    if not isinstance(coefficients, tuple | list) or len(coefficients) != 3:
        raise ValueError(f"coefficients: got {coefficients!r}, expected three numbers")
    numbers = tuple(finite(c, "coefficients") for c in coefficients)
    one_of(qk_norm, "qk_norm", QK_NORMS)
    heat = finite(temperature, "temperature")
    if heat <= 0:
        raise ValueError(f"temperature: got {temperature}, expected above 0")
    of_queries: dict[str, Any] = {"map": "taylor", "order": degree}
    if qk_norm == "none":
        heat *= float(np.sqrt(qn.shape[3]))
    of_keys = of_queries | {"coefficients": numbers}
    if qk_norm == "standardise":
        # The norm comes after the scale: what divides the products goes into the coefficients.
        of_queries["norm"] = of_keys["norm"] = "standard"
        of_keys["coefficients"] = (numbers[0], numbers[1] / heat, numbers[2] / heat**2)
    else:
        of_queries["scale"] = of_keys["scale"] = heat**-0.5
    if qk_norm == "maxnorm":
        of_queries["head_factors"], of_keys["head_factors"] = _inverse_longest(qn), _inverse_longest(kn)
    return attend(q, arrays, (of_queries, of_keys), ("divide", 0.0, 0.0), mask=mask, out=out)


def _inverse_longest(x: NDArray[Any]) -> NDArray[np.float32]:
    """One over the length of the longest row of each head, `[B, H]`."""
    if x.shape[2] == 0:
        return np.ones(x.shape[:2], np.float32)
    squares, _ = _core.feature_norms(x, {})
    longest = np.sqrt(squares.reshape(x.shape[:3]).max(axis=2).astype(np.float64))
    inverse = np.divide(1.0, longest, out=np.zeros_like(longest), where=longest > 0)
    return np.ascontiguousarray(inverse, np.float32)


METHOD = Method(
    name="fastmax_attention",
    family="linear",
    title="FAST: Factorizable Attention for Speeding up Transformers",
    year=2024,
    arxiv="2402.07901",
    function=fastmax_attention,
    reference=reference.fastmax_attention,
    exact=True,
    modes=frozenset({"non-causal", "self", "cross"}),
    gqa=True,
    step=False,
    checks=(
        "It is the direct evaluation of the polynomial over all pairs.",
        "Results do not depend on how keys fall into blocks.",
        "A query of zeros gives the mean value.",
        "It differs from softmax by what the series leaves out.",
    ),
    tests="tests/linear/test_fastmax_attention.py",
    cost="`(Hq * Lq + Hkv * Lk) * F * Dv` multiply-adds, `F = 1 + D + D (D + 1) / 2`.",
)
