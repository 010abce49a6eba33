"""Simplified linear attention over the rows so far."""

from __future__ import annotations

from longattn._arrays import Array
from longattn.linear._documented import ENTRIES, documented
from longattn.linear._recurrence import CHUNK
from longattn.linear._running import RELU, LocalState, divide, rows_of
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def causal_simplified_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    eps: float = 1e-6,
    weight: Array | None = None,
    initial_state: LocalState | None = None,
    chunk_size: int = CHUNK,
    out: Array | None = None,
) -> tuple[Array, LocalState]:
    """Simplified linear attention over the rows so far, `o_t = relu(q_t)^T S_t / (relu(q_t)^T z_t + eps)`.

    UNSURE: the paper's language models; here the convolution of the values is causal, along rows, and may be left out.

    Args:
        q: {queries}
        k: {own_keys}
        v: {own_values}
        eps: added to the divisor.
        weight: {taps}
        initial_state: {going_on}
        chunk_size: {chunk_size}
        out: array for the output.

    Returns:
        {local}

    Raises:
        {raises}

    Cost:
        {local_cost}

    References:
        J. Guo et al., "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
        Re-parameterized Batch Normalization", 2024, arXiv:2405.11582.
    """
    return divide(q, rows_of(q, k, v), (RELU, RELU), eps, weight, initial_state, chunk_size, out)


METHOD = Method(
    name="causal_simplified_linear_attention",
    family="linear",
    title="SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized "
    "Batch Normalization",
    year=2024,
    arxiv="2405.11582",
    function=causal_simplified_linear_attention,
    reference=reference.causal_simplified_linear_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Its last row is that of `simplified_linear_attention` over all keys.",
        "Steps and parts that hand the state on give the rows of one call.",
        "A row sees nothing of rows after it.",
    ),
    tests="tests/linear/test_causal_forms.py",
    cost=ENTRIES["local_cost"],
)
