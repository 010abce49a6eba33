"""The delta rule: an update replaces what the state holds for a key."""

from __future__ import annotations

from longattn._arrays import Array
from longattn._checks import flag
from longattn.gpu import is_on_gpu
from longattn.linear._documented import documented
from longattn.linear._on_gpu import recurrence_on_gpu
from longattn.linear._recurrence import CHUNK, present, recurrence
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

    Arrays of a GPU go to `longattn.gpu.chunked_recurrence`, one head of queries per head of keys; `normalize_qk`,
    `out_state`, `cu_seqlens`, `chunk_size` and `out` are not offered there.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or a beta that is not finite or, with
            `normalize_qk`, outside 0 to 2.

    Cost:
        `3 * H * L * D * Dv` multiply-adds of states, and of rows of a chunk `C` with each other about `H * L * C * (D
        + Dv + C / 6)`; memory beyond inputs and outputs does not depend on `L`.

    References:
        S. Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024,
        arXiv:2406.06484.
    """
    present(beta=beta)
    if is_on_gpu(q):
        return recurrence_on_gpu(
            q,
            k,
            v,
            beta=beta,
            scale=scale,
            initial_state=initial_state,
            chunk_size=chunk_size,
            normalize_qk=flag(normalize_qk, "normalize_qk"),
            out_state=out_state,
            cu_seqlens=cu_seqlens,
            out=out,
        )
    return recurrence(
        q,
        k,
        v,
        beta=beta,
        delta=True,
        scale=scale,
        unit=1e-6 if flag(normalize_qk, "normalize_qk") else None,
        initial_state=initial_state,
        out_state=out_state,
        chunk_size=chunk_size,
        cu_seqlens=cu_seqlens,
        out=out,
    )


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
    cost="`3 * H * L * D * Dv` multiply-adds of states, and of rows of a chunk `C` with "
    "each other about `H * L * C * (D + Dv + C / 6)`; memory beyond inputs and outputs does not depend on `L`.",
)
