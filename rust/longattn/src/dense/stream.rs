//! Attention of a few query rows over many keys: one pass over K and V, which is all the time there is.
//!
//! ```text
//! for each block of keys:
//!     S = Q K^T          dot products along contiguous rows, up to 4 query rows x 2 keys in registers
//!     modify, mask, online softmax                       (scores.rs)
//!     O = O * factor + P V                                up to 4 query rows x 4 vectors in registers
//! ```
//! All rows of a KV head's query group go together, so each K and V byte is read once per group.

use super::Problem;
use super::rows::{Rows, prefetch_row};
use super::scores::{RowId, Running, modify, online_softmax};
use crate::simd::Simd;
use crate::tensor::Element;
use std::ops::Range;

/// Keys per block: their scores, K and V stay in the L1 and L2 caches.
pub(crate) const KEYS: usize = 128;

/// The most query rows that go together; more are worth packing (tile.rs).
pub(crate) const MAX_QUERY_ROWS: usize = 8;

/// Query rows and what they accumulate.
pub(crate) struct RowState<'a> {
    /// Scaled queries, `[rows, padded_dim]`, zeros beyond `dim`.
    pub(crate) queries: &'a [f32],
    pub(crate) padded_dim: usize,
    /// `[rows, padded_value_dim]`.
    pub(crate) outputs: &'a mut [f32],
    pub(crate) padded_value_dim: usize,
    pub(crate) running: &'a mut [Running],
}

/// `scores[r][j] = q_r . k_j` for `R` rows and the keys `keys`; rows of scores are [`KEYS`] apart.
///
/// # Safety
/// `rows` yields `dim` readable elements for every key; queries are padded with zeros to a multiple of `LANES`.
#[inline(always)]
unsafe fn scores_of<S: Simd, T: Element, K: Rows<T>, const R: usize>(
    s: S,
    queries: *const f32,
    padded_dim: usize,
    dim: usize,
    rows: K,
    keys: Range<usize>,
    scores: *mut f32,
) {
    const AHEAD: usize = 8;
    let whole = dim / S::LANES * S::LANES;
    let count = keys.len();
    let mut j = 0;
    while j < count {
        let two = j + 1 < count;
        let first = rows.row(keys.start + j);
        let second = if two { rows.row(keys.start + j + 1) } else { first };
        prefetch_row(rows.row(keys.start + j + AHEAD), dim);
        prefetch_row(rows.row(keys.start + j + AHEAD + 1), dim);
        let mut acc = [[s.zero(); 2]; R];
        let mut d = 0;
        // SAFETY: d + LANES <= dim in the loop, the rest is read by its length; queries are padded; scores holds KEYS per row.
        unsafe {
            while d < whole {
                let (x, y) = (s.load_as(first.add(d)), s.load_as(second.add(d)));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let q = s.load(queries.add(r * padded_dim + d));
                    acc[0] = s.fma(q, x, acc[0]);
                    acc[1] = s.fma(q, y, acc[1]);
                }
                d += S::LANES;
            }
            if d < dim {
                let (x, y) = (s.load_first(first.add(d), dim - d), s.load_first(second.add(d), dim - d));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let q = s.load(queries.add(r * padded_dim + d));
                    acc[0] = s.fma(q, x, acc[0]);
                    acc[1] = s.fma(q, y, acc[1]);
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                *scores.add(r * KEYS + j) = s.sum(acc[0]);
                if two {
                    *scores.add(r * KEYS + j + 1) = s.sum(acc[1]);
                }
            }
        }
        j += 2;
    }
}

