//! Gradients of exact attention.

use crate::arrays::{view, view_mut};
use crate::dense::{offsets, operations};
use crate::options::Given;
use crate::running;
use longattn::dense::{self, Forward, Gradients, Options};
use longattn::tensor::{TensorView, TensorViewMut};
use numpy::{PyReadonlyArray1, PyReadwriteArray1, PyUntypedArray};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Five matrix products where attention has two.
pub(crate) const BACKWARD: f64 = 2.5;

/// What a forward call was given and what it gave: the gradient of its output; queries, keys, values; output and log-sum-exp; the
/// gradient of this, if any.
pub(crate) type GivenForward<'py> = (
    Bound<'py, PyUntypedArray>,
    Bound<'py, PyUntypedArray>,
    Bound<'py, PyUntypedArray>,
    Bound<'py, PyUntypedArray>,
    Bound<'py, PyUntypedArray>,
    Bound<'py, PyUntypedArray>,
    Option<Bound<'py, PyUntypedArray>>,
);

/// Where the gradients of queries, keys and values go.
pub(crate) type GivenGradients<'py> =
    (Bound<'py, PyUntypedArray>, Bound<'py, PyUntypedArray>, Bound<'py, PyUntypedArray>);

/// The arrays of a forward call as views, heads before rows.
pub(crate) fn forward<'a>(given: &'a GivenForward<'_>, options: Options<'a>) -> PyResult<Forward<'a>> {
    let (d_out, q, k, v, out, lse, d_lse) = given;
    let sums = |name, array: &'a Bound<'_, PyUntypedArray>| view(name, array).map(TensorView::with_unit_axis);
    Ok(Forward {
        q: view("q", q)?,
        k: view("k", k)?,
        v: view("v", v)?,
        options,
        out: view("out", out)?,
        lse: sums("lse", lse)?,
        d_out: view("d_out", d_out)?,
        d_lse: d_lse.as_ref().map(|array| sums("d_lse", array)).transpose()?,
    })
}

/// Those of the gradients likewise.
pub(crate) fn gradients<'a>(given: &'a GivenGradients<'_>, d_sinks: Option<&'a mut [f32]>) -> PyResult<Gradients<'a>> {
    let (dq, dk, dv) = given;
    Ok(Gradients { dq: view_mut("dq", dq)?, dk: view_mut("dk", dk)?, dv: view_mut("dv", dv)?, d_sinks })
}

#[pyfunction]
pub(crate) fn attention_backward<'py>(
    py: Python<'py>,
    arrays: GivenForward<'py>,
    results: GivenGradients<'py>,
    mut d_sinks: Option<PyReadwriteArray1<'py, f32>>,
    options: &Bound<'py, PyDict>,
) -> PyResult<()> {
    let given = Given::<f32>::new(options)?;
    let forward = forward(&arrays, given.options()?)?;
    let mut gradients = gradients(&results, d_sinks.as_mut().map(|a| a.as_slice_mut()).transpose()?)?;
    let operations = BACKWARD * operations(&forward.q, &forward.k.into(), &forward.v.into());
    running::run(py, operations, |execution| dense::attention_backward(forward, &mut gradients, execution))
}

#[pyfunction]
pub(crate) fn attention_varlen_backward<'py>(
    py: Python<'py>,
    arrays: GivenForward<'py>,
    results: GivenGradients<'py>,
    mut d_sinks: Option<PyReadwriteArray1<'py, f32>>,
    cu_seqlens_q: PyReadonlyArray1<'py, i64>,
    cu_seqlens_k: PyReadonlyArray1<'py, i64>,
    options: &Bound<'py, PyDict>,
) -> PyResult<()> {
    let (queries, keys) = (offsets("cu_seqlens_q", &cu_seqlens_q)?, offsets("cu_seqlens_k", &cu_seqlens_k)?);
    let given = Given::<f32>::new(options)?;
    // Packed arrays have heads after rows.
    let mut forward = forward(&arrays, given.options()?)?;
    for x in [&mut forward.q, &mut forward.k, &mut forward.v, &mut forward.out, &mut forward.d_out] {
        *x = x.swap_heads_and_length();
    }
    let Gradients { dq, dk, dv, d_sinks } =
        gradients(&results, d_sinks.as_mut().map(|a| a.as_slice_mut()).transpose()?)?;
    let [dq, dk, dv] = [dq, dk, dv].map(TensorViewMut::into_swapped_heads_and_length);
    let mut gradients = Gradients { dq, dk, dv, d_sinks };
    let (q, k, v) = (forward.q, forward.k, forward.v);
    let longest = keys.windows(2).map(|w| w[1].saturating_sub(w[0])).max().unwrap_or(0);
    let operations = BACKWARD * operations(&q, &k.into(), &v.into()) * longest as f64 / k.shape()[2].max(1) as f64;
    running::run(py, operations, |execution| {
        dense::attention_varlen_backward(forward, &queries, &keys, &mut gradients, execution)
    })
}
