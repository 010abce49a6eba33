//! Attention over lists of keys.

use crate::arrays::{lse_view, view, view_mut};
use crate::backward::{BACKWARD, sums};
use crate::dense::offsets;
use crate::options::Given;
use crate::running;
use crate::store::KvArgument;
use longattn::dense::{Forward, Gradients};
use longattn::sparse::{self, BlockLists, Lists, RowLists};
use longattn::tensor::{KvView, TensorView};
use numpy::{PyReadonlyArray1, PyReadonlyArrayDyn, PyUntypedArray};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Multiply-adds of attention in which a list's entry stands for `keys` keys.
fn operations(q: &TensorView, v: &KvView, lists: &Lists, keys: f64) -> f64 {
    let [batch, heads, queries, dim] = q.shape().map(|n| n as f64);
    let repeats = batch / lists.batch.max(1) as f64 * heads / lists.heads.max(1) as f64;
    let rows = queries / (lists.query_bounds.len() as f64 - 1.0).max(1.0);
    lists.indices.len() as f64 * repeats * rows * keys * (dim + v.shape()[3] as f64)
}

#[pyfunction]
pub(crate) fn block_sparse(
    py: Python<'_>,
    q: &Bound<'_, PyUntypedArray>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    out: &Bound<'_, PyUntypedArray>,
    lse: &Bound<'_, PyUntypedArray>,
    indptr: PyReadonlyArrayDyn<'_, i64>,
    indices: PyReadonlyArray1<'_, u32>,
    shape: (usize, usize),
    query_bounds: PyReadonlyArray1<'_, i64>,
    key_bounds: PyReadonlyArray1<'_, i64>,
    options: &Bound<'_, PyDict>,
) -> PyResult<()> {
    let (q, k, v) = (view("q", q)?, KvArgument::new("k", k)?, KvArgument::new("v", v)?);
    let (k, v) = (k.view()?, v.view()?);
    let (mut out, mut lse) = (view_mut("out", out)?, lse_view("lse", lse)?);
    let given = Given::new(options)?;
    let options = given.options()?;
    let (query_bounds, key_bounds) = (offsets("query_bounds", &query_bounds)?, offsets("key_bounds", &key_bounds)?);
    let (indptr, indices, (batch, heads)) = (indptr.as_slice()?, indices.as_slice()?, shape);
    let lists = Lists { indptr, indices, batch, heads, query_bounds: &query_bounds };
    let keys = k.shape()[2] as f64 / (key_bounds.len() as f64 - 1.0).max(1.0);
    running::run(py, operations(&q, &v, &lists, keys), |execution| {
        let blocks = BlockLists { lists, key_bounds: &key_bounds };
        sparse::block_sparse(q, k, v, blocks, options, &mut out, &mut lse, execution)
    })
}

#[pyfunction]
pub(crate) fn block_sparse_backward(
    py: Python<'_>,
    d_out: &Bound<'_, PyUntypedArray>,
    q: &Bound<'_, PyUntypedArray>,
    k: &Bound<'_, PyUntypedArray>,
    v: &Bound<'_, PyUntypedArray>,
    out: &Bound<'_, PyUntypedArray>,
    lse: &Bound<'_, PyUntypedArray>,
    d_lse: Option<&Bound<'_, PyUntypedArray>>,
    dq: &Bound<'_, PyUntypedArray>,
    dk: &Bound<'_, PyUntypedArray>,
    dv: &Bound<'_, PyUntypedArray>,
    indptr: PyReadonlyArrayDyn<'_, i64>,
    indices: PyReadonlyArray1<'_, u32>,
    shape: (usize, usize),
    query_bounds: PyReadonlyArray1<'_, i64>,
    key_bounds: PyReadonlyArray1<'_, i64>,
    options: &Bound<'_, PyDict>,
) -> PyResult<()> {
    let given = Given::<f32>::new(options)?;
    let forward = Forward {
        q: view("q", q)?,
        k: view("k", k)?,
        v: view("v", v)?,
        options: given.options()?,
        out: view("out", out)?,
        lse: sums("lse", lse)?,
        d_out: view("d_out", d_out)?,
        d_lse: d_lse.map(|a| sums("d_lse", a)).transpose()?,
    };
    let mut gradients =
        Gradients { dq: view_mut("dq", dq)?, dk: view_mut("dk", dk)?, dv: view_mut("dv", dv)?, d_sinks: None };
    let (query_bounds, key_bounds) = (offsets("query_bounds", &query_bounds)?, offsets("key_bounds", &key_bounds)?);
    let (indptr, indices, (batch, heads)) = (indptr.as_slice()?, indices.as_slice()?, shape);
    let lists = Lists { indptr, indices, batch, heads, query_bounds: &query_bounds };
    let keys = forward.k.shape()[2] as f64 / (key_bounds.len() as f64 - 1.0).max(1.0);
    let operations = BACKWARD * operations(&forward.q, &forward.v.into(), &lists, keys);
    running::run(py, operations, |execution| {
        let blocks = BlockLists { lists, key_bounds: &key_bounds };
        sparse::block_sparse_backward(forward, blocks, &mut gradients, execution)
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
    indptr: PyReadonlyArrayDyn<'_, i64>,
    indices: PyReadonlyArray1<'_, u32>,
    bias: Option<PyReadonlyArray1<'_, f32>>,
    shape: (usize, usize),
    query_bounds: PyReadonlyArray1<'_, i64>,
    max: Option<Bound<'_, PyUntypedArray>>,
    options: &Bound<'_, PyDict>,
) -> PyResult<()> {
    let (q, k, v) = (view("q", q)?, KvArgument::new("k", k)?, KvArgument::new("v", v)?);
    let (k, v) = (k.view()?, v.view()?);
    let (mut out, mut lse) = (view_mut("out", out)?, lse_view("lse", lse)?);
    let given = Given::new(options)?;
    let options = given.options()?;
    let query_bounds = offsets("query_bounds", &query_bounds)?;
    let (indptr, indices, (batch, heads)) = (indptr.as_slice()?, indices.as_slice()?, shape);
    let lists = Lists { indptr, indices, batch, heads, query_bounds: &query_bounds };
    let mut max = max.as_ref().map(|max| lse_view("max", max)).transpose()?;
    let bias = bias.as_ref().map(|bias| bias.as_slice()).transpose()?;
    running::run(py, operations(&q, &v, &lists, 1.0), |execution| {
        let rows = RowLists { lists, bias };
        sparse::index_sparse(q, k, v, rows, options, &mut out, &mut lse, max.as_mut(), execution)
    })
}
