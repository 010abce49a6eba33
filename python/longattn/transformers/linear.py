"""Models with states of fixed size: their torch loops over the sequence, replaced by `longattn.torch`.

transformers writes such a layer as a few functions of its model's module, each with a slow form in torch that runs
wherever the CUDA package it stands for is missing. `use_linear_kernels` puts ours in the place of those that a model's
modules have; the model's own code, its cache and its weights stay as they are.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, cast

import torch

import longattn.torch as ops
from longattn import linear

Function = Callable[..., Any]


class LinearKernels:
    """What `use_linear_kernels` replaced. `remove` puts it back, as does the end of a `with` block.

    Attributes:
        functions: names of the replaced functions, `module.function`, in order.
    """

    def __init__(self, replaced: list[tuple[ModuleType, str, Function, Function]]) -> None:
        self._replaced = replaced
        self.functions = [f"{module.__name__}.{name}" for module, name, _, _ in replaced]

    def remove(self) -> None:
        """Puts back what was there. Called twice it does nothing."""
        for module, name, before, ours in self._replaced:
            # What somebody else put there meanwhile stays.
            if getattr(module, name) is ours:
                setattr(module, name, before)
        self._replaced = []

    def __enter__(self) -> LinearKernels:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def use_linear_kernels(model: torch.nn.Module) -> LinearKernels:
    """Runs the linear, recurrent and state space layers of a transformers model on longattn's kernels.

    Replaced are the gated delta rule (Qwen3-Next, Qwen3.5, Olmo-Hybrid and others), Kimi delta attention (Kimi-Linear,
    Bailing hybrid and others), the selective scan (Mamba, FalconMamba, Jamba, Zamba) and the chunked scan of Mamba-2
    (Mamba-2, Bamba, FalconH1, GraniteMoeHybrid, NemotronH, Zamba2), each for prompts and for single tokens. Results are
    equal to within float32's rounding. Prompts, cached steps, `generate`, gradients and `torch.compile` work as before;
    caches are transformers' own. Convolutions, norms and full attention layers are not touched: for the latter there
    is `attn_implementation="longattn"`.

        with longattn.transformers.use_linear_kernels(model):
            model.generate(**inputs)

    or `handle = use_linear_kernels(model)` and later `handle.remove()`.

    Args:
        model: a transformers model. Its classes' modules are what is changed, so all models of the same architecture in
            this process run on the kernels, until the handle is removed. Tensors of other devices, and float64, go
            where they went before.

    Returns:
        A handle, which names the functions.

    Raises:
        TypeError: `model` is no torch module.
        ValueError: a model without any of these functions.

    Cost:
        Nothing by itself.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch module")
    modules = {type(part).__module__: sys.modules[type(part).__module__] for part in model.modules()}
    replaced = []
    for module in modules.values():
        for name, make in _REPLACEMENTS.items():
            before = getattr(module, name, None)
            if callable(before) and not hasattr(before, "longattn_replaces"):
                ours = _on_cpu(make, before)
                setattr(module, name, ours)
                replaced.append((module, name, before, ours))
    if not replaced and not any(_is_ours(module) for module in modules.values()):
        raise ValueError(
            f"model: got a {type(model).__name__} without any function that longattn replaces, expected a model with "
            f"one of {', '.join(sorted(_REPLACEMENTS))}"
        )
    return LinearKernels(replaced)


def _is_ours(module: ModuleType) -> bool:
    return any(hasattr(getattr(module, name, None), "longattn_replaces") for name in _REPLACEMENTS)


