//! Retrieval attention.

use crate::arrays::{lse_view, view, view_mut};
use crate::index::Index;
use crate::running;
use longattn::parallel::Execution;
use longattn::retrieval::{self, ErrorBudget, Rest, RetrievalOptions, Sampling, Select};
use numpy::{PyReadonlyArray1, PyUntypedArray};
use pyo3::prelude::*;

/// Statistics of a call, flat: `[kv_heads, queries]` each, those of query heads `[kv_heads, queries, group]`.
#[derive(Default, IntoPyObject)]
pub(crate) struct Stats {
    keys_total: Vec<usize>,
    keys_scored: Vec<usize>,
    keys_attended: Vec<usize>,
    keys_sampled: Vec<usize>,
    index_bytes: Vec<usize>,
    verified: Vec<bool>,
    missed_mass: Vec<f32>,
    missed_mass_bound: Vec<f32>,
    error_estimate: Vec<f32>,
    selected: Vec<Vec<u32>>,
}

/// Seed, and epsilon, whether in units of the values, and deviations of a budget of error.
type SamplingArguments = (u64, Option<(f32, bool, [f64; 2])>);

#[pyfunction]
#[pyo3(signature = (q, index, out, lse, top_k, top_p, sinks, window, scale, estimate_rest, sink_logits, keep_selected, sampling))]
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
    sampling: Option<SamplingArguments>,
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
        sampling: sampling.map(|(seed, error)| Sampling {
            seed,
            error: error.map(|(epsilon, of_values, deviations)| ErrorBudget { epsilon, of_values, deviations }),
        }),
    };
    index.update(py)?;
    let work = |execution: &Execution| {
        retrieval::retrieval_attention(q, index.inner(), options, &mut out, &mut lse, keep_selected, execution)
    };
    let store = index.inner().store();
    let operations = (q.shape()[2] * store.len() * store.kv_heads() * 64) as f64;
    let rows = running::run(py, operations, work)?;
    let mut stats = Stats::default();
    for row in rows {
        stats.keys_total.push(row.keys_total);
        stats.keys_scored.push(row.keys_scored);
        stats.keys_attended.push(row.keys_attended);
        stats.keys_sampled.push(row.keys_sampled);
        stats.index_bytes.push(row.index_bytes);
        stats.verified.push(row.verified);
        stats.missed_mass.extend(row.missed_mass);
        stats.missed_mass_bound.extend(row.missed_mass_bound);
        stats.error_estimate.extend(row.error_estimate);
        stats.selected.push(row.selected);
    }
    Ok(stats)
}
