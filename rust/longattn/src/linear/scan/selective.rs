//! The scan whose decay, input and output weights depend on the token.

use super::super::pointwise::{silu, softplus};
use super::super::tiles::{
    Place, Sequence, WIDTH, block_channels, check_len, check_shape, load, sequences, store, transposed,
};
use crate::dense::scratch::with_scratch;
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Element, Error, Result, TensorView, TensorViewMut, with_element};
use std::sync::atomic::{AtomicBool, Ordering};

/// Tokens of one tile: inputs, outputs and states of a block of channels stay in the first cache.
pub(super) const TOKENS: usize = 16;

/// What [`selective_scan`] reads. Tensors are `[1, batch, length, ...]`.
#[derive(Clone, Copy)]
pub struct SelectiveScan<'a> {
    /// Inputs of the channels.
    pub x: TensorView<'a>,
    /// Step sizes of the channels.
    pub dt: TensorView<'a>,
    /// Rates `[channels, states]`.
    pub a: &'a [f32],
    /// Input weights of the states.
    pub b: TensorView<'a>,
    /// Output weights of the states.
    pub c: TensorView<'a>,
    /// Weight of a channel's input in its output.
    pub skip: Option<&'a [f32]>,
    /// Added to the step sizes of a channel.
    pub dt_bias: Option<&'a [f32]>,
    /// Whether step sizes are `ln(1 + e^(dt + dt_bias))`.
    pub softplus: bool,
    /// Outputs are multiplied by `silu` of it.
    pub gate: Option<TensorView<'a>>,
}

/// For each channel e and state n, `h = exp(dt a) h + dt b x`, and `out = sum over n of c h + skip x`, row after row.
///
/// `state`, `[sequences, channels, states]`, holds the states before the first row, and receives those after the last. With `bounds` a
/// batch of 1 holds sequences one after another.
pub fn selective_scan(
    given: SelectiveScan,
    bounds: Option<&[usize]>,
    state: &mut [f32],
    out: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    check_scan(&given, execution)?;
    let [_, entries, len, channels] = given.x.shape();
    let states = given.b.shape()[3];
    check_shape("out", out.shape(), given.x.shape())?;
    let all = sequences(entries, len, bounds)?;
    check_len("state", state.len(), all.len() * channels * states)?;
    let blocks = channels.div_ceil(WIDTH);
    let (isa, out, to) = (simd::current(), &*out, state.as_mut_ptr() as usize);
    for_each(execution, all.len() * blocks, |i| {
        let (sequence, block) = (i / blocks, block_channels(i % blocks, channels));
        let (at, n) = ((sequence * channels + block.0) * states, block.1 * states);
        // SAFETY: each item has the states of its own sequence and channels, which `state` holds and this call borrows.
        let state = unsafe { std::slice::from_raw_parts_mut((to as *mut f32).add(at), n) };
        let item = Item { given: &given, sequence: &all[sequence], block, states, state, out };
        with_scratch(|scratch| {
            let rows = if item.sequence.rows.len() == 1 { 1 } else { TOKENS };
            let padded = states.next_multiple_of(simd::MAX_LANES);
            let buffer = scratch.extra.take(rows * (4 * WIDTH + 2 * padded) + 2 * states * WIDTH + 2 * WIDTH);
            dispatch(isa, Run { item, rows, padded, buffer });
        });
    })
}

/// Shapes that agree, and steps that are steps.
pub(super) fn check_scan(given: &SelectiveScan, execution: &Execution) -> Result<()> {
    let [one, entries, len, channels] = given.x.shape();
    let states = given.b.shape()[3];
    check_shape("x", given.x.shape(), [1, entries, len, channels])?;
    check_shape("dt", given.dt.shape(), given.x.shape())?;
    check_shape("b", given.b.shape(), [one, entries, len, states])?;
    check_shape("c", given.c.shape(), given.b.shape())?;
    if let Some(gate) = given.gate {
        check_shape("z", gate.shape(), given.x.shape())?;
    }
    check_len("a", given.a.len(), channels * states)?;
    for (name, values) in [("skip", given.skip), ("dt_bias", given.dt_bias)] {
        check_len(name, values.map_or(channels, <[f32]>::len), channels)?;
    }
    check_steps(given, execution)
}

/// Rows of `dt` that are checked as one item.
const CHECKED: usize = 256;

