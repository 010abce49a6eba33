//! Indexes over a [`KvStore`]'s keys, which pick the rows that are worth reading.
//!
//! An [`Index`] belongs to one store and follows it by itself: what was appended since is indexed when it is next read, what was
//! truncated is forgotten (`follow.rs`). [`View`] is an index at one moment. For the query group of one KV head it picks rows and, where it
//! can, weighs those that it leaves unread; attention itself is the same for all of them (`crate::retrieval`).

pub(crate) mod clusters;
pub(crate) mod codes;
mod collisions;
mod features;
mod flat;
mod follow;
mod graph;
mod hashes;
mod head_rows;
mod inverted_lists;
mod key_clusters;
mod kmeans;
mod lookup;
mod lsh;
mod pages;
mod postings;
mod product;
mod project;
mod rotation;
mod signatures;
mod snapshot;
pub(crate) mod units;

use crate::kv::{KvStore, Reader};
use crate::parallel::Execution;
use crate::simd::Isa;
use crate::tensor::{Error, KvView, Result, Storage, TensorView};
pub use collisions::{CollisionOptions, Collisions};
pub use features::{Encoder, FeatureOptions, Features};
pub use flat::Flat;
pub(crate) use follow::{Followed, Grow, Grown};
pub use graph::{Graph, GraphOptions, IndexPer, KeyMetric, SearchBy};
pub use hashes::{HashOptions, Hashes};
pub use inverted_lists::{InvertedListOptions, InvertedLists, Probe};
pub use key_clusters::{KeyClusterOptions, KeyClusters};
pub use lsh::{LshOptions, LshTables};
pub use pages::{PageOptions, Pages};
pub use postings::Postings;
pub use product::{Bases, ProductOptions, ProductQuantisation};
pub(crate) use rotation::Random;
pub use signatures::{HeadStats, SignatureOptions, Signatures};
pub use snapshot::{Parameters, Saved, SavedData, SavedElement, SavedTensor, load, save};
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
pub use units::UnitScore;

/// An index over the rows of one store.
pub trait Index: Any + Send + Sync {
    /// The store that is indexed.
    fn store(&self) -> &Arc<KvStore>;

    /// What it is, as in the file that it is saved to: "signatures", "pages", ...
    fn kind(&self) -> &'static str;

    /// Whether it weighs the rows it leaves unread, which an estimate of the rest, a bound and a budget of mass need.
    fn estimates(&self) -> bool;

    /// Whether it knows what share of the mass rows have, which a budget of mass needs.
    fn knows_mass(&self) -> bool {
        self.estimates()
    }

    /// Whether it weighs each row by itself ([`View::weigh`]), which samples need.
    fn weighs_rows(&self) -> bool {
        false
    }

    /// Rows indexed so far.
    fn len(&self) -> usize;

    /// Whether no row is indexed.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes in memory.
    fn nbytes(&self) -> usize;

    /// Multiply-adds that bringing it up to date takes, roughly: long ones are run where they can be interrupted.
    fn pending_operations(&self) -> f64;

    /// The index at the moment of `reader`, brought up to date first.
    fn read<'a>(&'a self, reader: &'a Reader<'a>, execution: &Execution) -> Result<Box<dyn View + 'a>>;

    /// Indexes the rows appended since; [`Self::read`] does so by itself.
    fn update(&self, execution: &Execution) -> Result<()> {
        let store = Arc::clone(self.store());
        let reader = store.read();
        self.read(&reader, execution).map(drop)
    }

    /// The index of a fork of the store, as far as its rows are those that were indexed here: a copy instead of a build.
    fn fork(&self, store: Arc<KvStore>) -> Result<Arc<dyn Index>>;

    /// What it was made with, by name.
    fn parameters(&self) -> Parameters;

    /// Everything that is needed to have it again without a build.
    fn save(&self) -> Saved;

    /// For what only some kinds have.
    fn as_any(&self) -> &dyn Any;
}

/// An index at one moment.
pub trait View: Sync {
    /// Rows indexed: the first ones of the store. Later rows are read exactly. May be more than the reader sees.
    fn covered(&self) -> usize;

    /// Rows for one KV head's query group.
    fn pick(&self, ask: &Ask) -> Pick;

    /// What it estimates of every candidate, which a sample of them corrects; `None` unless the index weighs rows. `select` and
    /// `rest` of the question do not matter.
    fn weigh<'a>(&'a self, ask: &Ask) -> Option<Box<dyn Estimates + 'a>> {
        let _ = ask;
        None
    }
}

