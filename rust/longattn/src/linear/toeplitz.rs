//! Long convolutions by Fourier transforms: one kernel per head or per channel.

use super::tiles::{check_len, check_shape};
use crate::parallel::{Execution, for_each, map};
use crate::tensor::{Element, Error, Result, TensorView, TensorViewMut, with_element};
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};
use rustfft::FftNum;
use rustfft::num_complex::Complex;
use std::ops::Range;
use std::sync::Arc;

/// Channels of one item: a few neighbours are read and written together.
const TOGETHER: usize = 8;

/// Numbers that transforms are of.
trait Real: FftNum + Default {
    fn of(x: f64) -> Self;
    fn rounded(self) -> f32;
}

impl Real for f32 {
    fn of(x: f64) -> Self {
        x as Self
    }
    fn rounded(self) -> f32 {
        self
    }
}

impl Real for f64 {
    fn of(x: f64) -> Self {
        x
    }
    fn rounded(self) -> f32 {
        self as f32
    }
}

/// What [`toeplitz`] reads.
#[derive(Clone, Copy)]
pub struct Toeplitz<'a> {
    /// `[batch, heads, length, channels]`.
    pub x: TensorView<'a>,
    /// `[kernels, span]`: weights by the distance of the output's row from the input's.
    pub kernel: &'a [f64],
    /// The weight of distance 0.
    pub zero: usize,
    /// Whether there is a kernel per channel; else there is one per head.
    pub per_channel: bool,
    /// Whether transforms are in `f64`.
    pub double: bool,
}

/// `out[b, h, i, c] = sum over j of kernel[i - j + zero] x[b, h, j, c]`, nothing where the kernel has no weight. The output may be longer
/// or shorter than the input.
pub fn toeplitz(given: Toeplitz, out: &mut TensorViewMut, execution: &Execution) -> Result<()> {
    let [batch, heads, _, channels] = given.x.shape();
    let [out_batch, out_heads, _, out_channels] = out.shape();
    if [out_batch, out_heads, out_channels] != [batch, heads, channels] {
        return Err(Error::value("out", format!("shape {:?}", out.shape()), "batch, heads and channels of x"));
    }
    let kernels = if given.per_channel { channels } else { heads };
    let span = given.kernel.len().checked_div(kernels).unwrap_or(0);
    check_len("kernel", given.kernel.len(), kernels * span)?;
    if kernels > 0 && given.zero >= span {
        return Err(Error::value("zero", given.zero, format!("a weight of the kernel, 0 to {}", span.max(1) - 1)));
    }
    if out.shape().contains(&0) {
        return Ok(());
    }
    if given.double { run::<f64>(given, span, out, execution) } else { run::<f32>(given, span, out, execution) }
}

/// The smallest even number of at least `n` without prime factors above 5.
fn fast_length(n: usize) -> usize {
    let mut best = n.max(2).next_power_of_two();
    for fives in [1, 5, 25] {
        for threes in [1, 3, 9, 27] {
            let odd = fives * threes;
            best = best.min((n.div_ceil(odd).max(2)).next_power_of_two() * odd);
        }
    }
    best
}

/// Distances of one axis that count, `[-back, forth]`, for `rows` outputs of `len` inputs; and the length of a circle on which no
/// distance meets a wrong row.
fn circle(span: usize, zero: usize, len: usize, rows: usize) -> (usize, usize, usize) {
    let back = zero.min(len.saturating_sub(1));
    let forth = (span - 1 - zero).min(rows.saturating_sub(1));
    (back, forth, fast_length((len + forth).max(rows + back).max(back + forth + 1)))
}

/// How rows of one length are convolved.
struct Plan<'a, F: Real> {
    kernel: &'a [f64],
    span: usize,
    zero: usize,
    /// Distances that count on either side of 0.
    back: usize,
    forth: usize,
    /// The length of the transforms.
    n: usize,
    rows: usize,
    len: usize,
    forward: Arc<dyn RealToComplex<F>>,
    inverse: Arc<dyn ComplexToReal<F>>,
}

