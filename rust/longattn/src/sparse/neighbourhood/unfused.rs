//! The two halves of neighbourhood attention, with scores and weights in the open: one number per query and place in its window.

use super::tiles::Tiles;
use super::{head_ranges, row_ids, visible_of};
use crate::dense::grid::{Grid, Patch};
use crate::dense::micro::{multiply, panel};
use crate::dense::packing::{PackKeys, PackValues};
use crate::dense::rows::{Indexed, is_finite, with_rows};
use crate::dense::scores::RowId;
use crate::dense::scratch::{Scratch, with_scratch};
use crate::dense::tile::{KEYS, QUERY_ROWS};
use crate::dense::{Options, Problem, load_query};
use crate::kv::convert::narrow;
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{DType, Element, Error, Result, TensorView, TensorViewMut, with_element};
use std::ops::Range;

/// Ranges of a block's columns that each tile of `S::ROWS` rows sees.
#[inline(always)]
fn tile_ranges<S: Simd>(visible: &[Range<usize>], block: &Range<usize>) -> [(usize, usize); QUERY_ROWS.div_ceil(4)] {
    let mut ranges = [(KEYS, 0); QUERY_ROWS.div_ceil(4)];
    for (r, visible) in visible.iter().enumerate() {
        let (start, end) = (visible.start.max(block.start), visible.end.min(block.end));
        if start < end {
            let range = &mut ranges[r / S::ROWS];
            *range = (range.0.min(start - block.start), range.1.max(end - block.start));
        }
    }
    ranges
}

/// Where a run of a row's keys lies in its window of `sizes` places.
#[inline(always)]
pub(super) fn place(offset: [u32; 3], sizes: [usize; 3]) -> usize {
    let [z, y, x] = offset.map(|n| n as usize);
    (z * sizes[1] + y) * sizes[2] + x
}

/// What the kernels below work on: a tile of one batch entry and KV head.
struct Tile<'a, 's> {
    problem: &'a Problem<'a>,
    ids: &'a [RowId],
    patch: &'a Patch<'a>,
    visible: &'a [Range<usize>],
    sizes: [usize; 3],
    scratch: &'s mut Scratch,
}

/// Scores of a tile.
struct Scores<'a, 's> {
    tile: Tile<'a, 's>,
    to: &'a TensorViewMut<'a>,
}

impl Kernel for Scores<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { tile: Tile { problem, ids, patch, visible, sizes, scratch }, to } = self;
        let (panel, n) = (panel::<S>(), ids.len());
        let padded = n.next_multiple_of(S::ROWS);
        let dp = problem.dim.next_multiple_of(S::LANES);
        let queries = scratch.queries.take(padded * dp);
        for (r, &id) in ids.iter().enumerate() {
            load_query(s, problem, id, &mut queries[r * dp..(r + 1) * dp]);
            // SAFETY: the row has as many places as its window, and no other worker holds it.
            let row =
                unsafe { std::slice::from_raw_parts_mut(to.row_ptr::<f32>(id.batch, id.head, id.row), to.shape()[3]) };
            row.fill(f32::NEG_INFINITY);
        }
        queries[n * dp..padded * dp].fill(0.0);
        let packed = scratch.keys.take(KEYS * dp);
        let scores = scratch.scores.take(padded * KEYS);
        let wide = scratch.extra.take(panel * dp);
        let (index, batch, kv_head) = (patch.index(), ids[0].batch, ids[0].head / problem.group);
        for start in (0..index.len()).step_by(KEYS) {
            let keys = start..(start + KEYS).min(index.len());
            let columns = keys.len().next_multiple_of(panel);
            with_rows!(problem, batch, kv_head, |k, _v| {
                let (k, dim, padded_dim) = (Indexed { rows: k, index }, problem.dim, dp);
                let (wide, to) = (wide.as_mut_ptr(), packed.as_mut_ptr());
                s.call(PackKeys { k, keys: keys.clone(), dim, padded_dim, wide, to });
            });
            let ranges = tile_ranges::<S>(visible, &keys);
            for p in 0..columns / panel {
                for (t, &(low, high)) in ranges.iter().enumerate().take(padded / S::ROWS) {
                    if low < (p + 1) * panel && p * panel < high {
                        // SAFETY: the buffers hold `padded` rows and KEYS columns, of which these are a tile and a panel.
                        unsafe {
                            let a = queries.as_ptr().add(t * S::ROWS * dp);
                            let b = packed.as_ptr().add(p * dp * panel);
                            let c = scores.as_mut_ptr().add(t * S::ROWS * KEYS + p * panel);
                            multiply(s, problem.dim, a, dp, b, c, KEYS, false);
                        }
                    }
                }
            }
            for (r, &id) in ids.iter().enumerate() {
                if ranges[r / S::ROWS].0 >= ranges[r / S::ROWS].1 {
                    continue;
                }
                let row = &mut scores[r * KEYS..r * KEYS + keys.len()];
                patch.modify(problem.query_heads, problem.queries, id, row, keys.clone());
                let mut runs = patch.runs(id.row, keys.clone());
                while let Some(run) = runs.next_run() {
                    let from = &row[run.at.clone()];
                    // SAFETY: as above; places of a window were checked to fit its row.
                    let to = unsafe {
                        let to = to.row_ptr::<f32>(id.batch, id.head, id.row).add(place(run.offset, sizes));
                        std::slice::from_raw_parts_mut(to, from.len())
                    };
                    to.copy_from_slice(from);
                }
            }
        }
    }
}

