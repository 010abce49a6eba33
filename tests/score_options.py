"""Random queries, keys and score options, for functions that look at weights."""

import numpy as np
from hypothesis import strategies as st

from random_arrays import DTYPES, F32, LAYOUTS, normal

DIMS = st.sampled_from([1, 3, 16, 40, 64, 130])
LENGTHS = st.one_of(st.integers(0, 20), st.sampled_from([31, 65, 127, 129, 255, 257, 300]))


@st.composite
def options_for(draw):
    """Queries, keys, options of one call, and the largest magnitude that the options add to a logit."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, kv_heads = draw(st.integers(0, 2)), draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    rows, keys, dim = draw(LENGTHS), draw(LENGTHS), draw(DIMS)
    q_dtype, k_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    q = normal(rng, (batch, heads, rows, dim), q_dtype, draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from([1, 8])))
    k = normal(rng, (batch, kv_heads, keys, dim), k_dtype, draw(st.sampled_from(LAYOUTS)))
    side = st.one_of(st.just(-1), st.integers(0, 70))
    options = {"causal": draw(st.booleans()), "window": (draw(side), draw(side))}
    offset = 0.0
    if draw(st.booleans()):
        options["scale"] = draw(st.floats(-1.0, 1.0, width=32))
    if draw(st.booleans()):
        options["softcap"] = draw(st.floats(0.125, 100.0, width=32))
    shape = tuple(n if draw(st.booleans()) else 1 for n in (batch, heads, rows, keys))
    if draw(st.booleans()):
        options["mask"] = rng.random(shape) > draw(st.sampled_from([0.1, 0.6]))
    if draw(st.booleans()):
        options["bias"] = normal(rng, shape, F32)
        offset += 6.0
    if draw(st.booleans()):
        options["alibi_slopes"] = rng.random((batch, heads) if draw(st.booleans()) else (heads,), np.float32)
        offset += rows + keys
    if draw(st.booleans()):
        options["sinks"] = normal(rng, (heads,), F32, spread=3.0)
        offset += 12.0
    if draw(st.booleans()):
        options["relative_bias"] = normal(rng, (heads, draw(st.integers(1, 90))), F32)
        options["relative_zero"] = draw(st.integers(0, options["relative_bias"].shape[1] - 1))
        offset += 6.0
    if draw(st.booleans()):
        options["segments"] = rng.integers(0, 3, rows), rng.integers(0, 3, (batch, keys))
    if draw(st.booleans()):
        options["visible_until"] = rng.integers(0, keys + 20, keys)
    return q, k, options, offset
