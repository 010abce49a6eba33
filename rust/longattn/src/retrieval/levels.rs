//! Units that are scored together: scores, mass, shares of it, and what units left unread add to the estimate of the rest.

use super::chunks::{Shared, Slots};
use crate::dense::dots::BlockScores;
use crate::dense::rows::{Coded, Rows, Strided};
use crate::dense::scores::{Running, exp_difference};
use crate::dense::scratch::Buffer;
use crate::dense::stream::{KEYS, MAX_QUERY_ROWS};
use crate::dense::values::BlockValues;
use crate::index::Ask;
use crate::index::units::{HeadUnits, UnitScore, padded, with_table};
use crate::parallel::for_each;
use crate::simd::{Kernel, Simd, dispatch};
use std::ops::Range;
use std::sync::OnceLock;

/// Units that one item goes through, whole blocks of [`KEYS`].
const CHUNK: usize = 16 * KEYS;

/// A block none of whose units has this share of a row's mass is not added to the estimate of the rest: f32 would not show it.
const NEGLIGIBLE: f32 = 1.0 / (1u64 << 40) as f32;

/// Some units of a head, scored for a query group.
pub(super) struct Level<'a> {
    of: &'a HeadUnits,
    /// Number of the first.
    first: usize,
    group: usize,
    /// Candidates of each unit that its score stands for.
    pub(super) counts: Vec<u32>,
    /// Blocks of `[group, KEYS]`.
    scores: Vec<f32>,
}

impl<'a> Level<'a> {
    pub(super) fn score(of: &'a HeadUnits, score: UnitScore, units: Range<usize>, counts: Vec<u32>, ask: &Ask) -> Self {
        let (first, group, n, width) = (units.start, ask.queries.len(), units.len(), of.vectors.width());
        assert!(counts.len() == n);
        let mut queries = Buffer::default();
        for (to, q) in queries.take(group * width).chunks_exact_mut(width).zip(ask.queries) {
            score.query(q, to);
        }
        let queries = queries.filled();
        let mut scores = vec![0f32; n.next_multiple_of(KEYS) * group];
        let all = Shared::new(&mut scores);
        run(ask, n, |_, units| {
            // SAFETY: a chunk's blocks are its worker's own.
            let scores = unsafe { blocks(&all, &units, group) };
            with_table!(&of.vectors, |vectors| {
                let units = first + units.start..first + units.end;
                dispatch(ask.isa, Scan { queries, group, width, vectors, units, scores });
            });
        });
        Self { of, first, group, counts, scores }
    }

    /// Units that the scores stand for.
    pub(super) fn scored(&self) -> usize {
        self.counts.iter().filter(|&&n| n > 0).count()
    }

    fn at(&self, g: usize, i: usize) -> usize {
        (i / KEYS * self.group + g) * KEYS + i % KEYS
    }

    /// Score of the unit at place `i` for query `g`.
    pub(super) fn logit(&self, g: usize, i: usize) -> f32 {
        self.scores[self.at(g, i)]
    }

    /// Changes the score of the unit at place `i` for query `g`.
    pub(super) fn add(&mut self, g: usize, i: usize, change: f32) {
        let at = self.at(g, i);
        self.scores[at] += change;
    }

    /// Adds the mass of all candidates to each query's.
    pub(super) fn masses(&self, ask: &Ask, totals: &mut [Running]) {
        let n = self.counts.len();
        let logs: Vec<f32> = (self.counts.iter().map(|&n| log(n)))
            .chain(std::iter::repeat_n(f32::NEG_INFINITY, n.next_multiple_of(KEYS) - n))
            .collect();
        let masses = Slots::new(n.div_ceil(CHUNK));
        run(ask, n, |c, units| {
            let scores = &self.scores[floats(&units, self.group)];
            masses.set(c, dispatch(ask.isa, Masses { scores, group: self.group, logs: &logs[units.start..] }));
        });
        for masses in masses.into_values() {
            totals.iter_mut().zip(&masses).for_each(|(total, mass)| *total = join(*total, *mass));
        }
    }

    /// The mean over the queries of the share that a row of each unit has. Where shares of fewer than `rows` candidates are above the
    /// smallest float, the scores keep the order of the others, below every share.
    pub(super) fn ranks(&self, ask: &Ask, totals: &[f32], rows: usize) -> Vec<f32> {
        let n = self.counts.len();
        let mut weights = vec![0f32; n.next_multiple_of(KEYS)];
        let all = Shared::new(&mut weights);
        run(ask, n, |_, units| {
            // SAFETY: a chunk's shares are its worker's own.
            let shares = unsafe { blocks(&all, &units, 1) };
            let scores = &self.scores[floats(&units, self.group)];
            dispatch(ask.isa, Shares { scores, totals, shares });
        });
        weights.truncate(n);
        let positive: usize =
            weights.iter().zip(&self.counts).filter(|(w, _)| **w > 0.0).map(|(_, &count)| count as usize).sum();
        if positive < rows {
            for (i, weight) in weights.iter_mut().enumerate().filter(|(_, weight)| **weight == 0.0) {
                *weight = (0..self.group).map(|g| self.logit(g, i) - totals[g]).fold(f32::NEG_INFINITY, f32::max);
            }
        }
        weights
    }

