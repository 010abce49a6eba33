//! Numbers as sums of a few bf16, which matrix registers multiply: one of the numbers of a bf16 array, two of f16, three of floats.
//!
//! ```text
//! x = x0 + x1 + x2       x0 the first eight bits, x1 the next and so on: three hold a float, two an f16
//! x y ~ sum of x_i y_j for i + j <= 2       what is left out is below 2^-22 |x y|, and 2^-25 on average
//! ```
//! Weights of bf16 queries over bf16 values are rounded to bf16, as the output is; others are in as many parts as the queries, in two at
//! least. Where scores come from bytes, two parts of weights and values are enough.
//!
//! Blocks of 16 or 32 rows and 32 numbers, a step of the registers, lie together:
//! `[16 rows][step][part][row][32 numbers]` on the left, `[32 columns][step][part][16 pairs][column][2 numbers]` on the right.

use super::Problem;
use super::rows::{Row, Rows};
use super::scores::{RowId, Weights};
use crate::simd::tiles::{BLOCK, Left, Pairs, Right, STEP, TILE, TILE_BYTES, Tiles};
use crate::simd::{Kernel, Simd, prefetch};
use crate::tensor::{DType, KvView, Storage, with_element};
use half::bf16;
use std::ops::Range;

/// Floats that a step of sixteen rows takes on the left.
pub(crate) const LEFT: usize = TILE * TILE_BYTES / 4;

/// Floats that a step of 32 columns takes on the right.
pub(crate) const RIGHT: usize = 2 * LEFT;

/// Pairs of factors in `left` and `right` parts, both numbers of which add up to `most` at most.
pub(crate) const fn pairs(left: usize, right: usize, most: usize) -> Pairs {
    let all = [(2, 0), (1, 0), (0, 0), (0, 1), (1, 1), (0, 2)];
    let (mut kept, mut count, mut n) = ([(0, 0); 6], 0, 0);
    while n < all.len() {
        let (i, j) = (all[n].0 as usize, all[n].1 as usize);
        if i < left && j < right && i + j <= most {
            kept[count] = all[n];
            count += 1;
        }
        n += 1;
    }
    Pairs::new(kept.split_at(count).0)
}

/// In how many parts the factors of a problem's products are.
#[derive(Clone, Copy)]
pub(crate) struct Parts {
    pub(crate) tiles: Tiles,
    queries: usize,
    keys: usize,
    pub(crate) weights: usize,
    values: usize,
    /// Whether queries are as they came, and their products are scaled.
    pub(crate) scales_products: bool,
    pub(crate) of_scores: Pairs,
    pub(crate) of_outputs: Pairs,
}

/// In how many parts numbers are that came as this.
pub(crate) const fn parts_of(dtype: DType) -> usize {
    match dtype {
        DType::BF16 => 1,
        DType::F16 => 2,
        DType::F32 => 3,
    }
}

impl Parts {
    /// If there are registers and they are worth it: with few numbers to sum over the padding costs more than the registers gain.
    /// `from_bytes` says that scores are computed from bytes.
    #[inline(always)]
    pub(crate) fn of<S: Simd>(problem: &Problem, from_bytes: bool) -> Option<Self> {
        if !S::DOT2_BF16 {
            return None;
        }
        let tiles = problem.tiles?;
        let stored = match problem.k.storage() {
            Storage::Numbers(dtype) => parts_of(dtype),
            Storage::Codes(_) => 3,
        };
        let dtype = problem.q.dtype();
        let scales_products = dtype != DType::F32 && matches!(problem.k, KvView::Numbers(_));
        let queries = if scales_products { parts_of(dtype) } else { 3 };
        let weights = if queries == 1 && stored == 1 { 1 } else { parts_of(dtype).max(2) };
        let (weights, values) = if from_bytes { (weights.min(2), stored.min(2)) } else { (weights, stored) };
        let of_scores = pairs(queries, stored, 2);
        let worth = from_bytes || 2 * of_scores.listed().len() * problem.dim.div_ceil(STEP) <= problem.dim;
        worth.then(|| Self {
            tiles,
            queries,
            keys: stored,
            weights,
            values,
            scales_products,
            of_scores,
            of_outputs: pairs(weights, values, if weights.max(values) == 3 { 2 } else { 1 }),
        })
    }

