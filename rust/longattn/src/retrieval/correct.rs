//! What a sample of rows says about an estimate of all of them: the correction, its variance, and the shape of its error.
//!
//! A row of weight `e` and value `v`, which the estimate has with weight `w` and value `u`, was drawn with probability `p`. About a
//! centre `c`, the estimate's output, it adds `r = e (v - c) - w (u - c)` to the numerator and `y = e - w` to the mass, so
//!
//! ```text
//! mass        Z = estimate's mass + sum y / p
//! correction  d = (sum r / p) / Z                                        output = c + d
//! variance    sum (1 - p) / p^2 |r - d y|^2 / Z^2                        of draws that do not depend on each other
//! ```
//! As `d` is known only afterwards, the sums that the square is made of are kept. [`SKETCHES`] sums of some of the terms each, with
//! random signs, have the error's covariance: from their products follows how many directions it has.

use super::sample::Key;
use crate::dense::rows::{Row, Rows, widen_row};
use crate::simd::{Kernel, Simd};

/// Sums with random signs, a power of two.
pub(super) const SKETCHES: usize = 16;

/// Rows that go through keys, then weights, then values.
const BLOCK: usize = 64;

/// Rows whose memory is asked for ahead of their use.
const AHEAD: usize = 6;

/// Rows of a sample with the probability that each was drawn with.
#[derive(Clone, Debug, Default)]
pub(super) struct Sample {
    /// Ascending.
    pub(super) rows: Vec<u32>,
    pub(super) probabilities: Vec<f32>,
}

/// Sums over rows of a sample for one query.
#[derive(Clone, Debug)]
pub(super) struct Sums {
    /// `sum r / p`.
    pub(super) numerator: Vec<f32>,
    /// `sum y / p`.
    mass: f64,
    /// The same two of the rows that were certain.
    certain: Vec<f32>,
    certain_mass: f64,
    /// `sum e / p`: the mass of all candidates by the sample alone.
    pub(super) drawn: f64,
    /// `sum e`: that of the rows read.
    pub(super) read: f64,
    /// With `b = (1 - p) / p^2`: `sum b |r|^2`, `sum b y r`, `sum b y^2`.
    rr: f64,
    yr: Vec<f32>,
    yy: f64,
    /// `sum (1 - p) (b |r|^2)^2`.
    fourth: f64,
    /// `[SKETCHES, dim]` and `[SKETCHES]`: `sum +-sqrt(b) r` and the same of `y`.
    sketches: Vec<f32>,
    sketches_y: [f32; SKETCHES],
}

impl Sums {
    pub(super) fn new(dim: usize) -> Self {
        Self {
            numerator: vec![0.0; dim],
            mass: 0.0,
            certain: vec![0.0; dim],
            certain_mass: 0.0,
            drawn: 0.0,
            read: 0.0,
            rr: 0.0,
            yr: vec![0.0; dim],
            yy: 0.0,
            fourth: 0.0,
            sketches: vec![0.0; SKETCHES * dim],
            sketches_y: [0.0; SKETCHES],
        }
    }

    pub(super) fn join(&mut self, other: &Self) {
        let add = |to: &mut [f32], from: &[f32]| to.iter_mut().zip(from).for_each(|(a, b)| *a += b);
        add(&mut self.numerator, &other.numerator);
        add(&mut self.certain, &other.certain);
        add(&mut self.yr, &other.yr);
        add(&mut self.sketches, &other.sketches);
        add(&mut self.sketches_y, &other.sketches_y);
        self.mass += other.mass;
        self.certain_mass += other.certain_mass;
        self.drawn += other.drawn;
        self.read += other.read;
        self.rr += other.rr;
        self.yy += other.yy;
        self.fourth += other.fourth;
    }

