//! Keys and values of whole heads, packed once for all the items that pick blocks of them.

use super::Problem;
use super::micro::panel;
use super::packing::{PackKeys, PackValues};
use super::parts::{PackKeyParts, PackValueParts, Parts};
use super::rows::{Rows, Strided, numbers, with_rows};
use super::scratch::Buffer;
use super::tile::{KEYS, multiplies_pairs};
use crate::parallel::{Execution, for_each};
use crate::simd::{Isa, Kernel, Simd, dispatch};
use crate::tensor::{Result, TensorViewMut};
use half::bf16;
use std::ops::Range;
use std::sync::Mutex;

/// Floats that the packed heads of one pass may take, unless a single head needs more.
const ROOM: usize = 1 << 22;

/// Memory of packed heads, kept from one pass to the next.
#[derive(Default)]
pub(crate) struct PackedRoom {
    keys: Buffer,
    values: Buffer,
}

/// Runs `work` with memory for packed heads that stays for the next call, on whatever thread, unless single heads are larger than
/// what several may take: new pages cost more than packing does.
pub(crate) fn with_room<R>(work: impl FnOnce(&mut PackedRoom) -> R) -> R {
    static KEPT: Mutex<Option<PackedRoom>> = Mutex::new(None);
    let kept = || KEPT.lock().unwrap_or_else(|e| e.into_inner());
    let mut room = kept().take().unwrap_or_default();
    let done = work(&mut room);
    if room.keys.filled().len() + room.values.filled().len() <= ROOM {
        *kept() = Some(room);
    }
    done
}

/// How a head is packed on an instruction set.
#[derive(Clone, Copy)]
pub(crate) struct Packing {
    /// Keys of a panel.
    pub(crate) panel: usize,
    parts: Option<Parts>,
    /// Floats that a key takes.
    key_width: usize,
    /// Floats that a value takes in a panel of columns.
    value_width: usize,
    /// Panels of columns.
    columns: usize,
    /// Keys of a head, up to whole panels.
    padded_keys: usize,
}

struct Layout<'a>(&'a Problem<'a>);

impl Kernel for Layout<'_> {
    type Output = Packing;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Packing {
        let problem = self.0;
        let dim = if multiplies_pairs::<S>(problem) { problem.dim / 2 } else { problem.dim };
        let (panel, parts) = (panel::<S>(), Parts::of::<S>(problem, false));
        Packing {
            panel,
            parts,
            key_width: parts.map_or(dim.next_multiple_of(S::LANES), |parts| parts.key_width(problem.dim)),
            value_width: parts.map_or(panel, |parts| parts.value_width()),
            columns: problem.value_dim.div_ceil(panel),
            padded_keys: problem.keys.next_multiple_of(panel),
        }
    }
}

impl Packing {
    /// Of the problem, on an instruction set.
    pub(crate) fn new(isa: Isa, problem: &Problem) -> Self {
        dispatch(isa, Layout(problem))
    }

    /// KV heads that are packed at a time.
    pub(crate) fn heads_together(&self) -> usize {
        (ROOM / (self.padded_keys * (self.key_width + self.columns * self.value_width)).max(1)).max(1)
    }
}

/// Packed KV heads, counted over batches, that follow one another.
pub(crate) struct PackedHeads<'a> {
    packing: Packing,
    first: usize,
    /// `[head, panel of keys, width, panel]`.
    keys: &'a [f32],
    /// `[head, panel of columns, padded keys, panel]`.
    values: &'a [f32],
}

