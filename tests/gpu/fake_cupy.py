"""As much of CuPy as `longattn.gpu` and its benchmark call, over numpy arrays and the emulator.

It holds the callers to what CuPy asks: pointers and scalars of the right types, shared memory announced beyond 48 KB,
arrays of a device apart from those of the host. Kernels run at once. Copies run as late as they may: those to
page-locked memory when the host waits for an event after them, those of a stream of their own when another stream waits
for one. Until then what they write to holds NaN.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections import defaultdict, deque
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from emu import emulator

_DEFAULT_SHARED = 48 << 10


class ndarray(np.ndarray):
    """An array in the memory of a device."""

    _number = 0

    def __array_finalize__(self, source):
        self._number = getattr(source, "_number", 0)

    @property
    def device(self):
        return SimpleNamespace(id=self._number)

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)

    def get(self, stream=None, order="C", out=None, blocking=True):
        if out is None:
            return np.array(self)
        assert type(out) is np.ndarray and out.dtype == self.dtype and out.shape == self.shape
        later(out, self)
        return out

    def set(self, arr, stream=None):
        assert type(arr) is np.ndarray and arr.dtype == self.dtype and arr.shape == self.shape
        self[...] = arr


class Device:
    """A device, current while it is entered."""

    _current: ClassVar[list[int]] = [0]
    attributes: ClassVar[dict[str, int]] = {"MultiProcessorCount": 4, "MaxSharedMemoryPerBlockOptin": 227 << 10}

    def __init__(self, number=None):
        self.id = self._current[-1] if number is None else number

    def __enter__(self):
        self._current.append(self.id)

    def __exit__(self, *_):
        self._current.pop()

    def synchronize(self):
        pass


class _Memory:
    """Allocations by address."""

    def __init__(self):
        self._made = {}
        self.allocators = []  # that were asked for

    def array(self, shape, dtype):
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        raw = np.full(size + 512, 0xFF, np.uint8)
        start = -raw.ctypes.data % 256
        held = raw[start : start + max(size, 1)]
        number = Device().id
        self._made[held.ctypes.data] = weakref.ref(raw), held.size, number
        made = np.ndarray.__new__(ndarray, shape, dtype, buffer=raw, offset=start)
        made._number = number
        return made

    def holds(self, address):
        """Whether an address is one of the device's."""
        made = self._made.items()
        return any(start <= address < start + size for start, (raw, size, _) in made if raw() is not None)

    def at(self, address):
        """The bytes from an address of the current device to the end of its allocation."""
        for start, (reference, size, number) in list(self._made.items()):
            raw = reference()
            if raw is None:
                del self._made[start]
            elif start <= address < start + size:
                assert number == Device().id, f"an array of device {number} on device {Device().id}"
                first = address - raw.ctypes.data
                return raw[first : start + size - raw.ctypes.data]
        raise AssertionError(f"{address:#x} is no address of the device")


class _Function:
    def __init__(self, memory, kernel):
        self._memory, self._kernel = memory, kernel
        self.max_dynamic_shared_size_bytes = _DEFAULT_SHARED

    def __call__(self, grid, block, args, *, shared_mem=0):
        assert shared_mem <= self.max_dynamic_shared_size_bytes, "shared memory that was not announced"
        assert all(isinstance(n, int) for n in (*grid, *block))
        given = []
        for letter, value in zip(self._kernel.signature, args, strict=True):
            if letter != "p":
                given.append(value)
                continue
            assert type(value) is np.uint64, f"a pointer as {type(value).__name__}"
            given.append(self._memory.at(int(value)) if value else None)
        _Stream.launched.append((Device().id, _Stream.current[-1]))
        self._kernel(grid, block, tuple(given), shared_mem=shared_mem)


class _Event:
    def __init__(self, *, disable_timing=False):
        self.at = None
        self._queue = None

    def record(self, stream=None):
        self.at = time.perf_counter()
        self._queue = _Stream.queues[_Stream.current[-1]]
        self._queue.append(self)
        _Stream.calls.append(("record", _Stream.current[-1]))

    def synchronize(self):
        assert self.at is not None, "an event that was not recorded"
        while self in self._queue:
            first = self._queue.popleft()
            if not isinstance(first, _Event):
                first()


