"""Devices that GPU tests run on: the emulator, whose thread order turns with the test, and a GPU where there is one."""

from __future__ import annotations

import os
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
_ONLY = os.environ.get("LONGATTN_TEST_DEVICE")  # one of them, and only tests that have one
if _ONLY:
    BACK_ENDS = [name for name in BACK_ENDS if name == _ONLY]


def pytest_collection_modifyitems(config, items):
    """Leaves out tests without a device where one is asked for by name."""
    if not _ONLY:
        return
    left_out = [item for item in items if "device" not in item.fixturenames]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if "device" in item.fixturenames]


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
