//! Hash tables that sample rows.

use super::Index;
use crate::errors::to_py;
use crate::store::KVStore;
use longattn::index::{LshOptions, LshTables};
use pyo3::prelude::*;

#[pyfunction]
pub(crate) fn lsh_tables(store: &KVStore, tables: usize, bits: usize, seed: u64) -> PyResult<Index> {
    let options = LshOptions { tables, bits, seed };
    Ok(Index::new(LshTables::new(store.inner().clone(), options).map_err(to_py)?))
}
