"""`longattn vectors`: makes what is missing, says where it is, and what it lacks."""

import numpy as np
import pytest

from longattn import cli, vectors
from longattn.vectors import command
from longattn.vectors.recording import Source


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """The only recorded set: one head of four keys."""
    monkeypatch.setenv("LONGATTN_CACHE", str(tmp_path))

    def record(progress):
        progress(0, 2)
        progress(2, 2)
        arrays = {name: np.zeros((1, 4, 2), np.float16) for name in ("keys", "values")}
        return arrays | {name: np.zeros((1, 3, 1, 2), np.float16) for name in ("queries", "prefill_queries")}, {
            "heads": ["0"]
        }

    source = Source("minilm", lambda: "minilm-test", None, record)
    monkeypatch.setattr(vectors, "RECORDED", {"minilm": source})
    return tmp_path / "vectors" / "minilm-test"


def test_makes_and_tells_where(made_up, capsys):
    assert cli.main(["vectors"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"minilm: {made_up}\n"
    assert "recording minilm: 100 %" in shown.err
    assert vectors.load("minilm", length=4, groups=3).queries.shape == (3, 1, 2)
    assert cli.main(["vectors", "--name", "minilm"]) == 0
    assert capsys.readouterr().err == "", "the cache has it"
    assert cli.main(["vectors", "--refresh"]) == 0
    assert "100 %" in capsys.readouterr().err


def test_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LONGATTN_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["vectors", "--name", "minilm"]) == 2
    assert "longattn vectors: minilm: recording minilm vectors needs torch, transformers" in capsys.readouterr().err


def test_progress_is_quiet_in_a_file(capsys):
    show = command.progress_line("x")
    for done in range(100):
        show(done, 100)
    show(100, 100)
    assert capsys.readouterr().err.count("\n") == 1
