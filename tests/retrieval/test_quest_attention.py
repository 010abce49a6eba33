"""quest_attention against its oracle."""

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import retrieval as reference
from longattn.retrieval import quest_attention
from random_arrays import BF16, DTYPES
from random_stores import queries, rows, store, store_of


@pytest.mark.parametrize("shape", [(4, 2, 1000, 32, 24), (7, 1, 533, 20, 1), (2, 2, 300, 64, 64)], ids=str)
@pytest.mark.parametrize("page_size", [16, 5])
def test_oracle(rng, isa, threads, shape, page_size):
    heads, kv_heads, count, dim, value_dim = shape
    s = store(rng, kv_heads, count, dim, value_dim)
    index = la.index.Pages(s, page_size, "bounds")
    q = queries(rng, heads, 3, dim=dim)
    for call in ({"token_budget": 100}, {"token_budget": 1, "sinks": 3, "window": 40}, {"scale": 0.3}):
        result = quest_attention(q, s, index, return_selected=True, **call)
        expected = reference.quest_attention(q, s.keys, s.values, page_size, **call)
        for picked, wanted in zip(result.stats.selected, expected.selected, strict=True):
            for a, b in zip(picked, wanted, strict=True):
                np.testing.assert_array_equal(a, b)
        tolerance = tolerances.attention(q, s.keys, s.values, scale=call.get("scale"))
        tolerance.check(result.out, expected.out, result.lse, expected.lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_rows_are_causal_attention(rng, isa, dtype):
    s = store(rng, 2, 700, 40, dtype=dtype)
    q = queries(rng, 4, 2, dim=40, dtype=dtype)
    result = quest_attention(q, s, la.index.Pages(s, 16, "bounds"), token_budget=704)
    out, lse = la.attention(q, s.keys, s.values, causal=True, return_lse=True)
    tolerances.same_storage(q, s.keys, s.values).check(result.out, out, result.lse, lse)
    assert (result.stats.missed_mass_bound == 0).all()


def test_the_bound_holds(rng):
    """Of each logit of a page, and so of the mass that is missed."""
    s = store(rng, 2, 2000, 40, dtype=BF16)
    index = la.index.Pages(s, 16, "bounds")
    q = queries(rng, 8, 2, dim=40)
    for budget in (64, 1024, 1968):
        result = quest_attention(q, s, index, token_budget=budget, return_selected=True)
        exact = reference.attention(q, s.keys, s.values, result.stats.selected, len(index), sinks=0, window=16)
        assert (exact.missed_mass <= result.stats.missed_mass_bound + 1e-6).all()
    assert (result.stats.missed_mass_bound < 1).any()
    for page in reference.page_rows(len(index), 16):
        keys = np.asarray(s.keys, np.float64)[0, page]
        scores = reference.unit_scores(q[:4, 0], np.asarray(s.keys)[0], page, page, "bounds")
        assert (keys @ q[:4, 0].T.astype(np.float64) <= scores + 1e-9).all()


def test_pages_of_one_row_are_exact_top_k(rng, isa):
    s = store(rng, 1, 900, 32)
    q = queries(rng, 1)
    result = quest_attention(q, s, la.index.Pages(s, 1, "bounds"), token_budget=50, return_selected=True)
    best = np.sort(np.argsort(-(s.keys[0, :884] @ q[0, 0]), kind="stable")[:50])
    np.testing.assert_array_equal(result.stats.selected[0][0], best)


def test_steps_read_what_a_prefill_reads(rng, isa):
    keys, values = rows(rng, 2, 640, 32)
    q = queries(rng, 4, 40)
    whole = store_of(keys, values)
    call = {"token_budget": 64, "return_selected": True}
    expected = quest_attention(q, whole, la.index.Pages(whole, 16, "bounds"), **call)
    s = store_of(keys[:, :600], values[:, :600])
    index = la.index.Pages(s, 16, "bounds")
    for i in range(40):
        s.append(keys[:, 600 + i : 601 + i], values[:, 600 + i : 601 + i])
        step = quest_attention(q[:, i : i + 1], s, index, **call)
        # A step does not see pages that rows after it completed: it reads their rows exactly.
        if (601 + i) // 16 == 640 // 16 or expected.stats.keys_attended[0, i] == step.stats.keys_attended[0, 0]:
            for h in range(2):
                np.testing.assert_array_equal(step.stats.selected[h][0], expected.stats.selected[h][i])
            np.testing.assert_allclose(step.out[:, 0], expected.out[:, i], atol=1e-5)


def test_bad_arguments(rng):
    s = store(rng)
    q, index = queries(rng), la.index.Pages(s, 16, "bounds")
    with pytest.raises(TypeError, match="index: got Signatures, expected Pages"):
        quest_attention(q, s, la.index.Signatures(s))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="index: got pages scored by 'mean', expected 'bounds'"):
        quest_attention(q, s, la.index.Pages(s))
    with pytest.raises(ValueError, match="token_budget: got 0"):
        quest_attention(q, s, index, token_budget=0)
    with pytest.raises(ValueError, match="index: got the index of another store"):
        quest_attention(q, store(rng), index)
