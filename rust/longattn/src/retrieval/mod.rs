//! Retrieval attention: each step reads the rows that matter, estimates the rest, and says how much it may have missed.
//!
//! ```text
//! steady rows    the first `sinks` and the last `window`                       exact
//! candidates     the coded rows between them
//!     scan       an estimated logit of every candidate, once per query group    (index/codes.rs)
//!     select     the rows of most weight, for the whole group                   (select.rs)
//! selected rows                                                                exact, where they lie
//! other rows     estimated weight x mean value of the row's cluster             estimate
//! ```
//! The parts share one running softmax, so the result is the softmax over all rows with some logits and values estimated.

mod chunks;
mod cluster_sums;
mod correct;
pub(crate) mod exact;
mod levels;
mod once;
mod sample;
pub(crate) mod scan;
pub(crate) mod select;
pub(crate) mod units;
mod weigh;

use crate::dense::rows::{Indexed, widen_row, with_rows};
use crate::dense::scores::{RowId, Running, exp_difference};
use crate::dense::scratch::{Buffer, Scratch, with_scratch};
use crate::dense::stream::{self, MAX_QUERY_ROWS, RowState, scale_row};
use crate::dense::{Broadcast, Options, Problem};
pub use crate::index::Select;
use crate::index::{Ask, Index, Pick, Seconds, View};
use crate::kv::{KvStore, Reader};
use crate::parallel::{Execution, map, num_threads};
use crate::simd::{self, Isa, Kernel, Simd, dispatch};
use crate::tensor::{DType, Element, Error, Result, TensorView, TensorViewMut, with_element};
pub use sample::{ErrorBudget, Sampling};
use std::ops::Range;
use std::sync::Arc;

/// What is done with the rows that are not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Nothing: they are left out of the softmax.
    Ignored,
    /// Their mass and mean value, as the index estimates them, take part.
    Estimated,
}

/// Parameters of [`retrieval_attention`].
#[derive(Clone, Copy, Debug)]
pub struct RetrievalOptions<'a> {
    /// How rows are selected.
    pub select: Select,
    /// Rows of each KV head, in place of `select`: heads that spread their mass need more.
    pub by_head: Option<&'a [usize]>,
    /// First rows that are always read.
    pub sinks: usize,
    /// Last rows that are always read.
    pub window: usize,
    /// Factor of the dot products; `None` is `head_dim^-0.5`.
    pub scale: Option<f32>,
    /// What is done with the rows that are not read.
    pub rest: Rest,
    /// A logit of each query head that takes part in the denominator only.
    pub sink_logits: Option<&'a [f32]>,
    /// Rows drawn at random, whose correction of the estimate takes part: instead of `select` with a budget of error, else half of the
    /// rows that it counts. `rest` does not matter then.
    pub sampling: Option<Sampling>,
}

/// What one query row of one KV head did.
#[derive(Clone, Debug, Default)]
pub struct RowStats {
    /// Rows that the query saw.
    pub keys_total: usize,
    /// Rows, or units of several rows, that the index scored.
    pub keys_scored: usize,
    /// Bytes of the index that were read for it.
    pub index_bytes: usize,
    /// What a scan of codes or keys took; 0 where there was none.
    pub seconds: Seconds,
    /// Rows read exactly.
    pub keys_attended: usize,
    /// Estimated share of the softmax mass outside the rows read exactly, for each query head of the group.
    pub missed_mass: Vec<f32>,
    /// Upper bound of that share, see [`retrieval_attention`].
    pub missed_mass_bound: Vec<f32>,
    /// Rows of a sample, with those that were certain of a place in it; 0 where all rows were read instead.
    pub keys_sampled: usize,
    /// Whether a sample met the budget of error; all rows were read where it did not.
    pub verified: bool,
    /// Expected norm of the output's error, in units of the norm of the output or, by the budget, of the values, for each query head of
    /// the group: 0 where all rows were read, NaN where nothing was sampled.
    pub error_estimate: Vec<f32>,
    /// Rows that the index picked or that were sampled, ascending; empty unless asked for.
    pub selected: Vec<u32>,
}

struct Call<'a> {
    problem: Problem<'a>,
    options: RetrievalOptions<'a>,
    view: Box<dyn View + 'a>,
    isa: Isa,
    keep_selected: bool,
}

