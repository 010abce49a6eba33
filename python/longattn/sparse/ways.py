"""Named selectors for prompts, with the parameters that are compared beside each other.

`longattn demo --prefill-ways` lets a model read its prompt through them; `longattn bench capture` draws what they keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longattn.sparse.anchor_attention import Anchor
from longattn.sparse.dhsa_select import Dhsa
from longattn.sparse.dynamic_block_topk import DynamicBlocks
from longattn.sparse.flex_prefill import FlexPrefill
from longattn.sparse.minference_vertical_slash import VerticalSlash
from longattn.sparse.moba_select import Moba
from longattn.sparse.power_of_two_attention import PowerOfTwo
from longattn.sparse.sale_select import Sale
from longattn.sparse.sparge_attention import Sparge
from longattn.sparse.sparse_attention import Selector
from longattn.sparse.xattention import Antidiagonal


@dataclass(frozen=True)
class PromptWay:
    """One way to choose keys for the queries of a prompt.

    Attributes:
        name: what tables call it.
        selector: what chooses, causally.
    """

    name: str
    selector: Selector


PROMPT_WAYS: tuple[PromptWay, ...] = (
    PromptWay("sparge", Sparge(cdf=0.9, theta=0.3, sink=True)),
    PromptWay("sale", Sale(tau=0.008)),
    PromptWay("anchor", Anchor(theta=6.0, step=8)),
    PromptWay("dhsa", Dhsa(budget=2048, instruction_tokens=0, per_head=True)),
    PromptWay("power of two", PowerOfTwo(block=128, n_window=4)),
    PromptWay("vertical and slash", VerticalSlash(vertical=1000, slash=500)),
    PromptWay("xattention", Antidiagonal(threshold=0.9, stride=16)),
    PromptWay("flexprefill", FlexPrefill(gamma=0.9)),
    PromptWay("dynamic blocks", DynamicBlocks(top_k=64)),
    PromptWay("moba", Moba(block=512, top_k=8)),
)


def chosen_prompt_ways(parts: str) -> Sequence[PromptWay]:
    """The ways whose names contain one of the comma-separated `parts`; all of them for `"all"`.

    Raises:
        ValueError: there is none.
    """
    asked = parts.split(",")
    found = [way for way in PROMPT_WAYS if parts == "all" or any(part in way.name for part in asked)]
    if not found:
        names = "; ".join(way.name for way in PROMPT_WAYS)
        raise ValueError(f"prefill ways: got {parts!r}, expected part of one of {names}")
    return found
