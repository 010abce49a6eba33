//! `PrefixTree` and attention over it.

use crate::arrays::{self, lse_view, view, view_mut};
use crate::errors::to_py;
use crate::running;
use longattn::dense::{self, ChunkOptions};
use longattn::kv;
use longattn::tensor::{DType, Error};
use numpy::{PyReadonlyArray1, PyUntypedArray};
use pyo3::prelude::*;

/// Keys and values of many sequences that share what they have in common at the front.
#[pyclass(frozen, module = "longattn._core")]
pub(crate) struct PrefixTree(kv::PrefixTree);

#[pymethods]
impl PrefixTree {
    #[new]
    fn new(
        kv_heads: usize,
        head_dim: usize,
        value_dim: usize,
        dtype: &str,
        chunk_size: usize,
        capacity: usize,
    ) -> PyResult<Self> {
        let Some(dtype) = DType::from_name(dtype) else {
            return Err(to_py(Error::dtype("dtype", dtype, "float32, float16 or bfloat16")));
        };
        kv::PrefixTree::new(kv_heads, head_dim, value_dim, dtype, chunk_size, capacity).map(Self).map_err(to_py)
    }

    /// Adds a sequence; returns its number.
    fn add(
        &self,
        py: Python<'_>,
        tokens: PyReadonlyArray1<'_, i64>,
        k: &Bound<'_, PyUntypedArray>,
        v: &Bound<'_, PyUntypedArray>,
    ) -> PyResult<u64> {
        let (tokens, k, v) = (tokens.as_slice()?, arrays::view("k", k)?, arrays::view("v", v)?);
        py.detach(|| self.0.add(tokens, &k, &v)).map_err(to_py)
    }

    /// Appends tokens to one sequence.
    fn extend(
        &self,
        py: Python<'_>,
        sequence: u64,
        tokens: PyReadonlyArray1<'_, i64>,
        k: &Bound<'_, PyUntypedArray>,
        v: &Bound<'_, PyUntypedArray>,
    ) -> PyResult<()> {
        let (tokens, k, v) = (tokens.as_slice()?, arrays::view("k", k)?, arrays::view("v", v)?);
        py.detach(|| self.0.extend(sequence, tokens, &k, &v)).map_err(to_py)
    }

    /// Appends one token to each of `sequences` (all, ascending, if none are named): rows `[sequences, kv_heads, dim]`.
    fn append(
        &self,
        py: Python<'_>,
        sequences: Option<Vec<u64>>,
        tokens: PyReadonlyArray1<'_, i64>,
        k: &Bound<'_, PyUntypedArray>,
        v: &Bound<'_, PyUntypedArray>,
    ) -> PyResult<()> {
        let tokens = tokens.as_slice()?;
        let (k, v) = (view("k", k)?.swap_heads_and_length(), view("v", v)?.swap_heads_and_length());
        py.detach(|| self.0.append(sequences.as_deref(), tokens, &k, &v)).map_err(to_py)
    }

    /// Sequences that begin as one does now.
    fn fork(&self, py: Python<'_>, sequence: u64, n: usize) -> PyResult<Vec<u64>> {
        py.detach(|| self.0.fork(sequence, n)).map_err(to_py)
    }

    /// Drops a sequence.
    fn remove(&self, py: Python<'_>, sequence: u64) -> PyResult<()> {
        py.detach(|| self.0.remove(sequence)).map_err(to_py)
    }

    /// How many of the first tokens are stored.
    fn stored(&self, py: Python<'_>, tokens: PyReadonlyArray1<'_, i64>) -> PyResult<usize> {
        let tokens = tokens.as_slice()?;
        Ok(py.detach(|| self.0.read().stored(tokens)))
    }

    /// Number of tokens of a sequence.
    fn length(&self, py: Python<'_>, sequence: u64) -> PyResult<usize> {
        py.detach(|| self.0.read().len(sequence)).map_err(to_py)
    }

    /// Tokens of a sequence.
    fn tokens(&self, py: Python<'_>, sequence: u64) -> PyResult<Vec<i64>> {
        py.detach(|| self.0.read().tokens(sequence)).map_err(to_py)
    }

    /// Copies the first rows of a sequence.
    fn copy_rows(
        &self,
        py: Python<'_>,
        sequence: u64,
        k: &Bound<'_, PyUntypedArray>,
        v: &Bound<'_, PyUntypedArray>,
    ) -> PyResult<()> {
        let (mut k, mut v) = (view_mut("k", k)?, view_mut("v", v)?);
        py.detach(|| self.0.read().copy_rows(sequence, &mut k, &mut v)).map_err(to_py)
    }

    /// Numbers of all sequences, ascending.
    fn sequences(&self, py: Python<'_>) -> Vec<u64> {
        py.detach(|| self.0.read().sequences())
    }

    /// Numbers of all sequences, depth first.
    fn order(&self, py: Python<'_>) -> Vec<u64> {
        py.detach(|| self.0.read().order())
    }

    /// Chunks in use and tokens stored.
    fn usage(&self, py: Python<'_>) -> (usize, usize) {
        py.detach(|| {
            let reader = self.0.read();
            (reader.chunks(), reader.tokens_stored())
        })
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
    fn chunk_size(&self) -> usize {
        self.0.chunk_size()
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

/// Attention of one query row of each sequence: `q` and `out` are `[sequences, heads, dim]`, `lse` `[sequences, heads]`.
#[pyfunction]
#[pyo3(signature = (q, tree, sequences, out, lse, scale, softcap, sinks, shared))]
pub(crate) fn chunk_attention(
    py: Python<'_>,
    q: &Bound<'_, PyUntypedArray>,
    tree: &PrefixTree,
    sequences: Option<Vec<u64>>,
    out: &Bound<'_, PyUntypedArray>,
    lse: &Bound<'_, PyUntypedArray>,
    scale: f32,
    softcap: f32,
    sinks: Option<PyReadonlyArray1<'_, f32>>,
    shared: bool,
) -> PyResult<()> {
    let q = view("q", q)?.swap_heads_and_length();
    let mut out = view_mut("out", out)?.into_swapped_heads_and_length();
    let mut lse = lse_view("lse", lse)?.into_swapped_heads_and_length();
    let options =
        ChunkOptions { scale: Some(scale), softcap, sinks: sinks.as_ref().map(|a| a.as_slice()).transpose()?, shared };
    let tokens = py.detach(|| tree.0.read().total_len());
    let operations = [tokens, q.shape()[1], tree.0.head_dim() + tree.0.value_dim()].iter().map(|&n| n as f64).product();
    running::run(py, operations, |execution| {
        dense::chunk_attention(q, &tree.0, sequences.as_deref(), options, &mut out, &mut lse, execution)
    })
}
