//! Decode of bf16 queries over bf16 keys and values where the CPU multiplies pairs of bf16: products are exact, sums are f32.

use super::Problem;
use super::ahead::{Coming, ahead};
use super::dots::{Dots, fill_scores};
use super::lanes::{LaneDots, LaneQueries, Words, fill_lanes};
use super::rows::{Row, Rows};
use super::scores::RowId;
use super::stream::{KEYS, MAX_QUERY_ROWS, scale_row};
use super::values::VALUE_BYTES;
use crate::simd::{Kernel, LaneRows, MAX_LANES, Simd};
use half::bf16;
use std::ops::Range;

/// Unscaled query rows, padded with zeros to whole vectors.
pub(super) struct PairQueries {
    numbers: Vec<bf16>,
    stride: usize,
    scales: [f32; MAX_QUERY_ROWS],
    lanes: LaneQueries,
}

impl PairQueries {
    /// The rows `ids` of a problem with bf16 queries.
    pub(super) fn new(problem: &Problem, ids: &[RowId]) -> Self {
        let stride = problem.dim.next_multiple_of(2 * MAX_LANES);
        let (mut numbers, mut scales) = (vec![bf16::ZERO; ids.len() * stride], [0.0; MAX_QUERY_ROWS]);
        for ((row, scale), &id) in numbers.chunks_exact_mut(stride.max(1)).zip(&mut scales).zip(ids) {
            let query = problem.q.row::<bf16>(id.batch, id.head, id.row);
            row[..query.len()].copy_from_slice(query);
            *scale = problem.row_scale(id);
        }
        let pairs: Vec<u32> = numbers
            .as_chunks::<2>()
            .0
            .iter()
            .map(|[a, b]| u32::from(a.to_bits()) | u32::from(b.to_bits()) << 16)
            .collect();
        let lanes = LaneQueries::new(&pairs, stride / 2, problem.dim.div_ceil(2));
        Self { numbers, stride, scales, lanes }
    }
}

/// Scores of all rows for a block of keys.
pub(super) struct PairScores<'a, K, V> {
    pub(super) queries: &'a PairQueries,
    pub(super) rows: usize,
    pub(super) dim: usize,
    pub(super) k: K,
    pub(super) keys: Range<usize>,
    pub(super) next: (V, usize),
    pub(super) words: &'a mut Words,
    pub(super) scores: &'a mut [f32],
}

impl<K: Rows, V: Rows> Kernel for PairScores<'_, K, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if !S::DOT2_BF16 || !K::BF16 {
            unreachable!("asked for where pairs are multiplied only");
        }
        let Self { queries, rows: n, dim, k, keys, next, words, scores } = self;
        let padded = keys.len().next_multiple_of(S::LANES);
        assert!(queries.numbers.len() >= n * queries.stride);
        let dots = PairDots { queries, dim, k };
        // SAFETY: the queries are there by the assertion; whoever made this vouches for the keys.
        unsafe {
            if n == MAX_QUERY_ROWS {
                fill_lanes::<S, _, _, V, MAX_QUERY_ROWS>(s, dots, k, 0, keys, Some(next), words, scores);
            } else {
                fill_scores(s, dots, n, k, dim, keys, next, scores);
            }
        }
        for (scores, scale) in scores.chunks_mut(KEYS).zip(queries.scales).take(n) {
            scale_row(s, &mut scores[..padded], scale);
        }
    }
}

#[derive(Clone, Copy)]
struct PairDots<'a, K> {
    queries: &'a PairQueries,
    dim: usize,
    k: K,
}

