//! What causal forms of methods over all keys need beside a state: softmax over the positions so far, and read-outs whose means are of
//! the rows so far.

use super::pointwise::softplus;
use super::statistics::ReadOut;
use super::tiles::{Place, WIDTH, block_channels, check_len, check_shape, load, store};
use crate::dense::scratch::with_scratch;
use crate::kv::convert::narrow;
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{DType, Element, Error, Result, TensorView, TensorViewMut, with_element};

/// Rows of one tile.
const ROWS: usize = 64;

/// For each channel, the logarithm of the share that rows before a row keep of the softmax over positions when the row comes in,
/// `ln(Z_(t-1) / Z_t)` with `Z_t = sum_(j <= t) e^(x_j)`: what a state of running means decays by.
///
/// `logs`, `[batch, heads, channels]`, holds `ln Z` before the first row, minus infinity where there is none, and receives it after the
/// last. On the way it is a sum of two floats. `out` is f32 in the shape of `x`.
pub fn running_softmax(x: TensorView, logs: &mut [f64], out: &mut TensorViewMut, execution: &Execution) -> Result<()> {
    let [batch, heads, rows, channels] = x.shape();
    check_shape("out", out.shape(), x.shape())?;
    if out.dtype() != DType::F32 {
        return Err(Error::dtype("out", out.dtype(), "float32"));
    }
    check_len("initial_state", logs.len(), batch * heads * channels)?;
    let blocks = channels.div_ceil(WIDTH);
    let (isa, out, logs) = (simd::current(), &*out, logs.as_mut_ptr() as usize);
    for_each(execution, batch * heads * blocks, |i| {
        let (head, block) = (i / blocks, block_channels(i % blocks, channels));
        // SAFETY: each item has the channels of its own head, in an array that this call borrows.
        let logs =
            unsafe { std::slice::from_raw_parts_mut((logs as *mut f64).add(head * channels + block.0), block.1) };
        let place = Place { batch: head / heads, head: head % heads, channel: block.0, channels: block.1 };
        with_scratch(|scratch| {
            let [buffer, sums] = scratch.extra.carve([ROWS * WIDTH, 2 * WIDTH]);
            dispatch(isa, Softmax { x: &x, place, rows, logs, out, buffer, sums });
        });
    })
}

/// A sum as it is rounded, and what rounding took from it.
#[inline(always)]
fn exact_sum<S: Simd>(s: S, a: S::F32, b: S::F32) -> (S::F32, S::F32) {
    let sum = s.add(a, b);
    let back = s.sub(sum, a);
    (sum, s.add(s.sub(a, s.sub(sum, back)), s.sub(b, back)))
}

struct Softmax<'a> {
    x: &'a TensorView<'a>,
    place: Place,
    rows: usize,
    logs: &'a mut [f64],
    out: &'a TensorViewMut<'a>,
    buffer: &'a mut [f32],
    /// Logarithms of sums, and what rounding took from them.
    sums: &'a mut [f32],
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, place, rows, logs, out, buffer, sums } = self;
        let (high, low) = sums.split_at_mut(WIDTH);
        high.fill(0.0);
        low.fill(0.0);
        for ((log, high), low) in logs.iter().zip(&mut *high).zip(&mut *low) {
            *high = *log as f32;
            if high.is_finite() {
                *low = (log - f64::from(*high)) as f32;
            }
        }
        let (none, one) = (s.splat(f32::MIN), s.splat(1.0));
        for start in (0..rows).step_by(ROWS) {
            let part = start..rows.min(start + ROWS);
            load(s, x, place, part.clone(), buffer, WIDTH);
            for at in (0..place.channels).step_by(S::LANES) {
                // SAFETY: vectors from `at` on in rows of WIDTH floats, of which the buffer has ROWS and the sums two.
                unsafe {
                    let (mut sum, mut rest) = (s.load(high.as_ptr().add(at)), s.load(low.as_ptr().add(at)));
                    for t in 0..part.len() {
                        let p = buffer.as_mut_ptr().add(t * WIDTH + at);
                        let value = s.load(p);
                        let (above, lost) = exact_sum(s, value, s.sub(s.zero(), sum));
                        let (above, further) = exact_sum(s, above, s.sub(s.zero(), rest));
                        let lost = s.select_less(above, none, s.zero(), s.add(lost, further));
                        // The slope is the lesser of softplus and 1 where `above` is far from 0; near it next to nothing is lost.
                        let grown = softplus(s, above);
                        let grown = s.fma(lost, s.min(grown, one), grown);
                        let is_first = sum;
                        let (next, left) = exact_sum(s, sum, s.add(rest, grown));
                        s.store(p, s.sub(s.zero(), s.select_less(is_first, none, s.sub(value, sum), grown)));
                        rest = s.select_less(is_first, none, s.zero(), left);
                        sum = s.select_less(is_first, none, value, next);
                    }
                    s.store(high.as_mut_ptr().add(at), sum);
                    s.store(low.as_mut_ptr().add(at), rest);
                }
            }
            store(out, place, part, buffer, WIDTH);
        }
        for (log, (high, low)) in logs.iter_mut().zip(high.iter().zip(low.iter())) {
            *log = f64::from(*high) + f64::from(*low);
        }
    }
}

