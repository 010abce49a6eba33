//! Clusters of keys.

use super::Index;
use crate::errors::to_py;
use crate::store::KVStore;
use longattn::index::{KeyClusterOptions, KeyClusters, UnitScore};
use pyo3::prelude::*;

#[pyfunction]
#[pyo3(signature = (store, segment, tail, keys_per_cluster, iterations, spherical, score, coded, seed))]
pub(crate) fn clusters(
    store: &KVStore,
    segment: usize,
    tail: usize,
    keys_per_cluster: usize,
    iterations: usize,
    spherical: bool,
    score: &str,
    coded: bool,
    seed: u64,
) -> PyResult<Index> {
    let score = UnitScore::from_parts(score, 0).map_err(to_py)?;
    let options = KeyClusterOptions { segment, tail, keys_per_cluster, iterations, spherical, score, coded, seed };
    Ok(Index::new(KeyClusters::new(store.inner().clone(), options).map_err(to_py)?))
}

/// Rows of each cluster of a KV head; empty for other indexes.
#[pyfunction]
pub(crate) fn clusters_members(py: Python<'_>, index: &Index, head: usize) -> PyResult<Vec<Vec<u32>>> {
    let members = |index: &KeyClusters| index.clusters(head);
    py.detach(|| index.inner().as_any().downcast_ref::<KeyClusters>().map_or_else(|| Ok(Vec::new()), members))
        .map_err(to_py)
}
