"""The recurrences of matrix states whose speed is measured, with what they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from longattn import linear
from longattn.bench.arrays import DTYPES, gaussian


@dataclass(frozen=True)
class Form:
    """A recurrence: its name, the function, its gates, and whether it follows the delta rule."""

    name: str
    call: Callable[..., Any]
    gates: tuple[str, ...]
    delta: bool = False

    def arguments(self, rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
        """Arrays by name; keys have unit length, so that the delta rule is stable."""
        found = {name: gaussian(rng, shape, DTYPES[dtype]) for name in "qkv"}
        k = found["k"].astype(np.float32)
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        found["k"] = k.astype(DTYPES[dtype])
        if "head" in self.gates:
            found["g"] = np.broadcast_to(-0.1 * rng.random((shape[1], 1), np.float32), shape[:-1])
        if "row" in self.gates:
            found["g"] = -0.1 * rng.random(shape[:-1], np.float32)
        if "channel" in self.gates:
            found["g"] = -0.1 * rng.random(shape, np.float32)
        if self.delta:
            found["beta"] = rng.random(shape[:-1], np.float32)
        return found

    def flops(self, rows: int, dim: int) -> float:
        """Operations that are counted for `rows` rows of a head each."""
        states, chunk = (6 * dim * dim, 320 * dim) if self.delta else (4 * dim * dim, 128 * dim)
        return float(rows) * (states + chunk)


def _identity(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return linear.linear_attention(q, k, v, normalize=False, **options)


def _decayed(q: Any, k: Any, v: Any, g: Any, **options: Any) -> Any:
    return linear.lightning_attention(q, k, v, -g[0, :, 0], **options)


FORMS = (
    Form("linear_attention", _identity, ()),
    Form("lightning_attention", _decayed, ("head",)),
    Form("gated_linear_attention", lambda **x: linear.gated_linear_attention(**{"scale": 1.0, **x}), ("channel",)),
    Form("gated_delta_rule", lambda **x: linear.gated_delta_rule(**{"scale": 1.0, **x}), ("row",), True),
    Form(
        "kimi_delta_attention",
        lambda **x: linear.kimi_delta_attention(**{"scale": 1.0, "normalize_qk": False, **x}),
        ("channel",),
        True,
    ),
)
