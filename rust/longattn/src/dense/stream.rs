//! Attention of a few query rows over many keys: one pass over K and V, which is all the time there is.
//!
//! ```text
//! for each block of keys:
//!     S = Q K^T          dot products along contiguous rows, 16 accumulators (8 where registers are few): 4 query rows x 4 keys;
//!                        of bytes with a key in each lane (codes.rs)
//!     modify, mask, online softmax                       (scores.rs)
//!     O = O * factor + P V                                16 accumulators: 4 query rows x 4 vectors of columns
//! ```
//! While K is read, memory is asked for the rows of K to come and then for the first of V, and the other way round, so that it is
//! never idle.
//! All rows of a KV head's query group go together, so each K and V byte is read once per group.

use super::Problem;
use super::code_values::{ByteValues, ByteWeights, RoundWeights};
use super::codes::{ByteScores, RoundQueries, ScaleScores, ScaleWeights, widest};
use super::keys::List;
use super::pairs::{PairQueries, PairScores};
use super::rows::{BareRows, Row, Rows};
use super::scores::{RowId, Running, is_negligible, modify, modify_listed, online_softmax};
use crate::simd::{Kernel, Simd, prefetch};
use crate::tensor::DType;
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

/// Bytes of rows asked for ahead of their use: what memory delivers while a request for more is on its way.
const AHEAD_BYTES: usize = 8 << 10;

/// Keys asked for ahead of their use.
#[inline(always)]
pub(super) fn ahead(row_bytes: usize) -> usize {
    (AHEAD_BYTES / row_bytes.max(1)).clamp(4, KEYS / 4)
}

/// Rows to come, of which memory is asked for line by line while others are computed with: a burst of requests would stall loads.
#[derive(Clone, Copy)]
pub(super) struct Coming<const C: usize> {
    starts: [*const u8; C],
    bytes: usize,
}

impl<const C: usize> Coming<C> {
    /// What comes `ahead` after the keys `j..j + C`: rows of the block `keys` and, towards its end, the first of `next`, whose turn
    /// it is then. Nothing without `next`.
    #[inline(always)]
    pub(super) fn new<K: Rows, V: Rows>(
        rows: K,
        dim: usize,
        ahead: usize,
        j: usize,
        keys: &Range<usize>,
        next: Option<(V, usize)>,
    ) -> Self {
        let Some((next, next_dim)) = next else { return Self::none() };
        let mut starts = [std::ptr::null(); C];
        for (c, start) in starts.iter_mut().enumerate() {
            let coming = j + c + ahead;
            let inside = coming < keys.end;
            *start = if inside { rows.start(coming) } else { next.start(keys.start + (coming - keys.end)) };
        }
        let inside = j + ahead < keys.end;
        Self { starts, bytes: if inside { rows.row_bytes(dim) } else { next.row_bytes(next_dim) } }
    }

    /// Rows that come after the block: those from `j` on.
    #[inline(always)]
    pub(super) fn rows<V: Rows>(rows: V, dim: usize, j: usize) -> Self {
        let mut starts = [std::ptr::null(); C];
        for (c, start) in starts.iter_mut().enumerate() {
            *start = rows.start(j + c);
        }
        Self { starts, bytes: rows.row_bytes(dim) }
    }

    /// Nothing to ask for.
    #[inline(always)]
    pub(super) fn none() -> Self {
        Self { starts: [std::ptr::null(); C], bytes: 0 }
    }

