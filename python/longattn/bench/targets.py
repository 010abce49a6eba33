"""What the benchmarks should show: every threshold in one table, judged from the JSON alone.

A target holds if every figure that it speaks of reaches the bound; the worst one is reported with its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from longattn.bench import external, nearest, peers, prefill
from longattn.bench.results import Result, Row
from longattn.bench.tables import count
from longattn.retrieval.ways import WAYS

PASS, MISS, ABSENT = "PASS", "MISS", "not measured"
LONG = 32768
GQA, MHA = ("32/8", "64/8"), ("32/32",)
HALF = ("bfloat16", "float16")
VNNI = ("avx512vnni", "avxvnni")


@dataclass(frozen=True)
class Target:
    """A bound on some figures.

    Attributes:
        text: what should hold, without the bound.
        routine: whose results speak of it.
        figure: the row's key.
        bound: least value, or greatest where `at_most`.
        command: what measures it.
        where: keys of a row to the values that count; a row without the figure does not count.
        keys: least and greatest length that count, both inclusive.
        table: list of the result that holds the rows.
        needs: CPU features of which the machine must have one.
        form: how to write the figure.
    """

    text: str
    routine: str
    figure: str
    bound: float
    command: str
    where: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    keys: tuple[float, float] = (0, float("inf"))
    table: str = "rows"
    at_most: bool = False
    needs: Sequence[str] = ()
    form: str = ".2f"

    def written(self, value: float) -> str:
        return format(value, self.form) + ("×" if self.form == ".2f" and not self.at_most else "")

    def holds(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def counts(self, row: Row) -> bool:
        """Whether the target speaks of this row."""
        return (
            row.get(self.figure) is not None
            and all(row.get(key) in values for key, values in self.where.items())
            and self.keys[0] <= row.get("keys", self.keys[0]) <= self.keys[1]
        )


@dataclass(frozen=True)
class Verdict:
    """A target, the worst figure found, where, and how many of how many figures reach the bound."""

    target: Target
    status: str
    worst: float | None = None
    place: str = ""
    reached: int = 0
    of: int = 0

    @property
    def cells(self) -> tuple[str, ...]:
        """Of a table: target, bound, worst figure and its place, how many reach it, verdict, command."""
        target = self.target
        bound = f"{'≤' if target.at_most else '≥'} {target.written(target.bound)}"
        worst = "" if self.worst is None else f"{target.written(self.worst)} ({self.place})"
        reached = f"{self.reached} of {self.of}" if self.of else ""
        return target.text, bound, worst, reached, self.status, f"`{target.command}`"


def judge(results: Sequence[Result], targets: Sequence[Target] | None = None) -> list[Verdict]:
    """Every target against the results, in the order of the table."""
    return [_judge(target, results) for target in (TARGETS if targets is None else targets)]


def _judge(target: Target, results: Sequence[Result]) -> Verdict:
    rows = [
        row
        for result in results
        if result["routine"] == target.routine and _able(target, result)
        for row in result.get(target.table, ())
        if target.counts(row)
    ]
    if not rows:
        return Verdict(target, ABSENT)
    worst = (max if target.at_most else min)(rows, key=lambda row: float(row[target.figure]))
    reached = sum(target.holds(row[target.figure]) for row in rows)
    status = PASS if reached == len(rows) else MISS
    return Verdict(target, status, worst[target.figure], _place(worst), reached, len(rows))


def _able(target: Target, result: Result) -> bool:
    return not target.needs or bool(set(target.needs) & set(result["machine"]["cpu"]["features"]))


def _place(row: Row) -> str:
    """The shape of a row, in a few words."""
    parts = [
        row.get("vectors"),
        f"{row['level']:.0%} of the mass" if "level" in row else None,
        row.get("heads"),
        f"D {row['head_dim']}" if "head_dim" in row else None,
        f"N {row['keys']}" if "keys" in row else None,
        row.get("dtype"),
        count(row["threads"]) if "threads" in row else None,
    ]
    return ", ".join(part for part in parts if part)


def _decode() -> list[Target]:
    command = "longattn bench decode --threads 1,2"
    share = [
        Target(
            f"decode, {dtype}: share of the read bandwidth, N ≥ 32K",
            "decode",
            "of_read",
            bound,
            command,
            {"ours": (True,), "dtype": (dtype,)},
            (LONG, float("inf")),
            form=".0%",
        )
        for dtype, bound in (("float32", 0.85), ("bfloat16", 0.85), ("float16", 0.85), ("int8", 0.7), ("int4", 0.5))
    ]
    ratios = [
        (GQA, "float32", "vs_best_torch", 1.2),
        (GQA, "bfloat16", "vs_best_torch", 1.8),
        (GQA, "float16", "vs_best_torch", 1.8),
        (GQA, "bfloat16", "vs_enable_gqa", 25.0),
        (MHA, "float32", "vs_best_torch", 1.0),
        (MHA, "bfloat16", "vs_best_torch", 1.4),
        (MHA, "float16", "vs_best_torch", 1.4),
        (GQA + MHA, "int8", "vs_torch_float32", 4.0),
    ]
    against = {
        "vs_best_torch": "torch's best form",
        "vs_enable_gqa": peers.ENABLE_GQA,
        "vs_torch_float32": "torch's best float32 form",
    }
    kinds = {GQA: "GQA decode", MHA: "MHA decode", GQA + MHA: "decode"}
    return share + [
        Target(
            f"{kinds[heads]}, {dtype}: speed against {against[figure]}",
            "decode",
            figure,
            bound,
            command,
            {"ours": (True,), "dtype": (dtype,), "heads": heads},
        )
        for heads, dtype, figure, bound in ratios
    ]


def _prefill() -> list[Target]:
    command = "longattn bench prefill --threads 1,2"
    infinity = float("inf")
    found = [
        Target(
            "prefill, float32: share of the multiply-add peak, N ≥ 4K",
            "prefill",
            "of_fma",
            0.6,
            command,
            {"method": (prefill.OURS,), "dtype": ("float32",)},
            (4096, infinity),
            form=".0%",
        )
    ]
    for dtype in ("float32", *HALF):
        for what, dims, keys, bound in (
            ("D 128, N ≥ 4K", (128,), (4096, infinity), 1.2),
            ("D 64", (64,), (0, infinity), 1.5),
            ("N = 1K", (64, 128), (1024, 1024), 1.5),
        ):
            found.append(
                Target(
                    f"prefill, {dtype}, {what}: speed against {prefill.TORCH}",
                    "prefill",
                    "vs_torch",
                    bound,
                    command,
                    {"method": (prefill.OURS,), "dtype": (dtype,), "head_dim": dims},
                    keys,
                )
            )
    found.append(
        Target(
            "prefill, float32, int8 scores: speed against our own float32, where the CPU has VNNI",
            "prefill",
            "vs_own",
            1.3,
            command,
            {"method": (prefill.INT8_SCORES,), "dtype": ("float32",)},
            needs=VNNI,
        )
    )
    found.append(
        Target(
            "prefill: memory beyond inputs and outputs grows as length to the power",
            "prefill",
            "slope",
            1.1,
            command,
            {"method": (prefill.OURS,)},
            table="memory_slopes",
            at_most=True,
        )
    )
    return found


def _peers() -> list[Target]:
    return [
        Target(
            f"{kind} decode: speed against {peer}",
            external.ROUTINE,
            "times_ours",
            2.0,
            f"python benches/peers/{script} --threads 1,2",
            {"peer": (peer,), "heads": heads},
        )
        for peer, script in (("onnxruntime", "onnxruntime_gqa.py"), ("ggml", "ggml_flash.py"))
        for kind, heads in (("GQA", GQA), ("MHA", MHA))
    ]


def _nearest() -> list[Target]:
    return [
        Target(
            f"time of {peer} per query head over that of the default way, at equal mass",
            nearest.ROUTINE,
            "times_ours",
            3.0,
            "python benches/peers/ann.py",
            {"peer": (peer,)},
            table="levels",
        )
        for peer in ("faiss IVF", "faiss HNSW", "faiss binary flat", "hnswlib", "usearch")
    ]


def _growth() -> list[Target]:
    return [
        Target(
            "time at equal error grows as length to the power, the best way over clusters, pages or a graph",
            "growth",
            "slope",
            0.5,
            "longattn bench growth --threads 1",
            table="best_slopes",
            at_most=True,
        )
    ]


def _verified() -> list[Target]:
    return [
        Target(
            "stated errors: share of violations over delta",
            "verified",
            "violations_over_delta",
            1.0,
            "longattn bench verified",
            at_most=True,
        ),
        Target(
            "stated errors: outputs per setting",
            "verified",
            "queries",
            10_000,
            "longattn bench verified",
            form=",.0f",
        ),
    ]


def _demo() -> list[Target]:
    return [
        Target(
            "demo, 131,072 tokens: ways of 0.97 of exact attention's accuracy and 10 times the speed of SDPA",
            "demo",
            "accurate_and_fast",
            6,
            "longattn demo --context 131072 --ways all --peer transformers",
            keys=(131_072, float("inf")),
            table="summary",
            form=".0f",
        )
    ]


def _drift() -> list[Target]:
    return [
        Target(
            "drift: recall of the default index after 32K generated rows, less that behind the prefill",
            "drift",
            "recall_change",
            -0.02,
            "longattn bench drift",
            {"method": (WAYS[0].name,)},
            form="+.3f",
        )
    ]


TARGETS: tuple[Target, ...] = (
    *_decode(),
    *_prefill(),
    *_peers(),
    *_nearest(),
    *_demo(),
    *_drift(),
    *_growth(),
    *_verified(),
)
