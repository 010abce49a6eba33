"""Sequences that lie one after another along the rows, for functions that take one sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from longattn._arrays import Array, as_numpy, like
from longattn._checks import sequence_bounds
from longattn.linear._named_rows import NamedRows


def each_sequence(
    function: Callable[..., Any],
    rows: Mapping[str, Array],
    cu_seqlens: Array,
    *,
    initial_states: Sequence[Any] | None = None,
    **options: Any,
) -> tuple[Array, list[Any]]:
    """Runs a function over each of the sequences that its rows hold one after another.

    Recurrences of matrix states take `cu_seqlens` themselves, and are faster for it. This is for all others: causal
    forms, groups of rows, memories that learn, layers, whatever their states are made of.

    Args:
        function: one of `longattn.linear`.
        rows: its arguments by name that have a row per token, `[1, H, L, D]`, `[1, L, C]`, `[1, H, L]` (or without the
            1 where `v` or `x` has none); one of them is called "v", or "x".
        cu_seqlens: integers `[N + 1]`, bounds of `N` sequences along the rows.
        initial_states: what `function` takes as the `initial_state` of each sequence; `None` is none.
        options: further arguments of `function`, the same for all sequences.

    Returns:
        `(output, states)`: rows in their places, and the state that `function` returned of each sequence, `None` where
        it returns none.

    Raises:
        TypeError: arguments of another kind.
        ValueError: bounds that do not fit, rows of another number, as many states as sequences are not, and what
            `function` raises.

    Cost:
        A call per sequence.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 10, 8), dtype=np.float32)
        >>> rows = {"q": q, "k": k, "v": v}
        >>> out, states = la.linear.each_sequence(la.linear.causal_inline_attention, rows, np.array([0, 4, 10]))
        >>> out.shape, [state.count for state in states]
        ((1, 2, 10, 8), [4, 6])
    """
    given = NamedRows(function, rows, options)
    length = given.shape[given.axis]
    given.check(length, "token")
    if given.shape[0] != 1 and (given.axis == 2 or "v" not in rows):
        raise ValueError(f"cu_seqlens: got it with a batch of {given.shape[0]}, expected one")
    bounds = sequence_bounds(cu_seqlens, "cu_seqlens", length)
    count = len(bounds) - 1
    if initial_states is not None and len(initial_states) != count:
        raise ValueError(f"initial_states: got {len(initial_states)}, expected {count}, one per sequence")
    out, states = None, []
    for n, (first, last) in enumerate(pairwise(bounds.tolist() if count else [0, 0])):
        state = {} if initial_states is None or not count else {"initial_state": initial_states[n]}
        found = given.run(slice(first, last), **state)
        made, after = found if isinstance(found, tuple) else (found, None)
        part = as_numpy(made, "out")
        if out is None:
            out = given.empty(part, length)
        out[..., first:last, :] = part
        states.append(after)
    assert out is not None
    return like(given.values, out), states[:count]
