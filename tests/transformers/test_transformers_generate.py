"""`generate` over a LongAttnCache gives the tokens and logits of eager attention over a DynamicCache."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.19")

from longattn.transformers import LongAttnCache  # noqa: E402
from transformers import DynamicCache  # noqa: E402

# Logits are of order 1 to 10; both sides work in float32 and differ in the order of sums.
ATOL = 2e-4


def prompts(batch: int, length: int, seed: int = 0) -> Any:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_same(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.logits) == len(expected.logits) > 0
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"prefill_chunk_size": 10},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"prefill_chunk_size": 7, "num_beams": 2},
    ],
    ids=lambda arguments: "-".join(arguments) or "plain",
)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
def test_equals_eager(model: Any, generate: Any, arguments: dict[str, int], padded: bool) -> None:
    input_ids = prompts(2, 33)
    mask = torch.ones_like(input_ids)
    if padded:
        mask[0, :11] = 0
    expected = generate(model, "eager", DynamicCache(config=model.config), input_ids, mask, **arguments)
    cache = LongAttnCache(model.config)
    got = generate(model, "longattn", cache, input_ids, mask, **arguments)
    assert_same(got, expected)
    assert cache.get_seq_length() == 33 + 9


@pytest.mark.parametrize("candidates", [3, 8])
def test_prompt_lookup_crops_rejected_candidates(model: Any, generate: Any, candidates: int) -> None:
    input_ids = prompts(1, 6).repeat(1, 5)
    expected = generate(model, "eager", DynamicCache(config=model.config), input_ids, max_new_tokens=24)
    got = generate(
        model,
        "longattn",
        LongAttnCache(model.config),
        input_ids,
        max_new_tokens=24,
        prompt_lookup_num_tokens=candidates,
    )
    assert_same(got, expected)


def test_two_calls_on_one_cache(model: Any, generate: Any) -> None:
    cache = LongAttnCache(model.config)
    first = generate(model, "longattn", cache, prompts(2, 20)).sequences
    conversation = torch.cat([first, prompts(2, 9, seed=1)], dim=1)
    got = generate(model, "longattn", cache, conversation)
    assert_same(got, generate(model, "eager", DynamicCache(config=model.config), conversation))
    assert cache.get_seq_length() == conversation.shape[1] + 9

    cache.reset()
    assert cache.get_seq_length() == 0 and cache.stats().nbytes == 0
    other = prompts(3, 15, seed=2)
    assert_same(
        generate(model, "longattn", cache, other),
        generate(model, "eager", DynamicCache(config=model.config), other),
    )


def test_padding_in_the_middle_equals_each_sequence_alone(model: Any) -> None:
    """Prompts of unequal lengths, padded on the left or on the right, one after another."""
    model.set_attn_implementation("longattn")
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :4] = 0
    mask[1, 12:20] = 0
    mask[0, 20:23] = 0
    input_ids = prompts(2, 40)
    cache = LongAttnCache(model.config)
    with torch.no_grad():
        for start, stop in ((0, 12), (12, 20), (20, 37), (37, 38), (38, 40)):
            positions = (mask[:, :stop].cumsum(-1) - 1).clamp(min=0)[:, start:]
            batch = model(
                input_ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions,
                past_key_values=cache,
            ).logits
        for row in range(2):
            alone = model(input_ids[row, mask[row].bool()][None], past_key_values=LongAttnCache(model.config)).logits
            torch.testing.assert_close(batch[row, -2:], alone[0, -2:], atol=ATOL, rtol=0)
    assert [len(s) for s in cache.layers[0].sequences] == mask.sum(1).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_weights_err_no_more_than_eager(build_model: Any, dtype: Any) -> None:
    """Both sides in half precision against eager attention in float32, token by token over the same text."""
    for name in ("llama", "smollm3", "gpt_oss", "gemma2"):
        model = build_model(name)
        text = prompts(2, 40)

        def logits(implementation: str, cache: Any, model: Any = model, text: Any = text) -> Any:
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                parts = [model(text[:, :30], past_key_values=cache).logits]
                parts += [model(text[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)]
            return torch.cat(parts, dim=1).float()

        exact = logits("eager", DynamicCache(config=model.config))
        model.to(dtype)
        eager_error = (logits("eager", DynamicCache(config=model.config)) - exact).square().mean().sqrt()
        cache = LongAttnCache(model.config)
        our_error = (logits("longattn", cache) - exact).square().mean().sqrt()
        assert cache.layers[0].sequences[0].store.dtype.name == str(dtype).removeprefix("torch.")
        assert 0 < our_error <= 1.25 * eager_error, name


def test_store_dtype_narrower_than_the_model(build_model: Any) -> None:
    model = build_model("llama")
    model.set_attn_implementation("longattn")
    text = prompts(1, 64)
    wide, narrow = LongAttnCache(model.config), LongAttnCache(model.config, dtype="bfloat16")
    with torch.no_grad():
        expected = model(text, past_key_values=wide).logits
        got = model(text, past_key_values=narrow).logits
    assert narrow.layers[0].sequences[0].store.dtype.name == "bfloat16"
    relative = (got - expected).norm() / expected.norm()
    assert 0 < relative < 0.05  # 8 bits of mantissa, through four layers


def test_sliding_layers_let_go_of_old_rows(build_model: Any) -> None:
    model = build_model("smollm3")
    text = prompts(1, 4600)
    cache = LongAttnCache(model.config, capacity=4600)
    with torch.no_grad():
        model.set_attn_implementation("longattn")
        for part in text.split(400, dim=1):
            got = model(part, past_key_values=cache).logits
        model.set_attn_implementation("sdpa")
        expected = model(text, use_cache=False).logits[:, -got.shape[1] :]
    torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)
    full, sliding = cache.layers[0], cache.layers[1]
    assert len(full.sequences[0].store) == 4600
    assert len(sliding.sequences[0].store) < 2600 and len(sliding.sequences[0]) == 4600
    assert cache.get_seq_length(0) == cache.get_seq_length(1) == 4600
    before = sliding.get_seq_length()
    with pytest.raises(ValueError, match="let go"):
        cache.crop(-4000)  # the full layers come first, and are left alone too
    assert sliding.get_seq_length() == full.get_seq_length() == before

    cache.crop(-600)
    with torch.no_grad():
        model.set_attn_implementation("longattn")
        again = model(text[:, 4000:], past_key_values=cache).logits
    torch.testing.assert_close(again[:, -got.shape[1] :], expected, atol=ATOL, rtol=0)

    cache.crop(-1)
    allowed = torch.ones(1, 1, 1, 4600, dtype=torch.bool)
    windowed = allowed.clone()
    windowed[..., : 4600 - 8] = False
    masks = {"full_attention": allowed, "sliding_attention": windowed}  # over rows that are gone, too
    with torch.no_grad():
        by_own_mask = model(text[:, 4599:], attention_mask=masks, past_key_values=cache).logits
    torch.testing.assert_close(by_own_mask, expected[:, -1:], atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_own_4d_mask(model: Any, kind: str) -> None:
    """Two packed sequences kept apart by the caller's own mask, in two chunks."""
    text = prompts(1, 24)
    allowed = torch.ones(24, 24, dtype=torch.bool).tril()
    allowed[10:, :10] = False
    mask = allowed[None, None]
    if kind == "float":
        mask = torch.zeros(1, 1, 24, 24).masked_fill(~mask, torch.finfo(torch.float32).min)
    eager = torch.zeros(1, 1, 24, 24).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(text, attention_mask=_per_kind(model, eager), use_cache=False).logits
        model.set_attn_implementation("longattn")
        cache = LongAttnCache(model.config)
        first = model(text[:, :15], attention_mask=_per_kind(model, mask[:, :, :15, :15]), past_key_values=cache).logits
        second = model(text[:, 15:], attention_mask=_per_kind(model, mask[:, :, 15:]), past_key_values=cache).logits
        without_cache = model(text, attention_mask=_per_kind(model, mask), use_cache=False).logits
    torch.testing.assert_close(torch.cat([first, second], dim=1), expected, atol=ATOL, rtol=0)
    torch.testing.assert_close(without_cache, expected, atol=ATOL, rtol=0)


def _per_kind(model: Any, mask: Any) -> Any:
    """The form in which a model with several kinds of layers takes prepared masks."""
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    return dict.fromkeys(kinds, mask) if len(kinds) > 1 else mask
