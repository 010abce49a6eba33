//! Linear attention and its relatives: states of fixed size in place of keys and values that grow.

pub mod recurrence;
