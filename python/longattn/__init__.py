"""Attention over long contexts on ordinary machines: functions over arrays, with the KV cache in host memory."""

from importlib.metadata import version as _version

# Registers the dtype "bfloat16" with numpy, which the compiled module asks for.
import ml_dtypes as _ml_dtypes  # noqa: F401

from longattn import dense, diagnostics, index, kv, retrieval
from longattn.config import get_num_threads, set_num_threads, show_config
from longattn.dense import attention, attention_varlen, merge
from longattn.kv import KVStore
from longattn.methods import Method, methods
from longattn.retrieval import RetrievalResult, RetrievalStats, retrieval_attention

__version__ = _version("longattn")

__all__ = [
    "KVStore",
    "Method",
    "RetrievalResult",
    "RetrievalStats",
    "__version__",
    "attention",
    "attention_varlen",
    "dense",
    "diagnostics",
    "get_num_threads",
    "index",
    "kv",
    "merge",
    "methods",
    "retrieval",
    "retrieval_attention",
    "set_num_threads",
    "show_config",
]