    /// Floats that a query row takes.
    #[inline(always)]
    pub(crate) fn query_width(&self, dim: usize) -> usize {
        dim.div_ceil(STEP) * self.queries * STEP / 2
    }

    /// Floats that a packed key takes.
    #[inline(always)]
    pub(crate) fn key_width(&self, dim: usize) -> usize {
        dim.div_ceil(STEP) * self.keys * STEP / 2
    }

    /// Floats that a column panel of a packed value takes.
    #[inline(always)]
    pub(crate) fn value_width(&self) -> usize {
        self.values * BLOCK / 2
    }

    /// Floats that the weights of a row for `keys` keys take.
    #[inline(always)]
    pub(crate) fn weight_width(&self, keys: usize) -> usize {
        keys.div_ceil(STEP) * self.weights * STEP / 2
    }

    /// Working memory of packing, in floats.
    #[inline(always)]
    pub(crate) fn room(&self, dim: usize) -> usize {
        BLOCK * self.key_width(dim)
    }

    /// The block of query rows that starts with row `first`, a multiple of sixteen.
    #[inline(always)]
    pub(crate) fn query_rows(&self, queries: &[f32], dim: usize, first: usize) -> Left {
        left(&queries[first * self.query_width(dim)..], dim.div_ceil(STEP), self.queries)
    }

    /// A packed panel of keys.
    #[inline(always)]
    pub(crate) fn key_columns(&self, panel: *const f32) -> Right {
        right(panel, self.keys)
    }

    /// The weights of the block of rows that starts with row `first`, a multiple of sixteen, from key `low` on, a multiple of 32.
    #[inline(always)]
    pub(crate) fn weight_rows(&self, weights: &[f32], keys: usize, first: usize, low: usize) -> Left {
        let at = first * self.weight_width(keys) + low / STEP * self.weights * LEFT;
        left(&weights[at..], keys.div_ceil(STEP), self.weights)
    }

    /// A column panel of packed values.
    #[inline(always)]
    pub(crate) fn value_columns(&self, panel: *const f32) -> Right {
        right(panel, self.values)
    }

    /// Loads query row `id` as row `r` of the blocks in `to`.
    #[inline(always)]
    pub(crate) fn load_query<S: Simd>(
        &self,
        s: S,
        problem: &Problem,
        id: RowId,
        r: usize,
        row: &[f32],
        to: &mut [f32],
    ) {
        let dim = problem.dim;
        let width = self.query_width(dim);
        let block = &mut to[r / TILE * TILE * width..][..TILE * width];
        if self.scales_products {
            with_element!(problem.q.dtype(), Q => {
                let row = problem.q.row::<Q>(id.batch, id.head, id.row);
                // SAFETY: the row has `dim` elements, and the block rows of as many steps and parts.
                unsafe { store_row(s, row.as_ptr(), dim, self.queries, r % TILE, block.as_mut_ptr()) };
            });
        } else {
            assert!(row.len() >= dim);
            // SAFETY: as above.
            unsafe { store_row(s, row.as_ptr(), dim, self.queries, r % TILE, block.as_mut_ptr()) };
        }
    }

    /// Where row `r` of the blocks in `to`, which have room for `keys` keys, takes its weights for the keys from `low` on, a multiple of
    /// 32.
    #[inline(always)]
    pub(crate) fn weight_row<const PARTS: usize>(
        &self,
        to: &mut [f32],
        keys: usize,
        r: usize,
        low: usize,
    ) -> WeightRow<PARTS> {
        assert!(PARTS == self.weights);
        let width = self.weight_width(keys);
        let block = &mut to[r / TILE * TILE * width..][..TILE * width];
        let block = &mut block[low / STEP * self.weights * LEFT..];
        WeightRow { block: block.as_mut_ptr().cast(), row: r % TILE }
    }
}

