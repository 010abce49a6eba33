//! Logits of many query rows over all keys, for what chooses by them: whole rows, or marks of what reaches a threshold.

use crate::dense::Problem;
use crate::dense::logits::LogitTile;
use crate::dense::scores::RowId;
use crate::dense::scratch::{Scratch, with_scratch};
use crate::dense::tile::QUERY_ROWS;
use crate::parallel::{Execution, map};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Error, Result};
use std::ops::Range;

/// What is made of a row of logits. `row` must be `#[inline(always)]`.
pub(super) trait RowWork: Sync {
    type Output: Send;
    /// `logits` has one number per key, minus infinity where the row does not see it.
    fn row<S: Simd>(&self, s: S, id: RowId, logits: &[f32]) -> Self::Output;
}

/// Logits that one item holds, unless a single tile needs more.
const ROOM: usize = 1 << 20;

/// Applies `work` to the logits of every query row; results are `[batch, query heads, queries]`.
pub(super) fn map_rows<W: RowWork>(problem: &Problem, work: &W, execution: &Execution) -> Result<Vec<W::Output>> {
    let (isa, rows) = (simd::current(), problem.queries * problem.group);
    let step = (ROOM / problem.keys.max(1)).clamp(12, QUERY_ROWS);
    let tiles = rows.div_ceil(step);
    let heads = problem.batch * problem.kv_heads;
    let parts = map(execution, heads * tiles, |i| {
        let (tile, head) = (i % tiles, i / tiles);
        let ids: Vec<RowId> = (tile * step..((tile + 1) * step).min(rows))
            .map(|r| problem.id(head / problem.kv_heads, head % problem.kv_heads, r))
            .collect();
        with_scratch(|scratch| dispatch(isa, WholeRows { problem, ids: &ids, work, scratch }))
    })?;
    let mut all: Vec<Option<W::Output>> = (0..heads * rows).map(|_| None).collect();
    for (i, part) in parts.into_iter().enumerate() {
        let (tile, head) = (i % tiles, i / tiles);
        for (r, output) in part.into_iter().enumerate() {
            let r = tile * step + r;
            let head = head * problem.group + r % problem.group;
            all[head * problem.queries + r / problem.group] = Some(output);
        }
    }
    Ok(all.into_iter().flatten().collect())
}

struct WholeRows<'a, 's, W> {
    problem: &'a Problem<'a>,
    ids: &'a [RowId],
    work: &'a W,
    scratch: &'s mut Scratch,
}

impl<W: RowWork> Kernel for WholeRows<'_, '_, W> {
    type Output = Vec<W::Output>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let Self { problem, ids, work, scratch } = self;
        let keys = problem.keys;
        let Scratch { queries, keys: packed, scores, extra, outputs, .. } = scratch;
        let rows = outputs.take(ids.len() * keys);
        let tile = LogitTile::load(s, problem, ids, queries);
        let (width, scores) = (tile.width(), scores.take(tile.room::<S>()));
        for start in (0..keys).step_by(width) {
            let block = start..(start + width).min(keys);
            let seen = tile.logits(s, block.clone(), packed, extra, scores).is_some();
            for r in 0..ids.len() {
                let to = &mut rows[r * keys..][block.clone()];
                if seen {
                    to.copy_from_slice(&scores[r * width..][..block.len()]);
                } else {
                    to.fill(f32::NEG_INFINITY);
                }
            }
        }
        let mut done = Vec::with_capacity(ids.len());
        for (r, &id) in ids.iter().enumerate() {
            done.push(work.row(s, id, &rows[r * keys..(r + 1) * keys]));
        }
        done
    }
}

/// Marks each of `keys` whose logit reaches the threshold of some row.
pub(super) struct Mark<'a, 's> {
    pub(super) problem: &'a Problem<'a>,
    /// Of one KV head.
    pub(super) ids: &'a [RowId],
    /// One for each of `ids`.
    pub(super) thresholds: &'a [f32],
    pub(super) keys: Range<usize>,
    pub(super) scratch: &'s mut Scratch,
}

impl Kernel for Mark<'_, '_> {
    type Output = Vec<u8>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<u8> {
        let Self { problem, ids, thresholds, keys, scratch } = self;
        let mut marks = vec![0u8; keys.len()];
        for (ids, thresholds) in ids.chunks(QUERY_ROWS).zip(thresholds.chunks(QUERY_ROWS)) {
            let Scratch { queries, keys: packed, scores, extra, .. } = &mut *scratch;
            let tile = LogitTile::load(s, problem, ids, queries);
            let (width, scores) = (tile.width(), scores.take(tile.room::<S>()));
            for start in keys.clone().step_by(width) {
                let block = start..(start + width).min(keys.end);
                if tile.logits(s, block.clone(), packed, extra, scores).is_none() {
                    continue;
                }
                let marks = &mut marks[start - keys.start..block.end - keys.start];
                for (r, &threshold) in thresholds.iter().enumerate() {
                    for (mark, &logit) in marks.iter_mut().zip(&scores[r * width..]) {
                        *mark |= u8::from(logit >= threshold);
                    }
                }
            }
        }
        marks
    }
}

/// Lists one after another, and where each begins.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Where lists begin in `indices`, and the end.
    pub indptr: Vec<i64>,
    /// Their numbers, ascending in each.
    pub indices: Vec<u32>,
}

impl Selection {
    /// Whether lists begin and end where there are numbers, and ascend.
    pub(super) fn check(&self, name: &'static str) -> Result<()> {
        let end = self.indices.len() as i64;
        let fits = self.indptr.first() == Some(&0) && self.indptr.last() == Some(&end) && self.indptr.is_sorted();
        if fits && (0..self.indptr.len() - 1).all(|i| self.list(i).is_sorted()) {
            return Ok(());
        }
        Err(Error::value(name, format!("{} bounds", self.indptr.len()), "bounds of ascending lists"))
    }

    /// List `i`.
    pub(super) fn list(&self, i: usize) -> &[u32] {
        &self.indices[self.indptr[i] as usize..self.indptr[i + 1] as usize]
    }
}

impl FromIterator<Vec<u32>> for Selection {
    fn from_iter<I: IntoIterator<Item = Vec<u32>>>(lists: I) -> Self {
        let mut made = Self { indptr: vec![0], indices: Vec::new() };
        for list in lists {
            made.indices.extend(list);
            made.indptr.push(made.indices.len() as i64);
        }
        made
    }
}
