//! `VirtualKVStore`.

use crate::arrays;
use crate::errors::to_py;
use crate::store::Rows;
use longattn::kv::{VirtualOptions, VirtualStore};
use longattn::tensor::{DType, Error};
use numpy::PyUntypedArray;
use pyo3::prelude::*;

/// Keys and values of a batch of requests in all layers.
#[pyclass(frozen, module = "longattn._core")]
pub(crate) struct VirtualKVStore(VirtualStore);

#[pymethods]
impl VirtualKVStore {
    #[new]
    fn new(
        py: Python<'_>,
        layers: usize,
        kv_heads: usize,
        head_dim: usize,
        value_dim: usize,
        dtype: &str,
        max_requests: usize,
        max_tokens: usize,
        granule: usize,
        deferred_reclaim: bool,
        eager: usize,
        background: bool,
    ) -> PyResult<Self> {
        let Some(dtype) = DType::from_name(dtype) else {
            return Err(to_py(Error::dtype("dtype", dtype, "float32, float16 or bfloat16")));
        };
        let options = VirtualOptions {
            layers,
            kv_heads,
            head_dim,
            value_dim,
            dtype,
            max_requests,
            max_tokens,
            granule,
            deferred_reclaim,
            eager,
            background,
        };
        py.detach(|| VirtualStore::new(options)).map(Self).map_err(to_py)
    }

    /// Gives a new request a slot.
    fn alloc(&self, py: Python<'_>) -> PyResult<usize> {
        py.detach(|| self.0.alloc()).map_err(to_py)
    }

    /// Takes a request's slot back.
    fn free(&self, py: Python<'_>, request: usize) -> PyResult<()> {
        py.detach(|| self.0.free(request)).map_err(to_py)
    }

    /// Makes room for rows of a request.
    fn ensure(&self, py: Python<'_>, request: usize, tokens: usize) -> PyResult<()> {
        py.detach(|| self.0.ensure(request, tokens)).map_err(to_py)
    }

    /// Rows that a request has asked for.
    fn tokens(&self, py: Python<'_>, request: usize) -> PyResult<usize> {
        py.detach(|| self.0.tokens(request)).map_err(to_py)
    }

    /// Keys and values of a request in one layer, as objects that numpy can borrow.
    fn view(&self, py: Python<'_>, request: usize, layer: usize) -> PyResult<(Rows, Rows)> {
        let VirtualOptions { kv_heads, head_dim, value_dim, dtype, .. } = *self.0.options();
        let (memory, tokens, addresses) = py
            .detach(|| {
                let rows = self.0.rows(request, layer)?;
                Ok((rows.memory, rows.tokens, [rows.keys as usize, rows.values as usize]))
            })
            .map_err(to_py)?;
        let rows = |address: usize, dim: usize| {
            let row = (dim * dtype.size()) as isize;
            let strides = [kv_heads as isize * row, row, dtype.size() as isize];
            Rows::of(memory.clone(), address, dtype, [tokens, kv_heads, dim], strides)
        };
        Ok((rows(addresses[0], head_dim), rows(addresses[1], value_dim)))
    }

    /// Writes rows of a request in one layer.
    fn write(
        &self,
        py: Python<'_>,
        request: usize,
        layer: usize,
        start: usize,
        k: &Bound<'_, PyUntypedArray>,
        v: &Bound<'_, PyUntypedArray>,
    ) -> PyResult<()> {
        let (k, v) = (arrays::view("k", k)?, arrays::view("v", v)?);
        py.detach(|| self.0.write(request, layer, start, &k, &v)).map_err(to_py)
    }

    /// Gives the memory of slots without a request back.
    fn reclaim(&self, py: Python<'_>) {
        py.detach(|| self.0.reclaim());
    }

    /// Waits until the background thread has nothing left to do.
    fn settle(&self, py: Python<'_>) {
        py.detach(|| self.0.settle());
    }

    /// Requests now, and slots without one.
    fn slots(&self, py: Python<'_>) -> (usize, usize) {
        py.detach(|| self.0.slots())
    }

    #[getter]
    fn committed_bytes(&self) -> usize {
        self.0.committed_bytes()
    }

    #[getter]
    fn reserved_bytes(&self) -> usize {
        self.0.reserved_bytes()
    }
}
