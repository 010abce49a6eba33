"""Devices that GPU tests run on: the emulator, whose thread order turns with the test, and a GPU where there is one.

Tests of what both halves offer take `anywhere`, which also runs them on the CPU's own functions.
"""

from __future__ import annotations

import functools
import os
import sys
import zlib

import numpy as np
import pytest

import tolerances
from emu import emulator
from emu.device import EmulatorDevice
from gpu import fake_cupy
from longattn.gpu import _cupy

#: In the place of a device: the functions for arrays in host memory.
CPU = "cpu"


def _has_gpu():
    try:
        import cupy
    except ImportError:
        return False
    return cupy.is_available()


BACK_ENDS = [*(["emulator"] if emulator.available() else []), *(["gpu"] if _has_gpu() else [])]
_ONLY = os.environ.get("LONGATTN_TEST_DEVICE")  # one of them, and only tests that have one
if _ONLY:
    BACK_ENDS = [name for name in BACK_ENDS if name == _ONLY]


def pytest_collection_modifyitems(config, items):
    """Leaves out tests without a device where one is asked for by name."""
    if not _ONLY:
        return
    on_device = [item for item in items if {"device", "anywhere"} & set(item.fixturenames)]
    config.hook.pytest_deselected(items=[item for item in items if item not in on_device])
    items[:] = on_device


@pytest.fixture(params=BACK_ENDS)
def device(request):
    """A back end of `longattn.gpu`."""
    return _made(request)


@pytest.fixture(params=[*([] if _ONLY else [CPU]), *BACK_ENDS])
def anywhere(request):
    """A back end, or `CPU`."""
    return CPU if request.param == CPU else _made(request)


def _made(request):
    if request.param == "gpu":
        from longattn.gpu._cupy import current

        return current()
    # Orders give the same bits (a test of its own), so one is enough here; which one, the test's name says.
    return EmulatorDevice(order=zlib.crc32(request.node.name.encode()) % len(emulator.ORDERS))


@pytest.fixture
def cupy(monkeypatch):
    """CuPy, as far as it is needed."""
    made = fake_cupy.modules()
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    _cupy._back_end.cache_clear()
    yield made["cupy"]
    _cupy._back_end.cache_clear()


def put(device, x):
    """A numpy array in the memory of a device."""
    if device is CPU:
        return x
    if isinstance(device, EmulatorDevice):
        return device.contiguous(x)
    import cupy

    return cupy.asarray(x)


def get(x):
    """An array of a device as numpy."""
    return x if isinstance(x, np.ndarray) else x.get()


def function_of(device, on_cpu, on_device):
    """The CPU's function, or that of `longattn.gpu` for a device."""
    return on_cpu if device is CPU else functools.partial(on_device, device=device)


def tolerance_of(device, q, k, v, *, together=None, **how):
    """Tolerance of attention there; `together` counts on the CPU."""
    if device is CPU:
        return tolerances.attention(q, k, v, together=together, **how)
    return tolerances.device_attention(q, k, v, **how)
