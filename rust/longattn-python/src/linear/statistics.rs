//! Feature maps, sums over keys, and what queries read of them.

use crate::arrays::{view, view_mut};
use crate::running;
use longattn::linear::{
    self, FeatureMap, Map, Power, ReadOut, RowNorm, Sums, accumulate, feature_norms as norms, read,
};
use longattn::tensor::TensorView;
use numpy::{
    IntoPyArray, PyArray1, PyReadonlyArray1, PyReadonlyArrayDyn, PyReadwriteArray3, PyUntypedArray,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

type Floats<'py> = Bound<'py, PyArray1<f32>>;

/// What a dict that describes a feature map holds; keeps its arrays alive while [`Given::map`] looks at them.
pub(super) struct Given<'py> {
    map: String,
    scale: f32,
    norm: String,
    offset: f32,
    order: usize,
    coefficients: Option<[f32; 3]>,
    power: Option<(f32, bool)>,
    shift: Option<Bound<'py, PyUntypedArray>>,
    projection: Option<PyReadonlyArrayDyn<'py, f32>>,
    head_factors: Option<PyReadonlyArrayDyn<'py, f32>>,
    channel_factors: Option<PyReadonlyArrayDyn<'py, f32>>,
    row_factors: Option<PyReadonlyArrayDyn<'py, f32>>,
    rotation: Option<PyReadonlyArrayDyn<'py, f32>>,
}

impl<'py> Given<'py> {
    /// Reads the dict; a name that is no part of a map is an error.
    pub(super) fn new(parts: &Bound<'py, PyDict>) -> PyResult<Self> {
        let mut given = Self {
            map: "identity".into(),
            scale: 1.0,
            norm: "none".into(),
            offset: 0.0,
            order: 2,
            coefficients: None,
            power: None,
            shift: None,
            projection: None,
            head_factors: None,
            channel_factors: None,
            row_factors: None,
            rotation: None,
        };
        for (name, value) in parts {
            let name = name.cast::<PyString>()?;
            match name.to_cow()?.as_ref() {
                "map" => given.map = value.extract()?,
                "scale" => given.scale = value.extract()?,
                "norm" => given.norm = value.extract()?,
                "offset" => given.offset = value.extract()?,
                "order" => given.order = value.extract()?,
                "coefficients" => given.coefficients = Some(value.extract()?),
                "power" => given.power = Some(value.extract()?),
                "shift" => given.shift = Some(value.extract()?),
                "projection" => given.projection = Some(value.extract()?),
                "head_factors" => given.head_factors = Some(value.extract()?),
                "channel_factors" => given.channel_factors = Some(value.extract()?),
                "row_factors" => given.row_factors = Some(value.extract()?),
                "rotation" => given.rotation = Some(value.extract()?),
                other => return Err(PyTypeError::new_err(format!("map: got {other:?}, expected a part of a map"))),
            }
        }
        Ok(given)
    }

    /// The map as the core takes it, over the arrays held here.
    pub(super) fn map(&self) -> PyResult<FeatureMap<'_>> {
        fn slice<'a>(array: &'a Option<PyReadonlyArrayDyn<'_, f32>>) -> PyResult<Option<&'a [f32]>> {
            Ok(array.as_ref().map(|a| a.as_slice()).transpose()?)
        }
        let map = match self.map.as_str() {
            "identity" => Map::Identity,
            "relu" => Map::Relu,
            "relu2" => Map::ReluSquared,
            "elu1" => Map::Elu1,
            "exp" => Map::Exp,
            "silu" => Map::Silu,
            "softmax" => Map::Softmax,
            "softmax_pair" => Map::SoftmaxPair,
            "position_softmax" => Map::PositionSoftmax,
            "gaussian" => Map::Gaussian,
            "taylor" => Map::Taylor { order: self.order, coefficients: self.coefficients },
            other => return Err(PyTypeError::new_err(format!("map: got {other:?}, expected a known map"))),
        };
        let norm = match self.norm.as_str() {
            "length" => RowNorm::Length,
            "standard" => RowNorm::Standard,
            "largest" => RowNorm::Largest,
            _ => RowNorm::None,
        };
        let projection = match &self.projection {
            Some(matrix) => Some((matrix.as_slice()?, matrix.shape().iter().rev().nth(1).copied().unwrap_or(0))),
            None => None,
        };
        Ok(FeatureMap {
            shift: self.shift.as_ref().map(|shift| view("shift", shift)).transpose()?,
            scale: self.scale,
            head_factors: slice(&self.head_factors)?,
            norm,
            projection,
            map,
            offset: self.offset,
            channel_factors: slice(&self.channel_factors)?,
            power: self.power.map(|(exponent, keep_length)| Power { exponent, keep_length }),
            row_factors: slice(&self.row_factors)?,
            rotation: slice(&self.rotation)?,
        })
    }
}

fn operations(x: &TensorView, map: &FeatureMap, value_dim: usize) -> f64 {
    let [batch, heads, rows, dim] = x.shape();
    (batch * heads * rows) as f64 * map.features(dim) as f64 * value_dim as f64
}

