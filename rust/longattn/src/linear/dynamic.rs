//! Convolution whose taps are given for each token and head.

use super::tiles::{Place, check_shape, load, store};
use crate::dense::scratch::with_scratch;
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Error, Result, TensorView, TensorViewMut};

/// Tokens of one item.
const TOKENS: usize = 64;

/// `out[b, h, i] = sum over t of w[b, h, i, t] v[b, h, i + t - centre]`, zeros outside.
///
/// `w`, `[batch, heads, length, taps]`, holds weights or, with `softmax`, what their softmax is taken of. `before`, `[batch, heads,
/// rows, dim]`, holds the values before the first, where zeros would be.
pub fn dynamic_convolution(
    v: TensorView,
    w: TensorView,
    centre: usize,
    softmax: bool,
    before: Option<TensorView>,
    out: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let [batch, heads, len, dim] = v.shape();
    let taps = w.shape()[3];
    check_shape("w", w.shape(), [batch, heads, len, taps])?;
    check_shape("out", out.shape(), v.shape())?;
    if centre >= taps {
        return Err(Error::value("w", format!("{taps} taps"), format!("more than {centre}")));
    }
    if let Some(before) = before {
        check_shape("initial_state", before.shape(), [batch, heads, before.shape()[2], dim])?;
    }
    let (isa, out, pieces) = (simd::current(), &*out, len.div_ceil(TOKENS));
    for_each(execution, batch * heads * pieces, |i| {
        let (piece, head) = (i % pieces, i / pieces);
        let (wide, long) = (dim.next_multiple_of(simd::MAX_LANES), taps.next_multiple_of(simd::MAX_LANES));
        with_scratch(|scratch| {
            let buffer = scratch.extra.take((2 * TOKENS + taps) * wide + TOKENS * long);
            let (batch, head, first) = (head / heads, head % heads, piece * TOKENS);
            dispatch(isa, Run { v, w, before, batch, head, first, centre, softmax, buffer, out });
        });
    })
}

struct Run<'a> {
    v: TensorView<'a>,
    w: TensorView<'a>,
    before: Option<TensorView<'a>>,
    batch: usize,
    head: usize,
    first: usize,
    centre: usize,
    softmax: bool,
    buffer: &'a mut [f32],
    out: &'a TensorViewMut<'a>,
}

impl Kernel for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Run { v, w, before, batch, head, first, centre, softmax, buffer, out } = self;
        let ([_, _, len, dim], taps) = (v.shape(), w.shape()[3]);
        let (wide, long) = (dim.next_multiple_of(simd::MAX_LANES), taps.next_multiple_of(simd::MAX_LANES));
        let n = TOKENS.min(len - first);
        let (values, rest) = buffer.split_at_mut((TOKENS + taps) * wide);
        let (y, weights) = rest.split_at_mut(TOKENS * wide);
        let place = Place { batch, head, channel: 0, channels: dim };
        // Values that any of the tokens meets, from `origin` on.
        let (origin, held) = (first as isize - centre as isize, n + taps - 1);
        let (from, until) = (origin.max(0) as usize, ((origin + held as isize) as usize).min(len));
        let at = (from as isize - origin) as usize;
        values[..at * wide].fill(0.0);
        values[(at + until - from) * wide..held * wide].fill(0.0);
        load(s, &v, place, from..until, &mut values[at * wide..], wide);
        if let Some(before) = before
            && origin < 0
        {
            let earlier = before.shape()[2];
            let count = earlier.min(at);
            load(s, &before, place, earlier - count..earlier, &mut values[(at - count) * wide..], wide);
        }
        load(s, &w, Place { channels: taps, ..place }, first..first + n, weights, long);
        if softmax {
            for row in weights.chunks_exact_mut(long).take(n) {
                normalise(s, &mut row[..taps]);
            }
        }
        assert!(values.len() >= held * wide && y.len() >= n * wide && weights.len() >= n * long);
        for i in 0..n {
            for d in (0..dim).step_by(S::LANES) {
                // SAFETY: rows i to i + taps - 1 of `values` are below `held`, and all rows are padded to whole vectors.
                unsafe {
                    let mut sums = [s.zero(); 2];
                    let row = values.as_ptr().add(i * wide + d);
                    let own = weights.as_ptr().add(i * long);
                    for t in 0..taps {
                        sums[t % 2] = s.fma(s.splat(*own.add(t)), s.load(row.add(t * wide)), sums[t % 2]);
                    }
                    s.store(y.as_mut_ptr().add(i * wide + d), s.add(sums[0], sums[1]));
                }
            }
        }
        store(out, place, first..first + n, y, wide);
    }
}

/// The softmax of a row.
#[inline(always)]
fn normalise<S: Simd>(s: S, row: &mut [f32]) {
    let largest = row.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a || b.is_nan() { b } else { a });
    if largest == f32::NEG_INFINITY {
        row.fill(0.0);
        return;
    }
    let mut sum = 0f32;
    let mut lanes = [0f32; simd::MAX_LANES];
    for part in row.chunks_mut(S::LANES) {
        for (lane, x) in lanes.iter_mut().zip(part.iter()) {
            *lane = x - largest;
        }
        // SAFETY: `lanes` holds a vector of any instruction set.
        unsafe { s.store(lanes.as_mut_ptr(), s.exp(s.load(lanes.as_ptr()))) };
        part.copy_from_slice(&lanes[..part.len()]);
        sum += part.iter().sum::<f32>();
    }
    for x in row {
        *x /= sum;
    }
}
