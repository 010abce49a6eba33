//! Memories that learn while they read.

use crate::arrays::{view, view_mut};
use crate::running;
use longattn::linear::fast_weight::{self as engine, Activation, FastWeight, Loss, Memory, Residual, Retention};
use numpy::{PyReadonlyArray1, PyReadwriteArray1, PyUntypedArray};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Products of a weight per row: forward, gradient, update and read.
const PRODUCTS: f64 = 6.0;

#[pyfunction]
#[pyo3(signature = (q, k, v, rate, keep, momentum, threshold, widths, activation, residual, loss, retention, before, chunk, position, unit, scale, bias, out, live, step, frozen))]
pub(crate) fn fast_weight(
    py: Python<'_>,
    q: &Bound<'_, PyUntypedArray>,
    k: &Bound<'_, PyUntypedArray>,
    v: &Bound<'_, PyUntypedArray>,
    rate: &Bound<'_, PyUntypedArray>,
    keep: Option<&Bound<'_, PyUntypedArray>>,
    momentum: Option<&Bound<'_, PyUntypedArray>>,
    threshold: Option<&Bound<'_, PyUntypedArray>>,
    widths: Vec<usize>,
    activation: &str,
    residual: Option<(PyReadonlyArray1<'_, f32>, PyReadonlyArray1<'_, f32>, f32)>,
    loss: (String, f32, f32),
    retention: (String, f32, bool),
    before: bool,
    chunk: usize,
    position: usize,
    unit: Option<f32>,
    scale: f32,
    bias: bool,
    out: &Bound<'_, PyUntypedArray>,
    mut live: PyReadwriteArray1<'_, f32>,
    mut step: PyReadwriteArray1<'_, f32>,
    mut frozen: PyReadwriteArray1<'_, f32>,
) -> PyResult<()> {
    let activation = match activation {
        "silu" => Activation::Silu,
        "gelu" => Activation::Gelu,
        other => return Err(PyValueError::new_err(format!("activation: got {other:?}, expected 'silu' or 'gelu'"))),
    };
    let (kind, one, two) = loss;
    let loss = match kind.as_str() {
        "square" => Loss::Square { factor: one },
        "power" => Loss::Power { exponent: one, steepness: two },
        "signs" => Loss::HuberSigns,
        "length" => Loss::HuberLength,
        "each" => Loss::HuberEach,
        other => return Err(PyValueError::new_err(format!("loss: got {other:?}, expected a known loss"))),
    };
    let (kind, number, by_token) = retention;
    let retention = match kind.as_str() {
        "plain" => Retention::Plain,
        "norm" => Retention::Norm { exponent: number, by_token },
        "softmax" => Retention::Softmax { total: number, by_token },
        other => return Err(PyValueError::new_err(format!("retention: got {other:?}, expected a known retention"))),
    };
    let residual = match &residual {
        Some((gain, shift, eps)) => Some(Residual { gain: gain.as_slice()?, shift: shift.as_slice()?, eps: *eps }),
        None => None,
    };
    let of = FastWeight {
        q: view("q", q)?,
        k: view("k", k)?,
        v: view("v", v)?,
        rate: view("rate", rate)?,
        keep: keep.map(|x| view("keep", x)).transpose()?,
        momentum: momentum.map(|x| view("momentum", x)).transpose()?,
        threshold: threshold.map(|x| view("threshold", x)).transpose()?,
        widths: &widths,
        bias,
        activation,
        residual,
        loss,
        retention,
        before,
        chunk,
        position,
        unit,
        scale,
    };
    let [b, h, l, _] = of.k.shape();
    let operations = PRODUCTS * (b * h * l) as f64 * of.weights() as f64;
    let mut out = view_mut("out", out)?;
    let memory = Memory { live: live.as_slice_mut()?, step: step.as_slice_mut()?, frozen: frozen.as_slice_mut()? };
    running::run(py, operations, |execution| engine::fast_weight(of, &mut out, memory, execution))
}
