//! One block of keys: the gradients of its keys and values, and its part of every query's.

use super::{Forward, Job, ROWS, Sum, Tile, load_row, store_row};
use crate::dense::keys::List;
use crate::dense::micro::{multiply, panel};
use crate::dense::packing::{pack_transposed, pack_values};
use crate::dense::rows::{Strided, is_finite};
use crate::dense::scores::{RowId, modify};
use crate::dense::scratch::{Buffer, Scratch};
use crate::dense::tile::KEYS;
use crate::dense::{Problem, load_query};
use crate::parallel::Cancel;
use crate::simd::{MAX_ROWS, Simd};
use std::ops::Range;

/// Keys of a block, rounded up to whole tiles of any instruction set.
const KEY_ROWS: usize = KEYS.next_multiple_of(MAX_ROWS);

const _: () = assert!(ROWS <= KEYS && ROWS.is_multiple_of(16) && ROWS.is_multiple_of(MAX_ROWS) && MAX_ROWS == 12);

/// The block `block` of one KV head's keys, and the tiles of all query rows of the head's group.
pub(super) struct Block<'a, 's> {
    pub(super) job: &'a Job<'a>,
    pub(super) batch: usize,
    pub(super) kv_head: usize,
    pub(super) block: usize,
    pub(super) tiles: &'a [Tile],
    pub(super) cancel: &'a Cancel,
    pub(super) scratch: &'s mut Scratch,
}

/// Turns logits into softmax weights: `exp(logit - lse)` where the row sees the key, else 0, even if `lse` is NaN.
#[inline(always)]
fn weights<S: Simd>(s: S, row: &mut [f32], visible: &Range<usize>, lse: f32) {
    if lse == f32::NEG_INFINITY || visible.is_empty() {
        row.fill(0.0);
        return;
    }
    let (shift, lowest) = (s.splat(lse), s.splat(f32::MIN));
    for chunk in row.chunks_exact_mut(S::LANES) {
        // SAFETY: the chunk has LANES floats.
        unsafe {
            let logit = s.load(chunk.as_ptr());
            let weight = s.exp(s.sub(logit, shift));
            s.store(chunk.as_mut_ptr(), s.select_less(logit, lowest, s.zero(), weight));
        }
    }
    row[..visible.start].fill(0.0);
    row[visible.end..].fill(0.0);
}

/// The derivative of softcap at each scaled dot product.
#[inline(always)]
fn softcap_slope<S: Simd>(s: S, scores: &[f32], softcap: f32, to: &mut [f32]) {
    let (inverse, one) = (s.splat(1.0 / softcap), s.splat(1.0));
    for (from, to) in scores.chunks_exact(S::LANES).zip(to.chunks_exact_mut(S::LANES)) {
        // SAFETY: both chunks have LANES floats.
        unsafe {
            let t = s.tanh(s.mul(s.load(from.as_ptr()), inverse));
            s.store(to.as_mut_ptr(), s.sub(one, s.mul(t, t)));
        }
    }
}

/// `p = p (d_p - delta) slope`, and 0 wherever the weight `p` is 0, whatever the rest holds.
#[inline(always)]
fn score_gradient<S: Simd>(s: S, p: &mut [f32], d_p: &[f32], delta: f32, slope: Option<&[f32]>) {
    let (delta, tiny) = (s.splat(delta), s.splat(f32::MIN_POSITIVE));
    for j in (0..p.len()).step_by(S::LANES) {
        // SAFETY: the slices have one length, a multiple of LANES.
        unsafe {
            let weight = s.load(p.as_ptr().add(j));
            let mut x = s.mul(weight, s.sub(s.load(d_p.as_ptr().add(j)), delta));
            if let Some(slope) = slope {
                x = s.mul(x, s.load(slope.as_ptr().add(j)));
            }
            s.store(p.as_mut_ptr().add(j), s.select_less(weight, tiny, s.zero(), x));
        }
    }
}

/// `to[c][r] = from[r][c]` for the first `rows` rows and `columns` columns; rows are `KEYS` and `ROWS` floats apart.
#[inline(always)]
fn transpose<S: Simd>(s: S, from: &[f32], rows: usize, columns: usize, to: &mut [f32]) {
    let rows = rows.next_multiple_of(S::LANES);
    assert!(rows <= ROWS && columns <= KEYS && columns.is_multiple_of(S::LANES));
    assert!(from.len() >= ROWS * KEYS && to.len() >= KEYS * ROWS);
    for c in (0..columns).step_by(S::LANES) {
        for r in (0..rows).step_by(S::LANES) {
            // SAFETY: rows r.. and columns c.. of whole vectors lie inside both, by the assertions.
            unsafe { s.transpose(from.as_ptr().add(r * KEYS + c), KEYS, to.as_mut_ptr().add(c * ROWS + r), ROWS) };
        }
    }
}

