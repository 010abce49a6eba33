"""What `longattn bench gpu` runs beside its timings: tests on the device, and compute-sanitizer over small cases."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from longattn.bench.results import Row

#: Tools of compute-sanitizer, the cheapest first.
SANITIZERS = ("memcheck", "synccheck", "racecheck")
_LEAST_SECONDS = 5.0  # less is not worth a start


@dataclass
class Budget:
    """Seconds that are left.

    Args:
        seconds: at the start.
        clock: what counts them.
    """

    seconds: float
    clock: Callable[[], float] = time.monotonic
    _start: float = field(init=False)

    def __post_init__(self) -> None:
        """Starts the clock."""
        self._start = self.clock()

    @property
    def left(self) -> float:
        """Seconds, not below 0."""
        return max(self.seconds - (self.clock() - self._start), 0.0)


def find_sanitizer(environment: Mapping[str, str] = os.environ) -> str | None:
    """compute-sanitizer in PATH, CUDA_HOME or CUDA_PATH."""
    found = shutil.which("compute-sanitizer", path=environment.get("PATH"))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        there = Path(environment.get(name, "")) / "bin" / "compute-sanitizer"
        if found is None and environment.get(name) and there.is_file():
            found = str(there)
    return found


def find_tests() -> Path | None:
    """The tests of kernels, beside a package that is used from its repository."""
    tests = Path(__file__).resolve().parents[3] / "tests" / "gpu"
    return tests if tests.is_dir() else None


def run_tests(budget: Budget, share: float = 0.7) -> Row:
    """All tests that have a device, on the GPU alone, in at most a share of what is left."""
    tests = find_tests()
    if tests is None:
        return {"case": "tests", "outcome": "not run: the package is not in its repository"}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(tests)]
    environment = {**os.environ, "LONGATTN_TEST_DEVICE": "gpu"}
    status, output, seconds = _run(command, share * budget.left, environment, cwd=tests.parents[1])
    counts = re.findall(r"(\d+) (passed|failed|error|errors|skipped)", output)
    summary = ", ".join(f"{count} {what}" for count, what in counts) or _last_line(output)
    return {"case": "tests", "outcome": _outcome(status, summary, seconds)}


def run_sanitizers(budget: Budget, command: Sequence[str], tool: str | None = None) -> list[Row]:
    """compute-sanitizer over a command, one tool after another as long as there is time."""
    tool = tool or find_sanitizer()
    if tool is None:
        return [{"case": "compute-sanitizer", "outcome": "not run: it is neither in PATH nor in CUDA_HOME"}]
    rows: list[Row] = []
    for name in SANITIZERS:
        if budget.left < _LEAST_SECONDS:
            rows.append({"case": name, "outcome": "not run: no time left"})
            continue
        call = [tool, "--tool", name, "--error-exitcode", "99", *command]
        status, output, seconds = _run(call, budget.left, dict(os.environ))
        summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
        rows.append(
            {"case": name, "outcome": _outcome(status, summaries[-1] if summaries else _last_line(output), seconds)}
        )
    return rows


def _run(
    command: Sequence[str], seconds: float, environment: dict[str, str], cwd: Path | None = None
) -> tuple[int | None, str, float]:
    """Exit status (`None`: stopped), output, seconds."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            env=environment,
            cwd=cwd,
            check=False,
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as stopped:
        raw = stopped.stdout or b""
        status, output = None, raw if isinstance(raw, str) else raw.decode(errors="replace")
    return status, output, time.monotonic() - start


def _last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1][:80] if lines else "no output"


def _outcome(status: int | None, summary: str, seconds: float) -> str:
    verdict = "stopped" if status is None else "passed" if status == 0 else f"FAILED (status {status})"
    return f"{verdict} after {seconds:.0f} s: {summary}"
