//! Rows of a grid at real coordinates, by linear interpolation between neighbours.

use super::check_grid;
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Element, Error, Result, TensorView, with_element};
use std::sync::Mutex;

/// Positions of one item.
const TOGETHER: usize = 64;

/// How coordinates are read.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Whether coordinates go from -1 to 1, not from 0 to the extent less 1.
    pub unit: bool,
    /// With `unit`: whether -1 and 1 are the centres of the outermost rows, not their outer edges.
    pub align_corners: bool,
    /// Whether coordinates outside the grid are those of its border; otherwise rows outside are zeros.
    pub border: bool,
}

/// Where to sample.
#[derive(Clone, Copy, Debug)]
pub struct Points<'a> {
    /// Finite, `[batch, positions, taps, groups, axes]`; the last axes of the grid.
    pub coords: &'a [f32],
    /// Axes of a coordinate, 1 to 3.
    pub axes: usize,
    /// Equal parts of the channels with coordinates of their own.
    pub groups: usize,
    /// Samples that are summed at a position.
    pub taps: usize,
    /// Their weights, `[batch, positions, taps, groups]`; all 1 if absent.
    pub weights: Option<&'a [f32]>,
}

/// Samples of `x`, `[batch, t * y, x, channels]`, into `out`, `[batch, positions, channels]`. Corners of weight 0 are not read.
pub fn sample(
    x: TensorView,
    extent: [usize; 3],
    points: Points,
    sampling: Sampling,
    out: &mut [f32],
    execution: &Execution,
) -> Result<()> {
    check_grid(&x, extent)?;
    let [batch, _, _, channels] = x.shape();
    let Points { coords, axes, groups, taps, weights } = points;
    if !(1..=3).contains(&axes) {
        return Err(Error::value("axes", axes, "1 to 3"));
    }
    if groups == 0 || !channels.is_multiple_of(groups) {
        return Err(Error::value("groups", groups, format!("a divisor of {channels} channels")));
    }
    let (per_position, numbers) = (taps * groups, batch * taps * groups * axes);
    if numbers == 0 || !coords.len().is_multiple_of(numbers) {
        if out.is_empty() && coords.is_empty() {
            return Ok(());
        }
        return Err(Error::value("coords", format!("{} numbers", coords.len()), format!("a multiple of {numbers}")));
    }
    let positions = coords.len() / numbers;
    if weights.is_some_and(|w| w.len() != batch * positions * per_position) {
        let expected = batch * positions * per_position;
        return Err(Error::value("weights", format!("{} numbers", weights.map_or(0, <[f32]>::len)), expected));
    }
    if out.len() != batch * positions * channels {
        return Err(Error::value("out", format!("{} numbers", out.len()), batch * positions * channels));
    }
    if !coords.iter().all(|c| c.is_finite()) {
        return Err(Error::value("coords", "NaN or infinity", "finite numbers"));
    }
    if out.is_empty() {
        return Ok(());
    }
    let pieces = positions.div_ceil(TOGETHER);
    let parts: Vec<_> = out
        .chunks_mut(positions * channels)
        .flat_map(|one| one.chunks_mut(TOGETHER * channels))
        .map(Mutex::new)
        .collect();
    let isa = simd::current();
    for_each(execution, batch * pieces, |i| {
        let (b, first) = (i / pieces, i % pieces * TOGETHER);
        let mut to = parts[i].lock().unwrap_or_else(|e| e.into_inner());
        with_element!(x.dtype(), T => {
            dispatch(isa, Samples::<T> { x, extent, points, sampling, batch: b, first: b * positions + first, to: &mut to, element: std::marker::PhantomData });
        });
    })
}

struct Samples<'a, T> {
    x: TensorView<'a>,
    extent: [usize; 3],
    points: Points<'a>,
    sampling: Sampling,
    batch: usize,
    /// Counted over the whole batch.
    first: usize,
    to: &'a mut [f32],
    element: std::marker::PhantomData<T>,
}

/// A row of the grid and its weight.
type Corner = (isize, f32);

impl<T: Element> Kernel for Samples<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, extent, points, sampling, batch, first, to, .. } = self;
        let Points { coords, axes, groups, taps, weights } = points;
        let channels = x.shape()[3];
        let width = channels / groups;
        let [_, _, row_stride, _] = x.strides();
        let line_stride = x.strides()[1];
        let base = x.head::<T>(batch, 0);
        let mut sums = vec![0f32; width.next_multiple_of(S::LANES)];
        for (p, row) in to.chunks_exact_mut(channels).enumerate() {
            for (g, part) in row.chunks_exact_mut(width.max(1)).enumerate() {
                sums.fill(0.0);
                for tap in 0..taps {
                    let at = ((first + p) * taps + tap) * groups + g;
                    let weight = weights.map_or(1.0, |w| w[at]);
                    let (corners, n) = corners(
                        &coords[at * axes..(at + 1) * axes],
                        extent,
                        sampling,
                        weight,
                        [line_stride, row_stride],
                    );
                    let from = base.wrapping_add(g * width);
                    let mut c = 0;
                    while c < width {
                        let left = width - c;
                        // SAFETY: corners are rows of the grid, of which channels c.. of group g are read, at most as many as are
                        // left; `sums` holds the padded width.
                        unsafe {
                            let slot = sums.as_mut_ptr().add(c);
                            let mut sum = s.load(slot);
                            for &(offset, weight) in &corners[..n] {
                                let source = from.offset(offset).add(c);
                                let values =
                                    if left >= S::LANES { s.load_as(source) } else { s.load_first(source, left) };
                                sum = s.fma(s.splat(weight), values, sum);
                            }
                            s.store(slot, sum);
                        }
                        c += S::LANES;
                    }
                }
                part.copy_from_slice(&sums[..width]);
            }
        }
    }
}

