"""`longattn doctor`: its report, what it advises, and that it stays light."""

import copy
import json
import subprocess
import sys

import pytest

from longattn import _core, cli, doctor


@pytest.fixture
def healthy():
    """Facts of a machine with nothing to improve."""
    return {
        "cpu": {
            "model": "A CPU",
            "architecture": "x86_64",
            "logical_cpus": 4,
            "usable_cpus": 4,
            "features": ["avx2"],
        },
        "isa": {"used": "avx2", "available": ["scalar", "avx2"], "LONGATTN_ISA": None},
        "threads": {"used": 4, "LONGATTN_NUM_THREADS": None, "LONGATTN_OPENMP": None},
        "memory": {"total_bytes": 2**34, "available_bytes": 2**33, "transparent_huge_pages": "madvise"},
        "versions": {"longattn": "1"},
        "optional": {"torch": "2.9", "transformers": "5.0", "matplotlib": "3.9", "cupy": None},
        "speed": {
            "read_gb_s_one_thread": 10.0,
            "read_gb_s_all_threads": 20.0,
            "fma_gflop_s_one_thread": 100.0,
            "fma_gflop_s_all_threads": 390.0,
        },
    }


def test_json_report(capsys):
    assert cli.main(["doctor", "--json", "--quick"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["isa"]["used"] == _core.isa()
    assert facts["isa"]["available"] == _core.available_isas()
    assert facts["threads"]["used"] == _core.num_threads()
    assert facts["versions"]["python"] == sys.version.split()[0]
    assert 1 <= facts["cpu"]["usable_cpus"] <= facts["cpu"]["logical_cpus"]
    assert facts["speed"] is None
    assert isinstance(facts["advice"], list)


def test_text_report(capsys):
    assert cli.main(["doctor", "--quick"]) == 0
    text = capsys.readouterr().out
    for line in ("CPU", "instructions", "threads", "memory", "huge pages", "numpy", "torch"):
        assert any(row.startswith(line) for row in text.splitlines()), line


def test_speed_is_measured():
    speed = doctor.measure_speed(1 << 24)
    assert all(value > 0.1 for value in speed.values())
    assert len(speed) == 4


def test_optional_packages_are_found_without_importing_them():
    code = (
        "import sys; from longattn import cli; cli.main(['doctor', '--quick'])\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_nothing_to_improve(healthy):
    assert doctor.advice(healthy) == []
    assert "Nothing to improve." in doctor.as_text(healthy | {"advice": []})


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("isa", {"LONGATTN_ISA": "avx2"}, "LONGATTN_ISA forces avx2; available: scalar, avx2"),
        ("isa", {"used": "scalar"}, "No vector instructions"),
        ("threads", {"used": 2}, "2 of 4 CPUs are used: set LONGATTN_NUM_THREADS"),
        ("threads", {"used": 8}, "8 threads share 4 CPUs"),
        ("threads", {"LONGATTN_OPENMP": "0"}, "LONGATTN_OPENMP=0: calls between torch's operations wait"),
        ("threads", {"LONGATTN_NUM_THREADS": "two"}, "LONGATTN_NUM_THREADS is 'two', which is no number of threads"),
        ("threads", {"LONGATTN_NUM_THREADS": "4097"}, "LONGATTN_NUM_THREADS is '4097', which is no number of threads"),
        ("threads", {"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS is '0', which is no number of threads"),
        (
            "memory",
            {"transparent_huge_pages": "never"},
            "sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        ("speed", {"read_gb_s_all_threads": 11.0}, "read memory hardly faster than one"),
        ("speed", {"fma_gflop_s_all_threads": 150.0}, "do not add up"),
        ("optional", {"torch": None}, r"torch is not installed: pip install 'longattn[torch]'"),
        ("optional", {"matplotlib": None}, r"pip install 'longattn[plot]'"),
    ],
)
def test_advice(healthy, section, change, words):
    facts = copy.deepcopy(healthy)
    facts[section] |= change
    (line,) = doctor.advice(facts)
    assert words in line
    assert line in doctor.as_text(facts | {"advice": [line]})


def test_unknown_memory_and_no_speed(healthy):
    healthy["memory"] = {"total_bytes": None, "available_bytes": None, "transparent_huge_pages": None}
    healthy["speed"] = None
    assert doctor.advice(healthy) == []
    assert "unknown" in doctor.as_text(healthy | {"advice": []})
