//! Signs that collide.

use super::Index;
use crate::errors::to_py;
use crate::store::KVStore;
use longattn::index::{CollisionOptions, Collisions};
use pyo3::prelude::*;

/// A ratio of `None` goes by the number of keys.
#[pyfunction]
#[pyo3(signature = (store, seed, collision_ratio, candidate_ratio))]
pub(crate) fn collisions(
    store: &KVStore,
    seed: u64,
    collision_ratio: Option<f64>,
    candidate_ratio: Option<f64>,
) -> PyResult<Index> {
    let options = CollisionOptions { seed, collision_ratio, candidate_ratio };
    Ok(Index::new(Collisions::new(store.inner().clone(), options).map_err(to_py)?))
}
