"""Inputs and options of functions that look at queries and keys only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, CodedRows, as_numpy
from longattn._checks import check_float_storage, check_floating, check_heads
from longattn._score_options import check_names
from longattn.dense._options import Options, score_options


def query_key_inputs(q: Array, k: Array) -> tuple[NDArray[Any], NDArray[Any]]:
    """Queries and keys as numpy arrays (or keys as rows of codes) of fitting rank, dtype, head_dim, batch and heads."""
    qn = as_numpy(q, "q")
    kn = cast(Any, k) if isinstance(k, CodedRows) else as_numpy(k, "k")
    if qn.ndim not in (3, 4):
        raise ValueError(f"q: got shape {qn.shape}, expected rank 3 or 4")
    if kn.ndim != qn.ndim:
        raise ValueError(f"k: got shape {kn.shape}, expected rank {qn.ndim} as q")
    for x, name in ((qn, "q"), (kn, "k")):
        check_float_storage(x, name)
        if x.shape[-1] == 0:
            raise ValueError(f"{name}: got head_dim 0 in shape {x.shape}, expected at least 1")
    if kn.shape[-1] != qn.shape[-1]:
        raise ValueError(f"k: got head_dim {kn.shape[-1]}, expected {qn.shape[-1]} as in q")
    if kn.shape[:-3] != qn.shape[:-3]:
        raise ValueError(f"k: got batch {kn.shape[0]}, expected {qn.shape[0]} as in q")
    check_heads(qn.shape[-3], kn.shape[-3], kn.shape[-3])
    return qn, kn


def weight_options(qn: NDArray[Any], kn: NDArray[Any], options: Mapping[str, Any]) -> Options:
    """The options as the compiled module takes them."""
    check_names(options)
    keys = kn.shape[-2]
    return score_options(qn.shape, keys, span=qn.shape[-2] + keys, **options)


def row_values(values: Array, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A floating number per query row as contiguous float32 of exactly this shape."""
    x = as_numpy(values, name)
    check_floating(x, name)
    if x.shape != shape:
        raise ValueError(f"{name}: got shape {x.shape}, expected {shape}")
    return np.ascontiguousarray(x, np.float32)
