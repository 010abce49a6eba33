//! Rows of a chunk whose state decays by column: products with values, block by block, each column with decays of its own.

use super::rows::{exp_row, forgotten, multiply_rows};
use super::scores::{Sizes, WHOLE_BLOCK, product};
use crate::dense::micro::panel;
use crate::simd::{PANEL_VECTORS, Simd};

/// What a panel of columns needs of the chunk.
pub(super) struct Fade<'a> {
    pub(super) sizes: Sizes,
    pub(super) n: usize,
    /// Floats between rows of outputs.
    pub(super) width: usize,
    /// Whether values are multiplied by `1 - e^g`.
    pub(super) fills: bool,
    /// Queries `[group, rows, padded]`, scores `[group, rows, across]` and transposed keys, without decays.
    pub(super) q: &'a [f32],
    pub(super) scores: &'a [f32],
    pub(super) turned: &'a [f32],
    /// Log decays of the panel, which become decays.
    pub(super) logs: &'a mut [f32],
}

impl Fade<'_> {
    /// Outputs of all queries for one panel of columns, and the state after the chunk. Values become those times what is left of
    /// them at the end of their block.
    #[inline(always)]
    pub(super) fn panel<S: Simd>(self, s: S, values: &mut [f32], state: &mut [f32], out: &mut [f32]) {
        let Self { sizes, n, width, fills, q, scores, turned, logs } = self;
        let Sizes { dim, padded, rows, across, group, .. } = sizes;
        let wide = panel::<S>();
        for i in 0..n {
            let log = &mut logs[i * wide..][..wide];
            if fills {
                let mut filled = [0f32; 2 * crate::simd::MAX_LANES];
                forgotten(s, log, &mut filled[..wide]);
                multiply_rows(s, &mut values[i * wide..][..wide], &filled[..wide]);
            }
            exp_row(s, log);
        }
        for start in (0..n).step_by(WHOLE_BLOCK) {
            let m = WHOLE_BLOCK.min(n - start);
            let decays = &logs[start * wide..][..m * wide];
            for head in 0..group {
                let at = head * rows + start;
                let (q, out) = (&q[at * padded..], &mut out[at * width..]);
                product(s, [0, m], dim, false, q, padded, state, wide, out, width, false);
            }
            let one = s.splat(1.0);
            let mut total = [one; PANEL_VECTORS];
            for i in 0..m {
                for (v, total) in total.iter_mut().enumerate() {
                    // SAFETY: decays have a panel for each of the m rows.
                    *total = s.mul(*total, unsafe { s.load(decays.as_ptr().add(i * wide + v * S::LANES)) });
                }
                for head in 0..group {
                    let to = &mut out[(head * rows + start + i) * width..][..wide];
                    for (v, &total) in total.iter().enumerate() {
                        // SAFETY: `to` is a panel.
                        unsafe {
                            let to = to.as_mut_ptr().add(v * S::LANES);
                            s.store(to, s.mul(s.load(to), total));
                        }
                    }
                }
            }
            for j in 0..m {
                let value = &mut values[(start + j) * wide..][..wide];
                let mut along = [s.zero(); PANEL_VECTORS];
                for (v, along) in along.iter_mut().enumerate() {
                    // SAFETY: the row is a panel.
                    *along = unsafe { s.load(value.as_ptr().add(v * S::LANES)) };
                }
                for i in j..m {
                    if i > j {
                        for (v, along) in along.iter_mut().enumerate() {
                            // SAFETY: as above.
                            *along = s.mul(*along, unsafe { s.load(decays.as_ptr().add(i * wide + v * S::LANES)) });
                        }
                    }
                    for head in 0..group {
                        let row = head * rows + start + i;
                        let score = s.splat(scores[row * across + start + j]);
                        let to = &mut out[row * width..][..wide];
                        for (v, &along) in along.iter().enumerate() {
                            // SAFETY: `to` is a panel.
                            unsafe {
                                let to = to.as_mut_ptr().add(v * S::LANES);
                                s.store(to, s.fma(score, along, s.load(to)));
                            }
                        }
                    }
                }
                for (v, &along) in along.iter().enumerate() {
                    // SAFETY: the row is a panel.
                    unsafe { s.store(value.as_mut_ptr().add(v * S::LANES), along) };
                }
            }
            for row in state.chunks_exact_mut(wide).take(dim) {
                for (v, &total) in total.iter().enumerate() {
                    // SAFETY: the row is a panel.
                    unsafe {
                        let at = row.as_mut_ptr().add(v * S::LANES);
                        s.store(at, s.mul(s.load(at), total));
                    }
                }
            }
            let (keys, values) = (&turned[start..], &values[start * wide..]);
            product(s, [0, dim], m, false, keys, across, values, wide, state, wide, true);
        }
    }
}
