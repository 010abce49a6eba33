//! Sampled rows: an unbiased correction of an index's estimate, and budgets that end when the error is small enough.
//!
//! ```text
//! probability of candidate i   p_i = min(1, m (0.8 share_i / sum of shares + 0.2 / n)),  share_i the mean over the query group
//! draw                         i is in the sample if its own random number is below p_i
//! ```
//! Rows of much weight are certain, others are drawn independently of each other; `m` is what the size would be if none were certain.
//! A row's random number depends on seed, position, head and row alone, so a larger `m` adds rows and keeps those it had.

use super::correct::{Correct, Correction, Sample, Sums};
use super::select::{self, Budget, Weights};
use super::{Call, GroupRows, Keys, Pick, RowStats};
use crate::dense::rows::with_rows;
use crate::dense::scores::{RowId, Running, exp_difference};
use crate::index::{Ask, Estimates, Select};
use crate::parallel::{Execution, map};
use crate::simd::{Kernel, Simd, dispatch};
use crate::tensor::TensorViewMut;
use std::ops::Range;

/// Share of the probabilities that does not follow the weights: no row is out of reach, whatever its code says.
const UNIFORM: f32 = 0.2;

/// Size of a first sample.
const PILOT: f32 = 1024.0;

/// Sizes that are tried before everything is read.
const ROUNDS: usize = 5;

/// A sample of more than this part of the candidates is not worth its gaps: they are all read.
const LARGEST: f64 = 1.0 / 3.0;

/// A next sample is larger by what the error calls for, times the first, and at least by the second.
const GROWTH: [f64; 2] = [1.1, 1.3];

/// Estimates whose logits err by more than this, in nats, say nothing about what is unread: the way is to read everything.
const LARGEST_ERROR: f32 = 16.0;

/// Deviations by which one unread row's logit may be too low without the row alone shifting the output by all that is allowed.
const UNDERESTIMATE: f32 = 3.0;

/// Directions that an error is taken to have, of those it seems to.
const DIRECTIONS: f64 = 1.0 / 1.5;

/// Rows of a sample that one item reads.
const PART: usize = 2048;

/// Candidates that one item draws from.
const CHUNK: usize = 16 * 1024;

/// How rows are sampled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Of the random numbers.
    pub seed: u64,
    /// The error that ends the sampling; `None` for a sample of fixed size, by `Select::TopK`.
    pub error: Option<ErrorBudget>,
}

/// An error that the output keeps with some confidence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ErrorBudget {
    /// Largest norm of the error, in units of the norm of the output, or of the root mean square norm of the head's values.
    pub epsilon: f32,
    /// Whether the unit is that of the values.
    pub of_values: bool,
    /// Standard deviations that a normal number exceeds with the chance of a violation: in one direction, and in either.
    pub deviations: [f64; 2],
}