impl<'a> PackedHeads<'a> {
    /// Packs the KV heads `heads`.
    pub(crate) fn new(
        isa: Isa,
        problem: &Problem,
        packing: Packing,
        heads: Range<usize>,
        room: &'a mut PackedRoom,
        execution: &Execution,
    ) -> Result<Self> {
        let Packing { panel, key_width, value_width, columns, padded_keys, .. } = packing;
        let count = heads.len();
        let keys = room.keys.take(count * padded_keys * key_width);
        let values = room.values.take(count * columns * padded_keys * value_width);
        let to_keys = TensorViewMut::new(keys, [1, count, padded_keys / panel, key_width * panel])?;
        let to_values = TensorViewMut::new(values, [1, count * columns, padded_keys, value_width])?;
        let pieces = problem.keys.div_ceil(KEYS);
        for_each(execution, count * pieces, |i| {
            let (head, start) = (i / pieces, i % pieces * KEYS);
            let rows = start..(start + KEYS).min(problem.keys);
            let global = heads.start + head;
            let (batch, kv_head) = (global / problem.kv_heads, global % problem.kv_heads);
            let to_keys = to_keys.row_ptr::<f32>(0, head, start / panel);
            let to_values = if columns == 0 { to_keys } else { to_values.row_ptr::<f32>(0, head * columns, start) };
            dispatch(isa, PackPiece { problem, packing, batch, kv_head, rows, to_keys, to_values });
        })?;
        Ok(Self { packing, first: heads.start, keys: room.keys.filled(), values: room.values.filled() })
    }

    /// A packed panel of keys.
    #[inline(always)]
    pub(crate) fn keys(&self, problem: &Problem, batch: usize, kv_head: usize, panel: u32) -> &[f32] {
        let Packing { panel: keys, key_width, padded_keys, .. } = self.packing;
        let head = batch * problem.kv_heads + kv_head - self.first;
        &self.keys[(head * padded_keys + panel as usize * keys) * key_width..][..keys * key_width]
    }

    /// The packed values of all keys in a panel of columns.
    #[inline(always)]
    pub(crate) fn values(&self, problem: &Problem, batch: usize, kv_head: usize, column: usize) -> &[f32] {
        let Packing { value_width, columns, padded_keys, .. } = self.packing;
        let head = batch * problem.kv_heads + kv_head - self.first;
        &self.values[(head * columns + column) * padded_keys * value_width..][..padded_keys * value_width]
    }
}

/// Packs up to [`KEYS`] keys of a head.
struct PackPiece<'a> {
    problem: &'a Problem<'a>,
    packing: Packing,
    batch: usize,
    kv_head: usize,
    rows: Range<usize>,
    to_keys: *mut f32,
    to_values: *mut f32,
}

impl PackPiece<'_> {
    #[inline(always)]
    fn pack<S: Simd, K: Rows, V: Rows>(self, s: S, k: K, v: V, dim: usize) {
        let Self { problem, packing, rows, to_keys, to_values, .. } = self;
        let Packing { panel, key_width, columns, padded_keys, .. } = packing;
        let padded_dim = columns * panel;
        let mut wide = vec![0f32; (panel * key_width).max(padded_dim)];
        let wide = wide.as_mut_ptr();
        s.call(PackKeys { k, keys: rows.clone(), dim, padded_dim: key_width, wide, to: to_keys });
        let dim = problem.value_dim;
        s.call(PackValues { v, keys: rows, dim, padded_dim, wide, between: padded_keys, to: to_values });
    }

    #[inline(always)]
    fn pack_parts<S: Simd, K: Rows, V: Rows>(self, s: S, parts: Parts, k: K, v: V) {
        let Self { problem, packing, rows, to_keys, to_values, .. } = self;
        let mut wide = vec![0f32; parts.room(problem.dim)];
        let wide = wide.as_mut_ptr();
        s.call_pairs(PackKeyParts { parts, k, keys: rows.clone(), dim: problem.dim, wide, to: to_keys });
        let between = packing.padded_keys * packing.value_width;
        s.call_pairs(PackValueParts { parts, v, keys: rows, dim: problem.value_dim, between, to: to_values });
    }
}

impl Kernel for PackPiece<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (problem, batch, kv_head) = (self.problem, self.batch, self.kv_head);
        if let Some(parts) = self.packing.parts {
            with_rows!(problem, batch, kv_head, |k, v| self.pack_parts(s, parts, k, v));
        } else if multiplies_pairs::<S>(problem) {
            let k = numbers::<bf16>(&problem.k, batch, kv_head);
            let k = Strided { base: k.base.cast::<f32>(), stride: k.stride / 2 };
            self.pack(s, k, numbers::<bf16>(&problem.v, batch, kv_head), problem.dim / 2);
        } else {
            with_rows!(problem, batch, kv_head, |k, v| self.pack(s, k, v, problem.dim));
        }
    }
}
