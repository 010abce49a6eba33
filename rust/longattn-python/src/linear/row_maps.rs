//! Functions of rows of one head.

use crate::arrays::{view, view_mut};
use crate::running;
use longattn::linear::row_maps::{RowMap, map_rows};
use numpy::{PyReadonlyArray1, PyUntypedArray, PyUntypedArrayMethods};
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
    out: &Bound<'_, PyUntypedArray>,
) -> PyResult<()> {
    run(py, RowMap::Norm { centred, eps, gain: gain.as_slice()?, shift: shift.as_slice()? }, x, out)
}

fn run(py: Python<'_>, map: RowMap, x: &Bound<'_, PyUntypedArray>, out: &Bound<'_, PyUntypedArray>) -> PyResult<()> {
    let operations = 10.0 * x.len() as f64;
    let (x, mut out) = (view("x", x)?, view_mut("out", out)?);
    running::run(py, operations, |execution| map_rows(map, x, &mut out, execution))
}
