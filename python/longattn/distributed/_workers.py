"""Workers as threads, which pass arrays to each other by reference and count the bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


class Exchange:
    """What workers send to each other: messages by receiver and tag, each received once."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        #: Bytes that each worker sent to others.
        self.sent = np.zeros(workers, np.int64)
        self._messages: dict[tuple[int, Hashable], Any] = {}
        self._changed = threading.Condition()
        self._failed = False

    def send(self, sender: int, receiver: int, tag: Hashable, message: Any) -> None:
        """Never waits: what is received later overlaps with the sender's work."""
        with self._changed:
            self._messages[receiver, tag] = message
            if sender != receiver:
                self.sent[sender] += _nbytes(message)
            self._changed.notify_all()

    def receive(self, receiver: int, tag: Hashable) -> Any:
        """Waits for the message.

        Raises:
            RuntimeError: another worker failed.
        """
        key = receiver, tag
        with self._changed:
            self._changed.wait_for(lambda: self._failed or key in self._messages)
            if self._failed:
                raise _OtherFailed
            return self._messages.pop(key)

    def all_gather(self, worker: int, tag: Hashable, message: Any) -> list[Any]:
        """Every worker's message, in the order of workers."""
        for other in range(self.workers):
            self.send(worker, other, (tag, worker), message)
        return [self.receive(worker, (tag, other)) for other in range(self.workers)]

    def fail(self) -> None:
        """Lets all who wait fail."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()


class _OtherFailed(RuntimeError):
    """Raised where a worker waits for one that failed."""


def run_workers(exchange: Exchange, body: Callable[[int], T]) -> list[T]:
    """What `body(worker)` returns for each worker, run at the same time; the first failure is raised."""
    results: list[Any] = [None] * exchange.workers
    errors: list[BaseException | None] = [None] * exchange.workers

    def run(worker: int) -> None:
        try:
            results[worker] = body(worker)
        except BaseException as error:
            errors[worker] = error
            exchange.fail()

    threads = [threading.Thread(target=run, args=(worker,)) for worker in range(1, exchange.workers)]
    for thread in threads:
        thread.start()
    run(0)
    for thread in threads:
        thread.join()
    found = [error for error in errors if error is not None]
    causes = [error for error in found if not isinstance(error, _OtherFailed)]
    if found:
        raise (causes or found)[0]
    return results


def _nbytes(message: Any) -> int:
    """Of the arrays in a message."""
    if isinstance(message, np.ndarray):
        return message.nbytes
    if isinstance(message, tuple | list):
        return sum(map(_nbytes, message))
    return 0
