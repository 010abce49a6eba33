"""Sparse prefill of `LongAttnCache`: which layers, when, and how far from exact attention."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.19")

import longattn as la  # noqa: E402
from longattn.sparse import (  # noqa: E402
    Antidiagonal,
    DynamicBlocks,
    FlexPrefill,
    Sparge,
    VerticalSlash,
    by_name,
)
from longattn.transformers import EvictionConfig, LongAttnCache, RetrievalConfig, SparsePrefill  # noqa: E402

SELECTORS = {
    "sparge": lambda share: Sparge(cdf=share, theta=-1.0, block_q=32, block_k=32),
    "vertical and slash": lambda share: VerticalSlash(
        vertical=int(600 * share**3), slash=int(600 * share**3), n_sink=4, local=16, block_q=32
    ),
    "xattention": lambda share: Antidiagonal(threshold=share, block=32, stride=4),
    "flexprefill": lambda share: FlexPrefill(gamma=share, block=32, min_budget=64),
    "dynamic blocks": lambda share: DynamicBlocks(top_k=max(1, int(19 * share)), block=32),
}


def prompts(batch: int, length: int) -> Any:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(3))


def logits(model: Any, text: Any, prefill: Any, **options: Any) -> tuple[Any, Any]:
    cache = LongAttnCache(model.config, prefill=prefill, **options)
    with torch.no_grad():
        return model(text, past_key_values=cache).logits, cache.stats()


@pytest.mark.parametrize("name", SELECTORS)
def test_quality_against_dense(build_model: Any, name: str) -> None:
    """All of it is exact attention; less is nearer to it the more is attended."""
    model = build_model("llama")
    model.set_attn_implementation("longattn")
    text = prompts(1, 600)
    exact, stats = logits(model, text, None)
    assert all(layer.prompt_density == 1.0 for layer in stats.layers)
    errors, densities = [], []
    for share in (1.0, 0.7, 0.1):
        found, stats = logits(model, text, SparsePrefill(SELECTORS[name](share), min_length=0))
        errors.append(float((found - exact).norm() / exact.norm()))
        densities.append(stats.layers[0].prompt_density)
        assert all(0 < layer.prompt_density <= 1 for layer in stats.layers)
    assert errors[0] < 1e-4 and errors[0] < errors[1] < errors[2]
    assert densities[0] >= densities[1] > densities[2]


def test_per_layer_choice_and_min_length(build_model: Any) -> None:
    model = build_model("llama")
    model.set_attn_implementation("longattn")
    how = SparsePrefill(DynamicBlocks(top_k=2, block=16), min_length=300)
    cache = LongAttnCache(model.config, prefill={1: how, 2: None})
    text = prompts(1, 420)
    with torch.no_grad():
        model(text[:, :200], past_key_values=cache)
        assert all(layer.prompt_density == 1.0 for layer in cache.stats().layers)  # too short
        model(text[:, 200:201], past_key_values=cache)
        model(text[:, 201:400], past_key_values=cache)
        before = [layer.prompt_density for layer in cache.stats().layers]
        model(text[:, 400:], past_key_values=cache)
    assert before[0] == before[2] == before[3] == 1.0 and before[1] < 0.3


def test_decoding_is_exact_and_retrieval_goes_with_it(build_model: Any) -> None:
    model = build_model("llama")
    model.set_attn_implementation("longattn")
    text = prompts(2, 900)
    whole = SparsePrefill(DynamicBlocks(top_k=1000, block=16), min_length=0)
    how = RetrievalConfig(top_k=16, window=16, min_length=0)
    plain = model.generate(text, max_new_tokens=4, do_sample=False, past_key_values=LongAttnCache(model.config))
    cache = LongAttnCache(model.config, prefill=whole)
    assert (model.generate(text, max_new_tokens=4, do_sample=False, past_key_values=cache) == plain).all()
    cache = LongAttnCache(model.config, prefill=whole, retrieval=how)
    model.generate(text, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert 0 < cache.stats().fraction_read < 1


@pytest.mark.parametrize(
    ("prefill", "error", "message"),
    [
        (3, TypeError, "prefill: got int, expected a SparsePrefill or a mapping from layers"),
        ({0: 3}, TypeError, r"prefill\[0\]: got int, expected a SparsePrefill or None"),
        ({9: SparsePrefill(Sparge())}, ValueError, "prefill: got layer 9, expected full-attention layers"),
    ],
)
def test_bad_arguments(build_model: Any, prefill: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LongAttnCache(build_model("llama").config, prefill=prefill)


def test_no_prefill_beside_eviction(build_model: Any) -> None:
    how = {0: EvictionConfig("heavy_hitter", rows=128)}
    with pytest.raises(ValueError, match=r"prefill: got layers \[0\] with eviction as well"):
        LongAttnCache(build_model("llama").config, eviction=how, prefill=SparsePrefill(Sparge()))


def test_selectors_by_name(build_model: Any) -> None:
    """A name and parameters are the selector that they name."""
    model = build_model("llama")
    model.set_attn_implementation("longattn")
    text = prompts(1, 300)
    parameters = {"top_k": 2, "block": 16}
    named, stats = logits(model, text, SparsePrefill("dynamic_block_topk", 0, parameters))
    made, _ = logits(model, text, SparsePrefill(DynamicBlocks(**parameters), min_length=0))
    assert torch.equal(named, made) and stats.layers[0].prompt_density < 0.3
    needed: dict[str, Any] = {"dhsa_select": {"budget": 64}, "strided_fixed_sparse_attention": {"stride": 16}}
    for name, kind in by_name.SELECTORS.items():
        how = needed.get(name, {})
        assert SparsePrefill(name, parameters=how).made == kind(**how)
        assert name in {method.name for method in la.methods("sparse")}


def test_bad_prefill() -> None:
    with pytest.raises(ValueError, match="selector: got 'most', expected 'anchor_attention', "):
        SparsePrefill("most")
    with pytest.raises(TypeError, match="top_k: no parameter of sparge_attention, which has"):
        SparsePrefill("sparge_attention", parameters={"top_k": 3})
    with pytest.raises(TypeError, match="budget: got none, expected the parameter that dhsa_select needs"):
        SparsePrefill("dhsa_select")
    with pytest.raises(ValueError, match="top_k"):
        SparsePrefill("moba_select", parameters={"top_k": 0})
    with pytest.raises(TypeError, match="parameters: got some beside a selector"):
        SparsePrefill(Sparge(), parameters={"cdf": 0.5})
    with pytest.raises(TypeError, match="selector: got int"):
        SparsePrefill(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_length: got -1"):
        SparsePrefill(Sparge(), min_length=-1)
