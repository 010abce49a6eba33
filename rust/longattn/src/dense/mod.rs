//! Exact attention: blocked online softmax over any number of keys, memory linear in the inputs.
//!
//! ```text
//! rows of one KV head's query group, all positions         -> row blocks
//! row blocks x ranges of keys (fixed sizes)                 -> items, run by the pool
//! few rows: stream.rs          many rows: tile.rs           -> partial (max, sum, output) of each item
//! partials of one row block merged in order                 -> output and lse
//! ```
//! How the work is cut depends on shapes only, so results do not depend on the number of threads.

mod ahead;
pub(crate) mod backward;
pub(crate) mod bytes;
mod chunk;
mod code_values;
mod codes;
pub(crate) mod dots;
pub mod double;
pub(crate) mod grid;
pub(crate) mod keys;
mod lanes;
pub(crate) mod listed;
pub(crate) mod logits;
pub(crate) mod matrix;
mod merge;
pub(crate) mod micro;
mod options;
pub(crate) mod packed;
pub(crate) mod packing;
mod pairs;
pub(crate) mod parts;
mod ranks;
mod reduce;
mod register_scores;
mod registers;
pub(crate) mod rows;
pub(crate) mod run;
pub(crate) mod scores;
pub(crate) mod scratch;
mod selective;
pub(crate) mod stream;
mod sums;
pub(crate) mod tile;
pub(crate) mod turns;
pub(crate) mod values;
mod weighted;
mod weights;

pub use backward::{Forward, Gradients, attention_backward, attention_varlen_backward};
pub use chunk::{ChunkOptions, chunk_attention};
pub use grid::{Axis, Grid, GridBias, Interval};
pub use listed::{Reduce, listed_attention};
pub use merge::merge;
pub use options::{Broadcast, Options, RelativeBias, Segments, State};
pub use ranks::rank_union;
pub use reduce::{MAX_MOMENTS, Reductions, prob_reduce};
pub use selective::selective_attention;
pub use weighted::{Weights, weighted_attention};
pub use weights::attention_weights;

use crate::kv::convert::narrow;
use crate::parallel::Execution;
use crate::simd::tiles::{self, Tiles};
use crate::simd::{self, Isa, Kernel, MAX_ROWS, Simd, dispatch};
use crate::tensor::{DType, Element, Error, KvView, Result, TensorView, TensorViewMut, with_element};
use bytes::{ByteKeys, ByteRows};
use keys::{Keys, List};
use packed::PackedHeads;
use parts::Parts;
use registers::BlockState;
use rows::{Indexed, is_finite, widen_row, with_rows};
use run::{Job, Partial, run};
use scores::{RowId, Running, exp_difference};
use scratch::Scratch;
use std::ops::Range;
use stream::{MAX_QUERY_ROWS, RowState, Seen, scale_row};
use tile::{Form, MAX_ITEM_ROWS, QUERY_ROWS, TileState};
use turns::{Share, Turns};

/// Checked inputs of one attention call.
#[derive(Clone, Copy)]
pub(crate) struct Problem<'a> {
    pub(crate) q: TensorView<'a>,
    pub(crate) k: KvView<'a>,
    pub(crate) v: KvView<'a>,
    /// The keys as bytes, where scores may be computed from them.
    pub(crate) byte_keys: Option<&'a ByteKeys<'a>>,
    /// Keys and values of the heads that are computed, packed, where blocks of them are picked.
    pub(crate) packed: Option<&'a PackedHeads<'a>>,
    /// Matrix registers of the instruction set that it runs on, which [`Self::on`] says.
    pub(crate) tiles: Option<Tiles>,
    pub(crate) options: Options<'a>,
    /// Factor of all dot products; 1 where each row has its own.
    pub(crate) scale: f32,
    /// Log of the threshold below which blocks are left out.
    pub(crate) log_skip: f32,
    pub(crate) batch: usize,
    pub(crate) query_heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) group: usize,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) dim: usize,
    pub(crate) value_dim: usize,
}

