//! One head of one entry of the batch, tile by tile.

use super::functions::{activate, activate_back, descend, standardise, standardise_back};
use super::layer::{ACROSS, Gates, Layer, ROOM, TILE, times};
use super::{FastWeight, Memory, Residual, Retention};
use crate::linear::recurrence::{load, load_numbers};
use crate::linear::tiles::{Place, store};
use crate::parallel::Cancel;
use crate::simd::{Kernel, Simd};
use crate::tensor::{TensorView, TensorViewMut};
use std::ops::Range;

pub(super) struct Item<'a, 'm> {
    pub(super) of: &'a FastWeight<'a>,
    pub(super) batch: usize,
    pub(super) head: usize,
    pub(super) out: &'a TensorViewMut<'a>,
    pub(super) memory: Memory<'m>,
    pub(super) cancel: &'a Cancel,
}

impl Kernel for Item<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        s.call(Body(self));
    }
}

/// [`Item`], compiled once for the base of an instruction set.
struct Body<'a, 'm>(Item<'a, 'm>);

/// How tokens read their weights.
#[derive(Clone, Copy, PartialEq)]
enum Reading {
    /// By sums over the tokens of a tile.
    Sums,
    /// One token after the other.
    Each,
    /// Those with which the chunk began.
    Frozen,
}

/// The gates of a tile.
struct Numbers {
    rate: [f32; TILE],
    keep: [f32; TILE],
    momentum: [f32; TILE],
    threshold: [f32; TILE],
}

impl Kernel for Body<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Item { of, batch, head, out, memory, cancel } = self.0;
        let [_, heads, length, _] = of.k.shape();
        let reading = match of.retention {
            Retention::Plain | Retention::Norm { by_token: false, .. } => Reading::Sums,
            Retention::Norm { .. } | Retention::Softmax { by_token: true, .. } => Reading::Each,
            Retention::Softmax { .. } => Reading::Frozen,
        };
        let (each, moves) = (reading == Reading::Each, of.momentum.is_some());
        let mut layers = Vec::with_capacity(of.widths.len() - 1);
        for pair in of.widths.windows(2) {
            layers.push(Layer::new(s, pair[0] + usize::from(of.bias), pair[1], moves, each));
        }
        exchange(&mut layers, &mut *memory.live, &mut *memory.step, &mut *memory.frozen, false);
        let mut worker = Worker {
            of,
            at: [batch, head],
            out,
            layers,
            gates: Gates::new(),
            scores: vec![0.0; ROOM * ACROSS],
            errors: vec![],
            numbers: Numbers { rate: [0.0; TILE], keep: [1.0; TILE], momentum: [0.0; TILE], threshold: [0.0; TILE] },
        };
        worker.prepare(s);
        let group = of.q.shape()[1] / heads;
        let (mut at, mut position) = (0, of.position);
        // Up to here, rows are taken one by one: some hold numbers that are not finite, which may reach no row before them.
        let mut one_by_one = 0;
        while at < length {
            if cancel.is_cancelled() {
                return;
            }
            if position == of.chunk {
                for layer in &mut worker.layers {
                    layer.freeze();
                }
                worker.prepare(s);
                position = 0;
            }
            let most = if each || at < one_by_one { 1 } else { TILE };
            let n = most.min(of.chunk - position).min(length - at);
            let now = at..at + n;
            if !worker.learn_from(s, now.clone()) && n > 1 {
                one_by_one = at + n;
                continue;
            }
            if each && of.before {
                worker.look(s);
            }
            if each {
                worker.learn(s, n);
            }
            if each && !of.before {
                worker.look(s);
            }
            for reader in head * group..(head + 1) * group {
                worker.answer(s, reader, now.clone(), reading);
            }
            if !each {
                worker.learn(s, n);
            }
            (at, position) = (at + n, position + n);
        }
        if position == of.chunk {
            for layer in &mut worker.layers {
                layer.freeze();
            }
        }
        exchange(&mut worker.layers, memory.live, memory.step, memory.frozen, true);
    }
}

/// The head's weights, matrix after matrix, in or out.
fn exchange(layers: &mut [Layer], live: &mut [f32], step: &mut [f32], frozen: &mut [f32], out: bool) {
    let mut at = 0;
    for layer in layers {
        let momentum = at.min(step.len());
        layer.exchange(&mut live[at..], &mut step[momentum..], &mut frozen[at..], out);
        at += layer.inputs * layer.outputs;
    }
}

