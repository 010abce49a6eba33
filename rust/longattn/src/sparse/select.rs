//! Lists of keys or of key blocks from logits.

use super::scan::{Mark, RowWork, Selection, map_rows};
use crate::dense::bytes::ByteKeys;
use crate::dense::scores::RowId;
use crate::dense::scratch::with_scratch;
use crate::dense::{Broadcast, Options, Problem};
use crate::parallel::{Execution, map};
use crate::simd::{self, Simd, dispatch};
use crate::tensor::{Error, KvView, Result, TensorView};
use std::ops::Range;

pub(super) fn check_len(name: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::value(name, format!("{got} numbers"), expected))
}

/// Numbers of the entries, the largest first, equal ones by number; NaN comes last.
pub(super) fn descending(scores: &[f32], among: impl Iterator<Item = u32>) -> Vec<u32> {
    let value = |j: u32| {
        let x = scores[j as usize];
        if x.is_nan() { f32::NEG_INFINITY } else { x }
    };
    let mut order: Vec<u32> = among.collect();
    order.sort_unstable_by(|&a, &b| value(b).total_cmp(&value(a)).then(a.cmp(&b)));
    order
}

/// How [`pooled_blocks`] chooses.
#[derive(Clone, Copy, Debug)]
pub struct PooledBlocks<'a> {
    /// Query blocks that take every key block, `[batch, query heads, query blocks]`.
    pub whole_rows: &'a [bool],
    /// Key blocks that every query block takes, `[batch, query heads, key blocks]`.
    pub always: &'a [bool],
    /// Each query block takes key blocks below this only.
    pub limits: &'a [usize],
    /// For each query head, the share of the softmax over the other key blocks that the best ones may have together, or, with
    /// `by_count`, the share of their number.
    pub share: &'a [f32],
    /// See `share`.
    pub by_count: bool,
    /// So many first key blocks are always taken.
    pub sinks: usize,
}

struct PooledRow<'a> {
    problem: &'a Problem<'a>,
    blocks: PooledBlocks<'a>,
}

impl RowWork for PooledRow<'_> {
    type Output = Vec<u32>;

    #[inline(always)]
    fn row<S: Simd>(&self, _: S, id: RowId, logits: &[f32]) -> Vec<u32> {
        let Self { problem, blocks } = self;
        let limit = blocks.limits[id.row].min(problem.keys);
        let row = (id.batch * problem.query_heads + id.head) * problem.queries + id.row;
        let share = blocks.share[id.head];
        if blocks.whole_rows[row] || (!blocks.by_count && share >= 1.0) {
            return (0..limit as u32).collect();
        }
        let first = (id.batch * problem.query_heads + id.head) * problem.keys;
        let always = &blocks.always[first..first + limit];
        let order = descending(logits, (0..limit as u32).filter(|&j| !always[j as usize]));
        let mut taken = always.to_vec();
        taken[..blocks.sinks.min(limit)].fill(true);
        let take = if blocks.by_count {
            ((share * order.len() as f32).ceil() as usize).clamp(1, order.len().max(1))
        } else {
            let max = order.first().map_or(0.0, |&j| f64::from(logits[j as usize]));
            let weights: Vec<f64> = order.iter().map(|&j| (f64::from(logits[j as usize]) - max).exp()).collect();
            let allowed = f64::from(share) * weights.iter().sum::<f64>();
            let mut sum = 0.0;
            let fits = weights.iter().take_while(|&&weight| {
                sum += weight;
                sum <= allowed
            });
            fits.count().max(1)
        };
        for &j in order.iter().take(take) {
            taken[j as usize] = true;
        }
        (0..limit as u32).filter(|&j| taken[j as usize]).collect()
    }
}

