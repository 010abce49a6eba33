//! One matrix of a memory, and what its rows are during a tile of tokens.

use super::Retention;
use super::functions::{power_sum, softmax_columns};
use crate::dense::micro::panel;
use crate::linear::recurrence::{multiply_rows, product, scale_row, turn};
use crate::simd::{MAX_LANES, Simd};

/// Tokens that are read together, a multiple of every instruction set's `ROWS`.
pub(super) const TILE: usize = 48;

/// Floats between rows of scores: a tile in whole panels of any instruction set.
pub(super) const ACROSS: usize = 64;

/// Rows of a buffer of tokens: a tile, and what transposing in whole vectors reads beyond it.
pub(super) const ROOM: usize = TILE + MAX_LANES;

/// A matrix `[inputs, outputs]` that learns. Buffers of rows are padded to whole panels, with zeros.
pub(super) struct Layer {
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    /// Floats between rows of inputs and of outputs.
    pub(super) wide_in: usize,
    pub(super) wide_out: usize,
    /// `W`, `S` and `F`, `[inputs, wide_out]`.
    live: Vec<f32>,
    step: Vec<f32>,
    frozen: Vec<f32>,
    /// What is read of `F`, and its transpose `[outputs, wide_in]`.
    pub(super) used: Vec<f32>,
    pub(super) back: Vec<f32>,
    /// What is read of the weights at hand, where that is no part of sums.
    now: Vec<f32>,
    /// Factor of what is read of sums.
    factor: f32,
    /// Inputs by keys, `[ROOM, wide_in]`, sums `[ROOM, wide_out]` and gradients of the sums.
    pub(super) x: Vec<f32>,
    pub(super) sums: Vec<f32>,
    pub(super) delta: Vec<f32>,
    /// Inputs by keys, transposed, `[wide_in, ACROSS]`, and times factors.
    turned: Vec<f32>,
    weighted: Vec<f32>,
    /// Inputs by queries, and their sums.
    pub(super) z: Vec<f32>,
    pub(super) out: Vec<f32>,
    apart: Vec<f32>,
}

/// What gates make of a tile's tokens, for every read `[TILE + 1]` (how many tokens it sees) and for the weights after it.
pub(super) struct Gates {
    /// `-c[t, i] theta_i`, `[TILE + 1, ACROSS]`.
    pub(super) weights: Vec<f32>,
    /// `b` and `d`.
    pub(super) kept: [f32; TILE + 1],
    pub(super) moved: [f32; TILE + 1],
    /// `-p[n, i] theta_i`, and the product of `eta`.
    pub(super) last: Vec<f32>,
    pub(super) slowed: f32,
}

impl Gates {
    pub(super) fn new() -> Self {
        let (weights, last) = (vec![0.0; (TILE + 1) * ACROSS], vec![0.0; ACROSS]);
        Self { weights, kept: [1.0; TILE + 1], moved: [0.0; TILE + 1], last, slowed: 1.0 }
    }

    /// From the gates of `n` tokens.
    #[inline(always)]
    pub(super) fn set<S: Simd>(&mut self, s: S, n: usize, rate: &[f32], keep: &[f32], momentum: &[f32]) {
        let mut negative = [0f32; ACROSS];
        for (to, rate) in negative.iter_mut().zip(&rate[..n]) {
            *to = -rate;
        }
        (self.kept[0], self.moved[0], self.slowed) = (1.0, 0.0, 1.0);
        self.weights[..ACROSS].fill(0.0);
        self.last.fill(0.0);
        // Rows without rates first: each is made of the one before.
        for t in 0..n {
            scale_row(s, &mut self.last, momentum[t]);
            self.last[t] = 1.0;
            self.slowed *= momentum[t];
            let (before, row) = self.weights.split_at_mut((t + 1) * ACROSS);
            let row = &mut row[..ACROSS];
            row.copy_from_slice(&before[t * ACROSS..]);
            scale_row(s, row, keep[t]);
            for (to, last) in row.iter_mut().zip(&self.last) {
                *to += last;
            }
            self.kept[t + 1] = keep[t] * self.kept[t];
            self.moved[t + 1] = keep[t] * self.moved[t] + self.slowed;
        }
        for row in self.weights.chunks_exact_mut(ACROSS).take(n + 1) {
            multiply_rows(s, row, &negative);
        }
        multiply_rows(s, &mut self.last, &negative);
    }
}

