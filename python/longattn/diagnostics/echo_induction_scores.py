"""Heads that look back at earlier occurrences of a token: what razor attention calls retrieval heads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy
from longattn._checks import check_floating, integer, real, scale_factor, shape_of
from longattn.dense._query_key import query_key_inputs
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.reference import diagnostics as reference


def echo_induction_scores(
    q: Array, k: Array, period: int, *, scale: float | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How much weight a head gives to earlier occurrences of a token, and to what came after them.

    The text is a sequence of `period` random tokens, repeated (2,500 tokens four times, in the paper's code). Of a
    position after the first repeat, the echo score is its causal weight on the positions a whole number of periods
    back, which hold the same token, the induction score that on the positions right after those. Both are averaged
    over positions.

    Args:
        q: queries `[Hq, L, D]` of the whole text; float32, float16 or bfloat16.
        k: keys `[Hkv, L, D]`, likewise.
        period: tokens before they repeat, less than `L`.
        scale: factor of the dot products; `None` is `D ** -0.5`.

    Returns:
        Echo and induction scores, float64 `[Hq]` each, in 0 to 1.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        That of attention, for the rows' log-sum-exp; then `2 * Hq * L * D` multiply-adds for each repeat.

    References:
        H. Tang et al., "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads", 2024,
        arXiv:2407.15891.
    """
    qn, kn = query_key_inputs(q, k)
    if qn.ndim != 3 or qn.shape[1] != kn.shape[1]:
        raise ValueError(f"q: got shape {qn.shape} with k of {kn.shape}, expected [Hq, L, D] and [Hkv, L, D]")
    heads, length, dim = qn.shape
    period = integer(period, "period", 1, length - 1)
    factor = scale_factor(scale, dim)
    keys = as_numpy(kn, "k")
    # One column of values: only the log-sum-exp is wanted.
    _, lse = attention(qn, keys, keys[..., :1], causal=True, scale=factor, return_lse=True)
    wide_q, wide_k = qn.astype(np.float32), np.repeat(keys.astype(np.float32), heads // len(keys), axis=0)
    scores = []
    for after in (0, 1):
        mass = np.zeros((heads, length))
        for back in range(period, length, period):
            distance = back - after
            if distance < 1:
                continue
            first = distance if after == 0 else back  # only rows whose token came before
            s = np.einsum("hld,hld->hl", wide_q[:, first:], wide_k[:, first - distance : length - distance])
            mass[:, first:] += np.exp(factor * s - lse[:, first:], dtype=np.float64)
        scores.append(mass[:, period:].mean(axis=1))
    return scores[0], scores[1]


def razor_heads(
    echo: Array, induction: Array, kv_heads: int, *, echo_share: float = 0.01, induction_share: float = 0.14
) -> NDArray[np.bool_]:
    """The KV heads that keep everything: those with a query head of high echo or induction score.

    The shares are the paper's as far as is known.

    Args:
        echo: floating `[..., Hq]`, of one layer or of all (`[layers, Hq]`): shares are of all heads given.
        induction: floating, likewise.
        kv_heads: KV heads of a layer.
        echo_share: share of the query heads that count by their echo score, rounded up.
        induction_share: share of the query heads that count by their induction score, rounded up.

    Returns:
        bool `[..., kv_heads]`, True where one of the group's query heads counts.

    Raises:
        TypeError: an argument of another kind.
        ValueError: shapes that do not fit, or shares outside 0 to 1.
    """
    x, y = as_numpy(echo, "echo"), as_numpy(induction, "induction")
    for scores, name in ((x, "echo"), (y, "induction")):
        check_floating(scores, name)
        if scores.ndim == 0 or scores.shape != x.shape:
            raise ValueError(f"{name}: got shape {scores.shape}, expected [..., Hq], the same for both")
    kv_heads = integer(kv_heads, "kv_heads", 1)
    if x.shape[-1] == 0 or x.shape[-1] % kv_heads:
        raise ValueError(f"echo: got {x.shape[-1]} heads, expected a positive multiple of {kv_heads}")
    counts = np.zeros(x.size, bool)
    for scores, share, name in ((x, echo_share, "echo_share"), (y, induction_share, "induction_share")):
        if not 0 <= real(share, name) <= 1:
            raise ValueError(f"{name}: got {share}, expected 0 to 1")
        best = np.argsort(-scores.astype(np.float64), axis=None, kind="stable")
        counts[best[: math.ceil(share * x.size - 1e-9)]] = True
    return np.asarray(counts.reshape(*x.shape[:-1], kv_heads, -1).any(axis=-1), bool)


def alibi_scope(
    wq: Array, wk: Array, gamma: Array, beta: Array, slopes: Array, *, eps: float = 1e-3
) -> NDArray[np.float64]:
    """How far back a head with an ALiBi slope can look at all: beyond it weights are below `eps`.

    `(2 |Wq Wk^T|_2 (|gamma|^2 + |beta|^2) - ln eps) / slope`, with the layer norm's weight and bias before the
    projections. Heads whose scope is below the window need no full cache. The constants are as far as the paper is
    known; weights here are taken with the scale of the logits already in `wq`.

    Args:
        wq: query weights of each head, floating `[H, E, D]`.
        wk: key weights, likewise.
        gamma: layer norm weight, floating `[E]`.
        beta: layer norm bias, floating `[E]`.
        slopes: ALiBi slopes, floating `[H]`, positive.
        eps: weight that counts as none.

    Returns:
        Scopes in tokens, float64 `[H]`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: shapes or values that do not fit.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for name, x in (("wq", wq), ("wk", wk), ("gamma", gamma), ("beta", beta), ("slopes", slopes)):
        arrays[name] = as_numpy(x, name)
        check_floating(arrays[name], name)
    heads, width, _ = shape = shape_of(wq, "wq") if arrays["wq"].ndim == 3 else (0, 0, 0)
    expected = {"wq": shape, "wk": shape, "gamma": (width,), "beta": (width,), "slopes": (heads,)}
    for name, array in arrays.items():
        if array.shape != expected[name] or heads == 0:
            raise ValueError(f"{name}: got shape {array.shape}, expected [H, E, D], [E] or [H] alike")
    if not 0 < real(eps, "eps") < 1:
        raise ValueError(f"eps: got {eps}, expected a number between 0 and 1")
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    if not (wide["slopes"] > 0).all():
        raise ValueError("slopes: got some that are not positive, expected positive ones")
    for name, array in wide.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: got NaN or infinity, expected finite numbers")
    # The largest singular value of Wq Wk^T is that of the small product of their triangular factors.
    r_q, r_k = (np.linalg.qr(wide[name]).R for name in ("wq", "wk"))
    norm = np.linalg.norm(r_q @ r_k.swapaxes(-1, -2), ord=2, axis=(-2, -1))
    size = wide["gamma"] @ wide["gamma"] + wide["beta"] @ wide["beta"]
    scopes: NDArray[np.float64] = (2 * norm * size - math.log(eps)) / wide["slopes"]
    return scopes


METHOD = Method(
    name="echo_induction_scores",
    family="diagnostics",
    title="RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
    year=2024,
    arxiv="2407.15891",
    function=echo_induction_scores,
    reference=reference.echo_induction_scores,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    step=False,
    checks=(
        "Scores are sums of explicit weights.",
        "A head that copies what came after the last occurrence has induction score 1 and echo score 0.",
    ),
    tests="tests/diagnostics/test_echo_induction_scores.py",
    cost="That of attention, and `2 * Hq * L * D` multiply-adds for each repeat.",
)
