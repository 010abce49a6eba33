"""The few figures of the front page, from the JSON files of a folder: `longattn bench report DIR --readme FILE`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longattn.bench.results import Result, Row
from longattn.bench.sections import all_rows
from longattn.bench.tables import grid

TORCH = ("torch SDPA, enable_gqa", "torch SDPA, group folded", "torch matmul, group folded")


@dataclass(frozen=True)
class Headline:
    """One of our calls beside the fastest of its peers, at one size and the most threads that were measured.

    Attributes:
        text: what was computed, with figures of our row in braces.
        routine: whose results have it.
        ours: what the name of our method begins with.
        peers: names of the others.
        at: values that all of these rows have.
        figure: the time, in ms.
    """

    text: str
    routine: str
    ours: str
    peers: tuple[str, ...]
    at: Mapping[str, object]
    figure: str = "ms"

    def cells(self, found: Sequence[Result]) -> list[str]:
        """Its line of the table; nothing where it was not measured."""
        rows = [row for row in all_rows(found, self.routine) if all(row.get(k) == x for k, x in self.at.items())]
        most = max((row["threads"] for row in rows), default=0)
        timed = [row for row in rows if row["threads"] == most and row.get(self.figure) is not None]
        ours = [row for row in timed if str(row["method"]).startswith(self.ours)]
        peers = [row for row in timed if row["method"] in self.peers]
        if not ours or not peers:
            return []
        own, peer = ours[0], min(peers, key=self._time)
        ratio = self._time(peer) / self._time(own)
        times = (f"{_ms(self._time(peer))} ({peer['method']})", f"{ratio:.1f}")
        return [self.text.format(**own), str(most), _ms(self._time(own)), *times]

    def _time(self, row: Row) -> float:
        return float(row[self.figure])


HEADLINES = (
    Headline(
        "demo, {keys:,} tokens, retrieval: {accuracy:.0%} right answers from {keys_read_fraction:.1%} of the keys; "
        "attention per token",
        "demo",
        "retrieval",
        ("transformers sdpa",),
        {"keys": 65_536},
        "attention_ms_per_token",
    ),
    Headline(
        "decode step, 131,072 keys, bfloat16, 32/8 heads of 128: exact",
        "decode",
        "longattn.attention",
        TORCH,
        {"keys": 131_072, "heads": "32/8", "head_dim": 128, "dtype": "bfloat16"},
    ),
    Headline(
        "the same by retrieval, synthetic keys; error {error_o:.1%}",
        "retrieval",
        "longattn.retrieval_attention",
        TORCH,
        {"keys": 131_072, "shape": "32/8×128", "vectors": "synthetic"},
    ),
    Headline(
        "causal prefill, 16,384 tokens, bfloat16, 8 heads of 128",
        "prefill",
        "longattn.attention",
        ("torch SDPA",),
        {"keys": 16_384, "head_dim": 128, "dtype": "bfloat16"},
    ),
    Headline(
        "gated delta rule, 8,192 tokens, bfloat16, 8 heads of 128",
        "linear",
        "longattn.linear.gated_delta_rule",
        ("torch chunk loop", "transformers torch_chunk_gated_delta_rule"),
        {"form": "gated_delta_rule", "keys": 8192, "dtype": "bfloat16"},
    ),
    Headline(
        "windows of 13x13 over an image of 56x56, float32, 12 heads of 32",
        "neighbourhood",
        "longattn",
        ("torch gather", "torch unfold", "torch flex_attention, compiled"),
        {"grid": "56x56", "window": "13x13", "dtype": "float32", "query_heads": 12},
    ),
)


def lines(found: Sequence[Result]) -> list[str]:
    """Lines of Markdown: the machines, and a table of the figures that there are."""
    routines = {headline.routine for headline in HEADLINES}
    machines = dict.fromkeys(
        f"{result['machine']['cpu']['model']}, {result['machine']['cpu']['usable_cpus']} CPUs"
        for result in found
        if result["routine"] in routines
    )
    heads = ["", "threads", "ms", "fastest peer, ms", "faster"]
    return [f"{'; '.join(machines)}:", "", *grid(heads, filter(None, (line.cells(found) for line in HEADLINES)))]


def _ms(time: float) -> str:
    return f"{time:,.0f}" if time >= 100 else f"{time:.1f}"
