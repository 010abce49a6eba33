//! `x * Phi(x)`, `Phi` the normal distribution.

use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::Result;
use std::sync::Mutex;

/// Numbers of one item.
const TOGETHER: usize = 1 << 14;

/// Puts `x * Phi(x)` in the place of each number `x`, to within 2e-7 times `1 + |x|`.
pub fn gelu(x: &mut [f32], execution: &Execution) -> Result<()> {
    let isa = simd::current();
    let parts: Vec<_> = x.chunks_mut(TOGETHER).map(Mutex::new).collect();
    for_each(execution, parts.len(), |i| {
        dispatch(isa, Gelu(&mut parts[i].lock().unwrap_or_else(|e| e.into_inner())));
    })
}

struct Gelu<'a>(&'a mut [f32]);

impl Kernel for Gelu<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut chunks = self.0.chunks_exact_mut(S::LANES);
        for chunk in &mut chunks {
            // SAFETY: the chunk holds a whole vector.
            unsafe { s.store(chunk.as_mut_ptr(), of(s, s.load(chunk.as_ptr()))) };
        }
        let rest = chunks.into_remainder();
        let mut tail = [0f32; simd::MAX_LANES];
        tail[..rest.len()].copy_from_slice(rest);
        // SAFETY: the buffer holds a whole vector.
        unsafe { s.store(tail.as_mut_ptr(), of(s, s.load(tail.as_ptr()))) };
        rest.copy_from_slice(&tail[..rest.len()]);
    }
}

/// By erfc(z) = p(1 / (1 + c z)) e^(-z^2), z >= 0, a polynomial p of degree 5 (Abramowitz and Stegun 7.1.26; off by 1.5e-7).
#[inline(always)]
fn of<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let (zero, one) = (s.zero(), s.splat(1.0));
    let size = s.max(x, s.sub(zero, x));
    let z = s.mul(size, s.splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = s.div(one, s.fma(z, s.splat(0.327_591_1), one));
    let mut p = s.splat(1.061_405_4);
    for c in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        p = s.fma(p, t, s.splat(c));
    }
    let tail = s.mul(s.mul(p, t), s.exp(s.sub(zero, s.mul(z, z))));
    // Half of x times erfc, which is missing from x where x is positive, and all there is where it is not.
    let part = s.mul(s.mul(x, s.splat(0.5)), tail);
    s.select_less(x, zero, part, s.sub(x, part))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;

    #[test]
    fn known_values() {
        let table = [(0.0, 0.0), (1.0, 0.841_344_7), (-1.0, -0.158_655_3), (2.5, 2.484_475_8), (-6.0, 0.0), (9.0, 9.0)];
        for isa in Isa::available() {
            simd::set_current(isa).unwrap();
            let mut x: Vec<f32> = (0..40).map(|i| table[i % table.len()].0).collect();
            gelu(&mut x, &Execution::default()).unwrap();
            for (i, x) in x.iter().enumerate() {
                let (at, expected) = table[i % table.len()];
                assert!((x - expected).abs() <= 3e-7 * (1.0 + f32::abs(at)), "{at}: {x}");
            }
        }
    }

    #[test]
    fn nan_stays() {
        let mut x = [f32::NAN];
        gelu(&mut x, &Execution::default()).unwrap();
        assert!(x[0].is_nan());
    }
}
