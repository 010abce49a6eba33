"""Prefix tree: many sequences whose common beginnings are stored, and read, once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from longattn import _core
from longattn._arrays import Array, as_numpy
from longattn._checks import (
    check_float_storage,
    flag,
    per_head,
    result_array,
    returned,
    scale_factor,
    size,
    softcap_value,
    storage,
)
from longattn.kv._sizes import Sizes
from longattn.methods import Method
from longattn.reference.kv import chunk_attention as reference


class PrefixTree(Sizes):
    """Keys and values of many sequences in one layer of a model, common beginnings stored once.

    Tokens lie in chunks of `chunk_size`. A full chunk belongs to every sequence that begins with the same tokens
    up to its end; sequences are compared by their tokens, so the keys and values of equal beginnings must be
    equal, too: sequences start at position 0 with the same rotary positions, adapters and so on. The unfinished
    last chunk of a sequence is its own, until it is full: then it, too, is shared with whoever has an equal one
    (that sequence's rows stay, this one's are given up).

    Layers of a model are trees of their own, to which the same calls are made: a model computes its layers one
    after another, each reading what it has just appended. Numbers of sequences then agree between layers.

    Sequences have numbers that are never given twice. Memory for `capacity` tokens is reserved, not committed;
    freed chunks are used again, lowest first, and memory beyond the last one in use goes back to the system.
    Methods may be called from several threads; those that change the tree wait for those that read it.

    Args:
        kv_heads: heads of keys and values.
        head_dim: width of a key.
        value_dim: width of a value; `None` is `head_dim`.
        dtype: storage dtype: float32, float16 or bfloat16 (a name, or a numpy or ml_dtypes type).
        chunk_size: tokens of a chunk. Smaller ones share more, larger ones cost less bookkeeping.
        capacity: most tokens stored, rounded up to whole chunks; each sequence's unfinished chunk counts whole.

    Raises:
        TypeError: a size is no integer, or another dtype.
        ValueError: a size below 1, or a capacity of 2^32 tokens or more.
        MemoryError: the system refuses that much address space.

    Cost:
        `2 * kv_heads * head_dim` numbers for each distinct token and 8 bytes for its id.

    Example:
        >>> import numpy as np, longattn as la
        >>> tree = la.kv.PrefixTree(kv_heads=1, head_dim=4, dtype="float32", chunk_size=2)
        >>> rows = np.ones((1, 5, 4), np.float32)
        >>> tree.add_seq([7, 8, 9, 10, 11], rows, rows), tree.add_seq([7, 8, 9, 10, 12], rows, rows)
        (0, 1)
        >>> tree.tokens_stored  # 4 shared, 2 not
        6
    """

    __slots__ = ("_handle",)

    _handle: _core.PrefixTree

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: DTypeLike = "bfloat16",
        chunk_size: int = 64,
        capacity: int = 1 << 20,
    ) -> None:
        self._handle = _core.PrefixTree(
            size(kv_heads, "kv_heads"),
            size(head_dim, "head_dim"),
            size(head_dim if value_dim is None else value_dim, "value_dim"),
            storage(dtype).name,
            size(chunk_size, "chunk_size"),
            size(capacity, "capacity"),
        )

    def add_seq(self, tokens: Array, k: Array, v: Array) -> int:
        """Adds a sequence and returns its number.

        Rows of tokens that are `stored` need not be computed again: `k` and `v` may leave them out.

        Args:
            tokens: integers `[L]`, an array or a sequence of them; may be empty.
            k: keys `[kv_heads, T, head_dim]` of the last `T` tokens, `L - stored(tokens) <= T <= L`; float32,
                float16 or bfloat16, converted to the tree's dtype.
            v: values `[kv_heads, T, value_dim]`, likewise.

        Raises:
            TypeError: not an array, or another dtype.
            ValueError: another shape, too few or too many rows, or more chunks than the capacity has. Nothing
                has changed then.
            MemoryError: the system refuses the memory; nothing has changed.

        Cost:
            One copy of the rows that are not stored yet; one hash of every chunk of tokens.
        """
        return self._handle.add(_tokens(tokens), as_numpy(k, "k"), as_numpy(v, "v"))

    def extend(self, sequence: int, tokens: Array, k: Array, v: Array) -> None:
        """Appends several tokens to one sequence.

        Args:
            sequence: its number.
            tokens: integers `[L]`.
            k: keys `[kv_heads, T, head_dim]` of the last `T` tokens: of all of them, or without the first ones that
                complete chunks which are there already.
            v: values `[kv_heads, T, value_dim]`, likewise.

        Raises:
            TypeError: as `add_seq`.
            ValueError: as `add_seq`, or no such sequence.
            MemoryError: as `add_seq`.
        """
        self._handle.extend(_sequence(sequence), _tokens(tokens), as_numpy(k, "k"), as_numpy(v, "v"))

    def append(self, tokens: Array, k: Array, v: Array, *, sequences: Iterable[int] | None = None) -> None:
        """Appends one token to each of `n` sequences: a decoding step.

        Args:
            tokens: integers `[n]`.
            k: keys `[n, kv_heads, head_dim]`.
            v: values `[n, kv_heads, value_dim]`.
            sequences: numbers of the sequences that the rows belong to; `None` is all, ascending, as the
                attribute `sequences` gives them.

        Raises:
            TypeError: as `add_seq`.
            ValueError: another shape or number of rows, no such sequence, one named twice, or no chunk left.
                Nothing has changed then.
            MemoryError: the system refuses the memory; nothing has changed.
        """
        self._handle.append(_numbers(sequences), _tokens(tokens), as_numpy(k, "k"), as_numpy(v, "v"))

    def fork(self, sequence: int, n: int = 1) -> list[int]:
        """Adds `n` sequences that begin as this one is now; returns their numbers.

        They share its full chunks. The unfinished chunk is copied for each.

        Raises:
            TypeError: a number is no integer.
            ValueError: no such sequence, `n` below 1 or above 65,536, or too few chunks left.
            MemoryError: the system refuses the memory.
        """
        if size(n, "n") > _MOST_FORKS:
            raise ValueError(f"n: got {n}, expected at most {_MOST_FORKS}")
        return self._handle.fork(_sequence(sequence), n)

    def remove(self, sequence: int) -> None:
        """Drops a sequence. Chunks that no other one has are free again.

        Raises:
            TypeError: the number is no integer.
            ValueError: no such sequence.
        """
        self._handle.remove(_sequence(sequence))

    def stored(self, tokens: Array) -> int:
        """How many of the first of these tokens a new sequence would share: whole chunks, from the front.

        Args:
            tokens: integers `[L]`.

        Raises:
            TypeError: no integers.
            ValueError: another shape.
        """
        return self._handle.stored(_tokens(tokens))

    def length(self, sequence: int) -> int:
        """Number of tokens of a sequence.

        Raises:
            TypeError: the number is no integer.
            ValueError: no such sequence.
        """
        return self._handle.length(_sequence(sequence))

    def tokens(self, sequence: int) -> list[int]:
        """Tokens of a sequence.

        Raises:
            TypeError: the number is no integer.
            ValueError: no such sequence.
        """
        return self._handle.tokens(_sequence(sequence))

    def rows(self, sequence: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Copies of the keys `[kv_heads, L, head_dim]` and values `[kv_heads, L, value_dim]` of a sequence.

        Raises:
            TypeError: the number is no integer.
            ValueError: no such sequence.
        """
        sequence = _sequence(sequence)
        length, dtype = self._handle.length(sequence), self.dtype
        k, v = (np.empty((self.kv_heads, length, dim), dtype) for dim in (self.head_dim, self.value_dim))
        self._handle.copy_rows(sequence, k, v)
        return k, v

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._handle.sequences())

    @property
    def sequences(self) -> list[int]:
        """Numbers of all sequences, ascending."""
        return self._handle.sequences()

    @property
    def order(self) -> list[int]:
        """Numbers of all sequences, depth first: those that share a chunk stand side by side."""
        return self._handle.order()

    @property
    def chunks(self) -> int:
        """Chunks in use."""
        return self._handle.usage()[0]

    @property
    def tokens_stored(self) -> int:
        """Tokens stored, those that several sequences share counted once."""
        return self._handle.usage()[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Storage dtype."""
        return np.dtype(self._handle.dtype)

    @property
    def chunk_size(self) -> int:
        """Tokens of a chunk."""
        return self._handle.chunk_size

    @property
    def capacity(self) -> int:
        """Most tokens stored, each sequence's unfinished chunk counted whole."""
        return self._handle.capacity

    @property
    def nbytes(self) -> int:
        """Committed bytes: per head, keys and values each in steps of 2 MiB, as `KVStore.nbytes`."""
        return self._handle.nbytes

    def __repr__(self) -> str:
        """Sizes, dtype and what is stored."""
        return (
            f"PrefixTree(kv_heads={self.kv_heads}, head_dim={self.head_dim}, value_dim={self.value_dim}, "
            f"dtype={self.dtype.name!r}, chunk_size={self.chunk_size}, sequences={len(self)}, chunks={self.chunks})"
        )


def chunk_attention(
    q: Array,
    tree: PrefixTree,
    *,
    sequences: Iterable[int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Array | None = None,
    shared: bool = True,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """Exact attention of one query row of each sequence over all keys of that sequence: a decoding step of a batch.

    Chunks that several of the sequences share are read once, for the query rows of all of them together
    ("chunk first"), the others once for each query group ("sequence first"); the parts of a sequence are merged by
    their log-sum-exp. ChunkAttention: Efficient Self-Attention with Prefix-Aware KV Cache and Two-Phase Partition
    (2024, arXiv 2402.15220).

    Args:
        q: queries `[n, Hq, D]`, one row for each sequence; float32, float16 or bfloat16. Query head h reads KV
            head `h // (Hq // kv_heads)`.
        tree: where keys and values are.
        sequences: numbers of the `n` sequences that the rows of `q` belong to, each at most once, in any order;
            `None` is all, ascending, as `tree.sequences` gives them.
        scale: factor of the dot products; `None` is `D**-0.5`.
        softcap: `softcap * tanh(logit / softcap)` when above 0.
        sinks: floating `[Hq]`; a logit of each head that takes part in the denominator only.
        shared: whether shared chunks are read once (or once for each sequence, to compare).
        return_lse: also return the log-sum-exp of the logits.
        out: array `[n, Hq, Dv]` of the kind and dtype of `q` that receives the result; must not overlap any input.

    Returns:
        The output `[n, Hq, Dv]` in the kind and dtype of `q`: `out` itself where it was given. With `return_lse`,
        the pair `(output, lse)`, `lse` float32 `[n, Hq]`. A sequence without tokens gives 0 and -inf.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes that do not fit the tree, no such sequence, or one named twice.

    Cost:
        `Hq * (D + Dv)` multiply-adds for each token of each sequence; bytes read are those of the distinct tokens,
        not the sum of the lengths. Extra memory `Hq * (Dv + 2)` floats for each sequence and each branch on its path.

    Example:
        >>> import numpy as np, longattn as la
        >>> tree = la.kv.PrefixTree(kv_heads=1, head_dim=4, dtype="float32", chunk_size=2)
        >>> k = v = np.ones((1, 3, 4), np.float32)
        >>> for tokens in ([1, 2, 3], [1, 2, 4]):
        ...     _ = tree.add_seq(tokens, k, v)
        >>> la.kv.chunk_attention(np.ones((2, 2, 4), np.float32), tree).shape
        (2, 2, 4)
    """
    if not isinstance(tree, PrefixTree):
        raise TypeError(f"tree: got {type(tree).__name__}, expected a PrefixTree")
    qn = as_numpy(q, "q")
    check_float_storage(qn, "q")
    heads, dim = tree.kv_heads, tree.head_dim
    if qn.ndim != 3 or qn.shape[2] != dim or qn.shape[1] == 0 or qn.shape[1] % heads:
        raise ValueError(f"q: got shape {qn.shape}, expected [sequences, a multiple of {heads} heads, {dim}]")
    numbers = _numbers(sequences)
    if numbers is not None and len(numbers) != len(qn):
        raise ValueError(f"q: got {len(qn)} rows, expected one for each of {len(numbers)} sequences")
    scale, softcap = scale_factor(scale, dim), softcap_value(softcap)
    sinks_n = None if sinks is None else per_head(sinks, "sinks", qn.shape[1])
    shared, return_lse = flag(shared, "shared"), flag(return_lse, "return_lse")
    inputs = {"q": qn, "sinks": sinks_n}
    result = result_array(out, q, (*qn.shape[:2], tree.value_dim), qn.dtype, inputs)
    lse = np.empty(qn.shape[:2], np.float32)
    _core.chunk_attention(qn, tree._handle, numbers, result, lse, scale, softcap, sinks_n, shared)
    return returned(out, q, result, lse if return_lse else None)


_MOST_FORKS = 1 << 16


def _tokens(tokens: Array) -> NDArray[np.int64]:
    x = np.zeros(0, np.int64) if isinstance(tokens, list | tuple) and not tokens else tokens
    if isinstance(x, list | tuple | range):
        try:
            x = np.array(x)
        except ValueError:
            raise TypeError(f"tokens: got {tokens!r}, expected integers") from None
    x = as_numpy(x, "tokens")
    if x.dtype.kind not in "iu":
        raise TypeError(f"tokens: got dtype {x.dtype}, expected integers")
    if x.ndim != 1:
        raise ValueError(f"tokens: got shape {x.shape}, expected [length]")
    if x.dtype == np.uint64 and x.size and x.max() > np.iinfo(np.int64).max:
        raise ValueError(f"tokens: got {x.max()}, expected at most {np.iinfo(np.int64).max}")
    return np.ascontiguousarray(x, np.int64)


def _sequence(number: int) -> int:
    return size(number, "sequence", least=0)


def _numbers(sequences: Iterable[int] | None) -> list[int] | None:
    if sequences is None:
        return None
    try:
        numbers = list(sequences)
    except TypeError:
        raise TypeError(f"sequences: got {sequences!r}, expected numbers of sequences") from None
    return [size(number, "sequences", least=0) for number in numbers]


METHOD = Method(
    name="chunk_attention",
    family="kv",
    title="ChunkAttention: Efficient Self-Attention with Prefix-Aware KV Cache and Two-Phase Partition",
    year=2024,
    arxiv="2402.15220",
    function=chunk_attention,
    reference=reference,
    exact=True,
    modes=frozenset({"causal", "self"}),
    gqa=True,
    prefill=False,
    checks=(
        "Equals dense attention of each sequence over its own keys and values, for any chunk size.",
        "Reading shared chunks once or once for each sequence gives the same numbers.",
        "Stores one chunk for each distinct whole chunk of tokens with all that precedes it, and the unfinished ones.",
        "Removing every sequence leaves no chunk in use.",
    ),
    tests="tests/kv/test_chunk_attention.py",
    cost="`Hq * (D + Dv)` multiply-adds for each token of each sequence; bytes of the distinct tokens.",
)
