//! What chooses keys for sparse attention. Lists come back as `(indptr, indices)`, one after another.

use crate::arrays::view;
use crate::dense::offsets;
use crate::options::Given;
use crate::running;
use longattn::parallel::Execution;
use longattn::sparse::{
    self, BlockMass, Choice, ChunkKeys, HashLists, HashOrder, PooledBlocks, RoundedBlocks, Selection,
};
use longattn::tensor::{Error, Result, TensorView};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1, PyUntypedArray};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::ops::Range;

type Floats<'py> = Bound<'py, PyArray1<f32>>;
type Arrays<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<u32>>);

fn arrays(py: Python<'_>, selection: Selection) -> Arrays<'_> {
    (selection.indptr.into_pyarray(py), selection.indices.into_pyarray(py))
}

fn products(q: &TensorView, k: &TensorView) -> f64 {
    let ([b, h, l, d], keys) = (q.shape(), k.shape()[2]);
    [b, h, l, d, keys].iter().map(|&n| n as f64).product()
}

/// Lists that `work` makes of queries and keys, in `share` of the time of their products.
fn select<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyUntypedArray>,
    k: &Bound<'py, PyUntypedArray>,
    share: f64,
    work: impl FnOnce(TensorView, TensorView, &Execution) -> Result<Selection> + Send,
) -> PyResult<Arrays<'py>> {
    let (q, k) = (view("q", q)?, view("k", k)?);
    let chosen = running::run(py, share * products(&q, &k), |execution| work(q, k, execution))?;
    Ok(arrays(py, chosen))
}

fn ranges(name: &'static str, starts: &[usize], ends: &[usize]) -> Result<Vec<Range<usize>>> {
    if starts.len() != ends.len() || starts.iter().zip(ends).any(|(start, end)| start > end) {
        return Err(Error::value(name, format!("{} starts, {} ends", starts.len(), ends.len()), "ranges"));
    }
    Ok(starts.iter().zip(ends).map(|(&start, &end)| start..end).collect())
}

/// Means `[batch * heads * blocks * dim]`, and likenesses `[batch * heads * blocks]` or nothing.
#[pyfunction]
pub(crate) fn block_means<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyUntypedArray>,
    bounds: PyReadonlyArray1<'py, i64>,
    centre: Option<PyReadonlyArray1<'py, f32>>,
    likeness: bool,
) -> PyResult<(Floats<'py>, Floats<'py>)> {
    let x = view("x", x)?;
    let bounds = offsets("bounds", &bounds)?;
    let centre = centre.as_ref().map(|c| c.as_slice()).transpose()?;
    let [batch, heads, _, dim] = x.shape();
    let blocks = batch * heads * bounds.len().saturating_sub(1);
    let (mut means, mut likes) = (vec![0f32; blocks * dim], vec![0f32; if likeness { blocks } else { 0 }]);
    let to = likeness.then_some(likes.as_mut_slice());
    running::run(py, 0.0, |execution: &Execution| sparse::block_means(x, &bounds, centre, &mut means, to, execution))?;
    Ok((means.into_pyarray(py), likes.into_pyarray(py)))
}

/// Mean distances `[batch * heads * blocks * dim]` of rows from their blocks' means.
#[pyfunction]
pub(crate) fn block_deviations<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyUntypedArray>,
    bounds: PyReadonlyArray1<'py, i64>,
    means: PyReadonlyArray1<'py, f32>,
) -> PyResult<Floats<'py>> {
    let (x, bounds, means) = (view("x", x)?, offsets("bounds", &bounds)?, means.as_slice()?);
    let found = running::run(py, 0.0, |execution| sparse::block_deviations(x, &bounds, means, execution))?;
    Ok(found.into_pyarray(py))
}

#[pyfunction]
pub(crate) fn listed_means<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyUntypedArray>,
    bounds: PyReadonlyArray1<'py, i64>,
    indices: PyReadonlyArray1<'py, u32>,
) -> PyResult<Floats<'py>> {
    let x = view("x", x)?;
    let (bounds, indices) = (offsets("bounds", &bounds)?, indices.as_slice()?);
    let [batch, heads, _, dim] = x.shape();
    let mut means = vec![0f32; batch * heads * bounds.len().saturating_sub(1) * dim];
    running::run(py, 0.0, |execution: &Execution| sparse::listed_means(x, &bounds, indices, &mut means, execution))?;
    Ok(means.into_pyarray(py))
}

#[pyfunction]
pub(crate) fn pooled_blocks<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyUntypedArray>,
    k: &Bound<'py, PyUntypedArray>,
    scale: f32,
    whole_rows: PyReadonlyArray1<'py, bool>,
    always: PyReadonlyArray1<'py, bool>,
    limits: PyReadonlyArray1<'py, i64>,
    share: PyReadonlyArray1<'py, f32>,
    by_count: bool,
    sinks: usize,
) -> PyResult<Arrays<'py>> {
    let limits = offsets("limits", &limits)?;
    let (whole_rows, always, share) = (whole_rows.as_slice()?, always.as_slice()?, share.as_slice()?);
    let blocks = PooledBlocks { whole_rows, always, limits: &limits, share, by_count, sinks };
    select(py, q, k, 1.0, |q, k, execution| sparse::pooled_blocks(q, k, scale, blocks, execution))
}

