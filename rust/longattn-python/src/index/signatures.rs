//! Signatures.

use super::Index;
use crate::errors::to_py;
use crate::store::KVStore;
use longattn::index::{Hash, SignatureOptions, Signatures};
use numpy::{PyReadonlyArray3, PyUntypedArrayMethods};
use pyo3::prelude::*;

/// `hash_weights`, `[kv_heads, head_dim, code_bits]`, makes plain sign codes.
#[pyfunction]
#[pyo3(signature = (store, bits, seed, hash_weights, use_norm))]
pub(crate) fn signatures(
    store: &KVStore,
    bits: usize,
    seed: u64,
    hash_weights: Option<PyReadonlyArray3<'_, f32>>,
    use_norm: bool,
) -> PyResult<Index> {
    let hash = match &hash_weights {
        Some(weights) => Some(Hash { weights: weights.as_slice()?.to_vec(), code_bits: weights.shape()[2], use_norm }),
        None => None,
    };
    let options = SignatureOptions { bits, seed, hash };
    Ok(Index::new(Signatures::new(store.inner().clone(), options).map_err(to_py)?))
}

/// Root mean square of the codes' error per KV head, for a query of norm 1 at scale 1; empty for other indexes.
#[pyfunction]
pub(crate) fn signatures_sigma(py: Python<'_>, index: &Index) -> Vec<f32> {
    let sigma = |index: &Signatures| index.head_stats().iter().map(|s| s.sigma).collect();
    py.detach(|| index.inner().as_any().downcast_ref::<Signatures>().map_or_else(Vec::new, sigma))
}
