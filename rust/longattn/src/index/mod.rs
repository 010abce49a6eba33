//! Indexes over a [`KvStore`](crate::kv::KvStore)'s keys: small codes that are scanned instead of the keys.

pub(crate) mod clusters;
pub(crate) mod codes;
mod rotation;
mod signatures;

#[cfg(test)]
pub(crate) use rotation::Random;
pub(crate) use signatures::Snapshot;
pub use signatures::{Hash, HeadStats, SignatureOptions, Signatures};