impl<K: Rows> Dots for PairDots<'_, K> {
    #[inline(always)]
    unsafe fn dots<S: Simd, const R: usize, const C: usize>(
        self,
        s: S,
        first: usize,
        j: usize,
        coming: Coming<C>,
    ) -> [[f32; C]; R] {
        let Self { queries, dim, k } = self;
        let (bytes, step) = (2 * dim, 4 * S::LANES);
        let mut acc = [[s.zero(); C]; R];
        let mut at = 0;
        while at < bytes {
            let mut x = [s.splat_i32(0); C];
            for (c, x) in x.iter_mut().enumerate() {
                let row = k.start(j + c).wrapping_add(at);
                // SAFETY: the row has `bytes` bytes.
                *x =
                    unsafe { if at + step <= bytes { s.load_bytes(row) } else { s.load_bytes_first(row, bytes - at) } };
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                // SAFETY: queries are padded to whole vectors.
                let q = unsafe {
                    s.load_bytes(queries.numbers.as_ptr().add((first + r) * queries.stride).cast::<u8>().add(at))
                };
                for (acc, &x) in acc.iter_mut().zip(&x) {
                    *acc = s.dot2_bf16(*acc, q, x);
                }
            }
            coming.ask(at, at + step);
            at += step;
        }
        coming.ask(at, usize::MAX);
        s.sums(acc)
    }
}

impl<K: Rows> LaneDots for PairDots<'_, K> {
    #[inline(always)]
    unsafe fn lane_dots<S: Simd, const R: usize>(
        self,
        s: S,
        first: usize,
        rows: &LaneRows,
        coming: Coming<MAX_LANES>,
        words: &mut Words,
    ) -> [S::F32; R] {
        let Self { queries, dim, .. } = self;
        let (bytes, step) = (2 * dim, 4 * S::LANES);
        let words = words.0.as_mut_ptr().cast::<u8>();
        let mut acc = [[s.zero(); 2]; R];
        for at in (0..bytes).step_by(step) {
            let n = (bytes - at).min(step);
            // SAFETY: the rows have `bytes` bytes, the words room for a vector of each lane, and the queries a word for each.
            unsafe {
                s.transpose_words(rows, at, n, words);
                let queries = queries.lanes.at(at / 4, first).cast::<i32>();
                for t in (0..n.div_ceil(4)).step_by(2) {
                    for (parity, t) in [t, t + 1].into_iter().enumerate() {
                        let x = s.load_bytes(words.add(t * step));
                        for (r, acc) in acc.iter_mut().enumerate() {
                            let q = s.splat_i32(*queries.add(t * MAX_QUERY_ROWS + r));
                            acc[parity] = s.dot2_bf16(acc[parity], x, q);
                        }
                    }
                }
            }
            coming.ask(at, at + step);
        }
        coming.ask(bytes.next_multiple_of(step), usize::MAX);
        let mut sums = [s.zero(); R];
        for (sum, &[even, odd]) in sums.iter_mut().zip(&acc) {
            *sum = s.add(even, odd);
        }
        sums
    }

    #[inline(always)]
    fn coming<V: Rows>(self, j: usize, keys: &Range<usize>, next: Option<(V, usize)>) -> Coming<MAX_LANES> {
        Coming::new(self.k, self.dim, ahead(self.k.row_bytes(self.dim)), j, keys, next)
    }
}

/// Adds a block's values to the outputs of [`MAX_QUERY_ROWS`] rows: pairs of keys beside each other, under weights rounded to bf16.
///
/// Rounding changes each weight by at most one part in 256, in either direction: what it does to an output is of the size of its
/// rounding to bf16. The denominator is of the weights as they were. For fewer rows memory is slower than products of floats.
pub(super) struct PairValues<'a, K, V> {
    pub(super) weights: &'a [f32],
    pub(super) dim: usize,
    pub(super) v: V,
    pub(super) keys: Range<usize>,
    pub(super) next: (K, usize),
    pub(super) outputs: &'a mut [f32],
    pub(super) padded_dim: usize,
}

/// A block's weights as bf16.
#[repr(align(64))]
struct PairWeights([[bf16; KEYS]; MAX_QUERY_ROWS]);

