"""Models whose newest keys are on a device: the whole flow of `generate`, with the emulator in the place of a GPU."""

from __future__ import annotations

import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.19")

from emu import emulator  # noqa: E402
from emu.device import EmulatorDevice  # noqa: E402
from longattn import gpu  # noqa: E402
from longattn.transformers import DeviceConfig, EvictionConfig, LongAttnCache, RetrievalConfig  # noqa: E402
from transformers import DynamicCache  # noqa: E402

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64")

_SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}


@pytest.fixture
def model(request: Any, build_model: Any) -> Any:
    """Few layers with heads of 64, the smallest that the device's kernels take."""
    return build_model(request.param, **_SIZES, **({"num_hidden_layers": 2} if request.param == "llama" else {}))


def prompts(batch: int, length: int) -> Any:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(3))


def cache_of(model: Any, **how: Any) -> tuple[LongAttnCache, EmulatorDevice]:
    device = EmulatorDevice()
    sizes = {"sinks": 2, "window": 16, "top_k": 512, "index": "flat", **how}
    return LongAttnCache(model.config, device=DeviceConfig(device=device, **sizes)), device


def check(model: Any, generate: Any, cache: Any, input_ids: Any, mask: Any = None, **arguments: Any) -> None:
    """As transformers' own attention and cache, to rounding."""
    steps = {"max_new_tokens": 4, **arguments}
    expected = generate(model, "eager", DynamicCache(config=model.config), input_ids, mask, **steps)
    got = generate(model, "longattn", cache, input_ids, mask, **steps)
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("reads", ["host", "gather"])
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_budget_of_all_rows_is_dense(model: Any, generate: Any, reads: str) -> None:
    cache, device = cache_of(model, reads=reads)
    check(model, generate, cache, prompts(1, 40))
    stats = cache.stats()
    assert stats.layers[0].length == 43 and stats.layers[0].store_nbytes > 0
    assert stats.keys_read == stats.keys_visible > 0
    assert {name.split("_")[0] for name in device.started} == {"prefill", "decode", "merge"}


@pytest.mark.parametrize("model", ["smollm3", "gpt_oss"], indirect=True)
def test_sliding_layers_sinks_and_padding(model: Any, generate: Any) -> None:
    """Sliding windows stay on the device; logits of sinks belong to its part; padding is never stored."""
    input_ids = prompts(2, 30)
    mask = torch.ones_like(input_ids)
    mask[0, :7] = 0
    cache, _ = cache_of(model)
    check(model, generate, cache, input_ids, mask)
    full = next(layer for layer in cache.layers if not layer.is_sliding)
    assert [len(sequence) for sequence in full.sequences] == [26, 33]


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_prompts_in_parts_and_more_than_one_turn(model: Any, generate: Any) -> None:
    """Later parts see what the device holds and what the host holds."""
    cache, _ = cache_of(model)
    check(model, generate, cache, prompts(1, 60), prefill_chunk_size=20)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_small_budget_reads_a_part(model: Any, generate: Any) -> None:
    cache, _ = cache_of(model, top_k=4)
    generate(model, "longattn", cache, prompts(1, 100), max_new_tokens=3)
    stats = cache.stats()
    # Two steps of two layers with one KV head each: what the device holds, and the budget.
    assert stats.keys_read == 2 * 2 * (2 + 16 + 4)
    assert stats.keys_visible == 2 * (101 + 102)


@pytest.mark.parametrize("codes", ["int8", "int4"])
@pytest.mark.parametrize("top_k", [None, 512])
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_codes_in_host_memory(model: Any, generate: Any, codes: str, top_k: int | None) -> None:
    """Of all rows, logits err by what the codes do."""
    cache, _ = cache_of(model, codes=codes, top_k=top_k)
    expected = generate(model, "eager", DynamicCache(config=model.config), prompts(1, 60), max_new_tokens=2)
    got = generate(model, "longattn", cache, prompts(1, 60), max_new_tokens=2)
    allowed = 0.05 * float(expected.logits[-1].std()) * (1 if codes == "int8" else 255 / 15)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=allowed, rtol=0)
    stats = cache.stats()
    assert stats.keys_read == stats.keys_visible > 0 and stats.layers[0].index_nbytes == 0


@pytest.mark.parametrize("model", ["llama", "gemma2", "gpt_oss"], indirect=True)
def test_without_a_cache_of_ours_masks_are_biases(model: Any, generate: Any, monkeypatch: Any) -> None:
    """Tensors count as a GPU's: padded batches, windows, softcap and sinks through the kernels of `longattn.gpu`."""
    device = EmulatorDevice()
    there = sys.modules["longattn.transformers.attention"]
    monkeypatch.setattr(there, "is_on_gpu", lambda x: True)
    monkeypatch.setattr(
        there.la, "attention", lambda *arrays, **options: gpu.attention(*arrays, device=device, **options)
    )
    input_ids = prompts(2, 21)
    mask = torch.ones_like(input_ids)
    mask[0, :6] = 0
    check(model, generate, DynamicCache(config=model.config), input_ids, mask, max_new_tokens=2)
    assert {name.split("_")[0] for name in device.started} == {"prefill", "decode", "merge"}


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_what_such_a_cache_cannot_do(model: Any, generate: Any) -> None:
    cache, _ = cache_of(model)
    with pytest.raises(ValueError, match="expected none for rows on a device"):
        generate(model, "longattn", cache, prompts(1, 20), num_beams=2, max_new_tokens=2)
    cache, _ = cache_of(model)
    generate(model, "longattn", cache, prompts(1, 20), max_new_tokens=2)
    with pytest.raises(ValueError, match="cannot go back"):
        cache.crop(-1)
    model.set_attn_implementation("longattn")
    cache, _ = cache_of(model)
    with torch.no_grad(), pytest.raises(ValueError, match="rows lie in two memories"):
        model(prompts(1, 5), attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool).tril(), past_key_values=cache)


@pytest.mark.parametrize("model", ["gemma2"], indirect=True)
def test_softcap_over_two_memories_is_refused(model: Any, generate: Any) -> None:
    cache, _ = cache_of(model)
    with pytest.raises(ValueError, match=r"got softcap .* from the model"):
        generate(model, "longattn", cache, prompts(1, 20), max_new_tokens=2)


def test_bad_input(build_model: Any) -> None:
    for change, message in (
        ({"window": 0}, "window: got 0"),
        ({"sinks": -1}, "sinks: got -1"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"reads": "bus"}, "reads: got 'bus', expected 'host', 'gather' or 'auto'"),
        ({"reads": "auto"}, "top_k: got None with reads='auto'"),
        ({"index": "nothing"}, "index: got 'nothing', expected 'signatures', "),
        ({"index": ["pages"]}, r"index: got \['pages'\], expected 'signatures', "),
        ({"codes": "int2"}, "codes: got 'int2', expected 'int8', 'int4' or None"),
        ({"codes": "int8", "reads": "gather", "top_k": 4}, "reads: got 'gather' with codes='int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            DeviceConfig(**change)
    with pytest.raises(TypeError, match=r"costs: got float, expected gpu\.Costs or None"):
        DeviceConfig(costs=1.0)  # type: ignore[arg-type]
    config = build_model("llama").config
    with pytest.raises(TypeError, match="device: got str"):
        LongAttnCache(config, device="cuda")  # type: ignore[arg-type]
    for other in ({"retrieval": RetrievalConfig()}, {"eviction": EvictionConfig("streaming_llm", rows=64)}):
        with pytest.raises(ValueError, match=f"device: got {next(iter(other))} as well"):
            LongAttnCache(config, device=DeviceConfig(), **other)
