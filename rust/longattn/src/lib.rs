//! Attention over long contexts on ordinary machines.
//!
//! The crate offers functions over strided views of the caller's arrays: exact attention in blocks, a key-value store in host
//! memory, indexes that grow with it, and attention that reads only the few per cent of the store that matter.

pub mod dense;
pub mod index;
pub mod kv;
pub mod limits;
pub mod parallel;
pub mod retrieval;
pub mod simd;
pub mod tensor;
