"""Public names exist, are documented, and can be reached the way the pages write them; stubs say what there is."""

import ast
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import longattn
from longattn import _core, catalogue
from longattn.methods import methods

ROOT = Path(__file__).parents[2]
NEED_TORCH = ("longattn.torch", "longattn.transformers")


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", [*catalogue.PACKAGES, *NEED_TORCH])
def test_names_of_a_package(name):
    if name in NEED_TORCH:
        pytest.importorskip(name.removeprefix("longattn."))
    package = importlib.import_module(name)
    assert [offered for offered in package.__all__ if not hasattr(package, offered)] == []
    things = {offered: getattr(package, offered) for offered in package.__all__}
    # A dataclass without a docstring of its own gets its signature for one.
    bare = [
        offered
        for offered, thing in things.items()
        if callable(thing)
        and not re.match(r"(?!\w+\().* .*[.:]$", (inspect.getdoc(thing) or "").split("\n\n")[0], re.S)
    ]
    assert bare == []


def test_packages_are_reached_from_the_top():
    """Pages write `la.linear.based`; the packages behind such names are imported when they are asked for."""
    paths = sorted({catalogue.public_path(method.function) for method in methods()})
    code = (
        "import sys, longattn\n"
        "early = [name for name in ('linear', 'vision') if f'longattn.{name}' in sys.modules]\n"
        f"missing = [path for path in {paths} if not callable(eval(path))]\n"
        "print(early, missing, {'linear', 'vision'} <= set(dir(longattn)), hasattr(longattn, 'lineer'))"
    )
    assert run(code) == "[] [] True False"


def test_everything_can_be_imported_by_a_star():
    assert run("from longattn import *\nprint(linear.__name__, attention.__name__)") == "longattn.linear attention"


def test_a_copy_that_nothing_installed_can_be_imported():
    code = (
        "import importlib.metadata as metadata\n"
        "def version(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = version\n"
        "import longattn, longattn.doctor\n"
        "print(longattn.__version__, longattn.doctor.machine()['versions']['longattn'])"
    )
    assert run(code) == "0+unknown 0+unknown"


def test_the_command_without_its_script():
    done = subprocess.run([sys.executable, "-m", "longattn", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"longattn {longattn.__version__}\n"


def signature_of(node):
    a = node.args
    given = [*a.posonlyargs, *a.args, *a.kwonlyargs]
    optional = [*(False for _ in range(len(a.posonlyargs + a.args) - len(a.defaults))), *(True for _ in a.defaults)]
    optional += [default is not None for default in a.kw_defaults]
    return [x for x in zip((x.arg for x in given), optional, strict=True) if x[0] not in ("self", "cls")]


def signature_in_core(function):
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default is not inspect.Parameter.empty) for p in parameters if p.name != "self"]


def test_stubs_of_the_compiled_module():
    tree = ast.parse((ROOT / "python/longattn/_core.pyi").read_text(encoding="utf-8"))
    stubs = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert set(stubs) == {name for name in dir(_core) if not name.startswith("__")}
    checked = 0
    for name, node in stubs.items():
        thing = getattr(_core, name)
        if isinstance(node, ast.FunctionDef):
            assert signature_of(node) == signature_in_core(thing), name
            checked += 1
            continue
        members = {member.name: member for member in node.body if isinstance(member, ast.FunctionDef)}
        public = {member for member in members if not member.startswith("__")}
        assert public == {member for member in vars(thing) if not member.startswith("__")}, name
        for member in public:
            if callable(getattr(thing, member)):
                where = f"{name}.{member}"
                assert signature_of(members[member]) == signature_in_core(getattr(thing, member)), where
                checked += 1
    assert checked > 100
