"""When and how a layer reads a part of its keys instead of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RetrievalConfig:
    """Retrieval attention of one layer during decoding: the arguments of `longattn.retrieval_attention`.

    Args:
        top_k: keys selected per KV head beyond `sinks` and `window`, shared by the head's query group.
        top_p: instead of `top_k`: the fewest keys that hold this share of the estimated softmax mass. Without
            either, 1 % of the keys are selected, at least 64.
        sinks: first keys of the sequence, always read.
        window: last keys of the sequence, always read.
        bits: bits per dimension of the key signatures: 1, 2 or 4.
        seed: seed of the signatures.
        rest: what stands for the keys that are not read: `"values"` (an estimate of their part) or `"none"`.
        min_length: sequences shorter than this are attended exactly.

    Raises:
        ValueError: a value outside the range stated above, or both `top_k` and `top_p`.
    """

    top_k: int | None = None
    top_p: float | None = None
    sinks: int = 4
    window: int = 512
    bits: int = 4
    seed: int = 0
    rest: Literal["values", "none"] = "values"
    min_length: int = 2048

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.top_k is not None and self.top_p is not None:
            raise ValueError(f"top_k, top_p: got {self.top_k} and {self.top_p}, expected one of the two")
        for name, least in (("top_k", 1), ("sinks", 0), ("window", 0), ("seed", 0), ("min_length", 0)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= least):
                raise ValueError(f"{name}: got {value!r}, expected an integer >= {least}")
        if self.top_p is not None and not 0 < self.top_p < 1:
            raise ValueError(f"top_p: got {self.top_p!r}, expected a number between 0 and 1")
        if self.bits not in (1, 2, 4):
            raise ValueError(f"bits: got {self.bits!r}, expected 1, 2 or 4")
        if self.rest not in ("values", "none"):
            raise ValueError(f"rest: got {self.rest!r}, expected 'values' or 'none'")
