//! Functions of single numbers, over vectors: gates, activations, and the attention functions that are no softmax.

use super::tiles::check_len;
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Error, Result};

/// What [`apply`] makes of each number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Function {
    /// `e^x`.
    Exp,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// `x / (1 + e^-x)`.
    Silu,
    /// `x Phi(x)`, `Phi` the normal distribution, to within 2e-7 times `1 + |x|`.
    Gelu,
    /// `max(x, 0)^2`.
    SquaredRelu,
    /// `(1 + erf((x - mean) / (deviation sqrt 2))) / 2`; the error function is off by at most 2e-7.
    Laplace {
        /// Where the function is a half.
        mean: f32,
        /// How wide it rises.
        deviation: f32,
    },
}

impl Function {
    /// The function of that name.
    pub fn from_name(name: &str) -> Result<Self> {
        Ok(match name {
            "exp" => Self::Exp,
            "sigmoid" => Self::Sigmoid,
            "silu" => Self::Silu,
            "gelu" => Self::Gelu,
            "relu2" => Self::SquaredRelu,
            "laplace" => {
                let variance = 0.25 * std::f32::consts::FRAC_1_PI;
                Self::Laplace { mean: std::f32::consts::FRAC_1_SQRT_2, deviation: variance.sqrt() }
            }
            _ => {
                return Err(Error::value(
                    "function",
                    format!("{name:?}"),
                    "exp, sigmoid, silu, gelu, relu2 or laplace",
                ));
            }
        })
    }
}

/// Numbers of one item.
const TOGETHER: usize = 1 << 14;

/// Replaces every number by the function's value, times the number of `factor` in its place where there is one.
pub fn apply(function: Function, x: &mut [f32], factor: Option<&[f32]>, execution: &Execution) -> Result<()> {
    if let Some(factor) = factor {
        check_len("factor", factor.len(), x.len())?;
    }
    let (isa, n) = (simd::current(), x.len());
    let start = x.as_mut_ptr() as usize;
    for_each(execution, n.div_ceil(TOGETHER), |i| {
        let (first, count) = (i * TOGETHER, TOGETHER.min(n - i * TOGETHER));
        // SAFETY: items are disjoint parts of `x`, which this call borrows.
        let part = unsafe { std::slice::from_raw_parts_mut((start as *mut f32).add(first), count) };
        dispatch(isa, Apply { function, x: part, factor: factor.map(|f| &f[first..first + count]) });
    })
}

struct Apply<'a> {
    function: Function,
    x: &'a mut [f32],
    factor: Option<&'a [f32]>,
}

impl Kernel for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (n, p) = (self.x.len(), self.x.as_mut_ptr());
        let mut i = 0;
        while i < n {
            let rest = n - i;
            // SAFETY: whole vectors inside the slices, or the ragged rest by its length.
            unsafe {
                let whole = rest >= S::LANES;
                let x = if whole { s.load(p.add(i)) } else { s.load_first(p.add(i).cast_const(), rest) };
                let mut y = value(s, self.function, x);
                if let Some(factor) = self.factor {
                    let f = factor.as_ptr().add(i);
                    y = s.mul(y, if whole { s.load(f) } else { s.load_first(f, rest) });
                }
                if whole {
                    s.store(p.add(i), y);
                } else {
                    let mut last = [0f32; simd::MAX_LANES];
                    s.store(last.as_mut_ptr(), y);
                    std::ptr::copy_nonoverlapping(last.as_ptr(), p.add(i), rest);
                }
            }
            i += S::LANES;
        }
    }
}

#[inline(always)]
fn value<S: Simd>(s: S, function: Function, x: S::F32) -> S::F32 {
    match function {
        Function::Exp => s.exp(x),
        Function::Sigmoid => sigmoid(s, x),
        Function::Silu => silu(s, x),
        Function::Gelu => gelu(s, x),
        Function::SquaredRelu => {
            let above = s.max(s.zero(), x);
            s.mul(above, above)
        }
        Function::Laplace { mean, deviation } => {
            let z = s.mul(s.sub(x, s.splat(mean)), s.splat(std::f32::consts::FRAC_1_SQRT_2 / deviation));
            let half = s.splat(0.5);
            s.fma(erf(s, z), half, half)
        }
    }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(super) fn sigmoid<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let one = s.splat(1.0);
    // Beyond 88 e^-x overflows; the sigmoid is e^x there, 0 to f32.
    let e = s.exp(s.min(s.splat(88.0), s.sub(s.zero(), x)));
    let y = s.div(one, s.add(one, e));
    // `min` loses a NaN.
    s.select_less(s.zero(), s.mul(x, x), y, s.fma(x, s.splat(0.25), s.splat(0.5)))
}

/// `x sigmoid(x)`.
#[inline(always)]
pub(super) fn silu<S: Simd>(s: S, x: S::F32) -> S::F32 {
    s.mul(x, sigmoid(s, x))
}

