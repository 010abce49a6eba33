"""Policies by name and budget, and what they keep of a prompt by a sample of its queries."""

import numpy as np
import pytest

import longattn as la
from longattn.kv import evict
from longattn.retrieval.ways import FURTHER, POLICIES, WAYS, chosen_of_all, heaviest

HEADS, GROUP, DIM, LENGTH = 2, 2, 16, 300
BUDGET = {"rows": 60, "sinks": 4, "window": 16}


@pytest.fixture
def prompt(rng):
    k, v = rng.standard_normal((2, HEADS, LENGTH, DIM), dtype=np.float32)
    q = 2 * rng.standard_normal((HEADS * GROUP, LENGTH, DIM), dtype=np.float32)
    return q, k, v


def test_every_policy_has_a_name():
    assert {kind.policy for kind in evict.KINDS.values()} == {
        thing
        for thing in vars(evict).values()
        if isinstance(thing, type) and issubclass(thing, evict.Policy) and thing is not evict.Policy
    }
    assert {way.policy for way in POLICIES} == set(evict.KINDS)


@pytest.mark.parametrize("name", [name for name, kind in evict.KINDS.items() if kind.needs is None])
def test_budgets_are_kept(prompt, name):
    q, k, v = prompt
    policy = evict.make(name, 40, kv_heads=HEADS, sinks=4, window=16)
    cache = evict.EvictingCache(policy, HEADS, DIM, dtype="float32")
    cache.prefill(q, k, v)
    # A step whose number is a multiple of lazy eviction's window.
    for step in range(5):
        cache.append(k[:, step : step + 1], v[:, step : step + 1])
        cache.attend(q[:, step : step + 1])
    extra = 5 if name == "snap_kv" else 16 if name == "lazy_eviction" else 0
    assert all(n <= 40 + extra for n in cache.stats.live)


@pytest.mark.parametrize("way", POLICIES, ids=lambda way: way.policy)
def test_equal_budgets(prompt, way):
    q, k, v = prompt
    kept = way.compressed(k, v, np.ascontiguousarray(q[:, ::5]), **BUDGET)
    assert kept.kept[:, :4].all() and kept.kept[:, -16:].all()
    assert 40 <= kept.kept.sum(1).mean() <= 60 + 16
    for of_head, rows in zip(kept.kept, kept.rows, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(of_head), rows)


@pytest.mark.parametrize("way", POLICIES, ids=lambda way: way.policy)
def test_attention_over_what_is_kept(prompt, way, rng):
    """Attention over the kept rows and those that came later, as often as it goes back."""
    q, k, v = prompt
    kept = way.compressed(k, v, np.ascontiguousarray(q[:, ::5]), **BUDGET)
    mean = way.policy == "razor_attention"  # folds what it drops
    for _ in range(2):
        later = rng.standard_normal((3, HEADS, 5, DIM), dtype=np.float32)
        asked = rng.standard_normal((HEADS * GROUP, 2, DIM), dtype=np.float32)
        kept.rewind()
        kept.append(later[0], later[1])
        out = kept.attend(asked)
        for h in range(HEADS):
            rows = kept.rows[h]
            keys, values = np.concatenate([k[h, rows], later[0, h]]), np.concatenate([v[h, rows], later[1, h]])
            bias = np.zeros((1, 1, len(keys)), np.float32)
            if mean:
                gone = ~kept.kept[h]
                keys, values = (
                    np.concatenate([k[h][gone].mean(0)[None], keys]),
                    np.concatenate([v[h][gone].mean(0)[None], values]),
                )
                bias = np.concatenate([np.full((1, 1, 1), np.log(gone.sum()), np.float32), bias], -1)
            mine = slice(h * GROUP, (h + 1) * GROUP)
            expected = la.attention(
                asked[mine], keys[None], values[None], causal=True, bias=np.repeat(np.repeat(bias, GROUP, 0), 2, 1)
            )
            np.testing.assert_allclose(out[mine], expected, atol=2e-5)


