//! The rows of one kind (keys or values): a contiguous lane of memory per head, all lanes in one region.

use super::convert::{convert, widen};
use super::region::{Region, STEP, page_size};
use crate::parallel::{self, Execution};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{CodeFormat, CodedView, DType, Error, KvView, Result, TensorView};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Appends of fewer bytes than this stay on the calling thread.
const PARALLEL_BYTES: usize = 4 << 20;

/// How many rows there are of keys and values, `[1, kv_heads, rows, dim]` each with its dim.
pub(super) fn check_pair(k: &TensorView, v: &TensorView, kv_heads: usize, dims: [usize; 2]) -> Result<usize> {
    for (argument, view, dim) in [("k", k, dims[0]), ("v", v, dims[1])] {
        let [batch, heads, count, width] = view.shape();
        if (batch, heads, width) != (1, kv_heads, dim) {
            let expected = format!("[1, {kv_heads}, T, {dim}]");
            return Err(Error::value(argument, format!("shape [{batch}, {heads}, {count}, {width}]"), expected));
        }
    }
    let (count, values) = (k.shape()[2], v.shape()[2]);
    if values != count {
        return Err(Error::value("v", format!("{values} rows"), format!("as many as k has, {count}")));
    }
    Ok(count)
}

/// In what form rows lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RowFormat {
    Numbers { dtype: DType, dim: usize },
    Codes(CodeFormat),
}

impl RowFormat {
    pub(super) fn dim(&self) -> usize {
        match self {
            Self::Numbers { dim, .. } => *dim,
            Self::Codes(format) => format.dim(),
        }
    }

    /// Bytes of a row; `None` beyond any address space.
    pub(super) fn row_bytes(&self) -> Option<usize> {
        match self {
            Self::Numbers { dtype, dim } => dim.checked_mul(dtype.size()),
            // Where this is no overflow, the few bytes more of the scales are none either, as dimensions fit memory.
            Self::Codes(format) => format.dim().checked_mul(2).map(|_| format.row_bytes()),
        }
    }
}

pub(super) struct Rows {
    region: Region,
    heads: usize,
    format: RowFormat,
    row_bytes: usize,
    /// Bytes from one lane to the next: the capacity, rounded up so that a lane starts on a step (a page, if it is smaller).
    lane: usize,
    /// Granularity of commits: [`STEP`], or the whole lane if that is smaller.
    step: usize,
    /// Bytes committed at the start of every lane.
    committed: AtomicUsize,
    what: &'static str,
}

impl Rows {
    pub(super) fn new(heads: usize, capacity: usize, format: RowFormat, what: &'static str) -> Result<Self> {
        let absurd = || {
            let got = format!("{capacity} rows of {heads} heads x {}", format.dim());
            Error::value("capacity", got, "a store that fits an address space")
        };
        let row_bytes = format.row_bytes().ok_or_else(absurd)?;
        let wanted = capacity.checked_mul(row_bytes).ok_or_else(absurd)?;
        let grain = if wanted >= STEP { STEP } else { page_size() };
        let lane = wanted.checked_next_multiple_of(grain).ok_or_else(absurd)?;
        let bytes = lane.checked_mul(heads).filter(|&n| n <= isize::MAX as usize).ok_or_else(absurd)?;
        let region = Region::reserve(bytes, what)?;
        let (step, committed) = (lane.min(STEP), AtomicUsize::new(0));
        Ok(Self { region, heads, format, row_bytes, lane, step, committed, what })
    }

    pub(super) fn format(&self) -> RowFormat {
        self.format
    }

    /// Committed bytes of all lanes.
    pub(super) fn nbytes(&self) -> usize {
        self.committed.load(Ordering::Relaxed) * self.heads
    }

