"""As much of torch as `longattn.gpu` calls on tensors of a GPU, over the memory of the stand-in for CuPy."""

from __future__ import annotations

import contextlib
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from gpu import fake_cupy
from longattn._arrays import BFLOAT16


class dtype:
    def __init__(self, name, kind):
        self._name, self.kind = name, np.dtype(kind)

    def __str__(self):
        return f"torch.{self._name}"


_NAMES = ("float32", "float16", "bool", "uint8", "int16", "int32", "int64")
_DTYPES = {"bfloat16": dtype("bfloat16", BFLOAT16), **{name: dtype(name, name) for name in _NAMES}}
_HOST = SimpleNamespace(type="cpu", index=None)


class Tensor:
    """A tensor over an array: of a device where that is one of the stand-in for CuPy, else of the host."""

    requires_grad = False
    layout = "strided"

    def __init__(self, held):
        self.held = held

    @property
    def device(self):
        if not isinstance(self.held, fake_cupy.ndarray):
            return _HOST
        return SimpleNamespace(type="cuda", index=self.held.device.id)

    @property
    def shape(self):
        return self.held.shape

    @property
    def dtype(self):
        return _DTYPES[str(self.held.dtype)]

    def stride(self):
        return tuple(step // self.held.itemsize for step in self.held.strides)

    def element_size(self):
        return self.held.itemsize

    def is_neg(self):
        return False

    def is_conj(self):
        return False

    def data_ptr(self):
        return self.held.ctypes.data

    def contiguous(self):
        return self if self.held.flags.c_contiguous else _made(self.held, self.device)

    def detach(self):
        return self

    def numpy(self):
        assert self.device is _HOST
        return self.held

    def view(self, kind):
        return Tensor(self.held.view(kind.kind))

    def reshape(self, *shape):
        return Tensor(self.held.reshape(shape))

    def pin_memory(self):
        return self

    def to(self, device, non_blocking=False):
        return _made(self.held, device)

    def copy_(self, other, non_blocking=False):
        if non_blocking and self.device is _HOST:
            fake_cupy.later(self.held, other.held, STREAMS[other.device.index])
        else:
            self.held[...] = other.held

    def __getitem__(self, at):
        return Tensor(self.held[at])

    def __setitem__(self, at, value):
        self.held[at] = value.held


def _made(array, device):
    """A copy of an array there."""
    if device is _HOST:
        return Tensor(np.array(array))
    made = empty(array.shape, dtype=_DTYPES[str(array.dtype)], device=device)
    made.held[...] = array
    return made


def empty(shape, *, dtype, device=_HOST, pin_memory=False):
    if device is _HOST:
        made = Tensor(np.empty(shape, dtype.kind))
        made.held.view(np.uint8)[...] = 0xFF
        return made
    cupy = __import__("cupy")
    with fake_cupy.Device(device.index):  # torch goes to the device that it is told
        return Tensor(cupy.empty(shape, dtype.kind))


def zeros(shape, *, dtype, device=_HOST):
    made = empty(shape, dtype=dtype, device=device)
    made.held[...] = 0
    return made


def as_tensor(values, *, dtype, device):
    held = values.held if isinstance(values, Tensor) else np.asarray(values)
    return _made(np.asarray(held).astype(dtype.kind), device)


def on_device(array, number=0):
    """A tensor of a device with the numbers of an array."""
    return _made(array, SimpleNamespace(type="cuda", index=number))


#: Torch's current streams, by device.
STREAMS = {0: 77, 1: 88}


def module() -> Any:
    """`torch` for `sys.modules`."""
    torch: Any = ModuleType("torch")
    torch.Tensor, torch.strided = Tensor, "strided"
    torch.empty, torch.zeros, torch.as_tensor, torch.from_numpy = empty, zeros, as_tensor, Tensor
    torch.is_grad_enabled = lambda: True
    torch.no_grad = contextlib.nullcontext
    torch.cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        current_stream=lambda device: SimpleNamespace(cuda_stream=STREAMS[device]),
    )
    for name, kind in _DTYPES.items():
        setattr(torch, name, kind)
    return torch
