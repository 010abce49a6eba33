//! Gradients on every instruction set of this CPU against the f64 path, and that path against differences of its own outputs.

use super::*;
use crate::dense::{Broadcast, double};

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut random = crate::index::Random::new(seed);
    (0..n).map(|_| random.normal() as f32).collect()
}

/// Batch, KV heads, group, queries, keys, dim, value_dim.
type Shape = [usize; 7];

struct Case {
    shape: Shape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    d_out: Vec<f32>,
    d_lse: Vec<f32>,
    sinks: Vec<f32>,
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

impl Case {
    fn new(shape: Shape, seed: u64) -> Self {
        let [b, h, g, n, m, d, e] = shape;
        Self {
            shape,
            q: numbers(b * h * g * n * d, seed),
            k: numbers(b * h * m * d, seed + 1),
            v: numbers(b * h * m * e, seed + 2),
            d_out: numbers(b * h * g * n * e, seed + 3),
            d_lse: numbers(b * h * g * n, seed + 4),
            sinks: numbers(h * g, seed + 5),
        }
    }

    /// `[queries, keys, values, outputs, sums]`
    fn shapes(&self) -> [[usize; 4]; 5] {
        let [b, h, g, n, m, d, e] = self.shape;
        [[b, h * g, n, d], [b, h, m, d], [b, h, m, e], [b, h * g, n, e], [b, h * g, n, 1]]
    }

    /// Output, lse and gradients in f64.
    fn expected(&self, options: double::Options, sinks: bool) -> (Vec<f64>, Vec<f64>, double::Gradients) {
        let [qs, ks, vs, os, _] = self.shapes();
        let [q, k, v, d_out, d_lse, sink] =
            [&self.q, &self.k, &self.v, &self.d_out, &self.d_lse, &self.sinks].map(|x| wide(x));
        let options = double::Options { sinks: sinks.then_some(&sink), ..options };
        let view = |x, shape| Broadcast::new(x, shape).unwrap();
        let problem = double::Problem::new(view(&q, qs), view(&k, ks), view(&v, vs), options).unwrap();
        let execution = Execution::default();
        let (out, lse) = double::attention(&problem, None, &execution).unwrap();
        let gradients =
            double::attention_backward(&problem, view(&out, os), &lse, view(&d_out, os), Some(&d_lse), &execution);
        (out, lse, gradients.unwrap())
    }

    /// Runs in f32 on an instruction set, from the f64 forward pass's rounded results.
    fn run(&self, isa: Isa, options: Options, out: &[f64], lse: &[f64]) -> [Vec<f32>; 4] {
        let [qs, ks, vs, os, ls] = self.shapes();
        let [out, lse] = [out, lse].map(|x| x.iter().map(|&x| x as f32).collect::<Vec<f32>>());
        let mut dq = vec![f32::NAN; self.q.len()];
        let (mut dk, mut dv) = (vec![f32::NAN; self.k.len()], vec![f32::NAN; self.v.len()]);
        let forward = Forward {
            q: TensorView::new(&self.q, qs).unwrap(),
            k: TensorView::new(&self.k, ks).unwrap(),
            v: TensorView::new(&self.v, vs).unwrap(),
            options,
            out: TensorView::new(&out, os).unwrap(),
            lse: TensorView::new(&lse, ls).unwrap(),
            d_out: TensorView::new(&self.d_out, os).unwrap(),
            d_lse: Some(TensorView::new(&self.d_lse, ls).unwrap()),
        };
        let gradients = Gradients {
            dq: TensorViewMut::new(&mut dq, qs).unwrap(),
            dk: TensorViewMut::new(&mut dk, ks).unwrap(),
            dv: TensorViewMut::new(&mut dv, vs).unwrap(),
            d_sinks: None,
        };
        let job = Job::new(forward, &gradients).unwrap();
        let d_sinks = run(isa, &[job], self.sinks.len(), &Execution::default()).unwrap();
        [dq, dk, dv, d_sinks.into_iter().map(|x| x as f32).collect()]
    }

