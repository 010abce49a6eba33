//! Gradients of the selective scan.

use super::super::pointwise::{sigmoid, silu};
use super::super::tiles::{
    Place, Sequence, WIDTH, block_channels, check_len, check_shape, load, sequences, store, transposed,
};
use super::selective::{SelectiveScan, TOKENS, Tile, check_scan, steps, tile};
use crate::dense::scratch::with_scratch;
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{DType, Error, Result, TensorView, TensorViewMut};
use std::ops::Range;

/// Where gradients go: f32 arrays in the shapes of the arguments, which they replace.
pub struct SelectiveOutputs<'a> {
    /// Of inputs.
    pub x: TensorViewMut<'a>,
    /// Of step sizes.
    pub dt: TensorViewMut<'a>,
    /// Of rates.
    pub a: &'a mut [f32],
    /// Of input weights.
    pub b: TensorViewMut<'a>,
    /// Of output weights.
    pub c: TensorViewMut<'a>,
    /// Of the weights of inputs in outputs.
    pub skip: &'a mut [f32],
    /// Of what is added to step sizes.
    pub dt_bias: &'a mut [f32],
    /// Of gates; there if these are.
    pub gate: Option<TensorViewMut<'a>>,
    /// Gradients of the states after the last rows; receives those of the states before the first.
    pub state: &'a mut [f32],
}

/// Rows of weights whose gradients are added up as one item.
const ROWS: usize = 256;

