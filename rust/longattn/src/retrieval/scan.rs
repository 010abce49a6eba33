//! Picking rows by a scan of codes, or of keys: a logit of every candidate, the rows of most weight, an estimate of the others.

use super::chunks::{Shared, Slots};
use super::cluster_sums::Left;
use super::once;
use super::select::{self, Budget, Weights};
pub(crate) use super::weigh::CodeError;
use super::weigh::{Bulk, HeadWeight, Summarise, Weigh, WeighTile};
use crate::dense::scores::Running;
use crate::dense::scratch::{Buffer, with_scratch};
use crate::index::clusters::Clusters;
use crate::index::{Ask, Estimates, Pick, RestMass, Seconds, Select};
use crate::parallel::for_each;
use crate::simd::{Isa, Kernel, Simd, dispatch};
use std::ops::Range;
use std::time::Instant;

/// Standard deviations of a code's error that the bound of the missed mass allows for.
const BOUND_SIGMAS: f32 = 5.5;

/// Relative error of a sum of weights.
const SUM_ROUNDING: f64 = 4e-6;

/// Candidates that one item scans, a multiple of [`TILE`].
pub(super) const CHUNK: usize = 16 * 1024;

/// Candidates whose scores are made and summed while they are in the first cache, whole blocks of any codes.
pub(super) const TILE: usize = 1024;

/// What gives candidates their scores. Candidates have places: row numbers, or places in a list of rows.
pub(crate) trait RowCodes: Sync {
    /// A query group made ready for the scan.
    type Group: Sync;
    /// Places whose codes lie together: a multiple of 16 that divides [`TILE`].
    fn block(&self) -> usize;
    /// Bytes of a block.
    fn block_bytes(&self) -> usize;
    /// Makes a group ready.
    fn group(&self, isa: Isa, head: usize, queries: &[&[f32]]) -> Self::Group;
    /// Scores of the places of some blocks, `[queries, stride]`, of the last query no more than these. What is written for places beyond
    /// the candidates does not matter. `next`: a later block that is scanned next, if not those that follow.
    #[allow(clippy::too_many_arguments, reason = "what is scanned, for whom, where to, and what comes next")]
    fn scan(
        &self,
        isa: Isa,
        head: usize,
        blocks: Range<usize>,
        group: &Self::Group,
        scores: &mut [f32],
        stride: usize,
        next: Option<usize>,
    );
    /// How the scores of one query of the group, which stand for logits, err.
    fn error(&self, head: usize, group: &Self::Group, query: usize) -> CodeError;
    /// The largest standard deviation of a score of that query, where it is known.
    fn largest_error(&self, head: usize, group: &Self::Group, query: usize) -> Option<f32>;
    /// Clusters of the values and each place's cluster, where the values of unread rows are known.
    fn values(&self, head: usize) -> Option<(&Clusters, &[u8])>;
}

/// What is done with scanned rows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// Some are selected by weight, or by mass.
    Rows,
    Mass,
    /// All are weighed, down to the least.
    Sample,
}

/// The candidates of one query group with their scores and weights.
struct Scanned<'a, C: RowCodes> {
    codes: &'a C,
    queries: C::Group,
    isa: Isa,
    head: usize,
    group: usize,
    candidates: Range<usize>,
    /// First place and number of places scanned, whole blocks.
    base: usize,
    n: usize,
    /// What the scan left of the places, `[group, TILE]` one tile after another.
    scores: Buffer,
    /// What turns weights that the scan left into shares, `[tiles, group]`.
    scales: Vec<f32>,
    /// Mean over the group of each place's share of all mass, `[n]` and more.
    weights: Buffer,
    errors: Vec<CodeError>,
    heads: Vec<HeadWeight>,
    totals: Weights,
    /// `[clusters, group]`: the places' weights by value cluster.
    sums: Vec<f32>,
    clusters: usize,
    seconds: Seconds,
}

impl<C: RowCodes> Drop for Scanned<'_, C> {
    fn drop(&mut self) {
        let (scores, weights) = (std::mem::take(&mut self.scores), std::mem::take(&mut self.weights));
        with_scratch(|scratch| (scratch.extra, scratch.values) = (scores, weights));
    }
}

