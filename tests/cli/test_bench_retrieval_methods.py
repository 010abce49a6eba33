"""`longattn bench retrieval-methods`, at sizes that take seconds."""

import json

import longattn as la
from longattn import cli
from longattn.bench import registry, retrieval_cases, retrieval_methods


def names():
    return {method.name for family in retrieval_methods.FAMILIES for method in la.methods(family)}


def test_every_method_has_a_row(tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = ["--quick", "--rounds", "2", "--threads", "1", "--json", str(file)]
    assert cli.main(["bench", "retrieval-methods", *arguments]) == 0
    result = json.loads(file.read_text())
    ours = [row for row in result["rows"] if row["method"].startswith("longattn ")]
    assert [row["name"] for row in ours if row["ms"] is None] == []
    assert {row["name"] for row in ours} == names() and len(ours) == len(names())
    beside = {row["name"]: row["error"] for row in result["rows"] if row["method"] == "torch"}
    assert set(beside) == set(retrieval_cases.PLAIN) and max(beside.values()) < 1e-4
    (section,) = retrieval_methods.SECTIONS
    table = "\n".join(section.tables([result]))
    assert all(f"longattn {name} |" in table for name in names())
    (panel,) = section.figures([result])["retrieval-methods"]
    assert set(panel.labels) == set(beside)


def test_cases_are_the_registry():
    assert set(retrieval_cases.CASES) == names() and set(retrieval_cases.CALLS) < names()
    classes = {m.name for f in retrieval_methods.FAMILIES for m in la.methods(f) if isinstance(m.function, type)}
    assert set(retrieval_cases.CALLS) == classes
    assert "retrieval-methods" in registry.routines()


def test_only_unknown_is_refused(tmp_path, capsys):
    assert cli.main(["bench", "retrieval-methods", "--quick", "--only", "nothing", "--json", str(tmp_path / "x")]) == 2
    assert "--only: got 'nothing', expected part of one of" in capsys.readouterr().err
