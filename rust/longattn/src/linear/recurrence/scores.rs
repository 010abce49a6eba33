//! What the rows of a chunk have to do with each other: products of queries and keys times the decay between them, and the inverse
//! that the delta rule takes.

use super::block::Block;
use super::coming::Coming;
use super::products::{Multiplier, Part};
use super::rows::{exp_row, multiply_rows, scale_row};
use crate::dense::micro::{multiply_strided, panel};
use crate::simd::{MAX_LANES, PANEL_VECTORS, Simd};

/// Rows of a chunk between which decays of channels are multiplied row by row; between others, sums of products of rows times decays
/// up to the borders of these blocks.
pub(super) const BLOCK: usize = 16;

/// The same where what lies below a block's rows may not be written to: a multiple of every instruction set's `ROWS`.
pub(super) const WHOLE_BLOCK: usize = 12;

/// Sizes of an item's buffers.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) dim: usize,
    /// Floats between rows of queries and keys.
    pub(super) padded: usize,
    /// Rows of a buffer of queries, keys or scores.
    pub(super) rows: usize,
    /// Floats between rows of scores and of transposed keys.
    pub(super) across: usize,
    /// Query heads that read the state.
    pub(super) group: usize,
}

impl Sizes {
    #[inline(always)]
    pub(super) fn new<S: Simd>(chunk: usize, dim: usize, group: usize) -> Self {
        // Products write whole tiles.
        let rows = chunk.next_multiple_of(BLOCK).max(chunk.next_multiple_of(WHOLE_BLOCK)) + MAX_LANES;
        // An odd number of cache lines, so that a column of rows does not fall on few sets of the cache.
        let lines = chunk.next_multiple_of(panel::<S>()).div_ceil(16) + 1;
        Self { dim, padded: dim.next_multiple_of(S::LANES), rows, across: 16 * (lines | 1), group }
    }

    /// Floats that [`Chunk::by_channels`] works in.
    #[inline(always)]
    pub(super) fn channel_room(&self) -> usize {
        (4 + 2 * TAIL) * self.padded + 2 * (self.group + 1) * BLOCK * BLOCK
    }

    /// Rows of transposed keys.
    #[inline(always)]
    pub(super) fn channels<S: Simd>(&self) -> usize {
        self.dim.next_multiple_of(S::ROWS).max(self.padded)
    }
}

/// What is known of the rows of one chunk.
pub(super) struct Chunk<'a> {
    pub(super) sizes: Sizes,
    /// Rows of this chunk.
    pub(super) n: usize,
    /// Queries `[group, rows, padded]`; afterwards times the decay from before the chunk.
    pub(super) q: &'a mut [f32],
    /// Keys `[rows, padded]`; afterwards, with the delta rule, times minus the decay from before the chunk.
    pub(super) k: &'a mut [f32],
    /// Transposed keys `[channels, across]`; afterwards times the decay up to the chunk's end.
    pub(super) turned: &'a mut [f32],
    /// Scores `[group, rows, across]`, 0 above the diagonal.
    pub(super) scores: &'a mut [f32],
    /// Whether updates follow the delta rule.
    pub(super) delta: bool,
    /// With it, `(I + A)^-1 diag(beta)`, `[rows, across]`.
    pub(super) inverse: &'a mut [f32],
    /// With it, room for `A`.
    pub(super) own: &'a mut [f32],
    /// Factors of updates, where there are any.
    pub(super) beta: Option<&'a [f32]>,
    /// Queries read the state before their own row and the row's key times this.
    pub(super) bonus: Option<&'a [f32]>,
    /// Second keys, written with what is read of the state.
    pub(super) pair: Option<Pair<'a>>,
    /// What multiplies rows with one another.
    pub(super) sides: Sides<'a>,
}

