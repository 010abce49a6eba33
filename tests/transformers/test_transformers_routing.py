"""Layers that decide which of their heads, or whether all, read few keys."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.19")

import longattn as la  # noqa: E402
from longattn.diagnostics import less_is_more_attention, less_is_more_select, qada_attention  # noqa: E402
from longattn.transformers import LongAttnCache, RetrievalConfig, RoutingConfig  # noqa: E402
from longattn.transformers.routing import ROUTES, Lists, Pass  # noqa: E402
from longattn.transformers.sequence import ReadCounts, ScoreOptions  # noqa: E402

PLAIN = ScoreOptions(scale=0.3, softcap=0.0, sinks=None)


def prompts(batch: int, length: int) -> Any:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(3))


def weights(dim: int, gate: int) -> list[tuple[Any, Any]]:
    """Of a network that always decides for `gate`."""
    sizes = [dim, 8 * dim, 2 * dim, 4 * dim, dim, 2]
    layers = [(np.zeros((o, i), np.float32), np.zeros(o, np.float32)) for i, o in itertools.pairwise(sizes)]
    layers[-1][1][gate] = 1
    return layers


def lists_of(selects: int, budget: int) -> dict[int, RoutingConfig]:
    """Layer `selects` and those after it, of four."""
    named = {i: {"selects": i == selects, "budget": budget} for i in range(selects, 4)}
    return {i: RoutingConfig("less_is_more_select", how) for i, how in named.items()}


#: What reads all keys, and what reads few.
ALL = {
    "qada_head_gate": RoutingConfig("qada_head_gate", {"tau": 1.1, "sinks": 2, "local": 8}),
    "flux_route": RoutingConfig("flux_route", {"weights": weights(16, 1), "sinks": 2, "window": 8}),
    "retrieval_head_score": RoutingConfig("retrieval_head_score", {"heads": [1, 2], "sinks": 2, "window": 8}),
    "less_is_more_select": lists_of(0, 10_000),
}
FEW = {
    "qada_head_gate": RoutingConfig("qada_head_gate", {"tau": 0.0, "sinks": 2, "local": 8}),
    "flux_route": RoutingConfig("flux_route", {"weights": weights(16, 0), "sinks": 2, "window": 8}),
    "retrieval_head_score": RoutingConfig("retrieval_head_score", {"heads": [], "sinks": 2, "window": 8}),
    "less_is_more_select": lists_of(1, 20),
}


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize(
    "arguments", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["plain", "beams", "lookup"]
)
def test_reading_all_is_dense(build_model: Any, generate: Any, name: str, arguments: dict[str, int]) -> None:
    model = build_model("llama")
    text = prompts(1, 120)
    expected = generate(model, "longattn", LongAttnCache(model.config), text, **arguments)
    cache = LongAttnCache(model.config, routing=ALL[name])
    got = generate(model, "longattn", cache, text, **arguments)
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    stats = cache.stats()
    assert stats.keys_read == stats.keys_visible > 0


@pytest.mark.parametrize("name", ROUTES)
def test_reading_few_is_not(build_model: Any, name: str) -> None:
    model = build_model("llama")
    model.set_attn_implementation("longattn")
    text = prompts(2, 220)
    mask = torch.ones_like(text)
    mask[0, :40] = 0
    logits = {}
    for routing in (None, FEW[name]):
        cache = LongAttnCache(model.config, routing=routing)
        with torch.no_grad():
            model(text[:, :200], attention_mask=mask[:, :200], past_key_values=cache)
            got = [
                model(text[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits
                for i in range(200, 220)
            ]
        logits[routing is None] = torch.cat(got)
    full = {0} if name == "less_is_more_select" else set()
    for i, layer in enumerate(cache.stats().layers):
        assert (layer.fraction_read == 1) == (i in full or (name == "less_is_more_select" and i == 1))
    assert 0 < (logits[True] - logits[False]).norm() < logits[True].norm() * 2


def filled(rng: np.random.Generator, rows: int) -> la.KVStore:
    store = la.KVStore(kv_heads=2, head_dim=16, dtype="float32", capacity=4096)
    store.append(*rng.normal(size=(2, 2, rows, 16)).astype(np.float32))
    return store


def attend(router: Any, store: Any, query: Any, decode: bool = True, lists: Any = None, options: Any = PLAIN) -> Any:
    counts, out = ReadCounts(), torch.empty(query.shape)
    written = router.attend(Pass(query, store, options, decode, lists or Lists(), counts, out))
    return (out if written else None), counts


def queries(rng: np.random.Generator, rows: int) -> Any:
    return torch.from_numpy(rng.normal(size=(4, rows, 16)).astype(np.float32))


def test_moments_follow_the_sequence() -> None:
    """Steps, prompts between them, and going back give what `qada_attention` computes from all keys."""
    rng = np.random.default_rng(0)
    store, how = filled(rng, 300), {"tau": 0.12, "sinks": 4, "local": 32, "any_of_group": False}
    router = RoutingConfig("qada_head_gate", how).router()
    local = 0
    for change in (1, 3, -2, 40, -100, 200, 1):
        if change < 0:
            store.truncate(len(store) + change)
            router.crop(len(store))
            continue
        store.append(*rng.normal(size=(2, 2, change, 16)).astype(np.float32))
        query = queries(rng, min(change, 3))
        out, counts = attend(router, store, query)
        read = 0
        for i in range(query.shape[1]):
            end = len(store) - query.shape[1] + i + 1
            expected, stats = qada_attention(
                query[:, i : i + 1], store.keys[:, :end], store.values[:, :end], scale=0.3, return_stats=True, **how
            )
            torch.testing.assert_close(out[:, i : i + 1], expected, atol=1e-5, rtol=1e-5)
            read += round(2 * stats.keys_read)
            local += stats.local.sum()
        assert counts.keys_read == read <= counts.keys_visible
    assert 0 < local < 4 * 12
    assert attend(router, store, queries(rng, 20), decode=False)[0] is None


def test_a_copy_goes_its_own_way() -> None:
    rng = np.random.default_rng(1)
    store = filled(rng, 200)
    router = RoutingConfig("qada_head_gate", {"tau": 0.15, "local": 16}).router()
    query = queries(rng, 1)
    first, _ = attend(router, store, query)
    other, twin = store.fork(), router.fork()
    other.append(*rng.normal(size=(2, 2, 60, 16)).astype(np.float32))
    attend(twin, other, query)
    assert torch.equal(attend(router, store, query)[0], first)
    assert torch.equal(attend(copy.deepcopy(router), store, query)[0], first)


def test_a_prompt_decides_for_its_steps() -> None:
    rng = np.random.default_rng(2)
    layers = [(rng.normal(size=(o, i)), np.zeros(o)) for i, o in ((16, 128), (128, 32), (32, 64), (64, 16))]
    layers = [*layers, (rng.normal(size=(2, 16)), np.zeros(2))]
    how = {"weights": layers, "pool": 5, "sinks": 3, "window": 12}
    router, store = RoutingConfig("flux_route", how).router(), filled(rng, 100)
    options = ScoreOptions(scale=0.4, softcap=3.0, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))
    seen = set()
    for _ in range(30):
        query = queries(rng, 40)
        gate = la.diagnostics.flux_route(query, layers, pool=5)
        seen.add(gate)
        step = query[:, :2]
        for q, decode in ((query, False), (step, True)):
            out, counts = attend(router, store, q, decode, options=options)
            assert (out is None) == bool(gate)
            if out is not None:
                i, j = np.arange(100 - q.shape[1], 100)[:, None], np.arange(100)
                mask = (j <= i) & ((j < 3) | (j > i - 12))
                expected = la.attention(q, store.keys, store.values, mask=mask, **options)
                torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
                assert counts.keys_read == (2 * 2 * 15 if decode else 0)
    assert seen == {0, 1}


def test_heads_that_read_all() -> None:
    rng = np.random.default_rng(3)
    store, query = filled(rng, 90), queries(rng, 3)
    router = RoutingConfig("retrieval_head_score", {"heads": (3, 3), "sinks": 2, "window": 10}).router()
    options = ScoreOptions(scale=0.4, softcap=0.0, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))
    out, counts = attend(router, store, query, options=options)
    exact = la.attention(query, store.keys, store.values, causal=True, **options)
    i, j = np.arange(87, 90)[:, None], np.arange(90)
    mask = (j <= i) & ((j < 2) | (j > i - 10))
    few = la.attention(query, store.keys, store.values, mask=mask, **options)
    torch.testing.assert_close(out[2:], exact[2:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[:2], few[:2], atol=1e-5, rtol=1e-5)
    assert counts.keys_read == 88 + 89 + 90 + 3 * 12
    with pytest.raises(ValueError, match="heads: got 9, expected heads below 4"):
        attend(RoutingConfig("retrieval_head_score", {"heads": [9]}).router(), store, query)


def test_lists_go_from_layer_to_layer() -> None:
    rng = np.random.default_rng(4)
    store, other, query = filled(rng, 90), filled(rng, 90), queries(rng, 2)
    how = {"budget": 12, "sinks": 2}
    make = RoutingConfig("less_is_more_select", {"selects": True, **how}).router()
    use = RoutingConfig("less_is_more_select", {"selects": False, **how}).router()
    lists = Lists()
    exact, _ = attend(make, store, query, lists=lists)
    got, counts = attend(use, other, query, lists=lists)
    assert counts.keys_read == 2 * 2 * 12
    for i, end in enumerate((89, 90)):
        one = slice(i, i + 1)
        keys, values = store.keys[:, :end], store.values[:, :end]
        full, rows = less_is_more_attention(query[:, one], keys, values, scale=0.3, **how)
        assert rows.tolist() == lists.of_rows[i].tolist() and len(rows) == 12
        few, _ = less_is_more_attention(query[:, one], other.keys[:, :end], other.values[:, :end], rows, scale=0.3)
        torch.testing.assert_close(exact[:, one], full, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[:, one], few, atol=1e-5, rtol=1e-5)
    other.append(*rng.normal(size=(2, 2, 1, 16)).astype(np.float32))
    with pytest.raises(RuntimeError, match="a layer without a list"):
        attend(use, other, query, lists=lists)
    assert len(less_is_more_select(np.zeros((1, 50)), 12, sinks=2)) == 12


@pytest.mark.parametrize(
    ("route", "parameters", "error", "message"),
    [
        ("nothing", {}, ValueError, "route: got 'nothing', expected 'qada_head_gate', 'flux_route'"),
        (["flux_route"], {}, ValueError, r"route: got \['flux_route'\], expected 'qada_head_gate'"),
        ("qada_head_gate", {"heads": 1}, TypeError, "heads: no parameter of qada_head_gate, which has tau"),
        ("qada_head_gate", {"tau": "much"}, TypeError, "tau"),
        ("qada_head_gate", {"local": -1}, ValueError, "local"),
        ("qada_head_gate", {"rank": -1}, ValueError, "rank"),
        ("qada_head_gate", {"any_of_group": 3}, TypeError, "any_of_group"),
        ("flux_route", {}, TypeError, "weights: got none, expected the parameter that flux_route needs"),
        ("flux_route", {"weights": weights(16, 1)[:4]}, ValueError, "weights: got list, expected 5 pairs"),
        ("flux_route", {"weights": weights(16, 1), "sparse": "blocks"}, ValueError, "sparse: got 'blocks'"),
        ("flux_route", {"weights": weights(16, 1), "window": 0}, ValueError, "window"),
        ("retrieval_head_score", {"heads": [1.5]}, TypeError, "heads"),
        ("retrieval_head_score", {"heads": [-1]}, ValueError, "heads"),
        ("less_is_more_select", {}, TypeError, "selects: got none"),
        ("less_is_more_select", {"selects": 1}, TypeError, "selects"),
        ("less_is_more_select", {"selects": True, "recent_ratio": 2}, ValueError, "recent_ratio"),
        ("less_is_more_select", {"selects": True, "budget": 8, "sinks": 4}, ValueError, "sinks: got 4"),
    ],
)
def test_config_refuses(route: str, parameters: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RoutingConfig(route, parameters)


def test_cache_refuses(build_model: Any) -> None:
    llama, gpt_oss = build_model("llama"), build_model("gpt_oss")
    listed = RoutingConfig("less_is_more_select", {"selects": False})
    with pytest.raises(ValueError, match="routing: got layer 2 that reads a list"):
        LongAttnCache(llama.config, routing={2: listed, 3: lists_of(3, 20)[3]})
    with pytest.raises(ValueError, match=r"routing: got layers \[0, 1, 2, 3\] with retrieval as well"):
        LongAttnCache(llama.config, routing=FEW["flux_route"], retrieval=RetrievalConfig(top_k=4))
    with pytest.raises(TypeError, match="routing: got int"):
        LongAttnCache(llama.config, routing=4)  # type: ignore[arg-type]
    gpt_oss.set_attn_implementation("longattn")
    cache = LongAttnCache(gpt_oss.config, routing=FEW["qada_head_gate"])
    with torch.no_grad(), pytest.raises(ValueError, match="routing: got sinks from the model"):
        gpt_oss(prompts(1, 5), past_key_values=cache)
    llama.set_attn_implementation("longattn")
    cache = LongAttnCache(llama.config, routing=FEW["retrieval_head_score"])
    with torch.no_grad():
        llama(prompts(1, 5), past_key_values=cache)
        with pytest.raises(ValueError, match="4-D mask, expected a 2-D one: routing"):
            llama(prompts(1, 1), attention_mask=torch.ones(1, 1, 1, 6, dtype=torch.bool), past_key_values=cache)
