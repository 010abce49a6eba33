//! Functions of rows of one head: gates made of what a projection gave, and norms of outputs.

use super::pointwise::{sigmoid, softplus};
use super::tiles::{Place, load, store};
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Error, Result, TensorView, TensorViewMut};
use std::sync::atomic::{AtomicBool, Ordering};

/// What [`map_rows`] makes of a row.
#[derive(Clone, Copy)]
pub enum RowMap<'a> {
    /// `ln max(x^2 + 2 r x (1 - x), floor)` of gates `x` and of `r`, gates from 0 to 1.
    Refine {
        /// What gates are at least.
        floor: f32,
        /// `r`, in the shape of the rows.
        by: TensorView<'a>,
    },
    /// `-rate softplus(x + bias)`, or `bound sigmoid(rate (x + bias))`.
    Decay {
        /// Of the heads, `[heads]`.
        rates: &'a [f32],
        /// Of the heads' channels, `[heads, dim]`; empty for none.
        bias: &'a [f32],
        /// At most 0.
        bound: Option<f32>,
    },
    /// `y / sqrt(mean of squares + eps)` of `y = e^log x`, less its mean where it is `centred`, times `gain` plus `shift`. A row of
    /// zeros stays one.
    Norm {
        /// Whether the mean is taken away.
        centred: bool,
        /// Added to the mean of squares.
        eps: f32,
        /// `[heads, dim]`; empty for none.
        gain: &'a [f32],
        /// Likewise.
        shift: &'a [f32],
        /// Of rows, `[batch, heads or a divisor of them, length]`.
        logs: &'a [f64],
    },
    /// `e^log x`.
    Scale {
        /// Of rows, likewise.
        logs: &'a [f64],
    },
}

/// Rows of one item.
const ROWS: usize = 256;

/// Writes the function of every row of `x` to `out`, which has its shape.
pub fn map_rows(map: RowMap, x: TensorView, out: &mut TensorViewMut, execution: &Execution) -> Result<()> {
    let [batch, heads, length, dim] = x.shape();
    let expect = |name: &'static str, got: usize, expected: usize, optional: bool| {
        if got == expected || (optional && got == 0) {
            Ok(())
        } else {
            Err(Error::value(name, format!("{got} numbers"), expected))
        }
    };
    if out.shape() != x.shape() {
        return Err(Error::value("out", format!("shape {:?}", out.shape()), format!("{:?}", x.shape())));
    }
    match map {
        RowMap::Refine { by, .. } => {
            if by.shape() != x.shape() {
                return Err(Error::value("r", format!("shape {:?}", by.shape()), format!("{:?}", x.shape())));
            }
        }
        RowMap::Decay { rates, bias, .. } => {
            expect("rates", rates.len(), heads, false)?;
            expect("bias", bias.len(), heads * dim, true)?;
        }
        RowMap::Norm { gain, shift, logs, .. } => {
            expect("gain", gain.len(), heads * dim, true)?;
            expect("shift", shift.len(), heads * dim, true)?;
            check_logs(logs, x)?;
        }
        RowMap::Scale { logs } => check_logs(logs, x)?,
    }
    let bad = [AtomicBool::new(false), AtomicBool::new(false)];
    let (isa, pieces, out) = (simd::current(), length.div_ceil(ROWS), &*out);
    for_each(execution, batch * heads * pieces, |i| {
        let (pair, first) = (i / pieces, i % pieces * ROWS);
        let at = [pair / heads, pair % heads, first];
        dispatch(isa, Part { map, x, out, at, bad: &bad });
    })?;
    for (bad, name) in bad.into_iter().zip(["gate", "refine"]) {
        if bad.into_inner() {
            return Err(Error::value(name, "a number outside 0 to 1", "numbers from 0 to 1"));
        }
    }
    Ok(())
}