impl<'a> Problem<'a> {
    pub(crate) fn new(q: TensorView<'a>, k: KvView<'a>, v: KvView<'a>, options: Options<'a>) -> Result<Self> {
        let ([batch, query_heads, queries, dim], [bk, kv_heads, keys, dk], [bv, hv, kv, value_dim]) =
            (q.shape(), k.shape(), v.shape());
        if dim == 0 {
            return Err(Error::value("q", format!("shape {:?}", q.shape()), "a head_dim of at least 1"));
        }
        if bk != batch || dk != dim {
            let expected = format!("batch {batch} and head_dim {dim} as in q");
            return Err(Error::value("k", format!("shape {:?}", k.shape()), expected));
        }
        if bv != bk || hv != kv_heads || kv != keys {
            let expected = format!("batch, heads and length of k, {:?}", &k.shape()[..3]);
            return Err(Error::value("v", format!("shape {:?}", v.shape()), expected));
        }
        if k.storage() != v.storage() {
            return Err(Error::dtype("v", v.storage(), format!("the dtype of k, {}", k.storage())));
        }
        if query_heads > 0 && (kv_heads == 0 || query_heads % kv_heads != 0) {
            let expected = format!("a multiple of the {kv_heads} heads of k");
            return Err(Error::value("q", format!("{query_heads} heads"), expected));
        }
        if keys > u32::MAX as usize {
            return Err(Error::value("k", format!("{keys} keys"), "fewer than 2^32"));
        }
        options.check([batch, query_heads, queries, keys], value_dim)?;
        let scale = match options.row_scales {
            Some(_) => 1.0,
            None => options.scale.unwrap_or_else(|| (dim as f32).powf(-0.5)),
        };
        let group = query_heads.checked_div(kv_heads).unwrap_or(0);
        let log_skip = options.skip_threshold.ln();
        Ok(Self {
            q,
            k,
            v,
            byte_keys: None,
            packed: None,
            tiles: None,
            options,
            scale,
            log_skip,
            batch,
            query_heads,
            kv_heads,
            group,
            queries,
            keys,
            dim,
            value_dim,
        })
    }

    /// The problem as it runs on an instruction set.
    pub(crate) fn on(self, isa: Isa) -> Self {
        Self { tiles: isa.tiles(), ..self }
    }

    /// Query rows that items are best made of, a divisor of [`QUERY_ROWS`].
    pub(crate) fn row_step(&self) -> usize {
        if self.tiles.is_some() { tiles::BLOCK } else { MAX_ROWS }
    }

    /// Query rows of an item over a range of keys. With matrix registers as many as leave enough items and fit the second cache: the
    /// more there are, the less of the time keys and values take to be packed.
    pub(crate) fn item_rows(&self) -> usize {
        const IN_CACHE: usize = 1 << 20;
        if self.tiles.is_none() {
            return QUERY_ROWS;
        }
        let items = self.batch * self.kv_heads * (self.group * self.queries).div_ceil(MAX_ITEM_ROWS);
        // Queries in parts of two bytes, outputs as floats.
        let row_bytes = 2 * parts::parts_of(self.q.dtype()) * self.dim + 4 * self.value_dim;
        if items >= run::ENOUGH && MAX_ITEM_ROWS * row_bytes <= IN_CACHE { MAX_ITEM_ROWS } else { MAX_ITEM_ROWS / 2 }
    }

    /// Position of a query row among the keys; negative when there are more queries than keys.
    #[inline(always)]
    pub(crate) fn position(&self, row: usize) -> isize {
        self.keys as isize - self.queries as isize + row as isize
    }

    /// Keys that causality and window leave a row.
    #[inline(always)]
    pub(crate) fn visible(&self, row: usize) -> Range<usize> {
        let Options { causal, window_left, window_right, .. } = self.options;
        visible_keys(causal, window_left, window_right, self.queries, self.keys, row)
    }

    /// Factor of a row's dot products.
    #[inline(always)]
    pub(crate) fn row_scale(&self, id: RowId) -> f32 {
        match &self.options.row_scales {
            // SAFETY: the row is one of the problem's, whose shape the scales were checked against.
            Some(scales) => unsafe { *scales.row(id.batch, id.head, id.row, 0).0 },
            None => self.scale,
        }
    }

