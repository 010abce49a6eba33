//! Exact attention over chosen keys, and what chooses them.
//!
//! ```text
//! what stands for blocks (pool.rs), hashes (hash.rs)
//! logits of many rows (scan.rs), sums of weights (mass.rs)
//! what is best of them (select.rs, choose.rs)                       -> lists: of key blocks, or of keys, per head and query block
//! lists x dense kernels (tile.rs, stream.rs)                        -> output and lse
//! lists of single queries, by the block they pick (gathered.rs)      -> output and lse
//! windows of a grid, tile by tile (neighbourhood)                   -> output and lse
//! ```
//! Time goes with the number of keys in the lists.

mod blocks;
mod choose;
mod gathered;
mod hash;
mod lists;
mod mass;
mod neighbourhood;
mod pool;
mod scan;
mod select;

pub use blocks::{Sequences, block_sparse, block_sparse_backward};
pub use choose::{Choice, best_forced, choose, line_lists};
pub use hash::{HashLists, HashOrder, MAX_BITS, hash_lists, hash_order};
pub use lists::{BlockLists, Lists, RowLists, index_sparse};
pub use mass::{BlockMass, block_mass, line_mass};
pub use neighbourhood::{
    neighbourhood, neighbourhood_backward, neighbourhood_scores, neighbourhood_spread, neighbourhood_values,
};
pub use pool::{block_deviations, block_means, listed_means};
pub use scan::Selection;
pub use select::{
    ChunkKeys, PooledBlocks, RoundedBlocks, best_of_rows, chunk_keys, pooled_blocks, rounded_blocks, stripes,
};
