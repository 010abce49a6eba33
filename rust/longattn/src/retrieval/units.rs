//! Picking whole units of keys (pages, clusters) by a score of each, and weighing those that are left unread.
//!
//! ```text
//! score     one product of a vector per unit with each query of the group: each unit's bytes are read once       (dense/stream.rs)
//! rank      the mean over the group of the share of all mass that a row of the unit has
//! pick      units in this order until the budget of rows is full; of the last one, its first rows
//! rest      rows left unread have their unit's weight and their unit's mean value
//! ```
//! A unit may lie partly outside the candidates. Its share, where it is a mean, is then of its candidates alone, and so is its mean value.

use super::chunks::{Shared, Slots};
use super::select::{BINS, bin};
use crate::dense::dots::BlockScores;
use crate::dense::rows::Strided;
use crate::dense::scores::{Running, exp_difference};
use crate::dense::scratch::Buffer;
use crate::dense::stream::{KEYS, MAX_QUERY_ROWS};
use crate::dense::values::BlockValues;
use crate::index::units::{HeadUnits, Members, Table, UnitScore, padded, part_mean};
use crate::index::{Ask, Pick, RestMass, Select};
use crate::parallel::for_each;
use crate::simd::{Kernel, Simd, dispatch};
use crate::tensor::{Element, with_element};
use std::ops::Range;
use std::sync::OnceLock;

/// Units that one item goes through, whole blocks of [`KEYS`].
const CHUNK: usize = 16 * KEYS;

/// A block none of whose units has this share of a row's mass is not added to the estimate of the rest: f32 would not show it.
const NEGLIGIBLE: f32 = 1.0 / (1u64 << 40) as f32;

/// Units of one head.
pub(crate) trait Units: Sync {
    /// Units that may hold candidates.
    fn within(&self, candidates: &Range<usize>) -> Range<usize>;
    /// Of these, units that are known to hold nothing else.
    fn whole(&self, candidates: &Range<usize>) -> Range<usize>;
    /// Rows of a unit.
    fn members(&self, unit: usize) -> Members<'_>;
}

/// A unit that is not simply read or left unread as a whole.
struct Part {
    /// Counted from the first one scored.
    unit: usize,
    /// Places of its members that are candidates and, once rows were picked, unread.
    places: Range<usize>,
}

