//! Scores of a few query rows with a block of keys, a key in each lane.
//!
//! Dot products along rows end with sums across lanes, one for each query row and key. Where the products are few beside them (short
//! rows, two or four products to a lane) or the query rows are many, it takes less to transpose the keys in words of four bytes, once
//! for all query rows, and to multiply each word of the keys by one word of a query in all lanes.

use super::ahead::Coming;
use super::rows::Rows;
use super::stream::{KEYS, MAX_QUERY_ROWS};
use crate::simd::{LaneRows, MAX_LANES, Simd};
use std::ops::Range;

/// How words of keys and queries are multiplied.
pub(super) trait LaneDots: Copy {
    /// Products of the `R` query rows from `first` on with the keys `rows`. Asks for what is `coming` meanwhile; `words` is scratch space.
    ///
    /// # Safety
    /// The keys and the query rows exist.
    unsafe fn lane_dots<S: Simd, const R: usize>(
        self,
        s: S,
        first: usize,
        rows: &LaneRows,
        coming: Coming<MAX_LANES>,
        words: &mut Words,
    ) -> [S::F32; R];

    /// What memory is asked for while the keys from `j` on are computed with.
    fn coming<V: Rows>(self, j: usize, keys: &Range<usize>, next: Option<(V, usize)>) -> Coming<MAX_LANES>;
}

/// `scores[r][j] = q_r . k_j` of the `R` query rows from `first` on and the keys `keys`; rows of scores are [`KEYS`] apart and written in
/// whole vectors.
///
/// # Safety
/// As [`LaneDots::lane_dots`].
#[inline(always)]
pub(super) unsafe fn fill_lanes<S: Simd, D: LaneDots, K: Rows, V: Rows, const R: usize>(
    s: S,
    dots: D,
    k: K,
    first: usize,
    keys: Range<usize>,
    next: Option<(V, usize)>,
    words: &mut Words,
    scores: &mut [f32],
) {
    const { assert!(KEYS.is_multiple_of(MAX_LANES)) };
    assert!(keys.len() <= KEYS && scores.len() >= R * KEYS);
    let mut rows = LaneRows::NONE;
    for j in keys.clone().step_by(S::LANES) {
        rows.go_to::<S, K>(k, j..keys.end);
        let coming = dots.coming(j, &keys, next);
        // SAFETY: the caller's promise; KEYS is a multiple of LANES, so a vector fits at j of each of the R rows.
        unsafe {
            let sums = dots.lane_dots::<S, R>(s, first, &rows, coming, words);
            let to = scores.as_mut_ptr().add(j - keys.start);
            for (r, &sums) in sums.iter().enumerate() {
                s.store(to.add(r * KEYS), sums);
            }
        }
    }
}

/// Words of query rows in the order in which transposed keys meet them: word `t` of all rows beside each other.
pub(super) struct LaneQueries(Vec<[u32; MAX_QUERY_ROWS]>);

impl LaneQueries {
    /// Of rows of `words` words, `stride` apart, padded with zeros to whole vectors.
    pub(super) fn new(rows: &[u32], stride: usize, words: usize) -> Self {
        let mut made = vec![[0; MAX_QUERY_ROWS]; words.next_multiple_of(MAX_LANES)];
        for (r, row) in rows.chunks_exact(stride.max(1)).enumerate() {
            for (to, &word) in made.iter_mut().zip(&row[..words]) {
                to[r] = word;
            }
        }
        Self(made)
    }

    /// The words from `t` on of the row `first` and those after it.
    #[inline(always)]
    pub(super) fn at(&self, t: usize, first: usize) -> *const u32 {
        self.0[t..].as_ptr().cast::<u32>().wrapping_add(first)
    }
}

/// Room for a vector of words of as many keys.
#[repr(align(64))]
pub(super) struct Words(pub(super) [u32; MAX_LANES * MAX_LANES]);

impl Words {
    pub(super) const NONE: Self = Self([0; _]);
}

impl LaneRows {
    /// Goes to the first of `keys`; the last of them stands for those that would come after it.
    #[inline(always)]
    pub(super) fn go_to<S: Simd, K: Rows>(&mut self, k: K, keys: Range<usize>) {
        let before = self.first;
        self.first = k.start(keys.start);
        if K::SCATTERED || before.is_null() || keys.len() < S::LANES {
            for (lane, distance) in self.distances.iter_mut().enumerate() {
                let row = k.start((keys.start + lane).min(keys.end - 1));
                *distance = row.addr().wrapping_sub(self.first.addr()) as isize;
            }
        }
    }
}
