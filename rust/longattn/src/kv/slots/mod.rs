//! The rows of one sequence that are worth keeping, in a fixed number of slots per KV head.
//!
//! Every row that is appended has a position, counted from 0. A head keeps a row in a *slot*, the lowest free one; rows never move
//! while they live, and heads differ in what they keep. Rows that go may be folded into their head's mean row, which stands in for
//! them in attention.

mod attend;
#[cfg(test)]
mod tests;

use super::rows::{RowFormat, Rows, check_pair};
use crate::parallel::{Execution, map};
use crate::tensor::{DType, Element, Error, Result, TensorView, TensorViewMut, with_element};
pub use attend::Observe;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Keys and values of the kept rows of one sequence; see the module.
///
/// Every method takes `&self`: those that read go together, those that change the store take turns.
pub struct SlotStore {
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    slots: usize,
    dtype: DType,
    state: RwLock<State>,
}

struct State {
    /// Rows appended so far.
    appended: usize,
    heads: Vec<Head>,
}

/// What one KV head keeps.
struct Head {
    keys: Rows,
    values: Rows,
    /// Slots in use, ascending.
    live: Vec<u32>,
    /// Position of the row in each slot ever used, -1 where it is free.
    positions: Vec<i64>,
    /// Free ones among those.
    free: BinaryHeap<Reverse<u32>>,
    mean: Mean,
}

/// Running means of the rows that were folded.
#[derive(Clone)]
struct Mean {
    key: Vec<f64>,
    value: Vec<f64>,
    count: u64,
}

impl Mean {
    /// Takes one row more.
    fn take<T: Element>(&mut self, key: &[T], value: &[T]) {
        self.count += 1;
        let share = 1.0 / self.count as f64;
        for (means, row) in [(&mut self.key, key), (&mut self.value, value)] {
            means.iter_mut().zip(row).for_each(|(mean, x)| *mean += (f64::from(x.to_f32()) - *mean) * share);
        }
    }
}

impl Head {
    fn views(&self) -> [TensorView<'_>; 2] {
        [&self.keys, &self.values].map(|rows| {
            // SAFETY: slots in `positions` are written, and the state's lock keeps writers away while this borrow lasts.
            let view = unsafe { rows.view(self.positions.len(), None) };
            view.numbers().expect("slots hold numbers")
        })
    }

    /// The slots that the next `count` rows take.
    fn next_slots(&self, count: usize) -> Vec<u32> {
        let used = self.positions.len() as u32;
        if count == 1 {
            return vec![self.free.peek().map_or(used, |&Reverse(slot)| slot)];
        }
        let mut free = self.free.clone();
        let mut fresh = used..;
        (0..count).filter_map(|_| free.pop().map_or_else(|| fresh.next(), |Reverse(slot)| Some(slot))).collect()
    }

    fn row_bytes(&self) -> usize {
        let bytes = |rows: &Rows| rows.format().row_bytes().expect("checked when the store was made");
        bytes(&self.keys) + bytes(&self.values)
    }
}

/// As many zeros, if there is memory for them.
fn zeros(n: usize) -> Result<Vec<f64>> {
    let mut zeros = Vec::new();
    let refused = Error::Memory { bytes: n.saturating_mul(size_of::<f64>()), what: "the mean row of a slot store" };
    zeros.try_reserve_exact(n).map_err(|_| refused)?;
    zeros.resize(n, 0.0);
    Ok(zeros)
}