    /// Whether some key may be hidden from a row.
    fn hides(&self, id: RowId) -> bool {
        let options = &self.options;
        options.mask.is_some()
            || options.bias.is_some()
            || options.segments.is_some()
            || options.visible_until.is_some()
            || options
                .relative_bias
                .is_some_and(|bias| bias.of_head(id.head, self.query_heads).contains(&f32::NEG_INFINITY))
            || self.visible(id.row) != (0..self.keys)
    }

    /// A row's softmax with what else takes part in it: the sink logit of its head and the state's log-sum-exp.
    pub(crate) fn denominator(&self, id: RowId, running: Running) -> Running {
        let running = self.options.sinks.map_or(running, |sinks| running.with_logit(sinks[id.head]));
        self.options.state.map_or(running, |state| running.with_logit(state.lse.row(id.batch, id.head, id.row)[0]))
    }

    pub(crate) fn id(&self, batch: usize, kv_head: usize, r: usize) -> RowId {
        RowId { batch, head: kv_head * self.group + r % self.group, row: r / self.group }
    }
}

/// Keys that causality and window leave query row `row` of `queries`, the last of which is at the last of `keys`.
#[inline(always)]
fn visible_keys(
    causal: bool,
    left: Option<usize>,
    right: Option<usize>,
    queries: usize,
    keys: usize,
    row: usize,
) -> Range<usize> {
    let (position, keys) = (keys as isize - queries as isize + row as isize, keys as isize);
    let clamp = |x: isize| x.clamp(0, keys) as usize;
    let mut end = keys;
    if causal {
        end = end.min(position + 1);
    }
    if let Some(right) = right {
        end = end.min(position.saturating_add_unsigned(right).saturating_add(1));
    }
    let start = left.map_or(0, |left| position.saturating_sub_unsigned(left));
    let (start, end) = (clamp(start), clamp(end));
    start..end.max(start)
}

/// What one worker does at a time.
pub(crate) struct Item<'a, 's> {
    pub(crate) problem: &'a Problem<'a>,
    /// Of one KV head, at most [`MAX_ITEM_ROWS`] rows in all. Several have lists of packed keys, more than [`MAX_QUERY_ROWS`] rows each
    /// and are all finished.
    pub(crate) shares: &'a [Share<'a>],
    pub(crate) scratch: &'s mut Scratch,
}

