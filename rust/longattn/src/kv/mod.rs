//! Key-value stores in host memory.
//!
//! A [`KvStore`] holds the keys and values of one sequence. Its address space is reserved once for the whole capacity and memory
//! is committed as the sequence grows, so a row never moves, no append copies the past, and views stay valid.

pub(crate) mod convert;
pub(crate) mod prefix_tree;
mod region;
mod rows;
mod slots;
pub(crate) mod snapshot;
mod store;
#[cfg(test)]
mod tests;
mod virtual_store;

pub use prefix_tree::{PrefixTree, TreeReader};
pub use slots::{Observe, SlotStore};
pub use store::{ChannelScales, Format, KvStore, Origin, Reader};
pub use virtual_store::{Planes, RequestRows, VirtualOptions, VirtualStore};
