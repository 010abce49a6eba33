"""Options of attention calls: checked once, for every function that takes them, in the form the core reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import DTypeLike, NDArray

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
from longattn._score_options import PackedScoreOptions, ScoreOptions, check_names


class Options(TypedDict, total=False):
    """What differs from plain softmax attention, as the compiled module takes it; names are those of the arguments.

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
ON_GPU = frozenset({*ScoreOptions.__annotations__, "state"})


def gpu_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a call's options that `longattn.gpu` takes.

    Raises:
        ValueError: an option that is not offered there is not off.
    """
    taken = {name: value for name, value in given.items() if name in ON_GPU}
    refuse_on_gpu(taken, **{name: value for name, value in given.items() if name not in ON_GPU})
    return taken


def refuse_on_gpu(taken: Collection[str], **refused: object) -> None:
    """ValueError where an option that is not offered for arrays of a GPU is not off; `taken`: those that are."""
    for name, value in refused.items():
        if value is not None and not (isinstance(value, bool | int | float) and not value):
            offered = ", ".join(sorted(taken))
            raise ValueError(f"{name}: not offered for arrays of a GPU, where options are {offered}")


def is_array(x: object) -> bool:
    """Whether an argument that may be a number is an array."""
    return isinstance(x, np.ndarray) or hasattr(x, "__dlpack__")


def score_options(
    shape: tuple[int, ...],
    keys: int,
    *,
    span: int,
    dtype: DTypeLike = np.float32,
    skip_threshold: object = 0.0,
    **given: Unpack[ScoreOptions],
) -> Options:
    """Options of queries of shape `[..., Hq, Lq, D]` over `keys` keys, for arithmetic in `dtype`.

    Distances stay below `span`.
    """
    check_names(given)
    *outer, heads, length, dim = shape
    batch = outer[0] if outer else 1
    rows = shape[:-1]
    scale = given.get("scale")
    options: Options = {"scale": row_scales(scale, rows, dtype) if is_array(scale) else scale_factor(scale, dim)}
    if flag(given.get("causal", False), "causal"):
        options["causal"] = True
    sides = window_sides(given.get("window", (-1, -1)), span)
    if sides != (-1, -1):
        options["window"] = sides
    cap = softcap_value(given.get("softcap", 0.0))
    if cap:
        options["softcap"] = cap
    if (bias := given.get("bias")) is not None:
        options["bias"] = bias_scores(bias, (*rows, keys), dtype)
    if (mask := given.get("mask")) is not None:
        options["mask"] = mask_scores(mask, (*rows, keys))
    if (slopes := given.get("alibi_slopes")) is not None:
        options["alibi_slopes"] = slopes_per_head(slopes, shape[:-2], dtype)
    if (sinks := given.get("sinks")) is not None:
        options["sinks"] = per_head(sinks, "sinks", heads, dtype)
    table, zero = given.get("relative_bias"), given.get("relative_zero")
    if table is not None:
        options["relative_bias"], options["relative_zero"] = relative_table(table, zero, heads, dtype)
    elif zero is not None:
        raise ValueError(f"relative_zero: got {zero!r} without relative_bias, expected both or neither")
    if (segments := given.get("segments")) is not None:
        options["segments"] = segment_ids(segments, batch, length, keys)
    if (until := given.get("visible_until")) is not None:
        options["visible_until"] = key_ends(until, batch, keys)
    skip = skip_fraction(skip_threshold)
    if skip:
        options["skip_threshold"] = skip
    return options


def packed_options(
    shape: tuple[int, ...], keys: int, *, skip_threshold: object = 0.0, **given: Unpack[PackedScoreOptions]
) -> Options:
    """Options of packed queries `[Tq, Hq, D]`: one query row stands for all, as nothing differs between them."""
    check_names(given, PackedScoreOptions)
    total, heads, dim = shape
    if is_array(scale := given.get("scale")):
        given["scale"] = per_head(scale, "scale", heads)
    if (slopes := given.get("alibi_slopes")) is not None:
        given["alibi_slopes"] = per_head(slopes, "alibi_slopes", heads)
    return score_options((heads, 1, dim), keys, span=total + keys, skip_threshold=skip_threshold, **given)


def arrays_of(options: Options) -> dict[str, NDArray[Any]]:
    """The arrays among the options, by argument."""
    found: dict[str, NDArray[Any]] = {}
    for name, value in options.items():
        if isinstance(value, np.ndarray):
            found[name] = value
        elif isinstance(value, tuple):
            found.update({f"{name}[{n}]": x for n, x in enumerate(value) if isinstance(x, np.ndarray)})
    return found
