"""`longattn.torch` with states of fixed size: results, gradients and whole graphs."""

import numpy as np
import pytest

import longattn as la
import tolerances
from random_arrays import DTYPES, F32

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

import longattn.torch  # noqa: E402

ROWS = {"g": (1, 2, 21), "beta": (1, 2, 21)}
CHANNELS = {"g": (1, 2, 21, 8), "beta": (1, 2, 21)}

#: Function by name: what goes in beside queries, keys and values, options, and whether outputs are divided.
CASES = {
    "linear_attention": ({}, {}, True),
    "linear_attention plain": ({}, {"normalize": False, "scale": 0.5}, False),
    "lightning_attention": ({"slopes": (2,)}, {}, False),
    "retention": ({"gamma": (2,)}, {}, False),
    "retention of the paper": ({}, {}, False),
    "gated_linear_attention": ({"g": CHANNELS["g"]}, {}, False),
    "delta_rule_attention": ({"beta": ROWS["beta"]}, {"normalize_qk": True}, False),
    "gated_delta_rule": (ROWS, {"normalize_qk": True}, False),
    "kimi_delta_attention": (CHANNELS, {}, False),
    "rwkv6": ({"g": CHANNELS["g"], "u": (2, 8)}, {}, False),
}


def function(name):
    return getattr(longattn.torch, name.split()[0])


def tensors(rng, name, *, dtype=F32, state=True, heads=(4, 2, 2)):
    """Random arguments by name that require grad."""
    gates, options, divided = CASES[name]
    sizes = zip("qkv", heads, (8, 8, 6), strict=True)
    found = {n: rng.standard_normal((1, count, 21, width)) for n, count, width in sizes}
    if divided:
        found["q"], found["k"] = np.abs(found["q"]), np.abs(found["k"])
    for gate, shape in gates.items():
        x = rng.random(shape)
        found[gate] = {"g": -x, "gamma": 0.5 + x / 2}.get(gate, x)
    if state:
        found["initial_state"] = np.abs(rng.standard_normal((1, heads[2], 8, 6 + divided)))
    found = {n: torch.from_numpy(x.astype(np.float32)) for n, x in found.items()}
    if dtype != F32:
        kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}[str(dtype)]
        found = {n: x.to(kind) if n in "qkv" else x for n, x in found.items()}
    return {n: x.requires_grad_() for n, x in found.items()}, options


