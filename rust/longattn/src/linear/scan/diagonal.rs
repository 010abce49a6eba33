//! The scan with constant weights: damped averages (real) and diagonal state space models (complex).

use super::super::pointwise::silu;
use super::super::tiles::{Place, Sequence, WIDTH, block_channels, check_len, check_shape, load, sequences, store};
use crate::dense::scratch::with_scratch;
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Result, TensorView, TensorViewMut};

/// Tokens of one tile.
pub(super) const TOKENS: usize = 64;
/// States that go through a tile together, in registers.
pub(super) const TOGETHER: usize = 4;

/// What [`diagonal_scan`] reads. Weights are `[channels, states]`: real parts, and imaginary parts or nothing.
#[derive(Clone, Copy)]
pub struct DiagonalScan<'a> {
    /// Inputs of the channels, `[1, batch, length, channels]`.
    pub x: TensorView<'a>,
    /// What a state is multiplied by each row, less 1: states that decay slowly keep their precision.
    pub decay_less_1: [&'a [f32]; 2],
    /// Input weights.
    pub b: [&'a [f32]; 2],
    /// Output weights.
    pub c: [&'a [f32]; 2],
    /// Weight of a channel's input in its output.
    pub skip: Option<&'a [f32]>,
    /// Whether `silu` of the outputs is returned.
    pub silu: bool,
}

/// For each channel and state `h = decay h + b x`, and `out = Re(sum of c h) + skip x`, row after row.
///
/// `state`, `[sequences, parts, channels, states]` with real (and imaginary) parts, holds the states before the first row and receives
/// those after the last. With `bounds` a batch of 1 holds sequences one after another.
pub fn diagonal_scan(
    given: DiagonalScan,
    bounds: Option<&[usize]>,
    state: &mut [f32],
    out: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let (states, parts) = check_weights(&given)?;
    let [_, entries, len, channels] = given.x.shape();
    check_shape("out", out.shape(), given.x.shape())?;
    let all = sequences(entries, len, bounds)?;
    check_len("state", state.len(), all.len() * parts * channels * states)?;
    let blocks = channels.div_ceil(WIDTH);
    let (isa, out, to) = (simd::current(), &*out, state.as_mut_ptr() as usize);
    // States are padded to whole groups with zeros.
    let padded = states.next_multiple_of(TOGETHER);
    for_each(execution, all.len() * blocks, |i| {
        let (sequence, block) = (i / blocks, block_channels(i % blocks, channels));
        let item = Item { given: &given, sequence: &all[sequence], block, channels, states, padded, parts, out };
        let first = sequence * parts * channels * states;
        with_scratch(|scratch| {
            let buffer = scratch.extra.take(2 * TOKENS * WIDTH + 4 * parts * padded * WIDTH + WIDTH);
            let (h, buffer) = buffer.split_at_mut(parts * padded * WIDTH);
            let at = |part: usize, channel: usize, n: usize| {
                // SAFETY: inside `state`; each item has its own channels of its own sequence.
                unsafe { (to as *mut f32).add(first + (part * channels + block.0 + channel) * states + n) }
            };
            h.fill(0.0);
            for part in 0..parts {
                for (n, row) in h[part * padded * WIDTH..].chunks_exact_mut(WIDTH).take(states).enumerate() {
                    for (channel, h) in row.iter_mut().enumerate().take(block.1) {
                        // SAFETY: as `at` says.
                        *h = unsafe { *at(part, channel, n) };
                    }
                }
            }
            if parts == 1 {
                dispatch(isa, Run::<1> { item, h, buffer });
            } else {
                dispatch(isa, Run::<2> { item, h, buffer });
            }
            for part in 0..parts {
                for (n, row) in h[part * padded * WIDTH..].chunks_exact(WIDTH).take(states).enumerate() {
                    for (channel, h) in row.iter().enumerate().take(block.1) {
                        // SAFETY: as `at` says.
                        unsafe { *at(part, channel, n) = *h };
                    }
                }
            }
        });
    })
}

/// Checks weights; how many states a channel has, and of how many parts each is.
pub(super) fn check_weights(given: &DiagonalScan) -> Result<(usize, usize)> {
    let [_, entries, len, channels] = given.x.shape();
    check_shape("x", given.x.shape(), [1, entries, len, channels])?;
    let size = given.decay_less_1[0].len();
    let states = size.checked_div(channels).unwrap_or(0);
    let parts = if given.decay_less_1[1].is_empty() { 1 } else { 2 };
    for (name, values) in [("decay", given.decay_less_1), ("b", given.b), ("c", given.c)] {
        check_len(name, values[0].len(), channels * states)?;
        check_len(name, values[1].len(), (parts - 1) * channels * states)?;
    }
    check_len("skip", given.skip.map_or(channels, <[f32]>::len), channels)?;
    Ok((states, parts))
}

struct Item<'a> {
    given: &'a DiagonalScan<'a>,
    sequence: &'a Sequence,
    block: (usize, usize),
    channels: usize,
    states: usize,
    padded: usize,
    parts: usize,
    out: &'a TensorViewMut<'a>,
}

struct Run<'a, const PARTS: usize> {
    item: Item<'a>,
    /// States, `[PARTS, padded, WIDTH]`.
    h: &'a mut [f32],
    buffer: &'a mut [f32],
}

