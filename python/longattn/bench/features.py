"""What this build of longattn offers beyond its first functions, read from their signatures."""

from __future__ import annotations

import inspect

import longattn as la


def coded_stores() -> bool:
    """Whether a store can hold int8 and int4."""
    return "group_size" in inspect.signature(la.KVStore).parameters


def int8_scores() -> bool:
    """Whether attention can multiply queries and keys as int8."""
    return "qk_int8" in inspect.signature(la.attention).parameters
