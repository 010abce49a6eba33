"""What the README, the other pages and the examples show runs."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from longattn.bench import report, results

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
IMPORT = re.compile(r"^(?:import|from) (torch|transformers)\b", re.MULTILINE)

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
README = BLOCK.findall(TEXT)

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/benchmarks.md",
    "docs/benchmarks-amx.md",
    "docs/benchmarks-avx2.md",
    "docs/index.md",
]

#: Code by page; the pages of methods show what docstrings do, whose examples run elsewhere.
BLOCKS = [
    pytest.param(block, id=f"{page} {n}")
    for page in PAGES
    for n, block in enumerate(BLOCK.findall((ROOT / page).read_text(encoding="utf-8")))
]

#: Every example, with arguments that make it short, and a line of its output.
EXAMPLES = {
    "numpy_attention.py": ([], "two halves merged"),
    "retrieval_numpy.py": (["--length", "8192", "--top-k", "64"], "relative error of the output"),
    "torch_attention.py": ([], "sliding window of 256"),
    "generate_transformers.py": (["--context", "4096", "--questions", "1"], "all layers"),
}


def need(source):
    for package in IMPORT.findall(source):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def run(*arguments):
    env = os.environ | {"LONGATTN_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_shows_each_way_of_use():
    assert [IMPORT.findall(block) for block in README] == [[], [], ["torch"], ["torch"], ["torch", "transformers"]]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_of_pages(block):
    need(block)
    run("-c", block)


def test_the_rust_example_is_the_tested_one():
    crate = (ROOT / "rust/longattn/src/lib.rs").read_text(encoding="utf-8")
    (tested,) = re.findall(r"^//! ```\n(.*?)^//! ```$", crate, re.MULTILINE | re.DOTALL)
    shown = [line.removeprefix("//!").removeprefix(" ") for line in tested.splitlines()]
    (block,) = re.findall(r"^```rust\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert block.splitlines() == [line for line in shown if line != "#" and not line.startswith("# ")]


def test_the_figures_are_those_of_the_results():
    page = report.put_between(TEXT, report.front(results.read_folder(ROOT / "benches/results")), report.FIGURES)
    assert page == TEXT, "run: longattn bench report benches/results --docs docs/benchmarks --readme README.md"


def test_every_example_is_tested():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    path = ROOT / "examples" / name
    need(path.read_text(encoding="utf-8"))
    arguments, shown = EXAMPLES[name]
    assert shown in run(str(path), *arguments)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text)
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not ((ROOT / page).parent / target).exists()] == []


def test_paths_in_the_architecture_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:rust|python|tests|tools|examples)/[\w/.-]+)`", text)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
