//! Depthwise convolution: every channel with taps of its own, along one axis or two.

use super::pointwise::silu;
use super::tiles::{Place, Sequence, WIDTH, block_channels, check_len, load, sequences, store};
use crate::dense::scratch::with_scratch;
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Error, Result, TensorView, TensorViewMut};

/// Outputs along the last axis that are computed from one tile.
const TILE: usize = 64;
/// Outputs that share a load of weights.
const TOGETHER: usize = 4;
/// Outputs of one item: along a line, or lines of a tile.
const LINE: usize = 1024;
const LINES: usize = 16;

/// What [`depthwise`] reads.
#[derive(Clone, Copy)]
pub struct Depthwise<'a> {
    /// `[batch, height, width, channels]`.
    pub x: TensorView<'a>,
    /// `[rows, columns, channels]`.
    pub weights: &'a [f32],
    /// Rows and columns of the weights.
    pub taps: [usize; 2],
    /// The tap that meets the output's own place; what is before it in the kernel meets what is before the place.
    pub centre: [usize; 2],
    /// Added to each channel's output.
    pub bias: Option<&'a [f32]>,
    /// Columns before the first of each sequence, `[1, sequences, columns, channels]`, where zeros would be; for a height of 1.
    pub before: Option<TensorView<'a>>,
    /// Whether `silu` of the outputs is returned.
    pub silu: bool,
}

/// `out[b, y, x, c] = sum of weights[i, j, c] x[b, y + i - centre, x + j - centre, c]`, zeros outside.
///
/// The output may be higher or wider than the input, or less so. With `bounds` a batch of 1 and a height of 1 hold sequences, one after
/// another, along the width.
pub fn depthwise(
    given: Depthwise,
    bounds: Option<&[usize]>,
    out: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let [batch, height, width, channels] = given.x.shape();
    let [out_batch, out_height, out_width, out_channels] = out.shape();
    if out_batch != batch || out_channels != channels {
        return Err(Error::value("out", format!("shape {:?}", out.shape()), "batch and channels of x"));
    }
    check_len("weights", given.weights.len(), given.taps[0] * given.taps[1] * channels)?;
    if given.centre[0] >= given.taps[0] || given.centre[1] >= given.taps[1] {
        return Err(Error::value("centre", format!("{:?}", given.centre), format!("a tap of {:?}", given.taps)));
    }
    check_len("bias", given.bias.map_or(channels, <[f32]>::len), channels)?;
    if bounds.is_some() && (out_height != height || out_width != width) {
        return Err(Error::value("out", format!("shape {:?}", out.shape()), "the shape of x"));
    }
    if (bounds.is_some() || given.before.is_some()) && (height != 1 || given.taps[0] != 1) {
        return Err(Error::value("x", format!("height {height}"), "a height of 1"));
    }
    let all = sequences(batch, width, bounds)?;
    if let Some(before) = given.before {
        let [one, n, _, c] = before.shape();
        if one != 1 || n != all.len() || c != channels {
            let expected = format!("[1, {}, columns, {channels}]", all.len());
            return Err(Error::value("initial_state", format!("shape {:?}", before.shape()), expected));
        }
    }
    let (blocks, lines) = (channels.div_ceil(WIDTH), if out_height == 1 { 1 } else { LINES });
    let length = if out_height == 1 { LINE } else { TILE };
    // Items: sequence, lines, part of a line, block of channels.
    let mut items = Vec::new();
    for (sequence, found) in all.iter().enumerate() {
        let columns = if bounds.is_some() { found.rows.len() } else { out_width };
        for row in (0..out_height).step_by(lines) {
            for column in (0..columns).step_by(length) {
                for block in 0..blocks {
                    items.push((
                        sequence,
                        row,
                        (row + lines).min(out_height),
                        column,
                        (column + length).min(columns),
                        block,
                    ));
                }
            }
        }
    }
    let (isa, out) = (simd::current(), &*out);
    for_each(execution, items.len(), |i| {
        let (index, first, last, start, end, block) = items[i];
        let block = block_channels(block, channels);
        with_scratch(|scratch| {
            let (taps, earlier) = (given.taps[0] * given.taps[1], given.before.map_or(0, |before| before.shape()[2]));
            // Columns that any output of a tile meets: no more than there are.
            let held = TILE + TOGETHER + given.taps[1].min(width + earlier + TILE);
            let buffer = scratch.extra.take((given.taps[0] * held + taps + TILE + 1) * WIDTH);
            let (given, sequence, rows, columns) = (&given, &all[index], [first, last], [start, end]);
            dispatch(isa, Run { given, sequence, index, rows, columns, block, buffer, out });
        });
    })
}