#[pyfunction]
pub(crate) fn best_of_rows<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyUntypedArray>,
    k: &Bound<'py, PyUntypedArray>,
    share: f64,
    least: usize,
    options: &Bound<'py, PyDict>,
) -> PyResult<Arrays<'py>> {
    let given = Given::new(options)?;
    let options = given.options()?;
    select(py, q, k, 1.0, |q, k, execution| sparse::best_of_rows(q, k, options, share, least, execution))
}

#[pyfunction]
pub(crate) fn chunk_keys<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyUntypedArray>,
    k: &Bound<'py, PyUntypedArray>,
    bounds: PyReadonlyArray1<'py, i64>,
    limits: PyReadonlyArray1<'py, i64>,
    budget: usize,
    first: usize,
    last: usize,
) -> PyResult<Arrays<'py>> {
    let (bounds, limits) = (offsets("bounds", &bounds)?, offsets("limits", &limits)?);
    let chunks = ChunkKeys { bounds: &bounds, limits: &limits, budget, first, last };
    select(py, q, k, 1.0, |q, k, execution| sparse::chunk_keys(q, k, chunks, execution))
}

#[pyfunction]
pub(crate) fn stripes<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyUntypedArray>,
    k: &Bound<'py, PyUntypedArray>,
    scale: f32,
    thresholds: PyReadonlyArray1<'py, f32>,
    step: usize,
    starts: PyReadonlyArray1<'py, i64>,
    ends: PyReadonlyArray1<'py, i64>,
    shared: bool,
) -> PyResult<Arrays<'py>> {
    let thresholds = thresholds.as_slice()?;
    let (starts, ends) = (offsets("starts", &starts)?, offsets("ends", &ends)?);
    select(py, q, k, 1.0, |q, k, execution| {
        let candidates = ranges("candidates", &starts, &ends)?;
        sparse::stripes(q, k, scale, thresholds, step, &candidates, shared, execution)
    })
}

#[pyfunction]
pub(crate) fn rounded_blocks<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyUntypedArray>,
    k: &Bound<'py, PyUntypedArray>,
    scale: f32,
    query_bounds: PyReadonlyArray1<'py, i64>,
    block: usize,
    judged: (PyReadonlyArray1<'py, i64>, PyReadonlyArray1<'py, i64>),
    limits: PyReadonlyArray1<'py, i64>,
    thresholds: PyReadonlyArray1<'py, f32>,
    mean_queries: PyReadonlyArray1<'py, f32>,
    levels: f32,
) -> PyResult<Arrays<'py>> {
    let (query_bounds, limits) = (offsets("query_bounds", &query_bounds)?, offsets("limits", &limits)?);
    let (starts, ends) = (offsets("judged", &judged.0)?, offsets("judged", &judged.1)?);
    let (thresholds, mean_queries) = (thresholds.as_slice()?, mean_queries.as_slice()?);
    select(py, q, k, 0.25, |q, k, execution| {
        let judged = ranges("judged", &starts, &ends)?;
        let blocks = RoundedBlocks {
            query_bounds: &query_bounds,
            block,
            judged: &judged,
            limits: &limits,
            thresholds,
            mean_queries,
            levels,
        };
        sparse::rounded_blocks(q, k, scale, blocks, execution)
    })
}

/// Rows `[batch * heads * length]` in the order of their hashes.
#[pyfunction]
pub(crate) fn hash_order<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyUntypedArray>,
    directions: PyReadonlyArray1<'py, f32>,
    gray: bool,
) -> PyResult<Bound<'py, PyArray1<u32>>> {
    let (x, directions) = (view("x", x)?, directions.as_slice()?);
    let order = if gray { HashOrder::Gray } else { HashOrder::InverseGray };
    let operations = x.shape().iter().map(|&n| n as f64).product::<f64>() * 16.0;
    let sorted = running::run(py, operations, |execution| sparse::hash_order(x, directions, order, execution))?;
    Ok(sorted.into_pyarray(py))
}

/// Lists, and a log of a weight for each of their numbers.
#[pyfunction]
pub(crate) fn hash_lists<'py>(
    py: Python<'py>,
    order: PyReadonlyArray1<'py, u32>,
    heads: usize,
    block: usize,
    samples: PyReadonlyArray1<'py, u32>,
    own: bool,
) -> PyResult<(Arrays<'py>, Floats<'py>)> {
    let lists = HashLists { order: order.as_slice()?, heads, block, samples: samples.as_slice()?, own };
    let (chosen, weights) = running::run(py, 0.0, |execution| sparse::hash_lists(lists, execution))?;
    Ok((arrays(py, chosen), weights.into_pyarray(py)))
}

