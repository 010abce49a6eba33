"""`PrefixTree` and `chunk_attention`: what sequences have in common is stored and read once; nothing else changes."""

import doctest
import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import longattn as la
import tolerances
from longattn.kv import PrefixTree, chunk_attention
from longattn.reference import kv as reference
from random_arrays import BF16, DTYPES, F32, normal
from resident import resident
from running import on_threads


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
        tolerances.attention(q, *every, scale=scale).check(out, expected[0], lse, expected[1])
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


# identity checks


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 16, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (9, 1)])
def test_equals_dense_attention_of_each_sequence(rng, isa, chunk_size, heads, kv_heads):
    batch = family(kv_heads=kv_heads, head_dim=20, value_dim=12, chunk_size=chunk_size)
    batch.check_store()
    batch.check_attention(queries(rng, batch, heads))


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_without_sharing_the_numbers_are_the_same(rng, isa, chunk_size):
    batch = family(chunk_size=chunk_size)
    q = queries(rng, batch, 6)
    once = batch.check_attention(q)
    each = batch.check_attention(q, shared=False)
    k, v = (np.concatenate([rows[i] for rows in batch.model.rows.values()], 1) for i in (0, 1))
    tolerances.same_storage(q, k, v).check(once[0], each[0], once[1], each[1])


@pytest.mark.parametrize("chunk_size", [1, 4, 8])
def test_stores_each_distinct_chunk_once(chunk_size):
    batch = Batch(chunk_size=chunk_size)
    for n in range(6):
        batch.add([*PROMPT[:24], n, n])
        batch.check_store()
    assert batch.tree.tokens_stored == 24 + 6 * 2
    # Appended tokens come to be shared, too.
    for _ in range(2 * chunk_size):
        batch.append([1] * 6)
        batch.check_store()
    twins = batch.fork(0, 2)
    for n in range(chunk_size):
        batch.append([n] * 3, [0, *twins])
    batch.check_store()
    assert batch.tree.tokens(0) == batch.tree.tokens(twins[1])


def test_removing_every_sequence_empties_the_tree():
    batch = family(chunk_size=4)
    assert batch.tree.chunks > 0
    for sequence in batch.model.sequences[::-1]:
        batch.remove(sequence)
        batch.check_store()
    assert (batch.tree.chunks, batch.tree.tokens_stored, len(batch.tree), batch.tree.order) == (0, 0, 0, [])
    batch.add(PROMPT)
    batch.check_store()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "append", "append", "some", "extend", "fork", "remove", "attend"]),
        st.integers(0, 99),
        st.integers(0, 17),
    ),
    max_size=30,
)


