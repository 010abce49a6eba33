"""`longattn.torch`: gradients by autograd, whole graphs by `torch.compile`."""

import re
import subprocess
import sys
from itertools import pairwise

import pytest

import longattn as la
import tolerances
from random_arrays import normal, qkv

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

import longattn.torch  # noqa: E402

attend = longattn.torch.attention
sdpa = torch.nn.functional.scaled_dot_product_attention


def tensors(rng, dtype=torch.float32, *, grad=True, **shape):
    return [torch.from_numpy(x).to(dtype).requires_grad_(grad) for x in qkv(rng, **shape)]


def gradients(function, inputs, seed=0):
    """Results of a function of tensors, and the gradients of a fixed linear form of them."""
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in results]
    return results, torch.autograd.grad(results, inputs, weights)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (3, 0)},
    "both sides": {"window": (2, 1)},
    "scale and softcap": {"scale": 0.8, "softcap": 1.5},
    "bias and mask": {
        "bias": torch.linspace(-1, 1, 45, dtype=torch.float64).reshape(5, 9),
        "mask": torch.arange(45).reshape(5, 9) % 3 != 0,
    },
    "scales of rows": {"scale": torch.linspace(0.2, 1.5, 20, dtype=torch.float64).reshape(4, 5)},
    "relative bias": {
        "relative_bias": torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3),
        "relative_zero": 1,
    },
    "segments": {"segments": (torch.tensor([0, 1, 1, 2, 0]), torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 0]))},
    "visible until": {"causal": True, "visible_until": torch.tensor([9, 9, 6, 7, 8, 9, 5, 9, 9])},
    "slopes": {"causal": True, "alibi_slopes": torch.tensor([0.1, 0.2, 0.5, 1.0], dtype=torch.float64)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_gradcheck(rng, options, kv_heads):
    q, k, v = tensors(rng, torch.float64, kv_heads=kv_heads, rows=5, keys=9, dim=4, value_dim=3)
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, **options), (q, k, v))
    assert torch.autograd.gradcheck(
        lambda q, k, v, sinks: attend(q, k, v, sinks=sinks, return_lse=True, **options), (q, k, v, sinks)
    )


def test_second_derivatives_are_refused(rng):
    q, k, v = tensors(rng, torch.float64, rows=3, keys=4, dim=2)
    with pytest.raises(RuntimeError, match="gradients of gradients are not computed"):
        torch.autograd.gradgradcheck(attend, (q, k, v))
    (dq,) = torch.autograd.grad(attend(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"longattn\.torch: got a second backward pass"):
        dq.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_same_numbers_as_without_autograd(rng, isa, dtype, causal):
    q, k, v = tensors(rng, dtype, batch=2, rows=40, keys=70, dim=24)
    out, lse = attend(q, k, v, causal=causal, return_lse=True)
    assert out.requires_grad and lse.requires_grad
    with torch.no_grad():
        expected, expected_lse = la.attention(q, k, v, causal=causal, return_lse=True)
        silent = attend(q, k, v, causal=causal)
    assert not silent.requires_grad
    assert torch.equal(out, expected) and torch.equal(silent, expected) and torch.equal(lse, expected_lse)
    with torch.inference_mode():
        assert torch.equal(attend(q, k, v, causal=causal), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_gradients_of_scaled_dot_product_attention(rng, isa, causal, kv_heads):
    q, k, v = tensors(rng, kv_heads=kv_heads, batch=2, rows=130, keys=130, dim=32)
    (out,), ours = gradients(lambda *x: attend(*x, causal=causal), (q, k, v))
    double = [x.detach().double().requires_grad_() for x in (q, k, v)]
    (expected,), theirs = gradients(lambda *x: sdpa(*x, is_causal=causal, enable_gqa=True), double)
    arrays = [x.detach().numpy() for x in (q, k, v)]
    tolerances.attention(*arrays).check(out.detach(), expected.detach())
    generator = torch.Generator().manual_seed(0)  # as in `gradients`
    d_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).numpy()
    eye = torch.eye(130, dtype=torch.float64).expand(2, kv_heads, 130, 130)
    weights = sdpa(*double[:2], eye, is_causal=causal, enable_gqa=True).detach().numpy()
    allowed = tolerances.attention_backward(*arrays, d_out, weights=weights)
    allowed.check([x.numpy() for x in ours], [x.numpy() for x in theirs])


def test_mixed_dtypes_and_strided_inputs(rng, isa):
    q = torch.randn(2, 30, 4, 16).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(2, 50, 2, 16).bfloat16().transpose(1, 2).requires_grad_() for _ in range(2))
    attend(q, k, v, causal=True).sum().backward()  # the gradient of a sum repeats one number
    assert q.grad.dtype == torch.float32 and k.grad.dtype == v.grad.dtype == torch.bfloat16
    want = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    attend(*want, causal=True).sum().backward()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip((q, k, v), want, strict=True))


