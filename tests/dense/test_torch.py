"""Torch tensors in and out: borrowed, not copied, and the same numbers as torch's own attention."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import longattn as la
import tolerances
from longattn._arrays import as_numpy, like
from random_arrays import normal, qkv

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}


def tensors(rng, dtype, **shape):
    return [torch.from_numpy(x).to(dtype) for x in qkv(rng, **shape)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kind_and_numbers(rng, isa, dtype):
    q, k, v = tensors(rng, dtype, batch=2, rows=20, keys=67, dim=32)
    out, lse = la.attention(q, k, v, causal=True, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.shape == (2, 4, 20, 32) and lse.shape == (2, 4, 20)
    same = la.attention(*(x.float().numpy().astype(NUMPY[dtype]) for x in (q, k, v)), causal=True, return_lse=True)
    np.testing.assert_array_equal(out.float().numpy(), same[0].astype(np.float32))
    np.testing.assert_array_equal(lse.numpy(), same[1])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.int32], ids=str)
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "sliced"])
def test_borrowed_memory(dtype, strides):
    """The numpy view lies where the tensor lies, and writes go through."""
    x = torch.zeros(2, 6, 4, 8, dtype=dtype)
    x = {"contiguous": x, "transposed": x.transpose(1, 2), "sliced": x[:, 1::2, :, 2:6]}[strides]
    view = as_numpy(x, "x")
    assert view.ctypes.data == x.data_ptr() and view.shape == tuple(x.shape)
    assert view.strides == tuple(stride * x.element_size() for stride in x.stride())
    view[0, 1, 2, 3] = 1
    assert x[0, 1, 2, 3] == 1


def test_only_a_strided_last_axis_is_copied():
    x = torch.zeros(4, 6, 8)
    assert as_numpy(x.transpose(0, 1), "x").ctypes.data == x.data_ptr()
    copied = as_numpy(x.transpose(1, 2), "x")
    assert copied.ctypes.data != x.data_ptr() and copied.flags.c_contiguous
    assert as_numpy(x.transpose(1, 2), "x", any_strides=True).ctypes.data == x.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_share_memory(dtype):
    result = np.zeros((2, 3), NUMPY[dtype])
    wrapped = like(torch.zeros(1), result)
    assert wrapped.dtype == dtype and wrapped.data_ptr() == result.ctypes.data


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(1, 200), (30, 30), (65, 200)])
def test_equals_scaled_dot_product_attention(rng, isa, dtype, rows, keys):
    # [B, L, H, D] transposed, as projections leave them.
    shapes = ((rows, 8), (keys, 2), (keys, 2))
    q, k, v = (torch.from_numpy(normal(rng, (2, *n, 64))).to(dtype).transpose(1, 2) for n in shapes)
    mask = torch.from_numpy(rng.random((2, 1, rows, keys)) > 0.3)
    mask[..., 0] = True
    bias = torch.from_numpy(normal(rng, (8, rows, keys))).to(dtype)
    tolerance = tolerances.same_storage(*(as_numpy(x, "x") for x in (q, k, v)), offset=6.0)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    exact = [x.double() for x in (q, k, v)]  # torch rounds weights to the storage dtype, so let it run in float64
    tolerance.check(la.attention(q, k, v).float(), sdpa(*exact, enable_gqa=True))
    tolerance.check(la.attention(q, k, v, mask=mask).float(), sdpa(*exact, attn_mask=mask, enable_gqa=True))
    expected = sdpa(*exact, attn_mask=bias.double(), enable_gqa=True, scale=0.2)
    tolerance.check(la.attention(q, k, v, bias=bias, scale=0.2).float(), expected)
    if rows == keys:  # torch aligns causality top-left
        expected = sdpa(*exact, is_causal=True, enable_gqa=True)
        tolerance.check(la.attention(q, k, v, causal=True).float(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out(rng, dtype):
    q, k, v = tensors(rng, dtype, rows=6, keys=40, dim=16)
    buffer = torch.full((1, 6, 4, 16), float("nan"), dtype=dtype)
    out = buffer.transpose(1, 2)
    assert la.attention(q, k, v, out=out) is out
    assert torch.equal(out, la.attention(q, k, v)) and torch.equal(out, buffer.transpose(1, 2))


def test_options_and_mixed_kinds(rng, isa):
    q, k, v = qkv(rng, rows=6, keys=40)
    mask, bias = rng.random((6, 40)) > 0.3, normal(rng, (4, 1, 40))
    slopes, sinks = rng.random(4).astype(np.float32), normal(rng, (4,))
    options = {"mask": mask, "bias": bias, "alibi_slopes": slopes, "sinks": sinks}
    expected = la.attention(q, k, v, **options)
    out = la.attention(torch.from_numpy(q), k, v, **{name: torch.from_numpy(x) for name, x in options.items()})
    assert isinstance(out, torch.Tensor)
    np.testing.assert_array_equal(out.numpy(), expected)
    assert type(la.attention(q, torch.from_numpy(k), v)) is np.ndarray


def test_expanded_mask_is_not_copied(rng):
    q, k, v = qkv(rng, rows=6, keys=40)
    mask = torch.from_numpy(rng.random((1, 1, 6, 1)) > 0.5).expand(1, 4, 6, 40)
    np.testing.assert_array_equal(la.attention(q, k, v, mask=mask), la.attention(q, k, v, mask=mask.numpy().copy()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_varlen_and_merge(rng, dtype):
    q, k, v = (torch.from_numpy(normal(rng, (20, heads, 16))).to(dtype) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 5, 20], dtype=torch.int32)
    out, lse = la.attention_varlen(q, k, v, bounds, bounds, causal=True, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32 and lse.shape == (4, 20)
    tail = [x[5:].transpose(0, 1) for x in (q, k, v)]
    whole = la.attention(*tail, causal=True)
    np.testing.assert_array_equal(out[5:].transpose(0, 1).float().numpy(), whole.float().numpy())
    merged, total = la.merge([(out, lse.T), (out, lse.T)])
    assert merged.dtype == dtype and isinstance(total, torch.Tensor)
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(total, lse.T + np.log(2), check_stride=False)


def test_gradients_are_refused_not_dropped(rng):
    q, k, v = tensors(rng, torch.float32)
    q.requires_grad_()
    with pytest.raises(
        ValueError, match=r"^q: got a tensor that requires grad.*longattn\.torch\.attention.*torch\.no_grad\(\)"
    ):
        la.attention(q, k, v)
    with torch.no_grad():
        allowed = la.attention(q, k, v)
    with torch.inference_mode():
        assert torch.equal(la.attention(q, k, v), allowed)
    assert torch.equal(la.attention(torch.nn.Parameter(q.detach(), requires_grad=False), k, v), allowed)


def test_other_devices_and_layouts_are_refused(rng):
    q, k, v = tensors(rng, torch.float32)
    with pytest.raises(ValueError, match=r"^k: got a tensor on device meta, expected a CPU tensor"):
        la.attention(q, k.to("meta"), v)
    with pytest.raises(ValueError, match=r"^v: got a tensor of layout torch.sparse_coo"):
        la.attention(q, k, v.to_sparse())
    with pytest.raises(TypeError, match=r"^q: got dtype float64.*or float64 for all of q, k and v"):
        la.attention(q.double(), k, v)
    with pytest.raises(TypeError, match=r"^q: got dtype torch.float8_e4m3fn"):
        la.attention(q.to(torch.float8_e4m3fn), k, v)


def test_negated_imaginary_parts(rng):
    """Their sign is a bit of the tensor, which numpy does not know."""
    q, k, v = (torch.from_numpy(x) for x in qkv(rng, rows=6, keys=9))
    lazy = torch.complex(k, -q[:, : k.shape[1], :1].expand_as(k)).conj().imag
    assert lazy.is_neg()
    assert torch.equal(la.attention(q, lazy, v), la.attention(q, lazy.clone(), v))


def test_tensors_of_transforms_are_refused(rng):
    q, k, v = (torch.from_numpy(x) for x in qkv(rng, rows=6, keys=9))
    with pytest.raises(ValueError, match=r"^q: got a Tensor without memory of its own .* call longattn\.torch"):
        torch.func.vmap(lambda x: la.attention(x, k, v))(torch.stack([q, q]))


def test_out_has_the_kind_of_q(rng):
    q, k, v = tensors(rng, torch.float32, rows=3, keys=9)
    out = torch.zeros(1, 4, 3, 16)
    with pytest.raises(TypeError, match=r"^out: got numpy.ndarray, expected a torch tensor as q is"):
        la.attention(q, k, v, out=out.numpy())
    with pytest.raises(TypeError, match=r"^out: got torch.Tensor, expected a numpy array as q is"):
        la.attention(q.numpy(), k, v, out=out)
    with pytest.raises(TypeError, match=r"^out: got dtype bfloat16, expected float32"):
        la.attention(q, k, v, out=out.bfloat16())
    with pytest.raises(ValueError, match=r"^out: got strides"):
        la.attention(q, k, v, out=torch.zeros(1, 4, 1, 16).expand(1, 4, 3, 16))
    with pytest.raises(ValueError, match=r"^out: got an array that overlaps q"):
        la.attention(q, k, v, out=q)
    assert (out == 0).all()


def test_importing_longattn_does_not_import_torch():
    code = "import sys, longattn; assert not {'torch', 'transformers', 'matplotlib'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
