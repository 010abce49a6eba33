"""Attention over long contexts on ordinary machines: functions over arrays, with the KV cache in host memory."""

from importlib import import_module as _import_module
from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

# Registers the dtype "bfloat16" with numpy, which the compiled module asks for.
import ml_dtypes as _ml_dtypes  # noqa: F401

from longattn import dense, diagnostics, gpu, index, kv, retrieval, sparse
from longattn.config import get_num_threads, set_num_threads, show_config
from longattn.dense import attention, attention_varlen, merge
from longattn.kv import KVStore
from longattn.methods import Method, methods
from longattn.retrieval import RetrievalResult, RetrievalStats, retrieval_attention, retrieval_attention_batch
from longattn.sparse import BlockMask, RowLists, block_sparse_attention, index_sparse_attention, sparse_attention

if TYPE_CHECKING:
    from longattn import distributed, linear, pool, recurrent, vectors, vision

try:
    __version__ = _version("longattn")
except _PackageNotFoundError:  # a copy of the sources that nothing installed
    __version__ = "0+unknown"

#: Packages that are imported when they are first asked for: together they take as long as all the rest.
_ON_DEMAND = ("distributed", "linear", "pool", "recurrent", "vectors", "vision")

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
    "distributed",
    "get_num_threads",
    "gpu",
    "index",
    "index_sparse_attention",
    "kv",
    "linear",
    "merge",
    "methods",
    "pool",
    "recurrent",
    "retrieval",
    "retrieval_attention",
    "retrieval_attention_batch",
    "set_num_threads",
    "show_config",
    "sparse",
    "sparse_attention",
    "vectors",
    "vision",
]


if not TYPE_CHECKING:  # a type checker shall say that a misspelt name is none

    def __getattr__(name):
        if name in _ON_DEMAND:
            return _import_module(f"longattn.{name}")
        raise AttributeError(f"module 'longattn' has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *_ON_DEMAND})
