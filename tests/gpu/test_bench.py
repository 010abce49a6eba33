"""`longattn bench gpu`: its cases run on the emulator, and without a GPU the command says what is missing."""

import numpy as np
import pytest

from emu import emulator
from emu.device import EmulatorDevice
from longattn import cli
from longattn.bench import gpu
from longattn.bench.harness import Bench
from longattn.bench.tables import table


@pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64")
def test_every_case_runs_and_counts():
    bench = Bench(threads=None, rounds=1, budget_s=1, quick=True, peers=False)
    device = EmulatorDevice()
    runner = gpu.Runner(device, device.contiguous, gpu.wall_seconds, lambda q, k, v, causal: lambda: None)
    rows = gpu.cases(bench, runner, gpu.QUICK)
    found = {row["case"].split(",")[0]: row for row in rows}
    assert list(found) == [
        "device copy",
        "decode",
        "scan and top-k",
        "attention to listed rows",
        "prefill",
        "block-sparse",
    ]
    decode = found["decode"]
    assert decode["gb_s"] == pytest.approx(4 * 2 * 300 * 64 / decode["ms"] / 1e6)
    assert decode["vs_torch"] == pytest.approx(decode["torch_ms"] / decode["ms"])
    assert found["prefill"]["tflop_s"] == pytest.approx(2 * 4 * 64 * 100 * 101 / found["prefill"]["ms"] / 1e9)
    assert {name.split("_")[0] for name in device.started} == {"decode", "merge", "hash", "prefill"}
    assert len(table(rows, gpu.COLUMNS)) == 2 + len(rows)


def test_random_blocks_have_the_density_they_say(rng):
    starts, blocks, density = gpu.random_blocks(rng, 2, 1000, 128)
    assert starts.shape == (1, 2, 9) and starts[0, 0, 0] == 0 and starts[0, 1, -1] == len(blocks)
    assert starts[0, 0, -1] == starts[0, 1, 0]
    for first, end in zip(starts[0, :, :-1].ravel(), starts[0, :, 1:].ravel(), strict=True):
        assert (np.diff(blocks[first:end]) > 0).all() and (end - first) / 16 == density


def test_without_a_gpu_the_command_says_what_is_missing(capsys):
    try:
        import cupy
    except ImportError:
        expected = "pip install 'longattn[gpu]'"
    else:
        if cupy.is_available():
            pytest.skip("there is a GPU")
        expected = "no GPU"
    assert cli.main(["bench", "gpu", "--quick"]) == 2
    assert expected in capsys.readouterr().err
