"""Data sets as the routines measure them: those that can be had, in stores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import longattn as la
from longattn import vectors
from longattn.bench.harness import Bench
from longattn.vectors.command import progress_line


def prepared(bench: Bench, names: Iterable[str], *, asked: bool) -> Iterator[str]:
    """Names of the sets that can be loaded, made where need be; for others a note, or an error if `asked`."""
    for name in names:
        try:
            vectors.prepare(name, progress=progress_line(name))
        except (FileNotFoundError, ModuleNotFoundError) as error:
            if asked:
                raise
            bench.notes.append(f"{name} left out: {error}")
        else:
            yield name


def empty_store(data: vectors.Vectors, dtype: str) -> la.KVStore:
    """A store that the set's rows fit into."""
    return la.KVStore(
        kv_heads=data.kv_heads,
        head_dim=data.head_dim,
        value_dim=data.values.shape[2],
        dtype=dtype,
        capacity=len(data),
    )