/// Gradients of [`super::selective_scan`], which began with `first` states, for the gradient `d_out` of its outputs.
///
/// States before every sixteenth row are made anew and kept, for the channels at hand; those between are made once more. Each block
/// of 64 channels leaves its share of the gradients of input and output weights, which are added in the order of the blocks: memory
/// of `2 channels / 64` times the two arrays.
pub fn selective_scan_backward(
    given: SelectiveScan,
    bounds: Option<&[usize]>,
    first: &[f32],
    d_out: TensorView,
    to: &mut SelectiveOutputs,
    execution: &Execution,
) -> Result<()> {
    check_scan(&given, execution)?;
    let [_, entries, len, channels] = given.x.shape();
    let states = given.b.shape()[3];
    let all = sequences(entries, len, bounds)?;
    check_shape("d_out", d_out.shape(), given.x.shape())?;
    let views = [("dx", Some(&to.x)), ("d_dt", Some(&to.dt)), ("dz", to.gate.as_ref())];
    for (name, view) in views {
        if let Some(view) = view {
            check_output(name, view, given.x.shape())?;
        }
    }
    if to.gate.is_some() != given.gate.is_some() {
        return Err(Error::value("dz", "one without the other", "a gate and its gradient, or neither"));
    }
    check_output("db", &to.b, given.b.shape())?;
    check_output("dc", &to.c, given.b.shape())?;
    check_len("da", to.a.len(), channels * states)?;
    check_len("d_skip", to.skip.len(), channels)?;
    check_len("d_dt_bias", to.dt_bias.len(), channels)?;
    check_len("initial_state", first.len(), all.len() * channels * states)?;
    check_len("d_state", to.state.len(), first.len())?;

    let blocks = channels.div_ceil(WIDTH);
    // Of input and output weights, by blocks of channels; of rates, skips and biases, by sequences.
    let mut shares = vec![0f32; blocks * entries * len * 2 * states];
    let mut sums = vec![0f32; all.len() * blocks * (states + 2) * WIDTH];
    let isa = simd::current();
    let [to_state, to_shares, to_sums] =
        [to.state.as_mut_ptr() as usize, shares.as_mut_ptr() as usize, sums.as_mut_ptr() as usize];
    let views = &*to;
    for_each(execution, all.len() * blocks, |i| {
        let (sequence, n) = (i / blocks, i % blocks);
        let block = block_channels(n, channels);
        let (at, count) = ((sequence * channels + block.0) * states, block.1 * states);
        let rows = all[sequence].rows.clone();
        let share = ((n * entries + all[sequence].entry) * len + rows.start) * 2 * states;
        let size = (states + 2) * WIDTH;
        // SAFETY: each item has the states of its own sequence and channels, its rows of its block's share, and sums of its own, in
        // arrays that this call borrows.
        let (d_state, share, sums) = unsafe {
            (
                std::slice::from_raw_parts_mut((to_state as *mut f32).add(at), count),
                std::slice::from_raw_parts_mut((to_shares as *mut f32).add(share), rows.len() * 2 * states),
                std::slice::from_raw_parts_mut((to_sums as *mut f32).add(i * size), size),
            )
        };
        let first = &first[at..at + count];
        let sequence = &all[sequence];
        with_scratch(|scratch| {
            let padded = states.next_multiple_of(simd::MAX_LANES);
            let buffer = scratch.extra.carve([
                TOKENS * WIDTH,
                TOKENS * WIDTH,
                TOKENS * WIDTH,
                TOKENS * WIDTH,
                TOKENS * WIDTH,
                TOKENS * WIDTH,
                TOKENS * padded,
                TOKENS * padded,
                TOKENS * states * simd::MAX_LANES,
                TOKENS * states * simd::MAX_LANES,
                states * WIDTH,
                states * WIDTH,
                states * WIDTH,
                TOKENS * states * WIDTH,
                3 * WIDTH,
            ]);
            let (given, to) = (&given, views);
            dispatch(
                isa,
                Item { given, sequence, block, first, d_out: &d_out, to, d_state, share, sums, padded, buffer },
            );
        });
    })?;

    // One block after another, and one sequence after another.
    for_each(execution, (entries * len).div_ceil(ROWS), |i| {
        for row in i * ROWS..((i + 1) * ROWS).min(entries * len) {
            for (part, view) in [&views.b, &views.c].into_iter().enumerate() {
                let target = view.row_ptr::<f32>(0, row / len, row % len);
                // SAFETY: the row has `states` floats, and this item alone writes it.
                let target = unsafe { std::slice::from_raw_parts_mut(target, states) };
                target.fill(0.0);
                for n in 0..blocks {
                    let from = &shares[((n * entries * len + row) * 2 + part) * states..][..states];
                    for (target, x) in target.iter_mut().zip(from) {
                        *target += x;
                    }
                }
            }
        }
    })?;
    for channel in 0..channels {
        let of = |row: usize| -> f32 {
            let at = |sequence: usize| ((sequence * blocks + channel / WIDTH) * (states + 2) + row) * WIDTH;
            (0..all.len()).map(|sequence| sums[at(sequence) + channel % WIDTH]).sum()
        };
        for n in 0..states {
            to.a[channel * states + n] = of(n);
        }
        to.skip[channel] = of(states);
        to.dt_bias[channel] = of(states + 1);
    }
    Ok(())
}

pub(super) fn check_output(name: &'static str, view: &TensorViewMut, shape: [usize; 4]) -> Result<()> {
    check_shape(name, view.shape(), shape)?;
    if view.dtype() == DType::F32 { Ok(()) } else { Err(Error::dtype(name, view.dtype(), "float32")) }
}

/// A block of channels of a sequence.
struct Item<'a> {
    given: &'a SelectiveScan<'a>,
    sequence: &'a Sequence,
    /// First channel and channels.
    block: (usize, usize),
    first: &'a [f32],
    d_out: &'a TensorView<'a>,
    to: &'a SelectiveOutputs<'a>,
    d_state: &'a mut [f32],
    /// Gradients of input and output weights, rows of `2 states`.
    share: &'a mut [f32],
    /// Gradients of rates, skips and biases, rows of `WIDTH`.
    sums: &'a mut [f32],
    /// States in rows of a tile.
    padded: usize,
    buffer: [&'a mut [f32]; 15],
}

