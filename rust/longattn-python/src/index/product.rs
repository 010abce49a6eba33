//! Product quantisation.

use super::Index;
use crate::errors::to_py;
use crate::store::KVStore;
use longattn::index::{Bases, ProductOptions, ProductQuantisation};
use numpy::PyReadonlyArray3;
use pyo3::prelude::*;

/// `bases`: matrices `[kv_heads, head_dim, head_dim]` of keys and of queries.
#[pyfunction]
#[pyo3(signature = (store, subvectors, bits, seed, bases))]
pub(crate) fn product_quantisation(
    store: &KVStore,
    subvectors: usize,
    bits: usize,
    seed: u64,
    bases: Option<(PyReadonlyArray3<'_, f32>, PyReadonlyArray3<'_, f32>)>,
) -> PyResult<Index> {
    let bases = match &bases {
        Some((keys, queries)) => Some(Bases { keys: keys.as_slice()?.to_vec(), queries: queries.as_slice()?.to_vec() }),
        None => None,
    };
    let options = ProductOptions { subvectors, bits, seed, bases };
    Ok(Index::new(ProductQuantisation::new(store.inner().clone(), options).map_err(to_py)?))
}
