//! Attention over long contexts on ordinary machines.
//!
//! The crate offers functions over strided views of the caller's arrays: exact attention in blocks, a key-value store
//! in host memory, indexes that grow with it, and attention that reads only the few per cent of the store that matter.
//!
//! A decode step, two query heads sharing one KV head, over a store of bfloat16 rows:
//!
//! ```
//! use longattn::dense::{Options, attention};
//! use longattn::kv::KvStore;
//! use longattn::parallel::Execution;
//! use longattn::tensor::{DType, TensorView, TensorViewMut};
//!
//! # fn main() -> longattn::tensor::Result<()> {
//! let (heads, kv_heads, len, dim) = (2, 1, 100, 16);
//! let store = KvStore::new(kv_heads, dim, dim, DType::BF16, 1 << 20)?;
//! let (keys, values) = (vec![0.5f32; kv_heads * len * dim], vec![2f32; kv_heads * len * dim]);
//! let rows = [1, kv_heads, len, dim];
//! store.append(&TensorView::new(&keys, rows)?, &TensorView::new(&values, rows)?)?;
//!
//! let queries = vec![1f32; heads * dim];
//! let (mut out, mut lse) = (vec![0f32; heads * dim], vec![0f32; heads]);
//! let reader = store.read();
//! attention(
//!     TensorView::new(&queries, [1, heads, 1, dim])?,
//!     reader.keys(),
//!     reader.values(),
//!     Options { causal: true, ..Options::default() },
//!     &mut TensorViewMut::new(&mut out, [1, heads, 1, dim])?,
//!     &mut TensorViewMut::new(&mut lse, [1, heads, 1, 1])?,
//!     &Execution::default(),
//! )?;
//! // Equal keys weigh the same: every output is the mean value, and lse is the logit plus ln(100).
//! assert!(out.iter().all(|x| (x - 2.0).abs() < 1e-5));
//! assert!((lse[0] - (16.0 * 0.5 * 0.25 + 100f32.ln())).abs() < 1e-4);
//! # Ok(())
//! # }
//! ```

pub mod dense;
pub mod grid;
pub mod index;
pub mod kv;
pub mod limits;
pub mod linear;
pub mod parallel;
pub mod retrieval;
pub mod simd;
pub mod sparse;
pub mod tensor;
