//! What the scan's estimated logits weigh: sums over chunks of candidates, shares of rows, sums by value cluster.

use super::cluster_sums::{ClusterSums, Left, Turned, blocks, quads};
use super::scan::TILE;
use super::select::Weights;
use crate::dense::scores::exp_difference;
use crate::simd::{self, Isa, Kernel, Simd, dispatch};
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Sums over candidates of one query head: what turns estimated logits into weights.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bulk {
    /// The largest estimated logit, and the sum of all `e^(logit - max)`.
    max: f32,
    mass: f64,
    sum: f64,
    squares: f64,
}

impl Bulk {
    /// Of a sample, of whose logits there are `times` as many: its mass, `ln mass` above `max`, and its moments.
    pub(super) fn of_sample(max: f32, mass: f32, [sum, squares]: [f64; 2], times: f64) -> Self {
        Self { max, mass: f64::from(mass) * times, sum: sum * times, squares: squares * times }
    }

    /// Of a known sum of all `e^(logit - max)` and known moments.
    pub(super) fn of_all(max: f32, mass: f64, [sum, squares]: [f64; 2]) -> Self {
        Self { max, mass, sum, squares }
    }

    pub(super) const EMPTY: Self = Self { max: f32::NEG_INFINITY, mass: 0.0, sum: 0.0, squares: 0.0 };

    pub(super) fn join(&mut self, other: Self) {
        let max = self.max.max(other.max);
        self.mass = self.mass * f64::from(exp_difference(self.max, max))
            + other.mass * f64::from(exp_difference(other.max, max));
        self.max = max;
        self.sum += other.sum;
        self.squares += other.squares;
    }

    fn lse(&self) -> f32 {
        if self.mass == 0.0 { f32::NEG_INFINITY } else { self.max + self.mass.ln() as f32 }
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

    /// Whether one factor corrects all weights: those of means, and where noise below half a nat hardly moves them. Those of a query
    /// that is no number are nothing anyway.
    pub(super) fn is_one_factor(self) -> bool {
        self.mean || !(0.25..f64::INFINITY).contains(&self.variance)
    }
}

/// How one query head weighs candidates by their estimated logits, as shares of all its mass.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeadWeight {
    /// Log of all mass: steady rows and candidates.
    pub(super) log_total: f32,
    /// Share of the steady rows.
    pub(super) steady_share: f32,
    /// Share of the candidates.
    pub(super) mass: f64,
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
    /// `scaled`: the scan left weights of the whole group, of which each head's error is one factor.
    pub(super) fn new(bulk: &Bulk, steady: f32, error: CodeError, n: usize, scaled: bool) -> Self {
        let candidates = bulk.lse();
        let log_total = log_sum(steady, candidates);
        let noise = error.variance;
        let unread = if error.mean {
            // The mean of Gaussian logits' weights lies above the weight of their mean; above ln n it would stand for logits rarer
            // than one row in n.
            Unread::Scaled { factor: (noise / 2.0).min((n as f64).ln()).exp() as f32 }
        } else if scaled {
            Unread::Scaled { factor: (-noise / 2.0).exp() as f32 }
        } else {
            // The mean given a Gaussian prior, which rows left unread because of their low estimate do not bias.
            let mean = bulk.sum / n as f64;
            let variance = (bulk.squares / n as f64 - mean * mean).max(0.0);
            let signal = (variance - noise).max(0.05 * variance);
            // Above 0: the estimate of a hidden row is minus infinity.
            let slope = (signal / (signal + noise)).max(1e-6);
            // Above ln n the correction would stand for errors rarer than one row in n.
            let shift = mean * (1.0 - slope) + (slope * noise / 2.0).min((n as f64).ln());
            Unread::Sloped { slope: slope as f32, shift: shift as f32 - log_total }
        };
        Self::of(bulk, steady, log_total, unread)
    }

    fn of(bulk: &Bulk, steady: f32, log_total: f32, unread: Unread) -> Self {
        let mass = f64::from(exp_difference(bulk.max, log_total)) * bulk.mass;
        Self { log_total, steady_share: exp_difference(steady, log_total), mass, unread }
    }

