//! Exact attention in float64.

use crate::arrays::broadcast;
use crate::options::Given;
use crate::running;
use longattn::dense::double::{self, Problem};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// What float64 arithmetic costs beside the float32 kernels, for the watch on long calls.
const SLOWER: f64 = 8.0;

type Array<'py> = Bound<'py, PyArray1<f64>>;

fn operations(q: &Bound<'_, PyUntypedArray>, v: &Bound<'_, PyUntypedArray>) -> f64 {
    let product = |shape: &[usize]| shape.iter().map(|&n| n as f64).product::<f64>();
    match (q.shape(), v.shape()) {
        (q @ [.., dim], [.., keys, value_dim]) => {
            SLOWER * product(q) / *dim as f64 * *keys as f64 * (dim + value_dim) as f64
        }
        _ => 0.0,
    }
}

/// Output and lse, flat.
#[pyfunction]
pub(crate) fn attention_double<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyUntypedArray>,
    k: &Bound<'py, PyUntypedArray>,
    v: &Bound<'py, PyUntypedArray>,
    options: &Bound<'py, PyDict>,
) -> PyResult<(Array<'py>, Array<'py>)> {
    let given = Given::<f64>::new(options)?;
    let (options, state, work) = (given.scores()?, given.state()?, operations(q, v));
    let (q, k, v) = (broadcast("q", q, b'f')?, broadcast("k", k, b'f')?, broadcast("v", v, b'f')?);
    let (out, lse) =
        running::run(py, work, |execution| double::attention(&Problem::new(q, k, v, options)?, state, execution))?;
    Ok((out.into_pyarray(py), lse.into_pyarray(py)))
}

/// Gradients of queries, keys, values and sinks, flat.
#[pyfunction]
#[pyo3(signature = (d_out, q, k, v, out, lse, d_lse, options))]
pub(crate) fn attention_backward_double<'py>(
    py: Python<'py>,
    d_out: &Bound<'py, PyUntypedArray>,
    q: &Bound<'py, PyUntypedArray>,
    k: &Bound<'py, PyUntypedArray>,
    v: &Bound<'py, PyUntypedArray>,
    out: &Bound<'py, PyUntypedArray>,
    lse: PyReadonlyArray1<'py, f64>,
    d_lse: Option<PyReadonlyArray1<'py, f64>>,
    options: &Bound<'py, PyDict>,
) -> PyResult<(Array<'py>, Array<'py>, Array<'py>, Array<'py>)> {
    let given = Given::<f64>::new(options)?;
    let (options, work) = (given.scores()?, 3.5 * operations(q, v));
    let (q, k, v) = (broadcast("q", q, b'f')?, broadcast("k", k, b'f')?, broadcast("v", v, b'f')?);
    let (out, d_out) = (broadcast("out", out, b'f')?, broadcast("d_out", d_out, b'f')?);
    let (lse, d_lse) = (lse.as_slice()?, d_lse.as_ref().map(|a| a.as_slice()).transpose()?);
    let gradients = running::run(py, work, |execution| {
        double::attention_backward(&Problem::new(q, k, v, options)?, out, lse, d_out, d_lse, execution)
    })?;
    Ok((
        gradients.dq.into_pyarray(py),
        gradients.dk.into_pyarray(py),
        gradients.dv.into_pyarray(py),
        gradients.d_sinks.into_pyarray(py),
    ))
}
