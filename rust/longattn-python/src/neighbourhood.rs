//! Attention over windows of a grid.

use crate::arrays::{lse_view, view, view_mut};
use crate::backward::{BACKWARD, GivenForward, GivenGradients, forward, gradients};
use crate::errors::to_py;
use crate::options::Given;
use crate::running;
use longattn::dense::{Axis, Grid, GridBias, Interval};
use longattn::sparse;
use longattn::tensor::{Error, TensorView};
use numpy::{PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArrayDyn, PyReadwriteArray1, PyUntypedArray};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Keys, dilation and step of an axis, and `[group, start, end, position]` of each query along it.
type GivenAxis<'py> = (usize, usize, usize, PyReadonlyArray2<'py, u32>);

/// Entries along each axis and those of distance 0; the table, and the numbers by axis.
type GivenBias<'py> =
    ([usize; 3], [usize; 3], Option<PyReadonlyArrayDyn<'py, f32>>, Option<[PyReadonlyArray1<'py, f32>; 3]>);

/// Keeps the arrays that a grid is made of.
struct Tables<'py> {
    axes: [GivenAxis<'py>; 3],
    intervals: [Vec<Interval>; 3],
    bias: Option<GivenBias<'py>>,
}

/// Rows of four numbers.
fn intervals(rows: &PyReadonlyArray2<'_, u32>) -> PyResult<Vec<Interval>> {
    let (rows, []) = rows.as_slice()?.as_chunks::<4>() else {
        return Err(to_py(Error::value("grid", "rows of another length", "four numbers each")));
    };
    Ok(rows.iter().map(|&[group, start, end, position]| Interval { group, start, end, position }).collect())
}

impl<'py> Tables<'py> {
    fn new(axes: [GivenAxis<'py>; 3], bias: Option<GivenBias<'py>>) -> PyResult<Self> {
        let mut found = [const { Vec::new() }; 3];
        for (to, (.., rows)) in found.iter_mut().zip(&axes) {
            *to = intervals(rows)?;
        }
        Ok(Self { axes, intervals: found, bias })
    }

    fn grid(&self) -> PyResult<Grid<'_>> {
        let axis = |a: usize| {
            let (keys, dilation, step, _) = self.axes[a];
            Axis { keys, dilation, step, queries: &self.intervals[a] }
        };
        let bias = match &self.bias {
            None => None,
            Some((sizes, zeros, table, by_axis)) => {
                let table = table.as_ref().map(|table| table.as_slice()).transpose()?;
                let by_axis = match by_axis {
                    None => None,
                    Some([z, y, x]) => Some([z.as_slice()?, y.as_slice()?, x.as_slice()?]),
                };
                Some(GridBias { sizes: *sizes, zeros: *zeros, table, by_axis })
            }
        };
        Ok(Grid { axes: [axis(0), axis(1), axis(2)], bias })
    }

    /// Multiply-adds of two products over all that queries see, `dims` numbers in both together.
    fn operations(&self, q: &TensorView, dims: usize) -> f64 {
        let seen = |rows: &Vec<Interval>| rows.iter().map(|x| f64::from(x.end.saturating_sub(x.start))).sum::<f64>();
        let [batch, heads, ..] = q.shape().map(|n| n as f64);
        batch * heads * self.intervals.iter().map(seen).product::<f64>() * dims as f64
    }
}

#[pyfunction]
pub(crate) fn neighbourhood<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyUntypedArray>,
    k: &Bound<'py, PyUntypedArray>,
    v: &Bound<'py, PyUntypedArray>,
    out: &Bound<'py, PyUntypedArray>,
    lse: &Bound<'py, PyUntypedArray>,
    axes: [GivenAxis<'py>; 3],
    bias: Option<GivenBias<'py>>,
    options: &Bound<'py, PyDict>,
) -> PyResult<()> {
    let (q, k, v) = (view("q", q)?, view("k", k)?, view("v", v)?);
    let (mut out, mut lse) = (view_mut("out", out)?, lse_view("lse", lse)?);
    let tables = Tables::new(axes, bias)?;
    let grid = [tables.grid()?];
    let given = Given::new(options)?;
    let options = given.options()?;
    running::run(py, tables.operations(&q, k.shape()[3] + v.shape()[3]), |execution| {
        sparse::neighbourhood(q, k, v, &grid, None, options, &mut out, &mut lse, execution)
    })
}

