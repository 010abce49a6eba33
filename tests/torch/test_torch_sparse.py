"""`longattn.torch` over windows of grids and over blocks: gradients and whole graphs."""

import warnings

import numpy as np
import pytest

import longattn as la
import tolerances
from longattn.reference import sparse as reference
from random_arrays import normal, qkv
from random_lists import random_mask
from running import on_threads

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

import longattn.torch  # noqa: E402

neighborhood = longattn.torch.neighborhood_attention
halo_attention = longattn.torch.halo_attention
block_sparse = longattn.torch.block_sparse_attention
windowed = longattn.torch.windowed_attention
na_qk, na_av = longattn.torch.na_qk, longattn.torch.na_av


def dense(q, k, v, mask, *, bias=None, scale=None, softcap=0.0, sinks=None):
    """Output and lse by torch's own operations in float64; q, k and v `[B, H, L, D]`."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scale = scale[..., None].double() if isinstance(scale, torch.Tensor) else scale
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    logits = logits.masked_fill(~mask, -torch.inf)
    lse = logits.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks[:, None])
    return (logits - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp() @ v, lse


def compare(function, oracle, arrays, out_tolerance):
    """Results and gradients of a fixed linear form, beside those of the oracle in float64."""
    generator = torch.Generator().manual_seed(0)
    found, expected = [], []
    for call, dtype, into in ((function, None, found), (oracle, torch.float64, expected)):
        inputs = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in arrays]
        results = call(*inputs)
        if not expected and into is found:
            weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in results]
        present = [x for x in inputs if x is not None]
        grads = torch.autograd.grad(results, present, [w.to(x.dtype) for w, x in zip(weights, results, strict=True)])
        into += [*results, *grads]
    for ours, theirs in zip(found, expected, strict=True):
        largest = float(theirs.abs().max())
        np.testing.assert_allclose(
            ours.detach().double().numpy(), theirs.detach().numpy(), rtol=out_tolerance, atol=out_tolerance * largest
        )


CASES = [
    ((23,), {"window": 6}),
    ((40,), {"window": 9, "stride": 3, "causal": True}),
    ((9, 10), {"window": 5}),
    ((11, 12), {"window": (3, 4), "dilation": (3, 2), "causal": (True, False)}),
    ((17, 18), {"window": (5, 8), "stride": (2, 3)}),
    ((3, 5, 6), {"window": (2, 3, 5), "causal": (False, True, False)}),
]


def grid_tensors(rng, shape, *, heads=4, kv_heads=2, dim=8, value_dim=6, extra=0, window=None, dtype=torch.float32):
    arrays = [normal(rng, (2, heads, *shape, dim)), *(normal(rng, (2, kv_heads, *shape, d)) for d in (dim, value_dim))]
    arrays += [normal(rng, (2, kv_heads, extra, d)) if extra else None for d in (dim, value_dim)]
    sizes = reference.spread(window, len(shape)) if window else None
    arrays.append(normal(rng, (heads, *(2 * w - 1 for w in sizes))) if sizes else None)
    return [None if x is None else torch.from_numpy(x).to(dtype) for x in arrays]


def oracle_of(shape, rule, **options):
    mask = torch.from_numpy(reference.neighborhood_mask(shape, **rule))
    sizes, gaps = (reference.spread(rule.get(name, 1), len(shape)) for name in ("window", "dilation"))

    def call(q, k, v, extra_k=None, extra_v=None, table=None):
        grid = q.shape[:-1]
        q, k, v = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (q, k, v))
        bias, seen = None, mask
        if table is not None:
            tokens = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, len(shape))
            places = tokens // np.array(gaps)
            entry = np.clip(places[None] - places[:, None] + np.array(sizes) - 1, 0, 2 * np.array(sizes) - 2)
            bias = table[(slice(None), *map(torch.from_numpy, np.moveaxis(entry, -1, 0)))]
        if extra_k is not None:
            more = extra_k.shape[2]
            k, v = torch.cat([extra_k, k], 2), torch.cat([extra_v, v], 2)
            seen = torch.cat([torch.ones(len(mask), more, dtype=torch.bool), mask], 1)
            if bias is not None:
                bias = torch.cat([bias.new_zeros(*bias.shape[:2], more), bias], 2)
        out, lse = dense(q, k, v, seen, bias=bias, **options)
        return out.reshape(*grid, -1), lse.reshape(grid)

    return call


@pytest.mark.parametrize(("shape", "rule"), CASES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_of_neighborhoods(rng, isa, shape, rule, with_bias):
    arrays = grid_tensors(rng, shape, window=rule["window"] if with_bias else None)
    given = [x for x in arrays if x is not None]

    def ours(q, k, v, bias=None):
        return neighborhood(q, k, v, bias=bias, return_lse=True, **rule)

    oracle = oracle_of(shape, rule)
    compare(ours, lambda q, k, v, bias=None: oracle(q, k, v, None, None, bias), given, 2e-5)


@pytest.mark.parametrize(("shape", "rule"), [case for case in CASES if "stride" not in case[1]])
def test_gradients_of_the_halves(rng, isa, shape, rule):
    """With a softmax between them they are the whole."""

    def ours(q, k, v, bias):
        logits = na_qk(q, k, bias=bias, scale=0.4, **rule)
        out = na_av(logits.softmax(-1), v, **rule)
        return out, logits.logsumexp(-1)

    oracle = oracle_of(shape, rule, scale=0.4)
    arrays = grid_tensors(rng, shape, window=rule["window"])
    given = [x for x in arrays if x is not None]
    compare(ours, lambda q, k, v, bias: oracle(q, k, v, None, None, bias), given, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_storage_dtypes_of_the_halves(rng, dtype):
    shape, rule = (9, 10), {"window": 5}
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]

    def ours(q, k, v):
        return (na_av(na_qk(q, k, **rule).softmax(-1).to(dtype), v, **rule),)

    oracle = oracle_of(shape, rule)
    compare(ours, lambda q, k, v: oracle(q, k, v)[:1], grid_tensors(rng, shape, dtype=dtype)[:3], tolerance)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_gradients_with_extra_keys_and_options(rng, isa, softcap):
    shape, rule = (9, 10), {"window": 3}
    arrays = grid_tensors(rng, shape, extra=5, window=3)

    def ours(q, k, v, extra_k, extra_v, bias):
        given = {"extra_k": extra_k, "extra_v": extra_v, "bias": bias}
        return neighborhood(q, k, v, scale=0.4, softcap=softcap, return_lse=True, **given, **rule)

    compare(ours, oracle_of(shape, rule, scale=0.4, softcap=softcap), arrays, 2e-5)


def test_gradients_of_large_groups_and_grids(rng, isa):
    shape, rule = (21, 22), {"window": 7}
    compare(
        lambda q, k, v: neighborhood(q, k, v, return_lse=True, **rule),
        oracle_of(shape, rule),
        grid_tensors(rng, shape, heads=8, kv_heads=1, dim=20)[:3],
        2e-5,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_storage_dtypes(rng, dtype):
    shape, rule = (9, 10), {"window": 5}
    tensors = grid_tensors(rng, shape, dtype=dtype)[:3]
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    compare(lambda *x: neighborhood(*x, return_lse=True, **rule), oracle_of(shape, rule), tensors, tolerance)


#: Grid and rule: regions beyond the grid, short last blocks, strides, a block larger than the grid.
HALOS = [
    ((23,), {"block": 8, "halo": 3}),
    ((23,), {"block": 6, "halo": 9, "stride": 3}),
    ((8, 12), {"block": 4, "halo": 0, "stride": 2}),
    ((9, 10), {"block": 4, "halo": 2}),
    ((9, 10), {"block": (4, 3), "halo": (1, 4), "stride": (2, 3)}),
    ((5, 6), {"block": 9, "halo": 2}),
    ((3, 5, 6), {"block": (2, 3, 4), "halo": (1, 0, 2), "stride": (1, 3, 2)}),
]


def halo_tensors(rng, shape, rule, *, dtype=torch.float32, **sizes):
    """Queries, keys, values and a table for each axis."""
    q, k, v = grid_tensors(rng, shape, dtype=dtype, **sizes)[:3]
    both = zip(*(reference.spread(rule[name], len(shape)) for name in ("block", "halo")), strict=True)
    return [q, k, v, *(torch.from_numpy(normal(rng, (2 * (b + h) - 1, q.shape[-1]), spread=0.5)) for b, h in both)]


def halo_oracle(shape, *, block, halo, stride=1, scale_rel=False, mask_pad=True, scale=None):
    """Over the grid and zeros around it, all pairs of which have a logit."""
    sizes, rims, steps = (np.array(reference.spread(x, len(shape))) for x in (block, halo, stride))
    ends = -(-np.array(shape) // sizes) * sizes + rims

    def places(*ranges):
        return np.stack(np.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, len(shape))

    queries = places(*(np.arange(0, n, step) for n, step in zip(shape, steps, strict=True)))
    keys = places(*(np.arange(-rim, end) for rim, end in zip(rims, ends, strict=True)))
    offset = keys - (queries // sizes * sizes - rims)[:, None]
    seen = ((offset >= 0) & (offset < sizes + 2 * rims)).all(-1)
    if mask_pad:
        seen &= ((keys >= 0) & (keys < shape)).all(-1)
    entries = torch.from_numpy(np.clip(keys - queries[:, None] + sizes + rims - 1, 0, 2 * (sizes + rims) - 2))
    pads = [int(n) for a in reversed(range(len(shape))) for n in (rims[a], ends[a] - shape[a])]

    def call(q, k, v, *tables):
        q = q[(slice(None), slice(None), *(slice(None, None, int(step)) for step in steps))]
        grid = q.shape[:-1]
        k, v = (torch.nn.functional.pad(x, (0, 0, *pads)) for x in (k, v))
        q, k, v = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (q, k, v))
        factor = (q.shape[-1] ** -0.5 if scale is None else scale) if scale_rel else 1.0
        own = torch.arange(len(queries))[:, None]
        parts = [(factor * q @ table.mT)[:, :, own, entries[..., a]] for a, table in enumerate(tables)]
        out, lse = dense(q, k, v, torch.from_numpy(seen), bias=sum(parts) if parts else None, scale=scale)
        return out.reshape(*grid, -1), lse.reshape(grid)

    return call


@pytest.mark.parametrize(("shape", "rule"), HALOS)
@pytest.mark.parametrize("mask_pad", [True, False])
@pytest.mark.parametrize("relative", [True, False])
def test_gradients_of_halos(rng, isa, shape, rule, mask_pad, relative):
    rule = rule | {"mask_pad": mask_pad}
    arrays = halo_tensors(rng, shape, rule)

    def ours(q, k, v, *tables):
        return halo_attention(q, k, v, relative=tables or None, return_lse=True, **rule)

    compare(ours, halo_oracle(shape, **rule), arrays if relative else arrays[:3], 2e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("options", [{"scale_rel": True}, {"scale": 0.3}, {"scale_rel": True, "scale": 0.3}], ids=str)
def test_gradients_of_halos_with_options(rng, isa, heads, options):
    shape, rule = (9, 10), {"block": 4, "halo": 2, **options}
    arrays = halo_tensors(rng, shape, rule, heads=heads[0], kv_heads=heads[1], dim=20)
    compare(
        lambda q, k, v, *tables: halo_attention(q, k, v, relative=tables, return_lse=True, **rule),
        halo_oracle(shape, **rule),
        arrays,
        2e-5,
    )


def test_gradients_of_some_halo_arguments(rng):
    """What requires no grad gets none, and changes nothing for the others."""
    rule = {"block": 4, "halo": 2}
    arrays = halo_tensors(rng, (9, 10), rule)

    def gradients(wanted):
        q, k, v, *tables = (x.clone().requires_grad_(n in wanted) for n, x in enumerate(arrays))
        out = halo_attention(q, k, v, relative=tables, **rule)
        out.square().sum().backward()
        return [x.grad for x in (q, k, v, *tables)]

    every = gradients(range(5))
    for wanted in ({0}, {1, 2}, {3}, {4}):
        for n, (found, whole) in enumerate(zip(gradients(wanted), every, strict=True)):
            assert found is None if n not in wanted else torch.equal(found, whole)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_storage_dtypes_of_halos(rng, dtype, relative):
    shape, rule = (9, 10), {"block": 4, "halo": 2, "stride": 2}
    tensors = halo_tensors(rng, shape, rule, dtype=dtype)
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    compare(
        lambda q, k, v, *tables: halo_attention(q, k, v, relative=tables or None, return_lse=True, **rule),
        halo_oracle(shape, **rule),
        tensors if relative else tensors[:3],
        tolerance,
    )


def test_gradients_of_halos_by_differences(rng):
    """Beside differences of the results; in float32, so over wide steps."""
    rule = {"block": 4, "halo": 1, "stride": 2}
    inputs = [x.requires_grad_() for x in halo_tensors(rng, (7,), rule, heads=2, kv_heads=1, dim=4, value_dim=3)]

    def function(q, k, v, table):
        return halo_attention(q, k, v, relative=[table], return_lse=True, **rule)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(function, inputs, eps=3e-2, atol=4e-3, rtol=2e-2, nondet_tol=0.0)


def test_halos_inside_transforms(rng):
    rule = {"block": 4, "halo": 1}
    q, k, v, table = halo_tensors(rng, (9,), rule)

    def loss(q, table):
        return halo_attention(q, k, v, relative=[table], **rule).square().sum()

    found = torch.func.grad(loss, argnums=(0, 1))(q, table)
    inputs = [x.clone().requires_grad_() for x in (q, table)]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_halos_have_the_same_numbers_as_without_autograd(rng):
    rule = {"block": 4, "halo": 2, "stride": 2}
    q, k, v, *tables = (x.requires_grad_() for x in halo_tensors(rng, (9, 10), rule))
    out = halo_attention(q, k, v, relative=tables, **rule)
    with torch.no_grad():
        assert torch.equal(out, la.sparse.halo_attention(q, k, v, relative=tables, **rule))


def test_threads_do_not_matter(rng):
    q, k, v = (x.requires_grad_() for x in grid_tensors(rng, (20, 21))[:3])
    found = on_threads(lambda: torch.autograd.grad(neighborhood(q, k, v, window=5).square().sum(), (q, k, v)), (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("block", [(16, 16), (50, 7), (200, 64)])
def test_gradients_of_blocks(rng, isa, heads, block, causal):
    q, k, v = (torch.from_numpy(x) for x in qkv(rng, batch=2, rows=130, keys=170, dim=12, value_dim=9))
    mask = random_mask(rng, batch=2, heads=heads, lengths=(130, 170), block_q=block[0], block_k=block[1])
    seen = torch.from_numpy(np.repeat(mask.to_dense_mask(), 4 // heads, axis=1))
    if causal:
        seen = seen & (torch.arange(170) <= torch.arange(40, 170)[:, None])
    # Rows without keys have an lse of -inf, whose gradient is none.
    compare(
        lambda q, k, v: (block_sparse(q, k, v, mask, causal=causal),),
        lambda q, k, v: dense(q, k, v, seen)[:1],
        (q, k, v),
        2e-5,
    )


def test_gradients_of_blocks_with_options(rng):
    q, k, v = (torch.from_numpy(x) for x in qkv(rng, rows=100, keys=100))
    mask = random_mask(rng, lengths=(100, 100), block_q=32, block_k=16) | la.BlockMask.from_blocks(
        np.ones((4, 7), bool), lengths=(100, 100), block_q=32, block_k=16
    )
    place = torch.arange(100)
    seen = (place <= place[:, None]) & (place >= place[:, None] - 20)
    options = {"scale": 0.3, "softcap": 2.0}
    compare(
        lambda *x: block_sparse(*x, mask, causal=True, window=(20, 0), return_lse=True, **options),
        lambda *x: dense(*x, seen, **options),
        (q, k, v),
        2e-5,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"softcap": 2.0, "scale": 0.5},
        {"bias": torch.linspace(-1, 1, 20)},
        {"alibi_slopes": torch.tensor([0.1, 0.2])},
        {"cu_seqlens_q": torch.tensor([0, 7, 20])},
        {"sinks": torch.tensor([0.3, -0.5])},
        {"segments": (torch.arange(20) % 2, torch.arange(20) % 2)},
    ],
    ids="-".join,
)
def test_gradients_of_blocks_by_differences(rng, options):
    """Beside differences of the results; in float32, so over wide steps."""
    q, k, v = (torch.from_numpy(x).requires_grad_() for x in qkv(rng, heads=2, kv_heads=1, rows=20, keys=20, dim=4))
    blocks = rng.random((3, 3)) < 0.6
    blocks[:, 0] = True
    mask = la.BlockMask.from_blocks(blocks | np.eye(3, dtype=bool), lengths=(20, 20), block_q=8, block_k=8)
    tensors = [q, k, v, *([options["sinks"].clone().requires_grad_()] if "sinks" in options else [])]

    def function(q, k, v, *sinks):
        given = options | ({"sinks": sinks[0]} if sinks else {})
        return block_sparse(q, k, v, mask, **given)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(function, tensors, eps=3e-2, atol=4e-3, rtol=2e-2, nondet_tol=0.0)


def test_constants_of_blocks(rng):
    q, k, v = (torch.from_numpy(x) for x in qkv(rng, rows=20, keys=20))
    mask = random_mask(rng, lengths=(20, 20), block_q=8, block_k=8)
    with pytest.raises(ValueError, match="bias: got a tensor that requires grad"):
        block_sparse(q, k, v, mask, bias=torch.zeros(20, requires_grad=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("radius", [6, (9, 2), torch.tensor([0, 3, 3, 50]), torch.tensor([[4, 0]] * 4)])
def test_gradients_of_windows(rng, isa, radius, causal):
    q, k, v = (torch.from_numpy(x) for x in qkv(rng, batch=2, rows=50, keys=60, dim=12, value_dim=9))
    sides = radius if isinstance(radius, torch.Tensor) else torch.tensor(radius).expand(4, 2)
    sides = sides.reshape(4, -1).expand(4, 2)
    distance = torch.arange(60) - torch.arange(10, 60)[:, None]
    seen = (distance >= -sides[:, 0, None, None]) & (distance <= sides[:, 1, None, None])
    compare(
        lambda *x: windowed(*x, radius=radius, causal=causal, scale=0.3, softcap=2.0, return_lse=True),
        lambda *x: dense(*x, seen & (distance <= 0) if causal else seen, scale=0.3, softcap=2.0),
        (q, k, v),
        2e-5,
    )


@pytest.mark.parametrize("options", [{}, {"scale": 0.4, "softcap": 1.5}, {"scale": torch.linspace(0.2, 1.5, 360)}])
def test_gradients_of_sinks_beside_neighborhoods(rng, isa, options):
    shape, rule = (9, 10), {"window": 3}
    arrays = grid_tensors(rng, shape, extra=5, window=3)
    arrays.append(torch.from_numpy(normal(rng, (4,))))
    if isinstance(options.get("scale"), torch.Tensor):
        options = {"scale": options["scale"].reshape(1, 4, 90).expand(2, 4, 90)}

    def ours(q, k, v, extra_k, extra_v, bias, sinks):
        given = {"extra_k": extra_k, "extra_v": extra_v, "bias": bias, "sinks": sinks}
        return neighborhood(q, k, v, return_lse=True, **given, **options, **rule)

    def theirs(q, k, v, extra_k, extra_v, bias, sinks):
        return oracle_of(shape, rule, sinks=sinks, **options)(q, k, v, extra_k, extra_v, bias)

    compare(ours, theirs, arrays, 2e-5)


@pytest.mark.parametrize("options", [{}, {"scale": 0.3, "softcap": 2.0}, {"scale": torch.linspace(0.2, 1.5, 4)}])
def test_gradients_of_sinks_beside_windows(rng, isa, options):
    q, k, v = (torch.from_numpy(x) for x in qkv(rng, batch=2, rows=50, keys=60, dim=12, value_dim=9))
    distance = (torch.arange(60) - torch.arange(10, 60)[:, None]).abs()
    theirs = options
    if isinstance(options.get("scale"), torch.Tensor):
        theirs = {"scale": options["scale"][:, None]}
    compare(
        lambda q, k, v, sinks: windowed(q, k, v, radius=6, sinks=sinks, return_lse=True, **options),
        lambda q, k, v, sinks: dense(q, k, v, distance <= 6, sinks=sinks, **theirs),
        (q, k, v, torch.from_numpy(normal(rng, (4,)))),
        2e-5,
    )


#: Options of windows of 5 queries and 9 keys, for 4 heads.
WINDOWS = {
    "one radius": {"radius": 2},
    "causal, by head": {"radius": torch.tensor([[0, 1], [9, 2], [5, 5], [1, 0]]), "causal": True},
    "centres, some without keys": {"radius": (1, 2), "centre": torch.tensor([0, 40, 3, 8, -9])},
    "scale and softcap": {"radius": 2, "scale": 0.8, "softcap": 1.5},
    "scales of rows": {"radius": 2, "scale": torch.linspace(0.2, 1.5, 20, dtype=torch.float64).reshape(4, 5)},
    "packed": {"radius": 3, "cu_seqlens_q": torch.tensor([0, 2, 2, 5]), "cu_seqlens_k": torch.tensor([0, 4, 6, 9])},
}


@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_gradcheck_of_windows(rng, options, kv_heads):
    arrays = qkv(rng, heads=4, kv_heads=kv_heads, rows=5, keys=9, dim=4, value_dim=3)
    q, k, v = (torch.from_numpy(x).double().requires_grad_() for x in arrays)
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v: windowed(q, k, v, **options), (q, k, v))
    assert torch.autograd.gradcheck(
        lambda q, k, v, sinks: windowed(q, k, v, sinks=sinks, return_lse=True, **options), (q, k, v, sinks)
    )


@pytest.mark.parametrize("options", [{}, {"stride": 2, "causal": True}, {"softcap": 1.5, "scale": 0.8}], ids=str)
def test_gradients_of_neighborhoods_by_differences(rng, options):
    """Beside differences of the results; in float32, so over wide steps."""
    arrays = grid_tensors(rng, (8,), heads=2, kv_heads=1, dim=4, value_dim=3, extra=2, window=3)
    inputs = [x.requires_grad_() for x in (*arrays, torch.tensor([0.3, -0.5]))]

    def function(q, k, v, extra_k, extra_v, bias, sinks):
        given = {"extra_k": extra_k, "extra_v": extra_v, "bias": bias, "sinks": sinks}
        return neighborhood(q, k, v, window=3, return_lse=True, **given, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(function, inputs, eps=3e-2, atol=4e-3, rtol=2e-2, nondet_tol=0.0)


def test_gradients_of_packed_windows(rng):
    q, k, v = (torch.from_numpy(x) for x in qkv(rng, rows=50, keys=50))
    bounds, centre = torch.tensor([0, 20, 50]), torch.arange(50) % 20
    place = torch.where(torch.arange(50) < 20, 0, 20)
    distance = torch.arange(50) - (centre + place)[:, None]
    seen = (distance.abs() <= 5) & (place == place[:, None])
    compare(
        lambda *x: windowed(*x, radius=5, centre=centre, cu_seqlens_q=bounds, return_lse=True),
        lambda *x: dense(*x, seen),
        (q, k, v),
        2e-5,
    )


def test_same_numbers_as_without_autograd(rng):
    q, k, v = (x.requires_grad_() for x in grid_tensors(rng, (9, 10))[:3])
    out = neighborhood(q, k, v, window=3)
    with torch.no_grad():
        assert torch.equal(out, la.sparse.generalized_neighborhood_attention(q, k, v, window=3))


def test_opcheck(rng):
    q, k, v = (x.requires_grad_() for x in grid_tensors(rng, (4, 5), dim=3, value_dim=2)[:3])
    rule = [3, 3], [1, 1], [1, 1], [False, False]
    sinks = torch.zeros(4, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = torch.ops.longattn.neighborhood_attention.default
    torch.library.opcheck(operator, (q, k, v, *rule, None, None, None, None, None, 0.0, sinks), test_utils=checks)
    q, k, v = (x.requires_grad_() for x in grid_tensors(rng, (9,), dim=3, value_dim=2)[:3])
    given = (torch.ones(4, 2, dtype=torch.int64), None, None, None, True, None, None, 0.0, sinks)
    rule = [3], [1], [True]
    torch.library.opcheck(torch.ops.longattn.na_qk.default, (q, k, *rule, None, None), test_utils=checks)
    weights = torch.ones(2, 4, 9, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.longattn.na_av.default, (weights, v, *rule), test_utils=checks)
    torch.library.opcheck(torch.ops.longattn.windowed_attention.default, (q, k, v, *given), test_utils=checks)
    rule = [4], [1], [2]
    for table in (None, torch.ones(9, 3, requires_grad=True)):
        given = (*rule, table, None, None, False, True, None)
        torch.library.opcheck(torch.ops.longattn.halo_attention.default, (q, k, v, *given), test_utils=checks)


@pytest.mark.parametrize("kind", ["neighborhood", "blocks", "windows", "halves", "halos"])
def test_whole_graphs(rng, kind):
    table = torch.from_numpy(normal(rng, (13, 8)))
    mask = la.BlockMask.from_blocks(np.eye(4, dtype=bool), lengths=(20, 20), block_q=5, block_k=5)

    def function(q, k, v):
        if kind == "blocks":
            return block_sparse(q, k, v, mask, causal=True).sin()
        if kind == "windows":
            return windowed(q, k, v, radius=(3, 1)).sin()
        if kind == "halves":
            return na_av(na_qk(q, k, window=3).tanh(), v, window=3).sin()
        if kind == "halos":
            return halo_attention(q, k, v, block=4, halo=3, stride=2, relative=[table]).sin()
        return neighborhood(q, k, v, window=3, dilation=2).sin()

    q, k, v = (x.requires_grad_() for x in grid_tensors(rng, (20,))[:3])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, expected = compiled(q, k, v), function(q, k, v)
    assert torch.equal(found, expected)
    for ours, theirs in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (found, expected)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: halo_attention(x, x, x, block=4, stride=(1, 2)), "stride: got 2 numbers, expected 1"),
        (lambda x: halo_attention(x, x, x, block=4, stride=0), "stride: got 0, expected at least 1"),
        (lambda x: halo_attention(x[0], x[0], x[0], block=4), "q: got shape .* expected rank 4"),
    ],
)
def test_compiled_halos_say_what_is_wrong(rng, call, words):
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=words):
        torch.compile(call, fullgraph=True, backend="eager")(grid_tensors(rng, (6,))[0])


@pytest.mark.parametrize(
    ("call", "works"),
    [
        (lambda *x, **options: neighborhood(*x, window=3, **options), "neighborhood"),
        (lambda *x, **options: halo_attention(*x, block=2, halo=1, **options), "halo"),
        (lambda *x, **options: windowed(*(y[0] for y in x), radius=2, **options), "windowed"),
        (
            lambda *x, **options: block_sparse(
                *x, la.BlockMask.from_blocks(np.ones((1, 1), bool), lengths=(6, 6), block_q=6, block_k=6), **options
            ),
            "block_sparse",
        ),
    ],
    ids=["neighborhood", "halo", "windowed", "block_sparse"],
)
def test_return_lse_is_looked_at_first(rng, monkeypatch, call, works):
    monkeypatch.setattr(longattn._torch_sparse, f"_{works}", lambda **_: pytest.fail("it was computed"))
    with pytest.raises(TypeError, match="return_lse: got 1, expected True or False"):
        call(*grid_tensors(rng, (6,))[:3], return_lse=1)


def test_gradients_have_the_kinds_of_what_they_are_of(rng):
    q, k, v = grid_tensors(rng, (6,))[:3]
    bias, sinks, table = (normal(rng, shape) for shape in ((q.shape[1], 5), (q.shape[1],), (5, q.shape[-1])))
    extra_k, extra_v = (x[:, :, :2].numpy() for x in (k, v))
    given = {"extra_k": extra_k, "extra_v": extra_v, "bias": bias, "sinks": sinks, "window": 3}
    out, lse = la.sparse.generalized_neighborhood_attention(q, k, v, return_lse=True, **given)
    found = la.sparse.neighborhood_attention_backward(out, q, k, v, out, lse, **given)
    assert [type(x) for x in found] == [torch.Tensor] * 3 + [np.ndarray] * 4
    given = {"block": 2, "halo": 1}
    for arrays, of_each in (((q, k, v), table), ([x.numpy() for x in (q, k, v)], torch.from_numpy(table))):
        out, lse = la.sparse.halo_attention(*arrays, relative=[of_each], return_lse=True, **given)
        found = la.sparse.halo_attention_backward(out, *arrays, out, lse, relative=[of_each], **given)
        assert [type(x) for x in (*found[:3], *found.d_relative)] == [type(x) for x in (*arrays, of_each)]


@pytest.mark.parametrize(
    "call", [lambda *x: neighborhood(*x, window=3), lambda *x: halo_attention(*x, block=2, halo=1)]
)
def test_second_derivatives_are_refused(rng, call):
    q, k, v = (x.requires_grad_() for x in grid_tensors(rng, (6,))[:3])
    (dq,) = torch.autograd.grad(call(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"longattn\.torch: got a second backward pass"):
        dq.sum().backward()


def test_nan_reaches_only_what_sees_it(rng):
    q, k, v = grid_tensors(rng, (20,), heads=1, kv_heads=1)[:3]
    k[0, 0, 10, 0] = torch.nan
    inputs = [x.requires_grad_() for x in (q, k, v)]
    gradients = torch.autograd.grad(neighborhood(*inputs, window=3).sum(), inputs)
    near = np.abs(np.arange(20) - 10)
    for gradient, reach in zip(gradients, (1, 2, 2), strict=True):
        bad = gradient[0, 0].isnan().any(-1).numpy()
        assert (bad == (near <= reach)).all()
        assert not gradient[1].isnan().any()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: neighborhood(x, x, x, window=9), ValueError, "window: got 9"),
        (lambda x: neighborhood(x, x.numpy(), x, window=3), TypeError, "k: got ndarray"),
        (lambda x: neighborhood(x, x.to("meta"), x, window=3), ValueError, "k: got a tensor on device meta"),
        (lambda x: neighborhood(x, x, x, window="3"), TypeError, "window: got '3', expected an integer"),
        (lambda x: neighborhood(x, x, x, window=3, stride=(1.5,)), TypeError, "stride: got 1.5, expected an integer"),
        (lambda x: neighborhood(x, x, x, window=3, dilation=True), TypeError, "dilation: got True, expected an"),
        (lambda x: neighborhood(x, x, x, window=3, causal=1), TypeError, "causal: got 1, expected True or False"),
        (
            lambda x: windowed(x, x, x, radius=torch.ones(2, dtype=torch.int64, device="meta")),
            ValueError,
            "radius: got a tensor on device meta",
        ),
        (lambda x: block_sparse(x, x, x, None), TypeError, "block_mask: got NoneType"),
        (lambda x: windowed(x, x, x, radius=-1), ValueError, "radius: got -1"),
        (lambda x: windowed(x[0, 0, 0], x, x, radius=1), ValueError, "q: got shape"),
        (lambda x: windowed(3, x, x, radius=1), TypeError, "q: got int"),
        (lambda x: na_qk(x, x, window=9), ValueError, "window: got 9"),
        (lambda x: na_qk(x, None, window=3), TypeError, "k: got None"),
        (lambda x: na_av(x, x, window=3), ValueError, "weights: got 4 places"),
        (lambda x: na_av(None, x, window=3), TypeError, "weights: got None"),
        (lambda x: windowed(x, x, x, radius=1, centre=3), TypeError, "centre: got int"),
        (lambda x: windowed(x, x, x, radius=1, sinks=torch.zeros(3)), ValueError, "sinks: got shape"),
        (
            lambda x: windowed(x, x, x, radius=1, scale=torch.ones(2, requires_grad=True)),
            ValueError,
            "scale: got a tensor that requires grad",
        ),
        (lambda x: neighborhood(x, x, x, window=3, sinks=torch.zeros(3)), ValueError, "sinks: got shape"),
        (lambda x: halo_attention(x, x, x, stride=3), ValueError, "stride: got 3, expected a divisor of the block 8"),
        (lambda x: halo_attention(x, x, x, block=1.5), TypeError, "block: got 1.5, expected an integer"),
        (lambda x: halo_attention(x, x, x, halo=-1), ValueError, "halo: got -1"),
        (lambda x: halo_attention(x, x, x, mask_pad=1), TypeError, "mask_pad: got 1, expected True or False"),
        (lambda x: halo_attention(x, x, x, scale=x), TypeError, "scale: got"),
        (lambda x: halo_attention(x, x.numpy(), x), TypeError, "k: got ndarray"),
        (lambda x: halo_attention(x, x, x, relative=x), TypeError, "relative: got Tensor, expected a sequence"),
        (lambda x: halo_attention(x, x, x, relative=[x, x]), ValueError, "relative: got 2 tables, expected 1"),
        (lambda x: halo_attention(x, x, x, relative=[None]), TypeError, r"relative\[0\]: got None"),
        (lambda x: halo_attention(x, x, x, relative=[x]), ValueError, r"relative\[0\]: got shape"),
        (lambda x: halo_attention(x, x, x, relative=[x.to("meta")]), ValueError, r"relative\[0\]: got a tensor on dev"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.zeros(1, 2, 8, 4))


def test_reference_and_gradients_agree_with_tolerances(rng):
    q, k, v = (x.numpy() for x in grid_tensors(rng, (9, 10), dim=8, value_dim=8)[:3])
    out, lse = la.sparse.generalized_neighborhood_attention(q, k, v, window=3, return_lse=True)
    found = la.sparse.neighborhood_attention_backward(np.ones_like(out), q, k, v, out, lse, window=3)
    # Rows of weights sum to 1: so do the gradients of values, over all queries of a group.
    tolerances.check_linear(found.dv.sum(axis=(2, 3)), np.full((2, 2, 8), 180.0), 180.0, 180)
