//! The exact scan.

use super::Index;
use crate::errors::to_py;
use crate::store::KVStore;
use longattn::index::Flat;
use pyo3::prelude::*;

/// Scores every key exactly.
#[pyfunction]
pub(crate) fn flat(store: &KVStore) -> PyResult<Index> {
    Ok(Index::new(Flat::new(store.inner().clone()).map_err(to_py)?))
}