/// Rows times a matrix, all panels of columns.
#[inline(always)]
pub(super) fn times<S: Simd>(
    s: S,
    n: usize,
    depth: usize,
    lower: bool,
    a: &[f32],
    lda: usize,
    b: &[f32],
    c: &mut [f32],
    width: usize,
    add: bool,
) {
    for column in (0..width).step_by(panel::<S>()) {
        product(s, [0, n], depth, lower, a, lda, &b[column..], width, &mut c[column..], width, add);
    }
}

impl Layer {
    #[inline(always)]
    pub(super) fn new<S: Simd>(_: S, inputs: usize, outputs: usize, momentum: bool, by_token: bool) -> Self {
        let wide = |n: usize| n.next_multiple_of(panel::<S>());
        let (wide_in, wide_out) = (wide(inputs), wide(outputs));
        let rows = |n: usize| n.next_multiple_of(S::ROWS).max(wide(n));
        let matrix = rows(inputs) * wide_out;
        let zeros = |n: usize| vec![0f32; n];
        Self {
            inputs,
            outputs,
            wide_in,
            wide_out,
            live: zeros(matrix),
            step: zeros(if momentum { matrix } else { 0 }),
            frozen: zeros(matrix),
            used: zeros(matrix),
            back: zeros(rows(outputs) * wide_in),
            now: zeros(if by_token { matrix } else { 0 }),
            factor: 1.0,
            x: zeros(ROOM * wide_in),
            sums: zeros(ROOM * wide_out),
            delta: zeros(ROOM * wide_out),
            turned: zeros(rows(inputs) * ACROSS),
            weighted: zeros(rows(inputs) * ACROSS),
            z: zeros(ROOM * wide_in),
            out: zeros(ROOM * wide_out),
            apart: zeros(if momentum { ROOM * wide_out } else { 0 }),
        }
    }

    /// Copies this matrix' weights in from, or out to, those of the head; all slices begin with them.
    pub(super) fn exchange(&mut self, live: &mut [f32], step: &mut [f32], frozen: &mut [f32], out: bool) {
        let (n, wide) = (self.outputs, self.wide_out);
        for (rows, outside) in [(&mut self.live, live), (&mut self.step, step), (&mut self.frozen, frozen)] {
            for (row, outside) in rows.chunks_exact_mut(wide).zip(outside.chunks_exact_mut(n)).take(self.inputs) {
                if out {
                    outside.copy_from_slice(&row[..n]);
                } else {
                    row[..n].copy_from_slice(outside);
                }
            }
        }
    }

    /// Makes the weights at hand those at which gradients are taken.
    pub(super) fn freeze(&mut self) {
        self.frozen.copy_from_slice(&self.live);
    }

    /// Prepares what is read of the weights at which gradients are taken; `back`: for gradients with respect to inputs, too.
    #[inline(always)]
    pub(super) fn prepare<S: Simd>(&mut self, s: S, retention: Retention, back: bool) {
        self.used.copy_from_slice(&self.frozen);
        self.factor = Self::read_out(s, retention, &mut self.used, [self.inputs, self.outputs], self.wide_out);
        if back {
            turn(s, [self.wide_out, self.wide_in], &self.used, self.inputs, &mut self.back, 0);
        }
    }

    /// Makes weights what is read of them. Returns by what factor they changed, if that is all.
    #[inline(always)]
    fn read_out<S: Simd>(
        s: S,
        retention: Retention,
        weights: &mut [f32],
        [inputs, outputs]: [usize; 2],
        wide: usize,
    ) -> f32 {
        match retention {
            Retention::Plain => 1.0,
            Retention::Norm { exponent, .. } => {
                let sum = power_sum(s, &weights[..inputs * wide], exponent);
                let factor = if sum == 0.0 { 1.0 } else { sum.powf(-(exponent - 2.0) / exponent) };
                scale_row(s, weights, factor);
                factor
            }
            Retention::Softmax { total, .. } => {
                softmax_columns(s, &mut weights[..inputs * wide], wide, total);
                for row in weights.chunks_exact_mut(wide).take(inputs) {
                    row[outputs..].fill(0.0);
                }
                1.0
            }
        }
    }

    /// Transposes the inputs by keys of `n` tokens, once they are there.
    #[inline(always)]
    pub(super) fn transpose<S: Simd>(&mut self, s: S, n: usize) {
        turn(s, [self.wide_in, ACROSS], &self.x, n, &mut self.turned, 0);
    }

