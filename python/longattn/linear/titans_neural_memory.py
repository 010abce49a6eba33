"""The neural memory of Titans: a network that learns at test time, with momentum and forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longattn._arrays import Array, as_numpy
from longattn._checks import finite, one_of
from longattn.linear._chunk_steps import chunk_steps
from longattn.linear._documented import documented
from longattn.linear._fast_weight import CHUNK, MemoryState, fast_weight, gate
from longattn.methods import Method
from longattn.reference import linear as reference


@documented
def titans_neural_memory(
    q: Array,
    k: Array,
    v: Array,
    theta: Array | float,
    *,
    weights: Sequence[Array] | None = None,
    alpha: Array | float | None = None,
    eta: Array | float | None = None,
    activation: str = "silu",
    loss_scale: float = 0.5,
    read: str = "after",
    update: str = "per_token",
    normalize_qk: bool = True,
    scale: float = 1.0,
    chunk_size: int = CHUNK,
    initial_state: MemoryState | None = None,
    out_state: MemoryState | None = None,
    out: Array | None = None,
) -> tuple[Array, MemoryState]:
    """A memory `M` that each token teaches its key and value, `loss = loss_scale * |M(k_t) - v_t|^2`.

    `S_t = eta_t S_(t-1) - theta_t u_t`, `W_t = (1 - alpha_t) W_(t-1) + S_t`, `y_t = M(q_t)` with the weights `W_t`. The
    gradients `u_t` of all tokens of a chunk are taken at the weights with which it began: the chunk's size is part of
    the definition. Chunks are counted from the first row of all, over all calls. `M(x) = x W` of one matrix, or
    `act(x W_1) W_2` and so on; matrices are `[inputs, outputs]`.

    With `update="per_chunk"` (a public re-implementation) a chunk takes one step along the sum of its gradients,
    `S = eta S - sum_t theta_t u_t`, `W = (1 - alpha) W + S`, with `alpha` and `eta` of its last row, and its queries
    read the weights with which it began.

    The paper has gates of every token, from its hidden state by the caller: `theta` a sigmoid times a largest rate,
    `alpha` and `eta` sigmoids. Its compositions with attention (memory as context, as gate, as layer) are calls of this
    and of `longattn.attention`: `titans_memory_as_context`, `titans_memory_as_gate` and `titans_memory_as_layer`.
    UNSURE: the activation, which the paper leaves open for the memory.

    Args:
        q: queries `[B, Hq, L, D]`, or `[Hq, L, D]`; float32, float16 or bfloat16. `Hq` is a multiple of `H`, whose
            memories are read by groups of query heads.
        k: keys `[B, H, L, D]`; any of the three dtypes.
        v: values `[B, H, L, Dv]`; any of the three dtypes.
        theta: rates, at least 0, floating `[B, H, L]` or one number.
        weights: matrices before the first row, floating `[D, hidden]`, .., `[hidden, Dv]`, each with `[H]` or `[B, H]`
            in front or the same for all; `None` is one `[D, Dv]` of zeros.
        alpha: what is forgotten, 0 to 1, floating `[B, H, L]` or one number; `None` is 0.
        eta: momentum, 0 to 1, floating `[B, H, L]` or one number; `None` is 0.
        activation: "silu" or "gelu".
        loss_scale: factor of the loss.
        read: "after" the row's own step, or "before" it; without a meaning in "per_chunk".
        update: "per_token", or "per_chunk". The weights of a state within a chunk of the latter hold the steps of its
            gradients so far, and become those that are read when it is full.
        normalize_qk: divide rows of `q` and `k` by `sqrt(sum of squares + 1e-6)` first.
        scale: factor of queries.
        chunk_size: rows whose gradients are taken at the same weights.
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
        About `5 * H * L * P` multiply-adds for `P` numbers of weights, more by `2 * P` with momentum, and of the rows
        of a tile `C <= 48` with each other `H * L * C` times the widths of the layers. A state is `3 * P` numbers per
        head.

    References:
        A. Behrouz, P. Zhong and V. Mirrokni, "Titans: Learning to Memorize at Test Time", 2024, arXiv:2501.00663.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 100, 16), dtype=np.float32)
        >>> y, memory = la.linear.titans_neural_memory(q, k, v, 0.1, alpha=0.01, eta=0.9)
        >>> y.shape, memory.position
        ((2, 100, 16), 4)
    """
    keys = as_numpy(k, "k")
    one_of(read, "read", ("after", "before"))
    one_of(activation, "activation", ("silu", "gelu"))
    one_of(update, "update", ("per_token", "per_chunk"))
    shared: dict[str, Any] = {
        "rate_name": "theta",
        "activation": activation,
        "loss": ("square", finite(loss_scale, "loss_scale"), 0.0),
        "chunk_size": chunk_size,
        "normalize_qk": normalize_qk,
        "scale": scale,
    }
    if update == "per_chunk":
        return chunk_steps(
            q, k, v, theta, alpha=alpha, eta=eta, weights=weights, initial_state=initial_state, out_state=out_state,
            out=out, **shared,
        )  # fmt: skip
    keep = None if alpha is None or keys.ndim not in (3, 4) else 1 - gate(alpha, "alpha", keys, high=1.0)
    return fast_weight(
        q,
        k,
        v,
        theta,
        weights=weights,
        initial_state=initial_state,
        out_state=out_state,
        keep=keep,
        momentum=eta,
        before=read == "before",
        out=out,
        **shared,
    )


METHOD = Method(
    name="titans_neural_memory",
    family="recurrent",
    title="Titans: Learning to Memorize at Test Time",
    year=2024,
    arxiv="2501.00663",
    function=titans_neural_memory,
    reference=reference.titans_neural_memory,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "It is the loop over tokens, with gradients at the weights of the chunk's start.",
        "A linear memory without momentum, a token per chunk, is Kimi delta attention.",
        "A rate of 0 without forgetting reads the first weights.",
        "Cut at any row, the parts give the whole.",
        "A step per chunk of one row is a step per token that queries read before it.",
    ),
    tests="tests/linear/test_titans_neural_memory.py",
    cost="About `5 * H * L * P` multiply-adds for `P` numbers of weights, more by `2 * P` with momentum, and of the "
    "rows of a tile `C <= 48` with each other `H * L * C` times the widths of the layers. A state is `3 * P` numbers "
    "per head.",
)