    /// What follows for an estimate of mass `known`, in the unit of the weights, steady rows included, `steady` of it.
    pub(super) fn correction(&self, known: f64, steady: f64) -> Correction {
        let mass = known + self.mass;
        let over = |sums: &[f32], mass: f64| sums.iter().map(|x| (f64::from(*x) / mass) as f32).collect::<Vec<f32>>();
        let shift = over(&self.numerator, mass);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
        let square = dot(&shift, &shift);
        let unit = mass * mass;
        let variance = (self.rr - 2.0 * dot(&shift, &self.yr) + square * self.yy) / unit;
        // What is not a number stays so.
        let variance = if variance < 0.0 { 0.0 } else { variance };
        // Sum of the squared products of any two sketches: the trace of the squared covariance, but for those that are missing.
        let dim = shift.len();
        let mut sketches = self.sketches.clone();
        for (sketch, y) in sketches.chunks_exact_mut(dim.max(1)).zip(self.sketches_y) {
            sketch.iter_mut().zip(&shift).for_each(|(x, d)| *x -= d * y);
        }
        let mut squares = 0.0;
        for (i, a) in sketches.chunks_exact(dim.max(1)).enumerate() {
            for b in sketches.chunks_exact(dim.max(1)).skip(i + 1) {
                squares += 2.0 * (dot(a, b) / unit).powi(2);
            }
        }
        let squares = squares * SKETCHES as f64 / (SKETCHES - 1) as f64;
        let directions =
            if squares > 0.0 { (variance * variance / squares).clamp(1.0, dim.max(1) as f64) } else { 1.0 };
        let freedom = if self.fourth > 0.0 { 2.0 * self.rr * self.rr / self.fourth } else { f64::INFINITY };
        let certain = over(&self.certain, known + self.certain_mass);
        let finite = variance.is_finite() && shift.iter().chain(&certain).all(|x| x.is_finite());
        // A mass that the correction all but takes away is an estimate that says nothing.
        let mass_says = mass > 0.1 * (steady + self.drawn) && mass <= f64::from(f32::MAX);
        Correction { certain, shift, mass, variance, directions, freedom, sound: finite && mass_says }
    }
}

/// An estimate's correction by a sample, for one query.
#[derive(Clone, Debug)]
pub(super) struct Correction {
    /// To add to the estimate's output.
    pub(super) shift: Vec<f32>,
    /// The part of it that the rows read for certain make up, without noise.
    certain: Vec<f32>,
    /// Of all rows, in the unit of the weights.
    pub(super) mass: f64,
    /// Expected squared norm of the error that is left.
    pub(super) variance: f64,
    /// How many directions of equal variance the error is like.
    pub(super) directions: f64,
    /// How many squared normal numbers the estimate of the variance is like.
    pub(super) freedom: f64,
    /// Whether the numbers mean anything.
    pub(super) sound: bool,
}

impl Correction {
    /// As much of the correction as its noise does not explain (James and Stein), what is certain of it in full.
    pub(super) fn shrunken(&self) -> Vec<f32> {
        let square: f64 = self.shift.iter().zip(&self.certain).map(|(d, c)| f64::from(d - c).powi(2)).sum();
        let keep = if square > 0.0 { (1.0 - self.variance / square).max(0.0) as f32 } else { 0.0 };
        self.shift.iter().zip(&self.certain).map(|(d, c)| c + keep * (d - c)).collect()
    }
}

/// Reads some rows of a sample for a query group.
pub(super) struct Correct<'a, R> {
    pub(super) k: R,
    pub(super) v: R,
    pub(super) dim: usize,
    pub(super) value_dim: usize,
    /// `[group, padded_dim]`, times the softmax scale, zeros beyond `dim`.
    pub(super) queries: &'a [f32],
    pub(super) padded_dim: usize,
    /// Log of the unit of the weights, for each query.
    pub(super) log_unit: &'a [f32],
    pub(super) rows: &'a [u32],
    pub(super) probabilities: &'a [f32],
    /// Each row's weight in the estimate, for each query.
    pub(super) estimated: &'a [&'a [f32]],
    /// What stands for each row's value in the estimate.
    pub(super) stand_ins: &'a [&'a [f32]],
    /// `[group, padded_value_dim]`: the estimate's output, zeros beyond `value_dim`.
    pub(super) centres: &'a [f32],
    pub(super) padded_value_dim: usize,
    pub(super) key: Key,
}

