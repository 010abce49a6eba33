//! Attention of a few query rows over rows of keys that a list names, where they lie; what each weighed is told on request.
//!
//! ```text
//! units: one query position of one KV head's group, and its list
//! units x pieces of their lists (fixed sizes)       -> parts, run by the pool
//! parts of a unit merged in order, then the mean of rows that are gone -> output, lse, weights of the listed rows
//! ```
//! The cut depends on the lengths of the lists only, hence the same bits for any number of threads.

use super::rows::{Indexed, with_rows};
use super::run::split_length;
use super::scores::{RowId, Running};
use super::scratch::{Scratch, with_scratch};
use super::stream::{self, MAX_QUERY_ROWS, RowState, Seen, Watch};
use super::{Job, Options, Partial, Problem, check_outputs, fold, load_query, normalise, write_row};
use crate::parallel::{Execution, map};
use crate::simd::{self, Isa, Kernel, Simd, dispatch};
use crate::tensor::{Error, KvView, Result, TensorView, TensorViewMut};
use std::ops::Range;

/// How the weights that a row gets from the query heads of a group become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    /// The largest.
    Max,
    /// The mean.
    Mean,
    /// The sum.
    Sum,
}

/// What a unit tells of the rows it read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Nothing,
    /// The softmax weight of each, over the group.
    Weights(Reduce),
    /// The scaled product (by the softcap, not by a bias) of each with the query of this head of the group.
    Logits(usize),
}

/// The mean of rows that are not there any more: a key with a logit of `ln count` more than its own.
#[derive(Clone, Copy)]
pub(crate) struct MeanRow<'a> {
    pub(crate) key: &'a [f32],
    pub(crate) value: &'a [f32],
    pub(crate) count: f64,
}

/// One query position of one KV head's group.
pub(crate) struct Unit<'a> {
    /// Over the views that the list's rows are of; its causality and window are not looked at, its bias is one per place of the list.
    pub(crate) problem: Problem<'a>,
    pub(crate) batch: usize,
    pub(crate) kv_head: usize,
    /// Row of the queries.
    pub(crate) row: usize,
    /// Rows of the keys, all below their number.
    pub(crate) list: &'a [u32],
    pub(crate) mean: Option<MeanRow<'a>>,
    pub(crate) told: Told,
    /// Where results go, in the heads and rows of `problem`.
    pub(crate) out: &'a TensorViewMut<'a>,
    pub(crate) lse: &'a TensorViewMut<'a>,
}

impl Unit<'_> {
    fn id(&self, g: usize) -> RowId {
        RowId { batch: self.batch, head: self.kv_head * self.problem.group + g, row: self.row }
    }
}

/// Blocks as they went by.
struct Record<'a> {
    told: Told,
    /// First row of the group that goes by, place of the list that the first block starts at.
    first: usize,
    start: usize,
    keys: usize,
    found: &'a mut Found,
}

/// What a part keeps of its blocks.
#[derive(Default)]
struct Found {
    /// Weights, `[group, keys]`, or products, `[keys]`.
    scores: Vec<f32>,
    /// Running maxima that weights are relative to, `[group, blocks]`.
    maxima: Vec<f32>,
}

impl Watch for Record<'_> {
    #[inline(always)]
    fn products(&mut self, start: usize, keys: usize, scores: &[f32]) {
        if let Told::Logits(g) = self.told
            && let Some(r) = g.checked_sub(self.first)
            && (r + 1) * stream::KEYS <= scores.len()
        {
            let at = start - self.start;
            self.found.scores[at..at + keys].copy_from_slice(&scores[r * stream::KEYS..][..keys]);
        }
    }

    #[inline(always)]
    fn weights(&mut self, start: usize, keys: usize, weights: &[f32], running: &[Running]) {
        if !matches!(self.told, Told::Weights(_)) {
            return;
        }
        let (at, blocks) = (start - self.start, self.keys.div_ceil(stream::KEYS));
        for (r, running) in running.iter().enumerate() {
            let g = self.first + r;
            self.found.scores[g * self.keys + at..][..keys].copy_from_slice(&weights[r * stream::KEYS..][..keys]);
            self.found.maxima[g * blocks + at / stream::KEYS] = running.max;
        }
    }
}

/// Part of a unit's list.
struct Part<'a, 's> {
    unit: &'a Unit<'a>,
    keys: Range<usize>,
    scratch: &'s mut Scratch,
}

