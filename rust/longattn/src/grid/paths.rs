//! Sums of decays along two-part paths between the places of a grid, as biases of attention.

use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Error, Result};
use std::ops::Range;
use std::sync::Mutex;

/// Decays of a grid, as sums from the start of each line.
#[derive(Clone, Copy, Debug)]
pub struct Paths<'a> {
    /// `[heads, y, x]`: logarithms of decays, at most 0, summed along x up to each place.
    pub along_x: &'a [f64],
    /// `[heads, y, x]`, likewise along y.
    pub along_y: &'a [f64],
    /// Of y and x.
    pub extent: [usize; 2],
    /// Whether a path starts along y, from the query's place; else along x.
    pub first_y: bool,
}

/// The sum of decays on the path from each place of the lines `lines` to each place of the grid, `[heads, lines * x, y * x]`.
pub fn path_bias(paths: Paths, lines: Range<usize>, out: &mut [f32], execution: &Execution) -> Result<()> {
    let [height, width] = paths.extent;
    let area = height * width;
    if area == 0 || !paths.along_x.len().is_multiple_of(area) || paths.along_y.len() != paths.along_x.len() {
        let got = format!("{} and {} numbers", paths.along_x.len(), paths.along_y.len());
        return Err(Error::value("paths", got, format!("as many of both, a multiple of {area}")));
    }
    let heads = paths.along_x.len() / area;
    if lines.start > lines.end || lines.end > height {
        return Err(Error::value("lines", format!("{lines:?}"), format!("a range of {height} lines")));
    }
    let rows = lines.len() * width;
    if out.len() != heads * rows * area {
        return Err(Error::value("out", format!("{} numbers", out.len()), heads * rows * area));
    }
    let isa = simd::current();
    let parts: Vec<_> = out.chunks_mut(width * area).map(Mutex::new).collect();
    for_each(execution, parts.len(), |i| {
        let mut to = parts[i].lock().unwrap_or_else(|e| e.into_inner());
        dispatch(isa, Line { paths, head: i / lines.len(), y: lines.start + i % lines.len(), to: &mut to });
    })
}

/// The biases of one line of queries.
struct Line<'a> {
    paths: Paths<'a>,
    head: usize,
    y: usize,
    to: &'a mut [f32],
}

impl Kernel for Line<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { paths, head, y, to } = self;
        let [height, width] = paths.extent;
        let area = height * width;
        let along_x = &paths.along_x[head * area..(head + 1) * area];
        let along_y = &paths.along_y[head * area..(head + 1) * area];
        let of = |line: usize| line * width..(line + 1) * width;
        for (x, row) in to.chunks_exact_mut(area).enumerate() {
            for (key_y, part) in row.chunks_exact_mut(width).enumerate() {
                if paths.first_y {
                    let (own, turn) = (along_y[y * width + x], along_y[key_y * width + x]);
                    let (first, sums) = ((own - turn).abs(), &along_x[of(key_y)]);
                    for (to, &end) in part.iter_mut().zip(sums) {
                        *to = -(first + (sums[x] - end).abs()) as f32;
                    }
                } else {
                    let (own, starts, ends) = (&along_x[of(y)], &along_y[of(y)], &along_y[of(key_y)]);
                    for (((to, &turn), &start), &end) in part.iter_mut().zip(own).zip(starts).zip(ends) {
                        *to = -((own[x] - turn).abs() + (start - end).abs()) as f32;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_the_others_transpose() {
        let (height, width) = (3, 4);
        let area = height * width;
        let sums: Vec<f64> = (0..2 * area).map(|i| -((i * 7 % 5) as f64) - i as f64).collect();
        let of = |first_y| {
            let paths = Paths { along_x: &sums, along_y: &sums, extent: [height, width], first_y };
            let mut out = vec![0f32; 2 * area * area];
            path_bias(paths, 0..height, &mut out, &Execution::default()).unwrap();
            out
        };
        let (one, other) = (of(false), of(true));
        for (h, (i, j)) in (0..2).flat_map(|h| (0..area * area).map(move |n| (h, (n / area, n % area)))) {
            assert_eq!(one[(h * area + i) * area + j], other[(h * area + j) * area + i]);
            assert!(i != j || one[(h * area + i) * area + j] == 0.0);
        }
    }

    #[test]
    fn bad_arguments() {
        let sums = [0f64; 6];
        let paths = Paths { along_x: &sums, along_y: &sums, extent: [2, 3], first_y: false };
        let run = |paths, lines, n| path_bias(paths, lines, &mut vec![0f32; n], &Execution::default());
        assert!(run(paths, 1..2, 18).is_ok());
        assert!(run(paths, 1..3, 36).is_err());
        assert!(run(paths, 0..1, 17).is_err());
        assert!(run(Paths { along_y: &sums[..5], ..paths }, 0..1, 18).is_err());
    }
}
