"""Retention: linear attention whose heads forget at fixed rates."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import check_floating, shape_of
from longattn.linear._anywhere import recurrence_anywhere
from longattn.linear._documented import COST, documented
from longattn.linear._recurrence import CHUNK, Common
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def retention(
    q: Array,
    k: Array,
    v: Array,
    gamma: Array | None = None,
    *,
    scale: float | None = None,
    initial_state: Array | None = None,
    out_state: Array | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Retention of RetNet, `S_t = gamma S_(t-1) + k_t v_t^T`, `o_t = scale * q_t^T S_t`.

    The rotation of queries and keys comes before it, norm and gate after it.

    Args:
        q: {queries}
        k: {keys}
        v: {values}
        gamma: decays from 0 to 1, floating `[H]`; `None` is the paper's `1 - 2^(-5 - h)` of head `h`.
        scale: {scale}
        initial_state: {initial_state}
        out_state: {out_state}
        chunk_size: {chunk_size}
        cu_seqlens: {cu_seqlens}
        out: array for the output.

    Returns:
        {states}

    {gpu}

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit, or decays outside 0 to 1.

    Cost:
        {cost}

    References:
        Y. Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models", 2023,
        arXiv:2307.08621.
    """
    common = Common(scale, initial_state, out_state, chunk_size, cu_seqlens, out)
    return recurrence_anywhere(q, k, v, common, of_heads=("gamma", gamma, _log_decays))


def _log_decays(gamma: Array | None, v: Array) -> NDArray[Any]:
    """Logarithms of the decays of every head, one for all rows."""
    shape = shape_of(v, "v")
    heads = shape[-3] if len(shape) > 2 else 0
    if gamma is None:
        published: NDArray[np.float64] = np.log1p(-(2.0 ** (-5.0 - np.arange(heads))))
        return published
    x = as_numpy(gamma, "gamma", any_strides=True)
    check_floating(x, "gamma")
    if x.shape != (heads,):
        raise ValueError(f"gamma: got shape {x.shape}, expected {(heads,)}, one per head of v")
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError("gamma: got a number outside 0 to 1, expected decays")
    with np.errstate(divide="ignore"):
        found: NDArray[np.float64] = np.log(x.astype(np.float64))
    return found


METHOD = Method(
    name="retention",
    family="linear",
    title="Retentive Network: A Successor to Transformer for Large Language Models",
    year=2023,
    arxiv="2307.08621",
    function=retention,
    reference=reference.retention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Chunks of any size and steps give the rows of the recurrence.",
        "It is `(q k^T * gamma^(i - j)) v`, lower triangle.",
        "It is lightning attention with slopes `-log(gamma)`.",
    ),
    tests="tests/linear/test_retention.py",
    cost=COST,
)
