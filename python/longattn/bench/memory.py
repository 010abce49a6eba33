"""Memory that a call takes beyond its inputs and its output, in a process of its own.

It is the peak of the resident memory during the call less what was resident before it. The operating system
counts, so nothing escapes it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import longattn as la

PAGE = 4096
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def supported() -> bool:
    """Whether the system lets a process reset its own peak."""
    try:
        reset_peak()
    except OSError:
        return False
    return True


def extra_bytes(makes: str, arguments: Sequence[int | str], threads: int) -> int:
    """Bytes beyond inputs and outputs at the peak of a call; at least a page.

    Args:
        makes: "module:function", what `of_call` takes.
        arguments: numbers and names that it is called with.
        threads: of longattn.

    Raises:
        subprocess.CalledProcessError: the process failed; its message is on stderr.
    """
    module, function = makes.split(":")
    program = (
        f"import {module}; from longattn.bench import memory; "
        f"print(memory.of_call(*{module}.{function}(*{tuple(arguments)!r}), {threads}))"
    )
    # The process must find the package where this one did.
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
    return max(PAGE, int(done.stdout))


def reset_peak() -> None:
    """Sets the process's peak (VmHWM) to what is resident now."""
    CLEAR_REFS.write_text("5")


def release_freed() -> None:
    """Gives back what was freed and is still resident: scratch that lands there would not be seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of the GNU C library; others keep less
    if trim is not None:
        trim(0)


def resident(entry: str) -> int:
    """Bytes of an entry of /proc/self/status: VmRSS now, VmHWM at the peak."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(entry + ":"))
    return int(line.split()[1]) << 10


def of_call(few: Callable[[], Any], call: Callable[[], Any], threads: int) -> int:
    """Bytes that a call takes in this process; `few` is the same over a few rows, so that threads and code are there.

    Both write into arrays that are resident.
    """
    la.set_num_threads(threads)
    few()
    release_freed()
    reset_peak()
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before
