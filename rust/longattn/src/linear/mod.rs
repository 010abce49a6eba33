//! Linear attention and its relatives: states of fixed size in place of keys and values that grow.

pub mod convolution;
pub mod dynamic;
pub mod fast_weight;
mod feature_rows;
mod features;
mod key_scales;
pub mod neighbours;
pub mod pointwise;
pub mod recurrence;
pub mod row_maps;
mod rows;
mod running;
pub mod scan;
mod statistics;
mod tiles;
pub mod toeplitz;

pub use feature_rows::{feature_norms, write_features};
pub use features::{FeatureMap, Map, Power, RowNorm};
pub use key_scales::key_scales;
pub use running::{running_read, running_softmax};
pub use statistics::{ReadOut, Statistics, Sums, accumulate, read};