@settings(max_examples=120)
@given(steps=STEPS, chunk_size=st.integers(1, 5), shared=st.booleans())
def test_a_random_life_follows_the_model(steps, chunk_size, shared):
    batch = Batch(kv_heads=1, head_dim=4, chunk_size=chunk_size)
    rng = np.random.default_rng(7)
    for step, choice, n in steps:
        live = batch.model.sequences
        some = live[choice % len(live)] if live else None
        if step == "add":
            # Few different tokens, so that sequences agree by chance; some begin as an earlier one does.
            start = batch.model.tokens[some][:n] if live and choice % 2 else []
            tokens = [*start, *(choice * (i + 3) // 5 % 2 for i in range(n))]
            batch.add(tokens, given=len(tokens) - batch.tree.stored(tokens) if choice % 3 else None)
        elif step == "append":
            batch.append([(choice + i) % 2 for i in range(len(live))])
        elif step == "some":
            chosen = live[:: -2 if choice % 2 else 3]
            batch.append([choice % 3] * len(chosen), chosen)
        elif step == "attend":
            batch.check_attention(queries(rng, batch, 2), shared=shared)
        elif live and step == "extend":
            batch.extend(some, [(choice + i) % 2 for i in range(n)])
        elif live and step == "fork":
            batch.fork(some, 1 + n % 3)
        elif live:
            batch.remove(some)
        batch.check_store()
    batch.check_attention(queries(rng, batch, 3), shared=shared)


# attention


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_dtype", DTYPES, ids=str)
def test_dtypes(rng, isa, dtype, q_dtype):
    batch = family(dtype=dtype, head_dim=32, value_dim=32)
    batch.check_attention(queries(rng, batch, 8, q_dtype))


@pytest.mark.parametrize("group", [1, 3, 8, 16, 200])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_many_sequences_below_one_chunk(rng, isa, group, dtype):
    batch = Batch(kv_heads=1, head_dim=24, dtype=dtype, chunk_size=16)
    for n in range(13):
        batch.add([*PROMPT[:33], *[n] * n])
    batch.check_attention(queries(rng, batch, group, dtype))


@pytest.mark.parametrize("shared", [False, True])
def test_score_options(rng, isa, shared):
    batch = family()
    q = queries(rng, batch, 6)
    sinks = rng.standard_normal(6)
    batch.check_attention(q, shared=shared, scale=0.7)
    batch.check_attention(q, shared=shared, softcap=1.5)
    batch.check_attention(q, shared=shared, sinks=sinks, softcap=3.0)


def test_an_empty_sequence_gives_nothing(rng):
    batch = Batch()
    batch.add([])
    batch.add([1, 2, 3])
    out, lse = batch.check_attention(queries(rng, batch, 4))
    assert not out[0].any() and (lse[0] == -np.inf).all() and np.isfinite(lse[1]).all()
    nothing = chunk_attention(np.ones((0, 4, 16), F32), Batch().tree, return_lse=True)
    assert [x.shape for x in nothing] == [(0, 4, 16), (0, 4)]


def test_rows_of_chosen_sequences_in_any_order(rng):
    batch = family()
    numbers = batch.model.sequences
    q = queries(rng, batch, 4)
    out = chunk_attention(q, batch.tree)
    for chosen in (numbers[::-1], numbers[::2], numbers[3:4], []):
        places = [numbers.index(n) for n in chosen]
        some, _ = batch.check_attention(q[places], sequences=chosen)
        np.testing.assert_allclose(some, out[places], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        chunk_attention(q[::-1], batch.tree, sequences=np.array(numbers[::-1])), chunk_attention(q, batch.tree)[::-1]
    )


def test_order_keeps_sequences_that_share_a_chunk_together():
    batch = family(chunk_size=4)
    order = [batch.model.tokens[n] for n in batch.tree.order]
    assert sorted(batch.tree.order) == batch.model.sequences
    for beginning in batch.model.whole_chunks:
        below = [tuple(tokens[: len(beginning)]) == beginning for tokens in order]
        assert sum(a != b for a, b in zip([False, *below], [*below, False], strict=True)) == 2


@pytest.mark.parametrize("layout", ["contiguous", "blhd", "sliced", "fused", "reversed", "stepped", "misaligned"])
def test_layouts(rng, layout):
    batch = family()
    n = len(batch.model.sequences)
    q = normal(rng, (n, 6, 16), layout=layout)
    plain = np.ascontiguousarray(q)
    np.testing.assert_array_equal(chunk_attention(q, batch.tree), chunk_attention(plain, batch.tree))
    out = np.full((n, 12, 16), np.nan, F32)[:, ::2]
    assert chunk_attention(q, batch.tree, out=out) is out
    np.testing.assert_array_equal(out, chunk_attention(plain, batch.tree))
    other = Batch()
    k, v = normal(rng, (2, 9, 16), layout=layout), normal(rng, (2, 9, 16), layout=layout)
    other.tree.add_seq(range(9), k, v)
    for ours, given_rows in zip(other.tree.rows(0), (k, v), strict=True):
        np.testing.assert_array_equal(ours, given_rows)
    k, v = (normal(rng, (1, 2, 16), layout=layout) for _ in range(2))
    other.tree.append([3], k, v)
    np.testing.assert_array_equal(other.tree.rows(0)[0][:, 9], k[0])


def test_torch(rng):
    torch = pytest.importorskip("torch")
    batch = family()
    q = queries(rng, batch, 6)
    out, lse = chunk_attention(torch.from_numpy(q), batch.tree, return_lse=True)
    assert isinstance(out, torch.Tensor) and isinstance(lse, torch.Tensor)
    np.testing.assert_array_equal(out.numpy(), chunk_attention(q, batch.tree))
    target = torch.empty(out.shape)
    assert chunk_attention(torch.from_numpy(q), batch.tree, out=target) is target
    k = torch.ones(2, 3, 16, dtype=torch.bfloat16)
    assert batch.tree.tokens(batch.tree.add_seq(torch.arange(3), k, k)) == [0, 1, 2]


def test_nan_reaches_only_the_sequences_that_see_it(rng, isa):
    for heads in (4, 24):
        tree = PrefixTree(2, 16, dtype=F32, chunk_size=4)
        k, v = normal(rng, (2, 11, 16)), normal(rng, (2, 11, 16))
        for n in range(6):
            own = [x.copy() for x in (k, v)]
            if n == 2:
                own[0][0, 9] = np.nan
            if n == 4:
                own[1][1, 8] = np.inf
            tree.add_seq([*range(8), n, n, n], *own)
        out = chunk_attention(normal(rng, (6, heads, 16)), tree)
        bad = ~np.isfinite(out).all(axis=-1)
        group = heads // 2
        assert bad[2, :group].all() and bad[4, group:].all() and bad.sum() == 2 * group


LONG = [*range(1000, 5500)]


def long_batch(order, dtype=BF16):
    batch = Batch(kv_heads=2, head_dim=32, dtype=dtype, chunk_size=64)
    numbers = {n: batch.add([*LONG, n, *range(1100 * (n % 2))]) for n in order}
    batch.add([7] * 3000)
    return batch, [numbers[n] for n in sorted(numbers)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_on_any_number_of_threads(rng, isa, dtype):
    batch, _ = long_batch(range(5), dtype)
    for heads in (2, 16):
        q = queries(rng, batch, heads, dtype)
        results = on_threads(partial(chunk_attention, q, batch.tree, return_lse=True))
        for out, lse in results[1:]:
            np.testing.assert_array_equal(out.view(np.uint8), results[0][0].view(np.uint8))
            np.testing.assert_array_equal(lse.view(np.uint8), results[0][1].view(np.uint8))
    batch.check_attention(q)


def test_the_same_bits_wherever_chunks_lie(rng, isa):
    one, numbers = long_batch(range(5))
    other, _ = long_batch([9, 8])
    for n in (0, 1):
        other.remove(n)
    second = {n: other.add([*LONG, n, *range(1100 * (n % 2))]) for n in (3, 1, 4, 0, 2)}
    q = queries(rng, one, 16, BF16)[:5]
    np.testing.assert_array_equal(
        chunk_attention(q, one.tree, sequences=numbers).view(np.uint8),
        chunk_attention(q, other.tree, sequences=[second[n] for n in range(5)]).view(np.uint8),
    )


# the store


def test_rows_that_are_stored_may_be_left_out(rng):
    batch = Batch(chunk_size=4)
    batch.add(PROMPT)
    assert batch.tree.stored([*PROMPT, 1]) == 36
    assert batch.tree.stored(PROMPT[:7]) == 4 and batch.tree.stored([1]) == batch.tree.stored([]) == 0
    second = batch.add([*PROMPT, 1, 2], given=3)
    batch.add([*PROMPT, 1, 3], given=20)
    batch.add(PROMPT[:36], given=0)
    batch.check_store()
    for count in (1, 39):
        rows = (np.ones((2, count, 16), F32),) * 2
        with pytest.raises(ValueError, match=rf"^k: got {count} rows, expected the rows of the last 2 to 38 tokens"):
            batch.tree.add_seq([*PROMPT, 5], *rows)
    batch.check_store()
    # A chunk that others have completed already needs no rows of its own.
    batch.add([*PROMPT, 6, 7, 8, 9, 10])
    batch.tree.extend(0, [6, 7, 8, 9], *(x[:, 40:] for x in batch.rows([*PROMPT, 6, 7, 8, 9])))
    assert batch.tree.tokens(0) == [*PROMPT, 6, 7, 8, 9]
    assert batch.tree.tokens(second) == [*PROMPT, 1, 2]
    np.testing.assert_array_equal(batch.tree.rows(0)[0], batch.rows([*PROMPT, 6, 7, 8, 9])[0])


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_converted(rng, dtype, source):
    tree = PrefixTree(2, 5, 3, dtype, chunk_size=4)
    k, v = normal(rng, (2, 10, 5), source), normal(rng, (2, 10, 3), source)
    n = tree.add_seq(range(10), k, v)
    tree.append([1], k[None, :, 0], v[None, :, 0])
    for ours, given_rows in zip(tree.rows(n), (k, v), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours[:, :10], given_rows.astype(F32).astype(dtype))
        np.testing.assert_array_equal(ours[:, 10], given_rows[:, 0].astype(F32).astype(dtype))


def test_what_does_not_fit_changes_nothing():
    batch = Batch(chunk_size=4, capacity=38)  # ten chunks
    assert batch.tree.capacity == 40
    batch.add(range(20))  # five
    batch.add([*range(16), 5, 5])  # one more
    before = batch.tree.nbytes
    rows = tuple(np.ones((2, 40, 16), F32) for _ in range(2))
    with pytest.raises(ValueError, match=r"tokens: got 5 more chunks of 4 tokens on top of 6, .* 10 chunks"):
        batch.tree.add_seq(range(50, 70), *(x[:, :20] for x in rows))
    with pytest.raises(ValueError, match="tokens: got 5 more chunks"):
        batch.tree.extend(1, range(20), *(x[:, :20] for x in rows))
    with pytest.raises(ValueError, match="tokens: got 5 more chunks"):
        batch.tree.fork(1, 5)
    batch.fork(1, 3)
    batch.fork(0, 1)  # ends with a whole chunk: needs none yet
    with pytest.raises(ValueError, match="tokens: got 2 more chunks of 4 tokens on top of 9"):
        batch.tree.append([1] * 6, *(x[:, :1].swapaxes(0, 1).repeat(6, 0) for x in rows))
    batch.append([1], [0])
    with pytest.raises(ValueError, match="tokens: got 1 more chunks of 4 tokens on top of 10"):
        batch.tree.append([1], *(x[:, :1].swapaxes(0, 1) for x in rows), sequences=[5])
    batch.check_store()
    assert batch.tree.nbytes == before


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"kv_heads": 0}, ValueError, "kv_heads: got 0"),
        ({"head_dim": -1}, ValueError, "head_dim: got -1"),
        ({"value_dim": 0}, ValueError, "value_dim: got 0"),
        ({"chunk_size": 0}, ValueError, "chunk_size: got 0"),
        ({"capacity": 0}, ValueError, "capacity: got 0"),
        ({"capacity": 1 << 32}, ValueError, "capacity: got 4294967296 tokens in chunks of 64"),
        ({"chunk_size": 1 << 40}, ValueError, "capacity: got 10 tokens in chunks"),
        ({"head_dim": 1 << 40, "capacity": 1 << 30}, (ValueError, MemoryError), "capacity|memory"),
        ({"dtype": "int8"}, TypeError, "dtype: got 'int8'"),
        ({"chunk_size": 1.5}, TypeError, "chunk_size: got 1.5"),
    ],
)
def test_bad_sizes(arguments, error, match):
    with pytest.raises(error, match=match):
        PrefixTree(**{"kv_heads": 2, "head_dim": 8, "capacity": 10} | arguments)


