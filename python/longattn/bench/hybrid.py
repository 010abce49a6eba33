"""Hybrid models of transformers with random weights: on longattn's kernels and on transformers' own functions.

A model has four layers of the widths of a small one of its kind, so that its share of linear layers, convolutions,
experts and norms is what such models have. Tokens/s are of whole calls of the model: a prompt, which fills a cache,
single tokens after it and, if asked for, a training step (forward and backward) over the prompt.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn.bench.harness import Bench, Candidate, reason, rows_of
from longattn.bench.options import integers, names
from longattn.bench.plots import Bars
from longattn.bench.results import Result, Row
from longattn.bench.sections import Section, all_rows, by_threads, grouped, short, whole
from longattn.bench.tables import Column, count

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
    Column("largest logit", "largest", ".2f"),
)
LENGTHS, QUICK_LENGTHS = (512, 2048), (48,)
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
    "olmo_hybrid": (
        "OlmoHybridConfig",
        "OlmoHybridForCausalLM",
        lambda size: {
            "hidden_size": int(1024 * size),
            "intermediate_size": int(2048 * size),
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "linear_num_value_heads": 8,
            "linear_num_key_heads": 8,
            "linear_key_head_dim": int(96 * size),
            "linear_value_head_dim": int(192 * size),
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
    parser.add_argument(
        "--models", type=names(tuple(MODELS)), metavar="NAME,...", help=f"comma-separated (default {','.join(MODELS)})"
    )
    parser.add_argument(
        "--forms",
        type=names(tuple(FORMS)),
        metavar="NAME,...",
        help=f"kinds of calls of {','.join(FORMS)} (default {','.join(DEFAULT_FORMS)}: without our kernels a training "
        "step of Mamba takes minutes over long prompts)",
    )
    parser.add_argument(
        "--keys",
        type=integers,
        metavar="N,N",
        help=f"tokens of a prompt, comma-separated (default {','.join(map(str, LENGTHS))})",
    )


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Every model, each kind of call, both ways in turns."""
    rows: list[Row] = []
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        bench.notes.append("torch or transformers is not installed: no hybrid models")
        return {"rows": rows}
    for length in args.keys or (QUICK_LENGTHS if bench.quick else LENGTHS):
        for name in args.models or MODELS:
            rows += _of_model(bench, name, length, args.forms or DEFAULT_FORMS)
    return {"rows": rows}


class _Way:
    """Calls of a model on our kernels or on transformers' functions, each with the logits that it returns."""

    def __init__(self, model: Any, tokens: Any, ours: bool) -> None:
        self.model, self.tokens, self.ours = model, tokens, ours
        self.name = OURS if ours else THEIRS
        self.after_prompt: dict[str, Any] = {}
        self.cache: dict[str, Any] = {}

    def prompt(self) -> NDArray[np.float32]:
        """The prompt at once; its cache is kept."""
        import torch

        with self._kernels(), torch.no_grad():
            out = self.model(self.tokens, use_cache=True)
        name = "cache_params" if "cache_params" in out else "past_key_values"
        self.after_prompt = {name: out[name]}
        return self._plain(out.logits)

    def restart(self) -> None:
        """Single tokens go on from the prompt."""
        self.cache = copy.deepcopy(self.after_prompt)

    def single_tokens(self) -> NDArray[np.float32]:
        """The next tokens, one by one."""
        import torch

        with self._kernels(), torch.no_grad():
            steps = [self.model(self.tokens[:, n : n + 1], **self.cache, use_cache=True).logits for n in range(TOKENS)]
        return self._plain(torch.cat(steps, dim=1))

    def training_step(self) -> NDArray[np.float32]:
        """The prompt's loss and all gradients."""
        import torch

        self.model.zero_grad()
        with self._kernels():
            logits = self.model(self.tokens, use_cache=False).logits
            loss: Any = torch.nn.functional.cross_entropy(logits[0, :-1], self.tokens[0, 1:])
            loss.backward()
        return self._plain(logits)

    def _kernels(self) -> Any:
        from longattn.transformers import use_linear_kernels

        return use_linear_kernels(self.model) if self.ours else contextlib.nullcontext()

    def _plain(self, logits: Any) -> NDArray[np.float32]:
        plain: NDArray[np.float32] = logits[0].detach().numpy()
        return plain


