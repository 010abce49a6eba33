"""Attention on a GPU by kernels of our own, for CuPy arrays and torch CUDA tensors.

The functions of `longattn` take arrays of a GPU too and come here; what they do not offer there they refuse by name.
The kernels are CUDA sources (`longattn/gpu/cuda`) that CuPy compiles at first use, so CuPy is needed:
`pip install longattn[gpu]`. Importing this package needs neither CuPy nor a GPU.

Storage is float32, float16 or bfloat16; softmax and sums are float32. Rows must be aligned to 16 bytes, head sizes are
64, 128 or 256.
"""

from longattn.gpu._costs import Costs
from longattn.gpu._device import Device, View, device_of, is_on_gpu
from longattn.gpu.attention import attention, attention_varlen, block_sparse_attention, index_sparse_attention
from longattn.gpu.chunked_recurrence import chunked_recurrence
from longattn.gpu.coded_rows import CodedRows, encode_rows
from longattn.gpu.hash_topk import hash_encode, hash_topk
from longattn.gpu.host_kv_cache import HostKVCache, StepOptions, StepStats
from longattn.gpu.merge import merge
from longattn.gpu.neighborhood_attention import generalized_neighborhood_attention
from longattn.gpu.signatures import SignatureCodes, signatures_encode, signatures_topk

__all__ = [
    "CodedRows",
    "Costs",
    "Device",
    "HostKVCache",
    "SignatureCodes",
    "StepOptions",
    "StepStats",
    "View",
    "attention",
    "attention_varlen",
    "block_sparse_attention",
    "chunked_recurrence",
    "device_of",
    "encode_rows",
    "generalized_neighborhood_attention",
    "hash_encode",
    "hash_topk",
    "index_sparse_attention",
    "is_on_gpu",
    "merge",
    "signatures_encode",
    "signatures_topk",
]
