//! Depthwise convolution: every channel with taps of its own, along one to three axes.

use super::pointwise::silu;
use super::tiles::{Place, Sequence, WIDTH, block_channels, check_len, load, sequences, store};
use crate::dense::scratch::with_scratch;
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Error, Result, TensorView, TensorViewMut};

/// Outputs along the last axis that are computed from one tile, where they are one place apart.
const TILE: usize = 64;
/// Outputs that share a load of weights.
const TOGETHER: usize = 4;
/// Outputs of one item: along a line, or lines of a tile.
const LINE: usize = 1024;
const LINES: usize = 16;

/// What [`depthwise`] reads. Axes are frames, rows and columns.
#[derive(Clone, Copy)]
pub struct Depthwise<'a> {
    /// `[batch, frames * height, width, channels]`.
    pub x: TensorView<'a>,
    /// Frames of `x` and of the output; 1 where there is no such axis.
    pub frames: [usize; 2],
    /// `[taps of each axis, channels]`.
    pub weights: &'a [f32],
    /// Taps of each axis.
    pub taps: [usize; 3],
    /// The tap that meets the place an output stands for: what is before it in the kernel meets what is before the place.
    pub centre: [usize; 3],
    /// Places from one output to the next.
    pub stride: [usize; 3],
    /// Added to each channel's output.
    pub bias: Option<&'a [f32]>,
    /// Columns before the first of each sequence, `[1, sequences, columns, channels]`, where zeros would be; for a height of 1.
    pub before: Option<TensorView<'a>>,
    /// Whether `silu` of the outputs is returned.
    pub silu: bool,
}

/// `out[b, z, y, x, c] = sum of weights[h, i, j, c] x[b, z s + h - centre, y s + i - centre, x s + j - centre, c]`, with the strides s of
/// the axes, zeros outside.
///
/// The output may be larger than the input along any axis, or smaller. With `bounds` a batch of 1 and a height of 1 hold sequences, one
/// after another, along the width.
pub fn depthwise(
    given: Depthwise,
    bounds: Option<&[usize]>,
    out: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let [batch, lines, width, channels] = given.x.shape();
    let [out_batch, out_lines, out_width, out_channels] = out.shape();
    if out_batch != batch || out_channels != channels {
        return Err(Error::value("out", format!("shape {:?}", out.shape()), "batch and channels of x"));
    }
    let [frames, out_frames] = given.frames;
    if frames == 0 || out_frames == 0 || lines % frames != 0 || out_lines % out_frames != 0 {
        let got = format!("{:?} of {lines} and {out_lines} lines", given.frames);
        return Err(Error::value("frames", got, "numbers that divide the lines"));
    }
    let (height, out_height) = (lines / frames, out_lines / out_frames);
    check_len("weights", given.weights.len(), given.taps.iter().product::<usize>() * channels)?;
    if given.taps.contains(&0) || given.stride.contains(&0) {
        let got = format!("taps {:?} and strides {:?}", given.taps, given.stride);
        return Err(Error::value("weights", got, "at least 1 of each"));
    }
    check_len("bias", given.bias.map_or(channels, <[f32]>::len), channels)?;
    if bounds.is_some() && (out_lines != lines || out_width != width) {
        return Err(Error::value("out", format!("shape {:?}", out.shape()), "the shape of x"));
    }
    let flat = lines == 1 && given.taps[..2] == [1, 1] && given.stride == [1; 3];
    if (bounds.is_some() || given.before.is_some()) && !flat {
        return Err(Error::value("x", format!("{lines} lines"), "one line, and a stride of 1"));
    }
    let all = sequences(batch, width, bounds)?;
    if let Some(before) = given.before {
        let [one, n, _, c] = before.shape();
        if one != 1 || n != all.len() || c != channels {
            let expected = format!("[1, {}, columns, {channels}]", all.len());
            return Err(Error::value("initial_state", format!("shape {:?}", before.shape()), expected));
        }
    }
    let (blocks, together) = (channels.div_ceil(WIDTH), if out_height == 1 { 1 } else { LINES });
    let tile = (TILE / given.stride[2]).max(TOGETHER).next_multiple_of(TOGETHER);
    let length = if out_height == 1 { LINE } else { tile };
    // Items: sequence, frame, lines, part of a line, block of channels.
    let mut items = Vec::new();
    for (sequence, found) in all.iter().enumerate() {
        let columns = if bounds.is_some() { found.rows.len() } else { out_width };
        for (frame, row) in (0..out_frames).flat_map(|f| (0..out_height).step_by(together).map(move |row| (f, row))) {
            for column in (0..columns).step_by(length) {
                for block in 0..blocks {
                    let (rows, end) = ([row, (row + together).min(out_height)], (column + length).min(columns));
                    items.push((sequence, frame, rows, [column, end], block));
                }
            }
        }
    }
    let (isa, out) = (simd::current(), &*out);
    for_each(execution, items.len(), |i| {
        let (index, frame, rows, columns, block) = items[i];
        let block = block_channels(block, channels);
        with_scratch(|scratch| {
            let (taps, earlier) = (given.taps.iter().product::<usize>(), given.before.map_or(0, |x| x.shape()[2]));
            // Columns that any output of a tile meets: no more than there are.
            let held = (tile - 1) * given.stride[2] + 1 + given.taps[2].min(width + earlier + tile * given.stride[2]);
            let buffer = scratch.extra.take((given.taps[0] * given.taps[1] * held + taps + tile + 1) * WIDTH);
            let (given, sequence) = (&given, &all[index]);
            dispatch(
                isa,
                Run { given, sequence, index, height, frame, out_height, rows, columns, tile, block, buffer, out },
            );
        });
    })
}

