//! Convolutions, short and long, and functions of single numbers.

use crate::arrays::{view, view_mut};
use crate::dense::offsets;
use crate::errors::to_py;
use crate::running;
use longattn::linear::convolution::Depthwise;
use longattn::linear::pointwise::Function;
use longattn::linear::toeplitz::{Toeplitz, ToeplitzAttention};
use longattn::linear::{convolution, dynamic, neighbours, pointwise};
use longattn::tensor::TensorView;
use numpy::{PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3, PyReadwriteArray1, PyUntypedArray};
use pyo3::prelude::*;

fn size(x: &TensorView) -> f64 {
    x.shape().iter().map(|&n| n as f64).product()
}

/// `depth` says, of an axis before the lines, how many there are in `x` and in `out`, taps, centre and stride; the taps' axes are then
/// one in `weights`.
#[pyfunction]
#[pyo3(signature = (x, weights, centre, out, *, bias=None, before=None, silu=false, cu_seqlens=None, stride=[1, 1],
    depth=[1, 1, 1, 0, 1]))]
pub(crate) fn depthwise(
    py: Python<'_>,
    x: &Bound<'_, PyUntypedArray>,
    weights: PyReadonlyArray3<'_, f32>,
    centre: [usize; 2],
    out: &Bound<'_, PyUntypedArray>,
    bias: Option<PyReadonlyArray1<'_, f32>>,
    before: Option<&Bound<'_, PyUntypedArray>>,
    silu: bool,
    cu_seqlens: Option<PyReadonlyArray1<'_, i64>>,
    stride: [usize; 2],
    depth: [usize; 5],
) -> PyResult<()> {
    let shape = weights.as_array().shape().to_vec();
    let [frames, out_frames, deep, before_frame, frame_stride] = depth;
    let taps = [deep, shape[0].checked_div(deep).unwrap_or(0), shape[1]];
    let given = Depthwise {
        x: view("x", x)?,
        frames: [frames, out_frames],
        weights: weights.as_slice()?,
        taps,
        centre: [before_frame, centre[0], centre[1]],
        stride: [frame_stride, stride[0], stride[1]],
        bias: bias.as_ref().map(|b| b.as_slice()).transpose()?,
        before: before.map(|b| view("initial_state", b)).transpose()?,
        silu,
    };
    let mut out = view_mut("out", out)?;
    let bounds = cu_seqlens.as_ref().map(|bounds| offsets("cu_seqlens", bounds)).transpose()?;
    let outputs = out.shape().iter().map(|&n| n as f64).product::<f64>();
    let work = outputs * taps.iter().product::<usize>() as f64;
    running::run(py, work, |execution| convolution::depthwise(given, bounds.as_deref(), &mut out, execution))
}

#[pyfunction]
#[pyo3(signature = (v, w, centre, softmax, out, *, before=None))]
pub(crate) fn dynamic_convolution(
    py: Python<'_>,
    v: &Bound<'_, PyUntypedArray>,
    w: &Bound<'_, PyUntypedArray>,
    centre: usize,
    softmax: bool,
    out: &Bound<'_, PyUntypedArray>,
    before: Option<&Bound<'_, PyUntypedArray>>,
) -> PyResult<()> {
    let (v, w, mut out) = (view("v", v)?, view("w", w)?, view_mut("out", out)?);
    let before = before.map(|b| view("initial_state", b)).transpose()?;
    let work = size(&v) * w.shape()[3] as f64;
    running::run(py, work, |execution| dynamic::dynamic_convolution(v, w, centre, softmax, before, &mut out, execution))
}

#[pyfunction]
pub(crate) fn neighbour_means(
    py: Python<'_>,
    x: &Bound<'_, PyUntypedArray>,
    size: usize,
    out: &Bound<'_, PyUntypedArray>,
) -> PyResult<()> {
    let (x, mut out) = (view("x", x)?, view_mut("out", out)?);
    let work = self::size(&x) * (size * size) as f64;
    running::run(py, work, |execution| neighbours::neighbour_means(x, size, &mut out, execution))
}

/// Multiply-adds of a number's way through transforms of `n` numbers.
fn transforms(n: usize) -> f64 {
    20.0 * (n.max(2) as f64).log2()
}

#[pyfunction]
pub(crate) fn toeplitz(
    py: Python<'_>,
    x: &Bound<'_, PyUntypedArray>,
    kernel: PyReadonlyArray2<'_, f64>,
    zero: usize,
    per_channel: bool,
    double: bool,
    out: &Bound<'_, PyUntypedArray>,
) -> PyResult<()> {
    let (x, mut out) = (view("x", x)?, view_mut("out", out)?);
    let given = Toeplitz { x, kernel: kernel.as_slice()?, zero, per_channel, double };
    let work = size(&x) * transforms(x.shape()[2]);
    running::run(py, work, |execution| longattn::linear::toeplitz::toeplitz(given, &mut out, execution))
}

#[pyfunction]
pub(crate) fn toeplitz_attention(
    py: Python<'_>,
    q: &Bound<'_, PyUntypedArray>,
    k: &Bound<'_, PyUntypedArray>,
    v: &Bound<'_, PyUntypedArray>,
    kernel: PyReadonlyArray2<'_, f64>,
    zero: usize,
    double: bool,
    out: &Bound<'_, PyUntypedArray>,
) -> PyResult<()> {
    let (q, k, v, mut out) = (view("q", q)?, view("k", k)?, view("v", v)?, view_mut("out", out)?);
    let given = ToeplitzAttention { q, k, v, kernel: kernel.as_slice()?, zero, double };
    let work = size(&q) * (v.shape()[3] + 1) as f64 * transforms(q.shape()[2].max(k.shape()[2]));
    running::run(py, work, |execution| longattn::linear::toeplitz::toeplitz_attention(given, &mut out, execution))
}

#[pyfunction]
#[pyo3(signature = (name, x, factor=None))]
pub(crate) fn pointwise_function(
    py: Python<'_>,
    name: &str,
    mut x: PyReadwriteArray1<'_, f32>,
    factor: Option<PyReadonlyArray1<'_, f32>>,
) -> PyResult<()> {
    let function = Function::from_name(name).map_err(to_py)?;
    let factor = factor.as_ref().map(|f| f.as_slice()).transpose()?;
    let x = x.as_slice_mut()?;
    running::run(py, 10.0 * x.len() as f64, |execution| pointwise::apply(function, x, factor, execution))
}
