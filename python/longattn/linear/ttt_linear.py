"""TTT-Linear: a linear model with a layer norm that is trained on every token."""

from __future__ import annotations

from longattn._arrays import Array, as_numpy
from longattn._checks import check_floating
from longattn.linear._documented import documented
from longattn.linear._fast_weight import CHUNK, MemoryState, fast_weight
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def ttt_linear(
    q: Array,
    k: Array,
    v: Array,
    eta: Array | float,
    gain: Array,
    shift: Array,
    *,
    weights: Array | None = None,
    eps: float = 1e-6,
    scale: float = 1.0,
    chunk_size: int = CHUNK,
    initial_state: MemoryState | None = None,
    out_state: MemoryState | None = None,
    out: Array | None = None,
) -> tuple[Array, MemoryState]:
    """TTT-Linear, `o_t = f(q_t; W_t)` with `f(x) = x + norm(x W + b)`, trained on `|f(k_t) - v_t|^2 / 2`.

    `W_t = W_(t-1) - eta_t * gradient_t`, and `b` likewise. Gradients of the tokens of a mini-batch are taken at the
    weights with which it began: its size is part of the definition. Mini-batches are counted from the first row of all,
    over all calls. The norm's factors and summands stay as they are.

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16. `Hq` is a multiple of `H`.
        k: keys `[B, H, L, D]`; any of the three dtypes.
        v: values `[B, H, L, D]`; any of the three dtypes.
        eta: rates, at least 0, floating `[B, H, L]` or one number.
        gain: factors of the norm, floating `[H, D]` or `[D]`.
        shift: summands of the norm, likewise.
        weights: `W` and, as its last row, `b` before the first row, floating `[D + 1, D]`, with `[H]` or `[B, H]` in
            front or the same for all; `None` is zeros.
        eps: added to variances.
        scale: factor of queries.
        chunk_size: rows of a mini-batch.
        initial_state: what an earlier call with the same options returned, in place of `weights`.
        out_state: {memory}
        out: array for the output.

    Returns:
        `(output, state)`: the output in the kind and dtype of `q`, and the memory after the last row, with which a
        later call goes on at any row. Arithmetic is float32, the same bits for any number of threads. A row that holds
        NaN or an infinity spoils rows after it and none before.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        About `3 * H * L * D^2` multiply-adds of weights, and of the rows of a tile `C <= 48` with each other `2 * H * L
        * C * D`.

    References:
        Y. Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", 2024, arXiv:2407.04620.
    """
    first = None
    if weights is not None:
        first = [as_numpy(weights, "weights", any_strides=True)]
        check_floating(first[0], "weights")
    return fast_weight(
        q,
        k,
        v,
        eta,
        rate_name="eta",
        weights=first,
        initial_state=initial_state,
        out_state=out_state,
        bias=True,
        residual=(gain, shift, eps),
        chunk_size=chunk_size,
        scale=scale,
        out=out,
    )


METHOD = Method(
    name="ttt_linear",
    family="recurrent",
    title="Learning to (Learn at Test Time): RNNs with Expressive Hidden States",
    year=2024,
    arxiv="2407.04620",
    function=ttt_linear,
    reference=reference.ttt_linear,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "It is the loop over tokens, with gradients at the weights of the mini-batch's start.",
        "A rate of 0 reads the first weights.",
        "Gradients are those of the loss by differences.",
        "Cut at any row, the parts give the whole.",
    ),
    tests="tests/linear/test_ttt_linear.py",
    cost="About `3 * H * L * D^2` multiply-adds of weights, and of the rows of a tile `C <= 48` with each other "
    "`2 * H * L * C * D`.",
)
