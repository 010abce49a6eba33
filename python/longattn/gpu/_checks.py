"""Checks that every GPU function makes before it starts a kernel."""

from __future__ import annotations

from typing import Any

from longattn.gpu._device import KERNEL_DTYPES, Device, View

HEAD_DIMS = (64, 128, 256)
_ALIGNMENT = 16


def heads_view(device: Device, x: Any, name: str, dtype: str | None = None) -> View:
    """`[B, H, L, D]` whose rows kernels can load in pieces of 16 bytes; one copy is made where they cannot.

    Raises:
        TypeError: another dtype.
        ValueError: another rank or head size.
    """
    view = device.view(x, name)
    if view.dtype not in KERNEL_DTYPES or (dtype and view.dtype != dtype):
        raise TypeError(f"{name}: got dtype {view.dtype}, expected {dtype or ', '.join(KERNEL_DTYPES)}")
    if len(view.shape) != 4:
        raise ValueError(f"{name}: got shape {view.shape}, expected [batch, heads, length, head_dim]")
    if view.shape[3] not in HEAD_DIMS:
        raise ValueError(f"{name}: got head_dim {view.shape[3]}, expected one of {HEAD_DIMS} on a GPU")
    rows = [s * view.itemsize % _ALIGNMENT for s, n in zip(view.strides[:3], view.shape[:3], strict=True) if n > 1]
    if view.strides[3] == 1 and not any(rows) and view.address % _ALIGNMENT == 0:
        return view
    return device.view(device.contiguous(x), name)


def attention_views(device: Device, q: Any, k: Any, v: Any) -> tuple[View, View, View]:
    """Queries, keys and values that fit each other.

    Raises:
        TypeError: dtypes that no kernel takes, or that differ.
        ValueError: shapes that do not fit.
    """
    queries = heads_view(device, q, "q")
    keys = heads_view(device, k, "k", queries.dtype)
    values = heads_view(device, v, "v", queries.dtype)
    batch, heads, _, dim = queries.shape
    if keys.shape[0] != batch or keys.shape[3] != dim:
        raise ValueError(f"k: got shape {keys.shape}, expected [{batch}, kv_heads, length, {dim}]")
    if values.shape != keys.shape:
        raise ValueError(f"v: got shape {values.shape}, expected that of k, {keys.shape}, on a GPU")
    if keys.shape[1] == 0 or heads % keys.shape[1]:
        raise ValueError(f"k: got {keys.shape[1]} heads, expected a divisor of the {heads} heads of q")
    return queries, keys, values


def window_ends(causal: bool, window: tuple[int, int]) -> tuple[int, int]:
    """Keys to the left and to the right that a row sees, -1 for all.

    Raises:
        ValueError: an end below -1.
    """
    left, right = window
    if min(left, right) < -1:
        raise ValueError(f"window: got {window}, expected ends of at least -1")
    return left, 0 if causal else right
