"""FlashVGGT: all tokens attend to a few descriptors of each frame and to the patches of key frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from longattn._arrays import Array, as_numpy, like, reshaped
from longattn._checks import check_floating, flag, function, integer, integers, items_of, one_of, scale_factor
from longattn.dense.attention import attention
from longattn.methods import Method
from longattn.pictures import layer_seen
from longattn.reference import sparse as reference

Matrix = NDArray[np.float32]

#: What rotates or normalises rows `[B, heads, n, D]` at positions `[n, 2]`.
Turn = Callable[[Matrix, NDArray[np.int64]], Matrix]

MODES = ("bilinear", "mean", "dwconv")


def resize_patches(x: Array, grid: tuple[int, int], *, down: int, mode: str, kernel: Array | None = None) -> Matrix:
    """Patches `[..., h * w, C]` on a grid smaller by `down`, `[..., (h // down) * (w // down), C]`.

    Args:
        x: patches, row by row.
        grid: `(h, w)`.
        down: how much smaller.
        mode: "bilinear" (samples at the centres of the new patches, without smoothing: for `down` 4 the mean of the
            2 x 2 in the middle), "mean", or "dwconv", a weight for each place and channel.
        kernel: weights `[down, down, C]` of "dwconv".

    Raises:
        TypeError: an argument of another kind.
        ValueError: shapes or values that do not fit.
    """
    patches = np.asarray(as_numpy(x, "x"), np.float32)
    height, width = _grid(grid)
    integer(down, "down", 1, min(height, width))
    one_of(mode, "mode", MODES)
    if patches.ndim < 2 or patches.shape[-2] != height * width:
        raise ValueError(f"x: got shape {patches.shape}, expected [..., {height * width}, C]")
    channels = patches.shape[-1]
    if (kernel is not None) != (mode == "dwconv"):
        raise ValueError(f"kernel: got {kernel if kernel is None else 'one'}, expected one with mode 'dwconv' only")
    rows, columns = height // down, width // down
    if not patches.size:
        raise ValueError(f"x: got shape {patches.shape}, expected at least one frame and channel")
    cut = patches.reshape(-1, height, width, channels)
    if mode == "bilinear":
        over_rows = np.einsum("ih,nhwc->niwc", _bilinear(height, rows), cut, optimize=True)
        small = np.einsum("jw,niwc->nijc", _bilinear(width, columns), over_rows, optimize=True)
    else:
        weights = np.full((down, down, channels), 1 / down**2, np.float32)
        if kernel is not None:
            weights = np.asarray(as_numpy(kernel, "kernel"), np.float32)
            if weights.shape != (down, down, channels):
                raise ValueError(f"kernel: got shape {weights.shape}, expected {(down, down, channels)}")
        tiles = cut[:, : rows * down, : columns * down].reshape(-1, rows, down, columns, down, channels)
        small = np.einsum("niajbc,abc->nijc", tiles, weights, optimize=True)
    shaped: Matrix = small.reshape(*patches.shape[:-2], rows * columns, channels).astype(np.float32, copy=False)
    return shaped


def _bilinear(length: int, smaller: int) -> Matrix:
    """Weights `[smaller, length]` of samples at `(i + 1/2) length / smaller - 1/2`."""
    at = np.clip((np.arange(smaller) + 0.5) * length / smaller - 0.5, 0, length - 1)
    low = np.floor(at).astype(int)
    weights = np.zeros((smaller, length), np.float32)
    rows = np.arange(smaller)
    weights[rows, low] += (1 - (at - low)).astype(np.float32)
    weights[rows, np.minimum(low + 1, length - 1)] += (at - low).astype(np.float32)
    return weights


def _grid(grid: object) -> tuple[int, int]:
    if not isinstance(grid, tuple | list) or len(grid) != 2:
        raise TypeError(f"grid: got {grid!r}, expected (height, width)")
    return integer(grid[0], "grid", 1), integer(grid[1], "grid", 1)


def pick_keyframes(x: Array, *, every: int = 10, seed: int = 0, rounds: int = 20) -> NDArray[np.int64]:
    """Frame 0, and the frames nearest to the centres of `F // every` clusters of the frames' mean tokens.

    Args:
        x: tokens of one sequence, `[F, P, C]`.
        every: frames for each cluster; with a single cluster, frame 0 is the only one.
        seed: of the first centres, which are frames.
        rounds: of moving the centres.

    Returns:
        Frames; 0 may occur twice.

    Raises:
        TypeError: an argument of another kind.
        ValueError: another shape.
    """
    tokens = as_numpy(x, "x")
    if tokens.ndim != 3:
        raise ValueError(f"x: got shape {tokens.shape}, expected [F, P, C]")
    means = np.asarray(tokens, np.float32).mean(axis=1).astype(np.float64)
    count = len(means) // integer(every, "every", 1)
    if count <= 1:
        return np.zeros(min(len(means), 1), np.int64)
    rng = np.random.default_rng(integer(seed, "seed", 0))
    centres = means[np.sort(rng.choice(len(means), count, replace=False))]
    for _ in range(integer(rounds, "rounds", 0)):
        own = ((means[:, None] - centres) ** 2).sum(axis=-1).argmin(axis=1)
        centres = np.stack([means[own == c].mean(axis=0) if (own == c).any() else centres[c] for c in range(count)])
    nearest = ((means[:, None] - centres) ** 2).sum(axis=-1).argmin(axis=0)
    return np.concatenate([[0], nearest]).astype(np.int64)


class DescriptorAttention:
    """The weights of one layer of descriptor attention, and the descriptors of the frames that it has seen.

    `chunk` adds the descriptors of some frames and attends from all of their tokens to what there is; the first chunk
    adds the patches of its first frame as well. See `descriptor_attention` for the arguments.

    Raises:
        TypeError: an argument of another kind.
        ValueError: shapes or values that do not fit.
    """

    def __init__(
        self,
        wq: Array,
        wk: Array,
        wv: Array,
        wo: Array,
        *,
        heads: int,
        grid: tuple[int, int],
        special: int = 5,
        down: int = 4,
        mode: str = "bilinear",
        kernel: Array | None = None,
        biases: Sequence[Array | None] = (None, None, None, None),
        turn: Turn | None = None,
        scale: float | None = None,
    ) -> None:
        weights = []
        for x, name in ((wq, "wq"), (wk, "wk"), (wv, "wv"), (wo, "wo")):
            array = as_numpy(x, name)
            check_floating(array, name)
            if array.ndim != 2:
                raise ValueError(f"{name}: got shape {array.shape}, expected a matrix")
            weights.append(np.asarray(array, np.float32))
        self.wq, self.wk, self.wv, self.wo = weights
        channels, inner = self.wq.shape
        for name, expected in (("wk", (channels, inner)), ("wv", (channels, inner)), ("wo", (inner, channels))):
            if getattr(self, name).shape != expected:
                raise ValueError(f"{name}: got shape {getattr(self, name).shape}, expected {expected}")
        self.heads = integer(heads, "heads", 1)
        if inner % self.heads:
            raise ValueError(f"heads: got {heads}, expected a divisor of {inner}")
        self.grid, self.special = _grid(grid), integer(special, "special", 0)
        self.down, self.mode, self.kernel = integer(down, "down", 1, min(self.grid)), mode, kernel
        one_of(mode, "mode", MODES)
        self.scale, self.turn = scale_factor(scale, inner // self.heads), turn
        if turn is not None:
            function(turn, "turn")
        biases = items_of(biases, "biases", "arrays")
        if len(biases) != 4:
            raise ValueError(f"biases: got {len(biases)}, expected 4")
        self.biases = [None if b is None else np.asarray(as_numpy(b, "biases"), np.float32) for b in biases]
        for bias, width in zip(self.biases, (inner, inner, inner, channels), strict=True):
            if bias is not None and bias.shape != (width,):
                raise ValueError(f"biases: got shape {bias.shape}, expected {(width,)}")
        self._keys: list[Matrix] = []
        self._values: list[Matrix] = []

    def positions(self) -> NDArray[np.int64]:
        """Places of a frame's tokens, `[P, 2]`: special ones 0, patches from 1 on."""
        y, x = np.mgrid[: self.grid[0], : self.grid[1]]
        return np.concatenate([np.zeros((self.special, 2), np.int64), np.stack([y.ravel(), x.ravel()], 1) + 1])

    def descriptors(self, x: Matrix) -> tuple[Matrix, NDArray[np.int64]]:
        """Descriptors `[B, F, n, C]` of frames, and the places of those of one."""
        height, width = self.grid
        small = resize_patches(x[:, :, self.special :], self.grid, down=self.down, mode=self.mode, kernel=self.kernel)
        rows, columns = height // self.down, width // self.down
        y, z = np.mgrid[:rows, :columns]
        # Of the nearest patch.
        places = np.stack([(y * height // rows).ravel(), (z * width // columns).ravel()], 1) + 1
        own = np.concatenate([np.zeros((self.special, 2), np.int64), places])
        return np.concatenate([x[:, :, : self.special], small], axis=2), own

    def add(self, x: Matrix, places: NDArray[np.int64]) -> None:
        """Adds keys and values of tokens `[B, n, C]` at places `[n, 2]`."""
        keys, values = self._heads(x, self.wk, 1), self._heads(x, self.wv, 2)
        self._keys.append(keys if self.turn is None else np.asarray(self.turn(keys, places), np.float32))
        self._values.append(values)

    def add_frames(self, x: Matrix, *, keep_every: int = 1) -> None:
        """Adds the descriptors of each `keep_every`-th frame of `[B, F, P, C]`."""
        kept = x[:, :: integer(keep_every, "keep_every", 1)]
        descriptors, places = self.descriptors(kept)
        self.add(reshaped(descriptors, len(x), -1, x.shape[3]), np.tile(places, (kept.shape[1], 1)))

    def add_patches(self, x: Matrix, frames: Sequence[int] | NDArray[np.int64]) -> None:
        """Adds the patches of these frames of `[B, F, P, C]`."""
        picked = x[:, np.asarray(frames, np.int64), self.special :]
        places = np.tile(self.positions()[self.special :], (picked.shape[1], 1))
        self.add(reshaped(picked, len(x), -1, x.shape[3]), places)

    def attend(self, x: Matrix) -> Matrix:
        """From all tokens of `[B, F, P, C]` to what was added."""
        batch, frames, tokens, channels = x.shape
        q = self._heads(x.reshape(batch, frames * tokens, channels), self.wq, 0)
        if self.turn is not None:
            q = np.asarray(self.turn(q, np.tile(self.positions(), (frames, 1))), np.float32)
        self._keys, self._values = ([np.concatenate(x, axis=2)] for x in (self._keys, self._values))
        found = attention(q, self._keys[0], self._values[0], scale=self.scale)
        out = reshaped(found.swapaxes(1, 2), batch, frames, tokens, -1) @ self.wo
        bias = self.biases[3]
        result: Matrix = out if bias is None else out + bias
        return result

    def chunk(self, x: Array, *, keep_every: int = 1) -> Array:
        """Attention from the tokens of the next frames to all frames so far.

        Args:
            x: tokens `[B, F, P, C]` of the next frames.
            keep_every: of these, the descriptors of each so many-th frame are kept.

        Returns:
            `[B, F, P, C]`, float32, of the kind of `x`.

        Raises:
            TypeError: an argument of another kind.
            ValueError: another shape.
        """
        tokens = self.tokens(x)
        if not self._keys:
            self.add_patches(tokens, [0])
        self.add_frames(tokens, keep_every=keep_every)
        return like(x, self.attend(tokens))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are kept."""
        return sum(x.nbytes for x in (*self._keys, *self._values))

    def tokens(self, x: Array) -> Matrix:
        """`x` as float32, checked."""
        array = as_numpy(x, "x")
        check_floating(array, "x")
        expected = self.special + self.grid[0] * self.grid[1]
        if array.ndim != 4 or array.shape[2:] != (expected, len(self.wq)) or array.shape[1] == 0:
            raise ValueError(f"x: got shape {array.shape}, expected [B, F, {expected}, {len(self.wq)}]")
        return np.asarray(array, np.float32)

    def _heads(self, x: Matrix, w: Matrix, number: int) -> Matrix:
        bias = self.biases[number]
        projected = x @ w if bias is None else x @ w + bias
        return np.ascontiguousarray(reshaped(projected, *x.shape[:2], self.heads, -1).swapaxes(1, 2))


def descriptor_attention(
    x: Array,
    wq: Array,
    wk: Array,
    wv: Array,
    wo: Array,
    *,
    heads: int,
    grid: tuple[int, int],
    special: int = 5,
    down: int = 4,
    mode: str = "bilinear",
    kernel: Array | None = None,
    keyframes: Sequence[int] | None = None,
    every: int = 10,
    seed: int = 0,
    keep_duplicates: bool = False,
    biases: Sequence[Array | None] = (None, None, None, None),
    turn: Turn | None = None,
    scale: float | None = None,
) -> Array:
    """Attention from all tokens of several frames to descriptors of all frames and to the patches of key frames.

    A frame's descriptors are its `special` tokens and its patches on a grid smaller by `down`, made before the
    projections of keys and values. Key frames, whose patches take part as they are, are frame 0 and those nearest to
    the centres of `F // every` clusters of the frames' mean tokens (of the first sequence of a batch).

    Args:
        x: tokens `[B, F, P, C]`, `P = special + height * width`: floating; computed with as float32.
        wq: projection of queries `[C, heads * D]`.
        wk: projection of keys, of the same shape.
        wv: projection of values, of the same shape.
        wo: projection of the output `[heads * D, C]`.
        heads: number of heads.
        grid: rows and columns of a frame's patches.
        special: tokens at the beginning of each frame that are no patches.
        down: how much smaller the grid of descriptors is.
        mode: "bilinear", "mean" or "dwconv", see `resize_patches`.
        kernel: weights `[down, down, C]` of "dwconv".
        keyframes: frames whose patches are keys; `None` picks them.
        every: frames for each key frame that is picked.
        seed: of picking.
        keep_duplicates: whether a frame that is picked twice counts twice.
        biases: of the four projections, each a vector or `None`.
        turn: what normalises and rotates queries and keys: a function of rows `[B, heads, n, D]` and their places
            `[n, 2]` (special tokens 0, patches from 1 on, descriptors that of the nearest patch).
        scale: factor on the dot products; `None` is `D ** -0.5`.

    Returns:
        `[B, F, P, C]`, float32, of the kind of `x`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: shapes or values that do not fit.

    Cost:
        `F P * F (special + height * width / down^2) * 2 D` multiply-adds per head, and as many patches of key frames.

    References:
        Z. Wang et al., "FlashVGGT: Efficient and Scalable Visual Geometry Transformers with Compressed Descriptor
        Attention", 2025.

    Example:
        >>> import numpy as np, longattn as la
        >>> rng = np.random.default_rng(0)
        >>> x, w = rng.standard_normal((1, 3, 5 + 64, 16)), rng.standard_normal((4, 16, 16)) / 4
        >>> la.sparse.descriptor_attention(x, *w, heads=2, grid=(8, 8)).shape
        (1, 3, 69, 16)
    """
    layer = DescriptorAttention(
        wq, wk, wv, wo, heads=heads, grid=grid, special=special, down=down, mode=mode, kernel=kernel, biases=biases,
        turn=turn, scale=scale,
    )  # fmt: skip
    tokens = layer.tokens(x)
    if not tokens.shape[0]:
        raise ValueError(f"x: got batch 0 in shape {tokens.shape}, expected at least 1")
    flag(keep_duplicates, "keep_duplicates")
    if keyframes is None:
        picked = pick_keyframes(tokens[0], every=every, seed=seed)
    else:
        picked = np.array(integers(keyframes, "keyframes", 0, tokens.shape[1] - 1), np.int64)
    if not keep_duplicates:
        picked = np.unique(picked)
    if len(picked):
        layer.add_patches(tokens, picked)
    layer.add_frames(tokens)
    return like(x, layer.attend(tokens))


METHOD = Method(
    name="descriptor_attention",
    family="kv",
    title="FlashVGGT: Efficient and Scalable Visual Geometry Transformers with Compressed Descriptor Attention",
    year=2025,
    arxiv="2512.01540",
    function=descriptor_attention,
    reference=reference.descriptor_attention,
    exact=True,
    modes=frozenset({"non-causal", "self"}),
    gqa=False,
    checks=(
        "With a grid as large and no key frames it is attention over all tokens.",
        "One chunk gives what the call with frame 0 as key frame gives.",
        "A chunk does not depend on later ones.",
        "Where a frame's patches are equal, bilinear descriptors are the means.",
    ),
    tests="tests/sparse/test_descriptor_attention.py",
    cost="`F P * F (special + height * width / down^2) * 2 D` multiply-adds per head, and the patches of key frames.",
    mask=lambda: layer_seen(
        lambda x, wq, wk, wv: descriptor_attention(
            x, wq, wk, wv, np.eye(136), heads=1, grid=(4, 8), special=2, keyframes=[0]
        ),
        (4, 34),
    ),
    axes=("queries", "tokens"),
)
