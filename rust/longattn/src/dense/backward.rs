//! Gradients of attention: no weights are stored, blocks of them are made anew from the saved log-sum-exp.
//!
//! ```text
//! delta = sum_d out d_out - d_lse                            one number per query row
//! for each block of keys (an item), for each tile of query rows of the group that sees it:   (block.rs)
//!     P = exp(S - lse), S as in the forward pass
//!     dS = P (d_out V^T - delta) softcap'(S)
//!     dV += P^T d_out      dK += dS^T scale Q                 sums of the item alone
//!     dQ += scale dS K                                        sum of the tile, shared by all blocks of keys
//! ```
//! Blocks add to a tile's dQ in their order: an item waits for its turn. Items start in that order too, so the one waited for is
//! running, and results do not depend on the number of threads. Memory beyond the gradients is dQ in f32.

mod block;
mod listed;

pub(crate) use listed::{ListedTile, listed_backward, store_sinks};

use super::rows::widen_row;
use super::scratch::{Buffer, Scratch, with_scratch};
use super::tile::KEYS;
use super::{Options, Problem};
use crate::parallel::{Cancel, Execution, for_each, map};
use crate::simd::{self, Isa, Kernel, Simd, dispatch};
use crate::tensor::{DType, Element, Error, Result, TensorView, TensorViewMut, with_element};
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// Query rows per tile, a multiple of every instruction set's `ROWS` and `LANES`.
pub(crate) const ROWS: usize = 96;

/// What a forward call got and gave, and the gradients of what it gave.
#[derive(Clone, Copy)]
pub struct Forward<'a> {
    /// `[batch, query heads, queries, dim]`.
    pub q: TensorView<'a>,
    /// `[batch, kv heads, keys, dim]`.
    pub k: TensorView<'a>,
    /// `[batch, kv heads, keys, value_dim]`.
    pub v: TensorView<'a>,
    /// What changed the scores.
    pub options: Options<'a>,
    /// `[batch, query heads, queries, value_dim]`.
    pub out: TensorView<'a>,
    /// `[batch, query heads, queries, 1]`, f32.
    pub lse: TensorView<'a>,
    /// Gradient of `out`.
    pub d_out: TensorView<'a>,
    /// Gradient of `lse`, f32; none is zero.
    pub d_lse: Option<TensorView<'a>>,
}

/// Where the gradients of `q`, `k`, `v` and the sink logits go.
pub struct Gradients<'a> {
    /// As `q`.
    pub dq: TensorViewMut<'a>,
    /// As `k`.
    pub dk: TensorViewMut<'a>,
    /// As `v`.
    pub dv: TensorViewMut<'a>,
    /// One per query head, when there are sinks.
    pub d_sinks: Option<&'a mut [f32]>,
}

/// One checked problem with its saved results and the places of its gradients.
struct Job<'a> {
    problem: Problem<'a>,
    forward: Forward<'a>,
    dq: TensorViewMut<'a>,
    dk: TensorViewMut<'a>,
    dv: TensorViewMut<'a>,
}

