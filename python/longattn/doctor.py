"""`longattn doctor`: what this machine offers, what longattn uses of it, what to do about the rest."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import longattn
from longattn import _core

OPTIONAL = {"torch": "torch", "transformers": "transformers", "matplotlib": "plot", "cupy": None}
"""Optional packages and the extra that installs each; None where longattn does not use it yet."""

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
READ_BYTES = 1 << 30
THREADS_VARIABLES = ("LONGATTN_NUM_THREADS", "OMP_NUM_THREADS")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to `parser`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--quick", action="store_true", help="do not measure speed")


def run(args: argparse.Namespace) -> int:
    """Prints the report; always 0."""
    facts = machine()
    facts["speed"] = None if args.quick else measure_speed()
    facts["advice"] = advice(facts)
    print(json.dumps(facts, indent=2) if args.json else as_text(facts))
    return 0


def machine() -> dict[str, Any]:
    """Facts about processor, memory and packages; nothing is measured, no optional package is imported."""
    features = _core.cpu_features()
    return {
        "cpu": {
            "model": _cpu_model(),
            "architecture": platform.machine(),
            "logical_cpus": os.cpu_count(),
            "usable_cpus": _usable_cpus(),
            "features": sorted(name for name, present in features.items() if present),
        },
        "isa": {
            "used": _core.isa(),
            "available": _core.available_isas(),
            "LONGATTN_ISA": os.environ.get("LONGATTN_ISA"),
        },
        "threads": {
            "used": _core.num_threads(),
            **{name: os.environ.get(name) for name in (*THREADS_VARIABLES, "LONGATTN_OPENMP")},
        },
        "memory": {**_memory(), "transparent_huge_pages": _huge_pages()},
        "versions": {
            "longattn": longattn.__version__,
            "python": platform.python_version(),
            "numpy": _version("numpy"),
            "ml_dtypes": _version("ml_dtypes"),
            "platform": platform.platform(),
        },
        "optional": {name: _version(name) for name in OPTIONAL},
    }


def measure_speed(read_bytes: int | None = None) -> dict[str, float]:
    """Read bandwidth (GB/s of 1e9) and float32 FMA rate (GFLOP/s) of one thread and of all.

    Args:
        read_bytes: memory to read, larger than the caches; default 1 GiB, or a quarter of the free memory
            where that is less.
    """
    free = _memory()["available_bytes"]
    size = read_bytes or (READ_BYTES if free is None else min(READ_BYTES, free // 4))
    all_threads = _core.num_threads()
    speed = {}
    for name, threads in (("one_thread", 1), ("all_threads", all_threads)):
        speed[f"read_gb_s_{name}"] = _core.read_bandwidth(size, threads)
        speed[f"fma_gflop_s_{name}"] = _core.fma_peak(threads)
    return speed


def advice(facts: dict[str, Any]) -> list[str]:
    """What to do, from the facts of `machine` and, under "speed", the figures of `measure_speed` or None."""
    lines = []
    isa, threads, memory, speed = facts["isa"], facts["threads"], facts["memory"], facts["speed"]
    usable = facts["cpu"]["usable_cpus"]
    if isa["LONGATTN_ISA"]:
        lines.append(f"LONGATTN_ISA forces {isa['used']}; available: {', '.join(isa['available'])}.")
    elif isa["used"] == "scalar":
        lines.append("No vector instructions: a CPU with AVX2, FMA and F16C, AVX-512 or NEON is many times faster.")
    for name in THREADS_VARIABLES:
        asked = threads.get(name)
        if asked and not _is_count(asked):
            lines.append(f"{name} is {asked!r}, which is no number of threads: it is passed over.")
    if threads["used"] < usable:
        lines.append(f"{threads['used']} of {usable} CPUs are used: set LONGATTN_NUM_THREADS.")
    elif threads["used"] > usable:
        lines.append(f"{threads['used']} threads share {usable} CPUs: more threads than CPUs only wait for each other.")
    if threads.get("LONGATTN_OPENMP") == "0":
        lines.append("LONGATTN_OPENMP=0: calls between torch's operations wait for processors that its threads hold.")
    if memory["transparent_huge_pages"] == "never":
        lines.append(f"Huge pages are off; retrieval gains from them: echo madvise | sudo tee {HUGE_PAGES}")
    cores = min(threads["used"], usable)
    if speed and cores > 1:
        if speed["read_gb_s_all_threads"] < 1.2 * speed["read_gb_s_one_thread"]:
            lines.append("All threads read memory hardly faster than one: other work runs, or memory is the limit.")
        if speed["fma_gflop_s_all_threads"] < 0.6 * cores * speed["fma_gflop_s_one_thread"]:
            lines.append("Threads do not add up in arithmetic: other work runs, or they share physical cores.")
    lines += [
        f"{name} is not installed: pip install 'longattn[{OPTIONAL[name]}]' to use it."
        for name, version in facts["optional"].items()
        if version is None and OPTIONAL[name]
    ]
    return lines


def as_text(facts: dict[str, Any]) -> str:
    """The report as a person reads it."""
    cpu, isa, memory, speed = facts["cpu"], facts["isa"], facts["memory"], facts["speed"]
    versions = facts["versions"] | {name: version or "not installed" for name, version in facts["optional"].items()}
    others = [name for name in isa["available"] if name != isa["used"]]
    rows = [
        (
            "CPU",
            f"{cpu['model']} ({cpu['architecture']}), {cpu['usable_cpus']} of {cpu['logical_cpus']} usable",
        ),
        ("features", " ".join(cpu["features"]) or "none that longattn knows"),
        ("instructions", isa["used"] + (f" (also possible: {', '.join(others)})" if others else "")),
        ("threads", str(facts["threads"]["used"])),
        ("memory", f"{_gib(memory['total_bytes'])}, {_gib(memory['available_bytes'])} free"),
        ("huge pages", memory["transparent_huge_pages"] or "unknown on this system"),
    ]
    if speed:
        for name, unit in (("read", "gb_s"), ("fma", "gflop_s")):
            one, all_threads = (speed[f"{name}_{unit}_{threads}"] for threads in ("one_thread", "all_threads"))
            written = {"gb_s": "GB/s", "gflop_s": "GFLOP/s"}[unit]
            rows.append(
                (
                    f"{name} speed",
                    f"{one:.1f} {written} by one thread, {all_threads:.1f} by {facts['threads']['used']}",
                )
            )
    rows += list(versions.items())
    lines = [f"{name:13}{value}" for name, value in rows]
    lines += ["", *(f"- {line}" for line in facts["advice"])] if facts["advice"] else ["", "Nothing to improve."]
    return "\n".join(lines)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _usable_cpus() -> int:
    """CPUs that this process may run on (containers and taskset lower it)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> dict[str, int | None]:
    """Total and available bytes, None where the system does not say."""
    try:
        entries = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        kib = {entry[0].rstrip(":"): int(entry[1]) for entry in entries}
        return {"total_bytes": kib["MemTotal"] << 10, "available_bytes": kib["MemAvailable"] << 10}
    except (OSError, KeyError):
        pass
    try:
        return {
            "total_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "available_bytes": None,
        }
    except (AttributeError, ValueError, OSError):
        return {"total_bytes": None, "available_bytes": None}


def _huge_pages() -> str | None:
    """`always`, `madvise` or `never`; None where there is no such setting."""
    try:
        return HUGE_PAGES.read_text().split("[", 1)[1].split("]", 1)[0]
    except (OSError, IndexError):
        return None


def _version(package: str) -> str | None:
    """Version of an installed package, found without importing it."""
    builds = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x") if package == "cupy" else (package,)
    for name in builds:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _is_count(text: str) -> bool:
    return text.strip().isdecimal() and 1 <= int(text) <= 4096


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
