"""`longattn demo` at a size that takes seconds: its figures, its files, its complaints."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from longattn import demo
from longattn.bench import demonstration, results
from longattn.demo import driver, runner
from longattn.retrieval.ways import POLICIES

SMALL = ["--context", "2048", "--questions", "8", "--top-k", "24", "--window", "64"]
REQUIRED = {
    "context",
    "questions",
    "accuracy",
    "keys_read_fraction",
    "attention_ms_per_token",
    "prefill_s",
    "versions",
}


def test_figures_of_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "demo.json"
    assert demo.main([*SMALL, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result.keys() >= REQUIRED
    assert (result["context"], result["questions"]) == (2048, 8)
    accuracy = result["accuracy"]
    assert accuracy.keys() == {"exact", "retrieval", "window"}
    assert accuracy["exact"] >= 7 / 8
    assert accuracy["retrieval"] >= accuracy["exact"] - 1 / 8
    assert accuracy["window"] <= 1 / 8
    assert (4 + 64) / 2048 < result["keys_read_fraction"] <= (4 + 64 + 24) / 2048
    times = result["attention_ms_per_token"]
    assert times.keys() == {"exact", "retrieval", "sdpa"}
    assert times["exact"] > 0 < times["retrieval"]
    assert times["sdpa"] is None
    assert result["prefill_s"] > 0
    assert {"longattn", "numpy", "python"} <= result["versions"].keys()
    printed = capsys.readouterr().out
    assert "sinks + window" in printed
    assert "8 facts" in printed


def test_other_ways_are_asked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "demo.json"
    assert demo.main([*SMALL, "--ways", "2 bits", "--json", str(file)]) == 0
    contestants = json.loads(file.read_text())["contestants"]
    assert "signatures, 2 bits" in contestants
    assert 0 < contestants["signatures, 2 bits"]["keys_read_fraction"] < 0.1
    assert "signatures, 2 bits" in capsys.readouterr().out
    assert demo.main([*SMALL, "--ways", "no such"]) == 2


def test_policies_are_asked_too(tmp_path: Path) -> None:
    file = tmp_path / "demo.json"
    assert demo.main([*SMALL, "--ways", "H2O,Stream,1 bit", "--json", str(file)]) == 0
    contestants = json.loads(file.read_text())["contestants"]
    assert {"H2O", "StreamingLLM", "signatures, 1 bit"} < contestants.keys()
    (result,) = results.read_folder(tmp_path)
    (summary,) = result["summary"]
    assert result["routine"] == "demo" and 1 <= summary["accurate"] <= 4 and "accurate_and_fast" not in summary
    assert {row["method"]: row["accuracy"] for row in result["rows"]}["H2O"] == contestants["H2O"]["accuracy"]
    assert any("| H2O |" in line for line in demonstration._tables([result]))
    for row in contestants.values():
        assert 0 <= row["accuracy_of_exact"] <= 8 / 7 and row["faster_than_sdpa"] is None
    assert 0.04 < contestants["H2O"]["keys_read_fraction"] < 0.07


def test_a_policy_that_keeps_all_rows_reads_as_exact_attention_does() -> None:
    session, prefill = runner.Session(runner.Model(), 700), runner.PrefillReader()
    tokens = np.random.default_rng(0).integers(32, 127, 540)
    session.forward(tokens[:512], prefill)
    (h2o,) = [way for way in POLICIES if way.name == "H2O"]
    reader = runner.KeptReader(session.stores, prefill, h2o, top_k=512, sinks=4, window=16)
    mark = session.mark()
    for question in (tokens[512:530], tokens[530:]):
        expected, got = [], []
        for read, outs in ((runner.read_all, expected), (reader, got)):
            outs += [session.forward(question[:-2], read), session.forward(question[-2:-1], read)]
            session.rewind(mark)
        for ours, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert reader.fraction_read == 1


def test_the_prompt_is_read_through_selectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "demo.json"
    assert demo.main([*SMALL, "--prefill-ways", "power,dynamic", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert [row["name"] for row in result["prefill_ways"]] == ["power of two", "dynamic blocks"]
    for row in result["prefill_ways"]:
        assert 0 < row["density"] <= 1 and 0 <= row["accuracy"] <= 1 and row["attention_s"] < row["prefill_s"]
    exact, *others = result["prompts"]
    assert exact["faster_prefill"] == 1 and [row["method"] for row in others] == ["power of two", "dynamic blocks"]
    for row in others:
        assert row["faster_prefill"] == pytest.approx(exact["prefill_s"] / row["prefill_s"])
    well = [row for row in others if row["faster_prefill"] >= 3 and row["accuracy"] >= exact["accuracy"] - 0.03]
    assert result["summary"][0]["fast_prompts"] == len(well)
    assert "prompt read through" in capsys.readouterr().out
    assert demo.main([*SMALL, "--prefill-ways", "no such"]) == 2


def test_peer_answers_the_same(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    file = tmp_path / "demo.json"
    assert demo.main([*SMALL, "--peer", "transformers", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["summary"][0]["accurate_and_fast"] <= result["summary"][0]["accurate"]
    assert result["contestants"]["sdpa"]["accuracy"] == result["accuracy"]["exact"]
    assert result["contestants"]["sdpa"]["wrong"] == result["contestants"]["exact"]["wrong"]
    sdpa = result["attention_ms_per_token"]["sdpa"]
    for row in result["contestants"].values():
        assert row["faster_than_sdpa"] == pytest.approx(sdpa / row["attention_ms_per_token"])
    assert 0 < sdpa < result["contestants"]["sdpa"]["ms_per_token"]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "demo.png"
    assert demo.main([*SMALL, "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert demo.main([*SMALL, "--plot", "demo.png"]) == 2
    assert "matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--questions", "0"], "questions"),
        (["--context", "512", "--questions", "64"], "context"),
        (["--top-k", "0"], "top_k"),
        (["--window", "-3"], "window"),
        (["--sinks", "0"], "sinks"),
        (["--seed", "-1"], "seed"),
        (["--json", "no/such/folder/demo.json"], "--json"),
    ],
)
def test_bad_sizes_are_refused(options: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(options) == 2
    assert named in capsys.readouterr().err


def test_unknown_names_are_refused_first() -> None:
    with pytest.raises(ValueError, match="dtype: got 'float16', expected 'float32' or 'bfloat16'"):
        driver.Settings(dtype="float16")
    settings = driver.Settings(context=2048)
    with pytest.raises(ValueError, match="peer: got 'torch', expected 'transformers' or None"):
        driver.measure(settings, settings.haystack(), None, peer="torch")  # type: ignore[arg-type]


def test_ctrl_c_stops_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(self: driver.Tally, needle: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(driver.Tally, "ask", interrupted)
    assert demo.main(SMALL) == 130
    assert "stopped" in capsys.readouterr().err


def test_demo_does_not_import_torch() -> None:
    code = (
        f"import sys; from longattn.demo import main; assert main({SMALL!r}) == 0; "
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
