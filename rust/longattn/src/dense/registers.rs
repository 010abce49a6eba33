//! Attention of many query rows by matrix registers, in blocks of 32 x 32 (`parts.rs` says of what numbers).
//!
//! ```text
//! for each block of keys:
//!     pack K^T and V                                     (once for all query rows of the item)
//!     for 32 query rows:
//!         S = Q K^T                                      only where one of the rows sees a key of the panel
//!         modify, mask, online softmax, row by row       (scores.rs)
//!         O = O * factor + P V
//! ```
//! The registers work on their own: while 32 rows go through their softmax, the weights of those before are multiplied with V, and
//! the scores of those after are computed, a little after each row. Scores and weights of two times 32 rows stay in the first caches,
//! packed keys and values in the second.

use super::Problem;
use super::bytes::{ByteProduct, ByteRows, HeadBytes, words};
use super::keys::List;
use super::packing::PackKeys;
use super::parts::{PackKeyParts, PackValueParts, Parts, with_parts};
use super::rows::{Indexed, with_rows};
use super::scores::{RowId, Running, Weights, is_negligible, largest_logit, modify, weights_below};
use super::scratch::Buffer;
use super::stream::scale_row;
use super::tile::{KEYS, MAX_ITEM_ROWS, ask_for, check_keys, run_end};
use crate::simd::Simd;
use crate::simd::tiles::{BLOCK, Factors, Left, Pairs, Product, Queue, Right, STEP, Sums, TILE, TILE_BYTES};
use std::ops::Range;

/// In what form queries and keys are multiplied.
pub(crate) enum Form<'a> {
    /// Sums of bf16 in blocks, as [`Parts`] lays them out.
    Parts,
    /// Bytes, four to a float, `width` floats a row; of the keys less their mean.
    Bytes { rows: Box<ByteRows>, keys: HeadBytes<'a>, width: usize },
}

/// Query rows of one item and what they accumulate; rows are padded to a multiple of sixteen.
pub(crate) struct BlockState<'a> {
    pub(crate) parts: Parts,
    pub(crate) form: Form<'a>,
    pub(crate) queries: &'a [f32],
    /// `[padded rows, padded_value_dim]`, the width a multiple of 32.
    pub(crate) outputs: &'a mut [f32],
    pub(crate) padded_value_dim: usize,
    pub(crate) running: &'a mut [Running],
}

