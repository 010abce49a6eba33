"""`longattn demo`: a small language model finds facts in a long text and reads a few per cent of its keys.

`text` makes the haystack, `runner` is the model in numpy over longattn's functions, `driver` measures,
`peer` is the same model in transformers, `report` shows.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

__all__ = ["add_arguments", "main", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options to `parser`."""
    parser.add_argument(
        "--context", type=int, default=65536, help="tokens (bytes) of the haystack (default %(default)s)"
    )
    parser.add_argument(
        "--questions", type=int, default=32, help="hidden facts, each asked for once (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of text, facts and their places (default %(default)s)")
    parser.add_argument(
        "--top-k", type=int, default=128, help="keys that retrieval selects per KV head (default %(default)s)"
    )
    parser.add_argument(
        "--window", type=int, default=128, help="last keys that retrieval always reads (default %(default)s)"
    )
    parser.add_argument("--sinks", type=int, default=4, help="first keys that are always read (default %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of keys and values (default %(default)s)",
    )
    parser.add_argument(
        "--peer",
        choices=["transformers"],
        help="also run transformers' own attention and cache on the same prompt",
    )
    parser.add_argument(
        "--ways", default="", help="also ask through these ways of `longattn compare`: parts of names, or all"
    )
    parser.add_argument(
        "--prefill-ways",
        default="",
        help="also read the prompt through these selectors, and ask: parts of names, or all",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the figures there (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Runs the demo; the exit status is 0, 2 for bad options or a missing part, 130 after Ctrl-C."""
    from longattn.demo import report
    from longattn.demo.driver import Settings, measure
    from longattn.demo.runner import Model

    try:
        _check_extras(args)
        settings = Settings(
            args.context,
            args.questions,
            args.seed,
            args.top_k,
            args.window,
            args.sinks,
            args.dtype,
            args.ways,
            args.prefill_ways,
        )
        haystack = settings.haystack()
    except (ValueError, RuntimeError) as error:
        print(f"longattn demo: {error}", file=sys.stderr)
        return 2
    model = Model()
    print(report.introduction(vars(settings), model.parameters), flush=True)
    try:
        result = measure(settings, haystack, model, peer=args.peer, progress=report.Progress())
    except KeyboardInterrupt:
        print("\nlongattn demo: stopped", file=sys.stderr)
        return 130
    print(f"\n{report.table(result)}")
    if args.json:
        args.json.write_text(json.dumps(result | report.as_result(result, sys.argv[1:]), indent=2) + "\n")
    if args.plot:
        report.plot(result, args.plot)
    return 0


def _check_extras(args: argparse.Namespace) -> None:
    """Finds out before the work what would fail after it."""
    wanted = {"matplotlib": args.plot, "transformers": args.peer, "torch": args.peer}
    missing = [name for name, option in wanted.items() if option and not find_spec(name)]
    if missing:
        raise RuntimeError(f"these options need packages that are not installed: {', '.join(missing)}")
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path and not path.absolute().parent.is_dir():
            raise ValueError(f"{option}: {path}: there is no such folder")


def main(argv: list[str] | None = None) -> int:
    """The demo as a command of its own."""
    parser = argparse.ArgumentParser(prog="longattn demo", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))