impl Kernel for Item<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { given, sequence, block, first, d_out, to, d_state, share, sums, padded, buffer } = self;
        let [x, raw, dt, y, z, dy, b, c, db, dc, a, h, dh, held, rows_of_channels] = buffer;
        let (skip, rest) = rows_of_channels.split_at_mut(WIDTH);
        let (bias, none) = rest.split_at_mut(WIDTH);
        let states = given.b.shape()[3];
        none.fill(0.0);
        for (to, from) in [(&mut *skip, given.skip), (&mut *bias, given.dt_bias)] {
            to[..WIDTH].fill(0.0);
            if let Some(from) = from {
                to[..block.1].copy_from_slice(&from[block.0..block.0 + block.1]);
            }
        }
        let own = &given.a[block.0 * states..(block.0 + block.1) * states];
        transposed(own, states, (0, block.1), 0.0, a);
        for a in a.iter_mut() {
            *a *= std::f32::consts::LOG2_E;
        }
        transposed(first, states, (0, block.1), 0.0, h);
        transposed(d_state, states, (0, block.1), 0.0, dh);
        sums.fill(0.0);
        let (d_rates, rest) = sums.split_at_mut(states * WIDTH);
        let (d_skip, d_bias) = rest.split_at_mut(WIDTH);
        let place = Place { batch: 0, head: sequence.entry, channel: block.0, channels: block.1 };
        let weights = Place { channel: 0, channels: states, ..place };
        let (start, end) = (sequence.rows.start, sequence.rows.end);
        let tiles = sequence.rows.len().div_ceil(TOKENS);
        let part = |i: usize| start + i * TOKENS..end.min(start + (i + 1) * TOKENS);
        let vectors = WIDTH.min(block.1.next_multiple_of(S::LANES));
        let size = states * WIDTH;
        let mut kept = vec![0f32; tiles * size];
        for i in 0..tiles {
            kept[i * size..][..size].copy_from_slice(&h[..size]);
            if i + 1 < tiles {
                let now = part(i);
                load(s, &given.x, place, now.clone(), x, WIDTH);
                load(s, &given.dt, place, now.clone(), dt, WIDTH);
                load(s, &given.b, weights, now.clone(), b, padded);
                load(s, &given.c, weights, now.clone(), c, padded);
                steps(s, &mut dt[..now.len() * WIDTH], bias, given.softplus);
                for at in (0..vectors).step_by(S::LANES) {
                    tile(s, Tile { x, dt, b, c, padded, a, h, states, at, rows: now.len(), y });
                }
            }
        }
        for i in (0..tiles).rev() {
            let now = part(i);
            let n = now.len();
            load(s, &given.x, place, now.clone(), x, WIDTH);
            load(s, &given.dt, place, now.clone(), raw, WIDTH);
            load(s, &given.b, weights, now.clone(), b, padded);
            load(s, &given.c, weights, now.clone(), c, padded);
            load(s, d_out, place, now.clone(), dy, WIDTH);
            steps(s, &mut raw[..n * WIDTH], bias, false);
            dt[..n * WIDTH].copy_from_slice(&raw[..n * WIDTH]);
            steps(s, &mut dt[..n * WIDTH], none, given.softplus);
            h[..size].copy_from_slice(&kept[i * size..][..size]);
            // States before each row, and outputs.
            for t in 0..n {
                held[t * size..][..size].copy_from_slice(&h[..size]);
                let (x, dt, y) = (&x[t * WIDTH..], &dt[t * WIDTH..], &mut y[t * WIDTH..]);
                let (b, c) = (&b[t * padded..], &c[t * padded..]);
                for at in (0..vectors).step_by(S::LANES) {
                    tile(s, Tile { x, dt, b, c, padded, a, h, states, at, rows: 1, y });
                }
            }
            if let (Some(gate), Some(to)) = (&given.gate, &to.gate) {
                load(s, gate, place, now.clone(), z, WIDTH);
                through_gate(s, n, [x, skip, y], z, dy);
                store(to, place, now.clone(), z, WIDTH);
            }
            db[..n * states * S::LANES].fill(0.0);
            dc[..n * states * S::LANES].fill(0.0);
            for at in (0..vectors).step_by(S::LANES) {
                let back = Back { x, raw, dt, dy, b, c, db, dc, a, dh, held, skip, d_rates, d_skip, d_bias };
                rows_back(s, back, Shape { rows: n, states, padded, at, softplus: given.softplus });
            }
            // Gradients of inputs and steps have taken the places of gradients of outputs and of steps.
            store(&to.x, place, now.clone(), dy, WIDTH);
            store(&to.dt, place, now.clone(), dt, WIDTH);
            sum_lanes(s, now.start - start..now.end - start, states, [db, dc], share);
        }
        for (n, row) in dh.chunks_exact(WIDTH).take(states).enumerate() {
            for (channel, dh) in row.iter().enumerate().take(block.1) {
                d_state[channel * states + n] = *dh;
            }
        }
    }
}