/// Estimates of every candidate for the query group of one KV head.
pub trait Estimates: Sync {
    /// Mean over the queries of each candidate's share of a query's mass, steady rows and candidates together.
    fn shares(&self) -> &[f32];

    /// Log of each query's mass, steady rows and candidates together: the unit of its shares.
    fn log_total(&self) -> &[f32];

    /// What each of `rows`, all candidates, weighs for query `g` as long as it is not read, in the same unit.
    fn weights(&self, g: usize, rows: &[u32]) -> Vec<f32>;

    /// The sum of these weights over all candidates and their mean value, for each query.
    fn rest(&self) -> &[RestMass];

    /// Standard deviation of the error of a logit, for each query.
    fn sigma(&self) -> &[f32];

    /// What stands in for the value of a row.
    fn value(&self, row: usize) -> &[f32];

    /// Root mean square norm of the head's values.
    fn value_norm(&self) -> f32;

    /// Keys, or units of several keys, that were scored.
    fn scored(&self) -> usize;

    /// Bytes of the index that were read.
    fn bytes(&self) -> usize;
}

/// How many rows are read beside those that always are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Select {
    /// This many rows of each KV head, shared by its query group.
    TopK(usize),
    /// The fewest rows whose estimated mass, with the steady rows, reaches this share for every head of the group.
    TopP(f32),
}

/// What a query group asks of an index.
pub struct Ask<'a> {
    /// KV head.
    pub head: usize,
    /// Queries of the group, `head_dim` floats each, times the softmax scale.
    pub queries: &'a [&'a [f32]],
    /// Log of the sum of `e^logit` over the rows that are read in any case, for each query; minus infinity without any.
    pub steady: &'a [f32],
    /// Rows among which to pick, all of them covered; not empty.
    pub candidates: Range<usize>,
    /// How many to pick.
    pub select: Select,
    /// Whether the mean values of the rows left unread are wanted.
    pub rest: bool,
    /// Keys of the store.
    pub keys: KvView<'a>,
    /// Values of the store.
    pub values: KvView<'a>,
    /// Instruction set to run on.
    pub isa: Isa,
    /// Where the work of this one group may be shared out; `None` to do it here.
    pub parallel: Option<&'a Execution>,
}

/// What an index picked.
#[derive(Clone, Debug, Default)]
pub struct Pick {
    /// Candidates to read exactly for the whole group, ascending, each once.
    pub rows: Vec<u32>,
    /// `[queries, rows]`, added to the rows' logits: minus the log of the chance that a sampled row had; minus infinity where a query
    /// does not use a row.
    pub log_weights: Option<Vec<f32>>,
    /// What the candidates left unread hold, for each query. `None` where the index does not say.
    pub rest: Option<Vec<RestMass>>,
    /// Log of the most mass that they can hold, for each query.
    pub bound: Option<Vec<f32>>,
    /// Keys, or units of several keys, that were scored.
    pub scored: usize,
    /// Bytes of the index that were read.
    pub bytes: usize,
    /// What a scan of codes or keys took.
    pub seconds: Seconds,
}

/// Seconds that the steps of a scan took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seconds {
    /// Reading all codes; with sums over the scores where these are kept for a second pass.
    pub scan: f32,
    /// Turning scores into shares, summed by value cluster; in one pass with its sample and all sums, told from the tiles that are timed.
    pub weigh: f32,
    /// Selecting rows.
    pub select: f32,
}

/// Estimate of the rows that a query does not read.
#[derive(Clone, Debug)]
pub struct RestMass {
    /// Log of the sum of their `e^logit`.
    pub log_mass: f32,
    /// Mean of their values by weight, `value_dim` numbers; empty where it was not asked for.
    pub mean: Vec<f32>,
}

/// Rows of a store of numbers, as [`check_numbers`] has seen to.
pub(crate) fn numbers(rows: KvView<'_>) -> TensorView<'_> {
    rows.numbers().expect("asked when the index was made")
}

/// Refuses stores whose rows are codes.
pub(crate) fn check_numbers(store: &KvStore) -> Result<()> {
    if matches!(store.storage(), Storage::Codes(_)) {
        return Err(Error::dtype(
            "store",
            store.storage(),
            "float32, float16 or bfloat16 rows, or an index that takes codes",
        ));
    }
    Ok(())
}

/// The error of a key that cannot be ranked.
pub(crate) fn not_finite(row: usize, head: usize) -> Error {
    let got = format!("NaN or infinity in key {row} of head {head}");
    Error::value("store", got, "finite keys: an index cannot rank others")
}
