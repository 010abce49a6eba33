//! Exact nearest rows of many queries, by products of blocks.

use super::search::rank;
use crate::dense::matrix::{PackedMatrix, ROWS};
use crate::dense::rows::{Rows, Strided, widen_row};
use crate::dense::scratch::Buffer;
use crate::simd::{Kernel, Simd};
use crate::tensor::Element;
use std::ops::Range;

/// Rows of keys that are packed together.
const KEYS: usize = 512;

/// Queries of an item: each packs all keys once.
pub(super) const QUERIES: usize = 2 * ROWS;

/// The ranks of the `count` rows of largest inner product with each of some queries, best first.
pub(super) struct Nearest<'a, T> {
    pub(super) rows: Strided<T>,
    pub(super) dim: usize,
    /// Rows to choose from.
    pub(super) among: Range<usize>,
    /// `[queries, dim]`, at most [`QUERIES`] of them.
    pub(super) queries: &'a [f32],
    pub(super) count: usize,
}

impl<T: Element> Kernel for Nearest<'_, T> {
    type Output = Vec<Vec<u64>>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<Vec<u64>> {
        let Self { rows, dim, among, queries, count } = self;
        let n = queries.len() / dim;
        let mut best: Vec<Vec<u64>> = vec![Vec::with_capacity(3 * count); n];
        // What a row must exceed to be among the best so far.
        let mut least = vec![f32::NEG_INFINITY; n];
        let (mut wide, mut keys, mut out) = (Buffer::default(), Vec::new(), Vec::new());
        for first in among.clone().step_by(KEYS) {
            let block = KEYS.min(among.end - first);
            keys.resize(block * dim.next_multiple_of(S::LANES), 0.0);
            for j in 0..block {
                // SAFETY: the caller vouches for the rows; each is written over its own place and padding that the next overwrites.
                unsafe {
                    let to = keys.as_mut_ptr().add(j * dim);
                    widen_row(s, rows.row(first + j), dim, to, dim.next_multiple_of(S::LANES));
                }
            }
            let mut matrix = PackedMatrix::new(s, &keys[..block * dim], block, dim);
            out.resize(matrix.result_len::<S>(), 0.0);
            let queries = Strided { base: queries.as_ptr(), stride: dim as isize };
            for q in (0..n).step_by(ROWS) {
                let together = ROWS.min(n - q);
                // SAFETY: the queries are rows of `dim` floats.
                unsafe { matrix.apply(s, queries, q, together, None, &mut wide, &mut out) };
                for r in 0..together {
                    let scores = &out[r * matrix.stride::<S>()..][..block];
                    let (best, least) = (&mut best[q + r], &mut least[q + r]);
                    for (c, chunk) in scores.chunks(64).enumerate() {
                        if chunk.iter().fold(f32::NEG_INFINITY, |a, &x| if x > a { x } else { a }) <= *least {
                            continue;
                        }
                        for (j, &score) in chunk.iter().enumerate() {
                            if score > *least {
                                best.push(rank(score, (first + 64 * c + j) as u32));
                            }
                        }
                        if best.len() >= 2 * count {
                            best.select_nth_unstable_by(count - 1, |a, b| b.cmp(a));
                            best.truncate(count);
                            *least = score_of(best[count - 1]);
                        }
                    }
                }
            }
        }
        for best in &mut best {
            best.sort_unstable_by(|a, b| b.cmp(a));
            best.truncate(count);
        }
        best
    }
}

/// The score of a rank.
fn score_of(rank: u64) -> f32 {
    let order = (rank >> 32) as u32;
    f32::from_bits(if order >> 31 == 1 { order ^ 1 << 31 } else { !order })
}

#[cfg(test)]
mod tests {
    use super::super::search::row_of;
    use super::*;
    use crate::index::Random;
    use crate::simd::{Isa, dispatch};

    #[test]
    fn the_nearest_are_found_whatever_the_blocks() {
        let mut random = Random::new(3);
        for (n, dim, count) in [(1300, 20, 10), (40, 3, 100), (700, 64, 64)] {
            let keys: Vec<f32> = (0..n * dim).map(|_| random.normal() as f32).collect();
            let queries: Vec<f32> = (0..110 * dim).map(|_| random.normal() as f32).collect();
            let rows = Strided { base: keys.as_ptr(), stride: dim as isize };
            for isa in Isa::available() {
                let found = dispatch(isa, Nearest { rows, dim, among: 0..n, queries: &queries, count });
                for (query, found) in queries.chunks_exact(dim).zip(found) {
                    let score = |j: usize| -> f64 {
                        keys[j * dim..][..dim].iter().zip(query).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
                    };
                    let mut all: Vec<f64> = (0..n).map(score).collect();
                    all.sort_by(|a, b| b.total_cmp(a));
                    assert_eq!(found.len(), count.min(n));
                    for (&row, expected) in found.iter().zip(all) {
                        assert!((score(row_of(row) as usize) - expected).abs() < 1e-4, "{}", isa.name());
                    }
                }
            }
        }
    }
}
