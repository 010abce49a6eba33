//! Rows of one head as numbers: where they lie, or decoded, so that what is made of them knows no codes.

use crate::dense::rows::Strided;
use crate::tensor::{CodedView, DType, Element, KvView, TensorView};
use std::ops::Range;

/// Rows of codes that are decoded together.
const PART: usize = 4096;

/// Some rows of a head, with the numbers that they have in the store.
pub(crate) struct HeadRows<'a> {
    view: TensorView<'a>,
    /// Place of the head in the view.
    place: usize,
    /// What the first row of the view is in the store.
    first: usize,
    /// The KV head of the store.
    head: usize,
}

impl<'a> HeadRows<'a> {
    /// Rows of a head. `memory` holds the numbers of those that are codes.
    pub(crate) fn of(rows: &KvView<'a>, head: usize, range: Range<usize>, memory: &'a mut Vec<f32>) -> Self {
        match rows {
            KvView::Numbers(view) => Self { view: *view, place: head, first: 0, head },
            KvView::Codes(view) => {
                let first = range.start;
                Self { view: decoded(view, head, range, memory), place: 0, first, head }
            }
        }
    }

    /// Dtype of the numbers.
    pub(crate) fn dtype(&self) -> DType {
        self.view.dtype()
    }

    /// Numbers of a row.
    pub(crate) fn dim(&self) -> usize {
        self.view.shape()[3]
    }

    /// The KV head that they are of.
    pub(crate) fn head(&self) -> usize {
        self.head
    }

    /// The row behind the last one that may be read.
    pub(crate) fn end(&self) -> usize {
        self.first + self.view.shape()[2]
    }

    /// One row.
    pub(crate) fn row<T: Element>(&self, row: usize) -> &'a [T] {
        self.view.row::<T>(0, self.place, row - self.first)
    }

    /// All of them, for kernels.
    pub(crate) fn strided<T: Element>(&self) -> Strided<T> {
        let stride = self.view.row_stride();
        let base = self.view.head::<T>(0, self.place).wrapping_offset(-(self.first as isize) * stride);
        Strided { base, stride }
    }
}

/// Rows in parts that [`HeadRows::of`] may hold at once: all of them where they are numbers.
pub(crate) fn parts(rows: &KvView, range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let step = match rows {
        KvView::Numbers(_) => range.len().max(1),
        KvView::Codes(_) => PART,
    };
    range.clone().step_by(step).map(move |start| start..(start + step).min(range.end))
}

/// Rows of codes as numbers.
fn decoded<'a>(
    rows: &CodedView,
    head: usize,
    places: impl ExactSizeIterator<Item = usize>,
    memory: &'a mut Vec<f32>,
) -> TensorView<'a> {
    let (n, dim) = (places.len(), rows.shape()[3]);
    memory.clear();
    memory.resize(n * dim, 0.0);
    for (row, to) in places.zip(memory.chunks_exact_mut(dim)) {
        rows.decode(head, row, to);
    }
    TensorView::new(memory, [1, 1, n, dim]).expect("as many numbers as the shape says")
}

/// Some rows of a head, which are numbered anew, from 0 on.
pub(crate) fn gathered<'a>(rows: &CodedView, head: usize, places: &[usize], memory: &'a mut Vec<f32>) -> HeadRows<'a> {
    let view = decoded(rows, head, places.iter().copied(), memory);
    HeadRows { view, place: 0, first: 0, head }
}