impl<C: RowCodes> Scanned<'_, C> {
    /// What the scan left of a place: its weight relative to the tile's origin, or its logit; and the tile's scale.
    fn score(&self, g: usize, place: usize) -> (f32, f32) {
        let (tile, at) = ((place - self.base) / TILE, (place - self.base) % TILE);
        (self.scores.filled()[tile * self.group * TILE + g * TILE + at], self.scales[tile * self.group + g])
    }

    /// Bytes of the index that were read.
    fn bytes(&self) -> usize {
        let ids = if self.clusters > 0 { self.n } else { 0 };
        self.n / self.codes.block() * self.codes.block_bytes() + ids
    }

    fn value_clusters(&self) -> Option<(&Clusters, &[u8])> {
        self.codes.values(self.head).filter(|_| self.clusters > 0)
    }

    /// Mean value of all places by their weights for query `g`.
    fn mean_value(&self, g: usize) -> Vec<f32> {
        self.value_clusters()
            .map_or_else(Vec::new, |(values, _)| mean_value(self.isa, values, &self.sums, g, self.group))
    }
}

/// Scans the candidates and weighs them; `with_values` sums weights by value cluster.
fn scan<'a, C: RowCodes>(
    codes: &'a C,
    ask: &Ask,
    candidates: Range<usize>,
    purpose: Purpose,
    with_values: bool,
) -> Scanned<'a, C> {
    let Ask { head, isa, parallel, .. } = ask;
    let (head, isa, group) = (*head, *isa, ask.queries.len());
    let (block, queries) = (codes.block(), codes.group(isa, head, ask.queries));
    let blocks = candidates.start / block..candidates.end.div_ceil(block);
    let base = blocks.start * block;
    let n = blocks.len() * block;
    let chunks = n.div_ceil(CHUNK);
    let (mut memory, mut memory2) =
        with_scratch(|scratch| (std::mem::take(&mut scratch.extra), std::mem::take(&mut scratch.values)));
    let tiles = n.div_ceil(TILE);
    // The origins of the tiles' weights, which become their scales.
    let mut scales = vec![0f32; tiles * group];
    let scores = Shared::new(memory.take(group * tiles * TILE));
    let weights = Shared::new(memory2.take(tiles * TILE));
    let shared_scales = Shared::new(&mut scales);
    let run = |work: &(dyn Fn(usize) + Sync)| match parallel {
        // A cancelled call's results are never seen.
        Some(execution) => drop(for_each(execution, chunks, work)),
        None => (0..chunks).for_each(work),
    };
    let tiles_of = |c: usize| c * (CHUNK / TILE)..((c + 1) * (CHUNK / TILE)).min(tiles);
    let tile_places = |t: usize| base + t * TILE..(base + (t + 1) * TILE).min(base + n);

    // Scan: the scores of each tile, `[group, TILE]` one tile after another, which become weights relative to the tile's largest.
    let errors: Vec<CodeError> = (0..group).map(|g| codes.error(head, &queries, g)).collect();
    let scaled = errors.iter().all(|error| error.is_one_factor());
    let bulks = Slots::new(chunks);
    let start = Instant::now();
    run(&|c| {
        let mut bulk = vec![Bulk::EMPTY; group];
        for t in tiles_of(c) {
            let range = tile_places(t);
            // SAFETY: the tiles of chunk c are this worker's own.
            let (scores, origins) =
                unsafe { (scores.part(t * group * TILE, group * TILE), shared_scales.part(t * group, group)) };
            codes.scan(isa, head, range.start / block..range.end / block, &queries, scores, TILE, None);
            let inside = candidates.start.max(range.start) - range.start..candidates.end.min(range.end) - range.start;
            dispatch(isa, Summarise { scores, origins, len: range.len(), inside, scaled, bulk: &mut bulk });
        }
        bulks.set(c, bulk);
    });
    let scanned = Instant::now();
    let mut bulk = vec![Bulk::EMPTY; group];
    for part in bulks.into_values() {
        for (all, part) in bulk.iter_mut().zip(part) {
            all.join(part);
        }
    }

    // Weights of the group: the mean over its heads of each place's estimated share of all mass.
    let heads: Vec<HeadWeight> =
        (0..group).map(|g| HeadWeight::new(&bulk[g], ask.steady[g], errors[g], candidates.len(), scaled)).collect();
    let by_mass = purpose == Purpose::Mass;
    let values = codes.values(head).filter(|_| with_values);
    let (value_ids, clusters) = values.map_or((&[][..], 0), |(values, ids)| (ids, values.len()));
    let parts = Slots::new(chunks);
    let left = if purpose == Purpose::Sample { Left::NOTHING } else { Left::of(candidates.len()) };
    run(&|c| {
        // The last rows first: they are still in the caches.
        let c = chunks - 1 - c;
        let mut weigh = Weigh::new(&heads, clusters, by_mass);
        for t in tiles_of(c).rev() {
            let range = tile_places(t);
            // SAFETY: the tiles of chunk c are this worker's own.
            let (scores, weights, scales) = unsafe {
                let scores = scores.part(t * group * TILE, group * TILE);
                (scores, weights.part(t * TILE, TILE), shared_scales.part(t * group, group))
            };
            let ids: &[u8] = if clusters > 0 { &value_ids[range.clone()] } else { &[] };
            dispatch(
                isa,
                WeighTile { scores, scales, weights, ids, tile: t, len: range.len(), left, weigh: &mut weigh },
            );
        }
        parts.set(c, weigh.finish());
    });
    let mut sums = vec![0f32; group * clusters.max(1)];
    let mut totals = Weights::new(group, by_mass);
    for part in parts.into_values() {
        sums.iter_mut().zip(&part.sums).for_each(|(a, b)| *a += b);
        totals.join(&part.weights);
    }
    totals.mass.iter_mut().zip(&heads).for_each(|(mass, head)| *mass = head.mass);
    Scanned {
        codes,
        queries,
        isa,
        head,
        group,
        candidates,
        base,
        n,
        scores: memory,
        scales,
        weights: memory2,
        errors,
        heads,
        totals,
        sums,
        clusters,
        seconds: Seconds { scan: (scanned - start).as_secs_f32(), weigh: scanned.elapsed().as_secs_f32(), select: 0.0 },
    }
}