struct Worker<'a> {
    of: &'a FastWeight<'a>,
    at: [usize; 2],
    out: &'a TensorViewMut<'a>,
    layers: Vec<Layer>,
    gates: Gates,
    scores: Vec<f32>,
    /// Gradients with respect to inputs.
    errors: Vec<f32>,
    numbers: Numbers,
}

impl Worker<'_> {
    #[inline(always)]
    fn prepare<S: Simd>(&mut self, s: S) {
        for (l, layer) in self.layers.iter_mut().enumerate() {
            layer.prepare(s, self.of.retention, l > 0);
        }
    }

    #[inline(always)]
    fn look<S: Simd>(&mut self, s: S) {
        for layer in &mut self.layers {
            layer.look(s, self.of.retention);
        }
    }

    #[inline(always)]
    fn learn<S: Simd>(&mut self, s: S, n: usize) {
        for layer in &mut self.layers {
            layer.learn(s, n, &self.gates);
        }
    }

    /// Gradients and gates of rows. Returns whether keys, values and gradients are finite.
    #[inline(always)]
    fn learn_from<S: Simd>(&mut self, s: S, rows: Range<usize>) -> bool {
        let Self { of, at, layers, gates, errors, numbers, .. } = self;
        let (n, at, depth) = (rows.len(), *at, layers.len());
        load_numbers(&of.rate, at, rows.clone(), &mut numbers.rate[..n]);
        if let Some(keep) = &of.keep {
            load_numbers(keep, at, rows.clone(), &mut numbers.keep[..n]);
        }
        if let Some(momentum) = &of.momentum {
            load_numbers(momentum, at, rows.clone(), &mut numbers.momentum[..n]);
        }
        if let Some(threshold) = &of.threshold {
            load_numbers(threshold, at, rows.clone(), &mut numbers.threshold[..n]);
        }
        gates.set(s, n, &numbers.rate, &numbers.keep, &numbers.momentum);
        let wide = layers[0].wide_in;
        let mut finite = inputs(s, of, &of.k, at, rows.clone(), &mut layers[0].x, wide, 1.0);
        for l in 0..depth {
            let (layer, rest) = layers[l..].split_at_mut(1);
            let layer = &mut layer[0];
            let Layer { inputs, outputs, wide_in, wide_out, .. } = *layer;
            layer.transpose(s, n);
            times(s, n, inputs, false, &layer.x, wide_in, &layer.used, &mut layer.sums, wide_out, false);
            if let Some(next) = rest.first_mut() {
                hidden(s, of, n, &layer.sums, wide_out, outputs, &mut next.x, next.wide_in);
            }
        }
        // Errors of the last layer's rows.
        let Layer { outputs, wide_out, .. } = layers[depth - 1];
        finite &= load(s, &of.v, at, rows, &mut layers[depth - 1].delta, wide_out, None, -1.0);
        if of.residual.is_some() {
            match &mut layers[..] {
                [Layer { x, delta, .. }] => add_rows(n, outputs, x, wide, delta, wide_out),
                [Layer { x, .. }, .., Layer { delta, .. }] => add_rows(n, outputs, x, wide, delta, wide_out),
                [] => {}
            }
        }
        let Layer { sums, delta, .. } = &mut layers[depth - 1];
        for row in 0..n {
            let said = &mut sums[row * wide_out..][..wide_out];
            let error = &mut delta[row * wide_out..][..wide_out];
            let mut inverse = 0.0;
            if let Some(Residual { gain, shift, eps }) = of.residual {
                inverse = standardise(s, said, outputs, eps);
                let (gain, shift) = (&gain[at[1] * outputs..][..outputs], &shift[at[1] * outputs..][..outputs]);
                for c in 0..outputs {
                    error[c] += said[c] * gain[c] + shift[c];
                }
            } else {
                for (error, said) in error.iter_mut().zip(said.iter()) {
                    *error += said;
                }
            }
            descend(s, of.loss, numbers.threshold[row], error, outputs);
            if let Some(Residual { gain, .. }) = of.residual {
                for (error, gain) in error.iter_mut().zip(&gain[at[1] * outputs..][..outputs]) {
                    *error *= gain;
                }
                standardise_back(s, said, outputs, inverse, error);
            }
        }
        // And of those before it.
        for l in (1..depth).rev() {
            let (before, after) = layers.split_at_mut(l);
            let (before, after) = (&mut before[l - 1], &after[0]);
            let Layer { outputs, wide_in, wide_out, .. } = *after;
            errors.resize(ROOM * wide_in, 0.0);
            times(s, n, outputs, false, &after.delta, wide_out, &after.back, errors, wide_in, false);
            let width = before.wide_out;
            for row in 0..n {
                let error = &mut errors[row * wide_in..][..width.min(wide_in)];
                error[before.outputs..].fill(0.0);
                let sums = &before.sums[row * width..][..width];
                activate_back(s, of.activation, sums, error, &mut before.delta[row * width..][..width]);
            }
        }
        for layer in layers.iter() {
            finite &= crate::dense::rows::is_finite(s, &layer.delta[..n * layer.wide_out]);
        }
        finite
    }

    /// What the memory says to the queries of a head.
    #[inline(always)]
    fn answer<S: Simd>(&mut self, s: S, reader: usize, rows: Range<usize>, reading: Reading) {
        let Self { of, at, layers, gates, scores, out, .. } = self;
        let (n, depth) = (rows.len(), layers.len());
        let wide = layers[0].wide_in;
        // A query that is not finite spoils its own row alone.
        inputs(s, of, &of.q, [at[0], reader], rows.clone(), &mut layers[0].z, wide, of.scale);
        for l in 0..depth {
            let (layer, rest) = layers[l..].split_at_mut(1);
            let layer = &mut layer[0];
            match reading {
                Reading::Sums => layer.read(s, n, gates, usize::from(!of.before), scores),
                Reading::Each => layer.read_now(s),
                Reading::Frozen => layer.read_frozen(s, n),
            }
            if let Some(next) = rest.first_mut() {
                hidden(s, of, n, &layer.out, layer.wide_out, layer.outputs, &mut next.z, next.wide_in);
            }
        }
        let Layer { outputs, wide_out, .. } = layers[depth - 1];
        if let Some(Residual { gain, shift, eps }) = of.residual {
            let (gain, shift) = (&gain[at[1] * outputs..][..outputs], &shift[at[1] * outputs..][..outputs]);
            for row in 0..n {
                let said = &mut layers[depth - 1].out[row * wide_out..][..wide_out];
                standardise(s, said, outputs, eps);
                for c in 0..outputs {
                    said[c] = said[c] * gain[c] + shift[c];
                }
            }
            match &mut layers[..] {
                [Layer { z, out, .. }] => add_rows(n, outputs, z, wide, out, wide_out),
                [Layer { z, .. }, .., Layer { out, .. }] => add_rows(n, outputs, z, wide, out, wide_out),
                [] => {}
            }
        }
        let place = Place { batch: at[0], head: reader, channel: 0, channels: outputs };
        store(out, place, rows, &layers[depth - 1].out, wide_out);
    }
}

