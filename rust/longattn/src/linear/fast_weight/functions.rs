//! Activations, norms, losses and read-outs of a memory, over padded rows.

use super::{Activation, Loss};
use crate::linear::pointwise::{gelu, normal, sigmoid, silu};
use crate::linear::recurrence::{add_up, dot, scale_row};
use crate::simd::Simd;

/// `to = act(x)`.
#[inline(always)]
pub(super) fn activate<S: Simd>(s: S, activation: Activation, x: &[f32], to: &mut [f32]) {
    for (x, to) in x.chunks_exact(S::LANES).zip(to.chunks_exact_mut(S::LANES)) {
        // SAFETY: both chunks have LANES floats.
        unsafe {
            let x = s.load(x.as_ptr());
            let y = match activation {
                Activation::Silu => silu(s, x),
                Activation::Gelu => gelu(s, x),
            };
            s.store(to.as_mut_ptr(), y);
        }
    }
}

/// `to = gradient act'(x)`.
#[inline(always)]
pub(super) fn activate_back<S: Simd>(s: S, activation: Activation, x: &[f32], gradient: &[f32], to: &mut [f32]) {
    let one = s.splat(1.0);
    let parts = x.chunks_exact(S::LANES).zip(gradient.chunks_exact(S::LANES)).zip(to.chunks_exact_mut(S::LANES));
    for ((x, gradient), to) in parts {
        // SAFETY: the chunks have LANES floats.
        unsafe {
            let x = s.load(x.as_ptr());
            let slope = match activation {
                Activation::Silu => {
                    let y = sigmoid(s, x);
                    s.mul(y, s.fma(x, s.sub(one, y), one))
                }
                Activation::Gelu => {
                    let density = s.exp(s.mul(s.mul(x, x), s.splat(-0.5)));
                    let root = s.splat(std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2 * 0.5);
                    s.fma(s.mul(x, root), density, normal(s, x))
                }
            };
            s.store(to.as_mut_ptr(), s.mul(s.load(gradient.as_ptr()), slope));
        }
    }
}

/// A row less its mean, over its deviation, zeros beyond its `n` numbers. Returns the inverse of the deviation.
#[inline(always)]
pub(super) fn standardise<S: Simd>(s: S, row: &mut [f32], n: usize, eps: f32) -> f32 {
    row[n..].fill(0.0);
    let mean = add_up(s, row) / n as f32;
    for x in &mut row[..n] {
        *x -= mean;
    }
    let inverse = 1.0 / (dot(s, row, row) / n as f32 + eps).sqrt();
    scale_row(s, row, inverse);
    inverse
}

/// The gradient through [`standardise`], of which `row` is the result.
#[inline(always)]
pub(super) fn standardise_back<S: Simd>(s: S, row: &[f32], n: usize, inverse: f32, gradient: &mut [f32]) {
    gradient[n..].fill(0.0);
    let mean = add_up(s, gradient) / n as f32;
    let along = dot(s, gradient, row) / n as f32;
    for (g, x) in gradient[..n].iter_mut().zip(row) {
        *g = (*g - mean - x * along) * inverse;
    }
}

/// Turns a row of errors, zeros beyond its `n` numbers, into the gradient of the loss.
#[inline(always)]
pub(super) fn descend<S: Simd>(s: S, loss: Loss, threshold: f32, row: &mut [f32], n: usize) {
    match loss {
        Loss::Square { factor } => {
            if factor != 0.5 {
                scale_row(s, row, 2.0 * factor);
            }
        }
        Loss::Power { exponent, steepness } => {
            let (one, two) = (s.splat(1.0), s.splat(2.0));
            let raise = 0.5 * (exponent - 1.0);
            let mut sizes = [0f32; crate::simd::MAX_LANES];
            for chunk in row.chunks_exact_mut(S::LANES) {
                // SAFETY: the chunk has LANES floats, `sizes` has at least as many.
                unsafe {
                    let e = s.load(chunk.as_ptr());
                    let sign = s.sub(s.mul(two, sigmoid(s, s.mul(s.splat(2.0 * steepness), e))), one);
                    let mut size = s.fma(e, e, s.splat(1e-6));
                    if raise != 1.0 {
                        s.store(sizes.as_mut_ptr(), size);
                        for x in &mut sizes[..S::LANES] {
                            *x = x.powf(raise);
                        }
                        size = s.load(sizes.as_ptr());
                    }
                    s.store(chunk.as_mut_ptr(), s.mul(s.splat(exponent), s.mul(sign, size)));
                }
            }
            row[n..].fill(0.0);
        }
        Loss::HuberSigns | Loss::HuberLength => {
            let length = dot(s, row, row).sqrt();
            if length > threshold {
                if loss == Loss::HuberLength {
                    scale_row(s, row, threshold / length);
                } else {
                    for x in row {
                        *x = if *x == 0.0 { 0.0 } else { threshold.copysign(*x) };
                    }
                }
            }
        }
        Loss::HuberEach => {
            for x in row {
                // NaN stays what it is.
                if x.abs() > threshold {
                    *x = threshold.copysign(*x);
                }
            }
        }
    }
}

/// Sum of the `exponent`-th powers of magnitudes; beyond vectors in f64.
#[inline(always)]
pub(super) fn power_sum<S: Simd>(s: S, x: &[f32], exponent: f32) -> f32 {
    let mut total = 0f64;
    if exponent == 4.0 {
        for part in x.chunks(64 * S::LANES) {
            let mut sum = s.zero();
            for chunk in part.chunks_exact(S::LANES) {
                // SAFETY: the chunk has LANES floats.
                let x = unsafe { s.load(chunk.as_ptr()) };
                let squares = s.mul(x, x);
                sum = s.fma(squares, squares, sum);
            }
            total += f64::from(s.sum(sum));
        }
    } else {
        for x in x {
            total += f64::from(x.abs().powf(exponent));
        }
    }
    total as f32
}

/// Softmax down the columns of rows of `wide` numbers, times `factor`.
#[inline(always)]
pub(super) fn softmax_columns<S: Simd>(s: S, rows: &mut [f32], wide: usize, factor: f32) {
    let n = rows.len() / wide;
    for column in (0..wide).step_by(S::LANES) {
        // SAFETY: each of the n rows has `wide` floats, a multiple of LANES.
        unsafe {
            let at = rows.as_mut_ptr().add(column);
            let mut most = s.splat(f32::NEG_INFINITY);
            for row in 0..n {
                most = s.max(s.load(at.add(row * wide)), most);
            }
            let mut sum = s.zero();
            for row in 0..n {
                let x = s.exp(s.sub(s.load(at.add(row * wide)), most));
                s.store(at.add(row * wide), x);
                sum = s.add(sum, x);
            }
            let by = s.div(s.splat(factor), sum);
            for row in 0..n {
                s.store(at.add(row * wide), s.mul(s.load(at.add(row * wide)), by));
            }
        }
    }
}
