//! The engine against rows one after another in f64.

use super::*;

/// Numbers from -1 to 1, the same in every run.
fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Plain,
    Token,
    Channel,
}

/// One head: inputs of `length` rows of `dim` and `value_dim` numbers.
struct Rows {
    length: usize,
    dim: usize,
    value_dim: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    g: Vec<f32>,
    beta: Vec<f32>,
}

impl Rows {
    fn new(length: usize, dim: usize, value_dim: usize, kind: Kind) -> Self {
        let mut k = numbers(length * dim, 2);
        for row in k.chunks_mut(dim) {
            let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
            row.iter_mut().for_each(|x| *x /= norm);
        }
        let width = if kind == Kind::Channel { dim } else { 1 };
        let (q, v) = (numbers(length * dim, 1), numbers(length * value_dim, 3));
        let g = numbers(length * width, 4).into_iter().map(|x| -x.abs()).collect();
        let beta = numbers(length, 5).into_iter().map(f32::abs).collect();
        Self { length, dim, value_dim, q, k, v, g, beta }
    }

    /// Outputs and final state from the formula.
    fn expected(&self, kind: Kind, delta: bool) -> (Vec<f64>, Vec<f64>) {
        let (d, e) = (self.dim, self.value_dim);
        let (mut state, mut out) = (vec![0f64; d * e], vec![]);
        for t in 0..self.length {
            for (i, row) in state.chunks_mut(e).enumerate() {
                let log = match kind {
                    Kind::Plain => 0.0,
                    Kind::Token => self.g[t],
                    Kind::Channel => self.g[t * d + i],
                };
                row.iter_mut().for_each(|x| *x *= f64::from(log).exp());
            }
            let k = &self.k[t * d..][..d];
            for c in 0..e {
                let held: f64 = (0..d).map(|i| f64::from(k[i]) * state[i * e + c]).sum();
                let update = f64::from(self.beta[t]) * (f64::from(self.v[t * e + c]) - if delta { held } else { 0.0 });
                for i in 0..d {
                    state[i * e + c] += f64::from(k[i]) * update;
                }
                out.push((0..d).map(|i| f64::from(self.q[t * d + i]) * state[i * e + c]).sum());
            }
        }
        (out, state)
    }

    /// Outputs and final state, in two calls cut at `split`.
    fn run(&self, isa: Isa, kind: Kind, delta: bool, chunk: usize, split: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        let (n, d, e) = (self.length, self.dim, self.value_dim);
        let (mut out, mut state) = (vec![0f32; n * e], vec![f32::NAN; d * e]);
        let width = self.g.len() / n;
        let (first, second) = out.split_at_mut(split * e);
        for (rows, out, start) in [(0..split, first, Start::Zero), (split..n, second, Start::InPlace)] {
            let view = |x, width| TensorView::new(x, [1, 1, n, width]).map(|x| x.rows(rows.clone()));
            let g = view(&self.g, width)?;
            let of = Recurrence {
                q: view(&self.q, d)?,
                k: Some(view(&self.k, d)?),
                v: view(&self.v, e)?,
                decay: match kind {
                    Kind::Plain => Decay::None,
                    Kind::Token => Decay::Token(g),
                    Kind::Channel => Decay::Channel(g),
                },
                beta: Some(view(&self.beta, 1)?),
                delta,
                scale: 1.0,
                unit: None,
                normaliser: None,
                skip: None,
                bonus: None,
                pair: None,
                squares: false,
                maps: [None; 2],
                start,
                ends: None,
                chunk,
            };
            let mut to = TensorViewMut::new(out, [1, 1, rows.len(), e])?;
            run(isa, of, &mut to, &mut TensorViewMut::new(&mut state, [1, 1, d, e])?, &Execution::default())?;
        }
        Ok((out, state))
    }
}

