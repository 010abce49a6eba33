//! One row of one head: a decode step, in one pass over the state (two with the delta rule, the second from the cache).

use super::rows::{Mapped, exp_row, forgotten, load, load_numbers, multiply_rows, scale_row};
use super::{Decay, Job};
use crate::dense::scratch::Scratch;
use crate::kv::convert::narrow;
use crate::simd::{Kernel, Simd};
use crate::tensor::{Element, with_element};

/// The state of one head of a sequence that has one row or none.
pub(super) struct Step<'a, 's> {
    pub(super) job: &'a Job<'a>,
    pub(super) sequence: usize,
    pub(super) head: usize,
    pub(super) scratch: &'s mut Scratch,
}

impl Kernel for Step<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        s.call(Body(self));
    }
}

/// [`Step`], compiled once for the base of an instruction set.
struct Body<'a, 's>(Step<'a, 's>);

/// A state's rows as they are read and written; the two may be the same.
#[derive(Clone, Copy)]
struct Rows {
    from: *const f32,
    from_stride: isize,
    to: *mut f32,
    to_stride: isize,
    dim: usize,
}

impl Kernel for Body<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Step { job, sequence, head, scratch } = self.0;
        let of = &job.of;
        let (batch, rows) = job.sequence(sequence);
        let (readers, dim) = (job.readers(head), job.dim);
        let columns = job.state.shape()[3];
        let (padded, width) = (dim.next_multiple_of(S::LANES), columns.next_multiple_of(S::LANES));
        let [q, k, alpha, v, out, zeros, reads, b, fading] =
            scratch.extra.carve([readers.len() * padded, padded, padded, width, width, width, padded, padded, width]);
        let (from, from_stride) = match &job.first {
            Some(first) => (first.head::<f32>(sequence, head), first.row_stride()),
            None => {
                zeros.fill(0.0);
                (zeros.as_ptr(), 0)
            }
        };
        let state = Rows {
            from,
            from_stride,
            to: job.state.row_ptr::<f32>(sequence, head, 0),
            to_stride: job.state.as_view().row_stride(),
            dim,
        };
        if rows.is_empty() {
            for d in 0..dim as isize {
                // SAFETY: both have `dim` rows of `columns` numbers; they may be the same rows.
                unsafe {
                    let from = state.from.offset(d * state.from_stride);
                    std::ptr::copy(from, state.to.offset(d * state.to_stride), columns);
                }
            }
            return;
        }
        match &of.decay {
            Decay::None | Decay::Value { .. } => alpha.fill(1.0),
            Decay::Token(view) => {
                let mut log = [0f32];
                load_numbers(view, [batch, head], rows.clone(), &mut log);
                alpha.fill(f64::from(log[0]).exp() as f32);
            }
            Decay::Channel(view) => {
                load(s, view, [batch, head], rows.clone(), alpha, padded, None, 1.0);
                if of.k.is_none() {
                    forgotten(s, &alpha[..padded], &mut k[..padded]);
                }
                exp_row(s, &mut alpha[..padded]);
            }
        }
        if let Some(view) = &of.k {
            let at = [batch, job.key_head(head)];
            match of.maps[1] {
                Some(map) => Mapped::new(s, map, *view, at, false).load(s, rows.clone(), k, padded, 1.0),
                None => load(s, view, at, rows.clone(), k, padded, of.unit, 1.0),
            };
        }
        let mut beta = [1f32];
        if let Some(view) = &of.beta {
            load_numbers(view, [batch, head], rows.clone(), &mut beta);
        }
        if !of.delta {
            scale_row(s, &mut k[..padded], beta[0]);
        }
        load(s, &of.v, [batch, head], rows.clone(), v, width, None, 1.0);
        if of.normaliser.is_some() {
            v[job.value_dim] = 1.0;
        }
        for (i, reader) in readers.clone().enumerate() {
            let (at, to) = ([batch, reader], &mut q[i * padded..][..padded]);
            match of.maps[0] {
                Some(map) => Mapped::new(s, map, of.q, at, true).load(s, rows.clone(), to, padded, of.scale),
                None => load(s, &of.q, at, rows.clone(), to, padded, of.unit, of.scale),
            };
        }
        if let Decay::Value { g, fills } = &of.decay {
            load(s, g, [batch, head], rows.clone(), fading, width, None, 1.0);
            if *fills {
                forgotten(s, fading, zeros);
                multiply_rows(s, &mut v[..width], zeros);
                zeros.fill(0.0);
            }
            exp_row(s, &mut fading[..width]);
        }
        let at = [batch, job.key_head(head)];
        if let Some([a, by]) = &of.pair {
            load(s, a, at, rows.clone(), reads, padded, None, 1.0);
            load(s, by, at, rows.clone(), b, padded, None, 1.0);
        } else if of.delta {
            reads[..padded].copy_from_slice(&k[..padded]);
            multiply_rows(s, &mut reads[..padded], &alpha[..padded]);
        }
        let update = Update {
            k: &k[..dim],
            alpha: &alpha[..dim],
            reads: (of.delta || of.pair.is_some()).then_some(&reads[..dim]),
            beta: of.delta.then_some(beta[0]),
            b: of.pair.is_some().then_some(&b[..dim]),
            fading: of.decay.of_values().map(|_| &fading[..columns]),
            before: of.bonus.is_some(),
        };
        // The first reader updates the state, others read what it left; or, where the state before the row is read, the last one.
        for i in 0..readers.len() {
            let i = if update.before { readers.len() - 1 - i } else { i };
            let q = &q[i * padded..][..dim];
            let update = if i == 0 { Ok(&update) } else { Err(update.before) };
            // SAFETY: the state's rows have `columns` numbers, and so have `v` and `out`.
            unsafe {
                let mut at = 0;
                if S::LANES == 16 {
                    while at + 8 * S::LANES <= columns {
                        vectors::<S, 8>(s, state, at, q, update, v, out);
                        at += 8 * S::LANES;
                    }
                }
                while at + 4 * S::LANES <= columns {
                    vectors::<S, 4>(s, state, at, q, update, v, out);
                    at += 4 * S::LANES;
                }
                while at + S::LANES <= columns {
                    vectors::<S, 1>(s, state, at, q, update, v, out);
                    at += S::LANES;
                }
                for at in at..columns {
                    single(state, at, q, update, v, out);
                }
            }
            let mut factor = 1.0;
            if let Some(eps) = of.normaliser {
                let mass = out[job.value_dim] + eps;
                factor = if mass == 0.0 { 0.0 } else { 1.0 / mass };
            }
            let mut skip = of.skip.map_or(0.0, |skip| skip[head]);
            if let Some(bonus) = of.bonus {
                for ((q, k), u) in q.iter().zip(&k[..dim]).zip(&bonus[head * dim..]) {
                    skip += q * k * u;
                }
            }
            for (out, v) in out[..job.value_dim].iter_mut().zip(&v[..job.value_dim]) {
                // Without a skip, values that are not finite must not meet it.
                *out = if skip == 0.0 && of.bonus.is_none() { *out * factor } else { *out + skip * v };
            }
            with_element!(job.out.dtype(), T => {
                let to = job.out.row_ptr::<T>(batch, job.out_head(head, i), rows.start);
                // SAFETY: the row has value_dim numbers, and no other item writes it.
                unsafe { narrow(&out[..job.value_dim], to.cast(), T::DTYPE) };
            });
        }
    }
}

