"""longattn on torch tensors, beside torch's own scaled_dot_product_attention.

    python examples/torch_attention.py

Tensors are read where they lie and results are tensors of the same dtype; nothing goes through a copy. Needs
torch: pip install 'longattn[torch]'.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

import longattn as la

BATCH, HEADS, KV_HEADS, LENGTH, DIM = 1, 8, 2, 2048, 64


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    # Projections give [B, L, H, D]; the transposed view [B, H, L, D] is not contiguous and need not be.
    q = torch.randn(BATCH, LENGTH, HEADS, DIM).transpose(1, 2)
    k, v = torch.randn(2, BATCH, LENGTH, KV_HEADS, DIM).transpose(2, 3)

    prompt = la.attention(q, k, v, causal=True)
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    print(f"causal prefill, float32: largest difference {(prompt - expected).abs().max():.1e}")

    # One new query over all keys. torch aligns is_causal at the start, longattn at the end: no mask is needed.
    last = q[:, :, -1:]
    step = la.attention(last, k, v, causal=True)
    print(f"decode step, float32: largest difference {(step - expected[:, :, -1:]).abs().max():.1e}")

    # bfloat16 keys and values, float32 queries: half the memory to read, arithmetic in float32.
    mixed = la.attention(last, k.bfloat16(), v.bfloat16(), causal=True)
    print(f"decode step over bfloat16 keys and values: dtype {mixed.dtype}, ", end="")
    print(f"largest difference {(mixed - step).abs().max():.1e}")

    # A sliding window of 256 tokens, the query's own included, into memory of the caller's.
    out = torch.empty_like(prompt)
    la.attention(q, k, v, causal=True, window=(255, 0), out=out)
    position = torch.arange(LENGTH)
    distance = position[:, None] - position[None, :]
    mask = (distance >= 0) & (distance < 256)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    print(f"sliding window of 256: largest difference {(out - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()
