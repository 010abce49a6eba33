//! Exact attention.

use crate::arrays::{lse_view, view, view_mut};
use crate::errors::to_py;
use crate::options::Given;
use crate::running;
use crate::store::KvArgument;
use longattn::dense;
use longattn::tensor::{KvView, TensorView};
use numpy::{PyReadonlyArray1, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

pub(crate) fn operations(q: &TensorView, k: &KvView, v: &KvView) -> f64 {
    let ([b, h, l, d], keys, dv) = (q.shape(), k.shape()[2], v.shape()[3]);
    [b, h, l, keys, d + dv].iter().map(|&n| n as f64).product()
}

#[pyfunction]
pub(crate) fn attention(
    py: Python<'_>,
    q: &Bound<'_, PyUntypedArray>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    out: &Bound<'_, PyUntypedArray>,
    lse: &Bound<'_, PyUntypedArray>,
    options: &Bound<'_, PyDict>,
) -> PyResult<()> {
    let (q, k, v) = (view("q", q)?, KvArgument::new("k", k)?, KvArgument::new("v", v)?);
    let (k, v) = (k.view()?, v.view()?);
    let (mut out, mut lse) = (view_mut("out", out)?, lse_view("lse", lse)?);
    let given = Given::new(options)?;
    let options = given.options()?;
    running::run(py, operations(&q, &k, &v), |execution| {
        dense::attention(q, k, v, options, &mut out, &mut lse, execution)
    })
}

/// `[tokens, heads, dim]` as `[1, heads, tokens, dim]`.
pub(crate) fn packed<'a>(name: &'static str, array: &'a Bound<'_, PyUntypedArray>) -> PyResult<TensorView<'a>> {
    if array.shape().len() != 3 {
        return Err(PyValueError::new_err(format!(
            "{name}: got shape {:?}, expected [tokens, heads, dim]",
            array.shape()
        )));
    }
    Ok(view(name, array)?.swap_heads_and_length())
}

pub(crate) fn offsets(name: &str, array: &PyReadonlyArray1<'_, i64>) -> PyResult<Vec<usize>> {
    array
        .as_slice()?
        .iter()
        .map(|&n| {
            usize::try_from(n)
                .map_err(|_| PyValueError::new_err(format!("{name}: got {n}, expected no negative offsets")))
        })
        .collect()
}

#[pyfunction]
pub(crate) fn attention_varlen(
    py: Python<'_>,
    q: &Bound<'_, PyUntypedArray>,
    k: &Bound<'_, PyUntypedArray>,
    v: &Bound<'_, PyUntypedArray>,
    out: &Bound<'_, PyUntypedArray>,
    lse: &Bound<'_, PyUntypedArray>,
    cu_seqlens_q: PyReadonlyArray1<'_, i64>,
    cu_seqlens_k: PyReadonlyArray1<'_, i64>,
    options: &Bound<'_, PyDict>,
) -> PyResult<()> {
    let (q, k, v) = (packed("q", q)?, packed("k", k)?, packed("v", v)?);
    let mut out = view_mut("out", out)?.into_swapped_heads_and_length();
    let mut lse = lse_view("lse", lse)?;
    let (queries, keys) = (offsets("cu_seqlens_q", &cu_seqlens_q)?, offsets("cu_seqlens_k", &cu_seqlens_k)?);
    let given = Given::new(options)?;
    let options = given.options()?;
    let longest = keys.windows(2).map(|w| w[1].saturating_sub(w[0])).max().unwrap_or(0);
    let operations = operations(&q, &k.into(), &v.into()) * longest as f64 / k.shape()[2].max(1) as f64;
    running::run(py, operations, |execution| {
        dense::attention_varlen(q, k, v, &queries, &keys, options, &mut out, &mut lse, execution)
    })
}

#[pyfunction]
pub(crate) fn merge(
    py: Python<'_>,
    outs: Vec<Bound<'_, PyUntypedArray>>,
    lses: Vec<Bound<'_, PyUntypedArray>>,
    out: &Bound<'_, PyUntypedArray>,
    lse: &Bound<'_, PyUntypedArray>,
) -> PyResult<()> {
    if outs.len() != lses.len() {
        return Err(PyValueError::new_err(format!(
            "parts: got {} outputs and {} lses, expected pairs",
            outs.len(),
            lses.len()
        )));
    }
    let parts = outs
        .iter()
        .zip(&lses)
        .map(|(o, l)| Ok((view("parts", o)?, view("parts", l)?.with_unit_axis())))
        .collect::<PyResult<Vec<_>>>()?;
    let (mut out, mut lse) = (view_mut("out", out)?, lse_view("lse", lse)?);
    py.detach(|| dense::merge(&parts, &mut out, &mut lse, &Default::default())).map_err(to_py)
}