def oracle(name, found, options):
    """The formula in torch's own operations and float64, row after row."""
    x = {n: t.detach().double().requires_grad_() for n, t in found.items()}
    q, k, v = x["q"], x["k"], x["v"]
    base = name.split()[0]
    if options.get("normalize_qk", base == "kimi_delta_attention"):
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    scale = options.get(
        "scale", 1.0 if base in ("linear_attention", "lightning_attention", "rwkv6") else q.shape[-1] ** -0.5
    )
    readers = max(q.shape[1], v.shape[1])
    q, k = q.repeat_interleave(readers // q.shape[1], 1), k.repeat_interleave(v.shape[1] // k.shape[1], 1)
    divided = CASES[name][2]
    if divided:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    g = x.get("g")
    if "slopes" in x:
        g = -x["slopes"][:, None].expand(v.shape[:3])
    if base == "retention":
        gamma = x.get("gamma", 1 - 2.0 ** (-5 - torch.arange(v.shape[1], dtype=torch.float64)))
        g = gamma.log()[:, None].expand(v.shape[:3])
    state = x.get("initial_state", torch.zeros(1, v.shape[1], 8, v.shape[-1], dtype=torch.float64))
    rows = []
    for t in range(v.shape[2]):
        before = state
        if g is not None:
            state = state * (g[:, :, t, :, None] if g.dim() == 4 else g[:, :, t, None, None]).exp()
        key, new = k[:, :, t], v[:, :, t]
        if "delta" in base:
            new = new - (key.unsqueeze(-2) @ state).squeeze(-2)
        if "beta" in x:
            new = new * x["beta"][:, :, t, None]
        state = state + key[..., :, None] * new[..., None, :]
        read = state
        if "u" in x:
            read = before + (x["u"] * key)[..., :, None] * new[..., None, :]
        read = read.repeat_interleave(q.shape[1] // v.shape[1], 1)
        rows.append(scale * (q[:, :, t, None] @ read).squeeze(-2))
    out = torch.stack(rows, 2)
    if divided:
        out = out[..., :-1] / (out[..., -1:] + 1e-6)
    return x, (out, state)


def gradients(found, results, weights):
    return torch.autograd.grad(
        results, list(found.values()), [w.to(r.dtype) for w, r in zip(weights, results, strict=True)]
    )


def compare(rng, name, call=None, **options):
    found, given = tensors(rng, name, **options)
    call = function(name) if call is None else call
    results = call(**found, **given)
    exact, expected = oracle(name, found, given)
    weights = [torch.from_numpy(rng.standard_normal(r.shape)) for r in results]
    if results[0].dtype != torch.float32:
        weights[0] = weights[0].to(results[0].dtype)
    ours, theirs = gradients(found, results, weights), gradients(exact, expected, weights)
    dtype = np.dtype(np.float32) if results[0].dtype == torch.float32 else None
    for x, y in zip((*results, *ours), (*expected, *theirs), strict=True):
        assert x.shape == y.shape
        if dtype is not None:
            tolerances.check_gradients(x.detach().numpy(), y.detach().numpy(), 400)
        else:
            size = float(y.detach().abs().max())
            near = 4 * 2.0 ** (-8 if results[0].dtype == torch.bfloat16 else -11)
            np.testing.assert_allclose(x.detach().double(), y.detach(), rtol=near, atol=near * size)
    for (n, x), d in zip(found.items(), ours, strict=True):
        assert d.dtype == x.dtype, n


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(rng, isa, name):
    compare(rng, name)


@pytest.mark.parametrize("name", CASES)
def test_grouped_values(rng, name):
    compare(rng, name, heads=(1, 1, 2), state=False)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_storage_dtypes(rng, name, dtype):
    compare(rng, name, dtype=dtype)


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_as_without_autograd(rng, name):
    found, options = tensors(rng, name)
    out, state = function(name)(**found, **options)
    with torch.no_grad():
        given = {n: x.detach() for n, x in found.items()}
        expected, last = getattr(la.linear, name.split()[0])(**given, **options)
    # RWKV-6 adds its two parts in another order.
    rtol, atol = (1e-5, 1e-5) if name == "rwkv6" else (1e-6, 1e-6)
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(state, last, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_whole_graphs(rng, name):
    found, options = tensors(rng, name)
    names = list(found)

    def call(*arguments):
        out, state = function(name)(**dict(zip(names, arguments, strict=True)), **options)
        return out.sin().sum() + state.cos().sum()

    torch._dynamo.reset()  # what other cases compiled does not count towards the limit of this function
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = [f(*found.values()) for f in (compiled, call)]
    torch.testing.assert_close(*results)
    both = [torch.autograd.grad(r, list(found.values())) for r in results]
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["linear_attention", "gated_delta_rule", "kimi_delta_attention", "rwkv6"])
def test_parts_hand_states_on(rng, name):
    """A sequence in parts has the gradients of the whole."""
    found, options = tensors(rng, name)
    weights = [torch.from_numpy(rng.standard_normal(r.shape)).float() for r in function(name)(**found, **options)]
    whole = gradients(found, function(name)(**found, **options), weights)
    state, outs = found["initial_state"], []
    for rows in (slice(0, 1), slice(1, 9), slice(9, 21)):
        part = {n: x if n == "u" else x[:, :, rows] for n, x in found.items() if n != "initial_state"}
        out, state = function(name)(**part, **options, initial_state=state)
        outs.append(out)
    parts = gradients(found, (torch.cat(outs, 2), state), weights)
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["gated_delta_rule", "rwkv6"])
def test_packed_sequences(rng, name):
    found, options = tensors(rng, name, state=False)
    bounds = torch.tensor([0, 5, 5, 21])
    out, state = function(name)(**found, **options, cu_seqlens=bounds)
    assert state.shape == (3, 2, 8, 6)
    alone = {n: x if n == "u" else x[:, :, 5:] for n, x in found.items()}
    expected, last = function(name)(**alone, **options)
    torch.testing.assert_close(out[:, :, 5:], expected)
    torch.testing.assert_close(state[2:], last)
    ours, theirs = (torch.autograd.grad(o.sum(), found["k"])[0][:, :, 5:] for o in (out[:, :, 5:], expected))
    torch.testing.assert_close(ours, theirs)


def scan_tensors(rng):
    found = {"x": rng.standard_normal((2, 19, 20)), "dt": rng.standard_normal((2, 19, 20))}
    found |= {"a": -rng.random((20, 4)), "b": rng.standard_normal((2, 19, 4)), "c": rng.standard_normal((2, 19, 4))}
    found |= {
        "skip": rng.standard_normal(20),
        "dt_bias": rng.standard_normal(20),
        "z": rng.standard_normal((2, 19, 20)),
    }
    found["initial_state"] = rng.standard_normal((2, 20, 4))
    return {n: torch.from_numpy(x.astype(np.float32)).requires_grad_() for n, x in found.items()}


def scan_oracle(x, dt, a, b, c, skip, dt_bias, z, initial_state):
    steps, h, rows = torch.nn.functional.softplus(dt + dt_bias), initial_state, []
    for t in range(x.shape[1]):
        h = (steps[:, t, :, None] * a).exp() * h + (steps[:, t] * x[:, t])[..., None] * b[:, t, None]
        rows.append((h * c[:, t, None]).sum(-1))
    return (torch.stack(rows, 1) + skip * x) * torch.nn.functional.silu(z), h


def test_selective_scan(rng, isa):
    found = scan_tensors(rng)
    exact = {n: x.detach().double().requires_grad_() for n, x in found.items()}
    results, expected = longattn.torch.selective_scan(**found, softplus=True), scan_oracle(**exact)
    weights = [torch.from_numpy(rng.standard_normal(r.shape)) for r in results]
    ours, theirs = gradients(found, results, weights), gradients(exact, expected, weights)
    for x, y in zip((*results, *ours), (*expected, *theirs), strict=True):
        tolerances.check_gradients(x.detach().numpy(), y.detach().numpy(), 400)


def test_whole_graphs_of_scans(rng):
    found = scan_tensors(rng)
    names = list(found)

    def call(*arguments):
        out, state = longattn.torch.selective_scan(**dict(zip(names, arguments, strict=True)), softplus=True)
        return out.sin().sum() + state.cos().sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = [f(*found.values()) for f in (compiled, call)]
    for ours, theirs in zip(*(torch.autograd.grad(r, list(found.values())) for r in results), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_state_space_duality(rng, isa):
    shapes = {"x": (1, 4, 21, 6), "dt": (1, 4, 21), "a": (4,), "b": (1, 2, 21, 8), "c": (1, 2, 21, 8), "skip": (4,)}
    found = {n: rng.standard_normal(shape) for n, shape in shapes.items()}
    found |= {"dt": np.abs(found["dt"]), "a": -np.abs(found["a"]), "initial_state": rng.standard_normal((1, 4, 8, 6))}
    found = {n: torch.from_numpy(x.astype(np.float32)).requires_grad_() for n, x in found.items()}

    def exact(x, dt, a, b, c, skip, initial_state):
        b, c = (w.repeat_interleave(2, 1) for w in (b, c))
        state, rows = initial_state, []
        for t in range(x.shape[2]):
            step = dt[:, :, t, None, None]
            state = (step * a[:, None, None]).exp() * state + step * b[:, :, t, :, None] * x[:, :, t, None]
            rows.append((c[:, :, t, None] @ state)[:, :, 0] + skip[:, None] * x[:, :, t])
        return torch.stack(rows, 2), state

    double = {n: x.detach().double().requires_grad_() for n, x in found.items()}
    results, expected = longattn.torch.state_space_duality(**found), exact(**double)
    weights = [torch.from_numpy(rng.standard_normal(r.shape)) for r in results]
    ours, theirs = gradients(found, results, weights), gradients(double, expected, weights)
    for x, y in zip((*results, *ours), (*expected, *theirs), strict=True):
        tolerances.check_gradients(x.detach().numpy(), y.detach().numpy(), 400)


def test_opcheck(rng):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    found, _ = tensors(rng, "kimi_delta_attention")
    given = (*(found[n] for n in ("q", "k", "v", "g", "beta", "initial_state")), None, True, None, True, None, 48)
    torch.library.opcheck(torch.ops.longattn.recurrence.default, given, test_utils=checks)
    x = scan_tensors(rng)
    given = (*(x[n] for n in ("x", "dt", "a", "b", "c")), None, None, True, x["z"], None, None)
    torch.library.opcheck(torch.ops.longattn.selective_scan.default, given, test_utils=checks)


def test_second_derivatives_are_refused(rng):
    found, options = tensors(rng, "gated_delta_rule")
    out, _ = longattn.torch.gated_delta_rule(**found, **options)
    (dq,) = torch.autograd.grad(out.square().sum(), found["q"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"longattn\.torch: got a second backward pass"):
        dq.sum().backward()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, g: longattn.torch.gated_delta_rule(x, x, x, x, g), ValueError, "g: got shape"),
        (lambda x, g: longattn.torch.gated_linear_attention(x, x, x, g), ValueError, "g: got shape"),
        (lambda x, g: longattn.torch.gated_delta_rule(x, x.numpy(), x, g, g), TypeError, "k: got ndarray"),
        (lambda x, g: longattn.torch.gated_delta_rule(x, x, x.to("meta"), g, g), ValueError, "v: got a tensor on"),
        (lambda x, g: longattn.torch.gated_delta_rule(x, x, x, g + 1, g), ValueError, "g: got a number above 0"),
        (lambda x, g: longattn.torch.lightning_attention(x, x, x, g), ValueError, "slopes: got shape"),
        (lambda x, g: longattn.torch.rwkv6(x, x, x, x, g), ValueError, "u: got shape"),
        (lambda x, g: longattn.torch.gated_delta_rule(x, x, x, g), TypeError, "beta: got None"),
        (lambda x, g: longattn.torch.gated_delta_rule(x, x, x, g, g, g), TypeError, "got 6 positional"),
        (lambda x, g: longattn.torch.retention(x, x, x, gama=g), TypeError, "gama: got it twice or unasked"),
        (lambda x, g: longattn.torch.linear_attention(x.to(torch.float64), x, x), TypeError, "q: got dtype float64"),
        (lambda x, g: longattn.torch.selective_scan(x[0], None, x, x, x), TypeError, "dt: got None"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8))
