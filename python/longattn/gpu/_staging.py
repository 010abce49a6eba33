"""Page-locked memory between a device and the host: places of each kind that steps take in turns.

Copies go on a stream of their own. Nobody waits for the device as a whole: a stream waits for what it reads, the host
for a query that it needs, and whoever writes into a place for its last reader. A place is taken again when the other
one of its kind has been, so that this reader is that of the step before the last, which is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from longattn.gpu._device import Device, View

#: Of each kind; more only where more steps are under way at once.
_PLACES = 2


@dataclass(slots=True)
class _Place:
    """Memory of the host, and of the device where what is sent there arrives.

    Attributes:
        host: page-locked.
        there: of the device; `None` for what is fetched.
        copied: event after the last copy.
        read: event after the last reader of `there`.
    """

    host: NDArray[Any]
    there: Any
    copied: Any = None
    read: Any = None


@dataclass(frozen=True, slots=True)
class Sent:
    """A partial result on its way to the device, which the caller's stream waits for.

    Attributes:
        out: float32 on the device.
        lse: likewise.
        done: to be called after what reads both has been started.
    """

    out: Any
    lse: Any
    done: Callable[[], None]


class Staging:
    """The places of one device, which all layers and sequences share."""

    def __init__(self) -> None:
        self._places: dict[Hashable, deque[_Place]] = {}
        self._made: dict[Hashable, int] = {}

    def fetch(self, device: Device, x: Any) -> Callable[[], NDArray[np.float32]]:
        """Starts a copy of an array of the device; the result waits for it and gives the numbers."""
        view = device.view(device.contiguous(x), "fetched")
        kind = "fetched", view.shape, view.dtype
        place = self._take(kind, lambda: _Place(device.pinned(view.shape, view.dtype), None))
        device.follow(device.mark(), side=True)
        device.copy(place.host, view)
        place.copied = device.mark(side=True)

        def arrived(of: View = view) -> NDArray[np.float32]:  # which keeps alive what the copy reads
            device.wait(place.copied)
            numbers: NDArray[np.float32] = place.host.astype(np.float32).reshape(of.shape)
            self._places[kind].append(place)
            return numbers

        return arrived

    def send(self, device: Device, out: NDArray[Any], lse: NDArray[Any], like: Any) -> Sent:
        """Starts a copy of a partial result into memory of the kind of `like`."""
        split, size = out.size, out.size + lse.size
        kind = "sent", size, type(like)

        def made() -> _Place:
            # Memory that the device has just given out may still be in use by what it was given to before.
            there = device.empty((size,), "float32", like)
            return _Place(device.pinned((size,), "float32"), there, read=device.mark())

        place = self._take(kind, made)
        if place.copied is not None:
            device.wait(place.copied)
        place.host[:split], place.host[split:] = out.ravel(), lse.ravel()
        device.follow(place.read, side=True)
        device.copy(device.view(place.there, "there"), place.host)
        place.copied = device.mark(side=True)
        device.follow(place.copied)

        def done() -> None:
            place.read = device.mark()
            self._places[kind].append(place)

        with device.used():
            both = place.there[:split].reshape(*out.shape), place.there[split:].reshape(*lse.shape)
        return Sent(*both, done)

    def _take(self, kind: Hashable, make: Callable[[], _Place]) -> _Place:
        """The place of a kind whose turn it is; a new one while there are fewer than two, or all are taken."""
        free = self._places.setdefault(kind, deque())
        if free and self._made[kind] >= _PLACES:
            return free.popleft()
        self._made[kind] = self._made.get(kind, 0) + 1
        return make()


_OF_DEVICES: WeakKeyDictionary[Device, Staging] = WeakKeyDictionary()


def staging_of(device: Device) -> Staging:
    """The places of a device."""
    return _OF_DEVICES.setdefault(device, Staging())
