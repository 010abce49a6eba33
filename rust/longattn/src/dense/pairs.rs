//! Decode scores of bf16 queries over bf16 keys where the CPU multiplies pairs of bf16: products are exact, sums are f32.

use super::Problem;
use super::rows::Rows;
use super::scores::RowId;
use super::stream::{Coming, KEYS, MAX_QUERY_ROWS, ahead};
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
        assert!(keys.len() <= KEYS && scores.len() >= n * KEYS && queries.numbers.len() >= n * queries.stride);
        let mut r = 0;
        while r < n {
            let next = (r == 0).then_some(next);
            let (keys, out) = (keys.clone(), &mut scores[r * KEYS..]);
            // SAFETY: rows r.. of queries and scores exist by the assertion; whoever made this vouches for the keys.
            r += unsafe {
                match n - r {
                    1 => pair_scores::<S, K, V, 1, 8>(s, queries, r, dim, k, keys, next, out),
                    2 | 3 => pair_scores::<S, K, V, 2, 8>(s, queries, r, dim, k, keys, next, out),
                    4..=7 => pair_scores::<S, K, V, 4, 4>(s, queries, r, dim, k, keys, next, out),
                    _ => pair_scores::<S, K, V, 8, 2>(s, queries, r, dim, k, keys, next, out),
                }
            };
        }
    }
}

/// Scores of `R` rows from row `first` on, `C` keys at a time. Returns `R`.
///
/// # Safety
/// The rows of `keys` exist and are bf16, and `queries` has the query rows.
#[inline(always)]
unsafe fn pair_scores<S: Simd, K: Rows, V: Rows, const R: usize, const C: usize>(
    s: S,
    queries: &PairQueries,
    first: usize,
    dim: usize,
    k: K,
    keys: Range<usize>,
    next: Option<(V, usize)>,
    scores: &mut [f32],
) -> usize {
    let ahead = ahead(k.row_bytes(dim));
    let mut j = keys.start;
    while j < keys.end {
        let coming = Coming::<C>::new(k, dim, ahead, j, &keys, next);
        let to = &mut scores[j - keys.start..];
        // SAFETY: the caller's promise; fewer than C keys are left only where one at a time is taken.
        unsafe {
            if j + C <= keys.end {
                let sums = pair_dots::<S, K, R, C>(s, queries, first, dim, k, j, coming);
                for (r, sums) in sums.iter().enumerate() {
                    for (to, sum) in to[r * KEYS..r * KEYS + C].iter_mut().zip(sums) {
                        *to = queries.scales[first + r] * sum;
                    }
                }
            } else {
                coming.ask(0, usize::MAX);
                for c in 0..keys.end - j {
                    for (r, &[sum]) in
                        pair_dots::<S, K, R, 1>(s, queries, first, dim, k, j + c, Coming::none()).iter().enumerate()
                    {
                        to[r * KEYS + c] = queries.scales[first + r] * sum;
                    }
                }
            }
        }
        j += C;
    }
    R
}

/// Dot products of `R` query rows with the `C` keys from `j` on.
///
/// # Safety
/// As [`pair_scores`].
#[inline(always)]
unsafe fn pair_dots<S: Simd, K: Rows, const R: usize, const C: usize>(
    s: S,
    queries: &PairQueries,
    first: usize,
    dim: usize,
    k: K,
    j: usize,
    coming: Coming<C>,
) -> [[f32; C]; R] {
    let (bytes, step) = (2 * dim, 4 * S::LANES);
    let mut acc = [[s.zero(); C]; R];
    let mut at = 0;
    while at < bytes {
        let mut x = [s.splat_i32(0); C];
        for (c, x) in x.iter_mut().enumerate() {
            let row = k.start(j + c).wrapping_add(at);
            // SAFETY: the row has `bytes` bytes.
            *x = unsafe { if at + step <= bytes { s.load_bytes(row) } else { s.load_bytes_first(row, bytes - at) } };
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
