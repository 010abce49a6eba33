//! Sparse features: encoding, inverted lists by themselves, and the index over a store.

use super::Index;
use crate::arrays::view;
use crate::errors::to_py;
use crate::running;
use crate::store::KVStore;
use longattn::index::{Encoder, FeatureOptions, Features, Postings};
use longattn::parallel::Execution;
use longattn::tensor::Error;
use numpy::{
    PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3, PyReadwriteArray1, PyReadwriteArray2, PyUntypedArray,
    PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

fn encoder(
    weights: &PyReadonlyArray3<'_, f32>,
    bias: &PyReadonlyArray2<'_, f32>,
    centre: &PyReadonlyArray2<'_, f32>,
    top_k: usize,
    relu: bool,
) -> PyResult<Encoder> {
    let [heads, dim, features] = [0, 1, 2].map(|axis| weights.shape()[axis]);
    let (bias, centre) = (bias.as_slice()?.to_vec(), centre.as_slice()?.to_vec());
    Encoder::new(weights.as_slice()?, [heads, dim, features], bias, centre, top_k, relu).map_err(to_py)
}

/// Index of features: `weights` `[kv_heads or 1, head_dim, features]`, `bias` `[kv_heads or 1, features]`, `centre` `[.., head_dim]`.
#[pyfunction]
#[pyo3(signature = (store, weights, bias, centre, top_k, relu, idf, stop_share, scale))]
pub(crate) fn features(
    store: &KVStore,
    weights: PyReadonlyArray3<'_, f32>,
    bias: PyReadonlyArray2<'_, f32>,
    centre: PyReadonlyArray2<'_, f32>,
    top_k: usize,
    relu: bool,
    idf: bool,
    stop_share: f32,
    scale: f32,
) -> PyResult<Index> {
    let encoder = encoder(&weights, &bias, &centre, top_k, relu)?;
    let options = FeatureOptions { idf, stop_share, softmax_scale: scale };
    Ok(Index::new(Features::new(store.inner().clone(), encoder, options).map_err(to_py)?))
}

/// Features of rows `x` `[1, rows, dim]` into `features` and `activations` `[rows, top_k]`.
#[pyfunction]
#[pyo3(signature = (x, weights, bias, centre, relu, features, activations))]
pub(crate) fn encode_features(
    py: Python<'_>,
    x: &Bound<'_, PyUntypedArray>,
    weights: PyReadonlyArray3<'_, f32>,
    bias: PyReadonlyArray2<'_, f32>,
    centre: PyReadonlyArray2<'_, f32>,
    relu: bool,
    mut features: PyReadwriteArray2<'_, u32>,
    mut activations: PyReadwriteArray2<'_, f32>,
) -> PyResult<()> {
    let top_k = features.shape()[1];
    let encoder = encoder(&weights, &bias, &centre, top_k, relu)?;
    let x = view("x", x)?;
    let (numbers, strengths) = (features.as_slice_mut()?, activations.as_slice_mut()?);
    let rows = x.shape()[2];
    if numbers.len() != rows * top_k || strengths.len() != numbers.len() {
        return Err(to_py(Error::value("features", format!("{} numbers", numbers.len()), "top_k for each row")));
    }
    let operations = rows as f64 * x.shape()[3] as f64 * encoder.features() as f64;
    let entries = running::run(py, operations, |execution| encoder.encode(&x, execution))?;
    for ((feature, activation), (n, a)) in entries.into_iter().zip(numbers.iter_mut().zip(strengths)) {
        (*n, *a) = (feature, activation);
    }
    Ok(())
}

/// Inverted lists of features, by themselves.
#[pyclass(frozen, module = "longattn._core")]
pub(crate) struct FeaturePostings(RwLock<Postings>);

impl FeaturePostings {
    fn look(&self) -> RwLockReadGuard<'_, Postings> {
        self.0.read().unwrap_or_else(|e| e.into_inner())
    }

    fn change(&self) -> RwLockWriteGuard<'_, Postings> {
        self.0.write().unwrap_or_else(|e| e.into_inner())
    }
}

#[pymethods]
impl FeaturePostings {
    #[new]
    fn new(features: usize) -> Self {
        Self(RwLock::new(Postings::new(features)))
    }

    /// Adds rows, `[rows, top_k]`; an activation of 0 is no entry.
    fn add(
        &self,
        py: Python<'_>,
        features: PyReadonlyArray2<'_, u32>,
        activations: PyReadonlyArray2<'_, f32>,
    ) -> PyResult<()> {
        let (numbers, strengths, per_row) = (features.as_slice()?, activations.as_slice()?, features.shape()[1]);
        py.detach(|| self.change().extend(numbers, strengths, per_row)).map_err(to_py)
    }

    /// Scores of all rows, added to `scores`, by features, each once, with the sums of their activations over a query's rows. Returns
    /// the entries read.
    fn search(
        &self,
        py: Python<'_>,
        features: PyReadonlyArray1<'_, u32>,
        sums: PyReadonlyArray1<'_, f32>,
        idf: bool,
        stop_share: f32,
        mut scores: PyReadwriteArray1<'_, f32>,
    ) -> PyResult<usize> {
        let sums: Vec<(u32, f32)> =
            features.as_slice()?.iter().copied().zip(sums.as_slice()?.iter().copied()).collect();
        let scores = scores.as_slice_mut()?;
        py.detach(|| self.look().search(&sums, idf, stop_share, scores, &Execution::default())).map_err(to_py)
    }

    fn __len__(&self) -> usize {
        self.look().rows()
    }

    /// Rows that have each feature.
    fn counts(&self) -> Vec<usize> {
        let postings = self.look();
        (0..postings.features()).map(|f| postings.count(f)).collect()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.look().nbytes()
    }
}