/// `ln(1 + e^x)`, relative error of a few units in the last place.
#[inline(always)]
pub(super) fn softplus<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let (zero, two) = (s.zero(), s.splat(2.0));
    let size = s.max(s.sub(zero, x), x);
    let u = s.exp(s.sub(zero, size));
    // ln(1 + u) = 2 atanh(t), t = u / (2 + u) at most 1/3.
    let t = s.div(u, s.add(u, two));
    let t2 = s.mul(t, t);
    let mut p = s.splat(1.0 / 15.0);
    for n in [13.0f32, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        p = s.fma(p, t2, s.splat(1.0 / n));
    }
    s.fma(s.mul(two, t), p, s.max(zero, x))
}

/// `erfc(z)` for `z >= 0`, absolute error below 2e-7: Abramowitz and Stegun, 7.1.26.
#[inline(always)]
fn erfc<S: Simd>(s: S, z: S::F32) -> S::F32 {
    let one = s.splat(1.0);
    let t = s.div(one, s.fma(z, s.splat(0.327_591_1), one));
    let mut p = s.splat(1.061_405_4);
    for c in [-1.453_152_1f32, 1.421_413_7, -0.284_496_74, 0.254_829_6, 0.0] {
        p = s.fma(p, t, s.splat(c));
    }
    s.mul(p, s.exp(s.sub(s.zero(), s.mul(z, z))))
}

/// The error function, absolute error below 2e-7.
#[inline(always)]
fn erf<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let zero = s.zero();
    let y = s.sub(s.splat(1.0), erfc(s, s.max(s.sub(zero, x), x)));
    s.select_less(x, zero, s.sub(zero, y), y)
}

/// `Phi(x)`, the normal distribution.
#[inline(always)]
pub(super) fn normal<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let half = s.splat(0.5);
    s.fma(erf(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2))), half, half)
}

/// `x Phi(x)`.
#[inline(always)]
pub(super) fn gelu<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let zero = s.zero();
    let tail = erfc(s, s.mul(s.max(x, s.sub(zero, x)), s.splat(std::f32::consts::FRAC_1_SQRT_2)));
    // Half of x times erfc, which is missing from x where x is positive, and all there is where it is not.
    let part = s.mul(s.mul(x, s.splat(0.5)), tail);
    s.select_less(x, zero, part, s.sub(x, part))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;

    struct Softplus<'a>(&'a mut [f32]);

    impl Kernel for Softplus<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for x in self.0.chunks_exact_mut(S::LANES) {
                // SAFETY: the chunk has LANES floats.
                unsafe { s.store(x.as_mut_ptr(), softplus(s, s.load(x.as_ptr()))) };
            }
        }
    }

    #[test]
    fn softplus_is_precise() {
        let x: Vec<f32> = (-1600..1600).map(|i| i as f32 / 50.0).collect();
        for isa in Isa::available() {
            let mut y = x.clone();
            dispatch(isa, Softplus(&mut y));
            for (&x, y) in x.iter().zip(y) {
                let expected = f64::from(x).exp().ln_1p();
                assert!((f64::from(y) - expected).abs() <= 1e-6 * expected, "{} at {x}: {y}", isa.name());
            }
        }
    }

    #[test]
    fn functions_of_every_length_and_of_what_is_not_finite() {
        for isa in Isa::available() {
            for n in 0..40 {
                let mut x: Vec<f32> = (0..n).map(|i| i as f32 - 20.0).collect();
                let factor: Vec<f32> = (0..n).map(|i| i as f32).collect();
                dispatch(isa, Apply { function: Function::Silu, x: &mut x, factor: Some(&factor) });
                for (i, y) in x.iter().enumerate() {
                    let x = i as f64 - 20.0;
                    assert!((f64::from(*y) - x / (1.0 + (-x).exp()) * i as f64).abs() < 1e-4);
                }
            }
            let table =
                [(0.0, 0.0), (1.0, 0.841_344_7), (-1.0, -0.158_655_3), (2.5, 2.484_475_8), (-6.0, 0.0), (9.0, 9.0)];
            let mut x: Vec<f32> = table.iter().map(|&(x, _)| x).collect();
            x.push(f32::NAN);
            dispatch(isa, Apply { function: Function::Gelu, x: &mut x, factor: None });
            for (y, (at, expected)) in x.iter().zip(table) {
                assert!((y - expected).abs() <= 3e-7 * (1.0 + f32::abs(at)), "{at}: {y}");
            }
            assert!(x[table.len()].is_nan());
            let mut x = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0];
            dispatch(isa, Apply { function: Function::Sigmoid, x: &mut x, factor: None });
            assert!(x[0].is_nan() && x[1] == 1.0 && x[2] < 1e-37 && x[3] == 0.5, "{x:?}");
        }
    }
}
