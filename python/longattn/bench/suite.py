"""`longattn bench suite --out DIR`: the routines in steps, each in a process of its own with a JSON file.

A step whose file is there, made by the same command, is not run again: a suite that was stopped goes on where
it was.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from longattn.bench import decode, prefill, results
from longattn.bench.options import integers

SUMMARY = "run decode, prefill, error and scan step by step, with a JSON file each; goes on where it was stopped"
STOPPED = 130


@dataclass(frozen=True)
class Step:
    """A name, which its file has, and the arguments behind `program`."""

    name: str
    program: tuple[str, ...]
    arguments: tuple[str, ...]
    spoken: str

    @property
    def command(self) -> str:
        """The command as its result states it."""
        return " ".join([self.spoken, *self.arguments])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options to `parser`."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the JSON files")
    parser.add_argument("--threads", type=integers, default=[1, 2], metavar="N,N", help="thread counts (default 1,2)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each candidate (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
    parser.add_argument("--no-peers", action="store_true", help="longattn alone")
    parser.add_argument("--again", action="store_true", help="run steps that are there, too")
    parser.add_argument(
        "--only", metavar="TEXT", help="run the steps whose name has this part (decode, prefill-128, ...)"
    )
    parser.add_argument(
        "--scripts",
        type=Path,
        metavar="DIR",
        help="folder of scripts beside other peers, run as further steps (benches/peers)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs what is not there yet; status 0, 1 if a step failed, 130 after Ctrl-C.

    Raises:
        ValueError: nothing to run.
    """
    steps = [step for step in steps_of(args) if args.only is None or args.only in step.name]
    if not steps:
        raise ValueError(f"--only: no step has {args.only!r} in its name")
    failed = []
    begun = time.monotonic()
    for number, step in enumerate(steps, 1):
        head = f"[{number}/{len(steps)}, {(time.monotonic() - begun) / 60:.0f} min] {step.name}"
        if not args.again and _done(step, args.out):
            _say(f"{head}: there already")
            continue
        _say(f"{head}: {step.command}")
        try:
            status = subprocess.run([*step.program, *step.arguments], check=False, stdout=subprocess.DEVNULL).returncode
        except KeyboardInterrupt:
            status = STOPPED
        if status in (STOPPED, -2):
            _say("stopped; the same command goes on from here")
            return STOPPED
        if status:
            failed.append(step.name)
            _say(f"{step.name}: failed with status {status}")
    _say(f"{len(steps) - len(failed)} of {len(steps)} steps are in {args.out}; next: longattn bench report {args.out}")
    if failed:
        _say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def steps_of(args: argparse.Namespace) -> list[Step]:
    """The steps: decode by heads and width, prefill by width, the error table, scans, then the scripts."""
    decode_grid = decode.QUICK_GRID if args.quick else decode.GRID
    prefill_grid = prefill.QUICK_GRID if args.quick else prefill.GRID
    own: list[tuple[str, list[str]]] = [
        (f"decode-{hq}-{hkv}-{dim}", ["decode", "--heads", f"{hq}/{hkv}", "--head-dims", str(dim)])
        for hq, hkv in decode_grid.heads
        for dim in decode_grid.head_dims
    ]
    own += [(f"prefill-{dim}", ["prefill", "--head-dims", str(dim)]) for dim in prefill_grid.head_dims]
    own += [("error", ["error"]), ("scan", ["scan"])]
    common = ["--threads", ",".join(map(str, args.threads)), "--rounds", str(args.rounds)]
    common += ["--quick"] if args.quick else []
    alone = ["--no-peers"] if args.no_peers else []
    steps = [
        Step(
            name,
            (sys.executable, "-m", "longattn.cli"),
            ("bench", *arguments, *common, *alone, "--json", str(args.out / f"{name}.json")),
            "longattn",
        )
        for name, arguments in own
    ]
    scripts = sorted(args.scripts.glob("*.py")) if args.scripts else []
    if args.scripts and not scripts:
        raise ValueError(f"--scripts: {args.scripts} has no scripts")
    return steps + [
        Step(
            script.stem,
            (sys.executable, str(script)),
            (*common, "--json", str(args.out / f"{script.stem}.json")),
            f"python {script.as_posix()}",
        )
        for script in scripts
    ]


def _done(step: Step, folder: Path) -> bool:
    file = folder / f"{step.name}.json"
    if not file.exists():
        return False
    try:
        return bool(shlex.split(results.read(file)["command"]) == shlex.split(step.command))
    except ValueError:
        return False


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
