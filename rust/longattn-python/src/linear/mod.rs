//! Linear attention.

pub(crate) mod convolution;
pub(crate) mod fast_weight;
pub(crate) mod recurrence;
pub(crate) mod row_maps;
pub(crate) mod scan;
pub(crate) mod statistics;