    /// The same weighing with the mass that the candidates turned out to have.
    pub(super) fn settled(&self, bulk: &Bulk, steady: f32) -> Self {
        let log_total = log_sum(steady, bulk.lse());
        let unread = match self.unread {
            Unread::Sloped { slope, shift } => Unread::Sloped { slope, shift: shift + self.log_total - log_total },
            scaled @ Unread::Scaled { .. } => scaled,
        };
        Self::of(bulk, steady, log_total, unread)
    }

    /// What turns logits into weights but for a factor, and that factor.
    pub(super) fn of_logits(&self) -> Turn {
        match self.unread {
            Unread::Scaled { factor } => Turn { factor, slope: 1.0, shift: -self.log_total },
            Unread::Sloped { .. } => self.turn(),
        }
    }

    /// Shares of rows by what the scan left of them and their tile's scale: plain, and corrected for the codes' error.
    pub(super) fn weights(&self, isa: Isa, left: impl Iterator<Item = (f32, f32)> + Clone) -> (Vec<f32>, Vec<f32>) {
        match self.unread {
            Unread::Scaled { factor } => {
                let shares: Vec<f32> = left.map(|(weight, scale)| weight * scale).collect();
                let corrected = shares.iter().map(|share| share * factor).collect();
                (shares, corrected)
            }
            Unread::Sloped { .. } => self.of_rows(isa, left.map(|(logit, _)| logit)),
        }
    }

    /// Shares of rows by their logits: plain, and corrected for the codes' error.
    pub(super) fn of_rows(&self, isa: Isa, logits: impl Iterator<Item = f32> + Clone) -> (Vec<f32>, Vec<f32>) {
        let shares = exponentials(isa, logits.clone().map(|s| s - self.log_total));
        let corrected = match self.unread {
            Unread::Scaled { factor } => shares.iter().map(|share| share * factor).collect(),
            Unread::Sloped { slope, shift } => exponentials(isa, logits.map(|s| slope * s + shift)),
        };
        (shares, corrected)
    }

    /// Whether what an unread row weighs is not its share times a factor.
    pub(super) fn is_sloped(&self) -> bool {
        matches!(self.unread, Unread::Sloped { .. })
    }
}

/// `ln(e^a + e^b)`.
fn log_sum(a: f32, b: f32) -> f32 {
    let max = a.max(b);
    max + (exp_difference(a, max) + exp_difference(b, max)).ln()
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

/// Sum and sum of squares of a tile's logits that are inside; those outside are lost.
#[inline(always)]
pub(super) fn moments<S: Simd>(s: S, row: &mut [f32], inside: Range<usize>) -> [f64; 2] {
    // Of the differences from one of them, so that nothing cancels.
    let origin = row[inside.start];
    row[..inside.start].fill(origin);
    row[inside.end..].fill(origin);
    let (mut sum, mut squares) = ([s.zero(); 2], [s.zero(); 2]);
    for chunk in row.chunks(2 * S::LANES) {
        for ((sum, squares), chunk) in sum.iter_mut().zip(&mut squares).zip(chunk.chunks_exact(S::LANES)) {
            // SAFETY: the chunk has LANES floats.
            let d = s.sub(unsafe { s.load(chunk.as_ptr()) }, s.splat(origin));
            *sum = s.add(*sum, d);
            *squares = s.fma(d, d, *squares);
        }
    }
    let (n, o) = (inside.len() as f64, f64::from(origin));
    let (sum, squares) = (s.sum(s.add(sum[0], sum[1])), s.sum(s.add(squares[0], squares[1])));
    let (sum, squares) = (f64::from(sum), f64::from(squares));
    [sum + n * o, squares + 2.0 * o * sum + n * o * o]
}

/// Hides the scores of a tile that are outside the candidates and sums what is inside. Where the errors are small, the logits become
/// weights relative to the largest of the tile, their origin.
pub(super) struct Summarise<'a> {
    /// `[group, TILE]`.
    pub(super) scores: &'a mut [f32],
    /// `[group]`.
    pub(super) origins: &'a mut [f32],
    pub(super) len: usize,
    pub(super) inside: Range<usize>,
    /// Whether logits become weights, see [`CodeError::is_one_factor`].
    pub(super) scaled: bool,
    /// Sums of each head, added to.
    pub(super) bulk: &'a mut [Bulk],
}