ROWS = np.ones((2, 3, 16), F32)
STEP = np.ones((3, 2, 16), F32)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda t: t.add_seq([1, 2, 3], ROWS[:1], ROWS),
            ValueError,
            r"k: got shape \[1, 1, 3, 16\], expected \[1, 2, T, 16\]",
        ),
        (lambda t: t.add_seq([1, 2, 3], ROWS, ROWS[..., :8]), ValueError, r"v: got shape \[1, 2, 3, 8\]"),
        (lambda t: t.add_seq([1, 2, 3], ROWS, ROWS[:, :2]), ValueError, "v: got 2 rows, expected as many as k has, 3"),
        (lambda t: t.add_seq([1, 2], ROWS, ROWS), ValueError, "k: got 3 rows, expected the rows of the last 2 to 2"),
        (lambda t: t.add_seq([1, 2, 3], ROWS[0], ROWS), ValueError, "k: got shape"),
        (lambda t: t.add_seq([1, 2, 3], np.stack([ROWS] * 2), ROWS), ValueError, r"k: got shape \[2, 2, 3, 16\]"),
        (lambda t: t.add_seq([1.0, 2, 3], ROWS, ROWS), TypeError, "tokens: got dtype float64, expected integers"),
        (lambda t: t.add_seq(["a"], ROWS, ROWS), TypeError, "tokens: got"),
        (lambda t: t.add_seq([[1, 2, 3]], ROWS, ROWS), ValueError, r"tokens: got shape \(1, 3\)"),
        (lambda t: t.add_seq(3, ROWS, ROWS), TypeError, "tokens: got int"),
        (
            lambda t: t.add_seq(np.array([2**64 - 1, 1, 2], np.uint64), ROWS, ROWS),
            ValueError,
            "tokens: got 18446744073709551615",
        ),
        (lambda t: t.add_seq([1, 2, 3], ROWS.astype(int), ROWS), TypeError, "k: got dtype int64"),
        (lambda t: t.add_seq([1, 2, 3], ROWS, None), TypeError, "v: got NoneType"),
        (lambda t: t.extend(3, [1, 2, 3], ROWS, ROWS), ValueError, "sequence: got 3, expected a sequence of this tree"),
        (lambda t: t.extend(0, [1, 2], ROWS, ROWS), ValueError, "k: got 3 rows"),
        (lambda t: t.append([1, 2], STEP, STEP), ValueError, "tokens: got 2 tokens and 3 rows for 3 sequences"),
        (
            lambda t: t.append([1, 2, 3], STEP, STEP, sequences=[0, 1]),
            ValueError,
            "tokens: got 3 tokens and 3 rows for 2",
        ),
        (lambda t: t.append([1, 2, 3], STEP, STEP, sequences=[0, 1, 9]), ValueError, "sequences: got 9"),
        (lambda t: t.append([1, 2, 3], STEP, STEP, sequences=[0, 1, 0]), ValueError, "sequences: got 0 twice"),
        (lambda t: t.append([1, 2, 3], STEP, STEP, sequences=[0, 1, -1]), ValueError, "sequences: got -1"),
        (lambda t: t.append([1, 2, 3], STEP, STEP, sequences=5), TypeError, "sequences: got 5"),
        (lambda t: t.append([1, 2, 3], STEP[:, :1], STEP), ValueError, "k: got 1 heads"),
        (lambda t: t.fork(7), ValueError, "sequence: got 7"),
        (lambda t: t.fork(0, 0), ValueError, "n: got 0"),
        (lambda t: t.fork(0, 1 << 40), ValueError, "n: got 1099511627776, expected at most 65536"),
        (lambda t: t.remove(5), ValueError, "sequence: got 5"),
        (lambda t: t.remove("0"), TypeError, "sequence: got '0'"),
        (lambda t: t.length(5), ValueError, "sequence: got 5"),
        (lambda t: t.tokens(-1), ValueError, "sequence: got -1"),
        (lambda t: t.rows(5), ValueError, "sequence: got 5"),
        (lambda t: t.stored("abc"), TypeError, "tokens: got str"),
    ],
)
def test_bad_calls_change_nothing(call, error, match):
    batch = Batch()
    for n in range(3):
        batch.add([*range(n + 3)])
    with pytest.raises(error, match=f"^{match}"):
        call(batch.tree)
    batch.check_store()


