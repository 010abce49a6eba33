//! Attention of many query rows: packed tiles and a matrix micro-kernel for QK^T and PV.
//!
//! ```text
//! for each block of keys:
//!     pack K^T and V into panels of PANEL columns, widened to f32    (once for all query rows of the item)
//!     S = Q K^T           ROWS x PANEL micro-kernel, panel by panel, only where a row of the tile sees a key of the panel;
//!                         bf16 queries and keys stay pairs of bf16 where the CPU multiplies those (exactly, sums in f32)
//!     modify, mask, online softmax, row by row                       (scores.rs)
//!     O = O * factor + P V                                            the same micro-kernel
//! ```

use super::Problem;
use super::rows::{Indexed, Row, Rows, Strided, numbers, widen_part, widen_row, with_rows};
use super::scores::{RowId, Running, is_negligible, modify, online_softmax};
use super::scratch::Buffer;
use super::stream::scale_row;
use crate::simd::{Kernel, MAX_ROWS, PANEL_VECTORS, Simd};
use crate::tensor::{DType, KvView};
use half::bf16;
use std::ops::Range;

/// Keys per block.
pub(crate) const KEYS: usize = 256;

/// Query rows per item, a multiple of every instruction set's `ROWS`.
pub(crate) const QUERY_ROWS: usize = 192;

const _: () = assert!(
    QUERY_ROWS.is_multiple_of(12) && QUERY_ROWS.is_multiple_of(6) && QUERY_ROWS.is_multiple_of(4) && MAX_ROWS == 12
);

/// Columns of a packed panel.
#[inline(always)]
pub(crate) const fn panel<S: Simd>() -> usize {
    PANEL_VECTORS * S::LANES
}

