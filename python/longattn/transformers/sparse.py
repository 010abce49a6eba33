"""When and how a layer attends from a prompt to a part of its keys."""

from __future__ import annotations

from dataclasses import dataclass

from longattn.sparse import Selector


@dataclass(frozen=True)
class SparsePrefill:
    """Sparse attention of one layer during prefill: `longattn.sparse_attention` with a selector.

    Decoding steps are not affected. Where `prefill_chunk_size` cuts the prompt, the queries of each chunk choose for
    themselves among all keys so far. Prompts with a mask of their own are attended exactly.

    Args:
        selector: what chooses, one of `longattn.sparse` (`Sparge`, `VerticalSlash`, `Antidiagonal`, ...) or a function
            of that form; called with `causal=True`.
        min_length: sequences shorter than this, the new tokens included, are attended exactly.

    Raises:
        TypeError: no selector.
        ValueError: a negative length.
    """

    selector: Selector
    min_length: int = 4096

    def __post_init__(self) -> None:
        """Checks the values."""
        if not callable(self.selector):
            raise TypeError(f"selector: got {type(self.selector).__name__}, expected a selector or a function")
        if isinstance(self.min_length, bool) or not isinstance(self.min_length, int) or self.min_length < 0:
            raise ValueError(f"min_length: got {self.min_length!r}, expected an integer >= 0")
