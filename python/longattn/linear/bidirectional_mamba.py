"""Mamba in both directions."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from longattn._arrays import Array, like
from longattn._checks import flag, one_of
from longattn.linear._channels import optional, product, storage_rows
from longattn.linear.mamba_mixer import MambaWeights, branch, checked
from longattn.methods import Method
from longattn.reference import linear as reference

Merge = Literal["add", "concat"]


def bidirectional_mamba(
    x: Array,
    forward: MambaWeights,
    backward: MambaWeights,
    *,
    inner: bool = False,
    merge: Merge = "add",
    w_merge: Array | None = None,
) -> Array:
    """Mamba blocks over a sequence and over its reverse, merged: a mixer of tokens that is not causal.

    Outside of the blocks: `y = merge(mamba_f(x), flip(mamba_b(flip(x))))`. Inside of one, the projections of `forward`
    serve both: `y = ((scan_f(h) + flip(scan_b(flip(h)))) * silu(x w_gate)) w_out` with `h = x w_in`, where each scan
    has its own convolution and parameters. The paper compares both; whether outputs are better added or concatenated
    is not said, hence an option.

    Args:
        x: `[B, L, C]`; float32, float16 or bfloat16.
        forward: weights of the block that goes forward.
        backward: weights of the block that goes backward; `inner` uses those of its convolution and scan.
        inner: both directions inside one block.
        merge: outputs are added up, or laid side by side.
        w_merge: with `merge="concat"`, floating `[2 Co, Cm]`, by which they are multiplied.

    Returns:
        `[B, L, Co]`, `[B, L, 2 Co]` or `[B, L, Cm]`, in the kind and dtype of `x`.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: shapes or values that do not fit.

    Cost:
        Two scans, `2 * B * L * E * N` exponentials, and the projections.

    References:
        X. Zhang, Q. Zhang, H. Liu, T. Xiao, X. Qian, B. Ahmed, E. Ambikairajah, H. Li, J. Epps, "Mamba in Speech:
        Towards an Alternative to Self-Attention", 2024, arXiv:2405.12609.
    """
    xn = storage_rows(x, "x", (None, None, None), "[B, L, C]")
    one, two = checked(forward, "forward", xn.shape[2]), checked(backward, "backward", xn.shape[2])
    inside = flag(inner, "inner")
    one_of(merge, "merge", get_args(Merge))
    if inside and one.a.shape[0] != two.a.shape[0]:
        raise ValueError(f"backward.a: got {two.a.shape[0]} channels, expected {one.a.shape[0]} as in forward")
    if w_merge is not None and (inside or merge != "concat"):
        raise ValueError("w_merge: got one, expected None without merge='concat' outside of the blocks")
    h = product(xn, one.w_in)
    gate = None if one.w_gate is None else product(xn, one.w_gate)
    if inside:
        total = branch(h, one, gate)[0]
        back = branch(h[:, ::-1], two, None if gate is None else gate[:, ::-1])[0]
        result = total + back[:, ::-1]
        result = result if one.w_out is None else result @ one.w_out
    else:
        first = branch(h, one, gate)[0]
        flipped = xn[:, ::-1]
        other = None if two.w_gate is None else product(flipped, two.w_gate)
        second = branch(product(flipped, two.w_in), two, other)[0][:, ::-1]
        first, second = (y if w.w_out is None else y @ w.w_out for y, w in ((first, one), (second, two)))
        if merge == "add" and first.shape != second.shape:
            raise ValueError(f"backward: got outputs {second.shape}, expected {first.shape} as of forward")
        if merge == "add":
            result = first + second
        else:
            result = np.concatenate([first, second], axis=-1)
            weights = optional(w_merge, "w_merge", (result.shape[2], None), "[2 Co, Cm]")
            result = result if weights is None else result @ weights
    return like(x, result.astype(xn.dtype, copy=False))


METHOD = Method(
    name="bidirectional_mamba",
    family="recurrent",
    title="Mamba in Speech: Towards an Alternative to Self-Attention",
    year=2024,
    arxiv="2405.12609",
    function=bidirectional_mamba,
    reference=reference.bidirectional_mamba,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    step=False,
    checks=(
        "A backward block whose weights are zeros leaves causal Mamba.",
        "Equal weights and a palindrome give a palindrome.",
    ),
    tests="tests/linear/test_mamba_mixer.py",
    cost="Two selective scans and the projections.",
)
