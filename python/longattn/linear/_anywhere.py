"""Recurrences of arrays of the CPU or, by `longattn.gpu.chunked_recurrence`, of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn import gpu
from longattn._arrays import Array
from longattn.linear._recurrence import CHUNK, Common, recurrence
from longattn.linear.feature_map import FeatureMap


def recurrence_anywhere(
    q: Array,
    k: Array,
    v: Array,
    common: Common,
    *,
    g: Array | None = None,
    of_heads: tuple[str, Array | None, Callable[[Any, Array], NDArray[Any]]] | None = None,
    beta: Array | None = None,
    unit: float | None = None,
    normaliser: float | None = None,
    maps: tuple[FeatureMap | None, FeatureMap | None] = (None, None),
    channels: bool = False,
    delta: bool = False,
) -> tuple[Array, Array]:
    """`recurrence` of a method that has kernels for a GPU, where its arrays are.

    Args:
        q: queries.
        k: keys.
        v: values.
        common: as of `recurrence`.
        g: as of `recurrence`.
        of_heads: in place of `g`, the name of what a method takes for each head, that, and what makes log decays of it
            and `v`.
        beta: as of `recurrence`.
        unit: as of `recurrence`.
        normaliser: as of `recurrence`.
        maps: as of `recurrence`.
        channels: as of `recurrence`.
        delta: as of `recurrence`.

    Returns:
        `(output, states)`.

    Raises:
        ValueError: an option that kernels of a GPU do not have.
    """
    if not gpu.is_on_gpu(q):
        name = "g"
        if of_heads is not None:
            name, given, log_decays = of_heads
            g = log_decays(given, v)
        return recurrence(
            q, k, v, common, g=g, g_name=name, beta=beta, unit=unit, normaliser=normaliser, maps=maps,
            channels=channels, delta=delta,
        )  # fmt: skip
    refused = {
        "feature_map": maps[0],
        "normalize": normaliser,
        "normalize_qk": unit,
        "out_state": common.out_state,
        "cu_seqlens": common.cu_seqlens,
        "out": common.out,
        "chunk_size": None if common.chunk_size == CHUNK else common.chunk_size,
    }
    for name, value in refused.items():
        if value is not None:
            raise ValueError(f"{name}: not offered for arrays of a GPU")
    if of_heads is not None:
        g = _decays(of_heads[1], v, of_heads[2])
    scale: Any = common.scale
    found: tuple[Array, Array] = gpu.chunked_recurrence(
        q, k, v, g, beta, scale=scale, initial_state=common.initial_state
    )
    return found


def _decays(x: Array | None, v: Array, log_decays: Callable[[Any, Array], NDArray[Any]]) -> Any:
    """Log decays per head on the device of `v`, from what a method takes, on the host or on the device."""
    device = gpu.device_of(v, "v")
    on_host = device.download(x)() if gpu.is_on_gpu(x) else x
    return device.upload(np.ascontiguousarray(log_decays(on_host, v), np.float32), v)
