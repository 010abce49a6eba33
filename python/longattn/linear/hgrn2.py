"""HGRN2: a gated linear recurrence whose keys are what its gates forget."""

from __future__ import annotations

from longattn._arrays import Array
from longattn.linear._documented import COST, documented
from longattn.linear._recurrence import CHUNK, TIED, Common, present, recurrence
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def hgrn2(
    q: Array,
    v: Array,
    g: Array,
    *,
    scale: float = 1.0,
    initial_state: Array | None = None,
    out_state: Array | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """HGRN2, `S_t = Diag(f_t) S_(t-1) + (1 - f_t) v_t^T` with `f_t = e^g_t`, `o_t = scale * q_t^T S_t`.

    A channel of the state is a running mean of values. The lower bound of a layer's gates is part of `g`.

    Args:
        q: output gates `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16.
        v: inputs `[B, H, L, Dv]`; any of the three dtypes. There is a state per head of `v`. `Hq` is a multiple of `H`.
        g: natural logarithms of the forget gates, at most 0 (`-inf` forgets), floating `[B, H, L, D]`.
        scale: factor of outputs.
        initial_state: {initial_state}
        out_state: {out_state}
        chunk_size: {chunk_size}
        cu_seqlens: {cu_seqlens}
        out: array for the output.

    Returns:
        {states}

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, a log decay above 0 or NaN.

    Cost:
        {cost}

    References:
        Z. Qin et al., "HGRN2: Gated Linear RNNs with State Expansion", 2024, arXiv:2404.07904.
    """
    present(g=g)
    common = Common(scale, initial_state, out_state, chunk_size, cu_seqlens, out)
    return recurrence(q, TIED, v, common, g=g, channels=True)


METHOD = Method(
    name="hgrn2",
    family="linear",
    title="HGRN2: Gated Linear RNNs with State Expansion",
    year=2024,
    arxiv="2404.07904",
    function=hgrn2,
    reference=reference.hgrn2,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Chunks of any size and steps give the rows of the recurrence.",
        "It is gated linear attention with keys `1 - e^g`.",
        "Values that never change are held exactly once the state is full.",
        "Gates of 0 ignore the input.",
    ),
    tests="tests/linear/test_hgrn2.py",
    cost=COST,
)
