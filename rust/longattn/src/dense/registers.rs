//! Attention of many query rows by matrix registers, in blocks of 32 x 32 (`parts.rs` says of what numbers).
//!
//! ```text
//! for each block of keys, of whatever share has its turn:
//!     pack K^T and V                                     (once for all query rows of the share, or for all items: packed.rs)
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
use super::scores::{Running, Weights, is_negligible, largest_logit, modify, weights_below};
use super::scratch::Buffer;
use super::stream::scale_row;
use super::tile::{KEYS, MAX_ITEM_ROWS, check_keys};
use super::turns::{Share, Turns};
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

/// Query rows of one item and what they accumulate; those of each share are padded to a multiple of sixteen.
pub(crate) struct BlockState<'a> {
    pub(crate) parts: Parts,
    pub(crate) form: Form<'a>,
    pub(crate) queries: &'a [f32],
    /// `[padded rows, padded_value_dim]`, the width a multiple of 32; whatever they hold gives way.
    pub(crate) outputs: &'a mut [f32],
    pub(crate) padded_value_dim: usize,
    /// One for each padded row.
    pub(crate) running: &'a mut [Running],
    /// The rows of each share, with padding.
    pub(crate) places: &'a [Range<usize>],
}

/// Up to 32 query rows of a share and the keys of a block that some of them see.
#[derive(Clone)]
struct Unit {
    share: usize,
    /// First of the rows, in the share.
    first: usize,
    /// Which block of keys it is, of those that some rows see, and the keys.
    block: usize,
    keys: Range<usize>,
    /// Whole panels around what the rows see, from the first key on.
    span: Range<usize>,
}

/// All units, those of a block of keys one after another.
struct Units<'a> {
    shares: &'a [Share<'a>],
    /// What each row sees of the keys, for each share.
    visible: &'a [&'a [Range<usize>]],
    turns: Turns<'a>,
    /// The share that has its turn, the block of keys that its rows get and those after it, and the next rows.
    share: usize,
    left: Range<usize>,
    first: usize,
    /// The last block that rows saw, and whether these keys are another.
    block: usize,
    is_new: bool,
}

impl<'a> Units<'a> {
    fn new(shares: &'a [Share<'a>], visible: &'a [&'a [Range<usize>]]) -> Self {
        let turns = Turns::new(shares);
        Self { shares, visible, turns, share: 0, left: 0..0, first: usize::MAX, block: 0, is_new: false }
    }
}

impl Iterator for Units<'_> {
    type Item = Unit;

    fn next(&mut self) -> Option<Unit> {
        loop {
            if self.first >= self.shares[self.share].ids.len() {
                self.left.start = self.left.end.min(self.left.start + KEYS);
                if self.left.start == self.left.end {
                    (self.share, self.left) = self.turns.next()?;
                }
                (self.first, self.is_new) = (0, true);
            }
            let Self { share, first, .. } = *self;
            let keys = self.left.start..self.left.end.min(self.left.start + KEYS);
            let rows = first..self.shares[share].ids.len().min(first + BLOCK);
            self.first = rows.end;
            let (mut low, mut high) = (keys.end, keys.start);
            for visible in &self.visible[share][rows] {
                let (start, end) = (visible.start.max(keys.start), visible.end.min(keys.end));
                if start < end {
                    (low, high) = (low.min(start), high.max(end));
                }
            }
            if low < high {
                self.block += usize::from(self.is_new);
                self.is_new = false;
                let block = self.block;
                let span = (low - keys.start) / BLOCK * BLOCK..(high - keys.start).next_multiple_of(BLOCK);
                return Some(Unit { share, first, block, keys, span });
            }
        }
    }
}

/// More blocks of keys than products are queued of at a time: those of the rows before, of these and of the next.
const BLOCKS: usize = 4;

/// The panels of a packed head that each of the last blocks of keys is.
type Panels = [[u32; KEYS / BLOCK]; BLOCKS];

