//! The sums of `reduce.rs` over a tile of rows and a range of keys.

use super::Problem;
use super::logits::{LogitTile, Normaliser};
use super::reduce::{MAX_MOMENTS, flat};
use super::scores::{RowId, Running, online_softmax};
use super::scratch::Scratch;
use crate::simd::{Kernel, MAX_LANES, Simd};
use std::ops::Range;

/// Rows of a head whose columns are added in f32, the sums of these in f64: equal terms round alike, so that the error of a sum
/// is that of this many at worst.
const MASS_ROWS: usize = 8;

/// What is wanted of an item.
#[derive(Clone, Copy)]
pub(super) struct Plan<'a> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) query_weights: Option<&'a [f32]>,
    pub(super) column_mass: bool,
    pub(super) column_max: bool,
    pub(super) entropy: bool,
    pub(super) row_max: bool,
    pub(super) moments: usize,
    pub(super) distance_limit: Option<f32>,
    /// `[keys]` or `[batch, keys]`, negative for none.
    pub(super) segment_ids: &'a [i32],
    pub(super) segments: usize,
}

impl Plan<'_> {
    /// Sums per row: entropy, moments, segments.
    pub(super) fn sums(&self) -> usize {
        usize::from(self.entropy) + self.moments + self.segments
    }

    /// A row's sums apart: entropy, moments, segments.
    pub(super) fn split<'s>(&self, sums: &'s [f64]) -> (&'s [f64], &'s [f64], &'s [f64]) {
        let (entropy, rest) = sums.split_at(usize::from(self.entropy));
        let (moments, segments) = rest.split_at(self.moments);
        (entropy, moments, segments)
    }
}

/// A row's largest weight so far.
#[derive(Clone, Copy)]
pub(super) struct Best {
    logit: f32,
    pub(super) weight: f32,
    pub(super) key: i64,
}

impl Best {
    pub(super) const NONE: Self = Self { logit: f32::NEG_INFINITY, weight: 0.0, key: -1 };

    /// Takes over the other, which is of later keys, where its logit is larger.
    #[inline(always)]
    pub(super) fn raise(&mut self, other: Self) {
        if other.logit > self.logit {
            *self = other;
        }
    }
}

/// What an item leaves: sums of its rows over its keys, and of its columns over its rows (`[group, keys]`).
pub(super) struct Part {
    pub(super) sums: Vec<f64>,
    pub(super) best: Vec<Best>,
    pub(super) mass: Vec<f64>,
    pub(super) column_max: Vec<f32>,
}

/// The larger weight; NaN where either is.
#[inline(always)]
pub(super) fn larger(a: f32, b: f32) -> f32 {
    if a.is_nan() || a >= b { a } else { b }
}

/// Running softmaxes of rows over a range of keys.
pub(super) struct SoftmaxItem<'a, 's> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) ids: &'a [RowId],
    pub(super) keys: Range<usize>,
    pub(super) scratch: &'s mut Scratch,
}

impl Kernel for SoftmaxItem<'_, '_> {
    type Output = Vec<Running>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<Running> {
        let Self { problem, ids, keys, scratch } = self;
        let Scratch { queries, keys: packed, scores, extra, .. } = scratch;
        let tile = LogitTile::load(s, problem, ids, queries);
        let (width, scores) = (tile.width(), scores.take(tile.room::<S>()));
        let mut running = vec![Running::EMPTY; ids.len()];
        for start in keys.clone().step_by(width) {
            let block = start..(start + width).min(keys.end);
            if let Some(columns) = tile.logits(s, block.clone(), packed, extra, scores) {
                for (r, running) in running.iter_mut().enumerate() {
                    let row = &mut scores[r * width..r * width + columns];
                    (*running, _) = online_softmax(s, row, tile.visible(r, &block), *running);
                }
            }
        }
        running
    }
}

/// Sums over rows and a range of keys.
pub(super) struct SumItem<'a, 's> {
    pub(super) plan: Plan<'a>,
    pub(super) ids: &'a [RowId],
    pub(super) normalisers: &'a [Normaliser],
    pub(super) keys: Range<usize>,
    pub(super) scratch: &'s mut Scratch,
}

