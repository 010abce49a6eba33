//! Picking rows by a scan of codes: an estimated logit of every candidate, the rows of most weight, an estimate of the others.

use super::chunks::{Shared, Slots};
use super::select::{self, Budget, Weights};
use super::weigh::{Bulk, CodeError, HeadWeight, NEGLIGIBLE, Summarise, Weigh, WeighTile};
use crate::dense::scores::Running;
use crate::dense::scratch::{Buffer, with_scratch};
use crate::index::codes::{BLOCK, Scan, ScanQuery};
use crate::index::{Ask, Estimates, Pick, RestMass, Select, Snapshot};
use crate::parallel::for_each;
use crate::simd::{Isa, dispatch};
use std::ops::Range;

/// Standard deviations of a code's error that the bound of the missed mass allows for.
const BOUND_SIGMAS: f32 = 5.5;

/// Relative error of a sum of weights.
const SUM_ROUNDING: f64 = 1e-6;

/// Candidates that one item scans, a multiple of [`TILE`].
pub(super) const CHUNK: usize = 16 * 1024;

/// Candidates whose scores are made and summed while they are in the first cache, a multiple of [`BLOCK`].
pub(super) const TILE: usize = 1024;

/// The candidates of one query group with their scores and weights.
struct Scanned<'a> {
    snapshot: &'a Snapshot<'a>,
    isa: Isa,
    head: usize,
    group: usize,
    candidates: Range<usize>,
    /// First row and number of rows scanned, whole blocks.
    base: usize,
    n: usize,
    queries: Vec<ScanQuery>,
    /// What the scan left of the rows, `[group, TILE]` one tile after another.
    scores: Buffer,
    /// Origins of the tiles, `[tiles, group]`.
    origins: Vec<f32>,
    /// Mean over the group of each row's share of all mass, `[n]` and more.
    weights: Buffer,
    norms: Vec<f32>,
    heads: Vec<HeadWeight>,
    totals: Weights,
    /// `[clusters, group]`: the rows' weights by value cluster.
    sums: Vec<f32>,
    clusters: usize,
}

impl Drop for Scanned<'_> {
    fn drop(&mut self) {
        let (scores, weights) = (std::mem::take(&mut self.scores), std::mem::take(&mut self.weights));
        with_scratch(|scratch| (scratch.extra, scratch.values) = (scores, weights));
    }
}

impl Scanned<'_> {
    /// What the scan left of a row: its weight relative to the tile's origin, or its logit; and the origin.
    fn score(&self, g: usize, row: usize) -> (f32, f32) {
        let (tile, at) = ((row - self.base) / TILE, (row - self.base) % TILE);
        (self.scores.filled()[tile * self.group * TILE + g * TILE + at], self.origins[tile * self.group + g])
    }

    /// Bytes of the index that were read.
    fn bytes(&self) -> usize {
        let ids = if self.clusters > 0 { self.n } else { 0 };
        self.n / BLOCK * self.snapshot.format().block_bytes() + ids
    }
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

