//! What a chunk's gradients start from: its rows as they are, and times decays; scores; what is written; the next state.

use super::Decay;
use super::coming::Coming;
use super::products::{Multiplier, Multiply, Part};
use super::rows::{load, load_numbers, scale_row};
use super::scores::{Chunk, Pair, Sides, Sizes, dot};
use super::work::Work;
use crate::simd::{Kernel, MAX_LANES, Simd};
use crate::tensor::TensorView;
use std::ops::Range;

/// The least factor of an update by the delta rule. A smaller one changes nothing that f32 could tell from this.
const LEAST: f32 = 1e-10;

/// What rows of a chunk have to do with each other and what they write, from the state before it.
pub(super) struct Prepare<'w, 'a, 's> {
    pub(super) work: &'w mut Work<'a, 's>,
    pub(super) now: Range<usize>,
    /// Whether queries count.
    pub(super) queries: bool,
}

impl Kernel for Prepare<'_, '_, '_> {
    /// The decay of a whole state.
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let Self { work, now, queries } = self;
        let inputs = &work.job.inputs;
        let of = &inputs.of;
        let (n, at) = (now.len(), [work.batch, work.head]);
        let Sizes { padded, rows: room, .. } = work.sizes;
        let (group, wide) = (if queries { work.sizes.group } else { 0 }, work.wide);
        let sizes = Sizes { group, ..work.sizes };
        let tiles = n.next_multiple_of(S::ROWS);
        for (i, reader) in work.readers.clone().enumerate().take(group) {
            let to = &mut work.q[i * room * padded..][..room * padded];
            load(s, &of.q, [work.batch, reader], now.clone(), to, padded, None, 1.0);
            to[n * padded..tiles * padded].fill(0.0);
            let lengths = &mut work.lengths[i * room..];
            keep(s, of.unit, to, padded, lengths, &mut work.queries[i * room * wide..], wide, n);
        }
        let key_head = inputs.key_head(work.head);
        if let Some(k) = &of.k {
            load(s, k, [work.batch, key_head], now.clone(), work.k, padded, None, 1.0);
        }
        for (view, to) in of.pair.iter().flatten().zip([&mut *work.reads, &mut *work.b]) {
            load(s, view, [work.batch, key_head], now.clone(), to, padded, None, 1.0);
            to[n * padded..(tiles + MAX_LANES) * padded].fill(0.0);
        }
        work.k[n * padded..(tiles + MAX_LANES) * padded].fill(0.0);
        let lengths = &mut work.lengths[work.sizes.group * room..];
        keep(s, of.unit, work.k, padded, lengths, work.keys, wide, n);
        if of.pair.is_some() {
            keep(s, None, work.reads, padded, &mut [], work.asks, wide, n);
            keep(s, None, work.b, padded, &mut [], &mut work.keys[room * wide..], wide, n);
        }
        if let Decay::Channel(view) = &of.decay {
            load(s, view, at, now.clone(), work.g, padded, None, 1.0);
        }
        load(s, &of.v, at, now.clone(), work.values, work.across_values, None, 1.0);
        if of.normaliser.is_some() {
            for row in work.values.chunks_exact_mut(work.across_values).take(n) {
                row[inputs.value_dim] = 1.0;
            }
        }
        let beta = of.beta.map(|view| {
            load_numbers(&view, at, now.clone(), &mut work.beta[..n]);
            work.beta[n..].fill(0.0);
            if of.delta {
                for beta in &mut work.beta[..n] {
                    if beta.abs() < LEAST {
                        *beta = LEAST;
                    }
                }
            }
            &*work.beta
        });
        if let Some(beta) = beta
            && !of.delta
        {
            for (i, &beta) in beta.iter().enumerate().take(n) {
                let row = &mut work.k[i * padded..][..padded];
                scale_row(s, row, beta);
                work.scaled[i * wide..][..padded].copy_from_slice(row);
            }
        }
        let across = sizes.across;
        let turned_rows = work.turned.len() / work.sets;
        let (turned, b_turned) = work.turned.split_at_mut(turned_rows);
        let (scores, b_scores) = work.scores.split_at_mut(work.sizes.group * room * across);
        let (own, b_own) = work.own.split_at_mut(if work.solves { room * across } else { 0 });
        let pair = of.pair.map(|_| Pair {
            reads: &mut *work.reads,
            b: &mut *work.b,
            turned: b_turned,
            scores: b_scores,
            own: b_own,
        });
        let (q, k, inverse) = (&mut *work.q, &mut *work.k, &mut *work.inverse);
        let (mut vectors, delta) = (Multiplier::new(None), of.delta);
        let sides = Sides::none(&mut vectors);
        let mut rows_of = Chunk { sizes, n, q, k, turned, scores, delta, inverse, own, beta, bonus: None, pair, sides };
        let total = match &of.decay {
            Decay::None | Decay::Value { .. } => rows_of.by_tokens(s, None),
            Decay::Token(view) => {
                load_numbers(view, at, now, &mut work.decay[..n]);
                rows_of.by_tokens(s, Some(&mut *work.decay))
            }
            Decay::Channel(_) => {
                rows_of.by_channels(s, work.g, work.working, (&Coming::default(), 0));
                1.0
            }
        };
        let (dim, columns, pitch) = (inputs.dim, work.columns, work.across_values);
        if of.delta {
            let (a, b, c) = ((&*work.k, padded), (&*work.state, pitch), (&mut *work.values, pitch));
            s.call(Multiply { part: Part::Whole, rows: n, columns, depth: dim, a, b, c, add: true });
        } else if of.pair.is_some() {
            // What is read of the state before the chunk and of its own keys. There is room for it where gradients will be.
            let (a, b, c) = ((&*work.reads, padded), (&*work.state, pitch), (&mut *work.d_value, pitch));
            s.call(Multiply { part: Part::Whole, rows: n, columns, depth: dim, a, b, c, add: false });
            let (a, b, c) = ((&*work.own, across), (&*work.values, pitch), (&mut *work.d_value, pitch));
            s.call(Multiply { part: Part::Lower, rows: n, columns, depth: n, a, b, c, add: true });
        }
        if work.solves {
            let read = if of.delta { &*work.values } else { &*work.d_value };
            let (a, b, c) = ((&*work.inverse, across), (read, pitch), (&mut *work.updates, pitch));
            s.call(Multiply { part: Part::Lower, rows: n, columns, depth: n, a, b, c, add: false });
        }
        total
    }
}

