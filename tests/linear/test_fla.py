"""The published reference functions of `flash-linear-attention`, beside ours on random inputs.

They are in the wheel `fla-core`, which the dependency group `frameworks` has. Its packages need Triton to import; the
modules of the naive functions need torch and einops only, and are loaded by their paths. Without torch and the wheel
the tests are skipped; a wheel without one of the functions fails.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import longattn.linear
import tolerances

torch = pytest.importorskip("torch")
FLA = importlib.util.find_spec("fla")
if FLA is None or not FLA.submodule_search_locations:
    pytest.skip("fla-core is not installed", allow_module_level=True)


def naive(name, function):
    """A function of `fla.ops.<name>.naive`, without importing the packages around it."""
    for folder in FLA.submodule_search_locations:
        path = Path(folder, "ops", name, "naive.py")
        if path.exists():
            spec = importlib.util.spec_from_file_location(f"naive_{name}", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found = getattr(module, function, None)
            if found is not None:
                return found
    raise AssertionError(f"fla-core has no {function} in fla.ops.{name}.naive")


@pytest.fixture
def inputs(rng):
    """Tensors `[B, H, L, D]` and gates, keys of length 1."""
    q, k = (torch.from_numpy(rng.standard_normal((2, 3, 75, 16)).astype(np.float32)) for _ in range(2))
    found = {"q": q, "k": torch.nn.functional.normalize(k, dim=-1)}
    found["v"] = torch.from_numpy(rng.standard_normal((2, 3, 75, 20)).astype(np.float32))
    found["row"] = torch.from_numpy(-rng.random((2, 3, 75)).astype(np.float32))
    found["channel"] = torch.from_numpy(-rng.random((2, 3, 75, 16)).astype(np.float32))
    found["beta"] = torch.from_numpy(rng.random((2, 3, 75)).astype(np.float32))
    found["state"] = torch.from_numpy(rng.standard_normal((2, 3, 16, 20)).astype(np.float32))
    return found


def rows_first(*tensors):
    """Their layout `[B, L, H, ...]`."""
    return [x.transpose(1, 2) for x in tensors]


def check(ours, theirs, rows_second=True):
    out, state = theirs
    expected = out.transpose(1, 2) if rows_second else out
    tolerances.check_gradients(ours[0].numpy(), expected.double().numpy(), 300)
    if state is not None:
        tolerances.check_gradients(ours[1].numpy(), state.double().numpy(), 300)


@pytest.mark.parametrize("form", ["naive_recurrent_kda", "naive_chunk_kda"])
def test_kimi_delta_attention(inputs, form):
    x = inputs
    given = [t.contiguous() for t in rows_first(x["q"], x["k"], x["v"], x["channel"], x["beta"])]
    more = {"chunk_size": 25} if "chunk" in form else {}
    theirs = naive("kda", form)(*given, initial_state=x["state"], output_final_state=True, **more)
    ours = longattn.linear.kimi_delta_attention(
        x["q"], x["k"], x["v"], x["channel"], x["beta"], normalize_qk=False, initial_state=x["state"]
    )
    check(ours, theirs)


def test_gated_delta_rule(inputs):
    x = inputs
    given = rows_first(x["q"], x["k"], x["v"], x["beta"], x["row"])
    function = naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")
    theirs = function(*given, initial_state=x["state"], output_final_state=True)
    ours = longattn.linear.gated_delta_rule(x["q"], x["k"], x["v"], x["row"], x["beta"], initial_state=x["state"])
    check(ours, theirs)


def test_delta_rule(inputs):
    x = inputs
    theirs = naive("delta_rule", "delta_rule_recurrence")(
        x["q"], x["k"], x["v"], x["beta"], initial_state=x["state"], output_final_state=True
    )
    ours = longattn.linear.delta_rule_attention(x["q"], x["k"], x["v"], x["beta"], initial_state=x["state"])
    check(ours, theirs, rows_second=False)


def test_gated_linear_attention(inputs):
    x = inputs
    # Their result has the width of values only where that of keys is the same.
    given = rows_first(x["q"], x["k"], x["v"], x["channel"])
    theirs = naive("gla", "naive_recurrent_gla")(*given, initial_state=x["state"], output_final_state=True)
    ours = longattn.linear.gated_linear_attention(x["q"], x["k"], x["v"], x["channel"], initial_state=x["state"])
    check(ours, theirs)


def test_retention(inputs):
    x = inputs
    theirs = naive("retention", "naive_retention")(x["q"], x["k"], x["v"])
    check(longattn.linear.retention(x["q"], x["k"], x["v"]), (theirs, None), rows_second=False)


def test_lightning_attention(inputs):
    """Theirs is simple gated linear attention with a decay per head."""
    x = inputs
    slopes = torch.from_numpy(longattn.linear.lightning_slopes(3))
    decays = -slopes[:, None].expand(2, 3, 75)
    given = rows_first(x["q"], x["k"], x["v"], decays)
    function = naive("simple_gla", "naive_recurrent_simple_gla")
    theirs = function(*given, scale=1.0, initial_state=x["state"], output_final_state=True)
    check(longattn.linear.lightning_attention(x["q"], x["k"], x["v"], slopes, initial_state=x["state"]), theirs)


def test_linear_attention(inputs):
    x = inputs
    given = rows_first(x["q"].abs(), x["k"].abs(), x["v"])
    function = naive("linear_attn", "naive_recurrent_linear_attn")
    theirs, _ = function(*given, scale=1.0, normalize=True)
    ours = longattn.linear.linear_attention(x["q"].abs(), x["k"].abs(), x["v"], eps=1e-10)
    check(ours, (theirs, None))