/// What multiplies queries and keys, and what it packs of them.
pub(super) struct Sides<'a> {
    pub(super) multiplier: &'a mut Multiplier,
    pub(super) parts: Parts,
    /// Of each query head, as far apart as [`Self::apart`] says; of keys as rows and as columns.
    pub(super) q: &'a mut [f32],
    pub(super) k: &'a mut [f32],
    pub(super) turned: &'a mut [f32],
    pub(super) apart: usize,
}

impl<'a> Sides<'a> {
    /// Those of vectors, which pack nothing.
    pub(super) fn none(multiplier: &'a mut Multiplier) -> Self {
        Self { multiplier, parts: Parts::default(), q: &mut [], k: &mut [], turned: &mut [], apart: 0 }
    }
}

/// In how many parts queries, keys and values are, as they come, that matrix registers multiply.
#[derive(Clone, Copy, Default)]
pub(super) struct Parts {
    pub(super) q: usize,
    pub(super) k: usize,
    pub(super) v: usize,
}

/// Rows `a` that read the state before each row, and the keys `b` with which that is written.
pub(super) struct Pair<'a> {
    /// `a`, `[rows, padded]`; afterwards times the decay from before the chunk.
    pub(super) reads: &'a mut [f32],
    /// `b`, `[rows, padded]`.
    pub(super) b: &'a mut [f32],
    /// Transposed `b`, as [`Chunk::turned`].
    pub(super) turned: &'a mut [f32],
    /// Scores of queries and `b`, as [`Chunk::scores`].
    pub(super) scores: &'a mut [f32],
    /// Room for scores of `a` and `b`; those of `a` and the keys are [`Chunk::own`].
    pub(super) own: &'a mut [f32],
}

/// `c (+)= a b` for the tiles from `first` on of `rows` rows and the first panel of columns of `b` and `c`, sums over `depth` numbers;
/// `lower`: `a` is 0 right of its diagonal, so that a tile's sums end with its last row.
#[inline(always)]
pub(in crate::linear) fn product<S: Simd>(
    s: S,
    [first, rows]: [usize; 2],
    depth: usize,
    lower: bool,
    a: &[f32],
    lda: usize,
    b: &[f32],
    ldb: usize,
    c: &mut [f32],
    ldc: usize,
    add: bool,
) {
    let end = rows.next_multiple_of(S::ROWS);
    if first * S::ROWS >= end || depth == 0 {
        return;
    }
    assert!(a.len() >= (end - 1) * lda + depth && c.len() >= (end - 1) * ldc + panel::<S>());
    assert!(b.len() >= (depth - 1) * ldb + panel::<S>());
    for row in (first * S::ROWS..end).step_by(S::ROWS) {
        let k = if lower { depth.min(row + S::ROWS) } else { depth };
        // SAFETY: rows row..row + ROWS <= end of a and c and rows 0..k of b lie inside the slices, by the assertions.
        unsafe {
            let (a, c) = (a.as_ptr().add(row * lda), c.as_mut_ptr().add(row * ldc));
            multiply_strided(s, k, a, lda, b.as_ptr(), ldb, c, ldc, rows - row, add);
        }
    }
}

/// Writes rows of `from`, which are `padded` floats apart, as columns from `column` on of `to`, whose rows are `across` floats apart.
/// `LANES` columns at a time are written.
#[inline(always)]
pub(in crate::linear) fn turn<S: Simd>(
    s: S,
    [padded, across]: [usize; 2],
    from: &[f32],
    rows: usize,
    to: &mut [f32],
    column: usize,
) {
    let whole = rows.next_multiple_of(S::LANES);
    assert!(from.len() >= whole * padded && to.len() >= padded * across && column + whole <= across);
    for d in (0..padded).step_by(S::LANES) {
        for r in (0..whole).step_by(S::LANES) {
            // SAFETY: rows r.. and columns d.. of `from`, rows d.. and columns column + r.. of `to` are inside, by the assertions.
            unsafe {
                let to = to.as_mut_ptr().add(d * across + column + r);
                s.transpose(from.as_ptr().add(r * padded + d), padded, to, across);
            }
        }
    }
}