impl<'a> Job<'a> {
    fn new(forward: Forward<'a>, gradients: &'a Gradients) -> Result<Self> {
        let Forward { q, k, v, options, out, lse, d_out, d_lse } = forward;
        let problem = Problem::new(q, k.into(), v.into(), options)?;
        if problem.value_dim == 0 {
            return Err(Error::value("v", format!("shape {:?}", v.shape()), "a head_dim of at least 1"));
        }
        if options.state.is_some() || options.skip_threshold > 0.0 || options.qk_int8 {
            let got = "a state, a skip_threshold or qk_int8";
            return Err(Error::value("options", got, "none of these: they have no gradient"));
        }
        let rows = [problem.batch, problem.query_heads, problem.queries];
        let outputs = [rows[0], rows[1], rows[2], problem.value_dim];
        let sums = [rows[0], rows[1], rows[2], 1];
        let expect = |name, got: [usize; 4], expected: [usize; 4]| {
            if got == expected {
                Ok(())
            } else {
                Err(Error::value(name, format!("shape {got:?}"), format!("{expected:?}")))
            }
        };
        expect("out", out.shape(), outputs)?;
        expect("d_out", d_out.shape(), outputs)?;
        for (name, x) in [("lse", Some(lse)), ("d_lse", d_lse)] {
            if let Some(x) = x {
                expect(name, x.shape(), sums)?;
                if x.dtype() != DType::F32 {
                    return Err(Error::dtype(name, x.dtype(), "float32"));
                }
            }
        }
        expect("dq", gradients.dq.shape(), q.shape())?;
        expect("dk", gradients.dk.shape(), k.shape())?;
        expect("dv", gradients.dv.shape(), v.shape())?;
        if gradients.d_sinks.as_ref().is_some_and(|d| options.sinks.is_none() || d.len() != problem.query_heads) {
            let got = gradients.d_sinks.as_ref().map_or(0, |d| d.len());
            return Err(Error::value("d_sinks", format!("{got} numbers"), "one per sink"));
        }
        let whole = |x: &'a TensorViewMut| x.rows(0..x.shape()[2]);
        let (dq, dk, dv) = (whole(&gradients.dq), whole(&gradients.dk), whole(&gradients.dv));
        Ok(Self { problem, forward, dq, dk, dv })
    }

    fn tiles_per_head(&self) -> usize {
        self.problem.queries.div_ceil(ROWS)
    }
}

/// Consecutive query rows of one head.
struct Tile {
    batch: usize,
    head: usize,
    rows: Range<usize>,
    /// Blocks of keys that some row sees.
    blocks: Range<usize>,
    delta: Vec<f32>,
    /// The rows' share of the gradient of the head's sink logit.
    d_sink: f64,
    sum: Mutex<Sum>,
    turn: Condvar,
}

/// A tile's dQ, `[rows, padded dim]`, without the scale.
struct Sum {
    /// The block of keys that adds next.
    next: usize,
    dq: Buffer,
}

impl Tile {
    /// The sum, once it is the block's turn to add to it; nothing when the call was cancelled.
    fn turn_of(&self, block: usize, cancel: &Cancel) -> Option<MutexGuard<'_, Sum>> {
        let mut sum = self.sum.lock().unwrap_or_else(|e| e.into_inner());
        while sum.next != block {
            // A cancelled call leaves items out, for whose turn nobody would ever stop waiting.
            if cancel.is_cancelled() {
                return None;
            }
            let waited = self.turn.wait_timeout(sum, Duration::from_millis(50));
            sum = waited.unwrap_or_else(|e| e.into_inner()).0;
        }
        Some(sum)
    }

    /// Hands the sum on to the next block.
    fn pass_on(&self, mut sum: MutexGuard<'_, Sum>) {
        sum.next += 1;
        drop(sum);
        self.turn.notify_all();
    }
}

/// Makes a tile: what its rows need besides queries, and zeros for rows that no key is near.
struct Prepare<'a, 's> {
    job: &'a Job<'a>,
    batch: usize,
    head: usize,
    rows: Range<usize>,
    scratch: &'s mut Scratch,
}

impl Kernel for Prepare<'_, '_> {
    type Output = Tile;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Tile {
        let Self { job, batch, head, rows, scratch } = self;
        let Job { problem, forward, dq, .. } = job;
        let width = problem.value_dim.next_multiple_of(S::LANES);
        let (out, d_out) = (scratch.outputs.take(width), scratch.values.take(width));
        let sink = problem.options.sinks.map(|sinks| sinks[head]);
        let (mut delta, mut d_sink) = (Vec::with_capacity(rows.len()), 0f64);
        for row in rows.clone() {
            delta.push(delta_of(s, forward, [batch, head, row], &mut out[..width], &mut d_out[..width]));
            let lse = forward.lse.row::<f32>(batch, head, row)[0];
            if let Some(sink) = sink.filter(|_| lse != f32::NEG_INFINITY) {
                d_sink -= f64::from((sink - lse).exp()) * f64::from(delta[delta.len() - 1]);
            }
        }
        let keys = problem.visible(rows.start).start..problem.visible(rows.end - 1).end;
        let blocks = if keys.is_empty() { 0..0 } else { keys.start / KEYS..keys.end.div_ceil(KEYS) };
        if blocks.is_empty() {
            for row in rows.clone() {
                store_row(dq, [batch, head, row], std::iter::repeat_n(0.0, problem.dim));
            }
        }
        let sum = Mutex::new(Sum { next: blocks.start, dq: Buffer::default() });
        Tile { batch, head, rows, blocks, delta, d_sink, sum, turn: Condvar::new() }
    }
}

