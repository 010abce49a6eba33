//! Memories that learn while they read: the state is the weights of a small network, and each token is a step of gradient descent on
//! what the network should say for its key.
//!
//! ```text
//! M(x)      x_0 = x, pre_l = x_l W_l, x_(l+1) = act(pre_l), the last without act; perhaps x + norm(..)
//! chunk     gradients of all tokens of a chunk are taken at the weights F with which it began, and are of rank one, x_i delta_i^T:
//!               S_t = eta_t S_(t-1) - theta_t x_t delta_t^T,   W_t = a_t W_(t-1) + S_t
//! read      z^T W_t = b_t z^T W_0 + d_t z^T S_0 - sum_(i <= t) c[t, i] theta_i (z^T x_i) delta_i^T
//! ```
//! with `b`, `c`, `d` products and sums of gates. So tokens of a tile are read together, a masked linear attention per layer, and no
//! weights of single tokens are formed; where the read-out of weights is not linear, tokens go one by one.
//!
//! `F`, `W` and `S` are all there is of a state: a chunk may be continued by another call. The size of a chunk is part of what is
//! computed, the size of a tile is not.

mod functions;
mod item;
mod layer;

use crate::parallel::{Execution, for_each};
use crate::simd::{self, dispatch};
use crate::tensor::{DType, Error, Result, TensorView, TensorViewMut};
use std::sync::Mutex;

/// What hidden layers do to their sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// `x Phi(x)`.
    Gelu,
}

/// What is descended on, by the error `e = M(k) - v`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Loss {
    /// `factor |e|^2`.
    Square {
        /// One half makes the gradient `e`.
        factor: f32,
    },
    /// Gradient `p sgn(e) |e|^(p - 1)`, with `sgn(x) = tanh(steepness x)` and `|x| = sqrt(x^2 + 1e-6)`.
    Power {
        /// `p`.
        exponent: f32,
        /// Of the sign.
        steepness: f32,
    },
    /// Gradient `e` while `|e|` is at most the threshold, else the threshold times the signs of `e`.
    HuberSigns,
    /// As before, with `e / |e|` in place of the signs.
    HuberLength,
    /// Gradient `e` cut off at the threshold, number by number.
    HuberEach,
}

/// What is read of the weights that descend.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Retention {
    /// They themselves.
    Plain,
    /// They, over their `q`-norm to the power `q - 2`, a matrix for itself: the norm of a chunk's first weights, or of each token's.
    Norm {
        /// `q`.
        exponent: f32,
        /// Of each token's.
        by_token: bool,
    },
    /// Softmax over the inputs of each output, times `total`; read of each token's weights, or of a chunk's first.
    Softmax {
        /// What the weights of an output add up to.
        total: f32,
        /// Of each token's.
        by_token: bool,
    },
}

/// `x + norm(..)` around the network, with fixed factors and summands `[heads, value_dim]`.
#[derive(Clone, Copy)]
pub struct Residual<'a> {
    /// Factors.
    pub gain: &'a [f32],
    /// Summands.
    pub shift: &'a [f32],
    /// Added to variances.
    pub eps: f32,
}

/// The arguments of [`fast_weight`].
#[derive(Clone, Copy)]
pub struct FastWeight<'a> {
    /// `[batch, query heads, length, dim]`, heads a multiple of those of `k`.
    pub q: TensorView<'a>,
    /// `[batch, heads, length, dim]`.
    pub k: TensorView<'a>,
    /// `[batch, heads, length, value_dim]`.
    pub v: TensorView<'a>,
    /// `theta`, step sizes, `[batch, heads, length, 1]`.
    pub rate: TensorView<'a>,
    /// `a`, what is kept of weights, likewise; none is 1.
    pub keep: Option<TensorView<'a>>,
    /// `eta`, what is kept of the last step, likewise; none is 0.
    pub momentum: Option<TensorView<'a>>,
    /// Of Huber losses, likewise.
    pub threshold: Option<TensorView<'a>>,
    /// Sizes of the layers, from `dim` to `value_dim`.
    pub widths: &'a [usize],
    /// Whether each matrix has one row more, for an input of 1.
    pub bias: bool,
    /// Between layers.
    pub activation: Activation,
    /// Around the network.
    pub residual: Option<Residual<'a>>,
    /// What is descended on.
    pub loss: Loss,
    /// What is read of the weights.
    pub retention: Retention,
    /// Whether a query reads the weights before its own row's step.
    pub before: bool,
    /// Tokens whose gradients are taken at the same weights.
    pub chunk: usize,
    /// Tokens since the last chunk began.
    pub position: usize,
    /// Divide rows of `q` and `k` by `sqrt(sum of squares + this)`.
    pub unit: Option<f32>,
    /// Factor on queries.
    pub scale: f32,
}

