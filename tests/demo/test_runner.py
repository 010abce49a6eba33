"""The numpy runner: transformers' logits, in chunks as in one piece, after a rewind as before it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longattn.demo import text
from longattn.demo.runner import (
    MODEL,
    Model,
    PrefillReader,
    Reader,
    RetrievalReader,
    Session,
    WindowReader,
    read_all,
    read_safetensors,
)
from longattn.retrieval.ways import WAYS, Way

LENGTH = 1500
# Logits reach about 20. Another order of float32 sums moves most of them by 1e-5, and some by a few 1e-4
# where a sharp softmax is close to a tie.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return text.haystack(LENGTH, 4, seed=5).tokens


@pytest.fixture(scope="module")
def whole(model: Model, tokens: np.ndarray) -> np.ndarray:
    return Session(model, LENGTH).forward(tokens, read_all)


def test_weights_load_in_transformers_with_the_same_logits(tokens: np.ndarray, whole: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peer, loading = transformers.SmolLM3ForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        logits = peer.eval()(torch.from_numpy(tokens)[None]).logits[0].numpy()
    assert np.abs(logits).max() > 5
    np.testing.assert_allclose(whole, logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_chunks_give_the_logits_of_the_whole(model: Model, tokens: np.ndarray, whole: np.ndarray, chunk: int) -> None:
    session = Session(model, LENGTH)
    last = max(0, LENGTH - 5 * chunk)
    if last:
        session.forward(tokens[:last], read_all)
    logits = np.concatenate(
        [session.forward(tokens[start : start + chunk], read_all) for start in range(last, LENGTH, chunk)]
    )
    np.testing.assert_allclose(logits, whole[last:], rtol=0, atol=TOLERANCE)


def test_rewind_forgets_what_came_after(model: Model, tokens: np.ndarray) -> None:
    session = Session(model, LENGTH)
    session.forward(tokens[:1000], read_all)
    mark = session.mark()
    first = session.forward(tokens[1000:1020], read_all)
    session.rewind(mark)
    session.forward(tokens[1200:1300], read_all)
    session.rewind(mark)
    assert all(len(store) == 1000 for store in session.stores.values())
    np.testing.assert_array_equal(session.forward(tokens[1000:1020], read_all), first)


def continued(model: Model, tokens: np.ndarray, reader: Reader | Way, **options: int) -> np.ndarray:
    """Logits of the last 20 tokens, read by `reader`, after an exact prefill of all others."""
    session = Session(model, LENGTH)
    prefill = PrefillReader()
    session.forward(tokens[:-20], prefill)
    if isinstance(reader, Way):
        reader = RetrievalReader(session.stores, prefill, reader, **options)
    return session.forward(tokens[-20:], reader)


@pytest.mark.parametrize("way", [way for way in WAYS if way.kind != "lsh"], ids=lambda way: way.name)
def test_retrieval_of_all_keys_is_exact(model: Model, tokens: np.ndarray, whole: np.ndarray, way: Way) -> None:
    # LSH tables sample, whatever the budget.
    logits = continued(model, tokens, way, top_k=LENGTH, sinks=4, window=32)
    np.testing.assert_allclose(logits, whole[-20:], rtol=0, atol=TOLERANCE)


def test_window_that_misses_four_keys_differs_and_a_wider_one_less(
    model: Model, tokens: np.ndarray, whole: np.ndarray
) -> None:
    def error(window: int) -> float:
        return float(np.abs(continued(model, tokens, WindowReader(sinks=4, window=window)) - whole[-20:]).max())

    assert TOLERANCE < error(LENGTH - 30) < error(64)


def test_window_as_long_as_the_store_is_refused(model: Model, tokens: np.ndarray) -> None:
    with pytest.raises(ValueError, match="window"):
        continued(model, tokens, WindowReader(sinks=4, window=LENGTH))


def test_safetensors_reader_agrees_with_the_library() -> None:
    loader = pytest.importorskip("safetensors.torch")
    ours, theirs = (
        read_safetensors(MODEL / "model.safetensors"),
        loader.load_file(MODEL / "model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name].float().numpy())


def test_weights_are_small() -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 8e6


def test_other_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="smollm3"):
        Model(tmp_path)
