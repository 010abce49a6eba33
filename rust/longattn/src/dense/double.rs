//! Attention in f64, forward and backward: for arrays of that type and for checks of gradients, not for speed.
//!
//! Blocked softmax as elsewhere, in plain loops that the compiler vectorises for the instruction set in use. Backward makes two
//! passes: one over blocks of rows for dQ, one over blocks of keys for dK and dV.

use super::{Broadcast, visible_keys};
use crate::parallel::{Execution, map};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Error, Result};
use std::ops::Range;

/// Keys per block.
const KEYS: usize = 64;

/// Query rows per block.
const ROWS: usize = 32;

/// What changes the scores, in f64. `skip_threshold` leaves out nothing here, and a state is an argument of [`attention`].
pub type Options<'a> = super::Options<'a, f64>;

/// Checked queries, keys, values and options.
#[derive(Clone, Copy)]
pub struct Problem<'a> {
    q: Broadcast<'a, f64>,
    k: Broadcast<'a, f64>,
    v: Broadcast<'a, f64>,
    options: Options<'a>,
    scale: f64,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    queries: usize,
    keys: usize,
    dim: usize,
    value_dim: usize,
}

/// Gradients of one call, contiguous, in the shapes of the inputs.
pub struct Gradients {
    /// As the queries.
    pub dq: Vec<f64>,
    /// As the keys.
    pub dk: Vec<f64>,
    /// As the values.
    pub dv: Vec<f64>,
    /// One per query head; zeros without sinks.
    pub d_sinks: Vec<f64>,
}

impl<'a> Problem<'a> {
    /// Checks shapes and options: `q` `[batch, query heads, queries, dim]`, `k` and `v` `[batch, kv heads, keys, dim or value_dim]`.
    pub fn new(
        q: Broadcast<'a, f64>,
        k: Broadcast<'a, f64>,
        v: Broadcast<'a, f64>,
        options: Options<'a>,
    ) -> Result<Self> {
        let ([batch, heads, queries, dim], [_, kv_heads, keys, _]) = (q.shape(), k.shape());
        let value_dim = v.shape()[3];
        if dim == 0
            || value_dim == 0
            || k.shape() != [batch, kv_heads, keys, dim]
            || v.shape() != [batch, kv_heads, keys, value_dim]
        {
            let got = format!("shapes {:?}, {:?}, {:?}", q.shape(), k.shape(), v.shape());
            return Err(Error::value("k", got, "k of the batch and dim of q, v of the batch, heads and length of k"));
        }
        if heads > 0 && (kv_heads == 0 || heads % kv_heads != 0) {
            return Err(Error::value(
                "q",
                format!("{heads} heads"),
                format!("a multiple of the {kv_heads} heads of k"),
            ));
        }
        if options.state.is_some() {
            return Err(Error::value("state", "one among the options", "an argument of its own"));
        }
        options.check([batch, heads, queries, keys], value_dim)?;
        let scale = options.scale.unwrap_or_else(|| (dim as f64).powf(-0.5));
        Ok(Self { q, k, v, options, scale, batch, heads, kv_heads, queries, keys, dim, value_dim })
    }

    fn visible(&self, row: usize) -> Range<usize> {
        let Options { causal, window_left, window_right, .. } = self.options;
        visible_keys(causal, window_left, window_right, self.queries, self.keys, row)
    }

    fn kv_head(&self, head: usize) -> usize {
        head / (self.heads / self.kv_heads)
    }

    /// Factor of a row's dot products.
    fn row_scale(&self, batch: usize, head: usize, row: usize) -> f64 {
        // SAFETY: the row is one of the problem's, whose shape the scales were checked against.
        self.options
            .row_scales
            .map_or(self.scale, |scales| unsafe { scales.row(batch, head, row, 0).0.read_unaligned() })
    }

    /// Index of a query row among those of all heads.
    fn index(&self, batch: usize, head: usize, row: usize) -> usize {
        (batch * self.heads + head) * self.queries + row
    }

    /// Runs `work` on every block of query rows `(batch, head, rows)`; results in that order.
    fn map_rows<T: Send>(
        &self,
        execution: &Execution,
        work: impl Fn(usize, usize, Range<usize>) -> T + Sync,
    ) -> Result<Vec<T>> {
        let blocks = self.queries.div_ceil(ROWS);
        map(execution, self.batch * self.heads * blocks, |i| {
            let (pair, first) = (i / blocks, i % blocks * ROWS);
            work(pair / self.heads, pair % self.heads, first..(first + ROWS).min(self.queries))
        })
    }
}

