//! Graphs.

use super::Index;
use crate::errors::to_py;
use crate::store::KVStore;
use longattn::index::{Graph, GraphOptions, IndexPer, KeyMetric, SearchBy};
use longattn::tensor::Error;
use numpy::{PyReadonlyArray3, PyUntypedArrayMethods};
use pyo3::prelude::*;

/// `queries`, `[query_heads, queries, head_dim]`, are what the graphs are built around.
#[pyfunction]
#[pyo3(signature = (
    store, queries, neighbours, max_degree, query_neighbours, beam, ef, kk_metric, index_per, search_by, tail_max, seed
))]
pub(crate) fn graph(
    store: &KVStore,
    queries: Option<PyReadonlyArray3<'_, f32>>,
    neighbours: usize,
    max_degree: usize,
    query_neighbours: usize,
    beam: usize,
    ef: usize,
    kk_metric: &str,
    index_per: &str,
    search_by: &str,
    tail_max: usize,
    seed: u64,
) -> PyResult<Index> {
    let (numbers, query_heads) = match &queries {
        Some(queries) => (queries.as_slice()?.to_vec(), queries.shape()[0]),
        None => (Vec::new(), 0),
    };
    let wrong = |argument, got: &str, expected| to_py(Error::value(argument, format!("{got:?}"), expected));
    let options = GraphOptions {
        neighbours,
        max_degree,
        query_neighbours,
        beam,
        ef,
        kk_metric: KeyMetric::from_name(kk_metric).ok_or_else(|| wrong("kk_metric", kk_metric, "ip, l2 or cos"))?,
        per: IndexPer::from_name(index_per).ok_or_else(|| wrong("index_per", index_per, "kv_head or query_head"))?,
        search_by: SearchBy::from_name(search_by).ok_or_else(|| wrong("search_by", search_by, "head or mean"))?,
        tail_max,
        seed,
        queries: numbers,
        query_heads,
    };
    Ok(Index::new(Graph::new(store.inner().clone(), options).map_err(to_py)?))
}
