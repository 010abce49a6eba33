//! Picking rows by a scan of codes: an estimated logit of every candidate, the rows of most weight, an estimate of the others.

use super::chunks::{Shared, Slots};
use super::select::{self, Budget, Weights};
pub(crate) use super::weigh::CodeError;
use super::weigh::{Bulk, HeadWeight, NEGLIGIBLE, Summarise, Weigh, WeighTile};
use crate::dense::scores::Running;
use crate::dense::scratch::with_scratch;
use crate::index::clusters::Clusters;
use crate::index::{Ask, Pick, RestMass, Select};
use crate::parallel::for_each;
use crate::simd::{Isa, dispatch};
use std::ops::Range;

/// Standard deviations of a code's error that the bound of the missed mass allows for.
const BOUND_SIGMAS: f32 = 5.5;

/// Relative error of a sum of weights.
const SUM_ROUNDING: f64 = 1e-6;

/// Candidates that one item scans, a multiple of [`TILE`].
pub(super) const CHUNK: usize = 16 * 1024;

/// Candidates whose scores are made and summed while they are in the first cache, whole blocks of any codes.
pub(super) const TILE: usize = 1024;

/// Codes that give every row a score.
pub(crate) trait RowCodes: Sync {
    /// A query group made ready for the scan.
    type Group: Sync;
    /// Rows whose codes lie together: a multiple of 16 that divides [`TILE`].
    fn block(&self) -> usize;
    /// Bytes of a block.
    fn block_bytes(&self) -> usize;
    /// Whether scores stand for logits; others only rank.
    fn estimates(&self) -> bool;
    /// Makes a group ready.
    fn group(&self, head: usize, queries: &[&[f32]]) -> Self::Group;
    /// Scores of the rows of some blocks, `[queries, stride]`.
    fn scan(&self, isa: Isa, head: usize, blocks: Range<usize>, group: &Self::Group, scores: &mut [f32], stride: usize);
    /// How the scores of one query of the group err, where they stand for logits.
    fn error(&self, head: usize, group: &Self::Group, query: usize) -> CodeError;
    /// The largest standard deviation of a score of that query, where it is known.
    fn largest_error(&self, head: usize, group: &Self::Group, query: usize) -> Option<f32>;
    /// Clusters of the values and each row's cluster, where scores stand for logits.
    fn values(&self, head: usize) -> (&Clusters, &[u8]);
}

/// Scans the candidates and selects rows; weighs the rest.
pub(crate) fn pick<C: RowCodes>(codes: &C, ask: &Ask) -> Pick {
    let Ask { head, candidates, isa, parallel, .. } = ask;
    let (head, isa, group) = (*head, *isa, ask.queries.len());
    let (block, estimates, queries) = (codes.block(), codes.estimates(), codes.group(head, ask.queries));
    let blocks = candidates.start / block..candidates.end.div_ceil(block);
    let base = blocks.start * block;
    let n = blocks.len() * block;
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
    let error = |g| if estimates { codes.error(head, &queries, g) } else { CodeError::of_noise(0.0) };
    let errors: Vec<CodeError> = (0..group).map(error).collect();
    let bulks = Slots::new(chunks);
    run(&|c| {
        let mut bulk = vec![Bulk::EMPTY; group];
        for t in tiles_of(c) {
            let range = tile_rows(t);
            // SAFETY: the tiles of chunk c are this worker's own.
            let (scores, origins) =
                unsafe { (scores.part(t * group * TILE, group * TILE), origins.part(t * group, group)) };
            codes.scan(isa, head, range.start / block..range.end / block, &queries, scores, TILE);
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
    let by_mass = matches!(ask.select, Select::TopP(_));
    let values = estimates.then(|| codes.values(head));
    let clusters = values.filter(|_| ask.rest).map_or(0, |(values, _)| values.len());
    let (means, cluster_of) = values.map_or((&[][..], &[][..]), |(values, of)| (values.means(), of));
    let parts = Slots::new(chunks);
    // Sloped weights of rows with a small share need not be small.
    let scaled = heads.iter().all(HeadWeight::is_scaled);
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
            let ids: &[u8] = if clusters > 0 { &cluster_of[range.clone()] } else { &[] };
            dispatch(isa, WeighTile { scores, origins, weights, ids, len: range.len(), negligible, weigh: &mut weigh });
        }
        parts.set(c, weigh.finish());
    });
    // SAFETY: the workers are done.
    let (scores, weights, origins) =
        unsafe { (scores.part(0, group * tiles * TILE), weights.part(0, n), origins.part(0, group * tiles)) };
    // What the scan left of a row: its weight relative to the tile's origin, or its logit.
    let score = |g: usize, row: usize| {
        let (tile, at) = ((row - base) / TILE, (row - base) % TILE);
        (scores[tile * group * TILE + g * TILE + at], origins[tile * group + g])
    };
    let mut sums = vec![0f32; group * clusters.max(1)];
    let mut totals = Weights::new(group, by_mass);
    for part in parts.into_values() {
        sums.iter_mut().zip(&part.sums).for_each(|(a, b)| *a += b);
        totals.join(&part.weights);
    }
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
        codes.scan(isa, head, blocks.clone(), &queries, &mut logits, n);
        for (j, weight) in weights[..n].iter_mut().enumerate().filter(|(_, weight)| **weight == 0.0) {
            let below = heads.iter().enumerate().map(|(g, head)| logits[g * n + j] - head.log_total);
            *weight = below.fold(f32::NEG_INFINITY, f32::max);
        }
    }
    let mut rows = select::select(weights, &totals, inside, &budget);
    rows.iter_mut().for_each(|row| *row += base as u32);

    // What is left: all weights less those of the selected rows.
    let mut pick = Pick { scored: candidates.len(), bytes: blocks.len() * codes.block_bytes(), ..Pick::default() };
    if clusters > 0 {
        pick.bytes += n;
    }
    if estimates {
        let largest: Vec<Option<f32>> = (0..group).map(|g| codes.largest_error(head, &queries, g)).collect();
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
                    let sum = &mut sums[usize::from(cluster_of[row as usize]) * group + g];
                    *sum = (*sum - weight).max(0.0);
                }
            }
            let log_mass = Running { max: head.log_total, sum: left.max(0.0) as f32 }.lse();
            let mean = if clusters > 0 { mean_value(means, &sums, g, group) } else { Vec::new() };
            rest.push(RestMass { log_mass, mean });
            // Plain exp(s), up by what a code may be wrong; with what the difference of the sums may have rounded away, and what
            // lies below the smallest float.
            let unread = (candidates.len() - rows.len()) as f64;
            let lost = SUM_ROUNDING * totals.mass[g] + unread * f64::from(f32::MIN_POSITIVE);
            if let Some(largest) = largest[g] {
                bound.push(head.log_total + (mass.max(0.0) + lost).ln() as f32 + BOUND_SIGMAS * largest);
            }
        }
        pick.rest = Some(rest);
        pick.bound = (bound.len() == group).then_some(bound);
    }
    pick.rows = rows;
    with_scratch(|scratch| (scratch.extra, scratch.values) = (memory, memory2));
    pick
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