def _of_model(bench: Bench, name: str, length: int, forms: Sequence[str]) -> list[Row]:
    import torch

    import transformers

    config_class, model_class, widths = MODELS[name]
    config = getattr(transformers, config_class)(**{**_COMMON, **widths(0.125 if bench.quick else 1.0)})
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    tokens = torch.randint(2, 1000, (1, length), generator=torch.Generator().manual_seed(1))
    ways = [_Way(model, tokens, ours) for ours in ((True, False) if bench.peers else (True,))]
    rows: list[Row] = []
    for form in forms:
        if form == SINGLE:
            ways = [way for way in ways if _ready(bench, way)]
        bench.say(f"hybrid {name}, {form}, length {length}")
        for threads in bench.each_threads():
            torch.set_num_threads(threads)
            rows += _timed(bench, ways, form, {"threads": threads, "model": name, "form": form, "keys": length})
    return rows


def _ready(bench: Bench, way: _Way) -> bool:
    """Whether the way has a cache for single tokens to go on from: a peer may fail over the prompt."""
    if not way.after_prompt:
        try:
            way.prompt()
        except RuntimeError as error:
            if way.ours:
                raise
            bench.say(f"{way.name} has no cache: {reason(error)}")
    return bool(way.after_prompt)


def _timed(bench: Bench, ways: Sequence[_Way], form: str, case: Row) -> list[Row]:
    """A row per way, with tokens/s and how far its logits are from ours."""
    if form == SINGLE:
        for way in ways:
            way.restart()
    outcomes = bench.interleave([Candidate(way.name, FORMS[form](way), peer=not way.ours) for way in ways])
    rows = rows_of(outcomes, OURS, case)
    for row in rows:
        if row["ms"] is None:
            continue
        row["tokens_s"] = (TOKENS if form == SINGLE else case["keys"]) / row["ms"] * 1e3
        if not row["ours"]:
            # Of the first call of each: those of single tokens follow the prompt.
            ours, theirs = outcomes[OURS].result, outcomes[THEIRS].result
            row["difference"], row["largest"] = float(np.abs(theirs - ours).max()), float(np.abs(theirs).max())
    return rows


PROMPT, SINGLE, TRAINING = "prompt", "tokens", "training"
FORMS: dict[str, Callable[[_Way], Callable[[], NDArray[np.float32]]]] = {
    PROMPT: lambda way: way.prompt,
    SINGLE: lambda way: way.single_tokens,
    TRAINING: lambda way: way.training_step,
}
DEFAULT_FORMS = (PROMPT, SINGLE)


def panels(result: Result) -> list[Bars]:
    """Tokens/s of each model with the most threads, for each kind of call and length."""
    most = max((row["threads"] for row in result["rows"]), default=0)
    mine = [row for row in result["rows"] if row["threads"] == most]
    models = tuple(dict.fromkeys(row["model"] for row in mine))
    made = []
    for (form, length), rows in grouped(mine, "form", "keys").items():
        found = {(row["method"], row["model"]): row.get("tokens_s") for row in rows}
        series = {
            way: tuple(found.get((way, model)) for model in models)
            for way in dict.fromkeys(row["method"] for row in rows)
        }
        made.append(Bars(f"{form}, {short(length)}, {count(most)}", "tokens/s", models, series))
    return sorted(made, key=lambda bars: list(FORMS).index(bars.title.split(",")[0]))


def _tables(found: Sequence[Result]) -> list[str]:
    return by_threads(all_rows(found, "hybrid"), COLUMNS[1:])


SECTIONS = (
    Section(
        "linear",
        "hybrid",
        "Hybrid and state space models",
        "Random weights in four layers of width 1,024, three of them linear in the first three models, all in the "
        f"others; float32. `prompt` fills a cache, `tokens` are {TOKENS} single ones after it, `training` is a step "
        "forward and backward. Full attention, projections, experts and convolutions are transformers' in both. "
        "`× ours`: a call's time over that of ours. `max difference`: of all logits of a call from ours, whose size "
        "`largest logit` says.",
        _tables,
        whole("hybrid", panels),
    ),
)
