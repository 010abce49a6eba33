//! Rank-4 strided views, `[batch, heads, length, dim]`, last axis contiguous.

use super::{DType, Element, Error, Result};
use std::marker::PhantomData;

/// A read-only strided view whose element type is known at run time.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    ptr: *const u8,
    dtype: DType,
    shape: [usize; 4],
    /// In elements.
    strides: [isize; 4],
    memory: PhantomData<&'a [u8]>,
}

// SAFETY: a view is a shared borrow of plain numbers; sending or sharing it is sending or sharing `&[u8]`.
unsafe impl Send for TensorView<'_> {}
// SAFETY: as above.
unsafe impl Sync for TensorView<'_> {}

/// Contiguous strides of a shape, in elements.
pub(crate) fn contiguous(shape: [usize; 4]) -> [isize; 4] {
    let [_, h, l, d] = shape.map(|n| n as isize);
    [h * l * d, l * d, d, 1]
}

/// First and last element offset that a shape with strides touches; `None` when it is empty.
fn extent(shape: [usize; 4], strides: [isize; 4]) -> Option<(isize, isize)> {
    if shape.contains(&0) {
        return None;
    }
    let (mut low, mut high) = (0isize, 0isize);
    for (&n, &s) in shape.iter().zip(&strides) {
        let reach = (n as isize - 1).saturating_mul(s);
        if reach < 0 { low = low.saturating_add(reach) } else { high = high.saturating_add(reach) }
    }
    Some((low, high))
}

fn check_last_axis(argument: &'static str, shape: [usize; 4], strides: [isize; 4]) -> Result<()> {
    // The strides of an empty array mean nothing; numpy makes them 0.
    if shape[3] > 1 && strides[3] != 1 && !shape.contains(&0) {
        return Err(Error::value(argument, format!("last-axis stride {}", strides[3]), "a contiguous last axis"));
    }
    Ok(())
}

impl<'a> TensorView<'a> {
    /// A contiguous view of a slice.
    pub fn new<T: Element>(data: &'a [T], shape: [usize; 4]) -> Result<Self> {
        Self::strided(data, shape, contiguous(shape))
    }

    /// A strided view of a slice that starts at its first element; strides are in elements, may be 0 but not negative.
    pub fn strided<T: Element>(data: &'a [T], shape: [usize; 4], strides: [isize; 4]) -> Result<Self> {
        check_last_axis("strides", shape, strides)?;
        if let Some((low, high)) = extent(shape, strides)
            && (low < 0 || high as usize >= data.len())
        {
            let got = format!("shape {shape:?} with strides {strides:?} over {} elements", data.len());
            return Err(Error::value("shape", got, "a view inside the slice"));
        }
        Ok(Self { ptr: data.as_ptr().cast(), dtype: T::DTYPE, shape, strides, memory: PhantomData })
    }

    /// A view of memory that somebody else owns; strides in elements.
    ///
    /// # Safety
    /// Every element that the shape and strides reach from `ptr` is readable for `'a`, aligned for `dtype`, and not written
    /// meanwhile.
    pub unsafe fn from_raw(
        argument: &'static str,
        ptr: *const u8,
        dtype: DType,
        shape: [usize; 4],
        strides: [isize; 4],
    ) -> Result<Self> {
        check_last_axis(argument, shape, strides)?;
        Ok(Self { ptr, dtype, shape, strides, memory: PhantomData })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// `[batch, heads, length, dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Strides in elements.
    pub fn strides(&self) -> [isize; 4] {
        self.strides
    }

    /// Address of the first element.
    pub fn as_ptr(&self) -> *const u8 {
        self.ptr
    }

    /// The rows `rows` of every head.
    pub fn rows(&self, rows: std::ops::Range<usize>) -> TensorView<'a> {
        assert!(rows.start <= rows.end && rows.end <= self.shape[2], "rows {rows:?} of {}", self.shape[2]);
        let size = self.dtype.size() as isize;
        let ptr = self.ptr.wrapping_offset(rows.start as isize * self.strides[2] * size);
        TensorView { ptr, shape: [self.shape[0], self.shape[1], rows.len(), self.shape[3]], ..*self }
    }

