//! `KVStore`.

use crate::arrays;
use crate::errors::to_py;
use longattn::kv::{ChannelScales, Format, KvStore, Reader};
use longattn::tensor::{DType, Error, KvView, TensorView};
use numpy::{PyReadonlyArray1, PyReadwriteArray1, PyUntypedArray};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;

/// Keys and values of one sequence in host memory.
#[pyclass(frozen, module = "longattn._core")]
pub(crate) struct KVStore(Arc<KvStore>);

impl KVStore {
    fn rows<'py>(&self, py: Python<'py>, values: bool) -> PyResult<Bound<'py, PyAny>> {
        let reader = self.0.read();
        let view = if values { reader.values() } else { reader.keys() };
        match view {
            KvView::Numbers(view) => Ok(Bound::new(py, Rows::new(&self.0, &view))?.into_any()),
            KvView::Codes(_) => {
                let rows = CodedRows { store: self.0.clone(), values, len: reader.len(), epoch: reader.epoch() };
                Ok(Bound::new(py, rows)?.into_any())
            }
        }
    }

    /// The store itself, for other bindings.
    pub(crate) fn inner(&self) -> &Arc<KvStore> {
        &self.0
    }
}

#[pymethods]
impl KVStore {
    #[new]
    #[pyo3(signature = (kv_heads, head_dim, value_dim, dtype, capacity, group_size, first_rows_scale, channel_scales))]
    fn new(
        kv_heads: usize,
        head_dim: usize,
        value_dim: usize,
        dtype: &str,
        capacity: usize,
        group_size: Option<usize>,
        first_rows_scale: bool,
        channel_scales: Option<PyReadonlyArray1<'_, f32>>,
    ) -> PyResult<Self> {
        let codes = |bits| -> PyResult<Format> {
            let channel_scales = match &channel_scales {
                Some(scales) => ChannelScales::Given(scales.as_slice()?.to_vec()),
                None if first_rows_scale => ChannelScales::FirstRows,
                None => ChannelScales::Off,
            };
            Ok(Format::Codes { bits, group_size, channel_scales })
        };
        let format = match (dtype, DType::from_name(dtype)) {
            ("int8", _) => codes(8)?,
            ("int4", _) => codes(4)?,
            (_, Some(dtype)) => Format::Numbers(dtype),
            _ => return Err(to_py(Error::dtype("dtype", dtype, "float32, float16, bfloat16, int8 or int4"))),
        };
        let store = KvStore::new(kv_heads, head_dim, value_dim, format, capacity).map_err(to_py)?;
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

    /// The keys stored now: an object that numpy can borrow, or coded rows.
    #[getter]
    fn keys<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.rows(py, false)
    }

    /// The values stored now, likewise.
    #[getter]
    fn values<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.rows(py, true)
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
    fn dtype(&self) -> String {
        self.0.storage().to_string()
    }

    /// Factors of the channels of keys, `[kv_heads * head_dim]`, where there are any.
    #[getter]
    fn channel_scales(&self) -> Option<Vec<f32>> {
        self.0.channel_scales().map(<[f32]>::to_vec)
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

/// Rows of a store, of any rank-3 shape: what `numpy.asarray` makes a read-only array of, whose base keeps the store alive.
/// numpy's protocol has no bfloat16, so its bits are given as uint16.
#[pyclass(frozen, module = "longattn._core")]
pub(crate) struct Rows {
    /// Keeps the memory at `address`.
    _owner: Arc<dyn Any + Send + Sync>,
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
        Self::of(store.clone(), rows.as_ptr() as usize, rows.dtype(), [heads, len, dim], strides)
    }

    /// Rows at `address`, readable as long as `owner` lives; strides in bytes.
    pub(crate) fn of(
        owner: Arc<dyn Any + Send + Sync>,
        address: usize,
        dtype: DType,
        shape: [usize; 3],
        strides: [isize; 3],
    ) -> Self {
        Self { _owner: owner, address, dtype, shape, strides }
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

/// Rows of a store that keeps codes, `[kv_heads, len, dim]`: what attention takes as keys or values, and what can be decoded.
#[pyclass(frozen, module = "longattn._core")]
pub(crate) struct CodedRows {
    store: Arc<KvStore>,
    values: bool,
    len: usize,
    /// The store's when they were taken: rows that were dropped since are not there any more, whatever came after them.
    epoch: u64,
}

impl CodedRows {
    fn of<'a>(&self, reader: &'a Reader) -> PyResult<KvView<'a>> {
        if let Some(left) = reader.store().low_water(self.epoch).filter(|&left| left < self.len) {
            let message = format!("store: got {left} rows, expected the {} that were there", self.len);
            return Err(PyValueError::new_err(message));
        }
        Ok(if self.values { reader.values() } else { reader.keys() }.rows(0..self.len))
    }

    fn row_bytes(&self) -> usize {
        let (keys, values) = self.store.row_bytes();
        if self.values { values } else { keys }
    }
}

#[pymethods]
impl CodedRows {
    #[getter]
    fn shape(&self) -> (usize, usize, usize) {
        let dim = if self.values { self.store.value_dim() } else { self.store.head_dim() };
        (self.store.kv_heads(), self.len, dim)
    }

    #[getter]
    fn dtype(&self) -> String {
        self.store.storage().to_string()
    }

    /// Bytes of these rows.
    #[getter]
    fn nbytes(&self) -> usize {
        self.store.kv_heads() * self.len * self.row_bytes()
    }

    /// Decodes the rows `start..start + n` of a head into `out`, `[n * dim]`.
    fn decode(&self, head: usize, start: usize, mut out: PyReadwriteArray1<'_, f32>) -> PyResult<()> {
        let reader = self.store.read();
        let KvView::Codes(rows) = self.of(&reader)? else { unreachable!("made for codes") };
        let (heads, len, dim) = self.shape();
        let out = out.as_slice_mut()?;
        if head >= heads || start > len || out.len() > (len - start) * dim || !out.len().is_multiple_of(dim) {
            return Err(PyValueError::new_err(format!("head {head}, rows from {start}: outside {heads} x {len}")));
        }
        for (j, row) in out.chunks_exact_mut(dim).enumerate() {
            rows.decode(head, start + j, row);
        }
        Ok(())
    }
}

/// Keys or values of a call: an array, or coded rows, whose store is kept from truncating while this lives.
pub(crate) enum KvArgument<'a> {
    Array(TensorView<'a>),
    Codes(&'a CodedRows, Reader<'a>),
}

impl<'a> KvArgument<'a> {
    pub(crate) fn new(name: &'static str, argument: &'a Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(rows) = argument.cast::<CodedRows>() {
            let rows = rows.get();
            return Ok(Self::Codes(rows, rows.store.read()));
        }
        Ok(Self::Array(arrays::view(name, argument.cast::<PyUntypedArray>()?)?))
    }

    pub(crate) fn view(&self) -> PyResult<KvView<'_>> {
        match self {
            Self::Array(view) => Ok((*view).into()),
            Self::Codes(rows, reader) => rows.of(reader),
        }
    }
}
