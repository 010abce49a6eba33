//! Pages.

use super::Index;
use crate::errors::to_py;
use crate::store::KVStore;
use longattn::index::{PageOptions, Pages, UnitScore};
use pyo3::prelude::*;

/// `landmark` is a place in each page, for the score of that name.
#[pyfunction]
#[pyo3(signature = (store, page_size, score, landmark))]
pub(crate) fn pages(store: &KVStore, page_size: usize, score: &str, landmark: usize) -> PyResult<Index> {
    let options = PageOptions { page_size, score: UnitScore::from_parts(score, landmark).map_err(to_py)? };
    Ok(Index::new(Pages::new(store.inner().clone(), options).map_err(to_py)?))
}
