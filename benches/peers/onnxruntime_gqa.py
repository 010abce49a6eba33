"""A decode step of longattn beside onnxruntime's GroupQueryAttention, the operator that exported LLMs use, on a CPU.

python benches/peers/onnxruntime_gqa.py --threads 1,2 --json onnxruntime.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from longattn.bench import decode, external
from longattn.bench.harness import Candidate
from longattn.bench.options import Grid

GRID = Grid(heads=((32, 8), (32, 32)), head_dims=(128,), keys=(8192, 32768), dtypes=("float32", "float16"))


def load() -> tuple[str, external.Ways]:
    """Version, and the operator over a case's arrays."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} is not installed: pip install onnxruntime onnx") from error
    return onnxruntime.__version__, ways


def ways(case: decode.Case, threads: int, dtypes: Sequence[str]) -> list[decode.Way]:
    """The operator with the last row of the cache as the new one; it writes that row into the cache it reads."""
    import onnxruntime

    if case.stored not in GRID.dtypes:
        return []
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Waiting threads would take the processors from the candidate whose turn is next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(_model(case), options, providers=["CPUExecutionProvider"])
    new = {"q": case.q[:, :, 0], "k": case.k[:, :, -1], "v": case.v[:, :, -1]}
    values = {name: _value(rows.reshape(1, 1, -1)) for name, rows in new.items()}
    values |= {"past_k": _value(case.k), "past_v": _value(case.v)}
    values |= {
        "last": _value(np.array([case.keys - 1], np.int32)),
        "total": _value(np.array([case.keys], np.int32)),
    }
    out = _value(np.zeros((1, 1, case.query_heads * case.dim), case.q.dtype))
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in (("o", out), ("now_k", values["past_k"]), ("now_v", values["past_v"])):
        binding.bind_ortvalue_output(name, value)

    def step() -> Any:
        session.run_with_iobinding(binding)
        return out.numpy()

    return [case.way(Candidate("onnxruntime GroupQueryAttention", step))]


def _value(array: np.ndarray) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _model(case: decode.Case) -> bytes:
    """A graph of the one operator."""
    from onnx import TensorProto, helper

    number = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[case.stored]
    cache = [1, case.kv_heads, case.keys, case.dim]
    widths = {"q": case.query_heads, "k": case.kv_heads, "v": case.kv_heads}
    inputs = [helper.make_tensor_value_info(name, number, [1, 1, n * case.dim]) for name, n in widths.items()]
    inputs += [helper.make_tensor_value_info(name, number, cache) for name in ("past_k", "past_v")]
    inputs += [helper.make_tensor_value_info(name, TensorProto.INT32, [1]) for name in ("last", "total")]
    outputs = [helper.make_tensor_value_info("o", number, [1, 1, case.query_heads * case.dim])]
    outputs += [helper.make_tensor_value_info(name, number, cache) for name in ("now_k", "now_v")]
    node = helper.make_node(
        "GroupQueryAttention",
        [value.name for value in inputs],
        [value.name for value in outputs],
        domain="com.microsoft",
        num_heads=case.query_heads,
        kv_num_heads=case.kv_heads,
    )
    graph = helper.make_graph([node], "step", inputs, outputs)
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=versions, ir_version=8).SerializeToString()
    return model


if __name__ == "__main__":
    sys.exit(external.main("onnxruntime", GRID, load))