#[test]
fn chunks_and_steps_are_the_recurrence() {
    for isa in Isa::available() {
        for (kind, delta) in [Kind::Plain, Kind::Token, Kind::Channel].into_iter().flat_map(|k| [(k, false), (k, true)])
        {
            for (length, chunk, split) in [(1, 48, 1), (40, 48, 39), (100, 48, 0), (100, 13, 50), (260, 252, 7)] {
                for (dim, value_dim) in [(16, 16), (5, 37)] {
                    let rows = Rows::new(length, dim, value_dim, kind);
                    let (out, state) = rows.run(isa, kind, delta, chunk, split).unwrap();
                    let (expected, last) = rows.expected(kind, delta);
                    for (x, y) in out.iter().zip(&expected).chain(state.iter().zip(&last)) {
                        let error = (f64::from(*x) - y).abs();
                        assert!(error < 2e-5, "{} {kind:?} {delta} {length} {chunk} {dim}: {x} {y}", isa.name());
                    }
                }
            }
        }
    }
}

/// What matrix registers compute from bf16 and f16, or the emulation of them, is what vectors compute but for the rounding of numbers
/// to two parts: every rule of update, heads that share keys, columns and rows beyond whole blocks.
#[test]
fn registers_compute_what_vectors_do() {
    if !Isa::Amx.is_available() {
        return;
    }
    let kinds = [Kind::Plain, Kind::Token, Kind::Channel];
    let cases = kinds
        .into_iter()
        .flat_map(|kind| ["plain", "delta", "normaliser", "skip", "bonus", "pair"].map(|of| (kind, of)));
    for (kind, of_what) in cases.filter(|&(kind, of)| kind == Kind::Channel || !["bonus", "pair"].contains(&of)) {
        for (length, chunk, dim, value_dim) in [(100, 48, 64, 40), (150, 64, 33, 70), (40, 32, 128, 32)] {
            let rows = Rows::new(length, dim, value_dim, kind);
            let (k, v) = (halved::<half::bf16>(&rows.k), halved::<half::f16>(&rows.v));
            // Two query heads to each of two heads of values, which share keys.
            let q: Vec<_> = (0..4).flat_map(|head| halved::<half::bf16>(&numbers(length * dim, 10 + head))).collect();
            let v: Vec<_> = v.iter().chain(v.iter().rev()).copied().collect();
            let twice = |x: &[f32]| [x, x].concat();
            let (g, beta) = (twice(&rows.g), twice(&rows.beta));
            let (a, b) =
                (halved::<half::bf16>(&numbers(length * dim, 20)), halved::<half::bf16>(&numbers(length * dim, 21)));
            let a: Vec<_> = a.iter().map(|x| half::bf16::from_f32(0.05 * x.to_f32())).collect();
            let bonus = numbers(2 * dim, 22);
            let width = g.len() / (2 * length);
            let columns = value_dim + usize::from(of_what == "normaliser");
            let compute = |isa: Isa| {
                let (mut out, mut state) = (vec![0f32; 4 * length * value_dim], vec![0f32; 2 * dim * columns]);
                let decays = TensorView::new(&g, [1, 2, length, width]).unwrap();
                let of = Recurrence {
                    q: TensorView::new(&q, [1, 4, length, dim]).unwrap(),
                    k: Some(TensorView::new(&k, [1, 1, length, dim]).unwrap()),
                    v: TensorView::new(&v, [1, 2, length, value_dim]).unwrap(),
                    decay: match kind {
                        Kind::Plain => Decay::None,
                        Kind::Token => Decay::Token(decays),
                        Kind::Channel => Decay::Channel(decays),
                    },
                    beta: Some(TensorView::new(&beta, [1, 2, length, 1]).unwrap()).filter(|_| of_what == "delta"),
                    delta: of_what == "delta",
                    scale: 0.125,
                    unit: None,
                    normaliser: (of_what == "normaliser").then_some(2.0 * length as f32),
                    skip: (of_what == "skip").then_some(&[0.5, -0.25]),
                    bonus: (of_what == "bonus").then_some(&bonus),
                    pair: (of_what == "pair")
                        .then(|| [&a, &b].map(|x| TensorView::new(x, [1, 1, length, dim]).unwrap())),
                    squares: false,
                    maps: [None; 2],
                    start: Start::Zero,
                    ends: None,
                    chunk,
                };
                let mut to = TensorViewMut::new(&mut out, [1, 4, length, value_dim]).unwrap();
                let mut last = TensorViewMut::new(&mut state, [1, 2, dim, columns]).unwrap();
                run(isa, of, &mut to, &mut last, &Execution::default()).unwrap();
                [out, state].concat()
            };
            let (found, expected) = (compute(Isa::Amx), compute(Isa::Scalar));
            let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
            for (x, y) in found.iter().zip(&expected) {
                assert!((x - y).abs() < 1e-4 * largest, "{kind:?} {of_what} {length} {chunk} {dim}: {x} {y}");
            }
        }
    }
}

