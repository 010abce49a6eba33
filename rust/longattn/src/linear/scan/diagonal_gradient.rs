//! Gradients of the scan with constant weights.

use super::super::tiles::{
    Place, Sequence, WIDTH, block_channels, check_len, check_shape, load, sequences, store, transposed,
};
use super::diagonal::{DiagonalScan, TOGETHER, TOKENS, Tile, check_weights, first, tile};
use super::gradient::check_output;
use crate::dense::scratch::with_scratch;
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Error, Result, TensorView, TensorViewMut};

/// Where gradients go: f32 arrays in the shapes of the arguments, which they replace. A complex number's is that by its real part and,
/// as the imaginary part, that by its imaginary part.
pub struct DiagonalOutputs<'a> {
    /// Of inputs.
    pub x: TensorViewMut<'a>,
    /// Of decays.
    pub decay: [&'a mut [f32]; 2],
    /// Of input weights.
    pub b: [&'a mut [f32]; 2],
    /// Of output weights.
    pub c: [&'a mut [f32]; 2],
    /// Of the weights of inputs in outputs.
    pub skip: &'a mut [f32],
    /// Gradients of the states after the last rows; receives those of the states before the first.
    pub state: &'a mut [f32],
}

/// Gradients of [`super::diagonal_scan`], which began with `start` states, for the gradient `d_out` of its outputs. Without `silu`.
///
/// States before every tile of rows are made anew and kept, for the channels at hand; those between are made once more.
pub fn diagonal_scan_backward(
    given: DiagonalScan,
    bounds: Option<&[usize]>,
    start: &[f32],
    d_out: TensorView,
    to: &mut DiagonalOutputs,
    execution: &Execution,
) -> Result<()> {
    let (states, parts) = check_weights(&given)?;
    let [_, entries, len, channels] = given.x.shape();
    if given.silu {
        return Err(Error::value("silu", "true", "false: its gradient is a product outside"));
    }
    check_shape("d_out", d_out.shape(), given.x.shape())?;
    check_output("dx", &to.x, given.x.shape())?;
    for (name, values) in [("d_decay", &to.decay), ("db", &to.b), ("dc", &to.c)] {
        check_len(name, values[0].len(), channels * states)?;
        check_len(name, values[1].len(), (parts - 1) * channels * states)?;
    }
    check_len("d_skip", to.skip.len(), channels)?;
    let all = sequences(entries, len, bounds)?;
    check_len("initial_state", start.len(), all.len() * parts * channels * states)?;
    check_len("d_state", to.state.len(), start.len())?;

    let blocks = channels.div_ceil(WIDTH);
    let padded = states.next_multiple_of(TOGETHER);
    let size = parts * padded * WIDTH;
    // Gradients of weights, and of skips, of each sequence and block of channels.
    let one = 3 * size + WIDTH;
    let mut sums = vec![0f32; all.len() * blocks * one];
    let (isa, views, to_sums, to_state) =
        (simd::current(), &to.x, sums.as_mut_ptr() as usize, to.state.as_mut_ptr() as usize);
    for_each(execution, all.len() * blocks, |i| {
        let (sequence, block) = (i / blocks, block_channels(i % blocks, channels));
        // SAFETY: each item has sums of its own in an array that this call borrows.
        let sums = unsafe { std::slice::from_raw_parts_mut((to_sums as *mut f32).add(i * one), one) };
        let tiles = all[sequence].rows.len().div_ceil(TOKENS);
        let mut kept = vec![0f32; tiles * size];
        with_scratch(|scratch| {
            let [h, d, weights, x, y, dx, history, rest] = scratch.extra.carve([
                size,
                size,
                3 * size,
                TOKENS * WIDTH,
                TOKENS * WIDTH,
                TOKENS * WIDTH,
                (TOKENS + 1) * parts * TOGETHER * simd::MAX_LANES,
                WIDTH,
            ]);
            for part in 0..parts {
                let at = ((sequence * parts + part) * channels + block.0) * states;
                // SAFETY: each item has the states of its own channels of its own sequence, in an array that this call borrows.
                let after = unsafe { std::slice::from_raw_parts((to_state as *const f32).add(at), block.1 * states) };
                let rows = part * padded * WIDTH..(part + 1) * padded * WIDTH;
                for (from, to) in [(&start[at..at + block.1 * states], &mut h[rows.clone()]), (after, &mut d[rows])] {
                    to.fill(0.0);
                    transposed(from, states, (0, block.1), 0.0, to);
                }
            }
            weights.fill(0.0);
            for (kind, values) in [given.decay_less_1, given.b, given.c].into_iter().enumerate() {
                for (part, values) in values.into_iter().enumerate().take(parts) {
                    let to = &mut weights[kind * size + part * padded * WIDTH..][..padded * WIDTH];
                    transposed(values, states, block, 0.0, to);
                }
            }
            rest[..WIDTH].fill(0.0);
            if let Some(skip) = given.skip {
                rest[..block.1].copy_from_slice(&skip[block.0..block.0 + block.1]);
            }
            let (d_out, kept) = (&d_out, &mut kept[..]);
            let sequence = &all[sequence];
            let item = Item {
                given: &given,
                sequence,
                block,
                padded,
                d_out,
                dx: views,
                h,
                d,
                weights,
                x,
                y,
                d_x: dx,
                history,
                skip: &*rest,
                kept,
                sums,
            };
            if parts == 1 {
                dispatch(isa, Run::<1>(item));
            } else {
                dispatch(isa, Run::<2>(item));
            }
            for part in 0..parts {
                for channel in 0..block.1 {
                    for n in 0..states {
                        let at = ((i / blocks * parts + part) * channels + block.0 + channel) * states + n;
                        // SAFETY: as above.
                        unsafe { *(to_state as *mut f32).add(at) = d[(part * padded + n) * WIDTH + channel] };
                    }
                }
            }
        });
    })?;

    // One sequence after another.
    let kinds = [&mut to.decay, &mut to.b, &mut to.c];
    for (kind, values) in kinds.into_iter().enumerate() {
        for (part, values) in values.iter_mut().enumerate().take(parts) {
            for (i, value) in values.iter_mut().enumerate() {
                let (channel, n) = (i / states, i % states);
                let at = channel / WIDTH * one + kind * size + (part * padded + n) * WIDTH + channel % WIDTH;
                *value = sums.iter().skip(at).step_by(blocks * one).sum();
            }
        }
    }
    for (channel, value) in to.skip.iter_mut().enumerate() {
        *value = sums.iter().skip(channel / WIDTH * one + 3 * size + channel % WIDTH).step_by(blocks * one).sum();
    }
    Ok(())
}

/// A block of channels of a sequence.
struct Item<'a> {
    given: &'a DiagonalScan<'a>,
    sequence: &'a Sequence,
    block: (usize, usize),
    padded: usize,
    d_out: &'a TensorView<'a>,
    dx: &'a TensorViewMut<'a>,
    /// States, and gradients of states, `[parts, padded, WIDTH]`.
    h: &'a mut [f32],
    d: &'a mut [f32],
    /// Decays less 1, input and output weights, each as `h`.
    weights: &'a [f32],
    x: &'a mut [f32],
    y: &'a mut [f32],
    d_x: &'a mut [f32],
    /// States before each row of a tile and after it, of a vector of channels and the states that go together.
    history: &'a mut [f32],
    skip: &'a [f32],
    /// States before each tile.
    kept: &'a mut [f32],
    /// Gradients of weights, as these, and of skips.
    sums: &'a mut [f32],
}

struct Run<'a, const PARTS: usize>(Item<'a>);

