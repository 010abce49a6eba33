"""A prefix tree beside its model, and random families of sequences."""

import numpy as np

import tolerances
from longattn.kv import PrefixTree, chunk_attention
from longattn.reference import kv as reference
from random_arrays import F32, normal


class Batch:
    """A tree and its model; rows are functions of the tokens up to theirs, as a model's are."""

    def __init__(self, kv_heads=2, head_dim=16, value_dim=None, dtype=F32, chunk_size=4, capacity=1 << 16):
        value_dim = head_dim if value_dim is None else value_dim
        self.tree = PrefixTree(kv_heads, head_dim, value_dim, dtype, chunk_size, capacity)
        self.model = reference.PrefixTree(kv_heads, head_dim, value_dim, chunk_size)
        rng = np.random.default_rng(5)
        self.table = [normal(rng, (1009, kv_heads, dim)).astype(dtype) for dim in (head_dim, value_dim)]

    def rows(self, tokens):
        """Keys and values `[kv_heads, L, dim]` of a sequence."""
        places, place = [], 1
        for token in tokens:
            place = (place * 31 + token * 7 + 3) % 1_000_003
            places.append(place % 1009)
        return tuple(x[np.array(places, int)].swapaxes(0, 1) for x in self.table)

    def add(self, tokens, given=None):
        """Adds a sequence, with the rows of its last `given` tokens."""
        tokens = [*tokens]
        k, v = self.rows(tokens)
        number = self.model.add_seq(tokens, k, v)
        first = 0 if given is None else len(tokens) - given
        assert self.tree.add_seq(tokens, k[:, first:], v[:, first:]) == number
        return number

    def extend(self, sequence, tokens):
        start = len(self.model.tokens[sequence])
        k, v = (x[:, start:] for x in self.rows([*self.model.tokens[sequence], *tokens]))
        self.model.extend(sequence, tokens, k, v)
        self.tree.extend(sequence, tokens, k, v)

    def append(self, tokens, sequences=None):
        numbers = self.model.sequences if sequences is None else sequences
        last = [self.rows([*self.model.tokens[n], token]) for n, token in zip(numbers, tokens, strict=True)]
        k, v = (np.array([pair[i][:, -1] for pair in last] or self.table[i][:0]) for i in (0, 1))
        self.model.append(tokens, k, v, sequences=sequences)
        self.tree.append(tokens, k, v, sequences=sequences)

    def fork(self, sequence, n):
        numbers = self.model.fork(sequence, n)
        assert self.tree.fork(sequence, n) == numbers
        return numbers

    def remove(self, sequence):
        self.model.remove(sequence)
        self.tree.remove(sequence)

    def check_store(self):
        """What is stored is what the model says."""
        tree, model = self.tree, self.model
        assert tree.sequences == model.sequences and len(tree) == len(model.sequences)
        assert tree.tokens_stored == model.tokens_stored
        assert tree.chunks == model.chunks
        for sequence in model.sequences:
            assert tree.tokens(sequence) == model.tokens[sequence]
            assert tree.length(sequence) == len(model.tokens[sequence])
            for ours, theirs in zip(tree.rows(sequence), model.rows[sequence], strict=True):
                np.testing.assert_array_equal(ours, theirs)

    def check_attention(self, q, *, sequences=None, **options):
        """Attention is that of the model; returns output and lse."""
        out, lse = chunk_attention(q, self.tree, sequences=sequences, return_lse=True, **options)
        options.pop("shared", None)
        expected = reference.chunk_attention(q, self.model, sequences=sequences, return_lse=True, **options)
        numbers = self.model.sequences if sequences is None else sequences
        every = [np.concatenate([self.model.rows[n][i] for n in numbers] or [self.model.empty[i]], 1) for i in (0, 1)]
        scale = options.get("scale")
        tolerances.attention(q, *every, scale=scale, together=8).check(out, expected[0], lse, expected[1])
        assert out.dtype == q.dtype and lse.dtype == F32
        return out, lse


PROMPT = [*range(100, 137)]


def family(**sizes):
    """Sequences with beginnings of several lengths in common, one of them empty."""
    batch = Batch(**sizes)
    first = batch.add(PROMPT)
    batch.add([*PROMPT, 1, 2, 3])
    batch.add([])
    batch.add([*PROMPT[:20], *range(30)])
    batch.add([5])
    batch.add([*PROMPT[:20], *range(29), 77, 78])
    batch.fork(first, 3)
    for step in range(5):
        batch.append([n if n % 2 else 9 for n in batch.model.sequences] if step else [8] * len(batch.model.sequences))
    batch.remove(4)
    return batch


def queries(rng, batch, heads, dtype=F32):
    return normal(rng, (len(batch.model.sequences), heads, batch.tree.head_dim), dtype, spread=1.5)
