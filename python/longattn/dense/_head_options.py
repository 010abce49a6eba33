"""Options of `attention` that hold something per query head, for calls over some of the heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longattn._arrays import Array, as_numpy
from longattn.dense._options import is_array

#: Where the axis of query heads lies, from the end.
_HEAD_AXIS = {"alibi_slopes": -1, "sinks": -1, "relative_bias": -2, "bias": -3, "mask": -3}
#: These may broadcast over heads.
_BROADCAST = ("bias", "mask")


def options_of_heads(options: Mapping[str, Any], part: slice, heads: int) -> dict[str, Any]:
    """The options for `part` of the `heads` query heads: views where they are arrays, everything else as it is.

    Raises:
        TypeError: an option that should be an array is none.
        ValueError: an array whose axis of heads has another length.
    """
    return {name: _of_heads(name, value, part, heads) for name, value in options.items()}


def _of_heads(name: str, value: Any, part: slice, heads: int) -> Any:
    if value is None:
        return None
    if name in _HEAD_AXIS:
        return _sliced(name, value, _HEAD_AXIS[name], part, heads)
    if name == "scale" and is_array(value):
        axis = -1 if as_numpy(value, name, any_strides=True).ndim == 1 else -2
        return _sliced(name, value, axis, part, heads)
    if name == "state" and isinstance(value, tuple | list) and len(value) == 2:
        return _sliced("state o", value[0], -3, part, heads), _sliced("state lse", value[1], -2, part, heads)
    return value


def _sliced(name: str, value: Array, axis: int, part: slice, heads: int) -> Any:
    x = as_numpy(value, name, any_strides=True)
    if name in _BROADCAST and (x.ndim < -axis or x.shape[axis] == 1):
        return x
    if x.ndim < -axis or x.shape[axis] != heads:
        raise ValueError(f"{name}: got shape {x.shape}, expected {heads} query heads on axis {axis}")
    after: tuple[Any, ...] = (slice(None),) * (-axis - 1)
    index: Any = (..., part, *after)
    return x[index]
