"""Without CuPy the package imports and works on arrays of the host; calls for a GPU say what to install."""

import subprocess
import sys

_BLOCKED = """
import sys, types
sys.modules["cupy"] = None  # importing it raises ImportError
import numpy as np
import longattn as la
from longattn import gpu
assert "torch" not in sys.modules
x = np.ones((1, 1, 3, 64), np.float32)
"""

#: As much of torch as tells a tensor of a GPU from others.
_TENSOR = """
torch = types.ModuleType("torch")
class Tensor:
    device = types.SimpleNamespace(type="cuda", index=0)
    shape = x.shape
torch.Tensor = Tensor
torch.cuda = types.SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True)
sys.modules["torch"] = torch
x = Tensor()
"""


#: Calls, each with what it says.
_CALLS = """
for call in {calls}:
    try:
        eval(call)
    except (ImportError, TypeError) as error:
        print(f"{{type(error).__name__}}: {{error}}")
    else:
        print(f"{{call}} returned")
"""

TWO_MEMORIES = "gpu.HostKVCache(la.KVStore(kv_heads=1, head_dim=64, capacity=8), None).append(x, x)"
ON_GPU = ("la.attention(x, x, x)", "gpu.attention(x, x, x)", "gpu.merge([(x, x)])", TWO_MEMORIES)
ON_HOST = (
    "gpu.attention(x, x, x)",
    "gpu.attention_varlen(x[0], x[0], x[0], [0, 1], [0, 1])",
    "gpu.block_sparse_attention(x, x, x, [], [])",
    "gpu.index_sparse_attention(x, x, x, [])",
    "gpu.generalized_neighborhood_attention(x, x, x, window=1)",
    "gpu.chunked_recurrence(x, x, x)",
    "gpu.encode_rows(x)",
    "gpu.hash_encode(x, x)",
    "gpu.signatures_encode(x)",
    "gpu.signatures_topk(x, gpu.SignatureCodes(x, x, x), 1)",
    "gpu.hash_topk(x, x, 1)",
    "gpu.merge([(x, x)])",
    TWO_MEMORIES,
)
HINT = "GPU functions need CuPy: pip install 'longattn[gpu]'"


def said(code):
    """Lines that a new process prints."""
    command = [sys.executable, "-c", _BLOCKED + code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_arrays_of_the_host():
    """`longattn` computes, `longattn.gpu` says what it takes and what to install."""
    works = "print(np.allclose(la.attention(x, x, x), x), gpu.is_on_gpu(x))\n"
    first, *lines = said(works + _CALLS.format(calls=ON_HOST))
    assert first == "True False"
    assert len(lines) == len(ON_HOST)
    for line in lines:
        assert line.startswith("TypeError: ") and HINT in line
        assert "got numpy.ndarray, expected a CuPy array or a torch CUDA tensor" in line


def test_tensors_of_a_gpu():
    lines = said(_TENSOR + _CALLS.format(calls=ON_GPU))
    assert len(lines) == len(ON_GPU)
    assert all(line.startswith(f"ImportError: {HINT}") for line in lines)
