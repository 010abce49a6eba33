//! Signatures.

use super::Index;
use crate::errors::to_py;
use crate::store::KVStore;
use longattn::index::{SignatureOptions, Signatures};
use pyo3::prelude::*;

/// An index of rotated codes.
#[pyfunction]
pub(crate) fn signatures(store: &KVStore, bits: usize, seed: u64) -> PyResult<Index> {
    let options = SignatureOptions { bits, seed };
    Ok(Index::new(Signatures::new(store.inner().clone(), options).map_err(to_py)?))
}

/// Root mean square of the codes' error per KV head, for a query of norm 1 at scale 1; empty for other indexes.
#[pyfunction]
pub(crate) fn signatures_sigma(py: Python<'_>, index: &Index) -> Vec<f32> {
    let sigma = |index: &Signatures| index.head_stats().iter().map(|s| s.sigma).collect();
    py.detach(|| index.inner().as_any().downcast_ref::<Signatures>().map_or_else(Vec::new, sigma))
}
