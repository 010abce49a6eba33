//! What the scan's estimated logits weigh: sums over chunks of candidates, shares of rows, sums by value cluster.

use super::sample::mix32;
use super::scan::TILE;
use super::select::Weights;
use crate::dense::scores::exp_difference;
use crate::index::clusters::MAX_CLUSTERS;
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
        let max = steady.max(candidates);
        let log_total = max + (exp_difference(steady, max) + exp_difference(candidates, max)).ln();
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
        let mass = f64::from(exp_difference(bulk.max, log_total)) * bulk.mass;
        Self { log_total, steady_share: exp_difference(steady, log_total), mass, unread }
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
                // Moments of the differences from one score, so that nothing cancels.
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
    /// Value clusters, 0 if the sums are not asked for.
    clusters: usize,
    weights: Weights,
    /// Sums of each [`QUAD`] of heads.
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

/// Neighbouring rows that are left out of the clusters' sums together, or drawn together, whatever the instruction set.
const BLOCK: usize = 16;

/// Blocks of a tile, as many as a word has bits.
const BLOCKS: usize = TILE / BLOCK;
const _: () = assert!(BLOCKS == u64::BITS as usize);

/// Blocks of light rows of which one, drawn at random, stands for all in the clusters' sums.
const DRAWN: usize = 4;

/// Rows that may be left out of the clusters' sums: the rows of a block count by the largest of their weights. The mass counts in full
/// whatever is left out; the sums say how it is spread over the clusters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Left {
    /// Below this a block is left out.
    negligible: f32,
    /// Below this one block of [`DRAWN`] is drawn.
    light: f32,
}

impl Left {
    pub(super) const NOTHING: Self = Self { negligible: 0.0, light: 0.0 };

    /// Of so many candidates: a thousandth of the mass is left out at most, and what is drawn puts the mean value of the rest off by
    /// less than `sqrt((DRAWN - 1) * light)` = 0.95 % of the spread of the values; half of that where it was measured.
    pub(super) fn of(candidates: usize) -> Self {
        Self { negligible: 1e-3 / candidates as f32, light: 3e-5 }
    }
}

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

    pub(super) fn finish(mut self) -> Weighed {
        let group = self.heads.len();
        let mut sums = vec![0.0; self.clusters * group];
        for ((q, heads), tables) in self.heads.chunks(QUAD).enumerate().zip(&self.sums) {
            let factors: Vec<f32> = heads.iter().map(|head| head.turn().factor).collect();
            for (c, sums) in sums.chunks_exact_mut(group).enumerate() {
                for (h, (sum, factor)) in sums[q * QUAD..].iter_mut().zip(&factors).enumerate() {
                    *sum = tables.iter().map(|table| table[c][h]).sum::<f32>() * factor;
                }
            }
        }
        self.weights.rest.iter_mut().zip(self.heads).for_each(|(rest, head)| *rest *= f64::from(head.turn().factor));
        Weighed { weights: self.weights, sums }
    }
}

