"""What every index has: its store, its size, and how it is copied, saved and loaded."""

from __future__ import annotations

import copy
import json
import os
from typing import Any, ClassVar, Self

from longattn import _core
from longattn._checks import integer
from longattn.kv import KVStore


class Index:
    """An index over the rows of a store, which picks the rows worth reading.

    It grows with its store by itself: `retrieval_attention` indexes what was appended since the last call and
    follows `truncate`. Rows that are not indexed yet are read exactly. Several threads may use one index.

    `Signatures`, `Pages` and `Clusters` take stores of codes, too (`dtype="int8"` or `"int4"`): they are made of the
    numbers that the codes stand for, and rows are read as codes. The others refuse them.
    """

    __slots__ = ("_handle", "_store")

    #: What the compiled module calls this kind.
    KIND: ClassVar[str]

    _handle: _core.Index
    _store: KVStore

    def _set(self, handle: _core.Index, store: KVStore) -> None:
        self._handle, self._store = handle, store

    @classmethod
    def _around(cls, handle: _core.Index, store: KVStore) -> Self:
        index = cls.__new__(cls)
        index._set(handle, store)
        return index

    @property
    def store(self) -> KVStore:
        """The store that is indexed."""
        return self._store

    @property
    def parameters(self) -> dict[str, Any]:
        """What the index was made with, by name."""
        made: dict[str, Any] = json.loads(self._handle.parameters())
        return made

    @property
    def estimates(self) -> bool:
        """Whether it weighs the rows left unread, as `rest="values"`, `top_p` and bounds need; others only rank."""
        return self._handle.estimates

    @property
    def weighs_rows(self) -> bool:
        """Whether it weighs every row by itself, as `rest="sampled"` and `epsilon` need."""
        return self._handle.weighs_rows

    @property
    def nbytes(self) -> int:
        """Bytes of the index, beside those of the store."""
        return self._handle.nbytes

    def update(self) -> None:
        """Indexes the rows appended since the last call; `retrieval_attention` does so by itself.

        Raises:
            ValueError: a key that is not finite.
        """
        self._handle.update()

    def fork(self, store: KVStore) -> Self:
        """Index of a fork of the store, with what was made of the rows they share: a copy instead of a build.

        Args:
            store: `index.store.fork()`, with whatever was appended or truncated since.

        Raises:
            TypeError: `store` is no KVStore.
            ValueError: `store` is not a fork of the indexed store.
        """
        check_store(store)
        return self._around(self._handle.fork(store._handle), store)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """As `fork`, of the copy of the store."""
        return self.fork(copy.deepcopy(self._store, memo))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the index to a file, which appears under its name complete or not at all.

        The file is a safetensors file with checksums of itself and of the rows of the store it was made of. Save
        the store beside it.

        Raises:
            OSError: the file cannot be written, or `path` is a device or a pipe.
            ValueError: the store was truncated since the index was last used; `update` it first.
        """
        self._handle.save(os.fsdecode(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str], store: KVStore) -> Self:
        """Reads an index from a file that `save` wrote.

        Args:
            path: the file.
            store: a store that has the rows of the saved index, as its first ones; it may have more.

        Raises:
            TypeError: `store` is no KVStore.
            OSError: the file cannot be read.
            ValueError: the file is cut off, altered or of another kind, or its index was made of other rows.
        """
        check_store(store)
        handle = _core.Index.load(os.fsdecode(path), store._handle)
        if handle.kind != cls.KIND:
            raise ValueError(f"path: got an index of kind {handle.kind!r}, expected {cls.KIND!r}")
        return cls._around(handle, store)

    def __len__(self) -> int:
        """Rows indexed so far."""
        return len(self._handle)

    def __repr__(self) -> str:
        """The index in one line."""
        made = "".join(f"{name}={value!r}, " for name, value in self.parameters.items())
        return f"{type(self).__name__}({made}rows={len(self)}, nbytes={self.nbytes})"


def check_store(store: object) -> None:
    """Refuses what is no store."""
    if not isinstance(store, KVStore):
        raise TypeError(f"store: got {type(store).__name__}, expected a KVStore")


def check_seed(seed: object) -> int:
    """A seed as an integer."""
    return integer(seed, "seed", 0, (1 << 64) - 1)
