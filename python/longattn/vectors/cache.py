"""Recorded vectors on disk: a folder of .npy arrays per set and recipe version, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

META = "meta.json"


def root() -> Path:
    """`$LONGATTN_CACHE`, else `$XDG_CACHE_HOME/longattn`, else `~/.cache/longattn`."""
    if own := os.environ.get("LONGATTN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "longattn"


def folder(key: str) -> Path:
    """Where the set with this version key lies, or will lie."""
    return root() / "vectors" / key


def has(key: str) -> bool:
    return (folder(key) / META).is_file()


def has_array(key: str, array: str) -> bool:
    """Whether the set was recorded with it."""
    return (folder(key) / f"{array}.npy").is_file()


def read(key: str, array: str) -> NDArray[np.float16]:
    """An array of a cached set, memory-mapped: only what is used is read."""
    loaded: NDArray[np.float16] = np.load(folder(key) / f"{array}.npy", mmap_mode="r")
    return loaded


def meta(key: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder(key) / META).read_text())
    return loaded


def write(key: str, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> Path:
    """Store a set, replacing an older one of the same key.

    Raises:
        OSError: no space or no permission; the message has the path, and `LONGATTN_CACHE` moves it.
    """
    target = folder(key)
    partial = target.with_name(f".{key}-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        (partial / META).write_text(json.dumps(dict(about), indent=1))
        if target.exists():
            shutil.rmtree(target)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
