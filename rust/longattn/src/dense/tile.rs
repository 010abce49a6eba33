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
use super::bytes::{ByteProduct, ByteRows, HeadBytes, words};
use super::keys::List;
use super::micro::{Floats, Pairs, multiply_by, panel};
use super::packed::PackedHeads;
use super::packing::{PackKeys, PackValues};
use super::rows::{Indexed, Rows, Strided, numbers, prefetch_bytes, with_rows};
use super::scores::{RowId, Running, is_negligible, modify, online_softmax};
use super::scratch::Buffer;
use super::stream::scale_row;
use crate::simd::tiles::BLOCK;
use crate::simd::{MAX_ROWS, Simd};
use crate::tensor::{DType, KvView};
use half::bf16;
use std::ops::Range;

/// Keys per block.
pub(crate) const KEYS: usize = 256;

/// Query rows per item, a multiple of every instruction set's `ROWS` and of the matrix registers' blocks.
pub(crate) const QUERY_ROWS: usize = 192;

/// The most query rows of an item: for matrix registers, beside which packing takes more of the time than beside vectors.
pub(crate) const MAX_ITEM_ROWS: usize = 4 * QUERY_ROWS;

const _: () = assert!(
    QUERY_ROWS.is_multiple_of(12) && QUERY_ROWS.is_multiple_of(6) && QUERY_ROWS.is_multiple_of(4) && MAX_ROWS == 12
);
const _: () = assert!(QUERY_ROWS.is_multiple_of(BLOCK) && KEYS.is_multiple_of(BLOCK));

/// Whether queries and keys of a problem can stay pairs of bf16.
#[inline(always)]
pub(crate) fn multiplies_pairs<S: Simd>(problem: &Problem) -> bool {
    S::DOT2_BF16
        && S::ROWS == 12
        && problem.q.dtype() == DType::BF16
        && matches!(&problem.k, KvView::Numbers(k) if k.dtype() == DType::BF16 && k.row_stride() % 2 == 0)
        && problem.dim.is_multiple_of(2)
}

/// Packs keys and values, of rows `index` if there is one.
///
/// # Safety
/// As [`PackKeys`] and [`PackValues`] with panels of [`KEYS`] rows; `dims` and `padded` are those of keys and of values.
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
    let ([dim, value_dim], [padded_dim, padded_value_dim]) = (dims, padded);
    match index {
        Some(index) => {
            let (k, v) = (Indexed { rows: k, index }, Indexed { rows: v, index });
            s.call(PackKeys { k, keys: keys.clone(), dim, padded_dim, wide, to: to_keys });
            let (dim, padded_dim, to) = (value_dim, padded_value_dim, to_values);
            s.call(PackValues { v, keys, dim, padded_dim, wide, between: KEYS, to });
        }
        None => {
            s.call(PackKeys { k, keys: keys.clone(), dim, padded_dim, wide, to: to_keys });
            let (dim, padded_dim, to) = (value_dim, padded_value_dim, to_values);
            s.call(PackValues { v, keys, dim, padded_dim, wide, between: KEYS, to });
        }
    }
}

/// Where the run of keys that follow one another from `index[from]` on ends, `end` at the latest.
#[inline(always)]
fn run_end(index: &[u32], from: usize, end: usize) -> usize {
    let mut to = from + 1;
    while to < end && index[to] == index[to - 1] + 1 {
        to += 1;
    }
    to
}

/// Packed values, in a panel of columns, of the keys that follow one another from `index[run.start]` on, up to `index[run.end]`.
#[inline(always)]
fn run_values<'a, S: Simd>(
    problem: &Problem,
    id: RowId,
    heads: &'a PackedHeads,
    column: usize,
    index: &[u32],
    run: Range<usize>,
) -> &'a [f32] {
    let (first, panel) = (index[run.start] as usize, panel::<S>());
    let end = (first + run_end(index, run.start, run.end) - run.start).next_multiple_of(panel);
    &heads.values(problem, id.batch, id.head / problem.group, column)[first * panel..end * panel]
}

