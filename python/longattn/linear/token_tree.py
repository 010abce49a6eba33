"""Recurrences over trees of tokens, for speculative decoding: every branch goes on from its parent, one is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longattn._arrays import Array, as_numpy, like
from longattn._checks import integer, integers
from longattn.linear._named_rows import NamedRows


@dataclass(frozen=True, slots=True, eq=False)
class TreeVerification:
    """Outputs of a tree's tokens, and what it takes to go on from one of them.

    Attributes:
        out: outputs `[B, Hq, T, Dv]`, token by token as they came.
        parents: each token's parent, -1 for what was there before the tree.
    """

    out: Array
    parents: tuple[int, ...]
    _run: Callable[[Sequence[int], Any], tuple[Array, Any]] = field(repr=False)
    #: Chains of tokens, and the states before and after each.
    _chains: list[tuple[list[int], Any, Any]] = field(repr=False)

    def path(self, token: int) -> list[int]:
        """The tokens from the root of a token's branch to itself."""
        found, at = [], integer(token, "token", 0, len(self.parents) - 1)
        while at >= 0:
            found.append(at)
            at = self.parents[at]
        return found[::-1]

    def accept(self, token: int) -> Any:
        """The state after a token and those before it on its branch, with which the next call goes on.

        Args:
            token: the last one that is kept.

        Returns:
            What the function returns as its state.

        Raises:
            TypeError: a token that is no integer.
            ValueError: a token that is not in the tree.

        Cost:
            None, or where other branches begin after none of the tokens up to it, one call over at most these.
        """
        last = integer(token, "token", 0, len(self.parents) - 1)
        chain, before, after = next(c for c in self._chains if last in c[0])
        if chain[-1] == last:
            return after
        return self._run(chain[: chain.index(last) + 1], before)[1]


def verify_tree(
    function: Callable[..., tuple[Array, Any]],
    rows: Mapping[str, Array],
    parents: Sequence[int],
    *,
    initial_state: Any = None,
    **options: Any,
) -> TreeVerification:
    """Runs a recurrence over a tree of draft tokens: each token sees what its branch holds, and nothing of others.

    The tree falls into chains, which end where branches part. Each is one call that begins with the state at its
    parent's end, so that no token is computed twice, whatever the function keeps: matrices, groups of rows, last values
    of a convolution, or a memory's weights.

    Args:
        function: one of `longattn.linear` that takes and returns a state: `gated_delta_rule`, `rwkv7`,
            `grouped_linear_attention_local_conv`, `titans_neural_memory`, ..
        rows: its arguments by name that have a row per token, `[B, H, T, D]` or `[B, H, T]` (without `B` where `q` or
            `v` has none); one of them is called "v", or "x".
        parents: each token's parent, a token before it, or -1: the state before the tree.
        initial_state: the state before the tree, as `function` takes it.
        options: further arguments of `function`, the same for all tokens.

    Returns:
        `TreeVerification`: outputs of all tokens, and by `accept(token)` the state of the branch that is kept.

    Raises:
        TypeError: arguments of another kind.
        ValueError: a parent that is no token before, or rows of another number, and what `function` raises.

    Cost:
        A call per chain, of as many rows as the tree has in all.

    Example:
        >>> import numpy as np, longattn as la
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 4, 8), dtype=np.float32)
        >>> tree = la.linear.verify_tree(la.linear.retention, {"q": q, "k": k, "v": v}, [-1, 0, 0, 2])
        >>> tree.path(3), tree.accept(3).shape
        ([0, 2, 3], (1, 2, 8, 8))
    """
    given = NamedRows(function, rows, options)
    line = integers(parents, "parents", -1)
    if not line:
        raise ValueError("parents: got none, expected one for each token")
    for token, parent in enumerate(line):
        if parent >= token:
            raise ValueError(f"parents: got {parent} for token {token}, expected a token before it, or -1")
    given.check(len(line), "token")

    def run(tokens: Sequence[int], state: Any) -> tuple[Array, Any]:
        found: tuple[Array, Any] = given.run(tokens, initial_state=state)
        return found

    children = np.bincount([parent for parent in line if parent >= 0], minlength=len(line))
    ends: dict[int, Any] = {}
    chains: list[tuple[list[int], Any, Any]] = []
    out = None
    for first, parent in enumerate(line):
        if parent >= 0 and children[parent] == 1:
            continue  # it is in its parent's chain
        chain = [first]
        while children[chain[-1]] == 1:
            chain.append(line.index(chain[-1]))
        before = initial_state if parent < 0 else ends[parent]
        found, after = run(chain, before)
        ends[chain[-1]] = after
        chains.append((chain, before, after))
        made = as_numpy(found, "out")
        if out is None:
            out = given.empty(made, len(line))
        out[..., chain, :] = made
    assert out is not None
    return TreeVerification(like(given.values, out), line, run, chains)
