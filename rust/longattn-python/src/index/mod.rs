//! Indexes: one class for all, one function per kind that makes it.

pub(crate) mod clusters;
pub(crate) mod collisions;
pub(crate) mod features;
pub(crate) mod flat;
pub(crate) mod graph;
pub(crate) mod hashes;
pub(crate) mod inverted_lists;
pub(crate) mod lsh;
pub(crate) mod pages;
pub(crate) mod product;
pub(crate) mod signatures;

use crate::errors::to_py;
use crate::running;
use crate::store::KVStore;
use longattn::index;
use pyo3::prelude::*;
use std::path::PathBuf;
use std::sync::Arc;

/// An index over the rows of a store.
#[pyclass(frozen, module = "longattn._core")]
pub(crate) struct Index(Arc<dyn index::Index>);

impl Index {
    /// Wraps an index that was made.
    pub(crate) fn new(index: impl index::Index) -> Self {
        Self(Arc::new(index))
    }

    /// The index itself, for other bindings.
    pub(crate) fn inner(&self) -> &dyn index::Index {
        &*self.0
    }
}

#[pymethods]
impl Index {
    // Whoever indexes rows holds the index's lock, so even a look at it waits without the GIL.
    fn __len__(&self, py: Python<'_>) -> usize {
        py.detach(|| self.0.len())
    }

    #[getter]
    fn kind(&self) -> &'static str {
        self.0.kind()
    }

    #[getter]
    fn estimates(&self) -> bool {
        self.0.estimates()
    }

    #[getter]
    fn weighs_rows(&self) -> bool {
        self.0.weighs_rows()
    }

    #[getter]
    fn nbytes(&self, py: Python<'_>) -> usize {
        py.detach(|| self.0.nbytes())
    }

    pub(crate) fn update(&self, py: Python<'_>) -> PyResult<()> {
        let operations = py.detach(|| self.0.pending_operations());
        running::run(py, operations, |execution| self.0.update(execution))
    }

    fn fork(&self, py: Python<'_>, store: &KVStore) -> PyResult<Self> {
        py.detach(|| self.0.fork(store.inner().clone())).map(Self).map_err(to_py)
    }

    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        py.detach(|| index::save(&*self.0, path)).map_err(to_py)
    }

    #[staticmethod]
    fn load(py: Python<'_>, path: PathBuf, store: &KVStore) -> PyResult<Self> {
        py.detach(|| index::load(path, store.inner().clone())).map(Self).map_err(to_py)
    }

    /// What it was made with, as a JSON text.
    fn parameters(&self, py: Python<'_>) -> String {
        py.detach(|| serde_json::Value::Object(self.0.parameters()).to_string())
    }
}