    /// Asks for the lines from byte `from` up to byte `to` of each row.
    #[inline(always)]
    pub(super) fn ask(&self, from: usize, to: usize) {
        let mut at = from;
        while at < to.min(self.bytes) {
            for start in self.starts {
                prefetch(start.wrapping_add(at));
            }
            at += 64;
        }
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
    let mut r = 0;
    while r < n {
        let together = rows_together::<S>(n - r);
        // The first rows bring the block into the cache for the others.
        let next = (r == 0).then_some(next);
        let (keys, out) = (keys.clone(), &mut scores[r * KEYS..]);
        // SAFETY: the caller's promise.
        unsafe {
            match together {
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

/// [`fill_scores`] for the `R` rows from `first` on, `C` keys at a time.
///
/// # Safety
/// As [`fill_scores`]; `scores` are `R` rows.
#[inline(always)]
unsafe fn fill_rows<S: Simd, D: Dots, K: Rows, V: Rows, const R: usize, const C: usize>(
    s: S,
    dots: D,
    first: usize,
    k: K,
    dim: usize,
    keys: Range<usize>,
    next: Option<(V, usize)>,
    scores: &mut [f32],
) {
    let ahead = ahead(k.row_bytes(dim));
    let mut j = keys.start;
    while j < keys.end {
        let coming = Coming::<C>::new(k, dim, ahead, j, &keys, next);
        // SAFETY: the caller's promise; fewer than C keys are left only where one at a time is taken.
        unsafe {
            let to = scores.as_mut_ptr().add(j - keys.start);
            if j + C <= keys.end {
                for (r, sums) in dots.dots::<S, R, C>(s, first, j, coming).iter().enumerate() {
                    to.add(r * KEYS).cast::<[f32; C]>().write_unaligned(*sums);
                }
            } else {
                coming.ask(0, usize::MAX);
                for c in 0..keys.end - j {
                    for (r, &[sum]) in dots.dots::<S, R, 1>(s, first, j + c, Coming::none()).iter().enumerate() {
                        *to.add(r * KEYS + c) = sum;
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
        let Self { queries, padded_dim, dim, k } = self;
        // SAFETY: the caller's promise on rows and keys.
        unsafe { dots(s, queries.as_ptr().add(first * padded_dim), padded_dim, dim, k, j, coming) }
    }
}

/// Dot products of `R` query rows with the `C` keys from `first` on.
///
/// # Safety
/// `rows` yields `dim` readable elements for these keys; queries are padded with zeros to a multiple of `LANES`.
#[inline(always)]
unsafe fn dots<S: Simd, K: Rows, const R: usize, const C: usize>(
    s: S,
    queries: *const f32,
    padded_dim: usize,
    dim: usize,
    rows: K,
    first: usize,
    coming: Coming<C>,
) -> [[f32; C]; R] {
    let mut asked = 0;
    let mut keys = [rows.row(first); C];
    for (c, key) in keys.iter_mut().enumerate() {
        *key = rows.row(first + c);
    }
    let mut acc = [[s.zero(); C]; R];
    let mut x = [s.zero(); C];
    let mut d = 0;
    // SAFETY: d + LANES <= dim in the loop, the rest is read by its length; queries are padded.
    unsafe {
        while d + S::LANES <= dim {
            for (x, key) in x.iter_mut().zip(&keys) {
                *x = key.load(s, d);
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let q = s.load(queries.add(r * padded_dim + d));
                for (acc, &x) in acc.iter_mut().zip(&x) {
                    *acc = s.fma(q, x, *acc);
                }
            }
            d += S::LANES;
            // At the pace of the widest rows, 4 bytes an element.
            coming.ask(asked, asked + 4 * S::LANES);
            asked = (asked + 4 * S::LANES).next_multiple_of(64);
        }
        coming.ask(asked, usize::MAX);
        if d < dim {
            for (x, key) in x.iter_mut().zip(&keys) {
                *x = key.load_first(s, d, dim - d);
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let q = s.load(queries.add(r * padded_dim + d));
                for (acc, &x) in acc.iter_mut().zip(&x) {
                    *acc = s.fma(q, x, *acc);
                }
            }
        }
    }
    s.sums(acc)
}

/// Bytes of values that go through all columns together, so that the second pass finds them in the first-level cache.
const VALUE_BYTES: usize = 16 << 10;

/// `outputs[r] += sum_j p[r][j] v_j` for `R` rows and the keys `keys`, `C` vectors of columns at a time.
///
/// With `next`, the rows to come are asked for, in the first pass: those of the values and, towards the end of the block, the keys of
/// the next block.
///
/// # Safety
/// `rows` yields `dim` readable elements for every key; outputs hold `R` rows of `padded_dim >= dim` floats, a multiple of `LANES`.
#[inline(always)]
unsafe fn accumulate<S: Simd, K: Rows, V: Rows, const R: usize, const C: usize>(
    s: S,
    weights: *const f32,
    rows: V,
    keys: Range<usize>,
    next: Option<(K, usize)>,
    dim: usize,
    outputs: *mut f32,
    padded_dim: usize,
) {
    let row_bytes = rows.row_bytes(dim);
    let ahead = ahead(row_bytes);
    let step = (VALUE_BYTES / row_bytes.max(1)).clamp(16, KEYS);
    for first in keys.clone().step_by(step) {
        let part = first..(first + step).min(keys.end);
        let mut d = 0;
        // SAFETY: columns d.. + C vectors are inside `dim`, or C is 1 and the rest is read by its length; outputs are padded.
        unsafe {
            let weights = weights.add(first - keys.start);
            while d + C * S::LANES <= dim {
                let next = if d == 0 { next } else { None };
                accumulate_columns::<S, K, V, R, C>(
                    s,
                    weights,
                    rows,
                    part.clone(),
                    keys.end,
                    ahead,
                    next,
                    d,
                    dim,
                    outputs,
                    padded_dim,
                );
                d += C * S::LANES;
            }
            while d < dim {
                let next = if d == 0 { next } else { None };
                accumulate_columns::<S, K, V, R, 1>(
                    s,
                    weights,
                    rows,
                    part.clone(),
                    keys.end,
                    ahead,
                    next,
                    d,
                    dim,
                    outputs,
                    padded_dim,
                );
                d += S::LANES;
            }
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
            if let Some((next, next_dim)) = next {
                let coming = keys.start + j + ahead;
                if coming < block_end {
                    rows.row(coming).prefetch(dim);
                } else {
                    next.row(coming).prefetch(next_dim);
                }
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
                accumulate::<S, V, V, 1, 1>(s, weights.add(j), rows, key, None, dim, outputs, padded_dim);
            }
        }
    }
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
    #[inline(always)]
    fn new(
        state: &'a RowState,
        problem: &Problem,
        k: K,
        keys: Range<usize>,
        next: (V, usize),
        scores: &'a mut [f32],
    ) -> Self {
        let (queries, padded_dim, rows) = (state.queries, state.padded_dim, state.running.len());
        Self { queries, padded_dim, rows, dim: problem.dim, k, keys, next, scores }
    }
}

impl<K: Rows, V: Rows> Kernel for BlockScores<'_, K, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { queries, padded_dim, rows, dim, k, keys, next, scores } = self;
        assert!(queries.len() >= rows * padded_dim);
        let dots = FloatDots { queries, padded_dim, dim, k };
        // SAFETY: the queries are there by the assertion; whoever made this vouches for the keys.
        unsafe { fill_scores(s, dots, rows, k, dim, keys, next, scores) }
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

impl<'a, K: Rows, V: Rows> BlockValues<'a, K, V> {
    #[inline(always)]
    fn new(
        state: &'a mut RowState,
        problem: &Problem,
        v: V,
        keys: Range<usize>,
        next: (K, usize),
        weights: &'a [f32],
        careful: bool,
    ) -> Self {
        let (rows, padded_dim, outputs) = (state.running.len(), state.padded_value_dim, &mut *state.outputs);
        Self { weights, rows, dim: problem.value_dim, v, keys, next, outputs, padded_dim, careful }
    }
}

impl<K: Rows, V: Rows> Kernel for BlockValues<'_, K, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { weights, rows: n, dim, v, keys, next, outputs, padded_dim: dp, careful } = self;
        assert!(keys.len() <= KEYS && weights.len() >= n * KEYS && outputs.len() >= n * dp);
        let mut r = 0;
        while r < n {
            let together = if careful { 1 } else { rows_together::<S>(n - r) };
            let next = (r == 0).then_some(next);
            let keys = keys.clone();
            // SAFETY: rows r.. of weights and outputs exist by the assertion; whoever made this vouches for the values.
            unsafe {
                let (w, out) = (weights.as_ptr().add(r * KEYS), outputs.as_mut_ptr().add(r * dp));
                match together {
                    1 if careful => accumulate_visible(s, w, v, keys, dim, out, dp),
                    1 => accumulate::<S, K, V, 1, 4>(s, w, v, keys, next, dim, out, dp),
                    2 => accumulate::<S, K, V, 2, 4>(s, w, v, keys, next, dim, out, dp),
                    4 if S::SUMS == 16 => accumulate::<S, K, V, 4, 4>(s, w, v, keys, next, dim, out, dp),
                    4 => accumulate::<S, K, V, 4, 2>(s, w, v, keys, next, dim, out, dp),
                    _ => accumulate::<S, K, V, 8, 2>(s, w, v, keys, next, dim, out, dp),
                }
            }
            r += together;
        }
    }
}

/// Turns a block's scores into weights: modifications, masks, online softmax; rescales what the rows accumulated before. The output
/// is whether the block counts: one whose weights are all negligible may be left out, and then the rows stay as they are.
struct BlockWeights<'a, 'b> {
    problem: &'a Problem<'a>,
    ids: &'a [RowId],
    keys: Range<usize>,
    seen: Seen<'a>,
    state: &'a mut RowState<'b>,
    scores: &'a mut [f32],
    skips: bool,
}

impl Kernel for BlockWeights<'_, '_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> bool {
        let Self { problem, ids, keys: Range { start, end }, seen, state, scores, skips } = self;
        let padded = (end - start).next_multiple_of(S::LANES);
        let visible_of = |r: usize| {
            let visible = match &seen {
                Seen::ByPosition => problem.visible(ids[r].row),
                Seen::Places(places) => places.clone(),
                Seen::Listed(list) => list.visible[r].clone(),
            };
            visible.start.clamp(start, end) - start..visible.end.clamp(start, end) - start
        };
        let biased = matches!(seen, Seen::Listed(list) if list.changes_scores());
        if biased || !problem.options.is_plain() {
            for (r, &id) in ids.iter().enumerate() {
                let row = &mut scores[r * KEYS..r * KEYS + padded];
                match seen {
                    Seen::Listed(list) => modify_listed(s, problem, id, row, list, start..end),
                    _ => modify(s, problem, id, row, start),
                }
            }
        }
        if skips {
            let mut all = true;
            for r in 0..ids.len() {
                all &= is_negligible(problem, &scores[r * KEYS..][..padded], visible_of(r), state.running[r]);
            }
            if all {
                return false;
            }
        }
        for r in 0..ids.len() {
            let row = &mut scores[r * KEYS..r * KEYS + padded];
            let (running, factor) = online_softmax(s, row, visible_of(r), state.running[r]);
            state.running[r] = running;
            if factor != 1.0 {
                scale_row(s, &mut state.outputs[r * state.padded_value_dim..][..state.padded_value_dim], factor);
            }
        }
        true
    }
}

/// What the rows see of the keys that are gone through.
#[derive(Clone, Debug)]
pub(crate) enum Seen<'a> {
    /// What causality and window leave.
    ByPosition,
    /// These, which are counted otherwise than in the problem; what options say of a key, they say of its place.
    Places(Range<usize>),
    /// What the list says; keys are counted along it, and `k` and `v` are its rows.
    Listed(&'a List<'a>),
}

/// Sees every block of scores on its way: as products, and as the weights that they become.
pub(crate) trait Watch {
    /// Scaled products of all rows with the keys from `start` on, a row's [`KEYS`] after that of the row before.
    fn products(&mut self, start: usize, keys: usize, scores: &[f32]);
    /// Their weights `e^(logit - running.max)`, likewise.
    fn weights(&mut self, start: usize, keys: usize, weights: &[f32], running: &[Running]);
}

/// Looks away.
struct Unwatched;

impl Watch for Unwatched {
    #[inline(always)]
    fn products(&mut self, _start: usize, _keys: usize, _scores: &[f32]) {}
    #[inline(always)]
    fn weights(&mut self, _start: usize, _keys: usize, _weights: &[f32], _running: &[Running]) {}
}

/// Attends from the rows of `state` to the keys `keys`, `ids[r]` being row r.
///
/// `visible` stands in for what causality and window leave each row, where keys are counted otherwise than in the problem.
/// `careful` never multiplies a value by a weight of 0, so that NaN in keys a row does not see cannot reach it; slower.
///
/// # Safety
/// `k` and `v` yield readable rows for every key of `keys`; `state` is padded as its fields say.
#[inline(always)]
pub(crate) unsafe fn attend<S: Simd, K: Rows, V: Rows>(
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
    let seen = visible.map_or(Seen::ByPosition, Seen::Places);
    // SAFETY: the caller's promise.
    unsafe { attend_seen(s, problem, ids, k, v, keys, seen, state, scores, careful) }
}

/// [`attend`] to what `seen` says.
///
/// # Safety
/// As [`attend`].
#[inline(always)]
pub(crate) unsafe fn attend_seen<S: Simd, K: Rows, V: Rows>(
    s: S,
    problem: &Problem,
    ids: &[RowId],
    k: K,
    v: V,
    keys: Range<usize>,
    seen: Seen,
    state: &mut RowState,
    scores: &mut [f32],
    careful: bool,
) {
    // SAFETY: the caller's promise.
    unsafe { attend_watched(s, problem, ids, k, v, keys, seen, state, scores, careful, &mut Unwatched) }
}

/// [`attend_seen`], every block of which is shown to `watch`.
///
/// # Safety
/// As [`attend`].
#[inline(always)]
pub(crate) unsafe fn attend_watched<S: Simd, K: Rows, V: Rows, W: Watch>(
    s: S,
    problem: &Problem,
    ids: &[RowId],
    k: K,
    v: V,
    keys: Range<usize>,
    seen: Seen,
    state: &mut RowState,
    scores: &mut [f32],
    careful: bool,
    watch: &mut W,
) {
    let n = ids.len();
    assert!(n == state.running.len());
    if let Seen::Listed(list) = &seen {
        assert!(list.visible.len() == n && list.bias.is_none_or(|bias| bias.len() >= keys.end));
    }
    let skips = problem.options.skip_threshold > 0.0 && !careful;
    let bits = <K::Bare as BareRows>::BITS;
    let dot_bytes = S::DOT_BYTES && problem.dim <= widest(bits);
    let byte_queries = k.bare().map(|_| {
        let (queries, padded_dim, dim) = (state.queries, state.padded_dim, problem.dim);
        s.call(RoundQueries { queries, padded_dim, rows: n, dim, bits, bytes: dot_bytes })
    });
    let pairs = S::DOT2_BF16 && K::BF16 && problem.q.dtype() == DType::BF16;
    let pair_queries = pairs.then(|| PairQueries::new(problem, ids));
    let mut byte_weights = ByteWeights::NONE;
    let mut start = keys.start;
    while start < keys.end {
        let end = (start + KEYS).min(keys.end);
        // The caller vouches for the rows of `keys`, which the parts of this kernel read.
        let keys = start..end;
        match (k.bare(), &byte_queries) {
            (Some(k), Some(queries)) => {
                let next = (v, problem.value_dim);
                if dot_bytes {
                    s.call_bytes(ByteScores { queries, rows: n, k, keys: keys.clone(), next, scores });
                } else {
                    s.call(BlockScores::new(state, problem, k, keys.clone(), next, scores));
                }
                s.call(ScaleScores { queries, rows: n, k, keys: keys.clone(), scores });
            }
            _ => {
                let next = (v, problem.value_dim);
                match &pair_queries {
                    Some(queries) => {
                        let (dim, keys) = (problem.dim, keys.clone());
                        s.call_pairs(PairScores { queries, rows: n, dim, k, keys, next, scores });
                    }
                    None => s.call(BlockScores::new(state, problem, k, keys.clone(), next, scores)),
                }
            }
        }
        watch.products(start, keys.len(), scores);
        let weights = BlockWeights { problem, ids, keys: keys.clone(), seen: seen.clone(), state, scores, skips };
        if s.call(weights) {
            watch.weights(start, keys.len(), scores, state.running);
            let next = (k, problem.dim);
            match v.bare() {
                Some(v) if !careful && S::DOT_BYTES => {
                    let (outputs, padded_dim) = (&mut *state.outputs, state.padded_value_dim);
                    let to = &mut byte_weights;
                    s.call(RoundWeights { weights: scores, rows: n, v, keys: keys.clone(), outputs, padded_dim, to });
                    let weights = &byte_weights;
                    let outputs = &mut *state.outputs;
                    s.call_bytes(ByteValues { weights, rows: n, v, keys, next, outputs, padded_dim });
                }
                Some(v) if !careful => {
                    let (outputs, padded_dim) = (&mut *state.outputs, state.padded_value_dim);
                    s.call(ScaleWeights { weights: scores, rows: n, v, keys: keys.clone(), outputs, padded_dim });
                    s.call(BlockValues::new(state, problem, v, keys, next, scores, false));
                }
                _ => s.call(BlockValues::new(state, problem, v, keys, next, scores, careful)),
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
