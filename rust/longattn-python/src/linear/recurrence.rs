//! Recurrences of matrix states.

use super::statistics::Given;
use crate::arrays::{view, view_mut};
use crate::dense::offsets;
use crate::running;
use longattn::linear::recurrence::{self as engine, Decay, Gradients, Outputs, Recurrence, Start};
use numpy::{PyReadonlyArray1, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Products of a state's size per row: update, read, and what rows have to do with each other.
const PRODUCTS: f64 = 4.0;

#[pyfunction]
#[pyo3(signature = (q, k, v, g, beta, delta, scale, unit, normaliser, skip, initial_state, cu_seqlens, chunk_size, out, out_state, *, columns=None, bonus=None, pair=None, squares=false, maps=(None, None)))]
pub(crate) fn recurrence(
    py: Python<'_>,
    q: &Bound<'_, PyUntypedArray>,
    k: Option<&Bound<'_, PyUntypedArray>>,
    v: &Bound<'_, PyUntypedArray>,
    g: Option<&Bound<'_, PyUntypedArray>>,
    beta: Option<&Bound<'_, PyUntypedArray>>,
    delta: bool,
    scale: f32,
    unit: Option<f32>,
    normaliser: Option<f32>,
    skip: Option<PyReadonlyArray1<'_, f32>>,
    initial_state: Option<&Bound<'_, PyUntypedArray>>,
    cu_seqlens: Option<PyReadonlyArray1<'_, i64>>,
    chunk_size: usize,
    out: &Bound<'_, PyUntypedArray>,
    out_state: &Bound<'_, PyUntypedArray>,
    columns: Option<bool>,
    bonus: Option<PyReadonlyArray1<'_, f32>>,
    pair: Option<[Bound<'_, PyUntypedArray>; 2]>,
    squares: bool,
    maps: (Option<Bound<'_, PyDict>>, Option<Bound<'_, PyDict>>),
) -> PyResult<()> {
    let k = k.map(|k| view("k", k)).transpose()?;
    let (q, v) = (view("q", q)?, view("v", v)?);
    let decay = match g {
        None => Decay::None,
        Some(x) if columns.is_some() => Decay::Value { g: view("g", x)?, fills: columns == Some(true) },
        Some(x) if x.shape().last() == Some(&1) && k.is_some() && bonus.is_none() && pair.is_none() => {
            Decay::Token(view("g", x)?)
        }
        Some(x) => Decay::Channel(view("g", x)?),
    };
    let beta = beta.map(|x| view("beta", x)).transpose()?;
    let start = match initial_state {
        None => Start::Zero,
        Some(x) if x.is(out_state) => Start::InPlace,
        Some(x) => Start::From(view("initial_state", x)?),
    };
    let ends = cu_seqlens.map(|x| offsets("cu_seqlens", &x)).transpose()?;
    let skip = skip.as_ref().map(|x| x.as_slice()).transpose()?;
    let bonus = bonus.as_ref().map(|x| x.as_slice()).transpose()?;
    let pair = match &pair {
        Some([a, b]) => Some([view("a", a)?, view("b", b)?]),
        None => None,
    };
    let given = [maps.0, maps.1].map(|parts| parts.map(|parts| Given::new(&parts)).transpose());
    let [of_q, of_k] = given;
    let (of_q, of_k) = (of_q?, of_k?);
    let map_q = of_q.as_ref().map(Given::map).transpose()?;
    let map_k = of_k.as_ref().map(Given::map).transpose()?;
    let (mut out, mut state) = (view_mut("out", out)?, view_mut("out_state", out_state)?);
    let [b, h, l, d] = [v.shape()[0], v.shape()[1], v.shape()[2], v.shape()[3] * state.shape()[2]];
    let operations = PRODUCTS * [b, h, l, d].iter().map(|&n| n as f64).product::<f64>();
    let of = Recurrence {
        q,
        k,
        v,
        decay,
        beta,
        delta,
        scale,
        unit,
        normaliser,
        skip,
        bonus,
        pair,
        squares,
        maps: [map_q.as_ref(), map_k.as_ref()],
        start,
        ends: ends.as_deref(),
        chunk: chunk_size,
    };
    running::run(py, operations, |execution| engine::recurrence(of, &mut out, &mut state, execution))
}

/// What a backward pass takes of the products of a forward pass.
const BACKWARD: f64 = 3.0;

#[pyfunction]
#[pyo3(signature = (q, k, v, g, beta, delta, scale, unit, normaliser, initial_state, cu_seqlens, chunk_size, d_out, d_state, out, dq, dk, dv, dg, d_beta, d_initial_state))]
pub(crate) fn recurrence_backward(
    py: Python<'_>,
    q: &Bound<'_, PyUntypedArray>,
    k: &Bound<'_, PyUntypedArray>,
    v: &Bound<'_, PyUntypedArray>,
    g: Option<&Bound<'_, PyUntypedArray>>,
    beta: Option<&Bound<'_, PyUntypedArray>>,
    delta: bool,
    scale: f32,
    unit: Option<f32>,
    normaliser: Option<f32>,
    initial_state: Option<&Bound<'_, PyUntypedArray>>,
    cu_seqlens: Option<PyReadonlyArray1<'_, i64>>,
    chunk_size: usize,
    d_out: &Bound<'_, PyUntypedArray>,
    d_state: Option<&Bound<'_, PyUntypedArray>>,
    out: Option<&Bound<'_, PyUntypedArray>>,
    dq: &Bound<'_, PyUntypedArray>,
    dk: &Bound<'_, PyUntypedArray>,
    dv: &Bound<'_, PyUntypedArray>,
    dg: Option<&Bound<'_, PyUntypedArray>>,
    d_beta: Option<&Bound<'_, PyUntypedArray>>,
    d_initial_state: &Bound<'_, PyUntypedArray>,
) -> PyResult<()> {
    let (q, k, v) = (view("q", q)?, view("k", k)?, view("v", v)?);
    let ends = cu_seqlens.map(|x| offsets("cu_seqlens", &x)).transpose()?;
    let of = Recurrence {
        q,
        k: Some(k),
        v,
        decay: match g {
            None => Decay::None,
            Some(x) if x.shape().last() == Some(&1) => Decay::Token(view("g", x)?),
            Some(x) => Decay::Channel(view("g", x)?),
        },
        beta: beta.map(|x| view("beta", x)).transpose()?,
        delta,
        scale,
        unit,
        normaliser,
        skip: None,
        bonus: None,
        pair: None,
        squares: false,
        maps: [None, None],
        start: match initial_state {
            None => Start::Zero,
            Some(x) => Start::From(view("initial_state", x)?),
        },
        ends: ends.as_deref(),
        chunk: chunk_size,
    };
    let given = Gradients {
        d_out: view("d_out", d_out)?,
        d_state: d_state.map(|x| view("d_state", x)).transpose()?,
        out: out.map(|x| view("out", x)).transpose()?,
    };
    let mut to = Outputs {
        q: view_mut("dq", dq)?,
        k: view_mut("dk", dk)?,
        v: view_mut("dv", dv)?,
        g: dg.map(|x| view_mut("dg", x)).transpose()?,
        beta: d_beta.map(|x| view_mut("d_beta", x)).transpose()?,
        state: view_mut("d_initial_state", d_initial_state)?,
    };
    let size: f64 = v.shape().iter().map(|&n| n as f64).product();
    let operations = BACKWARD * PRODUCTS * size * q.shape()[3] as f64;
    running::run(py, operations, |execution| engine::recurrence_backward(of, given, &mut to, execution))
}
