//! Rows times a small matrix, with the attention tiles' micro-kernel: projections of keys and distances to centroids.

use super::micro::{multiply, panel};
use super::packing::pack_transposed;
use super::rows::{Rows, Strided, widen_row};
use super::scratch::Buffer;
use crate::simd::Simd;
use crate::tensor::Element;

/// Rows that are multiplied at once, a multiple of every instruction set's `ROWS`.
pub(crate) const ROWS: usize = 96;

/// A matrix `[outputs, dim]` packed for [`Self::apply`].
pub(crate) struct PackedMatrix {
    panels: Buffer,
    dim: usize,
    padded_dim: usize,
    outputs: usize,
}

impl PackedMatrix {
    /// Packs `matrix`, row-major `[outputs, dim]`, for the instruction set `S`.
    #[inline(always)]
    pub(crate) fn new<S: Simd>(s: S, matrix: &[f32], outputs: usize, dim: usize) -> Self {
        assert!(matrix.len() == outputs * dim);
        let padded_dim = dim.next_multiple_of(S::LANES);
        let (mut panels, mut wide) = (Buffer::default(), Buffer::default());
        let to = panels.take(outputs.next_multiple_of(panel::<S>()) * padded_dim).as_mut_ptr();
        let wide = wide.take(panel::<S>() * padded_dim).as_mut_ptr();
        let rows = Strided { base: matrix.as_ptr(), stride: dim as isize };
        // SAFETY: the matrix has `outputs` rows of `dim` floats, and both buffers were sized for their panels.
        unsafe { pack_transposed(s, rows, 0..outputs, dim, padded_dim, wide, to) };
        Self { panels, dim, padded_dim, outputs }
    }

    /// Floats between two rows of a result.
    #[inline(always)]
    pub(crate) fn stride<S: Simd>(&self) -> usize {
        self.outputs.next_multiple_of(panel::<S>())
    }

    /// Room that [`Self::apply`] needs for its result.
    #[inline(always)]
    pub(crate) fn result_len<S: Simd>(&self) -> usize {
        ROWS * self.stride::<S>()
    }

    /// `out[r][o] = sum_d matrix[o][d] * (rows[r][d] - centre[d])` for at most [`ROWS`] rows.
    ///
    /// # Safety
    /// `rows` yields `dim` readable elements for each of the `count` keys from `first` on.
    #[inline(always)]
    pub(crate) unsafe fn apply<S: Simd, T: Element>(
        &mut self,
        s: S,
        rows: Strided<T>,
        first: usize,
        count: usize,
        centre: Option<&[f32]>,
        wide: &mut Buffer,
        out: &mut [f32],
    ) {
        let (dp, stride) = (self.padded_dim, self.stride::<S>());
        assert!(count <= ROWS && out.len() >= self.result_len::<S>() && centre.is_none_or(|c| c.len() == self.dim));
        let tiles = count.div_ceil(S::ROWS);
        let wide = wide.take(tiles * S::ROWS * dp);
        for r in 0..count {
            let row = &mut wide[r * dp..(r + 1) * dp];
            // SAFETY: the caller vouches for the row; `row` has the padded length.
            unsafe { widen_row(s, rows.row(first + r), self.dim, row.as_mut_ptr(), dp) };
            if let Some(centre) = centre {
                row.iter_mut().zip(centre).for_each(|(x, c)| *x -= c);
            }
        }
        wide[count * dp..tiles * S::ROWS * dp].fill(0.0);
        let panels = self.panels.take(stride * dp).as_ptr();
        for p in 0..stride / panel::<S>() {
            for t in 0..tiles {
                // SAFETY: the tile's rows are in `wide`, the panel in `panels`, and out holds ROWS rows of `stride`.
                unsafe {
                    let (a, b) = (wide.as_ptr().add(t * S::ROWS * dp), panels.add(p * dp * panel::<S>()));
                    let c = out.as_mut_ptr().add(t * S::ROWS * stride + p * panel::<S>());
                    multiply(s, self.dim, a, dp, b, c, stride, false);
                }
            }
        }
    }
}
