"""Memory that causal attention takes beyond its inputs and its output, in a process of its own.

It is the peak of the resident memory during the call less what was resident before it. The operating system
counts, so nothing escapes it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import longattn as la
from longattn.bench.arrays import DTYPES

PAGE = 4096
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def supported() -> bool:
    """Whether the system lets a process reset its own peak."""
    try:
        reset_peak()
    except OSError:
        return False
    return True


def extra_bytes(heads: int, dim: int, length: int, dtype: str, threads: int) -> int:
    """Bytes beyond q, k, v and the output at the peak of one causal call; at least a page.

    Raises:
        subprocess.CalledProcessError: the process failed; its message is on stderr.
    """
    measure = f"memory.one_call({heads}, {dim}, {length}, {dtype!r}, {threads})"
    command = [sys.executable, "-c", f"from longattn.bench import memory; print({measure})"]
    # The process must find the package where this one did.
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=os.environ | {"PYTHONPATH": path})
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


def one_call(heads: int, dim: int, length: int, dtype: str, threads: int) -> int:
    """Bytes that one call takes in this process."""
    la.set_num_threads(threads)
    rng = np.random.default_rng(0)
    shape = (1, heads, length, dim)
    q, k, v = (rng.standard_normal(shape, dtype=np.float32).astype(DTYPES[dtype]) for _ in "qkv")
    out = np.zeros(shape, DTYPES[dtype])
    out.fill(1)  # resident before the call
    # Threads and code pages are there before; scratch for the length that is measured is not.
    few = (slice(None), slice(None), slice(0, 16))
    la.attention(q[few], k[few], v[few], causal=True)
    release_freed()
    reset_peak()
    before = resident("VmRSS")
    la.attention(q, k, v, causal=True, out=out)
    return resident("VmHWM") - before
