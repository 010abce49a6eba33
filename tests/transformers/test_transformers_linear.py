"""`use_linear_kernels`: models with states of fixed size give what transformers' own functions give."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.19")

from longattn.transformers import use_linear_kernels  # noqa: E402

# Logits are of order 1; both sides work in float32 and differ in the order of sums.
ATOL = 2e-4

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
_EXPERTS = {
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
}
_MIXED = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]

# name -> (config class, model class, config arguments beyond the common ones, functions that must be replaced)
MODELS: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**_EXPERTS, **_DELTA, "layer_types": _MIXED},
        {"torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"},
    ),
    "olmo_hybrid": (
        "OlmoHybridConfig",
        "OlmoHybridForCausalLM",
        {**_DELTA, "layer_types": _MIXED},
        {"torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"},
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        {
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "kv_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": _MIXED,
        },
        {"chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"},
    ),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {"state_size": 8, "time_step_rank": 4, "use_mambapy": False},
        {"mamba_selective_scan", "mamba_selective_state_update"},
    ),
    "mamba2": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {"state_size": 16, "num_heads": 8, "head_dim": 12, "n_groups": 2, "chunk_size": 16, "expand": 2},
        {"mamba2_chunk_scan", "mamba2_selective_state_update"},
    ),
}


def build(name: str) -> Any:
    config_class, model_class, extra, _ = MODELS[name]
    config = getattr(transformers, config_class)(**{**_COMMON, **extra})
    torch.manual_seed(3)
    return getattr(transformers, model_class)(config).eval()


@pytest.fixture(params=list(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def prompts(batch: int, length: int) -> Any:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(5))


def in_float64(model: Any, input_ids: Any) -> Any:
    """Logits of the model in float64, by which both sides are judged where a prompt amplifies what float32 rounds."""
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # the grouped products of experts have no float64
    with torch.no_grad():
        return exact(input_ids, use_cache=False).logits.double()


def generate(model: Any, input_ids: Any, mask: Any = None, **arguments: Any) -> Any:
    return model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids) if mask is None else mask,
        max_new_tokens=10,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )


def test_the_functions_are_replaced_and_put_back(name: str) -> None:
    model = build(name)
    before = {}
    handle = use_linear_kernels(model)
    names = {f.rsplit(".", 1)[1] for f in handle.functions}
    assert names == MODELS[name][3]
    again = use_linear_kernels(model)  # what is ours stays ours
    assert again.functions == []
    again.remove()
    module = __import__("sys").modules[type(model).__module__]
    for function in names:
        assert hasattr(getattr(module, function), "longattn_replaces")
        before[function] = getattr(module, function).longattn_replaces
    handle.remove()
    handle.remove()
    for function in names:
        assert getattr(module, function) is before[function]


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate(name: str, padded: bool, arguments: dict[str, int]) -> None:
    model, input_ids = build(name), prompts(2, 70)
    mask = torch.ones_like(input_ids)
    if padded:
        mask[0, :11] = 0
    expected = generate(model, input_ids, mask, **arguments)
    with use_linear_kernels(model):
        got = generate(model, input_ids, mask, **arguments)
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 63, 130])
def test_prefill_and_gradients(name: str, length: int) -> None:
    model, input_ids = build(name), prompts(2, length)
    results = []
    for use in (False, True):
        model.zero_grad()
        handle = use_linear_kernels(model) if use else None
        logits = model(input_ids, use_cache=False).logits
        logits.square().mean().backward()
        if handle is not None:
            handle.remove()
        results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (expected, theirs), (got, ours) = results
    exact = in_float64(model, input_ids)
    rounding = float((expected - exact).abs().max())
    assert rounding < 5e-4
    torch.testing.assert_close(got.double(), exact, atol=ATOL + rounding, rtol=0)
    assert ours.keys() == theirs.keys()
    for parameter, gradient in theirs.items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(ours[parameter], gradient, atol=1e-3 * size + 1e-7, rtol=0, msg=parameter)


def test_bfloat16(name: str) -> None:
    model, input_ids = build(name).to(torch.bfloat16), prompts(1, 50)
    expected = model(input_ids).logits.float()
    with use_linear_kernels(model):
        got = model(input_ids).logits.float()
    assert (got - expected).abs().max() <= 0.06 * expected.abs().max()


def test_float64_goes_where_it_went_before() -> None:
    model, input_ids = build("olmo_hybrid").double(), prompts(1, 20)
    expected = model(input_ids).logits
    with use_linear_kernels(model):
        assert torch.equal(model(input_ids).logits, expected)


def test_models_without_such_layers_are_an_error() -> None:
    config = transformers.LlamaConfig(**{**_COMMON, "num_hidden_layers": 1})
    with pytest.raises(ValueError, match="LlamaForCausalLM without any function"):
        use_linear_kernels(transformers.LlamaForCausalLM(config))
    with pytest.raises(TypeError, match="model: got int"):
        use_linear_kernels(3)  # type: ignore[arg-type]