/// Rows of length 1, where they shall be, and what they were multiplied by; `to` gets what they are then.
#[inline(always)]
fn keep<S: Simd>(
    s: S,
    unit: Option<f32>,
    rows: &mut [f32],
    padded: usize,
    factors: &mut [f32],
    to: &mut [f32],
    wide: usize,
    n: usize,
) {
    for i in 0..n {
        let row = &mut rows[i * padded..][..padded];
        if let Some(eps) = unit {
            factors[i] = 1.0 / (dot(s, row, row) + eps).sqrt();
            scale_row(s, row, factors[i]);
        }
        to[i * wide..][..padded].copy_from_slice(row);
    }
}

/// The state after a chunk, from that before it.
pub(super) struct Advance<'w, 'a, 's> {
    pub(super) work: &'w mut Work<'a, 's>,
    pub(super) now: Range<usize>,
}

impl Kernel for Advance<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { work, now } = self;
        let n = now.len();
        let total = s.call(Prepare { work: &mut *work, now, queries: false });
        let pitch = work.across_values;
        decayed(s, &work.job.inputs.of.decay, work.state, pitch, work.sizes.dim, total, work.working);
        let (rows, columns) = (work.sizes.dim, work.columns);
        let turned_rows = work.turned.len() / work.sets;
        for set in 0..work.sets {
            let written = if set == 1 || work.job.inputs.of.delta { &*work.updates } else { &*work.values };
            let a = (&work.turned[set * turned_rows..], work.sizes.across);
            let (b, c) = ((written, pitch), (&mut *work.state, pitch));
            s.call(Multiply { part: Part::Whole, rows, columns, depth: n, a, b, c, add: true });
        }
    }
}

/// Rows of a state times the decay of a chunk: `total`, or that of their channel.
#[inline(always)]
pub(super) fn decayed<S: Simd>(
    s: S,
    decay: &Decay<TensorView>,
    state: &mut [f32],
    pitch: usize,
    dim: usize,
    total: f32,
    channels: &[f32],
) {
    for (d, row) in state.chunks_exact_mut(pitch).take(dim).enumerate() {
        match decay {
            Decay::None | Decay::Value { .. } => {}
            Decay::Token(_) => scale_row(s, row, total),
            Decay::Channel(_) => scale_row(s, row, channels[d]),
        }
    }
}
