"""Running calls on one instruction set, or on several numbers of threads."""

import contextlib

import longattn as la
from longattn import _core


@contextlib.contextmanager
def running_on(isa):
    """Runs the block on an instruction set."""
    before = _core.isa()
    _core.set_isa(isa)
    try:
        yield
    finally:
        _core.set_isa(before)


def on_threads(call, counts=(1, 2, 3)):
    """What a call gives on each number of threads."""
    before, found = la.get_num_threads(), []
    try:
        for count in counts:
            la.set_num_threads(count)
            found.append(call())
    finally:
        la.set_num_threads(before)
    return found