/// Weighted sums of values of a tile.
struct Sums<'a, 's> {
    tile: Tile<'a, 's>,
    weights: TensorView<'a>,
    out: &'a TensorViewMut<'a>,
}

impl Sums<'_, '_> {
    /// A row computed anew from its window alone: zeros of other rows' windows met something that is not finite.
    #[inline(never)]
    fn careful(&self, id: RowId, row: &mut [f32]) {
        let Tile { problem, patch, sizes, .. } = &self.tile;
        row.fill(0.0);
        let index = patch.index();
        let mut runs = patch.runs(id.row, 0..index.len());
        while let Some(run) = runs.next_run() {
            let first = place(run.offset, *sizes);
            for (n, &key) in index[run.at].iter().enumerate() {
                let crate::tensor::KvView::Numbers(v) = &problem.v else { return };
                let weight = with_element!(self.weights.dtype(), W => {
                    self.weights.row::<W>(id.batch, id.head, id.row)[first + n].to_f32()
                });
                with_element!(v.dtype(), V => {
                    let from = v.row::<V>(id.batch, id.head / problem.group, key as usize);
                    row.iter_mut().zip(from).for_each(|(to, x)| *to += weight * x.to_f32());
                });
            }
        }
    }
}

impl Kernel for Sums<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let Self { tile: Tile { problem, ids, patch, visible, sizes, ref mut scratch }, weights, out } = self;
        let (panel, n) = (panel::<S>(), ids.len());
        let padded = n.next_multiple_of(S::ROWS);
        let vp = problem.value_dim.next_multiple_of(panel);
        // Taken out, so that a row can be made anew below.
        let Scratch { values, outputs, scores, extra, .. } = std::mem::take(&mut **scratch);
        let (mut values, mut outputs, mut scores, mut extra) = (values, outputs, scores, extra);
        let sums = outputs.take(padded * vp);
        sums[..padded * vp].fill(0.0);
        let packed = values.take(KEYS * vp);
        let across = scores.take(padded * KEYS);
        let wide = extra.take(vp);
        let (index, batch, kv_head) = (patch.index(), ids[0].batch, ids[0].head / problem.group);
        for start in (0..index.len()).step_by(KEYS) {
            let keys = start..(start + KEYS).min(index.len());
            with_rows!(problem, batch, kv_head, |_k, v| {
                let (v, dim, padded_dim) = (Indexed { rows: v, index }, problem.value_dim, vp);
                let (wide, to) = (wide.as_mut_ptr(), packed.as_mut_ptr());
                s.call(PackValues { v, keys: keys.clone(), dim, padded_dim, wide, between: KEYS, to });
            });
            let ranges = tile_ranges::<S>(visible, &keys);
            across.fill(0.0);
            for (r, &id) in ids.iter().enumerate() {
                let row = &mut across[r * KEYS..r * KEYS + keys.len()];
                let mut runs = patch.runs(id.row, keys.clone());
                while let Some(run) = runs.next_run() {
                    let first = place(run.offset, sizes);
                    let to = &mut row[run.at];
                    with_element!(weights.dtype(), W => {
                        let from = &weights.row::<W>(id.batch, id.head, id.row)[first..first + to.len()];
                        to.iter_mut().zip(from).for_each(|(to, w)| *to = w.to_f32());
                    });
                }
            }
            for p in 0..vp / panel {
                for (t, &(low, high)) in ranges.iter().enumerate().take(padded / S::ROWS) {
                    if low < high {
                        // SAFETY: columns low..high of the tile's weights and rows low..high of the panel exist.
                        unsafe {
                            let a = across.as_ptr().add(t * S::ROWS * KEYS + low);
                            let b = packed.as_ptr().add((p * KEYS + low) * panel);
                            let c = sums.as_mut_ptr().add(t * S::ROWS * vp + p * panel);
                            multiply(s, high - low, a, KEYS, b, c, vp, true);
                        }
                    }
                }
            }
        }
        for (r, &id) in ids.iter().enumerate() {
            let row = &mut sums[r * vp..r * vp + problem.value_dim];
            if !is_finite(s, row) {
                self.careful(id, row);
            }
            with_element!(out.dtype(), O => {
                let to = out.row_ptr::<O>(id.batch, id.head, id.row);
                // SAFETY: the output row has value_dim numbers, and no other worker holds it.
                unsafe { narrow(row, to.cast(), O::DTYPE) };
            });
        }
        let scratch = &mut *self.tile.scratch;
        (scratch.values, scratch.outputs, scratch.scores, scratch.extra) = (values, outputs, scores, extra);
    }
}

