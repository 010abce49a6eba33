//! Attention over lists of keys.

use crate::arrays::{lse_view, view, view_mut};
use crate::backward::{BACKWARD, GivenForward, GivenGradients, forward, gradients};
use crate::dense::offsets;
use crate::options::Given;
use crate::running;
use crate::store::KvArgument;
use longattn::sparse::{self, BlockLists, Lists, RowLists, Sequences};
use longattn::tensor::{KvView, TensorView};
use numpy::{PyReadonlyArray1, PyReadonlyArrayDyn, PyReadwriteArray1, PyUntypedArray};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Where lists begin, their numbers, batch entries and heads that have lists, and where blocks of queries begin.
type GivenLists<'py> =
    (PyReadonlyArrayDyn<'py, i64>, PyReadonlyArray1<'py, u32>, (usize, usize), PyReadonlyArray1<'py, i64>);

/// Calls `with` with the lists that were given.
fn with_lists<R>(given: &GivenLists<'_>, with: impl FnOnce(Lists) -> PyResult<R>) -> PyResult<R> {
    let (indptr, indices, (batch, heads), bounds) = given;
    let query_bounds = offsets("query_bounds", bounds)?;
    let (indptr, indices) = (indptr.as_slice()?, indices.as_slice()?);
    with(Lists { indptr, indices, batch: *batch, heads: *heads, query_bounds: &query_bounds })
}

/// Bounds of the sequences of queries and of keys, if there are several.
type GivenSequences<'py> = Option<(PyReadonlyArray1<'py, i64>, PyReadonlyArray1<'py, i64>)>;

/// Those bounds as offsets.
fn sequence_ends(given: &GivenSequences<'_>) -> PyResult<Option<(Vec<usize>, Vec<usize>)>> {
    let ends = |(q, k): &(_, _)| Ok((offsets("cu_seqlens_q", q)?, offsets("cu_seqlens_k", k)?));
    given.as_ref().map(ends).transpose()
}

/// Multiply-adds of attention in which a list's entry stands for `keys` keys.
fn operations(q: &TensorView, v: &KvView, lists: &Lists, keys: f64) -> f64 {
    let [batch, heads, queries, dim] = q.shape().map(|n| n as f64);
    let repeats = batch / lists.batch.max(1) as f64 * heads / lists.heads.max(1) as f64;
    let rows = queries / (lists.query_bounds.len() as f64 - 1.0).max(1.0);
    lists.indices.len() as f64 * repeats * rows * keys * (dim + v.shape()[3] as f64)
}

/// Keys of a block, on average.
fn block_keys(keys: usize, bounds: &[usize]) -> f64 {
    keys as f64 / (bounds.len() as f64 - 1.0).max(1.0)
}

#[pyfunction]
pub(crate) fn block_sparse(
    py: Python<'_>,
    q: &Bound<'_, PyUntypedArray>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    out: &Bound<'_, PyUntypedArray>,
    lse: &Bound<'_, PyUntypedArray>,
    lists: GivenLists<'_>,
    key_bounds: PyReadonlyArray1<'_, i64>,
    sequences: GivenSequences<'_>,
    options: &Bound<'_, PyDict>,
) -> PyResult<()> {
    let (q, k, v) = (view("q", q)?, KvArgument::new("k", k)?, KvArgument::new("v", v)?);
    let (k, v) = (k.view()?, v.view()?);
    let (mut out, mut lse) = (view_mut("out", out)?, lse_view("lse", lse)?);
    let given = Given::new(options)?;
    let options = given.options()?;
    let (key_bounds, ends) = (offsets("key_bounds", &key_bounds)?, sequence_ends(&sequences)?);
    let sequences = ends.as_ref().map(|(q, k)| Sequences { query_ends: q, key_ends: k });
    with_lists(&lists, |lists| {
        let operations = operations(&q, &v, &lists, block_keys(k.shape()[2], &key_bounds));
        running::run(py, operations, |execution| {
            let blocks = BlockLists { lists, key_bounds: &key_bounds };
            sparse::block_sparse(q, k, v, blocks, sequences, options, &mut out, &mut lse, execution)
        })
    })
}

#[pyfunction]
pub(crate) fn block_sparse_backward<'py>(
    py: Python<'py>,
    arrays: GivenForward<'py>,
    results: GivenGradients<'py>,
    mut d_sinks: Option<PyReadwriteArray1<'py, f32>>,
    lists: GivenLists<'py>,
    key_bounds: PyReadonlyArray1<'py, i64>,
    sequences: GivenSequences<'py>,
    options: &Bound<'py, PyDict>,
) -> PyResult<()> {
    let given = Given::<f32>::new(options)?;
    let forward = forward(&arrays, given.options()?)?;
    let mut gradients = gradients(&results, d_sinks.as_mut().map(|a| a.as_slice_mut()).transpose()?)?;
    let (key_bounds, ends) = (offsets("key_bounds", &key_bounds)?, sequence_ends(&sequences)?);
    let sequences = ends.as_ref().map(|(q, k)| Sequences { query_ends: q, key_ends: k });
    with_lists(&lists, |lists| {
        let keys = block_keys(forward.k.shape()[2], &key_bounds);
        let operations = BACKWARD * operations(&forward.q, &forward.v.into(), &lists, keys);
        running::run(py, operations, |execution| {
            let blocks = BlockLists { lists, key_bounds: &key_bounds };
            sparse::block_sparse_backward(forward, blocks, sequences, &mut gradients, execution)
        })
    })
}

#[pyfunction]
pub(crate) fn index_sparse(
    py: Python<'_>,
    q: &Bound<'_, PyUntypedArray>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    out: &Bound<'_, PyUntypedArray>,
    lse: &Bound<'_, PyUntypedArray>,
    lists: GivenLists<'_>,
    bias: Option<PyReadonlyArray1<'_, f32>>,
    max: Option<Bound<'_, PyUntypedArray>>,
    options: &Bound<'_, PyDict>,
) -> PyResult<()> {
    let (q, k, v) = (view("q", q)?, KvArgument::new("k", k)?, KvArgument::new("v", v)?);
    let (k, v) = (k.view()?, v.view()?);
    let (mut out, mut lse) = (view_mut("out", out)?, lse_view("lse", lse)?);
    let given = Given::new(options)?;
    let options = given.options()?;
    let mut max = max.as_ref().map(|max| lse_view("max", max)).transpose()?;
    let bias = bias.as_ref().map(|bias| bias.as_slice()).transpose()?;
    with_lists(&lists, |lists| {
        running::run(py, operations(&q, &v, &lists, 1.0), |execution| {
            let rows = RowLists { lists, bias };
            sparse::index_sparse(q, k, v, rows, options, &mut out, &mut lse, max.as_mut(), execution)
        })
    })
}
