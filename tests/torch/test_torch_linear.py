"""`longattn.torch` with states of fixed size: results, gradients and whole graphs."""

import numpy as np
import pytest

import longattn as la
import tolerances
from random_arrays import DTYPES, F32, normal

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
    "rwkv7": ({"g": CHANNELS["g"]}, {}, False),
    "hgrn2": ({"g": CHANNELS["g"]}, {}, False),
}

#: Those whose numbers are those of `longattn.linear` up to rounding only.
ROUNDED = ("rwkv6", "hgrn2")


def function(name):
    return getattr(longattn.torch, name.split()[0])


def tensors(rng, name, *, dtype=F32, state=True, heads=(4, 2, 2)):
    """Random arguments by name that require grad."""
    gates, options, divided = CASES[name]
    sizes = zip("qkv", heads, (8, 8, 6), strict=True)
    found = {n: rng.standard_normal((1, count, 21, width)) for n, count, width in sizes}
    if divided:
        found["q"], found["k"] = np.abs(found["q"]), np.abs(found["k"])
    if name == "hgrn2":
        del found["k"]
    if name == "rwkv7":
        reads = found["k"] / np.linalg.norm(found["k"], axis=-1, keepdims=True)
        found |= {"a": -reads, "b": reads * rng.random(reads.shape)}
    for gate, shape in gates.items():
        x = rng.random(shape)
        found[gate] = {"g": -x, "gamma": 0.5 + x / 2}.get(gate, x)
    if state:
        found["initial_state"] = np.abs(rng.standard_normal((1, heads[2], 8, 6 + divided)))
    found = {n: torch.from_numpy(x.astype(np.float32)) for n, x in found.items()}
    if dtype != F32:
        kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}[str(dtype)]
        found = {n: x.to(kind) if n in "qkvab" else x for n, x in found.items()}
    return {n: x.requires_grad_() for n, x in found.items()}, options


