//! `SlotStore` and attention over it, and attention over listed rows of arrays.

use crate::arrays::{self, lse_view, view, view_mut};
use crate::dense::operations;
use crate::errors::to_py;
use crate::running;
use crate::store::KvArgument;
use longattn::dense::{self, Options, Reduce};
use longattn::kv::{self, Observe};
use longattn::tensor::{DType, Error};
use numpy::{PyArray1, PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray1, PyUntypedArray};
use pyo3::prelude::*;

/// The kept rows of one sequence, in slots.
#[pyclass(frozen, module = "longattn._core")]
pub(crate) struct SlotStore(kv::SlotStore);

#[pymethods]
impl SlotStore {
    #[new]
    fn new(kv_heads: usize, head_dim: usize, value_dim: usize, dtype: &str, slots: usize) -> PyResult<Self> {
        let Some(dtype) = DType::from_name(dtype) else {
            return Err(to_py(Error::dtype("dtype", dtype, "float32, float16 or bfloat16")));
        };
        kv::SlotStore::new(kv_heads, head_dim, value_dim, dtype, slots).map(Self).map_err(to_py)
    }

    /// Appends rows; `slots` `[kv_heads * T]` receives where they went.
    fn append(
        &self,
        py: Python<'_>,
        k: &Bound<'_, PyUntypedArray>,
        v: &Bound<'_, PyUntypedArray>,
        keep: Option<PyReadonlyArray1<'_, u8>>,
        fold: bool,
        mut slots: PyReadwriteArray1<'_, i64>,
    ) -> PyResult<()> {
        let (k, v) = (arrays::view("k", k)?, arrays::view("v", v)?);
        let keep = keep.as_ref().map(|a| a.as_slice()).transpose()?;
        let to = slots.as_slice_mut()?;
        let expected = self.0.kv_heads() * k.shape()[2];
        if to.len() != expected {
            return Err(to_py(Error::value("slots", format!("{} numbers", to.len()), expected)));
        }
        let taken = py.detach(|| self.0.append(&k, &v, keep, fold)).map_err(to_py)?;
        to.copy_from_slice(&taken);
        Ok(())
    }

    /// Frees the slots where `mask` `[kv_heads * slots]` is not zero; how many each head freed.
    fn evict(&self, py: Python<'_>, mask: PyReadonlyArray1<'_, u8>, fold: bool) -> PyResult<Vec<usize>> {
        let mask = mask.as_slice()?;
        py.detach(|| self.0.evict(mask, fold)).map_err(to_py)
    }

    /// Forgets everything.
    fn clear(&self, py: Python<'_>) {
        py.detach(|| self.0.clear());
    }

    /// Attention of the last rows appended: `q` and `out` are `[heads, queries, dim]`, `lse` `[heads, queries]`.
    #[pyo3(signature = (q, out, lse, scale, softcap, sinks, within, bias, reduce, logits_of, observed))]
    fn attend(
        &self,
        py: Python<'_>,
        q: &Bound<'_, PyUntypedArray>,
        out: &Bound<'_, PyUntypedArray>,
        lse: &Bound<'_, PyUntypedArray>,
        scale: f32,
        softcap: f32,
        sinks: Option<PyReadonlyArray1<'_, f32>>,
        within: Option<PyReadonlyArray1<'_, u8>>,
        bias: Option<PyReadonlyArray1<'_, f32>>,
        reduce: Option<&str>,
        logits_of: Option<usize>,
        mut observed: PyReadwriteArray1<'_, f32>,
    ) -> PyResult<()> {
        let (q, mut out, mut lse) = (view("q", q)?, view_mut("out", out)?, lse_view("lse", lse)?);
        let sinks = sinks.as_ref().map(|a| a.as_slice()).transpose()?;
        let within = within.as_ref().map(|a| a.as_slice()).transpose()?;
        let bias = bias.as_ref().map(|a| a.as_slice()).transpose()?;
        let observed = observed.as_slice_mut()?;
        let observe = match (reduce, logits_of) {
            (None, None) => Observe::Nothing,
            (Some("max"), None) => Observe::Weights(Reduce::Max),
            (Some("mean"), None) => Observe::Weights(Reduce::Mean),
            (Some("sum"), None) => Observe::Weights(Reduce::Sum),
            (None, Some(head)) => Observe::Logits(head),
            (Some(other), _) => return Err(to_py(Error::value("reduce", other, "max, mean or sum, or logits_of"))),
        };
        let options = Options { scale: Some(scale), softcap, sinks, ..Options::default() };
        let [_, heads, queries, dim] = q.shape();
        let rows = self.0.live().into_iter().max().unwrap_or(0);
        let operations = [heads, queries, rows, dim + self.0.value_dim()].iter().map(|&n| n as f64).product();
        running::run(py, operations, |execution| {
            self.0.attend(q, options, within, bias, observe, observed, &mut out, &mut lse, execution)
        })
    }

