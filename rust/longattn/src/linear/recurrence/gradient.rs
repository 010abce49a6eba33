//! One head of keys of one sequence, from its last chunk to its first.
//!
//! With the names of a chunk (see [`super`]), `U` what is written, `D` the gradient of the state after the chunk:
//!
//! ```text
//! dU = P^T dO + K'' D       dV = dU, or ((I + A)^-1 diag(beta))^T dU        dP = dO U^T,  dA = -dV U^T
//! dQ' = dO S^T              dK' = -dV S^T                                   dK'' = U D^T
//! D before the chunk = decay D + Q'^T dO - K'^T dV
//! ```
//! With a second pair of keys, which writes `Y = (I - A_ab)^-1 (A' S + A_ak V)`, there is a dY like dU for what it writes, `dZ = ((I -
//! A_ab)^-1)^T dY` for what that is solved from, `dV = dU + A_ak^T dZ`, and products with both keys.
//!
//! What this means for queries, keys and decays is in [`super::decays`]. The gradient of `beta` is that of what is written, times what
//! was to be written: both are known times `beta`, which is why none is taken to be smaller than 1e-10 ([`super::prepare`]).

use super::Decay;
use super::backward::Backward;
use super::prepare::{Advance, Prepare, decayed};
use super::products::{Multiply, Part, Turn};
use super::rows::{load, scale_row};
use super::scores::{Sizes, add_up, dot};
use super::work::Work;
use crate::dense::scratch::Scratch;
use crate::parallel::Cancel;
use crate::simd::{Kernel, Simd};
use crate::tensor::TensorViewMut;
use std::ops::Range;

/// Bytes of states at the starts of chunks, of one head, beyond which they are not all kept at once.
const KEPT: usize = 32 << 20;

/// The heads of one sequence that share a head of keys.
pub(super) struct Item<'a, 's> {
    pub(super) job: &'a Backward<'a>,
    pub(super) sequence: usize,
    pub(super) key_head: usize,
    pub(super) cancel: &'a Cancel,
    pub(super) scratch: &'s mut Scratch,
}

impl Kernel for Item<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        s.call(Body(self));
    }
}

/// [`Item`], compiled once for the base of an instruction set.
struct Body<'a, 's>(Item<'a, 's>);

impl Kernel for Body<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Item { job, sequence, key_head, cancel, scratch } = self.0;
        let inputs = &job.inputs;
        let shared = inputs.heads / inputs.key_heads;
        let (_, rows) = inputs.sequence(sequence);
        for head in key_head * shared..(key_head + 1) * shared {
            let mut work = Work::new(s, scratch, job, sequence, head);
            let (dim, columns, pitch) = (inputs.dim, work.columns, work.across_values);
            for (from, to) in [(&job.first, &mut *work.state), (&job.given.d_state, &mut *work.d_state)] {
                if let Some(from) = from {
                    for (d, to) in to.chunks_exact_mut(pitch).take(dim).enumerate() {
                        to[..columns].copy_from_slice(from.row::<f32>(sequence, head, d));
                    }
                }
            }
            let chunk = inputs.of.chunk.min(rows.len()).max(1);
            let count = rows.len().div_ceil(chunk);
            let size = dim * pitch;
            // Chunks whose states are kept at once.
            let most = if count * size * 4 <= KEPT { count } else { count.isqrt() + 1 };
            let stretches = count.div_ceil(most.max(1));
            let mut kept = vec![0f32; (stretches + most) * size];
            let (starts, kept) = kept.split_at_mut(stretches * size);
            let part = |i: usize| rows.start + i * chunk..rows.end.min(rows.start + (i + 1) * chunk);
            for i in 0..count {
                if i % most == 0 {
                    starts[i / most * size..][..size].copy_from_slice(&work.state[..size]);
                }
                if i / most + 1 == stretches {
                    break;
                }
                if cancel.is_cancelled() {
                    return;
                }
                s.call(Advance { work: &mut work, now: part(i) });
            }
            for stretch in (0..stretches).rev() {
                let of_stretch = stretch * most..count.min((stretch + 1) * most);
                work.state[..size].copy_from_slice(&starts[stretch * size..][..size]);
                for i in of_stretch.clone() {
                    kept[i % most * size..][..size].copy_from_slice(&work.state[..size]);
                    if i + 1 < of_stretch.end {
                        s.call(Advance { work: &mut work, now: part(i) });
                    }
                }
                for i in of_stretch.rev() {
                    if cancel.is_cancelled() {
                        return;
                    }
                    work.state[..size].copy_from_slice(&kept[i % most * size..][..size]);
                    s.call(Back { work: &mut work, now: part(i) });
                }
            }
            for (d, from) in work.d_state.chunks_exact(pitch).take(dim).enumerate() {
                write(&job.to.state, [sequence, head, d], &from[..columns], false);
            }
        }
    }
}