/// A row's weights in `PARTS` parts, in blocks of sixteen rows.
pub(crate) struct WeightRow<const PARTS: usize> {
    block: *mut bf16,
    row: usize,
}

impl<S: Simd, const PARTS: usize> Weights<S> for WeightRow<PARTS> {
    #[inline(always)]
    unsafe fn take(&mut self, s: S, j: usize, weights: S::F32) {
        // SAFETY: the caller's promise; blocks have room for whole steps.
        unsafe { self.take_two(s, j, [weights, s.zero()]) };
    }

    #[inline(always)]
    unsafe fn take_two(&mut self, s: S, j: usize, weights: [S::F32; 2]) {
        // SAFETY: the caller vouches for the keys, and whoever made this for their blocks.
        unsafe { store_parts::<S, PARTS>(s, weights, self.block.add((j / STEP * PARTS * TILE + self.row) * STEP)) };
    }
}

/// Runs `$body` with `$parts` bound to the number of parts as a constant.
macro_rules! with_parts {
    ($number:expr, $parts:ident, $body:expr) => {
        match $number {
            1 => {
                const $parts: usize = 1;
                $body
            }
            2 => {
                const $parts: usize = 2;
                $body
            }
            _ => {
                const $parts: usize = 3;
                $body
            }
        }
    };
}
pub(crate) use with_parts;

/// Blocks of sixteen packed rows.
#[inline(always)]
pub(crate) fn left(from: &[f32], steps: usize, parts: usize) -> Left {
    let block = 4 * LEFT;
    Left { start: from.as_ptr().cast(), row: TILE_BYTES, tile: steps * parts * block, step: parts * block, part: block }
}

/// A panel of 32 packed columns.
#[inline(always)]
pub(crate) fn right(from: *const f32, parts: usize) -> Right {
    Right { start: from.cast(), step: parts * 4 * RIGHT, part: 4 * RIGHT, blocks: std::ptr::null() }
}

/// A row's 32 elements from `d` on, a multiple of 32; zeros from `dim` on, but for codes.
///
/// # Safety
/// The row has `dim` elements.
#[inline(always)]
unsafe fn load_step<S: Simd, R: Row>(s: S, row: R, d: usize, dim: usize) -> [S::F32; 2] {
    // SAFETY: the caller's promise.
    unsafe { [load(s, row, d, dim), load(s, row, d + S::LANES, dim)] }
}

/// A vector of a row's elements from `d` on, a multiple of `LANES`; zeros from `dim` on, but for codes.
///
/// # Safety
/// The row has `dim` elements.
#[inline(always)]
unsafe fn load<S: Simd, R: Row>(s: S, row: R, d: usize, dim: usize) -> S::F32 {
    // SAFETY: the caller's promise.
    unsafe {
        if d + S::LANES <= dim {
            row.load(s, d)
        } else if d < dim {
            row.load_first(s, d, dim - d)
        } else {
            s.zero()
        }
    }
}

/// Stores the parts of 32 numbers, each part a block of sixteen rows after the one before.
///
/// # Safety
/// `to` is writable for 32 numbers of each part.
#[inline(always)]
unsafe fn store_parts<S: Simd, const PARTS: usize>(s: S, numbers: [S::F32; 2], to: *mut bf16) {
    let mut rest = numbers;
    for part in 0..PARTS {
        let [[a, after_a], [b, after_b]] = match part + 1 < PARTS {
            true => [s.split_bf16(rest[0]), s.split_bf16(rest[1])],
            false => [[rest[0]; 2], [rest[1]; 2]],
        };
        // SAFETY: the caller's promise.
        unsafe { s.store_bytes(to.add(part * TILE * STEP).cast(), s.narrow_bf16(a, b)) };
        rest = [after_a, after_b];
    }
}