impl Kernel for Summarise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { scores, origins, len, inside, scaled, bulk } = self;
        let hidden = f32::NEG_INFINITY;
        assert!(len.is_multiple_of(simd::MAX_LANES) && len <= TILE && inside.end <= len);
        for (g, bulk) in bulk.iter_mut().enumerate() {
            let row = &mut scores[g * TILE..g * TILE + len];
            let mut sums = Bulk::EMPTY;
            if !scaled {
                [sums.sum, sums.squares] = moments(s, row, inside.clone());
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
            // No product was a number: the query's weights are 0, so that those of its group's other queries count.
            let nothing = max == hidden;
            if nothing {
                row.fill(hidden);
            }
            let max = if nothing { 0.0 } else { max };
            let mut total = s.zero();
            // e^(x - max) as a power of 2.
            let (log2_e, origin) = (s.splat(LOG2_E), s.splat(-max * LOG2_E));
            for chunk in row.chunks_exact_mut(S::LANES) {
                // SAFETY: as above.
                unsafe {
                    let weight = s.exp2_rough(s.fma(s.load(chunk.as_ptr()), log2_e, origin));
                    total = s.add(total, weight);
                    if scaled {
                        s.store(chunk.as_mut_ptr(), weight);
                    }
                }
            }
            (sums.max, sums.mass) = (max, f64::from(s.sum(total)));
            bulk.join(sums);
        }
    }
}

/// Turns scores into the group's weights, and sums the unread rows' weights by value cluster.
pub(super) struct Weigh<'a> {
    heads: &'a [HeadWeight],
    weights: Weights,
    sums: ClusterSums,
    /// Weights of unread rows, `[group, TILE]`, where a mass budget needs them.
    rest: Vec<f32>,
}

/// What [`Weigh`] found.
pub(super) struct Weighed {
    pub(super) weights: Weights,
    /// `[clusters, group]`.
    pub(super) sums: Vec<f32>,
}

/// Vectors of rows whose largest weights are counted, lane by lane.
const VECTORS: usize = 16;

impl<'a> Weigh<'a> {
    /// `clusters`: of the values, 0 if the sums are not asked for.
    pub(super) fn new(heads: &'a [HeadWeight], clusters: usize, by_mass: bool) -> Self {
        let group = heads.len();
        Self {
            heads,
            weights: Weights::new(group, by_mass),
            sums: ClusterSums::new(clusters, group),
            rest: vec![0.0; if by_mass { group * TILE } else { 0 }],
        }
    }

    pub(super) fn finish(mut self) -> Weighed {
        let factors: Vec<f32> = self.heads.iter().map(|head| head.turn().factor).collect();
        self.weights.rest.iter_mut().zip(&factors).for_each(|(rest, &factor)| *rest *= f64::from(factor));
        Weighed { weights: self.weights, sums: self.sums.times(&factors) }
    }
}

/// What a head's scores become weights by: `factor * scale * score` where the scan left weights, else `e^(slope * score + shift)`.
#[derive(Clone, Copy)]
pub(super) struct Turn {
    pub(super) factor: f32,
    pub(super) slope: f32,
    pub(super) shift: f32,
}

impl Turn {
    /// Of a logit, but for the factor.
    pub(super) fn weight(self, logit: f32) -> f32 {
        (self.slope * logit + self.shift).exp()
    }
}

impl HeadWeight {
    #[inline(always)]
    fn turn(&self) -> Turn {
        match self.unread {
            Unread::Scaled { factor } => Turn { factor, slope: 0.0, shift: 0.0 },
            Unread::Sloped { slope, shift } => Turn { factor: 1.0, slope, shift },
        }
    }
}

