//! Operations on grids.

use crate::arrays::view;
use crate::running;
use longattn::grid::{self, Paths, Points, Sampling};
use numpy::{PyReadonlyArray1, PyReadwriteArray1, PyUntypedArray};
use pyo3::prelude::*;

#[pyfunction]
pub(crate) fn sample<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyUntypedArray>,
    extent: [usize; 3],
    coords: PyReadonlyArray1<'py, f32>,
    axes: usize,
    groups: usize,
    taps: usize,
    weights: Option<PyReadonlyArray1<'py, f32>>,
    unit: bool,
    align_corners: bool,
    border: bool,
    mut out: PyReadwriteArray1<'py, f32>,
) -> PyResult<()> {
    let x = view("x", x)?;
    let weights = weights.as_ref().map(|w| w.as_slice()).transpose()?;
    let points = Points { coords: coords.as_slice()?, axes, groups, taps, weights };
    let out = out.as_slice_mut()?;
    let operations = (points.coords.len() * x.shape()[3]) as f64;
    let sampling = Sampling { unit, align_corners, border };
    running::run(py, operations, |execution| grid::sample(x, extent, points, sampling, out, execution))
}

#[pyfunction]
pub(crate) fn path_bias<'py>(
    py: Python<'py>,
    along_x: PyReadonlyArray1<'py, f64>,
    along_y: PyReadonlyArray1<'py, f64>,
    extent: [usize; 2],
    first_y: bool,
    lines: (usize, usize),
    mut out: PyReadwriteArray1<'py, f32>,
) -> PyResult<()> {
    let paths = Paths { along_x: along_x.as_slice()?, along_y: along_y.as_slice()?, extent, first_y };
    let out = out.as_slice_mut()?;
    running::run(py, out.len() as f64, |execution| grid::path_bias(paths, lines.0..lines.1, out, execution))
}
