//! The other direction of `unfused.rs`, for its gradients: rows of queries go to the keys of their windows.

use super::tiles::Tiles;
use super::unfused::place;
use super::{head_ranges, row_ids};
use crate::dense::backward::load_row;
use crate::dense::grid::{Grid, Patch};
use crate::dense::micro::{multiply, panel};
use crate::dense::scores::RowId;
use crate::dense::scratch::{Scratch, with_scratch};
use crate::dense::tile::{KEYS, QUERY_ROWS};
use crate::dense::{Options, Problem};
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Element, Error, Result, TensorView, TensorViewMut, with_element};
use std::sync::Mutex;

/// Sums of an item: rows of keys `[keys, dim]`, and weights by the entry of the grid's biases that they are at.
struct Sums {
    rows: Vec<f32>,
    table: Vec<f32>,
}

/// Adds a tile's rows to the sums.
struct Spread<'a, 's> {
    weights: TensorView<'a>,
    rows: TensorView<'a>,
    ids: &'a [RowId],
    patch: &'a Patch<'a>,
    sizes: [usize; 3],
    sums: &'s mut Sums,
    scratch: &'s mut Scratch,
}

impl Kernel for Spread<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { weights, rows, ids, patch, sizes, sums, scratch } = self;
        let (panel, n, dim) = (panel::<S>(), ids.len(), rows.shape()[3]);
        let width = dim.next_multiple_of(panel);
        let packed = scratch.values.take(n * width);
        let wide = &mut scratch.extra.take(width)[..width];
        let across = scratch.scores.take((KEYS + S::ROWS) * n);
        let products = scratch.outputs.take((KEYS + S::ROWS) * width);
        let mut line = [0f32; KEYS];
        let mut finite = [true; QUERY_ROWS];
        for (r, id) in ids.iter().enumerate() {
            load_row(s, &rows, [id.batch, id.head, id.row], wide);
            finite[r] = wide.iter().all(|x| x.is_finite());
            for p in 0..width / panel {
                let to = &mut packed[(p * n + r) * panel..(p * n + r + 1) * panel];
                // A weight of 0 must not spread what is not finite: such rows are added by themselves below.
                if finite[r] {
                    to.copy_from_slice(&wide[p * panel..(p + 1) * panel]);
                } else {
                    to.fill(0.0);
                }
            }
        }
        let index = patch.index();
        for start in (0..index.len()).step_by(KEYS) {
            let keys = start..(start + KEYS).min(index.len());
            let padded = keys.len().next_multiple_of(S::ROWS);
            across[keys.len() * n..padded * n].fill(0.0);
            for (r, &id) in ids.iter().enumerate() {
                let line = &mut line[..keys.len()];
                line.fill(0.0);
                let mut runs = patch.runs(id.row, keys.clone());
                while let Some(run) = runs.next_run() {
                    let first = place(run.offset, sizes);
                    with_element!(weights.dtype(), W => {
                        let from = &weights.row::<W>(id.batch, id.head, id.row)[first..first + run.at.len()];
                        line[run.at.clone()].iter_mut().zip(from).for_each(|(to, w)| *to = w.to_f32());
                    });
                    if !finite[r] {
                        load_row(s, &rows, [id.batch, id.head, id.row], wide);
                        for j in run.at {
                            let key = index[start + j] as usize;
                            let to = &mut sums.rows[key * dim..(key + 1) * dim];
                            to.iter_mut().zip(&*wide).for_each(|(to, x)| *to += line[j] * x);
                        }
                    }
                }
                if !sums.table.is_empty() {
                    patch.add_to_table(id, line, keys.clone(), &mut sums.table);
                }
                for (j, &weight) in line.iter().enumerate() {
                    across[j * n + r] = weight;
                }
            }
            for p in 0..width / panel {
                for t in 0..padded / S::ROWS {
                    // SAFETY: the buffers hold `padded` rows of weights and products, and `n` rows of a panel.
                    unsafe {
                        let a = across.as_ptr().add(t * S::ROWS * n);
                        let b = packed.as_ptr().add(p * n * panel);
                        let c = products.as_mut_ptr().add(t * S::ROWS * width + p * panel);
                        multiply(s, n, a, n, b, c, width, false);
                    }
                }
            }
            for (j, &key) in index[keys].iter().enumerate() {
                let to = &mut sums.rows[key as usize * dim..(key as usize + 1) * dim];
                to.iter_mut().zip(&products[j * width..]).for_each(|(to, x)| *to += x);
            }
        }
    }
}

