"""Attention over long contexts on ordinary machines: functions over arrays, with the KV cache in host memory."""

from importlib.metadata import version as _version

# Registers the dtype "bfloat16" with numpy, which the compiled module asks for.
import ml_dtypes as _ml_dtypes  # noqa: F401

from longattn import dense, diagnostics, index, kv, retrieval, sparse
from longattn.config import get_num_threads, set_num_threads, show_config
from longattn.dense import attention, attention_varlen, merge
from longattn.kv import KVStore
from longattn.methods import Method, methods
from longattn.retrieval import RetrievalResult, RetrievalStats, retrieval_attention, retrieval_attention_batch
from longattn.sparse import BlockMask, RowLists, block_sparse_attention, index_sparse_attention, sparse_attention

__version__ = _version("longattn")

__all__ = [
    "BlockMask",
    "KVStore",
    "Method",
    "RetrievalResult",
    "RetrievalStats",
    "RowLists",
    "__version__",
    "attention",
    "attention_varlen",
    "block_sparse_attention",
    "dense",
    "diagnostics",
    "get_num_threads",
    "index",
    "index_sparse_attention",
    "kv",
    "merge",
    "methods",
    "retrieval",
    "retrieval_attention",
    "retrieval_attention_batch",
    "set_num_threads",
    "show_config",
    "sparse",
    "sparse_attention",
]
