//! Sums of values under a block's weights, for a few rows of weights: `O += P V`.

use super::ahead::{ahead, in_parts};
use super::dots::{goes_as_stored, rows_together};
use super::rows::{Row, Rows};
use super::stream::KEYS;
use crate::simd::{Kernel, LINE_BYTES, Next, STORED_ROWS, STORED_STEP, Simd, asks_second_cache, stored_columns};
use crate::tensor::Storage;
use std::ops::Range;

/// Bytes of values that go through all columns together, so that the second pass finds them in the first-level cache.
pub(super) const VALUE_BYTES: usize = 16 << 10;

/// The same where every pass asks for its share of the rows to come: the first cache then holds as many bytes of these.
const SHARED_VALUE_BYTES: usize = 8 << 10;

/// `outputs[r] += sum_j p[r][j] v_j` for `R` rows and the keys `keys`, `C` vectors of columns at a time.
///
/// With `next`, the rows to come are asked for: those of the values and, towards the end of the block, the keys of the next block. Of
/// few passes the first asks for them all. Of many, as short vectors take, each asks for its share, so that memory does not wait in
/// between; the second cache, which waits for many lines, has enough to do.
///
/// Row `last` of weights and outputs stands for those after it, where [`goes_as_stored`].
///
/// # Safety
/// `rows` yields `dim` readable elements for every key; outputs hold `R` rows of `padded_dim >= dim` floats, a multiple of `LANES`.
#[inline(always)]
unsafe fn accumulate<S: Simd, K: Rows, V: Rows, const R: usize, const C: usize>(
    s: S,
    weights: *const f32,
    last: usize,
    rows: V,
    keys: Range<usize>,
    next: Option<(K, usize)>,
    dim: usize,
    outputs: *mut f32,
    padded_dim: usize,
) {
    let row_bytes = rows.row_bytes(dim);
    let stored = V::STORED.filter(|_| S::MULTIPLIES_STORED && R <= STORED_ROWS && C > 1 && dim >= STORED_STEP);
    let shares = S::SUMS < 16 && dim >= 4 * C * S::LANES && !asks_second_cache();
    let together = if shares { SHARED_VALUE_BYTES } else { VALUE_BYTES };
    let step = (together / row_bytes.max(1)).clamp(16, KEYS);
    let ahead = if shares || stored.is_some() { ahead(row_bytes).max(step) } else { ahead(row_bytes) };
    let Range { start, end } = keys;
    let mut starts = [std::ptr::null(); KEYS];
    if stored.is_some() {
        for (start, j) in starts.iter_mut().zip(keys.clone()) {
            *start = rows.start(j);
        }
    }
    for first in keys.step_by(step) {
        let part = first..(first + step).min(end);
        let mut d = 0;
        // SAFETY: columns d.. + C vectors are inside `dim`, or C is 1 and the rest is read by its length; outputs are padded.
        unsafe {
            let weights = weights.add(first - start);
            if let Some(storage) = stored {
                let starts = &starts[first - start..part.end - start];
                let coming = first + ahead;
                let outputs = (outputs, padded_dim);
                d = accumulate_stored::<S, K, V, R>(
                    s,
                    storage,
                    (weights, last),
                    (rows, dim),
                    starts,
                    coming,
                    end,
                    next,
                    outputs,
                );
            }
            let next = next.filter(|_| d == 0);
            while d < dim {
                let whole = d + C * S::LANES <= dim;
                let after = d + if whole { C * S::LANES } else { S::LANES };
                if let Some(next) = next.filter(|_| shares) {
                    let share = |d: usize| ahead + part.start + part.len() * d.min(dim) / dim;
                    prefetch_rows((rows, dim), next, end, share(d)..share(after));
                }
                let next = if d == 0 && !shares { next } else { None };
                let keys = part.clone();
                if whole {
                    accumulate_columns::<S, K, V, R, C>(
                        s, weights, rows, keys, end, ahead, next, d, dim, outputs, padded_dim,
                    );
                } else {
                    accumulate_columns::<S, K, V, R, 1>(
                        s, weights, rows, keys, end, ahead, next, d, dim, outputs, padded_dim,
                    );
                }
                d = after;
            }
        }
    }
}

/// [`accumulate`] for the columns that [`Simd::add_stored`] takes, all but the last few; the output is how many.
///
/// Each pass asks for its share of the rows to come, from number `coming` on: line after line with the rows of values, where nothing
/// is between them; else before it. Where the block ends, the first of them decides for all what they are.
///
/// # Safety
/// As [`accumulate`], for rows that start at `starts`.
#[inline(always)]
unsafe fn accumulate_stored<S: Simd, K: Rows, V: Rows, const R: usize>(
    s: S,
    storage: Storage,
    (weights, last): (*const f32, usize),
    (rows, dim): (V, usize),
    starts: &[*const u8],
    coming: usize,
    block_end: usize,
    next: Option<(K, usize)>,
    (outputs, padded_dim): (*mut f32, usize),
) -> usize {
    let (columns, pass) = (dim / STORED_STEP * STORED_STEP, stored_columns(R));
    let passes = columns / pass;
    let mut following = None;
    if let Some((next, next_dim)) = next {
        let (here, after, bytes) = if coming < block_end {
            (rows.start(coming), rows.start(coming + 1), rows.row_bytes(dim))
        } else {
            (next.start(coming), next.start(coming + 1), next.row_bytes(next_dim))
        };
        if !V::SCATTERED && !K::SCATTERED && after.addr().wrapping_sub(here.addr()) == bytes {
            following = in_parts(here, bytes, passes, storage.bytes(pass).next_multiple_of(LINE_BYTES));
        }
    }
    let evenly = following.is_some();
    let ask = |columns_done: Range<usize>| {
        if let Some(next) = next.filter(|_| !evenly) {
            let share = |d: usize| coming + starts.len() * d / columns;
            prefetch_rows((rows, dim), next, block_end, share(columns_done.start)..share(columns_done.end));
        }
    };
    // SAFETY: the caller's promise.
    unsafe {
        for d in (0..passes * pass).step_by(pass) {
            ask(d..d + pass);
            s.add_stored::<R>(storage, starts, following, d, last, weights, KEYS, outputs, padded_dim);
            following = following.map(|next| Next { start: next.start.wrapping_add(next.pace * starts.len()), ..next });
        }
        // Columns that make no pass go as those of four rows, all of them one.
        for d in (passes * pass..columns).step_by(stored_columns(STORED_ROWS)) {
            ask(d..d + stored_columns(STORED_ROWS));
            for r in 0..R {
                let (weights, outputs) = (weights.add(r * KEYS), outputs.add(r * padded_dim));
                s.add_stored::<STORED_ROWS>(storage, starts, None, d, 0, weights, 0, outputs, padded_dim);
            }
        }
    }
    columns
}