/// `sum_d out d_out - d_lse` of a row; the buffers are as wide as a padded row of values.
#[inline(always)]
fn delta_of<S: Simd>(s: S, forward: &Forward, row: [usize; 3], out: &mut [f32], d_out: &mut [f32]) -> f32 {
    assert!(out.len() == d_out.len() && out.len().is_multiple_of(S::LANES));
    load_row(s, &forward.out, row, out);
    load_row(s, &forward.d_out, row, d_out);
    let mut sum = s.zero();
    for d in (0..out.len()).step_by(S::LANES) {
        // SAFETY: both buffers have one length, a multiple of LANES.
        sum = unsafe { s.fma(s.load(out.as_ptr().add(d)), s.load(d_out.as_ptr().add(d)), sum) };
    }
    let [batch, head, row] = row;
    // A row without keys or sink gives constants: no gradient, whatever comes for it.
    if forward.lse.row::<f32>(batch, head, row)[0] == f32::NEG_INFINITY {
        return 0.0;
    }
    s.sum(sum) - forward.d_lse.map_or(0.0, |x| x.row::<f32>(batch, head, row)[0])
}

/// Widens row `[batch, head, row]`; `to` is padded with zeros up to its length, a multiple of `LANES`.
#[inline(always)]
pub(crate) fn load_row<S: Simd>(s: S, from: &TensorView, [batch, head, row]: [usize; 3], to: &mut [f32]) {
    with_element!(from.dtype(), T => {
        let row = from.row::<T>(batch, head, row);
        assert!(row.len() <= to.len());
        // SAFETY: the row has its length, `to` its own, which is the padded one.
        unsafe { widen_row(s, row.as_ptr(), row.len(), to.as_mut_ptr(), to.len()) };
    });
}

/// Writes row `[batch, head, row]`, rounded to its dtype. Only the item that owns the row calls this.
fn store_row(to: &TensorViewMut, [batch, head, row]: [usize; 3], values: impl ExactSizeIterator<Item = f32>) {
    assert!(values.len() == to.shape()[3]);
    with_element!(to.dtype(), T => {
        let to = to.row_ptr::<T>(batch, head, row);
        for (d, x) in values.enumerate() {
            // SAFETY: the row has as many elements as there are values, and no other worker holds it.
            unsafe { to.add(d).write(T::from_f32(x)) };
        }
    });
}

/// Cancels a call whose item panics, so that no other item waits for it forever.
struct CancelOnPanic<'a>(&'a Cancel);

impl Drop for CancelOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.cancel();
        }
    }
}

