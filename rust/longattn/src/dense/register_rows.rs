//! Attention of a few query rows by matrix registers, over keys and values of 16 bits (`parts.rs` says in what parts).
//!
//! ```text
//! S^T = K Q^T      32 keys at a time, bf16 as they lie in memory; scores are transposed
//! O += P V         pairs of keys beside each other, all columns of a block of keys
//! ```
//! Sixteen query rows take as long as one: reading keys and values is all the time there is.

use super::Problem;
use super::ahead::ahead;
use super::parts::{Parts, QueryColumns, WEIGHTS, pack_few_values, pack_rows};
use super::rows::{Row, Rows};
use super::scores::RowId;
use super::scratch::Buffer;
use super::stream::{KEYS, MAX_QUERY_ROWS};
use crate::simd::tiles::{BLOCK, Factors, Left, Registers, STEP, Sums, TILE, TILE_BYTES};
use crate::simd::{Kernel, Simd};
use std::ops::Range;

const _: () = assert!(KEYS.is_multiple_of(BLOCK) && MAX_QUERY_ROWS <= TILE);

/// Query rows and working memory of one call.
pub(super) struct RegisterRows {
    parts: Parts,
    queries: QueryColumns,
    scales: [f32; MAX_QUERY_ROWS],
    /// Keys, then values, in blocks; sums of a block.
    packed: Buffer,
    packed_len: usize,
    sums: Sixteen,
}

/// Sums of sixteen rows and 32 columns, or the other way round; and sixteen of either.
#[repr(align(64))]
struct Sixteen {
    products: [f32; TILE * BLOCK],
    turned: [f32; TILE * TILE],
}

impl RegisterRows {
    /// If the problem's rows `ids` are multiplied so.
    #[inline(always)]
    pub(super) fn new<S: Simd>(s: S, problem: &Problem, ids: &[RowId]) -> Option<Self> {
        let parts = Parts::of_few::<S>(problem)?;
        let queries = QueryColumns::new(s, &parts, problem, ids);
        let mut scales = [0.0; MAX_QUERY_ROWS];
        for (scale, &id) in scales.iter_mut().zip(ids) {
            *scale = problem.row_scale(id);
        }
        let of_keys = BLOCK * parts.key_width(problem.dim);
        let of_values = KEYS * problem.value_dim.div_ceil(BLOCK) * parts.value_width();
        let packed_len = of_keys.max(of_values);
        let sums = Sixteen { products: [0.0; TILE * BLOCK], turned: [0.0; TILE * TILE] };
        Some(Self { parts, queries, scales, packed: Buffer::default(), packed_len, sums })
    }
}

/// Scores of all rows for a block of keys.
pub(super) struct RegisterScores<'a, K, V> {
    pub(super) registers: &'a Registers,
    pub(super) of: &'a mut RegisterRows,
    pub(super) rows: usize,
    pub(super) dim: usize,
    pub(super) k: K,
    pub(super) keys: Range<usize>,
    pub(super) next: (V, usize),
    /// Rows of [`KEYS`].
    pub(super) scores: &'a mut [f32],
}

impl<K: Rows, V: Rows> Kernel for RegisterScores<'_, K, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if !S::DOT2_BF16 {
            unreachable!("asked for where there are matrix registers only");
        }
        let Self { registers, of, rows, dim, k, keys, next, scores } = self;
        assert!(rows <= MAX_QUERY_ROWS && keys.len() <= KEYS && scores.len() >= rows * KEYS);
        let RegisterRows { parts, queries, scales, packed, packed_len, sums } = of;
        let packed = packed.take(*packed_len);
        let ahead = ahead(k.row_bytes(dim));
        let mut from = keys.start;
        while from < keys.end {
            let count = BLOCK.min(keys.end - from);
            for coming in from + ahead..from + ahead + count {
                if coming < keys.end {
                    k.row(coming).prefetch(dim);
                } else {
                    next.0.row(keys.start + (coming - keys.end)).prefetch(next.1);
                }
            }
            let [first, second] = k.starts(from);
            // SAFETY: whoever made this vouches for the keys; `packed` has room for 32 of them.
            let left = unsafe {
                if K::BF16 && !K::SCATTERED && count == BLOCK && dim.is_multiple_of(STEP) {
                    let row = second.addr().wrapping_sub(first.addr());
                    Left { start: first, row, tile: TILE.wrapping_mul(row), step: TILE_BYTES, part: 0 }
                } else {
                    pack_rows(s, parts, k, from..from + count, dim, packed)
                }
            };
            let to = Sums { start: sums.products.as_mut_ptr(), row: TILE, add: false };
            let (products, steps) = (parts.of_keys.pairs(), dim.div_ceil(STEP));
            // SAFETY: 32 keys of whole steps, in place or packed, and as many query columns.
            unsafe { registers.multiply(Factors::Bf16, products, steps, [BLOCK, TILE], left, queries.columns(), to) };
            for half in (0..count).step_by(TILE) {
                // SAFETY: sixteen rows of sixteen; KEYS is a multiple of sixteen, so that as many scores are there in each row.
                unsafe {
                    let products = sums.products.as_ptr().add(half * TILE);
                    s.transpose(products, TILE, sums.turned.as_mut_ptr(), TILE);
                    for (r, &scale) in scales.iter().enumerate().take(rows) {
                        let to = scores.as_mut_ptr().add(r * KEYS + from - keys.start + half);
                        let scale = s.splat(scale);
                        for lane in (0..TILE).step_by(S::LANES) {
                            let x = s.load(sums.turned.as_ptr().add(r * TILE + lane));
                            s.store(to.add(lane), s.mul(x, scale));
                        }
                    }
                }
            }
            from += count;
        }
    }
}