    /// The heads `heads`.
    pub(crate) fn heads(&self, heads: std::ops::Range<usize>) -> TensorView<'a> {
        assert!(heads.start <= heads.end && heads.end <= self.shape[1], "heads {heads:?} of {}", self.shape[1]);
        let ptr = self.ptr.wrapping_offset(heads.start as isize * self.strides[1] * self.dtype.size() as isize);
        TensorView { ptr, shape: [self.shape[0], heads.len(), self.shape[2], self.shape[3]], ..*self }
    }

    /// One entry of the batch, as a batch of 1.
    pub(crate) fn batch(&self, batch: usize) -> TensorView<'a> {
        assert!(batch < self.shape[0], "batch {batch} of {}", self.shape[0]);
        let ptr = self.ptr.wrapping_offset(batch as isize * self.strides[0] * self.dtype.size() as isize);
        let [_, h, l, d] = self.shape;
        TensorView { ptr, shape: [1, h, l, d], ..*self }
    }

    /// `[b, h, l, d]` seen as `[b, l, h, d]`: packed tokens become a batch of heads, and back.
    pub fn swap_heads_and_length(self) -> Self {
        let ([b, h, l, d], [sb, sh, sl, sd]) = (self.shape, self.strides);
        Self { shape: [b, l, h, d], strides: [sb, sl, sh, sd], ..self }
    }

    /// `[1, b, h, l]` seen as `[b, h, l, 1]`.
    pub fn with_unit_axis(self) -> Self {
        let ([_, b, h, l], [_, sb, sh, sl]) = (self.shape, self.strides);
        Self { shape: [b, h, l, 1], strides: [sb, sh, sl, 1], ..self }
    }

    /// The addresses from the first byte that the shape reaches to the last.
    pub(crate) fn addresses(&self) -> std::ops::Range<usize> {
        let Some((low, high)) = extent(self.shape, self.strides) else { return 0..0 };
        let (start, size) = (self.ptr as usize, self.dtype.size() as isize);
        start.wrapping_add_signed(low * size)..start.wrapping_add_signed((high + 1) * size)
    }

    /// Elements between two rows of one head.
    #[inline]
    pub(crate) fn row_stride(&self) -> isize {
        self.strides[2]
    }

    /// Pointer to row 0 of a head. The caller reads `shape[2]` rows of `shape[3]` elements, `row_stride` apart.
    #[inline]
    pub(crate) fn head<T: Element>(&self, batch: usize, head: usize) -> *const T {
        debug_assert!(T::DTYPE == self.dtype && batch < self.shape[0] && head < self.shape[1]);
        let offset = batch as isize * self.strides[0] + head as isize * self.strides[1];
        self.ptr.cast::<T>().wrapping_offset(offset)
    }

    /// One row as a slice.
    pub(crate) fn row<T: Element>(&self, batch: usize, head: usize, row: usize) -> &'a [T] {
        assert!(T::DTYPE == self.dtype && batch < self.shape[0] && head < self.shape[1] && row < self.shape[2]);
        let start = self.head::<T>(batch, head).wrapping_offset(row as isize * self.strides[2]);
        // SAFETY: the indices are inside the shape, and the view's maker promised that what the shape reaches is readable for 'a.
        unsafe { std::slice::from_raw_parts(start, self.shape[3]) }
    }
}

/// A writable strided view, as [`TensorView`].
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    ptr: *mut u8,
    dtype: DType,
    shape: [usize; 4],
    strides: [isize; 4],
    memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: a unique borrow of plain numbers, as `&mut [u8]`.
unsafe impl Send for TensorViewMut<'_> {}
// SAFETY: shared use only hands out row pointers; the kernels write disjoint rows.
unsafe impl Sync for TensorViewMut<'_> {}

impl<'a> TensorViewMut<'a> {
    /// A contiguous view of a slice.
    pub fn new<T: Element>(data: &'a mut [T], shape: [usize; 4]) -> Result<Self> {
        if shape.iter().product::<usize>() != data.len() {
            return Err(Error::value("shape", format!("{shape:?} over {} elements", data.len()), "the slice's length"));
        }
        let strides = contiguous(shape);
        Ok(Self { ptr: data.as_mut_ptr().cast(), dtype: T::DTYPE, shape, strides, memory: PhantomData })
    }