impl Kernel for SumItem<'_, '_> {
    type Output = Part;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Part {
        let Self { plan, ids, normalisers, keys, scratch } = self;
        let (problem, group, stride) = (plan.problem, plan.problem.group, plan.sums());
        let Scratch { queries, keys: packed, scores, extra, outputs, values } = scratch;
        let tile = LogitTile::load(s, problem, ids, queries);
        let (width, logits) = (tile.width(), scores.take(tile.room::<S>()));
        let weights = values.take(width);
        // Sums of the block's columns, a row per head of the group.
        let block_mass = outputs.take(group * width);
        let columns_of = |wanted: bool| if wanted { group * keys.len() } else { 0 };
        let mut part = Part {
            sums: vec![0.0; ids.len() * stride],
            best: vec![Best::NONE; if plan.row_max { ids.len() } else { 0 }],
            mass: vec![0.0; columns_of(plan.column_mass)],
            column_max: vec![0.0; columns_of(plan.column_max)],
        };
        let mut runs = Vec::new();
        for start in keys.clone().step_by(width) {
            let block = start..(start + width).min(keys.end);
            let Some(columns) = tile.logits(s, block.clone(), packed, extra, logits) else {
                continue;
            };
            let (n, offset) = (block.len(), start - keys.start);
            let weights = &mut weights[..columns];
            if plan.segments > 0 {
                // [keys], or [batch, keys]
                let of_batch = if plan.segment_ids.len() > problem.keys { ids[0].batch * problem.keys } else { 0 };
                runs_of(&plan.segment_ids[of_batch + start..of_batch + block.end], &mut runs);
            }
            let together = MASS_ROWS * group;
            for first in (0..ids.len()).step_by(together) {
                block_mass.fill(0.0);
                for r in first..(first + together).min(ids.len()) {
                    let id = ids[r];
                    let normaliser = normalisers[r];
                    if normaliser.is_empty() || tile.visible(r, &block).is_empty() {
                        continue;
                    }
                    let logits = &logits[r * width..r * width + columns];
                    let total = normaliser.weigh(s, logits, weights);
                    let g = id.head % group;
                    if plan.row_max {
                        let best = &mut part.best[r];
                        best.raise(best_of(s, logits, weights, total, best.logit, start));
                    }
                    if plan.column_mass {
                        let w = plan.query_weights.map_or(1.0, |w| w[flat(problem, id)]);
                        add_scaled(s, w, weights, &mut block_mass[g * width..g * width + columns]);
                    }
                    if plan.column_max {
                        let to = g * keys.len() + offset;
                        part.column_max[to..to + n].iter_mut().zip(&*weights).for_each(|(to, &w)| *to = larger(*to, w));
                    }
                    let sums = &mut part.sums[r * stride..(r + 1) * stride];
                    let (entropies, sums) = sums.split_at_mut(usize::from(plan.entropy));
                    let (moments, segments) = sums.split_at_mut(plan.moments);
                    if let [sum] = entropies {
                        *sum += f64::from(entropy(s, normaliser, logits, weights, total));
                    }
                    if !moments.is_empty() {
                        let base = (problem.position(id.row) - start as isize) as f32;
                        add_moments(s, base, plan.distance_limit, weights, moments);
                    }
                    for &(first, end, segment) in &runs {
                        segments[segment] += f64::from(sum(s, &weights[first..end]));
                    }
                }
                if plan.column_mass {
                    for g in 0..group {
                        let to = &mut part.mass[g * keys.len() + offset..][..n];
                        to.iter_mut().zip(&block_mass[g * width..]).for_each(|(to, &x)| *to += f64::from(x));
                    }
                }
            }
        }
        part
    }
}

/// Ranges of equal segment in a block of keys, which have one; places count from the block's start.
fn runs_of(ids: &[i32], runs: &mut Vec<(usize, usize, usize)>) {
    runs.clear();
    let mut start = 0;
    for run in ids.chunk_by(|a, b| a == b) {
        if let Ok(segment) = usize::try_from(run[0]) {
            runs.push((start, start + run.len(), segment));
        }
        start += run.len();
    }
}