/// Picks units for a query group.
pub(crate) fn pick<U: Units>(units: &U, of: &HeadUnits, score: UnitScore, ask: &Ask) -> Pick {
    let group = ask.queries.len();
    let range = units.within(&ask.candidates);
    let n = range.len();
    let chunks = n.div_ceil(CHUNK);
    let run = |work: &(dyn Fn(usize) + Sync)| match ask.parallel {
        // A cancelled call's results are never seen.
        Some(execution) => drop(for_each(execution, chunks, work)),
        None => (0..chunks).for_each(work),
    };
    let chunk_units = |c: usize| c * CHUNK..((c + 1) * CHUNK).min(n);
    let chunk_floats =
        |c: usize| c * CHUNK * group..((c * CHUNK + chunk_units(c).len().next_multiple_of(KEYS)) * group);

    // How many candidates each unit has.
    let (mut counts, mut parts) = (vec![0u32; n], Vec::new());
    let whole = units.whole(&ask.candidates);
    for (i, count) in counts.iter_mut().enumerate() {
        let members = units.members(range.start + i);
        *count = members.len() as u32;
        if !whole.contains(&(range.start + i)) {
            let places = members.inside(&ask.candidates);
            if places.len() < members.len() {
                *count = places.len() as u32;
                if !places.is_empty() {
                    parts.push(Part { unit: i, places });
                }
            }
        }
    }

    // Scores, blocks of [group, KEYS].
    let mut queries = Buffer::default();
    let width = of.vectors.width();
    let long = queries.take(group * width);
    for (to, q) in long.chunks_exact_mut(width).zip(ask.queries) {
        score.query(q, to);
    }
    let queries = queries.filled();
    let blocks = n.div_ceil(KEYS);
    let mut memory = vec![0f32; blocks * KEYS * group];
    let scores = Shared::new(&mut memory);
    run(&|c| {
        let (units, floats) = (chunk_units(c), chunk_floats(c));
        // SAFETY: chunk c is this worker's own.
        let scores = unsafe { scores.part(floats.start, floats.len()) };
        let units = range.start + units.start..range.start + units.end;
        with_element!(of.vectors.dtype(), T => {
            dispatch(ask.isa, Scan { queries, group, width, vectors: of.vectors.rows::<T>(), units, scores });
        });
    });
    // SAFETY: the workers are done.
    let all = unsafe { scores.part(0, blocks * KEYS * group) };
    let at = |g: usize, i: usize| (i / KEYS * group + g) * KEYS + i % KEYS;
    if score.estimates() {
        for part in &parts {
            let members = units.members(range.start + part.unit);
            let stored = of.vectors.row(range.start + part.unit);
            let mean = part_mean(ask.keys, ask.head, &members, part.places.clone(), &stored);
            for (g, q) in ask.queries.iter().enumerate() {
                let change = q.iter().zip(mean.iter().zip(&stored)).map(|(q, (new, old))| q * (new - old));
                all[at(g, part.unit)] += change.sum::<f32>();
            }
        }
    }

    // Mass of the candidates, and each unit's share by row.
    let logs: Vec<f32> =
        counts.iter().map(|&n| log(n)).chain(std::iter::repeat_n(f32::NEG_INFINITY, blocks * KEYS - n)).collect();
    let masses = Slots::new(chunks);
    run(&|c| {
        // SAFETY: only read from here on.
        let scores = unsafe { &*scores.part(chunk_floats(c).start, chunk_floats(c).len()) };
        masses.set(c, dispatch(ask.isa, Masses { scores, group, logs: &logs[c * CHUNK..] }));
    });
    let mut totals: Vec<Running> = ask
        .steady
        .iter()
        .map(|&lse| Running { max: lse, sum: if lse == f32::NEG_INFINITY { 0.0 } else { 1.0 } })
        .collect();
    for masses in masses.into_values() {
        totals.iter_mut().zip(&masses).for_each(|(total, mass)| *total = join(*total, *mass));
    }
    let totals: Vec<f32> = totals.into_iter().map(Running::lse).collect();
    let mut weights = vec![0f32; blocks * KEYS];
    let shares = Shared::new(&mut weights);
    run(&|c| {
        let floats = chunk_floats(c);
        // SAFETY: the shares of chunk c are this worker's own; scores are only read.
        let (scores, shares) =
            unsafe { (&*scores.part(floats.start, floats.len()), shares.part(c * CHUNK, floats.len() / group)) };
        dispatch(ask.isa, Shares { scores, totals: &totals, shares });
    });

    // The units that fill the budget.
    let score_of = |g: usize, i: usize| all[at(g, i)] - totals[g];
    let (mut picked, last) = match ask.select {
        Select::TopK(rows) => {
            let positive = (0..n).filter(|&i| weights[i] > 0.0).map(|i| counts[i] as usize).sum::<usize>();
            if positive < rows.min(ask.candidates.len()) {
                // Shares below the smallest float are all 0. There the scores keep the order; they stay below every share.
                for (i, weight) in weights[..n].iter_mut().enumerate().filter(|(_, weight)| **weight == 0.0) {
                    *weight = (0..group).map(|g| score_of(g, i)).fold(f32::NEG_INFINITY, f32::max);
                }
            }
            fill(&weights[..n], &counts, rows)
        }
        Select::TopP(p) => {
            let steady: Vec<f64> =
                ask.steady.iter().zip(&totals).map(|(&lse, &total)| f64::from(exp_difference(lse, total))).collect();
            let mass = |g: usize, i: usize| f64::from((score_of(g, i) + logs[i]).exp());
            (reach(&weights[..n], &counts, f64::from(p), steady, mass), None)
        }
    };
    let mut rows = Vec::new();
    let mut unread: Vec<f32> = counts.iter().map(|&n| n as f32).collect();
    unread.resize(blocks * KEYS, 0.0);
    picked.sort_unstable();
    for &i in &picked {
        let (members, i) = (units.members(range.start + i as usize), i as usize);
        let places = match parts.iter().position(|part| part.unit == i) {
            Some(part) => parts.swap_remove(part).places,
            None => 0..members.len(),
        };
        rows.extend(places.map(|place| members.row(place) as u32));
        unread[i] = 0.0;
    }
    if let Some((i, taken)) = last {
        let members = units.members(range.start + i);
        if !parts.iter().any(|part| part.unit == i) {
            parts.push(Part { unit: i, places: 0..members.len() });
        }
        let part = parts.iter_mut().find(|part| part.unit == i).expect("pushed where it was not there");
        let first = part.places.start;
        rows.extend((first..first + taken).map(|place| members.row(place) as u32));
        part.places.start += taken;
    }
    rows.sort_unstable();
    // Those in part are added one by one.
    parts.iter().for_each(|part| unread[part.unit] = 0.0);

    let scored = counts.iter().filter(|&&n| n > 0).count();
    let mut bytes = scored * of.vectors.row_bytes();
    let (mut rest, mut bound) = (None, None);
    if score.estimates() || score.bounds() {
        let means = (ask.rest && score.estimates()).then_some(&of.values);
        bytes += means.map_or(0, |means| scored * means.row_bytes());
        let value_dim = ask.values.shape()[3];
        let unread = &unread;
        let sums = Slots::new(chunks);
        run(&|c| {
            let (units, floats) = (chunk_units(c), chunk_floats(c));
            // SAFETY: scores are only read.
            let scores = unsafe { &*scores.part(floats.start, floats.len()) };
            let unread = &unread[c * CHUNK..];
            let first = range.start + units.start;
            let of = of.vectors.dtype();
            let summed = with_element!(of, T => {
                let values = means.map(|means: &Table| means.rows::<T>());
                let rest = |careful| Rest { scores, totals: &totals, unread, first, values, value_dim, careful };
                let summed = dispatch(ask.isa, rest(false));
                // A mean that is not finite times a weight of 0 is NaN: then only units that weigh something are added.
                let fine = summed.outputs.iter().all(|x| x.is_finite());
                if fine { summed } else { dispatch(ask.isa, rest(true)) }
            });
            sums.set(c, summed);
        });
        let mut mass = vec![0f64; group];
        let mut outputs = vec![0f64; if means.is_some() { group * value_dim } else { 0 }];
        for part in sums.into_values() {
            mass.iter_mut().zip(&part.mass).for_each(|(a, &b)| *a += b);
            for (sum, part) in outputs.chunks_exact_mut(value_dim).zip(part.outputs.chunks_exact(padded(value_dim))) {
                sum.iter_mut().zip(part).for_each(|(a, &b)| *a += f64::from(b));
            }
        }
        for Part { unit, places } in parts.iter().filter(|part| !part.places.is_empty()) {
            let mean = means.map(|means| {
                let (members, stored) = (units.members(range.start + unit), means.row(range.start + unit));
                part_mean(ask.values, ask.head, &members, places.clone(), &stored)
            });
            for g in 0..group {
                let weight = f64::from(score_of(g, *unit).exp()) * places.len() as f64;
                mass[g] += weight;
                if let Some(mean) = &mean
                    && weight > 0.0
                {
                    let sum = &mut outputs[g * value_dim..(g + 1) * value_dim];
                    sum.iter_mut().zip(mean).for_each(|(a, &b)| *a += weight * f64::from(b));
                }
            }
        }
        let log_masses: Vec<f32> = mass.iter().zip(&totals).map(|(mass, total)| mass.ln() as f32 + total).collect();
        if score.estimates() {
            let mean = |g: usize| match means {
                Some(_) if mass[g] > 0.0 => {
                    outputs[g * value_dim..(g + 1) * value_dim].iter().map(|x| (x / mass[g]) as f32).collect()
                }
                Some(_) => vec![0.0; value_dim],
                None => Vec::new(),
            };
            rest = Some((0..group).map(|g| RestMass { log_mass: log_masses[g], mean: mean(g) }).collect());
        } else {
            bound = Some(log_masses);
        }
    }
    Pick { rows, rest, bound, scored, bytes, ..Pick::default() }
}