/// Decays of whole states along a chunk.
struct TokenDecays<'a> {
    /// Of each row.
    each: &'a mut [f32],
    /// From before the chunk to each row.
    before: &'a mut [f32],
    /// From each row to the end of the chunk.
    after: &'a mut [f32],
    /// From each row to the one at hand; 0 at first.
    between: &'a mut [f32],
}

impl<'a> TokenDecays<'a> {
    /// From the logarithms of `n` rows in the first of four rows of `across` numbers.
    #[inline(always)]
    fn new<S: Simd>(s: S, n: usize, across: usize, room: &'a mut [f32]) -> Self {
        let (each, rest) = room.split_at_mut(across);
        let (before, rest) = rest.split_at_mut(across);
        let (after, between) = rest.split_at_mut(across);
        let (mut sum, mut back) = (0f64, 0f64);
        for i in 0..n {
            sum += f64::from(each[i]);
            before[i] = sum as f32;
            after[n - 1 - i] = back as f32;
            back += f64::from(each[n - 1 - i]);
        }
        let whole = n.next_multiple_of(S::LANES);
        for row in [&mut *each, &mut *before, &mut *after] {
            row[n..whole].fill(0.0);
            exp_row(s, &mut row[..whole]);
        }
        between[..across].fill(0.0);
        Self { each, before, after, between }
    }
}