/// The best key blocks of each query block by the logits of what stands for them, `q` `[batch, query heads, query blocks, dim]` and
/// `k` `[batch, KV heads, key blocks, dim]`; lists are `[batch, query heads, query blocks]`.
pub fn pooled_blocks(
    q: TensorView,
    k: TensorView,
    scale: f32,
    blocks: PooledBlocks,
    execution: &Execution,
) -> Result<Selection> {
    let options = Options { scale: Some(scale), ..Options::default() };
    let problem = Problem::new(q, k.into(), k.into(), options)?;
    check_len("whole_rows", blocks.whole_rows.len(), problem.batch * problem.query_heads * problem.queries)?;
    check_len("always", blocks.always.len(), problem.batch * problem.query_heads * problem.keys)?;
    check_len("limits", blocks.limits.len(), problem.queries)?;
    check_len("share", blocks.share.len(), problem.query_heads)?;
    Ok(map_rows(&problem, &PooledRow { problem: &problem, blocks }, execution)?.into_iter().collect())
}

struct BestOfRow<'a> {
    problem: &'a Problem<'a>,
    share: f64,
    least: usize,
}

impl RowWork for BestOfRow<'_> {
    type Output = Vec<u32>;

    #[inline(always)]
    fn row<S: Simd>(&self, _: S, id: RowId, logits: &[f32]) -> Vec<u32> {
        let visible = self.problem.visible(id.row);
        let n = visible.len();
        let count = ((self.share * n as f64).ceil() as usize).max(self.least).min(n);
        if count == n {
            return (visible.start as u32..visible.end as u32).collect();
        }
        let logits = &logits[visible.clone()];
        let mut sorted: Vec<f32> = logits.iter().map(|&x| if x.is_nan() { f32::NEG_INFINITY } else { x }).collect();
        let (_, &mut bar, _) = sorted.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a));
        let above = logits.iter().filter(|&&x| x > bar).count();
        let mut equal = count - above;
        let mut list = Vec::with_capacity(count);
        for (j, &x) in (visible.start as u32..).zip(logits) {
            let ties = x == bar || (bar == f32::NEG_INFINITY && x.is_nan());
            if x > bar || (ties && equal > 0) {
                equal -= usize::from(ties);
                list.push(j);
            }
        }
        list
    }
}

/// For each query row the keys of the largest logits: `ceil(share * n)` of the `n` that it sees, but at least `least`; lists are
/// `[batch, query heads, queries]`.
pub fn best_of_rows(
    q: TensorView,
    k: TensorView,
    options: Options,
    share: f64,
    least: usize,
    execution: &Execution,
) -> Result<Selection> {
    let problem = Problem::new(q, k.into(), k.into(), options)?;
    Ok(map_rows(&problem, &BestOfRow { problem: &problem, share, least }, execution)?.into_iter().collect())
}

/// How [`chunk_keys`] chooses.
#[derive(Clone, Copy, Debug)]
pub struct ChunkKeys<'a> {
    /// Where chunks begin, and the number of keys.
    pub bounds: &'a [usize],
    /// Each query block takes keys below this only.
    pub limits: &'a [usize],
    /// Keys of a list.
    pub budget: usize,
    /// So many first keys are always taken.
    pub first: usize,
    /// So many last keys below the limit are always taken.
    pub last: usize,
}

struct ChunkRow<'a>(ChunkKeys<'a>);

impl RowWork for ChunkRow<'_> {
    type Output = Vec<u32>;

    #[inline(always)]
    fn row<S: Simd>(&self, _: S, id: RowId, logits: &[f32]) -> Vec<u32> {
        let ChunkKeys { bounds, limits, budget, first, last } = self.0;
        let limit = limits[id.row];
        let head = first.min(limit);
        let tail = limit.saturating_sub(last).max(head);
        let mut parts = vec![0..head, tail..limit];
        let mut left = budget.saturating_sub(head + limit - tail);
        let chunks = logits.len() as u32;
        let order = descending(logits, (0..chunks).filter(|&c| bounds[c as usize] < tail));
        for c in order {
            if left == 0 {
                break;
            }
            let start = bounds[c as usize].max(head);
            let end = bounds[c as usize + 1].min(tail).min(start + left);
            if start < end {
                left -= end - start;
                parts.push(start..end);
            }
        }
        parts.sort_unstable_by_key(|part| part.start);
        parts.into_iter().flat_map(|part| part.start as u32..part.end as u32).collect()
    }
}

