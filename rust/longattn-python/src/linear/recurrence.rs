//! Recurrences of matrix states.

use super::statistics::Given;
use crate::arrays::{broadcast, check_apart, row_numbers, view, view_mut};
use crate::dense::offsets;
use crate::running;
use longattn::linear::recurrence::{self as engine, Decay, Gradients, Outputs, Recurrence, Start};
use numpy::{PyReadonlyArray1, PyReadwriteArray4, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Products of a state's size per row: update, read, and what rows have to do with each other.
const PRODUCTS: f64 = 4.0;

/// What float64 arithmetic, row by row, costs beside that.
const SLOWER: f64 = 8.0;

type Array<'py> = Bound<'py, PyUntypedArray>;

/// What callers call queries, keys, values, decays and factors of updates.
const NAMES: [&str; 5] = ["q", "k", "v", "g", "beta"];

/// The decay that gates are: of rows or of channels, of keys or with `columns` of values.
fn decay<V>(g: Option<V>, by_row: bool, columns: Option<bool>) -> Decay<V> {
    match (g, columns) {
        (None, _) => Decay::None,
        (Some(g), Some(fills)) => Decay::Value { g, fills },
        (Some(g), None) if by_row => Decay::Token(g),
        (Some(g), None) => Decay::Channel(g),
    }
}

/// Whether gates have an axis less than values: one number for a row.
fn by_row(g: Option<&Array<'_>>, v: &Array<'_>) -> bool {
    g.is_some_and(|g| g.ndim() < v.ndim())
}

/// Results that share no memory with arguments, nor with each other.
fn check_results(
    names: Option<[String; 5]>,
    given: [Option<&Array<'_>>; 5],
    out: &Array<'_>,
    out_state: &Array<'_>,
) -> PyResult<()> {
    let mut known = NAMES;
    if let Some(names) = &names {
        known = names.each_ref().map(String::as_str);
    }
    let inputs = known.into_iter().zip(given);
    check_apart("out", out, inputs.clone())?;
    check_apart("out_state", out_state, inputs.chain([("out", Some(out))]))
}

#[pyfunction]
#[pyo3(signature = (q, k, v, g, beta, delta, scale, unit, normaliser, skip, initial_state, cu_seqlens, chunk_size, out, out_state, *, columns=None, bonus=None, pair=None, squares=false, maps=(None, None), names=None))]
pub(crate) fn recurrence(
    py: Python<'_>,
    q: &Array<'_>,
    k: Option<&Array<'_>>,
    v: &Array<'_>,
    g: Option<&Array<'_>>,
    beta: Option<&Array<'_>>,
    delta: bool,
    scale: f32,
    unit: Option<f32>,
    normaliser: Option<f32>,
    skip: Option<PyReadonlyArray1<'_, f32>>,
    initial_state: Option<&Array<'_>>,
    cu_seqlens: Option<PyReadonlyArray1<'_, i64>>,
    chunk_size: usize,
    out: &Array<'_>,
    out_state: &Array<'_>,
    columns: Option<bool>,
    bonus: Option<PyReadonlyArray1<'_, f32>>,
    pair: Option<[Array<'_>; 2]>,
    squares: bool,
    maps: (Option<Bound<'_, PyDict>>, Option<Bound<'_, PyDict>>),
    names: Option<[String; 5]>,
) -> PyResult<()> {
    check_results(names, [Some(q), k, Some(v), g, beta], out, out_state)?;
    let values = view("v", v)?;
    let rows = values.shape();
    let by_row = by_row(g, v);
    let g = g.map(|g| if by_row { row_numbers("g", g, rows) } else { view("g", g) }).transpose()?;
    let start = match initial_state {
        None => Start::Zero,
        Some(x) if x.is(out_state) => Start::InPlace,
        Some(x) => Start::From(view("initial_state", x)?),
    };
    let ends = cu_seqlens.map(|x| offsets("cu_seqlens", &x)).transpose()?;
    let skip = skip.as_ref().map(|x| x.as_slice()).transpose()?;
    let bonus = bonus.as_ref().map(|x| x.as_slice()).transpose()?;
    let given = [maps.0, maps.1].map(|parts| parts.map(|parts| Given::new(&parts)).transpose());
    let [of_q, of_k] = given;
    let (of_q, of_k) = (of_q?, of_k?);
    let map_q = of_q.as_ref().map(Given::map).transpose()?;
    let map_k = of_k.as_ref().map(Given::map).transpose()?;
    let of = Recurrence {
        q: view("q", q)?,
        k: k.map(|k| view("k", k)).transpose()?,
        v: values,
        decay: decay(g, by_row, columns),
        beta: beta.map(|x| row_numbers("beta", x, rows)).transpose()?,
        delta,
        scale,
        unit,
        normaliser,
        skip,
        bonus,
        pair: pair.as_ref().map(|[a, b]| PyResult::Ok([view("a", a)?, view("b", b)?])).transpose()?,
        squares,
        maps: [map_q.as_ref(), map_k.as_ref()],
        start,
        ends: ends.as_deref(),
        chunk: chunk_size,
    };
    let (mut out, mut state) = (view_mut("out", out)?, view_mut("out_state", out_state)?);
    let [b, h, l, d] = [of.v.shape()[0], of.v.shape()[1], of.v.shape()[2], of.v.shape()[3] * state.shape()[2]];
    let operations = PRODUCTS * [b, h, l, d].iter().map(|&n| n as f64).product::<f64>();
    running::run(py, operations, |execution| engine::recurrence(of, &mut out, &mut state, execution))
}

/// The recurrence of float64 arrays; `out_state` holds the states before the first row.
#[pyfunction]
#[pyo3(signature = (q, k, v, g, by_row, beta, delta, scale, unit, normaliser, skip, cu_seqlens, out, out_state, *, columns=None, bonus=None, pair=None))]
pub(crate) fn recurrence_double(
    py: Python<'_>,
    q: &Array<'_>,
    k: Option<&Array<'_>>,
    v: &Array<'_>,
    g: Option<&Array<'_>>,
    by_row: bool,
    beta: Option<&Array<'_>>,
    delta: bool,
    scale: f64,
    unit: Option<f64>,
    normaliser: Option<f64>,
    skip: Option<PyReadonlyArray1<'_, f64>>,
    cu_seqlens: Option<PyReadonlyArray1<'_, i64>>,
    mut out: PyReadwriteArray4<'_, f64>,
    mut out_state: PyReadwriteArray4<'_, f64>,
    columns: Option<bool>,
    bonus: Option<PyReadonlyArray1<'_, f64>>,
    pair: Option<[Array<'_>; 2]>,
) -> PyResult<()> {
    let ends = cu_seqlens.map(|x| offsets("cu_seqlens", &x)).transpose()?;
    let skip = skip.as_ref().map(|x| x.as_slice()).transpose()?;
    let bonus = bonus.as_ref().map(|x| x.as_slice()).transpose()?;
    let of = Recurrence {
        q: broadcast("q", q, b'f')?,
        k: k.map(|k| broadcast("k", k, b'f')).transpose()?,
        v: broadcast("v", v, b'f')?,
        decay: decay(g.map(|g| broadcast("g", g, b'f')).transpose()?, by_row, columns),
        beta: beta.map(|x| broadcast("beta", x, b'f')).transpose()?,
        delta,
        scale,
        unit,
        normaliser,
        skip,
        bonus,
        pair: pair
            .as_ref()
            .map(|[a, b]| PyResult::Ok([broadcast("a", a, b'f')?, broadcast("b", b, b'f')?]))
            .transpose()?,
        squares: false,
        maps: [None, None],
        start: Start::InPlace,
        ends: ends.as_deref(),
        chunk: 1,
    };
    let size: f64 = v.shape().iter().map(|&n| n as f64).product();
    let operations = SLOWER * PRODUCTS * size * q.shape().last().map_or(0.0, |&d| d as f64);
    let (out, state) = (out.as_slice_mut()?, out_state.as_slice_mut()?);
    running::run(py, operations, |execution| engine::double::recurrence(of, out, state, execution))
}

/// What a backward pass takes of the products of a forward pass.
const BACKWARD: f64 = 3.0;

#[pyfunction]
#[pyo3(signature = (q, k, v, g, beta, delta, scale, unit, normaliser, initial_state, cu_seqlens, chunk_size, d_out, d_state, out, dq, dk, dv, dg, d_beta, d_initial_state, *, pair=None, d_pair=None))]
pub(crate) fn recurrence_backward(
    py: Python<'_>,
    q: &Array<'_>,
    k: &Array<'_>,
    v: &Array<'_>,
    g: Option<&Array<'_>>,
    beta: Option<&Array<'_>>,
    delta: bool,
    scale: f32,
    unit: Option<f32>,
    normaliser: Option<f32>,
    initial_state: Option<&Array<'_>>,
    cu_seqlens: Option<PyReadonlyArray1<'_, i64>>,
    chunk_size: usize,
    d_out: &Array<'_>,
    d_state: Option<&Array<'_>>,
    out: Option<&Array<'_>>,
    dq: &Array<'_>,
    dk: &Array<'_>,
    dv: &Array<'_>,
    dg: Option<&Array<'_>>,
    d_beta: Option<&Array<'_>>,
    d_initial_state: &Array<'_>,
    pair: Option<[Array<'_>; 2]>,
    d_pair: Option<[Array<'_>; 2]>,
) -> PyResult<()> {
    let (q, k, v) = (view("q", q)?, view("k", k)?, view("v", v)?);
    let ends = cu_seqlens.map(|x| offsets("cu_seqlens", &x)).transpose()?;
    let width = g.and_then(|g| g.shape().last().copied());
    let of = Recurrence {
        q,
        k: Some(k),
        v,
        decay: decay(g.map(|g| view("g", g)).transpose()?, width == Some(1) && pair.is_none(), None),
        beta: beta.map(|x| view("beta", x)).transpose()?,
        delta,
        scale,
        unit,
        normaliser,
        skip: None,
        bonus: None,
        pair: pair.as_ref().map(|[a, b]| PyResult::Ok([view("a", a)?, view("b", b)?])).transpose()?,
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
        pair: d_pair.as_ref().map(|[a, b]| PyResult::Ok([view_mut("da", a)?, view_mut("db", b)?])).transpose()?,
        state: view_mut("d_initial_state", d_initial_state)?,
    };
    let size: f64 = v.shape().iter().map(|&n| n as f64).product();
    let operations = BACKWARD * PRODUCTS * size * q.shape()[3] as f64;
    running::run(py, operations, |execution| engine::recurrence_backward(of, given, &mut to, execution))
}