fn halved<T: crate::tensor::Element>(x: &[f32]) -> Vec<T> {
    x.iter().map(|&x| T::from_f32(x)).collect()
}

#[test]
fn gates_outside_their_range_are_refused() {
    let mut rows = Rows::new(20, 8, 8, Kind::Channel);
    for wrong in [1e-3, f32::NAN, f32::INFINITY] {
        rows.g[77] = wrong;
        assert!(rows.run(simd::current(), Kind::Channel, false, 48, 0).is_err(), "{wrong}");
    }
    rows.g[77] = f32::NEG_INFINITY;
    assert!(rows.run(simd::current(), Kind::Channel, false, 48, 0).is_ok());
    rows.beta[3] = f32::INFINITY;
    assert!(rows.run(simd::current(), Kind::Channel, true, 48, 0).is_err());
    rows.beta[3] = 0.5;
    for chunk in [0, MAX_CHUNK + 1] {
        assert!(rows.run(simd::current(), Kind::Channel, true, chunk, 0).is_err());
    }
}

/// A million steps in place, over the rows of a block again and again, against the same in f64: errors stay below 1e-3 of what states
/// hold. Where states decay, those of old steps do, too; the delta rule alone lengthens nothing, so that errors add up at most.
#[test]
fn a_million_steps_stay_near() {
    const STEPS: usize = 1_000_000;
    for (kind, delta) in [(Kind::Token, false), (Kind::Channel, false), (Kind::Plain, true), (Kind::Channel, true)] {
        let (length, d, e) = (997, 4, 4);
        let rows = Rows::new(length, d, e, kind);
        let (mut out, mut state, mut expected) = (vec![0f32; e], vec![0f32; d * e], vec![0f64; d * e]);
        for step in 0..STEPS {
            let t = step % length;
            let view = |x, width| TensorView::new(x, [1, 1, length, width]).unwrap().rows(t..t + 1);
            let g = view(&rows.g, rows.g.len() / length);
            let of = Recurrence {
                q: view(&rows.q, d),
                k: Some(view(&rows.k, d)),
                v: view(&rows.v, e),
                decay: match kind {
                    Kind::Plain => Decay::None,
                    Kind::Token => Decay::Token(g),
                    Kind::Channel => Decay::Channel(g),
                },
                beta: Some(view(&rows.beta, 1)),
                delta,
                scale: 1.0,
                unit: None,
                normaliser: None,
                skip: None,
                bonus: None,
                pair: None,
                squares: false,
                maps: [None; 2],
                start: Start::InPlace,
                ends: None,
                chunk: 48,
            };
            let mut to = TensorViewMut::new(&mut out, [1, 1, 1, e]).unwrap();
            let mut last = TensorViewMut::new(&mut state, [1, 1, d, e]).unwrap();
            recurrence(of, &mut to, &mut last, &Execution::default()).unwrap();
            for (i, row) in expected.chunks_mut(e).enumerate() {
                let log = match kind {
                    Kind::Plain => 0.0,
                    Kind::Token => rows.g[t],
                    Kind::Channel => rows.g[t * d + i],
                };
                row.iter_mut().for_each(|x| *x *= f64::from(log).exp());
            }
            let k = &rows.k[t * d..][..d];
            for c in 0..e {
                let held: f64 = (0..d).map(|i| f64::from(k[i]) * expected[i * e + c]).sum();
                let value = f64::from(rows.v[t * e + c]) - if delta { held } else { 0.0 };
                for i in 0..d {
                    expected[i * e + c] += f64::from(rows.beta[t]) * f64::from(k[i]) * value;
                }
            }
        }
        let largest = expected.iter().fold(0f64, |most, x| most.max(x.abs()));
        for (x, y) in state.iter().zip(&expected) {
            assert!((f64::from(*x) - y).abs() < 1e-3 * largest, "{kind:?} {delta}: {x} {y}");
        }
    }
}