#[pyfunction]
pub(crate) fn neighbourhood_scores<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyUntypedArray>,
    k: &Bound<'py, PyUntypedArray>,
    scores: &Bound<'py, PyUntypedArray>,
    axes: [GivenAxis<'py>; 3],
    bias: Option<GivenBias<'py>>,
    sizes: [usize; 3],
    options: &Bound<'py, PyDict>,
) -> PyResult<()> {
    let (q, k) = (view("q", q)?, view("k", k)?);
    let mut scores = view_mut("scores", scores)?;
    let tables = Tables::new(axes, bias)?;
    let grid = tables.grid()?;
    let given = Given::new(options)?;
    let options = given.options()?;
    running::run(py, tables.operations(&q, k.shape()[3]), |execution| {
        sparse::neighbourhood_scores(q, k, &grid, sizes, options, &mut scores, execution)
    })
}

#[pyfunction]
pub(crate) fn neighbourhood_values<'py>(
    py: Python<'py>,
    weights: &Bound<'py, PyUntypedArray>,
    v: &Bound<'py, PyUntypedArray>,
    out: &Bound<'py, PyUntypedArray>,
    axes: [GivenAxis<'py>; 3],
    sizes: [usize; 3],
) -> PyResult<()> {
    let (weights, v) = (view("weights", weights)?, view("v", v)?);
    let mut out = view_mut("out", out)?;
    let tables = Tables::new(axes, None)?;
    let grid = tables.grid()?;
    running::run(py, tables.operations(&weights, v.shape()[3]), |execution| {
        sparse::neighbourhood_values(weights, v, &grid, sizes, &mut out, execution)
    })
}

#[pyfunction]
pub(crate) fn neighbourhood_spread<'py>(
    py: Python<'py>,
    weights: &Bound<'py, PyUntypedArray>,
    rows: &Bound<'py, PyUntypedArray>,
    out: &Bound<'py, PyUntypedArray>,
    mut d_bias: Option<PyReadwriteArray1<'py, f32>>,
    axes: [GivenAxis<'py>; 3],
    bias: Option<GivenBias<'py>>,
    sizes: [usize; 3],
    factor: f32,
) -> PyResult<()> {
    let (weights, rows) = (view("weights", weights)?, view("rows", rows)?);
    let mut out = view_mut("out", out)?;
    let d_bias = d_bias.as_mut().map(|a| a.as_slice_mut()).transpose()?;
    let tables = Tables::new(axes, bias)?;
    let grid = tables.grid()?;
    running::run(py, tables.operations(&weights, rows.shape()[3]), |execution| {
        sparse::neighbourhood_spread(weights, rows, &grid, sizes, factor, &mut out, d_bias, execution)
    })
}

#[pyfunction]
pub(crate) fn neighbourhood_backward<'py>(
    py: Python<'py>,
    arrays: GivenForward<'py>,
    results: GivenGradients<'py>,
    mut d_sinks: Option<PyReadwriteArray1<'py, f32>>,
    mut d_bias: Option<PyReadwriteArray1<'py, f32>>,
    axes: [GivenAxis<'py>; 3],
    bias: Option<GivenBias<'py>>,
    options: &Bound<'py, PyDict>,
) -> PyResult<()> {
    let given = Given::<f32>::new(options)?;
    let forward = forward(&arrays, given.options()?)?;
    let mut gradients = gradients(&results, d_sinks.as_mut().map(|a| a.as_slice_mut()).transpose()?)?;
    let d_bias = d_bias.as_mut().map(|a| a.as_slice_mut()).transpose()?;
    let tables = Tables::new(axes, bias)?;
    let grid = [tables.grid()?];
    let operations = BACKWARD * tables.operations(&forward.q, forward.k.shape()[3] + forward.v.shape()[3]);
    running::run(py, operations, |execution| {
        sparse::neighbourhood_backward(forward, &grid, None, &mut gradients, d_bias, execution)
    })
}