/// `c[r][0..PANEL] (+)= sum_k a[r][k] b[k][0..PANEL]` for `R` rows; panels of `b` are packed, `PANEL` floats per k.
///
/// # Safety
/// `a` holds `R` rows of `k` floats, `b` `k` rows of `PANEL`, `c` `R` rows of `PANEL`.
#[inline(always)]
unsafe fn micro<S: Simd, const R: usize>(
    s: S,
    k: usize,
    a: *const f32,
    lda: usize,
    b: *const f32,
    c: *mut f32,
    ldc: usize,
    add: bool,
) {
    let mut acc = [[s.zero(); PANEL_VECTORS]; R];
    // SAFETY: the caller's promise on a, b and c.
    unsafe {
        if add {
            for (r, acc) in acc.iter_mut().enumerate() {
                for (v, acc) in acc.iter_mut().enumerate() {
                    *acc = s.load(c.add(r * ldc + v * S::LANES));
                }
            }
        }
        for i in 0..k {
            let row = b.add(i * panel::<S>());
            let columns: [S::F32; PANEL_VECTORS] = [s.load(row), s.load(row.add(S::LANES))];
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = s.splat(*a.add(r * lda + i));
                for (acc, &column) in acc.iter_mut().zip(&columns) {
                    *acc = s.fma(x, column, *acc);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (v, &acc) in acc.iter().enumerate() {
                s.store(c.add(r * ldc + v * S::LANES), acc);
            }
        }
    }
}

/// `c[r][0..PANEL] = scale * sum_k a[r][k] . b[k][0..PANEL]` for `R` rows, where `a` and `b` hold pairs of bf16.
///
/// # Safety
/// As [`micro`], `k` counting pairs.
#[inline(always)]
unsafe fn micro_pairs<S: Simd, const R: usize>(
    s: S,
    k: usize,
    a: *const f32,
    lda: usize,
    b: *const f32,
    c: *mut f32,
    ldc: usize,
    scale: f32,
) {
    let mut acc = [[s.zero(); PANEL_VECTORS]; R];
    // SAFETY: the caller's promise on a, b and c; an f32 and a pair of bf16 are both four plain bytes.
    unsafe {
        for i in 0..k {
            let row = b.add(i * panel::<S>()).cast::<u8>();
            let columns: [S::I32; PANEL_VECTORS] = [s.load_bytes(row), s.load_bytes(row.add(4 * S::LANES))];
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = s.splat_i32(*a.add(r * lda + i).cast::<i32>());
                for (acc, &column) in acc.iter_mut().zip(&columns) {
                    *acc = s.dot2_bf16(*acc, x, column);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (v, &acc) in acc.iter().enumerate() {
                s.store(c.add(r * ldc + v * S::LANES), s.mul(acc, s.splat(scale)));
            }
        }
    }
}

/// [`micro`] with the instruction set's own number of rows.
///
/// # Safety
/// As [`micro`], with `S::ROWS` rows.
#[inline(always)]
pub(crate) unsafe fn multiply<S: Simd>(
    s: S,
    k: usize,
    a: *const f32,
    lda: usize,
    b: *const f32,
    c: *mut f32,
    ldc: usize,
    add: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match S::ROWS {
            12 => micro::<S, 12>(s, k, a, lda, b, c, ldc, add),
            6 => micro::<S, 6>(s, k, a, lda, b, c, ldc, add),
            _ => micro::<S, 4>(s, k, a, lda, b, c, ldc, add),
        }
    }
}

/// [`micro_pairs`] with the instruction set's own number of rows.
///
/// # Safety
/// As [`micro_pairs`], with `S::ROWS` rows.
#[inline(always)]
unsafe fn multiply_pairs<S: Simd>(
    s: S,
    k: usize,
    a: *const f32,
    lda: usize,
    b: *const f32,
    c: *mut f32,
    ldc: usize,
    scale: f32,
) {
    // SAFETY: the caller's promise. Only AVX-512 has the instruction, with 12 rows.
    unsafe { micro_pairs::<S, 12>(s, k, a, lda, b, c, ldc, scale) }
}

/// Whether queries and keys of a problem can stay pairs of bf16.
#[inline(always)]
pub(crate) fn multiplies_pairs<S: Simd>(problem: &Problem) -> bool {
    S::DOT2_BF16
        && S::ROWS == 12
        && problem.q.dtype() == DType::BF16
        && matches!(&problem.k, KvView::Numbers(k) if k.dtype() == DType::BF16 && k.row_stride() % 2 == 0)
        && problem.dim.is_multiple_of(2)
}

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

/// Packs V of `keys` into panels `[panel of columns][KEYS][PANEL]`.
///
/// # Safety
/// `rows` yields `dim` readable elements for every key; `to` holds `padded_dim / PANEL` panels of [`KEYS`] rows, `wide` one row.
#[inline(always)]
unsafe fn pack_values<S: Simd, V: Rows>(
    s: S,
    rows: V,
    keys: Range<usize>,
    dim: usize,
    padded_dim: usize,
    wide: *mut f32,
    to: *mut f32,
) {
    let panel = panel::<S>();
    let whole = dim / panel * panel;
    for (j, key) in keys.enumerate() {
        let row = rows.row(key);
        // SAFETY: the caller's promise; the last, ragged panel is copied from the padded row in `wide`.
        unsafe {
            for d in (0..whole).step_by(panel) {
                let out = to.add((d / panel * KEYS + j) * panel);
                for v in 0..PANEL_VECTORS {
                    s.store(out.add(v * S::LANES), row.load(s, d + v * S::LANES));
                }
            }
            if whole < dim {
                widen_part(s, row, whole, dim, wide, padded_dim - whole);
                let out = to.add((whole / panel * KEYS + j) * panel);
                for v in 0..PANEL_VECTORS {
                    s.store(out.add(v * S::LANES), s.load(wide.add(v * S::LANES)));
                }
            }
        }
    }
}

/// [`pack_transposed`] as a part of a kernel.
pub(super) struct PackKeys<K> {
    pub(super) k: K,
    pub(super) keys: Range<usize>,
    pub(super) dim: usize,
    pub(super) padded_dim: usize,
    pub(super) wide: *mut f32,
    pub(super) to: *mut f32,
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
struct PackValues<V> {
    v: V,
    keys: Range<usize>,
    dim: usize,
    padded_dim: usize,
    wide: *mut f32,
    to: *mut f32,
}

impl<V: Rows> Kernel for PackValues<V> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: as in `PackKeys`.
        unsafe { pack_values(s, self.v, self.keys, self.dim, self.padded_dim, self.wide, self.to) }
    }
}

