"""Torch operators, each with the operator of its gradient, from one list of arguments.

Operators take plain arguments in a fixed order and return tensors of a fixed number; what they are given is checked by
the functions they call. Here every argument has its name throughout, and gradients of what is absent are `None`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.autograd import forward_ad

Given = dict[str, Any]
"""Arguments by name."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""The two results that every operator has."""

_RULE = "bool causal, SymInt window_left, SymInt window_right, float? scale, Tensor? row_scales, float softcap"
_BY_DISTANCE = "Tensor? alibi_slopes, Tensor? relative_bias, SymInt? relative_zero"

SCORE_ARGUMENTS = (
    f"{_RULE}, Tensor? bias, Tensor? mask, {_BY_DISTANCE}, Tensor? q_segments, Tensor? k_segments, "
    "Tensor? visible_until, Tensor? sinks"
)
"""What changes scores, as `split_options` takes it apart."""

PACKED_ARGUMENTS = f"{_RULE}, {_BY_DISTANCE}, Tensor? sinks"
"""What of that packed sequences take."""


def operator(
    name: str,
    arguments: str,
    forward: Callable[[Given], Any],
    backward: Callable[[torch.Tensor, torch.Tensor, Given, Any], Sequence[Any]],
    fake: Callable[[Given], Pair],
    *,
    gradients: Sequence[str],
    reads: Callable[[Given], bool] = lambda x: True,
) -> Callable[..., Pair]:
    """Registers `torch.ops.longattn.<name>` and `<name>_backward`.

    Args:
        name: of the operator.
        arguments: as a schema of torch has them: "Tensor q, Tensor? bias, float scale".
        forward: computes both results.
        backward: takes their gradients, the arguments and the results, or `None`, and returns gradients, or `None`, by
            the arguments that `gradients` names.
        fake: shapes and dtypes of both results, for tensors without memory.
        gradients: arguments that may require grad.
        reads: whether `backward` reads the results.

    Returns:
        A function that takes all arguments by name and returns both results.
    """
    names = tuple(argument.split()[-1] for argument in arguments.split(","))
    given_for = {"mutates_args": (), "device_types": "cpu"}

    def named(values: Sequence[Any]) -> Given:
        return dict(zip(names, values, strict=True))

    def run(*values: Any) -> Pair:
        out, second = forward(named(values))
        return out, second

    def run_backward(d_out: Any, d_second: Any, out: Any, second: Any, *values: Any) -> tuple[torch.Tensor, ...]:
        x = named(values)
        found = backward(d_out, d_second, dict(x), None if out is None else (out, second))
        pairs = zip(found, (x[name] for name in gradients), strict=True)
        return tuple(d_out.new_empty(0) if d is None or of is None else d.to(of.dtype) for d, of in pairs)

    def fake_backward(d_out: Any, d_second: Any, out: Any, second: Any, *values: Any) -> tuple[torch.Tensor, ...]:
        x = named(values)
        # Operators have one number of results: gradients of what is absent are empty.
        return tuple(d_out.new_empty(0) if x[n] is None else x[n].new_empty(x[n].shape) for n in gradients)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
        """Tensors as tensors and the rest as it is, to be put together again."""
        kept = (*(output if reads(named(inputs)) else (None, None)), *inputs)
        ctx.save_for_backward(*(x for x in kept if isinstance(x, torch.Tensor)))
        ctx.others = tuple(None if isinstance(x, torch.Tensor) else (x,) for x in kept)

    def differentiate(ctx: Any, d_out: torch.Tensor, d_second: torch.Tensor) -> tuple[Any, ...]:
        tensors = iter(ctx.saved_tensors)
        kept = [next(tensors) if other is None else other[0] for other in ctx.others]
        x = named(kept[2:])
        values = (d_out, d_second, *kept)
        found = Backward.apply(*values) if _in_transform() else call_backward(*values)
        by_argument = dict(zip(gradients, found, strict=True))
        return tuple(None if x[n] is None else by_argument.get(n) for n in names)

    results = ", ".join("Tensor" for _ in gradients)
    whole = f"(Tensor d_out, Tensor d_second, Tensor? out, Tensor? second, {arguments}) -> ({results})"
    define = cast(Any, torch.library.custom_op)
    define(f"longattn::{name}", run, schema=f"({arguments}) -> (Tensor, Tensor)", **given_for).register_fake(
        lambda *values: fake(named(values))
    )
    define(f"longattn::{name}_backward", run_backward, schema=whole, **given_for).register_fake(fake_backward)
    torch.library.register_autograd(f"longattn::{name}", differentiate, setup_context=save)
    torch.library.register_autograd(f"longattn::{name}_backward", no_second_derivative)
    call, call_backward = (getattr(torch.ops.longattn, n) for n in (name, f"{name}_backward"))
    # Transforms of torch.func differentiate functions of this form only, not operators.
    Forward = _function("Forward", call, save, differentiate)
    Backward = _function("Backward", call_backward, lambda *_: None, no_second_derivative)
    kinds = {argument.split()[-1]: argument.split()[0] for argument in arguments.split(",")}
    plain = {n: kind for n, kind in kinds.items() if kind.rstrip("?") in _PLAIN}

    def by_name(**x: Any) -> Pair:
        for n, kind in plain.items():
            check_plain(x[n], n, kind)
        values = [x[name] for name in names]
        return cast(Pair, Forward.apply(*values) if _in_transform() else call(*values))

    return by_name


