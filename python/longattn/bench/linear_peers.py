"""torch's ways to recurrences of matrix states on a CPU: row after row, and chunk by chunk as a user writes it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from longattn.bench.harness import Candidate
from longattn.bench.peers import tensor

RECURRENT = "torch recurrence loop"
CHUNKS = "torch chunk loop"
TRANSFORMERS = "transformers torch_chunk_gated_delta_rule"
CHUNK = 64


def ways(arguments: dict[str, Any], delta: bool, recurrent: bool) -> list[Candidate]:
    """Candidates for arrays `q`, `k`, `v` and, where there are any, `g` and `beta`; `scale` is 1.

    Args:
        arguments: the arrays.
        delta: whether updates follow the delta rule.
        recurrent: whether to time the loop over rows, too.
    """
    given = {name: tensor(x) for name, x in arguments.items()}
    found = [Candidate(CHUNKS, lambda: chunks(**given, delta=delta))]
    if recurrent:
        found.append(Candidate(RECURRENT, lambda: rows(**given, delta=delta)))
    theirs = _transformers() if delta and "g" in given and given["g"].ndim == 3 else None
    if theirs is not None:
        swapped = {name: x.transpose(1, 2).contiguous() for name, x in given.items()}
        scale = given["q"].shape[-1] ** 0.5

        def fallback() -> Any:
            names = {"query": "q", "key": "k", "value": "v", "g": "g", "beta": "beta"}
            out = theirs(**{name: swapped[x] for name, x in names.items()}, chunk_size=CHUNK)[0]
            return out.transpose(1, 2) * scale

        found.append(Candidate(TRANSFORMERS, fallback))
    return found


def rows(q: Any, k: Any, v: Any, g: Any = None, beta: Any = None, *, delta: bool) -> Any:
    """`S = e^g S + k u^T`, `o = q^T S`, a row at a time."""
    import torch

    with torch.no_grad():
        q, k, v = q.float(), k.float(), v.float()
        state, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), torch.empty_like(v)
        for t in range(q.shape[2]):
            if g is not None:
                state = state * (g[:, :, t, None, None] if g.ndim == 3 else g[:, :, t, :, None]).float().exp()
            update = v[:, :, t]
            if delta:
                update = (update - torch.einsum("bhd,bhde->bhe", k[:, :, t], state)) * beta[:, :, t, None]
            state = state + k[:, :, t, :, None] * update[:, :, None]
            out[:, :, t] = torch.einsum("bhd,bhde->bhe", q[:, :, t], state)
        return out


def chunks(q: Any, k: Any, v: Any, g: Any = None, beta: Any = None, *, delta: bool) -> Any:
    """The same in chunks: what does not depend on the state for all chunks at once, then a loop over them.

    Decays are factored as `e^G_i e^-G_j`, which is the fastest form and overflows where gates are large.
    """
    import torch

    with torch.no_grad():
        length = q.shape[2]
        whole = length // CHUNK * CHUNK
        assert whole == length, "lengths of whole chunks"
        q, k, v = (x.float().unflatten(2, (-1, CHUNK)) for x in (q, k, v))
        total = after = None
        inner, outer, keys = q, k, k
        if g is not None:
            log = g.float().unflatten(2, (-1, CHUNK)).cumsum(3)
            log = log[..., None] if g.ndim == 3 else log
            inner, outer, keys = q * log.exp(), k * log.exp(), k * (-log).exp()
            total, after = log[..., -1, :].exp()[..., None], k * (log[..., -1:, :] - log).exp()
        scores = (inner @ keys.mT).tril()
        if delta:
            b = beta.float().unflatten(2, (-1, CHUNK))[..., None]
            own = (outer * b @ keys.mT).tril(-1) + torch.eye(CHUNK)
            both = torch.cat([v * b, outer * b], -1)
            both = torch.linalg.solve_triangular(own, both, upper=False, unitriangular=True)
            updates, held = both[..., : v.shape[-1]], both[..., v.shape[-1] :]
        state, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), torch.empty_like(v)
        last = k if after is None else after
        for i in range(q.shape[2]):
            update = updates[:, :, i] - held[:, :, i] @ state if delta else v[:, :, i]
            out[:, :, i] = inner[:, :, i] @ state + scores[:, :, i] @ update
            state = (state if total is None else state * total[:, :, i]) + last[:, :, i].mT @ update
        return out.flatten(2, 3)


def _transformers() -> Callable[..., Any] | None:
    """What transformers runs on a CPU, if it is installed."""
    try:
        module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    except ImportError:
        return None
    found: Callable[..., Any] | None = getattr(module, "torch_chunk_gated_delta_rule", None)
    return found
