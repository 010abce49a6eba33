//! Scans of small states.

use crate::arrays::{view, view_mut};
use crate::dense::offsets;
use crate::running;
use longattn::linear::scan::{self, DiagonalOutputs, DiagonalScan, SelectiveOutputs, SelectiveScan};
use numpy::{
    PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3, PyReadonlyArray4, PyReadwriteArray1, PyReadwriteArray2,
    PyReadwriteArray3, PyReadwriteArray4, PyUntypedArray,
};
use pyo3::prelude::*;

/// What an exponential and the products of a state cost, in multiply-adds.
const PER_STATE: f64 = 16.0;

fn size(shape: [usize; 4]) -> f64 {
    shape.iter().map(|&n| n as f64).product()
}

#[pyfunction]
#[pyo3(signature = (x, dt, a, b, c, state, out, *, skip=None, dt_bias=None, softplus=false, z=None, cu_seqlens=None))]
pub(crate) fn selective_scan(
    py: Python<'_>,
    x: &Bound<'_, PyUntypedArray>,
    dt: &Bound<'_, PyUntypedArray>,
    a: PyReadonlyArray2<'_, f32>,
    b: &Bound<'_, PyUntypedArray>,
    c: &Bound<'_, PyUntypedArray>,
    mut state: PyReadwriteArray3<'_, f32>,
    out: &Bound<'_, PyUntypedArray>,
    skip: Option<PyReadonlyArray1<'_, f32>>,
    dt_bias: Option<PyReadonlyArray1<'_, f32>>,
    softplus: bool,
    z: Option<&Bound<'_, PyUntypedArray>>,
    cu_seqlens: Option<PyReadonlyArray1<'_, i64>>,
) -> PyResult<()> {
    let given = SelectiveScan {
        x: view("x", x)?,
        dt: view("dt", dt)?,
        a: a.as_slice()?,
        b: view("b", b)?,
        c: view("c", c)?,
        skip: skip.as_ref().map(|s| s.as_slice()).transpose()?,
        dt_bias: dt_bias.as_ref().map(|s| s.as_slice()).transpose()?,
        softplus,
        gate: z.map(|z| view("z", z)).transpose()?,
    };
    let mut out = view_mut("out", out)?;
    let bounds = cu_seqlens.as_ref().map(|bounds| offsets("cu_seqlens", bounds)).transpose()?;
    let state = state.as_slice_mut()?;
    let work = PER_STATE * size(given.x.shape()) * given.b.shape()[3] as f64;
    running::run(py, work, |execution| scan::selective_scan(given, bounds.as_deref(), state, &mut out, execution))
}

/// What a backward pass takes of the work of a forward pass: states twice, and their gradients.
const BACKWARD: f64 = 4.0;

#[pyfunction]
#[pyo3(signature = (x, dt, a, b, c, initial_state, d_out, dx, d_dt, da, db, dc, d_skip, d_dt_bias, d_state, *, skip=None, dt_bias=None, softplus=false, z=None, dz=None, cu_seqlens=None))]
pub(crate) fn selective_scan_backward(
    py: Python<'_>,
    x: &Bound<'_, PyUntypedArray>,
    dt: &Bound<'_, PyUntypedArray>,
    a: PyReadonlyArray2<'_, f32>,
    b: &Bound<'_, PyUntypedArray>,
    c: &Bound<'_, PyUntypedArray>,
    initial_state: PyReadonlyArray3<'_, f32>,
    d_out: &Bound<'_, PyUntypedArray>,
    dx: &Bound<'_, PyUntypedArray>,
    d_dt: &Bound<'_, PyUntypedArray>,
    mut da: PyReadwriteArray2<'_, f32>,
    db: &Bound<'_, PyUntypedArray>,
    dc: &Bound<'_, PyUntypedArray>,
    mut d_skip: PyReadwriteArray1<'_, f32>,
    mut d_dt_bias: PyReadwriteArray1<'_, f32>,
    mut d_state: PyReadwriteArray3<'_, f32>,
    skip: Option<PyReadonlyArray1<'_, f32>>,
    dt_bias: Option<PyReadonlyArray1<'_, f32>>,
    softplus: bool,
    z: Option<&Bound<'_, PyUntypedArray>>,
    dz: Option<&Bound<'_, PyUntypedArray>>,
    cu_seqlens: Option<PyReadonlyArray1<'_, i64>>,
) -> PyResult<()> {
    let given = SelectiveScan {
        x: view("x", x)?,
        dt: view("dt", dt)?,
        a: a.as_slice()?,
        b: view("b", b)?,
        c: view("c", c)?,
        skip: skip.as_ref().map(|s| s.as_slice()).transpose()?,
        dt_bias: dt_bias.as_ref().map(|s| s.as_slice()).transpose()?,
        softplus,
        gate: z.map(|z| view("z", z)).transpose()?,
    };
    let mut to = SelectiveOutputs {
        x: view_mut("dx", dx)?,
        dt: view_mut("d_dt", d_dt)?,
        a: da.as_slice_mut()?,
        b: view_mut("db", db)?,
        c: view_mut("dc", dc)?,
        skip: d_skip.as_slice_mut()?,
        dt_bias: d_dt_bias.as_slice_mut()?,
        gate: dz.map(|z| view_mut("dz", z)).transpose()?,
        state: d_state.as_slice_mut()?,
    };
    let bounds = cu_seqlens.as_ref().map(|bounds| offsets("cu_seqlens", bounds)).transpose()?;
    let (first, d_out) = (initial_state.as_slice()?, view("d_out", d_out)?);
    let work = BACKWARD * PER_STATE * size(given.x.shape()) * given.b.shape()[3] as f64;
    running::run(py, work, |execution| {
        scan::selective_scan_backward(given, bounds.as_deref(), first, d_out, &mut to, execution)
    })
}