def test_only_some_inputs_require_grad(rng):
    q, k, v = tensors(rng, grad=False, rows=6, keys=9)
    v.requires_grad_()
    out, lse = attend(q, k, v, return_lse=True)
    (dv,) = torch.autograd.grad(out.sum(), v, retain_graph=True)
    assert dv.shape == v.shape
    (through_lse,) = torch.autograd.grad(lse.sum(), v)
    assert (through_lse == 0).all()  # the lse does not depend on the values


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_module_equals_eager(rng):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(32, 64)
            self.sinks = torch.nn.Parameter(torch.zeros(4))

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (8, 8)).transpose(1, 2).split([4, 2, 2], dim=1)
            out, lse = attend(q, k, v, sinks=self.sinks, causal=True, window=(20, -1), softcap=5.0, return_lse=True)
            return out.transpose(1, 2).flatten(2), lse

    torch.manual_seed(0)
    layer, x = Layer(), torch.from_numpy(normal(rng, (2, 50, 32)))
    eager, want = gradients(lambda *_: layer(x), tuple(layer.parameters()))[:2]
    whole = compiled(layer)
    results, got = gradients(lambda *_: whole(x), tuple(layer.parameters()))
    # Attention is the same call; the projections around it are fused otherwise.
    for one, two in zip((*results, *got), (*eager, *want), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_attention_has_the_same_bits(rng):
    q, k, v = tensors(rng, rows=40, keys=70, dim=24)

    def function(q, k, v):
        return attend(q, k, v, causal=True, return_lse=True)

    eager, want = gradients(function, (q, k, v))
    whole = compiled(function)
    results, got = gradients(whole, (q, k, v))
    assert all(torch.equal(x, y) for x, y in zip((*results, *got), (*eager, *want), strict=True))
    with torch.no_grad():
        assert torch.equal(whole(q, k, v)[0], eager[0])
        longer = torch.cat([k, k], dim=2)  # another length: recompiled with symbolic shapes
        assert torch.equal(whole(q, longer, longer)[0], function(q, longer, longer)[0])


def detached(*arguments):
    return tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_operators_are_what_torch_expects(rng):
    q, k, v = tensors(rng, rows=6, keys=9, dim=4)
    sinks = torch.zeros(4, requires_grad=True)
    bias, mask = torch.randn(6, 9), torch.ones(4, 1, 9, dtype=torch.bool)
    operators = torch.ops.longattn
    segments = torch.zeros(6, dtype=torch.int32), torch.zeros(9, dtype=torch.int32)
    some = torch.ones(4), 3.0, bias, mask, torch.ones(4), torch.ones(4, 2), 1, *segments, torch.full((9,), 9), sinks
    for extra in ((None, 3.0, *(None,) * 9), some):
        options = (True, 5, -1, None, *extra)
        torch.library.opcheck(operators.attention.default, (q, k, v, *options))
        out, lse = operators.attention(q, k, v, *options)
        torch.library.opcheck(operators.attention_backward.default, detached(out, lse, out, lse, q, k, v, *options))
    bounds = torch.tensor([0, 4, 9])
    packed = [torch.randn(9, heads, 4, requires_grad=True) for heads in (4, 2, 2)]
    options = (True, -1, -1, 0.3, None, 0.0, None, None, None, sinks)
    torch.library.opcheck(operators.attention_varlen.default, (*packed, bounds, bounds, *options))
    out, lse = operators.attention_varlen(*packed, bounds, bounds, *options)
    saved = detached(out, lse, out, lse, *packed, bounds, bounds, *options)
    torch.library.opcheck(operators.attention_varlen_backward.default, saved)
    outs = [torch.randn(4, 6, 3, requires_grad=True) for _ in range(2)]
    lses = [torch.randn(4, 6, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(operators.merge.default, (outs, lses))


def test_training_step_decreases_the_loss(rng):
    torch.manual_seed(0)
    project, sinks = torch.nn.Linear(16, 48), torch.nn.Parameter(torch.zeros(2))
    x, target = torch.randn(4, 30, 16), torch.randn(4, 30, 16)

    def loss():
        q, k, v = project(x).unflatten(-1, (6, 8)).transpose(1, 2).chunk(3, dim=1)
        return (attend(q, k, v, causal=True, sinks=sinks).transpose(1, 2).flatten(2) - target).square().mean()

    optimizer = torch.optim.SGD([*project.parameters(), sinks], lr=0.2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        optimizer.step()
    assert sinks.grad.abs().max() > 0
    assert all(after < before for before, after in pairwise(losses))


def test_varlen_equals_each_sequence(rng, isa):
    bounds_q, bounds_k = torch.tensor([0, 5, 25]), torch.tensor([0, 20, 60], dtype=torch.int32)
    q, k, v = (torch.from_numpy(normal(rng, (n, h, 8))).requires_grad_() for n, h in ((25, 4), (60, 2), (60, 2)))
    sinks = torch.zeros(4, requires_grad=True)

    def packed(q, k, v, sinks):
        return longattn.torch.attention_varlen(q, k, v, bounds_q, bounds_k, causal=True, sinks=sinks, return_lse=True)

    def apart(q, k, v, sinks):
        parts = [
            attend(
                *(x[s].transpose(0, 1) for x, s in ((q, a), (k, b), (v, b))), causal=True, sinks=sinks, return_lse=True
            )
            for a, b in ((slice(0, 5), slice(0, 20)), (slice(5, 25), slice(20, 60)))
        ]
        return torch.cat([o.transpose(0, 1) for o, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)

    one, two = gradients(packed, (q, k, v, sinks)), gradients(apart, (q, k, v, sinks))
    for got, want in zip((*one[0], *one[1][:3]), (*two[0], *two[1][:3]), strict=True):
        assert torch.equal(got, want)
    torch.testing.assert_close(one[1][3], two[1][3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_parts_have_the_gradients_of_the_whole(rng, isa, dtype):
    q, k, v = tensors(rng, dtype, rows=20, keys=90, dim=16)

    def halves(q, k, v):
        sets = slice(0, 30), slice(30, 90)
        return longattn.torch.merge(attend(q, k[:, :, s], v[:, :, s], return_lse=True) for s in sets)

    one, two = gradients(halves, (q, k, v)), gradients(lambda *x: attend(*x, return_lse=True), (q, k, v))
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for got, want in zip((*one[0], *one[1]), (*two[0], *two[1]), strict=True):
        torch.testing.assert_close(got, want, **near)


def test_merge_passes_over_parts_that_saw_nothing(rng):
    o, lse = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    nothing = torch.full((2, 3, 4), torch.nan, requires_grad=True), torch.full((2, 3), -torch.inf, requires_grad=True)
    out, total = longattn.torch.merge([(o, lse), nothing])
    assert torch.equal(out, o) and torch.equal(total, lse)
    (out.sum() + 2 * total.sum()).backward()
    assert (nothing[0].grad == 0).all() and (nothing[1].grad == 0).all()
    assert (o.grad == 1).all() and (lse.grad == 2).all()


def test_constants_that_require_grad_are_refused(rng):
    q, k, v = tensors(rng, rows=6, keys=9)
    for name, shape in (("bias", (6, 9)), ("alibi_slopes", (4,))):
        constant = torch.ones(shape, requires_grad=True)
        with pytest.raises(
            ValueError, match=rf"^{name}: got a tensor that requires grad, expected none: {name} is a constant"
        ):
            attend(q, k, v, **{name: constant})
        with torch.no_grad():
            attend(q, k, v, **{name: constant})
        attend(q, k, v, **{name: constant.detach()}).sum().backward()


def test_bad_inputs_are_refused(rng):
    q, k, v = tensors(rng, rows=6, keys=9)
    with pytest.raises(
        ValueError, match=r"^k: got a tensor on device meta, expected a CPU tensor: pass tensor\.cpu\(\)"
    ):
        attend(q, k.to("meta"), v)
    with pytest.raises(ValueError, match=r"^sinks: got a tensor on device meta"):
        attend(q, k, v, sinks=torch.zeros(4, device="meta"))
    with pytest.raises(TypeError, match=r"^q: got ndarray, expected a torch tensor"):
        attend(q.detach().numpy(), k, v)
    with pytest.raises(TypeError, match=r"^v: got None, expected a torch tensor"):
        attend(q, k, None)
    with pytest.raises(TypeError, match=r"^window: got 5, expected a pair"):
        attend(q, k, v, window=5)
    with pytest.raises(ValueError, match=r"^k: got head_dim 8, expected 16 as in q"):
        attend(q, k[..., :8], v)
    with pytest.raises(TypeError, match=r"^mask: got dtype float32, expected bool"):
        attend(q, k, v, mask=torch.ones(6, 9))
    with pytest.raises(ValueError, match=r"^parts: got none"):
        longattn.torch.merge([])
    with pytest.raises(TypeError, match=r"^parts\[0\]: got Tensor, expected a pair"):
        longattn.torch.merge([q])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"causal": 1}, "causal: got 1, expected True or False"),
        ({"causal": None}, "causal: got None, expected True or False"),
        ({"scale": "1"}, "scale: got '1', expected a number"),
        ({"scale": True}, "scale: got True, expected a number"),
        ({"softcap": None}, "softcap: got None, expected a number"),
        ({"window": (1.0, 2)}, "window: got 1.0, expected an integer"),
        ({"return_lse": "yes"}, "return_lse: got 'yes', expected True or False"),
    ],
    ids=str,
)
def test_options_of_another_kind_are_refused(rng, given, words):
    with pytest.raises(TypeError, match=f"^{re.escape(words)}"):
        attend(*tensors(rng, rows=6, keys=9), **given)


def test_other_layouts_are_refused(rng):
    q, k, v = tensors(rng, rows=6, keys=9, grad=False)
    for bad in (q.to_sparse(), torch.nested.nested_tensor([q[0], q[0]])):
        with pytest.raises(ValueError, match=r"^q: got a tensor of layout .*, expected torch\.strided"):
            attend(bad, k, v)


def test_forward_derivatives_are_refused(rng):
    """An operator of this kind would take tangents for zero."""
    q, k, v = tensors(rng, rows=6, keys=9, grad=False)
    for function in (lambda x: attend(x, k, v), lambda x: longattn.torch.merge([(x, x[..., 0])])[0]):
        with pytest.raises(ValueError, match=r"got a tensor with a tangent"):
            torch.func.jvp(function, (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        assert attend(q, k, v).shape == q.shape
        with pytest.raises(ValueError, match=r"^v: got a tensor with a tangent"):
            attend(q, k, torch.autograd.forward_ad.make_dual(v, v))


def test_a_batch_of_calls(rng):
    q, k, v = tensors(rng, rows=6, keys=9, grad=False)
    out = torch.func.vmap(lambda x: attend(x, k, v))(torch.stack([q, 2 * q]))
    assert torch.equal(out[1], attend(2 * q, k, v))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_functions(rng):
    """`torch.func.grad`, `vjp`, `jacrev` and gradients per sample, beside torch's own attention."""
    q, k, v = tensors(rng, rows=6, keys=9, grad=False)
    k, v = (x[:, :1].repeat(1, q.shape[1], 1, 1) for x in (k, v))
    given = {"atol": 1e-5, "rtol": 1e-4}

    def ours(x, keys=k):
        return longattn.torch.attention(x, keys, v)

    def theirs(x, keys=k):
        return torch.nn.functional.scaled_dot_product_attention(x, keys, v)

    def of(function):
        return lambda *x: function(*x).square().sum()

    for one, two in zip(*(torch.func.grad(of(f), argnums=(0, 1))(q, k) for f in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, two, **given)
    torch.testing.assert_close(torch.func.vjp(ours, q)[1](q), torch.func.vjp(theirs, q)[1](q), **given)
    torch.testing.assert_close(torch.func.jacrev(ours)(q), torch.func.jacrev(theirs)(q), **given)
    several = torch.stack([q, 2 * q, -q])
    each = torch.stack([torch.func.grad(of(theirs))(x) for x in several])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(of(ours)))(several), each, **given)
    with pytest.raises(RuntimeError, match=r"^longattn.torch: got a second backward pass"):
        torch.func.grad(lambda x: torch.func.grad(of(ours))(x).sum())(q)
    with pytest.raises(RuntimeError, match=r"^longattn.torch: got a tangent"):
        torch.func.hessian(of(ours))(q)


def test_nothing_else_imports_it():
    code = "import sys, longattn; assert 'longattn.torch' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