/// Steps of at least 0, or any with a softplus, that are neither NaN nor infinite.
fn check_steps(given: &SelectiveScan, execution: &Execution) -> Result<()> {
    let [_, entries, len, channels] = given.dt.shape();
    let least = if given.softplus { f32::NEG_INFINITY } else { 0.0 };
    let step = |entry: usize, row: usize, channel: usize| {
        let x = with_element!(given.dt.dtype(), T => given.dt.row::<T>(0, entry, row)[channel].to_f32());
        x + given.dt_bias.map_or(0.0, |bias| bias[channel])
    };
    let bad = AtomicBool::new(false);
    for_each(execution, entries * len.div_ceil(CHECKED), |i| {
        let (entry, first) = (i % entries, i / entries * CHECKED);
        for row in first..(first + CHECKED).min(len) {
            // Without branches, so that the compiler vectorises it.
            let good = with_element!(given.dt.dtype(), T => {
                let steps = given.dt.row::<T>(0, entry, row).iter().map(|x| x.to_f32());
                let fits = |good: bool, x: f32| good & (x >= least) & (x <= f32::MAX);
                match given.dt_bias {
                    Some(bias) => steps.zip(bias).fold(true, |good, (x, bias)| fits(good, x + bias)),
                    None => steps.fold(true, fits),
                }
            });
            if !good {
                bad.store(true, Ordering::Relaxed);
            }
        }
    })?;
    if !bad.into_inner() {
        return Ok(());
    }
    let first = (0..entries * len * channels)
        .map(|i| step(i / channels / len, i / channels % len, i % channels))
        .find(|x| !(least..=f32::MAX).contains(x));
    let expected = if given.softplus { "a finite one" } else { "finite steps of at least 0 (or softplus)" };
    Err(Error::value("dt", format!("a step of {}", first.unwrap_or(f32::NAN)), expected))
}

struct Item<'a> {
    given: &'a SelectiveScan<'a>,
    sequence: &'a Sequence,
    /// First channel and channels.
    block: (usize, usize),
    states: usize,
    state: &'a mut [f32],
    out: &'a TensorViewMut<'a>,
}

struct Run<'a> {
    item: Item<'a>,
    /// Rows of a tile.
    rows: usize,
    /// States in rows of a tile.
    padded: usize,
    buffer: &'a mut [f32],
}

impl Kernel for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Run { item: Item { given, sequence, block, states, state, out }, rows, padded, buffer } = self;
        let (x, rest) = buffer.split_at_mut(rows * WIDTH);
        let (dt, rest) = rest.split_at_mut(rows * WIDTH);
        let (y, rest) = rest.split_at_mut(rows * WIDTH);
        let (z, rest) = rest.split_at_mut(rows * WIDTH);
        let (b, rest) = rest.split_at_mut(rows * padded);
        let (c, rest) = rest.split_at_mut(rows * padded);
        let (a, rest) = rest.split_at_mut(states * WIDTH);
        let (h, rest) = rest.split_at_mut(states * WIDTH);
        let (skip, bias) = rest.split_at_mut(WIDTH);
        let step = sequence.rows.len() == 1;
        for (to, from) in [(&mut *skip, given.skip), (&mut *bias, given.dt_bias)] {
            to[..WIDTH].fill(0.0);
            if let Some(from) = from {
                to[..block.1].copy_from_slice(&from[block.0..block.0 + block.1]);
            }
        }
        if !step {
            let own = &given.a[block.0 * states..(block.0 + block.1) * states];
            transposed(own, states, (0, block.1), 0.0, a);
            for a in a.iter_mut() {
                *a *= std::f32::consts::LOG2_E;
            }
            transposed(state, states, (0, block.1), 0.0, h);
        }
        let place = Place { batch: 0, head: sequence.entry, channel: block.0, channels: block.1 };
        let weights = Place { channel: 0, channels: states, ..place };
        let mut row = sequence.rows.start;
        while row < sequence.rows.end {
            let part = row..(row + rows).min(sequence.rows.end);
            load(s, &given.x, place, part.clone(), x, WIDTH);
            load(s, &given.dt, place, part.clone(), dt, WIDTH);
            load(s, &given.b, weights, part.clone(), b, padded);
            load(s, &given.c, weights, part.clone(), c, padded);
            let n = part.len();
            steps(s, &mut dt[..n * WIDTH], bias, given.softplus);
            if step {
                let a = &given.a[block.0 * states..(block.0 + block.1) * states];
                one_row(s, Row { x, dt, b, c, a, h: state, states, y, channels: block.1 });
            } else {
                for at in (0..WIDTH.min(block.1.next_multiple_of(S::LANES))).step_by(S::LANES) {
                    tile(s, Tile { x, dt, b, c, padded, a, h, states, at, rows: n, y });
                }
            }
            if let Some(gate) = &given.gate {
                load(s, gate, place, part.clone(), z, WIDTH);
            }
            finish(s, &mut y[..n * WIDTH], x, skip, given.gate.is_some().then_some(&*z));
            store(out, place, part, y, WIDTH);
            row += n;
        }
        if !step {
            for (n, row) in h.chunks_exact(WIDTH).take(states).enumerate() {
                for (channel, h) in row.iter().enumerate().take(block.1) {
                    state[channel * states + n] = *h;
                }
            }
        }
    }
}

/// Step sizes: bias added, through the softplus where asked for.
#[inline(always)]
pub(super) fn steps<S: Simd>(s: S, dt: &mut [f32], bias: &[f32], through: bool) {
    for row in dt.chunks_exact_mut(WIDTH) {
        for at in (0..WIDTH).step_by(S::LANES) {
            // SAFETY: rows and `bias` have WIDTH floats, a multiple of LANES.
            unsafe {
                let p = row.as_mut_ptr().add(at);
                let sum = s.add(s.load(p), s.load(bias.as_ptr().add(at)));
                s.store(p, if through { softplus(s, sum) } else { sum });
            }
        }
    }
}