impl ErrorBudget {
    /// Standard deviations of its norm that the error of `correction` stays within, by the confidence asked for.
    ///
    /// The squared norm of an error with `d` directions is like a chi-squared number (Wilson and Hilferty), for one direction the square
    /// of a normal one. A variance that few rows speak for widens it as Student's t does (expanded in the degrees of freedom).
    fn deviations(&self, correction: &Correction) -> f64 {
        let [one, two] = self.deviations;
        let d = (correction.directions * DIRECTIONS).max(1.0);
        let norm = (1.0 - 2.0 / (9.0 * d) + one * (2.0 / (9.0 * d)).sqrt()).max(0.0).powf(1.5);
        let (z, n) = (two, correction.freedom.max(2.0));
        let t = z
            + (z.powi(3) + z) / (4.0 * n)
            + (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / (96.0 * n * n)
            + (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / (384.0 * n.powi(3));
        norm.max(1.0) * (t / z).max(1.0)
    }
}

/// What one position's and head's random numbers are made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key([u32; 2]);

impl Key {
    pub(super) fn new(seed: u64, position: usize, head: usize) -> Self {
        const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
        let mix = |z: u64| {
            let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        };
        let z = mix(seed.wrapping_add(STEP.wrapping_mul(position as u64 + 1)));
        let z = mix(z.wrapping_add(STEP.wrapping_mul(head as u64 + 1)));
        Self([z as u32, (z >> 32) as u32])
    }

    /// A row's random bits: the upper 24 are its number, the lower choose its sketch.
    #[inline(always)]
    pub(super) fn hash(self, row: u32) -> u32 {
        mix32(mix32(row ^ self.0[0]).wrapping_add(self.0[1]))
    }
}

#[inline(always)]
pub(super) fn mix32(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x85EB_CA6B);
    let x = (x ^ (x >> 13)).wrapping_mul(0xC2B2_AE35);
    x ^ (x >> 16)
}

/// Probabilities of the candidates, but for the size of the sample.
#[derive(Clone, Copy, Debug)]
struct Chances {
    slope: f32,
    floor: f32,
}

/// Largest slope: a size times it is still a float. Where shares are as small as that, the same floor for all counts.
const STEEPEST: f64 = 1e28;

impl Chances {
    /// For candidates with shares up to `limit`, those above being certain.
    fn new(shares: &[f32], limit: f32) -> Self {
        let (mut sum, mut n) = (0.0, 0);
        for chunk in shares.chunks(256) {
            let (mut part, mut inside) = (0f32, 0u32);
            for &share in chunk {
                part += if share <= limit { share } else { 0.0 };
                inside += u32::from(share <= limit);
            }
            sum += f64::from(part);
            n += inside;
        }
        let floor = 1.0 / n.max(1) as f32;
        // Without any share there is nothing to follow.
        if sum > 0.0 && sum.is_finite() {
            Self { slope: ((1.0 - f64::from(UNIFORM)) / sum).min(STEEPEST) as f32, floor: UNIFORM * floor }
        } else {
            Self { slope: 0.0, floor }
        }
    }
}

/// Draws from some candidates, the first of which is row `first`.
struct Draw<'a> {
    shares: &'a [f32],
    first: usize,
    size: f32,
    chances: Chances,
    key: Key,
    /// Rows above this share are certain.
    limit: f32,
}

impl Kernel for Draw<'_> {
    type Output = Sample;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Sample {
        const STEP: usize = 64;
        let Self { shares, first, size, chances, key, limit } = self;
        let mut sample = Sample::default();
        let (slope, floor) = (size * chances.slope, size * chances.floor);
        let (mut chance, mut drawn) = ([0f32; STEP], [0u32; STEP]);
        for (c, shares) in shares.chunks(STEP).enumerate() {
            let start = (first + c * STEP) as u32;
            let mut any = 0;
            for (j, &share) in shares.iter().enumerate() {
                let p = share * slope + floor;
                let p = if share > limit || p > 1.0 { 1.0 } else { p };
                // 24 bits are exact in f32.
                let number = (key.hash(start + j as u32) >> 8) as f32 * (1.0 / 16_777_216.0);
                chance[j] = p;
                drawn[j] = u32::from(number < p);
                any |= drawn[j];
            }
            if any != 0 {
                for j in (0..shares.len()).filter(|&j| drawn[j] != 0) {
                    sample.rows.push(start + j as u32);
                    sample.probabilities.push(chance[j]);
                }
            }
        }
        sample
    }
}

/// One query group over its candidates.
struct Group<'a, 'b> {
    call: &'a Call<'b>,
    head: usize,
    candidates: Range<usize>,
    rows: &'a GroupRows,
    estimates: &'a dyn Estimates,
    key: Key,
    parallel: Option<&'a Execution>,
    /// `[group, padded_value_dim]`: output by the estimate.
    centres: Vec<f32>,
    /// Mass by the estimate, and of the steady rows and the sink, for each query.
    known: Vec<f64>,
    steady: Vec<f64>,
}

impl<'a, 'b> Group<'a, 'b> {
    fn new(
        call: &'a Call<'b>,
        ids: &[RowId],
        candidates: Range<usize>,
        rows: &'a GroupRows,
        estimates: &'a dyn Estimates,
        key: Key,
        parallel: Option<&'a Execution>,
    ) -> Self {
        let width = rows.padded_value_dim;
        let mut centres = vec![0.0; ids.len() * width];
        let (mut known, mut steady) = (Vec::new(), Vec::new());
        for (g, (&id, rest)) in ids.iter().zip(estimates.rest()).enumerate() {
            let unit = estimates.log_total()[g];
            let seen = rows.running[g];
            // The sink is a steady row of value 0.
            let mass = f64::from(exp_difference(call.problem.denominator(id, seen).lse(), unit));
            let other = f64::from(exp_difference(rest.log_mass, unit));
            let total = mass + other;
            let (old, new) = (f64::from(exp_difference(seen.max, unit)) / total, other / total);
            let centre = &mut centres[g * width..][..call.problem.value_dim];
            for ((x, output), mean) in centre.iter_mut().zip(&rows.outputs[g * width..]).zip(&rest.mean) {
                *x = (old * f64::from(*output) + new * f64::from(*mean)) as f32;
            }
            known.push(total);
            steady.push(mass);
        }
        let head = ids[0].head / call.problem.group;
        Self { call, head, candidates, rows, estimates, key, parallel, centres, known, steady }
    }