/// Stores the parts of a whole row as row `r` of blocks of sixteen, `[step][part][row][32 numbers]`.
///
/// # Safety
/// The row has `dim` elements; `to` is writable for as many steps.
#[inline(always)]
pub(crate) unsafe fn store_row<S: Simd, R: Row>(s: S, row: R, dim: usize, parts: usize, r: usize, to: *mut f32) {
    with_parts!(parts, PARTS, {
        for d in (0..dim).step_by(STEP) {
            // SAFETY: the caller's promise.
            unsafe {
                let to = to.cast::<bf16>().add((d / STEP * PARTS * TILE + r) * STEP);
                store_parts::<S, PARTS>(s, load_step(s, row, d, dim), to);
            }
        }
    });
}

/// Packs K^T of `keys` into panels of 32 keys, `[panel][step][part][16 pairs][32 keys]`; zeros for keys beyond the last.
pub(crate) struct PackKeyParts<K> {
    pub(crate) parts: Parts,
    pub(crate) k: K,
    pub(crate) keys: Range<usize>,
    pub(crate) dim: usize,
    /// Room for [`Parts::room`] floats.
    pub(crate) wide: *mut f32,
    pub(crate) to: *mut f32,
}

impl<K: Rows> Kernel for PackKeyParts<K> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if !S::DOT2_BF16 {
            unreachable!("asked for where there are matrix registers only");
        }
        let Self { parts: Parts { keys: parts, .. }, k, keys, dim, wide, to } = self;
        // SAFETY: whoever makes this gives it buffers of the right size and rows of a problem, whose maker vouched for them.
        with_parts!(parts, PARTS, unsafe { pack_keys::<S, K, PARTS>(s, k, keys, dim, wide, to) });
    }
}

/// # Safety
/// `k` yields `dim` readable elements for every key, `to` holds the panels, `wide` one of them.
#[inline(always)]
unsafe fn pack_keys<S: Simd, K: Rows, const PARTS: usize>(
    s: S,
    k: K,
    keys: Range<usize>,
    dim: usize,
    wide: *mut f32,
    to: *mut f32,
) {
    let steps = dim.div_ceil(STEP);
    for (p, first) in keys.clone().step_by(BLOCK).enumerate() {
        let count = BLOCK.min(keys.end - first);
        let [start, second] = k.starts(first);
        let distance = second.addr().wrapping_sub(start.addr());
        let words = distance % 4 == 0 && distance.cast_signed() > 0;
        if K::BF16 && PARTS == 1 && !K::SCATTERED && words && count == BLOCK && dim.is_multiple_of(STEP) {
            // Where they lie.
            for step in 0..steps {
                for half in 0..2 {
                    let from = start.wrapping_add(half * TILE * distance + step * TILE_BYTES);
                    if first + BLOCK < keys.end {
                        for c in 0..TILE {
                            prefetch(from.wrapping_add((BLOCK + c) * distance));
                        }
                    }
                    // SAFETY: the caller's promise; sixteen keys have a whole step of numbers each.
                    unsafe {
                        let to = to.add((p * steps + step) * RIGHT + half * TILE);
                        s.transpose(from.cast(), distance / 4, to, BLOCK);
                    }
                }
            }
            continue;
        }
        // Rows one after another, as they lie in memory: `[step][part][key][32 numbers]`.
        for c in 0..count {
            if first + c + BLOCK < keys.end {
                k.row(first + c + BLOCK).prefetch(dim);
            }
            for step in 0..steps {
                // SAFETY: the caller's promise.
                unsafe {
                    let to = wide.add(step * PARTS * RIGHT + c * TILE);
                    if K::BF16 && (step + 1) * STEP <= dim {
                        let numbers = s.load_bytes(k.start(first + c).wrapping_add(2 * step * STEP));
                        s.store_bytes(to.cast(), numbers);
                        continue;
                    }
                    let mut rest = load_step(s, k.row(first + c), step * STEP, dim);
                    for part in 0..PARTS {
                        let [[a, after_a], [b, after_b]] = [s.split_bf16(rest[0]), s.split_bf16(rest[1])];
                        s.store_bytes(to.add(part * RIGHT).cast(), s.narrow_bf16(a, b));
                        rest = [after_a, after_b];
                    }
                }
            }
        }
        for block in 0..steps * PARTS {
            // SAFETY: the caller's promise.
            unsafe {
                let (from, to) = (wide.add(block * RIGHT), to.add((p * steps * PARTS + block) * RIGHT));
                std::ptr::write_bytes(from.add(count * TILE), 0, (BLOCK - count) * TILE);
                s.transpose(from, TILE, to, BLOCK);
                s.transpose(from.add(TILE * TILE), TILE, to.add(TILE), BLOCK);
            }
        }
    }
}

