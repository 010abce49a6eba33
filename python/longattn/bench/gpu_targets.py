"""What `longattn bench gpu` should show on an H100, and its part of the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from longattn.bench import gpu
from longattn.bench.gpu import OF_TORCH, TFLOP_S
from longattn.bench.results import Result
from longattn.bench.sections import Section, all_rows
from longattn.bench.tables import table
from longattn.bench.targets import Target

#: FlashKDA's published speed against fla's kernels (8,192 rows, 96 heads of 128, H20), and the share that is asked.
_FLASH_KDA, _OF_FLASH_KDA = 1.85, 0.6


def _tables(found: Sequence[Result]) -> list[str]:
    rows = all_rows(found, "gpu")
    return ["", *table(rows, gpu.COLUMNS)] if rows else []


def _targets() -> Iterator[Target]:
    def asked(text: str, figure: str, bound: float, at_most: bool = False, form: str = ".2f", **where: Any) -> Target:
        within = where.pop("within", {})
        return Target(
            f"GPU: {text}",
            "gpu",
            figure,
            bound,
            "longattn bench gpu",
            {name: (value,) for name, value in where.items()},
            within=within,
            at_most=at_most,
            form=form,
        )

    long = {"keys": (32768, 131072)}
    yield asked("decode, bfloat16, share of a copy's bandwidth", "of_copy", 0.8, form=".0%", case="decode", within=long)
    yield asked(
        f"causal prefill, bfloat16, D 128, share of {OF_TORCH} of torch SDPA's speed (else {TFLOP_S:.0f} TFLOP/s)",
        "of_asked",
        1.0,
        head_dim=128,
    )
    yield asked("block-sparse, time over density over dense", "over_density", 1.25, at_most=True)
    for case in ("scan and top-k", "scan of 4-bit codes and top-k"):
        yield asked(
            f"{case} over 131,072 keys of 8 heads, ms", "ms", 0.040, True, ".3f", case=case, keys=131072, heads="32/8"
        )
    yield asked(
        f"KDA forward against fla, {_OF_FLASH_KDA} of FlashKDA's published {_FLASH_KDA}",
        "vs_fla",
        _OF_FLASH_KDA * _FLASH_KDA,
        within={"keys": (8192, 8192)},
    )
    yield asked(
        "hybrid step over 131,072 keys, time over that of copying the selected rows to the device",
        "of_rows_copy",
        1.0,
        at_most=True,
        keys=131072,
    )


SECTIONS = (
    Section(
        "dense",
        "gpu",
        "GPU: kernels of `longattn.gpu`",
        "Times on the device by events. `of copy`: bytes read a second over those of a copy within the device in the "
        "same run; `over density`: time over that of dense attention, over the share of blocks; `rows' copy`: the "
        "selected rows collected on the host and copied to the device; `bus`: as many bytes from page-locked memory.",
        _tables,
    ),
)

TARGETS = tuple(_targets())
