//! Softmax weights of chosen query rows.
//!
//! ```text
//! tiles of chosen rows x ranges of keys:   logits, written where the weights will lie
//! rows:                                    maximum, sum, weights in place; or weights by a given lse
//! ```

use super::logits::{LogitTile, Normaliser, tile_rows};
use super::scores::{RowId, Running};
use super::scratch::{Scratch, with_scratch};
use super::tile::QUERY_ROWS;
use super::{Options, Problem};
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{DType, Error, KvView, Result, TensorView, TensorViewMut};
use std::ops::Range;

/// Keys of one item.
const PIECE: usize = 4096;

/// Weights of the query rows `rows`, into `out`, float32 `[batch, query heads, rows, keys]`.
///
/// `lse`, `[batch, query heads, rows]`, gives the log of each row's denominator; without it the weights sum to 1, less what the sink
/// takes. Rows that see no key give 0.
pub fn attention_weights<'a>(
    q: TensorView<'a>,
    k: impl Into<KvView<'a>>,
    rows: &[usize],
    lse: Option<&[f32]>,
    options: Options<'a>,
    out: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let k = k.into();
    let problem = Problem::new(q, k, k, options)?;
    let Problem { batch, query_heads, kv_heads, group, keys, queries, .. } = problem;
    if let Some(row) = rows.iter().find(|&&row| row >= queries) {
        return Err(Error::value("rows", row, format!("rows below {queries}")));
    }
    let shape = [batch, query_heads, rows.len(), keys];
    if out.dtype() != DType::F32 || out.shape() != shape {
        return Err(Error::value("out", format!("{} {:?}", out.dtype(), out.shape()), format!("float32 {shape:?}")));
    }
    let count = batch * query_heads * rows.len();
    if let Some(lse) = lse
        && lse.len() != count
    {
        return Err(Error::value("lse", format!("{} numbers", lse.len()), format!("{:?}", &shape[..3])));
    }
    if count == 0 || keys == 0 {
        return Ok(());
    }
    let isa = simd::current();
    let out = &*out;
    let step = tile_rows(rows.len() * group);
    let (tiles, pieces) = ((rows.len() * group).div_ceil(step), keys.div_ceil(PIECE));
    for_each(execution, batch * kv_heads * tiles * pieces, |i| {
        let (piece, i) = (i % pieces, i / pieces);
        let (tile, i) = (i % tiles, i / tiles);
        let (kv_head, batch) = (i % kv_heads, i / kv_heads);
        let tile = tile * step..((tile + 1) * step).min(rows.len() * group);
        let keys = piece * PIECE..((piece + 1) * PIECE).min(keys);
        with_scratch(|scratch| {
            dispatch(isa, WriteLogits { problem: &problem, rows, batch, kv_head, tile, keys, out, scratch });
        });
    })?;
    for_each(execution, count, |i| {
        let (row, head) = (i % rows.len(), i / rows.len());
        let id = RowId { batch: head / query_heads, head: head % query_heads, row: rows[row] };
        let to = out.row_ptr::<f32>(id.batch, id.head, row);
        // SAFETY: a row of `out` has `keys` floats, written above, and this item alone holds it.
        let weights = unsafe { std::slice::from_raw_parts_mut(to, keys) };
        with_scratch(|scratch| {
            dispatch(isa, Normalise { problem: &problem, id, lse: lse.map(|lse| lse[i]), weights, scratch });
        });
    })
}

struct WriteLogits<'a, 's> {
    problem: &'a Problem<'a>,
    rows: &'a [usize],
    batch: usize,
    kv_head: usize,
    tile: Range<usize>,
    keys: Range<usize>,
    out: &'a TensorViewMut<'a>,
    scratch: &'s mut Scratch,
}

impl Kernel for WriteLogits<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { problem, rows, batch, kv_head, tile, keys, out, scratch } = self;
        let (first, n) = (tile.start, tile.len());
        let head = |r: usize| kv_head * problem.group + r % problem.group;
        let mut ids = [RowId { batch, head: 0, row: 0 }; QUERY_ROWS];
        for (r, id) in (first..).zip(ids.iter_mut().take(n)) {
            (id.head, id.row) = (head(r), rows[r / problem.group]);
        }
        let Scratch { queries, keys: packed, scores, extra, .. } = scratch;
        let tile = LogitTile::load(s, problem, &ids[..n], queries);
        let (width, scores) = (tile.width(), scores.take(tile.room::<S>()));
        for start in keys.clone().step_by(width) {
            let block = start..(start + width).min(keys.end);
            if tile.logits(s, block.clone(), packed, extra, scores).is_none() {
                scores.fill(f32::NEG_INFINITY);
            }
            for r in 0..n {
                let to = out.row_ptr::<f32>(batch, head(first + r), (first + r) / problem.group);
                // SAFETY: the row has a float for each key, and no other item writes these keys of it.
                unsafe { to.add(start).copy_from_nonoverlapping(scores.as_ptr().add(r * width), block.len()) };
            }
        }
    }
}

struct Normalise<'a, 's> {
    problem: &'a Problem<'a>,
    id: RowId,
    lse: Option<f32>,
    weights: &'a mut [f32],
    scratch: &'s mut Scratch,
}

impl Kernel for Normalise<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { problem, id, lse, weights, scratch } = self;
        let n = weights.len().min(PIECE).next_multiple_of(S::LANES);
        let (logits, exps) = (scratch.scores.take(n), scratch.outputs.take(n));
        let normaliser = lse.map_or_else(
            || {
                let max = maximum(s, weights);
                let mut sum = 0f64;
                for chunk in weights.chunks(PIECE) {
                    let n = padded(s, chunk, logits);
                    sum += f64::from(Normaliser { shift: max, factor: 1.0 }.weigh(s, &logits[..n], &mut exps[..n]));
                }
                let running = Running { max, sum: sum as f32 };
                Normaliser::of_running(running, problem.denominator(id, running))
            },
            Normaliser::of_lse,
        );
        for chunk in weights.chunks_mut(PIECE) {
            let n = padded(s, chunk, logits);
            normaliser.weigh(s, &logits[..n], &mut exps[..n]);
            chunk.copy_from_slice(&exps[..chunk.len()]);
        }
    }
}

/// The largest logit, NaN passed over unless there is nothing else but minus infinity.
#[inline(always)]
fn maximum<S: Simd>(s: S, row: &[f32]) -> f32 {
    let mut largest = s.splat(f32::NEG_INFINITY);
    let vectors = row.chunks_exact(S::LANES);
    let mut max = vectors.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for chunk in vectors {
        // SAFETY: the chunk has LANES floats.
        largest = s.max(unsafe { s.load(chunk.as_ptr()) }, largest);
    }
    max = max.max(s.max_lane(largest));
    if max == f32::NEG_INFINITY && row.iter().any(|x| x.is_nan()) { f32::NAN } else { max }
}

/// Copies `from` into `to`, minus infinity after it up to whole vectors, whose length it returns.
#[inline(always)]
fn padded<S: Simd>(_: S, from: &[f32], to: &mut [f32]) -> usize {
    let n = from.len().next_multiple_of(S::LANES);
    to[..from.len()].copy_from_slice(from);
    to[from.len()..n].fill(f32::NEG_INFINITY);
    n
}