/// Adds a block's values to the outputs.
pub(super) struct RegisterValues<'a, K, V> {
    pub(super) registers: &'a Registers,
    pub(super) of: &'a mut RegisterRows,
    /// Rows of [`KEYS`]; 0 beyond the last key, up to a whole vector.
    pub(super) weights: &'a [f32],
    pub(super) rows: usize,
    pub(super) dim: usize,
    pub(super) v: V,
    pub(super) keys: Range<usize>,
    pub(super) next: (K, usize),
    pub(super) outputs: &'a mut [f32],
    pub(super) padded_dim: usize,
}

impl<K: Rows, V: Rows> Kernel for RegisterValues<'_, K, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if !S::DOT2_BF16 {
            unreachable!("asked for where there are matrix registers only");
        }
        let Self { registers, of, weights, rows, dim, v, keys, next, outputs, padded_dim } = self;
        assert!(rows <= MAX_QUERY_ROWS && keys.len() <= KEYS && weights.len() >= rows * KEYS);
        assert!(outputs.len() >= rows * padded_dim && padded_dim >= dim);
        let RegisterRows { parts, packed, packed_len, sums, .. } = of;
        let packed = packed.take(*packed_len);
        let mut blocks = WEIGHTS;
        let steps = keys.len().div_ceil(STEP);
        for (r, weights) in weights.chunks(KEYS).enumerate().take(rows) {
            parts.store_few(s, &weights[..keys.len()], r, &mut blocks);
        }
        let between = KEYS * parts.value_width();
        let ahead = ahead(v.row_bytes(dim));
        for group in 0..steps {
            let first = keys.start + group * STEP;
            let part = first..(first + STEP).min(keys.end);
            for coming in part.start + ahead..part.end + ahead {
                if coming < keys.end {
                    v.row(coming).prefetch(dim);
                } else {
                    next.0.row(keys.end + (coming - keys.end)).prefetch(next.1);
                }
            }
            let to = &mut packed[group * STEP * parts.value_width()..];
            // SAFETY: whoever made this vouches for the values; `packed` has room for a block of them.
            unsafe { pack_few_values(s, parts, v, part, dim, between, to) };
        }
        let ordered = !V::BF16;
        for (p, d) in (0..dim).step_by(BLOCK).enumerate() {
            let to = Sums { start: sums.products.as_mut_ptr(), row: BLOCK, add: false };
            let (left, right) = (parts.few_weights(&blocks), parts.value_columns(packed[p * between..].as_ptr()));
            let products = parts.of_outputs.pairs();
            // SAFETY: there are weights and packed values for all steps.
            unsafe { registers.multiply(Factors::Bf16, products, steps, [TILE, BLOCK], left, right, to) };
            for (r, row) in outputs.chunks_exact_mut(padded_dim).enumerate().take(rows) {
                // SAFETY: rows of 32 sums.
                let mut halves = unsafe {
                    let p = sums.products.as_ptr().add(r * BLOCK);
                    [s.load(p), s.load(p.add(S::LANES))]
                };
                if !ordered {
                    halves = s.in_order_pairs(halves);
                }
                for (half, sum) in halves.into_iter().enumerate() {
                    if let Some(to) = row.get_mut(d + half * S::LANES..d + (half + 1) * S::LANES) {
                        // SAFETY: there are LANES floats.
                        unsafe { s.store(to.as_mut_ptr(), s.add(s.load(to.as_ptr()), sum)) };
                    }
                }
            }
        }
    }
}