    /// A writable view of memory that somebody else owns; strides in elements.
    ///
    /// # Safety
    /// As [`TensorView::from_raw`], and nobody else reads or writes the elements during `'a`, and no two indices reach the same
    /// element.
    pub unsafe fn from_raw(
        argument: &'static str,
        ptr: *mut u8,
        dtype: DType,
        shape: [usize; 4],
        strides: [isize; 4],
    ) -> Result<Self> {
        check_last_axis(argument, shape, strides)?;
        if !shape.contains(&0) && shape.iter().zip(&strides).any(|(&n, &s)| n > 1 && s == 0) {
            return Err(Error::value(argument, format!("strides {strides:?}"), "no axis that repeats the same memory"));
        }
        Ok(Self { ptr, dtype, shape, strides, memory: PhantomData })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// `[batch, heads, length, dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// `[b, h, l, d]` seen as `[b, l, h, d]`: packed tokens become a batch of heads, and back.
    pub fn into_swapped_heads_and_length(self) -> Self {
        let ([b, h, l, d], [sb, sh, sl, sd]) = (self.shape, self.strides);
        Self { shape: [b, l, h, d], strides: [sb, sl, sh, sd], ..self }
    }

    /// The rows `rows` of every head, for the time of this borrow.
    pub(crate) fn rows(&self, rows: std::ops::Range<usize>) -> TensorViewMut<'_> {
        assert!(rows.start <= rows.end && rows.end <= self.shape[2], "rows {rows:?} of {}", self.shape[2]);
        let size = self.dtype.size() as isize;
        let ptr = self.ptr.wrapping_offset(rows.start as isize * self.strides[2] * size);
        let shape = [self.shape[0], self.shape[1], rows.len(), self.shape[3]];
        TensorViewMut { ptr, shape, dtype: self.dtype, strides: self.strides, memory: PhantomData }
    }

    /// The heads `heads`, for the time of this borrow.
    pub(crate) fn heads(&self, heads: std::ops::Range<usize>) -> TensorViewMut<'_> {
        assert!(heads.start <= heads.end && heads.end <= self.shape[1], "heads {heads:?} of {}", self.shape[1]);
        let ptr = self.ptr.wrapping_offset(heads.start as isize * self.strides[1] * self.dtype.size() as isize);
        let shape = [self.shape[0], heads.len(), self.shape[2], self.shape[3]];
        TensorViewMut { ptr, shape, dtype: self.dtype, strides: self.strides, memory: PhantomData }
    }

    /// One entry of the batch, as a batch of 1, for the time of this borrow.
    pub(crate) fn batch(&self, batch: usize) -> TensorViewMut<'_> {
        assert!(batch < self.shape[0], "batch {batch} of {}", self.shape[0]);
        let ptr = self.ptr.wrapping_offset(batch as isize * self.strides[0] * self.dtype.size() as isize);
        let [_, h, l, d] = self.shape;
        TensorViewMut { ptr, shape: [1, h, l, d], dtype: self.dtype, strides: self.strides, memory: PhantomData }
    }

    /// The same memory for reading, for the time of this borrow. What is read while rows are written is not determined.
    pub(crate) fn as_view(&self) -> TensorView<'_> {
        TensorView { ptr: self.ptr, dtype: self.dtype, shape: self.shape, strides: self.strides, memory: PhantomData }
    }

    /// Pointer to one row of `shape[3]` elements. Two workers may hold pointers to different rows at once.
    #[inline]
    pub(crate) fn row_ptr<T: Element>(&self, batch: usize, head: usize, row: usize) -> *mut T {
        assert!(T::DTYPE == self.dtype && batch < self.shape[0] && head < self.shape[1] && row < self.shape[2]);
        let offset =
            batch as isize * self.strides[0] + head as isize * self.strides[1] + row as isize * self.strides[2];
        self.ptr.cast::<T>().wrapping_offset(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_outside_its_slice_is_refused() {
        let data = vec![0f32; 24];
        assert!(TensorView::new(&data, [1, 2, 3, 4]).is_ok());
        assert!(TensorView::new(&data, [1, 2, 3, 5]).is_err());
        assert!(TensorView::strided(&data, [1, 2, 3, 4], [0, 4, 8, 1]).is_ok());
        assert!(TensorView::strided(&data, [1, 2, 3, 4], [0, 4, 9, 1]).is_err());
        assert!(TensorView::strided(&data, [1, 1, 3, 4], [0, 0, -4, 1]).is_err());
        assert!(TensorView::strided(&data, [1, 1, 3, 4], [0, 0, 4, 2]).is_err());
        assert!(TensorView::new::<f32>(&[], [0, 2, 3, 4]).is_ok());
        assert!(TensorView::strided::<f32>(&[], [1, 2, 0, 4], [0; 4]).is_ok());
    }

    #[test]
    fn rows_of_a_strided_view() {
        let data: Vec<f32> = (0..24).map(|x| x as f32).collect();
        let view = TensorView::strided(&data, [1, 2, 3, 4], [24, 4, 8, 1]).unwrap();
        assert_eq!(view.row::<f32>(0, 1, 2), &[20.0, 21.0, 22.0, 23.0]);
    }
}