    /// Runs `n` items and returns what each leaves, in order.
    fn each<T: Send>(&self, n: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
        match self.parallel {
            // A cancelled call's results are never seen.
            Some(execution) if n > 1 => map(execution, n, work).unwrap_or_default(),
            _ => (0..n).map(work).collect(),
        }
    }

    fn draw(&self, size: f32, chances: Chances, limit: f32) -> Sample {
        let (shares, first) = (self.estimates.shares(), self.candidates.start);
        let parts = self.each(shares.len().div_ceil(CHUNK), |c| {
            let range = c * CHUNK..((c + 1) * CHUNK).min(shares.len());
            let (shares, first) = (&shares[range.clone()], first + range.start);
            dispatch(self.call.isa, Draw { shares, first, size, chances, key: self.key, limit })
        });
        let mut sample = Sample::default();
        for part in parts {
            sample.rows.extend(part.rows);
            sample.probabilities.extend(part.probabilities);
        }
        sample
    }

    /// Reads a sample: the correction for each query, and the mass of the rows read.
    fn correct(&self, sample: &Sample) -> Vec<(Correction, f64)> {
        let problem = &self.call.problem;
        let group = self.known.len();
        let weights: Vec<Vec<f32>> = (0..group).map(|g| self.estimates.weights(g, &sample.rows)).collect();
        let stand_ins: Vec<&[f32]> = sample.rows.iter().map(|&row| self.estimates.value(row as usize)).collect();
        let parts = self.each(sample.rows.len().div_ceil(PART), |i| {
            let range = i * PART..((i + 1) * PART).min(sample.rows.len());
            let estimated: Vec<&[f32]> = weights.iter().map(|weights| &weights[range.clone()]).collect();
            with_rows!(problem, 0, self.head, |k, v| {
                dispatch(
                    self.call.isa,
                    Correct {
                        k,
                        v,
                        dim: problem.dim,
                        value_dim: problem.value_dim,
                        queries: self.rows.for_keys(),
                        padded_dim: self.rows.padded_dim,
                        log_unit: self.estimates.log_total(),
                        rows: &sample.rows[range.clone()],
                        probabilities: &sample.probabilities[range.clone()],
                        estimated: &estimated,
                        stand_ins: &stand_ins[range.clone()],
                        centres: &self.centres,
                        padded_value_dim: self.rows.padded_value_dim,
                        key: self.key,
                    },
                )
            })
        });
        let mut sums: Option<Vec<Sums>> = None;
        for part in parts {
            match &mut sums {
                None => sums = Some(part),
                Some(sums) => sums.iter_mut().zip(&part).for_each(|(sums, part)| sums.join(part)),
            }
        }
        let sums = sums.unwrap_or_else(|| vec![Sums::new(self.rows.padded_value_dim); group]);
        let corrected = sums.iter().zip(&self.known).zip(&self.steady);
        corrected.map(|((sums, &known), &steady)| (sums.correction(known, steady), sums.read)).collect()
    }

    /// Norm of the output with a correction.
    fn norm(&self, g: usize, correction: &Correction) -> f64 {
        let centre = &self.centres[g * self.rows.padded_value_dim..];
        let square = |(c, d): (&f32, &f32)| (f64::from(*c) + f64::from(*d)).powi(2);
        centre.iter().zip(&correction.shift).map(square).sum::<f64>().sqrt()
    }

