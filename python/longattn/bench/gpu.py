"""Kernels of `longattn.gpu`: time on the device by events, beside the bandwidth of a copy and torch's own attention.

Times of kernels are the device's: all launches of a call wait behind a spinning one, so that how fast Python starts
them does not count. A hybrid step, which waits for the host, is timed by the clock.

Without a GPU the routine says what is missing; its cases run in the tests on the emulator, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

import longattn as la
from longattn import gpu
from longattn.bench.gpu_checks import Budget, run_sanitizers, run_tests
from longattn.bench.gpu_peers import fla_recurrence, has_fla, torch_attention, torch_has_gpu
from longattn.bench.harness import Bench
from longattn.bench.plots import Bars, Panel
from longattn.bench.results import Result, Row
from longattn.bench.tables import Column
from longattn.gpu import Device

SUMMARY = "kernels of longattn.gpu on a GPU: against copy bandwidth, torch, and density"
COLUMNS: tuple[Column, ...] = (
    Column("case", "case"),
    Column("Hq/Hkv", "heads"),
    Column("D", "head_dim"),
    Column("length", "keys"),
    Column("dtype", "dtype"),
    Column("ms", "ms", ".4g"),
    Column("min", "ms_min", ".4g"),
    Column("GB/s", "gb_s", ".4g"),
    Column("of copy", "of_copy", ".0%"),
    Column("TFLOP/s", "tflop_s", ".4g"),
    Column("over density", "over_density", ".2f"),
    Column("peer ms", "peer_ms", ".4g"),
    Column("vs torch", "vs_torch", ".2f"),
    Column("vs fla", "vs_fla", ".2f"),
    Column("rows' copy ms", "rows_copy_ms", ".4g"),
    Column("of rows' copy", "of_rows_copy", ".2f"),
    Column("bus ms", "bus_ms", ".4g"),
    Column("outcome", "outcome"),
)
_WARM_UP = 3
_COPY_BYTES = 1 << 30
_SECONDS = 480.0
_PARTS = ("times", "tests", "sanitizer")
_BITS = 128
_CHOSEN = 1024
_DENSITY = 0.1
_PIECE = 8192  # rows that enter a cache together
_AT_ONCE = 4  # steps over two memories
_SPIN_CYCLES = 5_000_000  # some 3 ms: longer than it takes to start a call's kernels
_SPIN = """extern "C" __global__ void spin(long long cycles) {
  long long start = clock64();
  while (clock64() - start < cycles) {}
}"""
#: What is asked of a causal prefill in bfloat16 at D 128: this share of the speed of torch's own attention, or without
#: torch this many TFLOP/s (0.9 of FlashAttention-2's published 335).
OF_TORCH, TFLOP_S = 0.55, 0.9 * 335


Call: TypeAlias = Callable[[], object]
Times: TypeAlias = tuple[float, float]
"""Median and least seconds."""


@dataclass(frozen=True)
class Runner:
    """Where cases run.

    Attributes:
        device: back end.
        put: a host array into its memory.
        seconds: how long a call keeps the device busy.
        wall: how long a call and what it starts take by the clock.
        fill: copies an array in page-locked memory into one of the device.
        torch: makes a call of torch's attention for queries, keys, values and causality; `None` without torch.
        fla: makes a call of fla's Kimi delta attention for queries, keys, values, gates and rates; `None` without it.
    """

    device: Device
    put: Callable[[np.ndarray[Any, Any]], Any]
    seconds: Callable[[Call], float]
    wall: Callable[[Call], float]
    fill: Callable[[Any, Any], object]
    torch: Callable[[Any, Any, Any, bool], Call] | None = None
    fla: Callable[[Any, Any, Any, Any, Any], Call] | None = None


@dataclass(frozen=True)
class Shapes:
    """What is measured."""

    heads: tuple[tuple[int, int], ...] = ((32, 8), (64, 8))
    head_dim: int = 128
    decode_keys: tuple[int, ...] = (32768, 131072)
    prefill_keys: tuple[int, ...] = (4096, 16384)
    copy_bytes: int = _COPY_BYTES
    bits: int = _BITS
    chosen: int = _CHOSEN
    grid: tuple[int, int] = (128, 15)  # side and window
    recurrence: tuple[tuple[int, int], ...] = ((96, 8192), (32, 16384))  # heads and length
    steps: tuple[tuple[int, int], ...] = ((1, 32), (64, 32))  # sequences and heads


QUICK = Shapes(
    heads=((4, 2),),
    head_dim=64,
    decode_keys=(300,),
    prefill_keys=(100,),
    copy_bytes=1 << 12,
    bits=32,
    chosen=16,
    grid=(10, 3),
    recurrence=((2, 40),),
    steps=((2, 2),),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the routine's options to `parser`."""
    parser.add_argument(
        "--parts",
        default=",".join(_PARTS),
        help="what to run, in order: times, tests (of the repository, on the device), sanitizer (compute-sanitizer)",
    )
    parser.add_argument(
        "--own-allocations",
        action="store_true",
        help="memory for each array instead of a pool's: compute-sanitizer then sees where an array ends",
    )
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="of all parts together (default: %(default)s)")


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """All cases on CuPy's current device, the tests there, and compute-sanitizer over small cases.

    Raises:
        ModuleNotFoundError: no CuPy, or no GPU; says what to do.
        ValueError: an unknown part.
    """
    parts = args.parts.split(",")
    unknown = sorted(set(parts) - set(_PARTS))
    if unknown:
        raise ValueError(f"--parts: got {', '.join(unknown)}, expected some of {', '.join(_PARTS)}")
    budget = Budget(args.seconds)
    rows: list[Row] = []
    runner = _on_gpu(bench)
    if args.own_allocations:
        _without_pool()
    for part in parts:
        if part == "times":
            rows += cases(bench, runner, QUICK if bench.quick else Shapes(), budget)
        elif part == "tests":
            bench.say("tests on the device")
            rows.append(run_tests(budget))
        else:
            bench.say("compute-sanitizer")
            again = [sys.executable, "-m", "longattn.cli", "bench", "gpu", "--quick", "--no-peers", "--own-allocations"]
            rows += run_sanitizers(budget, [*again, "--parts", "times"])
    return {"rows": rows, "slopes": [], "device": _name()}