/// `to[key] += sum_r weights[key][r] rows[r]` for the block's keys: `weights` transposed, `panels` the packed rows. `seen[r]` is the
/// range of keys that row r sees.
#[inline(always)]
fn add_transposed<S: Simd>(
    s: S,
    weights: &[f32],
    panels: &[f32],
    seen: &[(usize, usize)],
    keys: usize,
    to: &mut [f32],
    width: usize,
) {
    let panel = panel::<S>();
    assert!(weights.len() >= KEY_ROWS * ROWS && panels.len() >= KEYS * width && to.len() >= KEY_ROWS * width);
    assert!(seen.len() <= ROWS && keys <= KEYS && width.is_multiple_of(panel));
    for first in (0..keys).step_by(S::ROWS) {
        // From the first row that sees one of these keys to the last.
        let sees = |x: &(usize, usize)| x.0 < x.1 && x.0 < first + S::ROWS && first < x.1;
        let Some(low) = seen.iter().position(sees) else { continue };
        let high = seen.iter().rposition(sees).map_or(low, |r| r + 1);
        for p in 0..width / panel {
            // SAFETY: rows of KEY_ROWS >= first + S::ROWS keys and of low..high <= ROWS exist by the assertions.
            unsafe {
                let a = weights.as_ptr().add(first * ROWS + low);
                let b = panels.as_ptr().add((p * KEYS + low) * panel);
                let c = to.as_mut_ptr().add(first * width + p * panel);
                multiply(s, high - low, a, ROWS, b, c, width, true);
            }
        }
    }
}

/// `to[r][key] = sum_d rows[r][d] panels[key][d]`, panels of keys only where `ranges` says that some row of a tile sees one.
#[inline(always)]
fn dot_products<S: Simd>(
    s: S,
    rows: &[f32],
    width: usize,
    dim: usize,
    panels: &[f32],
    columns: usize,
    ranges: &[(usize, usize)],
    to: &mut [f32],
) {
    let panel = panel::<S>();
    let tiles = ranges.len();
    assert!(rows.len() >= tiles * S::ROWS * width && panels.len() >= columns * width && dim <= width);
    assert!(columns <= KEYS && columns.is_multiple_of(panel) && to.len() >= tiles * S::ROWS * KEYS);
    for p in 0..columns / panel {
        for (t, &(low, high)) in ranges.iter().enumerate() {
            if low < (p + 1) * panel && p * panel < high {
                // SAFETY: tile t of the rows and of `to`, and panel p, exist by the assertions.
                unsafe {
                    let a = rows.as_ptr().add(t * S::ROWS * width);
                    let b = panels.as_ptr().add(p * width * panel);
                    let c = to.as_mut_ptr().add(t * S::ROWS * KEYS + p * panel);
                    multiply(s, dim, a, width, b, c, KEYS, false);
                }
            }
        }
    }
}

/// Adds `sum_key weights[r][key] keys[key]` to a tile's dQ.
#[inline(always)]
fn add_keys<S: Simd>(s: S, weights: &[f32], panels: &[f32], ranges: &[(usize, usize)], to: &mut [f32], width: usize) {
    let panel = panel::<S>();
    let tiles = ranges.len();
    assert!(weights.len() >= tiles * S::ROWS * KEYS && panels.len() >= KEYS * width);
    assert!(to.len() >= tiles * S::ROWS * width && width.is_multiple_of(panel));
    for p in 0..width / panel {
        for (t, &(low, high)) in ranges.iter().enumerate() {
            if low < high {
                assert!(high <= KEYS);
                // SAFETY: columns low..high of tile t, panel p and the tile's rows exist by the assertions.
                unsafe {
                    let a = weights.as_ptr().add(t * S::ROWS * KEYS + low);
                    let b = panels.as_ptr().add((p * KEYS + low) * panel);
                    let c = to.as_mut_ptr().add(t * S::ROWS * width + p * panel);
                    multiply(s, high - low, a, KEYS, b, c, width, true);
                }
            }
        }
    }
}