impl Kernel for Item<'_, '_> {
    /// What is left of a single share that is not finished.
    type Output = Option<Partial>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Option<Partial> {
        let Self { problem, shares, scratch } = self;
        let Share { ids, keys, list, .. } = &shares[0];
        let few = shares.len() == 1 && ids.len() <= MAX_QUERY_ROWS;
        let as_bytes = !few && S::DOT_BYTES && list.is_none();
        let byte_keys = problem.byte_keys.filter(|_| as_bytes);
        let parts = if few { None } else { Parts::of::<S>(problem, byte_keys.is_some()) };
        let pairs = !few && parts.is_none() && tile::multiplies_pairs::<S>(problem);
        let row_step = match parts {
            _ if few => 1,
            Some(_) => tiles::TILE,
            None => S::ROWS,
        };
        let dp = match (byte_keys, parts) {
            (Some(_), _) => bytes::words(problem.dim).next_multiple_of(S::LANES),
            (_, Some(parts)) => parts.query_width(problem.dim),
            _ if pairs => (problem.dim / 2).next_multiple_of(S::LANES),
            _ => problem.dim.next_multiple_of(S::LANES),
        };
        let vp = problem.value_dim.next_multiple_of(if few { S::LANES } else { micro::panel::<S>() });
        // Where the rows of each share are, padding at their end.
        let mut rows = 0;
        let places: Vec<Range<usize>> = shares
            .iter()
            .map(|share| {
                let start = rows;
                rows = start + share.ids.len().next_multiple_of(row_step);
                start..rows
            })
            .collect();
        assert!(rows <= MAX_ITEM_ROWS);
        let queries = scratch.queries.take(rows * dp);
        let byte_rows = byte_keys.map(|all| load_query_bytes(s, problem, all, ids, dp, queries));
        for (share, place) in shares.iter().zip(&places) {
            let queries = &mut queries[place.start * dp..place.end * dp];
            if byte_keys.is_none() {
                let wide = scratch.extra.take(problem.dim.next_multiple_of(S::LANES));
                for (r, &id) in share.ids.iter().enumerate() {
                    let row = r * dp..(r + 1) * dp;
                    match parts {
                        Some(parts) => {
                            if !parts.scales_products {
                                load_query(s, problem, id, wide);
                            }
                            parts.load_query(s, problem, id, r, wide, queries);
                        }
                        None if pairs => load_query_pairs(problem, id, &mut queries[row]),
                        None => load_query(s, problem, id, &mut queries[row]),
                    }
                }
            }
            if byte_keys.is_some() || parts.is_none() {
                queries[share.ids.len() * dp..].fill(0.0);
            }
        }
        let outputs = scratch.outputs.take(rows * vp);
        if parts.is_none() {
            outputs[..rows * vp].fill(0.0);
        }
        let mut running = [Running::EMPTY; MAX_ITEM_ROWS];
        let of_bytes = byte_rows.zip(byte_keys).map(|(rows, all)| (rows, all.of(problem, ids[0])));

        if few {
            let scores = scratch.scores.take(ids.len() * stream::KEYS);
            let running = &mut running[..ids.len()];
            let mut state = RowState { queries, padded_dim: dp, outputs, padded_value_dim: vp, running };
            let keys = keys.clone();
            // SAFETY: `keys` lies inside the views' length or the index, whose rows the views have; the buffers are padded as
            // RowState says.
            unsafe {
                with_rows!(problem, ids[0].batch, ids[0].head / problem.group, |k, v| {
                    match list {
                        None => stream::attend(s, problem, ids, k, v, keys, None, &mut state, scores, false),
                        Some(list) => {
                            let index = list.index;
                            let (k, v) = (Indexed { rows: k, index }, Indexed { rows: v, index });
                            let seen = Seen::Listed(list);
                            stream::attend_seen(s, problem, ids, k, v, keys, seen, &mut state, scores, false)
                        }
                    }
                });
            }
        } else if let Some(parts) = parts {
            let form = match of_bytes {
                Some((rows, keys)) => registers::Form::Bytes { rows, keys, width: dp },
                None => registers::Form::Parts,
            };
            let (running, places) = (&mut running[..], &places[..]);
            let state = BlockState { parts, form, queries, outputs, padded_value_dim: vp, running, places };
            let Scratch { keys: kb, values: vb, scores: sb, extra, .. } = scratch;
            registers::attend(s, problem, shares, state, kb, vb, sb, extra);
        } else {
            let form = match of_bytes {
                Some((rows, keys)) => Form::Bytes { rows, keys },
                None if pairs => Form::Pairs,
                None => Form::Floats,
            };
            let Scratch { keys: kb, values: vb, scores: sb, extra, .. } = scratch;
            for (i, keys) in Turns::new(shares) {
                let (Share { ids, list, .. }, Range { start, end }) = (&shares[i], places[i].clone());
                let mut state = TileState {
                    queries: &queries[start * dp..end * dp],
                    padded_dim: dp,
                    form: &form,
                    outputs: &mut outputs[start * vp..end * vp],
                    padded_value_dim: vp,
                    running: &mut running[start..start + ids.len()],
                };
                tile::attend(s, problem, ids, keys, list.as_ref(), &mut state, kb, vb, sb, extra);
            }
        }
        for (share, place) in shares.iter().zip(&places) {
            let (running, outputs) = (&running[place.start..][..share.ids.len()], &mut outputs[place.start * vp..]);
            let Some((job, keys)) = share.finish else {
                let outputs = outputs[..share.ids.len() * vp].to_vec();
                return Some(Partial { running: running.to_vec(), outputs });
            };
            for (r, &id) in share.ids.iter().enumerate() {
                finish_row(s, job, id, keys, running[r], &mut outputs[r * vp..(r + 1) * vp]);
            }
        }
        None
    }
}

