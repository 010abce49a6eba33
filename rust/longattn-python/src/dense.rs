//! Exact attention.

use crate::arrays::{broadcast, lse_view, view, view_mut};
use crate::errors::to_py;
use crate::running;
use crate::store::KvArgument;
use longattn::dense::{self, Options};
use longattn::tensor::{KvView, TensorView};
use numpy::{PyReadonlyArray1, PyReadonlyArray2, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// -1 is no bound.
fn window(n: i64) -> Option<usize> {
    usize::try_from(n).ok()
}

fn slice<'a, T: numpy::Element>(name: &str, array: &'a [T], n: usize) -> PyResult<&'a [T]> {
    if array.len() == n {
        Ok(array)
    } else {
        Err(PyValueError::new_err(format!("{name}: got {} numbers, expected {n}", array.len())))
    }
}

fn operations(q: &TensorView, k: &KvView, v: &KvView) -> f64 {
    let ([b, h, l, d], keys, dv) = (q.shape(), k.shape()[2], v.shape()[3]);
    [b, h, l, keys, d + dv].iter().map(|&n| n as f64).product()
}

#[pyfunction]
#[pyo3(signature = (q, k, v, out, lse, scale, causal, window_left, window_right, softcap, bias, mask, alibi_slopes, sinks))]
pub(crate) fn attention(
    py: Python<'_>,
    q: &Bound<'_, PyUntypedArray>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    out: &Bound<'_, PyUntypedArray>,
    lse: &Bound<'_, PyUntypedArray>,
    scale: f32,
    causal: bool,
    window_left: i64,
    window_right: i64,
    softcap: f32,
    bias: Option<&Bound<'_, PyUntypedArray>>,
    mask: Option<&Bound<'_, PyUntypedArray>>,
    alibi_slopes: Option<PyReadonlyArray2<'_, f32>>,
    sinks: Option<PyReadonlyArray1<'_, f32>>,
) -> PyResult<()> {
    let (q, k, v) = (view("q", q)?, KvArgument::new("k", k)?, KvArgument::new("v", v)?);
    let (k, v) = (k.view()?, v.view()?);
    let (mut out, mut lse) = (view_mut("out", out)?, lse_view("lse", lse)?);
    let options = Options {
        scale: Some(scale),
        causal,
        window_left: window(window_left),
        window_right: window(window_right),
        softcap,
        bias: bias.map(|a| broadcast("bias", a, b'f')).transpose()?,
        mask: mask.map(|a| broadcast("mask", a, b'b')).transpose()?,
        alibi_slopes: alibi_slopes.as_ref().map(|a| a.as_slice()).transpose()?,
        sinks: sinks.as_ref().map(|a| a.as_slice()).transpose()?,
    };
    running::run(py, operations(&q, &k, &v), |execution| {
        dense::attention(q, k, v, options, &mut out, &mut lse, execution)
    })
}

/// `[tokens, heads, dim]` as `[1, heads, tokens, dim]`.
fn packed<'a>(name: &'static str, array: &'a Bound<'_, PyUntypedArray>) -> PyResult<TensorView<'a>> {
    if array.shape().len() != 3 {
        return Err(PyValueError::new_err(format!(
            "{name}: got shape {:?}, expected [tokens, heads, dim]",
            array.shape()
        )));
    }
    Ok(view(name, array)?.swap_heads_and_length())
}

fn offsets(name: &str, array: &PyReadonlyArray1<'_, i64>) -> PyResult<Vec<usize>> {
    array
        .as_slice()?
        .iter()
        .map(|&n| {
            usize::try_from(n)
                .map_err(|_| PyValueError::new_err(format!("{name}: got {n}, expected no negative offsets")))
        })
        .collect()
}

#[pyfunction]
#[pyo3(signature = (q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, causal, window_left, window_right, softcap, alibi_slopes, sinks))]
pub(crate) fn attention_varlen(
    py: Python<'_>,
    q: &Bound<'_, PyUntypedArray>,
    k: &Bound<'_, PyUntypedArray>,
    v: &Bound<'_, PyUntypedArray>,
    out: &Bound<'_, PyUntypedArray>,
    lse: &Bound<'_, PyUntypedArray>,
    cu_seqlens_q: PyReadonlyArray1<'_, i64>,
    cu_seqlens_k: PyReadonlyArray1<'_, i64>,
    scale: f32,
    causal: bool,
    window_left: i64,
    window_right: i64,
    softcap: f32,
    alibi_slopes: Option<PyReadonlyArray1<'_, f32>>,
    sinks: Option<PyReadonlyArray1<'_, f32>>,
) -> PyResult<()> {
    let (q, k, v) = (packed("q", q)?, packed("k", k)?, packed("v", v)?);
    let mut out = view_mut("out", out)?.into_swapped_heads_and_length();
    let mut lse = lse_view("lse", lse)?;
    let (queries, keys) = (offsets("cu_seqlens_q", &cu_seqlens_q)?, offsets("cu_seqlens_k", &cu_seqlens_k)?);
    let heads = q.shape()[1];
    let options = Options {
        scale: Some(scale),
        causal,
        window_left: window(window_left),
        window_right: window(window_right),
        softcap,
        alibi_slopes: alibi_slopes.as_ref().map(|a| slice("alibi_slopes", a.as_slice()?, heads)).transpose()?,
        sinks: sinks.as_ref().map(|a| a.as_slice()).transpose()?,
        ..Options::default()
    };
    let longest = keys.windows(2).map(|w| w[1].saturating_sub(w[0])).max().unwrap_or(0);
    let operations = operations(&q, &k.into(), &v.into()) * longest as f64 / k.shape()[2].max(1) as f64;
    running::run(py, operations, |execution| {
        dense::attention_varlen(q, k, v, &queries, &keys, options, &mut out, &mut lse, execution)
    })
}

#[pyfunction]
pub(crate) fn merge(
    py: Python<'_>,
    outs: Vec<Bound<'_, PyUntypedArray>>,
    lses: Vec<Bound<'_, PyUntypedArray>>,
    out: &Bound<'_, PyUntypedArray>,
    lse: &Bound<'_, PyUntypedArray>,
) -> PyResult<()> {
    if outs.len() != lses.len() {
        return Err(PyValueError::new_err(format!(
            "parts: got {} outputs and {} lses, expected pairs",
            outs.len(),
            lses.len()
        )));
    }
    let parts = outs
        .iter()
        .zip(&lses)
        .map(|(o, l)| Ok((view("parts", o)?, view("parts", l)?.with_unit_axis())))
        .collect::<PyResult<Vec<_>>>()?;
    let (mut out, mut lse) = (view_mut("out", out)?, lse_view("lse", lse)?);
    py.detach(|| dense::merge(&parts, &mut out, &mut lse, &Default::default())).map_err(to_py)
}