/// A chunk's gradients, and the gradient of the state before it from that after it.
struct Back<'w, 'a, 's> {
    work: &'w mut Work<'a, 's>,
    now: Range<usize>,
}

impl Kernel for Back<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { work, now } = self;
        let n = now.len();
        let total = s.call(Prepare { work: &mut *work, now: now.clone(), queries: true });
        let (job, inputs) = (work.job, &work.job.inputs);
        let of = &inputs.of;
        let Sizes { dim, padded, rows: room, across, group } = work.sizes;
        let (columns, wide, pitch) = (work.columns, work.wide, work.across_values);
        let from = (&*work.state, pitch);
        s.call(Turn { rows: dim, columns, from, to: (&mut *work.state_turned, wide) });
        let from = (&*work.d_state, pitch);
        s.call(Turn { rows: dim, columns, from, to: (&mut *work.d_state_turned, wide) });
        for (g, reader) in (0..group).map(|g| (g, inputs.out_head(work.head, g))) {
            let to = &mut work.d_out[g * room * pitch..][..room * pitch];
            load(s, &job.given.d_out, [work.batch, reader], now.clone(), to, pitch, None, of.scale);
            if let (Some(eps), Some(out)) = (of.normaliser, &job.given.out) {
                // The divisor is one more output, whose gradient is that of the quotient.
                let masses = &work.state_turned[inputs.value_dim * wide..][..padded];
                for i in 0..n {
                    let scores = &work.scores[(g * room + i) * across..][..=i];
                    let q = &work.q[(g * room + i) * padded..][..padded];
                    let mass = of.scale * (add_up(s, scores) + dot(s, q, masses)) + eps;
                    let row = &mut to[i * pitch..][..pitch];
                    scale_row(s, row, if mass == 0.0 { 0.0 } else { 1.0 / mass });
                    let at = now.start + i;
                    load(s, out, [work.batch, reader], at..at + 1, work.row, pitch, None, 1.0);
                    row[inputs.value_dim] = -dot(s, row, work.row);
                }
            }
        }
        let (sets, solves, keys) = (work.sets, work.solves, room * wide);
        let (readers, turned) = (group + usize::from(solves), work.turned.len() / sets);
        // Places of scores of a reader with one of the keys.
        let place = |set: usize, reader: usize| (set * (group + 1) + reader) * room * across;

        // What is written, what that is solved from, and values.
        for set in 0..sets {
            let (from, to) = ((&work.turned[set * turned..], across), (&mut work.last[set * keys..], wide));
            s.call(Turn { rows: dim, columns: n, from, to });
            let (a, b) = ((&work.last[set * keys..], wide), (&*work.d_state, pitch));
            let c = (&mut work.d_update[set * room * pitch..], pitch);
            s.call(Multiply { part: Part::Whole, rows: n, columns, depth: dim, a, b, c, add: false });
            for g in 0..group {
                let from = (&work.scores[(set * group + g) * room * across..], across);
                s.call(Turn { rows: n, columns: n, from, to: (&mut *work.d_turned, across) });
                let (a, b) = ((&*work.d_turned, across), (&work.d_out[g * room * pitch..], pitch));
                let c = (&mut work.d_update[set * room * pitch..], pitch);
                s.call(Multiply { part: Part::Upper, rows: n, columns, depth: n, a, b, c, add: true });
            }
        }
        if solves {
            let from = (&*work.inverse, across);
            s.call(Turn { rows: n, columns: n, from, to: (&mut *work.d_turned, across) });
            let (a, b) = ((&*work.d_turned, across), (&work.d_update[(sets - 1) * room * pitch..], pitch));
            let c = (&mut *work.d_value, pitch);
            s.call(Multiply { part: Part::Upper, rows: n, columns, depth: n, a, b, c, add: false });
        }
        if sets == 2 {
            s.call(Turn { rows: n, columns: n, from: (&*work.own, across), to: (&mut *work.d_turned, across) });
            let (a, b) = ((&*work.d_turned, across), (&*work.d_value, pitch));
            let c = (&mut *work.d_update, pitch);
            s.call(Multiply { part: Part::Upper, rows: n, columns, depth: n, a, b, c, add: true });
        }

        // Scores, 0 above the diagonal.
        for set in 0..sets {
            let written = if set == 1 || of.delta { &*work.updates } else { &*work.values };
            let to = (&mut *work.updates_turned, across);
            s.call(Turn { rows: n, columns, from: (written, pitch), to });
            for reader in 0..readers {
                let own = reader == group;
                let a = if own { &*work.d_value } else { &work.d_out[reader * room * pitch..] };
                let (b, to) = ((&*work.updates_turned, across), &mut work.d_scores[place(set, reader)..]);
                let (a, c) = ((a, pitch), (&mut *to, across));
                s.call(Multiply { part: Part::Below, rows: n, columns: n, depth: columns, a, b, c, add: false });
                for i in 0..n {
                    let end = ((i / S::ROWS + 1) * S::ROWS).max((i + 1).next_multiple_of(S::LANES)).min(across);
                    let row = &mut to[i * across..][..across];
                    row[i + usize::from(!own)..end].fill(0.0);
                    if own && of.delta {
                        scale_row(s, &mut row[..i.next_multiple_of(S::LANES)], -1.0);
                    }
                }
            }
        }

        // Queries and keys, by the states before and after the chunk.
        let b = (&*work.state_turned, wide);
        for g in 0..group {
            let a = (&work.d_out[g * room * pitch..], pitch);
            let c = (&mut work.d_queries[g * keys..], wide);
            s.call(Multiply { part: Part::Whole, rows: n, columns: dim, depth: columns, a, b, c, add: false });
        }
        if solves {
            let (a, c) = ((&*work.d_value, pitch), (&mut *work.d_reads, wide));
            s.call(Multiply { part: Part::Whole, rows: n, columns: dim, depth: columns, a, b, c, add: false });
        }
        for set in 0..sets {
            let written = if set == 1 || of.delta { &*work.updates } else { &*work.values };
            let (a, b, c) = ((written, pitch), (&*work.d_state_turned, wide), (&mut work.d_keys[set * keys..], wide));
            s.call(Multiply { part: Part::Whole, rows: n, columns: dim, depth: columns, a, b, c, add: false });
        }
        // What the decays of the chunk are to the state after it.
        let mut whole = 0f64;
        for d in 0..dim {
            let sum = dot(s, &work.state[d * pitch..][..pitch], &work.d_state[d * pitch..][..pitch]);
            match of.decay {
                Decay::None | Decay::Value { .. } => {}
                Decay::Token(_) => whole += f64::from(total) * f64::from(sum),
                Decay::Channel(_) => work.channels[d] = sum * work.working[d],
            }
        }

        decayed(s, &of.decay, work.d_state, pitch, dim, total, work.working);
        for reader in 0..readers {
            // Keys as they read are those of `Chunk`, negative.
            let (from, b) = match reader == group {
                false => (&work.q[reader * room * padded..], &work.d_out[reader * room * pitch..]),
                true => (if of.delta { &*work.k } else { &*work.reads }, &*work.d_value),
            };
            s.call(Turn { rows: n, columns: dim, from: (from, padded), to: (&mut *work.reads_turned, across) });
            let (a, b, c) = ((&*work.reads_turned, across), (b, pitch), (&mut *work.d_state, pitch));
            s.call(Multiply { part: Part::Whole, rows: dim, columns, depth: n, a, b, c, add: true });
        }

        match of.decay {
            Decay::Channel(_) => work.through_channels(s, n),
            _ => work.through_tokens(s, n, whole),
        }
        work.store(s, now);
    }
}