/// Real and imaginary parts.
fn parts<'a>(arrays: &'a [PyReadonlyArray2<'_, f32>]) -> PyResult<[&'a [f32]; 2]> {
    let part = |i: usize| arrays.get(i).map_or(Ok(&[][..]), |a| a.as_slice());
    Ok([part(0)?, part(1)?])
}

/// The same of arrays to write.
fn parts_mut<'a>(arrays: &'a mut [PyReadwriteArray2<'_, f32>]) -> PyResult<[&'a mut [f32]; 2]> {
    let mut arrays = arrays.iter_mut();
    let mut part = || arrays.next().map_or(Ok(&mut [][..]), |a| a.as_slice_mut());
    Ok([part()?, part()?])
}

#[pyfunction]
#[pyo3(signature = (x, decay_less_1, b, c, state, out, *, skip=None, silu=false, cu_seqlens=None))]
pub(crate) fn diagonal_scan(
    py: Python<'_>,
    x: &Bound<'_, PyUntypedArray>,
    decay_less_1: Vec<PyReadonlyArray2<'_, f32>>,
    b: Vec<PyReadonlyArray2<'_, f32>>,
    c: Vec<PyReadonlyArray2<'_, f32>>,
    mut state: PyReadwriteArray4<'_, f32>,
    out: &Bound<'_, PyUntypedArray>,
    skip: Option<PyReadonlyArray1<'_, f32>>,
    silu: bool,
    cu_seqlens: Option<PyReadonlyArray1<'_, i64>>,
) -> PyResult<()> {
    let given = DiagonalScan {
        x: view("x", x)?,
        decay_less_1: parts(&decay_less_1)?,
        b: parts(&b)?,
        c: parts(&c)?,
        skip: skip.as_ref().map(|s| s.as_slice()).transpose()?,
        silu,
    };
    let mut out = view_mut("out", out)?;
    let bounds = cu_seqlens.as_ref().map(|bounds| offsets("cu_seqlens", bounds)).transpose()?;
    let work = size(given.x.shape()) * (state.as_array().shape()[3] * 4) as f64;
    let state = state.as_slice_mut()?;
    running::run(py, work, |execution| scan::diagonal_scan(given, bounds.as_deref(), state, &mut out, execution))
}

#[pyfunction]
#[pyo3(signature = (x, decay_less_1, b, c, initial_state, d_out, dx, d_decay, db, dc, d_skip, d_state, *, skip=None, cu_seqlens=None))]
pub(crate) fn diagonal_scan_backward(
    py: Python<'_>,
    x: &Bound<'_, PyUntypedArray>,
    decay_less_1: Vec<PyReadonlyArray2<'_, f32>>,
    b: Vec<PyReadonlyArray2<'_, f32>>,
    c: Vec<PyReadonlyArray2<'_, f32>>,
    initial_state: PyReadonlyArray4<'_, f32>,
    d_out: &Bound<'_, PyUntypedArray>,
    dx: &Bound<'_, PyUntypedArray>,
    mut d_decay: Vec<PyReadwriteArray2<'_, f32>>,
    mut db: Vec<PyReadwriteArray2<'_, f32>>,
    mut dc: Vec<PyReadwriteArray2<'_, f32>>,
    mut d_skip: PyReadwriteArray1<'_, f32>,
    mut d_state: PyReadwriteArray4<'_, f32>,
    skip: Option<PyReadonlyArray1<'_, f32>>,
    cu_seqlens: Option<PyReadonlyArray1<'_, i64>>,
) -> PyResult<()> {
    let given = DiagonalScan {
        x: view("x", x)?,
        decay_less_1: parts(&decay_less_1)?,
        b: parts(&b)?,
        c: parts(&c)?,
        skip: skip.as_ref().map(|s| s.as_slice()).transpose()?,
        silu: false,
    };
    let work = BACKWARD * size(given.x.shape()) * (d_state.as_array().shape()[3] * 4) as f64;
    let mut to = DiagonalOutputs {
        x: view_mut("dx", dx)?,
        decay: parts_mut(&mut d_decay)?,
        b: parts_mut(&mut db)?,
        c: parts_mut(&mut dc)?,
        skip: d_skip.as_slice_mut()?,
        state: d_state.as_slice_mut()?,
    };
    let bounds = cu_seqlens.as_ref().map(|bounds| offsets("cu_seqlens", bounds)).transpose()?;
    let (first, d_out) = (initial_state.as_slice()?, view("d_out", d_out)?);
    running::run(py, work, |execution| {
        scan::diagonal_scan_backward(given, bounds.as_deref(), first, d_out, &mut to, execution)
    })
}
