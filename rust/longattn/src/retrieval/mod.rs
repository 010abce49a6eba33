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
mod select;
mod weigh;

use crate::dense::rows::{Indexed, numbers, widen_row};
use crate::dense::scores::{RowId, Running, exp_difference};
use crate::dense::scratch::{Buffer, Scratch, with_scratch};
use crate::dense::stream::{self, MAX_QUERY_ROWS, RowState, scale_row};
use crate::dense::{Options, Problem};
use crate::index::codes::{BLOCK, Scan, ScanQuery};
use crate::index::{Signatures, Snapshot};
use crate::kv::Reader;
use crate::parallel::{Execution, for_each, map, num_threads};
use crate::simd::{self, Isa, Kernel, Simd, dispatch};
use crate::tensor::{DType, Element, Error, Result, Storage, TensorView, TensorViewMut, with_element};
use chunks::{Shared, Slots};
use select::{Budget, Weights};
use std::ops::Range;
use std::sync::Arc;
use weigh::{Bulk, HeadWeight, Summarise, Weigh};

/// Standard deviations of a code's error that the bound of the missed mass allows for.
const BOUND_SIGMAS: f32 = 5.5;

/// Relative error of a sum of weights.
const SUM_ROUNDING: f64 = 1e-6;

/// Candidates that one item scans, a multiple of [`BLOCK`].
const CHUNK: usize = 16 * 1024;

/// What is done with the rows that are not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Nothing: they are left out of the softmax.
    Ignored,
    /// Their codes' weights times their value clusters' means take part.
    Estimated,
}

/// How rows are selected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Select {
    /// This many rows of each KV head, shared by its query group.
    TopK(usize),
    /// The fewest rows whose estimated mass, with the steady rows, reaches this share for every head of the group.
    TopP(f32),
}

/// Parameters of [`retrieval_attention`].
#[derive(Clone, Copy, Debug)]
pub struct RetrievalOptions<'a> {
    /// How rows are selected.
    pub select: Select,
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
}

/// What one query row of one KV head did.
#[derive(Clone, Debug, Default)]
pub struct RowStats {
    /// Rows that the query saw.
    pub keys_total: usize,
    /// Rows whose codes were scanned.
    pub keys_scored: usize,
    /// Rows read exactly.
    pub keys_attended: usize,
    /// Estimated share of the softmax mass outside the rows read exactly, for each query head of the group.
    pub missed_mass: Vec<f32>,
    /// Upper bound of that share, see [`retrieval_attention`].
    pub missed_mass_bound: Vec<f32>,
    /// Rows selected by their codes, ascending; empty unless asked for.
    pub selected: Vec<u32>,
}

struct Call<'a> {
    problem: Problem<'a>,
    /// Of the store's rows.
    dtype: DType,
    options: RetrievalOptions<'a>,
    snapshot: Snapshot<'a>,
    isa: Isa,
    keep_selected: bool,
}

/// Attention of `q`, `[1, query heads, queries, dim]`, over the store of `index`, reading few of its rows.
///
/// Query row i sits at position `len - queries + i` and sees the rows up to its own. `out` is `[1, query heads, queries, value_dim]`,
/// `lse` `[1, query heads, queries, 1]` in f32. Returns the statistics of `[kv_heads, queries]`, row-major.
///
/// `missed_mass` comes from the codes' unbiased logits. `missed_mass_bound` holds if no unread row's logit is underestimated by
/// more than 5.5 standard deviations of its code's error, a Gaussian event of 2e-8 per row: loose with 4 bits, near 1 with fewer.
/// Hash codes estimate nothing: both are 1 whenever rows were left out.
pub fn retrieval_attention(
    q: TensorView,
    index: &Signatures,
    options: RetrievalOptions,
    out: &mut TensorViewMut,
    lse: &mut TensorViewMut,
    keep_selected: bool,
    execution: &Execution,
) -> Result<Vec<RowStats>> {
    let store = Arc::clone(index.store());
    let reader = store.read();
    check(&q, index, &reader, &options, out, lse)?;
    let dense = Options { scale: options.scale, causal: true, sinks: options.sink_logits, ..Options::default() };
    let problem = Problem::new(q, reader.keys(), reader.values(), dense)?;
    if problem.queries == 0 {
        return Ok(Vec::new());
    }
    let snapshot = index.read(&reader, execution)?;
    let Storage::Numbers(dtype) = problem.k.storage() else {
        return Err(Error::dtype("store", problem.k.storage(), "a store of float32, float16 or bfloat16 rows"));
    };
    let call = Call { problem, dtype, options, snapshot, isa: simd::current(), keep_selected };
    let (out, lse) = (&*out, &*lse);
    let heads = call.problem.kv_heads;
    let rows = heads * call.problem.queries;
    if rows >= num_threads() {
        map(execution, rows, |i| call.row(i / call.problem.queries, i % call.problem.queries, out, lse, None))
    } else {
        // Fewer rows than threads: the rows go one by one, their candidates in parallel. The results are the same bits.
        (0..rows)
            .map(|i| {
                let (head, row) = (i / call.problem.queries, i % call.problem.queries);
                let stats = call.row(head, row, out, lse, Some(execution));
                if execution.cancel.is_cancelled() { Err(Error::Cancelled) } else { Ok(stats) }
            })
            .collect()
    }
}

