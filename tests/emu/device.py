"""The back end of `longattn.gpu` that runs kernels in the emulator: numpy arrays are its device memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from emu import emulator
from longattn.gpu._device import Launch, View
from longattn.gpu._sources import source

_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


@cache
def _module(name: str) -> emulator.Module:
    return emulator.Module(source(name))


class EmulatorDevice:
    """A `Device` without a GPU.

    Args:
        order: thread order of the launches, one of `emulator.ORDERS`.
        processors: how many the launching code sees, which decides about splits.
    """

    shared_limit = 227 << 10

    def __init__(self, order: int = 0, processors: int = 4) -> None:
        self.order, self.processors = order, processors
        #: Kernels started, in order.
        self.started: list[str] = []
        #: 8 x 8 matrices loaded, and how often banks made a load wait.
        self.matrix_loads = (0, 0)

    def view(self, x: Any, name: str) -> View:
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a numpy array")
        strides = tuple(stride // x.itemsize for stride in x.strides)
        return View(x, x.shape, strides, str(x.dtype), x.itemsize, x.ctypes.data, x)

    def contiguous(self, x: Any) -> Any:
        # As the allocators of a device do, at addresses that every load is aligned for.
        made = self.empty(x.shape, str(x.dtype), x)
        made[...] = x
        return made

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        kind = _DTYPES.get(dtype) or np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        raw = np.full(size + 256, 0xFF, np.uint8)
        start = -raw.ctypes.data % 256
        return raw[start : start + size].view(kind).reshape(shape)

    def integers(self, values: Any, like: Any) -> Any:
        return np.ascontiguousarray(values, dtype=np.int32)

    def download(self, x: Any) -> Any:
        copied = np.array(x)
        return lambda: copied

    def upload(self, x: Any, like: Any) -> Any:
        return self.contiguous(x)

    def kernel(self, source_name: str, name: str) -> Launch:
        kernel = _module(source_name).kernel(name)

        def launch(
            grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...], shared_bytes: int
        ) -> None:
            self.started.append(name)
            kernel(grid, block, arguments, shared_mem=shared_bytes, order=self.order)
            self.matrix_loads = tuple(map(sum, zip(self.matrix_loads, kernel.matrix_loads, strict=True)))

        return launch
