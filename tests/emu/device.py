"""The back end of `longattn.gpu` that runs kernels in the emulator: arrays of numpy, or torch's on the CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from emu import emulator
from longattn._arrays import as_numpy, is_torch
from longattn.gpu._device import Launch, View
from longattn.gpu._sources import source

_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


def _as_torch(x: Any) -> Any:
    """The same memory as a tensor on the CPU."""
    import torch

    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == "bfloat16" else torch.from_numpy(x)


@cache
def _module(name: str) -> emulator.Module:
    return emulator.Module(source(name))


def kernels_of(name: str) -> set[str]:
    """Names of all kernels of a source."""
    return _module(name).kernels()


class EmulatorDevice:
    """A `Device` without a GPU.

    Args:
        order: thread order of the launches, one of `emulator.ORDERS`.
        processors: how many the launching code sees, which decides about splits.

    It has a clock of its own, `now`, which nothing but a test puts forward.
    """

    shared_limit = 227 << 10

    def __init__(self, order: int = 0, processors: int = 4) -> None:
        self.order, self.processors = order, processors
        #: Kernels started, in order.
        self.started: list[str] = []
        #: 8 x 8 matrices loaded, and how often banks made a load wait.
        self.matrix_loads = (0, 0)
        self.now = 0.0

    def view(self, x: Any, name: str) -> View:
        if not isinstance(x, np.ndarray) and not is_torch(x):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a numpy array")
        memory = x if isinstance(x, np.ndarray) else as_numpy(x, name, any_strides=True)
        strides = tuple(stride // memory.itemsize for stride in memory.strides)
        return View(memory, memory.shape, strides, str(memory.dtype), memory.itemsize, memory.ctypes.data, x)

    def contiguous(self, x: Any) -> Any:
        # As the allocators of a device do, at addresses that every load is aligned for.
        made = self.empty(tuple(x.shape), str(x.dtype).removeprefix("torch."), x)
        made[...] = x
        return made

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        kind = _DTYPES.get(dtype) or np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        raw = np.full(size + 256, 0xFF, np.uint8)
        start = -raw.ctypes.data % 256
        made = raw[start : start + size].view(kind).reshape(shape)
        return _as_torch(made) if is_torch(like) else made

    def zeros(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        made = self.empty(shape, dtype, like)
        made[...] = 0
        return made

    def integers(self, values: Any, like: Any) -> Any:
        made = np.ascontiguousarray(values, dtype=np.int32)
        return _as_torch(made) if is_torch(like) else made

    def download(self, x: Any) -> Any:
        copied = np.array(x if isinstance(x, np.ndarray) else as_numpy(x, "x", any_strides=True))
        return lambda: copied

    def upload(self, x: Any, like: Any) -> Any:
        made = self.contiguous(x)
        return _as_torch(made) if is_torch(like) else made

    def pinned(self, shape: tuple[int, ...], dtype: str) -> Any:
        return np.empty(shape, _DTYPES.get(dtype) or dtype)

    def copy(self, to: Any, source: Any) -> None:
        to, source = (x.pointer if isinstance(x, View) else x for x in (to, source))
        np.copyto(to, source)

    def mark(self, *, side: bool = False) -> Any:
        return side

    def follow(self, event: Any, *, side: bool = False) -> None:
        pass

    def wait(self, event: Any) -> None:
        pass

    def used(self) -> AbstractContextManager[None]:
        return nullcontext()

    def seconds(self, call: Any) -> float:
        start = self.now
        call()
        return self.now - start

    def kernel(self, source_name: str, name: str) -> Launch:
        kernel = _module(source_name).kernel(name)

        def launch(
            grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...], shared_bytes: int
        ) -> None:
            assert shared_bytes <= self.shared_limit, f"{name}: {shared_bytes} bytes of shared memory"
            self.started.append(name)
            kernel(grid, block, arguments, shared_mem=shared_bytes, order=self.order)
            self.matrix_loads = tuple(map(sum, zip(self.matrix_loads, kernel.matrix_loads, strict=True)))

        return launch