/// `outputs[r] += sum_j p[r][j] v_j` for `R` rows and the keys `keys`.
///
/// # Safety
/// `rows` yields `dim` readable elements for every key; outputs hold `R` rows of `padded_dim >= dim` floats, a multiple of `LANES`.
#[inline(always)]
unsafe fn accumulate<S: Simd, T: Element, V: Rows<T>, const R: usize>(
    s: S,
    weights: *const f32,
    rows: V,
    keys: Range<usize>,
    dim: usize,
    outputs: *mut f32,
    padded_dim: usize,
) {
    const VECTORS: usize = 4;
    const AHEAD: usize = 8;
    let mut d = 0;
    // SAFETY: V is read at d + VECTORS * LANES <= dim, at d + LANES <= dim, or by the length of the rest; outputs are padded.
    unsafe {
        while d + VECTORS * S::LANES <= dim {
            let mut acc = [[s.zero(); VECTORS]; R];
            for (r, acc) in acc.iter_mut().enumerate() {
                for (c, acc) in acc.iter_mut().enumerate() {
                    *acc = s.load(outputs.add(r * padded_dim + d + c * S::LANES));
                }
            }
            for j in 0..keys.len() {
                let row = rows.row(keys.start + j).add(d);
                if d == 0 {
                    prefetch_row(rows.row(keys.start + j + AHEAD), dim);
                }
                let v: [S::F32; VECTORS] = [
                    s.load_as(row),
                    s.load_as(row.add(S::LANES)),
                    s.load_as(row.add(2 * S::LANES)),
                    s.load_as(row.add(3 * S::LANES)),
                ];
                for (r, acc) in acc.iter_mut().enumerate() {
                    let w = s.splat(*weights.add(r * KEYS + j));
                    for (acc, &v) in acc.iter_mut().zip(&v) {
                        *acc = s.fma(w, v, *acc);
                    }
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                for (c, &acc) in acc.iter().enumerate() {
                    s.store(outputs.add(r * padded_dim + d + c * S::LANES), acc);
                }
            }
            d += VECTORS * S::LANES;
        }
        while d < dim {
            let n = dim - d;
            let mut acc = [s.zero(); R];
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = s.load(outputs.add(r * padded_dim + d));
            }
            for j in 0..keys.len() {
                let row = rows.row(keys.start + j).add(d);
                let v = if n >= S::LANES { s.load_as(row) } else { s.load_first(row, n) };
                for (r, acc) in acc.iter_mut().enumerate() {
                    *acc = s.fma(s.splat(*weights.add(r * KEYS + j)), v, *acc);
                }
            }
            for (r, &acc) in acc.iter().enumerate() {
                s.store(outputs.add(r * padded_dim + d), acc);
            }
            d += S::LANES;
        }
    }
}

/// As [`accumulate`] for one row, passing over keys of weight 0: what they hold may be NaN.
///
/// # Safety
/// As [`accumulate`].
#[inline(always)]
unsafe fn accumulate_visible<S: Simd, T: Element, V: Rows<T>>(
    s: S,
    weights: *const f32,
    rows: V,
    keys: Range<usize>,
    dim: usize,
    outputs: *mut f32,
    padded_dim: usize,
) {
    for j in 0..keys.len() {
        // SAFETY: as the caller's promise, for a single key.
        unsafe {
            if *weights.add(j) != 0.0 {
                accumulate::<S, T, V, 1>(
                    s,
                    weights.add(j),
                    rows,
                    keys.start + j..keys.start + j + 1,
                    dim,
                    outputs,
                    padded_dim,
                );
            }
        }
    }
}

/// Scores of all rows for a block of keys, `R` at a time.
///
/// # Safety
/// As [`scores_of`].
#[inline(always)]
pub(crate) unsafe fn block_scores<S: Simd, T: Element, K: Rows<T>>(
    s: S,
    state: &RowState,
    dim: usize,
    rows: K,
    keys: Range<usize>,
    scores: &mut [f32],
) {
    let n = state.running.len();
    assert!(keys.len() <= KEYS && scores.len() >= n * KEYS && state.queries.len() >= n * state.padded_dim);
    let (mut r, dp) = (0, state.padded_dim);
    while r < n {
        // SAFETY: rows r.. of queries and scores exist by the assertion; the caller vouches for the keys.
        unsafe {
            let (q, out) = (state.queries.as_ptr().add(r * dp), scores.as_mut_ptr().add(r * KEYS));
            match n - r {
                1 => scores_of::<S, T, K, 1>(s, q, dp, dim, rows, keys.clone(), out),
                2 | 3 => scores_of::<S, T, K, 2>(s, q, dp, dim, rows, keys.clone(), out),
                _ => scores_of::<S, T, K, 4>(s, q, dp, dim, rows, keys.clone(), out),
            }
        }
        r += if n - r >= 4 { 4 } else { 2.min(n - r) };
    }
}