impl<const PARTS: usize> Kernel for Run<'_, PARTS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Run { item: Item { given, sequence, block, channels, states, padded, parts, out }, h, buffer } = self;
        assert!(parts == PARTS);
        let size = PARTS * padded * WIDTH;
        let (x, rest) = buffer.split_at_mut(TOKENS * WIDTH);
        let (y, rest) = rest.split_at_mut(TOKENS * WIDTH);
        let (weights, skip) = rest.split_at_mut(3 * size);
        weights.fill(0.0);
        for (kind, values) in [given.decay_less_1, given.b, given.c].into_iter().enumerate() {
            for (part, values) in values.into_iter().enumerate().take(PARTS) {
                let to = &mut weights[kind * size + part * padded * WIDTH..];
                for (n, row) in to.chunks_exact_mut(WIDTH).take(states).enumerate() {
                    for (channel, w) in row.iter_mut().enumerate().take(block.1) {
                        *w = values[(block.0 + channel) * states + n];
                    }
                }
            }
        }
        debug_assert!(block.0 + block.1 <= channels);
        skip[..WIDTH].fill(0.0);
        if let Some(from) = given.skip {
            skip[..block.1].copy_from_slice(&from[block.0..block.0 + block.1]);
        }
        let place = Place { batch: 0, head: sequence.entry, channel: block.0, channels: block.1 };
        let mut row = sequence.rows.start;
        while row < sequence.rows.end {
            let part = row..(row + TOKENS).min(sequence.rows.end);
            let n = part.len();
            load(s, &given.x, place, part.clone(), x, WIDTH);
            for at in (0..block.1).step_by(S::LANES) {
                first(s, x, skip, y, at, n);
                for group in (0..padded).step_by(TOGETHER) {
                    tile::<S, PARTS>(s, Tile { x, y, h, weights, padded, group, at, rows: n });
                }
                if given.silu {
                    for t in 0..n {
                        // SAFETY: the tile has n rows of WIDTH floats, and `at` is a multiple of LANES inside one.
                        unsafe {
                            let p = y.as_mut_ptr().add(t * WIDTH + at);
                            s.store(p, silu(s, s.load(p)));
                        }
                    }
                }
            }
            store(out, place, part, y, WIDTH);
            row += n;
        }
    }
}

/// What inputs add to their own outputs.
#[inline(always)]
pub(super) fn first<S: Simd>(s: S, x: &[f32], skip: &[f32], y: &mut [f32], at: usize, rows: usize) {
    assert!(x.len() >= rows * WIDTH && y.len() >= rows * WIDTH && skip.len() >= WIDTH && at + S::LANES <= WIDTH);
    // SAFETY: vectors from `at` on in rows of WIDTH floats, by the assertion.
    unsafe {
        let skip = s.load(skip.as_ptr().add(at));
        for t in 0..rows {
            s.store(y.as_mut_ptr().add(t * WIDTH + at), s.mul(skip, s.load(x.as_ptr().add(t * WIDTH + at))));
        }
    }
}

pub(super) struct Tile<'a> {
    pub(super) x: &'a [f32],
    pub(super) y: &'a mut [f32],
    pub(super) h: &'a mut [f32],
    /// Decays less 1, input weights and output weights, each as `h`.
    pub(super) weights: &'a [f32],
    pub(super) padded: usize,
    /// The first state.
    pub(super) group: usize,
    /// The first channel.
    pub(super) at: usize,
    pub(super) rows: usize,
}

/// A vector of channels and a few states of each, row after row.
#[inline(always)]
pub(super) fn tile<S: Simd, const PARTS: usize>(s: S, tile: Tile) {
    let Tile { x, y, h, weights, padded, group, at, rows } = tile;
    let size = PARTS * padded * WIDTH;
    assert!(x.len() >= rows * WIDTH && y.len() >= rows * WIDTH && at + S::LANES <= WIDTH);
    assert!(h.len() >= size && weights.len() >= 3 * size && group + TOGETHER <= padded);
    // SAFETY: vectors from `at` on in rows of WIDTH floats; rows `group..group + TOGETHER` of each part are there by the assertions.
    unsafe {
        let start = |kind: usize, part: usize, n: usize| {
            kind * size + (part * padded + group + n) * WIDTH + at // of a row of weights
        };
        let mut state = [[s.zero(); TOGETHER]; PARTS];
        let (mut decay, mut b, mut c) = (state, state, state);
        for part in 0..PARTS {
            for n in 0..TOGETHER {
                state[part][n] = s.load(h.as_ptr().add(start(0, part, n)));
                decay[part][n] = s.load(weights.as_ptr().add(start(0, part, n)));
                b[part][n] = s.load(weights.as_ptr().add(start(1, part, n)));
                c[part][n] = s.load(weights.as_ptr().add(start(2, part, n)));
            }
        }
        for t in 0..rows {
            let input = s.load(x.as_ptr().add(t * WIDTH + at));
            let p = y.as_mut_ptr().add(t * WIDTH + at);
            let mut sum = s.load(p);
            for n in 0..TOGETHER {
                let re = s.fma(b[0][n], input, state[0][n]);
                if PARTS == 1 {
                    state[0][n] = s.fma(decay[0][n], state[0][n], re);
                } else {
                    let (old_re, old_im) = (state[0][n], state[PARTS - 1][n]);
                    let (d_re, d_im) = (decay[0][n], decay[PARTS - 1][n]);
                    let im = s.fma(b[PARTS - 1][n], input, old_im);
                    state[0][n] = s.fma(d_re, old_re, s.sub(re, s.mul(d_im, old_im)));
                    state[PARTS - 1][n] = s.fma(d_re, old_im, s.fma(d_im, old_re, im));
                    sum = s.sub(sum, s.mul(c[PARTS - 1][n], state[PARTS - 1][n]));
                }
                sum = s.fma(c[0][n], state[0][n], sum);
            }
            s.store(p, sum);
        }
        for (part, states) in state.into_iter().enumerate() {
            for (n, state) in states.into_iter().enumerate() {
                s.store(h.as_mut_ptr().add(start(0, part, n)), state);
            }
        }
    }
}
