//! Gradients of [`super::recurrence`]: what goes in and out, and how the work is cut.

use super::gradient::Item;
use super::{Decay, Inputs, Recurrence, Start, check_gates, check_inputs, expect};
use crate::dense::scratch::with_scratch;
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Isa, dispatch};
use crate::tensor::{DType, Error, Result, TensorView, TensorViewMut};

/// What the gradients of a call of [`super::recurrence`] are made from, besides its arguments.
#[derive(Clone, Copy)]
pub struct Gradients<'a> {
    /// Of the outputs, in their shape.
    pub d_out: TensorView<'a>,
    /// Of the final states, f32; none is zero.
    pub d_state: Option<TensorView<'a>>,
    /// The outputs, for a call with a normaliser.
    pub out: Option<TensorView<'a>>,
}

/// Where gradients go: f32 arrays in the shapes of the arguments, which they replace.
pub struct Outputs<'a> {
    /// Of queries.
    pub q: TensorViewMut<'a>,
    /// Of keys.
    pub k: TensorViewMut<'a>,
    /// Of values.
    pub v: TensorViewMut<'a>,
    /// Of logarithms of decays; there if these are.
    pub g: Option<TensorViewMut<'a>>,
    /// Of factors of updates; there if these are.
    pub beta: Option<TensorViewMut<'a>>,
    /// Of a second pair of keys; there if this is.
    pub pair: Option<[TensorViewMut<'a>; 2]>,
    /// Of the states before the first row, `[sequences, heads, dim, value_dim]` (one column more with a normaliser).
    pub state: TensorViewMut<'a>,
}

/// A checked call.
pub(super) struct Backward<'a> {
    pub(super) inputs: Inputs<'a>,
    pub(super) given: Gradients<'a>,
    pub(super) first: Option<TensorView<'a>>,
    pub(super) to: &'a Outputs<'a>,
}

fn expect_f32(name: &'static str, view: &TensorView, shape: [usize; 4]) -> Result<()> {
    expect(name, view.shape(), shape)?;
    if view.dtype() == DType::F32 { Ok(()) } else { Err(Error::dtype(name, view.dtype(), "float32")) }
}

fn check<'a>(of: Recurrence<'a>, given: Gradients<'a>, to: &'a Outputs<'a>) -> Result<Backward<'a>> {
    let inputs = check_inputs(of)?;
    let Inputs { sequences, heads, query_heads, dim, value_dim, .. } = inputs;
    let Some(k) = of.k else {
        return Err(Error::value("k", "none", "keys, whose gradients are asked for"));
    };
    if of.skip.is_some() {
        return Err(Error::value("skip", "factors", "none: their part of the outputs is a product outside"));
    }
    let by_column = matches!(of.decay, Decay::Value { .. });
    if by_column || of.bonus.is_some() || of.squares || of.maps.iter().any(Option::is_some) {
        let expected = "decays per row or channel of the keys, and nothing between queries, keys and states";
        return Err(Error::value("decay", "a rule whose gradients are not known", expected));
    }
    let [batch, _, length, _] = of.v.shape();
    let outputs = [batch, query_heads.max(heads), length, value_dim];
    let states = [sequences, heads, dim, value_dim + usize::from(of.normaliser.is_some())];
    expect("d_out", given.d_out.shape(), outputs)?;
    match given.out {
        Some(out) => expect("out", out.shape(), outputs)?,
        None if of.normaliser.is_some() => return Err(Error::value("out", "none", "the outputs of the forward call")),
        None => {}
    }
    let first = match of.start {
        Start::Zero => None,
        Start::From(first) => Some(first),
        Start::InPlace => {
            return Err(Error::value("initial_state", "none", "the states that the forward call began with"));
        }
    };
    for (name, state) in [("initial_state", &first), ("d_state", &given.d_state)] {
        if let Some(state) = state {
            expect_f32(name, state, states)?;
        }
    }
    expect_f32("dq", &to.q.as_view(), of.q.shape())?;
    expect_f32("dk", &to.k.as_view(), k.shape())?;
    expect_f32("dv", &to.v.as_view(), of.v.shape())?;
    expect_f32("d_initial_state", &to.state.as_view(), states)?;
    let g = match of.decay {
        Decay::None | Decay::Value { .. } => None,
        Decay::Token(g) | Decay::Channel(g) => Some(g),
    };
    for (name, argument, gradient) in [("dg", &g, &to.g), ("d_beta", &of.beta, &to.beta)] {
        match (argument, gradient) {
            (Some(argument), Some(gradient)) => expect_f32(name, &gradient.as_view(), argument.shape())?,
            (None, None) => {}
            _ => return Err(Error::value(name, "one without the other", "an argument and its gradient, or neither")),
        }
    }
    match (&of.pair, &to.pair) {
        (Some(_), Some(pair)) => {
            for (name, gradient) in ["da", "db"].into_iter().zip(pair) {
                expect_f32(name, &gradient.as_view(), k.shape())?;
            }
        }
        (None, None) => {}
        _ => return Err(Error::value("da", "one without the other", "a pair and its gradients, or neither")),
    }
    Ok(Backward { inputs, given, first, to })
}