/// Adds a block's values to the outputs of all rows, `R` at a time.
///
/// # Safety
/// As [`accumulate`].
#[inline(always)]
pub(crate) unsafe fn block_values<S: Simd, T: Element, V: Rows<T>>(
    s: S,
    state: &mut RowState,
    dim: usize,
    rows: V,
    keys: Range<usize>,
    weights: &[f32],
) {
    let n = state.running.len();
    assert!(keys.len() <= KEYS && weights.len() >= n * KEYS && state.outputs.len() >= n * state.padded_value_dim);
    let (mut r, dp) = (0, state.padded_value_dim);
    while r < n {
        // SAFETY: rows r.. of weights and outputs exist by the assertion; the caller vouches for the values.
        unsafe {
            let (w, out) = (weights.as_ptr().add(r * KEYS), state.outputs.as_mut_ptr().add(r * dp));
            match n - r {
                1 => accumulate::<S, T, V, 1>(s, w, rows, keys.clone(), dim, out, dp),
                2 | 3 => accumulate::<S, T, V, 2>(s, w, rows, keys.clone(), dim, out, dp),
                _ => accumulate::<S, T, V, 4>(s, w, rows, keys.clone(), dim, out, dp),
            }
        }
        r += if n - r >= 4 { 4 } else { 2.min(n - r) };
    }
}

/// Attends from the rows of `state` to the keys `keys`, `ids[r]` being row r.
///
/// `visible` stands in for what causality and window leave each row, where keys are counted otherwise than in the problem.
/// `careful` never multiplies a value by a weight of 0, so that NaN in keys a row does not see cannot reach it; slower.
///
/// # Safety
/// `k` and `v` yield readable rows for every key of `keys`; `state` is padded as its fields say.
#[inline(always)]
pub(crate) unsafe fn attend<S: Simd, T: Element, K: Rows<T>, V: Rows<T>>(
    s: S,
    problem: &Problem,
    ids: &[RowId],
    k: K,
    v: V,
    keys: Range<usize>,
    visible: Option<Range<usize>>,
    state: &mut RowState,
    scores: &mut [f32],
    careful: bool,
) {
    let plain = problem.options.is_plain();
    let mut start = keys.start;
    while start < keys.end {
        let end = (start + KEYS).min(keys.end);
        let padded = (end - start).next_multiple_of(S::LANES);
        // SAFETY: the caller vouches for the rows of `keys`.
        unsafe { block_scores::<S, T, K>(s, state, problem.dim, k, start..end, scores) };
        for (r, &id) in ids.iter().enumerate() {
            let row = &mut scores[r * KEYS..r * KEYS + padded];
            if !plain {
                modify(s, problem, id, row, start);
            }
            let visible = visible.clone().unwrap_or_else(|| problem.visible(id.row));
            let visible = visible.start.clamp(start, end) - start..visible.end.clamp(start, end) - start;
            let (running, factor) = online_softmax(s, row, visible, state.running[r]);
            state.running[r] = running;
            if factor != 1.0 {
                scale_row(s, &mut state.outputs[r * state.padded_value_dim..][..state.padded_value_dim], factor);
            }
        }
        // SAFETY: as above.
        unsafe {
            if careful {
                for r in 0..ids.len() {
                    let out = state.outputs.as_mut_ptr().add(r * state.padded_value_dim);
                    let w = scores.as_ptr().add(r * KEYS);
                    accumulate_visible::<S, T, V>(s, w, v, start..end, problem.value_dim, out, state.padded_value_dim);
                }
            } else {
                block_values::<S, T, V>(s, state, problem.value_dim, v, start..end, scores);
            }
        }
        start = end;
    }
}

/// `row *= factor`; the row's length is a multiple of `LANES`.
#[inline(always)]
pub(crate) fn scale_row<S: Simd>(s: S, row: &mut [f32], factor: f32) {
    let f = s.splat(factor);
    for chunk in row.chunks_exact_mut(S::LANES) {
        // SAFETY: the chunk has LANES floats.
        unsafe { s.store(chunk.as_mut_ptr(), s.mul(s.load(chunk.as_ptr()), f)) };
    }
}
