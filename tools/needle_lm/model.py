"""The needle model in torch, for training only.

Parameter names and mathematics are those of transformers' `SmolLM3ForCausalLM`, so that the state dict
loads there unchanged. Here sliding layers work on blocks of one window, which is faster, and full layers
take a bias per key.

Two initialisations let it learn in minutes instead of hours (README.md says why):
offsets     q/k biases of a RoPE layer that make a head look a fixed number of bytes back;
induction   the last sliding layer copies the state of the previous byte, the first full layer compares
            its own state with those copies.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

VOCAB, BOS, PAD = 260, 256, 257
HIDDEN, MLP_HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 128, 320, 4, 2, 64
GROUP = HEADS // KV_HEADS
WINDOW, ROPE_THETA, EPS = 32, 1000.0, 1e-6
LAYERS = "SSSFF"  # S: sliding window with RoPE, F: full attention without position
OFFSETS = (
    (1, 2, 3, 4),
    (4, 8, 12, None),
    (1, None, 1, None),
)  # of each S layer's heads, in bytes; None: free

CONFIG: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    "dtype": "bfloat16",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP_HIDDEN,
    "num_hidden_layers": len(LAYERS),
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "rms_norm_eps": EPS,
    "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    # Both lists are written out: by SmolLM3's default the layers without RoPE would be the sliding ones.
    "layer_types": ["sliding_attention" if kind == "S" else "full_attention" for kind in LAYERS],
    "no_rope_layers": [1 if kind == "S" else 0 for kind in LAYERS],
    "no_rope_layer_interval": len(LAYERS),
    "attention_bias": True,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": BOS,
    "eos_token_id": PAD,
    "pad_token_id": PAD,
}
GENERATION_CONFIG = {"bos_token_id": BOS, "eos_token_id": PAD, "pad_token_id": PAD, "do_sample": False}


def rope_frequencies() -> Tensor:
    return 1.0 / ROPE_THETA ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = HEAD_DIM // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, EPS)


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN)

    def forward(self, x: Tensor, tables: Tables, key_bias: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            p(x).view(batch, length, -1, HEAD_DIM).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.kind == "S":
            out = self._sliding(rope(q, tables.cos, tables.sin), rope(k, tables.cos, tables.sin), v, tables.mask)
        else:
            out = self._full(q, k.repeat_interleave(GROUP, 1), v.repeat_interleave(GROUP, 1), key_bias)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, HEADS * HEAD_DIM))

    @staticmethod
    def _sliding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Each block of one window sees itself and the block before it."""
        batch, _, length, _ = q.shape
        blocks = length // WINDOW

        def with_previous(x: Tensor) -> Tensor:
            x = x.reshape(batch, KV_HEADS, blocks, WINDOW, HEAD_DIM)
            previous = F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :blocks]
            return torch.cat((previous, x), 3).repeat_interleave(GROUP, 1)

        q = q.reshape(batch, HEADS, blocks, WINDOW, HEAD_DIM)
        scores = torch.matmul(q, with_previous(k).mT) * HEAD_DIM**-0.5 + mask
        return torch.matmul(scores.softmax(-1), with_previous(v)).reshape(batch, HEADS, length, HEAD_DIM)

    @staticmethod
    def _full(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
        if key_bias is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        # The bias travels in 8 extra dimensions, so that the fused causal kernel still applies.
        scale = HEAD_DIM**-0.5
        ones = torch.zeros(*q.shape[:3], 8)
        ones[..., 0] = 1.0
        bias = torch.zeros(*q.shape[:3], 8)
        bias[..., 0] = key_bias[:, None, :] / scale
        q, k = torch.cat((q, ones), -1), torch.cat((k, bias), -1)
        return F.scaled_dot_product_attention(q, k, F.pad(v, (0, 8)), is_causal=True, scale=scale)[..., :HEAD_DIM]


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, MLP_HIDDEN, bias=False)
        self.up_proj = nn.Linear(HIDDEN, MLP_HIDDEN, bias=False)
        self.down_proj = nn.Linear(MLP_HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(kind), MLP()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(), RMSNorm()

    def forward(self, x: Tensor, tables: Tables, key_bias: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), tables, key_bias)
        return x + self.mlp(self.post_attention_layernorm(x))


