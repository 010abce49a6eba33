//! Decode scores of bf16 queries over bf16 keys where the CPU multiplies pairs of bf16: products are exact, sums are f32.

use super::Problem;
use super::rows::Rows;
use super::scores::RowId;
use super::stream::{Coming, Dots, KEYS, MAX_QUERY_ROWS, fill_scores, scale_row};
use crate::simd::{Kernel, MAX_LANES, Simd};
use half::bf16;
use std::ops::Range;

/// Unscaled query rows, padded with zeros to whole vectors.
pub(super) struct PairQueries {
    numbers: Vec<bf16>,
    stride: usize,
    scales: [f32; MAX_QUERY_ROWS],
}

impl PairQueries {
    /// The rows `ids` of a problem with bf16 queries.
    pub(super) fn new(problem: &Problem, ids: &[RowId]) -> Self {
        let stride = problem.dim.next_multiple_of(2 * MAX_LANES);
        let mut made = Self { numbers: vec![bf16::ZERO; ids.len() * stride], stride, scales: [0.0; MAX_QUERY_ROWS] };
        for (r, &id) in ids.iter().enumerate() {
            let row = problem.q.row::<bf16>(id.batch, id.head, id.row);
            made.numbers[r * stride..r * stride + row.len()].copy_from_slice(row);
            made.scales[r] = problem.row_scale(id);
        }
        made
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
    pub(super) scores: &'a mut [f32],
}

impl<K: Rows, V: Rows> Kernel for PairScores<'_, K, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if !S::DOT2_BF16 || !K::BF16 {
            unreachable!("asked for where pairs are multiplied only");
        }
        let Self { queries, rows: n, dim, k, keys, next, scores } = self;
        let padded = keys.len().next_multiple_of(S::LANES);
        assert!(queries.numbers.len() >= n * queries.stride);
        // SAFETY: the queries are there by the assertion; whoever made this vouches for the keys.
        unsafe { fill_scores(s, PairDots { queries, dim, k }, n, k, dim, keys, next, scores) }
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