def test_heaviest_rows(prompt):
    q, k, _ = prompt
    # A key that every query likes.
    k = k.copy()
    k[0, 77] = 10 * q[:GROUP, 200:].mean((0, 1))
    own = heaviest(k, q, 20, 4, 16, shared=False)
    together = heaviest(k, q, 20, 4, 16, shared=True)
    assert own[0, 77] and together[0, 77] and not own[:, :4].any() and not own[:, -16:].any()
    assert own.sum(1).tolist() == [20, 20] and together.sum() == 40


def test_names_of_ways_and_policies():
    ways, policies = chosen_of_all("H2O,1 bit")
    assert [way.name for way in ways] == ["signatures, 1 bit"] and [way.name for way in policies] == ["H2O"]
    assert tuple(map(len, chosen_of_all("all"))) == (len(WAYS) + len(FURTHER), len(POLICIES))
    with pytest.raises(ValueError, match=r"ways: got 'no such', expected part of one of .*SnapKV"):
        chosen_of_all("no such")


@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        ({"kind": "h2o"}, ValueError, "kind: got 'h2o', expected 'streaming_llm', "),
        ({"kind": "snap_kv", "recent": 3}, TypeError, "recent: no parameter of snap_kv"),
        ({"kind": "snap_kv", "rows": 0}, ValueError, "rows: got 0"),
        ({"kind": "snap_kv", "window": -1}, ValueError, "window: got -1"),
        ({"kind": "snap_kv", "kv_heads": 0}, ValueError, "kv_heads: got 0"),
    ],
)
def test_bad_names_and_budgets(arguments, error, complaint):
    given = {"rows": 40, "kv_heads": 2} | arguments
    with pytest.raises(error, match=complaint):
        evict.make(given.pop("kind"), given.pop("rows"), **given)


def test_bad_prompts(prompt):
    q, k, v = prompt
    policy = evict.StreamingLLM(4, 16)
    with pytest.raises(TypeError, match="policy: got str"):
        evict.CompressedPrompt("h2o", k, v, q)
    with pytest.raises(ValueError, match="v: got shape"):
        evict.CompressedPrompt(policy, k, v[:, 1:], q)
    with pytest.raises(ValueError, match="queries: got shape"):
        evict.CompressedPrompt(policy, k[:, :9], v[:, :9], q)
    evict.CompressedPrompt(policy, k, v, q)
    with pytest.raises(ValueError, match="policy: got one that serves a cache"):
        evict.CompressedPrompt(policy, k, v, q)


@pytest.mark.parametrize("name", [name for name in evict.KINDS if name != "lazy_eviction"])
def test_with_all_queries_a_policy_judges_as_it_does_in_a_cache(prompt, name, rng):
    q, k, v = prompt
    info = {
        "nats_attention": {"types": rng.integers(0, 3, (HEADS, LENGTH))},
        "attention_gate_evict": {"flags": rng.random((HEADS, LENGTH)) < 0.3},
    }.get(name, {})
    first, second = (evict.make(name, 40, kv_heads=HEADS, sinks=4, window=16) for _ in range(2))
    options = {"scale": None, "softcap": 0.0}
    np.testing.assert_array_equal(first.judge(q, k, v, options, **info), second.prefill(q, k, v, options, **info)[1])


def test_lazy_eviction_judges_by_what_recurs(prompt):
    """Two rows that every third query looks at stay, whatever else goes."""
    q, k, v = prompt
    q, k = q.copy(), k.copy()
    for row in (50, 120):
        k[:, row] = 0
        k[:, row, row % DIM] = 30
        q[:, row % 3 :: 3, row % DIM] = 10
    policy = evict.make("lazy_eviction", 40, kv_heads=HEADS, window=16, alpha=0.9)
    kept = policy.judge(np.ascontiguousarray(q[:, -60:]), k, v, {})
    assert kept.sum(1).tolist() == [40, 40]
    assert kept[:, [50, 120]].all() and kept[:, -16:].all()
