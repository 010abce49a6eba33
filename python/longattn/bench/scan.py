"""Scans and convolutions beside what torch users write: a loop over tokens, transformers' own fallback, torch.fft.

Ours run from numpy arrays, peers from tensors of the same numbers in the layout they like best.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from longattn.bench.harness import Bench, Candidate, rows_of, slopes
from longattn.bench.options import integers
from longattn.bench.plots import Bars, Panel, series
from longattn.bench.results import Result, Row
from longattn.bench.sections import Section, all_rows, by_threads, grouped, whole
from longattn.bench.tables import Column, count
from longattn.linear import causal_conv1d, diagonal_scan, selective_scan, toeplitz

SUMMARY = (
    "selective scan, its step, averages, short and long convolutions, against torch loops, transformers, torch.fft"
)
LENGTHS, QUICK_LENGTHS = (1024, 4096), (32, 64)
CHANNELS, QUICK_CHANNELS = 1536, 64
STATES, TAPS = 16, 4
COLUMNS: tuple[Column, ...] = (
    Column("threads", "threads"),
    Column("operation", "operation"),
    Column("channels", "channels"),
    Column("length", "keys"),
    Column("method", "method"),
    Column("ms", "ms", ".4g"),
    Column("min", "ms_min", ".4g"),
    Column("max", "ms_max", ".4g"),
    Column("calls", "calls"),
    Column("× ours", "times_ours", ".2f"),
    Column("ns per state", "ns_per_state", ".3f"),
    Column("GB/s of state", "state_gb_s", ".3g"),
    Column("of read", "of_read", ".0%"),
    Column("difference", "difference", ".1e"),
)
OURS = "longattn"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the routine's options to `parser`."""
    parser.add_argument("--lengths", type=integers, metavar="N,N", help="tokens (default 1024,4096)")
    parser.add_argument("--channels", type=int, metavar="N", help="channels of scans and of the short convolution")


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Every operation at every length; rows, and growth exponents of the time."""
    lengths = args.lengths or list(QUICK_LENGTHS if bench.quick else LENGTHS)
    channels = args.channels or (QUICK_CHANNELS if bench.quick else CHANNELS)
    rows: list[Row] = []
    for length in lengths:
        for case in (_selective, _diagonal, _short, _long):
            rows += case(bench, length, channels)
    rows += _step(bench, channels)
    return {"rows": rows, "slopes": slopes(rows, ("operation", "method", "threads"))}


def _measured(
    bench: Bench, operation: str, channels: int, length: int, candidates: list[Candidate]
) -> list[tuple[Row, Any]]:
    """Rows of all candidates, with the largest difference of a peer's output from ours, and what each returned."""
    bench.say(f"{operation}, {channels} channels, length {length}")
    found: list[tuple[Row, Any]] = []
    for threads in bench.each_threads():
        outcomes = bench.interleave(candidates)
        ours = candidates[0].name
        mine = np.asarray(outcomes[ours].result, np.float64)
        case = {"threads": threads, "operation": operation, "channels": channels, "keys": length}
        for row in rows_of(outcomes, ours, case):
            result = outcomes[row["method"]].result
            if not row["ours"] and result is not None:
                row["difference"] = float(np.abs(np.asarray(result, np.float64) - mine).max(initial=0.0))
            found.append((row, result))
    return found


def _arrays(length: int, channels: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32)

    return {
        "x": normal(1, length, channels),
        "dt": normal(1, length, channels),
        "a": -np.exp(normal(channels, STATES)),
        "b": normal(1, length, STATES),
        "c": normal(1, length, STATES),
        "z": normal(1, length, channels),
    }


def _selective(bench: Bench, length: int, channels: int) -> list[Row]:
    given = _arrays(length, channels)
    candidates = [Candidate(OURS, lambda: selective_scan(**given, softplus=True)[0], peer=False)]
    if bench.peers:
        candidates += _torch_scans(given)
    rows = [row for row, _ in _measured(bench, "selective scan", channels, length, candidates)]
    for row in rows:
        if row["ms"] is not None:
            row["ns_per_state"] = 1e6 * row["ms"] / (length * channels * STATES)
    return rows


def _torch_scans(given: dict[str, Any]) -> list[Candidate]:
    """A loop over tokens, and the formulation of transformers' slow path, which holds all decays and inputs at once."""
    import torch

    x, dt, a, b, c, z = (torch.from_numpy(given[name]) for name in ("x", "dt", "a", "b", "c", "z"))

    def loop() -> Any:
        steps, state, rows = torch.nn.functional.softplus(dt), torch.zeros(1, *a.shape), []
        for t in range(x.shape[1]):
            decay = torch.exp(steps[:, t, :, None] * a)
            state = decay * state + (steps[:, t] * x[:, t])[..., None] * b[:, t, None]
            rows.append((state * c[:, t, None]).sum(-1))
        return (torch.stack(rows, 1) * torch.nn.functional.silu(z)).numpy()

    def materialised() -> Any:
        steps = torch.nn.functional.softplus(dt)
        decays = torch.exp(steps[..., None] * a)
        inputs = (steps * x)[..., None] * b[:, :, None]
        state, rows = torch.zeros(1, *a.shape), []
        for t in range(x.shape[1]):
            state = decays[:, t] * state + inputs[:, t]
            rows.append(torch.matmul(state, c[:, t, :, None])[..., 0])
        return (torch.stack(rows, 1) * torch.nn.functional.silu(z)).numpy()

    found = [("torch loop", loop), ("torch loop, decays at once", materialised)]
    return [Candidate(name, _without_gradients(call)) for name, call in found]


