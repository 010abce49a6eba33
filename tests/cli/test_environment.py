"""Variables of the environment that say what to run on."""

import os
import subprocess
import sys

import pytest

from longattn import _core

CODE = "import longattn as la; print(la.get_num_threads())"


def run(**variables):
    env = {name: x for name, x in os.environ.items() if name not in ("LONGATTN_NUM_THREADS", "OMP_NUM_THREADS")}
    return subprocess.run(
        [sys.executable, "-c", CODE], env=env | variables, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("name", ["foo", "avx1024", "\udcff"], ids=ascii)
def test_an_unknown_instruction_set(name):
    done = run(LONGATTN_ISA=name)
    assert done.returncode != 0
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ValueError: LONGATTN_ISA: got ")
    assert message.endswith(f"expected one that this CPU has: {', '.join(_core.available_isas())}")


def test_a_known_instruction_set():
    for name in (_core.available_isas()[0], " ", ""):
        done = run(LONGATTN_ISA=name)
        assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("count", ["abc", "0", "-1", "2.5", "4097", "2,2"])
def test_what_is_no_number_of_threads(count):
    done = run(LONGATTN_NUM_THREADS=count, OMP_NUM_THREADS="1")
    assert done.returncode == 0 and done.stdout == "1\n"
    (line,) = (line for line in done.stderr.splitlines() if "RuntimeWarning" in line)
    assert f'LONGATTN_NUM_THREADS: got "{count}", expected a number of threads, 1 to 4096; it is passed over' in line


@pytest.mark.parametrize(("count", "threads"), [("3", 3), (" 2 ", 2), ("", 1)])
def test_a_number_of_threads(count, threads):
    done = run(LONGATTN_NUM_THREADS=count, OMP_NUM_THREADS="1")
    assert done.stdout == f"{threads}\n" and not done.stderr


def test_the_warning_may_be_an_error():
    done = run(LONGATTN_NUM_THREADS="abc", PYTHONWARNINGS="error")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("RuntimeWarning: LONGATTN_NUM_THREADS: got ")