    /// Samples until the error is as small as asked; `None` where reading everything is the way.
    fn verified(&self, budget: &ErrorBudget) -> Option<(Sample, Vec<(Correction, f64)>)> {
        let shares = self.estimates.shares();
        let n = shares.len();
        let chances = Chances::new(shares, f32::INFINITY);
        let largest = (n as f64 * LARGEST) as usize;
        let mut size = f64::from(PILOT);
        for _ in 0..ROUNDS {
            let sample = self.draw(size as f32, chances, f32::INFINITY);
            if sample.rows.len() > largest {
                return None;
            }
            let corrected = self.correct(&sample);
            let wanted = corrected.iter().enumerate().map(|(g, (c, _))| self.wanted(g, c, size, chances, budget));
            // Not a number where nothing can be said.
            let wanted = wanted.fold(0.0, |a: f64, b| if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) });
            if wanted <= size {
                return Some((sample, corrected));
            }
            if !wanted.is_finite() {
                return None;
            }
            size = (GROWTH[0] * wanted).max(GROWTH[1] * size);
        }
        None
    }

    /// Size of a sample that would keep query `g` within the budget.
    fn wanted(&self, g: usize, correction: &Correction, size: f64, chances: Chances, budget: &ErrorBudget) -> f64 {
        if !correction.sound {
            return f64::NAN;
        }
        let (epsilon, values) = (f64::from(budget.epsilon), f64::from(self.estimates.value_norm()));
        // The output's norm may be too large by as much as the output is wrong.
        let allowed =
            if budget.of_values { epsilon * values } else { epsilon / (1.0 + epsilon) * self.norm(g, correction) };
        let by_variance = size * correction.variance * (budget.deviations(correction) / allowed).powi(2);
        // A row whose logit is that much too low has up to this share of the mass, per unit of its share of the sample.
        let group = self.known.len() as f64;
        let factor = f64::from(UNDERESTIMATE * self.estimates.sigma()[g]).exp();
        let by_row =
            if chances.slope > 0.0 { group * factor / f64::from(chances.slope) * values / allowed } else { 0.0 };
        // Not `max`, which would leave out what is not a number.
        if by_variance >= by_row || by_variance.is_nan() { by_variance } else { by_row }
    }

    /// Half of `rows` by weight, and a sample of that size of the others.
    fn fixed(&self, rows: usize) -> (Sample, Vec<(Correction, f64)>) {
        let shares = self.estimates.shares();
        let top = (rows / 2).min(shares.len());
        let mut weights = Weights::new(1, false);
        weights.count(shares);
        let picked = select::select(self.call.isa, shares, &weights, 0..shares.len(), &Budget::Rows(top));
        let least = picked.iter().map(|&row| shares[row as usize]).fold(f32::INFINITY, f32::min);
        // The largest share that is not among them: of rows that tie for the last place all are left to chance.
        let tied = shares.iter().filter(|&&share| share >= least).count() > top;
        let limit = if tied { least } else { least.next_down() };
        let sample = self.draw((rows - top) as f32, Chances::new(shares, limit), limit);
        let corrected = self.correct(&sample);
        (sample, corrected)
    }
}

