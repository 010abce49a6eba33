//! The recurrence in f64, row by row from its formula: for arrays of that type and for comparing long runs with, not for speed.

use super::{Decay, Inputs, Recurrence, Shaped, Start, check_inputs, expect};
use crate::dense::Broadcast;
use crate::parallel::{Cancel, Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Error, Result};

/// A view of f64 numbers.
pub type View<'a> = Broadcast<'a, f64>;

impl Shaped for View<'_> {
    fn shape(&self) -> [usize; 4] {
        Broadcast::shape(self)
    }
}

/// Rows between two looks at whether a call was cancelled.
const ROWS: usize = 4096;

/// [`super::recurrence`] of f64 numbers. States are in place, and neither maps nor squares of scores are offered. `out` and `state`
/// are contiguous, in the shapes that they have there.
pub fn recurrence(
    of: Recurrence<'_, View<'_>, f64>,
    out: &mut [f64],
    state: &mut [f64],
    execution: &Execution,
) -> Result<()> {
    if of.squares || of.maps.iter().any(Option::is_some) || !matches!(of.start, Start::InPlace) {
        return Err(Error::value("q", "float64", "float32, float16 or bfloat16 for maps and squares of scores"));
    }
    let inputs = check_inputs(of)?;
    let [batch, heads, length, value_dim] = inputs.of.v.shape();
    let readers = inputs.query_heads.max(heads);
    let columns = value_dim + usize::from(of.normaliser.is_some());
    let size = inputs.dim * columns;
    expect("out", [out.len(); 4], [batch * readers * length * value_dim; 4])?;
    expect("out_state", [state.len(); 4], [inputs.sequences * heads * size; 4])?;
    let gate = match of.decay {
        Decay::None => None,
        Decay::Token(g) | Decay::Channel(g) | Decay::Value { g, .. } => Some(g),
    };
    check("g", gate, |x| x <= 0.0, "logarithms of decays, at most 0")?;
    check("beta", of.beta, f64::is_finite, "finite numbers")?;
    let (isa, to, states) = (simd::current(), out.as_mut_ptr() as usize, state.as_mut_ptr() as usize);
    for_each(execution, inputs.sequences * heads, |i| {
        // SAFETY: each item has the state of its own sequence and head, in an array that this call borrows.
        let state = unsafe { std::slice::from_raw_parts_mut((states as *mut f64).add(i * size), size) };
        let (sequence, head, cancel) = (i / heads, i % heads, &execution.cancel);
        dispatch(isa, Item { inputs: &inputs, sequence, head, columns, state, out: to as *mut f64, cancel });
    })
}

fn check(name: &'static str, gate: Option<View>, good: fn(f64) -> bool, expected: &str) -> Result<()> {
    let Some(gate) = gate else { return Ok(()) };
    let [batch, heads, length, width] = gate.shape();
    let mut row = vec![0.0; width];
    for i in 0..batch * heads * length {
        read(&gate, [i / length / heads, i / length % heads, i % length], &mut row);
        if let Some(x) = row.iter().find(|&&x| !good(x)) {
            return Err(Error::value(name, x, expected));
        }
    }
    Ok(())
}

/// A row of an array.
#[inline(always)]
fn read(view: &View, [batch, head, row]: [usize; 3], to: &mut [f64]) {
    let [batches, heads, rows, width] = view.shape();
    assert!(batch < batches && head < heads && row < rows && to.len() >= width);
    let (from, stride) = view.row(batch, head, row, 0);
    for (i, to) in to.iter_mut().enumerate().take(width) {
        // SAFETY: the row has `width` numbers, by the assertion.
        *to = unsafe { *from.offset(i as isize * stride) };
    }
}

struct Item<'a, 's> {
    inputs: &'a Inputs<'a, View<'a>, f64>,
    sequence: usize,
    head: usize,
    columns: usize,
    /// `[dim, columns]`.
    state: &'s mut [f64],
    out: *mut f64,
    cancel: &'a Cancel,
}

