"""The gated delta rule: a decay per row, then the delta rule."""

from __future__ import annotations

from longattn._arrays import Array
from longattn._checks import flag
from longattn.linear._anywhere import recurrence_anywhere
from longattn.linear._documented import DELTA_COST, documented
from longattn.linear._recurrence import CHUNK, Common, present
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state: Array | None = None,
    out_state: Array | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Gated DeltaNet, `S_t = S' + beta_t k_t (v_t - S'^T k_t)^T` with `S' = e^g_t S_(t-1)`, `o_t = scale * q_t^T S_t`.

    Args:
        q: {queries}
        k: {keys}
        v: {values}
        g: natural logarithms of the decays, at most 0 (`-inf` forgets), floating `[B, H, L]`.
        beta: {beta}
        scale: {scale}
        normalize_qk: {normalize_qk}
        initial_state: {initial_state}
        out_state: {out_state}
        chunk_size: {chunk_size}
        cu_seqlens: {cu_seqlens}
        out: array for the output.

    Returns:
        {states}

    {gpu_delta}

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, a log decay above 0 or NaN, {bad_beta}

    Cost:
        {delta_cost}

    References:
        S. Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024, arXiv:2412.06464.
    """
    present(g=g, beta=beta)
    common = Common(scale, initial_state, out_state, chunk_size, cu_seqlens, out)
    unit = 1e-6 if flag(normalize_qk, "normalize_qk") else None
    return recurrence_anywhere(q, k, v, common, g=g, beta=beta, delta=True, unit=unit)


METHOD = Method(
    name="gated_delta_rule",
    family="linear",
    title="Gated Delta Networks: Improving Mamba2 with Delta Rule",
    year=2024,
    arxiv="2412.06464",
    function=gated_delta_rule,
    reference=reference.gated_delta_rule,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Chunks of any size and steps give the rows of the recurrence.",
        "Log decays of 0 give the delta rule.",
        "A beta of 0 is pure decay of the initial state.",
        "It is Kimi delta attention whose gates are the same in all channels.",
    ),
    tests="tests/linear/test_gated_delta_rule.py",
    cost=DELTA_COST,
)
