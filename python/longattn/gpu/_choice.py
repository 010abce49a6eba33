"""The rows with the largest scores: the end of every scan on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from longattn.gpu._device import Device, View

#: Rows of a block of a scan and of the choice.
ROWS = 2048
THREADS = 256


def threshold_step(device: Device, source: str, score: str, counts: View, threshold: View, k: int) -> None:
    """Starts the search of the bin with the k-th largest score; with `k` below 0 of what the step before left."""
    *heads, bins = counts.shape
    arguments = counts.pointer, threshold.pointer, np.int32(bins), np.int32(k)
    launch = device.kernel(source, f"choice_threshold_{score}")
    launch((int(np.prod(heads)),), (THREADS,), arguments, 4 * THREADS)


def rows_above(device: Device, source: str, score: str, scores: View, threshold: View, k: int) -> Any:
    """Starts the collection of the rows from a threshold on: int32 `[B, H, k]`, ascending."""
    batch, heads, rows = scores.shape
    blocks = -(-rows // ROWS)
    found = device.view(device.empty((batch, heads, blocks, 2), "int32", scores.owner), "found")
    chosen = device.empty((batch, heads, k), "int32", scores.owner)
    across = (blocks, heads, batch)
    device.kernel(source, f"choice_count_{score}")(
        across, (THREADS,), (scores.pointer, threshold.pointer, found.pointer, np.int32(rows)), 8
    )
    to = device.view(chosen, "chosen").pointer
    device.kernel(source, f"choice_rows_{score}")(
        across,
        (THREADS,),
        (scores.pointer, threshold.pointer, found.pointer, to, np.int32(rows), np.int32(k)),
        8 * (THREADS // 32),
    )
    return chosen