/// Buffers of one worker.
struct Work<F> {
    real: Vec<F>,
    complex: Vec<Complex<F>>,
    scratch: Vec<Complex<F>>,
}

impl<'a, F: Real> Plan<'a, F> {
    fn new(kernel: &'a [f64], span: usize, zero: usize, len: usize, rows: usize) -> Self {
        let (back, forth, n) = circle(span, zero, len, rows);
        let mut planner = RealFftPlanner::<F>::new();
        let (forward, inverse) = (planner.plan_fft_forward(n), planner.plan_fft_inverse(n));
        Self { kernel, span, zero, back, forth, n, rows, len, forward, inverse }
    }

    fn work(&self) -> Work<F> {
        let scratch = self.forward.get_scratch_len().max(self.inverse.get_scratch_len());
        Work {
            real: self.forward.make_input_vec(),
            complex: self.forward.make_output_vec(),
            scratch: vec![Complex::default(); scratch],
        }
    }

    /// Transform of a kernel, divided by what the two transforms multiply by.
    fn spectrum(&self, kernel: usize, work: &mut Work<F>) -> Vec<Complex<F>> {
        let weights = &self.kernel[kernel * self.span..(kernel + 1) * self.span];
        work.real.fill(F::of(0.0));
        for distance in 0..=self.forth {
            work.real[distance] = F::of(weights[self.zero + distance] / self.n as f64);
        }
        for distance in 1..=self.back {
            work.real[self.n - distance] = F::of(weights[self.zero - distance] / self.n as f64);
        }
        let mut found = self.forward.make_output_vec();
        let done = self.forward.process_with_scratch(&mut work.real, &mut found, &mut work.scratch);
        done.expect("buffers of the plan's lengths");
        found
    }

    /// Replaces the first `len` numbers of a column by `rows` outputs.
    fn convolve(&self, work: &mut Work<F>, spectrum: &[Complex<F>], column: &mut [F]) {
        work.real[..self.len].copy_from_slice(&column[..self.len]);
        work.real[self.len..].fill(F::of(0.0));
        let done = self.forward.process_with_scratch(&mut work.real, &mut work.complex, &mut work.scratch);
        done.expect("buffers of the plan's lengths");
        for (x, w) in work.complex.iter_mut().zip(spectrum) {
            *x = *x * *w;
        }
        // Of a real signal, these are real up to rounding, and the inverse wants them so.
        work.complex[0].im = F::of(0.0);
        work.complex[self.n / 2].im = F::of(0.0);
        let done = self.inverse.process_with_scratch(&mut work.complex, &mut work.real, &mut work.scratch);
        done.expect("buffers of the plan's lengths");
        column[..self.rows].copy_from_slice(&work.real[..self.rows]);
    }
}

fn run<F: Real>(given: Toeplitz, span: usize, out: &mut TensorViewMut, execution: &Execution) -> Result<()> {
    let ([batch, heads, len, channels], rows) = (given.x.shape(), out.shape()[2]);
    let plan = Plan::<F>::new(given.kernel, span, given.zero, len, rows);
    let (blocks, longest, out) = (channels.div_ceil(TOGETHER), len.max(rows), &*out);
    let own = |block: usize| block * TOGETHER..((block + 1) * TOGETHER).min(channels);
    if given.per_channel {
        return for_each(execution, blocks, |block| {
            let (mut work, mut tile) = (plan.work(), vec![F::of(0.0); TOGETHER * longest]);
            let spectra: Vec<_> = own(block).map(|channel| plan.spectrum(channel, &mut work)).collect();
            for (b, h) in (0..batch * heads).map(|i| (i / heads, i % heads)) {
                read(&given.x, b, h, own(block), &mut tile, longest);
                for (column, spectrum) in tile.chunks_exact_mut(longest).zip(&spectra) {
                    plan.convolve(&mut work, spectrum, column);
                }
                write(out, b, h, own(block), &tile, longest);
            }
        });
    }
    let spectra = map(execution, heads, |head| plan.spectrum(head, &mut plan.work()))?;
    for_each(execution, batch * heads * blocks, |i| {
        let (block, b, h) = (i % blocks, i / blocks / heads, i / blocks % heads);
        let (mut work, mut tile) = (plan.work(), vec![F::of(0.0); TOGETHER * longest]);
        read(&given.x, b, h, own(block), &mut tile, longest);
        for column in tile.chunks_exact_mut(longest).take(own(block).len()) {
            plan.convolve(&mut work, &spectra[h], column);
        }
        write(out, b, h, own(block), &tile, longest);
    })
}