impl SlotStore {
    /// An empty store with `slots` slots per KV head. Reserves address space, commits no memory.
    pub fn new(kv_heads: usize, head_dim: usize, value_dim: usize, dtype: DType, slots: usize) -> Result<Self> {
        let sizes = [("kv_heads", kv_heads), ("head_dim", head_dim), ("value_dim", value_dim), ("slots", slots)];
        for (argument, n) in sizes {
            if n == 0 {
                return Err(Error::value(argument, n, "at least 1"));
            }
        }
        if slots > u32::MAX as usize {
            return Err(Error::value("slots", slots, "fewer than 2^32"));
        }
        let numbers = |dim| RowFormat::Numbers { dtype, dim };
        let mut heads = Vec::new();
        let what = "the heads of a slot store";
        let bytes = kv_heads.saturating_mul(size_of::<Head>());
        heads.try_reserve_exact(kv_heads).map_err(|_| Error::Memory { bytes, what })?;
        for _ in 0..kv_heads {
            heads.push(Head {
                keys: Rows::new(1, slots, numbers(head_dim), "the keys of a slot store")?,
                values: Rows::new(1, slots, numbers(value_dim), "the values of a slot store")?,
                live: Vec::new(),
                positions: Vec::new(),
                free: BinaryHeap::new(),
                mean: Mean { key: zeros(head_dim)?, value: zeros(value_dim)?, count: 0 },
            });
        }
        let state = RwLock::new(State { appended: 0, heads });
        Ok(Self { kv_heads, head_dim, value_dim, slots, dtype, state })
    }

    /// Heads of keys and values.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Width of a key.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Width of a value.
    pub fn value_dim(&self) -> usize {
        self.value_dim
    }

    /// Slots of each KV head.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// In what form rows are kept.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Rows appended so far, kept or not.
    pub fn appended(&self) -> usize {
        self.read().appended
    }

    /// Rows that each KV head keeps.
    pub fn live(&self) -> Vec<usize> {
        self.read().heads.iter().map(|head| head.live.len()).collect()
    }

    /// Rows that each KV head folded into its mean.
    pub fn folded(&self) -> Vec<u64> {
        self.read().heads.iter().map(|head| head.mean.count).collect()
    }

    /// Committed bytes: per head, keys and values each in steps of 2 MiB (all slots if they take less), of the slots ever used.
    pub fn nbytes(&self) -> usize {
        self.read().heads.iter().map(|head| head.keys.nbytes() + head.values.nbytes()).sum()
    }

    /// Bytes of the rows that are kept, and of the means.
    pub fn live_bytes(&self) -> usize {
        let of_head = |head: &Head| {
            let mean = if head.mean.count > 0 { (head.mean.key.len() + head.mean.value.len() + 1) * 8 } else { 0 };
            head.live.len() * head.row_bytes() + mean
        };
        self.read().heads.iter().map(of_head).sum()
    }

    /// Position of the row in each slot, `[kv_heads, slots]`, -1 where there is none.
    pub fn positions(&self, to: &mut [i64]) -> Result<()> {
        self.check_slots("positions", to.len())?;
        let state = self.read();
        for (to, head) in to.chunks_exact_mut(self.slots).zip(&state.heads) {
            to[..head.positions.len()].copy_from_slice(&head.positions);
            to[head.positions.len()..].fill(-1);
        }
        Ok(())
    }

    /// Copies the rows that a head keeps, oldest first: `k` `[1, 1, live, head_dim]`, `v` `[1, 1, live, value_dim]` in the store's
    /// dtype; returns their positions.
    pub fn copy_rows(&self, head: usize, k: &mut TensorViewMut, v: &mut TensorViewMut) -> Result<Vec<i64>> {
        let state = self.read();
        let Some(head) = state.heads.get(head) else {
            return Err(Error::value("head", head, format!("a head below {}", self.kv_heads)));
        };
        let mut rows: Vec<(i64, u32)> = head.live.iter().map(|&slot| (head.positions[slot as usize], slot)).collect();
        rows.sort_unstable();
        for (name, view, dim) in [("k", &*k, self.head_dim), ("v", &*v, self.value_dim)] {
            let expected = [1, 1, rows.len(), dim];
            if view.shape() != expected || view.dtype() != self.dtype {
                let got = format!("{} {:?}", view.dtype(), view.shape());
                return Err(Error::value(name, got, format!("{} {expected:?}", self.dtype)));
            }
        }
        let views = head.views();
        with_element!(self.dtype, T => {
            for (view, to) in views.iter().zip([&*k, &*v]) {
                for (row, &(_, slot)) in rows.iter().enumerate() {
                    let from = view.row::<T>(0, 0, slot as usize);
                    // SAFETY: the row of `to` has as many elements, and `to` is the caller's alone.
                    unsafe { to.row_ptr::<T>(0, 0, row).copy_from_nonoverlapping(from.as_ptr(), from.len()) };
                }
            }
        });
        Ok(rows.into_iter().map(|(position, _)| position).collect())
    }

