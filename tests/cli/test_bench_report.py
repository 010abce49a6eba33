"""`longattn bench suite` and `report`: steps that go on where they stopped, verdicts and pages from JSON alone."""

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from longattn import cli
from longattn.bench import decode, external, quality, registry, report, results, suite, targets
from longattn.bench.harness import Candidate

RESULTS = Path(__file__).parent / "results"
SCRIPTS = Path(__file__).parents[2] / "benches" / "peers"
PAGE = f"# Figures\n\nbefore\n\n{report.BEGIN}\nwritten before\n{report.END}\n\nbehind\n"


@pytest.fixture
def found():
    return results.read_folder(RESULTS)


def verdict(found, text):
    (one,) = [verdict for verdict in targets.judge(found, registry.targets()) if verdict.target.text == text]
    return one


def test_targets_that_are_reached_and_missed(found):
    reached = verdict(found, "decode, bfloat16: share of the read bandwidth, N ≥ 32K")
    assert (reached.status, reached.worst, reached.reached, reached.of) == (targets.PASS, 0.86, 2, 2)
    missed = verdict(found, "MHA decode, bfloat16: speed against torch's best form")
    assert (missed.status, missed.worst, missed.reached, missed.of) == (targets.MISS, 1.3, 1, 2)
    assert missed.place == "32/32, D 128, N 8192, bfloat16, 2 threads"
    assert missed.cells[:5] == (missed.target.text, "≥ 1.40×", f"1.30× ({missed.place})", "1 of 2", "MISS")
    assert verdict(found, "prefill, float32, N = 1K: speed against torch SDPA").status == targets.MISS
    assert verdict(found, "GQA decode: speed against onnxruntime").worst == 9
    assert verdict(found, "GQA decode: speed against ggml").status == targets.ABSENT


def test_a_bound_from_above(found):
    growth = verdict(found, "prefill: memory beyond inputs and outputs grows as length to the power")
    assert growth.status == targets.PASS and growth.worst == pytest.approx(0.532, abs=1e-3)
    for result in found:
        for slope in result.get("memory_slopes", ()):
            slope["slope"] += slope["head_dim"] / 128
    growth = verdict(found, "prefill: memory beyond inputs and outputs grows as length to the power")
    assert growth.status == targets.MISS and growth.reached == 1 and growth.place.startswith("D 128")


def test_a_target_for_other_machines_does_not_count(found):
    text = "prefill, float32, int8 scores: speed against our own float32, where the CPU has VNNI"
    assert verdict(found, text).status == targets.PASS
    for result in found:
        result["machine"]["cpu"]["features"] = ["avx2"]
    assert verdict(found, text).status == targets.ABSENT


def test_targets_speak_of_what_the_routines_measure():
    heads = {f"{query}/{kv}" for query, kv in decode.GRID.heads}
    assert {*targets.GQA, *targets.MHA} == heads
    for target in registry.targets():
        assert set(target.where.get("dtype", ())) <= set(decode.GRID.dtypes)
    scripts = {target.command.split()[1] for target in registry.targets() if target.routine == external.ROUTINE}
    assert all((SCRIPTS.parents[1] / script).exists() for script in scripts) and len(scripts) == 2