impl Kernel for Part<'_, '_> {
    type Output = (Partial, Found);

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (Partial, Found) {
        let Self { unit, keys, scratch } = self;
        let (problem, group) = (&unit.problem, unit.problem.group);
        let (dp, vp) = (problem.dim.next_multiple_of(S::LANES), problem.value_dim.next_multiple_of(S::LANES));
        let mut partial = Partial { running: vec![Running::EMPTY; group], outputs: vec![0.0; group * vp] };
        let mut found = Found::default();
        match unit.told {
            Told::Nothing => {}
            Told::Logits(_) => found.scores.resize(keys.len(), 0.0),
            Told::Weights(_) => {
                found.scores.resize(group * keys.len(), 0.0);
                found.maxima.resize(group * keys.len().div_ceil(stream::KEYS), f32::NEG_INFINITY);
            }
        }
        for first in (0..group).step_by(MAX_QUERY_ROWS) {
            let n = MAX_QUERY_ROWS.min(group - first);
            let mut ids = [RowId { batch: 0, head: 0, row: 0 }; MAX_QUERY_ROWS];
            for (r, id) in ids[..n].iter_mut().enumerate() {
                *id = unit.id(first + r);
            }
            let ids = &ids[..n];
            let queries = scratch.queries.take(n * dp);
            for (r, &id) in ids.iter().enumerate() {
                load_query(s, problem, id, &mut queries[r * dp..(r + 1) * dp]);
            }
            let scores = &mut scratch.scores.take(n * stream::KEYS)[..n * stream::KEYS];
            let mut state = RowState {
                queries,
                padded_dim: dp,
                outputs: &mut partial.outputs[first * vp..(first + n) * vp],
                padded_value_dim: vp,
                running: &mut partial.running[first..first + n],
            };
            let mut record = Record { told: unit.told, first, start: keys.start, keys: keys.len(), found: &mut found };
            let (keys, all, index) = (keys.clone(), Seen::Places(0..unit.list.len()), unit.list);
            // SAFETY: the list's rows are rows of the views; the buffers are padded as RowState says.
            unsafe {
                with_rows!(problem, unit.batch, unit.kv_head, |k, v| {
                    let (k, v) = (Indexed { rows: k, index }, Indexed { rows: v, index });
                    stream::attend_watched(s, problem, ids, k, v, keys, all, &mut state, scores, false, &mut record)
                });
            }
        }
        (partial, found)
    }
}

/// Merges the parts of a unit, writes its rows and returns what it is to tell, in the order of its list.
struct Finish<'a> {
    unit: &'a Unit<'a>,
    /// Keys of each part but the last.
    length: usize,
    parts: &'a [(Partial, Found)],
}

impl Kernel for Finish<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let Self { unit, length, parts } = self;
        let problem = &unit.problem;
        let vp = problem.value_dim.next_multiple_of(S::LANES);
        let (mut row, mut query) = (vec![0f32; vp], vec![0f32; problem.dim.next_multiple_of(S::LANES)]);
        let keys = unit.list.len();
        let mut told = vec![0f32; if unit.told == Told::Nothing { 0 } else { keys }];
        for g in 0..problem.group {
            let id = unit.id(g);
            row.fill(0.0);
            let mut running = Running::EMPTY;
            for (part, _) in parts {
                running = fold(s, running, &mut row, part.running[g], &part.outputs[g * vp..(g + 1) * vp]);
            }
            if let Some(mean) = &unit.mean {
                load_query(s, problem, id, &mut query);
                let mut logit = query.iter().zip(mean.key).map(|(q, k)| q * k).sum::<f32>();
                if problem.options.softcap > 0.0 {
                    logit = problem.options.softcap * (logit / problem.options.softcap).tanh();
                }
                let own = Running { max: logit + mean.count.ln() as f32, sum: 1.0 };
                let mut value = vec![0f32; vp];
                value[..mean.value.len()].copy_from_slice(mean.value);
                running = fold(s, running, &mut row, own, &value);
            }
            let lse = normalise(s, problem, id, running, &mut row);
            let job = Job::new(*problem, unit.out, unit.lse);
            write_row(&job, id, &row[..problem.value_dim], lse);
            if let Told::Weights(reduce) = unit.told {
                for (p, (_, found)) in parts.iter().enumerate() {
                    let to = &mut told[p * length..keys.min((p + 1) * length)];
                    weigh(found, g, lse, reduce, to);
                }
            }
        }
        match unit.told {
            Told::Nothing | Told::Weights(Reduce::Max | Reduce::Sum) => {}
            Told::Weights(Reduce::Mean) => told.iter_mut().for_each(|w| *w /= problem.group as f32),
            Told::Logits(_) => {
                for (p, (_, found)) in parts.iter().enumerate() {
                    told[p * length..][..found.scores.len()].copy_from_slice(&found.scores);
                }
                let cap = problem.options.softcap;
                if cap > 0.0 {
                    told.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
                }
            }
        }
        told
    }
}

