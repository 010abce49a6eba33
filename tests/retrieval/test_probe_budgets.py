"""A budget of rows for each KV head, and its choice by the last queries of a prefill."""

import numpy as np
import pytest

import longattn as la
from longattn.retrieval import probe_budgets
from random_arrays import DTYPES, F32, normal
from random_stores import queries, rows, store, store_of

CALL = {"sinks": 3, "window": 40}


def _heads(result, heads):
    return [np.asarray(x)[heads] for x in (result.out, result.lse, result.stats.missed_mass)]


@pytest.mark.parametrize("rest", ["values", "none", "sampled"])
@pytest.mark.parametrize("kind", ["signatures", "clusters", "flat"])
def test_each_head_reads_its_own_rows(rng, isa, threads, kind, rest):
    """The bits of a head are those of a call with its budget for all of them."""
    if kind != "signatures" and rest == "sampled":
        pytest.skip("weighs no single rows")
    s = store(rng, 3, 1700, 32)
    index = la.index.make(kind, s)
    q = queries(rng, 6, 2)
    rest = None if kind == "flat" else rest
    budgets = (20, 900, 111)
    result = la.retrieval_attention(q, s, index, top_k=budgets, rest=rest, return_selected=True, **CALL)
    for h, rows_of in enumerate(budgets):
        alone = la.retrieval_attention(q, s, index, top_k=rows_of, rest=rest, return_selected=True, **CALL)
        for a, b in zip(_heads(result, [2 * h, 2 * h + 1]), _heads(alone, [2 * h, 2 * h + 1]), strict=True):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(result.stats.selected[h], alone.stats.selected[h], strict=True):
            np.testing.assert_array_equal(a, b)


def test_arrays_and_batches(rng):
    stores = [store(rng, 2, n, 32) for n in (900, 1500)]
    indexes = [la.index.Signatures(s) for s in stores]
    qs = [queries(rng, 4), queries(rng, 4)]
    both = la.retrieval_attention_batch(qs, stores, indexes, top_k=np.array([30, 200]), **CALL)
    for q, s, index, result in zip(qs, stores, indexes, both, strict=True):
        alone = la.retrieval_attention(q, s, index, top_k=[30, 200], **CALL)
        np.testing.assert_array_equal(result.out, alone.out)
        np.testing.assert_array_equal(result.stats.keys_attended[:, 0], alone.stats.keys_attended[:, 0])


def _errors(q, s, index, budget, relative_to="values", **call):
    exact = la.attention(q.astype(np.float32), s.keys, s.values, causal=True)
    out = la.retrieval_attention(q, s, index, top_k=budget, **CALL, **call).out.astype(np.float32)
    gap = np.linalg.norm(out - exact, axis=-1)
    if relative_to == "output":
        gap = gap / np.linalg.norm(exact, axis=-1)
    by_head = gap.reshape(s.kv_heads, -1).mean(1)
    if relative_to == "values":
        by_head /= np.sqrt((np.asarray(s.values, np.float64) ** 2).sum(-1).mean(-1))
    return by_head


def _unlike(rng, dtype=F32):
    """A head whose mass is in a few rows, one that spreads it, and one between them."""
    keys, values = rows(rng, 3, 2000, 32)
    q = normal(rng, (6, 24, 32), spread=1.0)
    keys *= np.array([2.5, 0.2, 1.0], np.float32)[:, None, None]
    return q.astype(dtype), store_of(keys, values, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relative_to", ["values", "output"])
def test_each_head_gets_the_least_budget_that_will_do(rng, dtype, relative_to):
    q, s = _unlike(rng, dtype)
    index = la.index.Signatures(s)
    budgets = (8, 64, 256, 1024)
    by_budget = {k: _errors(q, s, index, k, relative_to, rest="none") for k in budgets}
    allowed = 1.01 * float(np.median(by_budget[256]))  # not at a head's own error, where rounding decides
    found = probe_budgets(q, s, index, error=allowed, budgets=budgets, relative_to=relative_to, rest="none", **CALL)
    for h in range(3):
        enough = [k for k in budgets if by_budget[k][h] <= allowed]
        assert found.top_k[h] == (enough[0] if enough else budgets[-1])
        assert found.met[h] == bool(enough)
        np.testing.assert_allclose(found.error[h], by_budget[found.top_k[h]][h], rtol=1e-3)
    assert len(set(found.top_k)) > 1


def test_the_choice_holds_for_later_queries(rng):
    """Heads that differ: the error asked for, with fewer rows than one number for all of them needs."""
    q, s = _unlike(rng)
    index = la.index.Signatures(s)
    found = probe_budgets(q, s, index, error=0.05, rest="none", **CALL)
    assert found.met.all()
    later = normal(rng, (6, 32, 32), spread=1.0)
    assert (_errors(later, s, index, found.top_k, rest="none") < 1.5 * 0.05).all()
    same_for_all = max(found.top_k)
    assert sum(found.top_k) < 0.8 * 3 * same_for_all


def test_an_estimate_of_the_rest_takes_fewer_rows(rng):
    q, s = _unlike(rng)
    index = la.index.Signatures(s)
    values, none = (probe_budgets(q, s, index, error=0.05, rest=rest, **CALL) for rest in ("values", "none"))
    assert sum(values.top_k) < sum(none.top_k)


def test_bad_inputs(rng):
    q, s = _unlike(rng)
    index = la.index.Signatures(s)
    for error, match, arguments in [
        (ValueError, "budgets: got", {"budgets": ()}),
        (ValueError, "budgets: got", {"budgets": (5, 5)}),
        (ValueError, "budgets: got", {"budgets": (9, 5)}),
        (ValueError, "budgets: got", {"budgets": (0, 5)}),
        (TypeError, "budgets", {"budgets": (1.5,)}),
        (ValueError, "error: got 0", {"error": 0}),
        (ValueError, "error: got nan", {"error": float("nan")}),
        (ValueError, "relative_to: got 'keys'", {"relative_to": "keys"}),
        (ValueError, "window", {"window": -1}),
    ]:
        with pytest.raises(error, match=match):
            probe_budgets(q, s, index, **arguments)
    for error, match, arguments in [
        (ValueError, "q: got shape", (q[0], s, index)),
        (ValueError, "q: got shape", (q[:, :0], s, index)),
        (ValueError, "q: got 5 heads", (q[:5], s, index)),
        (TypeError, "store: got list", (q, [], index)),
        (ValueError, "index: got the index of another", (q, s, la.index.Flat(store(rng, 3)))),
    ]:
        with pytest.raises(error, match=match):
            probe_budgets(*arguments)
    for top_k, match in [([5, 6], "got 2 numbers"), ([5, 0, 6], "expected at least 1")]:
        with pytest.raises(ValueError, match=match):
            la.retrieval_attention(q[:, :1], s, index, top_k=top_k)
    with pytest.raises(TypeError, match="top_k"):
        la.retrieval_attention(q[:, :1], s, index, top_k=[5, 6.5, 7])
