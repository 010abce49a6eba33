"""Random masks and lists."""

import numpy as np

import longattn as la


def random_mask(rng, *, batch=1, heads=1, lengths=(100, 130), block_q=16, block_k=8, density=0.4, first_q=None):
    """A mask with each block in it by chance; blocks are no larger than the lengths."""
    block_q, block_k = (min(size, max(n, 1)) for size, n in zip((block_q, block_k), lengths, strict=True))
    first_q = None if first_q is None else min(first_q, block_q)
    first = block_q if first_q is None else first_q
    query_blocks = 0 if lengths[0] == 0 else 1 + max(0, -(-(lengths[0] - first) // block_q))
    blocks = rng.random((batch, heads, query_blocks, -(-lengths[1] // block_k))) < density
    return la.BlockMask.from_blocks(blocks, lengths=lengths, block_q=block_q, block_k=block_k, first_q=first_q)


def random_lists(rng, *, batch=1, heads=1, lengths=(100, 130), block_q=16, density=0.4, first_q=None, bias=False):
    """Lists with each key in them by chance."""
    mask = random_mask(
        rng, batch=batch, heads=heads, lengths=lengths, block_q=block_q, block_k=1, density=density, first_q=first_q
    )
    values = rng.standard_normal(mask.indices.size).astype(np.float32) if bias else None
    return la.RowLists(
        indptr=mask.indptr, indices=mask.indices, lengths=lengths, block_q=block_q, first_q=first_q, bias=values
    )


def over_heads(dense, batch, heads):
    """A mask `[1 or B, H, Lq, Lk]` for every batch and query head."""
    return np.repeat(np.broadcast_to(dense, (batch, *dense.shape[1:])), heads // dense.shape[1], axis=1)