/// Attends from the rows of `shares`, which have their places in `state`, to their keys. Arguments are otherwise those of
/// [`super::tile::attend`].
#[inline(always)]
pub(crate) fn attend<S: Simd>(
    s: S,
    problem: &Problem,
    shares: &[Share],
    state: BlockState,
    key_buffer: &mut Buffer,
    value_buffer: &mut Buffer,
    score_buffer: &mut Buffer,
    extra: &mut Buffer,
) {
    let BlockState { parts, form, queries, outputs, padded_value_dim: vp, running, places } = state;
    let (key_width, query_width) = match &form {
        Form::Parts => (parts.key_width(problem.dim), parts.query_width(problem.dim)),
        Form::Bytes { width, .. } => (*width, *width),
    };
    let value_width = parts.value_width();
    let rows = places.last().map_or(0, |place| place.end);
    assert!(
        vp.is_multiple_of(BLOCK) && vp >= problem.value_dim && running.len() >= rows && places.len() == shares.len()
    );
    assert!(rows <= MAX_ITEM_ROWS && queries.len() >= rows * query_width && outputs.len() >= rows * vp);
    let mut packed = None;
    for (share, place) in shares.iter().zip(places) {
        assert!(place.len() == share.ids.len().next_multiple_of(TILE) && place.start.is_multiple_of(TILE));
        packed = check_keys(problem, share.ids, &share.keys, share.list.as_ref(), BLOCK);
    }
    assert!(shares.len() == 1 || packed.is_some());
    let all: Vec<Range<usize>> = match shares[0].list {
        Some(_) => Vec::new(),
        None => shares[0].ids.iter().map(|id| problem.visible(id.row)).collect(),
    };
    let visible: Vec<&[Range<usize>]> =
        shares.iter().map(|share| share.list.as_ref().map_or(&all[..], |list| list.visible)).collect();
    let skips = problem.options.skip_threshold > 0.0;
    let scales = matches!(form, Form::Parts) && parts.scales_products;
    let packed_keys = key_buffer.take(KEYS * key_width);
    let packed_values = value_buffer.take(KEYS * (vp / BLOCK) * value_width);
    let [even_scores, odd_scores] = score_buffer.carve([BLOCK * KEYS; 2]);
    let weight_room = BLOCK * parts.weight_width(KEYS);
    let [wide, even_weights, odd_weights] = extra.carve([BLOCK * key_width, weight_room, weight_room]);
    // Those of every other unit.
    let (scores, weights) = ([even_scores, odd_scores], [even_weights, odd_weights]);
    let mut queue = Queue::new(parts.tiles.registers());
    let (batch, head) = (shares[0].ids[0].batch, shares[0].ids[0].head / problem.group);
    let mut panels: Panels = [[0; KEYS / BLOCK]; BLOCKS];
    // Which blocks of sixteen rows have outputs.
    let mut written = [false; MAX_ITEM_ROWS / TILE];

    let rows_of = |unit: &Unit| {
        let count = BLOCK.min(shares[unit.share].ids.len() - unit.first);
        let start = places[unit.share].start + unit.first;
        start..start + count
    };
    let queue_scores = |queue: &mut Queue, unit: &Unit, panels: &Panels, packed_keys: &[f32], scores: &mut [f32]| {
        let panels = &panels[unit.block % BLOCKS];
        assert!(scores.len() >= BLOCK * KEYS);
        let Range { start: first, end } = rows_of(unit);
        for p in unit.span.start / BLOCK..unit.span.end / BLOCK {
            let b = match packed {
                Some(heads) => heads.keys(problem, batch, head, panels[p]),
                None => &packed_keys[p * BLOCK * key_width..][..BLOCK * key_width],
            };
            let (factors, pairs, steps, left, right) = match &form {
                Form::Parts => (
                    Factors::Bf16,
                    parts.of_scores,
                    problem.dim.div_ceil(STEP),
                    parts.query_rows(queries, problem.dim, first),
                    parts.key_columns(b.as_ptr()),
                ),
                Form::Bytes { width, .. } => (
                    Factors::Bytes,
                    Pairs::new(&[(0, 0)]),
                    problem.dim.div_ceil(TILE_BYTES),
                    byte_rows(&queries[first * *width..], *width),
                    Right { start: b.as_ptr().cast(), step: 2 * TILE * TILE_BYTES, part: 0, blocks: std::ptr::null() },
                ),
            };
            let sums = Sums { start: scores[p * BLOCK..].as_mut_ptr(), row: KEYS, add: false };
            // SAFETY: queries are padded to whole blocks of sixteen rows and of steps, the panel is one of the packed ones, and there is
            // room for the scores of 32 rows.
            unsafe { queue.push(Product { factors, pairs, steps, rows: end - first, left, right, sums }) };
        }
    };
    let queue_outputs = |queue: &mut Queue,
                         unit: &Unit,
                         panels: &Panels,
                         packed_values: &[f32],
                         weights: &[f32],
                         outputs: &mut [f32],
                         written: &mut [bool]| {
        let Range { start: first, end } = rows_of(unit);
        let panels = &panels[unit.block % BLOCKS];
        let blocks = &mut written[first / TILE..end.div_ceil(TILE)];
        let add = blocks[0];
        blocks.fill(true);
        assert!(outputs.len() >= (first + (end - first).next_multiple_of(TILE)) * vp);
        let Range { start: low, end: high } = unit.span.clone();
        for p in 0..vp / BLOCK {
            let right = match packed {
                Some(heads) => parts
                    .value_columns(heads.values(problem, batch, head, p).as_ptr())
                    .at(&panels[low / BLOCK..high / BLOCK]),
                None => {
                    let panel = &packed_values[p * KEYS * value_width..][..KEYS * value_width];
                    parts.value_columns(panel[low * value_width..high * value_width].as_ptr())
                }
            };
            let left = parts.weight_rows(weights, KEYS, 0, low);
            let sums = Sums { start: outputs[first * vp + p * BLOCK..].as_mut_ptr(), row: vp, add };
            let (factors, pairs, steps, rows) = (Factors::Bf16, parts.of_outputs, (high - low) / STEP, end - first);
            // SAFETY: there are weights for every key from `low` to `high` and packed values for as many, in panels of the head where
            // they are listed, and outputs are padded to whole blocks of sixteen rows. The panels' numbers stay for as many blocks as the
            // queue may hold products of.
            unsafe { queue.push(Product { factors, pairs, steps, rows, left, right, sums }) };
        }
    };

    let mut units = Units::new(shares, &visible);
    // The unit whose weights wait to be multiplied with values, and the one whose scores are queued.
    let mut attended: Option<Unit> = None;
    let mut next = units.next();
    let mut is_queued = false;
    let mut turn = 0;
    while let Some(unit) = next {
        let Share { ids, list, .. } = &shares[unit.share];
        let list = list.as_ref();
        let Range { start, end } = unit.keys.clone();
        if !is_queued {
            queue.finish();
            if let Some(before) = attended.take() {
                queue_outputs(
                    &mut queue,
                    &before,
                    &panels,
                    packed_values,
                    weights[(turn + 1) % 2],
                    outputs,
                    &mut written,
                );
                queue.finish();
            }
            match (packed, list) {
                (Some(_), Some(list)) => pick_panels(&mut panels[unit.block % BLOCKS], &list.index[start..end]),
                _ => {
                    let (keys, dim, value_dim) = (unit.keys.clone(), problem.dim, problem.value_dim);
                    let between = KEYS * value_width;
                    let (wide, to, to_values) =
                        (wide.as_mut_ptr(), packed_keys.as_mut_ptr(), packed_values.as_mut_ptr());
                    if let Form::Bytes { keys: bytes, .. } = &form {
                        assert!(list.is_none());
                        let (k, dim, keys) = (bytes.rows(), words(dim), keys.clone());
                        s.call(PackKeys { k, keys, dim, padded_dim: key_width, wide, to });
                    }
                    with_rows!(problem, batch, head, |k, v| {
                        // The buffers were sized above for as many keys; those of `keys` are rows of the problem, whose maker vouched for
                        // them.
                        let keys = keys.clone();
                        match list {
                            Some(List { index, .. }) => {
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
            }
            queue_scores(&mut queue, &unit, &panels, packed_keys, scores[turn % 2]);
        }
        // The scores of these rows, and whatever reads the weights that the next ones take the place of.
        queue.finish();
        if let Some(before) = attended.take() {
            queue_outputs(&mut queue, &before, &panels, packed_values, weights[(turn + 1) % 2], outputs, &mut written);
            if (before.share, before.first) == (unit.share, unit.first) {
                queue.finish();
            }
        }
        next = units.next();
        // What has to be packed first would take the place of what these rows still need.
        is_queued = next.as_ref().is_some_and(|next| packed.is_some() || next.block == unit.block);
        if let Some(next) = next.as_ref().filter(|_| is_queued) {
            if let Some(list) = shares[next.share].list.as_ref().filter(|_| next.block != unit.block) {
                pick_panels(&mut panels[next.block % BLOCKS], &list.index[next.keys.clone()]);
            }
            queue_scores(&mut queue, next, &panels, packed_keys, scores[(turn + 1) % 2]);
        }
        let (rows, Range { start: low, end: high }) = (rows_of(&unit), unit.span.clone());
        let (count, starts_anew) = (rows.len(), !written[rows.start / TILE]);
        let (ids, visible) = (&ids[unit.first..][..count], &visible[unit.share][unit.first..][..count]);
        let (outputs, running) = (&mut outputs[rows.start * vp..rows.end * vp], &mut running[rows]);
        let (scores, weights) = (&mut *scores[turn % 2], &mut *weights[turn % 2]);
        turn += 1;
        let plain = problem.options.is_plain() && list.is_none_or(|list| !list.changes_scores());
        // By rows of the unit.
        let of_row = |r: usize| r * KEYS + low..r * KEYS + high;
        let visible_of = |r: usize| {
            let (visible, start, end) = (&visible[r], start + low, end.min(start + high));
            visible.start.clamp(start, end) - start..visible.end.clamp(start, end) - start
        };
        if let Form::Bytes { rows: of_rows, keys, .. } = &form {
            // Sums of byte products until here.
            let product = ByteProduct { rows: of_rows, keys: *keys, first_row: 0, first_key: start };
            for r in 0..count {
                product.finish_row(s, unit.first + r, low, &mut scores[of_row(r)]);
            }
        }
        // Scaled with the softmax where nothing comes in between; a factor of 0 would turn what is hidden into NaN.
        let scale_of = |r: usize| problem.row_scale(ids[r]);
        let scales_later = scales && plain && !skips && (0..count).all(|r| scale_of(r) != 0.0);
        if scales && !scales_later {
            for r in 0..count {
                scale_row(s, &mut scores[of_row(r)], scale_of(r));
            }
        }
        if !plain {
            for r in 0..count {
                modify(s, problem, ids[r], &mut scores[of_row(r)], list, start + low..end.min(start + high));
            }
        }
        if skips {
            let mut all = true;
            for r in 0..count {
                all &= is_negligible(problem, &scores[of_row(r)], visible_of(r), running[r]);
            }
            if all {
                continue;
            }
        }
        // Maxima take about an eighth of the time of weights.
        let steps = (high - low) / STEP;
        queue.pace(count * steps * 9 / 8);
        // All maxima first: a row's weights need not wait for its own.
        let mut largest = [f32::NEG_INFINITY; BLOCK];
        for (r, largest) in largest[..count].iter_mut().enumerate() {
            let (row, visible, old) = (&mut scores[of_row(r)], visible_of(r), running[r]);
            *largest = if scales_later {
                largest_logit::<S, true>(s, row, visible, scale_of(r), old)
            } else {
                largest_logit::<S, false>(s, row, visible, 1.0, old)
            };
            queue.tick(steps / 8);
        }
        with_parts!(parts.weights, PARTS, {
            for (r, &largest) in largest[..count].iter().enumerate() {
                let to = parts.weight_row::<PARTS>(weights, KEYS, r, low);
                let mut to = Meanwhile { to, queue: &mut queue };
                let (row, visible, old) = (&scores[of_row(r)], visible_of(r), running[r]);
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
                if factor != 1.0 && !starts_anew {
                    scale_row(s, &mut outputs[r * vp..(r + 1) * vp], factor);
                }
            }
        });
        attended = Some(unit);
    }
    queue.finish();
    if let Some(before) = attended {
        queue_outputs(&mut queue, &before, &panels, packed_values, weights[(turn + 1) % 2], outputs, &mut written);
        queue.finish();
    }
    // Rows that see nothing.
    for (block, _) in written[..rows / TILE].iter().enumerate().filter(|(_, written)| !**written) {
        outputs[block * TILE * vp..(block + 1) * TILE * vp].fill(0.0);
    }
}

/// The panels of a packed head that listed keys are.
fn pick_panels(panels: &mut [u32; KEYS / BLOCK], index: &[u32]) {
    for (panel, &key) in panels.iter_mut().zip(index.iter().step_by(BLOCK)) {
        *panel = key / BLOCK as u32;
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
