"""Random shapes, dtypes, layouts and options against the reference, on every instruction set."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

import longattn as la
import tolerances
from longattn import _core
from longattn.reference import dense as reference
from random_arrays import DTYPES, F32, LAYOUTS, normal
from running import running_on

DIMS = st.sampled_from([1, 3, 4, 16, 40, 64, 80, 96, 128, 200])
LENGTHS = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 127, 129, 255, 256, 257, 300]))


@st.composite
def problems(draw):
    """Arrays and options of one call, and the largest magnitude that the options add to a logit."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, kv_heads = draw(st.integers(0, 2)), draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 5))
    rows, keys, dim, value_dim = draw(LENGTHS), draw(LENGTHS), draw(DIMS), draw(DIMS)
    q_dtype, kv_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    q = normal(rng, (batch, heads, rows, dim), q_dtype, draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from([1, 8])))
    k = normal(rng, (batch, kv_heads, keys, dim), kv_dtype, draw(st.sampled_from(LAYOUTS)))
    v = normal(rng, (batch, kv_heads, keys, value_dim), kv_dtype, draw(st.sampled_from(LAYOUTS)))

    side = st.one_of(st.just(-1), st.integers(0, 70))
    options = {"causal": draw(st.booleans()), "window": (draw(side), draw(side))}
    offset = 0.0
    if draw(st.booleans()):
        options["scale"] = draw(st.floats(-1.0, 1.0, width=32))
    elif draw(st.booleans()):
        shapes = [(heads,), (heads, rows), (batch, heads, rows)]
        options["scale"] = rng.uniform(-1, 1, draw(st.sampled_from(shapes)))
    if draw(st.booleans()):
        options["softcap"] = draw(st.floats(0.125, 100.0, width=32))
    shape = tuple(n if draw(st.booleans()) else 1 for n in (batch, heads, rows, keys))
    if draw(st.booleans()):
        options["mask"] = rng.random(shape) > draw(st.sampled_from([0.1, 0.6]))
    if draw(st.booleans()):
        options["bias"] = normal(rng, shape, draw(st.sampled_from([*DTYPES, np.float64])))
        offset += 6.0
    if draw(st.booleans()):
        options["alibi_slopes"] = rng.random((batch, heads) if draw(st.booleans()) else (heads,))
        offset += rows + keys
    if draw(st.booleans()):
        options["sinks"] = normal(rng, (heads,), F32, spread=3.0)
        offset += 12.0
    if draw(st.booleans()):
        entries = draw(st.integers(1, 60))
        options["relative_bias"] = normal(rng, (heads, entries), draw(st.sampled_from([*DTYPES, np.float64])))
        if draw(st.booleans()):
            options["relative_zero"] = draw(st.integers(0, entries - 1))
        offset += 6.0
    if draw(st.booleans()):
        count = draw(st.integers(1, 4))
        shapes = [(batch, n) if draw(st.booleans()) else (n,) for n in (rows, keys)]
        options["segments"] = tuple(rng.integers(-count, count, shape) for shape in shapes)
    if draw(st.booleans()):
        options["visible_until"] = rng.integers(
            keys - rows - 2, keys + 2, draw(st.sampled_from([(keys,), (batch, keys)]))
        )
    if draw(st.booleans()):
        lse = normal(rng, (batch, heads, rows), spread=3.0)
        lse[rng.random(lse.shape) > 0.7] = -np.inf
        options["state"] = (
            normal(rng, (batch, heads, rows, value_dim), draw(st.sampled_from([*DTYPES, np.float64]))),
            lse,
        )
        offset += 12.0
    return (q, k, v), options, offset


def tolerance_of(compare, q, k, v, options, offset):
    """`compare` is a function of `tolerances`; carried outputs may be larger than the values."""
    scale = options.get("scale")
    scale = None if scale is None else float(np.abs(scale).max(initial=0.0))
    o = options["state"][0].astype(np.float32) if "state" in options else v[..., :1, :]
    values = np.concatenate([x.astype(np.float32).ravel() for x in (v, o)])
    return compare(q, k, values, scale=scale, offset=offset)


@settings(max_examples=60 * len(_core.available_isas()))
@given(problem=problems(), isa=st.sampled_from(_core.available_isas()))
def test_attention_is_its_formula(problem, isa):
    (q, k, v), options, offset = problem
    with running_on(isa):
        out, lse = la.attention(q, k, v, return_lse=True, **options)
    expected, expected_lse = reference.attention(q, k, v, return_lse=True, **as_float32(options))
    tolerance = tolerance_of(tolerances.attention, q, k, v, options, offset)
    tolerance.check(out, expected, lse, expected_lse)