/// What [`neighbourhood_values`](super::neighbourhood_values) is turned round: key `j` of `out` `[batch, kv heads, keys, dim]` gets
/// `factor` times the sum of the `rows` `[batch, query heads, queries, dim]` whose window holds it, with their `weights`. `d_table`,
/// if any, gets the sums of the weights by the entry of the grid's biases that they are at.
pub fn neighbourhood_spread(
    weights: TensorView,
    rows: TensorView,
    grid: &Grid,
    sizes: [usize; 3],
    factor: f32,
    out: &mut TensorViewMut,
    d_table: Option<&mut [f32]>,
    execution: &Execution,
) -> Result<()> {
    /// Items that make use of many threads.
    const ENOUGH: usize = 32;
    let [batch, heads, queries, places] = weights.shape();
    if places != sizes.iter().product::<usize>() {
        return Err(Error::value("weights", format!("{places} places"), format!("{sizes:?}")));
    }
    if rows.shape()[..3] != [batch, heads, queries] {
        return Err(Error::value("rows", format!("shape {:?}", rows.shape()), format!("{heads} heads of {queries}")));
    }
    let out = &*out;
    // The results stand in for keys and values, whose numbers nobody looks at.
    let problem = Problem::new(rows, out.as_view().into(), out.as_view().into(), Options::default())?;
    super::unfused::check(&problem, grid, sizes)?;
    let entries = d_table.as_ref().map_or(0, |d| d.len());
    let expected = grid.bias.map_or(0, |bias| heads * bias.sizes.iter().product::<usize>());
    if d_table.is_some() && entries != expected {
        return Err(Error::value("d_bias", format!("{entries} numbers"), expected));
    }
    let (isa, dim, keys) = (simd::current(), problem.dim, problem.keys);
    let pairs = batch * problem.kv_heads;
    if pairs == 0 || queries == 0 {
        return Ok(());
    }
    let ranges = head_ranges(&problem, QUERY_ROWS);
    let (of_head, width) = (ranges.len() / problem.kv_heads, ranges.iter().map(|x| x.len()).max().unwrap_or(1));
    let tiles = Tiles::new(grid, width, QUERY_ROWS / width, 2 * dim);
    let count = of_head * tiles.len();
    let slabs = ENOUGH.div_ceil(pairs).min(count).max(1);
    let parts: Vec<Mutex<Vec<Option<Sums>>>> =
        (0..pairs).map(|_| Mutex::new((0..slabs).map(|_| None).collect())).collect();
    let tables: Vec<Mutex<Vec<f32>>> = (0..pairs).map(|_| Mutex::default()).collect();
    for_each(execution, pairs * slabs, |i| {
        let (pair, slab) = (i / slabs, i % slabs);
        let (batch, kv_head) = (pair / problem.kv_heads, pair % problem.kv_heads);
        let mut sums = Sums { rows: vec![0.0; keys * dim], table: vec![0.0; entries] };
        for tile in count * slab / slabs..count * (slab + 1) / slabs {
            if execution.cancel.is_cancelled() {
                return;
            }
            let (of_tile, patch) = tiles.rows(grid, tile % tiles.len());
            let ids = row_ids(&of_tile, batch, &ranges[kv_head * of_head + tile / tiles.len()]);
            with_scratch(|scratch| {
                let (ids, patch, sums) = (&ids[..], &patch, &mut sums);
                dispatch(isa, Spread { weights, rows, ids, patch, sizes, sums, scratch });
            });
        }
        let mut slots = parts[pair].lock().unwrap_or_else(|e| e.into_inner());
        slots[slab] = Some(sums);
        // The last item to arrive adds them all up, in their order.
        if slots.iter().all(Option::is_some) {
            let mut every = std::mem::take(&mut *slots).into_iter().flatten();
            let mut total = every.next().expect("there is at least one item");
            for part in every {
                for (to, from) in [(&mut total.rows, part.rows), (&mut total.table, part.table)] {
                    to.iter_mut().zip(from).for_each(|(to, x)| *to += x);
                }
            }
            for key in 0..keys {
                with_element!(out.dtype(), O => {
                    let to = out.row_ptr::<O>(batch, kv_head, key);
                    for (d, &x) in total.rows[key * dim..(key + 1) * dim].iter().enumerate() {
                        // SAFETY: the row has dim numbers, and no other worker holds it.
                        unsafe { to.add(d).write(O::from_f32(factor * x)) };
                    }
                });
            }
            *tables[pair].lock().unwrap_or_else(|e| e.into_inner()) = total.table;
        }
    })?;
    if let Some(d_table) = d_table {
        d_table.fill(0.0);
        for table in tables {
            let table = table.into_inner().unwrap_or_else(|e| e.into_inner());
            d_table.iter_mut().zip(table).for_each(|(to, x)| *to += x);
        }
    }
    Ok(())
}
