//! Picking whole units of keys (pages, clusters) by a score of each, and weighing those that are left unread.
//!
//! ```text
//! score     one product of a vector per unit with each query of the group: each unit's bytes are read once    (levels.rs)
//! rank      the mean over the group of the share of all mass that a row of the unit has
//! pick      units in this order until the budget of rows is full; of the last one, its first rows
//! rest      rows left unread have their unit's weight and their unit's mean value
//! ```
//! A unit may lie partly outside the candidates. Its share, where it is a mean, is then of its candidates alone, and so is its mean value.

use super::levels::Level;
use super::select::{BINS, bin};
use crate::dense::scores::{Running, exp_difference};
use crate::index::units::{HeadUnits, Members, UnitScore, part_mean};
use crate::index::{Ask, Pick, RestMass, Select};
use std::ops::Range;

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
    /// Its place, counted from the first unit that is scored.
    unit: usize,
    /// Places of its members that are candidates and, once rows were picked, unread.
    places: Range<usize>,
}

/// Log of each query's mass: steady rows and what is scored.
fn totals(ask: &Ask, level: &Level) -> Vec<f32> {
    let steady = |&lse: &f32| Running { max: lse, sum: if lse == f32::NEG_INFINITY { 0.0 } else { 1.0 } };
    let mut totals: Vec<Running> = ask.steady.iter().map(steady).collect();
    level.masses(ask, &mut totals);
    totals.into_iter().map(Running::lse).collect()
}

/// The share of each query's mass that the steady rows have.
fn steady_shares(ask: &Ask, totals: &[f32]) -> Vec<f64> {
    ask.steady.iter().zip(totals).map(|(&lse, &total)| f64::from(exp_difference(lse, total))).collect()
}

/// Picks units for a query group.
pub(crate) fn pick<U: Units>(units: &U, of: &HeadUnits, score: UnitScore, ask: &Ask) -> Pick {
    let (group, range) = (ask.queries.len(), units.within(&ask.candidates));
    let first = range.start;
    // How many candidates each unit has.
    let (mut counts, mut parts) = (vec![0u32; range.len()], Vec::new());
    let whole = units.whole(&ask.candidates);
    for (i, count) in counts.iter_mut().enumerate() {
        let unit = first + i;
        let members = units.members(unit);
        *count = members.len() as u32;
        if !whole.contains(&unit) {
            let places = members.inside(&ask.candidates);
            if places.len() < members.len() {
                *count = places.len() as u32;
                if !places.is_empty() {
                    parts.push(Part { unit: i, places });
                }
            }
        }
    }
    let mut level = Level::score(of, score, range, counts, ask);
    if score.estimates() {
        for part in &parts {
            let unit = first + part.unit;
            let stored = of.vectors.row(unit);
            let mean = part_mean(&ask.keys, ask.head, &units.members(unit), part.places.clone(), &stored);
            for (g, q) in ask.queries.iter().enumerate() {
                let change = q.iter().zip(mean.iter().zip(&stored)).map(|(q, (new, old))| q * (new - old));
                level.add(g, part.unit, change.sum::<f32>());
            }
        }
    }
    let totals = totals(ask, &level);

    // The units that fill the budget.
    let (mut picked, last) = match ask.select {
        Select::TopK(rows) => fill(&level.ranks(ask, &totals, rows.min(ask.candidates.len())), &level.counts, rows),
        Select::TopP(p) => {
            let (weights, p) = (level.ranks(ask, &totals, 0), f64::from(p));
            let mass = |g: usize, i: usize| level.mass(g, i, totals[g]);
            (reach(&weights, &level.counts, p, steady_shares(ask, &totals), mass), None)
        }
    };
    let mut read = Vec::new();
    let mut unread: Vec<f32> = level.counts.iter().map(|&n| n as f32).collect();
    picked.sort_unstable();
    for &i in &picked {
        let (members, i) = (units.members(first + i as usize), i as usize);
        let places = match parts.iter().position(|part| part.unit == i) {
            Some(part) => parts.swap_remove(part).places,
            None => 0..members.len(),
        };
        read.extend(places.map(|place| members.row(place) as u32));
        unread[i] = 0.0;
    }
    if let Some((i, taken)) = last {
        let members = units.members(first + i);
        if !parts.iter().any(|part| part.unit == i) {
            parts.push(Part { unit: i, places: 0..members.len() });
        }
        let part = parts.iter_mut().find(|part| part.unit == i).expect("pushed where it was not there");
        let start = part.places.start;
        read.extend((start..start + taken).map(|place| members.row(place) as u32));
        part.places.start += taken;
    }
    // Those in part are added one by one.
    parts.iter().for_each(|part| unread[part.unit] = 0.0);

    let scored = level.scored();
    let mut bytes = scored * of.vectors.row_bytes();
    let (mut rest, mut bound) = (None, None);
    if score.estimates() || score.bounds() {
        let means = ask.rest && score.estimates();
        bytes += if means { scored * of.values.row_bytes() } else { 0 };
        let value_dim = ask.values.shape()[3];
        let mut mass = vec![0f64; group];
        let mut outputs = vec![0f64; if means { group * value_dim } else { 0 }];
        level.rest(ask, &totals, unread, means, &mut mass, &mut outputs);
        for Part { unit, places: members } in parts.iter().filter(|part| !part.places.is_empty()) {
            let mean = means.then(|| {
                let unit = first + *unit;
                let stored = of.values.row(unit);
                part_mean(&ask.values, ask.head, &units.members(unit), members.clone(), &stored)
            });
            for g in 0..group {
                let weight = f64::from((level.logit(g, *unit) - totals[g]).exp()) * members.len() as f64;
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
                true if mass[g] > 0.0 => {
                    outputs[g * value_dim..(g + 1) * value_dim].iter().map(|x| (x / mass[g]) as f32).collect()
                }
                true => vec![0.0; value_dim],
                false => Vec::new(),
            };
            rest = Some((0..group).map(|g| RestMass { log_mass: log_masses[g], mean: mean(g) }).collect());
        } else {
            bound = Some(log_masses);
        }
    }
    Pick { rows: ascending(&read, &ask.candidates), rest, bound, scored, bytes, ..Pick::default() }
}

/// Different rows of a range, in order: by a bit for each row, which is several times as fast as sorting many.
fn ascending(rows: &[u32], range: &Range<usize>) -> Vec<u32> {
    let mut bits = vec![0u64; range.len().div_ceil(64)];
    for &row in rows {
        let i = row as usize - range.start;
        bits[i / 64] |= 1 << (i % 64);
    }
    let mut sorted = Vec::with_capacity(rows.len());
    for (word, &bits) in bits.iter().enumerate() {
        let (first, mut left) = ((range.start + 64 * word) as u32, bits);
        while left != 0 {
            sorted.push(first + left.trailing_zeros());
            left &= left - 1;
        }
    }
    sorted
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
    fn rows_come_out_in_order() {
        let mut random = Random::new(4);
        for (range, n) in [(3..4, 1), (5..70, 65), (1000..9000, 700), (64..128, 0)] {
            let mut rows: Vec<u32> = range.clone().map(|row| row as u32).collect();
            for i in 0..n {
                let left = rows.len() - i;
                rows.swap(i, i + random.below(left));
            }
            rows.truncate(n);
            let found = ascending(&rows, &range);
            rows.sort_unstable();
            assert_eq!(found, rows);
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