/// Scans the candidates and selects rows; weighs the rest.
pub(crate) fn pick<C: RowCodes>(codes: &C, ask: &Ask) -> Pick {
    pick_places(codes, ask, ask.candidates.clone())
}

/// [`pick`] among some places, which is what the rows of the result are.
pub(crate) fn pick_places<C: RowCodes>(codes: &C, ask: &Ask, candidates: Range<usize>) -> Pick {
    if let Select::TopK(rows) = ask.select
        && let Some(pick) = once::pick(codes, ask, &candidates, rows)
    {
        return pick;
    }
    pick_twice(codes, ask, candidates)
}

/// As [`pick_places`], going over the codes once and over all that they say again when their mass is known.
pub(super) fn pick_twice<C: RowCodes>(codes: &C, ask: &Ask, candidates: Range<usize>) -> Pick {
    let purpose = if matches!(ask.select, Select::TopP(_)) { Purpose::Mass } else { Purpose::Rows };
    let mut scanned = scan(codes, ask, candidates, purpose, ask.rest);
    // Selecting may rewrite weights, and the sums lose what is selected.
    let mut buffer = std::mem::take(&mut scanned.weights);
    let sums = std::mem::take(&mut scanned.sums);
    let Scanned { head, isa, group, base, n, .. } = scanned;
    let Scanned { candidates, heads, totals, queries, .. } = &scanned;
    let weights = &mut buffer.take(n)[..n];
    let budget = match ask.select {
        Select::TopK(k) => Budget::Rows(k),
        // What the candidates must hold, beside the steady rows, for each head.
        Select::TopP(p) => {
            let wanted = |g: usize| {
                let steady = f64::from(heads[g].steady_share);
                let wanted = f64::from(p) * (steady + totals.rest[g]) - steady;
                // Of a head whose query is not a number, nothing.
                if wanted.is_nan() { 0.0 } else { wanted }
            };
            Budget::Mass((0..group).map(wanted).collect())
        }
    };
    let inside = candidates.start - base..candidates.end - base;
    if let Budget::Rows(k) = budget
        && totals.positive() < k.min(inside.len())
        && weights[inside.clone()].iter().filter(|&&weight| weight > 0.0).count() < k.min(inside.len())
    {
        // Shares below the smallest float are all 0. There the logits keep the order; they stay below every share.
        let mut logits = vec![0.0; group * n];
        let block = codes.block();
        codes.scan(isa, head, base / block..(base + n) / block, queries, &mut logits, n, None);
        for (j, weight) in weights.iter_mut().enumerate().filter(|(_, weight)| **weight == 0.0) {
            let below = heads.iter().enumerate().map(|(g, head)| logits[g * n + j] - head.log_total);
            *weight = below.fold(f32::NEG_INFINITY, f32::max);
        }
    }
    let selecting = Instant::now();
    let mut rows = select::select(isa, weights, totals, inside, &budget);
    let seconds = Seconds { select: selecting.elapsed().as_secs_f32(), ..scanned.seconds };
    rows.iter_mut().for_each(|row| *row += base as u32);

    let all = Weighing { heads, mass: &totals.mass, rest: &totals.rest, sums, clusters: scanned.clusters };
    let of_rows = |g: usize| heads[g].weights(isa, rows.iter().map(|&row| scanned.score(g, row as usize)));
    let mut pick = all.without(codes, ask, queries, candidates, &rows, of_rows);
    (pick.bytes, pick.seconds) = (scanned.bytes(), seconds);
    pick.rows = rows;
    scanned.weights = buffer;
    pick
}

