"""Random weights of Mamba blocks."""

import numpy as np

from longattn.linear import MambaWeights
from random_arrays import normal


def mamba(rng, width=6, inner=10, states=4, *, out=None, gate=True, rank=3, conv=3):
    """Weights of a block from `width` channels to `out`; `rank` 0 is one matrix to the step sizes."""
    low = (normal(rng, (inner, max(rank, 1)), spread=0.4), normal(rng, (max(rank, 1), inner), spread=0.4))
    return MambaWeights(
        w_in=normal(rng, (width, inner), spread=width**-0.5),
        w_gate=normal(rng, (width, inner), spread=width**-0.5) if gate else None,
        conv=normal(rng, (inner, conv), spread=0.5),
        conv_bias=normal(rng, (inner,), spread=0.2),
        w_dt=low if rank else normal(rng, (inner, inner), spread=0.2),
        dt_bias=normal(rng, (inner,)),
        w_b=normal(rng, (inner, states), spread=0.4),
        w_c=normal(rng, (inner, states), spread=0.4),
        a=-np.exp(normal(rng, (inner, states))),
        skip=normal(rng, (inner,)),
        w_out=normal(rng, (inner, width if out is None else out), spread=inner**-0.5),
    )