def _on_cpu(ours: Function, before: Function) -> Function:
    """Our function for tensors that it takes, what was there for others."""

    def call(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        takes = first.device.type == "cpu" and first.dtype != torch.float64
        return (ours if takes else before)(*args, **kwargs)

    call.longattn_replaces = before  # type: ignore[attr-defined]
    return call


def _library() -> Any:
    """Operators where torch looks on, the functions themselves, which take less time to call, where it does not."""
    return ops if torch.is_grad_enabled() or torch.compiler.is_compiling() else linear


def _in_place(state: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """The array for the state after a single token: that before it, which its cache would copy it to anyway."""
    alone = rows == 1 and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return state if alone and state is not None and state.dtype == torch.float32 and state.is_contiguous() else None


# Tensors come as `[B, L, H, D]`, and go so.


def _delta_rule(
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    after = _in_place(initial_state, query.shape[1])
    out, state = getattr(_library(), name)(
        *(x.transpose(1, 2) for x in (query, key, value, g, beta)),
        normalize_qk=use_qk_l2norm_in_kernel,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        **({} if after is None else {"out_state": after}),
    )
    return out.transpose(1, 2), state if output_final_state else None


_gated_delta_rule = functools.partial(_delta_rule, "gated_delta_rule")
_kimi_delta_attention = functools.partial(_delta_rule, "kimi_delta_attention")


def _selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Any:
    """Channels come before rows here."""
    out, state = _library().selective_scan(
        hidden_states.transpose(1, 2),
        dt.transpose(1, 2),
        A,
        B.transpose(1, 2),
        C.transpose(1, 2),
        skip=D,
        dt_bias=delta_bias,
        softplus=delta_softplus,
        z=None if z is None else z.transpose(1, 2),
    )
    return (out.transpose(1, 2), torch.as_tensor(state)) if return_last_state else out.transpose(1, 2)


def _selective_step(
    state: torch.Tensor,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    z: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """One token; the state is updated in place."""
    in_place = _in_place(state, 1)
    out, after = _library().selective_scan(
        hidden_states[:, None],
        dt[:, None],
        A,
        B[:, None],
        C[:, None],
        skip=D,
        dt_bias=dt_bias,
        softplus=dt_softplus,
        z=None if z is None else z[:, None],
        initial_state=state,
        **({} if in_place is None else {"out_state": in_place.detach().numpy()}),
    )
    if in_place is None:
        state.copy_(torch.as_tensor(after))
    return cast(torch.Tensor, out[:, 0])


def _state_space_duality(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Any:
    """States have the rows of values first here. Output in float32, as there."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = torch.nn.functional.softplus(dt)
    dt = dt.clamp(*dt_limit).float()
    values = hidden_states.float()
    out, state = _library().state_space_duality(
        values.transpose(1, 2),
        dt.transpose(1, 2),
        A.float(),
        B.float().transpose(1, 2),
        C.float().transpose(1, 2),
        skip=None if D is None or D.dim() != 1 else D,
        initial_state=None if initial_states is None else initial_states.transpose(-1, -2),
    )
    out = out.transpose(1, 2)
    if D is not None and D.dim() != 1:
        out = out + D * values
    out = out.contiguous()
    return (out, state.transpose(-1, -2)) if return_final_states else out


def _state_space_step(
    state: torch.Tensor,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    z: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """One token; the state `[B, H, P, N]` is updated in place.

    Step sizes and rates come spread over states of a head, which share one. As rows of the state are those of values,
    values are what is written as keys, and input weights as values.
    """
    step = dt[..., 0] if dt_bias is None else dt[..., 0] + dt_bias[..., 0].to(dt.dtype)
    if dt_softplus:
        step = torch.nn.functional.softplus(step)
    step, groups = step.float(), B.shape[1]
    heads = hidden_states.shape[1]
    weights, reads = (x.float().repeat_interleave(heads // groups, 1) for x in (B, C))
    written = (hidden_states.float() * step[..., None])[:, :, None]
    decay = (step * A[:, 0, 0].float())[..., None, None].expand(written.shape)
    in_place = _in_place(state, 1)
    after = _library().gated_linear_attention(
        written,
        written,
        weights[:, :, None],
        decay,
        initial_state=state,
        **({} if in_place is None else {"out_state": in_place}),
    )[1]
    if in_place is None:
        state.copy_(after)
    out = torch.matmul(after, reads[..., None])[..., 0]
    if D is not None:
        out = out + hidden_states * D
    if z is not None:
        out = out * torch.nn.functional.silu(z)
    return out.to(hidden_states.dtype)


#: By the names that transformers' modules have for them.
_REPLACEMENTS: dict[str, Function] = {
    "torch_chunk_gated_delta_rule": _gated_delta_rule,
    "torch_recurrent_gated_delta_rule": _gated_delta_rule,
    "chunk_kimi_delta_attention": _kimi_delta_attention,
    "recurrent_kimi_delta_attention": _kimi_delta_attention,
    "mamba_selective_scan": _selective_scan,
    "mamba_selective_state_update": _selective_step,
    "mamba2_chunk_scan": _state_space_duality,
    "mamba2_selective_state_update": _state_space_step,
}
