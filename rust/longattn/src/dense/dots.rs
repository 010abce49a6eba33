//! Scores of a few query rows with a block of keys, by dot products along contiguous rows.

use super::ahead::{Coming, ahead};
use super::rows::{Row, Rows};
use super::stream::{KEYS, RowState};
use crate::simd::{Kernel, LINE_BYTES, STORED_ROWS, STORED_STEP, Simd, stored_keys};
use std::ops::Range;

/// Elements of the widest rows in a cache line.
const LINE: usize = 16;

/// Whether rows of this kind and length go through an instruction set's own products as a whole: then three go as four, of which the
/// last two are one, in less time than two and one.
#[inline(always)]
pub(super) fn goes_as_stored<S: Simd, K: Rows>(dim: usize) -> bool {
    S::MULTIPLIES_STORED && K::STORED.is_some() && dim.is_multiple_of(STORED_STEP)
}

/// Query rows that go through a block together, out of `n` that are left.
#[inline(always)]
pub(super) const fn rows_together<S: Simd>(n: usize) -> usize {
    match n {
        1 => 1,
        2 | 3 => 2,
        8.. if S::SUMS == 16 => 8,
        _ => 4,
    }
}

/// How dot products along rows come about: of floats or of pairs of bf16 (pairs.rs).
pub(super) trait Dots: Copy {
    /// Products of the `R` query rows from `first` on with the `C` keys from `j` on; asks for what is `coming` meanwhile.
    ///
    /// # Safety
    /// The keys and the query rows exist.
    unsafe fn dots<S: Simd, const R: usize, const C: usize>(
        self,
        s: S,
        first: usize,
        j: usize,
        coming: Coming<C>,
    ) -> [[f32; C]; R];
}

/// `scores[r][j] = q_r . k_j` for `n` rows and the keys `keys` of `k`; rows of scores are [`KEYS`] apart. The rows to come, of `k` and
/// then of `next`, are asked for.
///
/// # Safety
/// The rows of `keys` exist, and `dots` has `n` query rows.
#[inline(always)]
pub(super) unsafe fn fill_scores<S: Simd, D: Dots, K: Rows, V: Rows>(
    s: S,
    dots: D,
    n: usize,
    k: K,
    dim: usize,
    keys: Range<usize>,
    next: (V, usize),
    scores: &mut [f32],
) {
    assert!(keys.len() <= KEYS && scores.len() >= n * KEYS);
    let stored = S::MULTIPLIES_STORED && K::STORED.is_some() && dim >= STORED_STEP;
    let mut r = 0;
    while r < n {
        let three = n - r == 3 && goes_as_stored::<S, K>(dim);
        let together = if three { STORED_ROWS } else { rows_together::<S>(n - r) };
        // The first rows bring the block into the cache for the others.
        let next = (r == 0).then_some(next);
        let (keys, out) = (keys.clone(), &mut scores[r * KEYS..n * KEYS]);
        // SAFETY: the caller's promise.
        unsafe {
            match together {
                1 if stored => fill_rows::<S, D, K, V, 1, { stored_keys(1) }>(s, dots, r, k, dim, keys, next, out),
                2 if stored => fill_rows::<S, D, K, V, 2, { stored_keys(2) }>(s, dots, r, k, dim, keys, next, out),
                4 if stored => fill_rows::<S, D, K, V, 4, { stored_keys(4) }>(s, dots, r, k, dim, keys, next, out),
                1 => fill_rows::<S, D, K, V, 1, 8>(s, dots, r, k, dim, keys, next, out),
                2 if S::SUMS == 16 => fill_rows::<S, D, K, V, 2, 8>(s, dots, r, k, dim, keys, next, out),
                2 => fill_rows::<S, D, K, V, 2, 4>(s, dots, r, k, dim, keys, next, out),
                4 if S::SUMS == 16 => fill_rows::<S, D, K, V, 4, 4>(s, dots, r, k, dim, keys, next, out),
                4 => fill_rows::<S, D, K, V, 4, 2>(s, dots, r, k, dim, keys, next, out),
                _ => fill_rows::<S, D, K, V, 8, 2>(s, dots, r, k, dim, keys, next, out),
            }
        }
        r += together;
    }
}

/// [`fill_scores`] for the `R` rows from `first_row` on, `C` keys at a time.
///
/// # Safety
/// As [`fill_scores`]; `scores` are those of as many rows as there are from there on, of which the last stands for what `R` is more.
#[inline(always)]
unsafe fn fill_rows<S: Simd, D: Dots, K: Rows, V: Rows, const R: usize, const C: usize>(
    s: S,
    dots: D,
    first_row: usize,
    k: K,
    dim: usize,
    keys: Range<usize>,
    next: Option<(V, usize)>,
    scores: &mut [f32],
) {
    let ahead = ahead(k.row_bytes(dim));
    let last = if R == STORED_ROWS { scores.len() / KEYS - 1 } else { R };
    let mut j = keys.start;
    while j < keys.end {
        let coming = Coming::<C>::new(k, dim, ahead, j, &keys, next);
        // The last ones come again with those before them, if there are any.
        let first = if j + C <= keys.end { j } else { keys.end.saturating_sub(C).max(keys.start) };
        // SAFETY: the caller's promise; fewer than C keys are left only where one at a time is taken.
        unsafe {
            let to = scores.as_mut_ptr().add(first - keys.start);
            if first + C <= keys.end {
                for (r, sums) in dots.dots::<S, R, C>(s, first_row, first, coming).iter().enumerate() {
                    to.add(r.min(last) * KEYS).cast::<[f32; C]>().write_unaligned(*sums);
                }
            } else {
                coming.ask(0, usize::MAX);
                for c in 0..keys.end - first {
                    for (r, &[sum]) in dots.dots::<S, R, 1>(s, first_row, first + c, Coming::none()).iter().enumerate()
                    {
                        *to.add(r.min(last) * KEYS + c) = sum;
                    }
                }
            }
        }
        j += C;
    }
}