impl<const PARTS: usize> Kernel for Run<'_, PARTS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Item { given, sequence, block, padded, d_out, dx, h, d, weights, x, y, d_x, history, skip, kept, sums } =
            self.0;
        let size = PARTS * padded * WIDTH;
        let place = Place { batch: 0, head: sequence.entry, channel: block.0, channels: block.1 };
        let rows = &sequence.rows;
        for (i, kept) in kept.chunks_exact_mut(size.max(1)).enumerate() {
            kept.copy_from_slice(&h[..size]);
            let part = rows.start + i * TOKENS..rows.end.min(rows.start + (i + 1) * TOKENS);
            let n = part.len();
            load(s, &given.x, place, part, x, WIDTH);
            y.fill(0.0);
            for at in (0..block.1).step_by(S::LANES) {
                for group in (0..padded).step_by(TOGETHER) {
                    tile::<S, PARTS>(s, Tile { x, y, h, weights, padded, group, at, rows: n });
                }
            }
        }
        for i in (0..rows.len().div_ceil(TOKENS)).rev() {
            let part = rows.start + i * TOKENS..rows.end.min(rows.start + (i + 1) * TOKENS);
            let n = part.len();
            load(s, &given.x, place, part.clone(), x, WIDTH);
            load(s, d_out, place, part.clone(), y, WIDTH);
            for at in (0..block.1).step_by(S::LANES) {
                first(s, y, skip, d_x, at, n);
                skips(s, x, y, &mut sums[3 * size..], at, n);
                for group in (0..padded).step_by(TOGETHER) {
                    let kept = kept.get(i * size..(i + 1) * size).unwrap_or(&[]);
                    back::<S, PARTS>(
                        s,
                        Back { x, y, d_x, kept, d, weights, history, sums, padded, group, at, rows: n },
                    );
                }
            }
            store(dx, place, part, d_x, WIDTH);
        }
    }
}