/// The keys of the best chunks of each query block by the logits of what stands for them, `q` `[batch, heads, query blocks, dim]` and
/// `k` `[batch, KV heads, chunks, dim]`; lists are `[batch, heads, query blocks]`.
pub fn chunk_keys(q: TensorView, k: TensorView, chunks: ChunkKeys, execution: &Execution) -> Result<Selection> {
    let problem = Problem::new(q, k.into(), k.into(), Options { scale: Some(1.0), ..Options::default() })?;
    check_len("bounds", chunks.bounds.len(), problem.keys + 1)?;
    check_len("limits", chunks.limits.len(), problem.queries)?;
    let total = chunks.bounds.last().copied().unwrap_or(0);
    if !chunks.bounds.is_sorted() || chunks.limits.iter().any(|&limit| limit > total) {
        return Err(Error::value("bounds", "bounds that fall or end below a limit", "rising ones"));
    }
    Ok(map_rows(&problem, &ChunkRow(chunks), execution)?.into_iter().collect())
}

/// Keys that reach a threshold for some query row of a group: groups of `step` rows of `q`, `[batch, query heads, rows, dim]`, look at
/// the keys `candidates[group]`. `thresholds` is `[batch, query heads, rows]`. With `shared`, the rows of all query heads of a KV head
/// make one list, and lists are `[batch, KV heads, groups]`, else `[batch, query heads, groups]`.
pub fn stripes<'a>(
    q: TensorView<'a>,
    k: impl Into<KvView<'a>>,
    scale: f32,
    thresholds: &[f32],
    step: usize,
    candidates: &[Range<usize>],
    shared: bool,
    execution: &Execution,
) -> Result<Selection> {
    let k = k.into();
    let problem = Problem::new(q, k, k, Options { scale: Some(scale), ..Options::default() })?;
    check_len("thresholds", thresholds.len(), problem.batch * problem.query_heads * problem.queries)?;
    check_len("candidates", candidates.len(), problem.queries.div_ceil(step.max(1)))?;
    if step == 0 || candidates.iter().any(|keys| keys.end > problem.keys) {
        return Err(Error::value(
            "candidates",
            "keys that are not there, or no step",
            format!("below {}", problem.keys),
        ));
    }
    let (isa, groups) = (simd::current(), candidates.len());
    let together = if shared { problem.group } else { 1 };
    let heads = problem.query_heads / together.max(1);
    let lists = map(execution, problem.batch * heads * groups, |i| {
        let (group, i) = (i % groups, i / groups);
        let (batch, first) = (i / heads, i % heads * together);
        let rows = group * step..((group + 1) * step).min(problem.queries);
        let ids: Vec<RowId> = (first..first + together)
            .flat_map(|head| rows.clone().map(move |row| RowId { batch, head, row }))
            .collect();
        let of = |id: &RowId| thresholds[(id.batch * problem.query_heads + id.head) * problem.queries + id.row];
        let (of_rows, keys): (Vec<f32>, _) = (ids.iter().map(of).collect(), candidates[group].clone());
        let start = keys.start as u32;
        let mark =
            |scratch: &mut _| dispatch(isa, Mark { problem: &problem, ids: &ids, thresholds: &of_rows, keys, scratch });
        (start..).zip(with_scratch(mark)).filter(|&(_, mark)| mark != 0).map(|(j, _)| j).collect::<Vec<u32>>()
    })?;
    Ok(lists.into_iter().collect())
}

/// How [`rounded_blocks`] chooses.
#[derive(Clone, Copy, Debug)]
pub struct RoundedBlocks<'a> {
    /// Where query blocks begin, and the number of queries.
    pub query_bounds: &'a [usize],
    /// Keys of a block.
    pub block: usize,
    /// The key blocks of each query block that are judged; those before are taken, and those after up to the limit.
    pub judged: &'a [Range<usize>],
    /// Each query block takes key blocks below this only.
    pub limits: &'a [usize],
    /// The logit that a row must reach, `[batch, query heads, queries]`.
    pub thresholds: &'a [f32],
    /// Mean query of each query head, `[batch, query heads, dim]`.
    pub mean_queries: &'a [f32],
    /// Largest magnitude that queries and keys are rounded to.
    pub levels: f32,
}

