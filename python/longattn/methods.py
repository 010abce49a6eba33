"""The registry: every method as data, from which tests, documentation and `longattn methods` are made.

A method's module holds its entry under the name `METHOD`. Modules of the family packages are found by looking, so
that a new method is one new module and nothing else.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longattn._checks import one_of

#: Modules and packages that are searched for entries; a package with all that is below it.
FAMILY_PACKAGES = (
    "longattn.dense",
    "longattn.diagnostics",
    "longattn.distributed",
    "longattn.kv",
    "longattn.linear",
    "longattn.pool",
    "longattn.recurrent",
    "longattn.retrieval",
    "longattn.sparse",
    "longattn.vision",
)

#: What `Method.modes` may hold.
MODES = ("causal", "non-causal", "self", "cross")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method, as data.

    Attributes:
        name: what it is called everywhere.
        family: "exact", "kv", "score", "position", "diagnostics", "retrieval", ...
        title: title of the paper that describes it.
        year: year of that paper.
        arxiv: its arXiv number, `None` where it has none.
        function: the public function, or class.
        reference: the float64 numpy oracle, with the function's arguments; `None` where nothing is computed.
        exact: whether the result is the formula's up to rounding, or approximate.
        modes: what it supports: "causal", "non-causal"; "self", "cross".
        gqa: whether several query heads may share a KV head.
        dtypes: storage dtypes of what it reads.
        devices: where it runs.
        prefill: whether it takes many query rows at once.
        step: whether it takes one new row after what came before.
        checks: identities that it satisfies and that its tests check, a sentence each.
        tests: its test file's path in the repository.
        cost: what a call costs.
        mask: makes an example of what queries see, booleans `[queries, keys]`, that its page shows (`pictures.py`);
            `None` where there is nothing to see.
        axes: what the rows and columns of the mask are.
        shown: what part or case of the method the mask is of, where there are others; the page says it.

    Raises:
        ValueError: an unknown mode, or no identity check.
    """

    name: str
    family: str
    title: str
    year: int
    arxiv: str | None
    function: Callable[..., Any] | type[Any]
    reference: Callable[..., Any] | None
    exact: bool
    modes: frozenset[str]
    gqa: bool
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    devices: tuple[str, ...] = ("cpu",)
    prefill: bool = True
    step: bool = True
    checks: tuple[str, ...]
    tests: str
    cost: str
    mask: Callable[[], NDArray[np.bool_]] | None = None
    axes: tuple[str, str] = ("queries", "keys")
    shown: str | None = None

    def __post_init__(self) -> None:
        unknown = sorted(self.modes.difference(MODES))
        if unknown:
            raise ValueError(f"modes of {self.name}: got {unknown}, expected some of {MODES}")
        if not self.checks:
            raise ValueError(f"checks of {self.name}: got none, expected at least one identity")


def methods(family: str | None = None) -> tuple[Method, ...]:
    """Every method, sorted by family and name.

    The first call imports every module of the family packages; later ones take microseconds.

    Args:
        family: only the methods of this family.

    Raises:
        ValueError: a family without methods.

    Example:
        >>> import longattn as la
        >>> [method.name for method in la.methods("exact")][:2]
        ['attention', 'attention_backward']
    """
    every = _registry()
    if family is None:
        return every
    one_of(family, "family", sorted({method.family for method in every}))
    return tuple(method for method in every if method.family == family)


@cache
def _registry() -> tuple[Method, ...]:
    return collect(module for name in FAMILY_PACKAGES for module in _modules(name))


def collect(modules: Iterator[ModuleType]) -> tuple[Method, ...]:
    """The entries of these modules, sorted by family and name.

    Raises:
        TypeError: a `METHOD` that is no `Method`.
        ValueError: two entries of one name.
    """
    found: dict[str, tuple[Method, str]] = {}
    for module in modules:
        if not hasattr(module, "METHOD"):
            continue
        method = module.METHOD
        if not isinstance(method, Method):
            raise TypeError(f"METHOD of {module.__name__}: got {type(method).__name__}, expected a Method")
        if method.name in found:
            raise ValueError(
                f"METHOD of {module.__name__}: got name {method.name!r}, which {found[method.name][1]} has"
            )
        found[method.name] = method, module.__name__
    return tuple(sorted((method for method, _ in found.values()), key=lambda method: (method.family, method.name)))


def _modules(name: str) -> Iterator[ModuleType]:
    """A module and all that is below it."""
    module = importlib.import_module(name)
    yield module
    for info in pkgutil.walk_packages(getattr(module, "__path__", ()), f"{name}."):
        yield importlib.import_module(info.name)