class _Stream:
    #: Addresses of streams that are entered; CuPy's own is 0.
    current: ClassVar[list[int]] = [0]
    #: Device and stream of each kernel.
    launched: ClassVar[list[tuple[int, int]]] = []

    #: Events that were recorded or waited for, and on which stream.
    calls: ClassVar[list[tuple[str, int]]] = []
    #: Copies and events of each that are still to come.
    queues: ClassVar[dict[int, deque]] = defaultdict(deque)
    #: Of streams that were made here.
    made: ClassVar[list[int]] = []
    ptr = 0

    def __init__(self, *, non_blocking):
        assert non_blocking
        self.ptr = 1000 + len(self.made)
        self.made.append(self.ptr)

    def __enter__(self):
        self.current.append(self.ptr)

    def __exit__(self, *_):
        self.current.pop()

    @classmethod
    def from_external(cls, stream):
        version, address = stream.__cuda_stream__()
        assert version == 0

        @contextmanager
        def used():
            cls.current.append(address)
            try:
                yield
            finally:
                cls.current.pop()

        return used()


class _CurrentStream:
    """Of the moment."""

    @property
    def ptr(self):
        return _Stream.current[-1]

    def wait_event(self, event):
        _Stream.calls.append(("wait", self.ptr))
        event.synchronize()


def later(to, source, stream=None):
    """A copy of what stands in `source` now, when somebody waits for the stream, by default the current one."""
    stood = np.array(source)
    _Stream.queues[_Stream.current[-1] if stream is None else stream].append(lambda: np.copyto(to, stood))


def launches(call):
    """Devices and streams of the kernels that a call starts."""
    first = len(_Stream.launched)
    call()
    return _Stream.launched[first:]


def recorded(call):
    """What a call records on streams and makes them wait for."""
    first = len(_Stream.calls)
    call()
    return _Stream.calls[first:]


def modules() -> dict[str, Any]:
    """`cupy` and `cupyx` for `sys.modules`."""
    memory, host = _Memory(), _Memory()
    _Stream.queues.clear()

    def pinned(shape, dtype):
        return host.array(shape, dtype).view(np.ndarray)

    def asarray(x, dtype=None):
        if isinstance(x, ndarray) and (dtype is None or x.dtype == dtype):
            return x
        x = np.asarray(x) if dtype is None else np.asarray(x).astype(dtype)
        made = memory.array(x.shape, x.dtype)
        made[...] = x
        return made

    def ascontiguousarray(x):
        assert isinstance(x, ndarray)
        if x.flags.c_contiguous:
            return x
        made = memory.array(x.shape, x.dtype)
        made[...] = x
        return made

    def zeros(shape, dtype=float):
        made = memory.array(shape, dtype)
        made[...] = 0
        return made

    class RawModule:
        def __init__(self, *, code, options=()):
            assert options == ("-std=c++17",)
            self._module = emulator.Module(code)

        def get_function(self, name):
            return _Function(memory, self._module.kernel(name))

    def memcpy(to, source, size, kind, stream):
        assert kind == 4 and stream in _Stream.made, "a copy on no stream of its own"
        assert memory.holds(to) != memory.holds(source), "a copy between the device and the host"
        ends = (memory.at(x)[:size] if memory.holds(x) else host.at(x)[:size] for x in (to, source))
        _Stream.queues[stream].append(functools.partial(np.copyto, *ends))

    cupy, cupyx = ModuleType("cupy"), ModuleType("cupyx")
    cupy.ndarray, cupy.RawModule = ndarray, RawModule
    cupy.empty, cupy.zeros, cupy.asarray, cupy.ascontiguousarray = memory.array, zeros, asarray, ascontiguousarray
    cupy.is_available = lambda: True
    cupy.RawKernel = lambda code, name: lambda grid, block, args: None  # the benchmark's spinning kernel
    cupy.cuda = SimpleNamespace(
        Device=Device,
        Event=_Event,
        Stream=_Stream,
        get_elapsed_time=lambda start, end: 1e3 * (end.at - start.at),
        get_current_stream=_CurrentStream,
        set_allocator=memory.allocators.append,
        runtime=SimpleNamespace(
            getDeviceProperties=lambda number: {"name": b"no GPU, an emulator"}, memcpyAsync=memcpy
        ),
    )
    cupyx.empty_pinned = pinned
    return {"cupy": cupy, "cupyx": cupyx}
