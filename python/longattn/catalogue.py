"""`longattn methods`: the registry as a table, as one method's details, as JSON, and as documentation pages."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from longattn.methods import MODES, Method, methods
from longattn.pictures import Mask, digest, png

#: The folder of the pictures, beside the pages.
MASKS = "masks"

#: Packages whose public names `names.md` lists; those that need torch are left out.
PACKAGES = (
    "longattn",
    "longattn.dense",
    "longattn.kv",
    "longattn.kv.evict",
    "longattn.index",
    "longattn.retrieval",
    "longattn.sparse",
    "longattn.vision",
    "longattn.linear",
    "longattn.recurrent",
    "longattn.pool",
    "longattn.diagnostics",
    "longattn.distributed",
    "longattn.gpu",
    "longattn.vectors",
)

#: Sections of a docstring whose lines are `name: text`.
_LISTS = ("Args", "Raises", "Attributes")
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Cost|Example|References):$")
_ENTRY = re.compile(r"^(\*{0,2}\w+): (.*)$", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to `parser`."""
    parser.add_argument("name", nargs="?", help="show this method only, with its identities and cost")
    parser.add_argument("--family", help="only the methods of this family")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write the pages of docs/methods of a checkout to DIR")


def run(args: argparse.Namespace) -> int:
    """Prints methods or writes pages; exit status 0, 2 for an unknown name or family, or where writing fails."""
    try:
        chosen = methods(args.family)
    except ValueError as error:
        print(f"longattn methods: {error}", file=sys.stderr)
        return 2
    if args.name is not None:
        chosen = tuple(method for method in chosen if method.name == args.name)
        if not chosen:
            print(f"longattn methods: no method {args.name!r}; `longattn methods` lists them", file=sys.stderr)
            return 2
    if args.docs is not None:
        try:
            write_pages(args.docs)
        except OSError as error:
            print(f"longattn methods: --docs: {error}", file=sys.stderr)
            return 2
    elif args.json:
        print(json.dumps([as_dict(method) for method in chosen], indent=2))
    elif args.name is not None:
        print(as_text(chosen[0]))
    else:
        print(as_table(chosen))
    return 0


def public_path(function: Callable[..., Any] | type[Any]) -> str:
    """Where users find a function: the shortest dotted name by which a package offers it in `__all__`.

    Raises:
        LookupError: no package does.
    """
    parts = function.__module__.split(".")
    for depth in range(1, len(parts) + 1):
        home = importlib.import_module(".".join(parts[:depth]))
        offered = function.__name__ in getattr(home, "__all__", ())
        if offered and getattr(home, function.__name__) is function:
            return f"{home.__name__}.{function.__name__}"
    raise LookupError(f"{function.__module__}.{function.__name__} is in no __all__")


def as_dict(method: Method) -> dict[str, Any]:
    """A method as plain data; functions by their dotted names."""
    reference = method.reference
    return {
        "name": method.name,
        "family": method.family,
        "title": method.title,
        "year": method.year,
        "arxiv": method.arxiv,
        "function": public_path(method.function),
        "reference": None if reference is None else f"{reference.__module__}.{reference.__name__}",
        "exact": method.exact,
        "modes": [mode for mode in MODES if mode in method.modes],
        "gqa": method.gqa,
        "dtypes": list(method.dtypes),
        "devices": list(method.devices),
        "prefill": method.prefill,
        "step": method.step,
        "checks": list(method.checks),
        "tests": method.tests,
        "cost": method.cost,
    }


