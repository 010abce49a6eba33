"""Calls on torch's threads: when they are, and that nothing but the time depends on it."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch's threads are asked on Linux alone")

SETTINGS = ("LONGATTN_NUM_THREADS", "LONGATTN_OPENMP", "OMP_NUM_THREADS")
OWNER = "print(la.show_config()['threads_of'])\n"
ATTEND = """
import numpy as np, threading
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((n, l, 64), dtype=np.float32) for n, l in ((8, 1), (2, 3000), (2, 3000)))
def attend():
    return la.attention(q, k, v)
"""


def run(code, **variables):
    """What a fresh interpreter prints, of `OMP_NUM_THREADS` 2 unless said otherwise."""
    env = {name: x for name, x in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", "import longattn as la\n" + code],
        env=env | {"OMP_NUM_THREADS": "2"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_they_are_asked_once_torch_is_there():
    assert run(f"{OWNER}import torch\n{OWNER}{ATTEND}attend()\n{OWNER}") == ["longattn", "torch", "torch"]


@pytest.mark.parametrize(
    ("code", "variables", "owner"),
    [
        ("", {"LONGATTN_OPENMP": "0"}, "longattn"),
        ("", {"LONGATTN_NUM_THREADS": "3"}, "longattn"),
        ("", {"LONGATTN_NUM_THREADS": "2"}, "torch"),
        ("la.set_num_threads(3)", {}, "longattn"),
        ("la.set_num_threads(2)", {}, "torch"),
        # As many as torch has, where nobody asked for another number.
        ("torch.set_num_threads(3)", {}, "torch"),
        ("torch.set_num_threads(1)", {}, "longattn"),
    ],
)
def test_whose_threads(code, variables, owner):
    assert run(f"import torch\n{code}\n{OWNER}", **variables) == [owner]


def test_the_bits_are_the_same():
    code = f"import torch\n{ATTEND}\ntorch.ones(1000, 1000).sum()\nprint(attend().tobytes().hex())"
    shared, own = (run(code, LONGATTN_OPENMP=x) for x in "10")
    assert shared == own


def test_other_threads_use_our_own():
    code = f"""
import torch
{ATTEND}
expected, found = attend(), []
def other():
    found.append((la.show_config()["threads_of"], (attend() == expected).all()))
threads = [threading.Thread(target=other) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(*sorted(set(found))[0], len(found))
"""
    assert run(code) == ["longattn", "True", "4"]


def test_a_forked_child_does_not_wait_for_threads_that_it_has_not():
    code = f"""
import os, torch
{ATTEND}
torch.ones(1000, 1000).sum()
expected = attend()
child = os.fork()
if child == 0:
    os._exit(0 if la.show_config()["threads_of"] == "longattn" and (attend() == expected).all() else 1)
print(os.waitpid(child, 0)[1], la.show_config()["threads_of"], (attend() == expected).all())
"""
    assert run(code) == ["0", "torch", "True"]


def test_an_error_between_two_calls():
    code = f"""
import torch
{ATTEND}
expected = attend()
try:
    la.attention(q, k[:, :, :32], v)
except ValueError as error:
    print("refused")
print((attend() == expected).all())
"""
    assert run(code) == ["refused", "True"]