/// Checks what both halves need.
pub(super) fn check(problem: &Problem, grid: &Grid, sizes: [usize; 3]) -> Result<()> {
    grid.check([problem.batch, problem.query_heads, problem.queries, problem.keys])?;
    for (axis, size) in grid.axes.iter().zip(sizes) {
        if axis.queries.iter().any(|x| (x.end - x.start) as usize > size) {
            return Err(Error::value("window", size, "as many places as a query sees keys"));
        }
    }
    Ok(())
}

/// Runs `work` on every tile.
fn for_tiles<'a>(
    problem: &Problem<'a>,
    grid: &Grid,
    sizes: [usize; 3],
    execution: &Execution,
    work: impl Fn(Tile) + Sync,
) -> Result<()> {
    check(problem, grid, sizes)?;
    if problem.queries == 0 || problem.query_heads == 0 {
        return Ok(());
    }
    let heads = head_ranges(problem, QUERY_ROWS);
    let width = heads.iter().map(Range::len).max().unwrap_or(1);
    let tiles = Tiles::new(grid, width, QUERY_ROWS / width, problem.dim + problem.value_dim);
    for_each(execution, problem.batch * heads.len() * tiles.len(), |i| {
        let (pair, tile) = (i / tiles.len(), i % tiles.len());
        let (rows, patch) = tiles.rows(grid, tile);
        let ids = row_ids(&rows, pair / heads.len(), &heads[pair % heads.len()]);
        let visible = visible_of(&patch, &ids);
        with_scratch(|scratch| work(Tile { problem, ids: &ids, patch: &patch, visible: &visible, sizes, scratch }));
    })
}

/// Logits of every query with the keys of its window, `[batch, query heads, queries, product of sizes]` in f32.
///
/// Place `(z * sizes[1] + y) * sizes[2] + x` belongs to the key that many steps behind the window's start along each axis; places
/// beyond a window hold minus infinity. Arguments otherwise as in [`neighbourhood`](super::neighbourhood).
pub fn neighbourhood_scores(
    q: TensorView,
    k: TensorView,
    grid: &Grid,
    sizes: [usize; 3],
    options: Options,
    scores: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let problem = Problem::new(q, k.into(), k.into(), Options { scale: options.scale, ..Options::default() })?;
    let expected = [problem.batch, problem.query_heads, problem.queries, sizes.iter().product()];
    if scores.dtype() != DType::F32 || scores.shape() != expected {
        return Err(Error::value("scores", format!("{:?}", scores.shape()), format!("float32 {expected:?}")));
    }
    let (isa, to) = (simd::current(), &*scores);
    for_tiles(&problem, grid, sizes, execution, |tile| dispatch(isa, Scores { tile, to }))
}

/// Sums of the values of every query's window, weighted with what [`neighbourhood_scores`] has places for; weights of places beyond
/// a window do not count.
pub fn neighbourhood_values(
    weights: TensorView,
    v: TensorView,
    grid: &Grid,
    sizes: [usize; 3],
    out: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let [batch, heads, queries, places] = weights.shape();
    let value_dim = v.shape()[3];
    if places != sizes.iter().product::<usize>() {
        return Err(Error::value("weights", format!("{places} places"), format!("{sizes:?}")));
    }
    if out.shape() != [batch, heads, queries, value_dim] {
        return Err(Error::value(
            "out",
            format!("shape {:?}", out.shape()),
            format!("{heads} heads of {queries} rows"),
        ));
    }
    // Outputs and values stand in for queries and keys, whose numbers nobody looks at.
    let out = &*out;
    let (problem, isa) = (Problem::new(out.as_view(), v.into(), v.into(), Options::default())?, simd::current());
    for_tiles(&problem, grid, sizes, execution, |tile| dispatch(isa, Sums { tile, weights, out }))
}
