"""When and how a layer attends from a prompt to a part of its keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from longattn.sparse import Selector, by_name


@dataclass(frozen=True)
class SparsePrefill:
    """Sparse attention of one layer during prefill: `longattn.sparse_attention` with a selector.

    Decoding steps are not affected. Where `prefill_chunk_size` cuts the prompt, the queries of each chunk choose for
    themselves among all keys so far. Prompts with a mask of their own are attended exactly.

    Args:
        selector: what chooses: a name of `longattn.sparse.by_name.SELECTORS` (`"sparge_attention"`, `"xattention"`,
            ...), one of the selectors of `longattn.sparse`, or a function of that form; called with `causal=True`.
        min_length: sequences shorter than this, the new tokens included, are attended exactly.
        parameters: of a selector given by its name, for instance `{"block": 256}` of `"moba_select"`.

    Raises:
        TypeError: no selector, a parameter that it does not have, or parameters of one that is not given by name.
        ValueError: an unknown name, what the selector refuses, or a negative length.
    """

    selector: Selector | str
    min_length: int = 4096
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the values."""
        if isinstance(self.selector, str):
            by_name.make(self.selector, **self.parameters)
        elif not callable(self.selector):
            raise TypeError(f"selector: got {type(self.selector).__name__}, expected a name, a selector or a function")
        elif self.parameters:
            raise TypeError("parameters: got some beside a selector, expected them with the name of one only")
        if isinstance(self.min_length, bool) or not isinstance(self.min_length, int) or self.min_length < 0:
            raise ValueError(f"min_length: got {self.min_length!r}, expected an integer >= 0")

    @cached_property
    def made(self) -> Selector:
        """What chooses."""
        if isinstance(self.selector, str):
            return by_name.make(self.selector, **self.parameters)
        return self.selector