/// Gradients of [`super::recurrence`] for the gradients `given` of its results.
///
/// Sequences and heads of keys are computed side by side, each from its last chunk to its first. States at the starts of chunks are
/// made anew and kept, or, where those of one head would take more than 32 MiB, those of as many chunks as the root of their number
/// at a time. The chunk is the unit of rounding here as well. Numbers that are not finite may spoil a whole sequence.
pub fn recurrence_backward(of: Recurrence, given: Gradients, to: &mut Outputs, execution: &Execution) -> Result<()> {
    run(simd::current(), of, given, to, execution)
}

/// [`recurrence_backward`] on an instruction set.
pub(super) fn run(isa: Isa, of: Recurrence, given: Gradients, to: &mut Outputs, execution: &Execution) -> Result<()> {
    let job = check(of, given, to)?;
    check_gates(isa, &of, execution)?;
    let (sequences, key_heads) = (job.inputs.sequences, job.inputs.key_heads);
    let mut order: Vec<usize> = (0..sequences).collect();
    order.sort_by_key(|&n| std::cmp::Reverse(job.inputs.sequence(n).1.len()));
    for_each(execution, sequences * key_heads, |i| {
        let (sequence, key_head) = (order[i / key_heads], i % key_heads);
        let cancel = &execution.cancel;
        with_scratch(|scratch| dispatch(isa, Item { job: &job, sequence, key_head, cancel, scratch }));
    })
}

#[cfg(test)]
mod tests {
    //! Outputs and states are linear in values and first states, and outputs in queries; gradients beside the formula are tested
    //! from Python.

    use super::*;

    fn numbers(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    fn sum_of_products(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
    }

    #[test]
    fn gradients_are_those_of_a_linear_map() {
        let (n, d, e) = (100, 11, 7);
        for isa in Isa::available() {
            for (width, delta) in [(0, false), (1, false), (d, false), (0, true), (1, true), (d, true)] {
                let (q, v, first) = (numbers(n * d, 1), numbers(n * e, 3), numbers(d * e, 6));
                let k: Vec<f32> = numbers(n * d, 2).iter().map(|x| x / (d as f32).sqrt()).collect();
                let g: Vec<f32> = numbers(n * width, 4).iter().map(|x| -x.abs()).collect();
                let beta: Vec<f32> = numbers(n, 5).iter().map(|x| x.abs()).collect();
                let (d_out, d_state) = (numbers(n * e, 7), numbers(d * e, 8));
                let view = |x, length, width| TensorView::new(x, [1, 1, length, width]).unwrap();
                let of = Recurrence {
                    q: view(&q, n, d),
                    k: Some(view(&k, n, d)),
                    v: view(&v, n, e),
                    decay: match width {
                        0 => Decay::None,
                        1 => Decay::Token(view(&g, n, 1)),
                        _ => Decay::Channel(view(&g, n, d)),
                    },
                    beta: Some(view(&beta, n, 1)),
                    delta,
                    scale: 0.5,
                    unit: None,
                    normaliser: None,
                    skip: None,
                    bonus: None,
                    pair: None,
                    squares: false,
                    maps: [None, None],
                    start: Start::From(view(&first, d, e)),
                    ends: None,
                    chunk: 48,
                };
                let (mut out, mut state) = (vec![0f32; n * e], vec![0f32; d * e]);
                let mut result = TensorViewMut::new(&mut out, [1, 1, n, e]).unwrap();
                let mut last = TensorViewMut::new(&mut state, [1, 1, d, e]).unwrap();
                super::super::run(isa, of, &mut result, &mut last, &Execution::default()).unwrap();
                let given = Gradients { d_out: view(&d_out, n, e), d_state: Some(view(&d_state, d, e)), out: None };
                let [mut dq, mut dk, mut dv, mut dg, mut d_beta, mut d_first] =
                    [n * d, n * d, n * e, n * width, n, d * e].map(|size| vec![f32::NAN; size]);
                let mut to = Outputs {
                    q: TensorViewMut::new(&mut dq, [1, 1, n, d]).unwrap(),
                    k: TensorViewMut::new(&mut dk, [1, 1, n, d]).unwrap(),
                    v: TensorViewMut::new(&mut dv, [1, 1, n, e]).unwrap(),
                    g: (width > 0).then(|| TensorViewMut::new(&mut dg, [1, 1, n, width]).unwrap()),
                    beta: Some(TensorViewMut::new(&mut d_beta, [1, 1, n, 1]).unwrap()),
                    pair: None,
                    state: TensorViewMut::new(&mut d_first, [1, 1, d, e]).unwrap(),
                };
                run(isa, of, given, &mut to, &Execution::default()).unwrap();
                let (of_out, of_state) = (sum_of_products(&d_out, &out), sum_of_products(&d_state, &state));
                let name = format!("{} {width} {delta}", isa.name());
                let found = sum_of_products(&dv, &v) + sum_of_products(&d_first, &first);
                assert!((found - of_out - of_state).abs() < 1e-3, "{name}: {found} {of_out} {of_state}");
                let found = sum_of_products(&dq, &q);
                assert!((found - of_out).abs() < 1e-3, "{name}: {found} {of_out}");
                assert!(dk.iter().chain(&dg).chain(&d_beta).all(|x| x.is_finite()), "{name}");
            }
        }
    }
}
