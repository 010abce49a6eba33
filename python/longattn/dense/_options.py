"""Options of attention calls: checked once, for every function that takes them, in the form the core reads."""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np
from numpy.typing import DTypeLike, NDArray

from longattn._arrays import Array
from longattn._checks import (
    bias_scores,
    flag,
    key_ends,
    mask_scores,
    per_head,
    relative_table,
    row_scales,
    scale_factor,
    segment_ids,
    skip_fraction,
    slopes_per_head,
    softcap_value,
    window_sides,
)


class Options(TypedDict, total=False):
    """What differs from plain softmax attention; names are those of the arguments.

    Arrays of floats are float32, for float64 queries float64, but for what a state holds.
    """

    scale: float | NDArray[Any]  # a number, or [B, Hq, Lq, 1]
    causal: bool
    window: tuple[int, int]
    softcap: float
    bias: NDArray[Any]  # [B, Hq, Lq, Lk], as mask
    mask: NDArray[np.bool_]
    alibi_slopes: NDArray[Any]  # [B, Hq]
    sinks: NDArray[Any]  # [Hq]
    relative_bias: NDArray[Any]  # [Hq, n]
    relative_zero: int
    segments: tuple[NDArray[np.int32], NDArray[np.int32]]  # [B, Lq] and [B, Lk]
    visible_until: NDArray[np.int32]  # [B, Lk]
    skip_threshold: float
    qk_int8: bool
    state: tuple[NDArray[Any], NDArray[Any]]  # [B, Hq, Lq, Dv] and [B, Hq, Lq]; for float64 [B, Hq, Lq, 1]


#: Options that `longattn.gpu` takes; all others must be as they are by default.
ON_GPU = frozenset(
    {
        "causal",
        "window",
        "scale",
        "softcap",
        "bias",
        "mask",
        "alibi_slopes",
        "sinks",
        "relative_bias",
        "relative_zero",
        "segments",
        "visible_until",
        "state",
    }
)


def gpu_options(**given: Any) -> dict[str, Any]:
    """The options of a call on arrays of a GPU, for the function of `longattn.gpu` of the same name.

    Raises:
        ValueError: an option that is not offered there is not off.
    """
    taken = {name: value for name, value in given.items() if name in ON_GPU}
    for name, value in given.items():
        off = value is None or (isinstance(value, bool | int | float) and not value)
        if name not in ON_GPU and not off:
            offered = ", ".join(sorted(taken))
            raise ValueError(f"{name}: not offered for arrays of a GPU, where options are {offered}")
    return taken


def is_array(x: object) -> bool:
    """Whether an argument that may be a number is an array."""
    return isinstance(x, np.ndarray) or hasattr(x, "__dlpack__")


def score_options(
    shape: tuple[int, ...],
    keys: int,
    *,
    span: int,
    dtype: DTypeLike = np.float32,
    causal: object = False,
    window: object = (-1, -1),
    scale: object = None,
    softcap: object = 0.0,
    bias: Array | None = None,
    mask: Array | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    relative_bias: Array | None = None,
    relative_zero: object = None,
    segments: object = None,
    visible_until: Array | None = None,
    skip_threshold: object = 0.0,
) -> Options:
    """Options of queries of shape `[..., Hq, Lq, D]` over `keys` keys, for arithmetic in `dtype`.

    Distances stay below `span`.
    """
    *outer, heads, length, dim = shape
    batch = outer[0] if outer else 1
    rows = shape[:-1]
    options: Options = {"scale": row_scales(scale, rows, dtype) if is_array(scale) else scale_factor(scale, dim)}
    if flag(causal, "causal"):
        options["causal"] = True
    sides = window_sides(window, span)
    if sides != (-1, -1):
        options["window"] = sides
    cap = softcap_value(softcap)
    if cap:
        options["softcap"] = cap
    if bias is not None:
        options["bias"] = bias_scores(bias, (*rows, keys), dtype)
    if mask is not None:
        options["mask"] = mask_scores(mask, (*rows, keys))
    if alibi_slopes is not None:
        options["alibi_slopes"] = slopes_per_head(alibi_slopes, shape[:-2], dtype)
    if sinks is not None:
        options["sinks"] = per_head(sinks, "sinks", heads, dtype)
    if relative_bias is not None:
        options["relative_bias"], options["relative_zero"] = relative_table(relative_bias, relative_zero, heads, dtype)
    elif relative_zero is not None:
        raise ValueError(f"relative_zero: got {relative_zero!r} without relative_bias, expected both or neither")
    if segments is not None:
        options["segments"] = segment_ids(segments, batch, length, keys)
    if visible_until is not None:
        options["visible_until"] = key_ends(visible_until, batch, keys)
    skip = skip_fraction(skip_threshold)
    if skip:
        options["skip_threshold"] = skip
    return options


def packed_options(
    shape: tuple[int, ...], keys: int, *, scale: object = None, alibi_slopes: Array | None = None, **options: Any
) -> Options:
    """Options of packed queries `[Tq, Hq, D]`: one query row stands for all, as nothing differs between them."""
    total, heads, dim = shape
    return score_options(
        (heads, 1, dim),
        keys,
        span=total + keys,
        scale=per_head(scale, "scale", heads) if is_array(scale) else scale,
        alibi_slopes=None if alibi_slopes is None else per_head(alibi_slopes, "alibi_slopes", heads),
        **options,
    )


def arrays_of(options: Options) -> dict[str, NDArray[Any]]:
    """The arrays among the options, by argument."""
    found: dict[str, NDArray[Any]] = {}
    for name, value in options.items():
        if isinstance(value, np.ndarray):
            found[name] = value
        elif isinstance(value, tuple):
            found.update({f"{name}[{n}]": x for n, x in enumerate(value) if isinstance(x, np.ndarray)})
    return found
