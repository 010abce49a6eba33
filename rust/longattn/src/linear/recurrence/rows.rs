//! Rows of inputs as floats, and the check of gates.

use crate::dense::rows::{Rows, Strided, is_finite, widen_row};
use crate::linear::features::{FeatureMap, Map, Mapper};
use crate::linear::rows::exponential;
use crate::simd::{Kernel, Simd};
use crate::tensor::{Element, TensorView, with_element};
use std::marker::PhantomData;
use std::ops::Range;

/// Reads rows as floats, `stride` floats apart and padded with zeros; returns whether all numbers are finite.
struct Widen<T> {
    from: Strided<T>,
    rows: Range<usize>,
    dim: usize,
    to: *mut f32,
    stride: usize,
    /// Added to the sum of squares under the root that a row is divided by.
    unit: Option<f32>,
    scale: f32,
}

impl<T: Element> Kernel for Widen<T> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> bool {
        let Self { from, rows, dim, to, stride, unit, scale } = self;
        let mut finite = true;
        for (i, row) in rows.enumerate() {
            // SAFETY: whoever makes this has rows of `dim` numbers, and room for as many rows of `stride` floats.
            let row = unsafe {
                let at = to.add(i * stride);
                widen_row(s, from.row(row), dim, at, stride);
                std::slice::from_raw_parts_mut(at, stride)
            };
            finite &= is_finite(s, row);
            let mut factor = scale;
            if let Some(eps) = unit {
                let mut squares = s.zero();
                for chunk in row.chunks_exact(S::LANES) {
                    // SAFETY: the chunk has LANES floats.
                    let x = unsafe { s.load(chunk.as_ptr()) };
                    squares = s.fma(x, x, squares);
                }
                factor /= (s.sum(squares) + eps).sqrt();
            }
            if factor != 1.0 {
                scale_row(s, row, factor);
            }
        }
        finite
    }
}

/// `row *= factor`; the length is a multiple of `LANES`.
#[inline(always)]
pub(in crate::linear) fn scale_row<S: Simd>(s: S, row: &mut [f32], factor: f32) {
    let factor = s.splat(factor);
    for chunk in row.chunks_exact_mut(S::LANES) {
        // SAFETY: the chunk has LANES floats.
        unsafe { s.store(chunk.as_mut_ptr(), s.mul(s.load(chunk.as_ptr()), factor)) };
    }
}

/// `row *= factors` number by number; the length is a multiple of `LANES`.
#[inline(always)]
pub(in crate::linear) fn multiply_rows<S: Simd>(s: S, row: &mut [f32], factors: &[f32]) {
    for (chunk, factor) in row.chunks_exact_mut(S::LANES).zip(factors.chunks_exact(S::LANES)) {
        // SAFETY: both chunks have LANES floats.
        unsafe { s.store(chunk.as_mut_ptr(), s.mul(s.load(chunk.as_ptr()), s.load(factor.as_ptr()))) };
    }
}

/// `row = e^row`; the length is a multiple of `LANES`.
#[inline(always)]
pub(super) fn exp_row<S: Simd>(s: S, row: &mut [f32]) {
    for chunk in row.chunks_exact_mut(S::LANES) {
        // SAFETY: the chunk has LANES floats.
        unsafe { s.store(chunk.as_mut_ptr(), s.exp(s.load(chunk.as_ptr()))) };
    }
}

/// `to = 1 - e^g` for `g <= 0`, without the loss of digits of a difference where `g` is small.
#[inline(always)]
pub(super) fn forgotten<S: Simd>(s: S, g: &[f32], to: &mut [f32]) {
    let one = s.splat(1.0);
    for (g, to) in g.chunks_exact(S::LANES).zip(to.chunks_exact_mut(S::LANES)) {
        // SAFETY: both chunks have LANES floats.
        unsafe {
            let g = s.load(g.as_ptr());
            // -g (1 + g/2 (1 + g/3 (... g/9))), which leaves out less than 2^-30 of the sum above -0.4.
            let mut series = one;
            for n in [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0] {
                series = s.fma(s.mul(g, s.splat(1.0 / n)), series, one);
            }
            let series = s.mul(s.sub(s.zero(), g), series);
            let plain = s.sub(one, s.exp(g));
            s.store(to.as_mut_ptr(), s.select_less(g, s.splat(-0.4), plain, series));
        }
    }
}