fn check(
    q: &TensorView,
    index: &Signatures,
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
    match options.select {
        Select::TopK(0) => return Err(Error::value("top_k", 0, "at least 1")),
        Select::TopP(p) if !(p > 0.0 && p < 1.0) => return Err(Error::value("top_p", p, "between 0 and 1")),
        Select::TopP(_) if !index.estimates() => {
            return Err(Error::value("top_p", "an index of hash codes", "an index that estimates logits, or top_k"));
        }
        _ => {}
    }
    if options.rest == Rest::Estimated && !index.estimates() {
        return Err(Error::value("rest", "values", "none for hash codes, which estimate no logits"));
    }
    Ok(())
}

/// Query heads per KV head.
const MAX_GROUP: usize = 64;

impl Call<'_> {
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
        let coded = self.snapshot.coded();
        // Rows that have no code yet are read with the window.
        let first = self.options.sinks.min(total);
        let last = total.saturating_sub(self.options.window).min(coded).max(first);
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
        let selection = (!candidates.is_empty()).then(|| self.select(head, &ids, &candidates, &rows, parallel));
        let mut rest = vec![Running::EMPTY; problem.group];
        if let Some(selection) = &selection {
            stats.keys_scored = candidates.len();
            stats.keys_attended += selection.rows.len();
            if !selection.rows.is_empty() {
                rows.attend(self, head, &ids, Keys::Index(&selection.rows));
            }
            rest.copy_from_slice(&selection.rest);
        }
        self.finish(head, &ids, &mut rows, selection.as_ref(), out, lse);
        for (g, rest) in rest.iter().enumerate() {
            let read = rows.running[g].lse();
            let share = |log_mass: f32| {
                if log_mass == f32::NEG_INFINITY { 0.0 } else { 1.0 / (1.0 + (read - log_mass).exp()) }
            };
            let left_out = selection.as_ref().is_some_and(|s| s.rows.len() < candidates.len());
            let (missed, bound) = if self.snapshot.estimates() {
                (share(rest.lse()), share(selection.as_ref().map_or(f32::NEG_INFINITY, |s| s.bound[g])))
            } else {
                let all = if left_out { 1.0 } else { 0.0 };
                (all, all)
            };
            stats.missed_mass.push(missed);
            stats.missed_mass_bound.push(bound.max(missed));
        }
        if self.keep_selected {
            stats.selected = selection.map_or_else(Vec::new, |s| s.rows);
        }
        stats
    }

    /// Scans the candidates and selects rows; weighs the rest.
    fn select(
        &self,
        head: usize,
        ids: &[RowId],
        candidates: &Range<usize>,
        steady: &GroupRows,
        parallel: Option<&Execution>,
    ) -> Selection {
        let group = ids.len();
        let (codes, estimates) = (self.snapshot.head(head), self.snapshot.estimates());
        let queries: Vec<ScanQuery> = (0..group).map(|g| self.snapshot.query(head, steady.query(g))).collect();
        let blocks = candidates.start / BLOCK..candidates.end.div_ceil(BLOCK);
        let base = blocks.start * BLOCK;
        let n = blocks.len() * BLOCK;
        let chunks = n.div_ceil(CHUNK);
        let mut memory = with_scratch(|scratch| std::mem::take(&mut scratch.extra));
        let mut memory2 = with_scratch(|scratch| std::mem::take(&mut scratch.values));
        let scores = Shared::new(memory.take(group * chunks * CHUNK));
        let weights = Shared::new(memory2.take(chunks * CHUNK));
        let run = |work: &(dyn Fn(usize) + Sync)| match parallel {
            // A cancelled call's results are never seen.
            Some(execution) => drop(for_each(execution, chunks, work)),
            None => (0..chunks).for_each(work),
        };
        let chunk_rows = |c: usize| {
            let start = base + c * CHUNK;
            start..(start + CHUNK).min(base + n)
        };

        // Scan: scores of each chunk, [group, CHUNK] one chunk after another.
        let bulks = Slots::new(chunks);
        run(&|c| {
            let range = chunk_rows(c);
            let bytes = self.snapshot.format().block_bytes();
            // SAFETY: chunk c is this worker's own.
            let scores = unsafe { scores.part(c * group * CHUNK, group * CHUNK) };
            let codes = &codes.codes[range.start / BLOCK * bytes..range.end / BLOCK * bytes];
            let format = self.snapshot.format();
            dispatch(self.isa, Scan { format, codes, queries: &queries, scores, stride: CHUNK });
            let inside = candidates.start.max(range.start) - range.start..candidates.end.min(range.end) - range.start;
            let summed = dispatch(self.isa, Summarise { scores, group, len: range.len(), inside, estimates });
            bulks.set(c, summed);
        });
        let mut bulk = vec![Bulk { softmax: Running::EMPTY, sum: 0.0, squares: 0.0 }; group];
        for part in bulks.into_values() {
            for (all, part) in bulk.iter_mut().zip(part) {
                all.join(part);
            }
        }

        // Weights of the group: the mean over its heads of each row's estimated share of all mass.
        let sigma = if estimates { self.snapshot.stats(head).sigma } else { 0.0 };
        let heads: Vec<HeadWeight> = (0..group)
            .map(|g| HeadWeight::new(&bulk[g], steady.running[g].lse(), sigma * steady.query_norm(g), candidates.len()))
            .collect();
        let by_mass = matches!(self.options.select, Select::TopP(_));
        let clusters = if self.options.rest == Rest::Estimated { codes.values.len() } else { 0 };
        let parts = Slots::new(chunks);
        run(&|c| {
            let range = chunk_rows(c);
            // SAFETY: chunk c is this worker's own.
            let (scores, weights) =
                unsafe { (scores.part(c * group * CHUNK, group * CHUNK), weights.part(c * CHUNK, CHUNK)) };
            let ids: &[u8] = if clusters > 0 { &codes.value_ids[range.clone()] } else { &[] };
            let work = Weigh { scores, weights, heads: &heads, len: range.len(), estimates, ids, clusters, by_mass };
            parts.set(c, dispatch(self.isa, work));
        });
        // SAFETY: the workers are done.
        let (scores, weights) = unsafe { (scores.part(0, group * chunks * CHUNK), weights.part(0, n)) };
        let score = |g: usize, row: usize| {
            let at = row - base;
            scores[at / CHUNK * group * CHUNK + g * CHUNK + at % CHUNK]
        };
        let mut sums = vec![0f32; group * clusters.max(1)];
        let mut totals = Weights::new(group, by_mass);
        for part in parts.into_values() {
            sums.iter_mut().zip(&part.sums).for_each(|(a, b)| *a += b);
            totals.join(&part.weights);
        }
        let budget = match self.options.select {
            Select::TopK(k) => Budget::Rows(k),
            // What the candidates must hold, beside the steady rows, for each head.
            Select::TopP(p) => {
                let wanted = |g: usize| {
                    let steady = f64::from(heads[g].steady_share);
                    f64::from(p) * (steady + totals.rest[g]) - steady
                };
                Budget::Mass((0..group).map(wanted).collect())
            }
        };
        let inside = candidates.start - base..candidates.end - base;
        if let Budget::Rows(k) = budget
            && estimates
            && totals.positive() < k.min(inside.len())
        {
            // Shares below the smallest float are all 0. There the logits keep the order; they stay below every share.
            for (j, weight) in weights[inside.clone()].iter_mut().enumerate().filter(|(_, weight)| **weight == 0.0) {
                let logits = heads.iter().enumerate().map(|(g, head)| score(g, candidates.start + j) - head.log_total);
                *weight = logits.fold(f32::NEG_INFINITY, f32::max);
            }
        }
        let mut rows = select::select(weights, &totals, inside, &budget);
        rows.iter_mut().for_each(|row| *row += base as u32);

        // What is left: all weights less those of the selected rows.
        let mut rest = vec![Running::EMPTY; group];
        let mut bound = vec![f32::NEG_INFINITY; group];
        if estimates && rows.len() < candidates.len() {
            let sigma_max = self.snapshot.stats(head).sigma_max;
            for (g, head) in heads.iter().enumerate() {
                let (mut mass, mut left) = (totals.mass[g], totals.rest[g]);
                let (shares, weights) = head.weights(self.isa, rows.iter().map(|&row| score(g, row as usize)));
                for ((&row, share), weight) in rows.iter().zip(shares).zip(weights) {
                    mass -= f64::from(share);
                    left -= f64::from(weight);
                    if clusters > 0 {
                        let sum = &mut sums[usize::from(codes.value_ids[row as usize]) * group + g];
                        *sum = (*sum - weight).max(0.0);
                    }
                }
                let left = left.max(0.0) as f32;
                rest[g] = Running { max: head.log_total, sum: left };
                // Plain exp(s), up by what a code may be wrong; with what the difference of the sums may have rounded away, and what
                // lies below the smallest float.
                let unread = (candidates.len() - rows.len()) as f64;
                let lost = SUM_ROUNDING * totals.mass[g] + unread * f64::from(f32::MIN_POSITIVE);
                let wrong = BOUND_SIGMAS * sigma_max * steady.query_norm(g);
                bound[g] = head.log_total + (mass.max(0.0) + lost).ln() as f32 + wrong;
            }
        }
        let log_total = heads.iter().map(|h| h.log_total).collect();
        with_scratch(|scratch| (scratch.extra, scratch.values) = (memory, memory2));
        Selection { rows, rest, bound, sums, clusters, log_total }
    }

    /// Adds the estimate of the rest, normalises and writes.
    fn finish(
        &self,
        head: usize,
        ids: &[RowId],
        rows: &mut GroupRows,
        selection: Option<&Selection>,
        out: &TensorViewMut,
        lse: &TensorViewMut,
    ) {
        let problem = &self.problem;
        let group = ids.len();
        for (g, &id) in ids.iter().enumerate() {
            let output = &mut rows.outputs[g * rows.padded_value_dim..][..problem.value_dim];
            let mut total = rows.running[g];
            if let Some(selection) = selection
                && selection.clusters > 0
                && selection.rest[g].sum > 0.0
            {
                let log_total = selection.log_total[g];
                let max = total.max.max(log_total);
                let (old, new) = (exp_difference(total.max, max), exp_difference(log_total, max));
                output.iter_mut().for_each(|x| *x *= old);
                let means = self.snapshot.head(head).values.means();
                // Normalised to the mass that is left, of which the clusters' sums are the shares.
                let sum: f32 = (0..selection.clusters).map(|c| selection.sums[c * group + g]).sum();
                let rescale = if sum > 0.0 { new * selection.rest[g].sum / sum } else { 0.0 };
                for (c, mean) in means.chunks_exact(problem.value_dim).enumerate() {
                    let weight = selection.sums[c * group + g] * rescale;
                    if weight > 0.0 {
                        output.iter_mut().zip(mean).for_each(|(x, m)| *x += weight * m);
                    }
                }
                total = Running { max, sum: total.sum * old + new * selection.rest[g].sum };
            }
            let seen = total;
            let total = problem.denominator(id, seen);
            let scale = seen.normalise(total);
            with_element!(out.dtype(), O => {
                let to = out.row_ptr::<O>(id.batch, id.head, id.row);
                for (d, x) in output.iter().enumerate() {
                    // SAFETY: the output row has value_dim elements and belongs to this worker alone.
                    unsafe { to.add(d).write(O::from_f32(x * scale)) };
                }
            });
            // SAFETY: lse has one element per query row.
            unsafe { lse.row_ptr::<f32>(id.batch, id.head, id.row).write(total.lse()) };
        }
    }
}