#[pyfunction]
pub(crate) fn key_statistics<'py>(
    py: Python<'py>,
    k: &Bound<'py, PyUntypedArray>,
    v: &Bound<'py, PyUntypedArray>,
    map: &Bound<'py, PyDict>,
    keep: Option<PyReadonlyArrayDyn<'py, bool>>,
) -> PyResult<[Floats<'py>; 4]> {
    let (k, v, given) = (view("k", k)?, view("v", v)?, Given::new(map)?);
    let map = given.map()?;
    let keep = keep.as_ref().map(|keep| keep.as_slice()).transpose()?;
    let found =
        running::run(py, operations(&k, &map, v.shape()[3]), |execution| accumulate(k, v, &map, keep, execution))?;
    Ok([found.sums, found.totals, found.values, found.counts].map(|x| x.into_pyarray(py)))
}

/// A read-out by its name and two numbers.
fn read_out_of<'a>((kind, one, two): &(String, f32, f32), factors: &'a [f32]) -> PyResult<ReadOut<'a>> {
    let (one, two) = (*one, *two);
    Ok(match kind.as_str() {
        "plain" => ReadOut::Plain { factor: one, means: false },
        "plain_means" => ReadOut::Plain { factor: one, means: true },
        "divide" => ReadOut::Divide { eps: one, means: false },
        "divide_means" => ReadOut::Divide { eps: one, means: true },
        "clamp" => ReadOut::Clamp { least: one, factors },
        "subtract" => ReadOut::Subtract { scale: one },
        "magnitude" => ReadOut::Magnitude { scale: one, eps: two },
        other => return Err(PyTypeError::new_err(format!("read_out: got {other:?}, expected a known read-out"))),
    })
}

#[pyfunction]
pub(crate) fn running_softmax(
    py: Python<'_>,
    x: &Bound<'_, PyUntypedArray>,
    mut logs: PyReadwriteArray3<'_, f64>,
    out: &Bound<'_, PyUntypedArray>,
) -> PyResult<()> {
    let (x, mut out, logs) = (view("x", x)?, view_mut("out", out)?, logs.as_slice_mut()?);
    let work = 20.0 * x.shape().iter().map(|&n| n as f64).product::<f64>();
    running::run(py, work, |execution| linear::running_softmax(x, logs, &mut out, execution))
}

#[pyfunction]
pub(crate) fn running_read(
    py: Python<'_>,
    read: &Bound<'_, PyUntypedArray>,
    v: &Bound<'_, PyUntypedArray>,
    mut sums: PyReadwriteArray3<'_, f32>,
    count: u64,
    read_out: (String, f32, f32),
    factors: Option<PyReadonlyArray1<'_, f32>>,
    out: &Bound<'_, PyUntypedArray>,
) -> PyResult<()> {
    let (read, v, mut out, sums) = (view("q", read)?, view("v", v)?, view_mut("out", out)?, sums.as_slice_mut()?);
    let factors = factors.as_ref().map(|x| x.as_slice()).transpose()?.unwrap_or(&[]);
    let read_out = read_out_of(&read_out, factors)?;
    let work = 4.0 * read.shape().iter().map(|&n| n as f64).product::<f64>();
    running::run(py, work, |execution| linear::running_read(read, v, sums, count, read_out, &mut out, execution))
}

#[pyfunction]
pub(crate) fn read_statistics<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyUntypedArray>,
    map: &Bound<'py, PyDict>,
    statistics: [PyReadonlyArray1<'py, f32>; 4],
    heads: usize,
    read_out: (String, f32, f32),
    factors: Option<PyReadonlyArray1<'py, f32>>,
    add: Option<Bound<'py, PyUntypedArray>>,
    out: &Bound<'py, PyUntypedArray>,
) -> PyResult<()> {
    let (q, given, mut out) = (view("q", q)?, Given::new(map)?, view_mut("out", out)?);
    let map = given.map()?;
    let add = add.as_ref().map(|add| view("add", add)).transpose()?;
    let factors = factors.as_ref().map(|x| x.as_slice()).transpose()?.unwrap_or(&[]);
    let read_out = read_out_of(&read_out, factors)?;
    let [sums, totals, values, counts] = &statistics;
    let statistics = Sums {
        sums: sums.as_slice()?,
        totals: totals.as_slice()?,
        values: values.as_slice()?,
        counts: counts.as_slice()?,
        heads,
    };
    running::run(py, operations(&q, &map, out.shape()[3]), |execution| {
        read(q, &map, statistics, read_out, add, &mut out, execution)
    })
}

#[pyfunction]
pub(crate) fn feature_norms<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyUntypedArray>,
    map: &Bound<'py, PyDict>,
) -> PyResult<[Floats<'py>; 2]> {
    let (x, given) = (view("x", x)?, Given::new(map)?);
    let map = given.map()?;
    let [batch, heads, rows, _] = x.shape();
    let (mut before, mut after) = (vec![0f32; batch * heads * rows], vec![0f32; batch * heads * rows]);
    running::run(py, operations(&x, &map, 1), |execution| norms(x, &map, &mut before, &mut after, execution))?;
    Ok([before, after].map(|x| x.into_pyarray(py)))
}

/// Features `[batch * heads * rows * features]` of the rows of `x`.
#[pyfunction]
pub(crate) fn write_features<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyUntypedArray>,
    map: &Bound<'py, PyDict>,
) -> PyResult<Floats<'py>> {
    let (x, given) = (view("x", x)?, Given::new(map)?);
    let map = given.map()?;
    let [batch, heads, rows, dim] = x.shape();
    let mut out = vec![0f32; batch * heads * rows * map.features(dim)];
    running::run(py, operations(&x, &map, dim), |execution| linear::write_features(x, &map, &mut out, execution))?;
    Ok(out.into_pyarray(py))
}