/// Rows `rows` of a head of `view` as floats times `scale`, each divided by its length where `unit` says so. `to` holds the rows,
/// `stride >= dim` floats apart, a multiple of `LANES`. Returns whether all are finite.
#[inline(always)]
pub(in crate::linear) fn load<S: Simd>(
    s: S,
    view: &TensorView,
    [batch, head]: [usize; 2],
    rows: Range<usize>,
    to: &mut [f32],
    stride: usize,
    unit: Option<f32>,
    scale: f32,
) -> bool {
    let [batches, heads, length, dim] = view.shape();
    assert!(batch < batches && head < heads && rows.end <= length && rows.len() * stride <= to.len());
    assert!(dim <= stride && stride.is_multiple_of(S::LANES));
    with_element!(view.dtype(), T => {
        let from = Strided { base: view.head::<T>(batch, head), stride: view.row_stride() };
        s.call(Widen { from, rows, dim, to: to.as_mut_ptr(), stride, unit, scale })
    })
}

/// Rows of a head that become features as they are read.
pub(super) struct Mapped<'a> {
    mapper: Mapper<'a>,
    /// Exponents of a row of queries are taken less their largest.
    queries: bool,
    exponentials: bool,
    features: Vec<f32>,
}

impl<'a> Mapped<'a> {
    #[inline(always)]
    pub(super) fn new<S: Simd>(
        s: S,
        map: &'a FeatureMap<'a>,
        x: TensorView<'a>,
        [batch, head]: [usize; 2],
        queries: bool,
    ) -> Self {
        let mapper = s.call(Make { map, x, batch, head });
        Self { mapper, queries, exponentials: map.map == Map::Gaussian, features: vec![] }
    }

    /// As [`load`].
    #[inline(always)]
    pub(super) fn load<S: Simd>(
        &mut self,
        s: S,
        rows: Range<usize>,
        to: &mut [f32],
        stride: usize,
        scale: f32,
    ) -> bool {
        s.call(Apply { mapped: self, rows, to, stride, scale })
    }
}

struct Make<'a> {
    map: &'a FeatureMap<'a>,
    x: TensorView<'a>,
    batch: usize,
    head: usize,
}

impl<'a> Kernel for Make<'a> {
    type Output = Mapper<'a>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Mapper<'a> {
        Mapper::new(s, self.map, self.x, self.batch, self.head)
    }
}

struct Apply<'m, 'a, 't> {
    mapped: &'m mut Mapped<'a>,
    rows: Range<usize>,
    to: &'t mut [f32],
    stride: usize,
    scale: f32,
}

impl Kernel for Apply<'_, '_, '_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> bool {
        let Self { mapped, rows, to, stride, scale } = self;
        let Mapped { mapper, queries, exponentials, features } = mapped;
        let (n, width) = (rows.len(), mapper.width);
        features.resize(n * width, 0.0);
        mapper.apply(s, rows, features);
        let mut finite = true;
        for (row, to) in features.chunks_exact_mut(width).zip(to.chunks_exact_mut(stride)).take(n) {
            if *exponentials && *queries {
                mapper.exponentials_by_row(s, row);
            } else if *exponentials {
                exponential(s, row, 0.0);
                row[mapper.features..].fill(0.0);
            }
            to.copy_from_slice(&row[..stride]);
            if scale != 1.0 {
                scale_row(s, to, scale);
            }
            finite &= is_finite(s, to);
        }
        finite
    }
}

/// The numbers of rows `rows` of a head of a view `[batch, heads, length, 1]`.
pub(in crate::linear) fn load_numbers(
    view: &TensorView,
    [batch, head]: [usize; 2],
    rows: Range<usize>,
    to: &mut [f32],
) {
    with_element!(view.dtype(), T => {
        for (row, to) in rows.zip(to) {
            *to = view.row::<T>(batch, head, row)[0].to_f32();
        }
    });
}

/// Whether a gate's numbers are at most 0, or finite where they are `signed`.
pub(super) struct Gate<'a, T> {
    pub(super) gate: TensorView<'a>,
    pub(super) batch: usize,
    pub(super) head: usize,
    pub(super) rows: Range<usize>,
    pub(super) signed: bool,
    pub(super) element: PhantomData<T>,
}

impl<T: Element> Kernel for Gate<'_, T> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> bool {
        let dim = self.gate.shape()[3];
        let whole = dim / S::LANES * S::LANES;
        let (zero, one, tiny) = (s.zero(), s.splat(1.0), s.splat(f32::MIN_POSITIVE));
        let (mut bad, mut good) = (zero, true);
        for row in self.rows {
            let row = self.gate.row::<T>(self.batch, self.head, row);
            for d in (0..whole).step_by(S::LANES) {
                // SAFETY: the row has `whole` numbers.
                let x = unsafe { s.load_as(row.as_ptr().add(d)) };
                // What is not finite less itself is NaN, which is less than nothing.
                let x = if self.signed { s.sub(x, x) } else { x };
                bad = s.max(bad, s.select_less(x, tiny, zero, one));
            }
            for x in &row[whole..] {
                let x = x.to_f32();
                good &= if self.signed { x.is_finite() } else { x <= 0.0 };
            }
        }
        good && s.max_lane(bad) == 0.0
    }
}