/// Asks memory for one of `parts` parts of what will be read next: packed heads are larger than what caches hold.
#[inline(always)]
fn ask_for(next: &[f32], part: usize, parts: usize) {
    let step = next.len().div_ceil(parts).next_multiple_of(16);
    let start = (part * step).min(next.len());
    let piece = &next[start..(start + step).min(next.len())];
    if !piece.is_empty() {
        prefetch_bytes(piece.as_ptr().cast(), size_of_val(piece));
    }
}

/// In what form queries and keys are multiplied.
pub(crate) enum Form<'a> {
    /// Floats.
    Floats,
    /// Unscaled pairs of bf16, `dim / 2` of them a row.
    Pairs,
    /// Bytes, four to a float; of the keys less their mean.
    Bytes { rows: Box<ByteRows>, keys: HeadBytes<'a> },
}

/// Query rows of one item and what they accumulate; rows are padded to a multiple of `ROWS`.
pub(crate) struct TileState<'a> {
    /// Scaled queries, `[padded rows, padded_dim]`, zeros beyond `dim` and beyond the last row.
    pub(crate) queries: &'a [f32],
    pub(crate) padded_dim: usize,
    pub(crate) form: &'a Form<'a>,
    /// `[padded rows, padded_value_dim]`, the width a multiple of the panel.
    pub(crate) outputs: &'a mut [f32],
    pub(crate) padded_value_dim: usize,
    pub(crate) running: &'a mut [Running],
}

/// Checks the keys of an item, counted along `list` if there is one; returns the packed heads where there are
/// such. They hold it in whole panels of `panel` keys.
#[inline(always)]
pub(super) fn check_keys<'a>(
    problem: &Problem<'a>,
    ids: &[RowId],
    keys: &Range<usize>,
    list: Option<&List<'a>>,
    panel: usize,
) -> Option<&'a PackedHeads<'a>> {
    let Some(list) = list else {
        assert!(keys.end <= problem.keys);
        return None;
    };
    let picked = &list.index[keys.clone()];
    assert!(picked.iter().all(|&j| (j as usize) < problem.keys));
    assert!(list.visible.len() == ids.len() && list.bias.is_none_or(|bias| bias.len() >= keys.end));
    let packed = problem.packed?;
    let whole =
        |keys: &[u32]| (keys[0] as usize).is_multiple_of(panel) && keys[keys.len() - 1] - keys[0] < keys.len() as u32;
    assert!(picked.chunks(panel).all(whole));
    Some(packed)
}