/// What a head's scores become weights by: `factor * scale * score` where the scan left weights, else `e^(slope * score + shift)`.
#[derive(Clone, Copy)]
struct Turn {
    factor: f32,
    slope: f32,
    shift: f32,
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
        assert!(self.weigh.clusters == 0 || self.ids.len() >= len);
        for (scale, head) in self.scales.iter_mut().zip(heads) {
            *scale = exp_difference(*scale, head.log_total);
        }
        let sloped = heads.iter().any(|head| matches!(head.unread, Unread::Sloped { .. }));
        macro_rules! quads {
            ($work:ident $(, $more:expr)?) => {
                for first in (0..group).step_by(QUAD) {
                    match (sloped, group - first) {
                        (false, 1) => self.$work::<S, 1, false>(s, first $(, $more)?),
                        (false, 2) => self.$work::<S, 2, false>(s, first $(, $more)?),
                        (false, 3) => self.$work::<S, 3, false>(s, first $(, $more)?),
                        (false, _) => self.$work::<S, 4, false>(s, first $(, $more)?),
                        (true, 1) => self.$work::<S, 1, true>(s, first $(, $more)?),
                        (true, 2) => self.$work::<S, 2, true>(s, first $(, $more)?),
                        (true, 3) => self.$work::<S, 3, true>(s, first $(, $more)?),
                        (true, _) => self.$work::<S, 4, true>(s, first $(, $more)?),
                    }
                }
            };
        }
        quads!(weights);
        if self.weigh.clusters > 0 {
            let blocks = self.blocks(s);
            quads!(clusters, blocks);
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

/// What the scores of `H` heads are multiplied by, or become logits of weights in base 2 by.
struct Vectors<S: Simd, const H: usize> {
    slopes: [S::F32; H],
    shifts: [S::F32; H],
}

impl WeighTile<'_, '_> {
    #[inline(always)]
    fn vectors<S: Simd, const H: usize, const SLOPED: bool>(&self, s: S, first: usize) -> Vectors<S, H> {
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
        Vectors { slopes, shifts }
    }

    /// Weights of `H` heads from `first` on, but for their factors, of the rows from `j` on.
    ///
    /// # Safety
    /// j + LANES <= TILE, and the heads are of the group.
    #[inline(always)]
    unsafe fn of_rows<S: Simd, const H: usize, const SLOPED: bool>(
        &self,
        s: S,
        first: usize,
        j: usize,
        by: &Vectors<S, H>,
    ) -> [S::F32; H] {
        let mut weights = [s.zero(); H];
        for (h, weight) in weights.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            let x = unsafe { s.load(self.scores.as_ptr().add((first + h) * TILE + j)) };
            *weight = if SLOPED { s.exp2(s.fma(x, by.slopes[h], by.shifts[h])) } else { s.mul(x, by.slopes[h]) };
        }
        weights
    }

    /// Adds the mean over the group of the weights of `H` heads to the rows' weights.
    #[inline(always)]
    fn weights<S: Simd, const H: usize, const SLOPED: bool>(&mut self, s: S, first: usize) {
        let by = self.vectors::<S, H, SLOPED>(s, first);
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
                let weights = self.of_rows::<S, H, SLOPED>(s, first, j, &by);
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

    /// Blocks whose rows are added to the sums of their clusters, a bit each: all of the heavy ones, and those drawn from the others.
    #[inline(always)]
    fn blocks<S: Simd>(&self, s: S) -> [u64; 2] {
        let (negligible, light) = (s.splat(self.left.negligible), s.splat(self.left.light));
        let (mut some, mut heavy) = (0, 0);
        for b in 0..self.len / BLOCK {
            let mut largest = s.zero();
            for lane in (0..BLOCK).step_by(S::LANES) {
                // SAFETY: whole blocks lie inside the tile, and LANES divides BLOCK.
                largest = s.max(unsafe { s.load(self.weights.as_ptr().add(b * BLOCK + lane)) }, largest);
            }
            some |= u64::from(s.at_least(largest, negligible) != 0) << b;
            heavy |= u64::from(s.at_least(largest, light) != 0) << b;
        }
        // Two random bits say which block of each four stands for all.
        let (random, mut drawn) = (mix32(self.tile as u32), 0);
        for set in 0..BLOCKS / DRAWN {
            drawn |= 1 << (set * DRAWN + (random >> (2 * set)) as usize % DRAWN);
        }
        [some & heavy, some & !heavy & drawn]
    }

    /// Adds the weights of `H` heads to the sums of the rows' clusters.
    #[inline(always)]
    fn clusters<S: Simd, const H: usize, const SLOPED: bool>(&mut self, s: S, first: usize, [heavy, drawn]: [u64; 2]) {
        let by = self.vectors::<S, H, SLOPED>(s, first);
        for (mut left, times) in [(heavy, 1.0), (drawn, DRAWN as f32)] {
            let times = s.splat(times);
            while left != 0 {
                let start = left.trailing_zeros() as usize * BLOCK;
                left &= left - 1;
                for j in (0..BLOCK).step_by(S::LANES) {
                    // SAFETY: as above, and the heads are of the group.
                    let weights = unsafe { self.of_rows::<S, H, SLOPED>(s, first, start + j, &by) };
                    let mut quad = [s.zero(); QUAD];
                    for h in 0..H {
                        quad[h] = s.mul(weights[h], times);
                    }
                    self.add(s, first, start + j, quad);
                }
            }
        }
    }

    /// Adds a quad's weights of the rows from `j` on to the sums of their clusters.
    #[inline(always)]
    fn add<S: Simd>(&mut self, s: S, first: usize, j: usize, weights: [S::F32; QUAD]) {
        let mut rows = [[0f32; QUAD]; simd::MAX_LANES];
        for (t, turned) in s.turn4(weights).into_iter().enumerate() {
            // SAFETY: four vectors of LANES floats are LANES rows of a quad.
            unsafe { s.store(rows.as_mut_ptr().cast::<f32>().add(t * S::LANES), turned) };
        }
        // Kept in memory, where a row is one load: the compiler would take the turned vectors apart again.
        let rows = std::hint::black_box(&rows);
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