    /// Makes room for `len` rows, at most the capacity. Where the system refuses, the store is as before.
    pub(super) fn commit(&self, len: usize) -> Result<()> {
        let (have, want) = (self.committed.load(Ordering::Relaxed), self.committed_for(len));
        if want > have {
            for head in 0..self.heads {
                let start = head * self.lane;
                self.region.commit(start + have..start + want, self.what)?;
            }
            self.committed.store(want, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Gives memory back that lies more than a step above `len` rows; the step is kept for a sequence that grows again at once.
    pub(super) fn decommit(&self, len: usize) {
        let have = self.committed.load(Ordering::Relaxed);
        let keep = self.committed_for(len) + self.step;
        if keep < have {
            let mut given_back = true;
            for start in (0..self.heads).map(|head| head * self.lane) {
                given_back &= self.region.decommit(start + keep..start + have);
            }
            if given_back {
                self.committed.store(keep, Ordering::Relaxed);
            }
        }
    }

    fn committed_for(&self, len: usize) -> usize {
        (len * self.row_bytes).next_multiple_of(self.step)
    }

    /// The first `len` rows, `[1, heads, len, dim]`; `channels` are the factors that codes were divided by.
    ///
    /// # Safety
    /// Those rows are written, and nobody writes them during `'a`.
    pub(super) unsafe fn view<'a>(&'a self, len: usize, channels: Option<&'a [f32]>) -> KvView<'a> {
        // SAFETY: the region lives for 'a, lanes are page-aligned, and the caller vouches for the rows.
        unsafe {
            match self.format {
                RowFormat::Numbers { dtype, dim } => {
                    let lane = (self.lane / dtype.size()) as isize;
                    let (shape, strides) =
                        ([1, self.heads, len, dim], [lane * self.heads as isize, lane, dim as isize, 1]);
                    let view = TensorView::from_raw("store", self.region.base(), dtype, shape, strides);
                    KvView::Numbers(view.expect("rows are contiguous"))
                }
                RowFormat::Codes(format) => {
                    CodedView::from_raw(self.region.base(), format, self.heads, len, self.lane, channels).into()
                }
            }
        }
    }

    /// Converts the rows of `source`, `[1, heads, T, dim]`, into rows `at..at + T`, divided by `channels` if these are codes.
    ///
    /// # Safety
    /// The rows are committed, nobody else reads or writes them, and `source` is not among them.
    pub(super) unsafe fn write(&self, at: usize, source: &TensorView, channels: Option<&[f32]>) -> Result<()> {
        debug_assert_eq!((source.shape()[1], source.shape()[3]), (self.heads, self.format.dim()));
        let count = source.shape()[2];
        assert!((at + count) * self.row_bytes <= self.committed.load(Ordering::Relaxed));
        // SAFETY: each call writes another lane; the rest is the caller's promise.
        let write = |head: usize| unsafe { self.write_head(at, source, head, channels) };
        if count * self.heads * self.row_bytes < PARALLEL_BYTES {
            (0..self.heads).for_each(write);
            return Ok(());
        }
        parallel::for_each(&Execution::default(), self.heads, write)
    }

    /// # Safety
    /// As [`Self::write`], for one head.
    unsafe fn write_head(&self, at: usize, source: &TensorView, head: usize, channels: Option<&[f32]>) {
        let [_, _, count, dim] = source.shape();
        let [_, head_stride, row_stride, _] = source.strides();
        let size = source.dtype().size() as isize;
        let first = source.as_ptr().wrapping_offset(head as isize * head_stride * size);
        let target = self.lane_ptr(head).wrapping_add(at * self.row_bytes);
        // SAFETY: inside the source's shape, and inside committed rows that are the caller's alone.
        unsafe {
            match self.format {
                RowFormat::Numbers { dtype, .. } if row_stride == dim as isize => {
                    convert(first, source.dtype(), target, dtype, count * dim);
                }
                RowFormat::Numbers { dtype, .. } => {
                    for row in 0..count {
                        let from = first.wrapping_offset(row as isize * row_stride * size);
                        convert(from, source.dtype(), target.add(row * self.row_bytes), dtype, dim);
                    }
                }
                RowFormat::Codes(format) => {
                    let channels = channels.map(|c| &c[head * dim..(head + 1) * dim]);
                    let (dtype, stride) = (source.dtype(), row_stride * size);
                    let rows = std::slice::from_raw_parts_mut(target, count * self.row_bytes);
                    dispatch(simd::current(), Encode { format, first, dtype, stride, channels, rows });
                }
            }
        }
    }

    /// Whether `source` touches memory of these rows at or above row `len`, where an append is about to write.
    pub(super) fn free_rows_overlap(&self, source: &TensorView, len: usize) -> bool {
        let [_, heads, count, dim] = source.shape();
        let [_, head_stride, row_stride, _] = source.strides();
        if heads == 0 || count == 0 || dim == 0 {
            return false;
        }
        let size = source.dtype().size();
        let (base, end) = (self.region.base() as usize, self.region.base() as usize + self.region.bytes());
        (0..heads).any(|head| {
            let first = source.as_ptr().wrapping_offset(head as isize * head_stride * size as isize) as usize;
            let last = first.wrapping_add_signed((count as isize - 1) * row_stride * size as isize);
            let (low, high) = (first.min(last), first.max(last) + dim * size);
            if high <= base || low >= end {
                return false;
            }
            let lane = low.saturating_sub(base) / self.lane;
            low < base || high > base + lane * self.lane + len * self.row_bytes
        })
    }

    fn lane_ptr(&self, head: usize) -> *mut u8 {
        assert!(head < self.heads);
        self.region.base().wrapping_add(head * self.lane)
    }

    /// The first `len` rows of a head as bytes.
    ///
    /// # Safety
    /// As [`Self::view`], for as long as the slice is used.
    pub(super) unsafe fn head_bytes(&self, head: usize, len: usize) -> &[u8] {
        // SAFETY: the caller vouches for the rows.
        unsafe { std::slice::from_raw_parts(self.lane_ptr(head), len * self.row_bytes) }
    }

    /// The first `len` rows of a head as writable bytes; they must be committed.
    pub(super) fn head_bytes_mut(&mut self, head: usize, len: usize) -> &mut [u8] {
        let bytes = len * self.row_bytes;
        assert!(bytes <= *self.committed.get_mut());
        // SAFETY: committed memory is initialised, and `&mut self` makes it ours alone.
        unsafe { std::slice::from_raw_parts_mut(self.lane_ptr(head), bytes) }
    }
}

/// Codes rows of numbers, `stride` bytes apart.
struct Encode<'a> {
    format: CodeFormat,
    first: *const u8,
    dtype: DType,
    stride: isize,
    channels: Option<&'a [f32]>,
    rows: &'a mut [u8],
}

impl Kernel for Encode<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { format, first, dtype, stride, channels, rows } = self;
        let inverse: Option<Vec<f32>> = channels.map(|c| c.iter().map(|c| 1.0 / c).collect());
        let mut numbers = vec![0f32; format.dim()];
        for (j, row) in rows.chunks_exact_mut(format.row_bytes()).enumerate() {
            // SAFETY: whoever made this vouches for as many rows of numbers as `rows` has room for.
            unsafe { widen(first.wrapping_offset(j as isize * stride), dtype, &mut numbers) };
            if let Some(inverse) = &inverse {
                numbers.iter_mut().zip(inverse).for_each(|(x, c)| *x *= c);
            }
            format.encode(&numbers, row);
        }
    }
}