/// Attends from the rows of `state` to the keys `keys` of the problem, `ids[r]` being row r of one KV head's group; rows that belong
/// to later positions come later. `state` is padded as its fields say. With `list`, `keys` are counted along it.
#[inline(always)]
pub(crate) fn attend<S: Simd>(
    s: S,
    problem: &Problem,
    ids: &[RowId],
    keys: Range<usize>,
    list: Option<&List>,
    state: &mut TileState,
    key_buffer: &mut Buffer,
    value_buffer: &mut Buffer,
    score_buffer: &mut Buffer,
    extra: &mut Buffer,
) {
    let index = list.map(|list| list.index);
    let packed = check_keys(problem, ids, &keys, list, panel::<S>()).zip(index);
    let visible_of = |r: usize, start: usize, end: usize| {
        let visible = list.map_or_else(|| problem.visible(ids[r].row), |list| list.visible[r].clone());
        visible.start.clamp(start, end) - start..visible.end.clamp(start, end) - start
    };
    let panel = panel::<S>();
    let tiles = ids.len().div_ceil(S::ROWS);
    let (dp, vp) = (state.padded_dim, state.padded_value_dim);
    assert!(KEYS.is_multiple_of(panel) && vp % panel == 0 && ids.len() == state.running.len());
    assert!(state.queries.len() >= tiles * S::ROWS * dp && state.outputs.len() >= tiles * S::ROWS * vp);
    let plain = problem.options.is_plain() && list.is_none_or(|list| !list.changes_scores());
    let skips = problem.options.skip_threshold > 0.0;
    let packed_keys = key_buffer.take(KEYS * dp);
    let packed_values = value_buffer.take(KEYS * vp);
    let scores = score_buffer.take(tiles * S::ROWS * KEYS);
    let wide = extra.take((panel * dp).max(vp));
    let mut ranges = [(0usize, 0usize); MAX_ITEM_ROWS.div_ceil(4)];
    let (batch, head) = (ids[0].batch, ids[0].head / problem.group);

    let mut start = keys.start;
    while start < keys.end {
        let end = (start + KEYS).min(keys.end);
        let columns = (end - start).next_multiple_of(panel);
        // Range of the block's columns that some row of a tile sees.
        for (t, range) in ranges.iter_mut().enumerate().take(tiles) {
            *range = (columns, 0);
            for r in t * S::ROWS..((t + 1) * S::ROWS).min(ids.len()) {
                let visible = visible_of(r, start, end);
                if !visible.is_empty() {
                    *range = (range.0.min(visible.start), range.1.max(visible.end));
                }
            }
        }
        // SAFETY: the buffers were sized above for KEYS keys; the rows of `keys` are rows of the problem, whose maker vouched for them.
        unsafe {
            let keys = start..end;
            let (to_keys, to_values) = (packed_keys.as_mut_ptr(), packed_values.as_mut_ptr());
            let dims = ([problem.dim, problem.value_dim], [dp, vp]);
            match state.form {
                _ if packed.is_some() => {}
                Form::Pairs => {
                    let k = numbers::<bf16>(&problem.k, batch, head);
                    let k = Strided { base: k.base.cast::<f32>(), stride: k.stride / 2 };
                    let v = numbers::<bf16>(&problem.v, batch, head);
                    let dims = [problem.dim / 2, problem.value_dim];
                    pack(s, k, v, keys, index, dims, [dp, vp], wide.as_mut_ptr(), to_keys, to_values);
                }
                Form::Floats => with_rows!(problem, batch, head, |k, v| {
                    let keys = keys.clone();
                    pack(s, k, v, keys, index, dims.0, dims.1, wide.as_mut_ptr(), to_keys, to_values);
                }),
                Form::Bytes { keys: bytes, .. } => {
                    assert!(index.is_none());
                    let (k, dim) = (bytes.rows(), words(problem.dim));
                    s.call(PackKeys {
                        k,
                        keys: keys.clone(),
                        dim,
                        padded_dim: dp,
                        wide: wide.as_mut_ptr(),
                        to: to_keys,
                    });
                    with_rows!(problem, batch, head, |_k, v| {
                        let (dim, padded_dim, wide) = (problem.value_dim, vp, wide.as_mut_ptr());
                        s.call(PackValues {
                            v,
                            keys: keys.clone(),
                            dim,
                            padded_dim,
                            wide,
                            between: KEYS,
                            to: to_values,
                        });
                    });
                }
            }
            for p in 0..columns / panel {
                let b = match packed {
                    Some((heads, index)) => {
                        heads.keys(problem, batch, head, index[start + p * panel] / panel as u32).as_ptr()
                    }
                    None => packed_keys.as_ptr().add(p * dp * panel),
                };
                let next = match packed {
                    Some((heads, index)) if (p + 1) * panel < columns => {
                        heads.keys(problem, batch, head, index[start + (p + 1) * panel] / panel as u32)
                    }
                    Some((heads, index)) if vp > 0 => run_values::<S>(problem, ids[0], heads, 0, index, start..end),
                    _ => &[],
                };
                for (t, &(low, high)) in ranges.iter().enumerate().take(tiles) {
                    ask_for(next, t, tiles);
                    if low < (p + 1) * panel && p * panel < high {
                        let a = state.queries.as_ptr().add(t * S::ROWS * dp);
                        let c = scores.as_mut_ptr().add(t * S::ROWS * KEYS + p * panel);
                        let rows_left = ids.len() - t * S::ROWS;
                        match state.form {
                            Form::Floats => {
                                multiply_by(s, Floats { add: false }, problem.dim, a, dp, b, c, KEYS, rows_left);
                            }
                            Form::Pairs => {
                                let product = Pairs { scale: problem.scale };
                                multiply_by(s, product, problem.dim / 2, a, dp, b, c, KEYS, rows_left);
                            }
                            Form::Bytes { rows, keys } => {
                                let (keys, first_row, first_key) = (*keys, t * S::ROWS, start + p * panel);
                                let product = ByteProduct { rows, keys, first_row, first_key };
                                multiply_by(s, product, words(problem.dim), a, dp, b, c, KEYS, rows_left);
                            }
                        }
                    }
                }
            }
        }
        for (t, range) in ranges.iter_mut().enumerate().take(tiles) {
            if range.0 >= range.1 {
                continue;
            }
            let rows = t * S::ROWS..((t + 1) * S::ROWS).min(ids.len());
            // Whole vectors around what is seen; beyond them nothing is read below.
            let (low, high) = (range.0 / S::LANES * S::LANES, range.1.next_multiple_of(S::LANES));
            let visible_of = |r: usize| visible_of(r, start + low, end.min(start + high));
            if matches!(state.form, Form::Pairs) && problem.options.row_scales.is_some() {
                for r in rows.clone() {
                    scale_row(s, &mut scores[r * KEYS + low..r * KEYS + high], problem.row_scale(ids[r]));
                }
            }
            if !plain {
                for r in rows.clone() {
                    let row = &mut scores[r * KEYS + low..r * KEYS + high];
                    modify(s, problem, ids[r], row, list, start + low..end.min(start + high));
                }
            }
            if skips {
                let mut all = true;
                for r in rows.clone() {
                    let row = &scores[r * KEYS + low..r * KEYS + high];
                    all &= is_negligible(problem, row, visible_of(r), state.running[r]);
                }
                if all {
                    // Nothing of the block is added below.
                    *range = (columns, 0);
                    continue;
                }
            }
            for r in rows {
                let row = &mut scores[r * KEYS + low..r * KEYS + high];
                let (running, factor) = online_softmax(s, row, visible_of(r), state.running[r]);
                state.running[r] = running;
                if factor != 1.0 {
                    scale_row(s, &mut state.outputs[r * vp..(r + 1) * vp], factor);
                }
            }
        }
        // Keys that follow one another: all of them, but for packed ones, which lie where the head has them.
        let mut from = start;
        while from < end {
            let to = packed.map_or(end, |(_, index)| run_end(index, from, end));
            let (first, last) = (from - start, to - start);
            for p in 0..vp / panel {
                let b = match packed {
                    Some((heads, index)) => run_values::<S>(problem, ids[0], heads, p, index, from..end),
                    None => &packed_values[p * KEYS * panel..],
                };
                assert!(b.len() >= (to - from) * panel);
                let next = match packed {
                    Some((heads, index)) if (p + 1) * panel < vp => {
                        run_values::<S>(problem, ids[0], heads, p + 1, index, from..end)
                    }
                    Some((heads, index)) if to < end => run_values::<S>(problem, ids[0], heads, 0, index, to..end),
                    Some((heads, index)) if end < keys.end => {
                        heads.keys(problem, batch, head, index[end] / panel as u32)
                    }
                    _ => &[],
                };
                for (t, &(low, high)) in ranges.iter().enumerate().take(tiles) {
                    ask_for(next, t, tiles);
                    let (low, high) = (low.max(first), high.min(last));
                    if low < high {
                        // SAFETY: columns low..high of the tile's weights and these rows of the panel exist; outputs are padded.
                        unsafe {
                            let a = scores.as_ptr().add(t * S::ROWS * KEYS + low);
                            let b = b.as_ptr().add((low - first) * panel);
                            let c = state.outputs.as_mut_ptr().add(t * S::ROWS * vp + p * panel);
                            let rows_left = ids.len() - t * S::ROWS;
                            multiply_by(s, Floats { add: true }, high - low, a, KEYS, b, c, vp, rows_left);
                        }
                    }
                }
            }
            from = to;
        }
        start = end;
    }
}
