"""Selective attention: tokens say which earlier tokens later ones may ignore."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy, like
from longattn._checks import (
    attention_inputs,
    batched,
    check_floating,
    check_heads,
    flag,
    integer,
    returned,
    scale_factor,
    softcap_value,
)
from longattn.methods import Method
from longattn.reference import dense as reference


def selective_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    selector_head: int = 0,
    protect_first: int = 1,
    scale: float | None = None,
    softcap: float = 0.0,
    state: Array | None = None,
    return_state: bool = False,
    return_lse: bool = False,
) -> Any:
    """Causal attention that subtracts from every logit what earlier rows selected of its key.

    With the logits `A` of head `selector_head`, row `r` selects `S_rj = max(A_rj, 0)` of every key `j` before its
    own, the first `protect_first` excepted. Every head of row `i` attends by `softmax_j(A_h,ij - F_ij)`, where
    `F_ij = sum_{r < i} S_rj`: a selection acts from the next row on, and never wears off.

    Args:
        q: queries `[B, Hq, Lq, D]`, or `[Hq, Lq, D]`; float32, float16 or bfloat16. They are those of the last
            `Lq` keys.
        k: keys `[B, Hkv, Lk, D]`, or `[Hkv, Lk, D]`, `Lk >= Lq`; any of the three dtypes, or the `keys` of a
            `KVStore` of codes.
        v: values `[B, Hkv, Lk, Dv]`, or `[Hkv, Lk, Dv]`; dtype of `k`.
        selector_head: the query head whose logits select, for all heads.
        protect_first: so many first keys are never selected (the first token is every row's way out).
        scale: factor on the dot products; `None` is `D ** -0.5`.
        softcap: `c > 0` turns each scaled logit `s` into `c * tanh(s / c)`, before selection; 0 is off.
        state: floating `[B, Lk - Lq]` (or `[Lk - Lq]`): `F` of the keys before the first query, as the call that
            ended there returned it; after an eviction, the kept entries of it. `None` only without such keys.
        return_state: also return `F` after the last row, `[B, Lk]` (or `[Lk]`), float32.
        return_lse: also return the log-sum-exp of the lowered logits.

    Returns:
        The output `[B, Hq, Lq, Dv]` (or `[Hq, Lq, Dv]`), in the kind and dtype of `q`; a tuple with `lse`
        float32 `[B, Hq, Lq]` and the state, in this order, where they were asked for.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit, or no `state` for keys before the first query.

    Cost:
        That of `attention` and one head's logits once more. Memory: one float32 per key and row of a block of
        192 rows, `192 * Lk`, whatever the number of rows.

    References:
        Y. Leviathan, M. Kalman, Y. Matias, "Selective Attention Improves Transformer", 2024, arXiv:2410.02703.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 4, 100, 16), dtype=np.float32)
        >>> whole = la.dense.selective_attention(q, k, v)
        >>> _, state = la.dense.selective_attention(q[:, :99], k[:, :99], v[:, :99], return_state=True)
        >>> np.allclose(la.dense.selective_attention(q[:, 99:], k, v, state=state), whole[:, 99:], atol=1e-5)
        True
    """
    qn, kn, vn = attention_inputs(q, k, v, ranks=(3, 4), codes=True)
    for x, name in ((kn, "k"), (vn, "v")):
        if x.shape[:-3] != qn.shape[:-3]:
            raise ValueError(f"{name}: got batch {x.shape[0]}, expected {qn.shape[0]} as in q")
    check_heads(qn.shape[-3], kn.shape[-3], vn.shape[-3])
    *batch, heads, rows, dim = qn.shape
    keys = kn.shape[-2]
    if vn.shape[-2] != keys:
        raise ValueError(f"v: got length {vn.shape[-2]}, expected {keys} as in k")
    if rows > keys:
        raise ValueError(f"q: got {rows} queries, expected at most the {keys} keys of k")
    selector_head = integer(selector_head, "selector_head", 0, heads - 1)
    protect_first = integer(protect_first, "protect_first", 0)
    scale, softcap = scale_factor(scale, dim), softcap_value(softcap)
    return_state, return_lse = flag(return_state, "return_state"), flag(return_lse, "return_lse")
    selected = np.zeros((*batch, keys), np.float32)
    if state is not None:
        selected[..., : keys - rows] = _state_numbers(state, (*batch, keys - rows))
    elif keys > rows:
        raise ValueError(f"state: got None with {keys - rows} keys before the first query, expected their F")

    result = np.empty((*qn.shape[:-1], vn.shape[-1]), qn.dtype)
    lse = np.empty(qn.shape[:-1], np.float32)
    if lse.size:
        q4, k4, v4, out4 = (batched(x, 4) for x in (qn, kn, vn, result))
        _core.selective_attention(
            q4, k4, v4, out4, batched(lse, 3), batched(selected, 2), selector_head, protect_first, scale, softcap
        )
    given = returned(None, q, result, lse if return_lse else None)
    if not return_state:
        return given
    return (*given, like(q, selected)) if return_lse else (given, like(q, selected))


def max_f_kept(state: Array, budget: int, *, protect_first: int = 1) -> NDArray[np.int64]:
    """Which cached keys the eviction policy max_F keeps: those with the largest F go.

    `F` only grows, so a key that goes would never have been wanted again. The first `protect_first` keys and the
    newest never go; of keys with equal `F` the older (of lower index) goes first. Rows of keys, of values and
    the entries of the state are kept alike, in their order: `k[..., kept, :]`, `v[..., kept, :]`, `state[..., kept]`.

    Args:
        state: floating `F`, `[B, Lk]` or `[Lk]`, as `selective_attention` returns it.
        budget: how many keys stay, at least `protect_first + 1`.
        protect_first: so many first keys never go.

    Returns:
        Indices of the kept keys, rising, int64 `[B, min(budget, Lk)]` or `[min(budget, Lk)]`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: another shape, a budget that cannot be met, or NaN in `state`.

    Cost:
        One sort of the state.

    Example:
        >>> import numpy as np, longattn as la
        >>> la.dense.max_f_kept(np.array([0.0, 3.0, 1.0, 0.0, 9.0]), 3)
        array([0, 3, 4])
    """
    x = as_numpy(state, "state")
    check_floating(x, "state")
    if x.ndim not in (1, 2):
        raise ValueError(f"state: got shape {x.shape}, expected [Lk] or [B, Lk]")
    protect_first = integer(protect_first, "protect_first", 0)
    budget = integer(budget, "budget", protect_first + 1)
    f = x.astype(np.float64)
    if np.isnan(f).any():
        raise ValueError("state: got NaN, expected numbers")
    keys = f.shape[-1]
    f[..., :protect_first] = -np.inf
    f[..., keys - 1 :] = -np.inf
    # Smallest F first, newer before older among equals.
    order = keys - 1 - np.argsort(f[..., ::-1], axis=-1, kind="stable")
    return np.sort(order[..., :budget], axis=-1)


def _state_numbers(state: Array, shape: tuple[int, ...]) -> NDArray[Any]:
    x = as_numpy(state, "state")
    check_floating(x, "state")
    if x.shape != shape:
        raise ValueError(f"state: got shape {x.shape}, expected {shape}: F of the keys before the first query")
    return x


METHOD = Method(
    name="selective_attention",
    family="score",
    title="Selective Attention Improves Transformer",
    year=2024,
    arxiv="2410.02703",
    function=selective_attention,
    reference=reference.selective_attention,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    checks=(
        "Where no logit of the selecting head is positive it is causal attention.",
        "Steps that pass the state on give the rows of the prefill.",
        "Rows 0, 1 and 2 are those of causal attention while the first key is protected.",
        "A budget of as many keys as there are evicts none.",
    ),
    tests="tests/dense/test_selective_attention.py",
    cost="That of attention and one head's logits once more; `192 * Lk` float32 beside the arrays.",
)
