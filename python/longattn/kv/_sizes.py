"""What every store of rows says about its sizes."""

from __future__ import annotations

from typing import Protocol


class _Handle(Protocol):
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...


class Sizes:
    """Heads and widths of the rows of a store."""

    __slots__ = ()

    _handle: _Handle

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self._handle.kv_heads

    @property
    def head_dim(self) -> int:
        """Width of a key."""
        return self._handle.head_dim

    @property
    def value_dim(self) -> int:
        """Width of a value."""
        return self._handle.value_dim
