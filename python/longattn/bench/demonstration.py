"""The demo's part of the report: its tables and its targets; `longattn demo --json` measures."""

from __future__ import annotations

from collections.abc import Sequence

from longattn.bench.results import Result
from longattn.bench.sections import Section, all_rows
from longattn.bench.tables import Column, table
from longattn.bench.targets import Target

COLUMNS: tuple[Column, ...] = (
    Column("threads", "threads"),
    Column("context", "keys"),
    Column("way", "method"),
    Column("accuracy", "accuracy", ".2f"),
    Column("of exact", "accuracy_of_exact", ".2f"),
    Column("keys read", "keys_read_fraction", ".2%"),
    Column("attention, ms per token", "attention_ms_per_token", ".2f"),
    Column("× faster than SDPA", "faster_than_sdpa", ".1f"),
    Column("ms per token", "ms_per_token", ".2f"),
)
#: Of ways to read the prompt.
PROMPTS: tuple[Column, ...] = (
    Column("threads", "threads"),
    Column("context", "keys"),
    Column("prompt read through", "method"),
    Column("accuracy", "accuracy", ".2f"),
    Column("density", "density", ".1%"),
    Column("prefill, s", "prefill_s", ".1f"),
    Column("times faster", "faster_prefill", ".1f"),
    Column("of it attention, s", "attention_s", ".1f"),
    Column("times faster", "faster_attention", ".1f"),
)


def _tables(found: Sequence[Result]) -> list[str]:
    rows = all_rows(found, "demo")
    return ["", *table(rows, COLUMNS)] if rows else []


def _prompt_tables(found: Sequence[Result]) -> list[str]:
    rows = all_rows(found, "demo", "prompts")
    return ["", *table(rows, PROMPTS)] if rows else []


SECTIONS = (
    Section(
        "sparse",
        "prompts",
        "Long prompts: a model reads a text through selectors",
        "The demo's model reads its prompt through a selector of keys in its full layers, choosing included, and is "
        "asked for hidden facts with all keys. Times faster than exact attention on the same prompt.",
        _prompt_tables,
    ),
    Section(
        "retrieval",
        "demo",
        "Demo: a model answers questions about a long text",
        "The byte-level model of `tools/needle_lm` over text that it was not trained on, asked for hidden facts. Ways "
        "read sinks, window and `--top-k` rows per KV head; policies keep as many rows of the text, judged by a sample "
        "of its queries before any question is known. Attention times are those of the full layers, cache update "
        "included; SDPA is transformers with its own cache on the same prompt.",
        _tables,
    ),
)
TARGETS = (
    Target(
        "demo, 131,072 tokens: ways of 0.97 of exact attention's accuracy and 10 times the speed of SDPA",
        "demo",
        "accurate_and_fast",
        6,
        "longattn demo --context 131072 --ways all --peer transformers",
        within={"keys": (131_072, float("inf"))},
        table="summary",
        form=".0f",
    ),
    Target(
        "demo, 65,536 tokens: selectors with 3 times the speed of dense prefill and its accuracy to 0.03",
        "demo",
        "fast_prompts",
        3,
        "longattn demo --context 65536 --prefill-ways all",
        within={"keys": (65_536, float("inf"))},
        table="summary",
        form=".0f",
    ),
)
