"""Offsets of sampling points that a small network predicts from the queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array
from longattn._checks import finite, integer, one_of
from longattn.vision._inputs import Float32, layer_norm, norm_weights, numbers
from longattn.vision.convolution import depthwise_convolution, gelu

#: Where sampling points are before their offsets.
REFERENCES = ("code", "symmetric", "corners")


@dataclass(frozen=True, slots=True)
class Offsets:
    """A depth-wise convolution, a layer norm (or none), a gelu and a projection to one number per axis."""

    kernel: Float32
    norm: tuple[Float32, Float32] | None
    project: Float32
    stride: int
    range_factor: float
    reference: str

    @classmethod
    def of(
        cls, kernel: Array, project: Array, norm: Any, *, stride: object, range_factor: object, reference: object,
        channels: int, dims: int,
    ) -> Offsets:  # fmt: skip
        """From what a caller passed."""
        taps = numbers(kernel, "offset_kernel", (*(None,) * dims, channels))
        out = numbers(project, "offset_weights", (channels, dims))
        one_of(reference, "reference", REFERENCES)
        normed = None if norm is None else norm_weights(norm, "offset_norm", channels)
        return cls(
            taps, normed, out, integer(stride, "stride", 1), finite(range_factor, "range_factor"), str(reference)
        )

    def positions(self, features: Float32) -> Float32:
        """Coordinates from -1 to 1 of the sampling points for a grid of features, `[B, Y1, .., Yn, n]`."""
        taps = self.kernel.shape[:-1]
        # No padding where the kernel is as large as its step.
        padding = [0 if k == self.stride else k // 2 for k in taps]
        h = depthwise_convolution(features, self.kernel, stride=self.stride, padding=padding)
        if self.norm is not None:
            h = layer_norm(h, *self.norm)
        offsets: Float32 = gelu(h) @ self.project
        extents = offsets.shape[1:-1]
        reach = np.array([1 / max(n - 1, 1) for n in extents], np.float32)
        if self.range_factor >= 0:
            offsets = np.tanh(offsets) * np.float32(self.range_factor) * reach
        at = reference_points(extents, self.reference).astype(np.float32) + offsets
        return at if self.range_factor >= 0 else np.clip(at, -1, 1)


def reference_points(extents: tuple[int, ...], convention: str) -> NDArray[np.float64]:
    """Coordinates of the points of a coarse grid, `[Y1, .., Yn, n]`; 0 along an axis of one point.

    "code": `2 (i + 0.5) / (Y - 1) - 1`; "symmetric": `2 (i + 0.5) / Y - 1`; "corners": `2 i / (Y - 1) - 1`.
    """
    shift, less = {"code": (0.5, 1), "symmetric": (0.5, 0), "corners": (0.0, 1)}[convention]
    lines = [np.zeros(1) if n == 1 else 2 * (np.arange(n) + shift) / (n - less) - 1 for n in extents]
    return np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1)
