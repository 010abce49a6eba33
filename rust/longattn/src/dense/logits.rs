//! Logits of a tile of query rows and a block of keys, and the softmax weights they become: what the passes over queries and keys
//! without values are made of.
//!
//! ```text
//! load the rows of a tile once
//! for each block of keys:
//!     few rows:  dot products along the rows of K where they lie          (stream.rs)
//!     many rows: pack K^T, matrix micro-kernel panel by panel             (tile.rs)
//!     modify; minus infinity where a row does not see a key
//! ```

use super::bytes::{ByteProduct, ByteRows, HeadBytes, words};
use super::dots::BlockScores;
use super::micro::{multiply, multiply_by, panel};
use super::packing::PackKeys;
use super::rows::{Strided, with_rows};
use super::scores::{RowId, Running, exp_difference, modify};
use super::scratch::Buffer;
use super::stream::{self, MAX_QUERY_ROWS};
use super::tile::{self, QUERY_ROWS};
use super::{Problem, load_query, load_query_bytes};
use crate::simd::Simd;
use std::ops::Range;

/// Loaded query rows of one KV head.
pub(crate) struct LogitTile<'a> {
    problem: &'a Problem<'a>,
    ids: &'a [RowId],
    /// Scaled, `[rows, padded_dim]`, zeros beyond `dim` and beyond the last row.
    queries: &'a [f32],
    padded_dim: usize,
    few: bool,
    /// Queries and keys of bytes, which are multiplied as such, or as the floats they stand for where the CPU does not.
    bytes: Option<(Box<ByteRows>, HeadBytes<'a>)>,
}

/// Rows of one tile when `rows` are to be shared out among tiles.
pub(crate) fn tile_rows(rows: usize) -> usize {
    if rows <= MAX_QUERY_ROWS { MAX_QUERY_ROWS } else { QUERY_ROWS }
}

impl<'a> LogitTile<'a> {
    /// Loads at most [`QUERY_ROWS`] rows, all of one KV head; `buffer` keeps them.
    #[inline(always)]
    pub(crate) fn load<S: Simd>(s: S, problem: &'a Problem<'a>, ids: &'a [RowId], buffer: &'a mut Buffer) -> Self {
        assert!(!ids.is_empty() && ids.len() <= QUERY_ROWS);
        let byte_keys = problem.byte_keys;
        let few = ids.len() <= MAX_QUERY_ROWS && byte_keys.is_none();
        let n = ids.len();
        let padded_rows = if few { n } else { n.next_multiple_of(S::ROWS) };
        let as_bytes = S::DOT_BYTES && byte_keys.is_some();
        let dp = if as_bytes { words(problem.dim) } else { problem.dim }.next_multiple_of(S::LANES);
        let queries = buffer.take(padded_rows * dp);
        let bytes = match byte_keys {
            Some(all) if as_bytes => {
                Some((load_query_bytes(s, problem, all, ids, dp, queries), all.of(problem, ids[0])))
            }
            Some(all) => {
                let width = words(problem.dim);
                let mut coded = vec![0f32; n * width];
                let rows = load_query_bytes(s, problem, all, ids, width, &mut coded);
                for (r, coded) in coded.chunks_exact_mut(width).enumerate() {
                    let (to, padding) = queries[r * dp..(r + 1) * dp].split_at_mut(problem.dim);
                    rows.decode(r, coded, to);
                    padding.fill(0.0);
                }
                Some((rows, all.of(problem, ids[0])))
            }
            None => {
                for (r, &id) in ids.iter().enumerate() {
                    load_query(s, problem, id, &mut queries[r * dp..(r + 1) * dp]);
                }
                None
            }
        };
        queries[n * dp..padded_rows * dp].fill(0.0);
        Self { problem, ids, queries, padded_dim: dp, few, bytes }
    }

    /// The most keys of a block, and the distance between two rows of its logits.
    #[inline(always)]
    pub(crate) fn width(&self) -> usize {
        if self.few { stream::KEYS } else { tile::KEYS }
    }

