"""Partial results of attention over disjoint sets of keys, made into the whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy, like
from longattn._checks import batched, check_float_storage, check_floating
from longattn.gpu import is_on_gpu
from longattn.gpu import merge as merge_on_gpu
from longattn.methods import Method
from longattn.reference import dense as reference


def merge(parts: Iterable[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Attention over the union of disjoint sets of keys, from the results over each set.

    With `(o, lse)` of each part as `attention(..., return_lse=True)` gives them, `lse = log(sum(exp(lse_p)))`
    and `out = sum(exp(lse_p - lse) * o_p)`: associative, and exact up to rounding. Parts whose lse is -inf
    saw no key and do not count, whatever their `o` holds. At most one part may have been given `sinks`, or
    the sinks would count several times. Parts on a GPU, whose lse is float32, go to `longattn.gpu.merge`.

    Args:
        parts: pairs `(o, lse)`, at least one: `o` `[B, H, L, Dv]` or `[H, L, Dv]`, all of one shape and dtype
            (float32, float16 or bfloat16); `lse` floating `[B, H, L]` or `[H, L]`, natural logarithm.

    Returns:
        The pair `(o, lse)`: the kind and dtype of the first part's `o`, and float32.

    Raises:
        TypeError: a part that is no pair, or arrays of another kind or dtype.
        ValueError: no parts, or shapes that differ.

    Cost:
        One pass over all parts.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 4, 100, 16), dtype=np.float32)
        >>> sets = slice(0, 50), slice(50, None)
        >>> halves = [la.attention(q, k[:, s], v[:, s], return_lse=True) for s in sets]
        >>> np.allclose(la.merge(halves)[0], la.attention(q, k, v), atol=1e-6)
        True
    """
    if not isinstance(parts, Iterable):
        raise TypeError(f"parts: got {type(parts).__name__}, expected pairs (o, lse)")
    pairs = list(parts)
    if not pairs:
        raise ValueError("parts: got none, expected at least one pair (o, lse)")
    if isinstance(pairs[0], tuple | list) and pairs[0] and is_on_gpu(pairs[0][0]):
        return merge_on_gpu(pairs)
    outs: list[NDArray[Any]] = []
    lses: list[NDArray[np.float32]] = []
    for n, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"parts[{n}]: got {type(pair).__name__}, expected a pair (o, lse)")
        o, lse = as_numpy(pair[0], f"parts[{n}] o"), as_numpy(pair[1], f"parts[{n}] lse")
        check_float_storage(o, f"parts[{n}] o")
        check_floating(lse, f"parts[{n}] lse")
        first = outs[0] if outs else o
        if o.ndim not in (3, 4) or o.shape != first.shape:
            expected = f"{first.shape} as in parts[0]" if outs else "[B, H, L, Dv] or [H, L, Dv]"
            raise ValueError(f"parts[{n}] o: got shape {o.shape}, expected {expected}")
        if o.dtype != first.dtype:
            raise TypeError(f"parts[{n}] o: got dtype {o.dtype}, expected {first.dtype} as in parts[0]")
        if lse.shape != o.shape[:-1]:
            raise ValueError(f"parts[{n}] lse: got shape {lse.shape}, expected {o.shape[:-1]} as in its o")
        outs.append(o)
        lses.append(np.ascontiguousarray(lse, np.float32))
    result, total = np.empty(outs[0].shape, outs[0].dtype), np.empty(lses[0].shape, np.float32)
    if total.size:
        _core.merge(
            [batched(o, 4) for o in outs],
            [batched(x, 3) for x in lses],
            batched(result, 4),
            batched(total, 3),
        )
    return like(pairs[0][0], result), like(pairs[0][0], total)


METHOD = Method(
    name="merge",
    family="exact",
    title="Online normalizer calculation for softmax",
    year=2018,
    arxiv="1805.02867",
    function=merge,
    reference=reference.merge,
    exact=True,
    modes=frozenset({"causal", "non-causal", "self", "cross"}),
    gqa=True,
    checks=(
        "One part is itself.",
        "Attention over parts of the keys merges to attention over all of them.",
        "It is associative, and the order of the parts does not matter.",
        "Parts that saw no key do not count.",
    ),
    tests="tests/dense/test_merge.py",
    cost="One pass over the parts.",
)
