"""Gated slot attention: a cache of a few slots that forget, read by a softmax."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn._arrays import Array, as_numpy, like
from longattn._checks import check_float_storage
from longattn.linear._documented import documented
from longattn.linear._recurrence import CHUNK, TIED, Common, recurrence
from longattn.linear.feature_map import FeatureMap
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def gated_slot_attention(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    *,
    scale: float | None = None,
    initial_state: tuple[Array, Array] | None = None,
    out_state: tuple[Array, Array] | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    """GSA, `o_t = V_t^T softmax(scale * K_t q_t)` over `M` slots that forget.

    Every row is mixed into each slot by what the slot's gate frees, `K_t = Diag(a_t) K_(t-1) + (1 - a_t) k_t^T` with
    `a_t = e^g_t`, and `V_t` the same with `v_t^T`. That is gated linear attention twice, with a softmax in between: the
    first pass decays the columns of its state, the second the rows.

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16.
        k: keys `[B, H, L, D]`; any of the three dtypes.
        v: values `[B, H, L, Dv]`; any of the three dtypes. `Hq` is a multiple of `H`.
        g: natural logarithms of the slots' gates, at most 0 (`-inf` overwrites), floating `[B, H, L, M]`.
        scale: factor on the logits of slots; `None` is `D ** -0.5`.
        initial_state: slots before the first row, floating `[N, H, D, M]` (keys, transposed) and `[N, H, M, Dv]`;
            `None` is zeros.
        out_state: two float32 arrays for the final slots. They may be those of `initial_state`, which are then updated
            in place.
        chunk_size: {chunk_size}
        cu_seqlens: {cu_seqlens}
        out: array for the output.

    Returns:
        `(output, states)`: the output in the kind and dtype of `q`, and the float32 slots after the last rows. A call
        of one row with `initial_state` is the decode step. Logits of slots are float32 in between.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, a log gate above 0 or NaN.

    Cost:
        `2 * Hq * L * M * (D + Dv)` multiply-adds of states, and of rows of a chunk `C` with each other about `Hq * L *
        C * (D + 2 * M + Dv) / 2`; `Hq * L * M` numbers of memory beyond inputs and outputs.

    References:
        Y. Zhang et al., "Gated Slot Attention for Efficient Linear-Time Sequence Modeling", 2024, arXiv:2409.07146.
    """
    vn, gates = as_numpy(v, "v"), as_numpy(g, "g")
    check_float_storage(vn, "v")
    if gates.ndim != vn.ndim or gates.shape[-1] == 0:
        raise ValueError(f"g: got shape {gates.shape}, expected rank {vn.ndim} as v, and at least one slot")
    for name, pair in (("initial_state", initial_state), ("out_state", out_state)):
        if pair is not None and (not isinstance(pair, tuple | list) or len(pair) != 2):
            raise TypeError(f"{name}: got {type(pair).__name__}, expected a pair (keys, values)")
    starts: Any = initial_state or (None, None)
    ends: Any = out_state or (None, None)
    # Values of 1, of which a gate lets in what it frees.
    ones = np.broadcast_to(np.ones(gates.shape[-1], np.float32), (*vn.shape[:-1], gates.shape[-1]))
    logits, slots = recurrence(
        q, k, ones, Common(scale, starts[0], ends[0], chunk_size, cu_seqlens), g=g, columns=True,
        dtype=np.dtype(np.float32),
    )  # fmt: skip
    qn = as_numpy(q, "q")
    result, values = recurrence(
        as_numpy(logits, "q"), TIED, v, Common(1.0, starts[1], ends[1], chunk_size, cu_seqlens, out), g=g,
        channels=True, maps=(FeatureMap(kind="softmax"), None), dtype=qn.dtype,
    )  # fmt: skip
    returned: Any = like(q, as_numpy(result, "out")) if out is None else out
    last: Any = like(q, as_numpy(values, "out_state")) if ends[1] is None else ends[1]
    return returned, (slots, last)


METHOD = Method(
    name="gated_slot_attention",
    family="linear",
    title="Gated Slot Attention for Efficient Linear-Time Sequence Modeling",
    year=2024,
    arxiv="2409.07146",
    function=gated_slot_attention,
    reference=reference.gated_slot_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Chunks of any size and steps give the rows of the recurrence.",
        "It is softmax attention over the slots, built row by row.",
        "Gates that overwrite one slot each, in turn, give softmax attention over the rows.",
        "Values that never change are returned once the slots are full.",
    ),
    tests="tests/linear/test_gated_slot_attention.py",
    cost="`2 * Hq * L * M * (D + Dv)` multiply-adds of states, and of rows of a chunk `C` with each other about "
    "`Hq * L * C * (D + 2 * M + Dv) / 2`; `Hq * L * M` numbers of memory beyond inputs and outputs.",
)
