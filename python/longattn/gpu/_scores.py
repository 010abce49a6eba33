"""Options of scores on a GPU: checked, and in the order in which kernels take them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np

from longattn._checks import check_relative_shape, check_state_shapes, relative_entry, scale_factor, softcap_value
from longattn._score_options import ScoreOptions, check_names
from longattn.gpu._checks import window_ends
from longattn.gpu._device import Device, View

LOG2_E = math.log2(math.e)
#: Kernels without options multiply minus infinity by the factor; devices take numbers below this one for 0.
_LEAST_FACTOR = 2.0**-126


@dataclass(frozen=True, slots=True)
class Scores:
    """What becomes of dot products before the softmax, and what else enters it.

    Attributes:
        factor: of all of them, in units of log 2.
        softcap: in the same units; 0 is off.
        scales: factors per row `[B, Hq, Lq]` in the place of `factor`, by strides.
        slopes: `[B, Hq]`, of ALiBi.
        bias: `[B, Hq, Lq, Lk]`, by strides.
        sinks: `[Hq]`.
        mask: `[B, Hq, Lq, Lk]`, by strides.
        relative: `[Hq, n]`, and the entry of distance 0.
        relative_zero: that entry.
        segments: `[B, Lq]` and `[B, Lk]`, the batch by its stride.
        until: `[B, Lk]`, likewise.
        first_key: position of the first key, where those before it are left out.
        state: output of an earlier part and its log-sum-exp, in the layout of this call's.
    """

    factor: float
    softcap: float = 0.0
    scales: View | None = None
    slopes: View | None = None
    bias: View | None = None
    sinks: View | None = None
    mask: View | None = None
    relative: View | None = None
    relative_zero: int = 0
    segments: tuple[View, View] | None = None
    until: View | None = None
    first_key: int = 0
    state: tuple[View, View] | None = None

    @property
    def plain(self) -> bool:
        """Whether there is nothing but the factor, and that is above 0 for the device, too."""
        arrays = self.scales, self.slopes, self.bias, self.sinks, self.mask, self.relative, self.until
        pairs = self.segments, self.state
        return self.factor >= _LEAST_FACTOR and not self.softcap and all(x is None for x in (*arrays, *pairs))

    def from_key(self, device: Device, first: int) -> Scores:
        """The same for keys from `first` on."""
        if first == 0:
            return self

        def moved(view: View | None, name: str) -> View | None:
            if view is None or view.owner.shape[-1] == 1:
                return view
            there = device.view(view.owner[..., first:], name)
            return replace(view, pointer=there.pointer, address=there.address)

        segments = self.segments and (self.segments[0], moved(self.segments[1], "segments[1]") or self.segments[1])
        return replace(
            self,
            bias=moved(self.bias, "bias"),
            mask=moved(self.mask, "mask"),
            until=moved(self.until, "visible_until"),
            segments=segments,
            first_key=first,
        )

    def arguments(self) -> tuple[Any, ...]:
        """Of a kernel, `SCORE_ARGUMENTS`."""

        def of(view: View | None, axes: int = 0) -> tuple[Any, ...]:
            if view is None:
                return None, *(np.int64(0),) * axes
            return view.pointer, *(np.int64(stride) for stride in view.strides[:axes])

        own, of_keys = self.segments or (None, None)
        entries = 0 if self.relative is None else self.relative.shape[1]
        state, state_lse = self.state or (None, None)
        return (
            np.float32(self.softcap),
            *of(self.scales, 3),
            *of(self.slopes, 1),
            *of(self.bias, 4),
            *of(self.sinks),
            *of(self.mask, 4),
            *of(self.relative),
            np.int32(entries),
            np.int32(self.relative_zero),
            *of(own),
            *of(of_keys),
            *(np.int64(0 if x is None else x.strides[0]) for x in (own, of_keys)),
            *of(self.until, 1),
            np.int32(self.first_key),
            *of(state),
            *of(state_lse),
        )


def scores_of(
    device: Device,
    shape: tuple[int, ...],
    keys: int,
    *,
    state: Any = None,
    out_shape: tuple[int, ...] | None = None,
    **given: Unpack[ScoreOptions],
) -> tuple[Scores, tuple[int, int]]:
    """The options of queries of this shape over `keys` keys, and how far rows see; `out_shape`: of a packed output.

    Raises:
        TypeError: an array that is not float32, or of no GPU; an unknown option.
        ValueError: a shape that does not fit, or a number out of range.
    """
    check_names(given)
    batch, heads, rows, dim = shape
    scale: Any = given.get("scale")
    scales, factor = None, 1.0
    if hasattr(scale, "shape") and scale.shape != ():
        scales = _broadcast(device, scale, "scale", (batch, heads, rows), (((heads,), 1), ((heads, rows), 0)))
    else:
        factor = scale_factor(scale, dim)
    slopes, alibi_slopes = None, given.get("alibi_slopes")
    if alibi_slopes is not None:
        _floats(device, alibi_slopes, "alibi_slopes")
        slopes = _broadcast(device, device.contiguous(alibi_slopes), "alibi_slopes", (batch, heads), (((heads,), 0),))
    full = batch, heads, rows, keys
    bias = given.get("bias")
    added = None if bias is None else _over_scores(_floats(device, bias, "bias"), "bias", full)
    hidden = None
    if (mask := given.get("mask")) is not None:
        of_mask = device.view(mask, "mask")
        if of_mask.dtype != "bool":
            raise TypeError(f"mask: got dtype {of_mask.dtype}, expected bool (a mask to add goes to bias)")
        hidden = _over_scores(of_mask, "mask", full)
    shares = None
    if (sinks := given.get("sinks")) is not None:
        _floats(device, sinks, "sinks")
        shares = device.view(device.contiguous(sinks), "sinks")
        if shares.shape != (heads,):
            raise ValueError(f"sinks: got shape {shares.shape}, expected ({heads},)")
    relative, zero = _relative(device, given.get("relative_bias"), given.get("relative_zero"), heads)
    segments, until = given.get("segments"), given.get("visible_until")
    scores = Scores(
        factor * LOG2_E,
        softcap_value(given.get("softcap", 0.0)) * LOG2_E,
        scales,
        slopes,
        added,
        shares,
        hidden,
        relative,
        zero,
        None if segments is None else _segments(device, segments, batch, rows, keys),
        None if until is None else _rows(device, until, "visible_until", batch, keys),
        state=None
        if state is None
        else _state(device, state, out_shape or shape, shape[:3] if out_shape is None else shape[1:3]),
    )
    return scores, window_ends(given.get("causal", False), given.get("window", (-1, -1)), rows + keys)


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


def _over_scores(view: View, name: str, full: tuple[int, ...]) -> View:
    if len(view.shape) > 4 or any(n not in (1, m) for n, m in zip(view.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"{name}: got shape {view.shape}, expected one that broadcasts to {full}")
    missing = 4 - len(view.shape)
    strides = tuple(0 if n == 1 else s for n, s in zip(view.shape, view.strides, strict=True))
    return replace(view, shape=full, strides=(0,) * missing + strides)


def _relative(device: Device, table: Any, zero: object, heads: int) -> tuple[View | None, int]:
    if table is None:
        if zero is not None:
            raise ValueError(f"relative_zero: got {zero!r} without relative_bias, expected both or neither")
        return None, 0
    _floats(device, table, "relative_bias")
    view = device.view(device.contiguous(table), "relative_bias")
    check_relative_shape(view.shape, heads)
    return view, relative_entry(zero, view.shape[1])


def _segments(device: Device, segments: Any, batch: int, rows: int, keys: int) -> tuple[View, View]:
    if not isinstance(segments, tuple | list) or len(segments) != 2:
        raise TypeError(f"segments: got {type(segments).__name__}, expected a pair (q_segments, k_segments)")
    return (
        _rows(device, segments[0], "segments[0]", batch, rows),
        _rows(device, segments[1], "segments[1]", batch, keys),
    )


def _rows(device: Device, x: Any, name: str, batch: int, length: int) -> View:
    """Integers per row as `[B, length]`, the batch by its stride."""
    view = device.view(x, name)
    if view.dtype != "int32":
        raise TypeError(f"{name}: got dtype {view.dtype}, expected int32 on a GPU")
    if view.shape not in ((length,), (batch, length)):
        raise ValueError(f"{name}: got shape {view.shape}, expected {(length,)} or {(batch, length)}")
    if view.strides[-1] != 1:
        view = device.view(device.contiguous(x), name)
    return view if len(view.shape) == 2 else replace(view, shape=(batch, length), strides=(0, 1))


def _state(device: Device, state: Any, out_shape: tuple[int, ...], lse_shape: tuple[int, ...]) -> tuple[View, View]:
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise TypeError(f"state: got {type(state).__name__}, expected a pair (o, lse)")
    o, lse = (_floats(device, x, name) for x, name in zip(state, ("state o", "state lse"), strict=True))
    check_state_shapes(o.shape, lse.shape, out_shape, lse_shape)
    return device.view(device.contiguous(state[0]), "state o"), device.view(device.contiguous(state[1]), "state lse")
