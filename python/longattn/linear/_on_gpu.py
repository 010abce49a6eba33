"""Recurrences of arrays of a GPU, which `longattn.gpu.chunked_recurrence` computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import gpu
from longattn._arrays import Array
from longattn.linear._recurrence import CHUNK


def recurrence_on_gpu(
    q: Array,
    k: Array,
    v: Array,
    *,
    g: Array | None = None,
    beta: Array | None = None,
    scale: float | None = None,
    initial_state: Array | None = None,
    chunk_size: object = CHUNK,
    **refused: object,
) -> tuple[Array, Array]:
    """The recurrence of a method; `refused`: its options that kernels do not have, which must be off.

    Raises:
        ValueError: an option that is not offered there.
    """
    for name, value in {**refused, "chunk_size": None if chunk_size == CHUNK else chunk_size}.items():
        if value is not None and value is not False:
            raise ValueError(f"{name}: not offered for arrays of a GPU")
    found: tuple[Array, Array] = gpu.chunked_recurrence(q, k, v, g, beta, scale=scale, initial_state=initial_state)
    return found


def decays_on_gpu(x: Array | None, v: Array, log_decays: Callable[[Any, Array], NDArray[Any]]) -> Any:
    """Log decays per head on the device of `v`, from what a method takes, on the host or on the device."""
    device = gpu.device_of(v, "v")
    on_host = device.download(x)() if gpu.is_on_gpu(x) else x
    return device.upload(np.ascontiguousarray(log_decays(on_host, v), np.float32), v)
