//! Inverted lists.

use super::Index;
use crate::errors::to_py;
use crate::store::KVStore;
use longattn::index::{InvertedListOptions, InvertedLists, Probe};
use pyo3::prelude::*;

/// Keys by their nearest centroid; `probe_rows` goes before `nprobe`.
#[pyfunction]
#[pyo3(signature = (store, lists, nprobe, probe_rows, seed))]
pub(crate) fn inverted_lists(
    store: &KVStore,
    lists: Option<usize>,
    nprobe: usize,
    probe_rows: Option<usize>,
    seed: u64,
) -> PyResult<Index> {
    let probe = probe_rows.map_or(Probe::Lists(nprobe), Probe::Rows);
    let options = InvertedListOptions { lists, probe, seed };
    Ok(Index::new(InvertedLists::new(store.inner().clone(), options).map_err(to_py)?))
}
