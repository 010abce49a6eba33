"""Options of the scores of softmax attention: their names and types, stated once for host and device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from longattn._arrays import Array


class PackedScoreOptions(TypedDict, total=False):
    """Those that packed sequences have; what they mean and what they are by default `longattn.attention` says."""

    causal: bool
    window: tuple[int, int]
    scale: float | Array | None
    softcap: float
    alibi_slopes: Array | None
    sinks: Array | None
    relative_bias: Array | None
    relative_zero: int | None


class ScoreOptions(PackedScoreOptions, total=False):
    """All of them."""

    bias: Array | None
    mask: Array | None
    segments: tuple[Array, Array] | None
    visible_until: Array | None


def check_names(options: Mapping[str, Any], of: type = ScoreOptions) -> None:
    """TypeError for an option that these do not have, as Python itself raises where arguments are written out."""
    for name in options:
        if name not in of.__annotations__:
            expected = ", ".join(of.__annotations__)
            raise TypeError(f"{name}: got an option that does not exist here, expected some of {expected}")