/// Sums of inputs times gradients of outputs, which those of skips are.
#[inline(always)]
fn skips<S: Simd>(s: S, x: &[f32], y: &[f32], to: &mut [f32], at: usize, rows: usize) {
    assert!(x.len() >= rows * WIDTH && y.len() >= rows * WIDTH && to.len() >= WIDTH && at + S::LANES <= WIDTH);
    // SAFETY: vectors from `at` on in rows of WIDTH floats, by the assertion.
    unsafe {
        let mut sum = s.zero();
        for t in 0..rows {
            let p = t * WIDTH + at;
            sum = s.fma(s.load(x.as_ptr().add(p)), s.load(y.as_ptr().add(p)), sum);
        }
        let to = to.as_mut_ptr().add(at);
        s.store(to, s.add(s.load(to), sum));
    }
}

/// A vector of channels and a few states of each, from a tile's last row to its first.
struct Back<'a> {
    x: &'a [f32],
    /// Gradients of outputs.
    y: &'a [f32],
    d_x: &'a mut [f32],
    /// States before the tile.
    kept: &'a [f32],
    d: &'a mut [f32],
    weights: &'a [f32],
    history: &'a mut [f32],
    sums: &'a mut [f32],
    padded: usize,
    group: usize,
    at: usize,
    rows: usize,
}

