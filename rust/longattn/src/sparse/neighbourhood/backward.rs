//! Gradients of attention over windows of a grid.

use super::tiles::Tiles;
use super::{check_options, head_ranges, row_ids};
use crate::dense::backward::{ListedTile, ROWS, listed_backward};
use crate::dense::grid::Grid;
use crate::dense::keys::Keys;
use crate::dense::{Forward, Gradients, Problem};
use crate::parallel::Execution;
use crate::tensor::{Error, Result};
use std::ops::Range;

/// Gradients of [`neighbourhood`](super::neighbourhood); `d_table`, if any, gets that of the grid's bias table.
///
/// `forward.out` and `forward.lse` may be those over more keys than the grid's, whose gradients are then computed elsewhere.
pub fn neighbourhood_backward(
    forward: Forward,
    grid: &Grid,
    gradients: &mut Gradients,
    d_table: Option<&mut [f32]>,
    execution: &Execution,
) -> Result<()> {
    let problem = Problem::new(forward.q, forward.k.into(), forward.v.into(), forward.options)?;
    check_options(&forward.options)?;
    grid.check([problem.batch, problem.query_heads, problem.queries, problem.keys])?;
    if let Some(d_table) = &d_table {
        let expected = grid.bias.and_then(|bias| bias.table).map_or(0, <[f32]>::len);
        if d_table.len() != expected {
            return Err(Error::value("d_bias", format!("{} numbers", d_table.len()), expected));
        }
    }
    let heads = head_ranges(&problem, ROWS);
    // Heads are in order, those of a KV head one after another.
    let per_kv_head = heads.len() / problem.kv_heads.max(1);
    let width = heads.iter().map(Range::len).max().unwrap_or(1);
    let tiles = match problem.queries {
        0 => return Err(Error::value("q", "no queries", "at least one")),
        _ => Tiles::new(grid, width, ROWS / width, 2 * (problem.dim + problem.value_dim)),
    };
    let visit = |[batch, kv_head]: [usize; 2], i: usize, with: &mut dyn FnMut(ListedTile)| {
        let (rows, patch) = tiles.rows(grid, i / per_kv_head);
        let ids = row_ids(&rows, batch, &heads[kv_head * per_kv_head + i % per_kv_head]);
        with(ListedTile { ids: &ids, keys: &Keys::Patch(&patch) });
    };
    listed_backward(forward, gradients, d_table, tiles.len() * per_kv_head, &visit, execution)
}
