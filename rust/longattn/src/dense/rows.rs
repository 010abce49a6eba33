//! Where the rows of one head lie: one after another, or picked by an index list.

use crate::simd::{Simd, prefetch};
use crate::tensor::Element;

/// Rows of `dim` elements each.
pub(crate) trait Rows<T: Element>: Copy {
    /// Pointer to row `j`.
    fn row(self, j: usize) -> *const T;
}

/// Rows a fixed number of elements apart.
#[derive(Clone, Copy)]
pub(crate) struct Strided<T> {
    pub(crate) base: *const T,
    pub(crate) stride: isize,
}

impl<T: Element> Rows<T> for Strided<T> {
    #[inline(always)]
    fn row(self, j: usize) -> *const T {
        self.base.wrapping_offset(j as isize * self.stride)
    }
}

/// Row `j` is row `index[j]` of `rows`.
#[derive(Clone, Copy)]
pub(crate) struct Indexed<'a, T> {
    pub(crate) rows: Strided<T>,
    pub(crate) index: &'a [u32],
}

impl<T: Element> Rows<T> for Indexed<'_, T> {
    #[inline(always)]
    fn row(self, j: usize) -> *const T {
        // Prefetches run past the end of the list; the first row stands in for what is not there.
        self.rows.row(self.index.get(j).copied().unwrap_or(0) as usize)
    }
}

/// Asks for every cache line of a row of `dim` elements.
#[inline(always)]
pub(crate) fn prefetch_row<T>(row: *const T, dim: usize) {
    let bytes = dim * size_of::<T>();
    let mut offset = 0;
    while offset < bytes {
        prefetch(row.cast::<u8>().wrapping_add(offset));
        offset += 64;
    }
}

/// Widens a row into `to`, padding with zeros up to `padded` floats.
///
/// # Safety
/// `from` is readable for `dim` elements and `to` writable for `padded >= dim` floats, `padded` a multiple of `LANES`.
#[inline(always)]
pub(crate) unsafe fn widen_row<S: Simd, T: Element>(s: S, from: *const T, dim: usize, to: *mut f32, padded: usize) {
    let mut d = 0;
    // SAFETY: every access is at d + LANES <= dim, or to the ragged rest by its length, or to the padding of `to`.
    unsafe {
        while d + S::LANES <= dim {
            s.store(to.add(d), s.load_as(from.add(d)));
            d += S::LANES;
        }
        if d < dim {
            s.store(to.add(d), s.load_first(from.add(d), dim - d));
            d += S::LANES;
        }
        while d < padded {
            s.store(to.add(d), s.zero());
            d += S::LANES;
        }
    }
}
