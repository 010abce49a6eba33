"""`longattn bench`: the routines that ask ways to read a part of a store, at sizes that take a second."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from longattn import cli, vectors
from longattn.bench import compare, drift, growth, nearest, targets
from longattn.retrieval.ways import FURTHER, WAYS

SCRIPTS = Path(__file__).parents[2] / "benches" / "peers"


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
    judged = targets.judge([result], drift.TARGETS)
    assert [verdict.worst for verdict in judged] == [default["recall_change"]]


def test_generated_text_is_about_something_else(tmp_path):
    """Queries of the end look at what was generated, far more than its share."""
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
        (["--vectors", "synthetic-sharp"], "name: got 'synthetic-sharp', expected 'synthetic', 'synthetic-flat'"),
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


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def brute_force(keys, threads):
    """A peer that finds the best rows, or none of them."""

    def best(query, count):
        return np.argpartition(keys @ query, -count)[-count:]

    return [
        nearest.Search("all", lambda q: best(q, nearest.BEST)),
        nearest.Search("none", lambda q: np.full(nearest.BEST, -1)),
    ]


def test_nearest_peers(tmp_path, capsys):
    file = tmp_path / "nearest.json"
    peers = [nearest.Peer("brute force", brute_force), nearest.Peer("other", brute_force)]
    options = ["--quick", "--rounds", "1", "--vectors", "synthetic", "--only", "force", "--json", str(file)]
    assert nearest.main("brute force", lambda: ({"numpy": np.__version__}, peers), options) == 0
    result = json.loads(file.read_text())
    theirs = {row["setting"]: row for row in result["rows"] if row.get("peer")}
    assert {row["peer"] for row in theirs.values()} == {"brute force"}
    assert theirs["all"]["kept"] == pytest.approx(1, abs=1e-9) and theirs["none"]["kept"] == 0
    assert theirs["all"]["found"] == nearest.BEST and theirs["none"]["found"] == 0
    ours = [row for row in result["rows"] if row.get("default")]
    masses = [row["mass"] for row in ours]
    assert masses == sorted(masses) and 0.9 < ours[-1]["mass"] < 1 and all(row["us"] > 0 for row in ours)
    for line in result["levels"]:
        assert line["peer_setting"] == "all" and line["ours_us"] >= line["fastest_us"]
        assert line["times_ours"] == pytest.approx(line["peer_us"] / line["ours_us"])
    assert "## faiss, hnswlib, usearch" in (SCRIPTS / "README.md").read_text()
    assert "brute force" in capsys.readouterr().out
    assert any("of own best 100" in line for line in nearest._tables([result]))
    assert nearest.main("x", lambda: ({}, peers), [*options[:-3], "no such"]) == 2
    assert "--only: got no such" in capsys.readouterr().err


def test_levels_that_nobody_reaches():
    shared = {"threads": 1, "vectors": "v", "head": "0", "keys": 9, "head_dim": 8, "build_s": 1.0}
    ours = shared | {"method": "m", "setting": "top_k 9", "default": True, "kept": 0.85, "us": 10.0}
    slow, fast = (
        shared | {"peer": "p", "method": "p", "setting": s, "kept": kept, "us": us}
        for s, kept, us in (("slow", 0.99, 90.0), ("fast", 0.9, 40.0))
    )
    found = {row["level"]: row for row in nearest.at_levels([ours, slow, fast])}
    assert (found[0.8]["peer_setting"], found[0.8]["times_ours"]) == ("fast", 4.0)
    assert "times_ours" not in found[0.9] and found[0.95]["peer_setting"] == "slow"
    assert nearest.at_levels([ours, fast])[-1]["missing"] == "the peer: 0.900 at most"


def test_nearest_libraries_that_are_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert nearest.main("ann", script("ann").load, ["--quick", "--vectors", "synthetic"]) == 2
    assert "pip install faiss-cpu hnswlib usearch" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["faiss", "hnswlib", "usearch"])
def test_nearest_libraries_find_the_best(library, rng):
    pytest.importorskip(library)
    for package in ("faiss", "hnswlib", "usearch"):
        pytest.importorskip(package)
    keys, queries = rng.standard_normal((2, 2000, 16), dtype=np.float32)
    _, peers = script("ann").load()
    for peer in peers:
        if library not in peer.name:
            continue
        search = peer.build(keys, 1)[-1]
        for query in queries[:5]:
            rows = np.asarray(search.rows(query))
            best = np.argsort(keys @ query)[-100:]
            assert np.isin(best, rows).mean() > 0.9, peer.name


GROWTH = ("--vectors", "synthetic", "--ways", "2 bits,exact scan,of 64", "--error", "0.2")


def test_growth_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    file = tmp_path / "growth.json"
    timed, stop_at = growth._Case._timed, [3]

    def interrupted(self, *given):
        stop_at[0] -= 1
        if stop_at[0] < 0:
            raise KeyboardInterrupt
        return timed(self, *given)

    monkeypatch.setattr(growth._Case, "_timed", interrupted)
    common = ["--quick", "--rounds", "2", "--threads", "1", "--json", str(file)]
    assert cli.main(["bench", "growth", *common, *GROWTH]) == 130
    partly = json.loads(file.read_text())
    assert sum(row["ms"] is not None for row in partly["rows"]) == 3
    monkeypatch.setattr(growth._Case, "_timed", timed)
    result = run("growth", tmp_path, *GROWTH)
    assert result["rows"][: len(partly["rows"])] == partly["rows"], "what was there is not run again"
    rows = {(row["method"], row["keys"]): row for row in result["rows"]}
    ways = ("signatures, 2 bits", "exact scan", "clusters of 64")
    assert rows.keys() == {(way, keys) for way in ways for keys in growth.QUICK_LENGTHS}
    for row in rows.values():
        if row["ms"] is not None:
            assert row["error_v"] <= 0.2 and 0 < row["rows_read"] < 0.3 and row["exact_ms"] > 0
    assert rows["signatures, 2 bits", 8192]["ms"] > 0
    lines = {line["method"]: line["slope"] for line in result["slopes"]}
    assert "signatures, 2 bits" in lines
    assert [line["slope"] for line in result["best_slopes"]] == [lines["clusters of 64"]]
    assert run("growth", tmp_path, *GROWTH)["rows"] == result["rows"]
    assert "there already" in capsys.readouterr().err
    assert any("| signatures, 2 bits |" in line for line in growth._tables([result]))
    assert cli.main(["bench", "growth", *common, *GROWTH[:-1], "0.3"]) == 2
    assert "holds a run with other settings" in capsys.readouterr().err


def test_growth_says_what_was_not_run(tmp_path):
    options = ("--vectors", "synthetic", "--heads", "0", "--ways", "exact scan,graph of keys")
    result = run("growth", tmp_path, *options, "--error", "1e-9", "--build-limit", "1e-9")
    reasons = {(row["method"], row["keys"]): row["reason"] for row in result["rows"]}
    assert reasons["exact scan", 4096].startswith("error 0.") and "25% of the rows" in reasons["exact scan", 4096]
    assert "to build, at 4096 keys it was" in reasons["graph of keys", 8192]
    assert result["slopes"] == [] and all(row["ms"] is None for row in result["rows"])


def test_growth_finds_the_smallest_budget(monkeypatch):
    case = object.__new__(growth._Case)
    case.args = type("Args", (), {"most": 0.25, "error": 0.1})()
    case.data = range(100_000)
    asked = []

    def error(built, top_k):
        asked.append(top_k)
        return 0.1 * (777 / top_k) ** 0.5

    case._error = error
    top_k, found = case._budget(None)
    assert 777 <= top_k < 1.1 * 777 and found <= 0.1
    case.args.error = 1e-3
    assert case._budget(None)[0] is None
    case.args.error = 10
    assert case._budget(None)[0] == growth.LEAST


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--error", "0"], "--error: got 0.0"),
        (["--most", "1.5"], "--most: got 1.5"),
        (["--ways", "no such"], "ways: got 'no such'"),
    ],
)
def test_growth_refuses(options, complaint, capsys):
    assert cli.main(["bench", "growth", "--quick", *options]) == 2
    assert complaint in capsys.readouterr().err


def test_compare(tmp_path):
    options = ("--vectors", "synthetic", "--heads", "0", "--ways", "4 bits,exact scan")
    result = run("compare", tmp_path, *options)
    rows = {row["method"]: row for row in result["rows"]}
    assert rows["exact scan"]["recall"] == 1 and rows["longattn.attention"]["faster_than_exact"] == 1
    assert rows["signatures, 4 bits"]["error_v"] < rows["signatures, 4 bits, rows only"]["error_v"]
    assert all(row["rows_read"] == pytest.approx(0.02, abs=1e-3) for row in rows.values() if "rows_read" in row)


def test_compare_what_has_no_budget_and_what_was_asked(tmp_path):
    """Samples and promises stand beside the others; accuracies of a recorded demo join them by name."""
    options = ("--vectors", "synthetic", "--heads", "0", "--ways", "sampled,verified,radius,landmarks,S3")
    result = run("compare", tmp_path, *options)
    rows = {row["method"]: row for row in result["rows"] if "error_v" in row}
    assert {way.name for way in FURTHER} < rows.keys() | {"LSH tables, sampled"}
    assert rows["verified, 0.05 of the values"]["error_v_p95"] < 0.05
    assert rows["verified, 0.1 of the output"]["error_o_p95"] < 0.1
    assert rows["signatures, sampled"]["rows_read"] < 0.03
    (section,) = compare.SECTIONS
    assert "needles" not in "".join(section.tables([result]))
    asked = {"retrieval": 0.9, "signatures, sampled": 0.25}
    demo = [{"keys": 4096, "method": name, "accuracy_of_exact": found} for name, found in asked.items()]
    demo += [
        {"keys": 512, "method": "pages of 16, radius", "accuracy_of_exact": 0.75},
        {"keys": 4096, "method": "sdpa"},
    ]
    lines = section.tables([result, {"routine": "demo", "rows": demo}])
    (line,) = [line for line in lines if line.startswith("| signatures, sampled ")]
    assert line.rstrip(" |").endswith("0.25") and not any("0.75 |" in line for line in lines if "radius" in line)
    assert compare._needles([{"routine": "demo", "rows": demo}]) == {WAYS[0].name: 0.9, "signatures, sampled": 0.25}


def test_verified_counts_what_was_read_whole(tmp_path):
    """Where a sample that keeps the promise is a third of the rows, all are read, and said to be."""
    options = ("--vectors", "synthetic-flat", "--heads", "0", "--length")
    short, longer = (run("verified", tmp_path, *options, n)["rows"] for n in ("1200", "16384"))
    for row in short:
        assert row["dense"] == 1 and row["rows"] == 1 and row["violations"] == row["violations_over_delta"] == 0
    tight, wide = (
        [row for row in longer if row["epsilon"] == e and row["relative_to"] == "output"] for e in (0.05, 0.2)
    )
    assert all(0 < row["dense"] <= row["rows"] for row in tight)
    assert all(row["dense"] < 0.1 and row["rows"] < 0.5 for row in wide)


def test_the_best_slope_is_over_all_lengths():
    def row(method, keys, ms):
        return {"threads": 1, "vectors": "v", "method": method, "keys": keys, "ms": ms}

    rows = [row("Quest", n, ms) for n, ms in ((10, 1.0), (100, 1.0), (1000, None))]
    rows += [row("clusters of 16", n, n**0.4) for n in (10, 100, 1000)]
    rows += [row("signatures, 4 bits", n, n**0.1) for n in (10, 100, 1000)]
    (best,) = growth._figures(rows)["best_slopes"]
    assert best["method"] == "clusters of 16" and best["slope"] == pytest.approx(0.4)
