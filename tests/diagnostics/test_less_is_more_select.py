"""LessIsMore: one list for all heads from their rankings, and attention over it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tolerances
from longattn.diagnostics import less_is_more_attention, less_is_more_select
from longattn.reference import diagnostics as reference
from longattn.reference.dense import attention, attention_weights
from random_arrays import DTYPES, F32, qkv


@settings(max_examples=80)
@given(st.data())
def test_lists_are_those_of_the_rule(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    heads, keys = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
    # Few distinct scores: many ties.
    scores = rng.integers(0, data.draw(st.sampled_from([2, 5, 10**6])), (heads, keys)).astype(F32)
    budget, ratio = data.draw(st.integers(1, 45)), data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    sinks = data.draw(st.integers(0, int(budget * ratio)))
    got = less_is_more_select(scores, budget, recent_ratio=ratio, sinks=sinks)
    expected = reference.less_is_more_select(scores, budget, recent_ratio=ratio, sinks=sinks)
    np.testing.assert_array_equal(got, expected)
    recent = int(budget * ratio) - sinks
    assert len(got) == min(budget, keys) and (np.diff(got) > 0).all()
    if budget < keys:
        assert set(range(sinks)) | set(range(keys - recent, keys)) <= set(got.tolist())


def test_one_head_gets_its_best(rng):
    scores = rng.standard_normal((1, 100))
    got = less_is_more_select(scores, 20, recent_ratio=0.5, sinks=3)
    middle = 3 + np.argsort(-scores[0, 3:93])[:10]
    assert got.tolist() == sorted([0, 1, 2, *middle, *range(93, 100)])


def test_heads_of_equal_scores(rng):
    scores = rng.standard_normal(100)
    one = less_is_more_select(scores[None], 24)
    np.testing.assert_array_equal(one, less_is_more_select(np.repeat(scores[None], 6, axis=0), 24))


def test_ranks_come_before_heads():
    scores = np.array([[0, 9, 8, 7, 1, 1, 0.0], [0, 1, 1, 1, 9, 8, 0]])
    assert less_is_more_select(scores, 2, recent_ratio=0.0, sinks=0).tolist() == [1, 4]
    assert less_is_more_select(scores, 3, recent_ratio=0.0, sinks=0).tolist() == [1, 2, 4]


def test_nan_comes_last():
    scores = np.array([[np.nan, 1, 2, np.nan, 0]])
    assert less_is_more_select(scores, 3, recent_ratio=0.0, sinks=0).tolist() == [1, 2, 4]
    assert less_is_more_select(scores, 4, recent_ratio=0.0, sinks=0).tolist() == [0, 1, 2, 4]


def test_a_budget_of_all_tokens_is_dense(rng):
    q, k, v = (x[0] for x in qkv(rng, rows=1))
    out, selected = less_is_more_attention(q, k, v, budget=37)
    assert selected.tolist() == list(range(37))
    again, _ = less_is_more_attention(q, k, v, selected)
    for x in (out, again):
        tolerances.attention(q, k, v).check(x, attention(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_that_select_and_layers_that_use(rng, isa, dtype):
    q, k, v = (x[0] for x in qkv(rng, rows=1, keys=200, q_dtype=dtype, heads=6))
    out, selected = less_is_more_attention(q, k, v, budget=32, recent_ratio=0.5, sinks=2)
    tolerances.attention(q, k, v).check(out, attention(q, k, v))
    weights = attention_weights(q, k, [0])[:, 0]
    expected = reference.less_is_more_select(weights, 32, recent_ratio=0.5, sinks=2)
    np.testing.assert_array_equal(selected, expected)
    out, same = less_is_more_attention(q, k, v, selected)
    tolerances.attention(q, k, v).check(out, attention(q, k[:, selected], v[:, selected]))
    np.testing.assert_array_equal(same, selected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: less_is_more_select(x[0], 4), ValueError, "scores: got shape"),
        (lambda x: less_is_more_select(x.astype(int), 4), TypeError, "scores: got dtype int64"),
        (lambda x: less_is_more_select(x, 0), ValueError, "budget: got 0"),
        (lambda x: less_is_more_select(x, 8, recent_ratio=1.5), ValueError, "recent_ratio: got 1.5"),
        (lambda x: less_is_more_select(x, 8), ValueError, "sinks: got 4, expected at most 2"),
        (lambda x: less_is_more_select(x, 8, sinks=-1), ValueError, "sinks: got -1"),
    ],
)
def test_bad_input(rng, call, error, message):
    with pytest.raises(error, match=message):
        call(rng.standard_normal((3, 40)))
