//! Retrieval attention.

use crate::arrays::{lse_view, view, view_mut};
use crate::index::Index;
use crate::running;
use longattn::parallel::Execution;
use longattn::retrieval::{self, Rest, RetrievalOptions, Select};
use numpy::{PyReadonlyArray1, PyUntypedArray};
use pyo3::prelude::*;

/// Statistics of a call, flat: `[kv_heads, queries]` each, the masses `[kv_heads, queries, group]`.
type Stats = (Vec<usize>, Vec<usize>, Vec<usize>, Vec<usize>, Vec<f32>, Vec<f32>, Vec<Vec<u32>>);

#[pyfunction]
#[pyo3(signature = (q, index, out, lse, top_k, top_p, sinks, window, scale, estimate_rest, sink_logits, keep_selected))]
pub(crate) fn retrieval_attention(
    py: Python<'_>,
    q: &Bound<'_, PyUntypedArray>,
    index: &Index,
    out: &Bound<'_, PyUntypedArray>,
    lse: &Bound<'_, PyUntypedArray>,
    top_k: Option<usize>,
    top_p: f32,
    sinks: usize,
    window: usize,
    scale: f32,
    estimate_rest: bool,
    sink_logits: Option<PyReadonlyArray1<'_, f32>>,
    keep_selected: bool,
) -> PyResult<Stats> {
    let q = view("q", q)?;
    let (mut out, mut lse) = (view_mut("out", out)?, lse_view("lse", lse)?);
    let options = RetrievalOptions {
        select: top_k.map_or(Select::TopP(top_p), Select::TopK),
        sinks,
        window,
        scale: Some(scale),
        rest: if estimate_rest { Rest::Estimated } else { Rest::Ignored },
        sink_logits: sink_logits.as_ref().map(|a| a.as_slice()).transpose()?,
    };
    index.update(py)?;
    let work = |execution: &Execution| {
        retrieval::retrieval_attention(q, index.inner(), options, &mut out, &mut lse, keep_selected, execution)
    };
    let store = index.inner().store();
    let operations = (q.shape()[2] * store.len() * store.kv_heads() * 64) as f64;
    let rows = running::run(py, operations, work)?;
    let mut stats: Stats = Default::default();
    for row in rows {
        stats.0.push(row.keys_total);
        stats.1.push(row.keys_scored);
        stats.2.push(row.keys_attended);
        stats.3.push(row.index_bytes);
        stats.4.extend(row.missed_mass);
        stats.5.extend(row.missed_mass_bound);
        stats.6.push(row.selected);
    }
    Ok(stats)
}
