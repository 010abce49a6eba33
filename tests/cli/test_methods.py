"""`longattn methods`: table, details, JSON and pages."""

import json

import pytest

import longattn as la
from longattn import catalogue, cli


def test_table(capsys):
    assert cli.main(["methods"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["family", "name", "exact"]
    assert [line.split()[1] for line in lines] == [method.name for method in la.methods()]


def test_family(capsys):
    assert cli.main(["methods", "--family", "exact", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [fact["name"] for fact in facts] == [method.name for method in la.methods("exact")]


def test_details(capsys):
    assert cli.main(["methods", "grouped_query_attention"]) == 0
    text = capsys.readouterr().out
    (method,) = (m for m in la.methods() if m.name == "grouped_query_attention")
    for words in (method.title, "arXiv:2305.13245", "longattn.dense.grouped_query_attention", *method.checks):
        assert words in text


def test_json(capsys):
    assert cli.main(["methods", "--json", "retrieval_attention"]) == 0
    (fact,) = json.loads(capsys.readouterr().out)
    assert fact["function"] == "longattn.retrieval_attention"
    assert fact["reference"] == "longattn.reference.retrieval.retrieval_attention.attention"
    assert fact["exact"] is False and fact["modes"] == ["causal", "self"]


@pytest.mark.parametrize(("arguments", "words"), [(["nothing"], "no method 'nothing'"), (["--family", "x"], "family:")])
def test_unknown(capsys, arguments, words):
    assert cli.main(["methods", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_pages(tmp_path):
    assert cli.main(["methods", "--docs", str(tmp_path / "new")]) == 0
    written = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "new").glob("*.md")}
    assert written == catalogue.pages()


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["methods", "--docs", str(tmp_path / "file")]) == 2
    assert "longattn methods: --docs: " in capsys.readouterr().err


def documented(argument: int):
    """Computes what it says.

    More about it.

    Args:
        argument: a number,
            in two lines.

    Returns:
        A value.
    """


def test_a_docstring_becomes_markdown():
    body, sections = catalogue._docstring(documented)
    assert body == "Computes what it says.\n\nMore about it."
    assert sections == {"Args": "- `argument`: a number, in two lines.", "Returns": "A value."}
    assert catalogue._signature(documented, "longattn.documented") == "la.documented(argument)"
