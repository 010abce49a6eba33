//! What the scan's estimated logits weigh: sums over chunks of candidates, shares of rows, sums by value cluster.

use super::scan::TILE;
use super::select::Weights;
use crate::dense::scores::{Running, exp_difference};
use crate::index::clusters::MAX_CLUSTERS;
use crate::index::codes::BLOCK;
use crate::simd::{self, Isa, Kernel, Simd, dispatch};
use std::ops::Range;

/// Sums over candidates of one query head: what turns estimated logits into weights.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bulk {
    /// Running softmax of the estimated logits.
    pub(super) softmax: Running,
    pub(super) sum: f64,
    pub(super) squares: f64,
}

impl Bulk {
    pub(super) const EMPTY: Self = Self { softmax: Running::EMPTY, sum: 0.0, squares: 0.0 };

    pub(super) fn join(&mut self, other: Self) {
        let max = self.softmax.max.max(other.softmax.max);
        let sum = self.softmax.sum * exp_difference(self.softmax.max, max)
            + other.softmax.sum * exp_difference(other.softmax.max, max);
        self.softmax = Running { max, sum };
        self.sum += other.sum;
        self.squares += other.squares;
    }
}

/// How a query's estimated logits err.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodeError {
    variance: f64,
    /// Whether an estimate is the mean of the logits that it stands for, not a logit and noise.
    mean: bool,
}

impl CodeError {
    /// Estimates that are logits and noise of a standard deviation.
    pub(crate) fn of_noise(sigma: f32) -> Self {
        Self { variance: f64::from(sigma).powi(2), mean: false }
    }

    /// Estimates that are means of logits with a standard deviation.
    pub(crate) fn of_means(sigma: f32) -> Self {
        Self { variance: f64::from(sigma).powi(2), mean: true }
    }

    /// Its standard deviation.
    pub(super) fn sigma(self) -> f32 {
        self.variance.sqrt() as f32
    }

    /// Whether one factor corrects all weights: those of means, and where noise below a third of a nat hardly moves them.
    fn is_one_factor(self) -> bool {
        self.mean || self.variance < 0.11
    }
}

/// How one query head weighs candidates by their estimated logits, as shares of all its mass.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeadWeight {
    /// Log of all mass: steady rows and candidates.
    pub(super) log_total: f32,
    /// Share of the steady rows.
    pub(super) steady_share: f32,
    /// An unread row's share.
    unread: Unread,
}

/// The share of an unread row: the mean of e^logit given its estimate s, over all mass.
#[derive(Clone, Copy, Debug)]
enum Unread {
    /// `factor * e^(s - log_total)`. The scan leaves weights.
    Scaled { factor: f32 },
    /// `e^(slope * s + shift)`. The scan leaves logits.
    Sloped { slope: f32, shift: f32 },
}

impl HeadWeight {
    pub(super) fn new(bulk: &Bulk, steady: f32, error: CodeError, n: usize) -> Self {
        let candidates = bulk.softmax.lse();
        let max = steady.max(candidates);
        let log_total = max + (exp_difference(steady, max) + exp_difference(candidates, max)).ln();
        let noise = error.variance;
        let unread = if error.mean {
            // The mean of Gaussian logits' weights lies above the weight of their mean; above ln n it would stand for logits rarer
            // than one row in n.
            Unread::Scaled { factor: (noise / 2.0).min((n as f64).ln()).exp() as f32 }
        } else if error.is_one_factor() {
            Unread::Scaled { factor: (-noise / 2.0).exp() as f32 }
        } else {
            // The mean given a Gaussian prior, which rows left unread because of their low estimate do not bias.
            let mean = bulk.sum / n as f64;
            let variance = (bulk.squares / n as f64 - mean * mean).max(0.0);
            let signal = (variance - noise).max(0.05 * variance);
            let slope = signal / (signal + noise);
            // Above ln n the correction would stand for errors rarer than one row in n.
            let shift = mean * (1.0 - slope) + (slope * noise / 2.0).min((n as f64).ln());
            Unread::Sloped { slope: slope as f32, shift: shift as f32 - log_total }
        };
        Self { log_total, steady_share: exp_difference(steady, log_total), unread }
    }

