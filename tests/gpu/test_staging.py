"""Steps over two memories share places of page-locked memory: what is written there nobody reads at that time."""

import pytest

import longattn as la
import tolerances
from emu import emulator
from emu.device import EmulatorDevice
from emu.traced import SIDE, STREAM, WAITS, Traced, watch_merges
from gpu.test_host_kv_cache import arrays, cache_of
from longattn.gpu._staging import staging_of
from longattn.reference import dense as reference
from random_arrays import BF16, F32

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64")


@pytest.fixture
def merged(monkeypatch):
    watch_merges(monkeypatch)


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


@pytest.mark.parametrize("without", WAITS)
def test_a_missing_wait_is_a_race(rng, merged, without):
    """Each of them is needed: the check finds what happens without it."""
    device = Traced(without)
    given = layers(rng, device, 4)
    for _ in range(2):
        for finish in [cache.start(q, top_k=120) for cache, q, _, _ in given]:
            finish()
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
