//! Retrieval attention.

use crate::arrays::{lse_view, view, view_mut};
use crate::index::Index;
use crate::running;
use longattn::parallel::Execution;
use longattn::retrieval::{self, ErrorBudget, Rest, RetrievalOptions, RowStats, Sampling, Select, Sequence};
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
    scan_seconds: Vec<f32>,
    weigh_seconds: Vec<f32>,
    select_seconds: Vec<f32>,
    verified: Vec<bool>,
    missed_mass: Vec<f32>,
    missed_mass_bound: Vec<f32>,
    error_estimate: Vec<f32>,
    selected: Vec<Vec<u32>>,
}

/// Seed, and epsilon, whether in units of the values, and deviations of a budget of error.
type SamplingArguments = (u64, Option<(f32, bool, [f64; 2])>);

/// One sequence: `q`, index, `out`, `lse`, `top_k` (of all KV heads or of each), whether the rest is estimated.
type SequenceArguments<'py> = (
    Bound<'py, PyUntypedArray>,
    PyRef<'py, Index>,
    Bound<'py, PyUntypedArray>,
    Bound<'py, PyUntypedArray>,
    Option<Vec<usize>>,
    bool,
);

#[pyfunction]
#[pyo3(signature = (sequences, top_p, sinks, window, scale, sink_logits, keep_selected, sampling))]
pub(crate) fn retrieval_attention(
    py: Python<'_>,
    sequences: Vec<SequenceArguments<'_>>,
    top_p: f32,
    sinks: usize,
    window: usize,
    scale: f32,
    sink_logits: Option<PyReadonlyArray1<'_, f32>>,
    keep_selected: bool,
    sampling: Option<SamplingArguments>,
) -> PyResult<Vec<Stats>> {
    let sink_logits = sink_logits.as_ref().map(|a| a.as_slice()).transpose()?;
    let sampling = sampling.map(|(seed, error)| Sampling {
        seed,
        error: error.map(|(epsilon, of_values, deviations)| ErrorBudget { epsilon, of_values, deviations }),
    });
    let mut outputs = Vec::with_capacity(sequences.len());
    for (_, index, out, lse, ..) in &sequences {
        index.update(py)?;
        outputs.push((view_mut("out", out)?, lse_view("lse", lse)?));
    }
    let mut operations = 0.0;
    let mut calls = Vec::with_capacity(sequences.len());
    for ((q, index, _, _, top_k, estimate_rest), (out, lse)) in sequences.iter().zip(&mut outputs) {
        let (q, index) = (view("q", q)?, index.inner());
        operations += (q.shape()[2] * index.store().len() * index.store().kv_heads() * 64) as f64;
        let (select, by_head) = match top_k.as_deref() {
            None => (Select::TopP(top_p), None),
            Some([rows]) => (Select::TopK(*rows), None),
            Some(rows) => (Select::TopK(1), Some(rows)),
        };
        let options = RetrievalOptions {
            select,
            by_head,
            sinks,
            window,
            scale: Some(scale),
            rest: if *estimate_rest { Rest::Estimated } else { Rest::Ignored },
            sink_logits,
            sampling,
        };
        calls.push(Sequence { q, index, options, out, lse });
    }
    let calls = &mut calls;
    let work = |execution: &Execution| retrieval::retrieval_attention_batch(calls, keep_selected, execution);
    Ok(running::run(py, operations, work)?.into_iter().map(Stats::of).collect())
}

impl Stats {
    fn of(rows: Vec<RowStats>) -> Self {
        let mut stats = Self::default();
        for row in rows {
            stats.keys_total.push(row.keys_total);
            stats.keys_scored.push(row.keys_scored);
            stats.keys_attended.push(row.keys_attended);
            stats.keys_sampled.push(row.keys_sampled);
            stats.index_bytes.push(row.index_bytes);
            stats.scan_seconds.push(row.seconds.scan);
            stats.weigh_seconds.push(row.seconds.weigh);
            stats.select_seconds.push(row.seconds.select);
            stats.verified.push(row.verified);
            stats.missed_mass.extend(row.missed_mass);
            stats.missed_mass_bound.extend(row.missed_mass_bound);
            stats.error_estimate.extend(row.error_estimate);
            stats.selected.push(row.selected);
        }
        stats
    }
}