    /// `out = z^T W_t` of `n` rows, which see as many tokens as `seen` of their number says, by sums over these.
    #[inline(always)]
    pub(super) fn read<S: Simd>(&mut self, s: S, n: usize, gates: &Gates, after: usize, scores: &mut [f32]) {
        let Self { inputs, wide_in, wide_out, .. } = *self;
        times(s, n, inputs, false, &self.z, wide_in, &self.turned, scores, ACROSS, false);
        times(s, n, inputs, false, &self.z, wide_in, &self.live, &mut self.out, wide_out, false);
        let moves = !self.step.is_empty();
        if moves {
            times(s, n, inputs, false, &self.z, wide_in, &self.step, &mut self.apart, wide_out, false);
        }
        for row in 0..n {
            let t = row + after;
            multiply_rows(s, &mut scores[row * ACROSS..][..ACROSS], &gates.weights[t * ACROSS..][..ACROSS]);
            let out = &mut self.out[row * wide_out..][..wide_out];
            if gates.kept[t] != 1.0 {
                scale_row(s, out, gates.kept[t]);
            }
            if moves {
                let by = s.splat(gates.moved[t]);
                let apart = &self.apart[row * wide_out..][..wide_out];
                for (out, apart) in out.chunks_exact_mut(S::LANES).zip(apart.chunks_exact(S::LANES)) {
                    // SAFETY: both chunks have LANES floats.
                    unsafe { s.store(out.as_mut_ptr(), s.fma(by, s.load(apart.as_ptr()), s.load(out.as_ptr()))) };
                }
            }
        }
        times(s, n, n, true, scores, ACROSS, &self.delta, &mut self.out, wide_out, true);
        if self.factor != 1.0 {
            scale_row(s, &mut self.out[..n * wide_out], self.factor);
        }
    }

    /// `out = z^T R` of one row, `R` what is read of the weights at hand as [`Self::look`] left it.
    #[inline(always)]
    pub(super) fn read_now<S: Simd>(&mut self, s: S) {
        let Self { inputs, wide_in, wide_out, .. } = *self;
        times(s, 1, inputs, false, &self.z, wide_in, &self.now, &mut self.out, wide_out, false);
    }

    /// `out = z^T R` of `n` rows, `R` what is read of the weights with which the chunk began.
    #[inline(always)]
    pub(super) fn read_frozen<S: Simd>(&mut self, s: S, n: usize) {
        let Self { inputs, wide_in, wide_out, .. } = *self;
        times(s, n, inputs, false, &self.z, wide_in, &self.used, &mut self.out, wide_out, false);
    }

    /// Makes what is read of the weights at hand.
    #[inline(always)]
    pub(super) fn look<S: Simd>(&mut self, s: S, retention: Retention) {
        self.now.copy_from_slice(&self.live);
        Self::read_out(s, retention, &mut self.now, [self.inputs, self.outputs], self.wide_out);
    }

    /// The weights after `n` tokens.
    #[inline(always)]
    pub(super) fn learn<S: Simd>(&mut self, s: S, n: usize, gates: &Gates) {
        let Self { inputs, wide_out, .. } = *self;
        if gates.kept[n] != 1.0 {
            scale_row(s, &mut self.live, gates.kept[n]);
        }
        let mut parts = [Some((&gates.weights[n * ACROSS..][..ACROSS], &mut self.live)), None];
        if !self.step.is_empty() {
            let by = s.splat(gates.moved[n]);
            if let Some((_, live)) = &mut parts[0] {
                for (live, step) in live.chunks_exact_mut(S::LANES).zip(self.step.chunks_exact(S::LANES)) {
                    // SAFETY: both chunks have LANES floats.
                    unsafe { s.store(live.as_mut_ptr(), s.fma(by, s.load(step.as_ptr()), s.load(live.as_ptr()))) };
                }
            }
            scale_row(s, &mut self.step, gates.slowed);
            parts[1] = Some((&gates.last[..], &mut self.step));
        }
        for (factors, to) in parts.into_iter().flatten() {
            self.weighted.copy_from_slice(&self.turned);
            for row in self.weighted.chunks_exact_mut(ACROSS).take(inputs) {
                multiply_rows(s, row, factors);
            }
            times(s, inputs, n, false, &self.weighted, ACROSS, &self.delta, to, wide_out, true);
        }
    }
}
