"""Selective attention against its float64 reference, its identities, and the eviction that goes with it."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import longattn as la
import tolerances
from longattn import _core
from longattn.reference import dense as reference
from random_arrays import BF16, DTYPES, F32, LAYOUTS, normal, qkv
from running import on_threads, running_on

selective = la.dense.selective_attention


def check(q, k, v, *, state=None, **options):
    """Compare output, lse and state with the reference."""
    everything = {"state": state, "return_state": True, "return_lse": True} | options
    out, lse, after = selective(q, k, v, **everything)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:-1], v.shape[-1])
    assert lse.dtype == after.dtype == np.float32 and after.shape == (*k.shape[:-3], k.shape[-2])
    expected, expected_lse, expected_after = reference.selective_attention(q, k, v, **everything)
    most = 0.0 if state is None else float(np.max(state, initial=0.0))
    tolerance, f_atol = tolerances.selective(q, k, v, scale=options.get("scale"), state=most)
    tolerance.check(out, expected, lse, expected_lse)
    np.testing.assert_allclose(after, expected_after, atol=f_atol, rtol=0, err_msg="state")
    return out, after


@pytest.mark.parametrize("length", [1, 2, 3, 8, 17, 127, 129, 192, 193, 256, 400])
def test_lengths(rng, isa, length):
    check(*qkv(rng, rows=length, keys=length, dim=20))


@pytest.mark.parametrize(("rows", "keys"), [(1, 300), (5, 129), (40, 300), (200, 1100)])
def test_continued(rng, isa, threads, rows, keys):
    q, k, v = qkv(rng, batch=2, rows=rows, keys=keys, dim=24, value_dim=12)
    check(q, k, v, state=rng.random((2, keys - rows)) * 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(rng, isa, dtype, layout):
    q, k, v = qkv(rng, batch=2, rows=70, keys=70, dim=24, q_dtype=dtype, layout=layout)
    check(q, k, v)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (7, 1), (4, 4)])
def test_groups_and_selectors(rng, isa, heads, kv_heads):
    q, k, v = qkv(rng, batch=2, heads=heads, kv_heads=kv_heads, rows=60, keys=60)
    repeated = [np.repeat(x, heads // kv_heads, axis=1) for x in (k, v)]
    tolerance, _ = tolerances.selective(q, k, v)
    for head in {0, heads // 2, heads - 1}:
        out, _ = check(q, k, v, selector_head=head)
        tolerance.check(out, np.float64(selective(q, *repeated, selector_head=head)))


@pytest.mark.parametrize("options", [{"scale": 0.7}, {"scale": -0.3}, {"softcap": 1.5}, {"protect_first": 0},
                                     {"protect_first": 5}, {"protect_first": 1000}])  # fmt: skip
def test_options(rng, isa, options):
    check(*qkv(rng, rows=100, keys=100), **options)


@settings(max_examples=20 * len(_core.available_isas()))
@given(
    seed=st.integers(0, 2**32 - 1), batch=st.integers(0, 2), group=st.integers(1, 3), past=st.integers(0, 40),
    rows=st.one_of(st.integers(0, 20), st.sampled_from([63, 192, 200])), dim=st.sampled_from([1, 3, 16, 40]),
    protect=st.integers(0, 4), spread=st.sampled_from([0.3, 1.0, 4.0]), isa=st.sampled_from(_core.available_isas()),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_problem(*, seed, batch, group, past, rows, dim, protect, spread, isa, dtype):
    rng = np.random.default_rng(seed)
    q, k, v = qkv(rng, batch=batch, heads=2 * group, kv_heads=2, rows=rows, keys=past + rows, dim=dim,
                  q_dtype=dtype, spread=spread)  # fmt: skip
    with running_on(isa):
        check(q, k, v, protect_first=protect, state=4 * rng.random((batch, past)), selector_head=2 * group - 1)


def test_rank_3(rng):
    q, k, v = qkv(rng, rows=50, keys=60)
    state = rng.random(10)
    out, after = selective(q[0], k[0], v[0], state=state, return_state=True)
    whole, whole_after = selective(q, k, v, state=state[None], return_state=True)
    np.testing.assert_array_equal(out, whole[0])
    np.testing.assert_array_equal(after, whole_after[0])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_store_of_codes(rng, isa, dtype):
    store = la.KVStore(2, 24, dtype=dtype, capacity=250)
    store.append(normal(rng, (2, 250, 24)), normal(rng, (2, 250, 24)))
    k, v = np.asarray(store.keys), np.asarray(store.values)
    for rows in (1, 100):
        q, state = normal(rng, (4, rows, 24)), rng.random(250 - rows)
        tolerance, _ = tolerances.selective(q, k, v, state=1.0)
        out = selective(q, store.keys, store.values, state=state)
        tolerance.check(out, reference.selective_attention(q, k, v, state=state))


def test_without_positive_logits_it_is_causal_attention(rng, isa):
    q, k, v = qkv(rng, rows=250, keys=250)
    q[:, 0], k = -np.abs(q[:, 0]), np.abs(k)
    out, after = selective(q, k, v, return_state=True)
    assert (after == 0).all()
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=True))


@pytest.mark.parametrize("first", [250, 1])
def test_steps_are_prefill(rng, isa, first):
    q, k, v = qkv(rng, batch=2, rows=270, keys=270, dim=24)
    whole, after = selective(q, k, v, return_state=True)
    tolerance, f_atol = tolerances.selective(q, k, v)
    state, at = None, 0
    for end in [first, *range(first + 1, 270, 20 if first == 1 else 1), 270]:
        part = slice(at, end)
        out, state = selective(q[:, :, part], k[:, :, :end], v[:, :, :end], state=state, return_state=True)
        tolerance.check(out, np.float64(whole[:, :, part]))
        at = end
    np.testing.assert_allclose(state, after, atol=f_atol, rtol=0)


def test_rows_0_to_2_are_causal_attention(rng, isa):
    """Nothing but the protected key 0 lies before row 1, so nothing is selected before row 2 has attended."""
    q, k, v = qkv(rng, rows=30, keys=30, spread=4.0)
    dense = la.attention(q, k, v, causal=True)
    tolerance = tolerances.same_storage(q, k, v)
    for protect in (1, 2):
        out = selective(q, k, v, protect_first=protect)
        tolerance.check(out[:, :, :3], np.float64(dense[:, :, :3]))
        assert np.abs(out[:, :, 5:] - dense[:, :, 5:]).max() > 0.1


def test_protecting_every_key_is_causal_attention(rng, isa):
    q, k, v = qkv(rng, rows=30, keys=30)
    out, after = selective(q, k, v, protect_first=30, return_state=True)
    assert (after == 0).all()
    tolerances.same_storage(q, k, v).check(out, la.attention(q, k, v, causal=True))


def test_state_never_falls_and_spares_the_first_and_the_newest(rng, isa):
    q, k, v = qkv(rng, batch=2, rows=200, keys=200)
    state = None
    for end in (50, 51, 120, 200):
        start = 0 if state is None else state.shape[-1]
        out, after = selective(q[:, :, start:end], k[:, :, :end], v[:, :, :end], state=state, return_state=True)
        if state is not None:
            assert (after[:, :start] >= state).all()
        assert (after[:, 0] == 0).all() and (after[:, -1] == 0).all() and np.isfinite(out).all()
        state = after


def test_a_selected_key_is_lost_to_all_heads(rng, isa):
    """One row whose selecting head points at a key hides it from every head of the rows after it, not from its own."""
    q, k, v = qkv(rng, heads=2, kv_heads=2, rows=20, keys=20, dim=8)
    q[:, 0] = 0
    k[:, 0] = 0
    q[0, 0, 7, 0] = k[0, 0, 3, 0] = 100.0
    v[:, 1] = 0
    v[0, 1, 3] = 1.0
    dense, out = la.attention(q, k, v, causal=True), selective(q, k, v)
    np.testing.assert_allclose(out[0, 1, :8], dense[0, 1, :8], atol=1e-6)
    assert (out[0, 1, 8:] == 0).all() and (dense[0, 1, 8:] > 0).all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_same_bits_on_any_number_of_threads(rng, dtype):
    q, k, v = qkv(rng, rows=300, keys=3000, dim=32, q_dtype=dtype)
    state = rng.random((1, 2700))
    results = on_threads(lambda: selective(q, k, v, state=state, return_state=True, return_lse=True))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


def test_visible_nan_spoils_what_it_selects(rng, isa):
    q, k, v = qkv(rng, heads=2, kv_heads=2, rows=20, keys=20)
    k[0, 0, 10, 0] = np.nan
    out, after = selective(q, k, v, return_state=True)
    assert np.isfinite(out[0, :, :10]).all() and np.isnan(out[0, 0, 10:]).all()
    assert np.isfinite(out[0, 1, :12]).all() and np.isnan(out[0, 1, 12:]).all()
    assert np.isnan(after[0, 10]) and np.isfinite(np.delete(after[0], 10)).all()


def test_inputs_are_not_written(rng):
    q, k, v = qkv(rng, rows=5, keys=20)
    arrays = [q, k, v, rng.random((1, 15)).astype(np.float32)]
    before = [x.copy() for x in arrays]
    for x in arrays:
        x.flags.writeable = False
    selective(*arrays[:3], state=arrays[3], return_state=True)
    for x, y in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(x, y)


# eviction


def slowly(state, budget, protect_first):
    """Keys go one by one: the largest F, of equals the oldest; never the protected, never the newest."""
    kept = list(range(len(state)))
    while len(kept) > budget:
        out = max(kept[protect_first:-1], key=lambda j: (state[j], -j))
        kept.remove(out)
    return kept


@settings(max_examples=200)
@given(
    f=st.lists(st.one_of(st.sampled_from([0.0, 0.0, 1.0, 2.5, np.inf]), st.floats(0, 9, width=16)), max_size=12),
    protect=st.integers(0, 4), more=st.integers(1, 12),
)  # fmt: skip
def test_evicts_the_largest_f(f, protect, more):
    state, budget = np.array(f), protect + more
    kept = la.dense.max_f_kept(state, budget, protect_first=protect)
    assert kept.dtype == np.int64
    assert kept.tolist() == slowly(state, budget, protect)
    both = la.dense.max_f_kept(np.stack([state, state[::-1]]), budget, protect_first=protect)
    assert both.tolist() == [slowly(state, budget, protect), slowly(state[::-1], budget, protect)]


def test_a_budget_of_all_keys_evicts_none(rng):
    assert la.dense.max_f_kept(rng.random(20), 20).tolist() == list(range(20))
    assert la.dense.max_f_kept(rng.random((2, 20)), 50).tolist() == [list(range(20))] * 2


def test_evicting_what_is_hidden_changes_nothing(rng, isa):
    """Keys whose F has made their weight vanish can go: the next steps are the same without them."""
    q, k, v = qkv(rng, heads=2, kv_heads=1, rows=60, keys=60, dim=16, spread=10.0)
    _, state = selective(q[:, :, :50], k[:, :, :50], v[:, :, :50], return_state=True)
    state[0, 10:40] += 1000.0
    full, _ = selective(q[:, :, 50:], k, v, state=state, return_state=True)
    kept = la.dense.max_f_kept(state, 20)[0]
    assert kept.tolist() == [*range(10), *range(40, 50)]
    rows = [*kept, *range(50, 60)]
    small = selective(q[:, :, 50:], k[:, :, rows], v[:, :, rows], state=state[:, kept])
    tolerance, _ = tolerances.selective(q, k, v)
    tolerance.check(small, np.float64(full))


# what is refused

Q, K, V = np.ones((2, 4, 3, 8), np.float32), np.ones((2, 2, 5, 8), np.float32), np.ones((2, 2, 5, 6), np.float32)
STATE = np.zeros((2, 2), np.float32)
BAD = [
    ({"state": None}, ValueError, "state: got None with 2 keys before the first query"),
    ({"state": np.zeros((2, 5))}, ValueError, "state: got shape (2, 5), expected (2, 2)"),
    ({"state": np.zeros((2, 2), int)}, TypeError, "state: got dtype int64"),
    ({"state": [[0.0, 0.0]] * 2}, TypeError, "state: got list"),
    ({"q": np.ones((2, 4, 6, 8), np.float32)}, ValueError, "q: got 6 queries, expected at most the 5 keys"),
    ({"q": Q.astype(np.float64)}, TypeError, "q: got dtype float64"),
    ({"q": Q[:, :3]}, ValueError, "q: got 3 heads"),
    ({"k": K[:1]}, ValueError, "k: got batch 1, expected 2 as in q"),
    ({"k": K[..., :7]}, ValueError, "k: got head_dim 7"),
    ({"v": V[:, :, :4]}, ValueError, "v: got length 4, expected 5 as in k"),
    ({"v": V.astype(np.float16)}, TypeError, "v: got dtype float16"),
    ({"selector_head": 4}, ValueError, "selector_head: got 4, expected 0 to 3"),
    ({"selector_head": -1}, ValueError, "selector_head: got -1"),
    ({"selector_head": True}, TypeError, "selector_head: got True, expected an integer"),
    ({"protect_first": -1}, ValueError, "protect_first: got -1, expected at least 0"),
    ({"protect_first": 1.0}, TypeError, "protect_first: got 1.0"),
    ({"scale": np.inf}, ValueError, "scale: got inf"),
    ({"softcap": -2}, ValueError, "softcap: got -2"),
    ({"return_state": 1}, TypeError, "return_state: got 1"),
    ({"return_lse": None}, TypeError, "return_lse: got None"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_refuses(change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        selective(**({"q": Q, "k": K, "v": V, "state": STATE} | change))


@pytest.mark.parametrize(
    ("state", "budget", "protect", "error", "message"),
    [
        (np.zeros(5), 1, 1, ValueError, "budget: got 1, expected at least 2"),
        (np.zeros(5), 3.0, 1, TypeError, "budget: got 3.0"),
        (np.zeros(5), 3, -1, ValueError, "protect_first: got -1"),
        (np.zeros((1, 2, 5)), 3, 1, ValueError, "state: got shape (1, 2, 5), expected [Lk] or [B, Lk]"),
        (np.zeros(5, int), 3, 1, TypeError, "state: got dtype int64"),
        (np.array([0.0, np.nan]), 3, 1, ValueError, "state: got NaN"),
    ],
)
def test_eviction_refuses(state, budget, protect, error, message):
    with pytest.raises(error, match=re.escape(message)):
        la.dense.max_f_kept(state, budget, protect_first=protect)


def test_no_rows(rng):
    q, k, v = qkv(rng, rows=0, keys=7)
    out, state = selective(q, k, v, state=np.arange(7.0)[None], return_state=True)
    assert out.shape == (1, 4, 0, 16) and state.tolist() == [list(range(7))]
    assert selective(normal(rng, (0, 2, 3, 4)), *(normal(rng, (0, 1, 3, 4)),) * 2).shape == (0, 2, 3, 4)