@settings(max_examples=40 * len(_core.available_isas()))
@given(problem=problems(), threshold=st.floats(0.0, 0.9), isa=st.sampled_from(_core.available_isas()))
def test_skipping_errs_by_at_most_the_threshold_times_the_keys(problem, threshold, isa):
    (q, k, v), options, offset = problem
    with running_on(isa):
        expected, expected_lse = la.attention(q, k, v, return_lse=True, **options)
        out, lse = la.attention(q, k, v, return_lse=True, skip_threshold=threshold, **options)
    expected, out = (np.asarray(x, np.float64) for x in (expected, out))
    tolerance = tolerance_of(tolerances.same_storage, q, k, v, options, offset)
    share = k.shape[2] * threshold
    dark = expected_lse == -np.inf
    np.testing.assert_array_equal(lse == -np.inf, dark)
    missing = expected_lse[~dark] - lse[~dark]
    assert (missing >= -tolerance.lse_atol).all() and (missing <= np.log1p(share) + tolerance.lse_atol).all()
    # Keys left out had values of at most this; what stands for them, values or a carried output, too.
    largest = max(float(np.abs(x.astype(np.float64)).max(initial=0.0)) for x in (v, options.get("state", (v,))[0]))
    bound = 2 * share * largest + tolerance.atol + tolerance.rtol * np.abs(expected)
    assert (np.abs(out - expected) <= bound).all()


@settings(max_examples=40 * len(_core.available_isas()))
@given(problem=problems(), cut=st.integers(0, 300), isa=st.sampled_from(_core.available_isas()))
def test_splitting_the_keys_and_merging_is_the_whole(problem, cut, isa):
    (q, k, v), options, offset = problem
    keys = k.shape[2]
    cut = min(cut, keys)
    positions = np.arange(q.shape[2])[:, None] + keys - q.shape[2] - np.arange(keys)
    mask = reference.visible_keys(positions, options.pop("causal"), options.pop("window"))
    mask = mask & options.pop("mask", True)
    bias = np.zeros((1, 1, 1, 1)) if "bias" not in options else options.pop("bias").astype(np.float32)
    if "alibi_slopes" in options:
        bias = bias - options.pop("alibi_slopes")[..., None, None] * np.abs(positions)
    bias = np.broadcast_to(bias, np.broadcast_shapes(bias.shape, (1, 1, 1, keys)))
    if "relative_bias" in options:
        table = options.pop("relative_bias").astype(np.float32)
        zero = options.pop("relative_zero", table.shape[1] - 1)
        bias = bias + table[:, np.clip(zero - positions, 0, table.shape[1] - 1)]
    if "segments" in options:
        own, of_keys = (np.atleast_2d(ids) for ids in options.pop("segments"))
        mask = mask & (own[:, None, :, None] == of_keys[:, None, None, :])
    if "visible_until" in options:
        until = np.atleast_2d(options.pop("visible_until"))
        mask = mask & (positions + np.arange(keys) < until[:, None, None, :])
    sinks, state = options.pop("sinks", None), options.pop("state", None)

    def part(begin, end, **more):
        own = {"mask": mask[..., begin:end], "bias": bias[..., begin:end]}
        return la.attention(q, k[:, :, begin:end], v[:, :, begin:end], return_lse=True, **own, **options, **more)

    with running_on(isa):
        whole, whole_lse = part(0, keys, sinks=sinks, state=state)
        out, lse = la.merge([part(0, cut, sinks=sinks, state=state), part(cut, keys)])
    carried = options if state is None else options | {"state": state}
    tolerance = tolerance_of(tolerances.same_storage, q, k, v, carried, offset)
    tolerance.check(out, np.asarray(whole, np.float64), lse, whole_lse)


@settings(max_examples=30 * len(_core.available_isas()))
@given(
    seed=st.integers(0, 2**32 - 1), lengths=st.lists(st.tuples(LENGTHS, LENGTHS), max_size=5), dim=DIMS,
    causal=st.booleans(), left=st.integers(-1, 40), isa=st.sampled_from(_core.available_isas()),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@example(seed=0, lengths=[(0, 5), (5, 0), (1, 1)], dim=4, causal=True, left=-1, isa=_core.isa(), dtype=F32)
def test_varlen_is_its_formula(*, seed, lengths, dim, causal, left, isa, dtype):
    rng = np.random.default_rng(seed)
    cu_q, cu_k = (np.cumsum([0, *(pair[n] for pair in lengths)]) for n in (0, 1))
    q, k, v = (
        normal(rng, (total, heads, dim), dtype) for total, heads in ((cu_q[-1], 4), (cu_k[-1], 2), (cu_k[-1], 2))
    )
    options = {"causal": causal, "window": (left, -1), "return_lse": True}
    with running_on(isa):
        out, lse = la.attention_varlen(q, k, v, cu_q, cu_k, **options)
    expected, expected_lse = reference.attention_varlen(q, k, v, cu_q, cu_k, **options)
    tolerance = tolerances.attention(*(x.swapaxes(0, 1) for x in (q, k, v)))
    tolerance.check(out, expected, lse, expected_lse)


def as_float32(options):
    """The options as the call rounds them."""
    names = ("bias", "alibi_slopes", "relative_bias")
    rounded = {name: options[name].astype(np.float32) for name in names if name in options}
    if isinstance(options.get("scale"), np.ndarray):
        rounded["scale"] = options["scale"].astype(np.float32)
    return options | rounded
