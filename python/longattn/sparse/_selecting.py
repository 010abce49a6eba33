"""What selectors have in common: their inputs, positions of blocks, means of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import _core
from longattn._arrays import FLOAT64, Array, as_numpy
from longattn._checks import batched, check_float_storage, check_floating, check_heads, flag, integer
from longattn.sparse._lists import from_flat

#: Rows of one of the means that a mean over all rows is made of.
_PART = 256


def selector_inputs(q: Array, k: Array) -> tuple[NDArray[Any], NDArray[Any]]:
    """Queries and keys `[B, H, L, D]` that fit each other, from rank 3 or 4."""
    qn, kn = as_numpy(q, "q"), as_numpy(k, "k")
    for x, name in ((qn, "q"), (kn, "k")):
        if x.ndim not in (3, 4) or x.ndim != qn.ndim:
            raise ValueError(f"{name}: got shape {x.shape}, expected rank 3 or 4, as q")
        check_float_storage(x, name)
        if x.shape[-1] == 0:
            raise ValueError(f"{name}: got head_dim 0 in shape {x.shape}, expected at least 1")
    qn, kn = batched(qn, 4), batched(kn, 4)
    if not qn.shape[0]:
        raise ValueError(f"q: got batch 0 in shape {qn.shape}, expected at least 1: lists are of sequences")
    if kn.shape[0] != qn.shape[0]:
        raise ValueError(f"k: got batch {kn.shape[0]}, expected {qn.shape[0]} as in q")
    if kn.shape[3] != qn.shape[3]:
        raise ValueError(f"k: got head_dim {kn.shape[3]}, expected {qn.shape[3]} as in q")
    check_heads(qn.shape[1], kn.shape[1], kn.shape[1])
    return qn, kn


def keep_integers(selector: object, **least: int) -> None:
    """Checks a frozen selector's integers and keeps them as Python's own: those of numpy wrap around."""
    for name, low in least.items():
        object.__setattr__(selector, name, integer(getattr(selector, name), name, low))


def only_causal(causal: object) -> None:
    """For masks that look back only."""
    if not flag(causal, "causal"):
        raise ValueError("causal: got False, expected True: this mask looks back only")


def aligned_first(lengths: tuple[int, int], block: int) -> int:
    """Queries of the first block, so that the others begin at positions that are multiples of `block`."""
    return block - (lengths[1] - lengths[0]) % block


def block_bounds(length: int, block: int, first: int | None = None) -> NDArray[np.int64]:
    """Where blocks begin, and the length."""
    inner = np.arange(block if first is None else first, length, block, dtype=np.int64)
    return np.concatenate([[0], inner, [length]]) if length else np.zeros(1, np.int64)


def key_limits(query_bounds: NDArray[np.int64], lengths: tuple[int, int], causal: bool) -> NDArray[np.int64]:
    """Keys that the last query of each block may see come before these."""
    rows, keys = lengths
    if not causal:
        return np.full(len(query_bounds) - 1, keys, np.int64)
    return np.clip(query_bounds[1:] + (keys - rows), 0, keys)


def head_numbers(values: object, name: str) -> NDArray[Any]:
    """A number, or some `[Hq]` for heads that are not known yet; infinities are numbers."""
    number = isinstance(values, int | float) and not isinstance(values, bool)
    x = np.asarray(values) if number else as_numpy(values, name)
    if x.dtype.kind not in "iu":
        check_floating(x, name)
    if x.ndim > 1:
        raise ValueError(f"{name}: got shape {x.shape}, expected a number or [Hq], one per query head")
    if np.isnan(x.astype(FLOAT64)).any():
        raise ValueError(f"{name}: got NaN, expected numbers")
    return x


def per_query_head(values: object, name: str, heads: int) -> NDArray[np.float32]:
    """A number for each query head, from one for all or `[Hq]`."""
    x = head_numbers(values, name)
    if x.shape not in ((), (heads,)):
        raise ValueError(f"{name}: got shape {x.shape}, expected a number or {(heads,)}, one per query head")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(np.broadcast_to(x.astype(np.float32), (heads,)))


def block_means(
    x: NDArray[Any], bounds: NDArray[np.int64], centre: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Means `[B, H, blocks, D]` of the blocks of rows between `bounds`, less `centre` `[B, H, D]`."""
    flat = None if centre is None else np.ascontiguousarray(centre).ravel()
    means, _ = _core.block_means(x, bounds, flat, False)
    return means.reshape(*x.shape[:2], len(bounds) - 1, x.shape[3])


def block_likeness(
    x: NDArray[Any], bounds: NDArray[np.int64], centre: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`block_means`, and the mean cosine of all pairs of rows of each block, `[B, H, blocks]`."""
    flat = None if centre is None else np.ascontiguousarray(centre).ravel()
    means, likeness = _core.block_means(x, bounds, flat, True)
    shape = (*x.shape[:2], len(bounds) - 1)
    return means.reshape(*shape, x.shape[3]), likeness.reshape(shape)


def mean_row(x: NDArray[Any]) -> NDArray[np.float32]:
    """The mean row of each head, `[B, H, D]`; zeros without rows."""
    bounds = block_bounds(x.shape[2], _PART)
    parts, counts = block_means(x, bounds).astype(FLOAT64), np.diff(bounds)
    mean: NDArray[Any] = (parts * counts[:, None]).sum(axis=2) / max(x.shape[2], 1)
    return mean.astype(np.float32)


def listed(
    lists: tuple[NDArray[np.int64], NDArray[np.uint32]], shape: tuple[int, int, int]
) -> dict[str, NDArray[np.int64] | NDArray[np.uint32]]:
    """Fields of a mask or of lists, from what the compiled module gives."""
    return {"indptr": from_flat(lists[0], shape), "indices": lists[1]}