struct Run<'a> {
    given: &'a Depthwise<'a>,
    sequence: &'a Sequence,
    index: usize,
    /// Lines of a frame of the input, and of the output.
    height: usize,
    out_height: usize,
    /// Of the output.
    frame: usize,
    rows: [usize; 2],
    columns: [usize; 2],
    /// Columns that are computed from one tile.
    tile: usize,
    block: (usize, usize),
    buffer: &'a mut [f32],
    out: &'a TensorViewMut<'a>,
}

impl Kernel for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Run { given, sequence, index, height, out_height, frame, rows, columns, tile: most, block, buffer, out } =
            self;
        let ([deep, high, wide], [_, top, left], [_, down, right]) = (given.taps, given.centre, given.stride);
        let (taps, rest) = buffer.split_at_mut(deep * high * wide * WIDTH);
        let (y, rest) = rest.split_at_mut(most * WIDTH);
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
        // Taps of the first axis that meet frames, the first of which is number `first_frame - centre` of them.
        let first_frame = (frame * given.stride[0]) as isize - given.centre[0] as isize;
        let frames = met(first_frame, given.frames[0], deep);
        for start in (columns[0]..columns[1]).step_by(most) {
            let n = most.min(columns[1] - start);
            // Taps that meet anything: input columns run from `start * right - left + tap` on.
            let (near, far) = ((start * right) as isize, ((start + n - 1) * right) as isize);
            let low = (left as isize - earlier - far).clamp(0, wide as isize) as usize;
            let high_tap = (len + left as isize - near).clamp(low as isize, wide as isize) as usize;
            let origin = near + low as isize - left as isize;
            let held = (n.next_multiple_of(TOGETHER) - 1) * right + 1 + high_tap - low;
            let mut next = (rows[0] * down) as isize - top as isize;
            for row in rows[0]..rows[1] {
                let offset = (row * down) as isize - top as isize;
                next = next.max(offset);
                while next < offset + high as isize {
                    if next >= 0 && (next as usize) < height && high_tap > low {
                        for h in frames[0]..frames[1] {
                            let slot = h * high + next as usize % high;
                            let to = &mut tile[slot * held * WIDTH..][..held * WIDTH];
                            let row = (first_frame + h as isize) as usize * height + next as usize;
                            line(s, given, sequence, index, row, origin, block, to);
                        }
                    }
                    next += 1;
                }
                let [first, last] = met(offset, height, high);
                let shape = Lines {
                    frames,
                    first,
                    last,
                    low,
                    high: high_tap,
                    wide,
                    slots: high,
                    deep,
                    offset,
                    held,
                    step: right,
                };
                for at in (0..block.1).step_by(S::LANES) {
                    outputs(s, shape, taps, bias, tile, y, at, n);
                    if given.silu {
                        for t in 0..n {
                            // SAFETY: `y` has `most` >= n rows of WIDTH floats, and `at` is a multiple of LANES inside one.
                            unsafe {
                                let p = y.as_mut_ptr().add(t * WIDTH + at);
                                s.store(p, silu(s, s.load(p)));
                            }
                        }
                    }
                }
                let head = frame * out_height + row;
                let at = Place { batch: sequence.entry, head, channel: block.0, channels: block.1 };
                let first = sequence.rows.start + start;
                store(out, at, first..first + n, y, WIDTH);
            }
        }
    }
}