/// Heads that logarithms of rows are of.
fn log_heads(logs: &[f64], x: TensorView) -> usize {
    let [batch, _, length, _] = x.shape();
    logs.len().checked_div(batch * length).unwrap_or(0)
}

fn check_logs(logs: &[f64], x: TensorView) -> Result<()> {
    let [batch, heads, length, _] = x.shape();
    let of = log_heads(logs, x);
    if batch * heads * length == 0 || (of > 0 && heads % of == 0 && logs.len() == batch * of * length) {
        return Ok(());
    }
    Err(Error::value("logs", format!("{} numbers", logs.len()), format!("{} or a divisor", batch * heads * length)))
}

struct Part<'a> {
    map: RowMap<'a>,
    x: TensorView<'a>,
    out: &'a TensorViewMut<'a>,
    at: [usize; 3],
    /// Whether gates are outside their range, and what refines them.
    bad: &'a [AtomicBool; 2],
}

impl Kernel for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { map, x, out, at: [batch, head, first], bad } = self;
        let [_, _, length, dim] = x.shape();
        let width = dim.next_multiple_of(S::LANES);
        let place = Place { batch, head, channel: 0, channels: dim };
        let (mut row, mut other) = (vec![0f32; width], vec![0f32; width]);
        let of_head = |x: &'_ [f32], to: &mut [f32], default: f32| {
            to.fill(default);
            if !x.is_empty() {
                to[..dim].copy_from_slice(&x[head * dim..][..dim]);
            }
        };
        let log_of = |logs: &[f64], at: usize| {
            let of = log_heads(logs, x);
            logs[(batch * of + head / (x.shape()[1] / of)) * length + at]
        };
        let mut shifts = vec![0f32; width];
        match map {
            RowMap::Refine { .. } | RowMap::Scale { .. } => {}
            RowMap::Decay { bias, .. } => of_head(bias, &mut shifts, 0.0),
            RowMap::Norm { gain, shift, .. } => {
                of_head(gain, &mut other, 1.0);
                of_head(shift, &mut shifts, 0.0);
            }
        }
        for at in first..length.min(first + ROWS) {
            load(s, &x, place, at..at + 1, &mut row, width);
            match map {
                RowMap::Refine { floor, by } => {
                    load(s, &by, place, at..at + 1, &mut other, width);
                    for (x, r) in row[..dim].iter_mut().zip(&other) {
                        for (i, x) in [*x, *r].into_iter().enumerate() {
                            // NaN is in no range.
                            if !(0.0..=1.0).contains(&x) {
                                bad[i].store(true, Ordering::Relaxed);
                            }
                        }
                        *x = (*x * (*x + 2.0 * r * (1.0 - *x))).max(floor).ln();
                    }
                }
                RowMap::Decay { rates, bound, .. } => {
                    let rate = s.splat(rates[head]);
                    for (x, shift) in row.chunks_exact_mut(S::LANES).zip(shifts.chunks_exact(S::LANES)) {
                        // SAFETY: both chunks have LANES floats.
                        unsafe {
                            let sum = s.add(s.load(x.as_ptr()), s.load(shift.as_ptr()));
                            let y = match bound {
                                Some(bound) => s.mul(s.splat(bound), sigmoid(s, s.mul(rate, sum))),
                                None => s.sub(s.zero(), s.mul(rate, softplus(s, sum))),
                            };
                            s.store(x.as_mut_ptr(), y);
                        }
                    }
                }
                RowMap::Scale { logs } => {
                    // In two steps, as the factor may be out of a float's range where the product is not.
                    let factor = (0.5 * log_of(logs, at)).exp() as f32;
                    for x in &mut row[..dim] {
                        *x = *x * factor * factor;
                    }
                }
                RowMap::Norm { centred, eps, logs, .. } => {
                    if centred {
                        let mean = row[..dim].iter().sum::<f32>() / dim as f32;
                        for x in &mut row[..dim] {
                            *x -= mean;
                        }
                    }
                    let mut squares = s.zero();
                    for x in row.chunks_exact(S::LANES) {
                        // SAFETY: the chunk has LANES floats.
                        let x = unsafe { s.load(x.as_ptr()) };
                        squares = s.fma(x, x, squares);
                    }
                    let mut sum = f64::from(s.sum(squares));
                    if !(1e-30..=f64::from(f32::MAX)).contains(&sum) {
                        // Squares that a float may not hold.
                        sum = row[..dim].iter().map(|x| f64::from(*x).powi(2)).sum();
                    }
                    let added = if eps == 0.0 { 0.0 } else { f64::from(eps) * (-2.0 * log_of(logs, at)).exp() };
                    let mean = sum / dim as f64 + added;
                    // In f64: the factor of a row of tiny numbers is no float.
                    let factor = if mean == 0.0 { 0.0 } else { 1.0 / mean.sqrt() };
                    for ((x, gain), shift) in row.iter_mut().zip(&other).zip(&shifts) {
                        *x = (f64::from(*x) * factor) as f32 * gain + shift;
                    }
                }
            }
            store(out, place, at..at + 1, &row, width);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_any_width() {
        for dim in [1, 7, 16, 33] {
            let x: Vec<f32> = (0..3 * dim).map(|i| (i as f32 * 0.37).sin() * 0.5 + 0.5).collect();
            let r: Vec<f32> = (0..3 * dim).map(|i| (i as f32 * 0.71).cos() * 0.5 + 0.5).collect();
            let shape = [1, 1, 3, dim];
            let view = |x| TensorView::new(x, shape).unwrap();
            let mut out = vec![0f32; 3 * dim];
            let run = |map, out: &mut Vec<f32>| {
                let mut to = TensorViewMut::new(out, shape).unwrap();
                map_rows(map, view(&x), &mut to, &Execution::default()).unwrap();
            };
            run(RowMap::Refine { floor: 1e-6, by: view(&r) }, &mut out);
            for ((x, r), y) in x.iter().zip(&r).zip(&out) {
                let (x, r) = (f64::from(*x), f64::from(*r));
                let expected = ((1.0 - r) * x * x + r * (1.0 - (1.0 - x) * (1.0 - x))).max(1e-6).ln();
                assert!((f64::from(*y) - expected).abs() < 1e-5 * (1.0 - expected), "{y} {expected}");
            }
            let norm = |eps, logs| RowMap::Norm { centred: false, eps, gain: &[], shift: &[], logs };
            run(norm(0.0, &[0.0; 3]), &mut out);
            for row in out.chunks(dim) {
                let mean = row.iter().map(|x| x * x).sum::<f32>() / dim as f32;
                assert!((mean - 1.0).abs() < 1e-4, "{mean}");
            }
            // Rows of another size beside the same eps.
            let logs = [-4.0f64, 0.0, 4.0];
            run(norm(0.5, &logs), &mut out);
            for ((x, y), log) in x.chunks(dim).zip(out.chunks(dim)).zip(logs) {
                let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / dim as f64;
                let factor = log.exp() / (mean * (2.0 * log).exp() + 0.5).sqrt();
                for (x, y) in x.iter().zip(y) {
                    assert!((f64::from(*y) - f64::from(*x) * factor).abs() < 1e-5, "{y}");
                }
            }
            run(RowMap::Scale { logs: &logs }, &mut out);
            for (i, (x, y)) in x.iter().zip(&out).enumerate() {
                let expected = f64::from(*x) * logs[i / dim].exp();
                assert!((f64::from(*y) - expected).abs() < 1e-6 * expected.abs() + 1e-9, "{y} {expected}");
            }
            run(RowMap::Decay { rates: &[2.0], bias: &[], bound: Some(-5.0) }, &mut out);
            for (x, y) in x.iter().zip(&out) {
                assert!((y + 5.0 / (1.0 + (-2.0 * x).exp())).abs() < 1e-5);
            }
        }
    }
}