    /// Copies a head's mean rows and returns how many rows they are the means of.
    pub fn copy_mean(&self, head: usize, key: &mut [f64], value: &mut [f64]) -> Result<u64> {
        let state = self.read();
        let Some(head) = state.heads.get(head) else {
            return Err(Error::value("head", head, format!("a head below {}", self.kv_heads)));
        };
        for (name, to, from) in [("key", key, &head.mean.key), ("value", value, &head.mean.value)] {
            if to.len() != from.len() {
                return Err(Error::value(name, format!("{} numbers", to.len()), from.len()));
            }
            to.copy_from_slice(from);
        }
        Ok(head.mean.count)
    }

    /// Appends rows `k`, `[1, kv_heads, T, head_dim]`, and `v`, `[1, kv_heads, T, value_dim]`, converted to the store's dtype.
    ///
    /// With `keep`, `[kv_heads, T]`, a head keeps only rows where it is non-zero; the others count as appended, and are folded into
    /// the head's mean with `fold`. Returns the slots that rows went to, `[kv_heads, T]`, -1 for those not kept. On an error nothing
    /// changes.
    pub fn append(&self, k: &TensorView, v: &TensorView, keep: Option<&[u8]>, fold: bool) -> Result<Vec<i64>> {
        let count = check_pair(k, v, self.kv_heads, [self.head_dim, self.value_dim])?;
        if let Some(keep) = keep.filter(|keep| keep.len() != self.kv_heads * count) {
            return Err(Error::value("keep", format!("{} flags", keep.len()), format!("{} x {count}", self.kv_heads)));
        }
        let kept = |head: usize| -> Vec<usize> {
            (0..count).filter(|row| keep.is_none_or(|keep| keep[head * count + row] != 0)).collect()
        };
        let mut state = self.write();
        let mut taken = Vec::with_capacity(self.kv_heads);
        for (h, head) in state.heads.iter().enumerate() {
            let rows = kept(h);
            let left = self.slots - head.live.len();
            if rows.len() > left {
                let got = format!("{} rows for head {h}", rows.len());
                return Err(Error::value("k", got, format!("no more than its {left} free slots of {}", self.slots)));
            }
            let slots = head.next_slots(rows.len());
            let used = slots.iter().map(|&slot| slot as usize + 1).max().unwrap_or(0).max(head.positions.len());
            head.keys.commit(used)?;
            head.values.commit(used)?;
            taken.push((rows, slots));
        }
        // Nothing fails from here on.
        let heads = &state.heads;
        let work = |h: usize| {
            let (head, (rows, slots)) = (&heads[h], &taken[h]);
            let (k, v) = (k.heads(h..h + 1), v.heads(h..h + 1));
            let mut i = 0;
            while i < rows.len() {
                let run = (1..rows.len() - i)
                    .find(|&n| rows[i + n] != rows[i] + n || slots[i + n] as usize != slots[i] as usize + n)
                    .unwrap_or(rows.len() - i);
                let (from, at) = (rows[i]..rows[i] + run, slots[i] as usize);
                // SAFETY: free slots, committed, which nobody reads; the lock keeps other writers away; no view of the store's
                // memory is ever handed out, so the sources are elsewhere.
                unsafe {
                    head.keys.write(at, &k.rows(from.clone()), None)?;
                    head.values.write(at, &v.rows(from), None)?;
                }
                i += run;
            }
            let mut mean = None;
            if fold && rows.len() < count {
                let mean = mean.insert(head.mean.clone());
                let mut kept = rows.iter().peekable();
                for row in 0..count {
                    if kept.next_if_eq(&&row).is_none() {
                        fold_row(mean, &k, &v, row, self.dtype);
                    }
                }
            }
            Ok(mean)
        };
        const PARALLEL_ROWS: usize = 1024;
        let means: Result<Vec<Option<Mean>>> = if count * self.kv_heads < PARALLEL_ROWS {
            (0..self.kv_heads).map(work).collect()
        } else {
            map(&Execution::default(), self.kv_heads, work)?.into_iter().collect()
        };
        let first = state.appended;
        let mut slots_of = vec![-1; self.kv_heads * count];
        for (h, ((rows, slots), mean)) in taken.into_iter().zip(means?).enumerate() {
            let head = &mut state.heads[h];
            for (&row, &slot) in rows.iter().zip(&slots) {
                slots_of[h * count + row] = i64::from(slot);
                let (at, position) = (slot as usize, (first + row) as i64);
                if at == head.positions.len() {
                    head.positions.push(position);
                } else {
                    head.positions[at] = position;
                    head.free.pop();
                }
            }
            if rows.len() == 1 {
                let at = head.live.partition_point(|&slot| slot < slots[0]);
                head.live.insert(at, slots[0]);
            } else {
                head.live.extend(slots);
                head.live.sort_unstable();
            }
            if let Some(mean) = mean {
                head.mean = mean;
            }
        }
        state.appended = first + count;
        Ok(slots_of)
    }

