"""Causal linear attention with random features of the softmax kernel."""

from __future__ import annotations

from longattn._arrays import Array, as_numpy
from longattn._checks import finite, one_of, scale_factor
from longattn.linear._documented import documented
from longattn.linear._recurrence import CHUNK, Common, recurrence
from longattn.linear.feature_map import FeatureMap
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def causal_performer_attention(
    q: Array,
    k: Array,
    v: Array,
    projection: Array,
    *,
    kernel: str = "softmax",
    scale: float | None = None,
    eps: float = 0.0,
    shift: float = 0.0,
    initial_state: Array | None = None,
    out_state: Array | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """The causal form of `performer_attention`: a running state of random features instead of sums over all keys.

    With `kernel="softmax"`, `phi(x) = e^(W x - |x|^2 / 2)` of `x = sqrt(scale) q` or `sqrt(scale) k`; with "relu",
    `phi(x) = relu(W x) + 1e-3`. Exponents of a query are taken less their largest. Those of keys are at most `|w|^2 /
    2` of a direction `w`, which float32 holds for about `D <= 128` even in the worst case; a `shift` is taken from all
    of them, which cancels where `eps` is 0 and must be the same in every call that shares a state.

    Args:
        q: {queries}
        k: {keys}
        v: {values}
        projection: `W`, floating `[F, D]`, shared by the heads; `random_directions` draws it.
        kernel: "softmax" or "relu".
        scale: factor on the products, above 0; `None` is `D ** -0.5`.
        eps: added to the denominator. A row whose denominator is 0 gives 0.
        shift: taken from the exponents of keys.
        initial_state: states before the first row, floating `[N, H, F, Dv + 1]`, the last column being sums of
            features; `None` is zeros.
        out_state: {out_state}
        chunk_size: {chunk_size}
        cu_seqlens: {cu_seqlens}
        out: array for the output.

    Returns:
        `(output, states)`: the output in the kind and dtype of `q`, and float32 `[N, H, F, Dv + 1]`, the states after
        the last rows. A call of one row with `initial_state` is the decode step.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        `Hq * L * F * (D + 2 * Dv)` multiply-adds of features and states, and of rows of a chunk `C` with each other
        `Hq * L * C * (F + Dv) / 2`; memory beyond inputs and outputs does not depend on `L`.

    References:
        K. Choromanski et al., "Rethinking Attention with Performers", 2020, arXiv:2009.14794.
    """
    dim = max((as_numpy(q, "q").shape or (1,))[-1], 1)
    factor = scale_factor(scale, dim)
    if factor <= 0:
        raise ValueError(f"scale: got {scale}, expected above 0")
    one_of(kernel, "kernel", ("softmax", "relu"))
    w = as_numpy(projection, "projection")
    if w.ndim != 2:
        raise ValueError(f"projection: got shape {w.shape}, expected [F, {dim}]")
    kind, added = ("gaussian", -finite(shift, "shift")) if kernel == "softmax" else ("relu", 1e-3)
    maps = (
        FeatureMap(kind=kind, scale=factor**0.5, projection=w, offset=0.0 if kernel == "softmax" else added),
        FeatureMap(kind=kind, scale=factor**0.5, projection=w, offset=added),
    )
    common = Common(1.0, initial_state, out_state, chunk_size, cu_seqlens, out)
    return recurrence(q, k, v, common, maps=maps, normaliser=finite(eps, "eps", 0))


METHOD = Method(
    name="causal_performer_attention",
    family="linear",
    title="Rethinking Attention with Performers",
    year=2020,
    arxiv="2009.14794",
    function=causal_performer_attention,
    reference=reference.causal_performer_attention,
    exact=False,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Chunks of any size and steps give the rows of the recurrence.",
        "Its last row is that of `performer_attention` over all keys.",
        "A shift of the exponents of keys changes no output.",
        "Equal values return that value.",
    ),
    tests="tests/linear/test_causal_performer_attention.py",
    cost="`Hq * L * F * (D + 2 * Dv)` multiply-adds of features and states, and of rows of a chunk `C` with each "
    "other `Hq * L * C * (F + Dv) / 2`; memory beyond inputs and outputs does not depend on `L`.",
)