/// Attention of `q`, `[1, query heads, queries, dim]`, over the store of `index`, reading few of its rows.
///
/// Query row i sits at position `len - queries + i` and sees the rows up to its own. `out` is `[1, query heads, queries, value_dim]`,
/// `lse` `[1, query heads, queries, 1]` in f32. Returns the statistics of `[kv_heads, queries]`, row-major.
///
/// `missed_mass` and `missed_mass_bound` are what the index says of the rows left unread. For signatures the bound holds if no such
/// row's logit is underestimated by more than 5.5 standard deviations of its code's error, a Gaussian event of 2e-8 per row: loose with
/// 4 bits, near 1 with fewer. Where an index estimates nothing, both are 1 whenever rows were left out.
pub fn retrieval_attention(
    q: TensorView,
    index: &dyn Index,
    options: RetrievalOptions,
    out: &mut TensorViewMut,
    lse: &mut TensorViewMut,
    keep_selected: bool,
    execution: &Execution,
) -> Result<Vec<RowStats>> {
    let mut found =
        retrieval_attention_batch(&mut [Sequence { q, index, options, out, lse }], keep_selected, execution)?;
    Ok(found.pop().expect("one sequence"))
}

/// One sequence of a batch: what [`retrieval_attention`] takes.
pub struct Sequence<'a, 'o, 'l> {
    /// Queries.
    pub q: TensorView<'a>,
    /// Index of the sequence's own store.
    pub index: &'a dyn Index,
    /// How it is read.
    pub options: RetrievalOptions<'a>,
    /// Where the output goes.
    pub out: &'a mut TensorViewMut<'o>,
    /// Where the log-sum-exp goes.
    pub lse: &'a mut TensorViewMut<'l>,
}

/// [`retrieval_attention`] of several sequences, each with a store of its own, as one pool of work. The results are the same bits as
/// those of a call for each.
pub fn retrieval_attention_batch(
    sequences: &mut [Sequence],
    keep_selected: bool,
    execution: &Execution,
) -> Result<Vec<Vec<RowStats>>> {
    let stores: Vec<Arc<KvStore>> = sequences.iter().map(|s| Arc::clone(s.index.store())).collect();
    // Locks are taken in the order of the stores, so that calls with the same ones cannot wait for each other.
    let mut order: Vec<usize> = (0..stores.len()).collect();
    order.sort_by_key(|&i| stores[i].id());
    if order.windows(2).any(|pair| stores[pair[0]].id() == stores[pair[1]].id()) {
        return Err(Error::value("indexes", "a store twice", "a store of its own for each sequence"));
    }
    let mut readers: Vec<Option<Reader>> = stores.iter().map(|_| None).collect();
    for &i in &order {
        readers[i] = Some(stores[i].read());
    }
    let readers: Vec<Reader> = readers.into_iter().flatten().collect();
    for (sequence, reader) in sequences.iter().zip(&readers) {
        let Sequence { q, index, options, out, lse } = sequence;
        check(q, *index, reader, options, out, lse)?;
    }
    let mut calls: Vec<Option<Call>> = stores.iter().map(|_| None).collect();
    for &i in &order {
        let (sequence, reader) = (&sequences[i], &readers[i]);
        let (options, index) = (sequence.options, sequence.index);
        let dense = Options { scale: options.scale, causal: true, sinks: options.sink_logits, ..Options::default() };
        let problem = Problem::new(sequence.q, reader.keys(), reader.values(), dense)?;
        if problem.queries > 0 {
            let view = index.read(reader, execution)?;
            calls[i] = Some(Call { problem, options, view, isa: simd::current(), keep_selected });
        }
    }
    // (sequence, KV head, position)
    let mut items = Vec::new();
    for (i, call) in calls.iter().enumerate() {
        if let Some(Call { problem, .. }) = call {
            items
                .extend((0..problem.kv_heads * problem.queries).map(|j| (i, j / problem.queries, j % problem.queries)));
        }
    }
    let run = |&(i, head, row): &(usize, usize, usize), parallel| {
        let call = calls[i].as_ref().expect("items are of calls");
        call.row(head, row, sequences[i].out, sequences[i].lse, parallel)
    };
    let stats = if items.len() >= num_threads() {
        map(execution, items.len(), |i| run(&items[i], None))?
    } else {
        // Fewer items than threads: they go one by one, their candidates in parallel. The results are the same bits.
        let alone = |item| {
            let stats = run(item, Some(execution));
            if execution.cancel.is_cancelled() { Err(Error::Cancelled) } else { Ok(stats) }
        };
        items.iter().map(alone).collect::<Result<_>>()?
    };
    let mut found: Vec<Vec<RowStats>> = stores.iter().map(|_| Vec::new()).collect();
    for ((i, _, _), stats) in items.into_iter().zip(stats) {
        found[i].push(stats);
    }
    Ok(found)
}

