//! Gradients of attention over lists of keys, tile by tile of query rows.
//!
//! ```text
//! tiles of one KV head, in ranges (by shape alone)           -> items
//! an item, for each tile, for each block of the tile's list:   as block.rs; dQ is the tile's alone
//! dK and dV of an item in f32, added up over the items of a KV head in order
//! ```
//! An item keeps the gradients of all keys of its head: there are as many items as make use of many threads, and no more.

use super::block::{KeyRows, Room};
use super::{Forward, Gradients, Job, ROWS, delta_of, store_row};
use crate::dense::keys::{Keys, List};
use crate::dense::scores::RowId;
use crate::dense::scratch::{Scratch, with_scratch};
use crate::dense::tile::KEYS;
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::Result;
use std::ops::Range;
use std::sync::Mutex;

/// At most [`ROWS`] query rows of one KV head and their keys, of which they see what `keys` says.
pub(crate) struct ListedTile<'a> {
    pub(crate) ids: &'a [RowId],
    pub(crate) keys: &'a Keys<'a>,
}

/// Hands tile `i` of a batch entry and KV head to a function.
type Visit<'a> = dyn Fn([usize; 2], usize, &mut dyn FnMut(ListedTile)) + Sync + 'a;

/// Sums of an item, unpadded: `[keys, dim]`, `[keys, value_dim]`, the bias table's, and those of the sinks of the group's heads.
struct Sums {
    dk: Vec<f32>,
    dv: Vec<f32>,
    d_table: Vec<f32>,
    d_sinks: Vec<f64>,
}

/// One tile.
struct Pass<'a, 's> {
    job: &'a Job<'a>,
    head: [usize; 2],
    tile: ListedTile<'a>,
    sums: &'s mut Sums,
    scratch: &'s mut Scratch,
}

impl Kernel for Pass<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { job: Job { problem, forward, dq, .. }, head, tile: ListedTile { ids, keys }, sums, scratch } = self;
        let (dim, value_dim) = (problem.dim, problem.value_dim);
        let Some(index) = keys.index() else { return };
        let index = &*index;
        let visible: Vec<Range<usize>> = ids.iter().map(|id| keys.visible(problem, index, id.row)).collect();
        let list = List { index, bias: keys.bias(), visible: &visible, patch: keys.patch() };
        let width = value_dim.next_multiple_of(S::LANES);
        let (out, d_out) = (scratch.outputs.take(width), scratch.values.take(width));
        let mut delta = [0f32; ROWS];
        for (delta, id) in delta.iter_mut().zip(ids) {
            *delta = delta_of(s, forward, [id.batch, id.head, id.row], &mut out[..width], &mut d_out[..width]);
            let lse = forward.lse.row::<f32>(id.batch, id.head, id.row)[0];
            if let Some(sinks) = problem.options.sinks.filter(|_| lse != f32::NEG_INFINITY) {
                sums.d_sinks[id.head % problem.group] -= f64::from((sinks[id.head] - lse).exp()) * f64::from(*delta);
            }
        }
        let mut room = Room::new(s, problem, &mut scratch.extra);
        let [dw, vw] = room.widths;
        let total = scratch.queries.take(ids.len().next_multiple_of(S::ROWS) * dw);
        total.fill(0.0);
        room.load_rows(s, problem, forward, ids);
        for start in (0..index.len()).step_by(KEYS) {
            let keys = KeyRows { keys: start..(start + KEYS).min(index.len()), list: Some(&list) };
            let mut seen = [(0usize, 0usize); ROWS];
            for (seen, visible) in seen.iter_mut().zip(&visible) {
                let low = visible.start.clamp(keys.keys.start, keys.keys.end) - start;
                let high = visible.end.clamp(keys.keys.start, keys.keys.end) - start;
                *seen = (low, high.max(low));
            }
            let seen = &seen[..ids.len()];
            if seen.iter().all(|(low, high)| low == high) {
                continue;
            }
            room.load_keys(s, forward, head, &keys);
            let d_table = (!sums.d_table.is_empty()).then_some(&mut sums.d_table[..]);
            let ranges = room.gradients(s, problem, forward, ids, &delta, &keys, seen, d_table);
            room.add_queries(s, &ranges, total);
            for j in 0..keys.keys.len() {
                let key = keys.row(j);
                let from = &room.d_keys[j * dw..j * dw + dim];
                sums.dk[key * dim..(key + 1) * dim].iter_mut().zip(from).for_each(|(to, x)| *to += x);
                let from = &room.d_values[j * vw..j * vw + value_dim];
                sums.dv[key * value_dim..(key + 1) * value_dim].iter_mut().zip(from).for_each(|(to, x)| *to += x);
            }
        }
        for (&id, from) in ids.iter().zip(total.chunks_exact(dw)) {
            let scale = problem.row_scale(id);
            store_row(dq, [id.batch, id.head, id.row], from[..dim].iter().map(|x| x * scale));
        }
    }
}

