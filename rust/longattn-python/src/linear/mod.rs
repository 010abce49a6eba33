//! Linear attention.

pub(crate) mod convolution;
pub(crate) mod recurrence;
pub(crate) mod scan;
pub(crate) mod statistics;
