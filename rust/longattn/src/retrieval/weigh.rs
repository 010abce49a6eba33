//! What the scan's estimated logits weigh: sums over chunks of candidates, shares of rows, sums by value cluster.

use super::scan::CHUNK;
use super::select::Weights;
use crate::dense::scores::{Running, exp_difference};
use crate::index::clusters::MAX_CLUSTERS;
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
    pub(super) fn join(&mut self, other: Self) {
        let max = self.softmax.max.max(other.softmax.max);
        let sum = self.softmax.sum * exp_difference(self.softmax.max, max)
            + other.softmax.sum * exp_difference(other.softmax.max, max);
        self.softmax = Running { max, sum };
        self.sum += other.sum;
        self.squares += other.squares;
    }
}

/// How one query head weighs candidates by their estimated logits, as shares of all its mass.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeadWeight {
    /// Log of all mass: steady rows and candidates.
    pub(super) log_total: f32,
    /// Share of the steady rows.
    pub(super) steady_share: f32,
    /// An unread row's share is `exp(slope * s + shift)`: the mean of e^s given the estimate s.
    pub(super) slope: f32,
    pub(super) shift: f32,
}

impl HeadWeight {
    pub(super) fn new(bulk: &Bulk, steady: f32, sigma: f32, n: usize) -> Self {
        let candidates = bulk.softmax.lse();
        let max = steady.max(candidates);
        let log_total = max + (exp_difference(steady, max) + exp_difference(candidates, max)).ln();
        let mean = bulk.sum / n as f64;
        let variance = (bulk.squares / n as f64 - mean * mean).max(0.0);
        let noise = f64::from(sigma) * f64::from(sigma);
        // Below a third of a nat the code's error hardly moves weights: the plain correction. Above it the mean given a Gaussian
        // prior, which rows left unread because of their low estimate do not bias.
        let (slope, shift) = if noise < 0.11 {
            (1.0, -noise / 2.0)
        } else {
            let signal = (variance - noise).max(0.05 * variance);
            let slope = signal / (signal + noise);
            // Above ln n the correction would stand for errors rarer than one row in n.
            (slope, mean * (1.0 - slope) + (slope * noise / 2.0).min((n as f64).ln()))
        };
        Self {
            log_total,
            steady_share: exp_difference(steady, log_total),
            slope: slope as f32,
            shift: shift as f32 - log_total,
        }
    }

    /// Shares of rows by their estimated logits: plain, and corrected for the codes' error.
    pub(super) fn weights(&self, isa: Isa, logits: impl Iterator<Item = f32> + Clone) -> (Vec<f32>, Vec<f32>) {
        let shares = exponentials(isa, logits.clone().map(|s| s - self.log_total));
        let corrected = if self.slope == 1.0 {
            let factor = (self.shift + self.log_total).exp();
            shares.iter().map(|share| share * factor).collect()
        } else {
            exponentials(isa, logits.map(|s| self.slope * s + self.shift))
        };
        (shares, corrected)
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

/// Hides scores outside the candidates and sums what is inside.
pub(super) struct Summarise<'a> {
    /// `[group, CHUNK]`.
    pub(super) scores: &'a mut [f32],
    pub(super) group: usize,
    pub(super) len: usize,
    pub(super) inside: Range<usize>,
    pub(super) estimates: bool,
}

impl Kernel for Summarise<'_> {
    type Output = Vec<Bulk>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<Bulk> {
        let Self { scores, group, len, inside, estimates } = self;
        let hidden = f32::NEG_INFINITY;
        let mut bulks = Vec::with_capacity(group);
        for g in 0..group {
            let row = &mut scores[g * CHUNK..g * CHUNK + len];
            let mut bulk = Bulk { softmax: Running::EMPTY, sum: 0.0, squares: 0.0 };
            if estimates {
                // Moments of the differences from one score, so that nothing cancels.
                let origin = row[inside.start];
                row[..inside.start].fill(origin);
                row[inside.end..].fill(origin);
                let (mut max, mut sum, mut squares) = (s.splat(hidden), s.zero(), s.zero());
                for chunk in row.chunks_exact(S::LANES) {
                    // SAFETY: the chunk has LANES floats.
                    let x = unsafe { s.load(chunk.as_ptr()) };
                    let d = s.sub(x, s.splat(origin));
                    max = s.max(x, max);
                    sum = s.add(sum, d);
                    squares = s.fma(d, d, squares);
                }
                let max = s.max_lane(max);
                let (n, o) = (inside.len() as f64, f64::from(origin));
                let (sum, squares) = (f64::from(s.sum(sum)), f64::from(s.sum(squares)));
                bulk.sum = sum + n * o;
                bulk.squares = squares + 2.0 * o * sum + n * o * o;
                row[..inside.start].fill(hidden);
                row[inside.end..].fill(hidden);
                let mut total = s.zero();
                for chunk in row.chunks_exact(S::LANES) {
                    // SAFETY: as above.
                    total = s.add(total, s.exp(s.sub(unsafe { s.load(chunk.as_ptr()) }, s.splat(max))));
                }
                bulk.softmax = Running { max, sum: s.sum(total) };
            } else {
                row[..inside.start].fill(hidden);
                row[inside.end..].fill(hidden);
            }
            bulks.push(bulk);
        }
        bulks
    }
}