/// What a row does to the state.
struct Update<'a> {
    k: &'a [f32],
    /// Decays of the state's rows.
    alpha: &'a [f32],
    /// What the state before the row is multiplied by, where that is needed.
    reads: Option<&'a [f32]>,
    /// By the delta rule, values are less what is read, times this.
    beta: Option<f32>,
    /// What is read is written with these keys.
    b: Option<&'a [f32]>,
    /// Decays of the state's columns.
    fading: Option<&'a [f32]>,
    /// Queries read the state before the row.
    before: bool,
}

/// Columns `at..at + N * LANES` of the state: the update, if there is one, and `out = q^T S`. Without one, whether the state before
/// the row is read.
///
/// # Safety
/// The state's rows, `v`, `out` and decays of columns have these columns; `q` and what the update holds have a number for each row.
#[inline(always)]
unsafe fn vectors<S: Simd, const N: usize>(
    s: S,
    state: Rows,
    at: usize,
    q: &[f32],
    update: Result<&Update, bool>,
    v: &[f32],
    out: &mut [f32],
) {
    let mut sum = [s.zero(); N];
    // SAFETY: the caller's promise.
    unsafe {
        match update {
            Ok(&Update { k, alpha, reads, beta, b, fading, before }) => {
                let mut new = [s.zero(); N];
                for (n, new) in new.iter_mut().enumerate() {
                    *new = s.load(v.as_ptr().add(at + n * S::LANES));
                }
                let mut held = [s.zero(); N];
                if let Some(reads) = reads {
                    for (d, &read) in reads.iter().enumerate().take(state.dim) {
                        let row = state.from.offset(d as isize * state.from_stride).add(at);
                        let factor = s.splat(read);
                        for (n, held) in held.iter_mut().enumerate() {
                            *held = s.fma(factor, s.load(row.add(n * S::LANES)), *held);
                        }
                    }
                    if let Some(beta) = beta {
                        for (new, &held) in new.iter_mut().zip(&held) {
                            *new = s.mul(s.splat(beta), s.sub(*new, held));
                        }
                    }
                }
                for d in 0..state.dim {
                    let row = state.from.offset(d as isize * state.from_stride).add(at);
                    let to = state.to.offset(d as isize * state.to_stride).add(at);
                    let (alpha, k, q) = (s.splat(alpha[d]), s.splat(k[d]), s.splat(q[d]));
                    for n in 0..N {
                        let old = s.load(row.add(n * S::LANES));
                        let mut kept = old;
                        if let Some(fading) = fading {
                            kept = s.mul(old, s.load(fading.as_ptr().add(at + n * S::LANES)));
                        }
                        let mut x = s.fma(alpha, kept, s.mul(k, new[n]));
                        if let Some(b) = b {
                            x = s.fma(s.splat(b[d]), held[n], x);
                        }
                        s.store(to.add(n * S::LANES), x);
                        sum[n] = s.fma(q, if before { old } else { x }, sum[n]);
                    }
                }
            }
            Err(before) => {
                let (base, stride) =
                    if before { (state.from, state.from_stride) } else { (state.to.cast_const(), state.to_stride) };
                for (d, &q) in q.iter().enumerate() {
                    let row = base.offset(d as isize * stride).add(at);
                    for (n, sum) in sum.iter_mut().enumerate() {
                        *sum = s.fma(s.splat(q), s.load(row.add(n * S::LANES)), *sum);
                    }
                }
            }
        }
        for (n, &sum) in sum.iter().enumerate() {
            s.store(out.as_mut_ptr().add(at + n * S::LANES), sum);
        }
    }
}