impl Chunk<'_> {
    /// Scores and inverse where decays, if any, are of whole states. `decay` has room for four rows of `across` numbers and holds the
    /// logarithms in the first. Returns the decay of the state.
    #[inline(always)]
    pub(super) fn by_tokens<S: Simd>(&mut self, s: S, decay: Option<&mut [f32]>) -> f32 {
        let Self { sizes, n, .. } = *self;
        let Sizes { padded, across, rows, group, .. } = sizes;
        turn(s, [padded, across], self.k, n, self.turned, 0);
        // Products with all transposed keys that rows up to their own tile's end see.
        let Sides { multiplier, parts, q, k, turned, apart } = &mut self.sides;
        let (size, whole_tile) = ([n, sizes.dim], multiplier.tile::<S>());
        let b = multiplier.right(s, [sizes.dim, n], (self.turned, across), parts.k, turned);
        for g in 0..group {
            let rows_of = (&self.q[g * rows * padded..], padded);
            let a = multiplier.left(s, Part::Whole, size, rows_of, parts.q, &mut q[g * *apart..]);
            let to = (&mut self.scores[g * rows * across..], across);
            multiplier.multiply(s, Part::Below, [n, n, sizes.dim], a, b, to, false);
        }
        if self.delta {
            let a = multiplier.left(s, Part::Whole, size, (self.k, padded), parts.k, k);
            multiplier.multiply(s, Part::Below, [n, n, sizes.dim], a, b, (self.own, across), false);
        }
        let mut factors = decay.map(|decay| TokenDecays::new(s, n, across, decay));
        for i in 0..n {
            let tile = ((i / whole_tile + 1) * whole_tile).min(across);
            let seen = (i + 1).next_multiple_of(S::LANES);
            if let Some(TokenDecays { each, between, .. }) = &mut factors {
                scale_row(s, &mut between[..seen], each[i]);
                between[i] = 1.0;
            }
            for g in 0..group {
                let row = &mut self.scores[(g * rows + i) * across..][..across];
                if let Some(TokenDecays { between, .. }) = &factors {
                    multiply_rows(s, &mut row[..seen], &between[..seen]);
                }
                row[i + 1..tile.max(seen)].fill(0.0);
            }
            if self.delta {
                let row = &mut self.own[i * across..][..across];
                if let Some(TokenDecays { between, .. }) = &factors {
                    multiply_rows(s, &mut row[..seen], &between[..seen]);
                }
                row[i..tile.max(seen)].fill(0.0);
            }
        }
        let whole = n.next_multiple_of(S::LANES);
        for i in 0..n {
            let factor = factors.as_ref().map_or(1.0, |x| x.before[i]);
            if factors.is_some() {
                for g in 0..group {
                    scale_row(s, &mut self.q[(g * rows + i) * padded..][..padded], factor);
                }
            }
            if self.delta {
                scale_row(s, &mut self.k[i * padded..][..padded], -factor);
            }
        }
        if let Some(TokenDecays { after, .. }) = &factors {
            for row in self.turned.chunks_exact_mut(across).take(sizes.dim) {
                multiply_rows(s, &mut row[..whole], &after[..whole]);
            }
        }
        if self.delta {
            invert(s, sizes, n, self.own, self.inverse, self.beta);
        }
        factors.map_or(1.0, |x| x.before[n - 1])
    }

    /// Makes scores the squares of what they are above 0.
    #[inline(always)]
    pub(super) fn square<S: Simd>(&mut self, s: S) {
        let Sizes { rows, across, group, .. } = self.sizes;
        for g in 0..group {
            for row in self.scores[g * rows * across..].chunks_exact_mut(across).take(self.n) {
                for chunk in row.chunks_exact_mut(S::LANES) {
                    // SAFETY: the chunk has LANES floats.
                    unsafe {
                        let x = s.max(s.load(chunk.as_ptr()), s.zero());
                        s.store(chunk.as_mut_ptr(), s.mul(x, x));
                    }
                }
            }
        }
    }

    /// Scores and inverse where each channel decays by itself. `g` holds the log decays `[rows, padded]`, `room` is of
    /// [`Sizes::channel_room`]. Leaves the decays of the state's rows at the start of `room`. Memory is asked for as many rows from
    /// `next` on.
    #[inline(always)]
    pub(super) fn by_channels<S: Simd>(
        &mut self,
        s: S,
        g: &mut [f32],
        room: &mut [f32],
        (coming, next): (&Coming, usize),
    ) {
        let Self { sizes, n, delta, bonus, .. } = *self;
        let whole_tile = self.sides.multiplier.tile::<S>();
        let Self { q, k, turned, scores, own, pair, .. } = self;
        let Sizes { dim, padded, across, rows, group } = sizes;
        // Decay from before the chunk to the block; its logarithm; a product along the block; the block's decay.
        let (before, rest) = room.split_at_mut(padded);
        let (sum, rest) = rest.split_at_mut(padded);
        let (along, rest) = rest.split_at_mut(padded);
        let (whole, rest) = rest.split_at_mut(padded);
        let (tails, pairs) = rest.split_at_mut(2 * TAIL * padded);
        let sets = 1 + usize::from(pair.is_some());
        before.fill(1.0);
        sum.fill(0.0);
        for start in (0..n).step_by(BLOCK) {
            let end = (start + BLOCK).min(n);
            whole.fill(0.0);
            for i in start..end {
                let row = &mut g[i * padded..][..padded];
                add_row(s, whole, row);
                exp_row(s, row);
            }
            add_row(s, sum, whole);
            exp_row(s, whole);
            for set in 0..sets {
                let keys = pair.as_ref().filter(|_| set == 1).map_or(&**k, |pair| &*pair.b);
                let own = pair.as_ref().map(|pair| (&*pair.reads, true)).or(delta.then_some((&**k, false)));
                s.call(Block {
                    n: end - start,
                    padded,
                    decays: &g[start * padded..],
                    keys: &keys[start * padded..],
                    queries: &q[start * padded..],
                    group,
                    apart: rows * padded,
                    bonus,
                    own: own.map(|(rows, early)| (&rows[start * padded..], early)),
                    tail: &mut tails[set * TAIL * padded..],
                    pairs: &mut pairs[set * (group + 1) * BLOCK * BLOCK..],
                });
            }
            // Rows times the decay since the block's start, with the keys before it times the decay up to there.
            along.fill(1.0);
            for i in start..end {
                coming.ask(next + i);
                let here = &g[i * padded..][..padded];
                if let Some(pair) = pair {
                    multiply_rows(s, &mut pair.reads[i * padded..][..padded], along);
                }
                if bonus.is_none() {
                    multiply_rows(s, along, here);
                }
                for head in 0..group {
                    multiply_rows(s, &mut q[(head * rows + i) * padded..][..padded], along);
                }
                if bonus.is_some() {
                    multiply_rows(s, along, here);
                }
                if delta {
                    multiply_rows(s, &mut k[i * padded..][..padded], along);
                }
            }
            for set in 0..sets {
                let (turned, scores, own, reads) = match pair {
                    Some(pair) if set == 1 => (&*pair.turned, &mut *pair.scores, &mut *pair.own, &*pair.reads),
                    Some(pair) => (&**turned, &mut **scores, &mut **own, &*pair.reads),
                    None => (&**turned, &mut **scores, &mut **own, &**k),
                };
                for column in (0..start).step_by(panel::<S>()) {
                    let b = &turned[column..];
                    for head in 0..group {
                        let at = head * rows + start;
                        let (a, c) = (&q[at * padded..], &mut scores[at * across + column..]);
                        product(s, [0, end - start], dim, false, a, padded, b, across, c, across, false);
                    }
                    if delta || sets == 2 {
                        let (a, c) = (&reads[start * padded..], &mut own[start * across + column..]);
                        product(s, [0, end - start], dim, false, a, padded, b, across, c, across, false);
                    }
                }
                let pairs = &pairs[set * (group + 1) * BLOCK * BLOCK..];
                for i in start..end {
                    let tile = ((i / whole_tile + 1) * whole_tile).min(across);
                    for head in 0..group {
                        let row = &mut scores[(head * rows + i) * across..][..across];
                        let from = &pairs[(head * BLOCK + i - start) * BLOCK..];
                        row[start..=i].copy_from_slice(&from[..=i - start]);
                        row[i + 1..tile].fill(0.0);
                    }
                    if delta || sets == 2 {
                        let row = &mut own[i * across..][..across];
                        let from = &pairs[(group * BLOCK + i - start) * BLOCK..];
                        row[start..i].copy_from_slice(&from[..i - start]);
                        row[i..tile].fill(0.0);
                    }
                }
            }
            for i in start..end {
                for head in 0..group {
                    multiply_rows(s, &mut q[(head * rows + i) * padded..][..padded], before);
                }
                if delta {
                    let key = &mut k[i * padded..][..padded];
                    multiply_rows(s, key, before);
                    scale_row(s, key, -1.0);
                }
                if let Some(pair) = pair {
                    multiply_rows(s, &mut pair.reads[i * padded..][..padded], before);
                    // What is read is added, where the delta rule takes it away.
                    scale_row(s, &mut pair.own[i * across..][..i.next_multiple_of(S::LANES)], -1.0);
                }
            }
            // All keys so far times the decay to the block's end.
            let columns = start.next_multiple_of(S::LANES);
            for set in 0..sets {
                let turned = match pair {
                    Some(pair) if set == 1 => &mut *pair.turned,
                    _ => &mut **turned,
                };
                for (d, &factor) in whole.iter().enumerate().take(dim) {
                    scale_row(s, &mut turned[d * across..][..columns], factor);
                }
                turn(s, [padded, across], &tails[set * TAIL * padded..], end - start, turned, start);
            }
            before.copy_from_slice(sum);
            exp_row(s, before);
        }
        match &mut self.pair {
            Some(pair) => invert(s, sizes, n, pair.own, self.inverse, None),
            None if delta => invert(s, sizes, n, self.own, self.inverse, self.beta),
            None => {}
        }
    }
}

