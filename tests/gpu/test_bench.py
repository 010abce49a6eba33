"""`longattn bench gpu`: its cases run on the emulator, and without a GPU the command says what is missing."""

import re

import numpy as np
import pytest

from emu import emulator
from emu.device import EmulatorDevice
from longattn import cli
from longattn.bench import gpu, gpu_checks, gpu_targets
from longattn.bench.gpu_checks import Budget
from longattn.bench.harness import Bench
from longattn.bench.tables import table
from longattn.bench.targets import judge


@pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64")
def test_every_case_runs_and_counts():
    bench = Bench(threads=None, rounds=1, budget_s=1, quick=True, peers=False)
    device = EmulatorDevice()
    runner = gpu.Runner(
        device,
        device.contiguous,
        gpu.wall_seconds,
        gpu.wall_seconds,
        np.copyto,
        lambda q, k, v, causal: lambda: None,
        lambda *arrays: lambda: None,
    )
    rows = gpu.cases(bench, runner, gpu.QUICK)
    found = {row["case"].split(",")[0]: row for row in rows}
    assert list(found) == [
        "device copy",
        "decode",
        "decode of int8",
        "scan and top-k",
        "scan of 4-bit codes and top-k",
        "attention to listed rows",
        "prefill",
        "block-sparse",
        "KDA forward",
        "KDA step of 2 sequences",
        "hybrid step",
        "hybrid step of 4 at once",
        "neighbourhood",
    ]
    decode = found["decode"]
    assert decode["gb_s"] == pytest.approx(4 * 2 * 300 * 64 / decode["ms"] / 1e6)
    assert decode["vs_torch"] == pytest.approx(decode["peer_ms"] / decode["ms"])
    assert found["prefill"]["tflop_s"] == pytest.approx(2 * 4 * 64 * 100 * 101 / found["prefill"]["ms"] / 1e9)
    kinds = {"decode", "merge", "hash", "prefill", "codes", "signatures", "choice", "recurrence", "neighbourhood"}
    assert {name.split("_")[0] for name in device.started} == kinds
    assert len(table(rows, gpu.COLUMNS)) == 2 + len(rows)
    assert found["prefill"]["of_asked"] == pytest.approx(found["prefill"]["vs_torch"] / 0.55)
    assert found["hybrid step"]["of_rows_copy"] == pytest.approx(
        found["hybrid step"]["ms"] / found["hybrid step"]["rows_copy_ms"]
    )
    assert found["KDA forward"]["vs_fla"] > 0
    step = found["KDA step of 2 sequences"]
    assert step["gb_s"] == pytest.approx(8 * 2 * 2 * 64 * 64 / step["ms"] / 1e6)
    assert step["of_copy"] == pytest.approx(step["gb_s"] / found["device copy"]["gb_s"])


def test_every_target_is_judged_from_the_rows():
    """Figures at the bounds pass, and each alone fails when it is worse."""
    size = {"heads": "32/8", "head_dim": 128, "dtype": "bfloat16"}
    rows = [
        {"case": "decode", **size, "keys": 131072, "of_copy": 0.8},
        {"case": "decode of int8", **size, "keys": 131072, "of_copy": 0.1},
        {"case": "prefill", **size, "keys": 16384, "of_asked": 1.0},
        {"case": "block-sparse, density 0.100", **size, "keys": 16384, "over_density": 1.25},
        {"case": "scan and top-k", **size, "keys": 131072, "ms": 0.04},
        {"case": "scan of 4-bit codes and top-k", **size, "keys": 131072, "ms": 0.04},
        {"case": "KDA forward", **size, "keys": 8192, "vs_fla": 1.11},
        {"case": "hybrid step, top 1024", **size, "keys": 131072, "of_rows_copy": 1.0},
    ]
    result = {"routine": "gpu", "rows": rows, "notes": []}
    assert all(verdict.status == "PASS" for verdict in judge([result], gpu_targets.TARGETS))
    for target in gpu_targets.TARGETS:
        worse = [{**row, target.figure: target.bound * (1.1 if target.at_most else 0.9)} for row in rows]
        (verdict,) = judge([{**result, "rows": worse}], [target])
        assert verdict.status == "MISS"
        assert judge([{**result, "rows": []}], [target])[0].status == "not measured"
    assert gpu_targets.SECTIONS[0].tables([result]) and not gpu_targets.SECTIONS[0].tables([])