impl<K: Rows, V: Rows> Kernel for PairValues<'_, K, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if !S::DOT2_BF16 || !V::BF16 {
            unreachable!("asked for where pairs are multiplied only");
        }
        let Self { weights, dim, v, keys, next, outputs, padded_dim } = self;
        assert!(!keys.is_empty() && keys.len() <= KEYS && weights.len() >= MAX_QUERY_ROWS * KEYS);
        assert!(outputs.len() >= MAX_QUERY_ROWS * padded_dim && padded_dim >= dim);
        let mut pairs = PairWeights([[bf16::ZERO; KEYS]; MAX_QUERY_ROWS]);
        for (pairs, weights) in pairs.0.iter_mut().zip(weights.chunks_exact(KEYS)) {
            for j in (0..keys.len()).step_by(S::LANES) {
                // SAFETY: both rows have KEYS elements, a multiple of LANES; weights beyond the last key are 0 up to a whole vector.
                unsafe { s.store_bf16(pairs.as_mut_ptr().add(j), s.load(weights.as_ptr().add(j))) };
            }
        }
        let step = (VALUE_BYTES / v.row_bytes(dim).max(1)).clamp(16, KEYS) / 2 * 2;
        let columns = 2 * S::LANES;
        for first in keys.clone().step_by(step) {
            let part =
                Part { weights: &pairs, at: first - keys.start, v, keys: first..(first + step).min(keys.end), dim };
            for d in (0..dim).step_by(columns) {
                // The first pass brings the values; memory is asked for what comes after them meanwhile.
                let coming = (d == 0).then_some((next, keys.end));
                // SAFETY: whoever made this vouches for the values.
                let sums = unsafe { part.sums(s, d, coming) };
                for (row, sums) in outputs.chunks_exact_mut(padded_dim).zip(sums) {
                    for (half, sum) in s.in_order_pairs(sums).into_iter().enumerate() {
                        let d = d + half * S::LANES;
                        if let Some(to) = row.get_mut(d..d + S::LANES) {
                            // SAFETY: there are LANES floats.
                            unsafe { s.store(to.as_mut_ptr(), s.add(s.load(to.as_ptr()), sum)) };
                        }
                    }
                }
            }
        }
    }
}

/// Keys whose values are added up together, the first of which has the weight `at`.
struct Part<'a, V> {
    weights: &'a PairWeights,
    at: usize,
    v: V,
    keys: Range<usize>,
    dim: usize,
}

impl<V: Rows> Part<'_, V> {
    /// Sums for each row, of two vectors of columns from `d` on as `interleave_pairs` orders them. With `coming`, the rows to come are asked
    /// for: those of the values and, from the end of the block on, the keys of the next.
    ///
    /// # Safety
    /// The values exist.
    #[inline(always)]
    unsafe fn sums<S: Simd, K: Rows>(
        &self,
        s: S,
        d: usize,
        coming: Option<((K, usize), usize)>,
    ) -> [[S::F32; 2]; MAX_QUERY_ROWS] {
        let Self { weights, at, v, ref keys, dim } = *self;
        let (ahead, last, whole) = (ahead(v.row_bytes(dim)), keys.end - 1, 4 * S::LANES);
        let bytes = (2 * (dim - d)).min(whole);
        let mut acc = [[s.zero(); 2]; MAX_QUERY_ROWS];
        for j in (0..keys.len()).step_by(2) {
            let key = keys.start + j;
            if let Some(((next, next_dim), end)) = coming {
                for coming in [key + ahead, key + ahead + 1] {
                    if coming < end {
                        v.row(coming).prefetch(dim);
                    } else {
                        next.row(coming).prefetch(next_dim);
                    }
                }
            }
            // A last key without another has itself beside it, with weight 0.
            let (a, b) = (v.start(key).wrapping_add(2 * d), v.start((key + 1).min(last)).wrapping_add(2 * d));
            // SAFETY: the caller's promise; `bytes` bytes of a row from column d on are inside it. `at + j` is a weight, and so is the
            // one after it: both are even.
            unsafe {
                let x = s.interleave_pairs(if bytes == whole {
                    [s.load_bytes(a), s.load_bytes(b)]
                } else {
                    [s.load_bytes_first(a, bytes), s.load_bytes_first(b, bytes)]
                });
                for (weights, acc) in weights.0.iter().zip(&mut acc) {
                    let w = s.splat_i32(weights.as_ptr().add(at + j).cast::<i32>().read_unaligned());
                    for (acc, &x) in acc.iter_mut().zip(&x) {
                        *acc = s.dot2_bf16(*acc, x, w);
                    }
                }
            }
        }
        acc
    }
}