/// Copies rows of one head into `to`, one after another.
#[inline(always)]
fn load_rows(from: &Broadcast<f64>, batch: usize, head: usize, rows: Range<usize>, to: &mut [f64]) {
    let dim = from.shape()[3];
    assert!(
        batch < from.shape()[0]
            && head < from.shape()[1]
            && rows.end <= from.shape()[2]
            && to.len() >= rows.len() * dim
    );
    for (row, to) in rows.zip(to.chunks_exact_mut(dim.max(1))) {
        let (p, stride) = from.row(batch, head, row, 0);
        for (d, to) in to.iter_mut().enumerate() {
            // SAFETY: the indices are inside the shape, whose elements the view's maker vouched for.
            *to = unsafe { p.wrapping_offset(d as isize * stride).read_unaligned() };
        }
    }
}

/// Copies rows of one head into the columns of `to`, which are `KEYS` in number.
#[inline(always)]
fn load_across(from: &Broadcast<f64>, batch: usize, head: usize, rows: Range<usize>, to: &mut [f64]) {
    let mut one = vec![0.0; from.shape()[3]];
    for (c, row) in rows.enumerate() {
        load_rows(from, batch, head, row..row + 1, &mut one);
        for (x, to) in one.iter().zip(to.chunks_exact_mut(KEYS)) {
            to[c] = *x;
        }
    }
}

/// `to[c] = sum_d row[d] across[d][c]`.
#[inline(always)]
fn products(row: &[f64], across: &[f64], to: &mut [f64; KEYS]) {
    to.fill(0.0);
    for (x, columns) in row.iter().zip(across.as_chunks::<KEYS>().0) {
        for (to, c) in to.iter_mut().zip(columns) {
            *to += x * c;
        }
    }
}

#[inline(always)]
fn add_scaled(to: &mut [f64], factor: f64, from: &[f64]) {
    for (to, x) in to.iter_mut().zip(from) {
        *to += factor * x;
    }
}

/// Turns the dot products of one row with a block of keys into logits, minus infinity where a key is hidden; `slope` becomes the
/// derivative of softcap.
#[inline(always)]
fn logits(
    problem: &Problem,
    [batch, head, row]: [usize; 3],
    keys: &Range<usize>,
    scores: &mut [f64; KEYS],
    slope: &mut [f64; KEYS],
) {
    let options = &problem.options;
    let visible = problem.visible(row);
    let position = problem.keys as isize - problem.queries as isize + row as isize;
    let scale = problem.row_scale(batch, head, row);
    let own = options.segments.map(|s| s.queries[batch * problem.queries + row]);
    slope.fill(1.0);
    for (j, score) in scores.iter_mut().enumerate() {
        let key = keys.start + j;
        let of_key = batch * problem.keys + key;
        let seen = key < keys.end
            && visible.contains(&key)
            // SAFETY: the key is inside the mask, whose shape was checked.
            && options.mask.is_none_or(|m| unsafe { *m.row(batch, head, row, key).0 } != 0)
            && options.segments.is_none_or(|s| Some(s.keys[of_key]) == own)
            && options.visible_until.is_none_or(|until| (until[of_key] as isize) > position);
        if !seen {
            *score = f64::NEG_INFINITY;
            continue;
        }
        let mut s = *score * scale;
        if options.softcap > 0.0 {
            let t = (s / options.softcap).tanh();
            slope[j] = 1.0 - t * t;
            s = options.softcap * t;
        }
        if let Some(slopes) = options.alibi_slopes {
            s -= slopes[batch * problem.heads + head] * (position - key as isize).unsigned_abs() as f64;
        }
        if let Some(bias) = options.relative_bias {
            let table = bias.of_head(head, problem.heads);
            let entry = key as isize - position + bias.zero as isize;
            s += table[entry.clamp(0, table.len() as isize - 1) as usize];
        }
        if let Some(bias) = options.bias {
            // SAFETY: the key is inside the bias, whose shape was checked.
            s += unsafe { bias.row(batch, head, row, key).0.read_unaligned() };
        }
        *score = s;
    }
}

/// Blocks of keys that some of the rows may see.
#[inline(always)]
fn key_blocks(problem: &Problem, rows: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let (start, end) = (problem.visible(rows.start).start, problem.visible(rows.end - 1).end);
    (start..end.max(start)).step_by(KEYS).map(move |first| first..(first + KEYS).min(end))
}