/// What [`Call::select`] found.
struct Selection {
    /// Rows to read, ascending.
    rows: Vec<u32>,
    /// Mass of the unread rows of each head, corrected for the codes' error.
    rest: Vec<Running>,
    /// Logarithm of the most mass that they can have.
    bound: Vec<f32>,
    /// `[clusters, group]`: shares of the unread rows by value cluster, in units of `exp(log_total)`.
    sums: Vec<f32>,
    clusters: usize,
    log_total: Vec<f32>,
}

enum Keys<'a> {
    Range(Range<usize>),
    Index(&'a [u32]),
}

/// Query rows of one group and what they accumulated.
struct GroupRows {
    queries: Buffer,
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
        Self {
            queries,
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

    fn query_norm(&self, g: usize) -> f32 {
        self.query(g).iter().map(|x| x * x).sum::<f32>().sqrt()
    }

    /// Exact attention to some rows, added to what is there.
    fn attend(&mut self, call: &Call, head: usize, ids: &[RowId], keys: Keys) {
        with_scratch(|scratch| dispatch(call.isa, Exact { call, head, ids, keys, rows: self, scratch }));
    }
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
        let problem = &call.problem;
        let scores = scratch.scores.take(MAX_QUERY_ROWS * stream::KEYS);
        let queries = rows.queries.filled();
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
                with_element!(call.dtype, T => {
                    let (k, v) = (numbers::<T>(&problem.k, 0, head), numbers::<T>(&problem.v, 0, head));
                    match &keys {
                        Keys::Range(range) => {
                            stream::attend(s, problem, ids, k, v, range.clone(), None, &mut state, scores, false);
                        }
                        Keys::Index(index) => {
                            let (k, v) = (Indexed { rows: k, index }, Indexed { rows: v, index });
                            let all = 0..index.len();
                            stream::attend(s, problem, ids, k, v, all.clone(), Some(all), &mut state, scores, false);
                        }
                    }
                });
            }
        }
    }
}

#[cfg(test)]
mod tests;