/// What all candidates weigh.
pub(super) struct Weighing<'a> {
    pub(super) heads: &'a [HeadWeight],
    /// Sum of the shares of each head, and of what the rows would weigh unread.
    pub(super) mass: &'a [f64],
    pub(super) rest: &'a [f64],
    /// `[clusters, group]`: weights by value cluster.
    pub(super) sums: Vec<f32>,
    pub(super) clusters: usize,
}

impl Weighing<'_> {
    /// What is left unread: all weights less those of the selected rows, of which `of_rows` tells each head's shares and weights.
    pub(super) fn without<C: RowCodes>(
        mut self,
        codes: &C,
        ask: &Ask,
        queries: &C::Group,
        candidates: &Range<usize>,
        rows: &[u32],
        of_rows: impl Fn(usize) -> (Vec<f32>, Vec<f32>),
    ) -> Pick {
        let (heads, group) = (self.heads, self.heads.len());
        let values = codes.values(ask.head).filter(|_| self.clusters > 0);
        let (mut rest, mut bound) = (Vec::with_capacity(group), Vec::with_capacity(group));
        for (g, of_head) in heads.iter().enumerate() {
            if rows.len() == candidates.len() {
                rest.push(RestMass { log_mass: f32::NEG_INFINITY, mean: Vec::new() });
                bound.push(f32::NEG_INFINITY);
                continue;
            }
            let (mut mass, mut left) = (self.mass[g], self.rest[g]);
            let (shares, weights) = of_rows(g);
            for ((&row, share), weight) in rows.iter().zip(shares).zip(weights) {
                mass -= f64::from(share);
                left -= f64::from(weight);
                if let Some((_, ids)) = values {
                    let sum = &mut self.sums[usize::from(ids[row as usize]) * group + g];
                    *sum = (*sum - weight).max(0.0);
                }
            }
            let log_mass = Running { max: of_head.log_total, sum: left.max(0.0) as f32 }.lse();
            let mean = match values {
                Some((values, _)) => mean_value(ask.isa, values, &self.sums, g, group),
                None => Vec::new(),
            };
            rest.push(RestMass { log_mass, mean });
            // Plain exp(s), up by what a code may be wrong; with what the difference of the sums may have rounded away, and what
            // lies below the smallest float.
            let unread = (candidates.len() - rows.len()) as f64;
            let lost = SUM_ROUNDING * self.mass[g] + unread * f64::from(f32::MIN_POSITIVE);
            if let Some(largest) = codes.largest_error(ask.head, queries, g) {
                bound.push(of_head.log_total + (mass.max(0.0) + lost).ln() as f32 + BOUND_SIGMAS * largest);
            }
        }
        let bound = (bound.len() == group).then_some(bound);
        Pick { scored: candidates.len(), rest: Some(rest), bound, ..Pick::default() }
    }
}

