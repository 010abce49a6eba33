"""How the demo talks: progress on stderr, a table on stdout, a plot in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, TypeVar

from longattn import doctor

T = TypeVar("T")

NAMES = {"exact": "exact", "retrieval": "retrieval", "window": "sinks + window", "sdpa": "transformers sdpa"}


class Progress:
    """A bar that redraws itself on a terminal, a line every five seconds elsewhere; None is silent."""

    WIDTH, PAUSE = 30, 5.0

    def __init__(self, stream: TextIO | None = sys.stderr) -> None:
        self._stream = stream
        self._terminal = stream is not None and stream.isatty()

    def over(self, name: str, items: Sequence[T], total: int) -> Iterator[T]:
        """Yields the items; `total` is what all of them count for in the reader's units."""
        start = shown = time.monotonic()
        for i, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if self._terminal or now - shown > self.PAUSE:
                self._show(name, i / len(items), total, now - start)
                shown = now
        if self._terminal and self._stream is not None:
            print(file=self._stream)

    def _show(self, name: str, share: float, total: int, seconds: float) -> None:
        if self._stream is None:
            return
        bar = "#" * round(self.WIDTH * share)
        line = f"{name} [{bar:<{self.WIDTH}}] {round(share * total):,} of {total:,}, {seconds:.0f} s"
        print(
            f"\r{line}\x1b[K" if self._terminal else line,
            end="" if self._terminal else "\n",
            file=self._stream,
            flush=True,
        )


def introduction(settings: dict[str, Any], parameters: int) -> str:
    return (
        f"{settings['questions']} facts are hidden in {settings['context']:,} bytes of Python source; a "
        f"model of {parameters / 1e6:.2f} M parameters, which never saw that text, is asked for each.\n"
        "Each line of the table is the same model on the same prompt; what differs is how many keys "
        "its full-attention layers read per token."
    )


def table(result: dict[str, Any]) -> str:
    """One line per contestant; times are medians over the decoded tokens."""
    peer = result["peer"] is not None
    heads = f"{'':40}{'right answers':>15}{'keys read':>12}{'ms/token':>11}{'attention ms/token':>21}"
    lines = [heads + (f"{'faster than sdpa':>19}" if peer else "")]
    for name, row in result["contestants"].items():
        right = f"{round(row['accuracy'] * result['questions'])} of {result['questions']}"
        share = f"{100 * row['keys_read_fraction']:.2f} %"
        lines.append(
            f"{NAMES.get(name, name):40}{right:>15}{share:>12}{row['ms_per_token']:>11.2f}"
            f"{row['attention_ms_per_token']:>21.2f}" + (f"{row['faster_than_sdpa']:>18.1f}x" if peer else "")
        )
    megabytes = {name: result[f"{name}_bytes"] / 1e6 for name in ("store", "index")}
    lines.append(
        f"\nPrefill {result['prefill_s']:.1f} s, index {result['index_s']:.1f} s; keys and values "
        f"{megabytes['store']:.0f} MB, index {megabytes['index']:.0f} MB; {result['threads']} threads. "
        "Attention: that of the full layers, cache update included."
    )
    if result.get("prefill_ways"):
        lines += ["", *_prefill_table(result)]
    if result["peer"]:
        lines.append(f"Prefill of transformers {result['peer']['prefill_s']:.1f} s.")
    if result["text_copies"] > 1:
        lines.append(f"This Python has too little source text: the haystack repeats it {result['text_copies']} times.")
    return "\n".join(lines)


def _prompts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each way to read the prompt, exact attention's first; questions are then asked with all keys."""
    exact = {
        "name": "exact",
        "accuracy": result["accuracy"]["exact"],
        "density": 1.0,
        "prefill_s": result["prefill_s"],
        "attention_s": result["prefill_attention_s"],
    }
    return [
        {
            "method": row["name"],
            "keys": result["context"],
            "threads": result["threads"],
            **{figure: row[figure] for figure in ("accuracy", "density", "prefill_s", "attention_s")},
            "faster_prefill": exact["prefill_s"] / row["prefill_s"],
            "faster_attention": exact["attention_s"] / row["attention_s"],
        }
        for row in (exact, *result["prefill_ways"])
    ]


def _prefill_table(result: dict[str, Any]) -> list[str]:
    """One line for each way to read the prompt."""
    heads = f"{'density':>12}{'prefill s':>11}{'times':>8}{'attention s':>13}{'times':>8}"
    lines = [f"{'prompt read through':31}{'right answers':>15}{heads}"]
    for row in _prompts(result):
        right = f"{round(row['accuracy'] * result['questions'])} of {result['questions']}"
        lines.append(
            f"{row['method']:31}{right:>15}{100 * row['density']:>10.1f} %{row['prefill_s']:>11.1f}"
            f"{row['faster_prefill']:>8.1f}{row['attention_s']:>13.1f}{row['faster_attention']:>8.1f}"
        )
    lines.append("Attention: that of the full layers, choosing included; times: how much faster than exact.")
    return lines


#: Of exact attention's accuracy, and of the time of SDPA's attention.
ACCURATE, FAST = 0.97, 10.0
#: Of a way to read the prompt: what it may lose of exact attention's accuracy, and how much faster its prefill is.
LOST, FASTER_PREFILL = 0.03, 3.0


def as_result(result: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """What makes the figures a result of the benchmarks: a row per contestant, and how many do well."""
    keys = result["context"]
    rows = [
        {
            "method": NAMES.get(name, name),
            "keys": keys,
            "threads": result["threads"],
            "questions": result["questions"],
            **{figure: value for figure, value in row.items() if figure != "wrong"},
        }
        for name, row in result["contestants"].items()
    ]
    ways = [row for row in rows if row["method"] not in ("exact", "sinks + window", NAMES["sdpa"])]
    well = [row for row in ways if (row["accuracy_of_exact"] or 0) >= ACCURATE]
    summary = {"keys": keys, "threads": result["threads"], "accurate": len(well)}
    if result["peer"] is not None:
        summary["accurate_and_fast"] = sum(row["faster_than_sdpa"] >= FAST for row in well)
    prompts = _prompts(result) if result.get("prefill_ways") else []
    if prompts:
        least = prompts[0]["accuracy"] - LOST
        fast = [row for row in prompts if row["faster_prefill"] >= FASTER_PREFILL]
        summary["fast_prompts"] = sum(row["accuracy"] >= least for row in fast)
    return {
        "routine": "demo",
        "command": " ".join(["longattn", *arguments]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": doctor.machine(),
        "rows": rows,
        "prompts": prompts,
        "summary": [summary],
        "limits": {},
        "slopes": [],
        "notes": [],
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of accuracy, keys read and attention time; needs matplotlib."""
    from matplotlib.figure import Figure

    rows = result["contestants"]
    labels = [NAMES.get(name, name).replace(" ", "\n", 1) for name in rows]
    panels = (
        ("right answers, %", "accuracy", 100),
        ("keys read, %", "keys_read_fraction", 100),
        ("attention, ms per token", "attention_ms_per_token", 1),
    )
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (title, key, factor) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        bars = axes.bar(labels, [factor * row[key] for row in rows.values()], color=[f"C{i}" for i in range(len(rows))])
        axes.bar_label(bars, fmt="{:.3g}")
        axes.set_title(title)
        axes.margins(y=0.15)  # room for the numbers on the bars
        if key != "accuracy":
            axes.set_yscale("log")
    figure.suptitle(f"{result['context']:,} tokens, {result['questions']} questions")
    figure.savefig(path, dpi=150)