/// Adds the share of the inputs, and multiplies by the gates.
#[inline(always)]
fn finish<S: Simd>(s: S, y: &mut [f32], x: &[f32], skip: &[f32], z: Option<&[f32]>) {
    for (t, row) in y.chunks_exact_mut(WIDTH).enumerate() {
        for at in (0..WIDTH).step_by(S::LANES) {
            // SAFETY: rows of `x`, `y` and `z`, and `skip`, have WIDTH floats, a multiple of LANES.
            unsafe {
                let p = row.as_mut_ptr().add(at);
                let mut v = s.fma(s.load(skip.as_ptr().add(at)), s.load(x.as_ptr().add(t * WIDTH + at)), s.load(p));
                if let Some(z) = z {
                    v = s.mul(v, silu(s, s.load(z.as_ptr().add(t * WIDTH + at))));
                }
                s.store(p, v);
            }
        }
    }
}

pub(super) struct Tile<'a> {
    pub(super) x: &'a [f32],
    pub(super) dt: &'a [f32],
    pub(super) b: &'a [f32],
    pub(super) c: &'a [f32],
    pub(super) padded: usize,
    /// Rates times the logarithm of e to base 2, `[states, WIDTH]`.
    pub(super) a: &'a [f32],
    pub(super) h: &'a mut [f32],
    pub(super) states: usize,
    /// The first channel.
    pub(super) at: usize,
    pub(super) rows: usize,
    pub(super) y: &'a mut [f32],
}

/// A vector of channels, row after row.
#[inline(always)]
pub(super) fn tile<S: Simd>(s: S, tile: Tile) {
    let Tile { x, dt, b, c, padded, a, h, states, at, rows, y } = tile;
    assert!(x.len() >= rows * WIDTH && dt.len() >= rows * WIDTH && y.len() >= rows * WIDTH && at + S::LANES <= WIDTH);
    assert!(b.len() >= rows * padded && c.len() >= rows * padded && padded >= states);
    assert!(a.len() >= states * WIDTH && h.len() >= states * WIDTH);
    for t in 0..rows {
        // SAFETY: every vector is in a row of WIDTH floats, from `at` on, which the assertions above are about.
        unsafe {
            let step = s.load(dt.as_ptr().add(t * WIDTH + at));
            let input = s.mul(step, s.load(x.as_ptr().add(t * WIDTH + at)));
            let mut sum = s.zero();
            for n in 0..states {
                let state = h.as_mut_ptr().add(n * WIDTH + at);
                let decay = s.exp2(s.mul(step, s.load(a.as_ptr().add(n * WIDTH + at))));
                let added = s.mul(input, s.splat(*b.get_unchecked(t * padded + n)));
                let new = s.fma(decay, s.load(state), added);
                s.store(state, new);
                sum = s.fma(s.splat(*c.get_unchecked(t * padded + n)), new, sum);
            }
            s.store(y.as_mut_ptr().add(t * WIDTH + at), sum);
        }
    }
}

struct Row<'a> {
    x: &'a [f32],
    dt: &'a [f32],
    b: &'a [f32],
    c: &'a [f32],
    /// Rates and states, `[channels, states]`.
    a: &'a [f32],
    h: &'a mut [f32],
    states: usize,
    y: &'a mut [f32],
    channels: usize,
}

/// One row: states are read and written where they lie.
#[inline(always)]
fn one_row<S: Simd>(s: S, row: Row) {
    let Row { x, dt, b, c, a, h, states, y, channels } = row;
    y[..WIDTH].fill(0.0);
    for channel in 0..channels {
        let (step, input) = (s.splat(dt[channel]), s.splat(dt[channel] * x[channel]));
        let (rates, own) = (&a[channel * states..][..states], &mut h[channel * states..][..states]);
        let mut sum = s.zero();
        let mut n = 0;
        while n < states {
            let rest = states - n;
            // SAFETY: whole vectors inside the slices, or the ragged rest by its length; `b` and `c` are padded to MAX_LANES.
            unsafe {
                let p = own.as_mut_ptr().add(n);
                let (rate, state) = if rest >= S::LANES {
                    (s.load(rates.as_ptr().add(n)), s.load(p))
                } else {
                    (s.load_first(rates.as_ptr().add(n), rest), s.load_first(p.cast_const(), rest))
                };
                let decay = s.exp(s.mul(step, rate));
                let new = s.fma(decay, state, s.mul(input, s.load(b.as_ptr().add(n))));
                sum = s.fma(s.load(c.as_ptr().add(n)), new, sum);
                if rest >= S::LANES {
                    s.store(p, new);
                } else {
                    let mut last = [0f32; simd::MAX_LANES];
                    s.store(last.as_mut_ptr(), new);
                    std::ptr::copy_nonoverlapping(last.as_ptr(), p, rest);
                }
            }
            n += S::LANES;
        }
        y[channel] = s.sum(sum);
    }
}