fn check(
    q: &TensorView,
    index: &dyn Index,
    reader: &Reader,
    options: &RetrievalOptions,
    out: &TensorViewMut,
    lse: &TensorViewMut,
) -> Result<()> {
    let ([batch, heads, queries, dim], store) = (q.shape(), reader.store());
    if batch != 1 || dim != store.head_dim() || heads == 0 || heads % store.kv_heads() != 0 {
        let expected = format!("[1, a multiple of {}, queries, {}]", store.kv_heads(), store.head_dim());
        return Err(Error::value("q", format!("shape {:?}", q.shape()), expected));
    }
    if heads / store.kv_heads() > MAX_GROUP {
        let got = format!("{} query heads per KV head", heads / store.kv_heads());
        return Err(Error::value("q", got, format!("at most {MAX_GROUP}")));
    }
    if queries > reader.len() {
        let got = format!("{queries} queries on a store of {} rows", reader.len());
        return Err(Error::value("q", got, "queries that are the last rows of the store"));
    }
    if out.shape() != [1, heads, queries, store.value_dim()] {
        let expected = format!("[1, {heads}, {queries}, {}]", store.value_dim());
        return Err(Error::value("out", format!("shape {:?}", out.shape()), expected));
    }
    if lse.shape() != [1, heads, queries, 1] || lse.dtype() != DType::F32 {
        let expected = format!("float32 [1, {heads}, {queries}, 1]");
        return Err(Error::value("lse", format!("{} {:?}", lse.dtype(), lse.shape()), expected));
    }
    if let Some(rows) = options.by_head
        && (rows.len() != store.kv_heads() || rows.contains(&0))
    {
        let expected = format!("a positive number for each of {} KV heads", store.kv_heads());
        return Err(Error::value("top_k", format!("{rows:?}"), expected));
    }
    match options.select {
        Select::TopK(0) => return Err(Error::value("top_k", 0, "at least 1")),
        Select::TopP(p) if !(p > 0.0 && p < 1.0) => return Err(Error::value("top_p", p, "between 0 and 1")),
        Select::TopP(_) if !index.knows_mass() => {
            return Err(Error::value(
                "top_p",
                format!("an index of {} that estimates nothing", index.kind()),
                "an index that estimates logits, or top_k",
            ));
        }
        _ => {}
    }
    if let Some(sampling) = &options.sampling {
        check_sampling(sampling, index, options.by_head.map_or(options.select, |_| Select::TopK(1)))?;
    }
    if options.rest == Rest::Estimated && !index.estimates() {
        let got = format!("values with {} that estimate nothing", index.kind());
        return Err(Error::value("rest", got, "none: there is no estimate of the rest"));
    }
    Ok(())
}

fn check_sampling(sampling: &Sampling, index: &dyn Index, select: Select) -> Result<()> {
    let (name, open) = ("epsilon", |x: f32| x > 0.0 && x < 1.0);
    match &sampling.error {
        Some(budget) if !open(budget.epsilon) => return Err(Error::value(name, budget.epsilon, "between 0 and 1")),
        Some(budget) if !budget.deviations.iter().all(|z| z.is_finite()) || budget.deviations[1] < 0.0 => {
            return Err(Error::value("delta", format!("deviations {:?}", budget.deviations), "finite ones"));
        }
        None if matches!(select, Select::TopP(_)) => {
            return Err(Error::value("rest", "sampled with top_p", "top_k: a sample has a size"));
        }
        _ => {}
    }
    if !index.weighs_rows() {
        let (name, got) = if sampling.error.is_some() { ("epsilon", "") } else { ("rest", "sampled with ") };
        let got = format!("{got}an index of {} that weighs no single rows", index.kind());
        return Err(Error::value(name, got, "an index that does, such as signatures"));
    }
    Ok(())
}

