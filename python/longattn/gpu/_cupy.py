"""The back end for a GPU: CuPy compiles and starts the kernels, on the device and the stream of the caller's arrays."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import BFLOAT16, as_numpy
from longattn.gpu._device import INSTALL, Launch, View, not_on_gpu
from longattn.gpu._sources import source

_ANY_DIRECTION = 4  # cudaMemcpyDefault
_DEFAULT_SHARED = 48 << 10  # a kernel that wants more must say so before it is started


def current() -> CupyDevice:
    """The back end for CuPy arrays of CuPy's current device.

    Raises:
        ImportError: CuPy is not installed.
    """
    return _back_end(int(_cupy().cuda.Device().id), False)


def holding(x: Any) -> CupyDevice:
    """The back end for arrays of the kind of `x`, a CuPy array or a torch CUDA tensor, on its device.

    Raises:
        ImportError: CuPy is not installed.
    """
    cupy = _cupy()
    if isinstance(x, cupy.ndarray):
        return _back_end(int(x.device.id), False)
    return _back_end(int(x.device.index), True)


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise ImportError(INSTALL) from error
    return cupy


@cache
def _back_end(number: int, of_torch: bool) -> CupyDevice:
    return CupyDevice(number, of_torch)


class CupyDevice:
    """A `Device` over CuPy.

    Args:
        number: of the device.
        of_torch: whether kernels go to torch's current stream of that device, as is right for torch tensors, in
            place of CuPy's.
    """

    def __init__(self, number: int, of_torch: bool) -> None:
        import cupy

        self._cupy = cupy
        self._number = number
        self._of_torch = of_torch
        self._modules: dict[str, Any] = {}
        self._kernels: dict[tuple[str, str], Launch] = {}
        self._side: Any = None
        attributes = cupy.cuda.Device(number).attributes
        self.processors: int = attributes["MultiProcessorCount"]
        self.shared_limit: int = attributes["MaxSharedMemoryPerBlockOptin"]

    def view(self, x: Any, name: str) -> View:
        """The memory of a CuPy array or a torch CUDA tensor."""
        if isinstance(x, self._cupy.ndarray):
            self._check_place(int(x.device.id), name)
            address = int(x.data.ptr)
            strides = tuple(stride // x.itemsize for stride in x.strides)
            return View(np.uint64(address), x.shape, strides, str(x.dtype), x.itemsize, address, x)
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(x, torch.Tensor) and x.device.type == "cuda":
            self._check_place(int(x.device.index), name)
            if x.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name}: got a tensor that requires grad; this function computes no gradients")
            address = int(x.data_ptr())
            dtype = str(x.dtype).removeprefix("torch.")
            return View(np.uint64(address), tuple(x.shape), tuple(x.stride()), dtype, x.element_size(), address, x)
        raise TypeError(not_on_gpu(x, name))

    def _check_place(self, number: int, name: str) -> None:
        if number != self._number:
            raise ValueError(f"{name}: got an array of device {number}, expected device {self._number} as of the first")

    def contiguous(self, x: Any) -> Any:
        """`x`, or a C-contiguous copy."""
        if not isinstance(x, self._cupy.ndarray):
            return x.contiguous()
        with self.used():
            return self._cupy.ascontiguousarray(x)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """A new array of the kind of `like`."""
        if isinstance(like, self._cupy.ndarray):
            with self.used():
                return self._cupy.empty(shape, BFLOAT16 if dtype == "bfloat16" else dtype)
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)

    def zeros(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """A new array of the kind of `like`, filled with zeros on the caller's stream."""
        if isinstance(like, self._cupy.ndarray):
            with self.used():
                return self._cupy.zeros(shape, dtype)
        torch = sys.modules["torch"]
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=like.device)

    def integers(self, values: Any, like: Any) -> Any:
        """A new int32 array of the kind of `like`."""
        if isinstance(like, self._cupy.ndarray):
            with self.used():
                return self._cupy.ascontiguousarray(self._cupy.asarray(values, dtype=np.int32))
        torch = sys.modules["torch"]
        return torch.as_tensor(values, dtype=torch.int32, device=like.device).contiguous()

    def download(self, x: Any) -> Callable[[], NDArray[Any]]:
        """Starts a copy of `x` into page-locked memory, on the caller's stream."""
        with self.used():
            event = self._cupy.cuda.Event()
            if isinstance(x, self._cupy.ndarray):
                import cupyx

                pinned = cupyx.empty_pinned(x.shape, x.dtype)
                self._cupy.ascontiguousarray(x).get(out=pinned, blocking=False)
            else:
                torch = sys.modules["torch"]
                held = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
                held.copy_(x.detach(), non_blocking=True)
                pinned = as_numpy(held, "x")
            event.record()

        def wait() -> NDArray[Any]:
            event.synchronize()
            arrived: NDArray[Any] = pinned
            return arrived

        return wait

    def upload(self, x: NDArray[Any], like: Any) -> Any:
        """Starts a copy of a host array, on the caller's stream."""
        with self.used():
            if isinstance(like, self._cupy.ndarray):
                return self._cupy.asarray(x)  # by page-locked memory that CuPy keeps until the copy is done
            torch = sys.modules["torch"]
            held = torch.empty(x.shape, dtype=getattr(torch, str(x.dtype)), pin_memory=True)
            np.copyto(as_numpy(held, "x"), x)
            return held.to(like.device, non_blocking=True)  # torch keeps what it copies from until the copy is done

    def pinned(self, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """Memory of CuPy's pool of page-locked memory."""
        import cupyx

        with self.used():
            made: NDArray[Any] = cupyx.empty_pinned(shape, BFLOAT16 if dtype == "bfloat16" else dtype)
            return made

    def copy(self, to: View | NDArray[Any], source: View | NDArray[Any]) -> None:
        """By addresses, whose kinds the driver knows."""
        ends = [x.address if isinstance(x, View) else x.ctypes.data for x in (to, source)]
        size = next(x.nbytes for x in (to, source) if isinstance(x, np.ndarray))
        with self._beside():
            stream = self._cupy.cuda.get_current_stream()
            self._cupy.cuda.runtime.memcpyAsync(*ends, size, _ANY_DIRECTION, stream.ptr)

    def mark(self, *, side: bool = False) -> Any:
        """An event that takes no time."""
        with self._beside() if side else self.used():
            event = self._cupy.cuda.Event(disable_timing=True)
            event.record()
            return event

    def follow(self, event: Any, *, side: bool = False) -> None:
        """On the device; the host goes on."""
        with self._beside() if side else self.used():
            self._cupy.cuda.get_current_stream().wait_event(event)

    def wait(self, event: Any) -> None:
        """For that event alone."""
        event.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """By events on the caller's stream; work of the host between them counts as well."""
        with self.used():
            start, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
            start.record()
            call()
            end.record()
            end.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(start, end)) / 1e3

    def kernel(self, source_name: str, name: str) -> Launch:
        """A kernel, compiled at first use and kept by CuPy's own cache."""
        known = self._kernels.get((source_name, name))
        if known is None:
            known = self._kernels[source_name, name] = self._made(source_name, name)
        return known

    def _made(self, source_name: str, name: str) -> Launch:
        with self.used():
            if source_name not in self._modules:
                # Without a header of its own in the key of CuPy's cache, the text must be whole: `source` puts it so.
                self._modules[source_name] = self._cupy.RawModule(code=source(source_name), options=("-std=c++17",))
            kernel = self._modules[source_name].get_function(name)
        announced = _DEFAULT_SHARED

        def launch(
            grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...], shared_bytes: int
        ) -> None:
            nonlocal announced
            passed = tuple(np.uint64(0) if a is None else a for a in arguments)
            with self.used():
                if shared_bytes > announced:
                    kernel.max_dynamic_shared_size_bytes = announced = shared_bytes
                kernel(grid, block, passed, shared_mem=shared_bytes)

        return launch

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """This device, and a stream of its own for copies, which waits for no other."""
        with self._cupy.cuda.Device(self._number):
            if self._side is None:
                self._side = self._cupy.cuda.Stream(non_blocking=True)
            with self._side:
                yield

    @contextmanager
    def used(self) -> Iterator[None]:
        """This device, and the stream of the arrays' kind, so that their own kernels and ours stay in order."""
        with self._cupy.cuda.Device(self._number):
            if not self._of_torch:
                yield
                return
            current = sys.modules["torch"].cuda.current_stream(self._number).cuda_stream
            with self._cupy.cuda.Stream.from_external(_Stream(current)):
                yield


class _Stream:
    """A stream by its address, as the stream protocol has it; torch's own streams speak it since 2.10 only."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        """Version of the protocol, and address."""
        return 0, self._address
