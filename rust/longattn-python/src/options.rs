//! Options of attention calls, as the public functions pass them: a dict of what differs from the default.

use crate::arrays::{broadcast, view};
use longattn::dense::{Broadcast, Options, RelativeBias, Segments, State, double};
use numpy::{Element, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyFloat, PyString};

/// -1 is no bound.
fn window(n: i64) -> Option<usize> {
    usize::try_from(n).ok()
}

/// The type of a call's arithmetic.
pub(crate) trait Number: Element + Copy + Default {
    /// The nearest number of this type.
    fn from_f64(x: f64) -> Self;
}

impl Number for f32 {
    fn from_f64(x: f64) -> Self {
        x as f32
    }
}

impl Number for f64 {
    fn from_f64(x: f64) -> Self {
        x
    }
}

/// What a dict of options holds; keeps its arrays alive while [`Given::options`] looks at them.
#[derive(Default)]
pub(crate) struct Given<'py, F: Number = f32> {
    scale: Option<F>,
    row_scales: Option<Bound<'py, PyUntypedArray>>,
    causal: bool,
    window: Option<(i64, i64)>,
    softcap: F,
    bias: Option<Bound<'py, PyUntypedArray>>,
    mask: Option<Bound<'py, PyUntypedArray>>,
    alibi_slopes: Option<PyReadonlyArray2<'py, F>>,
    sinks: Option<PyReadonlyArray1<'py, F>>,
    relative_bias: Option<PyReadonlyArray2<'py, F>>,
    relative_zero: usize,
    segments: Option<(PyReadonlyArray2<'py, i32>, PyReadonlyArray2<'py, i32>)>,
    visible_until: Option<PyReadonlyArray2<'py, i32>>,
    skip_threshold: f32,
    qk_int8: bool,
    state: Option<(Bound<'py, PyUntypedArray>, Bound<'py, PyUntypedArray>)>,
}

impl<'py, F: Number> Given<'py, F> {
    /// Reads the dict; a name that is no option is an error.
    pub(crate) fn new(options: &Bound<'py, PyDict>) -> PyResult<Self> {
        let mut given = Self::default();
        for (name, value) in options {
            let name = name.cast::<PyString>()?;
            match name.to_cow()?.as_ref() {
                "scale" if value.is_instance_of::<PyFloat>() => given.scale = Some(F::from_f64(value.extract()?)),
                "scale" => given.row_scales = Some(value.extract()?),
                "causal" => given.causal = value.extract()?,
                "window" => given.window = Some(value.extract()?),
                "softcap" => given.softcap = F::from_f64(value.extract()?),
                "bias" => given.bias = Some(value.extract()?),
                "mask" => given.mask = Some(value.extract()?),
                "alibi_slopes" => given.alibi_slopes = Some(value.extract()?),
                "sinks" => given.sinks = Some(value.extract()?),
                "relative_bias" => given.relative_bias = Some(value.extract()?),
                "relative_zero" => given.relative_zero = value.extract()?,
                "segments" => given.segments = Some(value.extract()?),
                "visible_until" => given.visible_until = Some(value.extract()?),
                "skip_threshold" => given.skip_threshold = value.extract()?,
                "qk_int8" => given.qk_int8 = value.extract()?,
                "state" => given.state = Some(value.extract()?),
                other => return Err(PyTypeError::new_err(format!("options: got {other:?}, expected a known option"))),
            }
        }
        Ok(given)
    }

    /// The options as the core takes them, over the arrays held here, but for the state.
    pub(crate) fn scores(&self) -> PyResult<Options<'_, F>> {
        let (left, right) = self.window.unwrap_or((-1, -1));
        let relative_bias = |table| Ok::<_, PyErr>(RelativeBias { table, zero: self.relative_zero });
        Ok(Options {
            scale: self.scale,
            row_scales: self.row_scales.as_ref().map(|a| broadcast("scale", a, b'f')).transpose()?,
            causal: self.causal,
            window_left: window(left),
            window_right: window(right),
            softcap: self.softcap,
            bias: self.bias.as_ref().map(|a| broadcast("bias", a, b'f')).transpose()?,
            mask: self.mask.as_ref().map(|a| broadcast("mask", a, b'b')).transpose()?,
            alibi_slopes: self.alibi_slopes.as_ref().map(|a| a.as_slice()).transpose()?,
            sinks: self.sinks.as_ref().map(|a| a.as_slice()).transpose()?,
            relative_bias: self
                .relative_bias
                .as_ref()
                .map(|a| a.as_slice().map_err(PyErr::from).and_then(relative_bias))
                .transpose()?,
            segments: match &self.segments {
                Some((queries, keys)) => Some(Segments { queries: queries.as_slice()?, keys: keys.as_slice()? }),
                None => None,
            },
            visible_until: self.visible_until.as_ref().map(|a| a.as_slice()).transpose()?,
            skip_threshold: self.skip_threshold,
            qk_int8: self.qk_int8,
            state: None,
        })
    }
}

impl Given<'_> {
    /// The options as the core takes them, over the arrays held here.
    pub(crate) fn options(&self) -> PyResult<Options<'_>> {
        let state = match &self.state {
            Some((out, lse)) if lse.shape().len() == out.shape().len() - 1 => {
                Some(State { out: view("state", out)?, lse: view("state", lse)?.with_unit_axis() })
            }
            Some((_, lse)) => {
                return Err(PyValueError::new_err(format!("state: got an lse {:?}", lse.shape())));
            }
            None => None,
        };
        Ok(Options { state, ..self.scores()? })
    }
}

impl Given<'_, f64> {
    /// The state, whose lse has an axis of 1 at its end.
    pub(crate) fn state(&self) -> PyResult<Option<double::State<'_>>> {
        let array = |a| -> PyResult<Broadcast<'_, f64>> { broadcast("state", a, b'f') };
        self.state.as_ref().map(|(out, lse)| Ok(double::State { out: array(out)?, lse: array(lse)? })).transpose()
    }
}
