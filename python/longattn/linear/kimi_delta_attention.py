"""Kimi delta attention: the delta rule with a decay per channel of the keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn import _core
from longattn._arrays import FLOATS, Array, as_numpy, like
from longattn._checks import batched, check_floating, finite, flag, result_array
from longattn.linear._anywhere import recurrence_anywhere
from longattn.linear._documented import DELTA_COST, documented
from longattn.linear._recurrence import CHUNK, Common, present
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def kimi_delta_attention(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    *,
    scale: float | None = None,
    normalize_qk: bool = True,
    initial_state: Array | None = None,
    out_state: Array | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """KDA, `S_t = S' + beta_t k_t (v_t - S'^T k_t)^T` with `S' = Diag(e^g_t) S_(t-1)`, `o_t = scale * q_t^T S_t`.

    The state decays first; what is new is measured against the decayed state.

    Args:
        q: {queries}
        k: {keys}
        v: {values}
        g: natural logarithms of the decays, at most 0 (`-inf` forgets), floating `[B, H, L, D]`.
        beta: {beta}
        scale: {scale}
        normalize_qk: {normalize_qk}
        initial_state: {initial_state}
        out_state: {out_state}
        chunk_size: {chunk_size}
        cu_seqlens: {cu_seqlens}
        out: array for the output.

    Returns:
        {states}

    {gpu_delta}

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, a log decay above 0 or NaN, {bad_beta}

    Cost:
        {delta_cost}

    References:
        Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture", 2025, arXiv:2510.26692.
    """
    present(g=g, beta=beta)
    common = Common(scale, initial_state, out_state, chunk_size, cu_seqlens, out)
    unit = 1e-6 if flag(normalize_qk, "normalize_qk") else None
    return recurrence_anywhere(q, k, v, common, g=g, channels=True, beta=beta, delta=True, unit=unit)


def kimi_delta_gates(
    f: Array,
    a_log: Array,
    dt_bias: Array | None = None,
    *,
    lower_bound: float | None = None,
    out: Array | None = None,
) -> Array:
    """Log decays of KDA, `g = -e^a_log * softplus(f + dt_bias)`, or `lower_bound * sigmoid(e^a_log * (f + dt_bias))`.

    Args:
        f: what a token's gates are, `[B, H, L, D]` or `[H, L, D]`, floating: in the paper a projection of low rank.
        a_log: logarithms of the heads' rates, floating `[H]`.
        dt_bias: added to `f`, floating `[H, D]`; `None` is 0.
        lower_bound: what a log decay is at least, at most 0; `None` is no bound, and the first formula.
        out: float32 array of the shape of `f` for the result.

    Returns:
        `g`, float32, in the shape and kind of `f`: at most 0, as `kimi_delta_attention` takes it.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        One exponential per number.
    """
    fn = as_numpy(f, "f")
    check_floating(fn, "f")
    if fn.ndim not in (3, 4):
        raise ValueError(f"f: got shape {fn.shape}, expected rank 3 or 4")
    fn = fn if fn.dtype in FLOATS else fn.astype(np.float32)
    heads, dim = fn.shape[-3], fn.shape[-1]
    rates = as_numpy(a_log, "a_log", any_strides=True)
    check_floating(rates, "a_log")
    if rates.shape != (heads,):
        raise ValueError(f"a_log: got shape {rates.shape}, expected ({heads},)")
    with np.errstate(over="ignore"):
        rates = np.exp(rates.astype(np.float32))
    if not np.isfinite(rates).all():
        raise ValueError("a_log: got numbers whose exponential is not finite, expected smaller ones")
    bias = np.zeros(0, np.float32)
    if dt_bias is not None:
        given = as_numpy(dt_bias, "dt_bias", any_strides=True)
        check_floating(given, "dt_bias")
        if given.shape != (heads, dim):
            raise ValueError(f"dt_bias: got shape {given.shape}, expected {(heads, dim)}")
        bias = np.ascontiguousarray(given, np.float32).ravel()
    bound = None if lower_bound is None else finite(lower_bound, "lower_bound")
    if bound is not None and bound > 0:
        raise ValueError(f"lower_bound: got {lower_bound}, expected at most 0")
    result = result_array(out, f, fn.shape, np.dtype(np.float32), {"f": fn})
    _core.decay_gates(batched(fn, 4), rates, bias, bound, batched(result, 4))
    returned: Any = like(f, result) if out is None else out
    return returned


METHOD = Method(
    name="kimi_delta_attention",
    family="linear",
    title="Kimi Linear: An Expressive, Efficient Attention Architecture",
    year=2025,
    arxiv="2510.26692",
    function=kimi_delta_attention,
    reference=reference.kimi_delta_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Chunks of any size and steps give the rows of the recurrence.",
        "Gates that are the same in all channels give the gated delta rule, gates of 0 the delta rule.",
        "Orthonormal keys with a beta of 1 and no decay are recalled exactly.",
        "A beta of 0 is pure decay of the initial state.",
    ),
    tests="tests/linear/test_kimi_delta_attention.py",
    cost=DELTA_COST,
)
