"""Causal Fastmax: attention whose kernel is a polynomial of the score, as a recurrence."""

from __future__ import annotations

from longattn._arrays import Array
from longattn._checks import finite, integer, one_of, shape_of
from longattn.linear._documented import documented
from longattn.linear._recurrence import CHUNK, Common, recurrence
from longattn.linear.feature_map import FeatureMap
from longattn.methods import Method
from longattn.reference import linear as reference

QK_NORMS = ("standardise", "none")


@documented
def causal_fastmax_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    order: int = 2,
    coefficients: tuple[float, float, float] = (1.0, 1.0, 0.5),
    qk_norm: str = "standardise",
    temperature: float = 1.0,
    initial_state: Array | None = None,
    out_state: Array | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Weights `f(s_ij) / sum_(j <= i) f(s_ij)`, `f(s) = c0 + c1 s + c2 s^2`, of the keys up to each query.

    `s` is the product of normalised queries and keys, over the temperature. Features are made as rows are read;
    symmetric products are kept once. With the default coefficients of order 2, `f` is at least 1/2; with order 1
    divisors may come near 0 or below unless all `|s|` are below 1, and outputs are what the division gives.
    `fastmax_attention` is the form over all keys, also with the norm by a head's longest row, which a causal form has
    not.

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16.
        k: {keys}
        v: {values}
        order: 1 or 2.
        coefficients: `(c0, c1, c2)`; `c2` is not read with order 1.
        qk_norm: "standardise": rows less their mean over the channels, over their standard deviation (the paper);
            "none": as they are, products over `sqrt(D)`.
        temperature: divides the products, above 0.
        initial_state: states before the first row, floating `[N, H, F, Dv + 1]`, the last column being the sums of
            features; `None` is zeros.
        out_state: {out_state}
        chunk_size: {chunk_size}
        cu_seqlens: {cu_seqlens}
        out: array for the output.

    Returns:
        `(output, states)`: the output in the kind and dtype of `q`, and the float32 states after the last rows. A call
        of one row with `initial_state` is the decode step: one pass over the state, whose size grows with `D^2`: 545
        KiB per head for `D = Dv = 64`. A row whose divisor is 0 gives 0.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * Hq * L * F * Dv` multiply-adds of states, `F = 1 + D` or `1 + D + D (D + 1) / 2`, and of rows of a chunk
        `C` with each other `Hq * L * C * (F + Dv) / 2`; memory beyond inputs and outputs does not depend on `L`.

    References:
        A. Gerami et al., "FAST: Factorizable Attention for Speeding up Transformers", 2024, arXiv:2402.07901.
    """
    degree = integer(order, "order", 1, 2)
    if not isinstance(coefficients, tuple | list) or len(coefficients) != 3:
        raise ValueError(f"coefficients: got {coefficients!r}, expected three numbers")
    c0, c1, c2 = (finite(c, "coefficients") for c in coefficients)
    one_of(qk_norm, "qk_norm", QK_NORMS)
    heat = finite(temperature, "temperature")
    if heat <= 0:
        raise ValueError(f"temperature: got {temperature}, expected above 0")
    if qk_norm == "none":
        shape = shape_of(q, "q")
        heat *= (max(shape[-1], 1) if shape else 1) ** 0.5
    # What divides the products goes into the coefficients.
    scaled = (c0, c1 / heat, c2 / heat**2)
    norm = "standard" if qk_norm == "standardise" else "none"
    phi = FeatureMap(kind="taylor", order=degree, norm=norm, coefficients=scaled)
    common = Common(1.0, initial_state, out_state, chunk_size, cu_seqlens, out)
    return recurrence(q, k, v, common, maps=(phi, phi), normaliser=0.0)


METHOD = Method(
    name="causal_fastmax_attention",
    family="linear",
    title="FAST: Factorizable Attention for Speeding up Transformers",
    year=2024,
    arxiv="2402.07901",
    function=causal_fastmax_attention,
    reference=reference.causal_fastmax_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Chunks of any size and steps give the rows of the recurrence.",
        "It is the lower triangle of the polynomial, divided by its row sums, times the values.",
        "Its last row is that of `fastmax_attention` over all keys.",
        "Queries of zeros give the mean value so far.",
    ),
    tests="tests/linear/test_causal_fastmax_attention.py",
    cost="`2 * Hq * L * F * Dv` multiply-adds of states, `F = 1 + D + D (D + 1) / 2`, and of rows of a chunk `C` with "
    "each other `Hq * L * C * (F + Dv) / 2`; memory beyond inputs and outputs does not depend on `L`.",
)
