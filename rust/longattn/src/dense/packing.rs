//! Packing rows of keys and values, of whatever storage, into the panels that the micro-kernel reads.

use super::micro::panel;
use super::rows::{Row, Rows, widen_part, widen_row};
use crate::simd::{Kernel, PANEL_VECTORS, Simd};
use std::ops::Range;

/// Rows of values that lie anywhere are asked for so many rows before they are packed.
const ASKED_AHEAD: usize = 16;
/// Packs K^T of `keys` into panels `[panel][padded_dim][PANEL]`, zeros in the columns beyond the last key.
///
/// # Safety
/// `rows` yields `dim` readable elements for every key; `to` holds the panels; `wide` holds `PANEL` rows of `padded_dim` floats.
#[inline(always)]
pub(crate) unsafe fn pack_transposed<S: Simd, K: Rows>(
    s: S,
    rows: K,
    keys: Range<usize>,
    dim: usize,
    padded_dim: usize,
    wide: *mut f32,
    to: *mut f32,
) {
    let panel = panel::<S>();
    for (p, first) in keys.clone().step_by(panel).enumerate() {
        // SAFETY: the caller's promise; blocks of LANES x LANES stay inside a panel of padded_dim rows.
        unsafe {
            for c in 0..panel {
                let row = wide.add(c * padded_dim);
                if first + c < keys.end {
                    if K::SCATTERED && first + c + panel < keys.end {
                        rows.row(first + c + panel).prefetch(dim);
                    }
                    widen_row(s, rows.row(first + c), dim, row, padded_dim);
                } else {
                    std::ptr::write_bytes(row, 0, padded_dim);
                }
            }
            let out = to.add(p * padded_dim * panel);
            for d in (0..padded_dim).step_by(S::LANES) {
                for c in (0..panel).step_by(S::LANES) {
                    s.transpose(wide.add(c * padded_dim + d), padded_dim, out.add(d * panel + c), panel);
                }
            }
        }
    }
}

/// Packs V of `keys` into panels `[panel of columns][between][PANEL]`, whose first rows they become.
///
/// # Safety
/// `rows` yields `dim` readable elements for every key; `to` holds `padded_dim / PANEL` panels of `between` rows, `wide` one row.
#[inline(always)]
pub(crate) unsafe fn pack_values<S: Simd, V: Rows>(
    s: S,
    rows: V,
    keys: Range<usize>,
    dim: usize,
    padded_dim: usize,
    wide: *mut f32,
    between: usize,
    to: *mut f32,
) {
    let panel = panel::<S>();
    let whole = dim / panel * panel;
    let end = keys.end;
    for (j, key) in keys.enumerate() {
        let row = rows.row(key);
        if V::SCATTERED && key + ASKED_AHEAD < end {
            rows.row(key + ASKED_AHEAD).prefetch(dim);
        }
        // SAFETY: the caller's promise; the last, ragged panel is copied from the padded row in `wide`.
        unsafe {
            for d in (0..whole).step_by(panel) {
                let out = to.add((d / panel * between + j) * panel);
                for v in 0..PANEL_VECTORS {
                    s.store(out.add(v * S::LANES), row.load(s, d + v * S::LANES));
                }
            }
            if whole < dim {
                widen_part(s, row, whole, dim, wide, padded_dim - whole);
                let out = to.add((whole / panel * between + j) * panel);
                for v in 0..PANEL_VECTORS {
                    s.store(out.add(v * S::LANES), s.load(wide.add(v * S::LANES)));
                }
            }
        }
    }
}

/// [`pack_transposed`] as a part of a kernel.
pub(crate) struct PackKeys<K> {
    pub(crate) k: K,
    pub(crate) keys: Range<usize>,
    pub(crate) dim: usize,
    pub(crate) padded_dim: usize,
    pub(crate) wide: *mut f32,
    pub(crate) to: *mut f32,
}

impl<K: Rows> Kernel for PackKeys<K> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: whoever makes this gives it buffers of the right size and rows of a problem, whose maker vouched for them.
        unsafe { pack_transposed(s, self.k, self.keys, self.dim, self.padded_dim, self.wide, self.to) }
    }
}

/// [`pack_values`] as a part of a kernel.
pub(crate) struct PackValues<V> {
    pub(crate) v: V,
    pub(crate) keys: Range<usize>,
    pub(crate) dim: usize,
    pub(crate) padded_dim: usize,
    pub(crate) wide: *mut f32,
    /// Rows between two panels.
    pub(crate) between: usize,
    pub(crate) to: *mut f32,
}

impl<V: Rows> Kernel for PackValues<V> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: as in `PackKeys`.
        unsafe { pack_values(s, self.v, self.keys, self.dim, self.padded_dim, self.wide, self.between, self.to) }
    }
}
