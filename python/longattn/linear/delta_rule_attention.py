"""The delta rule: an update replaces what the state holds for a key."""

from __future__ import annotations

from longattn._arrays import Array
from longattn._checks import flag
from longattn.linear._anywhere import recurrence_anywhere
from longattn.linear._documented import DELTA_COST, documented
from longattn.linear._recurrence import CHUNK, Common, present
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def delta_rule_attention(
    q: Array,
    k: Array,
    v: Array,
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
    """DeltaNet, `S_t = S_(t-1) + beta_t k_t (v_t - S_(t-1)^T k_t)^T`, `o_t = scale * q_t^T S_t`.

    Args:
        q: {queries}
        k: {keys}
        v: {values}
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
        ValueError: shapes that do not fit, or {bad_beta}

    Cost:
        {delta_cost}

    References:
        S. Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024,
        arXiv:2406.06484.
    """
    present(beta=beta)
    common = Common(scale, initial_state, out_state, chunk_size, cu_seqlens, out)
    unit = 1e-6 if flag(normalize_qk, "normalize_qk") else None
    return recurrence_anywhere(q, k, v, common, beta=beta, delta=True, unit=unit)


METHOD = Method(
    name="delta_rule_attention",
    family="linear",
    title="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
    year=2024,
    arxiv="2406.06484",
    function=delta_rule_attention,
    reference=reference.delta_rule_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Chunks of any size and steps give the rows of the recurrence.",
        "Orthonormal keys with a beta of 1 are recalled exactly.",
        "A beta of 0 leaves the initial state as it is.",
        "A key written twice holds its second value.",
    ),
    tests="tests/linear/test_delta_rule_attention.py",
    cost=DELTA_COST,
)
