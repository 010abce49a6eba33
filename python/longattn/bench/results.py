"""Results as JSON files: written whole or not at all, read back by what they say about themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Result = dict[str, Any]
"""`routine`, `command`, `time`, `threads`, `settings`, `machine`, `rows`, `limits`, `slopes`, `notes`."""

Row = dict[str, Any]


def write(result: Result, path: Path) -> None:
    """Writes a result; a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)


def read(path: Path) -> Result:
    """Reads a result.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        result = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected the JSON of a benchmark, got {error}") from None
    if not isinstance(result, dict) or not {"routine", "command", "rows", "machine"} <= result.keys():
        raise ValueError(f"{path}: expected the JSON of a benchmark, got something without routine, command and rows")
    return result


def read_folder(folder: Path) -> list[Result]:
    """Every result in a folder, by file name.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a JSON file that is no result.
    """
    found = [read(path) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise FileNotFoundError(
            f"{folder}: no results (*.json) there; `longattn bench suite --out {folder}` makes them"
        )
    return found