/// Gradients of attention whose rows see what tiles say, `tiles[batch * kv_heads + kv_head]` of them for each batch entry and KV head;
/// between them the tiles have every query row once. `d_table`, if any, gets those of the bias table of the tiles' grid. Returns
/// those of the sinks, by query head (zeros where there are none).
pub(crate) fn listed_backward(
    forward: Forward,
    gradients: &Gradients,
    d_table: Option<&mut [f32]>,
    tiles: &[usize],
    visit: &Visit,
    execution: &Execution,
) -> Result<Vec<f64>> {
    /// Items that make use of many threads.
    const ENOUGH: usize = 32;
    let job = Job::new(forward, gradients)?;
    let (problem, isa) = (&job.problem, simd::current());
    let pairs = problem.batch * problem.kv_heads;
    let slabs = ENOUGH.div_ceil(pairs.max(1)).min(tiles.iter().copied().max().unwrap_or(0)).max(1);
    let sizes = [problem.keys * problem.dim, problem.keys * problem.value_dim, d_table.as_ref().map_or(0, |x| x.len())];
    let parts: Vec<Mutex<Vec<Option<Sums>>>> =
        (0..pairs).map(|_| Mutex::new((0..slabs).map(|_| None).collect())).collect();
    let rest: Vec<Mutex<(Vec<f32>, Vec<f64>)>> = (0..pairs).map(|_| Mutex::default()).collect();
    for_each(execution, pairs * slabs, |i| {
        let (pair, slab) = (i / slabs, i % slabs);
        let head = [pair / problem.kv_heads, pair % problem.kv_heads];
        let [dk, dv, d_table] = sizes.map(|n| vec![0f32; n]);
        let mut sums = Sums { dk, dv, d_table, d_sinks: vec![0f64; problem.group] };
        for tile in tiles[pair] * slab / slabs..tiles[pair] * (slab + 1) / slabs {
            if execution.cancel.is_cancelled() {
                return;
            }
            visit(head, tile, &mut |tile| {
                with_scratch(|scratch| dispatch(isa, Pass { job: &job, head, tile, sums: &mut sums, scratch }));
            });
        }
        let mut slots = parts[pair].lock().unwrap_or_else(|e| e.into_inner());
        slots[slab] = Some(sums);
        // The last item to arrive adds them all up, in their order.
        if slots.iter().all(Option::is_some) {
            let mut every = std::mem::take(&mut *slots).into_iter().flatten();
            let mut total = every.next().expect("there is at least one item");
            for part in every {
                let pairs = [(&mut total.dk, part.dk), (&mut total.dv, part.dv), (&mut total.d_table, part.d_table)];
                for (to, from) in pairs {
                    to.iter_mut().zip(from).for_each(|(to, x)| *to += x);
                }
                total.d_sinks.iter_mut().zip(part.d_sinks).for_each(|(to, x)| *to += x);
            }
            let [batch, kv_head] = head;
            let (dim, value_dim) = (problem.dim, problem.value_dim);
            for key in 0..problem.keys {
                store_row(&job.dk, [batch, kv_head, key], total.dk[key * dim..(key + 1) * dim].iter().copied());
                let row = &total.dv[key * value_dim..(key + 1) * value_dim];
                store_row(&job.dv, [batch, kv_head, key], row.iter().copied());
            }
            *rest[pair].lock().unwrap_or_else(|e| e.into_inner()) = (total.d_table, total.d_sinks);
        }
    })?;
    let mut d_table = d_table;
    if let Some(d_table) = &mut d_table {
        d_table.fill(0.0);
    }
    let mut d_sinks = vec![0f64; problem.query_heads];
    for (pair, rest) in rest.into_iter().enumerate() {
        let (table, sinks) = rest.into_inner().unwrap_or_else(|e| e.into_inner());
        if let Some(d_table) = &mut d_table {
            d_table.iter_mut().zip(table).for_each(|(to, x)| *to += x);
        }
        let first = pair % problem.kv_heads * problem.group;
        d_sinks[first..].iter_mut().zip(sinks).for_each(|(to, x)| *to += x);
    }
    Ok(d_sinks)
}

/// Writes the gradients of sinks where they are asked for.
pub(crate) fn store_sinks(gradients: &mut Gradients, d_sinks: &[f64]) {
    if let Some(to) = &mut gradients.d_sinks {
        to.iter_mut().zip(d_sinks).for_each(|(to, &x)| *to = x as f32);
    }
}