/// A row of a sample.
#[derive(Clone, Copy)]
struct Drawn {
    /// `1 - p`, `1 / p`, `(1 - p) / p^2`, and the root of the last with the row's sign.
    left: f32,
    inverse: f32,
    b: f32,
    signed: f32,
    sketch: usize,
}

impl<R: Rows> Kernel for Correct<'_, R> {
    type Output = Vec<Sums>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<Sums> {
        let (group, width) = (self.log_unit.len(), self.padded_value_dim);
        assert!(self.queries.len() >= group * self.padded_dim && self.padded_dim.is_multiple_of(S::LANES));
        assert!(self.centres.len() >= group * width && width.is_multiple_of(S::LANES) && width >= self.value_dim);
        assert!(self.probabilities.len() == self.rows.len() && self.stand_ins.len() == self.rows.len());
        assert!(self.estimated.iter().all(|weights| weights.len() == self.rows.len()));
        assert!(self.stand_ins.iter().all(|value| value.len() == self.value_dim));
        let mut sums = vec![Sums::new(width); group];
        let mut key_row = vec![0f32; self.padded_dim];
        let (mut value, mut stand_in) = (vec![0f32; width], vec![0f32; width]);
        let mut exact = vec![0f32; group * BLOCK];
        for start in (0..self.rows.len()).step_by(BLOCK) {
            let n = BLOCK.min(self.rows.len() - start);
            for j in 0..n {
                self.ask(start + j + AHEAD);
                let row = self.k.row(self.rows[start + j] as usize);
                // SAFETY: the caller vouches for the rows; the buffer has the padded length.
                unsafe { widen_row(s, row, self.dim, key_row.as_mut_ptr(), self.padded_dim) };
                self.dots(s, &key_row, j, &mut exact);
            }
            self.weigh(s, &mut exact);
            for j in 0..n {
                let row = self.v.row(self.rows[start + j] as usize);
                // SAFETY: as above, and a stand-in has value_dim numbers.
                unsafe {
                    widen_row(s, row, self.value_dim, value.as_mut_ptr(), width);
                    widen_row(s, self.stand_ins[start + j].as_ptr(), self.value_dim, stand_in.as_mut_ptr(), width);
                }
                // Codes decode to something behind their row, too.
                value[self.value_dim..].fill(0.0);
                let drawn = self.drawn(start + j);
                for (g, sums) in sums.iter_mut().enumerate() {
                    let weights = [exact[g * BLOCK + j], self.estimated[g][start + j]];
                    self.add(s, g, drawn, weights, &value, &stand_in, sums);
                }
            }
        }
        sums
    }
}