/// ln n.
fn log(n: u32) -> f32 {
    static LOGS: OnceLock<Vec<f32>> = OnceLock::new();
    let exact = |n: u32| (f64::from(n)).ln() as f32;
    let logs = LOGS.get_or_init(|| (0..1024).map(exact).collect());
    logs.get(n as usize).copied().unwrap_or_else(|| exact(n))
}

fn join(a: Running, b: Running) -> Running {
    let max = a.max.max(b.max);
    Running { max, sum: a.sum * exp_difference(a.max, max) + b.sum * exp_difference(b.max, max) }
}

/// Units of the largest weights that fill a budget of rows, and how many rows of one more. Ties go to the lower unit.
fn fill(weights: &[f32], counts: &[u32], budget: usize) -> (Vec<u32>, Option<(usize, usize)>) {
    let mut bins = vec![0usize; BINS];
    for (&weight, &count) in weights.iter().zip(counts) {
        bins[bin(weight)] += count as usize;
    }
    let mut above = 0;
    let mut threshold = BINS;
    while threshold > 0 && above + bins[threshold - 1] <= budget {
        threshold -= 1;
        above += bins[threshold];
    }
    let held = |&i: &u32| counts[i as usize] > 0;
    let all = 0..weights.len() as u32;
    let mut picked: Vec<u32> = all.clone().filter(held).filter(|&i| bin(weights[i as usize]) >= threshold).collect();
    // The next bin holds more than is left.
    let mut last = None;
    if threshold > 0 {
        let mut tied: Vec<u32> = all.filter(held).filter(|&i| bin(weights[i as usize]) == threshold - 1).collect();
        tied.sort_unstable_by(|&a, &b| weights[b as usize].total_cmp(&weights[a as usize]).then(a.cmp(&b)));
        for i in tied {
            let left = budget - above;
            let count = counts[i as usize] as usize;
            if count > left {
                last = (left > 0).then_some((i as usize, left));
                break;
            }
            picked.push(i);
            above += count;
        }
    }
    (picked, last)
}

