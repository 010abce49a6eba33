"""The sections of a report: what they say, their tables, their plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longattn.bench import (
    capture,
    compare,
    decode,
    drift,
    error,
    external,
    global_linear,
    growth,
    linear,
    nearest,
    neighbourhood,
    prefill,
    retrieval,
    scan,
    sparse,
    targets,
    verified,
)
from longattn.bench.plots import Bars, Panel, Scatter, series
from longattn.bench.results import Result, Row
from longattn.bench.tables import Column, count, grid, table


@dataclass(frozen=True)
class Section:
    """Name (its plots' names begin with it), title, what to know to read it, and its tables, none without rows."""

    name: str
    title: str
    text: str
    tables: Callable[[Sequence[Result]], list[str]]


def counted(verdicts: Sequence[targets.Verdict]) -> list[str]:
    """`12 PASS`, `3 MISS`, ..."""
    found = Counter(verdict.status for verdict in verdicts)
    return [f"{found[status]} {status}" for status in (targets.PASS, targets.MISS, targets.ABSENT) if found[status]]


def figures(found: Sequence[Result]) -> dict[str, list[Panel | Bars | Scatter]]:
    """Every plot that the results allow, by name."""
    drawn: dict[str, list[Panel | Bars | Scatter]] = {}
    rows = _rows(found, "decode")
    for threads in _values(rows, "threads"):
        mine = [row for row in rows if row["threads"] == threads]
        drawn[f"decode-{threads}"] = list(decode.panels({"rows": mine}))
    if any(row.get("vs_best_torch") for row in rows):
        drawn["decode-ratios"] = _decode_ratios(rows)
    rows = _rows(found, "prefill")
    if rows:
        drawn["prefill"] = _prefill_lines(rows)
    if any(row.get("vs_torch") for row in rows):
        drawn["prefill-ratios"] = _prefill_ratios(rows)
    rows = _rows(found, external.ROUTINE)
    if rows:
        drawn["peers"] = _peer_ratios(rows)
    rows = _rows(found, "error")
    if rows:
        drawn["error"] = list(error.panels({"rows": rows}))
    rows = _rows(found, "neighbourhood")
    if any(not row["ours"] and row["times_ours"] for row in rows):
        drawn["neighbourhood"] = list(neighbourhood.panels({"rows": rows}))
    routines = (
        ("sparse", sparse),
        ("capture", capture),
        ("compare", compare),
        ("verified", verified),
        ("drift", drift),
        ("growth", growth),
        ("scan", scan),
        ("linear", linear),
    )
    for name, routine in routines:
        rows = _rows(found, name)
        if rows:
            drawn[name] = list(routine.panels({"rows": rows}))
    return drawn


def _rows(found: Sequence[Result], routine: str, table: str = "rows") -> list[Row]:
    return [row for result in found if result["routine"] == routine for row in result.get(table, ())]


def _values(rows: Sequence[Row], key: str) -> list[int]:
    return sorted({row[key] for row in rows})


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _grown(rows: Sequence[Row], keys: Sequence[str], line: Row) -> str:
    """Slope of the line, if it was measured."""
    return next((f"{row['slope']:.2f}" for row in rows if all(row[key] == line[key] for key in keys)), "")


def _lengths(rows: Sequence[Row], keys: Sequence[str]) -> dict[tuple[object, ...], dict[int, Row]]:
    """Rows of one line by length."""
    lines: dict[tuple[object, ...], dict[int, Row]] = {}
    for row in rows:
        lines.setdefault(tuple(row[key] for key in keys), {})[row["keys"]] = row
    return lines


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _decode_tables(found: Sequence[Result]) -> list[str]:
    rows = [row for row in _rows(found, "decode") if row["ours"]]
    grown = _rows(found, "decode", "slopes")
    lengths = _values(rows, "keys")
    heads = ["Hq/Hkv", "D", "dtype", *(f"{_short(n)}: ms (of read)" for n in lengths), "slope"]
    heads += [f"{_short(n)}: × torch (× default)" for n in lengths] + ["max error"]
    lines: list[str] = []
    for threads in _values(rows, "threads"):
        cells = []
        mine = [row for row in rows if row["threads"] == threads]
        for by_length in _lengths(mine, ("heads", "head_dim", "dtype")).values():
            some = next(iter(by_length.values()))
            times, ratios = [], []
            for n in lengths:
                row = by_length.get(n, {})
                times.append(f"{row['ms']:.3g} ({row['of_read']:.0%})" if row else "")
                best = row.get("vs_best_torch") or row.get("vs_torch_float32")
                default = row.get("vs_enable_gqa")
                ratios.append(_number(best, ".1f") + (f" ({default:.0f})" if default else ""))
            worst = max(row["error"] for row in by_length.values())
            slope = _grown(grown, decode.LINE, some)
            cells.append([some["heads"], str(some["head_dim"]), some["dtype"], *times, slope, *ratios, f"{worst:.0e}"])
        lines += _titled(threads, grid(heads, cells))
    return lines


def _prefill_tables(found: Sequence[Result]) -> list[str]:
    rows = [row for row in _rows(found, "prefill") if row["ours"]]
    grown = _rows(found, "prefill", "slopes")
    memory = _rows(found, "prefill", "memory_slopes")
    lengths = _values(rows, "keys")
    heads = ["D", "dtype", *(f"{_short(n)}: ms (of FMA)" for n in lengths), "slope"]
    heads += [*(f"{_short(n)}: × torch" for n in lengths), *(f"{_short(n)}: extra MB" for n in lengths), "its slope"]
    lines: list[str] = []
    for threads in _values(rows, "threads"):
        cells = []
        mine = [row for row in rows if row["threads"] == threads]
        for by_length in _lengths(mine, ("method", "head_dim", "dtype")).values():
            some = next(iter(by_length.values()))
            kind = some["dtype"] + (", int8 scores" if some["method"] == prefill.INT8_SCORES else "")
            measured = [by_length.get(n, {}) for n in lengths]
            cells.append(
                [str(some["head_dim"]), kind]
                + [f"{row['ms']:.4g} ({row['of_fma']:.0%})" if row else "" for row in measured]
                + [_grown(grown, prefill.LINE, some)]
                + [_number(row.get("vs_torch"), ".2f") for row in measured]
                + [_number(row.get("extra_mb"), ".2f") for row in measured]
                + [_grown(memory, prefill.LINE, some)]
            )
        lines += _titled(threads, grid(heads, cells))
    return lines


def _peer_tables(found: Sequence[Result]) -> list[str]:
    rows = _rows(found, external.ROUTINE)
    lines: list[str] = []
    for threads in _values(rows, "threads"):
        lines += _titled(threads, table([row for row in rows if row["threads"] == threads], decode.COLUMNS[1:]))
    return lines


def _error_tables(found: Sequence[Result]) -> list[str]:
    rows = _rows(found, "error")
    return ["", *table(rows, error.COLUMNS)] if rows else []


def _compare_tables(found: Sequence[Result]) -> list[str]:
    lines: list[str] = []
    rows = _rows(found, "compare")
    for vectors, keys, threads in dict.fromkeys((row["vectors"], row["keys"], row["threads"]) for row in rows):
        mine = [row for row in rows if (row["vectors"], row["keys"], row["threads"]) == (vectors, keys, threads)]
        mine.sort(key=lambda row: row.get("error_v") or 0)
        lines += ["", f"{vectors}, {keys} keys, {count(threads)}:", "", *table(mine, compare.COLUMNS[2:])]
    return lines


def _neighbourhood_tables(found: Sequence[Result]) -> list[str]:
    rows, grown = _rows(found, "neighbourhood"), _rows(found, "neighbourhood", "slopes")
    lines = [row for row in rows if row["ours"]]
    if not lines:
        return []
    cells = []
    for row in lines:
        case = ("threads", "grid", "window", "dtype")
        times = {other["method"]: other["times_ours"] for other in rows if all(other[key] == row[key] for key in case)}
        cells.append(
            [row["grid"], row["window"], row["dtype"], str(row["threads"]), f"{row['ms']:.3g}", f"{row['of_fma']:.0%}"]
            + [_number(times.get(peer), ".1f") for peer in neighbourhood.PEERS]
            + [_grown(grown, ("method", "window", "dtype", "threads"), row)]
        )
    heads = [
        "grid",
        "window",
        "dtype",
        "threads",
        "ms",
        "of FMA",
        *(f"× {peer}" for peer in neighbourhood.PEERS),
        "slope",
    ]
    return ["", *grid(heads, cells)]


def _retrieval_tables(found: Sequence[Result]) -> list[str]:
    rows = _rows(found, "retrieval")
    if not rows:
        return []
    scans = [row for row in rows if row.get("scan_gb_s")]
    return ["", *table(rows, retrieval.COLUMNS), "", *table(scans, retrieval.SCAN_COLUMNS)]


def _verified_tables(found: Sequence[Result]) -> list[str]:
    rows = _rows(found, "verified")
    return ["", *table(rows, verified.COLUMNS)] if rows else []


def _drift_tables(found: Sequence[Result]) -> list[str]:
    lines: list[str] = []
    rows = _rows(found, "drift")
    for vectors, first, keys in dict.fromkeys((row["vectors"], row["prefill"], row["keys"]) for row in rows):
        mine = [row for row in rows if (row["vectors"], row["prefill"], row["keys"]) == (vectors, first, keys)]
        mine.sort(key=lambda row: -row["recall_end"])
        lines += ["", f"{vectors}, a prefill of {first} keys and {keys - first} behind it:", ""]
        lines += table(mine, drift.COLUMNS[3:])
    return lines


def _growth_tables(found: Sequence[Result]) -> list[str]:
    rows = _rows(found, "growth")
    grown = _rows(found, "growth", "slopes")
    lines: list[str] = []
    for vectors, threads in dict.fromkeys((row["vectors"], row["threads"]) for row in rows):
        mine = [row for row in rows if (row["vectors"], row["threads"]) == (vectors, threads)]
        lengths = _values(mine, "keys")
        heads = ["way", *(f"{_short(n)}: ms (rows)" for n in lengths), "slope"]
        heads += [f"× la.attention at {_short(lengths[-1])}", "build s", "not run"]
        cells = []
        for by_length in _lengths(mine, growth.LINE).values():
            some, last = next(iter(by_length.values())), by_length.get(lengths[-1], {})
            times = [_way_at(by_length.get(n, {})) for n in lengths]
            why = "; ".join(f"{_short(n)}: {row['reason']}" for n, row in by_length.items() if row.get("reason"))
            faster, seconds = _number(last.get("faster_than_exact"), ".1f"), _number(last.get("build_s"), ".1f")
            cells.append([some["method"], *times, _grown(grown, growth.LINE, some), faster, seconds, why])
        lines += ["", f"{vectors}, {count(threads)}:", "", *grid(heads, cells)]
    return lines


def _way_at(row: Row) -> str:
    return f"{row['ms']:.3g} ({row['rows_read']:.2%})" if row.get("ms") is not None else ""


def _nearest_tables(found: Sequence[Result]) -> list[str]:
    rows = _rows(found, nearest.ROUTINE, "levels")
    return ["", *table(rows, nearest.LEVEL_COLUMNS)] if rows else []


DEMO_COLUMNS: tuple[Column, ...] = (
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


def _demo_tables(found: Sequence[Result]) -> list[str]:
    rows = _rows(found, "demo")
    return ["", *table(rows, DEMO_COLUMNS)] if rows else []


def _scan_tables(found: Sequence[Result]) -> list[str]:
    rows = _rows(found, "scan")
    lines: list[str] = []
    for threads in _values(rows, "threads"):
        lines += _titled(threads, table([row for row in rows if row["threads"] == threads], scan.COLUMNS[1:]))
    return lines


def _linear_tables(found: Sequence[Result]) -> list[str]:
    rows = _rows(found, "linear")
    grown = _rows(found, "linear", "slopes")
    lines: list[str] = []
    for threads in _values(rows, "threads"):
        mine = [row for row in rows if row["threads"] == threads]
        for part in (
            [row for row in mine if row.get("gflop_s")],
            [row for row in mine if row.get("gb_s")],
            [row for row in mine if row.get("vs_attention")],
        ):
            if part:
                lines += _titled(threads, table(part, linear.COLUMNS[1:]))
    slopes = [f"{row['of']}: {row['slope']:.2f}" for row in grown if row["method"].startswith("longattn")]
    return (
        [*lines, "", "Slopes of log time over log length:", "", *(f"- {line}" for line in slopes)] if slopes else lines
    )


def _global_linear_tables(found: Sequence[Result]) -> list[str]:
    rows = _rows(found, "global-linear")
    lines: list[str] = []
    for threads in _values(rows, "threads"):
        mine = [row for row in rows if row["threads"] == threads and row["ours"]]
        lines += _titled(threads, table(mine, global_linear.COLUMNS[1:]))
    return lines


def _sparse_tables(found: Sequence[Result]) -> list[str]:
    rows = [row for row in _rows(found, "sparse") if row["method"] != sparse.DENSE]
    lines: list[str] = []
    for threads in _values(rows, "threads"):
        lines += _titled(threads, table([row for row in rows if row["threads"] == threads], sparse.COLUMNS[2:]))
    return lines


def _capture_tables(found: Sequence[Result]) -> list[str]:
    rows = _rows(found, "capture")
    return ["", *table(rows, capture.COLUMNS)] if rows else []


def _titled(threads: int, lines: list[str]) -> list[str]:
    return ["", f"{count(threads)}:", "", *lines]


def _decode_ratios(rows: Sequence[Row]) -> list[Panel | Bars | Scatter]:
    """Speed against torch's best form at the greatest length, a panel per width and thread count."""
    ours = [row for row in rows if row["ours"] and row["keys"] == max(_values(rows, "keys"))]
    dtypes = tuple(dict.fromkeys(row["dtype"] for row in ours))
    panels: list[Panel | Bars | Scatter] = []
    for threads in _values(ours, "threads"):
        for dim in _values(ours, "head_dim"):
            mine = [row for row in ours if (row["threads"], row["head_dim"]) == (threads, dim)]
            bars = {
                heads: tuple(_first(mine, heads, dtype) for dtype in dtypes)
                for heads in dict.fromkeys(row["heads"] for row in mine)
            }
            title = f"D {dim}, {_short(mine[0]['keys'])} keys, {count(threads)}: times as fast as torch's best"
            panels.append(Bars(title, "ratio (int8, int4: to float32)", dtypes, bars, limit=1))
    return panels


def _first(rows: Sequence[Row], heads: str, dtype: str) -> float | None:
    for row in rows:
        if (row["heads"], row["dtype"]) == (heads, dtype):
            ratio: float | None = row.get("vs_best_torch") or row.get("vs_torch_float32")
            return ratio
    return None


def _prefill_lines(rows: Sequence[Row]) -> list[Panel | Bars | Scatter]:
    """Share of the multiply-add peak over length per dtype; then memory over length."""
    ours = [
        {**row, "percent": 100 * row["of_fma"], "line": row["dtype"] + row["method"].removeprefix(prefill.OURS)}
        for row in rows
        if row["ours"]
    ]
    panels: list[Panel | Bars | Scatter] = []
    for threads in _values(ours, "threads"):
        for dim in _values(ours, "head_dim"):
            mine = [row for row in ours if (row["threads"], row["head_dim"]) == (threads, dim)]
            title = f"causal prefill, D {dim}, {count(threads)}"
            lines = series(mine, "keys", "percent", by="line")
            panels.append(Panel(title, "length", "% of multiply-add peak", lines, log_y=False, limit=100))
    most = max(_values(ours, "threads"))
    extra = [{**row, "line": f"D {row['head_dim']}, {row['dtype']}"} for row in ours if row["threads"] == most]
    lines = series(extra, "keys", "extra_mb", by="line")
    if lines:
        panels.append(Panel(f"memory beyond inputs and outputs, {count(most)}", "length", "MB", lines))
    return panels


def _prefill_ratios(rows: Sequence[Row]) -> list[Panel | Bars | Scatter]:
    """Speed against torch, a group of bars per length, a panel per width and thread count."""
    ours = [row for row in rows if row["method"] == prefill.OURS]
    panels: list[Panel | Bars | Scatter] = []
    for threads in _values(ours, "threads"):
        for dim in _values(ours, "head_dim"):
            mine = [row for row in ours if (row["threads"], row["head_dim"]) == (threads, dim)]
            found = {(row["dtype"], row["keys"]): row.get("vs_torch") for row in mine}
            lengths = _values(mine, "keys")
            bars = {
                dtype: tuple(found.get((dtype, n)) for n in lengths)
                for dtype in dict.fromkeys(row["dtype"] for row in mine)
            }
            title = f"D {dim}, {count(threads)}: times as fast as {prefill.TORCH}"
            panels.append(Bars(title, "ratio", tuple(map(_short, lengths)), bars, limit=1))
    return panels


def _peer_ratios(rows: Sequence[Row]) -> list[Panel | Bars | Scatter]:
    """How many times as long the peers take, a panel per shape and thread count."""
    theirs = [row for row in rows if row.get("peer") and row["times_ours"] is not None]
    kinds = dict.fromkeys((row["heads"], row["head_dim"], row["threads"]) for row in theirs)
    panels: list[Panel | Bars | Scatter] = []
    for heads, dim, threads in kinds:
        mine = [row for row in theirs if (row["heads"], row["head_dim"], row["threads"]) == (heads, dim, threads)]
        lengths = _values(mine, "keys")
        found = {(row["method"], row["keys"]): row["times_ours"] for row in mine}
        bars = {
            method: tuple(found.get((method, n)) for n in lengths)
            for method in dict.fromkeys(row["method"] for row in mine)
        }
        title = f"decode {heads} x {dim}, {count(threads)}: time as a multiple of ours"
        panels.append(Bars(title, "ratio", tuple(map(_short, lengths)), bars, limit=1))
    return panels


SECTIONS: tuple[Section, ...] = (
    Section(
        "decode",
        "Decode: one query row over a long cache",
        "`of read`: own bytes of K and V per second over the read bandwidth. `× torch`: speed against the best "
        "of torch's forms in the same dtype, for int8 and int4 against the best in float32; in brackets against the "
        "default `enable_gqa` call. `slope`: of log time over log length.",
        _decode_tables,
    ),
    Section(
        "prefill",
        "Prefill: causal attention of a whole sequence",
        "8 heads. `of FMA`: causal half of the arithmetic as a share of the multiply-add peak. `× torch`: speed "
        "against torch's fused kernel. `extra MB`: peak memory beyond inputs and outputs, and the slope of its growth.",
        _prefill_tables,
    ),
    Section(
        "neighbourhood",
        "Neighbourhoods: windows of images and videos",
        f"{neighbourhood.HEADS} heads, D {neighbourhood.DIM}. `of FMA`: arithmetic inside the windows as a share of "
        "the multiply-add peak. `×`: the peer's time over ours; its block mask and compilation are not in it. `slope`: "
        "of log time over log tokens, at one window.",
        _neighbourhood_tables,
    ),
    Section(
        "sparse",
        "Attention over blocks of keys and windows",
        "8 heads, not causal, random blocks. `of dense`: time over that of dense attention; `time / density`: this "
        "over the share of the pairs that is computed. `× ours`: time over ours with the same mask. Masks are given.",
        _sparse_tables,
    ),
    Section(
        "capture",
        "What selectors for prompts keep",
        "Queries and keys of the demo's model over a text. `mass`: mean share of the softmax inside the mask; "
        "selection and dense attention of all full layers in ms.",
        _capture_tables,
    ),
    Section(
        "peers",
        "Decode beside other runtimes",
        "Made by the scripts in `benches/peers`; `× ours` is the peer's time over ours in the same bits per element.",
        _peer_tables,
    ),
    Section(
        "compare",
        "Ways to read a part of the store",
        "Every way of `longattn compare` at the same budget of rows, sinks and window among them (LSH tables read what "
        "they draw), on one set of queries, by their error. `recall`: share of the query group's best rows among those "
        "selected; `mass`: share of the softmax mass in the rows read; `bytes read`: rows and index, of all keys and "
        "values.",
        _compare_tables,
    ),
    Section(
        "nearest",
        "Beside nearest-neighbour libraries",
        "Made by `benches/peers/ann.py`: one KV head, searches of one thread, a query a call. A peer is asked by each "
        "query head for its 100 or 400 nearest keys; ours are asked once for the query group, and their time, divided "
        "by the heads of the group, holds the attention over the rows found, the peers' does not. `of own best 100`: "
        "mass found over that of each query head's own 100 best keys; of each index the fastest setting that reaches "
        "it in the mean.",
        _nearest_tables,
    ),
    Section(
        "growth",
        "Growth with the length",
        "A decode step of one KV head, each way with the smallest number of rows that keeps the mean error below the "
        "same share of the values' rms norm. `slope`: of log time over log length. Empty cells were not run, for the "
        "reason in the last column.",
        _growth_tables,
    ),
    Section(
        "retrieval",
        "Retrieval attention: a decode step over codes of all keys",
        "`retrieval_attention` over 4-bit signatures beside exact attention and torch, by data set: time, and error "
        "relative to the norm of the output and to the rms row norm of V. `rows only`: without the estimate of the "
        "rest. Second table: `scan` reads the codes of every key, scores them and sums the scores; `of read`: bytes of "
        "codes a second over the read bandwidth measured just before; `weigh` turns scores into shares of the mass; "
        "`select` picks the rows. Times are of the threads' work, spread over the threads.",
        _retrieval_tables,
    ),
    Section(
        "verified",
        "Stated errors",
        "`retrieval_attention` with `epsilon` and `delta` over many queries: how often the error was larger than "
        "stated, what was read for it, and how often everything was.",
        _verified_tables,
    ),
    Section(
        "drift",
        "Drift: an index that grows",
        "An index over a prefill, and what it finds when as many rows came behind it as stated, a few at a time; "
        "beside it one that was built anew over all rows. Synthetic text changes its subject where the prefill ends, "
        "and the last queries ask about the new one; recorded text goes on as it is. `recall`: share of the query "
        "group's best rows among those selected; `kept`: their mass over that of the best set of as many; `growing`: "
        "time to follow the store, per row, all heads together.",
        _drift_tables,
    ),
    Section(
        "demo",
        "Demo: a model answers questions about a long text",
        "The byte-level model of `tools/needle_lm` over text that it was not trained on, asked for hidden facts. Ways "
        "read sinks, window and `--top-k` rows per KV head; policies keep as many rows of the text, judged by a sample "
        "of its queries before any question is known. Attention times are those of the full layers, cache update "
        "included; SDPA is transformers with its own cache on the same prompt.",
        _demo_tables,
    ),
    Section(
        "scan",
        "Scans and convolutions",
        "From arrays; torch has its tensors in the layout it likes best. `torch loop, decays at once` is the way of "
        "transformers' fallback. `ns per state`: time over tokens, channels and states; `GB/s of state`: rates read, "
        "states read and written; `difference`: largest of the peer's output from ours.",
        _scan_tables,
    ),
    Section(
        "linear",
        "Linear attention and recurrences",
        "States `[D, D]` of 8 heads. `of FMA`: arithmetic as a share of the multiply-add peak, rows of a chunk of 64 "
        "with each other counted whatever the chunk. Decode steps: bytes of the state read and written per second, as "
        "a share of the read bandwidth. `vs attention`: speed against causal `longattn.attention` of the same shape.",
        _linear_tables,
    ),
    Section(
        "global-linear",
        "Linear attention over all keys at once",
        "`of FMA`: two products per feature and value channel as a share of the multiply-add peak; making features is "
        "on top. `× torch`: speed against the same formula as torch's matrix products and elementwise functions; "
        "`difference`: the largest difference of the two results, of the largest number.",
        _global_linear_tables,
    ),
    Section(
        "error",
        "Error of storage",
        "Attention over stored keys and values against float64 attention over the float32 originals; relative to the "
        "norm of the output (mean and 95th percentile over queries and heads) and to the rms row norm of V. `append`: "
        "float32 bytes converted and stored per second, fresh memory included. `minilm` and `lm` are recordings in "
        "float16, which stores them without an error.",
        _error_tables,
    ),
)
