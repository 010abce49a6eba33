"""Queries, keys and values to measure retrieval on: synthetic out-of-distribution ones, and real models' own.

    vectors = longattn.vectors.load("synthetic")
    vectors.keys       # float32 [kv_heads, length, head_dim]
    vectors.queries    # float32 [groups, kv_heads * group, head_dim]: each asks from the end of the sequence

Independent Gaussian vectors flatter every index: a model's queries are distributed differently from its keys,
its keys share a large offset, and its logits are anything from flat to sharp. All sets here have these
properties.

| name | what | head_dim |
|---|---|---|
| `synthetic` | clustered low-rank content, massive channels, RoPE; 8 KV heads with 4 query heads each | 128 |
| `synthetic-flat` | the same with queries half as long: flat attention | 128 |
| `synthetic-sharp` | an induction head with partial RoPE: few exact matches among many keys | 128 |
| `minilm` | every head of a sentence encoder over Python source text, a group is 4 adjacent tokens | 32 |
| `lm` | full-attention layers of the demo's language model, asking for needles and reading on | 64 |

The last two are made once by a model (`prepare`, or `longattn vectors --name minilm`) and cached outside the
package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longattn._checks import one_of
from longattn.vectors import lm, minilm, synthetic
from longattn.vectors.recording import Progress

__all__ = ["Generation", "Vectors", "generation", "load", "names", "prepare"]

LENGTH = 131_072
RECORDED = {source.name: source for source in (minilm.SOURCE, lm.SOURCE)}


@dataclass(frozen=True)
class Vectors:
    """One layer's worth of attention input.

    Attributes:
        name: the set.
        heads: name of each KV head, `"layer.head"` where a model has them.
        keys: float32 `[kv_heads, length, head_dim]`, as attention uses them.
        values: float32 `[kv_heads, length, value_dim]`.
        queries: float32 `[groups, kv_heads * group, head_dim]`, asking from behind the last key; logits take
            1/sqrt(head_dim).
        prefill_queries: float32 `[m, kv_heads * group, head_dim]` from other places, for methods that learn
            from them.
    """

    name: str
    heads: tuple[str, ...]
    keys: NDArray[np.float32]
    values: NDArray[np.float32]
    queries: NDArray[np.float32]
    prefill_queries: NDArray[np.float32]

    @property
    def kv_heads(self) -> int:
        return len(self.keys)

    @property
    def head_dim(self) -> int:
        return int(self.keys.shape[2])

    @property
    def query_heads(self) -> int:
        return int(self.queries.shape[1])

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads

    def __len__(self) -> int:
        """Keys per head."""
        return int(self.keys.shape[1])


@dataclass(frozen=True)
class Generation:
    """A prefill and what is generated behind it.

    Attributes:
        data: the whole sequence; its `queries` ask from the end, its `prefill_queries` from the prefill.
        prefill: rows of the prefill, the first ones.
        first_queries: float32 `[groups, kv_heads * group, head_dim]`, asking from the end of the prefill.
    """

    data: Vectors
    prefill: int
    first_queries: NDArray[np.float32]


def names() -> tuple[str, ...]:
    """Every set that `load` knows."""
    return (*synthetic.NAMES, *RECORDED)


def load(
    name: str, *, length: int = LENGTH, groups: int = 50, heads: Sequence[str] | None = None, seed: int = 0
) -> Vectors:
    """Vectors of one set, the same for the same arguments (and cache).

    Args:
        name: one of `names()`.
        length: keys per head. Recorded sets hold 131,072; fewer are the first ones.
        groups: query groups (synthetic sets make them, recorded sets draw them).
        heads: KV heads by name, in the order wanted; default: the set's own choice (`Vectors.heads` tells
            which).
        seed: of the synthetic content, or of the draw of recorded queries.

    Raises:
        ValueError: unknown name or head, length or groups out of range.
        FileNotFoundError: a recorded set that `prepare` has not made yet.

    Cost: about 1.5 s and 4 * length * head_dim * 2 bytes per synthetic head of 131,072 keys; recorded sets
        are read from disk.
    """
    one_of(name, "name", names())
    if length < 1 or groups < 1:
        raise ValueError(f"length and groups: expected at least 1, got {length} and {groups}")
    if name in synthetic.NAMES:
        chosen = _choose(name, heads, synthetic.HEADS, synthetic.HEADS)
        made = [synthetic.head(name, int(head), length, groups, seed) for head in chosen]
    else:
        recording = RECORDED[name].open()
        chosen = _choose(name, heads, recording.heads, recording.default_heads)
        made = [recording.head(head, length, groups, seed) for head in chosen]
    return _together(name, chosen, made)


def generation(
    name: str,
    *,
    prefill: int,
    length: int = LENGTH,
    groups: int = 50,
    heads: Sequence[str] | None = None,
    seed: int = 0,
) -> Generation:
    """A sequence that goes on behind its prefill: what an index must keep up with.

    Synthetic text changes its subject where the prefill ends, and the last queries ask about the new one
    (`synthetic.drifting_head`). Recorded text goes on as it is, and the same queries ask at both times: those models'
    logits do not depend on positions.

    Args:
        name: one of `names()`, but not synthetic-sharp.
        prefill: rows of the prefill.
        length: rows in all, more than `prefill`.
        groups: query groups at either time.
        heads: as in `load`.
        seed: as in `load`.

    Raises:
        ValueError: as `load`; a set whose content cannot change; a prefill that leaves nothing to generate.
        FileNotFoundError: as `load`.
    """
    one_of(name, "name", (*synthetic.DRIFTING, *RECORDED))
    if not 0 < prefill < length or groups < 1:
        raise ValueError(f"prefill: got {prefill} of {length} rows and {groups} groups, expected fewer, at least 1")
    if name in RECORDED:
        data = load(name, length=length, groups=groups, heads=heads, seed=seed)
        return Generation(data, prefill, data.queries)
    chosen = _choose(name, heads, synthetic.HEADS, synthetic.HEADS)
    made = [synthetic.drifting_head(name, int(head), prefill, length, groups, seed) for head in chosen]
    data = _together(name, chosen, [head for head, _ in made])
    return Generation(data, prefill, np.concatenate([first for _, first in made], 1))


def _together(name: str, chosen: tuple[str, ...], made: Sequence[synthetic.Head]) -> Vectors:
    """The heads of a set side by side."""
    parts = list(zip(*made, strict=True))
    return Vectors(
        name,
        chosen,
        np.stack(parts[0]),
        np.stack(parts[1]),
        np.concatenate(parts[2], 1),
        np.concatenate(parts[3], 1),
    )


def prepare(name: str, *, refresh: bool = False, progress: Progress | None = None) -> Path | None:
    """Make a recorded set and cache it; nothing to do for synthetic ones or when the cache has it.

    Args:
        name: one of `names()`.
        refresh: make it again.
        progress: called with (done, total) now and then.

    Returns:
        The folder of the cache, None for synthetic sets.

    Raises:
        ValueError: unknown name.
        ModuleNotFoundError: a package that the recording needs is missing; the message says what to install.
    """
    one_of(name, "name", names())
    if name in synthetic.NAMES:
        return None
    return RECORDED[name].prepare(refresh, progress or (lambda done, total: None))


def _choose(name: str, heads: Sequence[str] | None, known: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
    if isinstance(heads, str):
        raise TypeError(f"heads: expected a sequence of names, got the string {heads!r}")
    chosen = tuple(default if heads is None else heads)
    unknown = [head for head in chosen if head not in known]
    if unknown or not chosen:
        raise ValueError(f"heads: expected some of {name}'s {', '.join(known)}, got {list(chosen)}")
    return chosen