/// Columns `channels` of a head, each as a row of `stride` numbers.
fn read<F: Real>(x: &TensorView, b: usize, h: usize, channels: Range<usize>, to: &mut [F], stride: usize) {
    with_element!(x.dtype(), T => {
        for row in 0..x.shape()[2] {
            for (c, x) in x.row::<T>(b, h, row)[channels.clone()].iter().enumerate() {
                to[c * stride + row] = F::of(f64::from(x.to_f32()));
            }
        }
    });
}

fn write<F: Real>(out: &TensorViewMut, b: usize, h: usize, channels: Range<usize>, from: &[F], stride: usize) {
    with_element!(out.dtype(), T => {
        for row in 0..out.shape()[2] {
            let to = out.row_ptr::<T>(b, h, row);
            for (c, channel) in channels.clone().enumerate() {
                // SAFETY: the row exists and has this channel, which this worker alone writes.
                unsafe { to.add(channel).write(T::from_f32(from[c * stride + row].rounded())) };
            }
        }
    });
}

/// What [`toeplitz_attention`] reads, all of it `[batch, heads, ...]`.
#[derive(Clone, Copy)]
pub struct ToeplitzAttention<'a> {
    /// Features of the queries, `[.., rows, features]`.
    pub q: TensorView<'a>,
    /// Features of the keys, `[.., length, features]`; heads of `q` share those of `k` in groups.
    pub k: TensorView<'a>,
    /// Values, `[.., length, dim]`, heads as of `k`.
    pub v: TensorView<'a>,
    /// `[heads of q, span]`: weights by the distance of the query from the key.
    pub kernel: &'a [f64],
    /// The weight of distance 0.
    pub zero: usize,
    /// Whether transforms are in `f64`.
    pub double: bool,
}

/// `out[b, h, i, c] = sum over features r and keys j of kernel[i - j + zero] q[i, r] k[j, r] v[j, c]`, and with ones for the last `c`, for
/// which `v` has no value. A pair of columns of keys and values is convolved at a time, so memory does not grow with their number.
pub fn toeplitz_attention(given: ToeplitzAttention, out: &mut TensorViewMut, execution: &Execution) -> Result<()> {
    let ([batch, heads, rows, features], [_, shared, len, dim]) = (given.q.shape(), given.v.shape());
    check_shape("k", given.k.shape(), [batch, shared, len, features])?;
    check_shape("v", given.v.shape(), [batch, shared, len, dim])?;
    check_shape("out", out.shape(), [batch, heads, rows, dim + 1])?;
    if heads > 0 && (shared == 0 || heads % shared != 0) {
        return Err(Error::value("q", format!("{heads} heads"), format!("a multiple of the {shared} heads of k")));
    }
    let span = given.kernel.len().checked_div(heads).unwrap_or(0);
    check_len("kernel", given.kernel.len(), heads * span)?;
    if heads > 0 && given.zero >= span {
        return Err(Error::value("zero", given.zero, format!("a weight of the kernel, 0 to {}", span.max(1) - 1)));
    }
    if batch * heads * rows == 0 {
        return Ok(());
    }
    if given.double { attend::<f64>(given, span, out, execution) } else { attend::<f32>(given, span, out, execution) }
}

