//! Products and transposes as parts of a kernel: compiled once, however many places call them.

use super::scores::product;
use crate::dense::micro::panel;
use crate::simd::{Kernel, Simd};

/// Which sums of a product there are.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Part {
    /// All.
    Whole,
    /// The left side is 0 right of its diagonal.
    Lower,
    /// The left side is 0 left of its diagonal.
    Upper,
    /// Of the result, only tiles that reach the diagonal or lie below it.
    Below,
}

/// A matrix by its first number and the distance of its rows.
pub(super) type Rows<'a> = (&'a [f32], usize);

/// `c (+)= a b`, `c` of `rows` rows and `columns` columns, sums over `depth` numbers. Rows of `c` up to a whole tile and columns up to a
/// whole panel are written.
pub(super) struct Multiply<'a> {
    pub(super) part: Part,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) depth: usize,
    pub(super) a: Rows<'a>,
    pub(super) b: Rows<'a>,
    pub(super) c: (&'a mut [f32], usize),
    pub(super) add: bool,
}

impl Kernel for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { part, rows, columns, depth, a: (a, lda), b: (b, ldb), c: (c, ldc), add } = self;
        for column in (0..columns).step_by(panel::<S>()) {
            let (b, c) = (&b[column..], &mut c[column..]);
            if part == Part::Upper {
                for row in (0..rows).step_by(S::ROWS) {
                    let (a, b, c) = (&a[row * lda + row..], &b[row * ldb..], &mut c[row * ldc..]);
                    let tile = S::ROWS.min(rows - row);
                    product(s, [0, tile], depth - row, false, a, lda, b, ldb, c, ldc, add);
                }
            } else {
                let first = if part == Part::Below { column / S::ROWS } else { 0 };
                product(s, [first, rows], depth, part == Part::Lower, a, lda, b, ldb, c, ldc, add);
            }
        }
    }
}

/// Writes rows as columns, in squares of `LANES`.
pub(super) struct Turn<'a> {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) from: Rows<'a>,
    pub(super) to: (&'a mut [f32], usize),
}

impl Kernel for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rows, columns, from: (from, ldf), to: (to, ldt) } = self;
        let (high, wide) = (rows.next_multiple_of(S::LANES), columns.next_multiple_of(S::LANES));
        if high == 0 || wide == 0 {
            return;
        }
        assert!(ldf >= wide && ldt >= high && from.len() >= (high - 1) * ldf + wide);
        assert!(to.len() >= (wide - 1) * ldt + high);
        for r in (0..high).step_by(S::LANES) {
            for c in (0..wide).step_by(S::LANES) {
                // SAFETY: rows r.. and columns c.. of `from`, rows c.. and columns r.. of `to` are inside, by the assertions.
                unsafe { s.transpose(from.as_ptr().add(r * ldf + c), ldf, to.as_mut_ptr().add(c * ldt + r), ldt) };
            }
        }
    }
}
