"""A back end that knows what happened after what: a clock per stream and for the host, as race detectors have them.

It looks at each access to memory that steps over two memories share, and finds those that nothing puts in order.
"""

from __future__ import annotations

import sys

import numpy as np
from numpy.lib.array_utils import byte_bounds

from emu.device import EmulatorDevice
from longattn.gpu import host_kv_cache
from longattn.gpu._device import View

HOST, STREAM, SIDE = range(3)

#: The waits of a step (`longattn.gpu._staging`): the function, and what it makes wait for an event.
WAITS = (
    "fetch: follow on the side",
    "arrived: wait",
    "send: wait",
    "send: follow on the side",
    "send: follow",
)


def _caller():
    """The function that called a method of the device."""
    return sys._getframe(2).f_code.co_name


class Watched(np.ndarray):
    """Page-locked memory that tells its device when the host reads or writes it."""

    device = None

    def __setitem__(self, at, value):
        if self.device is not None:
            self.device.touch(HOST, self, writes=True)
        super().__setitem__(at, value)

    def astype(self, dtype):
        self.device.touch(HOST, self, writes=False)
        return np.asarray(self).astype(dtype)


class Traced(EmulatorDevice):
    """Runs everything at once, and knows what a device might have run at another time.

    Args:
        without: a wait that it forgets, one of `WAITS`.
    """

    def __init__(self, without=""):
        super().__init__()
        assert without in ("", *WAITS)
        self.without = without
        self.clocks = [[0, 0, 0] for _ in range(3)]
        self.accesses = []  # who, when, what was before, from, to, whether it writes
        self.places = []  # memory that steps share, and since which access it is looked at
        self.computed = []  # likewise, what was computed for a step
        self.kept = []  # so that nothing else comes to lie there
        self.waits = []  # events that the host waited for
        self.started_before = []  # kernels started before each of these waits

    def step(self, who):
        """Something that `who` does after all that it did, and after what the host did before it was started."""
        if who != HOST:
            self.join(who, self.clocks[HOST])
        self.clocks[who][who] += 1

    def join(self, who, clock):
        self.clocks[who] = [max(a, b) for a, b in zip(self.clocks[who], clock, strict=True)]

    def touch(self, who, x, *, writes):
        self.step(who)
        low, high = byte_bounds(x)
        self.accesses.append((who, self.clocks[who][who], tuple(self.clocks[who]), low, high, writes))

    def pinned(self, shape, dtype):
        made = super().pinned(shape, dtype).view(Watched)
        made.device = self
        self.places.append((made, len(self.accesses)))
        return made

    def view(self, x, name):
        made = super().view(x, name)
        if name == "there" and not any(x is known for known in self.kept):
            self.kept.append(x)
            self.places.append((made.pointer, 0))  # what the device did there before counts, in memory of its pool
        if name == "fetched":  # what the caller's stream has just computed
            self.kept.append(x)
            self.computed.append((made.pointer, len(self.accesses)))
            self.touch(STREAM, made.pointer, writes=True)
        return made

    def copy(self, to, source):
        for x, writes in ((to, True), (source, False)):
            self.touch(SIDE, np.asarray(x.pointer if isinstance(x, View) else x), writes=writes)
        to, source = (x.pointer if isinstance(x, View) else np.asarray(x) for x in (to, source))
        np.copyto(to, source)

    def mark(self, *, side=False):
        who = SIDE if side else STREAM
        self.step(who)
        return tuple(self.clocks[who])

    def follow(self, event, *, side=False):
        who = SIDE if side else STREAM
        self.step(who)
        if self.without != f"{_caller()}: follow{' on the side' if side else ''}":
            self.join(who, event)

    def wait(self, event):
        self.step(HOST)
        self.waits.append(event)
        self.started_before.append(len(self.started))
        if self.without != f"{_caller()}: wait":
            self.join(HOST, event)

    def kernel(self, source_name, name):
        launch = super().kernel(source_name, name)

        def traced(grid, block, arguments, shared_bytes):
            for x in arguments:
                if isinstance(x, np.ndarray) and x.size:
                    self.touch(STREAM, x, writes=x.flags.writeable)
            launch(grid, block, arguments, shared_bytes)

        return traced

    def races(self):
        """Pairs of accesses to one place, a write among them, of which neither is after the other."""
        found = 0
        for place, since in (*self.places, *self.computed):
            low, high = byte_bounds(np.asarray(place))
            here = [a for a in self.accesses[since:] if a[3] < high and a[4] > low]
            for n, (who, at, _, first, end, writes) in enumerate(here):
                for other, _, known, start, until, writes_too in here[n + 1 :]:
                    overlap = first < until and start < end
                    found += other != who and overlap and (writes or writes_too) and known[who] < at
        return found


def watch_merges(monkeypatch):
    """Merges tell a traced device what they read: they copy parts side by side without its help."""
    real = host_kv_cache.merge

    def traced(parts, *, dtype, device):
        for x in (x for part in parts for x in part):
            device.touch(STREAM, np.asarray(x), writes=False)
        return real(parts, dtype=dtype, device=device)

    monkeypatch.setattr(host_kv_cache, "merge", traced)