/// Widens and scales one query row; `to` is padded with zeros.
#[inline(always)]
pub(crate) fn load_query<S: Simd>(s: S, problem: &Problem, id: RowId, to: &mut [f32]) {
    with_element!(problem.q.dtype(), Q => {
        let row = problem.q.row::<Q>(id.batch, id.head, id.row);
        // SAFETY: the row has `dim` elements, `to` its padded length.
        unsafe { widen_row(s, row.as_ptr(), row.len(), to.as_mut_ptr(), to.len()) };
    });
    scale_row(s, to, problem.row_scale(id));
    if let Some(channels) = problem.k.channels(id.head / problem.group) {
        to.iter_mut().zip(channels).for_each(|(x, c)| *x *= c);
    }
}

/// Loads query rows as bytes, `padded_dim` floats each.
#[inline(always)]
pub(crate) fn load_query_bytes<S: Simd>(
    s: S,
    problem: &Problem,
    all: &ByteKeys,
    ids: &[RowId],
    padded_dim: usize,
    to: &mut [f32],
) -> Box<ByteRows> {
    let mut rows = Box::new(ByteRows::new());
    let mut query = vec![0f32; problem.dim.next_multiple_of(S::LANES)];
    let mut rest = vec![0f32; problem.dim];
    for (r, &id) in ids.iter().enumerate() {
        load_query(s, problem, id, &mut query);
        let to = &mut to[r * padded_dim..(r + 1) * padded_dim];
        rows.load(r, &query[..problem.dim], all.of(problem, id), &mut rest, to);
    }
    rows
}

/// Copies one query row of bf16 as it is, two numbers to a float's four bytes; `to` is padded with zeros.
#[inline(always)]
fn load_query_pairs(problem: &Problem, id: RowId, to: &mut [f32]) {
    let row = problem.q.row::<half::bf16>(id.batch, id.head, id.row);
    to.fill(0.0);
    for (to, pair) in to.iter_mut().zip(row.as_chunks::<2>().0) {
        let [a, b] = pair.map(|x| x.to_ne_bytes());
        *to = f32::from_ne_bytes([a[0], a[1], b[0], b[1]]);
    }
}

/// Normalises a row, with sink logit and state, and writes output and lse.
#[inline(always)]
pub(crate) fn finish_row<S: Simd>(s: S, job: &Job, id: RowId, keys: &Keys, running: Running, outputs: &mut [f32]) {
    let problem = &job.problem;
    if let Some(max) = job.max {
        // SAFETY: it has one element per query row, and no other worker holds this row.
        unsafe { max.row_ptr::<f32>(id.batch, id.head, id.row).write(running.max) };
    }
    let lse = normalise(s, problem, id, running, outputs);
    let row = &outputs[..problem.value_dim];
    // An infinite number has no parts.
    let all = matches!(keys, Keys::Range(_)) && !problem.hides(id) && problem.tiles.is_none();
    if all || is_finite(s, row) {
        write_row(job, id, row, lse);
    } else {
        careful_row(job, id, keys);
    }
}

/// Turns what a row accumulated into its output and returns its log-sum-exp.
#[inline(always)]
fn normalise<S: Simd>(s: S, problem: &Problem, id: RowId, running: Running, outputs: &mut [f32]) -> f32 {
    let total = problem.denominator(id, running);
    scale_row(s, outputs, running.normalise(total));
    if let Some(state) = &problem.options.state {
        let lse: f32 = state.lse.row(id.batch, id.head, id.row)[0];
        if lse != f32::NEG_INFINITY {
            let weight = (lse - total.max).exp() / total.sum;
            with_element!(state.out.dtype(), O => {
                for (to, from) in outputs.iter_mut().zip(state.out.row::<O>(id.batch, id.head, id.row)) {
                    *to += weight * from.to_f32();
                }
            });
        }
    }
    total.lse()
}