/// Room for a block of keys, a tile of rows, and what lies between them.
pub(super) struct Room<'a> {
    /// Widths of rows of keys and of values.
    pub(super) widths: [usize; 2],
    /// The block's keys and values, transposed and as they are.
    k_across: &'a mut [f32],
    k_panels: &'a mut [f32],
    v_across: &'a mut [f32],
    /// The tile's queries and output gradients, in rows and in panels.
    q: &'a mut [f32],
    d_out: &'a mut [f32],
    q_panels: &'a mut [f32],
    d_panels: &'a mut [f32],
    /// Weights and then gradients of logits, value products, a transposed matrix, slopes of the softcap.
    p: &'a mut [f32],
    d_p: &'a mut [f32],
    turned: &'a mut [f32],
    slope: &'a mut [f32],
    /// Gradients of the block's keys and values.
    pub(super) d_keys: &'a mut [f32],
    pub(super) d_values: &'a mut [f32],
    /// For packing.
    wide: &'a mut [f32],
    rows: &'a mut [f32],
    /// Keys and rows that are not finite.
    ///
    /// They are left out of the products, where a weight of 0 would turn into NaN. What sees such a row becomes NaN all the
    /// same: by its logits where it is a key, else by delta.
    bad_keys: Vec<usize>,
    bad_rows: Vec<usize>,
}

/// The keys of a block: the rows `keys`, or those that the list has at these places.
pub(super) struct KeyRows<'a> {
    pub(super) keys: Range<usize>,
    pub(super) list: Option<&'a List<'a>>,
}

impl KeyRows<'_> {
    pub(super) fn row(&self, j: usize) -> usize {
        let place = self.keys.start + j;
        self.list.map_or(place, |list| list.index[place] as usize)
    }
}

impl<'a> Room<'a> {
    #[inline(always)]
    pub(super) fn new<S: Simd>(_: S, problem: &Problem, buffer: &'a mut Buffer) -> Self {
        let panel = panel::<S>();
        let (dw, vw) = (problem.dim.next_multiple_of(panel), problem.value_dim.next_multiple_of(panel));
        let slopes = if problem.options.softcap > 0.0 { ROWS * KEYS } else { 0 };
        let [
            k_across,
            k_panels,
            v_across,
            q,
            d_out,
            q_panels,
            d_panels,
            p,
            d_p,
            turned,
            slope,
            d_keys,
            d_values,
            wide,
            rows,
        ] = buffer.carve([
            KEYS * dw,
            KEYS * dw,
            KEYS * vw,
            ROWS * dw,
            ROWS * vw,
            KEYS * dw,
            KEYS * vw,
            ROWS * KEYS,
            ROWS * KEYS,
            KEY_ROWS * ROWS,
            slopes,
            KEY_ROWS * dw,
            KEY_ROWS * vw,
            panel * dw.max(vw),
            KEYS * dw.max(vw),
        ]);
        Self {
            widths: [dw, vw],
            k_across,
            k_panels,
            v_across,
            q,
            d_out,
            q_panels,
            d_panels,
            p,
            d_p,
            turned,
            slope,
            d_keys,
            d_values,
            wide,
            rows,
            bad_keys: Vec::new(),
            bad_rows: Vec::new(),
        }
    }

    /// Loads a block of at most [`KEYS`] keys of one head; their gradients are 0 so far.
    #[inline(always)]
    pub(super) fn load_keys<S: Simd>(&mut self, s: S, forward: &Forward, head: [usize; 2], keys: &KeyRows) {
        let ([dw, vw], [batch, kv_head], n) = (self.widths, head, keys.keys.len());
        let (dim, value_dim) = (forward.k.shape()[3], forward.v.shape()[3]);
        self.d_keys.fill(0.0);
        self.d_values.fill(0.0);
        self.bad_keys.clear();
        for (j, row) in self.rows.chunks_exact_mut(dw).take(n).enumerate() {
            load_row(s, &forward.k, [batch, kv_head, keys.row(j)], row);
            if !is_finite(s, row) {
                row.fill(0.0);
                self.bad_keys.push(j);
            }
        }
        let strided = Strided { base: self.rows.as_ptr(), stride: dw as isize };
        // SAFETY: `rows` has n <= KEYS rows of `dw >= dim` floats; the panels and `wide` were sized for KEYS rows.
        unsafe {
            let wide = self.wide.as_mut_ptr();
            pack_transposed(s, strided, 0..n, dim, dw, wide, self.k_across.as_mut_ptr());
            pack_values(s, strided, 0..n, dim, dw, wide, KEYS, self.k_panels.as_mut_ptr());
        }
        for (j, row) in self.rows.chunks_exact_mut(vw).take(n).enumerate() {
            load_row(s, &forward.v, [batch, kv_head, keys.row(j)], row);
            if !is_finite(s, row) {
                row.fill(0.0);
            }
        }
        let strided = Strided { base: self.rows.as_ptr(), stride: vw as isize };
        // SAFETY: as above, with rows of `vw >= value_dim` floats.
        unsafe {
            let (wide, to) = (self.wide.as_mut_ptr(), self.v_across.as_mut_ptr());
            pack_transposed(s, strided, 0..n, value_dim, vw, wide, to);
        }
    }

