//! Attention over windows of a grid, in one to three dimensions.
//!
//! ```text
//! queries of one dilation group, a box of the grid         -> tiles (tiles.rs), whose windows overlap
//! tiles x KV heads                                          -> items, run by the pool
//! keys of the box around a tile's windows, packed once      -> dense kernels; what a row does not see is hidden
//! ```
//! Tiles depend on shapes only, so results do not depend on the number of threads.

mod backward;
mod spread;
mod tiles;
mod unfused;

pub use backward::neighbourhood_backward;
pub use spread::neighbourhood_spread;
pub use unfused::{neighbourhood_scores, neighbourhood_values};

use crate::dense::grid::{Grid, Patch};
use crate::dense::keys::{Keys, List};
use crate::dense::run::Job;
use crate::dense::scores::RowId;
use crate::dense::scratch::with_scratch;
use crate::dense::tile::QUERY_ROWS;
use crate::dense::turns::Share;
use crate::dense::{Item, Options, Problem, check_outputs};
use crate::parallel::{Execution, for_each};
use crate::simd::{self, dispatch};
use crate::tensor::{Error, Result, TensorView, TensorViewMut};
use std::ops::Range;
use tiles::Tiles;

/// Options that make no sense on a grid.
fn check_options(options: &Options) -> Result<()> {
    let Options { causal, window_left, window_right, .. } = *options;
    if options.looks_at_keys() || causal || window_left.is_some() || window_right.is_some() || options.qk_int8 {
        let expected = "none of causal, window, bias, mask, slopes, segments, visible_until and qk_int8";
        return Err(Error::value("options", "one that looks at positions in a sequence", expected));
    }
    Ok(())
}

/// The query heads of one KV head that go together, at most `most`.
fn head_ranges(problem: &Problem, most: usize) -> Vec<Range<usize>> {
    let group = problem.group.max(1);
    let size = group.div_ceil(group.div_ceil(most));
    let cut = |first: usize| first..(first + size).min(first / group * group + group);
    (0..problem.kv_heads).flat_map(|head| (head * group..(head + 1) * group).step_by(size)).map(cut).collect()
}

/// Query heads of one KV head and batch entry that share a grid, at most as many as an item has rows.
struct Unit {
    batch: usize,
    heads: Range<usize>,
    grid: usize,
    /// Which of the ways to cut grids.
    tiles: usize,
    /// Number of its first item.
    first: usize,
}

/// How grids of heads are cut into items, those of a KV head one after another.
struct Plan<'a> {
    grids: &'a [Grid<'a>],
    /// Grid and heads that go together of each way to cut.
    cuts: Vec<(usize, usize, Tiles)>,
    units: Vec<Unit>,
    items: usize,
}

