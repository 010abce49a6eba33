//! Strided views over the caller's memory, element types and errors.
//!
//! A view never owns and never copies: it is a pointer, a shape and strides, checked once when it is made. Every kernel takes
//! views of rank 4, `[batch, heads, length, dim]`, whose last axis is contiguous.

mod coded;
mod dtype;
mod error;
mod view;

pub use coded::{CODE_STEP, CodeFormat, CodedView, KvView, Storage};
pub(crate) use dtype::with_element;
pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use view::{TensorView, TensorViewMut};