def oracle(name, found, options):
    """The formula in torch's own operations and float64, row after row."""
    x = {n: t.detach().double().requires_grad_() for n, t in found.items()}
    base = name.split()[0]
    q, k, v = x["q"], -x["g"].expm1() if base == "hgrn2" else x["k"], x["v"]
    if options.get("normalize_qk", base == "kimi_delta_attention"):
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    scale = options.get(
        "scale",
        1.0 if base in ("linear_attention", "lightning_attention", "rwkv6", "rwkv7", "hgrn2") else q.shape[-1] ** -0.5,
    )
    pair = [x[n].repeat_interleave(v.shape[1] // x[n].shape[1], 1) for n in "ab" if n in x]
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
        if pair:
            read = (pair[0][:, :, t].unsqueeze(-2) @ before).squeeze(-2)
            state = state + pair[1][:, :, t, :, None] * read[..., None, :]
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
    compare(rng, name, heads=(4, 2, 2) if name == "hgrn2" else (1, 1, 2), state=False)


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
    rtol, atol = (1e-5, 1e-5) if name in ROUNDED else (1e-6, 1e-6)
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


@pytest.mark.parametrize(
    "name", ["linear_attention", "gated_delta_rule", "kimi_delta_attention", "rwkv6", "rwkv7", "hgrn2"]
)
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


@pytest.mark.parametrize("name", ["gated_delta_rule", "rwkv6", "rwkv7"])
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
    rows = (*(found[n] for n in ("q", "k", "v", "g", "beta")), None, None, found["initial_state"], None)
    given = (*rows, True, None, True, None, 48)
    torch.library.opcheck(torch.ops.longattn.recurrence.default, given, test_utils=checks)
    x = scan_tensors(rng)
    given = (*(x[n] for n in ("x", "dt", "a", "b", "c")), None, None, True, x["z"], None, None)
    torch.library.opcheck(torch.ops.longattn.selective_scan.default, given, test_utils=checks)
    x = slot_tensors(rng)
    given = (*(x[n] for n in ("q", "k", "g", "keys")), None, None, 48)
    torch.library.opcheck(torch.ops.longattn.slot_logits.default, given, test_utils=checks)
    x = diagonal_tensors(rng, False)
    given = (*(x[n] for n in ("x", "decay", "b", "c", "skip", "initial_state")), None)
    torch.library.opcheck(torch.ops.longattn.diagonal_scan.default, given, test_utils=checks)


def slot_tensors(rng, dtype=torch.float32, length=21):
    """Arguments of gated slot attention with 5 slots, states apart."""
    shapes = {"q": (1, 4, length, 8), "k": (1, 2, length, 8), "v": (1, 2, length, 6), "g": (1, 2, length, 5)}
    found = {n: torch.from_numpy(rng.standard_normal(s).astype(np.float32)).to(dtype) for n, s in shapes.items()}
    found["g"] = -found["g"].abs().float()
    found |= {"keys": torch.from_numpy(rng.standard_normal((1, 2, 8, 5)).astype(np.float32))}
    found |= {"values": torch.from_numpy(rng.standard_normal((1, 2, 5, 6)).astype(np.float32))}
    return {n: x.requires_grad_() for n, x in found.items()}


def slots(x):
    out, states = longattn.torch.gated_slot_attention(
        x["q"], x["k"], x["v"], x["g"], initial_state=(x["keys"], x["values"])
    )
    return (out, *states)


def slots_oracle(q, k, v, g, keys, values):
    """The formula, row after row."""
    rows = []
    for t in range(q.shape[2]):
        gate, new = g[:, :, t].exp(), -g[:, :, t].expm1()
        keys = keys * gate[..., None, :] + k[:, :, t, :, None] * new[..., None, :]
        values = values * gate[..., None] + new[..., None] * v[:, :, t, None]
        both = [s.repeat_interleave(2, 1) for s in (keys, values)]
        weights = (8**-0.5 * (q[:, :, t, None] @ both[0])).softmax(-1)
        rows.append((weights @ both[1])[:, :, 0])
    return torch.stack(rows, 2), keys, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gated_slot_attention(rng, isa, dtype):
    found = slot_tensors(rng, dtype)
    exact = {n: x.detach().double().requires_grad_() for n, x in found.items()}
    results, expected = slots(found), slots_oracle(**exact)
    assert results[0].dtype == dtype
    weights = [torch.from_numpy(rng.standard_normal(r.shape)).to(r.dtype) for r in results]
    ours, theirs = gradients(found, results, weights), gradients(exact, expected, weights)
    for x, y in zip((*results, *ours), (*expected, *theirs), strict=True):
        if dtype == torch.float32:
            tolerances.check_gradients(x.detach().numpy(), y.detach().numpy(), 400)
        else:
            near = 4 * 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
            np.testing.assert_allclose(
                x.detach().double(), y.detach(), rtol=near, atol=near * float(y.detach().abs().max())
            )
    plain = {n: x.detach() for n, x in found.items()}
    states = plain.pop("keys"), plain.pop("values")
    out, last = la.linear.gated_slot_attention(**plain, initial_state=states)
    near = 1e-5 if dtype == torch.float32 else 1e-2
    for x, y in zip(results, (out, *last), strict=True):
        torch.testing.assert_close(x.detach(), y, rtol=near, atol=near)


def test_slots_of_parts_and_of_packed_sequences(rng):
    found = slot_tensors(rng)
    out, *states = slots(found)
    weights = [torch.from_numpy(rng.standard_normal(r.shape)).float() for r in (out, *states)]
    whole = gradients(found, (out, *states), weights)
    state, outs = (found["keys"], found["values"]), []
    for rows in (slice(0, 1), slice(1, 9), slice(9, 21)):
        part = [found[n][:, :, rows] for n in "qkvg"]
        y, state = longattn.torch.gated_slot_attention(*part, initial_state=state)
        outs.append(y)
    parts = gradients(found, (torch.cat(outs, 2), *state), weights)
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    rows = [found[n] for n in "qkvg"]
    packed, last = longattn.torch.gated_slot_attention(*rows, cu_seqlens=torch.tensor([0, 5, 5, 21]))
    alone, own = longattn.torch.gated_slot_attention(*(x[:, :, 5:] for x in rows))
    torch.testing.assert_close(packed[:, :, 5:], alone)
    torch.testing.assert_close(last[1][2:], own[1])
    ours, theirs = (torch.autograd.grad(o.sum(), found["k"])[0][:, :, 5:] for o in (packed[:, :, 5:], alone))
    torch.testing.assert_close(ours, theirs)


def diagonal_tensors(rng, is_complex):
    shapes = {
        "x": (2, 19, 20),
        "decay": (20, 4),
        "b": (20, 4),
        "c": (20, 4),
        "skip": (20,),
        "initial_state": (2, 20, 4),
    }
    found = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    found["decay"] = rng.uniform(0.3, 0.99, (20, 4)).astype(np.float32)
    if is_complex:
        for name in ("decay", "b", "c", "initial_state"):
            found[name] = (found[name] * np.exp(1j * rng.uniform(-1, 1, found[name].shape))).astype(np.complex64)
    return {n: torch.from_numpy(x).requires_grad_() for n, x in found.items()}


def diagonal_oracle(x, decay, b, c, skip, initial_state):
    h, rows = initial_state, []
    for t in range(x.shape[1]):
        h = decay * h + b * x[:, t, :, None]
        rows.append((c * h).sum(-1).real + skip * x[:, t])
    return torch.stack(rows, 1), h


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("is_complex", [False, True])
def test_diagonal_scan(rng, isa, is_complex, silu):
    found = diagonal_tensors(rng, is_complex)
    wide = {n: torch.complex128 if x.is_complex() else torch.float64 for n, x in found.items()}
    exact = {n: x.detach().to(wide[n]).requires_grad_() for n, x in found.items()}
    results, expected = longattn.torch.diagonal_scan(**found, silu=silu), list(diagonal_oracle(**exact))
    if silu:
        expected[0] = torch.nn.functional.silu(expected[0])
    weights = [torch.from_numpy(rng.standard_normal(r.shape)) for r in results]
    ours, theirs = gradients(found, results, weights), gradients(exact, expected, weights)
    for x, y in zip((*results, *ours), (*expected, *theirs), strict=True):
        parts = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (x.detach(), y.detach()))
        tolerances.check_gradients(*(part.numpy() for part in parts), 400)


@pytest.mark.parametrize("kind", ["slots", "real", "complex"])
def test_whole_graphs_of_slots_and_of_diagonal_scans(rng, kind):
    found = slot_tensors(rng) if kind == "slots" else diagonal_tensors(rng, kind == "complex")
    names = list(found)

    def call(*arguments):
        given = dict(zip(names, arguments, strict=True))
        results = slots(given) if kind == "slots" else longattn.torch.diagonal_scan(**given)
        return sum((torch.view_as_real(r) if r.is_complex() else r).sin().sum() for r in results)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = [f(*found.values()) for f in (compiled, call)]
    torch.testing.assert_close(*results)
    for ours, theirs in zip(*(torch.autograd.grad(r, list(found.values())) for r in results), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_by_a_transform(rng):
    """`torch.func.grad` gives what a backward pass gives, the state's part included."""
    q, k, v = (torch.tensor(normal(rng, (1, 2, 9, 8), F32)) for _ in range(3))
    g = -torch.rand(1, 2, 9)

    def loss(*x):
        out, state = longattn.torch.gated_delta_rule(*x, g.exp())
        return out.square().sum() + state.square().sum()

    wanted = [x.clone().requires_grad_() for x in (q, k, v, g)]
    loss(*wanted).backward()
    for found, x in zip(torch.func.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, g), wanted, strict=True):
        assert torch.equal(found, x.grad)


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
        (lambda x, g: longattn.torch.rwkv6(x.long(), x, x, x, x[0, :, 0]), TypeError, "q: got dtype torch.int64"),
        (lambda x, g: longattn.torch.rwkv6(x, x, x, g, x[0, :, 0]), ValueError, "g: got shape"),
        (lambda x, g: longattn.torch.rwkv6(x, x, x, x, x[0, :, 0].to(torch.complex64)), TypeError, "u: got dtype"),
        (lambda x, g: longattn.torch.retention(x, x, x.sum()), ValueError, r"v: got shape \(\)"),
        (lambda x, g: longattn.torch.linear_attention(x, x, x, normalize="no"), TypeError, "normalize: got 'no'"),
        (lambda x, g: longattn.torch.gated_delta_rule(x, x, x, g), TypeError, "beta: got None"),
        (lambda x, g: longattn.torch.gated_delta_rule(x, x, x, g, g, g), TypeError, "got 6 positional"),
        (lambda x, g: longattn.torch.retention(x, x, x, gama=g), TypeError, "gama: got it twice or unasked"),
        (lambda x, g: longattn.torch.linear_attention(x.to(torch.float64), x, x), TypeError, "q: got dtype float64"),
        (lambda x, g: longattn.torch.rwkv7(x, x, x, x, x[:, :, 1:], x), ValueError, "a: got shape"),
        (lambda x, g: longattn.torch.gated_slot_attention(x, x, x, g), ValueError, "g: got shape"),
        (
            lambda x, g: longattn.torch.gated_slot_attention(x, x, x, x, initial_state=x),
            TypeError,
            "initial_state: got",
        ),
        (lambda x, g: longattn.torch.diagonal_scan(g, g[0, 0], g, g), ValueError, "decay: got shape"),
        (lambda x, g: longattn.torch.selective_scan(x[0], None, x, x, x), TypeError, "dt: got None"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8))
