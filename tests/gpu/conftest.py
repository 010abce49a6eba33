"""Devices that GPU tests run on: the emulator, whose thread order turns with the test, and a GPU where there is one."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from emu import emulator
from emu.device import EmulatorDevice


def _has_gpu():
    try:
        import cupy
    except ImportError:
        return False
    return cupy.is_available()


BACK_ENDS = [*(["emulator"] if emulator.available() else []), *(["gpu"] if _has_gpu() else [])]


@pytest.fixture(params=BACK_ENDS)
def device(request):
    """A back end of `longattn.gpu`."""
    if request.param == "gpu":
        from longattn.gpu._cupy import current

        return current()
    # Orders give the same bits (a test of its own), so one is enough here; which one, the test's name says.
    return EmulatorDevice(order=zlib.crc32(request.node.name.encode()) % len(emulator.ORDERS))


def put(device, x):
    """A numpy array in the memory of a device."""
    if isinstance(device, EmulatorDevice):
        return device.contiguous(x)
    import cupy

    return cupy.asarray(x)


def get(x):
    """An array of a device as numpy."""
    return x if isinstance(x, np.ndarray) else x.get()
