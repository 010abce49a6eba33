//! Indexes and retrieval attention.

use crate::arrays::{lse_view, view, view_mut};
use crate::errors::to_py;
use crate::running;
use crate::store::KVStore;
use longattn::index::{self, Hash, SignatureOptions};
use longattn::parallel::Execution;
use longattn::retrieval::{self, Rest, RetrievalOptions, Select};
use numpy::{PyReadonlyArray1, PyReadonlyArray3, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use std::sync::Arc;

/// Codes of every key of a store.
#[pyclass(frozen, module = "longattn._core")]
pub(crate) struct Signatures(Arc<index::Signatures>);

#[pymethods]
impl Signatures {
    /// `hash_weights`, `[kv_heads, head_dim, code_bits]`, makes plain sign codes.
    #[new]
    #[pyo3(signature = (store, bits, seed, hash_weights, use_norm))]
    fn new(
        store: &KVStore,
        bits: usize,
        seed: u64,
        hash_weights: Option<PyReadonlyArray3<'_, f32>>,
        use_norm: bool,
    ) -> PyResult<Self> {
        let hash = match &hash_weights {
            Some(weights) => {
                Some(Hash { weights: weights.as_slice()?.to_vec(), code_bits: weights.shape()[2], use_norm })
            }
            None => None,
        };
        let options = SignatureOptions { bits, seed, hash };
        Ok(Self(Arc::new(index::Signatures::new(store.inner().clone(), options).map_err(to_py)?)))
    }

    fn fork(&self, py: Python<'_>, store: &KVStore) -> PyResult<Self> {
        let copy = py.detach(|| self.0.fork(store.inner().clone())).map_err(to_py)?;
        Ok(Self(Arc::new(copy)))
    }

    // Whoever codes rows holds the index's lock, so even a look at it waits without the GIL.
    fn __len__(&self, py: Python<'_>) -> usize {
        py.detach(|| self.0.len())
    }

    fn update(&self, py: Python<'_>) -> PyResult<()> {
        let store = self.0.store();
        let coded = py.detach(|| self.0.len());
        // Coding costs about head_dim multiply-adds per number of the new keys, the clusters' fit a few times that.
        let rows = store.len().saturating_sub(coded) * store.kv_heads();
        let operations = (rows * store.head_dim() * (store.head_dim() + 2048)) as f64;
        running::run(py, operations, |execution| self.0.update(execution))
    }

    #[getter]
    fn nbytes(&self, py: Python<'_>) -> usize {
        py.detach(|| self.0.nbytes())
    }

    /// Root mean square of the codes' error per KV head, for a query of norm 1 at scale 1.
    fn sigma(&self, py: Python<'_>) -> Vec<f32> {
        py.detach(|| self.0.head_stats().iter().map(|s| s.sigma).collect())
    }
}

/// Statistics of a call, flat: `[kv_heads, queries]` each, the masses `[kv_heads, queries, group]`.
type Stats = (Vec<usize>, Vec<usize>, Vec<usize>, Vec<f32>, Vec<f32>, Vec<Vec<u32>>);

#[pyfunction]
#[pyo3(signature = (q, index, out, lse, top_k, top_p, sinks, window, scale, estimate_rest, sink_logits, keep_selected))]
pub(crate) fn retrieval_attention(
    py: Python<'_>,
    q: &Bound<'_, PyUntypedArray>,
    index: &Signatures,
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
        retrieval::retrieval_attention(q, &index.0, options, &mut out, &mut lse, keep_selected, execution)
    };
    let operations = (q.shape()[2] * index.0.store().len() * index.0.store().kv_heads() * 64) as f64;
    let rows = running::run(py, operations, work)?;
    let mut stats: Stats = Default::default();
    for row in rows {
        stats.0.push(row.keys_total);
        stats.1.push(row.keys_scored);
        stats.2.push(row.keys_attended);
        stats.3.extend(row.missed_mass);
        stats.4.extend(row.missed_mass_bound);
        stats.5.push(row.selected);
    }
    Ok(stats)
}
