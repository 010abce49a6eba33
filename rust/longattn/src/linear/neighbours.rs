//! The mean difference of a place of a map to those around it.

use super::tiles::{Place, WIDTH, block_channels, check_shape, load, store};
use crate::dense::scratch::with_scratch;
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Error, Result, TensorView, TensorViewMut};

/// `out = mean of x over the square of `size` places around each, those inside the map only, less x`, for `[batch, height, width,
/// channels]` and an odd `size`. Differences are what is added up, so a constant map gives zeros.
pub fn neighbour_means(x: TensorView, size: usize, out: &mut TensorViewMut, execution: &Execution) -> Result<()> {
    let [batch, height, width, channels] = x.shape();
    check_shape("out", out.shape(), x.shape())?;
    if size.is_multiple_of(2) {
        return Err(Error::value("size", size, "an odd number"));
    }
    let (isa, out, blocks) = (simd::current(), &*out, channels.div_ceil(WIDTH));
    for_each(execution, batch * height * blocks, |i| {
        let (block, row) = (block_channels(i % blocks, channels), i / blocks);
        with_scratch(|scratch| {
            let buffer = scratch.extra.take(3 * width * WIDTH);
            let reach = size / 2;
            dispatch(isa, Run { x, batch: row / height, row: row % height, reach, block, buffer, out });
        });
    })
}

struct Run<'a> {
    x: TensorView<'a>,
    batch: usize,
    row: usize,
    reach: usize,
    block: (usize, usize),
    buffer: &'a mut [f32],
    out: &'a TensorViewMut<'a>,
}

impl Kernel for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Run { x, batch, row, reach, block, buffer, out } = self;
        let [_, height, width, _] = x.shape();
        let (own, rest) = buffer.split_at_mut(width * WIDTH);
        let (other, y) = rest.split_at_mut(width * WIDTH);
        assert!(y.len() >= width * WIDTH);
        let at = |head| Place { batch, head, channel: block.0, channels: block.1 };
        load(s, &x, at(row), 0..width, own, WIDTH);
        y[..width * WIDTH].fill(0.0);
        let rows = row.saturating_sub(reach)..(row + reach + 1).min(height);
        for near in rows.clone() {
            load(s, &x, at(near), 0..width, other, WIDTH);
            for column in 0..width {
                let columns = column.saturating_sub(reach)..(column + reach + 1).min(width);
                for c in (0..block.1).step_by(S::LANES) {
                    // SAFETY: columns are below `width`, and rows of WIDTH floats hold whole vectors.
                    unsafe {
                        let centre = s.load(own.as_ptr().add(column * WIDTH + c));
                        let p = y.as_mut_ptr().add(column * WIDTH + c);
                        let mut sum = s.load(p);
                        for j in columns.start..columns.end {
                            sum = s.add(sum, s.sub(s.load(other.as_ptr().add(j * WIDTH + c)), centre));
                        }
                        s.store(p, sum);
                    }
                }
            }
        }
        for column in 0..width {
            let columns = (column + reach + 1).min(width) - column.saturating_sub(reach);
            let inverse = 1.0 / (rows.len() * columns) as f32;
            for y in &mut y[column * WIDTH..][..WIDTH] {
                *y *= inverse;
            }
        }
        store(out, at(row), 0..width, y, WIDTH);
    }
}
