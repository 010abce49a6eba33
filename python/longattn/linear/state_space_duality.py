"""State space duality: the state space model of Mamba-2 as linear attention."""

from __future__ import annotations

import numpy as np

from longattn._arrays import Array, as_numpy
from longattn._checks import all_within, check_floating, per_head, shape_of
from longattn.linear._documented import documented
from longattn.linear._recurrence import CHUNK, Common, recurrence
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def state_space_duality(
    x: Array,
    dt: Array,
    a: Array,
    b: Array,
    c: Array,
    *,
    skip: Array | None = None,
    initial_state: Array | None = None,
    out_state: Array | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Mamba-2, `S_t = e^(dt_t a) S_(t-1) + dt_t b_t x_t^T`, `y_t = c_t^T S_t + skip x_t`.

    It is linear attention with queries `c`, keys `b`, values `dt x` and a decay per row.

    Args:
        x: inputs `[B, H, L, P]`, or `[H, L, P]`; float32, float16 or bfloat16.
        dt: step sizes, finite and at least 0 (after softplus and bias), floating `[B, H, L]`.
        a: negative rate of each head, at most 0, floating `[H]`.
        b: input projections `[B, groups, L, N]`, `H` a multiple of `groups`; any of the three dtypes.
        c: output projections, as `b`.
        skip: factor of `x` in the output, floating `[H]`; `None` is 0.
        initial_state: states before the first row, floating `[S, H, N, P]` of `S` sequences; `None` is zeros.
        out_state: {out_state}
        chunk_size: {chunk_size}
        cu_seqlens: {cu_seqlens}
        out: array for the output.

    Returns:
        `(output, states)`: the output in the kind and dtype of `c`, and float32 `[S, H, N, P]`, the states
        after the last rows. A call of one row with `initial_state` is the decode step: one pass over the state.
        Arithmetic is float32, the same bits for any number of threads. A row that holds NaN or an infinity spoils rows
        after it and none before.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or rates and steps of the wrong sign.

    Cost:
        `2 * H * L * N * P` multiply-adds of states, and of rows of a chunk `C` with each other `H * L * C * (N + P) /
        2`; memory beyond inputs and outputs does not depend on `L`.

    References:
        T. Dao, A. Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
        Space Duality", 2024, arXiv:2405.21060.
    """
    steps = as_numpy(dt, "dt", any_strides=True)
    check_floating(steps, "dt")
    shape = shape_of(x, "x")
    heads = shape[-3] if len(shape) > 2 else 0
    rates = per_head(a, "a", heads)
    skips = None if skip is None else per_head(skip, "skip", heads)
    if steps.shape != shape[:-1]:
        raise ValueError(f"dt: got shape {steps.shape}, expected {shape[:-1]}")
    if skips is not None and not np.isfinite(skips).all():
        raise ValueError("skip: got a number that is not finite, expected finite ones")
    if not (rates <= 0).all():
        raise ValueError("a: got a number above 0 or NaN, expected rates of at most 0")
    steps = steps.astype(np.float32, copy=False)
    if not all_within(steps, 0, float(np.finfo(np.float32).max)):
        raise ValueError("dt: got a number below 0 or not finite, expected finite steps of at least 0")
    decays = steps * rates[:, None]
    common = Common(1.0, initial_state, out_state, chunk_size, cu_seqlens, out)
    return recurrence(
        c, b, x, common, names=("c", "b", "x"), g=decays, g_name="dt", beta=steps, beta_name="dt", skip=skips
    )


METHOD = Method(
    name="state_space_duality",
    family="linear",
    title="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
    year=2024,
    arxiv="2405.21060",
    function=state_space_duality,
    reference=reference.state_space_duality,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Chunks of any size and steps give the rows of the recurrence.",
        "It is linear attention with a decay per row of `c`, `b` and `dt x`.",
        "A rate of 0 and steps of 1 give linear attention without a divisor.",
    ),
    tests="tests/linear/test_state_space_duality.py",
    cost="`2 * H * L * N * P` multiply-adds of states, and of rows of a chunk `C` with "
    "each other `H * L * C * (N + P) / 2`; memory beyond inputs and outputs does not depend on `L`.",
)