/// Activated rows, as inputs of the next layer.
#[inline(always)]
fn hidden<S: Simd>(
    s: S,
    of: &FastWeight,
    n: usize,
    sums: &[f32],
    wide: usize,
    outputs: usize,
    to: &mut [f32],
    wide_to: usize,
) {
    for row in 0..n {
        let to = &mut to[row * wide_to..][..wide_to];
        activate(s, of.activation, &sums[row * wide..][..wide.min(wide_to)], to);
        to[outputs..].fill(0.0);
        if of.bias {
            to[outputs] = 1.0;
        }
    }
}

/// Rows of inputs, with the input of 1 where there is one.
#[inline(always)]
fn inputs<S: Simd>(
    s: S,
    of: &FastWeight,
    view: &TensorView,
    at: [usize; 2],
    rows: Range<usize>,
    to: &mut [f32],
    wide: usize,
    scale: f32,
) -> bool {
    let finite = load(s, view, at, rows.clone(), to, wide, of.unit, scale);
    if of.bias {
        let dim = view.shape()[3];
        for row in to.chunks_exact_mut(wide).take(rows.len()) {
            row[dim] = 1.0;
        }
    }
    finite
}

/// Adds the first `columns` numbers of rows to those of others.
#[inline(always)]
fn add_rows(n: usize, columns: usize, from: &[f32], wide_from: usize, to: &mut [f32], wide_to: usize) {
    for (from, to) in from.chunks_exact(wide_from).zip(to.chunks_exact_mut(wide_to)).take(n) {
        for (from, to) in from[..columns].iter().zip(to) {
            *to += from;
        }
    }
}