/// `(I + A)^-1 diag(beta)` of the products `own` of rows, row after row.
#[inline(always)]
fn invert<S: Simd>(s: S, sizes: Sizes, n: usize, own: &mut [f32], inverse: &mut [f32], beta: Option<&[f32]>) {
    let across = sizes.across;
    assert!(inverse.len() >= n * across && own.len() >= n * across);
    for i in 0..n {
        let own = &mut own[i * across..][..across];
        if let Some(beta) = beta {
            scale_row(s, &mut own[..i.next_multiple_of(S::LANES)], beta[i]);
        }
        inverse[i * across..][..across].fill(0.0);
        for column in (0..i).step_by(panel::<S>()) {
            // Row j is 0 right of its column j.
            let mut acc = [[s.zero(); PANEL_VECTORS]; UNROLL];
            let mut j = column;
            while j < i {
                for (u, acc) in acc.iter_mut().enumerate().take(i - j) {
                    let x = s.splat(own[j + u]);
                    for (v, acc) in acc.iter_mut().enumerate() {
                        // SAFETY: row j + u < i <= n has `across` numbers, which hold the panel at `column`.
                        let row = unsafe { s.load(inverse.as_ptr().add((j + u) * across + column + v * S::LANES)) };
                        *acc = s.fma(x, row, *acc);
                    }
                }
                j += UNROLL;
            }
            let mut total = [s.zero(); PANEL_VECTORS];
            for acc in acc {
                for (total, acc) in total.iter_mut().zip(acc) {
                    *total = s.sub(*total, acc);
                }
            }
            for (v, &total) in total.iter().enumerate() {
                // SAFETY: as above, of row i.
                unsafe { s.store(inverse.as_mut_ptr().add(i * across + column + v * S::LANES), total) };
            }
        }
        inverse[i * across + i] = 1.0;
    }
    if let Some(beta) = beta {
        let columns = n.next_multiple_of(S::LANES);
        for row in inverse.chunks_exact_mut(across).take(n) {
            multiply_rows(s, &mut row[..columns], &beta[..columns]);
        }
    }
}