    /// Frees the slots where `mask`, `[kv_heads, slots]`, is non-zero; with `fold` their rows enter their head's mean first. Returns
    /// how many each head freed. A slot without a row is an error, and then nothing changes.
    pub fn evict(&self, mask: &[u8], fold: bool) -> Result<Vec<usize>> {
        self.check_slots("mask", mask.len())?;
        let mut state = self.write();
        for (h, (mask, head)) in mask.chunks_exact(self.slots).zip(&state.heads).enumerate() {
            let empty = |&slot: &usize| mask[slot] != 0 && head.positions.get(slot).is_none_or(|&p| p < 0);
            if let Some(slot) = (0..self.slots).find(empty) {
                return Err(Error::value("mask", format!("slot {slot} of head {h}, which is free"), "slots with rows"));
            }
        }
        let mut freed = Vec::with_capacity(self.kv_heads);
        for (mask, head) in mask.chunks_exact(self.slots).zip(&mut state.heads) {
            let gone: Vec<u32> = head.live.iter().copied().filter(|&slot| mask[slot as usize] != 0).collect();
            if fold && !gone.is_empty() {
                let mut mean = head.mean.clone();
                let [k, v] = head.views();
                gone.iter().for_each(|&slot| fold_row(&mut mean, &k, &v, slot as usize, self.dtype));
                head.mean = mean;
            }
            head.live.retain(|&slot| mask[slot as usize] == 0);
            for &slot in &gone {
                head.positions[slot as usize] = -1;
                head.free.push(Reverse(slot));
            }
            freed.push(gone.len());
        }
        Ok(freed)
    }

    /// Forgets everything: rows, means and positions. Memory well above nothing goes back to the system.
    pub fn clear(&self) {
        let mut state = self.write();
        state.appended = 0;
        for head in &mut state.heads {
            head.live.clear();
            head.positions.clear();
            head.free.clear();
            head.mean.key.fill(0.0);
            head.mean.value.fill(0.0);
            head.mean.count = 0;
            head.keys.decommit(0);
            head.values.decommit(0);
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        // Nothing under the lock is left half done by a panic.
        self.state.read().unwrap_or_else(|e| e.into_inner())
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(|e| e.into_inner())
    }

    fn check_slots(&self, name: &'static str, got: usize) -> Result<()> {
        if got == self.kv_heads * self.slots {
            return Ok(());
        }
        Err(Error::value(name, format!("{got} entries"), format!("{} x {}", self.kv_heads, self.slots)))
    }
}

/// Folds row `row` of a head's keys and values, as they are stored in `dtype`.
fn fold_row(mean: &mut Mean, k: &TensorView, v: &TensorView, row: usize, dtype: DType) {
    if k.dtype() == dtype && v.dtype() == dtype {
        with_element!(dtype, T => mean.take(k.row::<T>(0, 0, row), v.row::<T>(0, 0, row)));
        return;
    }
    // Rows that would have been rounded by storing them are folded as if they had been.
    let rounded = |view: &TensorView| -> Vec<f32> {
        with_element!(view.dtype(), S => with_element!(dtype, T => {
            view.row::<S>(0, 0, row).iter().map(|x| T::from_f32(x.to_f32()).to_f32()).collect()
        }))
    };
    mean.take(&rounded(k), &rounded(v));
}
