"""Steps of a batch over two memories, side by side: the device does its part of all while the host does its of each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.19")

import tolerances  # noqa: E402
from emu import emulator  # noqa: E402
from emu.device import EmulatorDevice  # noqa: E402
from emu.traced import WAITS, Traced, watch_merges  # noqa: E402
from longattn.gpu import Costs, _costs  # noqa: E402
from longattn.gpu._costs import Line  # noqa: E402
from longattn.reference import dense as reference  # noqa: E402
from longattn.transformers import DeviceConfig, LongAttnCache  # noqa: E402
from longattn.transformers.sequence import ScoreOptions  # noqa: E402
from transformers import DynamicCache  # noqa: E402

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64")

_SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
_PROMPT, _WINDOW, _SINKS = 40, 16, 2


@pytest.fixture
def merged(monkeypatch: Any) -> None:
    watch_merges(monkeypatch)


class Batch:
    """Rows of a few sequences, which one layer gets piece by piece."""

    def __init__(self, build_model: Any, device: Any, sequences: int, dtype: Any = torch.float32, **how: Any) -> None:
        sizes = {"sinks": _SINKS, "window": _WINDOW, "top_k": 512, "index": "flat", **how}
        config = build_model("llama", num_hidden_layers=2, **_SIZES).config
        self.cache = LongAttnCache(config, device=DeviceConfig(device=device, **sizes))
        self.layers = self.cache.layers
        drawn = torch.Generator().manual_seed(5)
        self.q = torch.randn(sequences, 2, _PROMPT + 20, 64, generator=drawn).to(dtype)
        self.k, self.v = (torch.randn(sequences, 1, _PROMPT + 20, 64, generator=drawn).to(dtype) for _ in "kv")
        self.at = 0

    def attend(self, count: int, layer: int = 0) -> Any:
        """The next rows' attention `[B, count, Hq, D]`."""
        rows = slice(self.at, self.at + count)
        self.layers[layer].update(self.k[:, :, rows], self.v[:, :, rows])
        options = ScoreOptions(scale=0.125, softcap=0.0, sinks=None)
        return self.layers[layer].attend(self.q[:, :, rows], None, options)

    def step(self, count: int) -> None:
        """The same, checked."""
        out = self.attend(count)
        end = self.at = self.at + count
        q, k, v = (_numbers(x) for x in (self.q[:, :, end - count : end], self.k[:, :, :end], self.v[:, :, :end]))
        expected = reference.attention(q, k, v, causal=True)
        tolerances.device_attention(q, k, v).check(_numbers(out.transpose(1, 2)), expected)


def _numbers(x: Any) -> Any:
    from longattn._arrays import as_numpy

    return np.array(as_numpy(x.contiguous(), "x"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_of_a_batch_are_side_by_side(build_model: Any, merged: None, dtype: Any) -> None:
    """All sequences' queries are on their way, and their parts on the device, before the host waits for the first."""
    device = Traced()
    batch = Batch(build_model, device, 3, dtype)
    batch.step(_PROMPT)
    assert not device.waits and not device.places  # prompts need nothing of the host
    for _ in range(4):
        device.started.clear()
        before = len(device.waits)
        batch.step(1)
        parts = [name for name in device.started[: device.started_before[before]] if name.startswith("decode")]
        assert len(parts) == 3
        assert all(name.startswith("merge") for name in device.started[device.started_before[before] :])
    # A place for each query under way; those of partial results are free again before the next but one is sent.
    assert len(device.places) == 3 + 2 + 2 and not device.races()


@pytest.mark.parametrize("without", WAITS)
def test_a_missing_wait_is_a_race(build_model: Any, merged: None, without: str) -> None:
    device = Traced(without)
    batch = Batch(build_model, device, 3)
    for count in (_PROMPT, 1, 1, 1):
        batch.attend(count)
        batch.at += count
    assert device.races()


@pytest.mark.parametrize("sequences", [1, 2])
def test_candidate_tokens(build_model: Any, merged: None, sequences: int) -> None:
    """Several rows of a sequence are steps one after another; meanwhile the other sequence's are under way."""
    device = Traced()
    batch = Batch(build_model, device, sequences)
    for count in (_PROMPT, 3, 1, 4):
        batch.step(count)
    assert len(device.places) == 6 and not device.races()


def test_layers_share_places(build_model: Any, merged: None) -> None:
    device = Traced()
    batch = Batch(build_model, device, 2)
    for count in (_PROMPT, 1, 1, 1):
        batch.attend(count, 1)
        batch.step(count)
    assert len(device.places) == 6 and not device.races()


def test_generation(build_model: Any, generate: Any, merged: None) -> None:
    """A batch, as transformers' own attention and cache."""
    device = Traced()
    model = build_model("llama", num_hidden_layers=2, **_SIZES)
    how = DeviceConfig(device=device, sinks=_SINKS, window=_WINDOW, top_k=512, index="flat")
    input_ids = torch.randint(2, 97, (3, 30), generator=torch.Generator().manual_seed(3))
    expected = generate(model, "eager", DynamicCache(config=model.config), input_ids, max_new_tokens=4)
    got = generate(model, "longattn", LongAttnCache(model.config, device=how), input_ids, max_new_tokens=4)
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    assert device.places and not device.races()


class TestCosts:
    def test_they_are_measured_once(self, build_model: Any, monkeypatch: Any) -> None:
        """For all layers and sequences."""
        measured = []

        def measure(device: Any, q: Any, keys: Any) -> Costs:
            measured.append(device)
            return Costs(host=Line(1.0, 1e9), gather=Line(1e-6, 1e12), scan=Line(1e-6, 1e12))

        monkeypatch.setattr(_costs, "measure", measure)
        device = EmulatorDevice()
        batch = Batch(build_model, device, 2, reads="auto")
        for count in (_PROMPT, 1):
            batch.attend(count, 1)
            batch.step(count)
        assert measured == [device]

    @pytest.mark.parametrize("gathers", [True, False])
    def test_they_choose_the_way(self, build_model: Any, gathers: bool) -> None:
        device = Traced()
        slow, fast = Line(1.0, 1e9), Line(1e-6, 1e12)
        costs = Costs(slow, fast, fast) if gathers else Costs(fast, slow, fast)
        batch = Batch(build_model, device, 2, reads="auto", costs=costs)
        for count in (_PROMPT, 1, 1):
            batch.step(count)
        assert bool(device.places) != gathers  # of queries for the host