/// Takes one head's weights of the keys of a part into `to`.
#[inline(always)]
fn weigh(found: &Found, g: usize, lse: f32, reduce: Reduce, to: &mut [f32]) {
    let (keys, blocks) = (to.len(), to.len().div_ceil(stream::KEYS));
    for (block, to) in to.chunks_mut(stream::KEYS).enumerate() {
        let max = found.maxima[g * blocks + block];
        // Nothing seen in the block, and perhaps nowhere.
        let factor = if max == f32::NEG_INFINITY { 0.0 } else { (max - lse).exp() };
        let weights = &found.scores[g * keys + block * stream::KEYS..][..to.len()];
        match reduce {
            Reduce::Max => {
                for (to, w) in to.iter_mut().zip(weights) {
                    let w = w * factor;
                    *to = if w > *to || w.is_nan() { w } else { *to };
                }
            }
            Reduce::Mean | Reduce::Sum => to.iter_mut().zip(weights).for_each(|(to, w)| *to += w * factor),
        }
    }
}

/// Attends; returns what each unit tells, in the order of its list.
pub(crate) fn attend(isa: Isa, units: &[Unit], execution: &Execution) -> Result<Vec<Vec<f32>>> {
    let longest = units.iter().map(|unit| unit.list.len()).max().unwrap_or(0);
    let length = split_length(units.len(), longest);
    // (unit, part), the long ones first.
    let mut parts: Vec<(usize, usize)> = Vec::new();
    let mut first = Vec::with_capacity(units.len());
    for (u, unit) in units.iter().enumerate() {
        first.push(parts.len());
        parts.extend((0..unit.list.len().div_ceil(length)).map(|part| (u, part)));
    }
    let range = |&(u, part): &(usize, usize)| part * length..((part + 1) * length).min(units[u].list.len());
    let mut turns: Vec<usize> = (0..parts.len()).collect();
    turns.sort_by_key(|&i| std::cmp::Reverse(range(&parts[i]).len()));
    let done = map(execution, parts.len(), |turn| {
        let part = &parts[turns[turn]];
        with_scratch(|scratch| dispatch(isa, Part { unit: &units[part.0], keys: range(part), scratch }))
    })?;
    let mut slots: Vec<Option<(Partial, Found)>> = parts.iter().map(|_| None).collect();
    for (turn, part) in turns.into_iter().zip(done) {
        slots[turn] = Some(part);
    }
    let done: Vec<(Partial, Found)> = slots.into_iter().flatten().collect();
    map(execution, units.len(), |u| {
        let end = first.get(u + 1).copied().unwrap_or(done.len());
        dispatch(isa, Finish { unit: &units[u], length, parts: &done[first[u]..end] })
    })
}

/// Softmax attention of every query row over those keys alone that `lists[batch * kv_heads + kv_head]` names, for the head's whole
/// query group.
///
/// `q` is `[batch, query heads, queries, dim]`, `k` and `v` `[batch, kv heads, keys, dim or value_dim]`. Of `options`, only `scale`,
/// `softcap` and `sinks` may be set. A key that a list names twice counts twice.
pub fn listed_attention<'a>(
    q: TensorView<'a>,
    k: impl Into<KvView<'a>>,
    v: impl Into<KvView<'a>>,
    lists: &[&[u32]],
    options: Options<'a>,
    out: &mut TensorViewMut,
    lse: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let Options { scale, softcap, sinks, .. } = options;
    let problem = Problem::new(q, k.into(), v.into(), Options { scale, softcap, sinks, ..Options::default() })?;
    check_outputs(&problem, out, lse)?;
    if lists.len() != problem.batch * problem.kv_heads {
        let expected = format!("one of each of {} x {} heads", problem.batch, problem.kv_heads);
        return Err(Error::value("rows", format!("{} lists", lists.len()), expected));
    }
    if let Some(row) = lists.iter().flat_map(|list| list.iter()).find(|&&row| row as usize >= problem.keys) {
        return Err(Error::value("rows", row, format!("rows below {}", problem.keys)));
    }
    let (out, lse) = (&*out, &*lse);
    let mut units = Vec::with_capacity(lists.len() * problem.queries);
    for (i, list) in lists.iter().enumerate() {
        let (batch, kv_head) = (i / problem.kv_heads, i % problem.kv_heads);
        for row in 0..problem.queries {
            units.push(Unit { problem, batch, kv_head, row, list, mean: None, told: Told::Nothing, out, lse });
        }
    }
    attend(simd::current(), &units, execution).map(drop)
}