    /// Share of a query's mass that the candidates of the unit at place `i` have.
    pub(super) fn mass(&self, g: usize, i: usize, total: f32) -> f64 {
        f64::from((self.logit(g, i) - total + log(self.counts[i])).exp())
    }

    /// Adds up the share of each query's mass that rows left unread have, and with `means` their values by it: `unread` rows of each
    /// unit, by the unit's score and mean value.
    pub(super) fn rest(
        &self,
        ask: &Ask,
        totals: &[f32],
        mut unread: Vec<f32>,
        means: bool,
        mass: &mut [f64],
        outputs: &mut [f64],
    ) {
        let (n, value_dim) = (self.counts.len(), ask.values.shape()[3]);
        unread.resize(n.next_multiple_of(KEYS), 0.0);
        let (unread, sums) = (&unread, Slots::new(n.div_ceil(CHUNK)));
        run(ask, n, |c, units| {
            let (scores, unread) = (&self.scores[floats(&units, self.group)], &unread[units.start..]);
            let first = self.first + units.start;
            let summed = with_table!(&self.of.values, |rows| {
                let values = means.then_some(rows);
                sum(ask, |careful| Rest { scores, totals, unread, first, values, value_dim, careful })
            });
            sums.set(c, summed);
        });
        for part in sums.into_values() {
            mass.iter_mut().zip(&part.mass).for_each(|(a, &b)| *a += b);
            for (sum, part) in outputs.chunks_exact_mut(value_dim).zip(part.outputs.chunks_exact(padded(value_dim))) {
                sum.iter_mut().zip(part).for_each(|(a, &b)| *a += f64::from(b));
            }
        }
    }
}

/// Goes through chunks of `n` units, with the number of each.
fn run(ask: &Ask, n: usize, work: impl Fn(usize, Range<usize>) + Sync) {
    let chunks = n.div_ceil(CHUNK);
    let work = |c: usize| work(c, c * CHUNK..((c + 1) * CHUNK).min(n));
    match ask.parallel {
        // A cancelled call's results are never seen.
        Some(execution) => drop(for_each(execution, chunks, work)),
        None => (0..chunks).for_each(work),
    }
}

/// Where the blocks of a chunk's units are.
fn floats(units: &Range<usize>, group: usize) -> Range<usize> {
    units.start * group..units.end.next_multiple_of(KEYS) * group
}

/// # Safety
/// No two chunks' workers have the same one.
#[allow(clippy::mut_from_ref, reason = "as Shared::part")]
unsafe fn blocks<'a>(all: &Shared<'a>, units: &Range<usize>, group: usize) -> &'a mut [f32] {
    let floats = floats(units, group);
    // SAFETY: the caller's promise.
    unsafe { all.part(floats.start, floats.len()) }
}

/// The sums of a chunk.
fn sum<'a, R: Rows + Ahead>(ask: &Ask, rest: impl Fn(bool) -> Rest<'a, R>) -> Summed {
    let summed = dispatch(ask.isa, rest(false));
    // A mean that is not finite times a weight of 0 is NaN: then only units that weigh something are added.
    let fine = summed.outputs.iter().all(|x| x.is_finite());
    if fine { summed } else { dispatch(ask.isa, rest(true)) }
}

/// Rows whose followers are asked for early.
trait Ahead {
    /// The rows from number `n` on.
    fn ahead(self, n: usize) -> Self;
}

impl<T> Ahead for Strided<T> {
    #[inline(always)]
    fn ahead(self, n: usize) -> Self {
        Self { base: self.base.wrapping_offset(n as isize * self.stride), ..self }
    }
}

impl Ahead for Coded<8> {
    #[inline(always)]
    fn ahead(self, n: usize) -> Self {
        self.from(n)
    }
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

/// `scores[block][g][j]`: the product of each unit's vector with each query.
struct Scan<'a, R> {
    /// `[group, width]`.
    queries: &'a [f32],
    group: usize,
    width: usize,
    vectors: R,
    units: Range<usize>,
    scores: &'a mut [f32],
}

impl<R: Rows + Ahead> Kernel for Scan<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { queries, group, width, vectors, units, scores } = self;
        assert!(scores.len() >= units.len().next_multiple_of(KEYS) * group);
        for (b, scores) in scores.chunks_exact_mut(KEYS * group).enumerate() {
            let first = units.start + b * KEYS;
            let keys = first..(first + KEYS).min(units.end);
            let following = vectors.ahead(KEYS);
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
                        // A query that is not a number does not take the others' shares away.
                        sum = s.fma(s.max(share, s.zero()), part, sum);
                    }
                    s.store(shares.as_mut_ptr().add(j), sum);
                }
            }
        }
    }
}

/// Adds up what units left unread weigh, times their mean values.
struct Rest<'a, R> {
    scores: &'a [f32],
    totals: &'a [f32],
    /// Rows left unread of each unit.
    unread: &'a [f32],
    /// Row of the first score's unit.
    first: usize,
    values: Option<R>,
    value_dim: usize,
    careful: bool,
}

struct Summed {
    mass: Vec<f64>,
    /// `[group, padded value_dim]`.
    outputs: Vec<f32>,
}

impl<R: Rows + Ahead> Kernel for Rest<'_, R> {
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
            let following = values.ahead(KEYS);
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
