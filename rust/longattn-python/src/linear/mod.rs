//! Linear attention.

pub(crate) mod recurrence;