impl Work<'_, '_> {
    /// Writes the gradients of a chunk's rows.
    #[inline(always)]
    fn store<S: Simd>(&mut self, s: S, now: Range<usize>) {
        let (job, inputs) = (self.job, &self.job.inputs);
        let of = &inputs.of;
        let Sizes { dim, padded, rows: room, group, .. } = self.sizes;
        let (wide, pitch, value_dim) = (self.wide, self.across_values, inputs.value_dim);
        // Heads that share queries or keys add to what the first of them wrote.
        let later_reader =
            inputs.query_heads < inputs.heads && !self.head.is_multiple_of(inputs.heads / inputs.query_heads);
        let later = !self.head.is_multiple_of(inputs.heads / inputs.key_heads);
        for (i, at) in now.enumerate() {
            for (g, reader) in self.readers.clone().enumerate() {
                let row = &mut self.d_queries[(g * room + i) * wide..][..padded];
                if of.unit.is_some() {
                    let q = &self.queries[(g * room + i) * wide..][..padded];
                    of_length(s, row, q, self.lengths[g * room + i]);
                }
                write(&job.to.q, [self.batch, reader, at], &row[..dim], later_reader);
            }
            let row = &mut self.d_keys[i * wide..][..padded];
            let key = &self.keys[i * wide..][..padded];
            let mut d_beta = 0.0;
            if of.delta {
                for (to, x) in row.iter_mut().zip(&self.d_reads[i * wide..][..padded]) {
                    *to += x;
                }
                let beta = self.beta[i];
                let (d, u) = (&self.d_value[i * pitch..][..pitch], &self.updates[i * pitch..][..pitch]);
                d_beta = dot(s, d, u) / (beta * beta);
            } else if of.beta.is_some() {
                d_beta = dot(s, row, key);
                scale_row(s, row, self.beta[i]);
            }
            if of.unit.is_some() {
                of_length(s, row, key, self.lengths[group * room + i]);
            }
            let key_head = inputs.key_head(self.head);
            write(&job.to.k, [self.batch, key_head, at], &row[..dim], later);
            if let Some([a, b]) = &job.to.pair {
                write(a, [self.batch, key_head, at], &self.d_reads[i * wide..][..dim], later);
                write(b, [self.batch, key_head, at], &self.d_keys[(room + i) * wide..][..dim], later);
            }
            let d_value = if of.delta { &*self.d_value } else { &*self.d_update };
            let place = [self.batch, self.head, at];
            write(&job.to.v, place, &d_value[i * pitch..][..value_dim], false);
            if let Some(to) = &job.to.beta {
                write(to, place, &[d_beta], false);
            }
            if let Some(to) = &job.to.g {
                let width = to.shape()[3];
                write(to, place, &self.dg[i * padded..][..width], false);
            }
        }
    }
}

/// The gradient of a row from that of the row `unit`, which it became by being multiplied by `factor`.
#[inline(always)]
fn of_length<S: Simd>(s: S, row: &mut [f32], unit: &[f32], factor: f32) {
    let along = dot(s, row, unit);
    for (x, u) in row.iter_mut().zip(unit) {
        *x = factor * (*x - along * u);
    }
}

/// Writes a row of floats, or adds it to what is there.
#[inline(always)]
fn write(to: &TensorViewMut, [batch, head, row]: [usize; 3], from: &[f32], add: bool) {
    assert!(from.len() == to.shape()[3]);
    let to = to.row_ptr::<f32>(batch, head, row);
    for (i, x) in from.iter().enumerate() {
        // SAFETY: the row has as many floats, and no other item writes it.
        unsafe { *to.add(i) = if add { *to.add(i) + x } else { *x } };
    }
}
