"""Efficient attention over the rows so far: each channel of the keys weighs positions by a running softmax."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array
from longattn._checks import batched, one_of, returned
from longattn.linear._documented import documented
from longattn.linear._recurrence import CHUNK, TIED, Common, recurrence
from longattn.linear._running import RunningStatistics, attend, check_state, result_of, rows_of
from longattn.linear.feature_map import FeatureMap
from longattn.methods import Method
from longattn.reference import linear as reference

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunningSoftmax:
    """A softmax over the positions so far, for each channel of the keys.

    Attributes:
        means: float32 `[B, H, D, Dv]`: means of the values by these weights.
        logs: float64 `[B, H, D]`: logarithms of the sums of `e^k`; minus infinity before the first row.
    """

    means: Float32
    logs: NDArray[np.float64]


@documented
def causal_efficient_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    norm: str = "softmax",
    initial_state: RunningSoftmax | RunningStatistics | None = None,
    chunk_size: int = CHUNK,
    out: Array | None = None,
) -> tuple[Array, RunningSoftmax | RunningStatistics]:
    """Efficient attention over the rows so far: `o_t = rho_q(q_t)^T sum_(j <= t) rho(k_j) v_j^T`.

    With `norm="softmax"` a channel of the keys weighs the rows so far by their softmax: running means of the values
    that decay by what the rows before keep of it. With "scaling" the sum is divided by the number of rows so far.

    Args:
        q: {queries}
        k: {own_keys}
        v: {own_values}
        norm: "softmax" or "scaling".
        initial_state: {going_on}
        chunk_size: {chunk_size}
        out: array for the output.

    Returns:
        `(output, state)`: the output in the kind and dtype of `q`, and `RunningSoftmax`, or with "scaling"
        `RunningStatistics`. A call of one row is the decode step.

    Raises:
        {raises}

    Cost:
        `2 * Hq * L * D * Dv` multiply-adds of states and an exponential per number of `k`; memory of a float32 array
        like `k`.

    References:
        Z. Shen et al., "Efficient Attention: Attention with Linear Complexities", 2018, arXiv:1812.01243.
    """
    one_of(norm, "norm", ("softmax", "scaling"))
    if norm == "scaling":
        return attend(q, k, v, None, ("plain_means", 1.0, 0.0), initial_state, chunk_size, out)
    rows = rows_of(q, k, v)
    batch, heads, _, dim = rows[1].shape
    means, logs = None, np.full((batch, heads, dim), -np.inf)
    if initial_state is not None:
        check_state(initial_state, RunningSoftmax, means=(batch, heads, dim, rows[2].shape[3]))
        assert isinstance(initial_state, RunningSoftmax)
        means, so_far = initial_state.means, initial_state.logs
        if so_far.shape != logs.shape or so_far.dtype != np.float64:
            raise ValueError(f"initial_state: got logs {so_far.dtype} {so_far.shape}, expected float64 {logs.shape}")
        logs[...] = so_far
    kept = np.empty(rows[1].shape, np.float32)
    _core.running_softmax(rows[1], logs, kept)
    result = result_of(q, rows, out)
    maps = (FeatureMap(kind="softmax"), None)
    _, after = recurrence(
        rows[0], TIED, rows[2], Common(1.0, means, None, chunk_size, None, batched(result, 4)), g=kept, channels=True,
        maps=maps,
    )  # fmt: skip
    last = RunningSoftmax(means=np.asarray(after, np.float32), logs=logs)
    return returned(out, q, result, None), last


METHOD = Method(
    name="causal_efficient_attention",
    family="linear",
    title="Efficient Attention: Attention with Linear Complexities",
    year=2018,
    arxiv="1812.01243",
    function=causal_efficient_attention,
    reference=reference.causal_efficient_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Its last row is that of `efficient_attention` over all keys.",
        "Steps and parts that hand the state on give the rows of one call.",
        "A row sees nothing of rows after it.",
        "Equal values are returned.",
    ),
    tests="tests/linear/test_causal_forms.py",
    cost="`2 * Hq * L * D * Dv` multiply-adds of states and an exponential per number of `k`.",
)