/// The result over other keys, which enters the softmax as one more part.
#[derive(Clone, Copy)]
pub struct State<'a> {
    /// Output, `[batch, query heads, queries, value_dim]`.
    pub out: Broadcast<'a, f64>,
    /// Its log-sum-exp, `[batch, query heads, queries, 1]`.
    pub lse: Broadcast<'a, f64>,
}

struct Attend<'a> {
    problem: &'a Problem<'a>,
    state: Option<State<'a>>,
    batch: usize,
    head: usize,
    rows: Range<usize>,
}

impl Kernel for Attend<'_> {
    /// Outputs and lse of the rows.
    type Output = (Vec<f64>, Vec<f64>);

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Self::Output {
        let Self { problem, state, batch, head, rows } = self;
        let (dim, value_dim, kv_head) = (problem.dim, problem.value_dim, problem.kv_head(head));
        let mut q = vec![0.0; rows.len() * dim];
        load_rows(&problem.q, batch, head, rows.clone(), &mut q);
        let (mut k_across, mut v) = (vec![0.0; dim * KEYS], vec![0.0; KEYS * value_dim]);
        let mut out = vec![0.0; rows.len() * value_dim];
        let mut running = [(f64::NEG_INFINITY, 0.0f64); ROWS];
        let (mut scores, mut slope) = ([0.0; KEYS], [0.0; KEYS]);
        for keys in key_blocks(problem, &rows) {
            load_across(&problem.k, batch, kv_head, keys.clone(), &mut k_across);
            load_rows(&problem.v, batch, kv_head, keys.clone(), &mut v);
            for (r, row) in rows.clone().enumerate() {
                products(&q[r * dim..(r + 1) * dim], &k_across, &mut scores);
                logits(problem, [batch, head, row], &keys, &mut scores, &mut slope);
                let (max, sum) = running[r];
                // The maximum passes over NaN, which then shows in the sum.
                let new = scores.iter().copied().fold(max, f64::max);
                if new == f64::NEG_INFINITY && !scores.iter().any(|s| s.is_nan()) {
                    continue;
                }
                let new = if new == f64::NEG_INFINITY { 0.0 } else { new };
                let factor = (max - new).exp();
                let out = &mut out[r * value_dim..(r + 1) * value_dim];
                out.iter_mut().for_each(|x| *x *= factor);
                let mut total = sum * factor;
                for (&score, v) in scores.iter().zip(v.chunks_exact(value_dim)) {
                    let weight = (score - new).exp();
                    // A hidden value may be NaN: weight 0 keeps it out.
                    if weight != 0.0 {
                        total += weight;
                        add_scaled(out, weight, v);
                    }
                }
                running[r] = (new, total);
            }
        }
        let sink = problem.options.sinks.map_or(f64::NEG_INFINITY, |sinks| sinks[head]);
        let mut lses = Vec::with_capacity(rows.len());
        let mut earlier = vec![0.0; value_dim];
        for ((&(max, sum), out), row) in running.iter().zip(out.chunks_exact_mut(value_dim)).zip(rows) {
            let mut before = [f64::NEG_INFINITY];
            if let Some(state) = &state {
                load_rows(&state.lse, batch, head, row..row + 1, &mut before);
            }
            let [before] = before;
            let top = max.max(sink).max(before);
            if top == f64::NEG_INFINITY {
                lses.push(top);
                continue;
            }
            let total = sum * (max - top).exp() + (sink - top).exp() + (before - top).exp();
            let factor = (max - top).exp() / total;
            out.iter_mut().for_each(|x| *x *= factor);
            if let Some(state) = state.filter(|_| before != f64::NEG_INFINITY) {
                load_rows(&state.out, batch, head, row..row + 1, &mut earlier);
                add_scaled(out, (before - top).exp() / total, &earlier);
            }
            lses.push(top + total.ln());
        }
        (out, lses)
    }
}

/// Softmax attention; returns output and lse, contiguous, `[batch, query heads, queries, value_dim]` and without the last axis.
pub fn attention(problem: &Problem, state: Option<State>, execution: &Execution) -> Result<(Vec<f64>, Vec<f64>)> {
    if let Some(state) = &state {
        let rows = [problem.batch, problem.heads, problem.queries];
        let (out, lse) = ([rows[0], rows[1], rows[2], problem.value_dim], [rows[0], rows[1], rows[2], 1]);
        if state.out.shape() != out || state.lse.shape() != lse {
            let got = format!("shapes {:?} and {:?}", state.out.shape(), state.lse.shape());
            return Err(Error::value("state", got, format!("{out:?} and {lse:?}")));
        }
    }
    let isa = simd::current();
    let parts =
        problem.map_rows(execution, |batch, head, rows| dispatch(isa, Attend { problem, state, batch, head, rows }))?;
    let (outs, lses): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    Ok((outs.concat(), lses.concat()))
}