/// Packs keys and values, of rows `index` if there is one.
///
/// # Safety
/// As [`pack_transposed`] and [`pack_values`]; `dims` and `padded` are those of keys and of values.
#[inline(always)]
unsafe fn pack<S: Simd, K: Rows, V: Rows>(
    s: S,
    k: K,
    v: V,
    keys: Range<usize>,
    index: Option<&[u32]>,
    dims: [usize; 2],
    padded: [usize; 2],
    wide: *mut f32,
    to_keys: *mut f32,
    to_values: *mut f32,
) {
    let [key_dim, value_dim] = dims;
    let [padded_key_dim, padded_value_dim] = padded;
    if let Some(index) = index {
        let (k, v) = (Indexed { rows: k, index }, Indexed { rows: v, index });
        s.call(PackKeys { k, keys: keys.clone(), dim: key_dim, padded_dim: padded_key_dim, wide, to: to_keys });
        s.call(PackValues { v, keys, dim: value_dim, padded_dim: padded_value_dim, wide, to: to_values });
    } else {
        s.call(PackKeys { k, keys: keys.clone(), dim: key_dim, padded_dim: padded_key_dim, wide, to: to_keys });
        s.call(PackValues { v, keys, dim: value_dim, padded_dim: padded_value_dim, wide, to: to_values });
    }
}

/// Query rows of one item and what they accumulate; rows are padded to a multiple of `ROWS`.
pub(crate) struct TileState<'a> {
    /// Scaled queries, `[padded rows, padded_dim]`, zeros beyond `dim` and beyond the last row.
    pub(crate) queries: &'a [f32],
    pub(crate) padded_dim: usize,
    /// The queries are unscaled pairs of bf16 (`dim / 2` of them a row), and so are the keys.
    pub(crate) pairs: bool,
    /// `[padded rows, padded_value_dim]`, the width a multiple of the panel.
    pub(crate) outputs: &'a mut [f32],
    pub(crate) padded_value_dim: usize,
    pub(crate) running: &'a mut [Running],
}

