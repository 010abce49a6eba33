"""Magnitude-aware linear attention over the rows so far."""

from __future__ import annotations

from longattn._arrays import Array
from longattn._checks import finite, scale_factor
from longattn.linear._documented import ENTRIES, documented
from longattn.linear._recurrence import CHUNK
from longattn.linear._running import RunningStatistics, attend, dim_of
from longattn.linear.feature_map import FeatureMap, feature_map
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def causal_magnitude_aware_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    phi: str | FeatureMap = "elu1",
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: RunningStatistics | None = None,
    chunk_size: int = CHUNK,
    out: Array | None = None,
) -> tuple[Array, RunningStatistics]:
    """Magnitude-aware linear attention over the `t` rows so far.

    Weights `(1 + 1 / (m_t + eps)) s phi(q_t)^T phi(k_j) / t - m_t / t`, `m_t = s phi(q_t)^T z_t / t`.

    Args:
        q: {queries}
        k: {own_keys}
        v: {own_values}
        phi: the map of queries and keys, or its name.
        scale: the factor `s`; `None` is `D ** -0.5`.
        eps: added to `m_t` in the denominator.
        initial_state: {going_on}
        chunk_size: {chunk_size}
        out: array for the output.

    Returns:
        {running}

    Raises:
        {raises}

    Cost:
        {running_cost}

    References:
        Q. Fan et al., "Rectifying Magnitude Neglect in Linear Attention", 2025, arXiv:2507.00698.
    """
    read_out = ("magnitude", scale_factor(scale, dim_of(q)), finite(eps, "eps", 0))
    return attend(q, k, v, feature_map(phi), read_out, initial_state, chunk_size, out)


METHOD = Method(
    name="causal_magnitude_aware_linear_attention",
    family="linear",
    title="Rectifying Magnitude Neglect in Linear Attention",
    year=2025,
    arxiv="2507.00698",
    function=causal_magnitude_aware_linear_attention,
    reference=reference.causal_magnitude_aware_linear_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Its last row is that of `magnitude_aware_linear_attention` over all keys.",
        "Steps and parts that hand the state on give the rows of one call.",
        "A row sees nothing of rows after it.",
        "Equal values are returned.",
    ),
    tests="tests/linear/test_causal_forms.py",
    cost=ENTRIES["running_cost"],
)
