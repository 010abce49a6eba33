"""RWKV-6: a decay per channel of the keys, and a weight of its own for the current token."""

from __future__ import annotations

from longattn._arrays import Array
from longattn.linear._documented import COST, documented
from longattn.linear._recurrence import CHUNK, Common, present, recurrence
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def rwkv6(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    u: Array,
    *,
    scale: float = 1.0,
    initial_state: Array | None = None,
    out_state: Array | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """RWKV-6, `o_t = scale * q_t^T (S_(t-1) + Diag(u) k_t v_t^T)`, `S_t = Diag(e^g_t) S_(t-1) + k_t v_t^T`.

    A row reads what was there before it, not yet decayed, and its own key with the weight `u`. In the paper `q` is the
    receptance `r`, and `e^g` is `w = exp(-exp(d))` of what a token's decay `d` is.

    Args:
        q: receptances `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16.
        k: {keys}
        v: {values}
        g: natural logarithms of the decays, at most 0 (`-inf` forgets), floating `[B, H, L, D]`.
        u: weights of the channels of a row's own key, floating `[H, D]`, finite.
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
        ValueError: shapes that do not fit, a log decay above 0 or NaN, a `u` that is not finite.

    Cost:
        {cost}

    References:
        B. Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", 2024,
        arXiv:2404.05892.
    """
    present(g=g, u=u)
    common = Common(scale, initial_state, out_state, chunk_size, cu_seqlens, out)
    return recurrence(q, k, v, common, g=g, channels=True, bonus=u)


METHOD = Method(
    name="rwkv6",
    family="linear",
    title="Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence",
    year=2024,
    arxiv="2404.05892",
    function=rwkv6,
    reference=reference.rwkv6,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Chunks of any size and steps give the rows of the recurrence.",
        "Without decay and with weights `u` of 1 it is linear attention without divisor.",
        "The first row reads its own key alone, times `u`.",
        "States are those of gated linear attention.",
    ),
    tests="tests/linear/test_rwkv6.py",
    cost=COST,
)
