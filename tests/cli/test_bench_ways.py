"""`longattn bench`: the routines that ask ways to read a part of a store, at sizes that take a second."""

import json

import pytest

from longattn import cli
from longattn.bench import drift, targets
from longattn.retrieval.ways import WAYS


def run(routine, tmp_path, *options):
    file = tmp_path / f"{routine}.json"
    common = ["--quick", "--rounds", "2", "--threads", "1", "--no-peers", "--json", str(file)]
    assert cli.main(["bench", routine, *common, *options]) == 0
    return json.loads(file.read_text())


def test_drift(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "drift.png"
    options = ("--vectors", "synthetic", "--heads", "0", "--ways", "4 bits,exact scan,clusters of 64")
    result = run("drift", tmp_path, *options, "--plot", str(plot))
    rows = {row["method"]: row for row in result["rows"]}
    # Ways that differ in what they do with the rest are one index.
    ways = {"signatures, 4 bits", "exact scan", "product codes, 4 bits", "product codes, 4 bits, by queries"}
    assert rows.keys() == ways | {"clusters of 64"}
    for row in rows.values():
        assert (row["prefill"], row["keys"]) == (6144, 8192)
        assert row["recall_change"] == row["recall_end"] - row["recall_start"]
        assert 0 < row["recall_anew"] <= 1 and row["grow_us"] > 0
        assert row["rows_read"] == pytest.approx(0.02, rel=0.05)
    exact, default = rows["exact scan"], rows[WAYS[0].name]
    assert exact["recall_start"] == exact["recall_end"] == exact["recall_anew"] == 1
    # What is clustered by the length alone is the same built anew; codes are fitted to the prefill.
    assert rows["clusters of 64"]["recall_end"] == rows["clusters of 64"]["recall_anew"]
    assert default["recall_end"] > 0.85 and abs(default["recall_change"]) < 0.05
    assert plot.stat().st_size > 1000 and "built anew" in capsys.readouterr().out
    judged = [verdict for verdict in targets.judge([result]) if verdict.target.routine == "drift"]
    assert [verdict.worst for verdict in judged] == [default["recall_change"]]


def test_generated_text_is_about_something_else(tmp_path):
    """Queries of the end look at what was generated, far more than its share."""
    import numpy as np

    from longattn import vectors

    text = vectors.generation("synthetic", prefill=3072, length=4096, groups=24, heads=["0"])
    keys = text.data.keys[0]

    def mass_behind(queries):
        logits = np.einsum("nhd,kd->nhk", queries, keys) * keys.shape[1] ** -0.5
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return (weights[..., 3072:].sum(-1) / weights.sum(-1)).mean()

    assert mass_behind(text.data.queries) > 1.5 * mass_behind(text.first_queries)
    assert text.first_queries.shape == text.data.queries.shape == (24, 4, 128)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--vectors", "synthetic-sharp"], "name: got 'synthetic-sharp', expected one of synthetic, synthetic-flat"),
        (["--vectors", "synthetic", "--rows", "0"], "--rows: got 0.0"),
        (["--vectors", "synthetic", "--step", "0"], "--step: got 0"),
        (["--vectors", "synthetic", "--generated", "9999", "--length", "2000"], "prefill: got"),
        (["--vectors", "synthetic", "--ways", "no such"], "ways: got 'no such'"),
    ],
)
def test_drift_refuses(options, complaint, capsys):
    assert cli.main(["bench", "drift", "--quick", *options]) == 2
    assert complaint in capsys.readouterr().err


def test_ways_of_one_index_are_one():
    kept = drift._distinct(WAYS)
    assert len({(way.kind, str(way.parameters), way.queries) for way in WAYS}) == len(kept) < len(WAYS)