def test_report_rewrites_its_part_of_the_page(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    page = tmp_path / "figures.md"
    page.write_text(PAGE)
    for _ in range(2):  # the second run finds what the first one wrote
        assert cli.main(["bench", "report", str(RESULTS), "--docs", str(tmp_path / "figures")]) == 0
    assert "14 PASS, 2 MISS" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("# Figures\n\nbefore\n\n") and text.endswith(f"{report.END}\n\nbehind\n")
    assert text.count("### Targets") == 1 and "written before" not in text
    assert "| 32/8 | 128 | bfloat16 | 1 (60%) | 4 (86%) | 1.00 | 1.9 (30) | 1.9 (30) | 5e-05 |" in text
    assert "| 64 | float32 | 5 (50%) | 70 (62%) | 1.90 | 1.60 | 1.70 | 1.10 | 2.30 | 0.53 |" in text
    assert "onnxruntime GroupQueryAttention" in text and "- int4 left out: an example" in text
    assert "| synthetic | 32/8×128 | 16384 | int8 | 272 | 26.6% |" in text
    drawn = {file.stem: file.stat().st_size for file in (tmp_path / "figures").iterdir()}
    assert drawn.keys() == {"decode-2", "decode-ratios", "prefill", "prefill-ratios", "peers", "error"}
    assert all(2_000 < size < 100_000 for size in drawn.values())
    assert all(f"(figures/{name}.png)" in text for name in drawn)


def test_report_without_docs_prints(capsys):
    assert cli.main(["bench", "report", str(RESULTS)]) == 0
    out = capsys.readouterr().out
    assert "### Targets" in out and ".png" not in out


def test_the_figures_of_a_front_page(tmp_path, found):
    begin, end = report.FIGURES
    page = tmp_path / "front.md"
    page.write_text(f"before\n\n{begin}\n| old |\n{end}\n\nbehind\n")
    shutil.copytree(RESULTS, tmp_path / "results")
    for result in found:  # one of the sizes that the page shows
        if result["routine"] == "prefill":
            at = {"keys": 16384, "head_dim": 128, "dtype": "bfloat16"}
            row = next(row for row in result["rows"] if row["ours"])
            result["rows"] = [
                row | at | {"threads": 1, "ms": 1.0},
                row | at | {"threads": 2, "ms": 1500.0},
                row | at | {"threads": 2, "ms": 3000.0, "method": "torch SDPA", "ours": False},
            ]
            results.write(result, tmp_path / "results" / "prefill.json")
    assert cli.main(["bench", "report", str(tmp_path / "results"), "--readme", str(page)]) == 0
    written = page.read_text()
    assert written.startswith("before\n") and written.endswith("behind\n") and "old" not in written
    assert "| 2 | 1,500 | 3,000 (torch SDPA) | 2.0 |" in written


@pytest.mark.parametrize("page", ["no markers", f"{report.END} {report.BEGIN}", PAGE + report.END])
def test_report_leaves_a_page_without_its_markers_alone(tmp_path, capsys, page):
    pytest.importorskip("matplotlib")
    (tmp_path / "figures.md").write_text(page)
    assert cli.main(["bench", "report", str(RESULTS), "--docs", str(tmp_path / "figures")]) == 2
    assert "the page needs one line" in capsys.readouterr().err
    assert (tmp_path / "figures.md").read_text() == page and not (tmp_path / "figures").exists()


@pytest.mark.parametrize("content", [None, "{", "[]", '{"routine": "decode"}'])
def test_report_of_something_else(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "decode.json").write_text(content)
    assert cli.main(["bench", "report", str(tmp_path)]) == 2
    assert ("no results" if content is None else "expected the JSON of a benchmark") in capsys.readouterr().err


def test_the_page_of_this_repository_has_the_markers():
    page = (SCRIPTS.parents[1] / "docs" / "benchmarks.md").read_text()
    assert "### Targets" in report.put_between(page, "### Targets")


def steps_run(capsys, *arguments):
    """Status of a suite and the names of the steps that it ran."""
    status = cli.main(["bench", "suite", "--quick", "--rounds", "1", "--threads", "1", "--no-peers", *arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    return status, [line.split("] ")[1].split(":")[0] for line in lines if not line.endswith("there already")]


def test_suite_goes_on_where_it_was_stopped(tmp_path, capsys):
    options = ("--out", str(tmp_path), "--only", "decode")
    assert steps_run(capsys, *options) == (0, ["decode-8-2-64", "decode-2-2-64"])
    assert steps_run(capsys, *options) == (0, [])
    kept = (tmp_path / "decode-8-2-64.json").read_text()
    (tmp_path / "decode-2-2-64.json").write_text(kept[:100])  # cut off
    assert steps_run(capsys, *options) == (0, ["decode-2-2-64"])
    assert (tmp_path / "decode-8-2-64.json").read_text() == kept
    other = json.loads(kept) | {"command": "longattn bench decode"}  # the file of another command
    (tmp_path / "decode-8-2-64.json").write_text(json.dumps(other))
    assert steps_run(capsys, *options) == (0, ["decode-8-2-64"])
    assert {row["heads"] for result in results.read_folder(tmp_path) for row in result["rows"]} == {"8/2", "2/2"}


@pytest.fixture
def statuses(monkeypatch):
    """What steps return instead of running, by name; 0 unless set. Collects what was asked for."""
    given = {"asked": []}

    def run(command, **rest):
        name = Path(command[-1]).stem
        given["asked"].append(name)
        return subprocess.CompletedProcess(command, given.get(name, 0))

    monkeypatch.setattr(subprocess, "run", run)
    return given


def test_suite_runs_every_routine_and_script(tmp_path, capsys, statuses):
    assert steps_run(capsys, "--out", str(tmp_path), "--scripts", str(SCRIPTS))[0] == 0
    assert statuses["asked"] == [
        "decode-8-2-64", "decode-2-2-64", "prefill-64", "error", "scan", "ann", "ggml_flash", "onnxruntime_gqa",
    ]  # fmt: skip


def test_a_failing_step_does_not_stop_the_others(tmp_path, capsys, statuses):
    statuses["prefill-64"] = 2
    status, asked = steps_run(capsys, "--out", str(tmp_path))
    assert status == 1 and asked[-2:] == ["error", "scan"]


def test_ctrl_c_stops_the_suite(tmp_path, capsys, statuses):
    statuses["decode-2-2-64"] = suite.STOPPED
    assert steps_run(capsys, "--out", str(tmp_path)) == (suite.STOPPED, ["decode-8-2-64", "decode-2-2-64"])


@pytest.mark.parametrize("options", [("--only", "training"), ("--scripts", "/nowhere")])
def test_suite_with_nothing_to_run(tmp_path, options):
    assert cli.main(["bench", "suite", "--out", str(tmp_path), *options]) == 2


def test_a_step_is_known_by_its_command(tmp_path, monkeypatch):
    """What a step writes as its command is what the suite looks for."""
    options = ["bench", "suite", "--quick", "--rounds", "1", "--threads", "1", "--no-peers", "--out", str(tmp_path)]
    platform.processor()  # runs a program, once in a process
    monkeypatch.setattr(subprocess, "run", lambda command, **rest: commands.append(command) or completed)
    commands, completed = [], subprocess.CompletedProcess([], 0)
    assert cli.main([*options, "--only", "decode-2"]) == 0
    (command,) = commands
    assert command[:3] == [sys.executable, "-m", "longattn.cli"]
    monkeypatch.setattr(sys, "argv", ["longattn", *command[3:]])
    assert cli.main(command[3:]) == 0
    commands.clear()
    assert cli.main([*options, "--only", "decode-2"]) == 0 and not commands


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["onnxruntime_gqa", "ggml_flash"])
def test_scripts_explain_themselves(name, capsys, monkeypatch):
    module = script(name)
    with pytest.raises(SystemExit) as stopped:
        external.main(name, module.GRID, module.load, ["--help"])
    assert stopped.value.code == 0 and "--dtypes" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delenv("GGML_LIB_DIR", raising=False)
    assert external.main(name, module.GRID, module.load, ["--quick"]) == 2
    assert {"onnxruntime_gqa": "pip install", "ggml_flash": "GGML_LIB_DIR"}[name] in capsys.readouterr().err
    monkeypatch.setenv("GGML_LIB_DIR", "/nowhere")
    assert external.main(name, module.GRID, module.load, ["--quick"]) == 2


def test_a_script_measures_its_peer_beside_ours(tmp_path, capsys):
    def ways(case, threads, dtypes):
        def slow():
            return quality.exact_decode(case.q[0, :, 0], case.k[0], case.v[0])

        asked.append((case.stored, threads, *dtypes))
        return [case.way(Candidate("numpy", slow))]

    asked = []
    options = ["--quick", "--heads", "8/2", "--keys", "256", "--dtypes", "float16", "--threads", "1,2", "--rounds", "2"]
    file = tmp_path / "numpy.json"
    assert external.main("numpy", decode.GRID, lambda: ("1", ways), [*options, "--json", str(file)]) == 0
    assert asked == [("float16", 1, "float16"), ("float16", 2, "float16")]
    result = results.read(file)
    assert result["routine"] == external.ROUTINE and result["version"] == "1"
    ours, theirs = result["rows"][:2]
    assert theirs["peer"] == "numpy" and theirs["times_ours"] == pytest.approx(theirs["ms"] / ours["ms"])
    assert "peer" not in ours and theirs["error"] < 1e-6 < ours["error"] < 1e-3
    assert "| 2 | 8/2 | 64 | 256 | float16 | numpy |" in capsys.readouterr().out


def test_results_are_written_whole_or_not(tmp_path, monkeypatch):
    file = tmp_path / "folder" / "result.json"
    whole = {"routine": "decode", "command": "c", "rows": [], "machine": {}}
    results.write(whole, file)
    with pytest.raises(TypeError):
        results.write(whole | {"rows": [np.float32]}, file)
    assert results.read(file) == whole
    shutil.copy(file, tmp_path / "other.json")
    assert len(results.read_folder(tmp_path)) == 1