/// Scans the candidates and weighs them; `with_values` sums weights by value cluster.
fn scan<'a>(snapshot: &'a Snapshot<'a>, ask: &Ask, purpose: Purpose, with_values: bool) -> Scanned<'a> {
    let Ask { head, candidates, isa, parallel, .. } = ask;
    let (head, isa, group) = (*head, *isa, ask.queries.len());
    let (codes, estimates) = (snapshot.head(head), snapshot.estimates());
    let queries: Vec<ScanQuery> = ask.queries.iter().map(|query| snapshot.query(head, query)).collect();
    let norms: Vec<f32> = ask.queries.iter().map(|q| q.iter().map(|x| x * x).sum::<f32>().sqrt()).collect();
    let blocks = candidates.start / BLOCK..candidates.end.div_ceil(BLOCK);
    let base = blocks.start * BLOCK;
    let n = blocks.len() * BLOCK;
    let chunks = n.div_ceil(CHUNK);
    let mut memory = with_scratch(|scratch| std::mem::take(&mut scratch.extra));
    let mut memory2 = with_scratch(|scratch| std::mem::take(&mut scratch.values));
    let tiles = n.div_ceil(TILE);
    let scores = Shared::new(memory.take(group * tiles * TILE));
    let (weights, origins) = memory2.take(tiles * (TILE + group)).split_at_mut(tiles * TILE);
    let (weights, origins) = (Shared::new(weights), Shared::new(origins));
    let run = |work: &(dyn Fn(usize) + Sync)| match parallel {
        // A cancelled call's results are never seen.
        Some(execution) => drop(for_each(execution, chunks, work)),
        None => (0..chunks).for_each(work),
    };
    let tiles_of = |c: usize| c * (CHUNK / TILE)..((c + 1) * (CHUNK / TILE)).min(tiles);
    let tile_rows = |t: usize| base + t * TILE..(base + (t + 1) * TILE).min(base + n);

    // Scan: the scores of each tile, `[group, TILE]` one tile after another, which become weights relative to the tile's largest.
    let sigma = if estimates { snapshot.stats(head).sigma } else { 0.0 };
    let errors: Vec<CodeError> = norms.iter().map(|norm| CodeError::new(sigma * norm)).collect();
    let (format, bytes) = (snapshot.format(), snapshot.format().block_bytes());
    let bulks = Slots::new(chunks);
    run(&|c| {
        let mut bulk = vec![Bulk::EMPTY; group];
        for t in tiles_of(c) {
            let range = tile_rows(t);
            // SAFETY: the tiles of chunk c are this worker's own.
            let (scores, origins) =
                unsafe { (scores.part(t * group * TILE, group * TILE), origins.part(t * group, group)) };
            let codes = &codes.codes[range.start / BLOCK * bytes..range.end / BLOCK * bytes];
            dispatch(isa, Scan { format, codes, queries: &queries, scores, stride: TILE });
            let inside = candidates.start.max(range.start) - range.start..candidates.end.min(range.end) - range.start;
            let errors = estimates.then_some(&errors[..]);
            dispatch(isa, Summarise { scores, origins, len: range.len(), inside, errors, bulk: &mut bulk });
        }
        bulks.set(c, bulk);
    });
    let mut bulk = vec![Bulk::EMPTY; group];
    for part in bulks.into_values() {
        for (all, part) in bulk.iter_mut().zip(part) {
            all.join(part);
        }
    }

    // Weights of the group: the mean over its heads of each row's estimated share of all mass.
    let heads: Vec<HeadWeight> =
        (0..group).map(|g| HeadWeight::new(&bulk[g], ask.steady[g], errors[g], candidates.len())).collect();
    let by_mass = purpose == Purpose::Mass;
    let clusters = if with_values && estimates { codes.values.len() } else { 0 };
    let parts = Slots::new(chunks);
    // Sloped weights of rows with a small share need not be small.
    let scaled = purpose != Purpose::Sample && heads.iter().all(HeadWeight::is_scaled);
    let negligible = if scaled { NEGLIGIBLE / candidates.len() as f32 } else { 0.0 };
    run(&|c| {
        let mut weigh = Weigh::new(&heads, estimates, clusters, by_mass);
        for t in tiles_of(c) {
            let range = tile_rows(t);
            // SAFETY: the tiles of chunk c are this worker's own.
            let (scores, weights, origins) = unsafe {
                let scores = scores.part(t * group * TILE, group * TILE);
                (scores, weights.part(t * TILE, TILE), origins.part(t * group, group))
            };
            let ids: &[u8] = if clusters > 0 { &codes.value_ids[range.clone()] } else { &[] };
            dispatch(isa, WeighTile { scores, origins, weights, ids, len: range.len(), negligible, weigh: &mut weigh });
        }
        parts.set(c, weigh.finish());
    });
    let mut sums = vec![0f32; group * clusters.max(1)];
    let mut totals = Weights::new(group, by_mass);
    for part in parts.into_values() {
        sums.iter_mut().zip(&part.sums).for_each(|(a, b)| *a += b);
        totals.join(&part.weights);
    }
    // SAFETY: the workers are done.
    let origins = unsafe { origins.part(0, tiles * group) }.to_vec();
    Scanned {
        snapshot,
        isa,
        head,
        group,
        candidates: candidates.clone(),
        base,
        n,
        queries,
        scores: memory,
        origins,
        weights: memory2,
        norms,
        heads,
        totals,
        sums,
        clusters,
    }
}

