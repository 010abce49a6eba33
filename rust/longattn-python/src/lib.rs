//! Python bindings of longattn: arrays in, arrays out; no arithmetic of their own.

mod arrays;
mod backward;
mod dense;
mod diagnostics;
mod double;
mod errors;
mod grid;
mod index;
mod linear;
mod neighbourhood;
mod options;
mod prefix_tree;
mod retrieval;
mod running;
mod selectors;
mod slot_store;
mod sparse;
mod store;
mod system;
mod virtual_store;

use pyo3::prelude::*;

#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use super::backward::{attention_backward, attention_varlen_backward};
    #[pymodule_export]
    use super::dense::{attention, attention_varlen, merge};
    #[pymodule_export]
    use super::diagnostics::{attention_weights, prob_reduce, selective_attention, weighted_attention};
    #[pymodule_export]
    use super::double::{attention_backward_double, attention_double};
    #[pymodule_export]
    use super::grid::{path_bias, sample};
    #[pymodule_export]
    use super::index::Index;
    #[pymodule_export]
    use super::index::clusters::{clusters, clusters_members};
    #[pymodule_export]
    use super::index::collisions::collisions;
    #[pymodule_export]
    use super::index::features::{FeaturePostings, encode_features, features};
    #[pymodule_export]
    use super::index::flat::flat;
    #[pymodule_export]
    use super::index::graph::graph;
    #[pymodule_export]
    use super::index::hashes::hashes;
    #[pymodule_export]
    use super::index::inverted_lists::inverted_lists;
    #[pymodule_export]
    use super::index::lsh::lsh_tables;
    #[pymodule_export]
    use super::index::pages::pages;
    #[pymodule_export]
    use super::index::product::product_quantisation;
    #[pymodule_export]
    use super::index::signatures::{signatures, signatures_sigma};
    #[pymodule_export]
    use super::linear::convolution::{
        depthwise, dynamic_convolution, neighbour_means, pointwise_function, toeplitz, toeplitz_attention,
    };
    #[pymodule_export]
    use super::linear::fast_weight::fast_weight;
    #[pymodule_export]
    use super::linear::recurrence::{recurrence, recurrence_backward, recurrence_double};
    #[pymodule_export]
    use super::linear::row_maps::{decay_gates, key_scales, normalised_rows, refined_gates, scaled_rows};
    #[pymodule_export]
    use super::linear::scan::{diagonal_scan, diagonal_scan_backward, selective_scan, selective_scan_backward};
    #[pymodule_export]
    use super::linear::statistics::{
        feature_norms, key_statistics, read_statistics, running_read, running_softmax, write_features,
    };
    #[pymodule_export]
    use super::neighbourhood::{
        neighbourhood, neighbourhood_backward, neighbourhood_scores, neighbourhood_spread, neighbourhood_values,
        windowed, windowed_backward,
    };
    #[pymodule_export]
    use super::prefix_tree::{PrefixTree, chunk_attention};
    #[pymodule_export]
    use super::retrieval::retrieval_attention;
    #[pymodule_export]
    use super::selectors::{
        best_forced, best_of_rows, block_deviations, block_mass, block_means, choose, chunk_keys, hash_lists,
        hash_order, line_lists, line_mass, listed_means, pooled_blocks, rounded_blocks, stripes,
    };
    #[pymodule_export]
    use super::slot_store::{SlotStore, listed_attention, rank_union};
    #[pymodule_export]
    use super::sparse::{block_sparse, block_sparse_backward, index_sparse};
    #[pymodule_export]
    use super::store::{CodedRows, KVStore, Rows};
    #[pymodule_export]
    use super::system::{
        available_isas, cpu_features, fma_peak, isa, num_threads, read_bandwidth, set_isa, set_num_threads,
        shares_openmp,
    };
    #[pymodule_export]
    use super::virtual_store::VirtualKVStore;

    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::system::check_environment(module.py())
    }
}