class Tables:
    """RoPE tables and the block mask of the sliding layers for one length (a multiple of the window)."""

    def __init__(self, length: int) -> None:
        angles = torch.arange(length).float()[:, None] * rope_frequencies()
        angles = torch.cat((angles, angles), -1)
        self.cos, self.sin = angles.cos(), angles.sin()
        row, column = torch.arange(WINDOW)[:, None] + WINDOW, torch.arange(2 * WINDOW)[None]
        seen = (column <= row) & (row - column < WINDOW)
        mask = torch.where(seen, 0.0, float("-inf")).repeat(length // WINDOW, 1, 1)
        mask[0] = mask[0].masked_fill(column < WINDOW, float("-inf"))  # nothing before the first block
        self.mask = mask


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer(kind) for kind in LAYERS)
        self.norm = RMSNorm()


class NeedleLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Decoder()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self._initialise()

    def forward(self, ids: Tensor, tables: Tables, key_bias: Tensor | None = None) -> Tensor:
        """States [B, L, hidden] after the last norm; full layers add `key_bias` [B, L] to their logits."""
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, tables, key_bias)
        return self.model.norm(x)

    @torch.no_grad()
    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
                # Quiet outputs, except the sliding layers' attention: it carries the previous bytes.
                if "down_proj" in name or ("o_proj" in name and LAYERS[int(name.split(".")[2])] == "F"):
                    std *= 0.3
                if "lm_head" in name:
                    std *= 0.1
                parameter.normal_(0, std)
            elif name.endswith("bias"):
                parameter.zero_()
        sliding = [layer.self_attn for layer in self.model.layers if layer.self_attn.kind == "S"]
        for attention, offsets in zip(sliding, OFFSETS, strict=True):
            _look_back(attention, offsets)
        _induction(sliding[-1], self.model.layers[len(sliding)].self_attn)


def _look_back(attention: Attention, offsets: tuple[int | None, ...]) -> None:
    """Constant q and k whose RoPE angle is zero `offset` bytes back: 69 % of a head's softmax lands there."""
    half, frequency = HEAD_DIM // 2, rope_frequencies()
    amplitude = 3.0 * (frequency > 0.05)
    attention.k_proj.bias.view(KV_HEADS, HEAD_DIM)[:, :half] = amplitude
    q_bias = attention.q_proj.bias.view(HEADS, HEAD_DIM)
    for head, offset in enumerate(offsets):
        if offset is not None:
            q_bias[head, :half] = amplitude * torch.cos(frequency * offset)
            q_bias[head, half:] = -amplitude * torch.sin(frequency * offset)


def _induction(copy: Attention, match: Attention) -> None:
    """`copy` writes a rotation O V of the previous byte's state x'; `match` compares V x with O^T O V x'."""
    v, o = (torch.linalg.qr(torch.randn(HIDDEN, HIDDEN))[0] for _ in range(2))
    copy.v_proj.weight.copy_(v)
    for kv in range(KV_HEADS):
        rows, head = (
            slice(kv * HEAD_DIM, (kv + 1) * HEAD_DIM),
            kv * GROUP,
        )  # the group's first head looks one byte back
        copy.o_proj.weight[:, head * HEAD_DIM : (head + 1) * HEAD_DIM] = o[:, rows]
        match.k_proj.weight[rows] = o[:, rows].T
        match.q_proj.weight.view(KV_HEADS, GROUP, HEAD_DIM, HIDDEN)[kv] = v[rows]


def save(model: NeedleLM, folder: Path) -> None:
    """Writes a folder, in bfloat16, that `SmolLM3ForCausalLM.from_pretrained` and `longattn.demo` load."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG, indent=2) + "\n")


def load(folder: Path) -> NeedleLM:
    model = NeedleLM()
    model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    return model
