"""Callers' arrays in, results out: the one place where memory is borrowed from numpy, torch and DLPack.

A borrowed array shares the caller's memory. Two things cost one copy, and nothing else does: a last axis that
is not contiguous, and elements that are misaligned or lie at strides which are no multiple of their size.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, TypeAlias, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from longattn import _core

#: What callers may pass: a numpy array, a torch CPU tensor, or another CPU array that speaks DLPack.
Array: TypeAlias = Any

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
#: Storage dtypes of queries, keys, values and outputs.
FLOATS: tuple[np.dtype[Any], ...] = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
#: What dense attention takes beside them, slowly.
FLOAT64: np.dtype[Any] = np.dtype(np.float64)

_FLOAT32 = FLOATS[0]

_T = TypeVar("_T", bound=np.generic)

#: Storage of a `KVStore` that keeps codes instead of numbers.
CODES = ("int8", "int4")

_DLPACK_CPU = (1, 3)  # plain and page-locked host memory
_DLPACK_NAMES = {
    2: "CUDA",
    4: "OpenCL",
    7: "Vulkan",
    8: "Metal",
    10: "ROCm",
    13: "CUDA managed",
    14: "oneAPI",
}


def is_torch(x: Array) -> bool:
    """Whether `x` is a torch tensor. Never imports torch: without torch loaded nothing can be one."""
    if type(x) is np.ndarray:  # nearly always, and calls of a few microseconds notice what follows
        return False
    torch = sys.modules.get("torch")
    return isinstance(x, getattr(torch, "Tensor", ()))


class CodedRows:
    """Keys or values of a `KVStore` that keeps codes, `[kv_heads, len, dim]`.

    Made by `KVStore.keys` and `KVStore.values`; `longattn.attention` reads them where they lie. They are the rows
    that were there when it was made: appends go on beyond them, and after a truncate below them a call that is
    given them raises ValueError. `numpy.asarray` decodes a copy to float32.
    """

    __slots__ = ("_handle",)

    ndim = 3

    def __init__(self, handle: _core.CodedRows) -> None:
        self._handle = handle

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(kv_heads, len, dim)`."""
        return self._handle.shape

    @property
    def dtype(self) -> str:
        """`"int8"` or `"int4"`."""
        return self._handle.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of these rows, codes and scales."""
        return self._handle.nbytes

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """The numbers that the codes stand for, float32 `[kv_heads, len, dim]`."""
        if copy is False:
            raise ValueError("copy: got False, expected a copy: the numbers are decoded")
        array: NDArray[Any] = self.rows(slice(None))
        return array if dtype is None else array.astype(dtype, copy=False)

    def rows(self, rows: slice) -> NDArray[np.float32]:
        """The numbers that some rows of every head stand for, float32 `[kv_heads, rows, dim]`.

        Args:
            rows: which, without a step.
        """
        heads, length, dim = self.shape
        first, end, _ = rows.indices(length)
        out = np.empty((heads, max(end - first, 0), dim), np.float32)
        for head in range(heads):
            self._handle.decode(head, first, out[head].reshape(-1))
        return out

    def __repr__(self) -> str:
        """Shape and storage."""
        return f"CodedRows(shape={self.shape}, dtype={self.dtype!r})"


def as_numpy(x: Array, name: str, *, any_strides: bool = False) -> NDArray[Any]:
    """Numpy array over the memory of `x`, last axis contiguous.

    Args:
        x: numpy array, torch CPU tensor or DLPack CPU array of booleans, integers or floats (bfloat16
            included).
        name: the argument's name, for error messages.
        any_strides: leave the last axis as it is, contiguous or not.

    Returns:
        An array that shares the memory of `x`, or one C-contiguous copy where the kernels could not read `x`
        in place (see the module's description).

    Raises:
        TypeError: `x` is no array, or its dtype is not a native boolean, integer or float.
        ValueError: `x` is not in CPU memory, or is a torch tensor that would need a gradient.
    """
    a = _borrow(x, name)
    if a.dtype is _FLOAT32 and a.flags.carray:
        return a
    if a.dtype != BFLOAT16 and a.dtype.kind not in "biuf":
        raise TypeError(f"{name}: got dtype {a.dtype}, expected booleans, integers or floats")
    if not a.dtype.isnative:
        raise TypeError(f"{name}: got dtype {a.dtype.str} in foreign byte order, expected native byte order")
    return a if _readable_in_place(a, any_strides) else a.copy(order="C")


def as_output(
    out: Array,
    *,
    like: Array,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    inputs: Mapping[str, NDArray[Any] | CodedRows | None],
    name: str = "out",
) -> NDArray[Any]:
    """Numpy array over the memory of a caller's `out`, which must be fit to receive a result in place.

    Args:
        out: the caller's array.
        like: the argument whose kind (torch or not) `out` must have.
        shape: the result's shape.
        dtype: the result's dtype.
        inputs: arrays that are read while `out` is written, by name; `None` where an optional one is absent.
        name: what the argument is called.

    Raises:
        TypeError: another kind or dtype.
        ValueError: another shape, read-only, last axis not contiguous, or memory that overlaps itself or an
            input.
    """
    if is_torch(out) != is_torch(like):
        kind = "a torch tensor" if is_torch(like) else "a numpy array"
        raise TypeError(f"{name}: got {_type_name(out)}, expected {kind} as q is")
    a = _borrow(out, name)
    if a.dtype != dtype:
        raise TypeError(f"{name}: got dtype {a.dtype}, expected {dtype}")
    if a.shape != shape:
        raise ValueError(f"{name}: got shape {a.shape}, expected {shape}")
    if not a.flags.writeable:
        raise ValueError(f"{name}: got a read-only array, expected a writable one")
    if not a.flags.carray and (not _readable_in_place(a) or _overlaps_itself(a)):
        raise ValueError(
            f"{name}: got strides {a.strides} bytes, expected a contiguous last axis and no repeated memory"
        )
    for other, x in inputs.items():
        if isinstance(x, np.ndarray) and np.may_share_memory(a, x):  # a store's rows are read-only: `a` is none
            raise ValueError(f"{name}: got an array that overlaps {other}, expected memory of its own")
    return a


def reshaped(x: NDArray[_T], *shape: int) -> NDArray[_T]:
    """`x.reshape(shape)` with a -1, which numpy does not work out beside an axis of length 0.

    Axes of length 0 stand where they stood, or among as many others: they count as 1 on both sides.
    """
    if x.size or 0 not in shape:
        return x.reshape(shape)
    rest = math.prod(n or 1 for n in x.shape) // math.prod(n or 1 for n in shape if n != -1)
    return x.reshape([rest if n == -1 else n for n in shape])


def like(x: Array, result: NDArray[Any]) -> Array:
    """`result` in the kind of `x`, sharing memory: a torch tensor for a torch tensor, else itself."""
    if not is_torch(x):
        return result
    torch = sys.modules["torch"]
    if result.dtype == BFLOAT16:
        return torch.from_numpy(result.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(result)


def _borrow(x: Array, name: str) -> NDArray[Any]:
    if type(x) is np.ndarray:
        return x
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name}: got a masked array, expected a plain one (its mask would be ignored)")
    if isinstance(x, np.ndarray):
        return np.asarray(x)
    if is_torch(x):
        return _borrow_torch(x, name)
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return _borrow_dlpack(x, name)
    if isinstance(x, CodedRows):
        raise TypeError(f"{name}: got {x!r}, expected numbers; only longattn.attention reads codes")
    raise TypeError(
        f"{name}: got {_type_name(x)}, expected a numpy array (numpy.asarray makes one), a torch CPU tensor "
        "or another DLPack CPU array"
    )


def _borrow_torch(t: Any, name: str) -> NDArray[Any]:
    torch = sys.modules["torch"]
    if t.device.type != "cpu":
        raise ValueError(f"{name}: got a tensor on device {t.device}, expected a CPU tensor")
    if t.layout != torch.strided:
        raise ValueError(f"{name}: got a tensor of layout {t.layout}, expected torch.strided")
    if t.requires_grad:
        if torch.is_grad_enabled():
            raise ValueError(
                f"{name}: got a tensor that requires grad, expected none: this function computes no "
                "gradients; call longattn.torch.attention, which does, or call under torch.no_grad()"
            )
        t = t.detach()
    if t.is_neg() or t.is_conj():  # bits that numpy does not know
        t = t.resolve_neg().resolve_conj()
    try:
        if t.dtype == torch.bfloat16:  # numpy() knows no bfloat16; the bits do
            bits: NDArray[Any] = t.view(torch.int16).numpy()
            return bits.view(BFLOAT16)
        plain: NDArray[Any] = t.numpy()
    except TypeError as error:
        raise TypeError(f"{name}: got dtype {t.dtype}, expected one that numpy knows or torch.bfloat16") from error
    except RuntimeError as error:  # tensors of torch.func, torch.compile and others
        raise ValueError(
            f"{name}: got a {type(t).__name__} without memory of its own ({error}), expected a plain tensor; inside "
            "transforms of torch call longattn.torch, which has operators"
        ) from error
    return plain


def _borrow_dlpack(x: Any, name: str) -> NDArray[Any]:
    kind, number = (int(part) for part in x.__dlpack_device__())
    if kind not in _DLPACK_CPU:
        device = f"{_DLPACK_NAMES.get(kind, f'DLPack type {kind}')}:{number}"
        raise ValueError(f"{name}: got {_type_name(x)} on device {device}, expected CPU memory")
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError) as error:
        came = f"{_type_name(x)} of dtype {getattr(x, 'dtype', 'unknown')}"
        raise TypeError(
            f"{name}: got {came}, which numpy cannot borrow by DLPack ({error}), expected float32 or float16"
        ) from error


def _readable_in_place(a: NDArray[Any], any_strides: bool = False) -> bool:
    """Whether the kernels can read `a` where it lies."""
    if a.flags.c_contiguous:  # nearly always, and calls of a few microseconds notice what follows
        return bool(a.flags.aligned)
    if a.size == 0:
        return True
    strides = [stride for stride, n in zip(a.strides, a.shape, strict=True) if n > 1]
    last = any_strides or a.ndim == 0 or a.shape[-1] <= 1 or a.strides[-1] == a.itemsize
    return last and a.flags.aligned and all(stride % a.itemsize == 0 for stride in strides)


def _overlaps_itself(a: NDArray[Any]) -> bool:
    """Whether two indices of `a` may reach the same memory (or interleave so that it is hard to tell)."""
    if a.flags.c_contiguous or a.size == 0:
        return False
    reach = a.itemsize
    for stride, n in sorted((abs(stride), n) for stride, n in zip(a.strides, a.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (n - 1)
    return False


def _type_name(x: object) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