/// Asks for rows of a block that ends with `end` and, from there on, of the next.
#[inline(always)]
fn prefetch_rows<K: Rows, V: Rows>(
    (rows, dim): (V, usize),
    (next, next_dim): (K, usize),
    end: usize,
    keys: Range<usize>,
) {
    for j in keys {
        if j < end {
            rows.row(j).prefetch(dim);
        } else {
            next.row(j).prefetch(next_dim);
        }
    }
}

/// [`accumulate`] for the `C` vectors of columns from `d` on.
///
/// # Safety
/// As [`accumulate`]; the columns are inside `dim`, or `C` is 1.
#[inline(always)]
unsafe fn accumulate_columns<S: Simd, K: Rows, V: Rows, const R: usize, const C: usize>(
    s: S,
    weights: *const f32,
    rows: V,
    keys: Range<usize>,
    block_end: usize,
    ahead: usize,
    next: Option<(K, usize)>,
    d: usize,
    dim: usize,
    outputs: *mut f32,
    padded_dim: usize,
) {
    let mut acc = [[s.zero(); C]; R];
    let mut v = [s.zero(); C];
    let ragged = d + C * S::LANES > dim;
    // SAFETY: the caller's promise.
    unsafe {
        for (r, acc) in acc.iter_mut().enumerate() {
            for (c, acc) in acc.iter_mut().enumerate() {
                *acc = s.load(outputs.add(r * padded_dim + d + c * S::LANES));
            }
        }
        for j in 0..keys.len() {
            let row = rows.row(keys.start + j);
            if let Some(next) = next {
                let coming = keys.start + j + ahead;
                prefetch_rows((rows, dim), next, block_end, coming..coming + 1);
            }
            if ragged {
                v[0] = row.load_first(s, d, dim - d);
            } else {
                for (c, v) in v.iter_mut().enumerate() {
                    *v = row.load(s, d + c * S::LANES);
                }
            }
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
    }
}

/// As [`accumulate`] for one row, passing over keys of weight 0: what they hold may be NaN.
///
/// # Safety
/// As [`accumulate`].
#[inline(always)]
unsafe fn accumulate_visible<S: Simd, V: Rows>(
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
                let key = keys.start + j..keys.start + j + 1;
                accumulate::<S, V, V, 1, 1>(s, weights.add(j), 0, rows, key, None, dim, outputs, padded_dim);
            }
        }
    }
}

/// Adds a block's values to the outputs of all rows; see [`accumulate`].
pub(crate) struct BlockValues<'a, K, V> {
    pub(crate) weights: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) dim: usize,
    pub(crate) v: V,
    pub(crate) keys: Range<usize>,
    pub(crate) next: (K, usize),
    pub(crate) outputs: &'a mut [f32],
    pub(crate) padded_dim: usize,
    pub(crate) careful: bool,
}

impl<K: Rows, V: Rows> Kernel for BlockValues<'_, K, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { weights, rows: n, dim, v, keys, next, outputs, padded_dim: dp, careful } = self;
        assert!(keys.len() <= KEYS && weights.len() >= n * KEYS && outputs.len() >= n * dp);
        let mut r = 0;
        while r < n {
            let last = n - r - 1;
            let together = match n - r {
                _ if careful => 1,
                3 if goes_as_stored::<S, V>(dim) => STORED_ROWS,
                left => rows_together::<S>(left),
            };
            let next = (r == 0).then_some(next);
            let keys = keys.clone();
            // SAFETY: rows r.. of weights and outputs exist by the assertion; whoever made this vouches for the values.
            unsafe {
                let (w, out) = (weights.as_ptr().add(r * KEYS), outputs.as_mut_ptr().add(r * dp));
                match together {
                    1 if careful => accumulate_visible(s, w, v, keys, dim, out, dp),
                    1 => accumulate::<S, K, V, 1, 4>(s, w, last, v, keys, next, dim, out, dp),
                    2 => accumulate::<S, K, V, 2, 4>(s, w, last, v, keys, next, dim, out, dp),
                    4 if S::SUMS == 16 => accumulate::<S, K, V, 4, 4>(s, w, last, v, keys, next, dim, out, dp),
                    4 => accumulate::<S, K, V, 4, 2>(s, w, last, v, keys, next, dim, out, dp),
                    _ => accumulate::<S, K, V, 8, 2>(s, w, last, v, keys, next, dim, out, dp),
                }
            }
            r += together;
        }
    }
}