/// Query heads per KV head.
const MAX_GROUP: usize = 64;

impl Call<'_> {
    /// How rows are selected for a KV head.
    fn select(&self, head: usize) -> Select {
        self.options.by_head.map_or(self.options.select, |rows| Select::TopK(rows[head]))
    }

    /// Attends from one query position of one KV head's group.
    fn row(
        &self,
        head: usize,
        row: usize,
        out: &TensorViewMut,
        lse: &TensorViewMut,
        parallel: Option<&Execution>,
    ) -> RowStats {
        let problem = &self.problem;
        let total = problem.visible(row).end;
        // Rows that are not indexed yet are read with the window.
        let first = self.options.sinks.min(total);
        let last = total.saturating_sub(self.options.window).min(self.view.covered()).max(first);
        let steady = [0..first, last..total];
        let candidates = first..last;

        let ids: Vec<RowId> =
            (0..problem.group).map(|g| RowId { batch: 0, head: head * problem.group + g, row }).collect();
        let mut rows = GroupRows::new(problem, &ids, self.isa);
        for range in steady {
            if !range.is_empty() {
                rows.attend(self, head, &ids, Keys::Range(range));
            }
        }
        let mut stats = RowStats { keys_total: total, keys_attended: total - candidates.len(), ..RowStats::default() };
        if let Some(sampling) = &self.options.sampling
            && !candidates.is_empty()
        {
            return self.sample(sampling, &ids, candidates, &mut rows, stats, out, lse, parallel);
        }
        let pick = if candidates.is_empty() { Pick::default() } else { self.pick(head, &rows, &candidates, parallel) };
        (stats.keys_scored, stats.index_bytes, stats.seconds) = (pick.scored, pick.bytes, pick.seconds);
        stats.keys_attended += pick.rows.len();
        if !pick.rows.is_empty() {
            rows.attend(self, head, &ids, Keys::Picked(&pick));
        }
        let read: Vec<f32> = rows.running.iter().map(|running| running.lse()).collect();
        self.finish(&ids, &mut rows, &pick, out, lse);
        let left_out = pick.rows.len() < candidates.len();
        for (g, read) in read.into_iter().enumerate() {
            let share = |log_mass: f32| {
                if log_mass == f32::NEG_INFINITY { 0.0 } else { 1.0 / (1.0 + (read - log_mass).exp()) }
            };
            let unknown = if left_out { 1.0 } else { 0.0 };
            let bound = pick.bound.as_ref().map_or(unknown, |bound| share(bound[g]));
            // Without an estimate, no more than the bound says.
            let missed = pick.rest.as_ref().map_or(bound, |rest| share(rest[g].log_mass));
            stats.missed_mass.push(missed);
            stats.missed_mass_bound.push(bound.max(missed));
            stats.error_estimate.push(if left_out { f32::NAN } else { 0.0 });
        }
        if self.keep_selected {
            stats.selected = pick.rows;
        }
        stats
    }

    /// Asks the index something about one KV head's group.
    fn ask<R>(
        &self,
        head: usize,
        rows: &GroupRows,
        candidates: &Range<usize>,
        parallel: Option<&Execution>,
        question: impl FnOnce(&Ask) -> R,
    ) -> R {
        let group = self.problem.group;
        let queries: Vec<&[f32]> = (0..group).map(|g| rows.query(g)).collect();
        let steady: Vec<f32> = rows.running.iter().map(|running| running.lse()).collect();
        question(&Ask {
            head,
            queries: &queries,
            steady: &steady,
            candidates: candidates.clone(),
            select: self.select(head),
            rest: self.options.rest == Rest::Estimated,
            keys: self.problem.k,
            values: self.problem.v,
            isa: self.isa,
            parallel,
        })
    }

    /// Asks the index for rows of one KV head's group.
    fn pick(&self, head: usize, rows: &GroupRows, candidates: &Range<usize>, parallel: Option<&Execution>) -> Pick {
        let group = self.problem.group;
        let pick = self.ask(head, rows, candidates, parallel, |ask| self.view.pick(ask));
        // A row twice, or one that is read anyway, would count twice in the softmax.
        debug_assert!(pick.rows.windows(2).all(|pair| pair[0] < pair[1]));
        let inside = |row: Option<&u32>| row.is_none_or(|&row| candidates.contains(&(row as usize)));
        assert!(inside(pick.rows.first()) && inside(pick.rows.last()), "picked rows are candidates");
        assert!(pick.log_weights.as_ref().is_none_or(|weights| weights.len() == group * pick.rows.len()));
        pick
    }

    /// Adds the estimate of the rest, normalises and writes.
    fn finish(&self, ids: &[RowId], rows: &mut GroupRows, pick: &Pick, out: &TensorViewMut, lse: &TensorViewMut) {
        let problem = &self.problem;
        for (g, &id) in ids.iter().enumerate() {
            let output = &mut rows.outputs[g * rows.padded_value_dim..][..problem.value_dim];
            let mut total = rows.running[g];
            if self.options.rest == Rest::Estimated
                && let Some(rest) = pick.rest.as_ref().map(|rest| &rest[g])
                && rest.log_mass > f32::NEG_INFINITY
            {
                assert!(rest.mean.len() == problem.value_dim, "the mean value that was asked for");
                let max = total.max.max(rest.log_mass);
                let (old, new) = (exp_difference(total.max, max), exp_difference(rest.log_mass, max));
                for (x, m) in output.iter_mut().zip(&rest.mean) {
                    *x = *x * old + new * m;
                }
                total = Running { max, sum: total.sum * old + new };
            }
            let seen = total;
            let total = problem.denominator(id, seen);
            let scale = seen.normalise(total);
            self.write(id, output.iter().map(|x| x * scale), total, out, lse);
        }
    }

    /// Writes a row's output, `value_dim` numbers, and its lse.
    fn write(
        &self,
        id: RowId,
        output: impl Iterator<Item = f32>,
        total: Running,
        out: &TensorViewMut,
        lse: &TensorViewMut,
    ) {
        with_element!(out.dtype(), O => {
            let to = out.row_ptr::<O>(id.batch, id.head, id.row);
            for (d, x) in output.take(self.problem.value_dim).enumerate() {
                // SAFETY: the output row has value_dim elements and belongs to this worker alone.
                unsafe { to.add(d).write(O::from_f32(x)) };
            }
        });
        // SAFETY: lse has one element per query row.
        unsafe { lse.row_ptr::<f32>(id.batch, id.head, id.row).write(total.lse()) };
    }
}

