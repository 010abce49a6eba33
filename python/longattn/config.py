"""Threads, and what this build runs on."""

from __future__ import annotations

import operator
import platform

import numpy as np

from longattn import _core


def set_num_threads(n: int) -> None:
    """Sets the number of threads of all later calls in this process. Results do not depend on it.

    The default is `LONGATTN_NUM_THREADS`, else `OMP_NUM_THREADS`, else the processors this process may run on. A
    `LONGATTN_NUM_THREADS` that is no such number is passed over, with a RuntimeWarning at import.

    Where torch is loaded (on Linux), calls of the main thread run on torch's threads, which look for work on every
    processor between two operations: so a call between them need not wait until they sleep. They are as many as
    `torch.get_num_threads()` says, as long as it is more than one and no other number was set here or by
    `LONGATTN_NUM_THREADS`. `LONGATTN_OPENMP=0` keeps calls on threads of longattn's own.

    Raises:
        TypeError: `n` is no integer.
        ValueError: `n` is not 1 to 4096.
    """
    if isinstance(n, bool):
        raise TypeError(f"n: got {n!r}, expected an integer")
    try:
        threads = operator.index(n)
    except TypeError:
        raise TypeError(f"n: got {n!r}, expected an integer") from None
    if not 1 <= threads <= 4096:
        raise ValueError(f"n: got {threads}, expected 1 to 4096")
    _core.set_num_threads(threads)


def get_num_threads() -> int:
    """Number of threads that calls use."""
    return _core.num_threads()


def show_config() -> dict[str, object]:
    """Versions, instruction set and threads, for bug reports; `longattn doctor` says more.

    `threads_of` says whose threads a call of this thread runs on, see `set_num_threads`.
    """
    from longattn import __version__

    return {
        "longattn": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "isa": _core.isa(),
        "available_isas": _core.available_isas(),
        "cpu_features": _core.cpu_features(),
        "num_threads": _core.num_threads(),
        "threads_of": "torch" if _core.shares_openmp() else "longattn",
    }