Q = np.ones((3, 4, 16), F32)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"q": Q[:2]}, ValueError, "q: got 2 rows, expected one of each of 3 sequences"),
        ({"q": Q, "sequences": [0, 1]}, ValueError, "q: got 3 rows, expected one for each of 2 sequences"),
        ({"q": Q, "sequences": [0, 1, 1]}, ValueError, "sequences: got 1 twice"),
        ({"q": Q, "sequences": [0, 1, 5]}, ValueError, "sequences: got 5, expected a sequence of this tree"),
        ({"q": Q[:, :3]}, ValueError, r"q: got shape \(3, 3, 16\), expected \[sequences, a multiple of 2 heads, 16\]"),
        ({"q": Q[:, :0]}, ValueError, r"q: got shape \(3, 0, 16\)"),
        ({"q": Q[..., :8]}, ValueError, "q: got shape"),
        ({"q": Q[None]}, ValueError, "q: got shape"),
        ({"q": Q.astype(np.float64)}, TypeError, "q: got dtype float64"),
        ({"q": Q.tolist()}, TypeError, "q: got list"),
        ({"q": Q, "tree": None}, TypeError, "tree: got NoneType, expected a PrefixTree"),
        ({"q": Q, "scale": np.nan}, ValueError, "scale: got nan"),
        ({"q": Q, "softcap": -1.0}, ValueError, r"softcap: got -1\.0"),
        ({"q": Q, "sinks": np.ones(3)}, ValueError, r"sinks: got shape \(3,\)"),
        ({"q": Q, "shared": 1}, TypeError, "shared: got 1"),
        ({"q": Q, "return_lse": None}, TypeError, "return_lse: got None"),
        ({"q": Q, "out": np.ones((3, 4, 8), F32)}, ValueError, "out: got shape"),
        ({"q": Q, "out": Q}, ValueError, "out: got an array that overlaps q"),
    ],
)
def test_bad_attention(arguments, error, match):
    batch = Batch()
    for n in range(3):
        batch.add([*range(n + 3)])
    with pytest.raises(error, match=f"^{match}"):
        chunk_attention(**{"tree": batch.tree} | arguments)