#[inline(always)]
fn write_row(job: &Job, id: RowId, row: &[f32], lse: f32) {
    with_element!(job.out.dtype(), O => {
        let out = job.out.row_ptr::<O>(id.batch, id.head, id.row);
        // SAFETY: the output row has value_dim elements, and no other worker holds this row.
        unsafe { narrow(row, out.cast(), O::DTYPE) };
    });
    // SAFETY: lse has one element per query row.
    unsafe { job.lse.row_ptr::<f32>(id.batch, id.head, id.row).write(lse) };
}

/// Computes one row anew without ever touching a value of weight 0: the row came out non-finite, and keys are hidden from it whose
/// values may be the reason.
#[inline(never)]
fn careful_row(job: &Job, id: RowId, keys: &Keys) {
    struct Careful<'a>(&'a Job<'a, 'a>, RowId, &'a Keys<'a>);
    impl Kernel for Careful<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let Self(job, id, keys) = self;
            let problem = &job.problem;
            let mut queries = vec![0f32; problem.dim.next_multiple_of(S::LANES)];
            let mut outputs = vec![0f32; problem.value_dim.next_multiple_of(S::LANES)];
            let mut scores = vec![0f32; stream::KEYS];
            let mut running = [Running::EMPTY];
            load_query(s, problem, id, &mut queries);
            let mut state = RowState {
                padded_dim: queries.len(),
                queries: &queries,
                padded_value_dim: outputs.len(),
                outputs: &mut outputs,
                running: &mut running,
            };
            let head = id.head / problem.group;
            // SAFETY: visible keys lie inside the views, as do those of a list; the buffers are padded as RowState says.
            unsafe {
                with_rows!(problem, id.batch, head, |k, v| {
                    match keys.index().as_deref() {
                        None => {
                            let keys = problem.visible(id.row);
                            stream::attend(s, problem, &[id], k, v, keys, None, &mut state, &mut scores, true)
                        }
                        Some(index) => {
                            let visible = [keys.visible(problem, index, id.row)];
                            let list = List { index, bias: keys.bias(), visible: &visible, patch: keys.patch() };
                            let (k, v) = (Indexed { rows: k, index }, Indexed { rows: v, index });
                            let (all, seen) = (visible[0].clone(), Seen::Listed(&list));
                            stream::attend_seen(s, problem, &[id], k, v, all, seen, &mut state, &mut scores, true)
                        }
                    }
                });
            }
            let lse = normalise(s, problem, id, running[0], &mut outputs);
            write_row(job, id, &outputs[..problem.value_dim], lse);
        }
    }
    dispatch(simd::current(), Careful(job, id, keys));
}

/// Adds what a row found among other keys to what it has; returns the softmax over both. The shorter row is a multiple of `LANES`.
#[inline(always)]
pub(crate) fn fold<S: Simd>(s: S, running: Running, row: &mut [f32], other: Running, from: &[f32]) -> Running {
    let max = running.max.max(other.max);
    let (a, b) = (exp_difference(running.max, max), exp_difference(other.max, max));
    scale_row(s, row, a);
    for (to, from) in row.chunks_exact_mut(S::LANES).zip(from.chunks_exact(S::LANES)) {
        // SAFETY: both chunks have LANES floats.
        unsafe { s.store(to.as_mut_ptr(), s.fma(s.splat(b), s.load(from.as_ptr()), s.load(to.as_ptr()))) };
    }
    Running { max, sum: running.sum * a + other.sum * b }
}

pub(crate) fn check_outputs(problem: &Problem, out: &TensorViewMut, lse: &TensorViewMut) -> Result<()> {
    let rows = [problem.batch, problem.query_heads, problem.queries];
    if out.shape()[..3] != rows || out.shape()[3] != problem.value_dim {
        let expected = format!("{rows:?} x {}", problem.value_dim);
        return Err(Error::value("out", format!("shape {:?}", out.shape()), expected));
    }
    if lse.dtype() != DType::F32 || lse.shape()[..3] != rows || lse.shape()[3] != 1 {
        return Err(Error::value("lse", format!("{} {:?}", lse.dtype(), lse.shape()), format!("float32 {rows:?} x 1")));
    }
    Ok(())
}

