//! What the scan's estimated logits weigh: sums over chunks of candidates, shares of rows, sums by value cluster.

use super::scan::TILE;
use super::select::Weights;
use crate::dense::scores::{Running, exp_difference};
use crate::index::clusters::MAX_CLUSTERS;
use crate::simd::{self, Isa, Kernel, Simd, dispatch};
use std::f32::consts::LOG2_E;
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

    /// Whether one factor corrects all weights: those of means, and where noise below half a nat hardly moves them.
    fn is_one_factor(self) -> bool {
        self.mean || self.variance < 0.25
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

    /// Shares of rows by what the scan left of them and their tile's scale: plain, and corrected for the codes' error.
    pub(super) fn weights(&self, isa: Isa, left: impl Iterator<Item = (f32, f32)> + Clone) -> (Vec<f32>, Vec<f32>) {
        match self.unread {
            Unread::Scaled { factor } => {
                let shares: Vec<f32> = left.map(|(weight, scale)| weight * scale).collect();
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
    /// Of each head.
    pub(super) errors: &'a [CodeError],
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
        for (g, (bulk, error)) in bulk.iter_mut().zip(errors).enumerate() {
            let row = &mut scores[g * TILE..g * TILE + len];
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
            // Several maxima at a time, which do not wait for each other.
            let mut largest = [s.splat(hidden); 4];
            for chunk in row.chunks(4 * S::LANES) {
                for (max, chunk) in largest.iter_mut().zip(chunk.chunks_exact(S::LANES)) {
                    // SAFETY: as above.
                    *max = s.max(unsafe { s.load(chunk.as_ptr()) }, *max);
                }
            }
            let [a, b, c, d] = largest;
            let max = s.max_lane(s.max(s.max(a, b), s.max(c, d)));
            origins[g] = max;
            let mut total = s.zero();
            let keep = error.is_one_factor();
            // e^(x - max) as a power of 2.
            let (log2_e, origin) = (s.splat(LOG2_E), s.splat(-max * LOG2_E));
            for chunk in row.chunks_exact_mut(S::LANES) {
                // SAFETY: as above.
                unsafe {
                    let weight = s.exp2(s.fma(s.load(chunk.as_ptr()), log2_e, origin));
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
    /// Value clusters, 0 if the sums are not asked for.
    clusters: usize,
    weights: Weights,
    /// Sums of each [`QUAD`] of heads, of plain shares where the heads of the quad are all scaled.
    sums: Vec<Tables>,
    /// Weights of unread rows, `[group, TILE]`, where a mass budget needs them.
    rest: Vec<f32>,
}

/// What [`Weigh`] found.
pub(super) struct Weighed {
    pub(super) weights: Weights,
    /// `[clusters, group]`.
    pub(super) sums: Vec<f32>,
}

/// Heads that are weighed together: their weights of a row are added to its cluster's as one vector of four.
const QUAD: usize = 4;

/// Sums by cluster, rows taking turns: neighbours often share a cluster, and would wait for each other's sum.
type Tables = [[[f32; QUAD]; MAX_CLUSTERS]; 4];

/// Vectors of rows whose largest weights are counted, lane by lane.
const VECTORS: usize = 16;

/// Rows whose share is below this, over the number of candidates, may be left out of the clusters' sums: a thousandth of the mass at
/// most, which counts in full and is then spread as the others.
pub(super) const NEGLIGIBLE: f32 = 1e-3;

impl<'a> Weigh<'a> {
    pub(super) fn new(heads: &'a [HeadWeight], clusters: usize, by_mass: bool) -> Self {
        let group = heads.len();
        let quads = if clusters > 0 { group.div_ceil(QUAD) } else { 0 };
        Self {
            heads,
            clusters,
            weights: Weights::new(group, by_mass),
            sums: vec![[[[0.0; QUAD]; MAX_CLUSTERS]; 4]; quads],
            rest: vec![0.0; if by_mass { group * TILE } else { 0 }],
        }
    }

    pub(super) fn finish(self) -> Weighed {
        let group = self.heads.len();
        let mut sums = vec![0.0; self.clusters * group];
        for ((q, heads), tables) in self.heads.chunks(QUAD).enumerate().zip(&self.sums) {
            let factors = factors(heads).unwrap_or([1.0; QUAD]);
            for (c, sums) in sums.chunks_exact_mut(group).enumerate() {
                for (h, sum) in sums[q * QUAD..].iter_mut().take(QUAD).enumerate() {
                    *sum = tables.iter().map(|table| table[c][h]).sum::<f32>() * factors[h];
                }
            }
        }
        Weighed { weights: self.weights, sums }
    }
}

/// What the shares of a quad's heads are multiplied by for unread rows, if that is all.
fn factors(heads: &[HeadWeight]) -> Option<[f32; QUAD]> {
    let mut factors = [1.0; QUAD];
    for (to, head) in factors.iter_mut().zip(heads) {
        let Unread::Scaled { factor } = head.unread else { return None };
        *to = factor;
    }
    Some(factors)
}

/// One tile's part of [`Weigh`].
pub(super) struct WeighTile<'a, 'b> {
    /// `[group, TILE]`, as [`Summarise`] left them.
    pub(super) scores: &'a [f32],
    /// Origins of the heads' scores; become what turns the weights that the scan left into shares.
    pub(super) scales: &'a mut [f32],
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
    fn run<S: Simd>(mut self, s: S) {
        let (heads, len) = (self.weigh.heads, self.len);
        let group = heads.len();
        assert!(len.is_multiple_of(simd::MAX_LANES) && len <= TILE && self.weights.len() >= len);
        assert!(self.scores.len() >= group * TILE && self.scales.len() == group);
        assert!(self.weigh.clusters == 0 || self.ids.len() >= len);
        for (scale, head) in self.scales.iter_mut().zip(heads) {
            *scale = exp_difference(*scale, head.log_total);
        }
        for first in (0..group).step_by(QUAD) {
            let quad = &heads[first..(first + QUAD).min(group)];
            match (quad.len(), factors(quad)) {
                (1, Some(factors)) => self.scaled::<S, 1>(s, first, factors),
                (2, Some(factors)) => self.scaled::<S, 2>(s, first, factors),
                (3, Some(factors)) => self.scaled::<S, 3>(s, first, factors),
                (_, Some(factors)) => self.scaled::<S, 4>(s, first, factors),
                (_, None) => self.mixed(s, first, quad),
            }
        }
        let Weigh { weights: totals, rest, .. } = self.weigh;
        let mut largest = [0f32; simd::MAX_LANES];
        for set in self.weights[..len].chunks(VECTORS * S::LANES) {
            let mut max = s.zero();
            for vector in set.chunks_exact(S::LANES) {
                // SAFETY: the chunk has LANES floats.
                max = s.max(unsafe { s.load(vector.as_ptr()) }, max);
            }
            // SAFETY: the array has MAX_LANES floats.
            unsafe { s.store(largest.as_mut_ptr(), max) };
            totals.count(&largest[..S::LANES]);
        }
        if totals.has_mass() {
            totals.count_mass(&self.weights[..len], rest, TILE);
        }
    }
}

impl WeighTile<'_, '_> {
    /// A quad, `H` heads from `first` on, whose weights are shares times a factor.
    #[inline(always)]
    fn scaled<S: Simd, const H: usize>(&mut self, s: S, first: usize, factors: [f32; QUAD]) {
        let part = s.splat(1.0 / self.weigh.heads.len() as f32);
        let by_mass = self.weigh.weights.has_mass();
        let mut mass = [s.zero(); H];
        let mut scales = [s.zero(); H];
        for (h, scale) in scales.iter_mut().enumerate() {
            *scale = s.splat(self.scales[first + h]);
        }
        for j in (0..self.len).step_by(S::LANES) {
            let mut shares = [s.zero(); QUAD];
            let mut mean = s.zero();
            for h in 0..H {
                // SAFETY: j + LANES <= len <= TILE, the heads are of the group.
                let x = unsafe { s.load(self.scores.as_ptr().add((first + h) * TILE + j)) };
                shares[h] = s.mul(x, scales[h]);
                mass[h] = s.add(mass[h], shares[h]);
                mean = s.fma(shares[h], part, mean);
            }
            if by_mass {
                for h in 0..H {
                    let rest = &mut self.weigh.rest[(first + h) * TILE + j..][..S::LANES];
                    // SAFETY: the slice has LANES floats.
                    unsafe { s.store(rest.as_mut_ptr(), s.mul(shares[h], s.splat(factors[h]))) };
                }
            }
            self.add(s, first, j, mean, shares);
        }
        for h in 0..H {
            let mass = f64::from(s.sum(mass[h]));
            self.weigh.weights.mass[first + h] += mass;
            self.weigh.weights.rest[first + h] += mass * f64::from(factors[h]);
        }
    }

    /// A quad with heads whose weights are no multiples of their shares.
    #[inline(always)]
    fn mixed<S: Simd>(&mut self, s: S, first: usize, heads: &[HeadWeight]) {
        let part = s.splat(1.0 / self.weigh.heads.len() as f32);
        let by_mass = self.weigh.weights.has_mass();
        let (mut mass, mut left) = ([s.zero(); QUAD], [s.zero(); QUAD]);
        for j in (0..self.len).step_by(S::LANES) {
            let mut weights = [s.zero(); QUAD];
            let mut mean = s.zero();
            for (h, head) in heads.iter().enumerate() {
                // SAFETY: j + LANES <= len <= TILE, the heads are of the group.
                let x = unsafe { s.load(self.scores.as_ptr().add((first + h) * TILE + j)) };
                let share;
                match head.unread {
                    Unread::Scaled { factor } => {
                        share = s.mul(x, s.splat(self.scales[first + h]));
                        weights[h] = s.mul(share, s.splat(factor));
                    }
                    Unread::Sloped { slope, shift } => {
                        share = s.exp2(s.fma(x, s.splat(LOG2_E), s.splat(-head.log_total * LOG2_E)));
                        weights[h] = s.exp2(s.fma(x, s.splat(slope * LOG2_E), s.splat(shift * LOG2_E)));
                    }
                }
                mass[h] = s.add(mass[h], share);
                left[h] = s.add(left[h], weights[h]);
                mean = s.fma(share, part, mean);
                if by_mass {
                    let rest = &mut self.weigh.rest[(first + h) * TILE + j..][..S::LANES];
                    // SAFETY: the slice has LANES floats.
                    unsafe { s.store(rest.as_mut_ptr(), weights[h]) };
                }
            }
            self.add(s, first, j, mean, weights);
        }
        for h in 0..heads.len() {
            self.weigh.weights.mass[first + h] += f64::from(s.sum(mass[h]));
            self.weigh.weights.rest[first + h] += f64::from(s.sum(left[h]));
        }
    }

    /// Adds to the rows from `j` on what the quad from `first` on has of them: part of their weight, and to the sums of their clusters.
    #[inline(always)]
    fn add<S: Simd>(&mut self, s: S, first: usize, j: usize, part: S::F32, weights: [S::F32; QUAD]) {
        // SAFETY: j + LANES <= len, and there are as many weights.
        unsafe {
            let to = self.weights.as_mut_ptr().add(j);
            s.store(to, if first == 0 { part } else { s.add(s.load(to), part) });
        }
        if self.weigh.clusters == 0 || s.at_least(part, s.splat(self.negligible)) == 0 {
            return;
        }
        let mut rows = [[0f32; QUAD]; simd::MAX_LANES];
        for (t, turned) in s.turn4(weights).into_iter().enumerate() {
            // SAFETY: four vectors of LANES floats are LANES rows of a quad.
            unsafe { s.store(rows.as_mut_ptr().cast::<f32>().add(t * S::LANES), turned) };
        }
        let tables = &mut self.weigh.sums[first / QUAD];
        for (q, ids) in self.ids[j..j + S::LANES].as_chunks::<4>().0.iter().enumerate() {
            for t in 0..4 {
                // Quarter q of vector t is row 4 q + t.
                let row = rows[t * (S::LANES / 4) + q];
                let sum = &mut tables[t][usize::from(ids[t])];
                for h in 0..QUAD {
                    sum[h] += row[h];
                }
            }
        }
    }
}
