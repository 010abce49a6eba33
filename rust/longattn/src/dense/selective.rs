//! Selective attention: one head's own logits say which earlier keys later rows shall ignore, in every head.
//!
//! ```text
//! F = what earlier rows selected, one number per key
//! for each block of rows, in order:
//!     S = relu(logits of the selecting head), 0 for the first keys, the row's own and later ones      (logits.rs)
//!     strip[row] = -F;  F += S[row]                                      row by row, ranges of keys apart
//!     attention of all heads of the block's rows, the strip being its bias
//! ```

use super::logits::LogitTile;
use super::scores::RowId;
use super::scratch::{Scratch, with_scratch};
use super::tile::QUERY_ROWS;
use super::{Broadcast, Job, Options, Problem, check_outputs, run};
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Error, KvView, Result, TensorView, TensorViewMut};
use std::ops::Range;

/// Keys of one item of the selection.
const PIECE: usize = 1024;

/// Attention in which each logit of every head is lowered by what the rows before it selected of its key.
///
/// Row i adds `relu` of the logits of head `selector_head` to `selected`, `[batch, keys]`, for the keys from `protect_first` on that
/// lie before its own; the rows after it see those sums subtracted from their logits. `selected` comes with the sums of the rows
/// before the first and is left with those up to the last. `scale` and `softcap` are those of [`Options`]; everything is causal.
pub fn selective_attention<'a>(
    q: TensorView<'a>,
    k: impl Into<KvView<'a>>,
    v: impl Into<KvView<'a>>,
    selector_head: usize,
    protect_first: usize,
    scale: Option<f32>,
    softcap: f32,
    selected: &mut [f32],
    out: &mut TensorViewMut,
    lse: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let options = Options { scale, softcap, causal: true, ..Options::default() };
    let (k, v) = (k.into(), v.into());
    let whole = Problem::new(q, k, v, options)?;
    check_outputs(&whole, out, lse)?;
    let Problem { batch, query_heads, queries, keys, .. } = whole;
    if selector_head >= query_heads {
        return Err(Error::value("selector_head", selector_head, format!("a head below {query_heads}")));
    }
    if queries > keys {
        return Err(Error::value("q", format!("{queries} queries"), format!("at most the {keys} keys")));
    }
    if selected.len() != batch * keys {
        return Err(Error::value("state", format!("{} numbers", selected.len()), format!("[{batch}, {keys}]")));
    }
    let isa = simd::current();
    let mut strip = vec![0f32; queries.min(QUERY_ROWS) * keys];
    for (b, selected) in selected.chunks_exact_mut(keys.max(1)).enumerate() {
        let selected = TensorViewMut::new(selected, [1, 1, 1, keys])?;
        for first in (0..queries).step_by(QUERY_ROWS) {
            let rows = first..(first + QUERY_ROWS).min(queries);
            let seen = keys - queries + rows.end;
            let ids: Vec<_> = rows.clone().map(|row| RowId { batch: b, head: selector_head, row }).collect();
            let biases = TensorViewMut::new(&mut strip[..rows.len() * seen], [1, 1, rows.len(), seen])?;
            for_each(execution, seen.div_ceil(PIECE), |piece| {
                let keys = piece * PIECE..((piece + 1) * PIECE).min(seen);
                let problem = &whole;
                with_scratch(|scratch| {
                    let item = Select {
                        problem,
                        ids: &ids,
                        keys,
                        protect_first,
                        biases: &biases,
                        selected: &selected,
                        scratch,
                    };
                    dispatch(isa, item);
                });
            })?;
            let bias = &strip[..rows.len() * seen];
            let bias = Broadcast::new(bias, [1, 1, rows.len(), seen])?;
            let (q, k, v) = (q.batch(b).rows(rows.clone()), k.batch(b).rows(0..seen), v.batch(b).rows(0..seen));
            let problem = Problem::new(q, k, v, Options { bias: Some(bias), ..options })?;
            let (out, lse) = (out.batch(b), lse.batch(b));
            run(isa, &[Job::new(problem, &out.rows(rows.clone()), &lse.rows(rows))], execution)?;
        }
    }
    Ok(())
}

/// Biases of a block of rows for a range of keys, and what the rows select of them.
struct Select<'a, 's> {
    problem: &'a Problem<'a>,
    ids: &'a [RowId],
    keys: Range<usize>,
    protect_first: usize,
    biases: &'a TensorViewMut<'a>,
    selected: &'a TensorViewMut<'a>,
    scratch: &'s mut Scratch,
}

impl Kernel for Select<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { problem, ids, keys, protect_first, biases, selected, scratch } = self;
        let Scratch { queries, keys: packed, scores, extra, .. } = scratch;
        let tile = LogitTile::load(s, problem, ids, queries);
        let (width, scores) = (tile.width(), scores.take(tile.room::<S>()));
        for start in keys.clone().step_by(width) {
            let block = start..(start + width).min(keys.end);
            let seen = tile.logits(s, block.clone(), packed, extra, scores).is_some();
            // SAFETY: the keys of the block are among those of `selected`, and no other item touches them.
            let selected =
                unsafe { std::slice::from_raw_parts_mut(selected.row_ptr::<f32>(0, 0, 0).add(start), block.len()) };
            for (r, id) in ids.iter().enumerate() {
                // SAFETY: as above, for a row of the biases.
                let biases =
                    unsafe { std::slice::from_raw_parts_mut(biases.row_ptr::<f32>(0, 0, r).add(start), block.len()) };
                biases.iter_mut().zip(&*selected).for_each(|(bias, f)| *bias = -f);
                // All keys before the row's own but the protected ones.
                let end = (problem.position(id.row).max(0) as usize).clamp(start, block.end) - start;
                let first = protect_first.clamp(start, block.end) - start;
                if seen && first < end {
                    let logits = &scores[r * width..];
                    for (f, &x) in selected[first..end].iter_mut().zip(&logits[first..end]) {
                        // NaN stays NaN.
                        *f += if x < 0.0 { 0.0 } else { x };
                    }
                }
            }
        }
    }
}