/// Scans the candidates and selects rows; weighs the rest.
pub(crate) fn pick<'a>(snapshot: &'a Snapshot<'a>, ask: &Ask) -> Pick {
    let estimates = snapshot.estimates();
    let purpose = if matches!(ask.select, Select::TopP(_)) { Purpose::Mass } else { Purpose::Rows };
    let mut scanned = scan(snapshot, ask, purpose, ask.rest);
    // Selecting may rewrite weights, and the sums lose what is selected.
    let mut buffer = std::mem::take(&mut scanned.weights);
    let mut sums = std::mem::take(&mut scanned.sums);
    let Scanned { isa, group, base, n, clusters, .. } = scanned;
    let Scanned { candidates, heads, totals, norms, queries, .. } = &scanned;
    let (format, bytes) = (snapshot.format(), snapshot.format().block_bytes());
    let codes = snapshot.head(scanned.head);
    let score = |g: usize, row: usize| scanned.score(g, row);
    let weights = &mut buffer.take(n)[..n];
    let budget = match ask.select {
        Select::TopK(k) => Budget::Rows(k),
        // What the candidates must hold, beside the steady rows, for each head.
        Select::TopP(p) => {
            let wanted = |g: usize| {
                let steady = f64::from(heads[g].steady_share);
                f64::from(p) * (steady + totals.rest[g]) - steady
            };
            Budget::Mass((0..group).map(wanted).collect())
        }
    };
    let inside = candidates.start - base..candidates.end - base;
    if let Budget::Rows(k) = budget
        && estimates
        && totals.positive() < k.min(inside.len())
    {
        // Shares below the smallest float are all 0. There the logits keep the order; they stay below every share.
        let mut logits = vec![0.0; group * n];
        let codes = &codes.codes[base / BLOCK * bytes..(base + n) / BLOCK * bytes];
        dispatch(isa, Scan { format, codes, queries, scores: &mut logits, stride: n });
        for (j, weight) in weights[..n].iter_mut().enumerate().filter(|(_, weight)| **weight == 0.0) {
            let below = heads.iter().enumerate().map(|(g, head)| logits[g * n + j] - head.log_total);
            *weight = below.fold(f32::NEG_INFINITY, f32::max);
        }
    }
    let mut rows = select::select(weights, totals, inside, &budget);
    rows.iter_mut().for_each(|row| *row += base as u32);

    // What is left: all weights less those of the selected rows.
    let mut pick = Pick { scored: candidates.len(), bytes: scanned.bytes(), ..Pick::default() };
    if estimates {
        let sigma_max = snapshot.stats(scanned.head).sigma_max;
        let all = rows.len() == candidates.len();
        let (mut rest, mut bound) = (Vec::with_capacity(group), Vec::with_capacity(group));
        for (g, head) in heads.iter().enumerate() {
            if all {
                rest.push(RestMass { log_mass: f32::NEG_INFINITY, mean: Vec::new() });
                bound.push(f32::NEG_INFINITY);
                continue;
            }
            let (mut mass, mut left) = (totals.mass[g], totals.rest[g]);
            let (shares, weights) = head.weights(isa, rows.iter().map(|&row| score(g, row as usize)));
            for ((&row, share), weight) in rows.iter().zip(shares).zip(weights) {
                mass -= f64::from(share);
                left -= f64::from(weight);
                if clusters > 0 {
                    let sum = &mut sums[usize::from(codes.value_ids[row as usize]) * group + g];
                    *sum = (*sum - weight).max(0.0);
                }
            }
            let log_mass = Running { max: head.log_total, sum: left.max(0.0) as f32 }.lse();
            let mean = if clusters > 0 { mean_value(codes.values.means(), &sums, g, group) } else { Vec::new() };
            rest.push(RestMass { log_mass, mean });
            // Plain exp(s), up by what a code may be wrong; with what the difference of the sums may have rounded away, and what
            // lies below the smallest float.
            let unread = (candidates.len() - rows.len()) as f64;
            let lost = SUM_ROUNDING * totals.mass[g] + unread * f64::from(f32::MIN_POSITIVE);
            let wrong = BOUND_SIGMAS * sigma_max * norms[g];
            bound.push(head.log_total + (mass.max(0.0) + lost).ln() as f32 + wrong);
        }
        (pick.rest, pick.bound) = (Some(rest), Some(bound));
    }
    pick.rows = rows;
    scanned.weights = buffer;
    pick
}

/// Estimates of all candidates, for a sample.
pub(crate) fn weigh<'a>(snapshot: &'a Snapshot<'a>, ask: &Ask) -> Box<dyn Estimates + 'a> {
    let scanned = scan(snapshot, ask, Purpose::Sample, true);
    let means = snapshot.head(scanned.head).values.means();
    let rest = scanned.heads.iter().enumerate().map(|(g, head)| RestMass {
        log_mass: Running { max: head.log_total, sum: scanned.totals.rest[g] as f32 }.lse(),
        mean: mean_value(means, &scanned.sums, g, scanned.group),
    });
    let sigma = snapshot.stats(scanned.head).sigma;
    Box::new(Weighed {
        rest: rest.collect(),
        sigma: scanned.norms.iter().map(|norm| norm * sigma).collect(),
        log_total: scanned.heads.iter().map(|head| head.log_total).collect(),
        value_dim: ask.values.shape()[3],
        scanned,
    })
}

struct Weighed<'a> {
    scanned: Scanned<'a>,
    rest: Vec<RestMass>,
    sigma: Vec<f32>,
    log_total: Vec<f32>,
    value_dim: usize,
}

impl Estimates for Weighed<'_> {
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
        let codes = self.scanned.snapshot.head(self.scanned.head);
        &codes.values.means()[usize::from(codes.value_ids[row]) * self.value_dim..][..self.value_dim]
    }

    fn value_norm(&self) -> f32 {
        self.scanned.snapshot.head(self.scanned.head).values.norm()
    }

    fn scored(&self) -> usize {
        self.scanned.candidates.len()
    }

    fn bytes(&self) -> usize {
        self.scanned.bytes()
    }
}

/// Mean of the clusters' means, cluster c with weight `sums[c * group + g]`.
fn mean_value(means: &[f32], sums: &[f32], g: usize, group: usize) -> Vec<f32> {
    let weights = sums[g..].iter().step_by(group);
    let total: f32 = weights.clone().sum();
    let dim = means.len() * group / sums.len();
    let mut mean = vec![0.0; dim];
    if total > 0.0 {
        for (cluster, weight) in means.chunks_exact(dim).zip(weights) {
            let share = weight / total;
            mean.iter_mut().zip(cluster).for_each(|(x, m)| *x += share * m);
        }
    }
    mean
}