/// Turns a chunk's scores into the group's weights, and sums the unread rows' weights by value cluster.
pub(super) struct Weigh<'a> {
    /// `[group, CHUNK]`.
    pub(super) scores: &'a [f32],
    /// `[CHUNK]`.
    pub(super) weights: &'a mut [f32],
    pub(super) heads: &'a [HeadWeight],
    pub(super) len: usize,
    pub(super) estimates: bool,
    /// Value cluster of each row, empty if not asked for.
    pub(super) ids: &'a [u8],
    pub(super) clusters: usize,
    pub(super) by_mass: bool,
}

pub(super) struct Weighed {
    pub(super) weights: Weights,
    /// `[clusters, group]`.
    pub(super) sums: Vec<f32>,
}

impl Kernel for Weigh<'_> {
    type Output = Weighed;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Weighed {
        const STEP: usize = 256;
        let Self { scores, weights, heads, len, estimates, ids, clusters, by_mass } = self;
        let group = heads.len();
        let mut totals = Weights::new(group, by_mass);
        let mut sums = vec![0f32; if clusters > 0 { TABLES * MAX_CLUSTERS * group } else { 0 }];
        let mut rest = vec![0f32; group * STEP];
        let mean = s.splat(1.0 / group as f32);
        for start in (0..len).step_by(STEP) {
            let n = STEP.min(len - start);
            weights[start..start + n].fill(0.0);
            for (g, head) in heads.iter().enumerate() {
                let row = &scores[g * CHUNK + start..][..n];
                let (mut mass, mut left) = (s.zero(), s.zero());
                for j in (0..n).step_by(S::LANES) {
                    // SAFETY: n is a multiple of the block of 16 and so of LANES; rows, weights and rest hold n floats from here.
                    unsafe {
                        let x = s.load(row.as_ptr().add(j));
                        let weight = weights.as_mut_ptr().add(start + j);
                        if estimates {
                            let share = s.exp(s.sub(x, s.splat(head.log_total)));
                            let other = if head.slope == 1.0 {
                                s.mul(share, s.splat((head.shift + head.log_total).exp()))
                            } else {
                                s.exp(s.fma(x, s.splat(head.slope), s.splat(head.shift)))
                            };
                            mass = s.add(mass, share);
                            left = s.add(left, other);
                            s.store(rest.as_mut_ptr().add(g * STEP + j), other);
                            s.store(weight, s.fma(share, mean, s.load(weight)));
                        } else {
                            // Agreeing bits.
                            s.store(weight, s.add(s.load(weight), x));
                        }
                    }
                }
                totals.mass[g] += f64::from(s.sum(mass));
                totals.rest[g] += f64::from(s.sum(left));
            }
            totals.count(&weights[start..start + n], &rest, STEP);
            if clusters > 0 {
                let ids = &ids[start..start + n];
                match group {
                    1 => add_by_cluster::<1, STEP>(ids, &rest, &mut sums),
                    2 => add_by_cluster::<2, STEP>(ids, &rest, &mut sums),
                    4 => add_by_cluster::<4, STEP>(ids, &rest, &mut sums),
                    8 => add_by_cluster::<8, STEP>(ids, &rest, &mut sums),
                    _ => {
                        for (j, &id) in ids.iter().enumerate() {
                            for (g, sum) in sums[usize::from(id) * group..][..group].iter_mut().enumerate() {
                                *sum += rest[g * STEP + j];
                            }
                        }
                    }
                }
            }
        }
        if clusters > 0 {
            let (first, others) = sums.split_at_mut(MAX_CLUSTERS * group);
            for other in others.chunks_exact(MAX_CLUSTERS * group) {
                first.iter_mut().zip(other).for_each(|(a, b)| *a += b);
            }
            sums.truncate(clusters * group);
        }
        Weighed { weights: totals, sums }
    }
}

/// Tables that [`add_by_cluster`] adds to in turn: neighbours often share a cluster, and would wait for each other's sum.
const TABLES: usize = 4;

/// `sums[j % TABLES][id][g] += rest[g][j]` for each row j and its cluster, the group's size known to the compiler.
#[inline(always)]
fn add_by_cluster<const G: usize, const STEP: usize>(ids: &[u8], rest: &[f32], sums: &mut [f32]) {
    let (sums, _) = sums.as_chunks_mut::<G>();
    let (tables, _) = sums.as_chunks_mut::<MAX_CLUSTERS>();
    let tables: &mut [[[f32; G]; MAX_CLUSTERS]; TABLES] = tables.try_into().expect("TABLES tables of MAX_CLUSTERS");
    let (rest, _) = rest.as_chunks::<STEP>();
    let rest: &[[f32; STEP]; G] = rest.try_into().expect("STEP weights of each head");
    let (ids, odd) = ids.as_chunks::<TABLES>();
    assert!(odd.is_empty() && ids.len() * TABLES <= STEP);
    for (i, ids) in ids.iter().enumerate() {
        for (t, &id) in ids.iter().enumerate() {
            let sum = &mut tables[t][usize::from(id)];
            for g in 0..G {
                sum[g] += rest[g][i * TABLES + t];
            }
        }
    }
}
