//! Linear attention and its relatives: states of fixed size in place of keys and values that grow.

pub mod convolution;
pub mod dynamic;
pub mod neighbours;
pub mod pointwise;
pub mod recurrence;
pub mod scan;
mod tiles;
pub mod toeplitz;
