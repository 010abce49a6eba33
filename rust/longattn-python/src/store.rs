//! `KVStore`.

use crate::arrays;
use crate::errors::to_py;
use longattn::kv::KvStore;
use longattn::tensor::{DType, Error, TensorView};
use numpy::PyUntypedArray;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;
use std::sync::Arc;

/// Keys and values of one sequence in host memory.
#[pyclass(frozen, module = "longattn._core")]
pub(crate) struct KVStore(Arc<KvStore>);

impl KVStore {
    /// The store itself, for other bindings.
    pub(crate) fn inner(&self) -> &Arc<KvStore> {
        &self.0
    }
}

#[pymethods]
impl KVStore {
    #[new]
    fn new(kv_heads: usize, head_dim: usize, value_dim: usize, dtype: &str, capacity: usize) -> PyResult<Self> {
        let Some(dtype) = DType::from_name(dtype) else {
            return Err(to_py(Error::dtype("dtype", dtype, "float32, float16 or bfloat16")));
        };
        let store = KvStore::new(kv_heads, head_dim, value_dim, dtype, capacity).map_err(to_py)?;
        Ok(Self(Arc::new(store)))
    }

    /// Appends rows; returns the new length.
    fn append(&self, py: Python<'_>, k: &Bound<'_, PyUntypedArray>, v: &Bound<'_, PyUntypedArray>) -> PyResult<usize> {
        let (k, v) = (arrays::view("k", k)?, arrays::view("v", v)?);
        py.detach(|| self.0.append(&k, &v)).map_err(to_py)
    }

    /// Drops all rows from row `length` on.
    fn truncate(&self, py: Python<'_>, length: usize) {
        py.detach(|| self.0.truncate(length));
    }

    /// A store of its own with the same rows.
    fn fork(&self, py: Python<'_>) -> PyResult<Self> {
        let copy = py.detach(|| self.0.fork()).map_err(to_py)?;
        Ok(Self(Arc::new(copy)))
    }

    /// Writes the rows to a file.
    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        py.detach(|| self.0.save(path)).map_err(to_py)
    }

    /// Reads a store from a file.
    #[staticmethod]
    fn load(py: Python<'_>, path: PathBuf, capacity: Option<usize>) -> PyResult<Self> {
        let store = py.detach(|| KvStore::load(path, capacity)).map_err(to_py)?;
        Ok(Self(Arc::new(store)))
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// The keys stored now, as an object that numpy can borrow.
    #[getter]
    fn keys(&self) -> Rows {
        let reader = self.0.read();
        Rows::new(&self.0, &reader.keys())
    }

    /// The values stored now, as an object that numpy can borrow.
    #[getter]
    fn values(&self) -> Rows {
        let reader = self.0.read();
        Rows::new(&self.0, &reader.values())
    }

    #[getter]
    fn kv_heads(&self) -> usize {
        self.0.kv_heads()
    }

    #[getter]
    fn head_dim(&self) -> usize {
        self.0.head_dim()
    }

    #[getter]
    fn value_dim(&self) -> usize {
        self.0.value_dim()
    }

    #[getter]
    fn dtype(&self) -> &'static str {
        self.0.dtype().name()
    }

    #[getter]
    fn capacity(&self) -> usize {
        self.0.capacity()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.0.nbytes()
    }
}

/// Rows of a store, `[kv_heads, len, dim]`: what `numpy.asarray` makes a read-only array of, whose base keeps the store alive.
/// numpy's protocol has no bfloat16, so its bits are given as uint16.
#[pyclass(frozen, module = "longattn._core")]
pub(crate) struct Rows {
    /// Owns the memory at `address`.
    _store: Arc<KvStore>,
    address: usize,
    dtype: DType,
    shape: [usize; 3],
    /// In bytes.
    strides: [isize; 3],
}

impl Rows {
    fn new(store: &Arc<KvStore>, rows: &TensorView) -> Self {
        let ([_, heads, len, dim], strides) = (rows.shape(), rows.strides());
        let strides = [1, 2, 3].map(|axis| strides[axis] * rows.dtype().size() as isize);
        let (address, dtype) = (rows.as_ptr() as usize, rows.dtype());
        Self { _store: store.clone(), address, dtype, shape: [heads, len, dim], strides }
    }
}

#[pymethods]
impl Rows {
    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let typestr = match self.dtype {
            DType::F32 => "<f4",
            DType::F16 => "<f2",
            DType::BF16 => "<u2",
        };
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("typestr", typestr)?;
        interface.set_item("data", (self.address, true))?;
        interface.set_item("shape", <(usize, usize, usize)>::from(self.shape))?;
        interface.set_item("strides", <(isize, isize, isize)>::from(self.strides))?;
        Ok(interface)
    }
}