impl Kernel for Item<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { inputs, sequence, head, columns, state, out, cancel } = self;
        let of = &inputs.of;
        let (batch, rows) = inputs.sequence(sequence);
        let [_, heads, length, value_dim] = of.v.shape();
        let (dim, key_head, readers) = (inputs.dim, inputs.key_head(head), inputs.readers(head));
        let [mut q, mut k, mut a, mut b, mut alpha] = std::array::from_fn(|_| vec![0.0; dim]);
        let [mut v, mut held, mut fade, mut sum] = std::array::from_fn(|_| vec![0.0; columns]);
        let mut beta = [1.0];
        for t in rows {
            if t % ROWS == 0 && cancel.is_cancelled() {
                return;
            }
            let (place, keys) = ([batch, head, t], [batch, key_head, t]);
            alpha.fill(0.0);
            match &of.decay {
                Decay::None | Decay::Value { .. } => {}
                Decay::Token(g) => {
                    read(g, place, &mut beta);
                    alpha.fill(beta[0]);
                }
                Decay::Channel(g) => read(g, place, &mut alpha),
            }
            match &of.k {
                Some(view) => read(view, keys, &mut k),
                None => {
                    for (k, g) in k.iter_mut().zip(&alpha) {
                        *k = -g.exp_m1();
                    }
                }
            }
            for alpha in &mut alpha {
                *alpha = alpha.exp();
            }
            if let Some(eps) = of.unit {
                shorten(&mut k, eps);
            }
            beta[0] = 1.0;
            if let Some(view) = &of.beta {
                read(view, place, &mut beta);
            }
            if !of.delta {
                scale(&mut k, beta[0]);
            }
            read(&of.v, place, &mut v);
            if of.normaliser.is_some() {
                v[value_dim] = 1.0;
            }
            fade.fill(1.0);
            if let Decay::Value { g, fills } = &of.decay {
                read(g, place, &mut fade);
                for (fade, v) in fade.iter_mut().zip(&mut v) {
                    if *fills {
                        *v *= -fade.exp_m1();
                    }
                    *fade = fade.exp();
                }
            }
            b.fill(0.0);
            if let Some([reads, writes]) = &of.pair {
                read(reads, keys, &mut a);
                read(writes, keys, &mut b);
                read_state(state, columns, &a, &mut held);
            } else if of.delta {
                for (a, (k, alpha)) in a.iter_mut().zip(k.iter().zip(&alpha)) {
                    *a = k * alpha;
                }
                read_state(state, columns, &a, &mut held);
                for (v, held) in v.iter_mut().zip(&held) {
                    *v = beta[0] * (*v - held);
                }
            }
            // Rows that read the state before their own update do so first.
            for early in [true, false] {
                if early == of.bonus.is_some() {
                    for (g, reader) in readers.clone().enumerate() {
                        read(&of.q, [batch, reader, t], &mut q);
                        if let Some(eps) = of.unit {
                            shorten(&mut q, eps);
                        }
                        scale(&mut q, of.scale);
                        read_state(state, columns, &q, &mut sum);
                        let mut own = of.skip.map_or(0.0, |skip| skip[head]);
                        if let Some(bonus) = of.bonus {
                            for ((q, k), u) in q.iter().zip(&k).zip(&bonus[head * dim..]) {
                                own += q * k * u;
                            }
                        }
                        let mut factor = 1.0;
                        if let Some(eps) = of.normaliser {
                            let mass = sum[value_dim] + eps;
                            factor = if mass == 0.0 { 0.0 } else { 1.0 / mass };
                        }
                        let at = (batch * inputs.query_heads.max(heads) + inputs.out_head(head, g)) * length + t;
                        for (c, (sum, v)) in sum.iter().zip(&v).enumerate().take(value_dim) {
                            // Without a skip, values that are not finite must not meet it.
                            let extra = if own == 0.0 && of.bonus.is_none() { 0.0 } else { own * v };
                            // SAFETY: the output has this row, which this item alone writes.
                            unsafe { *out.add(at * value_dim + c) = sum * factor + extra };
                        }
                    }
                }
                if early {
                    for (d, row) in state.chunks_exact_mut(columns).enumerate() {
                        for (c, x) in row.iter_mut().enumerate() {
                            let kept = alpha[d] * fade[c] * *x + k[d] * v[c];
                            *x = if of.pair.is_some() { kept + b[d] * held[c] } else { kept };
                        }
                    }
                }
            }
        }
    }
}

/// A row over the root of its sum of squares and `eps`.
#[inline(always)]
fn shorten(row: &mut [f64], eps: f64) {
    let squares: f64 = row.iter().map(|x| x * x).sum();
    scale(row, 1.0 / (squares + eps).sqrt());
}

#[inline(always)]
fn scale(row: &mut [f64], factor: f64) {
    for x in row {
        *x *= factor;
    }
}

/// `row^T state`.
#[inline(always)]
fn read_state(state: &[f64], columns: usize, row: &[f64], to: &mut [f64]) {
    to.fill(0.0);
    for (x, row) in row.iter().zip(state.chunks_exact(columns)) {
        for (to, y) in to.iter_mut().zip(row) {
            *to += x * y;
        }
    }
}