/// Mean value of all places by their weights for query `g`.
fn mean_value(isa: Isa, values: &Clusters, sums: &[f32], g: usize, group: usize) -> Vec<f32> {
    dispatch(isa, MeanValue { means: values.means(), sums, g, group })
}

/// Estimates of all candidates, for a sample: of codes whose scores stand for logits, and that know the values of unread rows.
pub(crate) fn weigh<'a, C: RowCodes>(codes: &'a C, ask: &Ask) -> Option<Box<dyn Estimates + 'a>> {
    codes.values(ask.head)?;
    let scanned = scan(codes, ask, ask.candidates.clone(), Purpose::Sample, true);
    let rest = scanned.heads.iter().enumerate().map(|(g, head)| RestMass {
        log_mass: Running { max: head.log_total, sum: scanned.totals.rest[g] as f32 }.lse(),
        mean: scanned.mean_value(g),
    });
    Some(Box::new(Weighed {
        rest: rest.collect(),
        sigma: scanned.errors.iter().map(|error| error.sigma()).collect(),
        log_total: scanned.heads.iter().map(|head| head.log_total).collect(),
        value_dim: ask.values.shape()[3],
        scanned,
    }))
}

struct Weighed<'a, C: RowCodes> {
    scanned: Scanned<'a, C>,
    rest: Vec<RestMass>,
    sigma: Vec<f32>,
    log_total: Vec<f32>,
    value_dim: usize,
}

impl<C: RowCodes> Weighed<'_, C> {
    fn values(&self) -> (&Clusters, &[u8]) {
        self.scanned.value_clusters().expect("asked for when it was made")
    }
}

impl<C: RowCodes> Estimates for Weighed<'_, C> {
    fn shares(&self) -> &[f32] {
        let Scanned { candidates, base, weights, .. } = &self.scanned;
        &weights.filled()[candidates.start - base..candidates.end - base]
    }

    fn log_total(&self) -> &[f32] {
        &self.log_total
    }

    fn weights(&self, g: usize, rows: &[u32]) -> Vec<f32> {
        let scanned = &self.scanned;
        scanned.heads[g].weights(scanned.isa, rows.iter().map(|&row| scanned.score(g, row as usize))).1
    }

    fn rest(&self) -> &[RestMass] {
        &self.rest
    }

    fn sigma(&self) -> &[f32] {
        &self.sigma
    }

    fn value(&self, row: usize) -> &[f32] {
        let (values, ids) = self.values();
        &values.means()[usize::from(ids[row]) * self.value_dim..][..self.value_dim]
    }

    fn value_norm(&self) -> f32 {
        self.values().0.norm()
    }

    fn scored(&self) -> usize {
        self.scanned.candidates.len()
    }

    fn bytes(&self) -> usize {
        self.scanned.bytes()
    }
}

/// Mean of the clusters' means for query `g`, cluster c with weight `sums[c * group + g]`.
struct MeanValue<'a> {
    means: &'a [f32],
    sums: &'a [f32],
    g: usize,
    group: usize,
}

impl Kernel for MeanValue<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let Self { means, sums, g, group } = self;
        let clusters = sums.len() / group;
        let (dim, weights) = (means.len() / clusters, sums[g..].iter().step_by(group));
        let total: f32 = weights.clone().sum();
        let mut mean = vec![0.0; dim];
        if total > 0.0 {
            let whole = dim / S::LANES * S::LANES;
            for (cluster, weight) in means.chunks_exact(dim).zip(weights) {
                let share = weight / total;
                for d in (0..whole).step_by(S::LANES) {
                    // SAFETY: d + LANES <= whole, which the mean and each cluster's have.
                    unsafe {
                        let to = mean.as_mut_ptr().add(d);
                        s.store(to, s.fma(s.load(cluster.as_ptr().add(d)), s.splat(share), s.load(to)));
                    }
                }
                for (x, m) in mean[whole..].iter_mut().zip(&cluster[whole..]) {
                    *x += share * m;
                }
            }
        }
        mean
    }
}
