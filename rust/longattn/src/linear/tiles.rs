//! Parts of tensors as floats: what kernels over channels work on.
//!
//! A tile has the channels of one block side by side, [`WIDTH`] of them or fewer, and rows one after another. It is widened once as
//! it is read and rounded once as it is written, so kernels know one dtype.

use crate::dense::rows::widen_row;
use crate::kv::convert::narrow;
use crate::simd::{MAX_LANES, Simd};
use crate::tensor::{Element, Error, Result, TensorView, TensorViewMut, with_element};
use std::ops::Range;

/// Channels of one block: a multiple of any instruction set's lanes.
pub(super) const WIDTH: usize = 64;
const _: () = assert!(WIDTH.is_multiple_of(MAX_LANES));

/// Where a tile lies in a tensor.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) batch: usize,
    pub(super) head: usize,
    /// The first channel, and how many there are.
    pub(super) channel: usize,
    pub(super) channels: usize,
}

/// Widens rows of a tensor to rows of `width` floats, zeros beyond the channels.
#[inline(always)]
pub(super) fn load<S: Simd>(s: S, from: &TensorView, at: Place, rows: Range<usize>, to: &mut [f32], width: usize) {
    assert!(to.len() >= rows.len() * width && width >= at.channels && width.is_multiple_of(S::LANES));
    with_element!(from.dtype(), T => {
        for (row, to) in rows.zip(to.chunks_exact_mut(width)) {
            let part = &from.row::<T>(at.batch, at.head, row)[at.channel..at.channel + at.channels];
            // SAFETY: the part has that many elements and `to` that many floats, a multiple of LANES.
            unsafe { widen_row(s, part.as_ptr(), part.len(), to.as_mut_ptr(), width) };
        }
    });
}

/// Rounds rows of `width` floats into a tensor. Two workers may write different channels of one row at once.
#[inline(always)]
pub(super) fn store(to: &TensorViewMut, at: Place, rows: Range<usize>, from: &[f32], width: usize) {
    assert!(at.channel + at.channels <= to.shape()[3] && from.len() >= rows.len() * width);
    with_element!(to.dtype(), T => {
        for (row, from) in rows.zip(from.chunks_exact(width)) {
            let target = to.row_ptr::<T>(at.batch, at.head, row).wrapping_add(at.channel);
            // SAFETY: the row exists and has these channels, which this worker alone writes.
            unsafe { narrow(&from[..at.channels], target.cast(), T::DTYPE) };
        }
    });
}

/// Channels of block `block`.
pub(super) fn block_channels(block: usize, channels: usize) -> (usize, usize) {
    let first = block * WIDTH;
    (first, WIDTH.min(channels - first))
}

/// Numbers `[channels, n]` of one block as `[n, WIDTH]`, `beyond` in the channels that are not there.
pub(super) fn transposed(from: &[f32], n: usize, (first, channels): (usize, usize), beyond: f32, to: &mut [f32]) {
    for (i, row) in to.chunks_exact_mut(WIDTH).take(n).enumerate() {
        for (channel, x) in row.iter_mut().enumerate() {
            *x = if channel < channels { from[(first + channel) * n + i] } else { beyond };
        }
    }
}

/// A sequence: its entry of the batch and its rows there.
#[derive(Clone, Debug)]
pub(super) struct Sequence {
    pub(super) entry: usize,
    pub(super) rows: Range<usize>,
}

/// The sequences of a batch of `entries` rows of `len` tokens, each cut at `bounds` where there are some (and one entry).
pub(super) fn sequences(entries: usize, len: usize, bounds: Option<&[usize]>) -> Result<Vec<Sequence>> {
    let Some(bounds) = bounds else {
        return Ok((0..entries).map(|entry| Sequence { entry, rows: 0..len }).collect());
    };
    if entries != 1 {
        return Err(Error::value("cu_seqlens", format!("a batch of {entries}"), "a batch of 1"));
    }
    if bounds.first() != Some(&0) || bounds.last() != Some(&len) || !bounds.is_sorted() {
        return Err(Error::value("cu_seqlens", format!("{} bounds", bounds.len()), format!("bounds from 0 to {len}")));
    }
    Ok(bounds.windows(2).map(|w| Sequence { entry: 0, rows: w[0]..w[1] }).collect())
}

/// An error unless a slice has as many numbers as the others say.
pub(super) fn check_len(name: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::value(name, format!("{got} numbers"), expected)) }
}

/// An error unless a tensor has the shape that the others say.
pub(super) fn check_shape(name: &'static str, got: [usize; 4], expected: [usize; 4]) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::value(name, format!("shape {got:?}"), format!("{expected:?}"))) }
}