def test_random_blocks_have_the_density_they_say(rng):
    starts, blocks, density = gpu.random_blocks(rng, 2, 1000, 128)
    assert starts.shape == (1, 2, 9) and starts[0, 0, 0] == 0 and starts[0, 1, -1] == len(blocks)
    assert starts[0, 0, -1] == starts[0, 1, 0]
    for first, end in zip(starts[0, :, :-1].ravel(), starts[0, :, 1:].ravel(), strict=True):
        assert (np.diff(blocks[first:end]) > 0).all() and (end - first) / 16 == density


@pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64")
def test_cases_leave_half_of_the_budget():
    seconds = iter([0.0, 0.0, 3.0, 6.0])
    bench = Bench(threads=None, rounds=1, budget_s=1, quick=True, peers=False)
    device = EmulatorDevice()
    runner = gpu.Runner(device, device.contiguous, gpu.wall_seconds, gpu.wall_seconds, np.copyto)
    rows = gpu.cases(bench, runner, gpu.QUICK, Budget(10.0, lambda: next(seconds)))
    assert "prefill" not in {row["case"] for row in rows}
    assert rows[-1] == {"case": "others", "outcome": "not measured: no time left"}


class TestSanitizer:
    def tool(self, folder, text):
        script = folder / "bin" / "compute-sanitizer"
        script.parent.mkdir()
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
        return script

    def test_it_is_found_in_path_and_in_cuda_home(self, tmp_path):
        script = self.tool(tmp_path, "exit 0")
        assert gpu_checks.find_sanitizer({"PATH": str(script.parent)}) == str(script)
        assert gpu_checks.find_sanitizer({"PATH": "", "CUDA_HOME": str(tmp_path)}) == str(script)
        assert gpu_checks.find_sanitizer({"PATH": "", "CUDA_PATH": "/nowhere"}) is None

    def test_each_tool_runs_the_command(self, tmp_path):
        script = self.tool(tmp_path, 'echo "========= ERROR SUMMARY: 0 errors"; echo "$@" >> "$(dirname "$0")/calls"')
        rows = gpu_checks.run_sanitizers(Budget(60.0), ["python", "-c", "pass"], str(script))
        assert [row["case"] for row in rows] == list(gpu_checks.SANITIZERS)
        assert all(re.fullmatch(r"passed after \d+ s: 0 errors", row["outcome"]) for row in rows)
        calls = (script.parent / "calls").read_text().splitlines()
        assert calls[0] == "--tool memcheck --error-exitcode 99 python -c pass" and len(calls) == 3

    def test_errors_and_missing_time_are_told(self, tmp_path):
        script = self.tool(tmp_path, 'echo "========= ERROR SUMMARY: 3 errors"; exit 99')
        rows = gpu_checks.run_sanitizers(Budget(60.0), [], str(script))
        assert rows[0]["outcome"].startswith("FAILED (status 99)") and rows[0]["outcome"].endswith("3 errors")
        rows = gpu_checks.run_sanitizers(Budget(1.0), [], str(script))
        assert all(row["outcome"] == "not run: no time left" for row in rows)

    def test_a_command_that_takes_too_long_is_stopped(self):
        status, _, seconds = gpu_checks._run(["sleep", "20"], 0.2, {})
        assert status is None and seconds < 10
        assert gpu_checks._outcome(status, "x", seconds).startswith("stopped after 0 s")


def test_the_tests_run_on_the_device_alone(monkeypatch):
    """The command that is started, without starting it."""
    seen = {}

    def run(command, seconds, environment, cwd):
        seen.update(command=command, seconds=seconds, device=environment["LONGATTN_TEST_DEVICE"], cwd=cwd)
        return 0, "....\n12 passed, 3 skipped in 1.2s\n", 1.2

    monkeypatch.setattr(gpu_checks, "_run", run)
    row = gpu_checks.run_tests(Budget(100.0, lambda: 0.0))
    assert row == {"case": "tests", "outcome": "passed after 1 s: 12 passed, 3 skipped"}
    assert (
        seen["device"] == "gpu" and seen["seconds"] == pytest.approx(70) and seen["command"][-1].endswith("tests/gpu")
    )
    monkeypatch.setattr(gpu_checks, "find_tests", lambda: None)
    assert "not run" in gpu_checks.run_tests(Budget(1.0))["outcome"]


def test_without_a_gpu_the_command_says_what_is_missing(capsys):
    try:
        import cupy
    except ImportError:
        expected = "pip install 'longattn[gpu]'"
    else:
        if cupy.is_available():
            pytest.skip("there is a GPU")
        expected = "no GPU"
    assert cli.main(["bench", "gpu", "--quick"]) == 2
    assert expected in capsys.readouterr().err