/// Runs several problems as one pool of work and returns the gradient of the sink logits, summed over all.
fn run(isa: Isa, jobs: &[Job], heads: usize, execution: &Execution) -> Result<Vec<f64>> {
    let mut plan = Vec::new();
    let mut first_tile = Vec::new();
    for (j, job) in jobs.iter().enumerate() {
        first_tile.push(plan.len());
        for pair in 0..job.problem.batch * job.problem.query_heads {
            plan.extend((0..job.tiles_per_head()).map(|tile| (j, pair, tile)));
        }
    }
    let tiles = map(execution, plan.len(), |i| {
        let (j, pair, tile) = plan[i];
        let job = &jobs[j];
        let (batch, head) = (pair / job.problem.query_heads, pair % job.problem.query_heads);
        let rows = tile * ROWS..((tile + 1) * ROWS).min(job.problem.queries);
        with_scratch(|scratch| dispatch(isa, Prepare { job, batch, head, rows, scratch }))
    })?;
    // (job, pair of batch and KV head, block): all pairs take their turns before the next block, so waits are rare; under
    // causality the first blocks have the most rows.
    let mut items: Vec<(usize, usize, usize)> = Vec::new();
    for (j, job) in jobs.iter().enumerate() {
        for pair in 0..job.problem.batch * job.problem.kv_heads {
            items.extend((0..job.problem.keys.div_ceil(KEYS)).map(|block| (j, pair, block)));
        }
    }
    items.sort_by_key(|&(_, _, block)| block);
    for_each(execution, items.len(), |i| {
        let (j, pair, block) = items[i];
        let job = &jobs[j];
        let count = job.problem.group * job.tiles_per_head();
        let first = first_tile[j] + pair * count;
        let (batch, kv_head) = (pair / job.problem.kv_heads, pair % job.problem.kv_heads);
        let tiles = &tiles[first..first + count];
        let cancel = &execution.cancel;
        let _guard = CancelOnPanic(cancel);
        with_scratch(|scratch| dispatch(isa, block::Block { job, batch, kv_head, block, tiles, cancel, scratch }));
    })?;
    let mut d_sinks = vec![0f64; heads];
    for tile in &tiles {
        d_sinks[tile.head] += tile.d_sink;
    }
    Ok(d_sinks)
}

/// Gradients of [`attention`](super::attention).
///
/// `delta = sum_d out d_out - d_lse`, `dS = P (d_out v^T - delta)`; `dq`, `dk` and `dv` follow, those of keys and values summed over
/// the query group. Bias, mask, slopes and scale are constants. A row that sees no key has no part in any gradient.
pub fn attention_backward(forward: Forward, gradients: &mut Gradients, execution: &Execution) -> Result<()> {
    let heads = forward.q.shape()[1];
    let d_sinks = run(simd::current(), &[Job::new(forward, gradients)?], heads, execution)?;
    store_sinks(gradients, &d_sinks);
    Ok(())
}

/// Gradients of [`attention_varlen`](super::attention_varlen), whose arguments `query_ends` and `key_ends` are.
pub fn attention_varlen_backward(
    forward: Forward,
    query_ends: &[usize],
    key_ends: &[usize],
    gradients: &mut Gradients,
    execution: &Execution,
) -> Result<()> {
    super::check_packed(forward.q.shape()[2], forward.k.shape()[2], query_ends, key_ends, &forward.options)?;
    Job::new(forward, gradients)?;
    let heads = forward.q.shape()[1];
    let mut jobs = Vec::new();
    for s in 1..query_ends.len() {
        let (rows, keys) = (query_ends[s - 1]..query_ends[s], key_ends[s - 1]..key_ends[s]);
        let (q, k, v) = (forward.q.rows(rows.clone()), forward.k.rows(keys.clone()), forward.v.rows(keys.clone()));
        jobs.push(Job {
            problem: Problem::new(q, k.into(), v.into(), forward.options)?,
            forward: Forward {
                q,
                k,
                v,
                options: forward.options,
                out: forward.out.rows(rows.clone()),
                lse: forward.lse.rows(rows.clone()),
                d_out: forward.d_out.rows(rows.clone()),
                d_lse: forward.d_lse.map(|x| x.rows(rows.clone())),
            },
            dq: gradients.dq.rows(rows.clone()),
            dk: gradients.dk.rows(keys.clone()),
            dv: gradients.dv.rows(keys),
        });
    }
    let d_sinks = run(simd::current(), &jobs, heads, execution)?;
    drop(jobs);
    store_sinks(gradients, &d_sinks);
    Ok(())
}

#[cfg(test)]
mod tests;