/// One tile's part of [`Weigh`]. Tiles go from the last, which the scan left in the caches, to the first.
pub(super) struct WeighTile<'a, 'b> {
    /// `[group, TILE]`, as [`Summarise`] left them.
    pub(super) scores: &'a [f32],
    /// Origins of the heads' scores; become what turns the weights that the scan left into shares.
    pub(super) scales: &'a mut [f32],
    /// `[TILE]`, written.
    pub(super) weights: &'a mut [f32],
    /// Value cluster of each row, empty if not asked for.
    pub(super) ids: &'a [u8],
    /// Number of the tile, and its rows.
    pub(super) tile: usize,
    pub(super) len: usize,
    pub(super) left: Left,
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
        assert!(!self.weigh.sums.wanted() || self.ids.len() >= len);
        for (scale, head) in self.scales.iter_mut().zip(heads) {
            *scale = exp_difference(*scale, head.log_total);
        }
        let sloped = heads.iter().any(HeadWeight::is_sloped);
        quads!(group, sloped, self.weights::<S>(s));
        if self.weigh.sums.wanted() {
            let blocks = blocks(s, &self.weights[..len], self.tile, self.left);
            quads!(group, sloped, self.clusters::<S>(s, blocks));
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
    #[inline(always)]
    fn turned<S: Simd, const H: usize, const SLOPED: bool>(&self, s: S, first: usize) -> Turned<S, H, SLOPED> {
        let (mut slopes, mut shifts) = ([s.zero(); H], [s.zero(); H]);
        for h in 0..H {
            let turn = self.weigh.heads[first + h].turn();
            let mut by =
                if SLOPED { [turn.slope * LOG2_E, turn.shift * LOG2_E] } else { [self.scales[first + h], 0.0] };
            if by.iter().any(|x| x.is_nan()) {
                // Of a query that is no number nothing was left but logits of minus infinity, or weights of 0.
                by = if SLOPED { [1.0, 0.0] } else { [0.0; 2] };
            }
            (slopes[h], shifts[h]) = (s.splat(by[0]), s.splat(by[1]));
        }
        Turned { scores: self.scores[first * TILE..].as_ptr(), stride: TILE, slopes, shifts }
    }

    /// Adds the mean over the group of the weights of `H` heads to the rows' weights.
    #[inline(always)]
    fn weights<S: Simd, const H: usize, const SLOPED: bool>(&mut self, s: S, first: usize) {
        let by = self.turned::<S, H, SLOPED>(s, first);
        let group = self.weigh.heads.len();
        let part = s.splat(1.0 / group as f32);
        let by_mass = self.weigh.weights.has_mass();
        let mut sums = [s.zero(); H];
        for j in (0..self.len).step_by(S::LANES) {
            // The scores of the tile that comes next, the one before, are in an outer cache at best, in pages of their own.
            for h in 0..H {
                simd::prefetch(self.scores.as_ptr().wrapping_sub((group - first - h) * TILE).wrapping_add(j));
            }
            // SAFETY: j + LANES <= len <= TILE, which the weights have, and the heads are of the group.
            unsafe {
                let weights = by.of_rows(s, j);
                let to = self.weights.as_mut_ptr().add(j);
                let mut mean = if first == 0 { s.zero() } else { s.load(to) };
                for h in 0..H {
                    sums[h] = s.add(sums[h], weights[h]);
                    mean = s.fma(weights[h], part, mean);
                }
                s.store(to, mean);
                if by_mass {
                    for (h, &weight) in weights.iter().enumerate() {
                        let factor = s.splat(self.weigh.heads[first + h].turn().factor);
                        let rest = &mut self.weigh.rest[(first + h) * TILE + j..][..S::LANES];
                        s.store(rest.as_mut_ptr(), s.mul(weight, factor));
                    }
                }
            }
        }
        for (h, &sum) in sums.iter().enumerate() {
            self.weigh.weights.rest[first + h] += f64::from(s.sum(sum));
        }
    }

    /// Adds the weights of `H` heads to the sums of the rows' clusters.
    #[inline(always)]
    fn clusters<S: Simd, const H: usize, const SLOPED: bool>(&mut self, s: S, first: usize, blocks: [u64; 2]) {
        let by = self.turned::<S, H, SLOPED>(s, first);
        // SAFETY: the blocks are those of the tile's rows, and the heads are of the group.
        unsafe { self.weigh.sums.add(s, first, &by, self.ids, blocks) };
    }
}
