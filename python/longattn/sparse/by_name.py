"""Selectors for prompts by the name of their method, for settings that are data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from longattn._checks import one_of
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
from longattn.sparse.strided_fixed_sparse_attention import StridedFixed
from longattn.sparse.xattention import Antidiagonal

#: Selectors that know all they need from queries, keys and their parameters, by the names of their methods.
SELECTORS: Mapping[str, Callable[..., Selector]] = {
    "anchor_attention": Anchor,
    "dhsa_select": Dhsa,
    "dynamic_block_topk": DynamicBlocks,
    "flex_prefill": FlexPrefill,
    "minference_vertical_slash": VerticalSlash,
    "moba_select": Moba,
    "power_of_two_attention": PowerOfTwo,
    "sale_select": Sale,
    "sparge_attention": Sparge,
    "strided_fixed_sparse_attention": StridedFixed,
    "xattention": Antidiagonal,
}


def make(selector: str, **parameters: Any) -> Selector:
    """A selector given by its name.

    Args:
        selector: one of `SELECTORS`.
        parameters: its own arguments.

    Raises:
        TypeError: a parameter that the selector does not have, or one that it needs and that is not given.
        ValueError: an unknown name, or what the selector refuses.

    Example:
        >>> from longattn.sparse import by_name
        >>> by_name.make("moba_select", block=256, top_k=4).top_k
        4
    """
    one_of(selector, "selector", SELECTORS)
    known = inspect.signature(SELECTORS[selector]).parameters
    for name in parameters:
        if name not in known:
            raise TypeError(f"{name}: no parameter of {selector}, which has {', '.join(known) or 'none'}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in parameters:
            raise TypeError(f"{name}: got none, expected the parameter that {selector} needs")
    return SELECTORS[selector](**parameters)
