"""One call of a sparse kernel: checks and arrays, whatever the lists are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from longattn._arrays import Array
from longattn._checks import batched, carried_state, dense_inputs, flag, result_array, returned
from longattn.dense._options import Options, arrays_of, packed_options, score_options
from longattn.sparse._lengths import packed_bounds
from longattn.sparse._lists import Lists


def call(
    kernel: Callable[..., None],
    lists: Lists,
    name: str,
    extra: tuple[Any, ...],
    q: Array,
    k: Array,
    v: Array,
    *,
    packed: tuple[Array | None, Array | None] | None = None,
    state: tuple[Array, Array] | None = None,
    return_lse: bool = False,
    out: Array | None = None,
    **options: Any,
) -> Any:
    """Attention over `lists`, which came as the argument `name`; `packed`: bounds of sequences, where it has them."""
    qn, kn, vn = dense_inputs(q, k, v, codes=True)
    if qn.dtype == np.float64:
        raise TypeError("q: got dtype float64, expected float32, float16 or bfloat16")
    rows, keys = qn.shape[-2], kn.shape[-2]
    check_fit(lists, name, qn.shape, kn.shape)
    batch = qn.shape[0] if qn.ndim == 4 else 1
    sequences = None if packed is None else packed_bounds(batch, rows, keys, *packed)
    given = list_options(qn.shape, keys, sequences is not None, **options)
    if packed is not None:
        extra = (*extra, sequences)
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


def list_options(shape: tuple[int, ...], keys: int, packed: bool, **options: Any) -> Options:
    """Options of queries of `shape` over lists of `keys` keys; of packed sequences, those that suit all of them."""
    *_, heads, rows, dim = shape
    if not packed:
        return score_options(shape, keys, span=rows + keys, **options)
    for name in ("bias", "mask", "segments", "visible_until"):
        if options.pop(name, None) is not None:
            raise ValueError(f"{name}: got one with cu_seqlens_q, expected none: packed sequences do not take it")
    return packed_options((rows, heads, dim), keys, **options)


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
