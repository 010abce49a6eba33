//! Keys times a matrix, a row at a time handed to whoever makes codes of them; and one query times the same matrix.

use super::{not_finite, numbers};
use crate::dense::matrix::{PackedMatrix, ROWS};
use crate::dense::rows::{Rows, Strided};
use crate::dense::scratch::Buffer;
use crate::kv::Reader;
use crate::parallel::{Execution, map};
use crate::simd::{Isa, Kernel, Simd, dispatch};
use crate::tensor::{Element, Result, with_element};
use std::ops::Range;

/// Rows that one item projects.
const CHUNK: usize = 2048;

/// What is made of projected keys.
pub(crate) trait Coder: Send {
    /// Whether [`Self::row`] needs the norm of the key, less the centre.
    const NORM: bool;

    /// Row `at` of this coder's range. `x` are its products, then what fills up the last vector: zeros.
    fn row<S: Simd>(&mut self, s: S, at: usize, x: &[f32], norm: f32);
}

/// A matrix `[outputs, dim]`, and what is subtracted from keys before they are multiplied by it.
#[derive(Clone, Copy)]
pub(crate) struct Projection<'a> {
    pub(crate) matrix: &'a [f32],
    pub(crate) outputs: usize,
    pub(crate) centre: Option<&'a [f32]>,
}

/// Coders of the rows `range` of each head, in pieces of at most [`CHUNK`] rows: `[heads][pieces]`. `make` starts one for a number of
/// rows. A key whose products are not finite is an error.
pub(crate) fn code_rows<'a, C: Coder>(
    isa: Isa,
    reader: &Reader,
    range: Range<usize>,
    projection: impl Fn(usize) -> Projection<'a> + Sync,
    make: impl Fn(usize) -> C + Sync,
    execution: &Execution,
) -> Result<Vec<Vec<C>>> {
    let keys = numbers(reader.keys());
    let (heads, pieces) = (keys.shape()[1], range.len().div_ceil(CHUNK));
    let coded = map(execution, heads * pieces, |i| {
        let (head, start) = (i / pieces, range.start + i % pieces * CHUNK);
        let range = start..(start + CHUNK).min(range.end);
        with_element!(keys.dtype(), T => {
            let rows = Strided { base: keys.head::<T>(0, head), stride: keys.row_stride() };
            let coder = make(range.len());
            dispatch(isa, Project { projection: projection(head), dim: keys.shape()[3], rows, range, coder })
                .map_err(|row| not_finite(row, head))
        })
    })?;
    let mut coded = coded.into_iter();
    (0..heads).map(|_| coded.by_ref().take(pieces).collect()).collect()
}

/// Yields the coder, or the first row that is not finite.
struct Project<'a, T, C> {
    projection: Projection<'a>,
    dim: usize,
    rows: Strided<T>,
    range: Range<usize>,
    coder: C,
}

impl<T: Element, C: Coder> Kernel for Project<'_, T, C> {
    type Output = std::result::Result<C, usize>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let Self { projection, dim, rows, range, mut coder } = self;
        let Projection { matrix, outputs, centre } = projection;
        let mut matrix = PackedMatrix::new(s, matrix, outputs, dim);
        let (mut out, mut wide) = (vec![0f32; matrix.result_len::<S>()], Buffer::default());
        let width = outputs.next_multiple_of(S::LANES);
        for first in range.clone().step_by(ROWS) {
            let count = ROWS.min(range.end - first);
            // SAFETY: the range lies inside the rows of the reader that `code_rows` was given.
            unsafe { matrix.apply(s, rows, first, count, centre, &mut wide, &mut out) };
            for r in 0..count {
                let x = &out[r * matrix.stride::<S>()..][..width];
                let mut sum = 0.0;
                for &x in x {
                    // Stays 0 unless something is NaN or infinite.
                    sum += x * 0.0;
                }
                let mut norm = 0.0;
                if C::NORM {
                    // SAFETY: as above, a row has `dim` elements.
                    let row = unsafe { std::slice::from_raw_parts(rows.row(first + r), dim) };
                    norm = key_norm(row, centre);
                }
                if sum != 0.0 || !norm.is_finite() {
                    return Err(first + r);
                }
                coder.row(s, first - range.start + r, x, norm);
            }
        }
        Ok(coder)
    }
}

#[inline(always)]
fn key_norm<T: Element>(row: &[T], centre: Option<&[f32]>) -> f32 {
    // Several sums, which become vectors.
    let mut sums = [0f32; 16];
    for (c, chunk) in row.chunks(16).enumerate() {
        for (d, x) in chunk.iter().enumerate() {
            let x = x.to_f32() - centre.map_or(0.0, |centre| centre[16 * c + d]);
            sums[d] += x * x;
        }
    }
    sums.iter().sum::<f32>().sqrt()
}

/// A query times a matrix `[outputs, dim]`.
pub(crate) struct Multiply<'a> {
    pub(crate) matrix: &'a [f32],
    pub(crate) query: &'a [f32],
}

impl Kernel for Multiply<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let Self { matrix, query } = self;
        let dim = query.len();
        let whole = dim / S::LANES * S::LANES;
        let mut products = Vec::with_capacity(matrix.len() / dim);
        for row in matrix.chunks_exact(dim) {
            let mut sum = [s.zero(); 2];
            // SAFETY: both have `dim` floats.
            unsafe {
                for d in (0..whole).step_by(S::LANES) {
                    let at = d / S::LANES % 2;
                    sum[at] = s.fma(s.load(row.as_ptr().add(d)), s.load(query.as_ptr().add(d)), sum[at]);
                }
                if whole < dim {
                    let (a, b) = (row.as_ptr().add(whole), query.as_ptr().add(whole));
                    sum[0] = s.fma(s.load_first(a, dim - whole), s.load_first(b, dim - whole), sum[0]);
                }
            }
            products.push(s.sum(s.add(sum[0], sum[1])));
        }
        products
    }
}
