"""Gated linear attention: each channel of the keys decays by itself."""

from __future__ import annotations

from longattn._arrays import Array
from longattn.linear._recurrence import CHUNK, recurrence
from longattn.methods import Method
from longattn.reference import linear as reference


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
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16.
        k: keys `[B, Hk, L, D]`; any of the three dtypes.
        v: values `[B, H, L, Dv]`, `H` a multiple of `Hk`; any of the three dtypes. There is a state per head of `v`.
            `Hq` is a multiple of `H`, whose states are read by groups of query heads, or divides it.
        g: natural logarithms of the decays, at most 0 (`-inf` forgets), floating `[B, H, L, D]`.
        scale: factor of outputs; `None` is `D ** -0.5`.
        initial_state: states before the first row, floating `[N, H, D, Dv]`; `None` is zeros.
        out_state: float32 array for the final states. It may be `initial_state`, which is then updated in place.
        chunk_size: rows computed at once, at most 252 (more means 252); it changes rounding only.
        cu_seqlens: integers `[N + 1]`, bounds of `N` sequences that lie one after another along the rows of a batch of
            1; each has a state of its own. `None`: the batch's entries are the sequences.
        out: array for the output.

    Returns:
        `(output, states)`: the output in the kind and dtype of `q`, and float32 `[N, H, D, Dv]`, the states
        after the last rows. A call of one row with `initial_state` is the decode step: one pass over the state.
        Arithmetic is float32, the same bits for any number of threads. A row that holds NaN or an infinity spoils rows
        after it and none before.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, a log decay above 0 or NaN.

    Cost:
        `2 * Hq * L * D * Dv` multiply-adds of states, and of rows of a chunk `C` with each other `Hq * L * C * (D +
        Dv) / 2`; memory beyond inputs and outputs does not depend on `L`.

    References:
        S. Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023, arXiv:2312.06635.
    """
    return recurrence(
        q,
        k,
        v,
        g=g,
        channels=True,
        scale=scale,
        initial_state=initial_state,
        out_state=out_state,
        chunk_size=chunk_size,
        cu_seqlens=cu_seqlens,
        out=out,
    )


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
    cost="`2 * Hq * L * D * Dv` multiply-adds of states, and of rows of a chunk `C` with "
    "each other `Hq * L * C * (D + Dv) / 2`; memory beyond inputs and outputs does not depend on `L`.",
)