/// [`vectors`] for one column.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn single(state: Rows, at: usize, q: &[f32], update: Result<&Update, bool>, v: &[f32], out: &mut [f32]) {
    let mut sum = 0.0;
    // SAFETY: the caller's promise.
    unsafe {
        let from = |d: usize| *state.from.offset(d as isize * state.from_stride).add(at);
        let to = |d: usize| state.to.offset(d as isize * state.to_stride).add(at);
        match update {
            Ok(&Update { k, alpha, reads, beta, b, fading, before }) => {
                let mut held = 0.0;
                if let Some(reads) = reads {
                    for (d, read) in reads.iter().enumerate().take(state.dim) {
                        held += read * from(d);
                    }
                }
                let new = beta.map_or(v[at], |beta| beta * (v[at] - held));
                let fade = fading.map_or(1.0, |fading| fading[at]);
                for d in 0..state.dim {
                    let old = from(d);
                    let x = alpha[d] * fade * old + k[d] * new + b.map_or(0.0, |b| b[d] * held);
                    *to(d) = x;
                    sum += q[d] * if before { old } else { x };
                }
            }
            Err(before) => {
                for (d, q) in q.iter().enumerate() {
                    sum += q * if before { from(d) } else { *to(d) };
                }
            }
        }
    }
    out[at] = sum;
}