/// The weights of one call, `[batch, heads, sum of inputs * outputs]` each, contiguous.
pub struct Memory<'a> {
    /// `W`.
    pub live: &'a mut [f32],
    /// `S`; empty without momentum.
    pub step: &'a mut [f32],
    /// `F`.
    pub frozen: &'a mut [f32],
}

impl FastWeight<'_> {
    /// Numbers of a head's weights.
    pub fn weights(&self) -> usize {
        self.widths.windows(2).map(|w| (w[0] + usize::from(self.bias)) * w[1]).sum()
    }

    fn check(&self, out: &TensorViewMut, memory: &Memory) -> Result<()> {
        let [batch, heads, length, dim] = self.k.shape();
        let [_, query_heads, ..] = self.q.shape();
        let value_dim = self.v.shape()[3];
        let expect = |name: &'static str, got: [usize; 4], expected: [usize; 4]| {
            if got == expected {
                Ok(())
            } else {
                Err(Error::value(name, format!("shape {got:?}"), format!("{expected:?}")))
            }
        };
        if heads == 0 || query_heads == 0 || query_heads % heads != 0 {
            return Err(Error::value("q", format!("{query_heads} heads"), format!("a multiple of the {heads} of k")));
        }
        expect("q", self.q.shape(), [batch, query_heads, length, dim])?;
        expect("v", self.v.shape(), [batch, heads, length, value_dim])?;
        expect("out", out.shape(), [batch, query_heads, length, value_dim])?;
        let gates = [
            ("rate", Some(self.rate)),
            ("keep", self.keep),
            ("momentum", self.momentum),
            ("threshold", self.threshold),
        ];
        for (name, gate) in gates {
            if let Some(gate) = gate {
                expect(name, gate.shape(), [batch, heads, length, 1])?;
                if gate.dtype() != DType::F32 {
                    return Err(Error::dtype(name, gate.dtype(), "float32"));
                }
            }
        }
        let widths = self.widths;
        if widths.len() < 2 || widths.contains(&0) || widths[0] != dim || widths[widths.len() - 1] != value_dim {
            return Err(Error::value("widths", format!("{widths:?}"), format!("{dim}, ..., {value_dim}")));
        }
        if let Some(Residual { gain, shift, .. }) = self.residual
            && (dim != value_dim || gain.len() != heads * value_dim || shift.len() != heads * value_dim)
        {
            return Err(Error::value(
                "residual",
                format!("{} factors", gain.len()),
                "values as wide as keys, and factors",
            ));
        }
        if self.chunk == 0 || self.position >= self.chunk {
            let got = format!("{} at {}", self.chunk, self.position);
            return Err(Error::value("chunk_size", got, "at least 1, and a position inside"));
        }
        let huber = matches!(self.loss, Loss::HuberSigns | Loss::HuberLength | Loss::HuberEach);
        if huber != self.threshold.is_some() {
            return Err(Error::value("threshold", "one without the other", "a threshold and a Huber loss"));
        }
        let numbers = batch * heads * self.weights();
        let step = if self.momentum.is_some() { numbers } else { 0 };
        for (name, got, expected) in [
            ("live", memory.live.len(), numbers),
            ("step", memory.step.len(), step),
            ("frozen", memory.frozen.len(), numbers),
        ] {
            if got != expected {
                return Err(Error::value(name, format!("{got} numbers"), expected));
            }
        }
        Ok(())
    }
}

/// Reads the queries of every head while its memory learns its keys and values; `memory` becomes what is there after the last row.
///
/// A row that is not finite spoils rows after it and none before.
pub fn fast_weight(of: FastWeight, out: &mut TensorViewMut, memory: Memory, execution: &Execution) -> Result<()> {
    of.check(out, &memory)?;
    let isa = simd::current();
    let [batch, heads, length, _] = of.k.shape();
    let numbers = of.weights();
    if batch == 0 || length == 0 {
        return Ok(());
    }
    let out = &*out;
    let mut steps = memory.step.chunks_mut(numbers);
    let parts: Vec<_> = memory.live.chunks_mut(numbers).zip(memory.frozen.chunks_mut(numbers)).collect();
    let parts: Vec<_> =
        parts.into_iter().map(|(live, frozen)| Mutex::new((live, steps.next().unwrap_or_default(), frozen))).collect();
    for_each(execution, batch * heads, |i| {
        let mut part = parts[i].lock().unwrap_or_else(|e| e.into_inner());
        let (live, step, frozen) = &mut *part;
        let memory = Memory { live, step, frozen };
        dispatch(
            isa,
            item::Item { of: &of, batch: i / heads, head: i % heads, out, memory, cancel: &execution.cancel },
        );
    })
}

#[cfg(test)]
mod tests;