def as_table(chosen: Sequence[Method]) -> str:
    """One line per method."""
    rows = [("family", "name", "exact", "supports", "paper")]
    rows += [
        (method.family, method.name, _yes(method.exact), ", ".join(_support(method)), f"{method.title} ({method.year})")
        for method in chosen
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def as_text(method: Method) -> str:
    """Everything about one method."""
    reference = as_dict(method)["reference"]
    rows = [
        ("name", method.name),
        ("family", method.family),
        ("paper", f"{method.title} ({method.year})" + (f", arXiv:{method.arxiv}" if method.arxiv else "")),
        ("function", public_path(method.function)),
        ("reference", reference or "none"),
        ("tests", method.tests),
        ("result", "exact" if method.exact else "approximate"),
        ("supports", ", ".join(_support(method))),
        ("dtypes", ", ".join(method.dtypes)),
        ("devices", ", ".join(method.devices)),
        ("cost", method.cost),
    ]
    lines = [f"{name:11}{value}" for name, value in rows]
    return "\n".join([*lines, "checks", *(f"  - {check}" for check in method.checks)])


def write_pages(folder: Path) -> None:
    """Writes `index.md`, `names.md`, a page per method and pictures of masks into `folder`, made where missing."""
    (folder / MASKS).mkdir(parents=True, exist_ok=True)
    for name, mask in masks().items():
        (folder / MASKS / f"{name}.png").write_bytes(png(mask))
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Texts of the documentation pages, by file name."""
    every = methods()
    lists = {"index.md": _index(every), "names.md": _names(every)}
    return lists | {f"{method.name}.md": _page(method) for method in every}


@cache
def masks() -> dict[str, Mask]:
    """Example masks of the methods that have one, by name."""
    return {method.name: method.mask() for method in methods() if method.mask is not None}


def _index(every: Sequence[Method]) -> str:
    head = ("Method", "Family", "Paper", "Result", *MODES, "GQA", "Prefill", "Step", "dtypes", "Devices")
    lines = [
        "# Methods",
        "",
        "What each method supports. This page and those of the methods are written by `longattn methods --docs",
        "docs/methods` from the entries beside the code; the tests say when they are out of date.",
        "",
        _cells(head),
        _cells("---" for _ in head),
    ]
    for method in every:
        marks = (mode in method.modes for mode in MODES)
        cells = (
            f"[{method.name}]({method.name}.md)",
            method.family,
            f"{method.title} ({method.year})",
            "exact" if method.exact else "approximate",
            *map(_yes, (*marks, method.gqa, method.prefill, method.step)),
            ", ".join(method.dtypes),
            ", ".join(method.devices),
        )
        lines.append(_cells(cells))
    return "\n".join(lines) + "\n"


def _names(every: Sequence[Method]) -> str:
    """Every public function and class by package, with the first sentence of its docstring."""
    method_of = {id(method.function): method.name for method in every}
    lines = [
        "# Public names",
        "",
        "Every function and class by package, methods or not; `help(...)` of each has arguments, errors and cost. This",
        "page is written along with those of the [methods](index.md). `longattn.torch` and `longattn.transformers`,",
        "which need torch, say theirs by `help(longattn.torch)` and `help(longattn.transformers)`.",
    ]
    for name in PACKAGES:
        package = importlib.import_module(name)
        lines += ["", f"## {name}", "", _cells(("Name", "What it is")), _cells(("---", "---"))]
        for offered in package.__all__:
            thing = getattr(package, offered)
            if not callable(thing):  # packages have sections of their own
                continue
            page = method_of.get(id(thing))
            shown = f"`{offered}`" if page is None else f"[`{offered}`]({page}.md)"
            lines.append(_cells((shown, _first_sentence(thing))))
    return "\n".join(lines) + "\n"


def _first_sentence(thing: Callable[..., Any] | type[Any]) -> str:
    paragraph = (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=\.) ", paragraph)[0].replace("|", "\\|")


def _page(method: Method) -> str:
    path = public_path(method.function)
    paper = f"{method.title} ({method.year})"
    if method.arxiv:
        paper = f"[{paper}](https://arxiv.org/abs/{method.arxiv})"
    lines = [f"# {method.name}", "", f"{paper} · family: {method.family}", ""]
    body, sections = _docstring(method.function)
    lines += ["## What is computed", "", body, ""]
    if method.mask is not None:
        lines += [*_picture(method), ""]
    lines += ["## Use", "", "```python", _signature(method.function, path), "```"]
    sections.setdefault("Cost", method.cost)
    for title, text in sections.items():
        lines += ["", f"### {title}", "", text]
    links = [_link("function", method.function)]
    if method.reference is not None:
        links.append(_link("reference", method.reference))
    links.append(f"[tests](../../{method.tests})")
    lines += [
        "",
        "## Supports",
        "",
        f"{', '.join(_support(method))}. Result: {'exact' if method.exact else 'approximate'}. "
        f"dtypes: {', '.join(method.dtypes)}. Devices: {', '.join(method.devices)}.",
        "",
        "## Identity checks",
        "",
        *(f"{number}. {check}" for number, check in enumerate(method.checks, 1)),
        "",
        f"Source: {' · '.join(links)}",
    ]
    return "\n".join(lines) + "\n"


def _picture(method: Method) -> list[str]:
    mask = masks()[method.name]
    (rows, columns), (queries, keys) = mask.shape, method.axes
    title = "Example" if method.shown is None else f"Example, {method.shown}"
    return [
        f"![mask of {method.name}]({MASKS}/{method.name}.png)",
        "",
        f"{title}: which of {columns} {keys} (from left to right) {rows} {queries} (from top to bottom) see; "
        f"{mask.mean():.0%} of the pairs. Mask `{digest(mask)}`.",
    ]


def _docstring(function: Callable[..., Any] | type[Any]) -> tuple[str, dict[str, str]]:
    """The text before the first section of a docstring, and the sections as Markdown."""
    text = inspect.getdoc(function) or ""
    body: list[str] = []
    sections: dict[str, list[str]] = {}
    lines = body
    for line in text.splitlines():
        if title := _SECTION.match(line):
            lines = sections.setdefault(title[1], [])
        else:
            lines.append(line)
    return "\n".join(body).strip(), {title: _section(title, lines) for title, lines in sections.items()}


def _section(title: str, lines: list[str]) -> str:
    text = textwrap.dedent("\n".join(lines)).strip()
    if title == "Example":
        return f"```python\n{text}\n```"
    if title not in _LISTS:
        return text
    entries: list[str] = []
    for line in text.splitlines():
        if line.startswith(" ") and entries:
            entries[-1] += " " + line.strip()
        else:
            entries.append(line.strip())
    return "\n".join(_ENTRY.sub(r"- `\1`: \2", entry) for entry in entries)


def _signature(function: Callable[..., Any] | type[Any], path: str) -> str:
    """The call, without annotations: the text says what each argument may be."""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(function).parameters.values()
    ]
    inside = str(inspect.Signature(parameters))
    name = path.replace("longattn.", "la.", 1)
    flat = f"{name}{inside}"
    if len(flat) <= 100:
        return flat
    items: list[str] = []
    for part in inside[1:-1].split(", "):  # tuples as defaults have commas of their own
        if items and items[-1].count("(") > items[-1].count(")"):
            items[-1] += f", {part}"
        else:
            items.append(part)
    return f"{name}(\n" + "".join(f"    {item},\n" for item in items) + ")"


def _support(method: Method) -> list[str]:
    flags = {"GQA": method.gqa, "prefill": method.prefill, "step": method.step}
    return [mode for mode in MODES if mode in method.modes] + [name for name, has in flags.items() if has]


def _link(title: str, function: Callable[..., Any] | type[Any]) -> str:
    return f"[{title}](../../python/{function.__module__.replace('.', '/')}.py)"


def _cells(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