def _name() -> str:
    import cupy

    return str(cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode())


def _without_pool() -> None:
    import cupy

    cupy.cuda.set_allocator(None)


def _on_gpu(bench: Bench) -> Runner:
    try:
        import cupy
    except ImportError:
        raise ModuleNotFoundError("CuPy is not installed: pip install 'longattn[gpu]'") from None
    if not cupy.is_available():
        raise ModuleNotFoundError("no GPU: CuPy finds no device; `nvidia-smi` shows what the driver sees")
    from longattn.gpu._cupy import current

    spin = cupy.RawKernel(_SPIN, "spin")

    def seconds(call: Call) -> float:
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        spin((1,), (1,), (np.int64(_SPIN_CYCLES),))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3

    def wall(call: Call) -> float:
        cupy.cuda.Device().synchronize()

        def finished() -> None:
            call()
            cupy.cuda.Device().synchronize()

        return wall_seconds(finished)

    with_torch = torch_has_gpu(bench)
    with_fla = with_torch and has_fla(bench)
    return Runner(
        current(),
        cupy.asarray,
        seconds,
        wall,
        lambda there, locked: there.set(locked, stream=cupy.cuda.get_current_stream()),
        torch_attention if with_torch else None,
        fla_recurrence if with_fla else None,
    )


def wall_seconds(call: Call) -> float:
    """Seconds of a call that is done when it returns."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cases(bench: Bench, runner: Runner, shapes: Shapes, budget: Budget | None = None) -> list[Row]:
    """Every case's row, as long as half the budget is left."""
    start = 0.0 if budget is None else budget.left

    def out_of_time() -> bool:
        return budget is not None and budget.left < start / 2

    rng = np.random.default_rng(0)
    copied, bandwidth = _copy(bench, runner, shapes.copy_bytes)
    rows = [{"case": "device copy", **_columns(copied), "gb_s": bandwidth, "of_copy": 1.0}]
    for (heads, kv_heads), keys in itertools.product(shapes.heads, shapes.decode_keys):
        if out_of_time():
            return [*rows, {"case": "others", "outcome": "not measured: no time left"}]
        bench.say(f"decode {heads}/{kv_heads}, {keys} keys")
        rows += _decode(bench, runner, rng, shapes, (heads, kv_heads, keys), bandwidth)
    later: list[tuple[str, Callable[[], list[Row]]]] = []
    heads, kv_heads = shapes.heads[0]
    for keys in shapes.prefill_keys:
        shape = heads, kv_heads, keys
        later.append((f"prefill, {keys} keys", partial(_prefill, bench, runner, rng, shape, shapes.head_dim)))
    later += [
        (f"KDA, {case[1]} rows", partial(_recurrence, bench, runner, rng, case, shapes.head_dim))
        for case in shapes.recurrence
    ]
    later += [
        (f"KDA step, {case[0]} sequences", partial(_step, bench, runner, rng, case, shapes.head_dim, bandwidth))
        for case in shapes.steps
    ]
    later.append(("hybrid", partial(_hybrid, bench, runner, rng, shapes)))
    later.append(("neighbourhood", partial(_neighbourhood, bench, runner, rng, shapes)))
    for name, measured in later:
        if out_of_time():
            return [*rows, {"case": "others", "outcome": "not measured: no time left"}]
        bench.say(name)
        rows += measured()
    return rows