#[inline(always)]
fn back<S: Simd, const PARTS: usize>(s: S, tile: Back) {
    let Back { x, y, d_x, kept, d, weights, history, sums, padded, group, at, rows } = tile;
    let size = PARTS * padded * WIDTH;
    let step = PARTS * TOGETHER * S::LANES;
    assert!(x.len() >= rows * WIDTH && y.len() >= rows * WIDTH && d_x.len() >= rows * WIDTH);
    assert!(at + S::LANES <= WIDTH && group + TOGETHER <= padded && history.len() >= (rows + 1) * step);
    assert!(kept.len() >= size && d.len() >= size && weights.len() >= 3 * size && sums.len() >= 3 * size);
    // SAFETY: vectors from `at` on in rows of WIDTH floats; rows `group..group + TOGETHER` of each part, and `rows + 1` steps of the
    // history, are there by the assertions.
    unsafe {
        let start = |kind: usize, part: usize, n: usize| kind * size + (part * padded + group + n) * WIDTH + at;
        let past = |t: usize, part: usize, n: usize| t * step + (part * TOGETHER + n) * S::LANES;
        let mut state = [[s.zero(); TOGETHER]; PARTS];
        let (mut grown, mut decay, mut b, mut c) = (state, state, state, state);
        let (mut d_decay, mut d_b, mut d_c) = (state, state, state);
        for part in 0..PARTS {
            for n in 0..TOGETHER {
                state[part][n] = s.load(kept.as_ptr().add(start(0, part, n)));
                grown[part][n] = s.load(d.as_ptr().add(start(0, part, n)));
                decay[part][n] = s.load(weights.as_ptr().add(start(0, part, n)));
                b[part][n] = s.load(weights.as_ptr().add(start(1, part, n)));
                c[part][n] = s.load(weights.as_ptr().add(start(2, part, n)));
                s.store(history.as_mut_ptr().add(past(0, part, n)), state[part][n]);
            }
        }
        for t in 0..rows {
            let input = s.load(x.as_ptr().add(t * WIDTH + at));
            for n in 0..TOGETHER {
                let (re, im) = (state[0][n], state[PARTS - 1][n]);
                let mut next = s.fma(decay[0][n], re, s.fma(b[0][n], input, re));
                if PARTS == 2 {
                    next = s.sub(next, s.mul(decay[1][n], im));
                    let turned = s.fma(b[1][n], input, im);
                    state[1][n] = s.fma(decay[0][n], im, s.fma(decay[1][n], re, turned));
                    s.store(history.as_mut_ptr().add(past(t + 1, 1, n)), state[1][n]);
                }
                state[0][n] = next;
                s.store(history.as_mut_ptr().add(past(t + 1, 0, n)), next);
            }
        }
        for t in (0..rows).rev() {
            let input = s.load(x.as_ptr().add(t * WIDTH + at));
            let given = s.load(y.as_ptr().add(t * WIDTH + at));
            let p = d_x.as_mut_ptr().add(t * WIDTH + at);
            let mut sum = s.load(p);
            for n in 0..TOGETHER {
                let (after, before) = (past(t + 1, 0, n), past(t, 0, n));
                let (h, old) = (s.load(history.as_ptr().add(after)), s.load(history.as_ptr().add(before)));
                let re = s.fma(c[0][n], given, grown[0][n]);
                d_c[0][n] = s.fma(given, h, d_c[0][n]);
                d_b[0][n] = s.fma(input, re, d_b[0][n]);
                d_decay[0][n] = s.fma(old, re, d_decay[0][n]);
                sum = s.fma(b[0][n], re, sum);
                grown[0][n] = s.fma(decay[0][n], re, re);
                if PARTS == 2 {
                    let h = s.load(history.as_ptr().add(past(t + 1, 1, n)));
                    let turned = s.load(history.as_ptr().add(past(t, 1, n)));
                    let im = s.sub(grown[1][n], s.mul(c[1][n], given));
                    d_c[1][n] = s.sub(d_c[1][n], s.mul(given, h));
                    d_b[1][n] = s.fma(input, im, d_b[1][n]);
                    d_decay[0][n] = s.fma(turned, im, d_decay[0][n]);
                    d_decay[1][n] = s.sub(s.fma(old, im, d_decay[1][n]), s.mul(turned, re));
                    sum = s.fma(b[1][n], im, sum);
                    grown[0][n] = s.fma(decay[1][n], im, grown[0][n]);
                    grown[1][n] = s.sub(s.fma(decay[0][n], im, im), s.mul(decay[1][n], re));
                }
            }
            s.store(p, sum);
        }
        for part in 0..PARTS {
            for n in 0..TOGETHER {
                s.store(d.as_mut_ptr().add(start(0, part, n)), grown[part][n]);
                for (kind, sum) in [d_decay[part][n], d_b[part][n], d_c[part][n]].into_iter().enumerate() {
                    let to = sums.as_mut_ptr().add(start(kind, part, n));
                    s.store(to, s.add(s.load(to), sum));
                }
            }
        }
    }
}
