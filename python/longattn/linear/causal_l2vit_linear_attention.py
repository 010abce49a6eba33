"""Linear attention of L2ViT over the rows so far."""

from __future__ import annotations

import numpy as np

from longattn._arrays import Array
from longattn._checks import finite, per_head
from longattn.linear._documented import ENTRIES, documented
from longattn.linear._recurrence import CHUNK
from longattn.linear._running import RELU, RunningStatistics, attend, dim_of, rows_of
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def causal_l2vit_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    tau: Array | None = None,
    den_min: float = 100.0,
    initial_state: RunningStatistics | None = None,
    chunk_size: int = CHUNK,
    out: Array | None = None,
) -> tuple[Array, RunningStatistics]:
    """Linear attention of L2ViT over the rows so far, `tau_h relu(q_t)^T S_t / max(relu(q_t)^T z_t, den_min)`.

    Args:
        q: {queries}
        k: {own_keys}
        v: {own_values}
        tau: floating `[Hq]`, learned factors of the output; `None` is `D ** -0.5`.
        den_min: the least denominator, at least 0.
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
        C. Zheng, "The Linear Attention Resurrection in Vision Transformer", 2025, arXiv:2501.16182.
    """
    least, heads = finite(den_min, "den_min"), rows_of(q, k, v)[0].shape[1]
    if least < 0:
        raise ValueError(f"den_min: got {den_min}, expected at least 0")
    factors = np.full(heads, dim_of(q) ** -0.5, np.float32) if tau is None else per_head(tau, "tau", heads)
    return attend(q, k, v, RELU, ("clamp", least, 0.0), initial_state, chunk_size, out, factors)


METHOD = Method(
    name="causal_l2vit_linear_attention",
    family="linear",
    title="The Linear Attention Resurrection in Vision Transformer",
    year=2025,
    arxiv="2501.16182",
    function=causal_l2vit_linear_attention,
    reference=reference.causal_l2vit_linear_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Its last row is that of `l2vit_linear_attention` over all keys.",
        "Steps and parts that hand the state on give the rows of one call.",
        "A row sees nothing of rows after it.",
    ),
    tests="tests/linear/test_causal_forms.py",
    cost=ENTRIES["running_cost"],
)
