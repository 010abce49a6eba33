"""What launching code sees of a device: memory, kernels, limits. The tests have a second back end that needs no GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import is_torch

#: What runs a kernel: `(grid, block, arguments, shared_bytes)`; arguments are numpy scalars, `View.pointer`s and None.
Launch = Callable[[tuple[int, ...], tuple[int, ...], tuple[Any, ...], int], None]

#: What is missing where CuPy is, and what to do.
INSTALL = (
    "GPU functions need CuPy: pip install 'longattn[gpu]' (cupy-cuda13x; for CUDA 12 install cupy-cuda12x), and a CUDA "
    "toolkit, which CuPy's extra brings where there is none (cupy-cuda13x[ctk])"
)

#: Names that kernels give storage dtypes.
KERNEL_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True)
class View:
    """An array in the memory of a device.

    Attributes:
        pointer: what the device's kernels take as its address.
        shape: the shape.
        strides: in elements.
        dtype: its name, such as "bfloat16".
        itemsize: bytes of an element.
        address: its address as a number, for checks of alignment.
        owner: the caller's array, which keeps the memory alive.
    """

    pointer: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    itemsize: int
    address: int
    owner: Any


class Device(Protocol):
    """What launching code needs of a back end."""

    #: Units that run blocks of threads side by side.
    processors: int
    #: Most bytes of shared memory that a block may have.
    shared_limit: int

    def view(self, x: Any, name: str) -> View:
        """The memory of a caller's array; TypeError or ValueError where it is none of this device."""

    def contiguous(self, x: Any) -> Any:
        """`x`, or a C-contiguous copy of it in the same memory."""

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """A new array of the kind of `like`, with arbitrary content."""

    def zeros(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """A new array of the kind of `like`, filled with zeros by the device."""

    def integers(self, values: Any, like: Any) -> Any:
        """A new int32 array of the kind of `like`, from host or device integers."""

    def download(self, x: Any) -> Callable[[], NDArray[Any]]:
        """Starts a copy of `x` to the host; the result waits for it and gives the array."""

    def upload(self, x: NDArray[Any], like: Any) -> Any:
        """Starts a copy of a host array into a new array of the kind of `like`."""

    def pinned(self, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """Page-locked memory of the host, with arbitrary content."""

    def copy(self, to: View | NDArray[Any], source: View | NDArray[Any]) -> None:
        """Starts a copy between the device and page-locked memory, on a stream of copies beside the caller's."""

    def mark(self, *, side: bool = False) -> Any:
        """An event after all that was started on the caller's stream, or on that of copies."""

    def follow(self, event: Any, *, side: bool = False) -> None:
        """Makes the caller's stream, or that of copies, wait for an event."""

    def wait(self, event: Any) -> None:
        """Makes the host wait for an event."""

    def used(self) -> AbstractContextManager[None]:
        """Where operators of the caller's arrays (assignments, sums) are in order with kernels."""

    def seconds(self, call: Callable[[], object]) -> float:
        """From before a call until the device has done what it started."""

    def kernel(self, source: str, name: str) -> Launch:
        """A compiled kernel of a source text of `longattn.gpu`."""


def is_on_gpu(x: Any) -> bool:
    """Whether `x` is a CuPy array or a torch CUDA tensor. Imports neither."""
    if type(x) is np.ndarray:
        return False
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, getattr(cupy, "ndarray", ())):
        return True
    return is_torch(x) and bool(x.device.type == "cuda")


def device_of(x: Any, name: str) -> Device:
    """The device that holds `x`.

    Raises:
        TypeError: `x` is neither a CuPy array nor a torch CUDA tensor.
        ImportError: CuPy is not installed; says what to install.
    """
    if not is_on_gpu(x):
        raise TypeError(not_on_gpu(x, name))
    from longattn.gpu._cupy import holding

    return holding(x)


def not_on_gpu(x: Any, name: str) -> str:
    """What to say of an array of no GPU."""
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    message = f"{name}: got {kind}, expected a CuPy array or a torch CUDA tensor (cupy.asarray copies a numpy array)"
    return message if sys.modules.get("cupy") or find_spec("cupy") else f"{message}; {INSTALL}"
