//! Exponentials of keys in states that decay, whatever their size: states are kept less a scale that follows the largest.
//!
//! With `g_t` the logarithms of decays, a head's state of `e^k` is kept as `e^(-m_t)` times itself:
//!
//! ```text
//! m_t  = max(m_(t-1) + max g_t, max k_t)
//! S'_t = e^(g_t + m_(t-1) - m_t) S'_(t-1) + e^(max k_t - m_t) e^(k_t - max k_t) v_t^T
//! ```
//! in which no exponent is above 0.

use super::rows::largest;
use super::tiles::{Place, check_len, check_shape, load, sequences, store};
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{DType, Error, Result, TensorView, TensorViewMut};
use std::ops::Range;

/// The scales `m` of the states of `e^k`, and what they make of decays and updates.
///
/// `k` is `[batch, key heads, length, dim]`. `g`, f32 `[batch, heads, length, any]`, holds logarithms of decays, at most 0, and receives
/// those of the states that are kept. `scales`, `[sequences, heads]`, holds the scales of the states before the first row, minus infinity
/// for states of zeros, and receives those after the last. `beta` and `logs`, `[batch, heads, length]`, receive factors of updates
/// and the scales of rows. With `bounds` a batch of 1 holds sequences one after another.
///
/// A row whose keys hold NaN or plus infinity spoils the state, not its scale.
pub fn key_scales(
    k: TensorView,
    g: &mut TensorViewMut,
    bounds: Option<&[usize]>,
    scales: &mut [f64],
    beta: &mut [f32],
    logs: &mut [f64],
    execution: &Execution,
) -> Result<()> {
    let [batch, heads, length, _] = g.shape();
    let [_, key_heads, _, dim] = k.shape();
    check_shape("k", k.shape(), [batch, key_heads, length, dim])?;
    if key_heads == 0 || heads % key_heads != 0 {
        return Err(Error::value("k", format!("{key_heads} heads"), format!("a divisor of {heads}")));
    }
    if g.dtype() != DType::F32 {
        return Err(Error::dtype("g", g.dtype(), "float32"));
    }
    let all = sequences(batch, length, bounds)?;
    check_len("log_scale", scales.len(), all.len() * heads)?;
    check_len("beta", beta.len(), batch * heads * length)?;
    check_len("logs", logs.len(), batch * heads * length)?;
    let (isa, g) = (simd::current(), &*g);
    let (scales, beta, logs) = (scales.as_mut_ptr() as usize, beta.as_mut_ptr() as usize, logs.as_mut_ptr() as usize);
    for_each(execution, all.len() * heads, |i| {
        let (sequence, head) = (&all[i / heads], i % heads);
        let (rows, first) = (sequence.rows.clone(), (sequence.entry * heads + head) * length + sequence.rows.start);
        // SAFETY: each item has the scale of its own sequence and head, and their rows, in arrays that this call borrows.
        let (scale, beta, logs) = unsafe {
            (
                &mut *(scales as *mut f64).add(i),
                std::slice::from_raw_parts_mut((beta as *mut f32).add(first), rows.len()),
                std::slice::from_raw_parts_mut((logs as *mut f64).add(first), rows.len()),
            )
        };
        let of_k = [sequence.entry, head / (heads / key_heads)];
        dispatch(isa, Item { k: &k, g, of_k, of_g: [sequence.entry, head], rows, scale, beta, logs });
    })
}

/// A sequence and a head.
struct Item<'a> {
    k: &'a TensorView<'a>,
    g: &'a TensorViewMut<'a>,
    /// Entry of the batch and head.
    of_k: [usize; 2],
    of_g: [usize; 2],
    rows: Range<usize>,
    scale: &'a mut f64,
    beta: &'a mut [f32],
    logs: &'a mut [f64],
}

impl Kernel for Item<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { k, g, of_k, of_g, rows, scale, beta, logs } = self;
        let place = |[batch, head]: [usize; 2], channels| Place { batch, head, channel: 0, channels };
        let (of_k, of_g) = (place(of_k, k.shape()[3]), place(of_g, g.shape()[3]));
        let width = of_k.channels.max(of_g.channels).next_multiple_of(S::LANES);
        let mut row = vec![0f32; width];
        for ((t, beta), log) in rows.zip(beta).zip(logs) {
            load(s, k, of_k, t..t + 1, &mut row, width);
            row[of_k.channels..].fill(f32::NEG_INFINITY);
            let top = f64::from(largest(s, &row));
            load(s, &g.as_view(), of_g, t..t + 1, &mut row, width);
            row[of_g.channels..].fill(f32::NEG_INFINITY);
            let slowest = f64::from(largest(s, &row));
            let before = *scale;
            *scale += slowest;
            *beta = if top == f64::NEG_INFINITY { 0.0 } else { 1.0 };
            if top.is_finite() {
                *scale = scale.max(top);
                *beta = (top - *scale).exp() as f32;
            }
            *log = *scale;
            // Of zeros it does not matter how fast they decay.
            let shift = if before == f64::NEG_INFINITY { -slowest } else { before - *scale };
            for x in &mut row[..of_g.channels] {
                *x = (f64::from(*x) + shift).min(0.0) as f32;
            }
            store(g, of_g, t..t + 1, &row, width);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_less_their_scales_are_the_states() {
        let (k, g) = ([300.0f32, -300.0, 1.0, -250.0, 2.0, 250.0], [-1.0f32, -2.0, -400.0, -300.0, -0.5, -0.25]);
        let (mut kept, mut scales, mut beta, mut logs) = (g, [f64::NEG_INFINITY], [0f32; 3], [0f64; 3]);
        let shape = [1, 1, 3, 2];
        let mut to = TensorViewMut::new(&mut kept, shape).unwrap();
        let keys = TensorView::new(&k, shape).unwrap();
        key_scales(keys, &mut to, None, &mut scales, &mut beta, &mut logs, &Execution::default()).unwrap();
        assert_eq!(logs, [300.0, 1.0, 250.0]);
        assert_eq!(scales, [250.0]);
        assert_eq!(beta, [1.0; 3]);
        assert_eq!(kept, [0.0, -1.0, -101.0, -1.0, -249.5, -249.25]);
    }

    #[test]
    fn rows_that_hold_nothing_or_are_not_finite_leave_the_scale() {
        let k = [f32::NEG_INFINITY, f32::INFINITY, 3.0];
        let (mut g, mut scales, mut beta, mut logs) = ([-1.0f32; 3], [4.0], [0f32; 3], [0f64; 3]);
        let mut to = TensorViewMut::new(&mut g, [1, 1, 3, 1]).unwrap();
        let keys = TensorView::new(&k, [1, 1, 3, 1]).unwrap();
        key_scales(keys, &mut to, None, &mut scales, &mut beta, &mut logs, &Execution::default()).unwrap();
        assert_eq!(logs, [3.0, 2.0, 3.0]);
        assert_eq!(beta, [0.0, 1.0, 1.0]);
        assert_eq!(g, [0.0, 0.0, -2.0]);
    }
}