    /// Loads at most [`ROWS`] query rows.
    #[inline(always)]
    pub(super) fn load_rows<S: Simd>(&mut self, s: S, problem: &Problem, forward: &Forward, ids: &[RowId]) {
        let ([dw, vw], n) = (self.widths, ids.len());
        let (dim, value_dim) = (problem.dim, problem.value_dim);
        self.bad_rows.clear();
        for (r, &id) in ids.iter().enumerate() {
            let (q, d_out) = (&mut self.q[r * dw..(r + 1) * dw], &mut self.d_out[r * vw..(r + 1) * vw]);
            load_query(s, problem, id, q);
            load_row(s, &forward.d_out, [id.batch, id.head, id.row], d_out);
            if !is_finite(s, q) || !is_finite(s, d_out) {
                q.fill(0.0);
                d_out.fill(0.0);
                self.bad_rows.push(r);
            }
        }
        let padded = n.next_multiple_of(S::ROWS);
        self.q[n * dw..padded * dw].fill(0.0);
        self.d_out[n * vw..padded * vw].fill(0.0);
        let (q_rows, d_rows) = (
            Strided { base: self.q.as_ptr(), stride: dw as isize },
            Strided { base: self.d_out.as_ptr(), stride: vw as isize },
        );
        // SAFETY: both have n <= ROWS <= KEYS rows; the panels were sized for KEYS.
        unsafe {
            let wide = self.wide.as_mut_ptr();
            pack_values(s, q_rows, 0..n, dim, dw, wide, KEYS, self.q_panels.as_mut_ptr());
            pack_values(s, d_rows, 0..n, value_dim, vw, wide, KEYS, self.d_panels.as_mut_ptr());
        }
    }

    /// Adds what the loaded rows, which see `seen` of the loaded keys, give to the gradients of these, and leaves the gradients
    /// of their logits for [`Self::add_queries`]. With `d_table`, they are also added to a bias table's gradient.
    #[inline(always)]
    pub(super) fn gradients<S: Simd>(
        &mut self,
        s: S,
        problem: &Problem,
        forward: &Forward,
        ids: &[RowId],
        delta: &[f32],
        keys: &KeyRows,
        seen: &[(usize, usize)],
        mut d_table: Option<&mut [f32]>,
    ) -> Ranges {
        let ([dw, vw], n) = (self.widths, ids.len());
        let softcap = problem.options.softcap;
        let plain = problem.options.is_plain() && keys.list.is_none_or(|list| !list.changes_scores());
        let columns = keys.keys.len().next_multiple_of(panel::<S>());
        // Range of the block's columns that some row of a micro-kernel's tile sees.
        let mut found = Ranges { tiles: n.div_ceil(S::ROWS), of: [(columns, 0); ROWS.div_ceil(4)] };
        for (range, seen) in found.of.iter_mut().zip(seen.chunks(S::ROWS)) {
            for &(low, high) in seen.iter().filter(|(low, high)| low < high) {
                *range = (range.0.min(low), range.1.max(high));
            }
        }
        let ranges = &found.of[..found.tiles];

        dot_products(s, self.q, dw, problem.dim, self.k_across, columns, ranges, self.p);
        for (r, &(low, high)) in seen.iter().enumerate() {
            let row = &mut self.p[r * KEYS..r * KEYS + columns];
            let id = ids[r];
            if ranges[r / S::ROWS].0 < ranges[r / S::ROWS].1 {
                if self.bad_rows.contains(&r) {
                    row.fill(f32::NAN);
                }
                for &j in &self.bad_keys {
                    row[j] = f32::NAN;
                }
                if softcap > 0.0 {
                    softcap_slope(s, row, softcap, &mut self.slope[r * KEYS..r * KEYS + columns]);
                }
                if !plain {
                    modify(s, problem, id, row, keys.list, keys.keys.clone());
                }
            }
            weights(s, row, &(low..high), forward.lse.row::<f32>(id.batch, id.head, id.row)[0]);
        }
        transpose(s, self.p, n, columns, self.turned);
        add_transposed(s, self.turned, self.d_panels, seen, keys.keys.len(), self.d_values, vw);

        dot_products(s, self.d_out, vw, problem.value_dim, self.v_across, columns, ranges, self.d_p);
        for r in 0..n {
            let (from, to) = (r * KEYS, r * KEYS + columns);
            let slope = (softcap > 0.0).then(|| &self.slope[from..to]);
            if let (Some(d_table), Some(patch)) = (&mut d_table, keys.list.and_then(|list| list.patch)) {
                // The bias is added behind the softcap.
                score_gradient(s, &mut self.p[from..to], &self.d_p[from..to], delta[r], None);
                patch.add_to_table(ids[r], &self.p[from..to], keys.keys.clone(), d_table);
                if let Some(slope) = slope {
                    self.p[from..to].iter_mut().zip(slope).for_each(|(x, slope)| *x *= slope);
                }
            } else {
                score_gradient(s, &mut self.p[from..to], &self.d_p[from..to], delta[r], slope);
            }
        }
        transpose(s, self.p, n, columns, self.turned);
        add_transposed(s, self.turned, self.q_panels, seen, keys.keys.len(), self.d_keys, dw);
        found
    }

