"""Hybrid models of transformers with random weights: on longattn's kernels and on transformers' own functions.

A model has four layers of the widths of a small one of its kind, so that its share of linear layers, convolutions,
experts and norms is what such models have. Tokens/s are of whole calls of the model: a prompt, single tokens after it,
and a training step (forward and backward) over the prompt.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from longattn.bench.harness import Bench, Candidate, rows_of
from longattn.bench.options import Grid, add_grid, chosen_grid
from longattn.bench.plots import Bars, Panel
from longattn.bench.results import Result, Row
from longattn.bench.sections import Section, all_rows, by_threads
from longattn.bench.tables import Column

SUMMARY = "transformers' hybrid and state space models: prompts, tokens and training steps, on our kernels and theirs"
OURS = "longattn.transformers.use_linear_kernels"
THEIRS = "transformers"
COLUMNS: tuple[Column, ...] = (
    Column("threads", "threads"),
    Column("model", "model"),
    Column("call", "form"),
    Column("length", "keys"),
    Column("method", "method"),
    Column("ms", "ms", ".3g"),
    Column("min", "ms_min", ".3g"),
    Column("max", "ms_max", ".3g"),
    Column("calls", "calls"),
    Column("tokens/s", "tokens_s", ".4g"),
    Column("× ours", "times_ours", ".2f"),
    Column("max difference", "difference", ".1e"),
)
GRID = Grid(heads=(), head_dims=(), keys=(1024,), dtypes=("float32",))
QUICK_GRID = Grid(heads=(), head_dims=(), keys=(48,), dtypes=("float32",))
#: Tokens after a prompt that are timed as one call.
TOKENS = 8

_MIXED = ["linear_attention"] * 3 + ["full_attention"]
_COMMON: dict[str, Any] = {
    "vocab_size": 1024,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 1 << 17,
}

#: Config class, model class and widths of each model, `size` being 1 or, in quick runs, 1/8.
MODELS: dict[str, tuple[str, str, Callable[[float], dict[str, Any]]]] = {
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        lambda size: {
            "hidden_size": int(1024 * size),
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": int(128 * size),
            "linear_num_value_heads": 8,
            "linear_num_key_heads": 4,
            "linear_key_head_dim": int(128 * size),
            "linear_value_head_dim": int(128 * size),
            "moe_intermediate_size": int(256 * size),
            "shared_expert_intermediate_size": int(256 * size),
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": _MIXED,
        },
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        lambda size: {
            "hidden_size": int(1024 * size),
            "intermediate_size": int(2048 * size),
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "linear_num_heads": 8,
            "linear_head_dim": int(128 * size),
            "kv_lora_rank": int(128 * size),
            "qk_rope_head_dim": int(64 * size),
            "qk_nope_head_dim": int(128 * size),
            "v_head_dim": int(128 * size),
            "moe_intermediate_size": int(256 * size),
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": _MIXED,
        },
    ),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        lambda size: {"hidden_size": int(1024 * size), "state_size": 16, "use_mambapy": False},
    ),
    "mamba2": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        lambda size: {
            "hidden_size": int(1024 * size),
            "state_size": int(128 * size),
            "num_heads": 32,
            "head_dim": int(64 * size),
            "n_groups": 1,
        },
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the routine's options to `parser`."""
    add_grid(parser, GRID, heads=False)


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Every model, each kind of call, both ways in turns."""
    rows: list[Row] = []
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        bench.notes.append("torch or transformers is not installed: no hybrid models")
        return {"rows": rows}
    grid = chosen_grid(args, GRID, QUICK_GRID)
    for length in grid.keys:
        for name in MODELS:
            rows += _of_model(bench, name, length)
    return {"rows": rows}


def _of_model(bench: Bench, name: str, length: int) -> list[Row]:
    import torch

    import transformers

    config_class, model_class, widths = MODELS[name]
    config = getattr(transformers, config_class)(**{**_COMMON, **widths(0.125 if bench.quick else 1.0)})
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    tokens = torch.randint(2, 1000, (1, length), generator=torch.Generator().manual_seed(1))
    rows: list[Row] = []
    for form, count in (("prompt", length), ("tokens", TOKENS), ("training step", length)):
        bench.say(f"hybrid {name}, {form}, length {length}")
        ways = [(OURS, True)] + ([(THEIRS, False)] if bench.peers else [])
        candidates = [Candidate(way, _call(model, form, tokens, ours), peer=not ours) for way, ours in ways]
        for threads in bench.each_threads():
            torch.set_num_threads(threads)
            outcomes = bench.interleave(candidates)
            found = rows_of(outcomes, OURS, {"threads": threads, "model": name, "form": form, "keys": length})
            for row in found:
                if row["ms"] is None:
                    continue
                row["tokens_s"] = count / row["ms"] * 1e3
                # Caches of single tokens have gone on by then, one further than the other.
                if not row["ours"] and form != "tokens":
                    difference = outcomes[THEIRS].result - outcomes[OURS].result
                    row["difference"] = float(np.abs(difference).max())
            rows += found
    return rows


def _call(model: Any, form: str, tokens: Any, ours: bool) -> Callable[[], Any]:
    """A call of the model that returns the last row of logits."""
    import torch

    from longattn.transformers import use_linear_kernels

    def kernels() -> Any:
        return use_linear_kernels(model) if ours else contextlib.nullcontext()

    def prompt() -> Any:
        with kernels(), torch.no_grad():
            return model(tokens, use_cache=False).logits[0, -1].numpy()

    def training_step() -> Any:
        model.zero_grad()
        with kernels():
            logits = model(tokens, use_cache=False).logits
            loss: Any = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
            loss.backward()
        return logits[0, -1].detach().numpy()

    if form != "tokens":
        return prompt if form == "prompt" else training_step
    with kernels(), torch.no_grad():
        first = model(tokens, use_cache=True)
    name = "cache_params" if "cache_params" in first else "past_key_values"
    cache = {name: first[name]}

    def single_tokens() -> Any:
        with kernels(), torch.no_grad():
            for n in range(TOKENS):
                logits = model(tokens[:, n : n + 1], **cache, use_cache=True).logits
        return logits[0, -1].numpy()

    return single_tokens


def panels(result: Result) -> list[Panel | Bars]:
    """Nothing: a table says it."""
    return []


def _tables(found: Sequence[Result]) -> list[str]:
    return by_threads(all_rows(found, "hybrid"), COLUMNS[1:])


SECTIONS = (
    Section(
        "linear",
        "hybrid",
        "Hybrid and state space models",
        "Random weights in four layers, three of them linear where layers differ; `tokens` are single ones after the "
        "prompt, `training step` forward and backward. `difference`: largest of the last row of logits from ours.",
        _tables,
    ),
)
