//! Functions of rows of one head.

use crate::arrays::{view, view_mut};
use crate::dense::offsets;
use crate::running;
use longattn::linear::row_maps::{RowMap, map_rows};
use numpy::{PyReadonlyArray1, PyReadwriteArray1, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;

#[pyfunction]
pub(crate) fn refined_gates(
    py: Python<'_>,
    x: &Bound<'_, PyUntypedArray>,
    by: &Bound<'_, PyUntypedArray>,
    floor: f32,
    out: &Bound<'_, PyUntypedArray>,
) -> PyResult<()> {
    let map = RowMap::Refine { floor, by: view("r", by)? };
    run(py, map, x, out)
}

#[pyfunction]
pub(crate) fn decay_gates(
    py: Python<'_>,
    x: &Bound<'_, PyUntypedArray>,
    rates: PyReadonlyArray1<'_, f32>,
    bias: PyReadonlyArray1<'_, f32>,
    bound: Option<f32>,
    out: &Bound<'_, PyUntypedArray>,
) -> PyResult<()> {
    run(py, RowMap::Decay { rates: rates.as_slice()?, bias: bias.as_slice()?, bound }, x, out)
}

#[pyfunction]
pub(crate) fn normalised_rows(
    py: Python<'_>,
    x: &Bound<'_, PyUntypedArray>,
    centred: bool,
    eps: f32,
    gain: PyReadonlyArray1<'_, f32>,
    shift: PyReadonlyArray1<'_, f32>,
    logs: PyReadonlyArray1<'_, f64>,
    out: &Bound<'_, PyUntypedArray>,
) -> PyResult<()> {
    let (gain, shift, logs) = (gain.as_slice()?, shift.as_slice()?, logs.as_slice()?);
    run(py, RowMap::Norm { centred, eps, gain, shift, logs }, x, out)
}

/// `out` may be `x`.
#[pyfunction]
pub(crate) fn scaled_rows(
    py: Python<'_>,
    x: &Bound<'_, PyUntypedArray>,
    logs: PyReadonlyArray1<'_, f64>,
    out: &Bound<'_, PyUntypedArray>,
) -> PyResult<()> {
    run(py, RowMap::Scale { logs: logs.as_slice()? }, x, out)
}

#[pyfunction]
pub(crate) fn key_scales(
    py: Python<'_>,
    k: &Bound<'_, PyUntypedArray>,
    g: &Bound<'_, PyUntypedArray>,
    cu_seqlens: Option<PyReadonlyArray1<'_, i64>>,
    mut scales: PyReadwriteArray1<'_, f64>,
    mut beta: PyReadwriteArray1<'_, f32>,
    mut logs: PyReadwriteArray1<'_, f64>,
) -> PyResult<()> {
    let operations = 2.0 * (k.len() + g.len()) as f64;
    let (k, mut g) = (view("k", k)?, view_mut("g", g)?);
    let bounds = cu_seqlens.as_ref().map(|bounds| offsets("cu_seqlens", bounds)).transpose()?;
    let (scales, beta, logs) = (scales.as_slice_mut()?, beta.as_slice_mut()?, logs.as_slice_mut()?);
    running::run(py, operations, |execution| {
        longattn::linear::key_scales(k, &mut g, bounds.as_deref(), scales, beta, logs, execution)
    })
}

fn run(py: Python<'_>, map: RowMap, x: &Bound<'_, PyUntypedArray>, out: &Bound<'_, PyUntypedArray>) -> PyResult<()> {
    let operations = 10.0 * x.len() as f64;
    let (x, mut out) = (view("x", x)?, view_mut("out", out)?);
    running::run(py, operations, |execution| map_rows(map, x, &mut out, execution))
}