def _copy(bench: Bench, runner: Runner, size: int) -> tuple[Times, float]:
    """A copy within the device: its times, and GB/s read and written together."""
    source = runner.put(np.zeros(size // 2, np.uint8))
    target = runner.device.empty(source.shape, "uint8", source)

    def copy() -> None:
        target[...] = source

    times = _times(bench, runner, {"copy": copy})["copy"]
    return times, size / times[0] / 1e9


def _random(runner: Runner, rng: np.random.Generator, *shape: int) -> Any:
    made = np.empty(shape, ml_dtypes.bfloat16)
    for head in made.reshape(-1, *shape[-2:]):  # one at a time: float32 of all of them would not fit small hosts
        head[...] = rng.standard_normal(head.shape, np.float32)
    return runner.put(made)


def _decode(
    bench: Bench,
    runner: Runner,
    rng: np.random.Generator,
    shapes: Shapes,
    case: tuple[int, int, int],
    bandwidth: float,
) -> list[Row]:
    """A decode step over all keys; codes, choice and attention to the chosen."""
    heads, kv_heads, keys = case
    dim, device = shapes.head_dim, runner.device
    q = _random(runner, rng, 1, heads, 1, dim)
    k, v = (_random(runner, rng, 1, kv_heads, keys, dim) for _ in "kv")
    row = {"heads": f"{heads}/{kv_heads}", "head_dim": dim, "keys": keys, "dtype": "bfloat16"}
    found = _times(bench, runner, _with_torch(runner, q, k, v, causal=False))
    speed = 4 * kv_heads * keys * dim / found["ours"][0] / 1e9
    rows = [{"case": "decode", **row, **_against(found), "gb_s": speed, "of_copy": speed / bandwidth}]
    coded = [gpu.encode_rows(x, device=device) for x in (k, v)]
    of_codes = _times(bench, runner, {"int8": lambda: gpu.attention(q, *coded, device=device)})["int8"]
    speed = 2 * kv_heads * keys * (dim + 8) / of_codes[0] / 1e9
    rows.append({"case": "decode of int8", **row, **_columns(of_codes), "gb_s": speed, "of_copy": speed / bandwidth})
    signatures = gpu.signatures_encode(k, device=device)
    of_group = q.reshape(1, kv_heads, heads // kv_heads, dim)
    matrix = runner.put(rng.standard_normal((kv_heads, dim, shapes.bits)).astype(np.float32))
    codes = gpu.hash_encode(k, matrix, device=device)
    asked = gpu.hash_encode(of_group, matrix, device=device)
    chosen = gpu.hash_topk(asked, codes, shapes.chosen, device=device)
    steps: dict[str, Call] = {
        "scan and top-k": lambda: gpu.hash_topk(asked, codes, shapes.chosen, device=device),
        "scan of 4-bit codes and top-k": lambda: gpu.signatures_topk(
            of_group, signatures, shapes.chosen, device=device
        ),
        "attention to listed rows": lambda: gpu.index_sparse_attention(q, k, v, chosen, device=device),
    }
    return rows + [{"case": name, **row, **_columns(times)} for name, times in _times(bench, runner, steps).items()]


def _prefill(bench: Bench, runner: Runner, rng: np.random.Generator, case: tuple[int, int, int], dim: int) -> list[Row]:
    """Causal attention of a whole sequence, and attention to a tenth of the blocks of keys against that to all."""
    heads, kv_heads, keys = case
    device = runner.device
    q = _random(runner, rng, 1, heads, keys, dim)
    k, v = (_random(runner, rng, 1, kv_heads, keys, dim) for _ in "kv")
    row = {"heads": f"{heads}/{kv_heads}", "head_dim": dim, "keys": keys, "dtype": "bfloat16"}
    found = _times(bench, runner, _with_torch(runner, q, k, v, causal=True))
    flops = 2 * heads * dim * keys * (keys + 1)
    against, speed = _against(found), flops / found["ours"][0] / 1e12
    asked = against["vs_torch"] / OF_TORCH if "vs_torch" in against else speed / TFLOP_S
    rows = [{"case": "prefill", **row, **against, "tflop_s": speed, "of_asked": asked}]
    starts, blocks, density = random_blocks(rng, heads, keys, 128)
    lists = runner.put(starts), runner.put(blocks)
    both: dict[str, Call] = {
        "dense": lambda: gpu.attention(q, k, v, device=device),
        "sparse": lambda: gpu.block_sparse_attention(q, k, v, *lists, query_block=128, device=device),
    }
    times = _times(bench, runner, both)
    name, ratio = f"block-sparse, density {density:.3f}", times["sparse"][0] / times["dense"][0] / density
    return [*rows, {"case": name, **row, **_columns(times["sparse"]), "over_density": ratio}]


def _recurrence(bench: Bench, runner: Runner, rng: np.random.Generator, case: tuple[int, int], dim: int) -> list[Row]:
    """Kimi delta attention forward: a gate per channel, and the delta rule."""
    heads, length = case
    q, k, v = (_random(runner, rng, 1, heads, length, dim) for _ in "qkv")
    gates = runner.put(np.float32(-0.05) * rng.standard_exponential((1, heads, length, dim), np.float32))
    rates = runner.put(rng.uniform(0, 1, (1, heads, length)).astype(np.float32))
    calls: dict[str, Call] = {
        "kda": lambda: gpu.chunked_recurrence(q, k, v, gates, rates, scale=1 / dim, device=runner.device)
    }
    if runner.fla is not None:
        calls["fla"] = runner.fla(q, k, v, gates, rates)
    found = _times(bench, runner, calls)
    times = found["kda"]
    flops = 2 * heads * length * dim * (3 * dim + 32)
    row = {"case": "KDA forward", "heads": f"{heads}/{heads}", "head_dim": dim, "keys": length, "dtype": "bfloat16"}
    row = {**row, **_columns(times), "tflop_s": flops / times[0] / 1e12}
    if "fla" in found:
        row |= {"peer_ms": 1e3 * found["fla"][0], "vs_fla": found["fla"][0] / times[0]}
    return [row]


def _step(
    bench: Bench, runner: Runner, rng: np.random.Generator, case: tuple[int, int], dim: int, bandwidth: float
) -> list[Row]:
    """One token of Kimi delta attention from a state: that is read once and written once."""
    batch, heads = case
    q, k, v = (_random(runner, rng, batch, heads, 1, dim) for _ in "qkv")
    gates = runner.put(np.float32(-0.05) * rng.standard_exponential((batch, heads, 1, dim), np.float32))
    rates = runner.put(rng.uniform(0, 1, (batch, heads, 1)).astype(np.float32))
    state = runner.put(rng.standard_normal((batch, heads, dim, dim), np.float32))
    call = {
        "step": lambda: gpu.chunked_recurrence(q, k, v, gates, rates, initial_state=state, device=runner.device),
    }
    times = _times(bench, runner, call)["step"]
    speed = 8 * batch * heads * dim * dim / times[0] / 1e9
    row = {"case": f"KDA step of {batch} sequences", "heads": f"{heads}/{heads}", "head_dim": dim, "dtype": "bfloat16"}
    return [{**row, **_columns(times), "gb_s": speed, "of_copy": speed / bandwidth}]


def _hybrid(bench: Bench, runner: Runner, rng: np.random.Generator, shapes: Shapes) -> list[Row]:
    """A step over a cache whose rows lie in host memory, beside the copy of the rows that it selects.

    That is once the way of the rows to the device as they lie, collected first, and once the bus alone: as many bytes
    that lie together in page-locked memory. Of steps at once, as a batch takes them, the time of each.
    """
    (heads, kv_heads), keys, dim = shapes.heads[0], max(shapes.decode_keys), shapes.head_dim
    device, chosen = runner.device, shapes.chosen
    store = la.KVStore(kv_heads=kv_heads, head_dim=dim, dtype="bfloat16", capacity=keys)
    cache = gpu.HostKVCache(store, la.index.Signatures(store), window=min(512, keys // 4), device=device)
    q = _random(runner, rng, 1, heads, 1, dim)
    for first in range(0, keys, _PIECE):
        cache.append(*(_random(runner, rng, 1, kv_heads, min(_PIECE, keys - first), dim) for _ in "kv"))
    rows = np.sort(rng.permuted(np.tile(np.arange(len(store)), (kv_heads, 1)), axis=1)[:, :chosen])

    def copy_rows() -> None:
        for x in (store.keys, store.values):
            device.upload(np.take_along_axis(x, rows[..., None], axis=1), q)

    together = np.take_along_axis(store.keys, rows[..., None], axis=1)
    locked = device.download(runner.put(together))()  # into page-locked memory
    there = device.empty(locked.shape, "bfloat16", q)
    calls: dict[str, Call] = {
        "step": lambda: cache.attend(q, top_k=chosen),
        "at once": lambda: [finish() for finish in [cache.start(q, top_k=chosen) for _ in range(_AT_ONCE)]],
        "rows": copy_rows,
        "bus": lambda: [runner.fill(there, locked) for _ in "kv"],
    }
    found = _times(bench, runner, calls, runner.wall)
    row = {"heads": f"{heads}/{kv_heads}", "head_dim": dim, "keys": keys, "dtype": "bfloat16"}
    copied = {"rows_copy_ms": 1e3 * found["rows"][0], "bus_ms": 1e3 * found["bus"][0]}
    ratio = found["step"][0] / found["rows"][0]
    each = found["at once"][0] / _AT_ONCE, found["at once"][1] / _AT_ONCE
    return [
        {"case": f"hybrid step, top {chosen}", **row, **_columns(found["step"]), **copied, "of_rows_copy": ratio},
        {"case": f"hybrid step of {_AT_ONCE} at once, top {chosen}", **row, **_columns(each)},
    ]


def _neighbourhood(bench: Bench, runner: Runner, rng: np.random.Generator, shapes: Shapes) -> list[Row]:
    """A square of tokens, each seeing the square around it."""
    heads, _ = shapes.heads[0]
    side, window = shapes.grid
    q, k, v = (_random(runner, rng, 1, heads, side, side, shapes.head_dim) for _ in "qkv")
    device = runner.device
    call = {
        "grid": lambda: gpu.generalized_neighborhood_attention(q, k, v, window=window, device=device),
    }
    times = _times(bench, runner, call)["grid"]
    flops = 4 * heads * side**2 * window**2 * shapes.head_dim
    sizes = {"heads": f"{heads}/{heads}", "head_dim": shapes.head_dim, "keys": side**2, "dtype": "bfloat16"}
    row = {"case": f"neighbourhood, window {window} x {window}", **sizes}
    return [{**row, **_columns(times), "tflop_s": flops / times[0] / 1e12}]


def random_blocks(
    rng: np.random.Generator, heads: int, length: int, query_block: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float]:
    """Random lists for `block_sparse_attention`, none empty: starts, blocks, the share of blocks that they hold."""
    of_rows, of_keys = -(-length // query_block), -(-length // 64)
    count = max(1, round(_DENSITY * of_keys))
    order = np.argsort(rng.random((heads * of_rows, of_keys)), axis=1)[:, :count]
    blocks = np.sort(order, axis=1).astype(np.int32).ravel()
    first = np.arange(heads, dtype=np.int32)[:, None] * (of_rows * count)
    starts = (first + np.arange(of_rows + 1, dtype=np.int32) * count)[None].astype(np.int32)
    return starts, blocks, count / of_keys


def _with_torch(runner: Runner, q: Any, k: Any, v: Any, *, causal: bool) -> dict[str, Call]:
    calls: dict[str, Call] = {"ours": lambda: gpu.attention(q, k, v, causal=causal, device=runner.device)}
    if runner.torch is not None:
        calls["torch"] = runner.torch(q, k, v, causal)
    return calls


def _times(
    bench: Bench, runner: Runner, calls: Mapping[str, Call], clock: Callable[[Call], float] | None = None
) -> dict[str, Times]:
    """Median and least seconds of each call, in turns; on the device, or by a clock."""
    for call in calls.values():
        for _ in range(_WARM_UP if not bench.quick else 1):
            call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(bench.rounds):
        for name, call in calls.items():
            found[name].append((clock or runner.seconds)(call))
    return {name: (statistics.median(seconds), min(seconds)) for name, seconds in found.items()}


def _columns(times: Times) -> Row:
    return {"ms": 1e3 * times[0], "ms_min": 1e3 * times[1]}


def _against(found: dict[str, Times]) -> Row:
    row = _columns(found["ours"])
    if "torch" in found:
        row |= {"peer_ms": 1e3 * found["torch"][0], "vs_torch": found["torch"][0] / found["ours"][0]}
    return row


def panels(result: Result) -> Sequence[Panel | Bars]:
    """Nothing is drawn: a device has one row per case."""
    del result
    return []
