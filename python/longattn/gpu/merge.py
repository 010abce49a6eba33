"""Partial results of disjoint sets of keys put together on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

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


def merge(parts: Sequence[tuple[Any, Any]], *, dtype: str = "float32", device: Device | None = None) -> tuple[Any, Any]:
    """Attention over several disjoint sets of keys from the results of each.

    Args:
        parts: pairs `(out, lse)`: `out` float32 `[..., D]` and `lse` float32 `[...]`, natural log, -inf where a row
            saw no key of that set; all of one shape.
        dtype: of the result.
        device: the back end; `None` is that of the first part.

    Returns:
        `(out, lse)` over all sets.

    Raises:
        TypeError: arrays that are not on a GPU, or of another dtype.
        ValueError: no parts, or shapes that differ.

    Cost: one pass over the parts, and one copy that puts them side by side.
    """
    if not parts:
        raise ValueError("parts: got none, expected at least one pair of output and lse")
    first = parts[0][0]
    device = device or device_of(first, "parts[0][0]")
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {tuple(KERNEL_DTYPES)}")
    shape = device.view(first, "parts[0][0]").shape
    for i, (out, lse) in enumerate(parts):
        for name, x, expected in ((f"parts[{i}][0]", out, shape), (f"parts[{i}][1]", lse, shape[:-1])):
            view = device.view(x, name)
            if view.shape != expected or view.dtype != "float32":
                raise ValueError(f"{name}: got {view.dtype} {view.shape}, expected float32 {expected}")
    outs = device.empty((*shape[:-1], len(parts), shape[-1]), "float32", first)
    lses = device.empty((*shape[:-1], len(parts)), "float32", first)
    for i, (out, lse) in enumerate(parts):
        outs[..., i, :] = out
        lses[..., i] = lse
    merged = device.empty(shape, dtype, first)
    merged_lse = device.empty(shape[:-1], "float32", first)
    merge_splits(
        device,
        device.view(outs, "parts"),
        device.view(lses, "parts"),
        device.view(merged, "out"),
        device.view(merged_lse, "lse"),
    )
    return merged, merged_lse
