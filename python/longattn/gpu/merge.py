"""Partial results of disjoint sets of keys put together on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from longattn._checks import one_of
from longattn.gpu._device import KERNEL_DTYPES, Device, View, device_of

_THREADS = 256


def merge_splits(device: Device, partial: View, lse: View, out: View, out_lse: View) -> None:
    """Starts the merge of `partial` `[heads.., parts, D]` and `lse` `[heads.., parts]` into `out` `[heads.., D]`."""
    *heads, parts, dim = partial.shape
    count = int(np.prod(heads))
    if count == 0:
        return
    kernel = device.kernel("merge", f"merge_{KERNEL_DTYPES[out.dtype]}")
    arguments = (partial.pointer, lse.pointer, out.pointer, out_lse.pointer, np.int32(parts), np.int32(dim))
    kernel((count,), (min(dim, _THREADS),), arguments, 0)


def merge(
    parts: Iterable[tuple[Any, Any]], *, dtype: str | None = None, device: Device | None = None
) -> tuple[Any, Any]:
    """Attention over several disjoint sets of keys from the results of each, as `longattn.merge`.

    Args:
        parts: pairs `(out, lse)`: `out` `[..., D]`, all float32, float16 or bfloat16, and `lse` float32 `[...]`,
            natural log, -inf where a row saw no key of that set; all of one shape.
        dtype: of the result; `None` is that of the parts.
        device: the back end; `None` is that of the first part.

    Returns:
        `(out, lse)` over all sets.

    Raises:
        TypeError: a part that is no pair; arrays that are not on a GPU, or of another dtype.
        ValueError: no parts, or shapes that differ.

    Cost: one pass over the parts, and one copy that puts them side by side in float32.
    """
    pairs = list(parts)
    if not pairs:
        raise ValueError("parts: got none, expected at least one pair (o, lse)")
    for n, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"parts[{n}]: got {type(pair).__name__}, expected a pair (o, lse)")
    first = pairs[0][0]
    device = device or device_of(first, "parts[0] o")
    whole = device.view(first, "parts[0] o")
    shape = whole.shape
    if whole.dtype not in KERNEL_DTYPES or not shape:
        raise TypeError(f"parts[0] o: got {whole.dtype} {shape}, expected [..., D] of {', '.join(KERNEL_DTYPES)}")
    dtype = one_of(dtype or whole.dtype, "dtype", KERNEL_DTYPES)
    for n, (out, lse) in enumerate(pairs):
        of_both = ((f"parts[{n}] o", out, shape, whole.dtype), (f"parts[{n}] lse", lse, shape[:-1], "float32"))
        for name, x, expected, kind in of_both:
            view = device.view(x, name)
            if view.dtype != kind:
                raise TypeError(f"{name}: got dtype {view.dtype}, expected {kind}")
            if view.shape != expected:
                raise ValueError(f"{name}: got shape {view.shape}, expected {expected}")
    outs = device.empty((*shape[:-1], len(pairs), shape[-1]), "float32", first)
    lses = device.empty((*shape[:-1], len(pairs)), "float32", first)
    with device.used():
        for n, (out, lse) in enumerate(pairs):
            outs[..., n, :] = out
            lses[..., n] = lse
    merged = device.empty(shape, dtype, first)
    merged_lse = device.empty(shape[:-1], "float32", first)
    if math.prod(shape):
        merge_splits(
            device,
            device.view(outs, "parts"),
            device.view(lses, "parts"),
            device.view(merged, "out"),
            device.view(merged_lse, "lse"),
        )
    return merged, merged_lse
