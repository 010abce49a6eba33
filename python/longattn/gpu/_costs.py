"""What a decode step over rows in host memory costs, by the way they are read; measured once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from longattn.gpu._device import Device
from longattn.gpu.attention import attention
from longattn.gpu.signatures import signatures_encode, signatures_topk

#: Rows of the two sizes that a line is laid through.
_FEW, _MANY = 512, 4096
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds that grow with bytes: `start + bytes / rate`."""

    start: float
    rate: float

    def seconds(self, count: float) -> float:
        """Of so many bytes."""
        return self.start + count / self.rate

    @classmethod
    def through(cls, few: float, few_seconds: float, many: float, many_seconds: float) -> Line:
        """The line through two measurements; noise gives neither a negative rate nor a negative start."""
        slope = max((many_seconds - few_seconds) / (many - few), 1e-3 * many_seconds / many, 1e-18)
        return cls(max(few_seconds - few * slope, 0.0), 1 / slope)


@dataclass(frozen=True, slots=True)
class Costs:
    """Lines of the parts of a step.

    Attributes:
        host: attention by the host over rows in its memory, with the way of the query there and of the result back.
        gather: rows collected by the host, copied to the device and attended to there, with the way of their numbers.
        scan: choice of rows by codes on the device.
    """

    host: Line
    gather: Line
    scan: Line

    def host_step(self, rows: int, chosen: int, row_bytes: int, code_bytes: float) -> float:
        """Seconds of a search and attention by the host: it reads all codes and the chosen rows."""
        return self.host.seconds(rows * code_bytes + chosen * row_bytes)

    def gather_step(self, rows: int, chosen: int, row_bytes: int, code_bytes: float) -> float:
        """Seconds of a choice on the device and the chosen rows' way there."""
        return self.scan.seconds(rows * code_bytes) + self.gather.seconds(chosen * row_bytes)

    def prefers_gather(self, rows: int, chosen: int, row_bytes: int, code_bytes: float) -> bool:
        """Whether the second is faster."""
        sizes = rows, chosen, row_bytes, code_bytes
        return self.gather_step(*sizes) < self.host_step(*sizes)

    def __str__(self) -> str:
        """One line a part."""
        lines = ((field.name, getattr(self, field.name)) for field in fields(self))
        return "\n".join(f"{name}: {1e6 * line.start:.1f} us + {line.rate / 1e9:.2f} GB/s" for name, line in lines)


_OF_DEVICES: WeakKeyDictionary[Device, dict[tuple[object, ...], Costs]] = WeakKeyDictionary()


def costs_of(device: Device, q: Any, keys: Any) -> Costs:
    """Those of `measure`, which all layers and sequences of the same sizes share."""
    asked, view = device.view(q, "q"), device.view(keys, "keys")
    sizes = asked.shape[1], view.shape[1], view.shape[3], view.dtype
    known = _OF_DEVICES.setdefault(device, {})
    if sizes not in known:
        known[sizes] = measure(device, q, keys)
    return known[sizes]


def measure(device: Device, q: Any, keys: Any) -> Costs:
    """Measures the parts with rows like `keys` `[1, Hkv, n, D]` and queries like `q` `[1, Hq, 1, D]` on the device.

    Cost: some milliseconds, once: three rounds of six small steps.
    """
    view, asked = device.view(keys, "keys"), device.view(q, "q")
    _, heads, _, dim = view.shape
    group = asked.shape[1] // heads
    rng = np.random.default_rng(0)
    times: dict[str, float] = {}
    for name, call in _steps(device, q, rng, (heads, group, dim), view).items():
        call()
        times[name] = min(device.seconds(call) for _ in range(_ROUNDS))
    row_bytes, code_bytes = 2 * heads * dim * view.itemsize, heads * (dim // 2 + 2)

    def line(name: str, size: int) -> Line:
        few, many = times[f"{name} few"], times[f"{name} many"]
        return Line.through(_FEW * size, few, _MANY * size, many)

    return Costs(line("host", row_bytes), line("gather", row_bytes), line("scan", code_bytes))


def _steps(
    device: Device, q: Any, rng: np.random.Generator, shape: tuple[int, int, int], like: Any
) -> dict[str, Callable[[], object]]:
    """The parts with few rows and with many."""
    from longattn.dense.attention import attention as on_host

    heads, group, dim = shape
    arrived = device.download(q)()
    steps: dict[str, Callable[[], object]] = {}
    for size, rows in (("few", _FEW), ("many", _MANY)):
        host = rng.standard_normal((2, 1, heads, rows, dim)).astype(arrived.dtype)
        there = device.upload(host[0], q)
        codes = signatures_encode(there, device=device)
        numbers = np.sort(rng.permutation(rows)).astype(np.int32)

        def by_host(host: Any = host) -> None:
            out, lse = on_host(device.download(q)().astype(np.float32), host[0], host[1], return_lse=True)
            device.upload(out, q), device.upload(lse, q)

        def by_gather(host: Any = host, numbers: Any = numbers) -> None:
            device.download(device.integers(numbers, q))()
            k, v = (device.upload(np.take(x, numbers, axis=2), q) for x in host)
            attention(q, k, v, device=device)

        def by_scan(codes: Any = codes, rows: int = rows) -> None:
            asked = q.reshape(1, heads, group, dim)
            signatures_topk(asked, codes, max(rows // 64, 1), device=device)

        steps |= {f"host {size}": by_host, f"gather {size}": by_gather, f"scan {size}": by_scan}
    return steps