impl Call<'_> {
    /// Attends from one position of one KV head's group to a sample of the candidates; `rows` has attended to the steady rows.
    pub(super) fn sample(
        &self,
        sampling: &Sampling,
        ids: &[RowId],
        candidates: Range<usize>,
        rows: &mut GroupRows,
        mut stats: RowStats,
        out: &TensorViewMut,
        lse: &TensorViewMut,
        parallel: Option<&Execution>,
    ) -> RowStats {
        let head = ids[0].head / self.problem.group;
        let estimates = self.ask(head, rows, &candidates, parallel, |ask: &Ask| self.view.weigh(ask));
        let estimates = estimates.expect("an index that estimates, as was checked");
        (stats.keys_scored, stats.index_bytes) = (estimates.scored(), estimates.bytes());
        let key = Key::new(sampling.seed, stats.keys_total - 1, head);
        let group = Group::new(self, ids, candidates.clone(), rows, &*estimates, key, parallel);
        let found = match (&sampling.error, self.select(head)) {
            _ if !estimates.sigma().iter().all(|&sigma| sigma <= LARGEST_ERROR) => None,
            (Some(budget), _) => group.verified(budget),
            (None, Select::TopK(k)) => Some(group.fixed(k)),
            (None, Select::TopP(_)) => unreachable!("refused before any work"),
        };
        let Some((sample, corrected)) = found else {
            drop(group);
            stats.keys_attended += candidates.len();
            rows.attend(self, head, ids, Keys::Range(candidates));
            self.finish(ids, rows, &Pick::default(), out, lse);
            let zeros = vec![0.0; ids.len()];
            (stats.missed_mass, stats.missed_mass_bound, stats.error_estimate) = (zeros.clone(), zeros.clone(), zeros);
            return stats;
        };
        stats.keys_attended += sample.rows.len();
        stats.keys_sampled = sample.rows.len();
        stats.verified = sampling.error.is_some();
        let all = sample.rows.len() == candidates.len();
        let width = rows.padded_value_dim;
        for (g, (&id, (correction, read))) in ids.iter().zip(&corrected).enumerate() {
            // Nothing is believed of a correction that is not sound, which only samples of a fixed size come to.
            let (mass, shift) = match (correction.sound, &sampling.error) {
                (false, _) => (group.known[g], vec![0.0; width]),
                (true, Some(_)) => (correction.mass, correction.shift.clone()),
                (true, None) => (correction.mass, correction.shrunken()),
            };
            let (norm, deviation) = (group.norm(g, correction), correction.variance.sqrt());
            let unit = match &sampling.error {
                Some(budget) if budget.of_values => f64::from(estimates.value_norm()),
                _ => norm,
            };
            stats.error_estimate.push(if deviation == 0.0 { 0.0 } else { (deviation / unit) as f32 });
            let missed = 1.0 - (group.steady[g] + read) / mass;
            let missed = if all { 0.0 } else { missed.clamp(0.0, 1.0) as f32 };
            stats.missed_mass.push(missed);
            stats.missed_mass_bound.push(if all { 0.0 } else { 1.0 });
            let centre = &group.centres[g * width..][..self.problem.value_dim];
            let output = centre.iter().zip(&shift).map(|(c, d)| c + d);
            let total = Running { max: estimates.log_total()[g], sum: mass as f32 };
            self.write(id, output, total, out, lse);
        }
        if self.keep_selected {
            stats.selected = sample.rows;
        }
        stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;

    fn draw(shares: &[f32], first: usize, size: f32, seed: u64, limit: f32) -> Sample {
        let chances = Chances::new(shares, limit);
        dispatch(Isa::Scalar, Draw { shares, first, size, chances, key: Key::new(seed, 99, 2), limit })
    }

    #[test]
    fn rows_are_drawn_as_often_as_their_probabilities_say() {
        let shares: Vec<f32> = (0..1000).map(|i| (-(i as f32) * 0.01).exp()).collect();
        let mut counts = vec![0u32; 1000];
        let mut chances = vec![0f32; 1000];
        for seed in 0..2000 {
            let sample = draw(&shares, 7, 200.0, seed, f32::INFINITY);
            for (&row, &p) in sample.rows.iter().zip(&sample.probabilities) {
                counts[row as usize - 7] += 1;
                chances[row as usize - 7] = p;
            }
        }
        let total: f32 = chances.iter().sum();
        assert!((total - 186.0).abs() < 10.0, "{total}: the size, less what certain rows would have beyond 1");
        for (i, (&count, &p)) in counts.iter().zip(&chances).enumerate() {
            let (mean, sd) = (2000.0 * p, (2000.0 * p * (1.0 - p)).sqrt());
            assert!((count as f32 - mean).abs() <= 5.0 * sd + 1e-3, "row {i}: {count} times with chance {p}");
        }
    }

    #[test]
    fn larger_samples_hold_smaller_ones_and_pieces_make_the_whole() {
        let shares: Vec<f32> = (0..5000).map(|i| ((i * 37 % 101) as f32 * -0.1).exp()).collect();
        let small = draw(&shares, 0, 300.0, 1, f32::INFINITY);
        let large = draw(&shares, 0, 700.0, 1, f32::INFINITY);
        assert!(small.rows.len() < large.rows.len() && small.rows.iter().all(|row| large.rows.contains(row)));
        let chances = Chances::new(&shares, f32::INFINITY);
        let piece = |range: Range<usize>| {
            let (key, limit) = (Key::new(1, 99, 2), f32::INFINITY);
            let shares = &shares[range.clone()];
            dispatch(Isa::Scalar, Draw { shares, first: range.start, size: 300.0, chances, key, limit }).rows
        };
        assert_eq!([piece(0..1234), piece(1234..5000)].concat(), small.rows);
    }

    #[test]
    fn rows_above_the_limit_are_certain_and_leave_the_others_their_size() {
        let mut shares = vec![1e-4f32; 4000];
        shares[11] = 0.5;
        shares[3999] = 0.3;
        let sample = draw(&shares, 0, 100.0, 5, 0.2);
        assert!(sample.rows.contains(&11) && sample.rows.contains(&3999));
        assert!((60..140).contains(&sample.rows.len()), "{}", sample.rows.len());
        let nothing = draw(&[0.0; 640], 0, 64.0, 5, f32::INFINITY);
        assert!(nothing.probabilities.iter().all(|&p| (p - 0.1).abs() < 1e-6) && !nothing.rows.is_empty());
    }
}
