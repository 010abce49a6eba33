//! The engine against tokens one after another in f64.

use super::*;

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// A linear memory with momentum, read after each token, in calls cut at `split`.
fn run(length: usize, chunk: usize, split: usize) -> Result<(Vec<f32>, Vec<f32>)> {
    let (dim, value_dim) = (6, 9);
    let (q, k, v) = (numbers(length * dim, 1), numbers(length * dim, 2), numbers(length * value_dim, 3));
    let gate = |seed| -> Vec<f32> { numbers(length, seed).into_iter().map(|x| 0.25 * (x + 1.0)).collect() };
    // Small rates, so that the weights of a long chunk do not grow.
    let (rate, momentum): (Vec<f32>, _) = (gate(4).into_iter().map(|x| 0.1 * x).collect(), gate(5));
    let keep: Vec<f32> = gate(6).into_iter().map(|x| 1.0 - 0.2 * x).collect();
    let mut live = numbers(dim * value_dim, 7);
    let (mut frozen, mut step, mut out) = (live.clone(), vec![0f32; live.len()], vec![0f32; length * value_dim]);
    let (first, second) = out.split_at_mut(split * value_dim);
    for (rows, out) in [(0..split, first), (split..length, second)] {
        let view = |x, width| TensorView::new(x, [1, 1, length, width]).map(|x| x.rows(rows.clone()));
        let of = FastWeight {
            q: view(&q, dim)?,
            k: view(&k, dim)?,
            v: view(&v, value_dim)?,
            rate: view(&rate, 1)?,
            keep: Some(view(&keep, 1)?),
            momentum: Some(view(&momentum, 1)?),
            threshold: None,
            widths: &[dim, value_dim],
            bias: false,
            activation: Activation::Silu,
            residual: None,
            loss: Loss::Square { factor: 0.5 },
            retention: Retention::Plain,
            before: false,
            chunk,
            position: rows.start.checked_rem(chunk).unwrap_or(0),
            unit: None,
            scale: 1.0,
        };
        let mut to = TensorViewMut::new(out, [1, 1, rows.len(), value_dim])?;
        let memory = Memory { live: &mut live, step: &mut step, frozen: &mut frozen };
        fast_weight(of, &mut to, memory, &Execution::default())?;
    }
    // Tokens one by one.
    let (mut w, mut s): (Vec<f64>, Vec<f64>) =
        (numbers(dim * value_dim, 7).into_iter().map(f64::from).collect(), vec![0.0; dim * value_dim]);
    let mut f = w.clone();
    for t in 0..length {
        if t.is_multiple_of(chunk) {
            f.clone_from(&w);
        }
        for c in 0..value_dim {
            let said: f64 = (0..dim).map(|d| f64::from(k[t * dim + d]) * f[d * value_dim + c]).sum();
            let error = said - f64::from(v[t * value_dim + c]);
            for d in 0..dim {
                let i = d * value_dim + c;
                s[i] = f64::from(momentum[t]) * s[i] - f64::from(rate[t]) * f64::from(k[t * dim + d]) * error;
                w[i] = f64::from(keep[t]) * w[i] + s[i];
            }
            let read: f64 = (0..dim).map(|d| f64::from(q[t * dim + d]) * w[d * value_dim + c]).sum();
            let got = f64::from(out[t * value_dim + c]);
            assert!((got - read).abs() < 2e-5, "{length} {chunk} {split}: row {t}: {got} {read}");
        }
    }
    for (got, expected) in live.iter().zip(&w) {
        assert!((f64::from(*got) - expected).abs() < 2e-5, "{length} {chunk} {split}: {got} {expected}");
    }
    Ok((out, live))
}

#[test]
fn tiles_are_tokens_one_by_one() {
    for (length, chunk, split) in [(1, 1, 0), (30, 1, 7), (100, 16, 0), (100, 16, 23), (130, 64, 65), (130, 200, 49)] {
        run(length, chunk, split).unwrap();
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    assert!(run(10, 0, 0).is_err());
}