    /// Adds the part of the loaded keys to the rows' dQ, without the scale.
    #[inline(always)]
    pub(super) fn add_queries<S: Simd>(&self, s: S, ranges: &Ranges, to: &mut [f32]) {
        add_keys(s, self.p, self.k_panels, &ranges.of[..ranges.tiles], to, self.widths[0]);
    }
}

/// Columns of a block that the tiles of the micro-kernel see.
pub(super) struct Ranges {
    tiles: usize,
    of: [(usize, usize); ROWS.div_ceil(4)],
}

impl crate::simd::Kernel for Block<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { job, batch, kv_head, block, tiles, cancel, scratch } = self;
        let Job { problem, forward, dq, dk, dv } = job;
        let (dim, value_dim) = (problem.dim, problem.value_dim);
        let mut room = Room::new(s, problem, &mut scratch.extra);
        let [dw, vw] = room.widths;
        let keys = KeyRows { keys: block * KEYS..((block + 1) * KEYS).min(problem.keys), list: None };
        room.load_keys(s, forward, [batch, kv_head], &keys);

        for tile in tiles.iter().filter(|tile| tile.blocks.contains(&block)) {
            let Tile { batch, head, ref rows, .. } = *tile;
            let n = rows.len();
            let mut seen = [(0usize, 0usize); ROWS];
            let mut ids = [RowId { batch, head, row: 0 }; ROWS];
            for (r, row) in rows.clone().enumerate() {
                ids[r].row = row;
                let visible = problem.visible(row);
                let low = visible.start.clamp(keys.keys.start, keys.keys.end) - keys.keys.start;
                let high = visible.end.clamp(keys.keys.start, keys.keys.end) - keys.keys.start;
                seen[r] = (low, high.max(low));
            }
            let (seen, ids) = (&seen[..n], &ids[..n]);
            room.load_rows(s, problem, forward, ids);
            let ranges = room.gradients(s, problem, forward, ids, &tile.delta, &keys, seen, None);

            let Some(mut sum) = tile.turn_of(block, cancel) else {
                return;
            };
            let Sum { next, dq: total } = &mut *sum;
            let total_rows = total.take(n.next_multiple_of(S::ROWS) * dw);
            room.add_queries(s, &ranges, total_rows);
            if *next + 1 == tile.blocks.end {
                for (&id, from) in ids.iter().zip(total_rows.chunks_exact(dw)) {
                    let scale = problem.row_scale(id);
                    store_row(dq, [batch, head, id.row], from[..dim].iter().map(|x| x * scale));
                }
                *total = Buffer::default();
            }
            tile.pass_on(sum);
        }
        for (j, key) in keys.keys.enumerate() {
            store_row(dk, [batch, kv_head, key], room.d_keys[j * dw..j * dw + dim].iter().copied());
            store_row(dv, [batch, kv_head, key], room.d_values[j * vw..j * vw + value_dim].iter().copied());
        }
    }
}