/// Packs V of `keys` into panels of 32 columns, `[panel][32 keys][part][16 pairs of keys][32 columns]`; zeros for keys beyond the last.
pub(crate) struct PackValueParts<V> {
    pub(crate) parts: Parts,
    pub(crate) v: V,
    pub(crate) keys: Range<usize>,
    pub(crate) dim: usize,
    /// Floats from panel to panel.
    pub(crate) between: usize,
    pub(crate) to: *mut f32,
}

impl<V: Rows> Kernel for PackValueParts<V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if !S::DOT2_BF16 {
            unreachable!("asked for where there are matrix registers only");
        }
        let Self { parts: Parts { values: parts, .. }, v, keys, dim, between, to } = self;
        // SAFETY: as in `PackKeyParts`.
        with_parts!(parts, PARTS, unsafe { pack_values::<S, V, PARTS>(s, v, keys, dim, between, to) });
    }
}

/// # Safety
/// `v` yields `dim` readable elements for every key, `to` holds the panels.
#[inline(always)]
unsafe fn pack_values<S: Simd, V: Rows, const PARTS: usize>(
    s: S,
    v: V,
    keys: Range<usize>,
    dim: usize,
    between: usize,
    to: *mut f32,
) {
    for (g, first) in keys.clone().step_by(BLOCK).enumerate() {
        for pair in 0..TILE {
            let j = first + 2 * pair;
            if V::BF16 && PARTS == 1 && j + 1 < keys.end && dim.is_multiple_of(STEP) {
                let rows = [v.start(j), v.start(j + 1)];
                let coming = [v.start(j + BLOCK), v.start(j + BLOCK + 1)];
                for d in (0..dim).step_by(STEP) {
                    if j + BLOCK + 1 < keys.end {
                        prefetch(coming[0].wrapping_add(2 * d));
                        prefetch(coming[1].wrapping_add(2 * d));
                    }
                    // SAFETY: the caller's promise; both rows have a whole step of numbers from `d` on.
                    unsafe {
                        let to = to.add(d / BLOCK * between + g * RIGHT + pair * BLOCK);
                        let numbers = [s.load_bytes(rows[0].add(2 * d)), s.load_bytes(rows[1].add(2 * d))];
                        let [low, high] = s.weave_pairs(numbers);
                        s.store_bytes(to.cast(), low);
                        s.store_bytes(to.add(TILE).cast(), high);
                    }
                }
                continue;
            }
            for ahead in [j + BLOCK, j + BLOCK + 1] {
                if ahead < keys.end {
                    v.row(ahead).prefetch(dim);
                }
            }
            for d in (0..dim.next_multiple_of(BLOCK)).step_by(S::LANES) {
                // SAFETY: the caller's promise.
                unsafe {
                    let mut a = if j < keys.end { load(s, v.row(j), d, dim) } else { s.zero() };
                    let mut b = if j + 1 < keys.end { load(s, v.row(j + 1), d, dim) } else { s.zero() };
                    let to = to.add(d / BLOCK * between + g * PARTS * RIGHT + pair * BLOCK + d % BLOCK);
                    for part in 0..PARTS {
                        let [x, y] = [s.split_bf16(a), s.split_bf16(b)];
                        s.store(to.add(part * RIGHT), s.pair_bf16(x[0], y[0]));
                        [a, b] = [x[1], y[1]];
                    }
                }
            }
        }
    }
}
