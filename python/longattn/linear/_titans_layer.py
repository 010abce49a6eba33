"""What the layers of Titans, which join its memory with attention, have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from longattn._arrays import Array, as_numpy, like
from longattn._checks import integer
from longattn.dense.attention import attention
from longattn.linear._channels import Float32, check_shape, parameter, storage_rows
from longattn.linear._fast_weight import MemoryState
from longattn.linear.titans_neural_memory import titans_neural_memory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TitansWeights:
    """Weights of a layer, floating; products are `x @ w`.

    Attributes:
        memory: `(w_q, w_k, w_v)` of the memory, `[C, heads * D]` twice and `[C, C]`.
        attention: `(w_q, w_k, w_v, w_o)`, `[C, heads * D]` twice, `[C, heads * Dv]` and `[heads * Dv, C]`.
        persistent: learned tokens `[P, C]` before the sequence, visible to all of it; `None` is none.
    """

    memory: tuple[Array, Array, Array]
    attention: tuple[Array, Array, Array, Array]
    persistent: Array | None = None


class Layer:
    """Checked weights, and the parts that the three have in common."""

    def __init__(self, x: Array, weights: TitansWeights, heads: object) -> None:
        if not isinstance(weights, TitansWeights):
            raise TypeError(f"weights: got {type(weights).__name__}, expected TitansWeights")
        given = storage_rows(x, "x", (None, None, None), "[B, L, C]")
        channels, self.heads = given.shape[2], integer(heads, "heads", 1)
        if channels == 0 or channels % self.heads:
            raise ValueError(f"heads: got {self.heads}, expected a divisor of the {channels} channels of x")
        for given_weights, name, count in ((weights.memory, "memory", 3), (weights.attention, "attention", 4)):
            if not isinstance(given_weights, tuple | list) or len(given_weights) != count:
                raise TypeError(f"{name}: got {type(given_weights).__name__}, expected {count} matrices")
        self.memory = [parameter(w, f"memory[{i}]", (channels, None), "[C, ..]") for i, w in enumerate(weights.memory)]
        self.own = [parameter(w, f"attention[{i}]", (None, None), "[C, ..]") for i, w in enumerate(weights.attention)]
        for ws, name in ((self.memory, "memory"), (self.own, "attention")):
            wide = ws[0].shape[1]
            if wide == 0 or wide % self.heads:
                raise ValueError(f"{name}[0]: got shape {ws[0].shape}, expected [C, heads * D] with {self.heads} heads")
            check_shape(ws[0], f"{name}[0]", (channels, wide), "[C, heads * D]")
            check_shape(ws[1], f"{name}[1]", (channels, wide), "[C, heads * D] as of queries")
        check_shape(self.memory[2], "memory[2]", (channels, channels), "[C, C]")
        values = self.own[2].shape[1]
        if values == 0 or values % self.heads:
            raise ValueError(f"attention[2]: got shape {self.own[2].shape}, expected [C, heads * Dv]")
        check_shape(self.own[2], "attention[2]", (channels, values), "[C, heads * Dv]")
        check_shape(self.own[3], "attention[3]", (values, channels), "[heads * Dv, C]")
        first = np.zeros((0, channels), np.float32)
        if weights.persistent is not None:
            first = parameter(weights.persistent, "persistent", (None, channels), "[P, C]")
        self.x, self.dtype = np.asarray(given, np.float32), given.dtype
        self.persistent: Float32 = np.broadcast_to(first, (len(given), *first.shape))

    def split(self, x: Float32, w: Float32) -> Float32:
        """Rows `[B, H, L, D]` by heads, of projected rows `[B, L, C]`."""
        made = (x @ w).reshape(*x.shape[:2], self.heads, w.shape[1] // self.heads)
        return np.ascontiguousarray(made.swapaxes(1, 2))

    def joined(self, x: Any) -> Float32:
        """Rows `[B, L, H * D]` of rows by heads."""
        whole = np.asarray(x, np.float32).swapaxes(1, 2)
        return np.ascontiguousarray(whole).reshape(*whole.shape[:2], whole.shape[2] * whole.shape[3])

    def remember(self, asking: Float32, learning: Float32, theta: Any, **options: Any) -> tuple[Float32, MemoryState]:
        """What the memory says to `asking` while it learns other rows."""
        q, k, v = (self.split(x, w) for x, w in zip((asking, learning, learning), self.memory, strict=True))
        said, state = titans_neural_memory(q, k, v, theta, **options)
        return self.joined(said), state

    def attend(self, asking: Float32, before: Float32, x: Float32, window: int | None) -> Float32:
        """Causal attention of the rows of `x`, as `asking` has them, that see all of `before`."""
        q, k, v = (self.split(y, w) for y, w in zip((asking, x, x), self.own, strict=False))
        merged: dict[str, Any] = {}
        if before.shape[1]:
            merged["state"] = attention(q, *(self.split(before, w) for w in self.own[1:3]), return_lse=True)
        span = (-1, -1) if window is None else (window - 1, 0)
        mixed: Float32 = self.joined(attention(q, k, v, causal=True, window=span, **merged)) @ self.own[3]
        return mixed


class Part:
    """The rows of a segment, and the memory at its start."""

    def __init__(self, layer: Layer, rows: Float32, gates: dict[str, Any], options: dict[str, Any]) -> None:
        self.layer, self.rows, self.gates, self.options = layer, rows, gates, options

    def ask(self, rows: Float32) -> Float32:
        """What the memory says to rows, of which it learns nothing."""
        eta = None if self.gates.get("eta") is None else 0.0
        return self.layer.remember(rows, rows, 0.0, eta=eta, **self.options)[0]

    def learn(self, rows: Float32) -> Float32:
        """What the memory says to rows, to each after it learnt it."""
        said, self.options["initial_state"] = self.layer.remember(rows, rows, **self.gates, **self.options)
        return said


def compose(
    x: Array,
    weights: TitansWeights,
    heads: object,
    gates: dict[str, Any],
    mix: Callable[[Part], Float32],
    *,
    segment: object = None,
    memory_weights: Any = None,
    **options: Any,
) -> tuple[Array, MemoryState]:
    """A memory beside attention: segment by segment `mix` makes outputs of rows, whose part of the memory learns."""
    if "out_state" in options:
        raise TypeError("out_state: got one, expected none: a layer asks its memory before that learns")
    layer = Layer(x, weights, heads)
    rows, length = layer.x, layer.x.shape[1]
    size = max(length, 1) if segment is None else integer(segment, "segment", 1)
    if segment is not None:
        gates = {name: _rows_of(gate, name, layer) for name, gate in gates.items()}
    given = {name: gate for name, gate in gates.items() if gate is not None}
    out, state = np.empty_like(rows), options.pop("initial_state", None)
    for at in range(0, max(length, 1), size):
        here = slice(at, min(at + size, length))
        cut = given if size >= length else {n: g if np.ndim(g) == 0 else g[..., here] for n, g in given.items()}
        begin = {"initial_state": state, "weights": memory_weights if at == 0 else None}
        part = Part(layer, rows[:, here], cut, {**options, **begin})
        out[:, here] = mix(part)
        state = part.options["initial_state"]
    assert state is not None
    return like(x, out.astype(layer.dtype, copy=False)), state


def _rows_of(gate: Any, name: str, layer: Layer) -> Any:
    """A gate of all rows, or one number, or nothing, as it came."""
    if gate is None or (isinstance(gate, int | float) and not isinstance(gate, bool)):
        return gate
    rows = as_numpy(gate, name, any_strides=True)
    expected = (len(layer.x), layer.heads, layer.x.shape[1])
    if rows.shape != expected:
        raise ValueError(f"{name}: got shape {rows.shape}, expected {expected}, or one number")
    return rows
