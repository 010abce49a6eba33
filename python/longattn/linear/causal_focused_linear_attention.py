"""Focused linear attention over the rows so far."""

from __future__ import annotations

from longattn._arrays import Array
from longattn.linear._documented import ENTRIES, documented
from longattn.linear._recurrence import CHUNK
from longattn.linear._running import LocalState, divide, rows_of
from longattn.linear.focused_linear_attention import focusing
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def causal_focused_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    power: float = 3.0,
    channel_scale: Array | None = None,
    norm_scope: str = "all",
    eps: float = 1e-6,
    weight: Array | None = None,
    initial_state: LocalState | None = None,
    chunk_size: int = CHUNK,
    out: Array | None = None,
) -> tuple[Array, LocalState]:
    """Focused linear attention over the rows so far, and a causal convolution of the values.

    `o_t = phi(q_t)^T S_t / (phi(q_t)^T z_t + eps)` with the map of `focused_linear_attention`. Positions are added to
    keys beforehand.

    Args:
        q: {queries}
        k: {own_keys}
        v: {own_values}
        power: the exponent `p`, above 0.
        channel_scale: floating `[H * D]`; features are divided by its softplus; `None` is zeros.
        norm_scope: "all": lengths are kept over all heads of a row; "head": in each.
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
        D. Han et al., "FLatten Transformer: Vision Transformer using Focused Linear Attention", 2023, arXiv:2308.00442.
    """
    qn, kn, _ = rows = rows_of(q, k, v)
    maps = focusing(qn, kn, power, channel_scale, norm_scope)
    return divide(q, rows, maps, eps, weight, initial_state, chunk_size, out)


METHOD = Method(
    name="causal_focused_linear_attention",
    family="linear",
    title="FLatten Transformer: Vision Transformer using Focused Linear Attention",
    year=2023,
    arxiv="2308.00442",
    function=causal_focused_linear_attention,
    reference=reference.causal_focused_linear_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Its last row is that of `focused_linear_attention` over all keys.",
        "Steps and parts that hand the state on give the rows of one call.",
        "A row sees nothing of rows after it.",
    ),
    tests="tests/linear/test_causal_forms.py",
    cost=ENTRIES["local_cost"],
)