struct Run<'a> {
    given: &'a Depthwise<'a>,
    sequence: &'a Sequence,
    index: usize,
    rows: [usize; 2],
    columns: [usize; 2],
    block: (usize, usize),
    buffer: &'a mut [f32],
    out: &'a TensorViewMut<'a>,
}

impl Kernel for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Run { given, sequence, index, rows, columns, block, buffer, out } = self;
        let ([high, wide], [top, left]) = (given.taps, given.centre);
        let height = given.x.shape()[1];
        let (taps, rest) = buffer.split_at_mut(high * wide * WIDTH);
        let (y, rest) = rest.split_at_mut(TILE * WIDTH);
        let (bias, tile) = rest.split_at_mut(WIDTH);
        let channels = given.x.shape()[3];
        for (tap, to) in taps.chunks_exact_mut(WIDTH).enumerate() {
            to.fill(0.0);
            to[..block.1].copy_from_slice(&given.weights[tap * channels + block.0..][..block.1]);
        }
        bias[..WIDTH].fill(0.0);
        if let Some(from) = given.bias {
            bias[..block.1].copy_from_slice(&from[block.0..block.0 + block.1]);
        }
        let len = sequence.rows.len() as isize;
        let earlier = given.before.map_or(0, |before| before.shape()[2]) as isize;
        for start in (columns[0]..columns[1]).step_by(TILE) {
            let n = TILE.min(columns[1] - start);
            // Taps that meet anything: input columns run from `start - left + tap` on.
            let low = (left as isize - earlier - (start + n - 1) as isize).clamp(0, wide as isize) as usize;
            let high_tap = (len + left as isize - start as isize).clamp(low as isize, wide as isize) as usize;
            let origin = (start + low) as isize - left as isize;
            let held = n.next_multiple_of(TOGETHER) + high_tap - low;
            let mut next = rows[0] as isize - top as isize;
            for row in rows[0]..rows[1] {
                let row_end = (row + high) as isize - top as isize;
                while next < row_end {
                    if next >= 0 && (next as usize) < height && high_tap > low {
                        let slot = next as usize % high;
                        let to = &mut tile[slot * held * WIDTH..][..held * WIDTH];
                        line(s, given, sequence, index, next as usize, origin, block, to);
                    }
                    next += 1;
                }
                let first = (top as isize - row as isize).clamp(0, high as isize) as usize;
                let last =
                    (height as isize + top as isize - row as isize).clamp(first as isize, high as isize) as usize;
                let shape = Lines {
                    first,
                    last,
                    low,
                    high: high_tap,
                    wide,
                    slots: high,
                    offset: row as isize - top as isize,
                    held,
                };
                for at in (0..block.1).step_by(S::LANES) {
                    outputs(s, shape, taps, bias, tile, y, at, n);
                    if given.silu {
                        for t in 0..n {
                            // SAFETY: `y` has TILE >= n rows of WIDTH floats, and `at` is a multiple of LANES inside one.
                            unsafe {
                                let p = y.as_mut_ptr().add(t * WIDTH + at);
                                s.store(p, silu(s, s.load(p)));
                            }
                        }
                    }
                }
                let at = Place { batch: sequence.entry, head: row, channel: block.0, channels: block.1 };
                let first = sequence.rows.start + start;
                store(out, at, first..first + n, y, WIDTH);
            }
        }
    }
}

