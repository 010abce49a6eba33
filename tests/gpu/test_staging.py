"""Steps over two memories share places of page-locked memory: what is written there nobody reads at that time.

A back end that knows what happened after what (a clock per stream and for the host, as race detectors have them) looks
at each access to the places.
"""

import numpy as np
import pytest
from numpy.lib.array_utils import byte_bounds

import longattn as la
import tolerances
from emu import emulator
from emu.device import EmulatorDevice
from gpu.test_host_kv_cache import arrays, cache_of
from longattn.gpu import host_kv_cache
from longattn.gpu._device import View
from longattn.gpu._staging import staging_of
from longattn.reference import dense as reference
from random_arrays import BF16, F32

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64")
HOST, STREAM, SIDE = range(3)


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

    `without`: what it forgets to do, "follow", "follow on the side" or "wait".
    """

    def __init__(self, without=""):
        super().__init__()
        self.without = without
        self.clocks = [[0, 0, 0] for _ in range(3)]
        self.accesses = []  # who, when, what was before, from, to, whether it writes
        self.places = []
        self.waits = []

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
        if name == "there" and not any(x is place for place, _ in self.places):
            self.places.append((x, 0))  # what the device did there before counts, in memory of its pool
        return super().view(x, name)

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
        if self.without != ("follow on the side" if side else "follow"):
            self.join(who, event)

    def wait(self, event):
        self.step(HOST)
        self.waits.append(event)
        if self.without != "wait":
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
        for place, since in self.places:
            low, high = byte_bounds(np.asarray(place))
            here = [a for a in self.accesses[since:] if a[3] < high and a[4] > low]
            for n, (who, at, _, first, end, writes) in enumerate(here):
                for other, _, known, start, until, writes_too in here[n + 1 :]:
                    overlap = first < until and start < end
                    found += other != who and overlap and (writes or writes_too) and known[who] < at
        return found


@pytest.fixture
def merged(monkeypatch):
    """Merges tell a traced device what they read: they copy parts side by side without its help."""
    real = host_kv_cache.merge

    def traced(parts, *, dtype, device):
        for x in (x for part in parts for x in part):
            device.touch(STREAM, np.asarray(x), writes=False)
        return real(parts, dtype=dtype, device=device)

    monkeypatch.setattr(host_kv_cache, "merge", traced)


def layers(rng, device, count, keys=120, dtype=F32):
    """Caches that share a device, and what each should answer."""
    made = []
    for _ in range(count):
        q, k, v = arrays(rng, dtype, keys)
        cache = cache_of(device, dtype)
        cache.append(k, v)
        made.append((cache, q, k, v))
    return made


def check(out, q, k, v):
    tolerances.device_attention(q, k, v).check(out, reference.attention(q, k, v))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_steps_one_after_another(rng, merged, dtype):
    """Of three layers and five tokens, through two places of each kind."""
    device = Traced()
    given = layers(rng, device, 3, dtype=dtype)
    for _ in range(5):
        for cache, q, k, v in given:
            check(cache.attend(q, top_k=120), q, k, v)
    # Two of queries, and two of what is sent, with as many on the device.
    assert len(device.places) == 2 + 2 + 2 and not device.races()


def test_steps_at_once(rng, merged):
    """The next layer's query is on its way before this one's partial result has come back, and waits for nothing."""
    device = Traced()
    given = layers(rng, device, 4)
    pending = []
    for _ in range(3):
        for cache, q, k, v in given:
            waits, merges = len(device.waits), device.started.count("merge_f32")
            pending.append((cache.start(q, top_k=120), q, k, v))
            assert len(device.waits) == waits  # the host went on at once
            copied = next(a for a in reversed(device.accesses) if a[0] == SIDE)
            # Of this layer's own part a split has been merged; no other merge came in between.
            assert device.started.count("merge_f32") == merges + 1
            if len(pending) > 1:
                before = pending[-2]
                first, *others = before
                check(first(), *others)
                pending = pending[-1:]
                # What the step before reads is not in the past of this one's query.
                assert max(a[1] for a in device.accesses if a[0] == STREAM) > copied[2][STREAM]
    finish, *others = pending.pop()
    check(finish(), *others)
    assert len(device.places) == 6 and not device.races()


def test_more_steps_at_once_take_more_places(rng, merged):
    device = Traced()
    given = layers(rng, device, 4)
    for _ in range(2):
        pending = [cache.start(q, top_k=120) for cache, q, _, _ in given]
        for finish, (_, q, k, v) in zip(reversed(pending), reversed(given), strict=True):
            check(finish(), q, k, v)
    assert len(device.places) == 4 + 2 + 2 and not device.races()


def test_the_host_waits_for_the_step_before_the_last_at_most(rng, merged):
    """Before it writes a partial result; for its own query else."""
    device = Traced()
    ((cache, q, *_),) = layers(rng, device, 1)
    sent = []
    for _ in range(6):
        waits = len(device.waits)
        cache.attend(q, top_k=120)
        asked, *others = device.waits[waits:]
        assert asked not in sent and set(others) == set(sent[-2:-1])
        place = max((p for p in staging_of(device)._places.items() if p[0][0] == "sent"), key=lambda p: len(p[1]))
        sent.append(place[1][-1].copied)


@pytest.mark.parametrize("without", ["follow", "follow on the side", "wait"])
def test_a_missing_wait_is_a_race(rng, merged, without):
    """Each of them is needed: the check finds what happens without it."""
    device = Traced(without)
    ((cache, q, *_),) = layers(rng, device, 1)
    for _ in range(4):
        cache.attend(q, top_k=120)
    assert device.races()


def test_a_step_under_way(rng):
    """Nothing is appended, and a result is taken once."""
    device = EmulatorDevice()
    ((cache, q, k, v),) = layers(rng, device, 1)
    finish = cache.start(q, top_k=120)
    with pytest.raises(ValueError, match="append: got tokens while a step is under way"):
        cache.append(k[:, :, :1], v[:, :, :1])
    check(finish(), q, k, v)
    with pytest.raises(ValueError, match="start: got a second call"):
        finish()
    cache.append(k[:, :, :1], v[:, :, :1])
    pending = cache.start(q, top_k=0)  # which the host refuses
    with pytest.raises(ValueError, match="top_k"):
        pending()
    cache.append(k[:, :, :1], v[:, :, :1])


def test_without_rows_on_the_host_nothing_crosses_the_bus(rng):
    device = Traced()
    q, k, v = arrays(rng, F32, 20)
    cache = cache_of(device, F32)
    cache.append(k, v)
    check(cache.attend(q), q, k, v)
    assert not device.places and not device.waits
    assert isinstance(cache.store, la.KVStore)