    fn check(&self, options: Options, sinks: bool) {
        let same = double::Options {
            scale: options.scale.map(f64::from),
            causal: options.causal,
            window_left: options.window_left,
            window_right: options.window_right,
            softcap: f64::from(options.softcap),
            ..double::Options::default()
        };
        let options = Options { sinks: sinks.then_some(&self.sinks), ..options };
        let (out, lse, expected) = self.expected(same, sinks);
        for isa in Isa::available() {
            let got = self.run(isa, options, &out, &lse);
            for (name, got, expected) in [
                ("dq", &got[0], &expected.dq),
                ("dk", &got[1], &expected.dk),
                ("dv", &got[2], &expected.dv),
                ("d_sinks", &got[3], &expected.d_sinks),
            ] {
                let largest = expected.iter().fold(1f64, |a, x| a.max(x.abs()));
                for (i, (&x, &y)) in got.iter().zip(expected).enumerate() {
                    let close = (f64::from(x) - y).abs() <= 2e-5 * largest;
                    assert!(close, "{} {name}[{i}]: {x} for {y}, {:?} {options:?}", isa.name(), self.shape);
                }
            }
        }
    }
}

#[test]
fn shapes_and_options_on_every_isa() {
    let window = Options { causal: true, window_left: Some(70), ..Options::default() };
    let capped = Options { softcap: 2.0, scale: Some(0.4), ..Options::default() };
    for (i, shape) in [
        [1, 1, 1, 1, 1, 1, 1],
        [2, 2, 3, 5, 37, 16, 20],
        [1, 1, 2, 97, 257, 40, 8],
        [1, 2, 1, 300, 200, 33, 64],
        [1, 1, 4, 30, 600, 8, 130],
    ]
    .into_iter()
    .enumerate()
    {
        let case = Case::new(shape, 100 * i as u64);
        case.check(Options::default(), false);
        case.check(Options { causal: true, ..Options::default() }, true);
        case.check(window, false);
        case.check(capped, true);
    }
}

#[test]
fn the_f64_gradient_is_the_derivative() {
    let mut case = Case::new([1, 1, 2, 3, 5, 4, 3], 7);
    let options = double::Options { causal: true, softcap: 1.5, ..double::Options::default() };
    let (_, _, gradients) = case.expected(options, true);
    let value = |case: &Case| -> f64 {
        let (out, lse, _) = case.expected(options, true);
        let both = out.iter().zip(&case.d_out).chain(lse.iter().zip(&case.d_lse));
        both.map(|(x, &d)| x * f64::from(d)).sum()
    };
    let arrays: [fn(&mut Case) -> &mut Vec<f32>; 4] = [|c| &mut c.q, |c| &mut c.k, |c| &mut c.v, |c| &mut c.sinks];
    for (array, gradient) in arrays.into_iter().zip([gradients.dq, gradients.dk, gradients.dv, gradients.d_sinks]) {
        for (i, gradient) in gradient.into_iter().enumerate() {
            let x = array(&mut case)[i];
            let (up, down) = (x + 1e-3, x - 1e-3);
            array(&mut case)[i] = up;
            let above = value(&case);
            array(&mut case)[i] = down;
            let slope = (above - value(&case)) / (f64::from(up) - f64::from(down));
            array(&mut case)[i] = x;
            assert!((slope - gradient).abs() < 1e-5 * (1.0 + gradient.abs()), "{slope} for {gradient}");
        }
    }
}

#[test]
fn a_cancelled_call_ends() {
    let case = Case::new([1, 1, 1, 300, 1000, 8, 8], 3);
    let (out, lse, _) = case.expected(double::Options::default(), false);
    let [qs, ks, vs, os, ls] = case.shapes();
    let [out, lse] = [out, lse].map(|x| x.into_iter().map(|x| x as f32).collect::<Vec<f32>>());
    let (mut dq, mut dk, mut dv) = (case.q.clone(), case.k.clone(), case.v.clone());
    let mut gradients = Gradients {
        dq: TensorViewMut::new(&mut dq, qs).unwrap(),
        dk: TensorViewMut::new(&mut dk, ks).unwrap(),
        dv: TensorViewMut::new(&mut dv, vs).unwrap(),
        d_sinks: None,
    };
    let forward = Forward {
        q: TensorView::new(&case.q, qs).unwrap(),
        k: TensorView::new(&case.k, ks).unwrap(),
        v: TensorView::new(&case.v, vs).unwrap(),
        options: Options::default(),
        out: TensorView::new(&out, os).unwrap(),
        lse: TensorView::new(&lse, ls).unwrap(),
        d_out: TensorView::new(&case.d_out, os).unwrap(),
        d_lse: None,
    };
    let execution = Execution::default();
    execution.cancel.cancel();
    assert!(matches!(attention_backward(forward, &mut gradients, &execution), Err(Error::Cancelled)));
    assert!(
        attention_backward(Forward { lse: forward.out, ..forward }, &mut gradients, &Execution::default()).is_err()
    );
}