/// Gates of outputs: `dy` becomes the gradient of what is gated, `z` that of itself.
#[inline(always)]
fn through_gate<S: Simd>(s: S, rows: usize, [x, skip, y]: [&[f32]; 3], z: &mut [f32], dy: &mut [f32]) {
    let size = rows * WIDTH;
    assert!(x.len() >= size && y.len() >= size && z.len() >= size && dy.len() >= size && skip.len() >= WIDTH);
    for i in (0..size).step_by(S::LANES) {
        // SAFETY: vectors inside rows of WIDTH floats, a multiple of LANES.
        unsafe {
            let (gate, d) = (s.load(z.as_ptr().add(i)), s.load(dy.as_ptr().add(i)));
            let gated =
                s.fma(s.load(skip.as_ptr().add(i % WIDTH)), s.load(x.as_ptr().add(i)), s.load(y.as_ptr().add(i)));
            // silu' = sigmoid (1 + z (1 - sigmoid))
            let open = sigmoid(s, gate);
            let slope = s.mul(open, s.fma(gate, s.sub(s.splat(1.0), open), s.splat(1.0)));
            s.store(dy.as_mut_ptr().add(i), s.mul(d, silu(s, gate)));
            s.store(z.as_mut_ptr().add(i), s.mul(s.mul(d, gated), slope));
        }
    }
}

#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    states: usize,
    padded: usize,
    /// The first channel.
    at: usize,
    softplus: bool,
}

struct Back<'a> {
    x: &'a [f32],
    /// Step sizes before the softplus.
    raw: &'a [f32],
    /// Step sizes, which their gradients replace.
    dt: &'a mut [f32],
    /// Gradients of outputs, which those of inputs replace.
    dy: &'a mut [f32],
    b: &'a [f32],
    c: &'a [f32],
    /// Gradients of weights, `[rows, states, LANES]`: sums over channels, lane by lane.
    db: &'a mut [f32],
    dc: &'a mut [f32],
    /// Rates times the logarithm of e to base 2.
    a: &'a [f32],
    dh: &'a mut [f32],
    /// States before each row.
    held: &'a [f32],
    skip: &'a [f32],
    d_rates: &'a mut [f32],
    d_skip: &'a mut [f32],
    d_bias: &'a mut [f32],
}