impl<R: Rows> Correct<'_, R> {
    /// Asks for a row's memory.
    #[inline(always)]
    fn ask(&self, i: usize) {
        if let Some(&row) = self.rows.get(i) {
            self.k.row(row as usize).prefetch(self.dim);
            self.v.row(row as usize).prefetch(self.value_dim);
        }
    }

    /// `logits[g][j]` of a key, four queries at a time.
    #[inline(always)]
    fn dots<S: Simd>(&self, s: S, key: &[f32], j: usize, logits: &mut [f32]) {
        const TOGETHER: usize = 4;
        let group = self.log_unit.len();
        for first in (0..group).step_by(TOGETHER) {
            let n = TOGETHER.min(group - first);
            let mut acc = [s.zero(); TOGETHER];
            for d in (0..self.padded_dim).step_by(S::LANES) {
                // SAFETY: key and queries have padded_dim floats each; queries beyond the last are the last again.
                unsafe {
                    let x = s.load(key.as_ptr().add(d));
                    for (i, acc) in acc.iter_mut().enumerate() {
                        let g = first + i.min(n - 1);
                        *acc = s.fma(s.load(self.queries.as_ptr().add(g * self.padded_dim + d)), x, *acc);
                    }
                }
            }
            let [sums] = s.sums([acc]);
            for (i, sum) in sums.into_iter().enumerate().take(n) {
                logits[(first + i) * BLOCK + j] = sum;
            }
        }
    }

    /// Turns the logits of a block into weights.
    #[inline(always)]
    fn weigh<S: Simd>(&self, s: S, logits: &mut [f32]) {
        for (row, &unit) in logits.chunks_exact_mut(BLOCK).zip(self.log_unit) {
            for chunk in row.chunks_exact_mut(S::LANES) {
                // SAFETY: the chunk has LANES floats.
                unsafe { s.store(chunk.as_mut_ptr(), s.exp(s.sub(s.load(chunk.as_ptr()), s.splat(unit)))) };
            }
        }
    }

    /// What a row's probability makes of its terms, for all queries.
    #[inline(always)]
    fn drawn(&self, i: usize) -> Drawn {
        let p = self.probabilities[i];
        let inverse = 1.0 / p;
        let b = (1.0 - p) * inverse * inverse;
        let bits = self.key.hash(self.rows[i]);
        let sign = if bits & SKETCHES as u32 == 0 { 1.0 } else { -1.0 };
        Drawn { left: 1.0 - p, inverse, b, signed: sign * b.sqrt(), sketch: bits as usize % SKETCHES }
    }

    /// Adds a drawn row to the sums of query `g`.
    #[inline(always)]
    fn add<S: Simd>(
        &self,
        s: S,
        g: usize,
        drawn: Drawn,
        [e, w]: [f32; 2],
        value: &[f32],
        stand_in: &[f32],
        sums: &mut Sums,
    ) {
        let width = self.padded_value_dim;
        let Drawn { left, inverse, b, signed, sketch } = drawn;
        let y = e - w;
        let to = &mut sums.sketches[sketch * width..][..width];
        let (ve, vw, vy) = (s.splat(e), s.splat(-w), s.splat(-y));
        let (vinverse, vby, vsigned) = (s.splat(inverse), s.splat(b * y), s.splat(signed));
        let mut square = s.zero();
        for d in (0..width).step_by(S::LANES) {
            // SAFETY: values, sums and centres have `width` floats, a multiple of LANES.
            unsafe {
                let centre = s.load(self.centres.as_ptr().add(g * width + d));
                let r = s.fma(vw, s.load(stand_in.as_ptr().add(d)), s.mul(vy, centre));
                let r = s.fma(ve, s.load(value.as_ptr().add(d)), r);
                let numerator = sums.numerator.as_mut_ptr().add(d);
                s.store(numerator, s.fma(vinverse, r, s.load(numerator)));
                if b == 0.0 {
                    let certain = sums.certain.as_mut_ptr().add(d);
                    s.store(certain, s.add(r, s.load(certain)));
                } else {
                    square = s.fma(r, r, square);
                    let yr = sums.yr.as_mut_ptr().add(d);
                    s.store(yr, s.fma(vby, r, s.load(yr)));
                    let sketch = to.as_mut_ptr().add(d);
                    s.store(sketch, s.fma(vsigned, r, s.load(sketch)));
                }
            }
        }
        let (e, y, inverse) = (f64::from(e), f64::from(y), f64::from(inverse));
        sums.mass += y * inverse;
        sums.drawn += e * inverse;
        sums.read += e;
        if b == 0.0 {
            sums.certain_mass += y;
        } else {
            let term = f64::from(b) * f64::from(s.sum(square));
            sums.rr += term;
            sums.fourth += f64::from(left) * term * term;
            sums.yy += f64::from(b) * y * y;
            sums.sketches_y[sketch] += signed * y as f32;
        }
    }
}