/// The fewest units, in the order of their weights, that with the steady rows hold the share `p` of every head.
fn reach(weights: &[f32], counts: &[u32], p: f64, mut held: Vec<f64>, mass: impl Fn(usize, usize) -> f64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..weights.len() as u32).filter(|&i| counts[i as usize] > 0).collect();
    order.sort_unstable_by(|&a, &b| weights[b as usize].total_cmp(&weights[a as usize]).then(a.cmp(&b)));
    let mut picked = Vec::new();
    for i in order {
        if held.iter().all(|&held| held >= p) {
            break;
        }
        held.iter_mut().enumerate().for_each(|(g, held)| *held += mass(g, i as usize));
        picked.push(i);
    }
    picked
}

/// `scores[block][g][j]`: the product of each unit's vector with each query.
struct Scan<'a, T> {
    /// `[group, width]`.
    queries: &'a [f32],
    group: usize,
    width: usize,
    vectors: Strided<T>,
    units: Range<usize>,
    scores: &'a mut [f32],
}

impl<T: Element> Kernel for Scan<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { queries, group, width, vectors, units, scores } = self;
        assert!(scores.len() >= units.len().next_multiple_of(KEYS) * group);
        for (b, scores) in scores.chunks_exact_mut(KEYS * group).enumerate() {
            let first = units.start + b * KEYS;
            let keys = first..(first + KEYS).min(units.end);
            let following = Strided { base: vectors.base.wrapping_offset(KEYS as isize * vectors.stride), ..vectors };
            for g in (0..group).step_by(MAX_QUERY_ROWS) {
                s.call(BlockScores {
                    queries: &queries[g * width..],
                    padded_dim: width,
                    rows: MAX_QUERY_ROWS.min(group - g),
                    dim: width,
                    k: vectors,
                    keys: keys.clone(),
                    next: (following, width),
                    scores: &mut scores[g * KEYS..],
                });
            }
            for row in scores.chunks_exact_mut(KEYS) {
                row[keys.len()..].fill(f32::NEG_INFINITY);
            }
        }
    }
}