    /// Whether the shares of unread rows are their plain shares times one factor.
    pub(super) fn is_scaled(&self) -> bool {
        matches!(self.unread, Unread::Scaled { .. })
    }

    /// Shares of rows by what the scan left of them: plain, and corrected for the codes' error.
    pub(super) fn weights(&self, isa: Isa, left: impl Iterator<Item = (f32, f32)> + Clone) -> (Vec<f32>, Vec<f32>) {
        match self.unread {
            Unread::Scaled { factor } => {
                let shares: Vec<f32> =
                    left.map(|(weight, origin)| weight * exp_difference(origin, self.log_total)).collect();
                let corrected = shares.iter().map(|share| share * factor).collect();
                (shares, corrected)
            }
            Unread::Sloped { slope, shift } => {
                let shares = exponentials(isa, left.clone().map(|(s, _)| s - self.log_total));
                (shares, exponentials(isa, left.map(|(s, _)| slope * s + shift)))
            }
        }
    }
}

/// `e^x` of each number.
fn exponentials(isa: Isa, numbers: impl Iterator<Item = f32>) -> Vec<f32> {
    struct Exponentials<'a>(&'a mut [f32]);
    impl Kernel for Exponentials<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for chunk in self.0.chunks_exact_mut(S::LANES) {
                // SAFETY: the chunk has LANES floats.
                unsafe { s.store(chunk.as_mut_ptr(), s.exp(s.load(chunk.as_ptr()))) };
            }
        }
    }
    let mut numbers: Vec<f32> = numbers.collect();
    let n = numbers.len();
    numbers.resize(n.next_multiple_of(simd::MAX_LANES), 0.0);
    dispatch(isa, Exponentials(&mut numbers));
    numbers.truncate(n);
    numbers
}

/// Hides the scores of a tile that are outside the candidates and sums what is inside. Where a head's error is small, the logits become
/// weights relative to the largest of the tile, its origin.
pub(super) struct Summarise<'a> {
    /// `[group, TILE]`.
    pub(super) scores: &'a mut [f32],
    /// `[group]`.
    pub(super) origins: &'a mut [f32],
    pub(super) len: usize,
    pub(super) inside: Range<usize>,
    /// Of each head; `None` for scores that are no logits.
    pub(super) errors: Option<&'a [CodeError]>,
    /// Sums of each head, added to.
    pub(super) bulk: &'a mut [Bulk],
}

impl Kernel for Summarise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { scores, origins, len, inside, errors, bulk } = self;
        let hidden = f32::NEG_INFINITY;
        assert!(len.is_multiple_of(simd::MAX_LANES) && len <= TILE && inside.end <= len);
        for (g, bulk) in bulk.iter_mut().enumerate() {
            let row = &mut scores[g * TILE..g * TILE + len];
            let Some(error) = errors.map(|errors| errors[g]) else {
                row[..inside.start].fill(hidden);
                row[inside.end..].fill(hidden);
                continue;
            };
            let mut sums = Bulk::EMPTY;
            if !error.is_one_factor() {
                // Moments of the differences from one score, so that nothing cancels.
                let origin = row[inside.start];
                row[..inside.start].fill(origin);
                row[inside.end..].fill(origin);
                let (mut sum, mut squares) = (s.zero(), s.zero());
                for chunk in row.chunks_exact(S::LANES) {
                    // SAFETY: the chunk has LANES floats.
                    let d = s.sub(unsafe { s.load(chunk.as_ptr()) }, s.splat(origin));
                    sum = s.add(sum, d);
                    squares = s.fma(d, d, squares);
                }
                let (n, o) = (inside.len() as f64, f64::from(origin));
                let (sum, squares) = (f64::from(s.sum(sum)), f64::from(s.sum(squares)));
                sums.sum = sum + n * o;
                sums.squares = squares + 2.0 * o * sum + n * o * o;
            }
            row[..inside.start].fill(hidden);
            row[inside.end..].fill(hidden);
            let mut max = s.splat(hidden);
            for chunk in row.chunks_exact(S::LANES) {
                // SAFETY: as above.
                max = s.max(unsafe { s.load(chunk.as_ptr()) }, max);
            }
            let max = s.max_lane(max);
            origins[g] = max;
            let mut total = s.zero();
            let keep = error.is_one_factor();
            for chunk in row.chunks_exact_mut(S::LANES) {
                // SAFETY: as above.
                unsafe {
                    let weight = s.exp(s.sub(s.load(chunk.as_ptr()), s.splat(max)));
                    total = s.add(total, weight);
                    if keep {
                        s.store(chunk.as_mut_ptr(), weight);
                    }
                }
            }
            sums.softmax = Running { max, sum: s.sum(total) };
            bulk.join(sums);
        }
    }
}