def test_readers_and_writers_on_many_threads(rng):
    """Every result is that of a moment between two appends."""
    tree = PrefixTree(1, 8, dtype=F32, chunk_size=4)
    k = normal(rng, (1, 40, 8))
    numbers = [tree.add_seq([*range(40), n], *(np.concatenate([k, k[:, :1]], 1),) * 2) for n in range(4)]
    q = np.zeros((4, 1, 8), F32)  # all keys weigh the same, so lse counts them
    wrong, done = [], threading.Event()

    def read():
        while not done.is_set():
            lse = chunk_attention(q, tree, sequences=numbers, return_lse=True)[1]
            lengths = np.exp(lse.astype(np.float64)).round(2)
            if len(np.unique(lengths)) != 1:
                wrong.append(lengths)

    def come_and_go():
        while not done.is_set():
            tree.remove(tree.add_seq([*range(38)], k[:, :38], k[:, :38]))

    with ThreadPoolExecutor(3) as others:
        for job in (read, read, come_and_go):
            others.submit(job)
        for step in range(300):
            row = np.ones((4, 1, 8), F32)
            tree.append([step % 3] * 4, row, row, sequences=numbers)
        done.set()
    assert not wrong and [tree.length(n) for n in numbers] == [341] * 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_distinct_tokens():
    heads, dim, length = 4, 64, 40_000
    k = np.ones((heads, length, dim), BF16)
    gc.collect()
    before = resident()
    tree = PrefixTree(heads, dim, capacity=1 << 22)
    tokens = np.arange(length)
    for n in range(20):
        tree.add_seq(np.append(tokens[:-1], length + n), k, k)
    planned = 2 * heads * -(-(length - 64 + 20 * 64) * dim * 2 // (2 << 20)) * (2 << 20)
    assert tree.nbytes == planned
    # Token ids are 8 bytes each.
    assert resident() - before < planned + (16 << 20)
    for n in tree.sequences:
        tree.remove(n)
    assert (tree.chunks, tree.nbytes) == (0, 2 * heads * (2 << 20))
    assert resident() - before < tree.nbytes + (16 << 20)


def test_a_model_decodes_with_it(rng):
    """A step at a time, as `attention` over each sequence's own rows."""
    batch = Batch(kv_heads=2, head_dim=16, chunk_size=8)
    for n in range(4):
        batch.add([*PROMPT, n])
    for step in range(12):
        batch.append([step + n % 2 for n in range(4)])
        q = queries(rng, batch, 4)
        out = chunk_attention(q, batch.tree)
        for n, row in enumerate(out):
            k, v = batch.tree.rows(n)
            expected = la.attention(q[n][:, None], k, v, causal=True)
            tolerances.same_storage(q, k, v).check(row, expected[:, 0])


def test_docstring_examples():
    result = doctest.testmod(sys.modules["longattn.kv.chunk_attention"])
    assert result.attempted > 0 and result.failed == 0
