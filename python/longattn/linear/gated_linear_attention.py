"""Gated linear attention: each channel of the keys decays by itself."""

from __future__ import annotations

from longattn._arrays import Array
from longattn.linear._anywhere import recurrence_anywhere
from longattn.linear._documented import COST, documented
from longattn.linear._recurrence import CHUNK, Common, present
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def gated_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    *,
    scale: float | None = None,
    initial_state: Array | None = None,
    out_state: Array | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Gated linear attention, `S_t = Diag(e^g_t) S_(t-1) + k_t v_t^T`, `o_t = scale * q_t^T S_t`.

    Args:
        q: {queries}
        k: {keys}
        v: {values}
        g: natural logarithms of the decays, at most 0 (`-inf` forgets), floating `[B, H, L, D]`.
        scale: {scale}
        initial_state: {initial_state}
        out_state: {out_state}
        chunk_size: {chunk_size}
        cu_seqlens: {cu_seqlens}
        out: array for the output.

    Returns:
        {states}

    {gpu}

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, a log decay above 0 or NaN.

    Cost:
        {cost}

    References:
        S. Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023, arXiv:2312.06635.
    """
    present(g=g)
    common = Common(scale, initial_state, out_state, chunk_size, cu_seqlens, out)
    return recurrence_anywhere(q, k, v, common, g=g, channels=True)


METHOD = Method(
    name="gated_linear_attention",
    family="linear",
    title="Gated Linear Attention Transformers with Hardware-Efficient Training",
    year=2023,
    arxiv="2312.06635",
    function=gated_linear_attention,
    reference=reference.gated_linear_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Chunks of any size and steps give the rows of the recurrence.",
        "Gates that are the same in all channels give the form with a decay per row.",
        "Gates of 0 give linear attention without a divisor.",
        "Large gates neither overflow nor lose digits.",
    ),
    tests="tests/linear/test_gated_linear_attention.py",
    cost=COST,
)
