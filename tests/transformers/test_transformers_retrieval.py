"""Decoding that reads a part of the keys."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.19")

import longattn as la  # noqa: E402
from longattn.index import by_name  # noqa: E402
from longattn.transformers import LongAttnCache, RetrievalConfig  # noqa: E402
from longattn.transformers.sequence import ReadCounts, ScoreOptions, Sequence  # noqa: E402
from transformers import DynamicCache  # noqa: E402

WITHOUT_SOFTCAP = ("llama", "qwen3", "smollm3", "gpt_oss")


def prompts(batch: int, length: int) -> Any:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", WITHOUT_SOFTCAP)
@pytest.mark.parametrize(
    "arguments", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["plain", "beams", "lookup"]
)
def test_all_keys_selected_equals_dense(build_model: Any, generate: Any, name: str, arguments: dict[str, int]) -> None:
    model = build_model(name)
    input_ids = prompts(1, 600)  # long enough for keys to have signatures
    expected = generate(model, "eager", DynamicCache(config=model.config), input_ids, **arguments)
    how = RetrievalConfig(top_k=4096, sinks=1, window=4, min_length=0)
    cache = LongAttnCache(model.config, retrieval=how)
    got = generate(model, "longattn", cache, input_ids, **arguments)
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    stats = cache.stats()
    assert stats.keys_read == stats.keys_visible > 0
    assert all((layer.index_nbytes > 0) == (layer.sliding_window is None) for layer in stats.layers)


@pytest.mark.parametrize("name", WITHOUT_SOFTCAP)
def test_reads_a_part_and_stays_close(build_model: Any, name: str) -> None:
    model = build_model(name)
    text = prompts(2, 1500)
    mask = torch.ones_like(text)
    mask[0, :200] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def logits(retrieval: RetrievalConfig | None) -> tuple[Any, Any]:
        model.set_attn_implementation("longattn")
        cache = LongAttnCache(model.config, retrieval=retrieval)
        with torch.no_grad():
            for start in range(0, 1480, 370):
                stop = start + 370
                model(
                    text[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                )
            steps = [
                model(
                    text[:, i : i + 4],
                    attention_mask=mask[:, : i + 4],
                    position_ids=positions[:, i : i + 4],
                    past_key_values=cache,
                ).logits
                for i in range(1480, 1500, 4)
            ]
        return torch.cat(steps, dim=1), cache.stats()

    exact, exact_stats = logits(None)
    assert exact_stats.fraction_read == 1.0 and exact_stats.keys_visible > 0
    got, stats = logits(RetrievalConfig(top_k=128, window=64, min_length=0))
    only_window, _ = logits(RetrievalConfig(top_k=1, window=64, rest="none", min_length=0))
    full = [layer for layer in stats.layers if layer.sliding_window is None]
    assert all(0 < layer.fraction_read < 0.2 for layer in full)
    assert all(layer.fraction_read == 1.0 for layer in stats.layers if layer.sliding_window is not None)
    error, window_error = ((part - exact).norm() / exact.norm() for part in (got, only_window))
    assert 0 < error < 0.5 * window_error
    assert all(0 < layer.missed_mass < 1 for layer in full)


def test_per_layer_choice_min_length_and_prefill_stay_exact(build_model: Any) -> None:
    model = build_model("llama")
    model.set_attn_implementation("longattn")
    how = RetrievalConfig(top_k=8, window=8, min_length=1000)
    cache = LongAttnCache(model.config, retrieval={1: how, 2: None})
    text = prompts(1, 1100)
    with torch.no_grad():
        model(text[:, :600], past_key_values=cache)
        model(text[:, 600:601], past_key_values=cache)  # a decoding step, too short for retrieval
        assert cache.stats().fraction_read == 1.0
        model(text[:, 601:1099], past_key_values=cache)  # long enough, but prefill
        assert cache.stats().fraction_read == 1.0
        model(text[:, 1099:], past_key_values=cache)
    read = [layer.fraction_read for layer in cache.stats().layers]
    assert read[0] == read[2] == read[3] == 1.0 and read[1] < 0.6  # of 601 and 1100 keys all and a few


def test_budgets_by_error(build_model: Any) -> None:
    """A prefill chooses budgets of each layer and head; a small error reads more than a large one, and is nearer."""
    model = build_model("llama")
    model.set_attn_implementation("longattn")
    text = prompts(1, 1500)

    def logits(retrieval: RetrievalConfig | None) -> tuple[torch.Tensor, Any, list[Any]]:
        cache = LongAttnCache(model.config, retrieval=retrieval)
        with torch.no_grad():
            model(text[:, :1450], past_key_values=cache)
            steps = [model(text[:, i : i + 1], past_key_values=cache).logits for i in range(1450, 1460)]
        budgets = [sequence.budgets for layer in cache.layers for sequence in layer.sequences]
        return torch.cat(steps, dim=1), cache.stats(), budgets

    exact, _, none = logits(None)
    assert none == [None] * 4
    found = {}
    for error in (0.2, 0.002):
        how = RetrievalConfig(error=error, window=64, rest="none", min_length=0)
        got, stats, budgets = logits(how)
        heads = model.config.num_key_value_heads
        assert all(len(rows) == heads and min(rows) >= 16 for rows in budgets)
        found[error] = ((got - exact).norm() / exact.norm()).item(), stats.fraction_read
    assert found[0.002][0] < found[0.2][0]
    assert found[0.002][1] > found[0.2][1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"epsilon": 0.3, "delta": 0.1, "relative_to": "values", "seed": 3},
        {"rest": "sampled", "top_k": 200, "seed": 3},
        {"rest": "sampled", "error": 0.1, "seed": 3},
    ],
    ids=str,
)
def test_samples(build_model: Any, arguments: dict[str, Any]) -> None:
    """A step with an epsilon, or with a sampled rest, is that of `retrieval_attention` with the same seed."""
    rng = np.random.default_rng(0)
    store = la.KVStore(kv_heads=2, head_dim=16, dtype="float32", capacity=9000)
    store.append(*(0.5 * rng.normal(size=(2, 2, 8000, 16))).astype(np.float32))
    query = torch.from_numpy(rng.normal(size=(4, 40, 16)).astype(np.float32))
    sequence = Sequence(store, None, RetrievalConfig(window=64, **arguments))
    options = ScoreOptions(scale=0.25, softcap=0.0, sinks=None)
    counts, out = ReadCounts(), torch.empty(4, 40, 16)
    sequence.attend(query, options, decode=False, dense=None, counts=counts, out=out)
    exact = out[:, -1:].clone()
    sequence.attend(query[:, -1:], options, decode=True, dense=None, counts=counts, out=out[:, -1:])
    index = la.index.Signatures(store)
    direct = {name: given for name, given in arguments.items() if name != "error"}
    if "error" in arguments:
        direct["top_k"] = sequence.budgets
    expected = la.retrieval_attention(query[:, -1:], store, index, scale=0.25, window=64, **direct)
    assert torch.equal(out[:, -1:], expected.out)
    other = la.retrieval_attention(query[:, -1:], store, index, scale=0.25, window=64, **direct | {"seed": 4})
    assert not torch.equal(other.out, expected.out)
    assert expected.stats is not None and (expected.stats.keys_sampled > 0).all()
    assert counts.keys_read == expected.stats.keys_attended.sum() < counts.keys_visible == 16_000
    assert (out[:, -1:] - exact).norm(dim=-1).max() <= 0.3 * 0.5 * 4


def test_kinds_that_weigh_rows() -> None:
    rng = np.random.default_rng(0)
    store = la.KVStore(kv_heads=1, head_dim=16, dtype="float32", capacity=100)
    store.append(*rng.normal(size=(2, 1, 60, 16)).astype(np.float32))
    kinds = [kind for kind in by_name.KINDS if not by_name.needed(kind)]
    weighing = {kind for kind in kinds if by_name.make(kind, store).weighs_rows}
    assert weighing == by_name.WEIGH_ROWS and len(kinds) >= len(by_name.KINDS) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 4, "top_p": 0.5}, "one of the two"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1e-60}, "top_p: got 1e-60, expected a number between 0 and 1"),
        ({"top_p": 1 - 1e-12}, "top_p: got 0.999"),
        ({"top_p": 1.0}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_k": 4, "index": "none"}, "index: got 'none', expected 'signatures', "),
        ({"top_k": 4, "rest": "some"}, "rest"),
        ({"top_k": 4, "error": 0.1}, "error: got 0.1 beside"),
        ({"top_p": 0.4, "error": 0.1}, "error: got 0.1 beside"),
        ({"error": 0.0}, "error: got 0.0"),
        ({"error": float("nan")}, "error: got nan"),
        ({"error": 1e39}, "error: got 1e.39, expected a finite float32"),
        ({"epsilon": 0.0}, "epsilon: got 0.0"),
        ({"epsilon": 0.1, "top_k": 4}, "epsilon: got 0.1 beside top_k=4"),
        ({"epsilon": 0.1, "top_p": 0.4}, "epsilon: got 0.1 beside top_p=0.4"),
        ({"epsilon": 0.1, "rest": "none"}, "epsilon: got 0.1 beside rest='none'"),
        ({"epsilon": 0.1, "error": 0.1}, "error: got 0.1 beside epsilon=0.1"),
        ({"epsilon": 0.1, "delta": 1.0}, "delta: got 1.0"),
        ({"epsilon": 0.1, "relative_to": "keys"}, "relative_to: got 'keys', expected 'output', 'values' or None"),
        ({"epsilon": 0.1, "index": "pages"}, "epsilon: got 0.1 with pages that weigh no single rows"),
        ({"delta": 0.1}, "delta: got 0.1 without epsilon"),
        ({"relative_to": "values"}, "relative_to: got 'values' without epsilon"),
        ({"rest": "sampled", "top_p": 0.4}, "rest: got 'sampled' with top_p"),
        ({"rest": "sampled", "index": "hashes"}, "rest: got 'sampled' with hashes that weigh no single rows"),
        ({"seed": -1}, "seed: got -1"),
        ({"top_k": 4, "window": -1}, "window"),
        ({"top_k": 4, "sinks": -1}, "sinks"),
        ({"index": ["pages"]}, r"index: got \['pages'\], expected 'signatures', "),
    ],
)
def test_config_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetrievalConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": True}, "top_k: got True, expected an integer"),
        ({"top_k": [4]}, "top_k: got .4., expected an integer"),
        ({"top_p": "0.5"}, "top_p: got '0.5', expected a number"),
        ({"error": "small"}, "error: got 'small', expected a number"),
        ({"error": True}, "error: got True, expected a number"),
        ({"sinks": None}, "sinks: got None, expected an integer"),
        ({"top_k": 4, "min_length": 1.5}, "min_length: got 1.5, expected an integer"),
    ],
)
def test_config_refuses_other_kinds(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        RetrievalConfig(**arguments)


def test_config_takes_integers_of_numpy_and_any_size() -> None:
    how = RetrievalConfig(top_k=np.int64(5), window=np.int32(64), sinks=2**70)
    assert (how.top_k, how.window, how.sinks) == (5, 64, 2**70)


def test_config_refuses_parameters_of_another_index() -> None:
    with pytest.raises(TypeError, match="parameters: got int, expected a mapping"):
        RetrievalConfig(parameters=5)
    with pytest.raises(TypeError, match="pages"):
        RetrievalConfig(top_k=4, parameters={"pages": 3})


def test_retrieval_refuses_what_it_cannot_do(build_model: Any) -> None:
    how = RetrievalConfig(top_k=4, min_length=0)
    gemma = build_model("gemma2")
    gemma.set_attn_implementation("longattn")
    with torch.no_grad(), pytest.raises(ValueError, match="softcap"):
        gemma(prompts(1, 5), past_key_values=LongAttnCache(gemma.config, retrieval=how))
    smollm3 = build_model("smollm3")
    with pytest.raises(ValueError, match="full-attention"):
        LongAttnCache(smollm3.config, retrieval={1: how})
    with pytest.raises(TypeError, match="retrieval"):
        LongAttnCache(smollm3.config, retrieval=8)  # type: ignore[arg-type]
    llama = build_model("llama")
    llama.set_attn_implementation("longattn")
    cache = LongAttnCache(llama.config, retrieval=how)
    with torch.no_grad():
        llama(prompts(1, 5), past_key_values=cache)
        with pytest.raises(ValueError, match="4-D"):
            llama(prompts(1, 1), attention_mask=torch.ones(1, 1, 1, 6, dtype=torch.bool), past_key_values=cache)


def test_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parents[2] / "examples" / "generate_transformers.py"
    monkeypatch.setattr("sys.argv", [example.name, "--context", "6000", "--questions", "3", "--top-k", "32"])
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("code for") == 3 and printed.count("  right  ") >= 2
    assert "of the keys read" in printed
