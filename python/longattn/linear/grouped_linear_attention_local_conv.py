"""Grouped linear attention with a local convolution: squares of scores near by, a state for what is far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like
from longattn._checks import batched, check_float_storage, check_floating, integer, one_of, result_array
from longattn.linear._local import add_causal_convolution
from longattn.linear._recurrence import LARGEST_CHUNK, Common, recurrence
from longattn.methods import Method
from longattn.reference import linear as reference

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupState:
    """What a later call needs to go on at any row.

    Attributes:
        sums: float32 `[B, H, D, Dv]`, sums over the groups that are complete.
        keys: `[B, Hk, n, D]`, keys of the group at hand.
        values: `[B, H, n, Dv]`, its values.
        before: float32 `[B, H, K - 1, Dv]`, the last values that the convolution sees.
    """

    sums: Float32
    keys: NDArray[Any]
    values: NDArray[Any]
    before: Float32


def grouped_linear_attention_local_conv(
    q: Array,
    k: Array,
    v: Array,
    weight: Array | None = None,
    *,
    group_size: int = 64,
    sim_local: str = "relu2",
    initial_state: GroupState | None = None,
    out: Array | None = None,
) -> tuple[Array, GroupState]:
    """Causal attention in groups of rows, with queries and keys divided by their lengths, and a convolution of values.

    `o_i = sum f(q_i k_j) v_j` over the row's own group, with `f(s) = max(s, 0)^2`, plus `sum (q_i k_j) v_j` over the
    groups before it, plus `sum_t w[t] v_(i - t)`. There is no divisor. With `f(s) = s` ("linear") groups change
    nothing; else `group_size` is part of the definition. Groups are counted from the first row of all, over all calls.

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`, with positions applied; float32, float16 or bfloat16.
        k: keys `[B, Hk, L, D]`, likewise; dtype of `v`.
        v: values `[B, H, L, Dv]`, `H` a multiple of `Hk`; any of the three dtypes. `Hq` is a multiple of `H`.
        weight: floating `[H, K]`, taps of each head; the first meets the row itself, the next the one before it. `None`
            is no convolution. (A masked centred kernel of `2 r + 1` taps has `K = r + 1`.)
        group_size: rows of a group, 1 to 252.
        sim_local: "relu2" or "linear".
        initial_state: what an earlier call with the same options returned.
        out: array for the output.

    Returns:
        `(output, state)`: the output in the kind and dtype of `q`, and the state after the last row. A call that does
        not begin with a group computes that group's rows so far again, fewer than `group_size`. A row that holds NaN or
        an infinity spoils rows after it and its group.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `Hq * L * (2 * D * Dv + group_size * (D + Dv) / 2 + K * Dv)` multiply-adds.

    References:
        H. You et al., "When Linear Attention Meets Autoregressive Decoding: Towards More Effective and Efficient
        Linearized Large Language Models", 2024, arXiv:2406.07368.
    """
    size = integer(group_size, "group_size", 1, LARGEST_CHUNK)
    one_of(sim_local, "sim_local", ("relu2", "linear"))
    qn, kn, vn = (as_numpy(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    for x, name in ((qn, "q"), (kn, "k"), (vn, "v")):
        check_float_storage(x, name)
        if x.ndim not in (3, 4) or x.ndim != qn.ndim:
            raise ValueError(f"{name}: got shape {x.shape}, expected rank {qn.ndim if qn.ndim in (3, 4) else '3 or 4'}")
    q4, k4, v4 = (batched(x, 4) for x in (qn, kn, vn))
    batch, heads, length, value_dim = v4.shape
    if q4.shape[2] != length or k4.shape[2] != length or heads == 0 or q4.shape[1] % heads:
        raise ValueError(f"v: got shape {vn.shape}, expected the length and a divisor of the heads of q, {qn.shape}")
    taps = None
    if weight is not None:
        taps = as_numpy(weight, "weight", any_strides=True)
        check_floating(taps, "weight")
        if taps.ndim != 2 or taps.shape[0] != heads or taps.shape[1] == 0:
            raise ValueError(f"weight: got shape {taps.shape}, expected ({heads}, taps)")
        taps = taps.astype(np.float32)
    kept = 0 if taps is None else taps.shape[1] - 1
    state = _start(initial_state, k4, v4, kept, size)
    result = result_array(out, q, (*qn.shape[:-1], value_dim), qn.dtype, {"q": qn, "k": kn, "v": vn})

    # Rows of the group at hand come once more, with queries that nobody reads.
    again = state.keys.shape[2]
    keys, values = (np.concatenate(x, axis=2) if again else x[1] for x in ((state.keys, k4), (state.values, v4)))
    queries = np.concatenate([np.zeros((*q4.shape[:2], again, q4.shape[3]), q4.dtype), q4], axis=2) if again else q4
    whole = (again + length) // size * size
    rows = np.empty((batch, q4.shape[1], again + length, value_dim), np.float32)
    sums = state.sums
    for part, complete in ((slice(0, whole), True), (slice(whole, again + length), False)):
        if part.start == part.stop:
            continue
        _, after = recurrence(
            queries[:, :, part], keys[:, :, part], values[:, :, part],
            Common(1.0, sums, chunk_size=size, out=rows[:, :, part]),
            unit=1e-24, squares=sim_local == "relu2", dtype=np.dtype(np.float32),
        )  # fmt: skip
        if complete:
            sums = np.asarray(after, np.float32)
    rows = rows[:, :, again:]
    before = state.before
    if taps is not None:
        filters = np.broadcast_to(taps[:, None], (heads, value_dim, kept + 1))
        before = add_causal_convolution(rows, v4, filters, before)
    batched(result, 4)[...] = rows
    last = GroupState(sums=sums, keys=keys[:, :, whole:].copy(), values=values[:, :, whole:].copy(), before=before)
    returned: Any = like(q, result) if out is None else out
    return returned, last


def _start(state: GroupState | None, keys: NDArray[Any], values: NDArray[Any], kept: int, size: int) -> GroupState:
    """The state before the first row, checked."""
    batch, heads, _, value_dim = values.shape
    shapes = {
        "sums": (batch, heads, keys.shape[3], value_dim),
        "keys": (*keys.shape[:2], 0, keys.shape[3]),
        "values": (batch, heads, 0, value_dim),
        "before": (batch, heads, kept, value_dim),
    }
    if state is None:
        zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        return GroupState(
            sums=zeros["sums"],
            keys=zeros["keys"].astype(keys.dtype),
            values=zeros["values"].astype(values.dtype),
            before=zeros["before"],
        )
    if not isinstance(state, GroupState):
        raise TypeError(f"initial_state: got {type(state).__name__}, expected a GroupState")
    rows = state.keys.shape[2]
    if rows >= size:
        raise ValueError(f"initial_state: got keys of {rows} rows, expected fewer than the {size} of a group")
    for name, shape in shapes.items():
        expected = (*shape[:2], rows, shape[3]) if name in ("keys", "values") else shape
        got = getattr(state, name).shape
        if got != expected:
            raise ValueError(f"initial_state: got {name} {got}, expected {expected}")
    if state.keys.dtype != keys.dtype or state.values.dtype != values.dtype:
        raise TypeError(f"initial_state: got keys {state.keys.dtype}, expected {keys.dtype} as k")
    return state


METHOD = Method(
    name="grouped_linear_attention_local_conv",
    family="linear",
    title="When Linear Attention Meets Autoregressive Decoding: Towards More Effective and Efficient Linearized Large "
    "Language Models",
    year=2024,
    arxiv="2406.07368",
    function=grouped_linear_attention_local_conv,
    reference=reference.grouped_linear_attention_local_conv,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "It is the matrix of both similarities, masked, plus the convolution.",
        "Steps give the rows of a prefill.",
        "With linear similarities everywhere groups of any size give linear attention.",
        "A row sees nothing of rows after it.",
    ),
    tests="tests/linear/test_grouped_linear_attention_local_conv.py",
    cost="`Hq * L * (2 * D * Dv + group_size * (D + Dv) / 2 + K * Dv)` multiply-adds.",
)
