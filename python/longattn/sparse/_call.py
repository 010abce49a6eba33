"""One call of a sparse kernel: checks and arrays, whatever the lists are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array
from longattn._checks import batched, carried_state, dense_inputs, flag, result_array, returned
from longattn.dense._options import arrays_of, score_options
from longattn.sparse._lists import Lists


def call(
    kernel: Callable[..., None],
    lists: Lists,
    name: str,
    extra: tuple[NDArray[Any] | None, ...],
    q: Array,
    k: Array,
    v: Array,
    *,
    state: tuple[Array, Array] | None = None,
    return_lse: bool = False,
    out: Array | None = None,
    **options: Any,
) -> Any:
    """Attention over `lists`, which came as the argument `name`."""
    qn, kn, vn = dense_inputs(q, k, v, codes=True)
    if qn.dtype == np.float64:
        raise TypeError("q: got dtype float64, expected float32, float16 or bfloat16")
    rows, keys = qn.shape[-2], kn.shape[-2]
    check_fit(lists, name, qn.shape, kn.shape)
    given = score_options(qn.shape, keys, span=rows + keys, **options)
    return_lse = flag(return_lse, "return_lse")
    shape = (*qn.shape[:-1], vn.shape[-1])
    if state is not None:
        o, part = carried_state(state, shape, shape[:-1])
        given["state"] = batched(o, 4), batched(part, 3)
    inputs = {} if out is None else {"q": qn, "k": kn, "v": vn, **arrays_of(given)}
    result = result_array(out, q, shape, qn.dtype, inputs)
    lse = np.empty(shape[:-1], np.float32)
    if lse.size:
        q4, k4, v4, out4 = (batched(x, 4) for x in (qn, kn, vn, result))
        kernel(q4, k4, v4, out4, batched(lse, 3), lists._for_kernel(), *extra, given)
    return returned(out, q, result, lse if return_lse else None)


def check_fit(lists: Lists, name: str, q: tuple[int, ...], k: tuple[int, ...]) -> None:
    """Whether lists are of this problem."""
    batch = q[0] if len(q) == 4 else 1
    heads, kv_heads = q[-3], k[-3]
    if lists.lengths != (q[-2], k[-2]):
        raise ValueError(f"{name}: got lengths {lists.lengths}, expected {(q[-2], k[-2])} as of q and k")
    if lists.shape[0] not in (1, batch):
        raise ValueError(f"{name}: got batch {lists.shape[0]}, expected 1 or {batch}")
    own = lists.shape[1]
    if heads % own or (own % kv_heads and kv_heads % own):
        raise ValueError(
            f"{name}: got {own} heads, expected {heads} query heads, {kv_heads} KV heads, 1, or a number between "
            "that divides them"
        )
