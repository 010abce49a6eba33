"""Others' kernels on a GPU: torch's attention, and fla's Kimi delta attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from longattn.bench.harness import Bench

_FLA = "fla.ops.kda"


def torch_has_gpu(bench: Bench) -> bool:
    if not bench.peers:
        return False
    import torch

    if not torch.cuda.is_available():
        bench.notes.append("torch has no CUDA: no peers")
        return False
    return True


def _as_torch(x: Any) -> Any:
    """A CuPy array as a tensor; bfloat16 goes by its bits, which every version of both takes."""
    import torch

    if str(x.dtype) != "bfloat16":
        return torch.utils.dlpack.from_dlpack(x)
    return torch.utils.dlpack.from_dlpack(x.view(np.int16)).view(torch.bfloat16)


def has_fla(bench: Bench) -> bool:
    try:
        importlib.import_module(_FLA)
    except Exception as error:  # it fails in many ways where its Triton does not fit
        bench.notes.append(f"fla does not import: no peer of KDA ({type(error).__name__}: {error})"[:200])
        return False
    return True


def fla_recurrence(q: Any, k: Any, v: Any, gates: Any, rates: Any) -> Callable[[], Any]:
    names = ("q", "k", "v", "g", "beta")
    swapped = {
        name: _as_torch(x).transpose(1, 2).contiguous() for name, x in zip(names, (q, k, v, gates, rates), strict=True)
    }
    chunk_kda = importlib.import_module(_FLA).chunk_kda
    return lambda: chunk_kda(**swapped, scale=1 / q.shape[3])


def torch_attention(q: Any, k: Any, v: Any, causal: bool) -> Callable[[], Any]:
    import torch

    query, key, value = (_as_torch(x) for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(query, key, value, is_causal=causal, enable_gqa=True)