/// Rows of `inverse` whose sums run side by side.
const UNROLL: usize = 4;

/// Rows of a block that are transposed at once.
const TAIL: usize = BLOCK.next_multiple_of(MAX_LANES);

/// `to += row`; the length is a multiple of `LANES`.
#[inline(always)]
fn add_row<S: Simd>(s: S, to: &mut [f32], row: &[f32]) {
    for (to, row) in to.chunks_exact_mut(S::LANES).zip(row.chunks_exact(S::LANES)) {
        // SAFETY: both chunks have LANES floats.
        unsafe { s.store(to.as_mut_ptr(), s.add(s.load(to.as_ptr()), s.load(row.as_ptr()))) };
    }
}

/// Sum of products; the length is a multiple of `LANES`.
#[inline(always)]
pub(in crate::linear) fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let mut sum = s.zero();
    for (a, b) in a.chunks_exact(S::LANES).zip(b.chunks_exact(S::LANES)) {
        // SAFETY: both chunks have LANES floats.
        sum = unsafe { s.fma(s.load(a.as_ptr()), s.load(b.as_ptr()), sum) };
    }
    s.sum(sum)
}

/// Sum of products of three; the length is a multiple of `LANES`.
#[inline(always)]
pub(super) fn dot3<S: Simd>(s: S, a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut sum = s.zero();
    for ((a, b), c) in a.chunks_exact(S::LANES).zip(b.chunks_exact(S::LANES)).zip(c.chunks_exact(S::LANES)) {
        // SAFETY: the chunks have LANES floats.
        sum = unsafe { s.fma(s.mul(s.load(a.as_ptr()), s.load(b.as_ptr())), s.load(c.as_ptr()), sum) };
    }
    s.sum(sum)
}

/// Sum of numbers.
#[inline(always)]
pub(in crate::linear) fn add_up<S: Simd>(s: S, row: &[f32]) -> f32 {
    let mut sum = s.zero();
    let chunks = row.chunks_exact(S::LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        // SAFETY: the chunk has LANES floats.
        sum = s.add(sum, unsafe { s.load(chunk.as_ptr()) });
    }
    let mut total = s.sum(sum);
    for x in rest {
        total += x;
    }
    total
}
