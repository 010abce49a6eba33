//! Asking memory for rows to come while others are computed.

use crate::dense::rows::prefetch_bytes;
use crate::simd::asks_second_cache;
use crate::tensor::{TensorView, with_element};

/// Rows of a few arrays. Nothing is asked for where it would come into the first cache, which a chunk of rows overflows.
#[derive(Default)]
pub(super) struct Coming {
    /// First row, bytes from row to row, bytes of a row.
    arrays: Vec<(*const u8, isize, usize)>,
    /// Rows there are.
    rows: usize,
}

impl Coming {
    /// Rows of one head of each array.
    pub(super) fn new<'a>(heads: impl Iterator<Item = (&'a TensorView<'a>, [usize; 2])>, rows: usize) -> Self {
        if !asks_second_cache() {
            return Self::default();
        }
        let arrays = heads.map(|(view, [batch, head])| {
            with_element!(view.dtype(), T => {
                let size = size_of::<T>();
                (view.head::<T>(batch, head).cast(), view.row_stride() * size as isize, view.shape()[3] * size)
            })
        });
        Self { arrays: arrays.collect(), rows }
    }

    /// Asks for a row, if there is one.
    #[inline(always)]
    pub(super) fn ask(&self, row: usize) {
        if row < self.rows {
            for &(first, distance, bytes) in &self.arrays {
                prefetch_bytes(first.wrapping_offset(row as isize * distance), bytes);
            }
        }
    }
}
