"""`longattn bench linear` and `linear-methods`, at sizes that take a second."""

import json

import numpy as np
import pytest

import longattn as la
from longattn import cli
from longattn.bench import linear, linear_cases, linear_crossover, linear_growth, linear_methods, linear_torch, memory
from longattn.bench.harness import Bench
from longattn.bench.options import Grid
from longattn.bench.targets import judge


def run(routine, tmp_path, *options):
    file = tmp_path / "result.json"
    assert cli.main(["bench", routine, "--quick", "--rounds", "2", "--json", str(file), *options]) == 0
    return json.loads(file.read_text())


def test_linear(tmp_path, capsys):
    """Every form agrees with torch's loops and with transformers' fallback, at a shape of its own."""
    result = run("linear", tmp_path, "--threads", "1", "--keys", "64,128", "--dtypes", "float32", "--no-memory")
    rows = result["rows"]
    forms = {row["form"] for row in rows}
    assert len(forms) == 5
    assert all(row["difference"] < 1e-3 for row in rows if row.get("difference") is not None)
    for figure in ("of_fma", "gb_s"):
        assert {row["form"] for row in rows if row.get(figure)} == forms
    assert {row["form"] for row in result["slopes"]} == forms and result["memory"] == []
    for row in result["slopes"]:
        assert row["slope_min"] <= row["slope"] <= row["slope_max"]
        assert row["from_linear"] == pytest.approx(abs(row["slope"] - 1))
    crossover = {(row["form"], row["keys"]) for row in result["crossover"]}
    assert crossover == {(name, n) for name in linear_crossover.METHODS for n in linear_crossover.QUICK_LENGTHS}
    printed = capsys.readouterr().out
    assert "faster from" in printed and "exponent of time" in printed
    judged = {verdict.target.figure: verdict for verdict in judge([result], linear.TARGETS)}
    assert judged["from_linear"].of == 5 and judged["memory_share"].status == "not measured"
    own, beside = linear.SECTIONS
    assert any("exponent of time" in line for line in own.tables([result]))
    assert any("faster from" in line for line in beside.tables([result]))
    (panel,) = beside.figures([result])["linear-crossover"]
    assert set(panel.series) == set(linear_crossover.METHODS) and panel.limit == 1


@pytest.mark.skipif(not memory.supported(), reason="needs /proc/self/clear_refs")
def test_memory_of_recurrences(monkeypatch):
    """A form that keeps what it was given is seen; ours take nothing to speak of."""
    monkeypatch.setattr(linear_growth, "FORMS", linear_growth.FORMS[:1])
    bench = Bench(threads=[1], rounds=1, budget_s=0.05, quick=True, peers=False)
    shapes = Grid(heads=((2, 2),), head_dims=(64,), keys=(256, 16384), dtypes=("float32",))
    result = linear_growth.measure(bench, shapes, True)
    assert [row["keys"] for row in result["memory"]] == [256, 16384]
    assert result["slopes"][0]["memory_share"] < 0.2  # of 33 MB; a copy of one array is a quarter
    few, call = linear_growth.calls_for_memory("linear_attention", 2, 64, 16384, "float32")
    assert memory.of_call(few, lambda: (call(), np.ones(1 << 22)), 1) > 30 << 20


def test_times_in_proportion_have_the_exponent_1(monkeypatch):
    seconds = {256: 0.5, 1024: 2.0}

    class Steady(Bench):
        def interleave(self, candidates):
            times = {256: 4 * seconds[256], 1024: seconds[1024]}
            return {c.name: type("Outcome", (), {"seconds": (times[int(c.name)], 3 * times[int(c.name)])})
                    for c in candidates}  # fmt: skip

    bench = Steady(threads=[1], rounds=2, budget_s=0.05, quick=True, peers=False)
    shape = (linear_growth.FORMS[0], 2, 8, "float32")
    found = linear_growth._exponent(bench, *shape, (1024, 256))
    assert found["slope"] == pytest.approx(1) and found["from_linear"] == pytest.approx(0, abs=1e-12)
    seconds[1024] = 8.0
    assert linear_growth._exponent(bench, *shape, (1024, 256))["slope"] == pytest.approx(2)


def test_where_lines_cross():
    assert linear_crossover.faster_from({128: 1.5, 256: 3.0}) == 128
    assert linear_crossover.faster_from({128: 0.5, 256: 2.0}) == pytest.approx(128 * 2**0.5)
    assert linear_crossover.faster_from({128: 2.0, 256: 0.5, 512: 2.0, 1024: 4.0}) == pytest.approx(256 * 2**0.5)
    assert linear_crossover.faster_from({128: 2.0, 256: 0.9}) is None


def test_every_linear_method_has_a_row(tmp_path):
    """Every entry of the registry in these families and those near, beside torch where there is a plain formulation."""
    pytest.importorskip("torch")
    result = run("linear-methods", tmp_path, "--threads", "1")
    names = [method.name for family in ("linear", "recurrent") for method in la.methods(family)]
    names += linear_cases.FURTHER
    others = {method.name: method.family for method in la.methods()}
    assert {others[name] for name in linear_cases.FURTHER} == {"score", "exact", "pool"}
    assert [row["name"] for row in result["rows"] if row["ours"]] == names
    assert set(linear_cases.CASES) == set(names)
    plain = {row["name"]: row for row in result["rows"] if not row["ours"]}
    assert set(plain) == set(linear_torch.PLAIN)
    for name, row in plain.items():
        assert row["ms"] > 0 and row["error"] < 1e-4, name
    assert len(linear_methods.panels(result)) == 1 and linear_methods.SECTIONS[0].tables([result])