/// Attends from the rows of `state` to the keys `keys` of the problem; arguments are those of [`super::tile::attend`].
#[inline(always)]
pub(crate) fn attend<S: Simd>(
    s: S,
    problem: &Problem,
    ids: &[RowId],
    keys: Range<usize>,
    list: Option<&List>,
    state: &mut BlockState,
    key_buffer: &mut Buffer,
    value_buffer: &mut Buffer,
    score_buffer: &mut Buffer,
    extra: &mut Buffer,
) {
    let BlockState { parts, form, queries, outputs, padded_value_dim: vp, running } = state;
    let (parts, form, vp) = (*parts, &*form, *vp);
    let index = list.map(|list| list.index);
    let packed = check_keys(problem, ids, &keys, list, BLOCK);
    let visible: [Range<usize>; MAX_ITEM_ROWS] = std::array::from_fn(|r| match list {
        _ if r >= ids.len() => 0..0,
        Some(list) => list.visible[r].clone(),
        None => problem.visible(ids[r].row),
    });
    let visible_of = |r: usize, start: usize, end: usize| {
        visible[r].start.clamp(start, end) - start..visible[r].end.clamp(start, end) - start
    };
    let padded_rows = ids.len().next_multiple_of(TILE);
    let (key_width, query_width) = match form {
        Form::Parts => (parts.key_width(problem.dim), parts.query_width(problem.dim)),
        Form::Bytes { width, .. } => (*width, *width),
    };
    let value_width = parts.value_width();
    assert!(vp.is_multiple_of(BLOCK) && vp >= problem.value_dim && ids.len() == running.len());
    assert!(queries.len() >= padded_rows * query_width && outputs.len() >= padded_rows * vp);
    let plain = problem.options.is_plain() && list.is_none_or(|list| !list.changes_scores());
    let skips = problem.options.skip_threshold > 0.0;
    let scales = matches!(form, Form::Parts) && parts.scales_products;
    let packed_keys = key_buffer.take(KEYS * key_width);
    let packed_values = value_buffer.take(KEYS * (vp / BLOCK) * value_width);
    let [even_scores, odd_scores] = score_buffer.carve([BLOCK * KEYS; 2]);
    let weight_room = BLOCK * parts.weight_width(KEYS);
    let [wide, even_weights, odd_weights] = extra.carve([BLOCK * key_width, weight_room, weight_room]);
    // Those of every other 32 rows.
    let (scores, weights) = ([even_scores, odd_scores], [even_weights, odd_weights]);
    let mut queue = Queue::new(parts.tiles.registers());
    let (batch, head) = (ids[0].batch, ids[0].head / problem.group);

    // Whether the weights of the last rows that went through their softmax wait to be multiplied with values.
    let mut attended = false;
    let mut start = keys.start;
    while start < keys.end {
        let end = (start + KEYS).min(keys.end);
        if packed.is_none() {
            let (keys, dim, value_dim, between) = (start..end, problem.dim, problem.value_dim, KEYS * value_width);
            let (wide, to, to_values) = (wide.as_mut_ptr(), packed_keys.as_mut_ptr(), packed_values.as_mut_ptr());
            if let Form::Bytes { keys: bytes, .. } = form {
                assert!(index.is_none());
                let (k, dim, keys) = (bytes.rows(), words(dim), keys.clone());
                s.call(PackKeys { k, keys, dim, padded_dim: key_width, wide, to });
            }
            with_rows!(problem, batch, head, |k, v| {
                // The buffers were sized above for as many keys; those of `keys` are rows of the problem, whose maker vouched for them.
                let keys = keys.clone();
                match index {
                    Some(index) => {
                        let (k, v) = (Indexed { rows: k, index }, Indexed { rows: v, index });
                        s.call_pairs(PackKeyParts { parts, k, keys: keys.clone(), dim, wide, to });
                        s.call_pairs(PackValueParts { parts, v, keys, dim: value_dim, between, to: to_values });
                    }
                    None => {
                        if matches!(form, Form::Parts) {
                            s.call_pairs(PackKeyParts { parts, k, keys: keys.clone(), dim, wide, to });
                        }
                        s.call_pairs(PackValueParts { parts, v, keys, dim: value_dim, between, to: to_values });
                    }
                }
            });
        }
        let tiles = ids.len().div_ceil(BLOCK);
        let rows_of = |t: usize| t * BLOCK..((t + 1) * BLOCK).min(ids.len());
        // Whole panels around what some of the rows see.
        let mut spans = [const { 0..0 }; MAX_ITEM_ROWS / BLOCK];
        for (t, span) in spans.iter_mut().enumerate().take(tiles) {
            let (mut low, mut high) = (KEYS, 0);
            for visible in &visible[rows_of(t)] {
                let (first, last) = (visible.start.max(start), visible.end.min(end));
                if first < last {
                    (low, high) = (low.min(first - start), high.max(last - start));
                }
            }
            if low < high {
                *span = low / BLOCK * BLOCK..high.next_multiple_of(BLOCK);
            }
        }
        let queue_scores = |queue: &mut Queue, t: usize, scores: &mut [f32]| {
            assert!(scores.len() >= BLOCK * KEYS);
            for p in spans[t].start / BLOCK..spans[t].end / BLOCK {
                let b = match packed {
                    Some((heads, index)) => heads.keys(problem, batch, head, index[start + p * BLOCK] as usize),
                    None => &packed_keys[p * BLOCK * key_width..][..BLOCK * key_width],
                };
                if let Some((heads, index)) = packed {
                    let next = start + (p + 1) * BLOCK;
                    if next < end {
                        ask_for(heads.keys(problem, batch, head, index[next] as usize), t, tiles);
                    }
                }
                let (factors, pairs, steps, left, right) = match form {
                    Form::Parts => (
                        Factors::Bf16,
                        parts.of_scores,
                        problem.dim.div_ceil(STEP),
                        parts.query_rows(queries, problem.dim, t * BLOCK),
                        parts.key_columns(b.as_ptr()),
                    ),
                    Form::Bytes { width, .. } => (
                        Factors::Bytes,
                        Pairs::new(&[(0, 0)]),
                        problem.dim.div_ceil(TILE_BYTES),
                        byte_rows(&queries[t * BLOCK * *width..], *width),
                        Right { start: b.as_ptr().cast(), step: 2 * TILE * TILE_BYTES, part: 0 },
                    ),
                };
                let sums = Sums { start: scores[p * BLOCK..].as_mut_ptr(), row: KEYS, add: false };
                // SAFETY: queries are padded to whole blocks of sixteen rows and of steps, the panel is one of the packed ones, and
                // there is room for the scores of 32 rows.
                unsafe { queue.push(Product { factors, pairs, steps, rows: rows_of(t).len(), left, right, sums }) };
            }
        };
        // Keys that follow one another go together: all of them, but for packed ones, which lie where the head has them.
        let queue_outputs = |queue: &mut Queue, t: usize, weights: &[f32], outputs: &mut [f32]| {
            assert!(outputs.len() >= (t * BLOCK + rows_of(t).len().next_multiple_of(TILE)) * vp);
            let mut from = start;
            while from < end {
                let (to, first_value) = match packed {
                    Some((_, index)) => (run_end(index, from, end), index[from] as usize),
                    None => (end, 0),
                };
                let (first, last) = (from - start, (to - start).next_multiple_of(BLOCK));
                let (low, high) = (spans[t].start.max(first), spans[t].end.min(last));
                from = to;
                if low >= high {
                    continue;
                }
                for p in 0..vp / BLOCK {
                    let b = match packed {
                        Some((heads, _)) => {
                            heads.values(problem, batch, head, p, first_value..first_value + last - first)
                        }
                        None => &packed_values[p * KEYS * value_width..][..KEYS * value_width],
                    };
                    let b = &b[(low - first) * value_width..(high - first) * value_width];
                    let left = parts.weight_rows(weights, KEYS, 0, low);
                    let sums = Sums { start: outputs[t * BLOCK * vp + p * BLOCK..].as_mut_ptr(), row: vp, add: true };
                    let (pairs, right) = (parts.of_outputs, parts.value_columns(b.as_ptr()));
                    let (factors, steps) = (Factors::Bf16, (high - low) / STEP);
                    // SAFETY: there are weights for every key from `low` to `high`, packed values for as many, and outputs are padded
                    // to whole blocks of sixteen rows.
                    unsafe { queue.push(Product { factors, pairs, steps, rows: rows_of(t).len(), left, right, sums }) };
                }
            }
        };
        queue_scores(&mut queue, 0, scores[0]);
        for t in 0..tiles {
            // The scores of these rows, and whatever reads the weights that the next ones take the place of.
            queue.finish();
            if t > 0 && attended {
                queue_outputs(&mut queue, t - 1, weights[(t - 1) % 2], outputs);
            }
            if t + 1 < tiles {
                queue_scores(&mut queue, t + 1, scores[(t + 1) % 2]);
            }
            attended = false;
            let (rows, scores, Range { start: low, end: high }) = (rows_of(t), &mut *scores[t % 2], spans[t].clone());
            if low >= high {
                continue;
            }
            let row_of = |r: usize| (r - t * BLOCK) * KEYS + low..(r - t * BLOCK) * KEYS + high;
            let visible_of = |r: usize| visible_of(r, start + low, end.min(start + high));
            if let Form::Bytes { rows: of_rows, keys, .. } = form {
                // Sums of byte products until here.
                let product = ByteProduct { rows: of_rows, keys: *keys, first_row: 0, first_key: start };
                for r in rows.clone() {
                    product.finish_row(s, r, low, &mut scores[row_of(r)]);
                }
            }
            // Scaled with the softmax where nothing comes in between; a factor of 0 would turn what is hidden into NaN.
            let scale_of = |r: usize| problem.row_scale(ids[r]);
            let scales_later = scales && plain && !skips && rows.clone().all(|r| scale_of(r) != 0.0);
            if scales && !scales_later {
                for r in rows.clone() {
                    scale_row(s, &mut scores[row_of(r)], scale_of(r));
                }
            }
            if !plain {
                for r in rows.clone() {
                    let of_row = start + low..end.min(start + high);
                    modify(s, problem, ids[r], &mut scores[row_of(r)], list, of_row);
                }
            }
            if skips {
                let mut all = true;
                for r in rows.clone() {
                    all &= is_negligible(problem, &scores[row_of(r)], visible_of(r), running[r]);
                }
                if all {
                    continue;
                }
            }
            attended = true;
            // Maxima take about an eighth of the time of weights.
            let steps = (high - low) / STEP;
            queue.pace(rows.len() * steps * 9 / 8);
            // All maxima first: a row's weights need not wait for its own.
            let mut largest = [f32::NEG_INFINITY; BLOCK];
            for (r, largest) in rows.clone().zip(&mut largest) {
                let (row, visible) = (&mut scores[row_of(r)], visible_of(r));
                *largest = if scales_later {
                    largest_logit::<S, true>(s, row, visible, scale_of(r), running[r])
                } else {
                    largest_logit::<S, false>(s, row, visible, 1.0, running[r])
                };
                queue.tick(steps / 8);
            }
            with_parts!(parts.weights, PARTS, {
                for (r, &largest) in rows.clone().zip(&largest) {
                    let to = parts.weight_row::<PARTS>(weights[t % 2], KEYS, r - t * BLOCK, low);
                    let mut to = Meanwhile { to, queue: &mut queue };
                    let (row, visible, old) = (&scores[row_of(r)], visible_of(r), running[r]);
                    let (p, n, rough) = (row.as_ptr(), row.len(), PARTS < 3);
                    // SAFETY: the row of scores; there is room for the weights of the keys from `low` to `high`.
                    let (new, factor) = unsafe {
                        if scales_later {
                            let scale = scale_of(r);
                            weights_below::<S, _, true>(s, p, n, visible, scale, largest, old, rough, &mut to)
                        } else {
                            weights_below::<S, _, false>(s, p, n, visible, 1.0, largest, old, rough, &mut to)
                        }
                    };
                    running[r] = new;
                    if factor != 1.0 {
                        scale_row(s, &mut outputs[r * vp..(r + 1) * vp], factor);
                    }
                }
            });
        }
        queue.finish();
        if attended {
            queue_outputs(&mut queue, tiles - 1, weights[(tiles - 1) % 2], outputs);
            queue.finish();
        }
        start = end;
    }
}

/// Weights between which the registers go on.
struct Meanwhile<'a, W> {
    to: W,
    queue: &'a mut Queue,
}

impl<S: Simd, W: Weights<S>> Weights<S> for Meanwhile<'_, W> {
    #[inline(always)]
    unsafe fn take(&mut self, s: S, j: usize, weights: S::F32) {
        // SAFETY: the caller's promise.
        unsafe { self.to.take(s, j, weights) };
        self.queue.tick(1);
    }

    #[inline(always)]
    unsafe fn take_two(&mut self, s: S, j: usize, weights: [S::F32; 2]) {
        // SAFETY: the caller's promise.
        unsafe { self.to.take_two(s, j, weights) };
        self.queue.tick(1);
    }
}

/// Query rows of bytes, `width` floats each, as registers read them.
#[inline(always)]
fn byte_rows(queries: &[f32], width: usize) -> Left {
    Left { start: queries.as_ptr().cast(), row: 4 * width, tile: TILE * 4 * width, step: TILE_BYTES, part: 0 }
}