/// Attends from the rows of `state` to the keys `keys` of the problem, `ids[r]` being row r of one KV head's group; rows that belong
/// to later positions come later. `state` is padded as its fields say. With `index`, key j is row `index[j]` of the problem;
/// what a row sees is counted along the index.
#[inline(always)]
pub(crate) fn attend<S: Simd>(
    s: S,
    problem: &Problem,
    ids: &[RowId],
    keys: Range<usize>,
    index: Option<&[u32]>,
    state: &mut TileState,
    key_buffer: &mut Buffer,
    value_buffer: &mut Buffer,
    score_buffer: &mut Buffer,
    extra: &mut Buffer,
) {
    assert!(keys.end <= problem.keys);
    assert!(index.is_none_or(|index| index[keys.clone()].iter().all(|&j| (j as usize) < problem.keys)));
    let panel = panel::<S>();
    let tiles = ids.len().div_ceil(S::ROWS);
    let (dp, vp) = (state.padded_dim, state.padded_value_dim);
    assert!(KEYS.is_multiple_of(panel) && vp % panel == 0 && ids.len() == state.running.len());
    assert!(state.queries.len() >= tiles * S::ROWS * dp && state.outputs.len() >= tiles * S::ROWS * vp);
    let plain = problem.options.is_plain();
    let skips = problem.options.skip_threshold > 0.0;
    let packed_keys = key_buffer.take(KEYS * dp);
    let packed_values = value_buffer.take(KEYS * vp);
    let scores = score_buffer.take(tiles * S::ROWS * KEYS);
    let wide = extra.take((panel * dp).max(vp)).as_mut_ptr();
    let mut ranges = [(0usize, 0usize); QUERY_ROWS.div_ceil(4)];

    let mut start = keys.start;
    while start < keys.end {
        let end = (start + KEYS).min(keys.end);
        let columns = (end - start).next_multiple_of(panel);
        // Range of the block's columns that some row of a tile sees.
        for (t, range) in ranges.iter_mut().enumerate().take(tiles) {
            *range = (columns, 0);
            for id in &ids[t * S::ROWS..((t + 1) * S::ROWS).min(ids.len())] {
                let visible = problem.visible(id.row);
                let (low, high) = (visible.start.clamp(start, end) - start, visible.end.clamp(start, end) - start);
                if low < high {
                    *range = (range.0.min(low), range.1.max(high));
                }
            }
        }
        // SAFETY: the buffers were sized above for KEYS keys; the rows of `keys` are rows of the problem, whose maker vouched for them.
        unsafe {
            let (batch, head) = (ids[0].batch, ids[0].head / problem.group);
            let keys = start..end;
            let (to_keys, to_values) = (packed_keys.as_mut_ptr(), packed_values.as_mut_ptr());
            if state.pairs {
                let k = numbers::<bf16>(&problem.k, batch, head);
                let k = Strided { base: k.base.cast::<f32>(), stride: k.stride / 2 };
                let v = numbers::<bf16>(&problem.v, batch, head);
                pack(s, k, v, keys, index, [problem.dim / 2, problem.value_dim], [dp, vp], wide, to_keys, to_values);
            } else {
                with_rows!(problem, batch, head, |k, v| {
                    let keys = keys.clone();
                    pack(s, k, v, keys, index, [problem.dim, problem.value_dim], [dp, vp], wide, to_keys, to_values);
                });
            }
            for p in 0..columns / panel {
                let b = packed_keys.as_ptr().add(p * dp * panel);
                for (t, &(low, high)) in ranges.iter().enumerate().take(tiles) {
                    if low < (p + 1) * panel && p * panel < high {
                        let a = state.queries.as_ptr().add(t * S::ROWS * dp);
                        let c = scores.as_mut_ptr().add(t * S::ROWS * KEYS + p * panel);
                        if state.pairs {
                            multiply_pairs(s, problem.dim / 2, a, dp, b, c, KEYS, problem.scale);
                        } else {
                            multiply(s, problem.dim, a, dp, b, c, KEYS, false);
                        }
                    }
                }
            }
        }
        let visible_of = |id: RowId| {
            let visible = problem.visible(id.row);
            visible.start.clamp(start, end) - start..visible.end.clamp(start, end) - start
        };
        for (t, range) in ranges.iter_mut().enumerate().take(tiles) {
            if range.0 >= range.1 {
                continue;
            }
            let rows = t * S::ROWS..((t + 1) * S::ROWS).min(ids.len());
            if state.pairs && problem.options.row_scales.is_some() {
                for r in rows.clone() {
                    scale_row(s, &mut scores[r * KEYS..r * KEYS + columns], problem.row_scale(ids[r]));
                }
            }
            if !plain {
                for r in rows.clone() {
                    modify(s, problem, ids[r], &mut scores[r * KEYS..r * KEYS + columns], start);
                }
            }
            if skips {
                let mut all = true;
                for r in rows.clone() {
                    all &= is_negligible(problem, &scores[r * KEYS..][..columns], visible_of(ids[r]), state.running[r]);
                }
                if all {
                    // Nothing of the block is added below.
                    *range = (columns, 0);
                    continue;
                }
            }
            for r in rows {
                let row = &mut scores[r * KEYS..r * KEYS + columns];
                let (running, factor) = online_softmax(s, row, visible_of(ids[r]), state.running[r]);
                state.running[r] = running;
                if factor != 1.0 {
                    scale_row(s, &mut state.outputs[r * vp..(r + 1) * vp], factor);
                }
            }
        }
        for p in 0..vp / panel {
            for (t, &(low, high)) in ranges.iter().enumerate().take(tiles) {
                if low < high {
                    // SAFETY: columns low..high of the tile's weights and rows low..high of the panel exist; outputs are padded.
                    unsafe {
                        let a = scores.as_ptr().add(t * S::ROWS * KEYS + low);
                        let b = packed_values.as_ptr().add((p * KEYS + low) * panel);
                        let c = state.outputs.as_mut_ptr().add(t * S::ROWS * vp + p * panel);
                        multiply(s, high - low, a, KEYS, b, c, vp, true);
                    }
                }
            }
        }
        start = end;
    }
}