/// Ranges of keys, `[group 0, start, end, position]` of each query, and which of them each batch entry and head has.
type GivenRanges<'py> = (Vec<PyReadonlyArray2<'py, u32>>, PyReadonlyArray1<'py, u32>);

/// Calls `with` with the grids of one axis that ranges are, which of them each head has, and multiply-adds of two products over all
/// that queries see.
fn with_ranges<R>(
    given: &GivenRanges<'_>,
    q: &TensorView,
    keys: usize,
    dims: usize,
    with: impl FnOnce(&[Grid], &[u32], f64) -> PyResult<R>,
) -> PyResult<R> {
    let rows = given.0.iter().map(intervals).collect::<PyResult<Vec<_>>>()?;
    let axis = |rows| Axis { keys, dilation: 1, step: 1, queries: rows };
    let grids: Vec<Grid> =
        rows.iter().map(|rows| Grid { axes: [Axis::NONE, Axis::NONE, axis(rows)], bias: None }).collect();
    let seen: f64 = rows.iter().flatten().map(|x| f64::from(x.end.saturating_sub(x.start))).sum();
    let [batch, heads, ..] = q.shape().map(|n| n as f64);
    with(&grids, given.1.as_slice()?, seen / (rows.len().max(1) as f64) * batch * heads * dims as f64)
}

/// Attention of every query to a range of keys.
#[pyfunction]
pub(crate) fn windowed<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyUntypedArray>,
    k: &Bound<'py, PyUntypedArray>,
    v: &Bound<'py, PyUntypedArray>,
    out: &Bound<'py, PyUntypedArray>,
    lse: &Bound<'py, PyUntypedArray>,
    ranges: GivenRanges<'py>,
    options: &Bound<'py, PyDict>,
) -> PyResult<()> {
    let (q, k, v) = (view("q", q)?, view("k", k)?, view("v", v)?);
    let (mut out, mut lse) = (view_mut("out", out)?, lse_view("lse", lse)?);
    let given = Given::new(options)?;
    let options = given.options()?;
    with_ranges(&ranges, &q, k.shape()[2], k.shape()[3] + v.shape()[3], |grids, of_heads, operations| {
        running::run(py, operations, |execution| {
            sparse::neighbourhood(q, k, v, grids, Some(of_heads), options, &mut out, &mut lse, execution)
        })
    })
}

#[pyfunction]
pub(crate) fn windowed_backward<'py>(
    py: Python<'py>,
    arrays: GivenForward<'py>,
    results: GivenGradients<'py>,
    mut d_sinks: Option<PyReadwriteArray1<'py, f32>>,
    ranges: GivenRanges<'py>,
    options: &Bound<'py, PyDict>,
) -> PyResult<()> {
    let given = Given::<f32>::new(options)?;
    let forward = forward(&arrays, given.options()?)?;
    let mut gradients = gradients(&results, d_sinks.as_mut().map(|a| a.as_slice_mut()).transpose()?)?;
    let (q, keys, dims) = (forward.q, forward.k.shape()[2], forward.k.shape()[3] + forward.v.shape()[3]);
    with_ranges(&ranges, &q, keys, dims, |grids, of_heads, operations| {
        running::run(py, BACKWARD * operations, |execution| {
            sparse::neighbourhood_backward(forward, grids, Some(of_heads), &mut gradients, None, execution)
        })
    })
}