/// The corners around a point that lie in the grid and weigh something, and how many they are.
#[inline(always)]
fn corners(
    coords: &[f32],
    extent: [usize; 3],
    sampling: Sampling,
    weight: f32,
    strides: [isize; 2],
) -> ([Corner; 8], usize) {
    let missing = 3 - coords.len();
    let mut found = [(0, weight); 8];
    let mut n = 1;
    for axis in 0..3 {
        let size = extent[axis];
        let (low, share) = if axis < missing { (0, 0.0) } else { place(coords[axis - missing], size, sampling) };
        // Axes t and y share the strides of lines.
        let stride = match axis {
            0 => extent[1] as isize * strides[0],
            1 => strides[0],
            _ => strides[1],
        };
        let sides = [(low, 1.0 - share), (low.saturating_add(1), share)];
        let (before, count) = (found, n);
        n = 0;
        for &(offset, so_far) in &before[..count] {
            for (index, part) in sides {
                if part != 0.0 && so_far != 0.0 && 0 <= index && (index as usize) < size {
                    found[n] = (offset + index * stride, so_far * part);
                    n += 1;
                }
            }
        }
    }
    (found, n)
}

/// The index at or below a coordinate, and the share of the one above.
#[inline(always)]
fn place(coordinate: f32, size: usize, sampling: Sampling) -> (isize, f32) {
    let (span, last) = (size as f32, size as f32 - 1.0);
    let mut at = match sampling {
        Sampling { unit: false, .. } => coordinate,
        Sampling { align_corners: true, .. } => (coordinate + 1.0) * 0.5 * last,
        _ => ((coordinate + 1.0) * span - 1.0) * 0.5,
    };
    if sampling.border {
        at = at.min(last).max(0.0);
    }
    let low = at.floor();
    (low as isize, at - low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;

    const PLAIN: Sampling = Sampling { unit: false, align_corners: true, border: false };

    fn run(x: &[f32], shape: [usize; 4], extent: [usize; 3], points: Points, sampling: Sampling) -> Result<Vec<f32>> {
        let positions = points.coords.len() / (points.axes * points.groups * points.taps * shape[0]).max(1);
        let mut out = vec![0f32; shape[0] * positions * shape[3]];
        sample(TensorView::new(x, shape)?, extent, points, sampling, &mut out, &Execution::default())?;
        Ok(out)
    }

    #[test]
    fn on_each_instruction_set() {
        let x: Vec<f32> = (0..2 * 3 * 4 * 19).map(|i| (i * 37 % 101) as f32).collect();
        let at = |y: usize, c: usize, ch: usize| x[(y * 4 + c) * 19 + ch];
        for isa in Isa::available() {
            simd::set_current(isa).unwrap();
            let points =
                Points { coords: &[1.25, 2.5, -0.5, 0.0, 9.0, 9.0], axes: 2, groups: 1, taps: 1, weights: None };
            let out = run(&x[..3 * 4 * 19], [1, 3, 4, 19], [1, 3, 4], points, PLAIN).unwrap();
            for ch in 0..19 {
                let expected = 0.375 * (at(1, 2, ch) + at(1, 3, ch)) + 0.125 * (at(2, 2, ch) + at(2, 3, ch));
                assert!((out[ch] - expected).abs() < 1e-4);
                assert_eq!(out[19 + ch], 0.5 * at(0, 0, ch));
                assert_eq!(out[38 + ch], 0.0);
            }
            let border = Sampling { border: true, ..PLAIN };
            let out = run(&x[..3 * 4 * 19], [1, 3, 4, 19], [1, 3, 4], points, border).unwrap();
            assert_eq!(out[38..57], x[11 * 19..12 * 19]);
        }
    }

    #[test]
    fn weighted_taps_are_summed() {
        let x = [1f32, 10.0, 100.0, 1000.0];
        let points = Points { coords: &[0.0, 3.0], axes: 1, groups: 1, taps: 2, weights: Some(&[2.0, 3.0]) };
        assert_eq!(run(&x, [1, 1, 4, 1], [1, 1, 4], points, PLAIN).unwrap(), [3002.0]);
    }

    #[test]
    fn bad_arguments() {
        let x = [0f32; 8];
        let points = Points { coords: &[0.0, 0.0], axes: 2, groups: 1, taps: 1, weights: None };
        assert!(run(&x, [1, 2, 2, 2], [1, 2, 3], points, PLAIN).is_err());
        assert!(run(&x, [1, 2, 2, 2], [1, 2, 2], Points { groups: 3, ..points }, PLAIN).is_err());
        assert!(run(&x, [1, 2, 2, 2], [1, 2, 2], Points { axes: 4, ..points }, PLAIN).is_err());
        assert!(run(&x, [1, 2, 2, 2], [1, 2, 2], Points { coords: &[f32::NAN, 0.0], ..points }, PLAIN).is_err());
        assert!(run(&x, [1, 2, 2, 2], [1, 2, 2], Points { weights: Some(&[]), ..points }, PLAIN).is_err());
        assert!(run(&x, [1, 2, 2, 2], [1, 2, 2], points, PLAIN).is_ok());
    }
}
