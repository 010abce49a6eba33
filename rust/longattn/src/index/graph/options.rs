//! How graphs are made and searched, and what the choices are called.

use super::KeyMetric;

/// How many graphs a KV head has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IndexPer {
    /// One, around the queries of the whole group.
    KvHead,
    /// One for each query head, around its queries.
    QueryHead,
}

/// What is searched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SearchBy {
    /// Each query of the group.
    Head,
    /// The mean query of the group.
    Mean,
}

/// How graphs are made and searched.
#[derive(Clone, Debug)]
pub struct GraphOptions {
    /// Links of a row that pruning leaves.
    pub neighbours: usize,
    /// The most links of a row.
    pub max_degree: usize,
    /// Nearest rows of each training query.
    pub query_neighbours: usize,
    /// Beam of the searches that link rows.
    pub beam: usize,
    /// Beam of a query's search; the rows asked for, if they are more.
    pub ef: usize,
    /// What rows are near each other by.
    pub kk_metric: KeyMetric,
    /// How many graphs there are.
    pub per: IndexPer,
    /// What is searched for.
    pub search_by: SearchBy,
    /// Rows that may wait to be linked.
    pub tail_max: usize,
    /// Seed of the order in which rows are linked.
    pub seed: u64,
    /// Training queries, `[query_heads, queries, head_dim]`; empty for a graph of the keys alone.
    pub queries: Vec<f32>,
    /// Query heads of the training queries; 0 without any.
    pub query_heads: usize,
}

macro_rules! names {
    ($type:ident: $($variant:ident $name:literal),*) => {
        impl $type {
            /// By its name, as in files and in Python.
            pub fn from_name(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$variant),)*
                    _ => None,
                }
            }

            pub(super) fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}
names!(KeyMetric: Ip "ip", L2 "l2", Cos "cos");
names!(IndexPer: KvHead "kv_head", QueryHead "query_head");
names!(SearchBy: Head "head", Mean "mean");