/// Products of floats.
#[derive(Clone, Copy)]
struct FloatDots<'a, K> {
    /// Padded with zeros to a multiple of `LANES`.
    queries: &'a [f32],
    padded_dim: usize,
    rows: usize,
    dim: usize,
    k: K,
}

impl<K: Rows> Dots for FloatDots<'_, K> {
    #[inline(always)]
    unsafe fn dots<S: Simd, const R: usize, const C: usize>(
        self,
        s: S,
        first: usize,
        j: usize,
        coming: Coming<C>,
    ) -> [[f32; C]; R] {
        let Self { queries, padded_dim, rows, dim, k } = self;
        // SAFETY: the caller's promise on rows and keys.
        unsafe { dots(s, queries.as_ptr().add(first * padded_dim), padded_dim, rows - first - 1, dim, k, j, coming) }
    }
}

/// Dot products of `R` query rows with the `C` keys from `first` on. Row `last` stands for those after it, of [`STORED_ROWS`].
///
/// # Safety
/// `rows` yields `dim` readable elements for these keys; queries are padded with zeros to a multiple of `LANES`.
#[inline(always)]
unsafe fn dots<S: Simd, K: Rows, const R: usize, const C: usize>(
    s: S,
    queries: *const f32,
    padded_dim: usize,
    last: usize,
    dim: usize,
    rows: K,
    first: usize,
    mut coming: Coming<C>,
) -> [[f32; C]; R] {
    let mut keys = [rows.row(first); C];
    for (c, key) in keys.iter_mut().enumerate() {
        *key = rows.row(first + c);
    }
    let (mut acc, mut x) = ([[s.zero(); C]; R], [s.zero(); C]);
    let query = |r: usize| queries.wrapping_add(padded_dim * if R == STORED_ROWS { r.min(last) } else { r });
    let mut d = 0;
    if let Some(storage) = K::STORED
        && S::MULTIPLIES_STORED
        && C == stored_keys(R)
        && dim >= STORED_STEP
    {
        let keys = rows.starts(first);
        let queries = std::array::from_fn(query);
        let steps = dim / STORED_STEP;
        let lines = (C * storage.bytes(STORED_STEP)).next_multiple_of(LINE_BYTES);
        let next = coming.evenly(steps, lines);
        if next.is_none() {
            coming.ask(0, usize::MAX);
        }
        // SAFETY: keys and queries have the elements up to `dim`.
        acc = unsafe { s.stored_dots(storage, keys, next, queries, steps) };
        d = steps * STORED_STEP;
        coming = Coming::none();
    }
    // SAFETY: d + LANES <= dim in the loop, the rest is read by its length; queries are padded.
    unsafe {
        while d + S::LANES <= dim {
            // At the pace of the widest rows, 4 bytes an element.
            if d.is_multiple_of(LINE) {
                coming.ask_line(4 * d);
            }
            for (x, key) in x.iter_mut().zip(&keys) {
                *x = key.load(s, d);
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let q = s.load(query(r).add(d));
                for (acc, &x) in acc.iter_mut().zip(&x) {
                    *acc = s.fma(q, x, *acc);
                }
            }
            d += S::LANES;
        }
        coming.ask(4 * d.next_multiple_of(LINE), usize::MAX);
        if d < dim {
            for (x, key) in x.iter_mut().zip(&keys) {
                *x = key.load_first(s, d, dim - d);
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let q = s.load(query(r).add(d));
                for (acc, &x) in acc.iter_mut().zip(&x) {
                    *acc = s.fma(q, x, *acc);
                }
            }
        }
    }
    s.sums(acc)
}

/// Scores of all rows for a block of keys; see [`fill_scores`].
pub(crate) struct BlockScores<'a, K, V> {
    pub(crate) queries: &'a [f32],
    pub(crate) padded_dim: usize,
    pub(crate) rows: usize,
    pub(crate) dim: usize,
    pub(crate) k: K,
    pub(crate) keys: Range<usize>,
    pub(crate) next: (V, usize),
    pub(crate) scores: &'a mut [f32],
}

impl<'a, K: Rows, V: Rows> BlockScores<'a, K, V> {
    /// Those of the rows of `state`.
    #[inline(always)]
    pub(super) fn of(
        state: &'a RowState,
        dim: usize,
        k: K,
        keys: Range<usize>,
        next: (V, usize),
        scores: &'a mut [f32],
    ) -> Self {
        let (queries, padded_dim, rows) = (state.queries, state.padded_dim, state.running.len());
        Self { queries, padded_dim, rows, dim, k, keys, next, scores }
    }
}

impl<K: Rows, V: Rows> Kernel for BlockScores<'_, K, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { queries, padded_dim, rows, dim, k, keys, next, scores } = self;
        assert!(queries.len() >= rows * padded_dim);
        let dots = FloatDots { queries, padded_dim, rows, dim, k };
        // SAFETY: the queries are there by the assertion; whoever made this vouches for the keys.
        unsafe { fill_scores(s, dots, rows, k, dim, keys, next, scores) }
    }
}