/// What backward needs of every row beside the inputs.
struct Saved<'a> {
    lse: &'a [f64],
    delta: Vec<f64>,
    d_out: Broadcast<'a, f64>,
}

/// Weights of one row over a block of keys, and the gradients of their scaled dot products.
struct RowWeights {
    p: [f64; KEYS],
    ds: [f64; KEYS],
}

#[inline(always)]
fn row_weights(
    problem: &Problem,
    saved: &Saved,
    id: [usize; 3],
    keys: &Range<usize>,
    (q, k_across): (&[f64], &[f64]),
    (d_out, v_across): (&[f64], &[f64]),
) -> RowWeights {
    let index = problem.index(id[0], id[1], id[2]);
    let (lse, delta) = (saved.lse[index], saved.delta[index]);
    let (mut p, mut slope, mut ds) = ([0.0; KEYS], [0.0; KEYS], [0.0; KEYS]);
    products(q, k_across, &mut p);
    logits(problem, id, keys, &mut p, &mut slope);
    products(d_out, v_across, &mut ds);
    for ((p, ds), slope) in p.iter_mut().zip(&mut ds).zip(&slope) {
        let hidden = *p == f64::NEG_INFINITY || lse == f64::NEG_INFINITY;
        *p = if hidden { 0.0 } else { (*p - lse).exp() };
        *ds = if *p == 0.0 { 0.0 } else { *p * (*ds - delta) * slope };
    }
    RowWeights { p, ds }
}

struct QueryGradients<'a> {
    problem: &'a Problem<'a>,
    saved: &'a Saved<'a>,
    batch: usize,
    head: usize,
    rows: Range<usize>,
}

impl Kernel for QueryGradients<'_> {
    type Output = Vec<f64>;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Vec<f64> {
        let Self { problem, saved, batch, head, rows } = self;
        let (dim, value_dim, kv_head) = (problem.dim, problem.value_dim, problem.kv_head(head));
        let (mut q, mut d_out) = (vec![0.0; rows.len() * dim], vec![0.0; rows.len() * value_dim]);
        load_rows(&problem.q, batch, head, rows.clone(), &mut q);
        load_rows(&saved.d_out, batch, head, rows.clone(), &mut d_out);
        let (mut k_across, mut v_across) = (vec![0.0; dim * KEYS], vec![0.0; value_dim * KEYS]);
        let mut k = vec![0.0; KEYS * dim];
        let mut dq = vec![0.0; rows.len() * dim];
        for keys in key_blocks(problem, &rows) {
            load_across(&problem.k, batch, kv_head, keys.clone(), &mut k_across);
            load_across(&problem.v, batch, kv_head, keys.clone(), &mut v_across);
            load_rows(&problem.k, batch, kv_head, keys.clone(), &mut k);
            for (r, row) in rows.clone().enumerate() {
                let (q, d_out) = (&q[r * dim..(r + 1) * dim], &d_out[r * value_dim..(r + 1) * value_dim]);
                let id = [batch, head, row];
                let RowWeights { ds, .. } = row_weights(problem, saved, id, &keys, (q, &k_across), (d_out, &v_across));
                let scale = problem.row_scale(batch, head, row);
                for (ds, k) in ds.iter().zip(k.chunks_exact(dim)).filter(|(ds, _)| **ds != 0.0) {
                    add_scaled(&mut dq[r * dim..(r + 1) * dim], scale * ds, k);
                }
            }
        }
        dq
    }
}

struct KeyGradients<'a> {
    problem: &'a Problem<'a>,
    saved: &'a Saved<'a>,
    batch: usize,
    kv_head: usize,
    keys: Range<usize>,
}