/// Softmax sums of each head over units of `e^log` rows each.
struct Masses<'a> {
    scores: &'a [f32],
    group: usize,
    logs: &'a [f32],
}

impl Kernel for Masses<'_> {
    type Output = Vec<Running>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<Running> {
        let Self { scores, group, logs } = self;
        let mut all = Vec::with_capacity(group);
        for g in 0..group {
            let mut largest = s.splat(f32::NEG_INFINITY);
            for (block, logs) in scores.chunks_exact(KEYS * group).zip(logs.chunks_exact(KEYS)) {
                for j in (0..KEYS).step_by(S::LANES) {
                    // SAFETY: j + LANES <= KEYS, which both have.
                    let x = unsafe { s.add(s.load(block.as_ptr().add(g * KEYS + j)), s.load(logs.as_ptr().add(j))) };
                    largest = s.max(x, largest);
                }
            }
            let max = s.max_lane(largest);
            let mut sum = 0.0;
            if max > f32::NEG_INFINITY {
                let mut sums = s.zero();
                for (block, logs) in scores.chunks_exact(KEYS * group).zip(logs.chunks_exact(KEYS)) {
                    for j in (0..KEYS).step_by(S::LANES) {
                        // SAFETY: as above.
                        let x =
                            unsafe { s.add(s.load(block.as_ptr().add(g * KEYS + j)), s.load(logs.as_ptr().add(j))) };
                        sums = s.add(sums, s.exp(s.sub(x, s.splat(max))));
                    }
                }
                sum = s.sum(sums);
            }
            all.push(Running { max, sum });
        }
        all
    }
}

/// The mean over the group of the share that a row of each unit has.
struct Shares<'a> {
    scores: &'a [f32],
    totals: &'a [f32],
    shares: &'a mut [f32],
}

impl Kernel for Shares<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { scores, totals, shares } = self;
        let group = totals.len();
        let part = s.splat(1.0 / group as f32);
        for (block, shares) in scores.chunks_exact(KEYS * group).zip(shares.chunks_exact_mut(KEYS)) {
            for j in (0..KEYS).step_by(S::LANES) {
                let mut sum = s.zero();
                // SAFETY: j + LANES <= KEYS, which every row has.
                unsafe {
                    for (g, &total) in totals.iter().enumerate() {
                        let share = s.exp(s.sub(s.load(block.as_ptr().add(g * KEYS + j)), s.splat(total)));
                        sum = s.fma(share, part, sum);
                    }
                    s.store(shares.as_mut_ptr().add(j), sum);
                }
            }
        }
    }
}

/// Adds up what units left unread weigh, times their mean values.
struct Rest<'a, T> {
    scores: &'a [f32],
    totals: &'a [f32],
    /// Rows left unread of each unit.
    unread: &'a [f32],
    /// The unit of the first score.
    first: usize,
    values: Option<Strided<T>>,
    value_dim: usize,
    careful: bool,
}

struct Summed {
    mass: Vec<f64>,
    /// `[group, padded value_dim]`.
    outputs: Vec<f32>,
}

