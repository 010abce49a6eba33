"""`PrefixTree` and `chunk_attention`: what sequences have in common is stored and read once; nothing else changes."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tolerances
from longattn.kv import PrefixTree, chunk_attention
from prefix_trees import PROMPT, Batch, family, queries
from random_arrays import BF16, DTYPES, F32, normal
from running import on_threads

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
    tolerances.same_storage(q, k, v, together=8).check(once[0], each[0], once[1], each[1])


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
