"""Memory that this process holds, for tests of memory plans."""

import resource
from pathlib import Path


def resident():
    """Bytes of physical memory in use; reads /proc, which is Linux's."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