/// Turns scores into the group's weights, and sums the unread rows' weights by value cluster.
pub(super) struct Weigh<'a> {
    heads: &'a [HeadWeight],
    estimates: bool,
    /// Value clusters, 0 if the sums are not asked for.
    clusters: usize,
    weights: Weights,
    /// `[TABLES, MAX_CLUSTERS, group]`.
    sums: Vec<f32>,
    /// Weights of unread rows, `[group, STEP]`.
    rest: Vec<f32>,
}

/// What [`Weigh`] found.
pub(super) struct Weighed {
    pub(super) weights: Weights,
    /// `[clusters, group]`.
    pub(super) sums: Vec<f32>,
}

/// Rows that are weighed together.
const STEP: usize = 256;

/// Rows whose share is below this, over the number of candidates, may be left out of the clusters' sums: a thousandth of the mass at
/// most, which counts in full and is then spread as the others.
pub(super) const NEGLIGIBLE: f32 = 1e-3;

impl<'a> Weigh<'a> {
    pub(super) fn new(heads: &'a [HeadWeight], estimates: bool, clusters: usize, by_mass: bool) -> Self {
        let group = heads.len();
        Self {
            heads,
            estimates,
            clusters,
            weights: Weights::new(group, by_mass),
            sums: vec![0.0; if clusters > 0 { TABLES * MAX_CLUSTERS * group } else { 0 }],
            rest: vec![0.0; group * STEP],
        }
    }

    pub(super) fn finish(mut self) -> Weighed {
        let group = self.heads.len();
        if self.clusters > 0 {
            let (first, others) = self.sums.split_at_mut(MAX_CLUSTERS * group);
            for other in others.chunks_exact(MAX_CLUSTERS * group) {
                first.iter_mut().zip(other).for_each(|(a, b)| *a += b);
            }
            self.sums.truncate(self.clusters * group);
        }
        Weighed { weights: self.weights, sums: self.sums }
    }
}

/// One tile's part of [`Weigh`].
pub(super) struct WeighTile<'a, 'b> {
    /// `[group, TILE]`, as [`Summarise`] left them.
    pub(super) scores: &'a [f32],
    pub(super) origins: &'a [f32],
    /// `[TILE]`, written.
    pub(super) weights: &'a mut [f32],
    /// Value cluster of each row, empty if not asked for.
    pub(super) ids: &'a [u8],
    pub(super) len: usize,
    /// Rows whose share is below this may be left out of the clusters' sums.
    pub(super) negligible: f32,
    pub(super) weigh: &'a mut Weigh<'b>,
}

