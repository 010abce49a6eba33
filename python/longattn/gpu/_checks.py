"""Checks that every GPU function makes before it starts a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._checks import sequence_bounds, window_sides
from longattn.gpu._device import KERNEL_DTYPES, Device, View

HEAD_DIMS = (64, 128, 256)
_ALIGNMENT = 16


def heads_view(device: Device, x: Any, name: str, dtype: str | None = None) -> View:
    """`[B, H, L, D]` whose rows kernels can load in pieces of 16 bytes; one copy is made where they cannot.

    Raises:
        TypeError: another dtype.
        ValueError: another rank or head size.
    """
    return _rows(device, x, name, dtype, ("batch", "heads", "length", "head_dim"))


def packed_view(device: Device, x: Any, name: str, dtype: str | None = None) -> View:
    """`[T, H, D]` as `[1, H, T, D]`, otherwise as `heads_view`."""
    view = _rows(device, x, name, dtype, ("tokens", "heads", "head_dim"))
    (tokens, heads, dim), (row, head, _) = view.shape, view.strides
    return replace(view, shape=(1, heads, tokens, dim), strides=(0, head, row, 1))


def _rows(device: Device, x: Any, name: str, dtype: str | None, axes: tuple[str, ...]) -> View:
    view = device.view(x, name)
    if view.dtype not in KERNEL_DTYPES or (dtype and view.dtype != dtype):
        raise TypeError(f"{name}: got dtype {view.dtype}, expected {dtype or ', '.join(KERNEL_DTYPES)}")
    if len(view.shape) != len(axes):
        raise ValueError(f"{name}: got shape {view.shape}, expected [{', '.join(axes)}]")
    if view.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"{name}: got head_dim {view.shape[-1]}, expected one of {HEAD_DIMS} on a GPU")
    outer = zip(view.strides[:-1], view.shape[:-1], strict=True)
    rows = [stride * view.itemsize % _ALIGNMENT for stride, n in outer if n > 1]
    if view.strides[-1] == 1 and not any(rows) and view.address % _ALIGNMENT == 0:
        return view
    return device.view(device.contiguous(x), name)


def attention_views(
    device: Device, q: Any, k: Any, v: Any, *, of: Callable[..., View] = heads_view
) -> tuple[View, View, View]:
    """Queries, keys and values that fit each other.

    Raises:
        TypeError: dtypes that no kernel takes, or that differ.
        ValueError: shapes that do not fit.
    """
    queries = of(device, q, "q")
    keys, values = of(device, k, "k", queries.dtype), of(device, v, "v", queries.dtype)
    check_fit(queries, keys.shape, values.shape)
    return queries, keys, values


def check_fit(queries: View, keys: tuple[int, ...], values: tuple[int, ...]) -> None:
    """Raises ValueError where shapes `[B, Hkv, L, D]` of keys and values do not fit each other or the queries."""
    batch, heads, _, dim = queries.shape
    if len(keys) != 4 or keys[0] != batch or keys[3] != dim:
        raise ValueError(f"k: got shape {keys}, expected [{batch}, kv_heads, length, {dim}]")
    if values != keys:
        raise ValueError(f"v: got shape {values}, expected that of k, {keys}, on a GPU")
    if keys[1] == 0 or heads % keys[1]:
        raise ValueError(f"k: got {keys[1]} heads, expected a divisor of the {heads} heads of q")


def window_ends(causal: bool, window: object, span: int) -> tuple[int, int]:
    """Keys to the left and to the right that a row sees, -1 for all.

    Raises:
        TypeError: a window that is no pair of integers.
        ValueError: an end below -1.
    """
    left, right = window_sides(window, span)
    return left, 0 if causal else right


def sequence_ends(device: Device, bounds: Any, name: str, total: int) -> NDArray[np.int64]:
    """Checked bounds of packed sequences, on the host.

    Raises:
        TypeError: no integers.
        ValueError: bounds that do not go from 0 to `total` without falling.
    """
    on_host = bounds if isinstance(bounds, np.ndarray) or not hasattr(bounds, "shape") else device.download(bounds)()
    return sequence_bounds(on_host, name, total)
