"""`longattn vectors`: make and cache the recorded vector sets, show what there is."""

from __future__ import annotations

import argparse
import sys
import time

from longattn import vectors
from longattn.vectors.recording import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to `parser`."""
    parser.add_argument("--name", choices=sorted(vectors.RECORDED), action="append", help="repeatable (default: all)")
    parser.add_argument("--refresh", action="store_true", help="make it again although the cache has it")


def run(args: argparse.Namespace) -> int:
    """Makes the sets; exit status 0, 2 when something that a set needs is missing, 130 after Ctrl-C."""
    status = 0
    for name in args.name or vectors.RECORDED:
        try:
            folder = vectors.prepare(name, refresh=args.refresh, progress=progress_line(name))
        except (FileNotFoundError, ModuleNotFoundError) as error:
            print(f"longattn vectors: {name}: {error}", file=sys.stderr)
            status = 2
            continue
        except KeyboardInterrupt:
            print("\nlongattn vectors: stopped", file=sys.stderr)
            return 130
        print(f"{name}: {folder}")
    return status


def progress_line(name: str) -> Progress:
    """A progress line on stderr: redrawn on a terminal, every ten seconds elsewhere."""
    start = shown = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        end = "\n" if done == total or not sys.stderr.isatty() else "\x1b[K\r"
        if end == "\n" and done < total and now - shown < 10:
            return
        shown = now
        print(
            f"recording {name}: {100 * done // total} %, {now - start:.0f} s",
            end=end,
            file=sys.stderr,
            flush=True,
        )

    return show