impl<'a> Plan<'a> {
    /// Items of at most `rows` rows, for numbers of `dims` (keys' and values' together). `of_heads` names the grid of each batch
    /// entry and query head; without it all have the first.
    fn new(
        problem: &Problem,
        grids: &'a [Grid<'a>],
        of_heads: Option<&[u32]>,
        rows: usize,
        dims: usize,
    ) -> Result<Self> {
        for grid in grids {
            grid.check([problem.batch, problem.query_heads, problem.queries, problem.keys])?;
        }
        let pairs = problem.batch * problem.query_heads;
        if of_heads.is_some_and(|of| of.len() != pairs || of.iter().any(|&g| g as usize >= grids.len())) {
            return Err(Error::value("of_heads", "other numbers", format!("{pairs} below {}", grids.len())));
        }
        if grids.is_empty() {
            return Err(Error::value("grids", "none", "at least one"));
        }
        let mut plan = Self { grids, cuts: Vec::new(), units: Vec::new(), items: 0 };
        if problem.queries == 0 || problem.query_heads == 0 {
            return Ok(plan);
        }
        let grid_of =
            |batch: usize, head: usize| of_heads.map_or(0, |of| of[batch * problem.query_heads + head] as usize);
        for batch in 0..problem.batch {
            for all in head_ranges(problem, rows) {
                let mut start = all.start;
                while start < all.end {
                    let grid = grid_of(batch, start);
                    let end = (start..all.end).find(|&head| grid_of(batch, head) != grid).unwrap_or(all.end);
                    let width = end - start;
                    let known = plan.cuts.iter().position(|&(g, w, _)| (g, w) == (grid, width));
                    let tiles = known.unwrap_or_else(|| {
                        plan.cuts.push((grid, width, Tiles::new(&grids[grid], width, rows / width, dims)));
                        plan.cuts.len() - 1
                    });
                    plan.units.push(Unit { batch, heads: start..end, grid, tiles, first: plan.items });
                    plan.items += plan.cuts[tiles].2.len();
                    start = end;
                }
            }
        }
        Ok(plan)
    }

    /// Rows and keys of an item.
    fn item(&self, item: usize) -> (Vec<RowId>, Patch<'_>) {
        let unit = &self.units[self.units.partition_point(|unit| unit.first <= item) - 1];
        let (rows, patch) = self.cuts[unit.tiles].2.rows(&self.grids[unit.grid], item - unit.first);
        (row_ids(&rows, unit.batch, &unit.heads), patch)
    }

    /// Number of the first item of each batch entry and KV head, and of all items.
    fn bounds(&self, problem: &Problem) -> Vec<usize> {
        let first = |pair: usize| {
            let (batch, head) = (pair / problem.kv_heads, pair % problem.kv_heads * problem.group);
            let unit = self.units.partition_point(|unit| (unit.batch, unit.heads.start) < (batch, head));
            self.units.get(unit).map_or(self.items, |unit| unit.first)
        };
        (0..=problem.batch * problem.kv_heads).map(first).collect()
    }
}

/// Softmax attention of queries on grids over the window of keys that each sees.
///
/// `q` is `[batch, query heads, queries, dim]`, queries numbered with the last axis of the grid fastest, `k` and `v`
/// `[batch, kv heads, keys, dim or value_dim]` likewise; `out` and `lse` as in [`attention`](crate::dense::attention). `of_heads`
/// names the grid of each batch entry and query head, `[batch, query heads]`; without it all have the first. Of `options`, only
/// scales, `softcap`, `sinks`, `skip_threshold` and `state` may be set.
pub fn neighbourhood(
    q: TensorView,
    k: TensorView,
    v: TensorView,
    grids: &[Grid],
    of_heads: Option<&[u32]>,
    options: Options,
    out: &mut TensorViewMut,
    lse: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let problem = Problem::new(q, k.into(), v.into(), options)?;
    check_options(&options)?;
    check_outputs(&problem, out, lse)?;
    let plan = Plan::new(&problem, grids, of_heads, QUERY_ROWS, problem.dim + problem.value_dim)?;
    let isa = simd::current();
    let job = Job::new(problem.on(isa), out, lse);
    for_each(execution, plan.items, |i| {
        let (ids, patch) = plan.item(i);
        let visible = visible_of(&patch, &ids);
        let keys = Keys::Patch(&patch);
        let list = List { index: patch.index(), bias: None, visible: &visible, patch: Some(&patch) };
        let finish = Some((&job, &keys));
        let (problem, ids, keys) = (&job.problem, &ids, 0..patch.index().len());
        with_scratch(|scratch| {
            dispatch(isa, Item { problem, shares: &[Share { ids, keys, list: Some(list), finish }], scratch })
        });
    })
}

/// The rows of some queries and heads, heads of a query one after another.
fn row_ids(rows: &[u32], batch: usize, heads: &Range<usize>) -> Vec<RowId> {
    let of_row = |&row: &u32| heads.clone().map(move |head| RowId { batch, head, row: row as usize });
    rows.iter().flat_map(of_row).collect()
}

/// What each row sees of a patch, from the first key to the last.
fn visible_of(patch: &Patch, ids: &[RowId]) -> Vec<Range<usize>> {
    ids.iter().map(|id| patch.visible(id.row)).collect()
}

#[cfg(test)]
mod tests;
