"""RWKV-7: the generalised delta rule, which removes by one vector and adds by another."""

from __future__ import annotations

from longattn._arrays import Array
from longattn.linear._documented import documented
from longattn.linear._recurrence import CHUNK, Common, present, recurrence
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def rwkv7(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    a: Array,
    b: Array,
    *,
    scale: float = 1.0,
    initial_state: Array | None = None,
    out_state: Array | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """RWKV-7, `S_t = (Diag(e^g_t) + b_t a_t^T) S_(t-1) + k_t v_t^T`, `o_t = scale * q_t^T S_t`.

    A transition of a diagonal and a matrix of rank one. The paper writes states with values along rows, `S (diag(w) + a
    b^T) + v k^T`; there `q` is the receptance `r`, `a = -kappa` of a unit vector `kappa` and `b = kappa * eta` of rates
    `eta` from 0 to 1 per channel. Any `a` and `b` are taken; states grow without bound where the transition lengthens
    vectors. `a` reads the state before it decays.

    Args:
        q: receptances `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16.
        k: {keys}
        v: {values}
        g: natural logarithms of the decays, at most 0 (`-inf` forgets), floating `[B, H, L, D]`.
        a: what states are read by before a row, in the shape of `k`; any of the three dtypes.
        b: where what was read is written, in the shape of `k`; any of the three dtypes.
        scale: factor of outputs.
        initial_state: {initial_state}
        out_state: {out_state}
        chunk_size: {chunk_size}
        cu_seqlens: {cu_seqlens}
        out: array for the output.

    Returns:
        `(output, states)`: the output in the kind and dtype of `q`, and float32 `[N, H, D, Dv]`, the states
        after the last rows. A call of one row with `initial_state` is the decode step: two passes over the state, the
        second of which finds it in the cache.
        Arithmetic is float32, the same bits for any number of threads. A row that holds NaN or an infinity spoils rows
        after it and none before.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, a log decay above 0 or NaN.

    Cost:
        `4 * H * L * D * Dv` multiply-adds of states, and of rows of a chunk `C` with each other about `H * L * C * (2
        * D + 2 * Dv + C / 6)`; memory beyond inputs and outputs does not depend on `L`.

    References:
        B. Peng et al., "RWKV-7 'Goose' with Expressive Dynamic State Evolution", 2025, arXiv:2503.14456.
    """
    present(g=g)
    common = Common(scale, initial_state, out_state, chunk_size, cu_seqlens, out)
    return recurrence(q, k, v, common, g=g, channels=True, pair=(a, b))


METHOD = Method(
    name="rwkv7",
    family="linear",
    title="RWKV-7 'Goose' with Expressive Dynamic State Evolution",
    year=2025,
    arxiv="2503.14456",
    function=rwkv7,
    reference=reference.rwkv7,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Chunks of any size and steps give the rows of the recurrence.",
        "With `a` or `b` of 0 it is gated linear attention.",
        "With `a = -e^g k` and `b = beta k`, keys `beta k`, it is Kimi delta attention.",
        "Without decay, with `a = -k` and `b = beta k`, keys `beta k`, it is the delta rule.",
    ),
    tests="tests/linear/test_rwkv7.py",
    cost="`4 * H * L * D * Dv` multiply-adds of states, and of rows of a chunk `C` with "
    "each other about `H * L * C * (2 * D + 2 * Dv + C / 6)`; memory beyond inputs and outputs does not depend on `L`.",
)
