"""The four projections of an attention layer and attention between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longattn.vision._inputs import Float32, Linear, optional_linear
from longattn.vision.partition import attend


@dataclass(frozen=True, slots=True)
class Block:
    """Projections of queries, keys, values and the output; `None` changes nothing."""

    parts: tuple[Linear | None, ...]
    heads: int

    @classmethod
    def of(cls, given: Any, name: str, channels: int, heads: int) -> Block:
        """From `(wq, wk, wv, wo)`, each `[C, C]`, a pair with the bias, or `None`."""
        if not isinstance(given, tuple | list) or len(given) != 4:
            raise TypeError(f"{name}: got {type(given).__name__}, expected (wq, wk, wv, wo)")
        parts = (
            optional_linear(w, f"{name} w{part}", channels, channels) for w, part in zip(given, "qkvo", strict=True)
        )
        return cls(tuple(parts), heads)

    def q(self, x: Float32) -> Float32:
        """Queries."""
        return _project(self.parts[0], x)

    def k(self, x: Float32) -> Float32:
        """Keys."""
        return _project(self.parts[1], x)

    def v(self, x: Float32) -> Float32:
        """Values."""
        return _project(self.parts[2], x)

    def o(self, x: Float32) -> Float32:
        """The output."""
        return _project(self.parts[3], x)

    def __call__(self, x: Float32, context: Float32 | None = None, **options: Any) -> Float32:
        """Attention of rows `[B, L, C]` to those of `context` (to each other without), through all projections."""
        other = x if context is None else context
        return self.o(attend(self.q(x), self.k(other), self.v(other), heads=self.heads, **options))


def _project(w: Linear | None, x: Float32) -> Float32:
    return x if w is None else w(x)