impl<T: Element> Kernel for Rest<'_, T> {
    type Output = Summed;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Summed {
        let Self { scores, totals, unread, first, values, value_dim, careful } = self;
        let group = totals.len();
        let stride = padded(value_dim);
        let mut summed = Summed { mass: vec![0.0; group], outputs: vec![0.0; group * stride] };
        let mut buffer = Buffer::default();
        let weights = buffer.take(group * KEYS);
        for (b, (block, unread)) in scores.chunks_exact(KEYS * group).zip(unread.chunks_exact(KEYS)).enumerate() {
            let mut largest = s.zero();
            for (g, &total) in totals.iter().enumerate() {
                let mut sum = s.zero();
                for j in (0..KEYS).step_by(S::LANES) {
                    // SAFETY: j + LANES <= KEYS, which every row has.
                    unsafe {
                        let share = s.exp(s.sub(s.load(block.as_ptr().add(g * KEYS + j)), s.splat(total)));
                        let weight = s.mul(share, s.load(unread.as_ptr().add(j)));
                        s.store(weights.as_mut_ptr().add(g * KEYS + j), weight);
                        sum = s.add(sum, weight);
                        largest = s.max(weight, largest);
                    }
                }
                summed.mass[g] += f64::from(s.sum(sum));
            }
            let Some(values) = values else { continue };
            if s.max_lane(largest) < NEGLIGIBLE {
                continue;
            }
            // Units beyond the last one weigh nothing and must not be read.
            let last = unread.iter().rposition(|&n| n > 0.0).map_or(0, |last| last + 1);
            let keys = first + b * KEYS..first + b * KEYS + last;
            let following = Strided { base: values.base.wrapping_offset(KEYS as isize * values.stride), ..values };
            for g in (0..group).step_by(MAX_QUERY_ROWS) {
                s.call(BlockValues {
                    weights: &weights[g * KEYS..],
                    rows: MAX_QUERY_ROWS.min(group - g),
                    dim: value_dim,
                    v: values,
                    keys: keys.clone(),
                    next: (following, value_dim),
                    outputs: &mut summed.outputs[g * stride..],
                    padded_dim: stride,
                    careful,
                });
            }
        }
        summed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Random;

    #[test]
    fn budgets_are_filled_in_the_order_of_weights() {
        let mut random = Random::new(3);
        for n in [1usize, 7, 500] {
            let weights: Vec<f32> = (0..n).map(|_| (random.below(30) as f32 * 0.4 - 8.0).exp()).collect();
            let counts: Vec<u32> = (0..n).map(|_| random.below(9) as u32).collect();
            let rows: usize = counts.iter().map(|&n| n as usize).sum();
            let mut order: Vec<usize> = (0..n).filter(|&i| counts[i] > 0).collect();
            order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
            for budget in [1, 2, rows / 3, rows.saturating_sub(1), rows, rows + 5] {
                let (mut picked, last) = fill(&weights, &counts, budget);
                let (mut expected, mut left, mut part) = (Vec::new(), budget, None);
                for &i in &order {
                    let count = counts[i] as usize;
                    if count > left {
                        part = (left > 0).then_some((i, left));
                        break;
                    }
                    expected.push(i as u32);
                    left -= count;
                }
                picked.sort_unstable();
                expected.sort_unstable();
                assert_eq!((picked, last), (expected, part), "{n} units, {budget} rows");
            }
        }
    }

    #[test]
    fn shares_are_reached_for_every_head() {
        let weights = [0.3f32, 0.1, 0.5, 0.0, 0.2];
        let masses = [[0.2, 0.1, 0.3, 0.0, 0.1], [0.4, 0.1, 0.1, 0.05, 0.2]];
        let reached = |p, counts: [u32; 5]| reach(&weights, &counts, p, vec![0.3, 0.15], |g, i| masses[g][i]);
        assert!(reached(0.1, [1; 5]).is_empty());
        assert_eq!(reached(0.6, [1; 5]), [2, 0]);
        assert_eq!(reached(0.9, [1; 5]), [2, 0, 4, 1]);
        assert_eq!(reached(0.72, [1, 1, 0, 1, 1]), [0, 4, 1, 3]);
    }
}
