//! Convolution of each channel with a kernel of its own.

use super::check_grid;
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Element, Error, Result, TensorView, with_element};
use std::sync::Mutex;

/// A depth-wise convolution; everything by axis t, y and x.
#[derive(Clone, Copy, Debug)]
pub struct Depthwise<'a> {
    /// `[taps of t, of y, of x, channels]`.
    pub kernel: &'a [f32],
    /// Taps.
    pub taps: [usize; 3],
    /// Positions from one output to the next.
    pub stride: [usize; 3],
    /// Positions before the grid, read as zeros.
    pub padding: [usize; 3],
    /// Outputs; positions they read after the grid are zeros.
    pub outputs: [usize; 3],
}

/// The convolution of `x`, `[batch, t * y, x, channels]`, into `out`, `[batch, outputs, channels]`.
pub fn depthwise(
    x: TensorView,
    extent: [usize; 3],
    convolution: Depthwise,
    out: &mut [f32],
    execution: &Execution,
) -> Result<()> {
    check_grid(&x, extent)?;
    let [batch, _, _, channels] = x.shape();
    let Depthwise { kernel, taps, outputs, .. } = convolution;
    let expected = taps.iter().product::<usize>() * channels;
    if kernel.len() != expected {
        return Err(Error::value("kernel", format!("{} numbers", kernel.len()), expected));
    }
    let row = outputs[2] * channels;
    let lines = batch * outputs[0] * outputs[1];
    if out.len() != lines * row {
        return Err(Error::value("out", format!("{} numbers", out.len()), lines * row));
    }
    if out.is_empty() {
        return Ok(());
    }
    let isa = simd::current();
    // Every tap's row padded with zeros to whole vectors.
    let padded = channels.next_multiple_of(simd::MAX_LANES);
    let mut padded_kernel = vec![0f32; taps.iter().product::<usize>() * padded];
    for (to, from) in padded_kernel.chunks_exact_mut(padded).zip(kernel.chunks_exact(channels)) {
        to[..channels].copy_from_slice(from);
    }
    let parts: Vec<_> = out.chunks_mut(row).map(Mutex::new).collect();
    for_each(execution, lines, |i| {
        let mut to = parts[i].lock().unwrap_or_else(|e| e.into_inner());
        let place = [i / (outputs[0] * outputs[1]), i / outputs[1] % outputs[0], i % outputs[1]];
        with_element!(x.dtype(), T => {
            let line = Line::<T> { x, extent, convolution, kernel: &padded_kernel, padded, place, to: &mut to, element: std::marker::PhantomData };
            dispatch(isa, line);
        });
    })
}

/// One line of outputs.
struct Line<'a, T> {
    x: TensorView<'a>,
    extent: [usize; 3],
    convolution: Depthwise<'a>,
    kernel: &'a [f32],
    padded: usize,
    /// Of the batch, of t and of y.
    place: [usize; 3],
    to: &'a mut [f32],
    element: std::marker::PhantomData<T>,
}

impl<T: Element> Kernel for Line<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, extent, convolution, kernel, padded, place: [batch, t, y], to, .. } = self;
        let Depthwise { taps, stride, padding, .. } = convolution;
        let channels = x.shape()[3];
        let [_, line_stride, row_stride, _] = x.strides();
        let base = x.head::<T>(batch, 0);
        // Rows that an output reads, and the taps they meet.
        let mut met: Vec<(isize, usize)> = Vec::with_capacity(taps.iter().product());
        let mut tail = [0f32; simd::MAX_LANES];
        for (column, row) in to.chunks_exact_mut(channels).enumerate() {
            met.clear();
            for a in 0..taps[0] {
                let Some(ti) = inside(t * stride[0] + a, padding[0], extent[0]) else { continue };
                for b in 0..taps[1] {
                    let Some(yi) = inside(y * stride[1] + b, padding[1], extent[1]) else { continue };
                    for c in 0..taps[2] {
                        let Some(xi) = inside(column * stride[2] + c, padding[2], extent[2]) else { continue };
                        let line = (ti * extent[1] + yi) as isize;
                        let tap = (a * taps[1] + b) * taps[2] + c;
                        met.push((line * line_stride + xi as isize * row_stride, tap * padded));
                    }
                }
            }
            let mut c = 0;
            while c < channels {
                let left = channels - c;
                let mut sum = s.zero();
                for &(offset, tap) in &met {
                    // SAFETY: the row lies in the grid, of which at most the channels left are read; the kernel's rows are padded to
                    // whole vectors.
                    unsafe {
                        let source = base.offset(offset).add(c);
                        let values = if left >= S::LANES { s.load_as(source) } else { s.load_first(source, left) };
                        sum = s.fma(values, s.load(kernel.as_ptr().add(tap + c)), sum);
                    }
                }
                // SAFETY: a whole vector fits into what is left of the row, or else into `tail`.
                unsafe {
                    if left >= S::LANES {
                        s.store(row.as_mut_ptr().add(c), sum);
                    } else {
                        s.store(tail.as_mut_ptr(), sum);
                        row[c..].copy_from_slice(&tail[..left]);
                    }
                }
                c += S::LANES;
            }
        }
    }
}

/// Index in the grid of a position counted from the first of its padding.
#[inline(always)]
fn inside(position: usize, padding: usize, size: usize) -> Option<usize> {
    position.checked_sub(padding).filter(|&at| at < size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;

    #[test]
    fn on_each_instruction_set() {
        let (h, w, channels) = (5, 6, 21);
        let x: Vec<f32> = (0..h * w * channels).map(|i| (i * 31 % 17) as f32 - 8.0).collect();
        let kernel: Vec<f32> = (0..9 * channels).map(|i| (i * 13 % 7) as f32 - 3.0).collect();
        let outputs = [1, 3, 3];
        let convolution =
            Depthwise { kernel: &kernel, taps: [1, 3, 3], stride: [1, 2, 2], padding: [0, 1, 1], outputs };
        let mut expected = vec![0f32; 9 * channels];
        for (i, sum) in expected.iter_mut().enumerate() {
            let (y, xo, c) = (i / (3 * channels), i / channels % 3, i % channels);
            for (a, b) in (0..9).map(|t| (t / 3, t % 3)) {
                if let (Some(yi), Some(xi)) = (inside(2 * y + a, 1, h), inside(2 * xo + b, 1, w)) {
                    *sum += x[(yi * w + xi) * channels + c] * kernel[(a * 3 + b) * channels + c];
                }
            }
        }
        for isa in Isa::available() {
            simd::set_current(isa).unwrap();
            let mut out = vec![0f32; 9 * channels];
            let view = TensorView::new(&x, [1, h, w, channels]).unwrap();
            depthwise(view, [1, h, w], convolution, &mut out, &Execution::default()).unwrap();
            assert_eq!(out, expected);
        }
    }

    #[test]
    fn bad_arguments() {
        let x = [0f32; 8];
        let view = TensorView::new(&x, [1, 2, 2, 2]).unwrap();
        let kernel = [0f32; 2];
        let one = Depthwise { kernel: &kernel, taps: [1; 3], stride: [1; 3], padding: [0; 3], outputs: [1, 2, 2] };
        let run =
            |extent, convolution, n| depthwise(view, extent, convolution, &mut vec![0f32; n], &Execution::default());
        assert!(run([1, 2, 2], one, 8).is_ok());
        assert!(run([1, 2, 2], one, 7).is_err());
        assert!(run([2, 2, 2], one, 8).is_err());
        assert!(run([1, 2, 2], Depthwise { taps: [1, 1, 2], ..one }, 8).is_err());
    }
}
