"""Based: linear attention whose features are the Taylor series of the softmax's exponential."""

from __future__ import annotations

from longattn._arrays import Array, as_numpy
from longattn._checks import finite, flag, integer, scale_factor
from longattn.linear._documented import documented
from longattn.linear._recurrence import CHUNK, Common, recurrence
from longattn.linear.feature_map import FeatureMap
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def based(
    q: Array,
    k: Array,
    v: Array,
    *,
    order: int = 2,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    initial_state: Array | None = None,
    out_state: Array | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Causal linear attention with weights `1 + s + s^2 / 2` of the logits `s = scale * q k`.

    The features, 1, channels and products of two channels, are made as rows are read. Symmetric products are kept once,
    `F = 1 + D + D * (D + 1) / 2`. The paper's model alternates such layers with softmax attention in a small window,
    which is `longattn.attention` with `window`.

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16. The paper projects to `D = 16`.
        k: {keys}
        v: {values}
        order: of the series, 1 or 2.
        scale: factor on the logits; `None` is `D ** -0.5`.
        normalize: divide outputs by the sum of their weights. A row whose divisor is 0 gives 0.
        eps: added to the divisor.
        initial_state: states before the first row, floating `[N, H, F, Dv]`, with `normalize` `[N, H, F, Dv + 1]`, the
            last column being the sums of features; `None` is zeros.
        out_state: {out_state}
        chunk_size: {chunk_size}
        cu_seqlens: {cu_seqlens}
        out: array for the output.

    Returns:
        `(output, states)`: the output in the kind and dtype of `q`, and the float32 states after the last rows. A call
        of one row with `initial_state` is the decode step: one pass over the state.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `2 * Hq * L * F * Dv` multiply-adds of states, and of rows of a chunk `C` with each other `Hq * L * C * (F +
        Dv) / 2`; memory beyond inputs and outputs does not depend on `L`.

    References:
        S. Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff", 2024,
        arXiv:2402.18668.
    """
    shape = as_numpy(q, "q").shape
    degree = integer(order, "order", 1, 2)
    factor = scale_factor(scale, max(shape[-1], 1) if shape else 1)
    if factor < 0:
        raise ValueError(f"scale: got {scale}, expected at least 0")
    phi = FeatureMap(kind="taylor", order=degree, scale=factor**0.5)
    common = Common(1.0, initial_state, out_state, chunk_size, cu_seqlens, out)
    divided = finite(eps, "eps", 0) if flag(normalize, "normalize") else None
    return recurrence(q, k, v, common, maps=(phi, phi), normaliser=divided)


METHOD = Method(
    name="based",
    family="linear",
    title="Simple linear attention language models balance the recall-throughput tradeoff",
    year=2024,
    arxiv="2402.18668",
    function=based,
    reference=reference.based,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Chunks of any size and steps give the rows of the recurrence.",
        "It is the lower triangle of `1 + s + s^2 / 2`, divided by its row sums, times the values.",
        "Small logits give softmax attention.",
        "Equal values are returned as they are.",
    ),
    tests="tests/linear/test_based.py",
    cost="`2 * Hq * L * F * Dv` multiply-adds of states, and of rows of a chunk `C` with each other "
    "`Hq * L * C * (F + Dv) / 2`; memory beyond inputs and outputs does not depend on `L`.",
)