/// The taps, of `taps` whose first meets place `offset`, that meet one of `places`.
fn met(offset: isize, places: usize, taps: usize) -> [usize; 2] {
    let first = (-offset).clamp(0, taps as isize);
    [first as usize, (places as isize - offset).clamp(first, taps as isize) as usize]
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
    /// Frames of taps that meet frames of the input.
    frames: [usize; 2],
    /// Rows of taps likewise.
    first: usize,
    last: usize,
    /// Columns of taps likewise.
    low: usize,
    high: usize,
    /// Columns of all taps.
    wide: usize,
    /// Lines of a frame that the tile holds, by their number modulo this, and frames.
    slots: usize,
    deep: usize,
    /// The input's row that the first row of taps meets.
    offset: isize,
    /// Columns of a line.
    held: usize,
    /// Columns from one output to the next.
    step: usize,
}

/// Outputs of one line, for a vector of channels.
#[inline(always)]
fn outputs<S: Simd>(s: S, lines: Lines, taps: &[f32], bias: &[f32], tile: &[f32], y: &mut [f32], at: usize, n: usize) {
    let Lines { frames, first, last, low, high, wide, slots, deep, offset, held, step } = lines;
    let padded = n.next_multiple_of(TOGETHER);
    assert!(bias.len() >= WIDTH && at + S::LANES <= WIDTH && y.len() >= padded * WIDTH && n > 0);
    assert!(last <= slots && high <= wide && frames[1] <= deep && taps.len() >= deep * slots * wide * WIDTH);
    let fits = tile.len() >= deep * slots * held * WIDTH && held > (padded - 1) * step + high - low;
    assert!(high == low || fits);
    for start in (0..n).step_by(TOGETHER) {
        // SAFETY: vectors from `at` on in rows of WIDTH floats: of taps up to `deep * slots * wide`, of the tile up to column
        // `(start + TOGETHER - 1) * step + high - low` of a slot, and of `y` up to n rounded up, by the assertions above.
        unsafe {
            let mut sum = [s.load(bias.as_ptr().add(at)); TOGETHER];
            for h in frames[0]..frames[1] {
                for i in first..last {
                    let slot = h * slots + (offset + i as isize) as usize % slots;
                    let mut from = tile.as_ptr().add((slot * held + start * step) * WIDTH + at);
                    let mut tap = taps.as_ptr().add(((h * slots + i) * wide + low) * WIDTH + at);
                    for _ in low..high {
                        let w = s.load(tap);
                        for (t, sum) in sum.iter_mut().enumerate() {
                            *sum = s.fma(w, s.load(from.add(t * step * WIDTH)), *sum);
                        }
                        from = from.add(WIDTH);
                        tap = tap.add(WIDTH);
                    }
                }
            }
            for (t, sum) in sum.into_iter().enumerate() {
                s.store(y.as_mut_ptr().add((start + t) * WIDTH + at), sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;

    /// A convolution straight from the definition, of one batch entry.
    fn expected(x: &[f32], extent: [usize; 3], channels: usize, given: &Depthwise, outputs: [usize; 3]) -> Vec<f32> {
        let places =
            |n: [usize; 3]| (0..n[0]).flat_map(move |z| (0..n[1]).flat_map(move |y| (0..n[2]).map(move |x| [z, y, x])));
        let mut out = Vec::new();
        for place in places(outputs) {
            for c in 0..channels {
                let mut sum = given.bias.map_or(0.0, |bias| bias[c]);
                for (t, tap) in places(given.taps).enumerate() {
                    let at: [isize; 3] = std::array::from_fn(|a| {
                        (place[a] * given.stride[a] + tap[a]) as isize - given.centre[a] as isize
                    });
                    if at.iter().zip(extent).all(|(&at, n)| at >= 0 && (at as usize) < n) {
                        let [z, y, x_at] = at.map(|n| n as usize);
                        let row = (z * extent[1] + y) * extent[2] + x_at;
                        sum += x[row * channels + c] * given.weights[t * channels + c];
                    }
                }
                out.push(sum);
            }
        }
        out
    }

    #[test]
    fn strides_paddings_and_frames_on_each_instruction_set() {
        let cases = [
            ([1, 5, 6], [1, 3, 3], [1, 2, 2], [0, 1, 1]),
            ([3, 5, 9], [2, 3, 4], [1, 3, 2], [1, 0, 5]),
            ([4, 9, 90], [3, 2, 2], [2, 2, 7], [0, 0, 0]),
            ([1, 1, 200], [1, 1, 9], [1, 1, 3], [0, 0, 4]),
            ([2, 3, 3], [2, 5, 5], [1, 1, 1], [3, 2, 2]),
        ];
        for (extent, taps, stride, centre) in cases {
            let channels = 70;
            let outputs: [usize; 3] = std::array::from_fn(|a| (extent[a] + 2 * centre[a] - taps[a]) / stride[a] + 1);
            let x: Vec<f32> =
                (0..extent.iter().product::<usize>() * channels).map(|i| (i * 31 % 17) as f32 - 8.0).collect();
            let weights: Vec<f32> =
                (0..taps.iter().product::<usize>() * channels).map(|i| (i * 13 % 7) as f32 - 3.0).collect();
            let bias: Vec<f32> = (0..channels).map(|c| c as f32).collect();
            let given = Depthwise {
                x: TensorView::new(&x, [1, extent[0] * extent[1], extent[2], channels]).unwrap(),
                frames: [extent[0], outputs[0]],
                weights: &weights,
                taps,
                centre,
                stride,
                bias: Some(&bias),
                before: None,
                silu: false,
            };
            let wanted = expected(&x, extent, channels, &given, outputs);
            for isa in Isa::available() {
                simd::set_current(isa).unwrap();
                let mut out = vec![0f32; wanted.len()];
                let shape = [1, outputs[0] * outputs[1], outputs[2], channels];
                depthwise(given, None, &mut TensorViewMut::new(&mut out, shape).unwrap(), &Execution::default())
                    .unwrap();
                assert!(out == wanted, "{} {extent:?} {taps:?}", isa.name());
            }
        }
    }

    #[test]
    fn bad_arguments() {
        let (x, weights) = ([0f32; 8], [0f32; 2]);
        let view = TensorView::new(&x, [1, 2, 2, 2]).unwrap();
        let one = Depthwise {
            x: view,
            frames: [1, 1],
            weights: &weights,
            taps: [1; 3],
            centre: [0; 3],
            stride: [1; 3],
            bias: None,
            before: None,
            silu: false,
        };
        let run = |given| {
            let mut out = [0f32; 8];
            depthwise(given, None, &mut TensorViewMut::new(&mut out, [1, 2, 2, 2]).unwrap(), &Execution::default())
        };
        assert!(run(one).is_ok());
        assert!(run(Depthwise { frames: [3, 1], ..one }).is_err());
        assert!(run(Depthwise { taps: [1, 1, 2], ..one }).is_err());
        assert!(run(Depthwise { stride: [1, 0, 1], ..one }).is_err());
    }
}
