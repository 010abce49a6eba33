//! Arithmetic on rows of floats whose length is a multiple of `LANES`.

use crate::simd::Simd;

/// Replaces every vector `x` of a row whose length is a multiple of `LANES`.
macro_rules! each {
    ($s:ident, $row:expr, $x:ident => $y:expr) => {
        for chunk in $row.chunks_exact_mut(S::LANES) {
            // SAFETY: the chunk has LANES floats.
            let $x = unsafe { $s.load(chunk.as_ptr()) };
            let y = $y;
            // SAFETY: as above.
            unsafe { $s.store(chunk.as_mut_ptr(), y) };
        }
    };
}
pub(super) use each;

/// Largest number of a row whose length is a multiple of `LANES`.
#[inline(always)]
pub(super) fn largest<S: Simd>(s: S, row: &[f32]) -> f32 {
    let mut most = s.splat(f32::NEG_INFINITY);
    for chunk in row.chunks_exact(S::LANES) {
        // SAFETY: the chunk has LANES floats.
        most = s.max(unsafe { s.load(chunk.as_ptr()) }, most);
    }
    s.max_lane(most)
}

/// Sum of the products of two rows of one length, a multiple of `LANES`.
#[inline(always)]
pub(super) fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let mut sum = s.zero();
    for (a, b) in a.chunks_exact(S::LANES).zip(b.chunks_exact(S::LANES)) {
        // SAFETY: both chunks have LANES floats.
        unsafe { sum = s.fma(s.load(a.as_ptr()), s.load(b.as_ptr()), sum) };
    }
    s.sum(sum)
}

/// `e^(x - shift)` of a row whose length is a multiple of `LANES`.
#[inline(always)]
pub(super) fn exponential<S: Simd>(s: S, row: &mut [f32], shift: f32) {
    let shift = s.splat(shift);
    each!(s, row, x => s.exp(s.sub(x, shift)));
}

#[inline(always)]
pub(super) fn multiply_row<S: Simd>(s: S, row: &mut [f32], factor: f32) {
    let factor = s.splat(factor);
    each!(s, row, x => s.mul(x, factor));
}

/// Softmax of the first `n` numbers of a padded row; zeros in the padding.
#[inline(always)]
pub(super) fn softmax<S: Simd>(s: S, row: &mut [f32], n: usize) {
    row[n..].fill(f32::NEG_INFINITY);
    let most = largest(s, row);
    exponential(s, row, most);
    row[n..].fill(0.0);
    let mut sum = s.zero();
    for chunk in row.chunks_exact(S::LANES) {
        // SAFETY: the chunk has LANES floats.
        sum = s.add(sum, unsafe { s.load(chunk.as_ptr()) });
    }
    multiply_row(s, row, 1.0 / s.sum(sum));
}

/// `x^n` of a row of `inverse * x`.
#[inline(always)]
pub(super) fn raise<S: Simd>(s: S, row: &mut [f32], exponent: f32, inverse: f32) {
    let by = s.splat(inverse);
    if exponent.fract() == 0.0 && (1.0..=8.0).contains(&exponent) {
        let times = exponent as usize;
        each!(s, row, x => {
            let x = s.mul(x, by);
            let mut y = x;
            for _ in 1..times {
                y = s.mul(y, x);
            }
            y
        });
    } else {
        for x in row {
            *x = (*x * inverse).powf(exponent);
        }
    }
}