/// A vector of channels, from the last row to the first.
#[inline(always)]
fn rows_back<S: Simd>(s: S, back: Back, shape: Shape) {
    let Back { x, raw, dt, dy, b, c, db, dc, a, dh, held, skip, d_rates, d_skip, d_bias } = back;
    let Shape { rows, states, padded, at, softplus } = shape;
    let size = states * WIDTH;
    assert!(at + S::LANES <= WIDTH && padded >= states);
    assert!(
        x.len() >= rows * WIDTH && raw.len() >= rows * WIDTH && dt.len() >= rows * WIDTH && dy.len() >= rows * WIDTH
    );
    assert!(b.len() >= rows * padded && c.len() >= rows * padded && held.len() >= rows * size);
    assert!(db.len() >= rows * states * S::LANES && dc.len() >= rows * states * S::LANES);
    assert!(a.len() >= size && dh.len() >= size && d_rates.len() >= size);
    assert!(skip.len() >= WIDTH && d_skip.len() >= WIDTH && d_bias.len() >= WIDTH);
    // SAFETY: every vector is in a row of WIDTH floats, from `at` on, or one of LANES; the assertions above are about both.
    unsafe {
        let factor = s.load(skip.as_ptr().add(at));
        let (mut of_skip, mut of_bias) = (s.load(d_skip.as_ptr().add(at)), s.load(d_bias.as_ptr().add(at)));
        for t in (0..rows).rev() {
            let place = t * WIDTH + at;
            let (step, input) = (s.load(dt.as_ptr().add(place)), s.load(x.as_ptr().add(place)));
            let d = s.load(dy.as_ptr().add(place));
            let stepped = s.mul(step, input);
            // Sums over states of gradients times input weights, and of gradients of decays times rates.
            let (mut written, mut decayed) = (s.zero(), s.zero());
            for n in 0..states {
                let rate = s.load(a.as_ptr().add(n * WIDTH + at));
                let decay = s.exp2(s.mul(step, rate));
                let left = s.mul(decay, s.load(held.as_ptr().add(t * size + n * WIDTH + at)));
                let (weight, out) =
                    (s.splat(*b.get_unchecked(t * padded + n)), s.splat(*c.get_unchecked(t * padded + n)));
                let after = s.fma(stepped, weight, left);
                let p = dh.as_mut_ptr().add(n * WIDTH + at);
                let own = s.fma(out, d, s.load(p));
                let (to_b, to_c) = (db.as_mut_ptr(), dc.as_mut_ptr());
                let (to_b, to_c) = (to_b.add((t * states + n) * S::LANES), to_c.add((t * states + n) * S::LANES));
                s.store(to_b, s.fma(own, stepped, s.load(to_b)));
                s.store(to_c, s.fma(after, d, s.load(to_c)));
                let kept = s.mul(own, left);
                let to_rate = d_rates.as_mut_ptr().add(n * WIDTH + at);
                s.store(to_rate, s.fma(kept, step, s.load(to_rate)));
                decayed = s.fma(kept, rate, decayed);
                written = s.fma(own, weight, written);
                s.store(p, s.mul(own, decay));
            }
            of_skip = s.fma(d, input, of_skip);
            s.store(dy.as_mut_ptr().add(place), s.fma(step, written, s.mul(factor, d)));
            let mut d_step = s.fma(decayed, s.splat(std::f32::consts::LN_2), s.mul(input, written));
            if softplus {
                d_step = s.mul(d_step, sigmoid(s, s.load(raw.as_ptr().add(place))));
            }
            of_bias = s.add(of_bias, d_step);
            s.store(dt.as_mut_ptr().add(place), d_step);
        }
        s.store(d_skip.as_mut_ptr().add(at), of_skip);
        s.store(d_bias.as_mut_ptr().add(at), of_bias);
    }
}

/// Adds up the lanes of gradients of weights.
#[inline(always)]
fn sum_lanes<S: Simd>(s: S, rows: Range<usize>, states: usize, from: [&mut [f32]; 2], to: &mut [f32]) {
    for (t, row) in rows.enumerate() {
        for (part, from) in from.iter().enumerate() {
            let to = &mut to[(row * 2 + part) * states..][..states];
            for (to, lanes) in to.iter_mut().zip(from[t * states * S::LANES..].chunks_exact(S::LANES)) {
                // SAFETY: the chunk has LANES floats.
                *to = s.sum(unsafe { s.load(lanes.as_ptr()) });
            }
        }
    }
}