/// Rows of logits as they are.
struct Logits;

impl RowWork for Logits {
    type Output = Vec<f32>;

    #[inline(always)]
    fn row<S: Simd>(&self, _: S, _: RowId, logits: &[f32]) -> Vec<f32> {
        logits.to_vec()
    }
}

/// Key blocks that hold a key whose estimated logit reaches the threshold of a row of the query block; lists are `[batch, query heads,
/// query blocks]`. Estimates are of queries and keys less their means, rounded to whole numbers of a scale per row.
pub fn rounded_blocks<'a>(
    q: TensorView<'a>,
    k: impl Into<KvView<'a>>,
    scale: f32,
    blocks: RoundedBlocks<'a>,
    execution: &Execution,
) -> Result<Selection> {
    let k = k.into();
    let options = Options { scale: Some(scale), ..Options::default() };
    let mut problem = Problem::new(q, k, k, options)?;
    let RoundedBlocks { query_bounds, block, judged, limits, thresholds, mean_queries, levels } = blocks;
    let count = problem.keys.div_ceil(block.max(1));
    let query_blocks = query_bounds.len().saturating_sub(1);
    let Problem { batch, query_heads, queries, keys, dim, .. } = problem;
    check_len("thresholds", thresholds.len(), batch * query_heads * queries)?;
    check_len("mean_queries", mean_queries.len(), batch * query_heads * dim)?;
    check_len("judged", judged.len(), query_blocks)?;
    check_len("limits", limits.len(), query_blocks)?;
    let fits = judged
        .iter()
        .zip(limits)
        .all(|(judged, &limit)| judged.start <= judged.end && judged.end <= limit && limit <= count);
    if block == 0 || query_bounds.last() != Some(&queries) || !query_bounds.is_sorted() || !fits {
        return Err(Error::value("judged", "blocks that are not there", format!("below {count}")));
    }
    let isa = simd::current();
    let scaled: Vec<f32> = mean_queries.iter().map(|x| x * scale).collect();
    let rounded = ByteKeys::new(isa, &problem, levels, &scaled, execution)?;
    // What the mean query gives with each key, less what it gives with the mean key.
    let mean_view = TensorView::new(mean_queries, [batch, query_heads, 1, dim])?;
    let mut of_mean = map_rows(&Problem::new(mean_view, k, k, options)?, &Logits, execution)?.concat();
    for (i, row) in of_mean.chunks_exact_mut(keys.max(1)).enumerate() {
        let id = RowId { batch: i / query_heads, head: i % query_heads, row: 0 };
        let constant = rounded.mean_product(&problem, id);
        row.iter_mut().for_each(|x| *x -= constant);
    }
    problem.options.bias = Some(Broadcast::new(&of_mean, [batch, query_heads, 1, keys])?);
    problem.byte_keys = Some(&rounded);
    let lists = map(execution, batch * query_heads * query_blocks, |i| {
        let (block_number, i) = (i % query_blocks, i / query_blocks);
        let (batch, head) = (i / query_heads, i % query_heads);
        let rows = query_bounds[block_number]..query_bounds[block_number + 1];
        let of_rows = &thresholds[i * queries..][rows.clone()];
        let ids: Vec<RowId> = rows.map(|row| RowId { batch, head, row }).collect();
        let judged = judged[block_number].clone();
        let keys = judged.start * block..(judged.end * block).min(keys);
        let mark =
            |scratch: &mut _| dispatch(isa, Mark { problem: &problem, ids: &ids, thresholds: of_rows, keys, scratch });
        let marks = with_scratch(mark);
        let kept = (judged.start as u32..).zip(marks.chunks(block)).filter(|(_, marks)| marks.contains(&1));
        let (before, after) = (0..judged.start as u32, judged.end as u32..limits[block_number] as u32);
        before.chain(kept.map(|(j, _)| j)).chain(after).collect::<Vec<u32>>()
    })?;
    Ok(lists.into_iter().collect())
}