impl Kernel for KeyGradients<'_> {
    /// Gradients of the keys and of the values.
    type Output = (Vec<f64>, Vec<f64>);

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Self::Output {
        let Self { problem, saved, batch, kv_head, keys } = self;
        let (dim, value_dim, group) = (problem.dim, problem.value_dim, problem.heads / problem.kv_heads);
        let (mut k_across, mut v_across) = (vec![0.0; dim * KEYS], vec![0.0; value_dim * KEYS]);
        load_across(&problem.k, batch, kv_head, keys.clone(), &mut k_across);
        load_across(&problem.v, batch, kv_head, keys.clone(), &mut v_across);
        let (mut dk, mut dv) = (vec![0.0; keys.len() * dim], vec![0.0; keys.len() * value_dim]);
        let (mut q, mut d_out) = (vec![0.0; dim], vec![0.0; value_dim]);
        for head in kv_head * group..(kv_head + 1) * group {
            for row in 0..problem.queries {
                let visible = problem.visible(row);
                if visible.start >= keys.end || visible.end <= keys.start {
                    continue;
                }
                load_rows(&problem.q, batch, head, row..row + 1, &mut q);
                load_rows(&saved.d_out, batch, head, row..row + 1, &mut d_out);
                let id = [batch, head, row];
                let RowWeights { p, ds } = row_weights(problem, saved, id, &keys, (&q, &k_across), (&d_out, &v_across));
                let scale = problem.row_scale(batch, head, row);
                for (ds, dk) in ds.iter().zip(dk.chunks_exact_mut(dim)).filter(|(ds, _)| **ds != 0.0) {
                    add_scaled(dk, scale * ds, &q);
                }
                for (p, dv) in p.iter().zip(dv.chunks_exact_mut(value_dim)).filter(|(p, _)| **p != 0.0) {
                    add_scaled(dv, *p, &d_out);
                }
            }
        }
        (dk, dv)
    }
}

/// Gradients of [`attention`] from its results `out` and `lse` (contiguous) and theirs.
pub fn attention_backward(
    problem: &Problem,
    out: Broadcast<f64>,
    lse: &[f64],
    d_out: Broadcast<f64>,
    d_lse: Option<&[f64]>,
    execution: &Execution,
) -> Result<Gradients> {
    let outputs = [problem.batch, problem.heads, problem.queries, problem.value_dim];
    for (name, got) in [("out", out.shape()), ("d_out", d_out.shape())] {
        if got != outputs {
            return Err(Error::value(name, format!("shape {got:?}"), format!("{outputs:?}")));
        }
    }
    let count = problem.batch * problem.heads * problem.queries;
    for (name, got) in [("lse", lse.len()), ("d_lse", d_lse.map_or(count, <[f64]>::len))] {
        if got != count {
            return Err(Error::value(name, format!("{got} numbers"), format!("{count}, one per query row")));
        }
    }
    let deltas = problem.map_rows(execution, |batch, head, rows| {
        let (mut o, mut g) = (vec![0.0; rows.len() * problem.value_dim], vec![0.0; rows.len() * problem.value_dim]);
        load_rows(&out, batch, head, rows.clone(), &mut o);
        load_rows(&d_out, batch, head, rows.clone(), &mut g);
        let rows = rows.zip(o.chunks_exact(problem.value_dim).zip(g.chunks_exact(problem.value_dim)));
        rows.map(|(row, (o, g))| {
            let sum: f64 = o.iter().zip(g).map(|(o, g)| o * g).sum();
            sum - d_lse.map_or(0.0, |d| d[problem.index(batch, head, row)])
        })
        .collect::<Vec<f64>>()
    })?;
    let saved = Saved { lse, delta: deltas.concat(), d_out };
    let mut d_sinks = vec![0.0; problem.heads];
    if let Some(sinks) = problem.options.sinks {
        for (i, (lse, delta)) in lse.iter().zip(&saved.delta).enumerate() {
            let head = i / problem.queries % problem.heads;
            if *lse != f64::NEG_INFINITY {
                d_sinks[head] -= (sinks[head] - lse).exp() * delta;
            }
        }
    }
    let isa = simd::current();
    let saved = &saved;
    let dq = problem
        .map_rows(execution, |batch, head, rows| dispatch(isa, QueryGradients { problem, saved, batch, head, rows }))?;
    let blocks = problem.keys.div_ceil(KEYS);
    let parts = map(execution, problem.batch * problem.kv_heads * blocks, |i| {
        let (pair, first) = (i / blocks, i % blocks * KEYS);
        let (batch, kv_head) = (pair / problem.kv_heads, pair % problem.kv_heads);
        let keys = first..(first + KEYS).min(problem.keys);
        dispatch(isa, KeyGradients { problem, saved, batch, kv_head, keys })
    })?;
    let (dk, dv): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    Ok(Gradients { dq: dq.concat(), dk: dk.concat(), dv: dv.concat(), d_sinks })
}