    /// Position of the row in each slot, `[kv_heads * slots]`.
    fn positions(&self, mut to: PyReadwriteArray1<'_, i64>) -> PyResult<()> {
        self.0.positions(to.as_slice_mut()?).map_err(to_py)
    }

    /// Copies the rows of a head, `[1, live, dim]`, oldest first; returns their positions.
    fn copy_rows(
        &self,
        py: Python<'_>,
        head: usize,
        k: &Bound<'_, PyUntypedArray>,
        v: &Bound<'_, PyUntypedArray>,
    ) -> PyResult<Vec<i64>> {
        let (mut k, mut v) = (view_mut("k", k)?, view_mut("v", v)?);
        py.detach(|| self.0.copy_rows(head, &mut k, &mut v)).map_err(to_py)
    }

    /// Copies the mean rows of a head; returns how many rows they are the means of.
    fn copy_mean(
        &self,
        head: usize,
        mut key: PyReadwriteArray1<'_, f64>,
        mut value: PyReadwriteArray1<'_, f64>,
    ) -> PyResult<u64> {
        self.0.copy_mean(head, key.as_slice_mut()?, value.as_slice_mut()?).map_err(to_py)
    }

    #[getter]
    fn appended(&self) -> usize {
        self.0.appended()
    }

    #[getter]
    fn live(&self) -> Vec<usize> {
        self.0.live()
    }

    #[getter]
    fn folded(&self) -> Vec<u64> {
        self.0.folded()
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
    fn slots(&self) -> usize {
        self.0.slots()
    }

    #[getter]
    fn dtype(&self) -> &'static str {
        self.0.dtype().name()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.0.nbytes()
    }

    #[getter]
    fn live_bytes(&self) -> usize {
        self.0.live_bytes()
    }
}

/// Attention over the rows that `lists` name, one list for each batch entry and KV head: `q`, `out` rank 4, `lse` rank 3.
#[pyfunction]
pub(crate) fn listed_attention(
    py: Python<'_>,
    q: &Bound<'_, PyUntypedArray>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    lists: Vec<PyReadonlyArray1<'_, u32>>,
    out: &Bound<'_, PyUntypedArray>,
    lse: &Bound<'_, PyUntypedArray>,
    scale: f32,
    softcap: f32,
    sinks: Option<PyReadonlyArray1<'_, f32>>,
) -> PyResult<()> {
    let (q, k, v) = (view("q", q)?, KvArgument::new("k", k)?, KvArgument::new("v", v)?);
    let (k, v) = (k.view()?, v.view()?);
    let (mut out, mut lse) = (view_mut("out", out)?, lse_view("lse", lse)?);
    let lists = lists.iter().map(|a| a.as_slice()).collect::<Result<Vec<_>, _>>()?;
    let options = Options {
        scale: Some(scale),
        softcap,
        sinks: sinks.as_ref().map(|a| a.as_slice()).transpose()?,
        ..Options::default()
    };
    let longest = lists.iter().map(|list| list.len()).max().unwrap_or(0) as f64;
    let operations = operations(&q, &k, &v) / (k.shape()[2].max(1) as f64) * longest;
    running::run(py, operations, |execution| {
        dense::listed_attention(q, k, v, &lists, options, &mut out, &mut lse, execution)
    })
}

/// Keys that the heads' rankings of `scores` `[heads, keys]` agree on, of the keys `first..last`.
#[pyfunction]
pub(crate) fn rank_union<'py>(
    py: Python<'py>,
    scores: PyReadonlyArray2<'py, f32>,
    first: usize,
    last: usize,
    count: usize,
) -> PyResult<Bound<'py, PyArray1<u32>>> {
    let (heads, scores) = (scores.as_array().shape()[0], scores.as_slice()?);
    let operations = 4.0 * scores.len() as f64;
    let union =
        running::run(py, operations, |execution| dense::rank_union(scores, heads, first..last, count, execution))?;
    Ok(PyArray1::from_vec(py, union))
}
