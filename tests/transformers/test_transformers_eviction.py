"""Layers that keep a part of their keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.19")

from longattn.kv import evict  # noqa: E402
from longattn.transformers import EvictionConfig, LongAttnCache, RetrievalConfig  # noqa: E402
from transformers import DynamicCache  # noqa: E402

EXACT = [name for name in evict.KINDS if name != "selective_attention_budget"]  # that one is another attention


def prompts(batch: int, length: int) -> Any:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(3))


def config(name: str, rows: int, **rest: Any) -> EvictionConfig:
    told = {
        "nats_attention": lambda k, v, first: {"types": np.zeros(k.shape[:2], np.int64)},
        "attention_gate_evict": lambda k, v, first: {"flags": np.ones(k.shape[:2], bool)},
    }
    return EvictionConfig(name, rows=rows, window=8, info=told.get(name), **rest)


@pytest.mark.parametrize("name", EXACT)
def test_a_budget_of_the_whole_text_is_dense(build_model: Any, generate: Any, name: str) -> None:
    model = build_model("smollm3")
    input_ids = prompts(2, 40)
    mask = torch.ones_like(input_ids)
    mask[0, :7] = 0
    expected = generate(model, "eager", DynamicCache(config=model.config), input_ids, mask)
    cache = LongAttnCache(model.config, eviction=config(name, 64))
    got = generate(model, "longattn", cache, input_ids, mask)
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    stats = cache.stats()
    assert stats.keys_read == stats.keys_visible > 0 and stats.nbytes > 0


@pytest.mark.parametrize("name", ["streaming_llm", "heavy_hitter", "lazy_eviction", "selective_attention_budget"])
def test_a_small_budget_is_kept(build_model: Any, generate: Any, name: str) -> None:
    model = build_model("llama")
    cache = LongAttnCache(model.config, eviction=config(name, 16))
    generate(model, "longattn", cache, prompts(1, 200))
    for layer in cache.layers:
        assert layer.get_seq_length() == 209
        live = layer.sequences[0]._cache.stats.live
        assert max(live) <= 16 + 8, "lazy eviction holds a window more"
    assert cache.stats().fraction_read < 0.2


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2"])
def test_sinks_and_softcap_of_the_model_reach_the_policy(build_model: Any, generate: Any, name: str) -> None:
    model = build_model(name)
    input_ids = prompts(1, 40)
    expected = generate(model, "eager", DynamicCache(config=model.config), input_ids)
    got = generate(model, "longattn", LongAttnCache(model.config, eviction=config("heavy_hitter", 64)), input_ids)
    assert torch.equal(got.sequences, expected.sequences)


def test_layers_differ(build_model: Any, generate: Any) -> None:
    model = build_model("llama")
    ways = {0: config("streaming_llm", 16), 2: None, 3: config("snap_kv", 24)}
    cache = LongAttnCache(model.config, eviction=ways, retrieval={1: RetrievalConfig(min_length=0)})
    generate(model, "longattn", cache, prompts(1, 100))
    read = [layer.keys_read / layer.keys_visible for layer in cache.stats().layers]
    assert read[0] < read[3] < read[2] == 1.0


def test_later_rows_come_one_by_one(build_model: Any) -> None:
    model = build_model("llama")
    model.set_attn_implementation("longattn")
    text = prompts(1, 60)
    seen = []
    for cut in ((40, 60), (40, 41, 42, 60)):
        cache = LongAttnCache(model.config, eviction=config("heavy_hitter", 24))
        start = 0
        with torch.no_grad():
            for stop in cut:
                logits = model(text[:, start:stop], past_key_values=cache).logits
                start = stop
        seen.append(logits[:, -1])
    torch.testing.assert_close(*seen)


def test_what_eviction_cannot_do(build_model: Any, generate: Any) -> None:
    model = build_model("llama")

    def cache() -> LongAttnCache:
        return LongAttnCache(model.config, eviction=config("heavy_hitter", 24))

    with pytest.raises(ValueError, match="copy of a sequence"):
        generate(model, "longattn", cache(), prompts(1, 40), num_beams=3)
    held = cache()
    generate(model, "longattn", held, prompts(1, 40))
    with pytest.raises(ValueError, match="a layer with an eviction policy cannot go back"):
        held.crop(-3)
    held.crop(0)


@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        ({"policy": "no such"}, ValueError, "kind: got 'no such', expected 'streaming_llm', "),
        ({"policy": "snap_kv", "rows": 0}, ValueError, "rows: got 0"),
        ({"policy": "snap_kv", "rows": 1.5}, TypeError, "rows"),
        ({"policy": "snap_kv", "parameters": {"kernels": 3}}, TypeError, "kernels: no parameter of snap_kv"),
        ({"policy": "snap_kv", "residual": "sum"}, ValueError, "residual: got 'sum', expected 'mean' or None"),
        ({"policy": "nats_attention"}, ValueError, "info: got None, expected a function that gives types"),
        ({"policy": "streaming_llm", "parameters": 5}, TypeError, "parameters: got int, expected a mapping"),
        ({"policy": "nats_attention", "info": 5}, TypeError, "info: got int, expected a function"),
    ],
)
def test_bad_configs(arguments: dict[str, Any], error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        EvictionConfig(**arguments)


def test_bad_layers(build_model: Any) -> None:
    model = build_model("smollm3")
    how = config("streaming_llm", 8)
    with pytest.raises(ValueError, match=r"eviction: got layer 1, expected full-attention layers, which are \[0, 2\]"):
        LongAttnCache(model.config, eviction={1: how})
    with pytest.raises(TypeError, match="eviction: got str, expected a EvictionConfig"):
        LongAttnCache(model.config, eviction="streaming_llm")
    with pytest.raises(ValueError, match=r"eviction: got layers \[0, 2\] with retrieval as well"):
        LongAttnCache(model.config, eviction=how, retrieval=RetrievalConfig())