def _function(name: str, forward: Any, setup_context: Any, backward: Any) -> Any:
    """A differentiable function, whose batches (`torch.func.vmap`) are those of what it calls."""
    methods = {"forward": forward, "setup_context": setup_context, "backward": backward, "jvp": _no_tangent}
    body = {key: staticmethod(method) for key, method in methods.items()} | {"generate_vmap_rule": True}
    return type(name, (torch.autograd.Function,), body)


def _no_tangent(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "longattn.torch: got a tangent (torch.func.jvp, jacfwd or hessian), expected none: only backward passes are "
        "computed; use torch.nn.functional.scaled_dot_product_attention for them"
    )


def _in_transform() -> bool:
    """Whether this runs inside `torch.func.grad` or another of its transforms, uncompiled."""
    return not torch.compiler.is_compiling() and bool(torch._C._are_functorch_transforms_active())


#: Python's types of what is no tensor, and how they are called.
_PLAIN: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool, np.bool_), "True or False"),
    "SymInt": ((int, np.integer, torch.SymInt), "an integer"),
    "float": ((int, float, np.integer, np.floating, torch.SymInt, torch.SymFloat), "a number"),
}


def check_plain(value: object, name: str, kind: str) -> None:
    """What an operator would refuse in its own words, or take for something else."""
    if value is None and kind.endswith("?"):
        return
    types, expected = _PLAIN[kind.rstrip("?")]
    name = "window" if name in ("window_left", "window_right") else name
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise TypeError(f"{name}: got {value!r}, expected {expected}")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise ValueError(f"{name}: got {value}, expected a number of 64 bits")


def no_second_derivative(ctx: Any, *_: torch.Tensor) -> None:
    """Refuses a second backward pass."""
    raise RuntimeError(
        "longattn.torch: got a second backward pass (create_graph=True), expected one: gradients of gradients are not "
        "computed; use torch.nn.functional.scaled_dot_product_attention for them"
    )


def check_tensors(tensors: Mapping[str, torch.Tensor | None], required: Sequence[str] = ("q", "k", "v")) -> None:
    """Kinds and devices; those of `required` that are named must be there."""
    for name, x in tensors.items():
        if x is None and name not in required:
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: got {'None' if x is None else type(x).__name__}, expected a torch tensor")
        if x.device.type != "cpu":
            raise ValueError(
                f"{name}: got a tensor on device {x.device}, expected a CPU tensor: pass tensor.cpu(), or use "
                "torch.nn.functional.scaled_dot_product_attention there"
            )
        if x.layout != torch.strided or x.is_nested:
            kind = "nested" if x.is_nested else str(x.layout)
            raise ValueError(f"{name}: got a tensor of layout {kind}, expected torch.strided")
        if x.is_quantized:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected numbers")
        if _has_tangent(x):
            raise ValueError(
                f"{name}: got a tensor with a tangent (forward-mode differentiation, torch.func.jvp), expected none: "
                "only backward passes are computed"
            )


def _has_tangent(x: torch.Tensor) -> bool:
    """Whether forward-mode differentiation follows `x`: operators of our kind would take its tangent for zero."""
    if torch.compiler.is_compiling() or getattr(forward_ad, "_current_level", -1) < 0:
        return False
    unpacked = cast(Any, forward_ad).unpack_dual(x)
    return unpacked.tangent is not None


def check_constants(tensors: Mapping[str, torch.Tensor | None], constants: Mapping[str, torch.Tensor | None]) -> None:
    """What the operators cannot say clearly: kinds, devices, and gradients that do not exist."""
    check_tensors({**tensors, **constants})
    for name, x in constants.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: got a tensor that requires grad, expected none: {name} is a constant here; pass "
                f"{name}.detach(), or train it with torch.nn.functional.scaled_dot_product_attention"
            )


def pair_of(values: Any, name: str) -> tuple[Any, Any]:
    """Both of a pair; where `None` stands for it, twice that."""
    if values is None and name != "window":
        return None, None
    if not isinstance(values, tuple | list) or len(values) != 2:
        raise TypeError(f"{name}: got {values!r}, expected a pair")
    return values[0], values[1]


def split_scale(scale: Any) -> tuple[Any, torch.Tensor | None]:
    """The number and the factors of rows that a scale is: operators take each by an argument of its own."""
    return (None, scale) if isinstance(scale, torch.Tensor) else (scale, None)


def split_options(x: Given) -> tuple[list[Any], Given]:
    """Positional arguments of `longattn`'s functions, and their options."""
    places = [x.pop(name) for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k") if name in x]
    x["window"] = x.pop("window_left"), x.pop("window_right")
    factors = x.pop("row_scales")
    x["scale"] = x["scale"] if factors is None else factors
    if "q_segments" in x:
        both = x.pop("q_segments"), x.pop("k_segments")
        x["segments"] = None if both[0] is None else both
    return places, x