impl Kernel for WeighTile<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { scores, origins, weights, ids, len, negligible, weigh } = self;
        let Weigh { heads, estimates, clusters, weights: totals, sums, rest } = weigh;
        let group = heads.len();
        assert!(
            len.is_multiple_of(simd::MAX_LANES) && len <= TILE && weights.len() >= len && rest.len() >= group * STEP
        );
        assert!(scores.len() >= group * TILE && origins.len() >= group);
        let mean = s.splat(1.0 / group as f32);
        for start in (0..len).step_by(STEP) {
            let n = STEP.min(len - start);
            let weights = &mut weights[start..start + n];
            weights.fill(0.0);
            for (g, head) in heads.iter().enumerate() {
                let row = &scores[g * TILE + start..][..n];
                let rest = &mut rest[g * STEP..][..n];
                let (mut mass, mut left) = (s.zero(), s.zero());
                // SAFETY of the loads and stores below: j + LANES <= n, the length of row, rest and weights.
                if !*estimates {
                    // Agreeing bits.
                    for j in (0..n).step_by(S::LANES) {
                        // SAFETY: as above.
                        unsafe {
                            let weight = weights.as_mut_ptr().add(j);
                            s.store(weight, s.add(s.load(weight), s.load(row.as_ptr().add(j))));
                        }
                    }
                    continue;
                }
                match head.unread {
                    Unread::Scaled { factor } => {
                        let scale = s.splat(exp_difference(origins[g], head.log_total));
                        for j in (0..n).step_by(S::LANES) {
                            // SAFETY: as above.
                            unsafe {
                                let share = s.mul(s.load(row.as_ptr().add(j)), scale);
                                let weight = weights.as_mut_ptr().add(j);
                                mass = s.add(mass, share);
                                s.store(rest.as_mut_ptr().add(j), s.mul(share, s.splat(factor)));
                                s.store(weight, s.fma(share, mean, s.load(weight)));
                            }
                        }
                        left = s.mul(mass, s.splat(factor));
                    }
                    Unread::Sloped { slope, shift } => {
                        for j in (0..n).step_by(S::LANES) {
                            // SAFETY: as above.
                            unsafe {
                                let x = s.load(row.as_ptr().add(j));
                                let share = s.exp(s.sub(x, s.splat(head.log_total)));
                                let other = s.exp(s.fma(x, s.splat(slope), s.splat(shift)));
                                let weight = weights.as_mut_ptr().add(j);
                                mass = s.add(mass, share);
                                left = s.add(left, other);
                                s.store(rest.as_mut_ptr().add(j), other);
                                s.store(weight, s.fma(share, mean, s.load(weight)));
                            }
                        }
                    }
                }
                totals.mass[g] += f64::from(s.sum(mass));
                totals.rest[g] += f64::from(s.sum(left));
            }
            totals.count(weights, rest, STEP);
            if *clusters == 0 {
                continue;
            }
            let ids = &ids[start..start + n];
            for (b, (ids, weights)) in ids.chunks_exact(BLOCK).zip(weights.chunks_exact(BLOCK)).enumerate() {
                let mut largest = s.zero();
                for j in (0..BLOCK).step_by(S::LANES) {
                    // SAFETY: a block has BLOCK weights, a multiple of LANES.
                    largest = s.max(largest, unsafe { s.load(weights.as_ptr().add(j)) });
                }
                if s.max_lane(largest) < negligible {
                    continue;
                }
                let at = b * BLOCK;
                match group {
                    1 => add_by_cluster::<1>(ids, rest, at, sums),
                    2 => add_by_cluster::<2>(ids, rest, at, sums),
                    4 => add_by_cluster::<4>(ids, rest, at, sums),
                    8 => add_by_cluster::<8>(ids, rest, at, sums),
                    _ => {
                        for (j, &id) in ids.iter().enumerate() {
                            for (g, sum) in sums[usize::from(id) * group..][..group].iter_mut().enumerate() {
                                *sum += rest[g * STEP + at + j];
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Tables that [`add_by_cluster`] adds to in turn: neighbours often share a cluster, and would wait for each other's sum.
const TABLES: usize = 4;

/// `sums[j % TABLES][id][g] += rest[g][at + j]` for each row j of a block and its cluster, the group's size known to the compiler.
#[inline(always)]
fn add_by_cluster<const G: usize>(ids: &[u8], rest: &[f32], at: usize, sums: &mut [f32]) {
    let (sums, _) = sums.as_chunks_mut::<G>();
    let (tables, _) = sums.as_chunks_mut::<MAX_CLUSTERS>();
    let tables: &mut [[[f32; G]; MAX_CLUSTERS]; TABLES] = tables.try_into().expect("TABLES tables of MAX_CLUSTERS");
    let rows: [&[f32; BLOCK]; G] =
        std::array::from_fn(|g| rest[g * STEP + at..][..BLOCK].try_into().expect("the weights of a block"));
    let ids: &[u8; BLOCK] = ids.try_into().expect("the clusters of a block");
    for i in (0..BLOCK).step_by(TABLES) {
        // Weights of TABLES rows, head by head, and then row by row.
        let mut turned = [[0f32; G]; TABLES];
        for g in 0..G {
            for t in 0..TABLES {
                turned[t][g] = rows[g][i + t];
            }
        }
        for t in 0..TABLES {
            let sum = &mut tables[t][usize::from(ids[i + t])];
            for g in 0..G {
                sum[g] += turned[t][g];
            }
        }
    }
}
