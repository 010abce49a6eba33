//! Gradients of exact attention.

use crate::arrays::{view, view_mut};
use crate::dense::{offsets, operations, packed};
use crate::options::Given;
use crate::running;
use longattn::dense::{self, Forward, Gradients};
use longattn::tensor::TensorView;
use numpy::{PyReadonlyArray1, PyReadwriteArray1, PyUntypedArray};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Five matrix products where attention has two.
pub(crate) const BACKWARD: f64 = 2.5;

pub(crate) fn sums<'a>(name: &'static str, array: &'a Bound<'_, PyUntypedArray>) -> PyResult<TensorView<'a>> {
    Ok(view(name, array)?.with_unit_axis())
}

#[pyfunction]
#[pyo3(signature = (d_out, q, k, v, out, lse, d_lse, dq, dk, dv, d_sinks, options))]
pub(crate) fn attention_backward(
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
    mut d_sinks: Option<PyReadwriteArray1<'_, f32>>,
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
    let mut gradients = Gradients {
        dq: view_mut("dq", dq)?,
        dk: view_mut("dk", dk)?,
        dv: view_mut("dv", dv)?,
        d_sinks: d_sinks.as_mut().map(|a| a.as_slice_mut()).transpose()?,
    };
    let operations = BACKWARD * operations(&forward.q, &forward.k.into(), &forward.v.into());
    running::run(py, operations, |execution| dense::attention_backward(forward, &mut gradients, execution))
}

#[pyfunction]
#[pyo3(signature = (d_out, q, k, v, out, lse, d_lse, dq, dk, dv, d_sinks, cu_seqlens_q, cu_seqlens_k, options))]
pub(crate) fn attention_varlen_backward(
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
    mut d_sinks: Option<PyReadwriteArray1<'_, f32>>,
    cu_seqlens_q: PyReadonlyArray1<'_, i64>,
    cu_seqlens_k: PyReadonlyArray1<'_, i64>,
    options: &Bound<'_, PyDict>,
) -> PyResult<()> {
    let (q, k, v) = (packed("q", q)?, packed("k", k)?, packed("v", v)?);
    let (queries, keys) = (offsets("cu_seqlens_q", &cu_seqlens_q)?, offsets("cu_seqlens_k", &cu_seqlens_k)?);
    let given = Given::<f32>::new(options)?;
    let forward = Forward {
        q,
        k,
        v,
        options: given.options()?,
        out: packed("out", out)?,
        lse: sums("lse", lse)?,
        d_out: packed("d_out", d_out)?,
        d_lse: d_lse.map(|a| sums("d_lse", a)).transpose()?,
    };
    let mut gradients = Gradients {
        dq: view_mut("dq", dq)?.into_swapped_heads_and_length(),
        dk: view_mut("dk", dk)?.into_swapped_heads_and_length(),
        dv: view_mut("dv", dv)?.into_swapped_heads_and_length(),
        d_sinks: d_sinks.as_mut().map(|a| a.as_slice_mut()).transpose()?,
    };
    let longest = keys.windows(2).map(|w| w[1].saturating_sub(w[0])).max().unwrap_or(0);
    let operations = BACKWARD * operations(&q, &k.into(), &v.into()) * longest as f64 / k.shape()[2].max(1) as f64;
    running::run(py, operations, |execution| {
        dense::attention_varlen_backward(forward, &queries, &keys, &mut gradients, execution)
    })
}