    /// Room that [`Self::logits`] needs for its result.
    #[inline(always)]
    pub(crate) fn room<S: Simd>(&self) -> usize {
        let n = self.ids.len();
        self.width() * if self.few { n } else { n.next_multiple_of(S::ROWS) }
    }

    /// What causality and window leave row `r` of the block `keys`, counted from the block's start.
    #[inline(always)]
    pub(crate) fn visible(&self, r: usize, keys: &Range<usize>) -> Range<usize> {
        let visible = self.problem.visible(self.ids[r].row);
        visible.start.clamp(keys.start, keys.end) - keys.start..visible.end.clamp(keys.start, keys.end) - keys.start
    }

    /// The logits of the block `keys`: row r's are `scores[r * width..][..columns]`, where `columns`, a multiple of `LANES`, is
    /// returned. What a row does not see, and the columns beyond the last key, are minus infinity. `None`, and nothing written,
    /// where causality and window leave no row any of the keys.
    #[inline(always)]
    pub(crate) fn logits<S: Simd>(
        &self,
        s: S,
        keys: Range<usize>,
        packed: &mut Buffer,
        wide: &mut Buffer,
        scores: &mut [f32],
    ) -> Option<usize> {
        let Self { problem, ids, .. } = self;
        let width = self.width();
        assert!(keys.start < keys.end && keys.end <= problem.keys && keys.len() <= width);
        assert!(scores.len() >= self.room::<S>());
        if (0..ids.len()).all(|r| self.visible(r, &keys).is_empty()) {
            return None;
        }
        let columns = keys.len().next_multiple_of(if self.few { S::LANES } else { panel::<S>() });
        let (batch, kv_head) = (ids[0].batch, ids[0].head / problem.group);
        let (dim, padded_dim) = (problem.dim, self.padded_dim);
        if self.few {
            let (queries, rows) = (self.queries, ids.len());
            with_rows!(problem, batch, kv_head, |k, _v| {
                let (next, scores, keys) = ((k, dim), &mut *scores, keys.clone());
                s.call(BlockScores { queries, padded_dim, rows, dim, k, keys, next, scores });
            });
        } else {
            let to = packed.take(width * padded_dim).as_mut_ptr();
            let wide = wide.take(panel::<S>() * padded_dim).as_mut_ptr();
            match &self.bytes {
                Some((_, bytes)) if S::DOT_BYTES => {
                    let (k, dim) = (bytes.rows(), words(dim));
                    s.call(PackKeys { k, keys: keys.clone(), dim, padded_dim, wide, to });
                }
                Some((_, bytes)) => {
                    let mut decoded = vec![0f32; keys.len() * dim];
                    for (j, row) in keys.clone().zip(decoded.chunks_exact_mut(dim)) {
                        bytes.decode(j, row);
                    }
                    let k = Strided { base: decoded.as_ptr(), stride: dim as isize };
                    s.call(PackKeys { k, keys: 0..keys.len(), dim, padded_dim, wide, to });
                }
                None => with_rows!(problem, batch, kv_head, |k, _v| {
                    s.call(PackKeys { k, keys: keys.clone(), dim, padded_dim, wide, to });
                }),
            }
            self.multiply(s, &keys, packed.filled(), scores);
        }
        let plain = problem.options.is_plain();
        for (r, &id) in ids.iter().enumerate() {
            let row = &mut scores[r * width..r * width + columns];
            if let Some((rows, _)) = self.bytes.as_ref().filter(|_| !S::DOT_BYTES) {
                let constant = rows.constant(r);
                row.iter_mut().for_each(|x| *x += constant);
            }
            if !plain {
                modify(s, problem, id, row, None, keys.clone());
            }
            let visible = self.visible(r, &keys);
            row[..visible.start].fill(f32::NEG_INFINITY);
            row[visible.end..].fill(f32::NEG_INFINITY);
        }
        Some(columns)
    }

