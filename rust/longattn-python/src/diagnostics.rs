//! Passes over queries and keys that look at the weights, selective attention, which is made of one, and attention whose weights
//! are not a softmax.

use crate::arrays::{lse_view, view, view_mut};
use crate::options::Given;
use crate::running;
use crate::store::KvArgument;
use longattn::dense::{self, Reductions, Weights};
use longattn::tensor::{KvView, TensorView};
use numpy::{PyReadonlyArray2, PyReadonlyArray3, PyReadwriteArray2, PyReadwriteArray3};
use numpy::{PyReadwriteArray4, PyUntypedArray};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Multiply-adds of `rows` query rows of each head over all keys.
fn operations(q: &TensorView, k: &KvView, rows: usize) -> f64 {
    let ([b, h, _, d], keys) = (q.shape(), k.shape()[2]);
    [b, h, rows, keys, d].iter().map(|&n| n as f64).product()
}

#[pyfunction]
pub(crate) fn attention_weights(
    py: Python<'_>,
    q: &Bound<'_, PyUntypedArray>,
    k: &Bound<'_, PyAny>,
    rows: Vec<usize>,
    lse: Option<PyReadonlyArray3<'_, f32>>,
    out: &Bound<'_, PyUntypedArray>,
    options: &Bound<'_, PyDict>,
) -> PyResult<()> {
    let (q, k, mut out) = (view("q", q)?, KvArgument::new("k", k)?, view_mut("out", out)?);
    let k = k.view()?;
    let lse = lse.as_ref().map(|a| a.as_slice()).transpose()?;
    let given = Given::new(options)?;
    let options = given.options()?;
    running::run(py, operations(&q, &k, rows.len()), |execution| {
        dense::attention_weights(q, k, &rows, lse, options, &mut out, execution)
    })
}

#[pyfunction]
#[pyo3(signature = (q, k, options, *, given_lse=None, lse=None, column_mass=None, query_weights=None, column_max=None,
    segment_mass=None, segment_ids=None, entropy=None, distance_moments=None, distance_limit=None, row_max=None,
    row_max_key=None))]
pub(crate) fn prob_reduce(
    py: Python<'_>,
    q: &Bound<'_, PyUntypedArray>,
    k: &Bound<'_, PyAny>,
    options: &Bound<'_, PyDict>,
    given_lse: Option<PyReadonlyArray3<'_, f32>>,
    mut lse: Option<PyReadwriteArray3<'_, f32>>,
    mut column_mass: Option<PyReadwriteArray3<'_, f32>>,
    query_weights: Option<PyReadonlyArray3<'_, f32>>,
    mut column_max: Option<PyReadwriteArray3<'_, f32>>,
    mut segment_mass: Option<PyReadwriteArray4<'_, f32>>,
    segment_ids: Option<PyReadonlyArray2<'_, i32>>,
    mut entropy: Option<PyReadwriteArray3<'_, f32>>,
    mut distance_moments: Option<PyReadwriteArray4<'_, f32>>,
    distance_limit: Option<f32>,
    mut row_max: Option<PyReadwriteArray3<'_, f32>>,
    mut row_max_key: Option<PyReadwriteArray3<'_, i64>>,
) -> PyResult<()> {
    let (q, k) = (view("q", q)?, KvArgument::new("k", k)?);
    let k = k.view()?;
    let given = Given::new(options)?;
    let options = given.options()?;
    let last_axis = |a: &Option<PyReadwriteArray4<'_, f32>>| a.as_ref().map_or(0, |a| a.as_array().shape()[3]);
    let (segments, moments) = (last_axis(&segment_mass), last_axis(&distance_moments));
    let reductions = Reductions {
        given_lse: given_lse.as_ref().map(|a| a.as_slice()).transpose()?,
        lse: lse.as_mut().map(|a| a.as_slice_mut()).transpose()?,
        column_mass: column_mass.as_mut().map(|a| a.as_slice_mut()).transpose()?,
        query_weights: query_weights.as_ref().map(|a| a.as_slice()).transpose()?,
        column_max: column_max.as_mut().map(|a| a.as_slice_mut()).transpose()?,
        segment_mass: segment_mass.as_mut().map(|a| a.as_slice_mut()).transpose()?,
        segment_ids: segment_ids.as_ref().map(|a| a.as_slice()).transpose()?.unwrap_or_default(),
        segments,
        entropy: entropy.as_mut().map(|a| a.as_slice_mut()).transpose()?,
        distance_moments: distance_moments.as_mut().map(|a| a.as_slice_mut()).transpose()?,
        moments,
        distance_limit,
        row_max: row_max.as_mut().map(|a| a.as_slice_mut()).transpose()?,
        row_max_key: row_max_key.as_mut().map(|a| a.as_slice_mut()).transpose()?,
    };
    let passes = if reductions.given_lse.is_some() { 1.0 } else { 2.0 };
    running::run(py, passes * operations(&q, &k, q.shape()[2]), |execution| {
        dense::prob_reduce(q, k, options, reductions, execution)
    })
}

#[pyfunction]
pub(crate) fn selective_attention(
    py: Python<'_>,
    q: &Bound<'_, PyUntypedArray>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    out: &Bound<'_, PyUntypedArray>,
    lse: &Bound<'_, PyUntypedArray>,
    mut state: PyReadwriteArray2<'_, f32>,
    selector_head: usize,
    protect_first: usize,
    scale: f32,
    softcap: f32,
) -> PyResult<()> {
    let (q, k, v) = (view("q", q)?, KvArgument::new("k", k)?, KvArgument::new("v", v)?);
    let (k, v) = (k.view()?, v.view()?);
    let (mut out, mut lse) = (view_mut("out", out)?, lse_view("lse", lse)?);
    let state = state.as_slice_mut()?;
    running::run(py, 2.0 * operations(&q, &k, q.shape()[2]), |execution| {
        dense::selective_attention(
            q,
            k,
            v,
            selector_head,
            protect_first,
            Some(scale),
            softcap,
            state,
            &mut out,
            &mut lse,
            execution,
        )
    })
}

#[pyfunction]
#[pyo3(signature = (q, k, v, out, options, *, signed=None, contrast=1.0))]
pub(crate) fn weighted_attention(
    py: Python<'_>,
    q: &Bound<'_, PyUntypedArray>,
    k: &Bound<'_, PyUntypedArray>,
    v: &Bound<'_, PyUntypedArray>,
    out: &Bound<'_, PyUntypedArray>,
    options: &Bound<'_, PyDict>,
    signed: Option<(f32, f32, bool, bool)>,
    contrast: f32,
) -> PyResult<()> {
    let (q, k, v, mut out) = (view("q", q)?, view("k", k)?, view("v", v)?, view_mut("out", out)?);
    let given = Given::new(options)?;
    let options = given.options()?;
    let weights = match signed {
        Some((similarity, distance, centred, doubled)) => Weights::Signed { similarity, distance, centred, doubled },
        None => Weights::Contrast { contrast },
    };
    running::run(py, 2.0 * operations(&q, &k.into(), q.shape()[2]), |execution| {
        dense::weighted_attention(q, k, v, weights, options, &mut out, execution)
    })
}
