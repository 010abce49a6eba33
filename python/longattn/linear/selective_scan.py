"""The selective scan of Mamba: a state of a few numbers per channel, whose decay depends on the token."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, like
from longattn._checks import all_within, flag, result_array
from longattn.linear._channels import bounds_of, optional, parameter, state_of, storage_rows
from longattn.methods import Method
from longattn.reference import linear as reference


def selective_scan(
    x: Array,
    dt: Array,
    a: Array,
    b: Array,
    c: Array,
    *,
    skip: Array | None = None,
    dt_bias: Array | None = None,
    softplus: bool = False,
    z: Array | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
    out_state: NDArray[np.float32] | None = None,
) -> tuple[Array, NDArray[np.float32]]:
    """Scan of diagonal states whose step size, input weights and output weights depend on the token.

    For channel `e` and state `n`, token after token:

        h[e, n] = exp(dt[e] * a[e, n]) * h[e, n] + dt[e] * b[n] * x[e]
        y[e] = (sum_n c[n] * h[e, n] + skip[e] * x[e]) * silu(z[e])

    The gate is left out without `z`. A call with one token and the state before it is the decode step.

    Args:
        x: inputs `[B, L, E]`; float32, float16 or bfloat16.
        dt: step sizes `[B, L, E]`, finite and at least 0 (after `dt_bias`); with `softplus` of any sign.
        a: rates `[E, N]`, finite and at most 0; floating.
        b: input weights `[B, L, N]`; any of the three dtypes.
        c: output weights `[B, L, N]`.
        skip: floating `[E]`; `None` is zeros.
        dt_bias: added to `dt`, floating `[E]`; `None` is zeros.
        softplus: step sizes are `ln(1 + exp(dt + dt_bias))`.
        z: gate `[B, L, E]`; any of the three dtypes.
        initial_state: states before the first token, floating `[B, E, N]`; `None` is zeros.
        cu_seqlens: bounds `[S + 1]` of sequences that a batch of 1 holds one after another; states are then
            `[S, E, N]`.
        out: memory for the result.
        out_state: memory for the state, float32 `[B, E, N]`; may be the array given as `initial_state`.

    Returns:
        `[B, L, E]` in the kind and dtype of `x`, and the states after the last token, float32 `[B, E, N]`.
        Arithmetic is float32.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, a rate above 0 or not finite, a step size that is negative, NaN or
            infinite.

    Cost:
        `B * L * E * N` exponentials and three multiply-adds each; memory is the state's.

    References:
        A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv:2312.00752.

    Example:
        >>> import numpy as np, longattn.linear
        >>> rng = np.random.default_rng(0)
        >>> x, dt = rng.standard_normal((2, 1, 50, 8), dtype=np.float32)
        >>> b, c = rng.standard_normal((2, 1, 50, 4), dtype=np.float32)
        >>> a = -np.exp(rng.standard_normal((8, 4)))
        >>> y, state = longattn.linear.selective_scan(x, dt, a, b, c, softplus=True)
        >>> y.shape, state.shape
        ((1, 50, 8), (1, 8, 4))
    """
    xn = storage_rows(x, "x", (None, None, None), "[B, L, E]")
    batch, length, channels = xn.shape
    dtn = storage_rows(dt, "dt", xn.shape, "[B, L, E]")
    an = parameter(a, "a", (channels, None), "[E, N]")
    states = an.shape[1]
    if not all_within(an, float(np.finfo(np.float32).min), 0):
        raise ValueError("a: got a rate that is above 0 or not finite, expected finite rates of at most 0")
    bn = storage_rows(b, "b", (batch, length, states), "[B, L, N]")
    cn = storage_rows(c, "c", (batch, length, states), "[B, L, N]")
    zn = None if z is None else storage_rows(z, "z", xn.shape, "[B, L, E]")
    skips, biases = optional(skip, "skip", (channels,), "[E]"), optional(dt_bias, "dt_bias", (channels,), "[E]")
    through = flag(softplus, "softplus")
    bounds = bounds_of(cu_seqlens, batch, length)
    sequences = batch if bounds is None else len(bounds) - 1
    result = result_array(out, x, xn.shape, xn.dtype, {"x": xn, "dt": dtn, "b": bn, "c": cn, "z": zn})
    state = state_of(initial_state, out_state, (sequences, channels, states), "[B, E, N]")
    _core.selective_scan(
        xn, dtn, an, bn, cn, state, result, skip=skips, dt_bias=biases, softplus=through, z=zn, cu_seqlens=bounds
    )
    returned: Any = like(x, result) if out is None else out
    return returned, state


METHOD = Method(
    name="selective_scan",
    family="recurrent",
    title="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    year=2023,
    arxiv="2312.00752",
    function=selective_scan,
    reference=reference.selective_scan,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=False,
    checks=(
        "It is the unrolled sum over earlier tokens.",
        "Rates and step sizes that all states share give attention with a scalar decay.",
        "Rates of 0 and steps of 1 give causal linear attention without a normaliser.",
        "Steps of 0 give the skipped inputs.",
        "Any split of a sequence, down to single tokens, gives the same as the whole.",
    ),
    tests="tests/linear/test_selective_scan.py",
    cost="`B * L * E * N` exponentials and three multiply-adds each.",
)
