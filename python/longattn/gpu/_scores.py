"""Options of scores on a GPU: checked, and in the order in which kernels take them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longattn._checks import scale_factor, softcap_value
from longattn.gpu._device import Device, View

LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Scores:
    """What becomes of dot products before the softmax.

    Attributes:
        factor: of all of them, in units of log 2.
        softcap: in the same units; 0 is off.
        scales: factors per row `[B, Hq, Lq]` in the place of `factor`, by strides.
        slopes: `[B, Hq]`, of ALiBi.
        bias: `[B, Hq, Lq, Lk]`, by strides.
        sinks: `[Hq]`.
    """

    factor: float
    softcap: float = 0.0
    scales: View | None = None
    slopes: View | None = None
    bias: View | None = None
    sinks: View | None = None

    @property
    def plain(self) -> bool:
        """Whether there is nothing but the factor."""
        return not self.softcap and all(x is None for x in (self.scales, self.slopes, self.bias, self.sinks))

    def from_key(self, device: Device, first: int) -> Scores:
        """The same for keys from `first` on."""
        if self.bias is None or first == 0 or self.bias.strides[3] == 0:
            return self
        moved = device.view(self.bias.owner[..., first:], "bias")
        return replace(self, bias=replace(self.bias, pointer=moved.pointer, address=moved.address))

    def arguments(self) -> tuple[Any, ...]:
        """Of a kernel, `SCORE_ARGUMENTS`."""

        def of(view: View | None, axes: int) -> tuple[Any, ...]:
            if view is None:
                return None, *(np.int64(0),) * axes
            return view.pointer, *(np.int64(stride) for stride in view.strides[:axes])

        return (
            np.float32(self.softcap),
            *of(self.scales, 3),
            *of(self.slopes, 1),
            *of(self.bias, 4),
            *of(self.sinks, 0),
        )


def scores_of(
    device: Device,
    shape: tuple[int, ...],
    keys: int,
    *,
    scale: Any = None,
    softcap: object = 0.0,
    bias: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
) -> Scores:
    """The options of queries of this shape over `keys` keys.

    Raises:
        TypeError: an array that is not float32, or of no GPU.
        ValueError: a shape that does not fit, or a number out of range.
    """
    batch, heads, rows, dim = shape
    scales, factor = None, 1.0
    if hasattr(scale, "shape") and scale.shape != ():
        scales = _broadcast(device, scale, "scale", (batch, heads, rows), (((heads,), 1), ((heads, rows), 0)))
    else:
        factor = scale_factor(scale, dim)
    slopes = None
    if alibi_slopes is not None:
        _floats(device, alibi_slopes, "alibi_slopes")
        slopes = _broadcast(device, device.contiguous(alibi_slopes), "alibi_slopes", (batch, heads), (((heads,), 0),))
    added = None if bias is None else _bias(device, bias, (batch, heads, rows, keys))
    shares = None
    if sinks is not None:
        _floats(device, sinks, "sinks")
        shares = device.view(device.contiguous(sinks), "sinks")
        if shares.shape != (heads,):
            raise ValueError(f"sinks: got shape {shares.shape}, expected ({heads},)")
    return Scores(factor * LOG2_E, softcap_value(softcap) * LOG2_E, scales, slopes, added, shares)


def _floats(device: Device, x: Any, name: str) -> View:
    view = device.view(x, name)
    if view.dtype != "float32":
        raise TypeError(f"{name}: got dtype {view.dtype}, expected float32 on a GPU")
    return view


def _broadcast(
    device: Device, x: Any, name: str, full: tuple[int, ...], shorter: tuple[tuple[tuple[int, ...], int], ...]
) -> View:
    """An array of the full shape, or of a shorter one that lacks axes in front and as many behind as is said."""
    view = _floats(device, x, name)
    if view.shape == full:
        return view
    for shape, behind in shorter:
        if view.shape == shape:
            before = len(full) - len(shape) - behind
            return replace(view, shape=full, strides=(0,) * before + view.strides + (0,) * behind)
    expected = ", ".join(str(shape) for shape, _ in (*shorter, (full, 0)))
    raise ValueError(f"{name}: got shape {view.shape}, expected one of {expected}")


def _bias(device: Device, bias: Any, full: tuple[int, ...]) -> View:
    view = _floats(device, bias, "bias")
    if len(view.shape) > 4 or any(n not in (1, m) for n, m in zip(view.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"bias: got shape {view.shape}, expected one that broadcasts to {full}")
    missing = 4 - len(view.shape)
    strides = tuple(0 if n == 1 else s for n, s in zip(view.shape, view.strides, strict=True))
    return replace(view, shape=full, strides=(0,) * missing + strides)
