"""Small random-weight models of several architectures, and generation with a chosen attention and cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.19")

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
    "initializer_range": 0.3,
}

# name -> (config class, model class, config arguments beyond the common ones)
_ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "smollm3": (
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "no_rope_layers": [0, 1, 0, 1],
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "sliding_window": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "sliding_window": 8,
            "attn_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 12,
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}


def _build(name: str, **sizes: Any) -> Any:
    config_class, model_class, extra = _ARCHITECTURES[name]
    config = getattr(transformers, config_class)(**{**_COMMON, **extra, **sizes})
    torch.manual_seed(7)
    model = getattr(transformers, model_class)(config).eval()
    if name == "gpt_oss":  # large enough to take a visible part of the mass
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks, mean=2.0)
    return model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=list(_ARCHITECTURES))
def model(request: pytest.FixtureRequest) -> Any:
    return _build(request.param)


@pytest.fixture(scope="session")
def build_model() -> Callable[..., Any]:
    return _build


@pytest.fixture(scope="session")
def generate() -> Callable[..., Any]:
    """Greedy generation: `generate(model, implementation, cache, input_ids, mask, **arguments)`."""

    def run(model: Any, implementation: str, cache: Any, input_ids: Any, mask: Any = None, **arguments: Any) -> Any:
        model.set_attn_implementation(implementation)
        return model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids) if mask is None else mask,
            past_key_values=cache,
            **{
                "max_new_tokens": 10,
                "do_sample": False,
                "return_dict_in_generate": True,
                "output_logits": True,
                **arguments,
            },
        )

    return run