enum Keys<'a> {
    Range(Range<usize>),
    Picked(&'a Pick),
}

/// Query rows of one group and what they accumulated.
struct GroupRows {
    queries: Buffer,
    /// The queries times the factors of the channels, where keys are codes that lack these: for products with keys as they lie.
    of_codes: Vec<f32>,
    padded_dim: usize,
    dim: usize,
    outputs: Vec<f32>,
    padded_value_dim: usize,
    running: Vec<Running>,
}

impl GroupRows {
    fn new(problem: &Problem, ids: &[RowId], isa: Isa) -> Self {
        struct Load<'a>(&'a Problem<'a>, &'a [RowId], &'a mut [f32], usize);
        impl Kernel for Load<'_> {
            type Output = ();
            #[inline(always)]
            fn run<S: Simd>(self, s: S) {
                let Self(problem, ids, to, padded) = self;
                for (row, id) in to.chunks_exact_mut(padded).zip(ids) {
                    with_element!(problem.q.dtype(), Q => {
                        let q = problem.q.row::<Q>(id.batch, id.head, id.row);
                        // SAFETY: the query has dim elements, `row` its padded length.
                        unsafe { widen_row(s, q.as_ptr(), q.len(), row.as_mut_ptr(), padded) };
                    });
                    scale_row(s, row, problem.scale);
                }
            }
        }
        let padded = |n: usize| n.next_multiple_of(simd::MAX_LANES);
        let (padded_dim, padded_value_dim) = (padded(problem.dim), padded(problem.value_dim));
        let mut queries = Buffer::default();
        dispatch(
            isa,
            Load(problem, ids, &mut queries.take(ids.len() * padded_dim)[..ids.len() * padded_dim], padded_dim),
        );
        let mut of_codes = Vec::new();
        if let Some(channels) = problem.k.channels(ids[0].head / problem.group) {
            of_codes.extend_from_slice(&queries.filled()[..ids.len() * padded_dim]);
            for row in of_codes.chunks_exact_mut(padded_dim) {
                row.iter_mut().zip(channels).for_each(|(x, c)| *x *= c);
            }
        }
        Self {
            queries,
            of_codes,
            padded_dim,
            dim: problem.dim,
            outputs: vec![0.0; ids.len() * padded_value_dim],
            padded_value_dim,
            running: vec![Running::EMPTY; ids.len()],
        }
    }

    /// Scaled query of a head of the group.
    fn query(&self, g: usize) -> &[f32] {
        &self.queries.filled()[g * self.padded_dim..][..self.dim]
    }

    /// Scaled queries, for products with keys as they lie.
    fn for_keys(&self) -> &[f32] {
        if self.of_codes.is_empty() { self.queries.filled() } else { &self.of_codes }
    }

    /// Exact attention to some rows, added to what is there.
    fn attend(&mut self, call: &Call, head: usize, ids: &[RowId], keys: Keys) {
        with_scratch(|scratch| dispatch(call.isa, Exact { call, head, ids, keys, rows: self, scratch }));
    }
}

