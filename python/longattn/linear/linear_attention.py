"""Linear attention: sums of keys and values instead of a softmax."""

from __future__ import annotations

from longattn._arrays import Array
from longattn._checks import finite, flag
from longattn.linear._anywhere import recurrence_anywhere
from longattn.linear._documented import COST, documented
from longattn.linear._recurrence import CHUNK, Common
from longattn.linear.feature_map import FeatureMap
from longattn.linear.feature_map import feature_map as named
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    feature_map: str | FeatureMap | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: Array | None = None,
    out_state: Array | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Causal linear attention, `o_t = scale * q_t^T S_t / (scale * q_t^T z_t + eps)`.

    `S_t` is the sum of `k_j v_j^T`, `z_t` that of `k_j`, over rows up to `t`, `k` and `q` being features: mapped by
    `feature_map` as they are read (`elu(x) + 1`, "elu1", in the paper), or before. Without `normalize` there is no
    divisor. This is the causal form of the methods that differ in their map alone.

    Args:
        q: {queries}
        k: keys `[B, Hk, L, D]`, or `[Hk, L, D]`; any of the three dtypes.
        v: values `[B, H, L, Dv]`, or `[H, L, Dv]`, `H` a multiple of `Hk`; any of the three dtypes. There is a state
            per head of `v`. `Hq` is a multiple of `H`, whose states are read by groups of query heads, or divides it.
        feature_map: name of a map or a `FeatureMap`, whose features `D` counts in states; `None`: `q` and `k` come
            mapped. Exponents of "gaussian" are less their largest for queries, and for keys taken as they are.
        normalize: divide outputs by the sum of their weights. A row whose divisor is 0 gives 0.
        eps: added to the divisor.
        scale: factor on products of queries and keys.
        initial_state: states before the first row, floating `[N, H, D, Dv]`, with
            `normalize` `[N, H, D, Dv + 1]`, the last column being `z`; `None` is zeros.
        out_state: {out_state}
        chunk_size: {chunk_size}
        cu_seqlens: {cu_seqlens}
        out: array for the output.

    Returns:
        `(output, states)`: the output in the kind and dtype of `q`, and float32 `[N, H, D, Dv]`
        (or one column more, `z`), the states
        after the last rows. A call of one row with `initial_state` is the decode step: one pass over the state.
        Arithmetic is float32, the same bits for any number of threads. A row that holds NaN or an infinity spoils rows
        after it and none before.

    Arrays of a GPU go to `longattn.gpu.chunked_recurrence`, one head of queries per head of keys; `feature_map`,
    `normalize`, `out_state`, `cu_seqlens`, `chunk_size` and `out` are not offered there.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit.

    Cost:
        {cost}

    References:
        A. Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention", 2020,
        arXiv:2006.16236.
    """
    common = Common(scale, initial_state, out_state, chunk_size, cu_seqlens, out)
    maps = (None, None) if feature_map is None else (named(feature_map, "feature_map"),) * 2
    divided = finite(eps, "eps", 0) if flag(normalize, "normalize") else None
    return recurrence_anywhere(q, k, v, common, maps=maps, normaliser=divided)


METHOD = Method(
    name="linear_attention",
    family="linear",
    title="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
    year=2020,
    arxiv="2006.16236",
    function=linear_attention,
    reference=reference.linear_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Chunks of any size and steps give the rows of the recurrence.",
        "It is the lower triangle of `q k^T`, divided by its row sums, times the values.",
        "The final state of a part is the initial state of the rest.",
        "A map gives what queries and keys that come mapped give.",
    ),
    tests="tests/linear/test_linear_attention.py",
    cost=COST,
)
