//! Picking rows by a scan of codes: an estimated logit of every candidate, the rows of most weight, an estimate of the others.

use super::chunks::{Shared, Slots};
use super::select::{self, Budget, Weights};
use super::weigh::{Bulk, HeadWeight, Summarise, Weigh};
use crate::dense::scores::Running;
use crate::dense::scratch::with_scratch;
use crate::index::codes::{BLOCK, Scan, ScanQuery};
use crate::index::{Ask, Pick, RestMass, Select, Snapshot};
use crate::parallel::for_each;
use crate::simd::dispatch;

/// Standard deviations of a code's error that the bound of the missed mass allows for.
const BOUND_SIGMAS: f32 = 5.5;

/// Relative error of a sum of weights.
const SUM_ROUNDING: f64 = 1e-6;

/// Candidates that one item scans, a multiple of [`BLOCK`].
pub(super) const CHUNK: usize = 16 * 1024;

/// Scans the candidates and selects rows; weighs the rest.
pub(crate) fn pick(snapshot: &Snapshot, ask: &Ask) -> Pick {
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
    let scores = Shared::new(memory.take(group * chunks * CHUNK));
    let weights = Shared::new(memory2.take(chunks * CHUNK));
    let run = |work: &(dyn Fn(usize) + Sync)| match parallel {
        // A cancelled call's results are never seen.
        Some(execution) => drop(for_each(execution, chunks, work)),
        None => (0..chunks).for_each(work),
    };
    let chunk_rows = |c: usize| {
        let start = base + c * CHUNK;
        start..(start + CHUNK).min(base + n)
    };

    // Scan: scores of each chunk, [group, CHUNK] one chunk after another.
    let bulks = Slots::new(chunks);
    run(&|c| {
        let range = chunk_rows(c);
        let bytes = snapshot.format().block_bytes();
        // SAFETY: chunk c is this worker's own.
        let scores = unsafe { scores.part(c * group * CHUNK, group * CHUNK) };
        let codes = &codes.codes[range.start / BLOCK * bytes..range.end / BLOCK * bytes];
        let format = snapshot.format();
        dispatch(isa, Scan { format, codes, queries: &queries, scores, stride: CHUNK });
        let inside = candidates.start.max(range.start) - range.start..candidates.end.min(range.end) - range.start;
        let summed = dispatch(isa, Summarise { scores, group, len: range.len(), inside, estimates });
        bulks.set(c, summed);
    });
    let mut bulk = vec![Bulk { softmax: Running::EMPTY, sum: 0.0, squares: 0.0 }; group];
    for part in bulks.into_values() {
        for (all, part) in bulk.iter_mut().zip(part) {
            all.join(part);
        }
    }

    // Weights of the group: the mean over its heads of each row's estimated share of all mass.
    let sigma = if estimates { snapshot.stats(head).sigma } else { 0.0 };
    let heads: Vec<HeadWeight> =
        (0..group).map(|g| HeadWeight::new(&bulk[g], ask.steady[g], sigma * norms[g], candidates.len())).collect();
    let by_mass = matches!(ask.select, Select::TopP(_));
    let clusters = if ask.rest && estimates { codes.values.len() } else { 0 };
    let parts = Slots::new(chunks);
    run(&|c| {
        let range = chunk_rows(c);
        // SAFETY: chunk c is this worker's own.
        let (scores, weights) =
            unsafe { (scores.part(c * group * CHUNK, group * CHUNK), weights.part(c * CHUNK, CHUNK)) };
        let ids: &[u8] = if clusters > 0 { &codes.value_ids[range.clone()] } else { &[] };
        let work = Weigh { scores, weights, heads: &heads, len: range.len(), estimates, ids, clusters, by_mass };
        parts.set(c, dispatch(isa, work));
    });
    // SAFETY: the workers are done.
    let (scores, weights) = unsafe { (scores.part(0, group * chunks * CHUNK), weights.part(0, n)) };
    let score = |g: usize, row: usize| {
        let at = row - base;
        scores[at / CHUNK * group * CHUNK + g * CHUNK + at % CHUNK]
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
        for (j, weight) in weights[inside.clone()].iter_mut().enumerate().filter(|(_, weight)| **weight == 0.0) {
            let logits = heads.iter().enumerate().map(|(g, head)| score(g, candidates.start + j) - head.log_total);
            *weight = logits.fold(f32::NEG_INFINITY, f32::max);
        }
    }
    let mut rows = select::select(weights, &totals, inside, &budget);
    rows.iter_mut().for_each(|row| *row += base as u32);

    // What is left: all weights less those of the selected rows.
    let mut pick =
        Pick { scored: candidates.len(), bytes: n / BLOCK * snapshot.format().block_bytes(), ..Pick::default() };
    if clusters > 0 {
        pick.bytes += n;
    }
    if estimates {
        let sigma_max = snapshot.stats(head).sigma_max;
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