def _without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
    import torch

    def quiet() -> Any:
        with torch.no_grad():
            return call()

    return quiet


def _step(bench: Bench, channels: int) -> list[Row]:
    """The decode step: reads rates, reads and writes states."""
    given = _arrays(1, channels)
    state = np.zeros((1, channels, STATES), np.float32)

    def call() -> Any:
        return selective_scan(**given, softplus=True, initial_state=state, out_state=state)[0]

    rows = []
    for row, _ in _measured(bench, "selective scan, one token", channels, 1, [Candidate(OURS, call, peer=False)]):
        row["state_gb_s"] = 3 * state.nbytes / row["ms"] / 1e6
        row["of_read"] = row["state_gb_s"] / bench.recent_read_gb_s()
        rows.append(row)
    return rows


def _diagonal(bench: Bench, length: int, channels: int) -> list[Row]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, length, channels), dtype=np.float32)
    decay, inputs, outputs = rng.uniform(0.5, 1, (channels, STATES)), *rng.standard_normal((2, channels, STATES))
    kernel = (
        (inputs * outputs)[..., None] * decay[..., None] ** np.arange(length) if bench.peers else np.zeros((1, 1, 1))
    ).sum(axis=1)
    candidates = [Candidate(OURS, lambda: diagonal_scan(x, decay, inputs, outputs)[0], peer=False)]
    if bench.peers:
        candidates.append(Candidate("torch.fft", _torch_fft(x, kernel)))
    rows = [row for row, _ in _measured(bench, "damped averages", channels, length, candidates)]
    for row in rows:
        if row["ours"]:
            row["ns_per_state"] = 1e6 * row["ms"] / (length * channels * STATES)
    return rows


def _short(bench: Bench, length: int, channels: int) -> list[Row]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, length, channels), dtype=np.float32)
    weight = rng.standard_normal((channels, TAPS), dtype=np.float32)
    candidates = [Candidate(OURS, lambda: causal_conv1d(x, weight, silu=True)[0], peer=False)]
    if bench.peers:
        import torch

        tensor, taps = torch.from_numpy(x).swapaxes(1, 2).contiguous(), torch.from_numpy(weight)[:, None]

        def torch_conv() -> Any:
            y = torch.nn.functional.conv1d(tensor, taps, groups=channels, padding=TAPS - 1)[..., :length]
            return torch.nn.functional.silu(y).swapaxes(1, 2).numpy()

        candidates.append(Candidate("torch conv1d", torch_conv))
    return [row for row, _ in _measured(bench, f"convolution of {TAPS}", channels, length, candidates)]


def _long(bench: Bench, length: int, channels: int) -> list[Row]:
    rng = np.random.default_rng(0)
    few = min(channels, 128)
    x = rng.standard_normal((1, length, few), dtype=np.float32)
    kernel = rng.standard_normal((few, length)) / np.sqrt(length)
    candidates = [
        Candidate(OURS, lambda: toeplitz(x, kernel, method="fft"), peer=False),
        Candidate(f"{OURS}, float32", lambda: toeplitz(x, kernel, method="fft", precision="float32"), peer=False),
    ]
    if bench.peers:
        candidates += [
            Candidate("torch.fft", _torch_fft(x, kernel)),
            Candidate("torch.fft, float64", _torch_fft(x, kernel, double=True)),
        ]
    return [row for row, _ in _measured(bench, "convolution of all", few, length, candidates)]


def _torch_fft(x: Any, kernel: Any, double: bool = False) -> Callable[[], Any]:
    """The causal convolution by transforms of twice the length."""
    import torch

    kind = torch.float64 if double else torch.float32
    tensor, weights = torch.from_numpy(x).swapaxes(1, 2).contiguous(), torch.from_numpy(kernel).to(torch.float32)
    length = x.shape[1]

    def call() -> Any:
        spectrum = torch.fft.rfft(tensor.to(kind), 2 * length) * torch.fft.rfft(weights.to(kind), 2 * length)
        return torch.fft.irfft(spectrum, 2 * length)[..., :length].float().swapaxes(1, 2).numpy()

    return call


def panels(result: Result) -> list[Panel | Bars]:
    """Milliseconds over the length, a panel per operation and thread count."""
    rows = [row for row in result["rows"] if row["keys"] > 1 and row["ms"] is not None]
    return [
        Panel(f"{operation}, {count(threads)}", "length", "ms", series(mine, "keys", "ms"))
        for (operation, threads), mine in grouped(rows, "operation", "threads").items()
    ]


def _tables(found: Sequence[Result]) -> list[str]:
    return by_threads(all_rows(found, "scan"), COLUMNS[1:])


SECTIONS = (
    Section(
        "linear",
        "scan",
        "Scans and convolutions",
        "From arrays; torch has its tensors in the layout it likes best. `torch loop, decays at once` is the way of "
        "transformers' fallback. `ns per state`: time over tokens, channels and states; `GB/s of state`: rates read, "
        "states read and written; `difference`: largest of the peer's output from ours.",
        _tables,
        whole("scan", panels),
    ),
)
