"""`PrefixTree`: what it takes, refuses and holds, also under readers and writers on many threads."""

import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.kv import PrefixTree, chunk_attention
from prefix_trees import PROMPT, Batch, queries
from random_arrays import BF16, DTYPES, F32, normal
from resident import resident


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
        (
            lambda t: t.append([1, 2, 3], STEP[:, :1], STEP),
            ValueError,
            r"k: got shape \[1, 1, 3, 16\], expected \[1, 2, T, 16\]",
        ),
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
            tolerances.same_storage(q, k, v, together=8).check(row, expected[:, 0])