    /// Products of all rows with the packed keys, panel by panel where one of the rows sees a key.
    #[inline(always)]
    fn multiply<S: Simd>(&self, s: S, keys: &Range<usize>, packed: &[f32], scores: &mut [f32]) {
        let (dim, dp, panel, width) = (self.problem.dim, self.padded_dim, panel::<S>(), self.width());
        let columns = keys.len().next_multiple_of(panel);
        assert!(packed.len() >= columns * dp && scores.len() >= self.room::<S>());
        for first in (0..self.ids.len()).step_by(S::ROWS) {
            // Columns that some of these rows see.
            let (mut low, mut high) = (columns, 0);
            for r in first..(first + S::ROWS).min(self.ids.len()) {
                let visible = self.visible(r, keys);
                if !visible.is_empty() {
                    (low, high) = (low.min(visible.start), high.max(visible.end));
                }
            }
            for p in 0..columns / panel {
                if low < (p + 1) * panel && p * panel < high {
                    // SAFETY: queries and scores hold ROWS rows from `first` on, the panel is packed.
                    unsafe {
                        let a = self.queries.as_ptr().add(first * dp);
                        let b = packed.as_ptr().add(p * dp * panel);
                        let c = scores.as_mut_ptr().add(first * width + p * panel);
                        match &self.bytes {
                            Some((rows, of_head)) if S::DOT_BYTES => {
                                let first_key = keys.start + p * panel;
                                let product = ByteProduct { rows, keys: *of_head, first_row: first, first_key };
                                multiply_by(s, product, words(dim), a, dp, b, c, width, S::ROWS);
                            }
                            _ => multiply(s, dim, a, dp, b, c, width, false),
                        }
                    }
                }
            }
        }
    }
}

/// What turns a row's logits into weights: `factor * e^(logit - shift)`.
#[derive(Clone, Copy)]
pub(crate) struct Normaliser {
    pub(crate) shift: f32,
    pub(crate) factor: f32,
}

impl Normaliser {
    /// By the log of the denominator.
    pub(crate) fn of_lse(lse: f32) -> Self {
        Self { shift: lse, factor: 1.0 }
    }

    /// By a row's running softmax over all of its keys and the denominator that it gives.
    pub(crate) fn of_running(running: Running, total: Running) -> Self {
        Self { shift: running.max, factor: running.normalise(total) }
    }

    /// Whether every weight is 0: the row sees no key.
    #[inline(always)]
    pub(crate) fn is_empty(&self) -> bool {
        self.shift == f32::NEG_INFINITY
    }

    /// Weights of `logits` into `weights`, both a multiple of `LANES` long; returns their sum. A logit of minus infinity weighs 0
    /// in a row of NaN, too.
    #[inline(always)]
    pub(crate) fn weigh<S: Simd>(self, s: S, logits: &[f32], weights: &mut [f32]) -> f32 {
        let n = logits.len();
        assert!(n == weights.len() && n.is_multiple_of(S::LANES));
        if self.is_empty() {
            weights.fill(0.0);
            return 0.0;
        }
        if self.shift.is_nan() || self.factor.is_nan() {
            for (w, &x) in weights.iter_mut().zip(logits) {
                *w = if x == f32::NEG_INFINITY { 0.0 } else { f32::NAN };
            }
            return weights.iter().sum();
        }
        let (shift, factor) = (s.splat(self.shift), s.splat(self.factor));
        let mut sum = s.zero();
        for j in (0..n).step_by(S::LANES) {
            // SAFETY: n is a multiple of LANES.
            unsafe {
                let w = s.mul(s.exp(s.sub(s.load(logits.as_ptr().add(j)), shift)), factor);
                s.store(weights.as_mut_ptr().add(j), w);
                sum = s.add(sum, w);
            }
        }
        s.sum(sum)
    }
}

/// Running softmax over two disjoint sets of keys.
pub(crate) fn join(a: Running, b: Running) -> Running {
    let max = a.max.max(b.max);
    Running { max, sum: a.sum * exp_difference(a.max, max) + b.sum * exp_difference(b.max, max) }
}
