//! Plain sign codes.

use super::Index;
use crate::errors::to_py;
use crate::store::KVStore;
use longattn::index::{HashOptions, Hashes};
use numpy::{PyReadonlyArray3, PyUntypedArrayMethods};
use pyo3::prelude::*;

/// `weights` is `[kv_heads, head_dim, code_bits]`.
#[pyfunction]
pub(crate) fn hashes(store: &KVStore, weights: PyReadonlyArray3<'_, f32>, use_norm: bool) -> PyResult<Index> {
    let options = HashOptions { weights: weights.as_slice()?.to_vec(), code_bits: weights.shape()[2], use_norm };
    Ok(Index::new(Hashes::new(store.inner().clone(), options).map_err(to_py)?))
}