/// Sums `[batch * heads * row blocks * key blocks]` of softmax weights, or of logits.
#[pyfunction]
pub(crate) fn block_mass<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyUntypedArray>,
    k: &Bound<'py, PyUntypedArray>,
    scale: f32,
    row_bounds: PyReadonlyArray1<'py, i64>,
    blocks: (PyReadonlyArray1<'py, i64>, PyReadonlyArray1<'py, i64>),
    limits: PyReadonlyArray1<'py, i64>,
    shifts: usize,
    weigh: bool,
    shared: bool,
) -> PyResult<Floats<'py>> {
    let (q, k) = (view("q", q)?, view("k", k)?);
    let (row_bounds, limits) = (offsets("row_bounds", &row_bounds)?, offsets("limits", &limits)?);
    let (starts, ends) = (offsets("blocks", &blocks.0)?, offsets("blocks", &blocks.1)?);
    let sums = running::run(py, products(&q, &k), |execution| {
        let blocks = ranges("blocks", &starts, &ends)?;
        let mass = BlockMass { row_bounds: &row_bounds, blocks: &blocks, shifts, limits: &limits, weigh, shared };
        sparse::block_mass(q, k, scale, mass, execution)
    })?;
    Ok(sums.into_pyarray(py))
}

/// Sums of causal softmax weights of the last rows, by key and by distance, `[batch * heads * keys]` each.
#[pyfunction]
pub(crate) fn line_mass<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyUntypedArray>,
    k: &Bound<'py, PyUntypedArray>,
    scale: f32,
) -> PyResult<(Floats<'py>, Floats<'py>)> {
    let (q, k) = (view("q", q)?, view("k", k)?);
    let (columns, diagonals) =
        running::run(py, products(&q, &k), |execution| sparse::line_mass(q, k, scale, execution))?;
    Ok((columns.into_pyarray(py), diagonals.into_pyarray(py)))
}

/// The best entries of rows of scores.
#[pyfunction]
pub(crate) fn choose<'py>(
    py: Python<'py>,
    scores: PyReadonlyArray1<'py, f32>,
    columns: usize,
    limits: PyReadonlyArray1<'py, i64>,
    forced: (PyReadonlyArray1<'py, i64>, PyReadonlyArray1<'py, i64>),
    marks: PyReadonlyArray1<'py, bool>,
    share: PyReadonlyArray1<'py, f32>,
    numbers: (usize, usize, usize, usize),
    together: usize,
    counts: bool,
    spread: bool,
) -> PyResult<Arrays<'py>> {
    let (scores, marks, share) = (scores.as_slice()?, marks.as_slice()?, share.as_slice()?);
    let limits = offsets("limits", &limits)?;
    let (starts, ends) = (offsets("forced", &forced.0)?, offsets("forced", &forced.1)?);
    let (sinks, least, most, others) = numbers;
    let chosen = running::run(py, scores.len() as f64 * 16.0, |execution| {
        let forced = ranges("forced", &starts, &ends)?;
        let choice = Choice {
            limits: &limits,
            forced: &forced,
            sinks,
            marks,
            share,
            least,
            most,
            counts,
            others,
            together,
            spread,
        };
        sparse::choose(scores, columns, choice, execution)
    })?;
    Ok(arrays(py, chosen))
}

/// The best entries of each query row, those that are forced among them.
#[pyfunction]
pub(crate) fn best_forced<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyUntypedArray>,
    k: &Bound<'py, PyUntypedArray>,
    limits: PyReadonlyArray1<'py, i64>,
    forced: (PyReadonlyArray1<'py, i64>, PyReadonlyArray1<'py, i64>),
    most: usize,
) -> PyResult<Arrays<'py>> {
    let limits = offsets("limits", &limits)?;
    let (starts, ends) = (offsets("forced", &forced.0)?, offsets("forced", &forced.1)?);
    select(py, q, k, 1.0, |q, k, execution| {
        let forced = ranges("forced", &starts, &ends)?;
        sparse::best_forced(q, k, &limits, &forced, most, execution)
    })
}

/// Keys on lines, per head and block of queries.
#[pyfunction]
pub(crate) fn line_lists<'py>(
    py: Python<'py>,
    columns: (PyReadonlyArray1<'py, i64>, PyReadonlyArray1<'py, u32>),
    distances: (PyReadonlyArray1<'py, i64>, PyReadonlyArray1<'py, u32>),
    bounds: PyReadonlyArray1<'py, i64>,
) -> PyResult<Arrays<'py>> {
    let lists = |lists: &(PyReadonlyArray1<'py, i64>, PyReadonlyArray1<'py, u32>)| -> PyResult<Selection> {
        Ok(Selection { indptr: lists.0.as_slice()?.to_vec(), indices: lists.1.as_slice()?.to_vec() })
    };
    let (columns, distances, bounds) = (lists(&columns)?, lists(&distances)?, offsets("bounds", &bounds)?);
    let chosen = running::run(py, 0.0, |execution| sparse::line_lists(&columns, &distances, &bounds, execution))?;
    Ok(arrays(py, chosen))
}
