"""What the cache and the attention function refuse, and what happens without the cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.19")

from longattn.transformers import LongAttnCache, MaskSpec, longattn_attention, longattn_mask  # noqa: E402
from transformers import DynamicCache, StaticCache  # noqa: E402


def prompts(batch: int, length: int) -> Any:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_implementations_with_our_cache_are_an_error(build_model: Any, implementation: str) -> None:
    model = build_model("llama")
    model.set_attn_implementation(implementation)
    cache = LongAttnCache(model.config)
    with pytest.raises(RuntimeError, match="attn_implementation='longattn'"):
        model.generate(prompts(1, 8), past_key_values=cache, max_new_tokens=2)
    assert cache.get_seq_length() == 0  # nothing was stored, so the same cache still serves
    model.set_attn_implementation("longattn")
    assert model.generate(prompts(1, 8), past_key_values=cache, max_new_tokens=2).shape == (1, 10)


def test_host_kv_gives_no_tensor_away(build_model: Any) -> None:
    layer = LongAttnCache(build_model("llama").config).layers[0]
    key, _ = layer.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16))
    assert key.shape == (1, 2, 3, 16) and key.dtype == torch.float32 and key.device.type == "cpu"
    for use in (
        lambda: key.mT,
        lambda: key + 1,
        lambda: key[0],
        lambda: torch.matmul(key, key),
        key.numpy,
    ):
        with pytest.raises(RuntimeError, match="LongAttnCache"):
            use()


@pytest.mark.parametrize("cache", ["none", "dynamic"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
def test_without_our_cache(model: Any, generate: Any, cache: str, padded: bool) -> None:
    input_ids = prompts(2, 21)
    mask = torch.ones_like(input_ids)
    if padded:
        mask[1, :9] = 0

    def make() -> Any:
        return DynamicCache(config=model.config) if cache == "dynamic" else None

    arguments = {"use_cache": False} if cache == "none" else {}
    expected = generate(model, "eager", make(), input_ids, mask, **arguments)
    got = generate(model, "longattn", make(), input_ids, mask, **arguments)
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


def test_static_caches_are_refused(model: Any, generate: Any) -> None:
    with pytest.raises(ValueError, match="static cache"):
        generate(model, "longattn", StaticCache(config=model.config, max_cache_len=40), prompts(2, 21))


def test_gradients_dropout_and_weights_are_refused(build_model: Any) -> None:
    model = build_model("llama")
    model.set_attn_implementation("longattn")
    text = prompts(1, 6)
    with pytest.raises(ValueError, match="no gradients"):
        model(text)
    with torch.no_grad(), pytest.raises(ValueError, match="output_attentions"):
        model(text, output_attentions=True)
    with torch.no_grad(), pytest.raises(TypeError, match="mystery"):
        model(text, mystery=3)
    q = torch.zeros(1, 4, 3, 16)
    module = torch.nn.Identity()
    with pytest.raises(ValueError, match="dropout"):
        longattn_attention(module, q, q, q, None, dropout=0.1)
    out, weights = longattn_attention(module, q, q, q, None, cache_position=torch.arange(3), mystery=None)
    assert out.shape == (1, 3, 4, 16) and weights is None
    key, value = LongAttnCache(model.config).layers[0].update(q, q)
    with pytest.raises(ValueError, match="position_bias"):
        longattn_attention(module, q, key, value, None, position_bias=torch.zeros(1, 4, 3, 3))
    with pytest.raises(ValueError, match="non-causal"):
        longattn_attention(module, q, key, value, None, is_causal=False)
    longattn_attention(module, q, key, value, None)
    with pytest.raises(RuntimeError, match="share the keys"):
        longattn_attention(module, q, key, value, None)


def test_position_bias_without_a_cache() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 5, 8, generator=generator) for _ in range(3))
    bias = torch.randn(1, 4, 5, 5, generator=generator)
    module = torch.nn.Identity()
    module.is_causal = False
    got, _ = longattn_attention(module, q, k, v, None, position_bias=bias)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_mask_function_gives_no_matrix() -> None:
    padding = torch.ones(2, 100_000, dtype=torch.bool)
    spec = longattn_mask(2, 4096, 100_000, 100_000 - 4096, attention_mask=padding)
    assert isinstance(spec, MaskSpec) and spec.padding is None and spec.causal
    padding[1, :7] = False
    spec = longattn_mask(2, 4096, 100_000, 100_000 - 4096, attention_mask=padding, local_size=512)
    assert isinstance(spec, MaskSpec) and spec.window == 512
    assert spec.padding is not None and spec.padding.shape == (2, 100_000)
    with pytest.raises(ValueError, match="attention_mask"):
        longattn_mask(2, 4, 8, 4, attention_mask=torch.ones(2, 4, dtype=torch.bool))
    dense = longattn_mask(1, 3, 3, mask_function=lambda b, h, q, k: k >= q, allow_is_causal_skip=False)
    assert torch.equal(dense[0, 0], torch.ones(3, 3, dtype=torch.bool).triu())


def test_models_the_cache_cannot_hold() -> None:
    for name, message in (
        ("Llama4TextConfig", "chunked"),
        ("DeepseekV3Config", "latent"),
        ("T5Config", "encoder-decoder"),
    ):
        with pytest.raises(ValueError, match=message):
            LongAttnCache(getattr(transformers, name)())
    model = transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=32,
            intermediate_size_mlp=32,
            num_hidden_layers=1,
            head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=1,
            attention_chunk_size=4,
            pad_token_id=0,
        )
    ).eval()
    model.set_attn_implementation("longattn")
    with torch.no_grad(), pytest.raises(ValueError, match="chunked"):
        model(prompts(1, 6), use_cache=False)


@pytest.mark.parametrize(
    "arguments", [{"capacity": 0}, {"dtype": "int8"}, {"dtype": torch.float64}, {"decode_length": 0}]
)
def test_constructor_refuses(build_model: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        LongAttnCache(build_model("llama").config, **arguments)


def test_the_config_is_asked_for(build_model: Any) -> None:
    with pytest.raises(TypeError, match=r"config: got LlamaForCausalLM, expected the model's config \(model\.config\)"):
        LongAttnCache(build_model("llama"))


def test_masks_at_odds_with_the_cache(build_model: Any) -> None:
    model = build_model("llama")
    model.set_attn_implementation("longattn")
    text = prompts(2, 12)
    mask = torch.ones_like(text)
    mask[0, :3] = 0
    cache = LongAttnCache(model.config)
    other = mask.clone()
    other[0, 4] = 0
    with torch.no_grad():
        model(text[:, :10], attention_mask=mask[:, :10], past_key_values=cache)
        for wrong in (None, torch.ones_like(text), other, mask[:, 10:]):
            with pytest.raises(ValueError, match="attention_mask"):
                model(text[:, 10:], attention_mask=wrong, past_key_values=cache)
        with pytest.raises(ValueError, match="batch size"):
            model(text[:1, 10:], attention_mask=mask[:1], past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [10] * 4
        got = model(text[:, 10:], attention_mask=mask, past_key_values=cache).logits  # none of these did harm
        whole = model(text, attention_mask=mask, past_key_values=LongAttnCache(model.config)).logits
    torch.testing.assert_close(got, whole[:, 10:], atol=1e-4, rtol=0)


def test_capacity_is_a_limit_and_appending_is_all_or_nothing(build_model: Any) -> None:
    model = build_model("llama")
    model.set_attn_implementation("longattn")
    cache = LongAttnCache(model.config, capacity=16)
    text = prompts(2, 20)
    mask = torch.ones_like(text)
    mask[0, :6] = 0  # sequence 0 fits, sequence 1 does not
    with torch.no_grad():
        with pytest.raises((ValueError, MemoryError)):
            model(text, attention_mask=mask, past_key_values=cache)
        assert cache.get_seq_length() == 0 and not cache.layers[0].sequences
        model(text[:, :16], attention_mask=mask[:, :16], past_key_values=cache)
        with pytest.raises((ValueError, MemoryError)):
            model(text[:, 16:17], attention_mask=mask[:, :17], past_key_values=cache)
    assert cache.get_seq_length() == 16
    assert [len(sequence) for sequence in cache.layers[0].sequences] == [10, 16]


def test_crop(build_model: Any) -> None:
    model = build_model("smollm3")
    model.set_attn_implementation("longattn")
    cache = LongAttnCache(model.config)
    text = prompts(2, 30)
    mask = torch.ones_like(text)
    mask[0, :5] = 0
    mask[1, 20:24] = 0
    with torch.no_grad():
        whole = model(text[:, :30], attention_mask=mask, past_key_values=cache).logits
        for wrong in (1, -31):
            with pytest.raises(ValueError, match="tokens_to_remove"):
                cache.crop(wrong)
        cache.crop(0)
        cache.crop(-8)  # from 30 to 22 arrivals; of the last 8, sequence 1 holds 6 tokens
        assert cache.get_seq_length() == 22
        assert [len(s) for s in cache.layers[0].sequences] == mask[:, :22].sum(1).tolist() == [17, 20]
        positions = torch.arange(22, 30)[None].expand(2, -1)
        again = model(text[:, 22:], attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    torch.testing.assert_close(again, whole[:, 22:], atol=1e-4, rtol=0)


def test_batch_operations(build_model: Any) -> None:
    """Select, repeat and reorder against the same operations on a DynamicCache."""
    model = build_model("llama")
    text, step = prompts(3, 15), prompts(1, 1)
    mask = torch.ones_like(text)
    mask[0, :6] = 0
    mask[2, :2] = 0
    operations = [
        ("reorder_cache", torch.tensor([2, 2, 0])),
        ("reorder_cache", torch.tensor([2, 0, 1])),
        ("batch_repeat_interleave", 2),
        ("batch_select_indices", torch.tensor([5, 0, 1])),
        ("batch_select_indices", torch.tensor([True, False, True])),
    ]
    ours, theirs = LongAttnCache(model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        for implementation, cache in (("longattn", ours), ("eager", theirs)):
            model.set_attn_implementation(implementation)
            model(text, attention_mask=mask, past_key_values=cache)
        for name, argument in operations:
            rows = torch.arange(len(mask))
            rows = rows.repeat_interleave(argument) if isinstance(argument, int) else rows[argument]
            mask = torch.nn.functional.pad(mask[rows], (0, 1), value=1)
            results = []
            for implementation, cache in (("longattn", ours), ("eager", theirs)):
                getattr(cache, name)(argument)
                model.set_attn_implementation(implementation)
                # another token in every sequence, so that copies go different ways
                new = step + torch.arange(len(rows))[:, None]
                results.append(model(new, attention_mask=mask, past_key_values=cache).logits)
            torch.testing.assert_close(results[0], results[1], atol=2e-4, rtol=0)


def test_a_copied_cache_goes_its_own_way(build_model: Any) -> None:
    """The recipe for a shared prefix: prefill once, copy the cache for every continuation."""
    model = build_model("llama")
    model.set_attn_implementation("longattn")
    prefix, first, second = prompts(1, 20), prompts(1, 3), prompts(1, 6)[:, 3:]
    cache = LongAttnCache(model.config)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
        for continuation in (first, second):
            got = model(continuation, past_key_values=copy.deepcopy(cache)).logits
            whole = model(torch.cat([prefix, continuation], dim=1), past_key_values=LongAttnCache(model.config)).logits
            torch.testing.assert_close(got, whole[:, 20:], atol=1e-4, rtol=0)
    assert cache.get_seq_length() == 20


def test_stats_table(build_model: Any) -> None:
    model = build_model("smollm3")
    model.set_attn_implementation("longattn")
    cache = LongAttnCache(model.config)
    with torch.no_grad():
        model(prompts(2, 30), past_key_values=cache)
        assert cache.stats().keys_visible == 0  # prefill is not counted
        model(prompts(2, 1), past_key_values=cache)
    stats = cache.stats()
    kv_heads, sequences = 2, 2
    assert [layer.keys_visible for layer in stats.layers] == [n * kv_heads * sequences for n in (31, 8, 31, 8)]
    assert stats.keys_read == stats.keys_visible and stats.nbytes > 0
    assert "window 8" in str(stats) and "100.00%" in str(stats)


def test_linear_attention_layers_keep_their_own_cache() -> None:
    config = transformers.Qwen3NextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        pad_token_id=0,
        eos_token_id=None,
        layer_types=["linear_attention", "full_attention"],
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3NextForCausalLM(config).eval()
    text = prompts(1, 17)
    model.set_attn_implementation("eager")
    expected = model.generate(text, max_new_tokens=6, do_sample=False)
    model.set_attn_implementation("longattn")
    cache = LongAttnCache(config)
    assert torch.equal(model.generate(text, max_new_tokens=6, do_sample=False, past_key_values=cache), expected)
    assert [layer.layer_idx for layer in cache.stats().layers] == [1]