/// The problem of a list of `n` keys with `weights`, `[group, n]`, added to their logits.
fn weighted<'a>(problem: &Problem<'a>, weights: &'a [f32], head: usize, n: usize) -> Problem<'a> {
    assert!(weights.len() == problem.group * n);
    // Heads are counted from the first of all, weights from the first of the group.
    let first = weights.as_ptr().wrapping_sub(head * problem.group * n);
    let shape = [1, problem.query_heads, problem.queries, n];
    // SAFETY: the heads of this group, which alone are asked for, lie inside `weights`.
    let bias = unsafe { Broadcast::from_raw(first, shape, [0, n as isize, 0, 1]) };
    let options = Options { bias: Some(bias), ..problem.options };
    Problem { keys: n, options, ..*problem }
}

struct Exact<'a> {
    call: &'a Call<'a>,
    head: usize,
    ids: &'a [RowId],
    keys: Keys<'a>,
    rows: &'a mut GroupRows,
    scratch: &'a mut Scratch,
}

impl Kernel for Exact<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { call, head, ids, keys, rows, scratch } = self;
        // Weights of picked rows are a bias over the list, whose places count as keys.
        let weighted = match keys {
            Keys::Picked(Pick { rows, log_weights: Some(weights), .. }) => {
                Some(weighted(&call.problem, weights, head, rows.len()))
            }
            _ => None,
        };
        let problem = weighted.as_ref().unwrap_or(&call.problem);
        let scores = scratch.scores.take(MAX_QUERY_ROWS * stream::KEYS);
        let queries = if rows.of_codes.is_empty() { rows.queries.filled() } else { &rows.of_codes };
        for first in (0..ids.len()).step_by(MAX_QUERY_ROWS) {
            let last = (first + MAX_QUERY_ROWS).min(ids.len());
            let mut state = RowState {
                queries: &queries[first * rows.padded_dim..],
                padded_dim: rows.padded_dim,
                outputs: &mut rows.outputs[first * rows.padded_value_dim..last * rows.padded_value_dim],
                padded_value_dim: rows.padded_value_dim,
                running: &mut rows.running[first..last],
            };
            let ids = &ids[first..last];
            // SAFETY: ranges and indices are rows of the reader; the buffers are padded as RowState says.
            unsafe {
                with_rows!(problem, 0, head, |k, v| match &keys {
                    Keys::Range(range) => {
                        stream::attend(s, problem, ids, k, v, range.clone(), None, &mut state, scores, false);
                    }
                    Keys::Picked(Pick { rows: index, .. }) => {
                        let (k, v) = (Indexed { rows: k, index }, Indexed { rows: v, index });
                        let all = 0..index.len();
                        stream::attend(s, problem, ids, k, v, all.clone(), Some(all), &mut state, scores, false);
                    }
                });
            }
        }
    }
}

#[cfg(test)]
mod tests;
