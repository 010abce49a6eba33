//! Gradients of attention over windows of a grid.

use super::{Plan, check_options};
use crate::dense::backward::{ListedTile, ROWS, listed_backward, store_sinks};
use crate::dense::grid::Grid;
use crate::dense::keys::Keys;
use crate::dense::{Forward, Gradients, Problem};
use crate::parallel::Execution;
use crate::tensor::{Error, Result};

/// Gradients of [`neighbourhood`](super::neighbourhood), with its `grids` and `of_heads`; `d_table`, if any, gets that of the bias
/// table of the only grid.
///
/// `forward.out` and `forward.lse` may be those over more keys than the grid's, whose gradients are then computed elsewhere.
pub fn neighbourhood_backward(
    forward: Forward,
    grids: &[Grid],
    of_heads: Option<&[u32]>,
    gradients: &mut Gradients,
    d_table: Option<&mut [f32]>,
    execution: &Execution,
) -> Result<()> {
    let problem = Problem::new(forward.q, forward.k.into(), forward.v.into(), forward.options)?;
    check_options(&forward.options)?;
    if let Some(d_table) = &d_table {
        let bias = if let [grid] = grids { grid.bias } else { None };
        let expected = bias.and_then(|bias| bias.table).map_or(0, <[f32]>::len);
        if d_table.len() != expected {
            return Err(Error::value("d_bias", format!("{} numbers", d_table.len()), expected));
        }
    }
    let plan = Plan::new(&problem, grids, of_heads, ROWS, 2 * (problem.dim + problem.value_dim))?;
    if problem.queries == 0 {
        return Err(Error::value("q", "no queries", "at least one"));
    }
    let bounds = plan.bounds(&problem);
    let visit = |[batch, kv_head]: [usize; 2], i: usize, with: &mut dyn FnMut(ListedTile)| {
        let (ids, patch) = plan.item(bounds[batch * problem.kv_heads + kv_head] + i);
        with(ListedTile { ids: &ids, keys: &Keys::Patch(&patch) });
    };
    let tiles: Vec<usize> = bounds.windows(2).map(|x| x[1] - x[0]).collect();
    let d_sinks = listed_backward(forward, gradients, d_table, &tiles, &visit, execution)?;
    store_sinks(gradients, &d_sinks);
    Ok(())
}