/// The largest logit of a block that starts at key `start`, if it beats `old`; in a row of NaN the first of them.
#[inline(always)]
fn best_of<S: Simd>(s: S, logits: &[f32], weights: &[f32], total: f32, old: f32, start: usize) -> Best {
    let (key, logit) = if total.is_nan() {
        (weights.iter().position(|w| w.is_nan()), f32::INFINITY)
    } else {
        let mut largest = s.splat(f32::NEG_INFINITY);
        for chunk in logits.chunks_exact(S::LANES) {
            // SAFETY: the chunk has LANES floats.
            largest = s.max(unsafe { s.load(chunk.as_ptr()) }, largest);
        }
        let max = s.max_lane(largest);
        (if max > old { logits.iter().position(|&x| x == max) } else { None }, max)
    };
    key.map_or(Best::NONE, |j| Best { logit, weight: weights[j], key: (start + j) as i64 })
}

/// `to += w * weights`; both are a multiple of `LANES` long.
#[inline(always)]
fn add_scaled<S: Simd>(s: S, w: f32, weights: &[f32], to: &mut [f32]) {
    let w = s.splat(w);
    for (to, from) in to.chunks_exact_mut(S::LANES).zip(weights.chunks_exact(S::LANES)) {
        // SAFETY: both chunks have LANES floats.
        unsafe { s.store(to.as_mut_ptr(), s.fma(w, s.load(from.as_ptr()), s.load(to.as_ptr()))) };
    }
}

/// `-sum w ln w`, where `w = factor e^(logit - shift)` sum to `total`.
#[inline(always)]
fn entropy<S: Simd>(s: S, normaliser: Normaliser, logits: &[f32], weights: &[f32], total: f32) -> f32 {
    if total == 0.0 {
        return 0.0;
    }
    let (shift, least) = (s.splat(normaliser.shift), s.splat(-200.0));
    let mut acc = s.zero();
    for (logits, weights) in logits.chunks_exact(S::LANES).zip(weights.chunks_exact(S::LANES)) {
        // SAFETY: both chunks have LANES floats.
        unsafe {
            // A weight of 0 may have a logit of minus infinity.
            let exponent = s.max(least, s.sub(s.load(logits.as_ptr()), shift));
            acc = s.fma(s.load(weights.as_ptr()), exponent, acc);
        }
    }
    -(s.sum(acc) + normaliser.factor.ln() * total)
}

/// Adds `sum_j w_j d_j^m` to `moments[m - 1]`, where `d_j = base - j`, clipped.
#[inline(always)]
fn add_moments<S: Simd>(s: S, base: f32, limit: Option<f32>, weights: &[f32], moments: &mut [f64]) {
    let iota: [f32; MAX_LANES] = std::array::from_fn(|i| i as f32);
    // SAFETY: iota holds MAX_LANES floats.
    let iota = unsafe { s.load(iota.as_ptr()) };
    let limit = limit.unwrap_or(f32::INFINITY);
    let (low, high) = (s.splat(-limit), s.splat(limit));
    let mut acc = [s.zero(); MAX_MOMENTS];
    for (v, chunk) in weights.chunks_exact(S::LANES).enumerate() {
        let distance = s.sub(s.splat(base - (v * S::LANES) as f32), iota);
        let distance = s.min(high, s.max(low, distance));
        // SAFETY: the chunk has LANES floats.
        let mut product = unsafe { s.load(chunk.as_ptr()) };
        for acc in acc.iter_mut().take(moments.len()) {
            product = s.mul(product, distance);
            *acc = s.add(*acc, product);
        }
    }
    for (sum, acc) in moments.iter_mut().zip(acc) {
        *sum += f64::from(s.sum(acc));
    }
}

/// Sum of a slice of any length.
#[inline(always)]
fn sum<S: Simd>(s: S, x: &[f32]) -> f32 {
    let vectors = x.chunks_exact(S::LANES);
    let rest: f32 = vectors.remainder().iter().sum();
    let mut acc = s.zero();
    for chunk in vectors {
        // SAFETY: the chunk has LANES floats.
        acc = s.add(acc, unsafe { s.load(chunk.as_ptr()) });
    }
    s.sum(acc) + rest
}
