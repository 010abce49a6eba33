"""`longattn bench report DIR`: tables, plots and verdicts from the JSON files of a suite, and from nothing else.

The page `DOCS.md` keeps all of its text; what stands between its two marker comments is made anew, and the
plots go into the folder `DOCS`. So does the front page with its own marker comments.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from longattn.bench import headlines, registry, results, targets
from longattn.bench.plots import draw, need_matplotlib
from longattn.bench.results import Result
from longattn.bench.tables import grid, limits

SUMMARY = "make tables, plots and verdicts of the JSON files in a folder"
BEGIN, END = RESULTS = "<!-- results: begin -->", "<!-- results: end -->"
FIGURES = "<!-- figures: begin -->", "<!-- figures: end -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options to `parser`."""
    parser.add_argument("results", type=Path, metavar="DIR", help="folder of JSON files")
    parser.add_argument(
        "--docs",
        type=Path,
        metavar="DOCS",
        help="write the plots into this folder and the rest into the page beside it: docs/benchmarks is "
        "docs/benchmarks/*.png and docs/benchmarks.md (default: print the page, draw nothing)",
    )
    parser.add_argument("--readme", type=Path, metavar="FILE", help="write the main figures into this page")


def run(args: argparse.Namespace) -> int:
    """Makes the report; status 0, also where targets are missed.

    Raises:
        FileNotFoundError: no results, or no page.
        ValueError: a file that is no result, or a page without the markers.
        ModuleNotFoundError: matplotlib is not installed.
    """
    found = results.read_folder(args.results)
    if args.docs is None and args.readme is None:
        print(body(found, None))
    page = "" if args.readme is None else put_between(args.readme.read_text(), front(found), FIGURES)
    if args.docs is not None:
        _write_docs(args.docs, found)
    if args.readme is not None:
        args.readme.write_text(page)
        print(f"{args.readme}: figures of {len(found)} results")
    return 0


def front(found: Sequence[Result]) -> str:
    """What stands between the markers of the front page."""
    return "\n".join(headlines.lines(found)) + "\n"


def _write_docs(docs: Path, found: Sequence[Result]) -> None:
    need_matplotlib("report --docs")
    page = docs.with_name(docs.name + ".md")
    text = page.read_text()
    put_between(text, "")  # complains before anything is drawn
    figures = {name: panels for section in registry.sections() for name, panels in section.figures(found).items()}
    for name, panels in figures.items():
        draw(panels, docs / f"{name}.png")
    page.write_text(put_between(text, body(found, docs.name, list(figures))))
    verdicts = ", ".join(targets.counted(targets.judge(found, registry.targets())))
    print(f"{page}: {verdicts}; {len(figures)} plots in {docs}")


def put_between(page: str, text: str, markers: tuple[str, str] = RESULTS) -> str:
    """The page with `text` between its two markers.

    Raises:
        ValueError: not exactly one of each marker, in order.
    """
    begin, end = markers
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page needs one line {begin!r} and, behind it, one line {end!r}")
    before, after = page[: page.index(begin)], page[page.index(end) :]
    return f"{before}{begin}\n\n{text}\n{after}" if text else f"{before}{begin}\n{after}"


def body(found: Sequence[Result], folder: str | None, figures: Sequence[str] = ()) -> str:
    """Markdown of everything; pictures of `folder` among the tables."""
    lines = [*_machines(found), "", "### Targets", ""]
    verdicts = targets.judge(found, registry.targets())
    lines += [f"{', '.join(targets.counted(verdicts))}. A target is reached when every figure reaches the bound.", ""]
    heads = ["target", "bound", "worst figure (where)", "reach it", "verdict", "command"]
    lines += grid(heads, [verdict.cells for verdict in verdicts])
    for section in registry.sections():
        tables = section.tables(found)
        if tables:
            lines += ["", f"### {section.title}", "", section.text]
            lines += [
                f"![{section.title}: {name}]({folder}/{name}.png)\n"
                for name in section.figures(found)
                if name in figures
            ]
            lines += tables
    notes = list(dict.fromkeys(note for result in found for note in result["notes"]))
    if notes:
        lines += ["", "### Notes of the runs", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _machines(found: Sequence[Result]) -> list[str]:
    """Where and when, and the limits measured in between."""
    lines = []
    for result in found:
        machine = result["machine"]
        versions = machine["versions"] | {name: version for name, version in machine["optional"].items() if version}
        packages = [f"{name} {versions[name]}" for name in ("longattn", "numpy", "torch") if name in versions]
        memory = machine["memory"]["total_bytes"]
        lines.append(
            f"{machine['cpu']['model']} ({machine['isa']['used']}, {machine['cpu']['usable_cpus']} CPUs"
            + (f", {memory / 2**30:.0f} GiB" if memory else "")
            + f"); Python {versions['python']}, {', '.join(packages)}; {result['time'][:10]}."
        )
    by_command = [f"- `{result['command']}`: {'; '.join(limits(result))}" for result in found if result["limits"]]
    return [*dict.fromkeys(lines), "", "Limits measured in turns with the calls:", "", *by_command]