/// Read-outs of `p = phi(q) S_t` and `t = phi(q) z_t`, the last column of `read` `[batch, query heads, rows, value_dim + 1]`, where `n`
/// and `u` count and add up the values `v` `[batch, heads, rows, value_dim]` up to the row.
///
/// `sums` `[batch, heads, value_dim]` and `count` are of the rows before the first; sums receive those after the last.
pub fn running_read(
    read: TensorView,
    v: TensorView,
    sums: &mut [f32],
    count: u64,
    read_out: ReadOut,
    out: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let [batch, heads, rows, value_dim] = v.shape();
    let [_, query_heads, _, _] = read.shape();
    check_shape("q", read.shape(), [batch, query_heads, rows, value_dim + 1])?;
    check_shape("out", out.shape(), [batch, query_heads, rows, value_dim])?;
    check_len("initial_state", sums.len(), batch * heads * value_dim)?;
    if heads == 0 || query_heads % heads != 0 {
        return Err(Error::value("q", format!("{query_heads} heads"), format!("a multiple of the {heads} of v")));
    }
    if read.dtype() != DType::F32 {
        return Err(Error::dtype("q", read.dtype(), "float32"));
    }
    if let ReadOut::Clamp { factors, .. } = read_out {
        check_len("factors", factors.len(), query_heads)?;
    }
    let (isa, out, sums) = (simd::current(), &*out, sums.as_mut_ptr() as usize);
    for_each(execution, batch * heads, |i| {
        // SAFETY: each item has the sums of its own head, in an array that this call borrows.
        let sums = unsafe { std::slice::from_raw_parts_mut((sums as *mut f32).add(i * value_dim), value_dim) };
        with_scratch(|scratch| {
            let [lost, row] = scratch.extra.carve([value_dim, value_dim]);
            let (lost, row) = (&mut lost[..value_dim], &mut row[..value_dim]);
            let group = query_heads / heads;
            let place = [i / heads, i % heads, group];
            dispatch(isa, Reading { read: &read, v: &v, place, sums, lost, row, count, read_out, out });
        });
    })
}

struct Reading<'a> {
    read: &'a TensorView<'a>,
    v: &'a TensorView<'a>,
    /// Entry of the batch, head, query heads of it.
    place: [usize; 3],
    sums: &'a mut [f32],
    /// What sums lost to rounding.
    lost: &'a mut [f32],
    row: &'a mut [f32],
    count: u64,
    read_out: ReadOut<'a>,
    out: &'a TensorViewMut<'a>,
}

impl Kernel for Reading<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { read, v, place: [batch, head, group], sums, lost, row, count, read_out, out } = self;
        lost.fill(0.0);
        let value_dim = sums.len();
        for t in 0..v.shape()[2] {
            with_element!(v.dtype(), T => {
                for ((sum, lost), x) in sums.iter_mut().zip(&mut *lost).zip(v.row::<T>(batch, head, t)) {
                    let x = x.to_f32() - *lost;
                    let next = *sum + x;
                    *lost = (next - *sum) - x;
                    *sum = next;
                }
            });
            let n = (count + t as u64 + 1) as f32;
            for reader in head * group..(head + 1) * group {
                let from = read.row::<f32>(batch, reader, t);
                let mass = from[value_dim];
                let (of_read, of_sum) = read_out.factors(mass, n, reader);
                for ((to, x), sum) in row.iter_mut().zip(from).zip(&*sums) {
                    *to = if of_sum == 0.0 { of_read * x } else { of_read * x + of_sum * sum };
                }
                with_element!(out.dtype(), T => {
                    let to = out.row_ptr::<T>(batch, reader, t);
                    // SAFETY: the row has value_dim numbers, and this item alone writes it.
                    unsafe { narrow(row, to.cast(), T::DTYPE) };
                });
            }
        }
    }
}
