"""Checks that every GPU function makes before it starts a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._checks import sequence_bounds, window_sides
from longattn.gpu._device import KERNEL_DTYPES, Device, View

HEAD_DIMS = (64, 128, 256)
#: Heads, and sequences of a batch, that a launch may have: of the second and third axis of a grid.
MOST_ACROSS = 65535

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
    for axis, n in zip(axes[:-2], view.shape[:-2], strict=True):
        if n > MOST_ACROSS and axis != "tokens":
            raise ValueError(f"{name}: got {n} along {axis}, expected at most {MOST_ACROSS} on a GPU")
    if view.strides[-1] == 1 and is_aligned(view, _ALIGNMENT):
        return view
    return device.view(device.contiguous(x), name)


def check_shared(device: Device, x: View, name: str, shared: int) -> None:
    """Raises ValueError where a kernel for `x` needs more shared memory than a block of the device may have."""
    if shared > device.shared_limit:
        raise ValueError(
            f"{name}: got shape {x.shape} of {x.dtype}, which needs {shared} bytes of shared memory a block; this "
            f"device has {device.shared_limit}"
        )


def is_aligned(x: View, size: int) -> bool:
    """Whether an array begins at a multiple of `size` bytes, and so does every step along an axis but the last."""
    outer = zip(x.strides[:-1], x.shape[:-1], strict=True)
    return x.address % size == 0 and not any(step * x.itemsize % size for step, n in outer if n > 1)


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
    return sequence_bounds(_on_host(device, bounds), name, total)


def check_listed(
    device: Device, rows: Any, lengths: Any, heads: tuple[int, int], keys: int, *, check: bool = False
) -> None:
    """Lists of rows `[B, Hkv, n]` of `keys` keys, of which the first `lengths` `[B]` or `[B, Hkv]` count.

    Numbers are looked at on the host, and with `check` those on the device too.

    Raises:
        TypeError: no integers.
        ValueError: another shape, or numbers out of range.
    """
    shape = _shape(rows)
    if len(shape) != 3 or shape[:2] != heads:
        raise ValueError(f"rows: got shape {shape}, expected [{heads[0]}, {heads[1]}, n]")
    if lengths is not None and _shape(lengths) not in (heads[:1], heads):
        raise ValueError(f"lengths: got shape {_shape(lengths)}, expected [{heads[0]}] or {list(heads)}")
    counts = np.full(heads, shape[2])
    if lengths is not None:
        if not (check or _is_on_host(lengths)):
            return
        given = _integers(device, lengths, "lengths", shape[2] + 1)
        counts = np.broadcast_to(given.reshape(heads[0], -1), heads)
    if check or _is_on_host(rows):
        _integers(device, _on_host(device, rows)[np.arange(shape[2]) < counts[..., None]], "rows", keys)


def listed_rows(lists: Sequence[NDArray[Any]], shape: tuple[int, int]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Lists of a batch and its heads as `[B, H, n]`, filled up with 0, and their lengths `[B, H]`."""
    counts = np.array([len(one) for one in lists], np.int32)
    padded = np.zeros((len(lists), counts.max(initial=0)), np.int32)
    for row, one in zip(padded, lists, strict=True):
        row[: len(one)] = one
    return padded.reshape(*shape, -1) if counts.any() else padded.reshape(*shape, 0), counts.reshape(shape)


def check_blocks(
    device: Device, starts: Any, blocks: Any, expected: tuple[int, ...], limit: int, *, check: bool = False
) -> None:
    """Lists `blocks[starts[i] : starts[i + 1]]` of blocks below `limit`, as `check_listed`.

    Raises:
        TypeError: no integers.
        ValueError: starts of another shape, or that fall; numbers out of range.
    """
    if _shape(starts) != expected:
        raise ValueError(f"starts: got shape {_shape(starts)}, expected {expected}")
    if len(_shape(blocks)) != 1:
        raise ValueError(f"blocks: got shape {_shape(blocks)}, expected rank 1")
    if not check and not (_is_on_host(starts) and _is_on_host(blocks)):
        return
    bounds = _integers(device, starts, "starts", _shape(blocks)[0] + 1)
    if (np.diff(bounds, axis=-1) < 0).any():
        raise ValueError("starts: got bounds that fall, expected each list to end where the next one begins")
    named = np.zeros(_shape(blocks)[0] + 1, np.int64)  # what no list has may be anything
    np.add.at(named, bounds[..., 0], 1)
    np.add.at(named, bounds[..., -1], -1)
    _integers(device, _on_host(device, blocks)[np.cumsum(named)[:-1] > 0], "blocks", limit)


def _integers(device: Device, x: Any, name: str, limit: int) -> NDArray[Any]:
    """Integers below a limit, on the host."""
    numbers = _on_host(device, x)
    if numbers.size and numbers.dtype.kind not in "iu":
        raise TypeError(f"{name}: got dtype {numbers.dtype}, expected integers")
    if numbers.size and not (int(numbers.min()) >= 0 and int(numbers.max()) < limit):
        raise ValueError(f"{name}: got numbers from {numbers.min()} to {numbers.max()}, expected 0 to {limit - 1}")
    return numbers


def _is_on_host(x: Any) -> bool:
    return isinstance(x, np.ndarray) or not hasattr(x, "shape")


def _on_host(device: Device, x: Any) -> NDArray[Any]:
    return np.asarray(x) if _is_on_host(x) else device.download(x)()


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.shape) if hasattr(x, "shape") else np.shape(x)