/// Softmax attention: `out = softmax(scale * q k^T + ...) v`, `lse` the natural log of each row's denominator.
///
/// `q` is `[batch, query heads, queries, dim]`, `k` and `v` `[batch, kv heads, keys, dim or value_dim]`; query head h reads KV head
/// `h / (query heads / kv heads)`. `lse` is `[batch, query heads, queries, 1]`, f32. Rows that see no key give 0 and minus infinity.
/// Nothing is written when an argument is wrong.
pub fn attention<'a>(
    q: TensorView<'a>,
    k: impl Into<KvView<'a>>,
    v: impl Into<KvView<'a>>,
    options: Options<'a>,
    out: &mut TensorViewMut,
    lse: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let mut problem = Problem::new(q, k.into(), v.into(), options)?;
    check_outputs(&problem, out, lse)?;
    let byte_keys;
    // Few rows are bound by reading keys, and read them as they are.
    if options.qk_int8 && problem.queries * problem.group > MAX_QUERY_ROWS {
        byte_keys = ByteKeys::new(simd::current(), &problem, 127.0, &[], execution)?;
        problem.byte_keys = Some(&byte_keys);
    }
    run(simd::current(), &[Job::new(problem, out, lse)], execution)
}

/// What packed sequences ask for beyond a problem's own checks.
pub(crate) fn check_packed(
    queries: usize,
    keys: usize,
    query_ends: &[usize],
    key_ends: &[usize],
    options: &Options,
) -> Result<()> {
    if options.bias.is_some() || options.mask.is_some() {
        return Err(Error::value("mask", "a bias or mask", "none: packed sequences take neither"));
    }
    if options.qk_int8 {
        return Err(Error::value("qk_int8", true, "false: packed sequences are not offered in bytes"));
    }
    if options.segments.is_some() || options.visible_until.is_some() {
        return Err(Error::value("segments", "segments or visible_until", "none: packed sequences take neither"));
    }
    for (name, ends, total) in [("cu_seqlens_q", query_ends, queries), ("cu_seqlens_k", key_ends, keys)] {
        let fine = ends.first() == Some(&0) && ends.last() == Some(&total) && ends.is_sorted();
        if !fine || ends.len() != query_ends.len() {
            let expected = format!("{} offsets that rise from 0 to {total}", query_ends.len());
            return Err(Error::value(name, format!("{ends:?}"), expected));
        }
    }
    Ok(())
}

/// Attention of several sequences packed one after another, as one call.
///
/// `q` is `[1, query heads, total queries, dim]` and so on; sequence s owns rows `queries[s]..queries[s + 1]` and keys
/// `keys[s]..keys[s + 1]`. Bias, mask, segments and `visible_until` are not offered; `alibi_slopes` is `[query heads]`,
/// `row_scales` may differ by head only, and distances are those inside a sequence.
pub fn attention_varlen(
    q: TensorView,
    k: TensorView,
    v: TensorView,
    query_ends: &[usize],
    key_ends: &[usize],
    options: Options,
    out: &mut TensorViewMut,
    lse: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    check_packed(q.shape()[2], k.shape()[2], query_ends, key_ends, &options)?;
    let (k, v) = (KvView::from(k), KvView::from(v));
    check_outputs(&Problem::new(q, k, v, options)?, out, lse)?;
    let parts: Vec<_> = (1..query_ends.len())
        .map(|s| {
            let (rows, keys) = (query_ends[s - 1]..query_ends[s], key_ends[s - 1]..key_ends[s]);
            let options = Options { state: options.state.map(|state| state.rows(rows.clone())), ..options };
            let problem = Problem::new(q.rows(rows.clone()), k.rows(keys.clone()), v.rows(keys), options)?;
            Ok((problem, out.rows(rows.clone()), lse.rows(rows)))
        })
        .collect::<Result<_>>()?;
    let jobs: Vec<_> = parts.iter().map(|(problem, out, lse)| Job::new(*problem, out, lse)).collect();
    run(simd::current(), &jobs, execution)
}

#[cfg(test)]
mod tests;