/// Columns from `origin` on of a line of a sequence, zeros where there are none, as many as `to` holds.
#[inline(always)]
fn line<S: Simd>(
    s: S,
    given: &Depthwise,
    sequence: &Sequence,
    index: usize,
    row: usize,
    origin: isize,
    block: (usize, usize),
    to: &mut [f32],
) {
    let (count, len) = ((to.len() / WIDTH) as isize, sequence.rows.len() as isize);
    let at = Place { batch: sequence.entry, head: row, channel: block.0, channels: block.1 };
    let (start, end) = (origin.clamp(0, len), (origin + count).clamp(0, len));
    let (from, until) = ((start - origin).clamp(0, count) as usize, (end - origin).clamp(0, count) as usize);
    to[..from * WIDTH].fill(0.0);
    to[until.max(from) * WIDTH..].fill(0.0);
    if until > from {
        let first = sequence.rows.start + start as usize;
        load(s, &given.x, at, first..first + until - from, &mut to[from * WIDTH..], WIDTH);
    }
    if let Some(before) = &given.before
        && origin < 0
    {
        let earlier = before.shape()[2] as isize;
        let (start, end) = (origin.max(-earlier), (origin + count).min(0));
        if end > start {
            let rows = (start + earlier) as usize..(end + earlier) as usize;
            let at = Place { batch: 0, head: index, ..at };
            load(s, before, at, rows, &mut to[(start - origin) as usize * WIDTH..], WIDTH);
        }
    }
}

#[derive(Clone, Copy)]
struct Lines {
    /// Rows of taps that meet rows of the input.
    first: usize,
    last: usize,
    /// Columns of taps likewise.
    low: usize,
    high: usize,
    /// Columns of all taps.
    wide: usize,
    /// Lines that the tile holds, by their number modulo this.
    slots: usize,
    /// The input's row that the first row of taps meets.
    offset: isize,
    /// Columns of a line.
    held: usize,
}

/// Outputs of one line, for a vector of channels.
#[inline(always)]
fn outputs<S: Simd>(s: S, lines: Lines, taps: &[f32], bias: &[f32], tile: &[f32], y: &mut [f32], at: usize, n: usize) {
    let Lines { first, last, low, high, wide, slots, offset, held } = lines;
    assert!(bias.len() >= WIDTH && at + S::LANES <= WIDTH && y.len() >= n.next_multiple_of(TOGETHER) * WIDTH);
    assert!(last <= slots && high <= wide && taps.len() >= slots * wide * WIDTH);
    assert!(high == low || tile.len() >= slots * held * WIDTH && held >= n.next_multiple_of(TOGETHER) + high - low);
    for start in (0..n).step_by(TOGETHER) {
        // SAFETY: vectors from `at` on in rows of WIDTH floats: of taps up to `slots * wide`, of the tile up to column
        // `start + TOGETHER - 1 + high - low` of a slot, and of `y` up to n rounded up, by the assertions above.
        unsafe {
            let mut sum = [s.load(bias.as_ptr().add(at)); TOGETHER];
            for i in first..last {
                let slot = (offset + i as isize) as usize % slots;
                let mut from = tile.as_ptr().add((slot * held + start) * WIDTH + at);
                let mut tap = taps.as_ptr().add((i * wide + low) * WIDTH + at);
                for _ in low..high {
                    let w = s.load(tap);
                    for (t, sum) in sum.iter_mut().enumerate() {
                        *sum = s.fma(w, s.load(from.add(t * WIDTH)), *sum);
                    }
                    from = from.add(WIDTH);
                    tap = tap.add(WIDTH);
                }
            }
            for (t, sum) in sum.into_iter().enumerate() {
                s.store(y.as_mut_ptr().add((start + t) * WIDTH + at), sum);
            }
        }
    }
}