fn attend<F: Real>(
    given: ToeplitzAttention,
    span: usize,
    out: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let ([batch, heads, rows, features], [_, shared, len, dim]) = (given.q.shape(), given.v.shape());
    let plan = Plan::<F>::new(given.kernel, span, given.zero, len, rows);
    let spectra = map(execution, heads, |head| plan.spectrum(head, &mut plan.work()))?;
    let (out, longest, columns) = (&*out, len.max(rows), dim + 1);
    for_each(execution, batch * heads * columns, |i| {
        let (b, h, c) = (i / columns / heads, i / columns % heads, i % columns);
        let (kv, mut work) = (h / (heads / shared), plan.work());
        let (mut values, mut sums) = (vec![F::of(1.0); len], vec![F::of(0.0); rows]);
        let (mut column, mut own) = (vec![F::of(0.0); longest], vec![F::of(0.0); rows]);
        if c < dim {
            read(&given.v, b, kv, c..c + 1, &mut values, len);
        }
        for r in 0..features {
            read(&given.k, b, kv, r..r + 1, &mut column, longest);
            for (x, v) in column.iter_mut().zip(&values) {
                *x = *x * *v;
            }
            plan.convolve(&mut work, &spectra[h], &mut column);
            read(&given.q, b, h, r..r + 1, &mut own, rows);
            for ((sum, q), y) in sums.iter_mut().zip(&own).zip(&column) {
                *sum = *sum + *q * *y;
            }
        }
        write(out, b, h, c..c + 1, &sums, rows);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_without_large_factors() {
        for n in 1..3000 {
            let length = fast_length(n);
            assert!(length >= n && length.is_multiple_of(2) && length < 2 * n.max(2));
            let mut rest = length;
            for factor in [2, 3, 5] {
                while rest.is_multiple_of(factor) {
                    rest /= factor;
                }
            }
            assert_eq!(rest, 1);
        }
    }

    #[test]
    fn any_kernel_over_any_lengths() {
        for (len, rows, span, zero) in
            [(1, 1, 1, 0), (7, 7, 7, 0), (7, 7, 13, 6), (5, 9, 4, 1), (9, 5, 30, 11), (3, 8, 2, 1), (8, 3, 10, 9)]
        {
            let x: Vec<f32> = (0..2 * len).map(|i| (i * 37 % 11) as f32 - 5.0).collect();
            let kernel: Vec<f64> = (0..2 * span).map(|i| (i * 29 % 13) as f64 - 6.0).collect();
            for (double, per_channel) in [(true, true), (true, false), (false, true), (false, false)] {
                let heads = if per_channel { [1, 2] } else { [2, 1] };
                let mut out = vec![0f32; 2 * rows];
                let shape = |n| [1, heads[0], n, heads[1]];
                let view = TensorView::new(&x, shape(len)).unwrap();
                let given = Toeplitz { x: view, kernel: &kernel, zero, per_channel, double };
                toeplitz(given, &mut TensorViewMut::new(&mut out, shape(rows)).unwrap(), &Execution::default())
                    .unwrap();
                for which in 0..2 {
                    for i in 0..rows {
                        let mut expected = 0.0;
                        for j in 0..len {
                            let at = (i + zero) as isize - j as isize;
                            if (0..span as isize).contains(&at) {
                                let x = x[if per_channel { j * 2 + which } else { which * len + j }];
                                expected += kernel[which * span + at as usize] * f64::from(x);
                            }
                        }
                        let got = out[if per_channel { i * 2 + which } else { which * rows + i }];
                        assert!(
                            (f64::from(got) - expected).abs() < 1e-3,
                            "{len} {rows} {span} {zero}: {got} {expected}"
                        );
                    }
                }
            }
        }
    }
}
