//! Attention over all keys at once from three sums: `S = sum phi(k_j) v_j^T`, `z = sum phi(k_j)`, `u = sum v_j`.
//!
//! ```text
//! accumulate, for each piece of the keys of a head (an item):
//!     for each block of rows:
//!         phi(k) into rows, z; v into panels, u
//!         S += phi(k)^T v                        the attention tiles' micro-kernel
//! then the pieces of a head are added up in their order
//! read, for each stretch of query rows of a head (an item):
//!     S into panels; for each block of rows:
//!         phi(q), t = phi(q) z;  o = a phi(q) S + b u / n, with a and b of t as the read-out says
//! ```
//! Pieces depend on the shape alone, so results do not depend on the number of threads.

use super::features::{FeatureMap, Map, Mapper};
use super::rows::{dot, exponential, largest, multiply_row};
use crate::dense::backward::load_row;
use crate::dense::micro::{multiply_strided, panel};
use crate::dense::packing::pack_values;
use crate::dense::rows::Strided;
use crate::dense::tile::KEYS;
use crate::kv::convert::narrow;
use crate::parallel::{Execution, for_each, map};
use crate::simd::{self, Kernel, MAX_ROWS, Simd, dispatch};
use crate::tensor::{Element, Error, Result, TensorView, TensorViewMut, with_element};
use std::ops::Range;

/// Keys of one item, at least: fewer where there are few heads.
const PIECES: [usize; 2] = [1024, 4096];

/// Query rows of one item, and of one product.
const STRETCH: usize = 1024;
const QUERIES: usize = 96;

const _: () = assert!(QUERIES.is_multiple_of(MAX_ROWS) && QUERIES.is_multiple_of(4));

/// Sums over the keys of every head, contiguous. Of maps with exponentials less a maximum, up to a factor per head; of
/// [`Map::PositionSoftmax`], with softmax weights, so that all of `z` is 1.
#[derive(Clone, Debug, Default)]
pub struct Statistics {
    /// `S`, `[batch, heads, features, value_dim]`.
    pub sums: Vec<f32>,
    /// `z`, `[batch, heads, features]`.
    pub totals: Vec<f32>,
    /// `u`, `[batch, heads, value_dim]`.
    pub values: Vec<f32>,
    /// Keys that counted, `[batch]`.
    pub counts: Vec<f32>,
}

/// What becomes of `p = phi(q) S` and `t = phi(q) z`, `n` keys having been counted. A row with no key, or with a denominator
/// of 0, gives zeros.
#[derive(Clone, Copy, Debug)]
pub enum ReadOut<'a> {
    /// `factor * p`, of the mean over the keys with `means`.
    Plain {
        /// The factor.
        factor: f32,
        /// Means in place of sums.
        means: bool,
    },
    /// `p / (t + eps)`; with `means` sums are means over the keys, `(p / n) / (t / n + eps)`.
    Divide {
        /// Added to the denominator.
        eps: f32,
        /// Means in place of sums.
        means: bool,
    },
    /// `factors[head] * p / max(t, least)`.
    Clamp {
        /// The least denominator.
        least: f32,
        /// One per query head.
        factors: &'a [f32],
    },
    /// `scale * p / n + (1 - scale * t / n) u / n`.
    Subtract {
        /// Factor of the products.
        scale: f32,
    },
    /// `(1 + 1 / (m + eps)) scale * p / n - m u / n`, `m = scale * t / n`.
    Magnitude {
        /// Factor of the products.
        scale: f32,
        /// Added to `m` in the denominator.
        eps: f32,
    },
}

impl ReadOut<'_> {
    /// Factors of `p` and of `u`.
    #[inline(always)]
    pub(super) fn factors(&self, t: f32, n: f32, head: usize) -> (f32, f32) {
        // Below the normal range a quotient would be infinite, or noise.
        let over = |x: f32, d: f32| if d.abs() < f32::MIN_POSITIVE { 0.0 } else { x / d };
        if n == 0.0 {
            return (0.0, 0.0);
        }
        match *self {
            Self::Plain { factor, means } => (if means { factor / n } else { factor }, 0.0),
            Self::Divide { eps, means: false } => (over(1.0, t + eps), 0.0),
            Self::Divide { eps, means: true } => (over(1.0 / n, t / n + eps), 0.0),
            Self::Clamp { least, factors } => (over(factors[head], t.max(least)), 0.0),
            Self::Subtract { scale } => (scale / n, (1.0 - scale * t / n) / n),
            Self::Magnitude { scale, eps } => {
                let m = scale * t / n;
                ((1.0 + over(1.0, m + eps)) * scale / n, -m / n)
            }
        }
    }
}

/// Rows of a block: as many as keep its features in the cache, a multiple of every panel and vector.
fn block_rows(width: usize) -> usize {
    (65536 / width / 64 * 64).clamp(64, KEYS)
}

/// What a piece of a head's keys adds up to.
struct Part {
    /// `[features, padded value_dim]`, and more rows than features.
    sums: Vec<f32>,
    totals: Vec<f32>,
    values: Vec<f32>,
    /// What exponents are taken less of: one per feature, or the first for all.
    largest: Vec<f32>,
    width: usize,
}

impl Part {
    /// Multiplies feature `f`'s sums.
    #[inline(always)]
    fn scale<S: Simd>(&mut self, s: S, f: usize, factor: f32) {
        if factor != 1.0 {
            multiply_row(s, &mut self.sums[f * self.width..(f + 1) * self.width], factor);
            self.totals[f] *= factor;
        }
    }
}

/// `e^(old - new)`, 0 where there was nothing yet.
#[inline(always)]
fn decay(old: f32, new: f32) -> f32 {
    if old == new || new == f32::NEG_INFINITY { 1.0 } else { (old - new).exp() }
}

struct Piece<'a> {
    k: TensorView<'a>,
    v: TensorView<'a>,
    map: &'a FeatureMap<'a>,
    /// The batch entry's keys that count.
    keep: Option<&'a [bool]>,
    batch: usize,
    head: usize,
    rows: Range<usize>,
}

impl Kernel for Piece<'_> {
    type Output = Part;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Part {
        let Self { k, v, map, keep, batch, head, rows } = self;
        let value_dim = v.shape()[3];
        let vw = value_dim.next_multiple_of(panel::<S>());
        let mut mapper = Mapper::new(s, map, k, batch, head);
        let (features, width) = (mapper.features, mapper.width);
        let block = block_rows(width);
        let padded = width.next_multiple_of(S::ROWS);
        let mut part = Part {
            sums: vec![0.0; padded * vw],
            totals: vec![0.0; width],
            values: vec![0.0; vw],
            largest: vec![f32::NEG_INFINITY; width],
            width: vw,
        };
        let mut phi = vec![0f32; block * width];
        let mut across = vec![0f32; padded * block];
        let mut wide = vec![0f32; block * vw];
        let mut last = vec![0f32; vw];
        let mut panels = vec![0f32; KEYS * vw];
        for first in rows.clone().step_by(block) {
            let n = block.min(rows.end - first);
            let skipped = |r: usize| keep.is_some_and(|keep| !keep[first + r]);
            mapper.apply(s, first..first + n, &mut phi);
            match map.map {
                Map::PositionSoftmax => {
                    let before = part.largest.clone();
                    for (r, row) in phi.chunks_exact(width).take(n).enumerate() {
                        if !skipped(r) {
                            take_larger(s, row, &mut part.largest);
                        }
                    }
                    for (f, &old) in before.iter().enumerate().take(features) {
                        let new = part.largest[f];
                        part.scale(s, f, decay(old, new));
                    }
                    exponentials_by_channel(s, &mut phi[..n * width], &part.largest, features);
                }
                Map::Gaussian => {
                    let mut most = part.largest[0];
                    for (r, row) in phi.chunks_exact_mut(width).take(n).enumerate() {
                        if !skipped(r) {
                            row[features..].fill(f32::NEG_INFINITY);
                            most = most.max(largest(s, row));
                        }
                    }
                    let factor = decay(part.largest[0], most);
                    for f in 0..features {
                        part.scale(s, f, factor);
                    }
                    part.largest[0] = most;
                    for row in phi.chunks_exact_mut(width).take(n) {
                        exponential(s, row, most);
                        row[features..].fill(0.0);
                    }
                }
                _ => {}
            }
            for (r, row) in phi.chunks_exact_mut(width).take(n).enumerate() {
                if skipped(r) {
                    row.fill(0.0);
                }
            }
            add_rows(s, &phi[..n * width], &mut part.totals);
            for (r, row) in phi.chunks_exact_mut(width).take(n).enumerate() {
                mapper.rotate(first + r, &mut row[..features]);
            }
            let rounded = n.next_multiple_of(S::LANES);
            phi[n * width..rounded * width].fill(0.0);
            for f in (0..width).step_by(S::LANES) {
                for r in (0..rounded).step_by(S::LANES) {
                    // SAFETY: blocks of whole vectors inside [block, width] and [padded, block]: block, width and `rounded` are
                    // multiples of LANES, and width <= padded.
                    unsafe {
                        let from = phi.as_ptr().add(r * width + f);
                        s.transpose(from, width, across.as_mut_ptr().add(f * block + r), block);
                    }
                }
            }
            for (r, row) in wide.chunks_exact_mut(vw).take(n).enumerate() {
                if skipped(r) {
                    row.fill(0.0);
                } else {
                    load_row(s, &v, [batch, head, first + r], row);
                }
            }
            add_rows(s, &wide[..n * vw], &mut part.values);
            let strided = Strided { base: wide.as_ptr(), stride: vw as isize };
            // SAFETY: `wide` has n <= KEYS rows of `vw` floats, `panels` that many panels of KEYS rows, `last` a row.
            unsafe { pack_values(s, strided, 0..n, value_dim, vw, last.as_mut_ptr(), KEYS, panels.as_mut_ptr()) };
            for p in 0..vw / panel::<S>() {
                for f in (0..features).step_by(S::ROWS) {
                    // SAFETY: ROWS rows from f on exist in `across` and `sums`, whose rows are `padded`; n <= block columns.
                    unsafe {
                        let a = across.as_ptr().add(f * block);
                        let b = panels.as_ptr().add(p * KEYS * panel::<S>());
                        let c = part.sums.as_mut_ptr().add(f * vw + p * panel::<S>());
                        multiply_strided(s, n, a, block, b, panel::<S>(), c, vw, features - f, true);
                    }
                }
            }
        }
        part
    }
}

/// Adds rows to `to`, which is as wide as they are.
#[inline(always)]
fn add_rows<S: Simd>(s: S, rows: &[f32], to: &mut [f32]) {
    let width = to.len();
    for d in (0..width).step_by(S::LANES) {
        let mut sum = s.zero();
        for row in rows.chunks_exact(width) {
            // SAFETY: width is a multiple of LANES.
            sum = s.add(sum, unsafe { s.load(row.as_ptr().add(d)) });
        }
        // SAFETY: as above.
        unsafe { s.store(to.as_mut_ptr().add(d), s.add(sum, s.load(to.as_ptr().add(d)))) };
    }
}

/// `to = max(row, to)`, both of one length, a multiple of `LANES`.
#[inline(always)]
fn take_larger<S: Simd>(s: S, row: &[f32], to: &mut [f32]) {
    for (row, to) in row.chunks_exact(S::LANES).zip(to.chunks_exact_mut(S::LANES)) {
        // SAFETY: both chunks have LANES floats.
        unsafe { s.store(to.as_mut_ptr(), s.max(s.load(row.as_ptr()), s.load(to.as_ptr()))) };
    }
}

/// `e^(x - most)` of rows, each feature less its own maximum.
#[inline(always)]
fn exponentials_by_channel<S: Simd>(s: S, rows: &mut [f32], most: &[f32], features: usize) {
    let width = most.len();
    for row in rows.chunks_exact_mut(width) {
        for d in (0..width).step_by(S::LANES) {
            // SAFETY: width is a multiple of LANES.
            unsafe {
                let x = s.sub(s.load(row.as_ptr().add(d)), s.load(most.as_ptr().add(d)));
                s.store(row.as_mut_ptr().add(d), s.exp(x));
            }
        }
        row[features..].fill(0.0);
    }
}

/// Adds up the parts of one head.
struct Combine {
    parts: Vec<Part>,
    map: Map,
    features: usize,
}

impl Kernel for Combine {
    type Output = Part;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Part {
        let Self { parts, map, features } = self;
        let mut parts = parts.into_iter();
        let mut whole = parts.next().expect("a head has at least one piece");
        for mut part in parts {
            if matches!(map, Map::PositionSoftmax | Map::Gaussian) {
                for f in 0..features {
                    let at = if map == Map::Gaussian { 0 } else { f };
                    let most = whole.largest[at].max(part.largest[at]);
                    whole.scale(s, f, decay(whole.largest[at], most));
                    part.scale(s, f, decay(part.largest[at], most));
                    if map == Map::PositionSoftmax {
                        whole.largest[f] = most;
                    }
                }
                whole.largest[0] = whole.largest[0].max(part.largest[0]);
            }
            for (to, from) in
                [(&mut whole.sums, &part.sums), (&mut whole.totals, &part.totals), (&mut whole.values, &part.values)]
            {
                for (x, y) in to.iter_mut().zip(from) {
                    *x += y;
                }
            }
        }
        if map == Map::PositionSoftmax {
            for f in 0..features {
                let total = whole.totals[f];
                if total != 0.0 {
                    whole.scale(s, f, 1.0 / total);
                    whole.totals[f] = 1.0;
                }
            }
        }
        whole
    }
}

/// Sums over the keys `k`, `[batch, heads, keys, dim]`, and values `v`, `[batch, heads, keys, value_dim]`, without the keys of
/// `keep`, `[batch, keys]`, that are false.
pub fn accumulate(
    k: TensorView,
    v: TensorView,
    map_of_keys: &FeatureMap,
    keep: Option<&[bool]>,
    execution: &Execution,
) -> Result<Statistics> {
    map_of_keys.check("k", k.shape())?;
    let [batch, heads, keys, dim] = k.shape();
    let value_dim = v.shape()[3];
    if v.shape() != [batch, heads, keys, value_dim] || value_dim == 0 {
        let expected = format!("[{batch}, {heads}, {keys}, at least 1]");
        return Err(Error::value("v", format!("shape {:?}", v.shape()), expected));
    }
    if let Some(keep) = keep.filter(|keep| keep.len() != batch * keys) {
        return Err(Error::value("mask", format!("{} entries", keep.len()), batch * keys));
    }
    if map_of_keys.map == Map::PositionSoftmax && map_of_keys.rotation.is_some() {
        return Err(Error::value("rotation", "a table", "none with a softmax over positions"));
    }
    let features = map_of_keys.features(dim);
    let counts = (0..batch)
        .map(|b| keep.map_or(keys, |keep| keep[b * keys..(b + 1) * keys].iter().filter(|&&x| x).count()) as f32)
        .collect();
    let mut found = Statistics {
        sums: vec![0.0; batch * heads * features * value_dim],
        totals: vec![0.0; batch * heads * features],
        values: vec![0.0; batch * heads * value_dim],
        counts,
    };
    if keys == 0 {
        return Ok(found);
    }
    let isa = simd::current();
    let length = PIECES[usize::from(batch * heads >= 8)].max((8 * features).next_multiple_of(KEYS));
    let pieces = keys.div_ceil(length);
    let mut parts = map(execution, batch * heads * pieces, |i| {
        let (pair, first) = (i / pieces, i % pieces * length);
        let (batch, head) = (pair / heads, pair % heads);
        let keep = keep.map(|keep| &keep[batch * keys..(batch + 1) * keys]);
        let rows = first..(first + length).min(keys);
        dispatch(isa, Piece { k, v, map: map_of_keys, keep, batch, head, rows })
    })?
    .into_iter();
    for pair in 0..batch * heads {
        let parts = parts.by_ref().take(pieces).collect();
        let whole = dispatch(isa, Combine { parts, map: map_of_keys.map, features });
        found.totals[pair * features..(pair + 1) * features].copy_from_slice(&whole.totals[..features]);
        found.values[pair * value_dim..(pair + 1) * value_dim].copy_from_slice(&whole.values[..value_dim]);
        let to = &mut found.sums[pair * features * value_dim..(pair + 1) * features * value_dim];
        for (to, from) in to.chunks_exact_mut(value_dim).zip(whole.sums.chunks_exact(whole.width)) {
            to.copy_from_slice(&from[..value_dim]);
        }
    }
    Ok(found)
}

/// Sums that are read: [`Statistics`], as slices.
#[derive(Clone, Copy, Debug)]
pub struct Sums<'a> {
    /// `[batch, heads, features, value_dim]`.
    pub sums: &'a [f32],
    /// `[batch, heads, features]`.
    pub totals: &'a [f32],
    /// `[batch, heads, value_dim]`.
    pub values: &'a [f32],
    /// `[batch]`.
    pub counts: &'a [f32],
    /// KV heads.
    pub heads: usize,
}

struct Stretch<'a, 'o> {
    q: TensorView<'a>,
    map: &'a FeatureMap<'a>,
    statistics: Sums<'a>,
    read_out: ReadOut<'a>,
    add: Option<TensorView<'a>>,
    batch: usize,
    head: usize,
    rows: Range<usize>,
    out: &'o TensorViewMut<'a>,
}

impl Kernel for Stretch<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { q, map, statistics, read_out, add, batch, head, rows, out } = self;
        let value_dim = out.shape()[3];
        let vw = value_dim.next_multiple_of(panel::<S>());
        let mut mapper = Mapper::new(s, map, q, batch, head);
        let (features, width) = (mapper.features, mapper.width);
        let pair = batch * statistics.heads + head / (q.shape()[1] / statistics.heads);
        let count = statistics.counts[batch];
        let mut panels = vec![0f32; vw / panel::<S>() * features * panel::<S>()];
        let sums = &statistics.sums[pair * features * value_dim..(pair + 1) * features * value_dim];
        for (f, from) in sums.chunks_exact(value_dim).enumerate() {
            for (p, from) in from.chunks(panel::<S>()).enumerate() {
                let at = (p * features + f) * panel::<S>();
                panels[at..at + from.len()].copy_from_slice(from);
            }
        }
        let mut totals = vec![0f32; width];
        totals[..features].copy_from_slice(&statistics.totals[pair * features..(pair + 1) * features]);
        let mut values = vec![0f32; vw];
        values[..value_dim].copy_from_slice(&statistics.values[pair * value_dim..(pair + 1) * value_dim]);
        let block = block_rows(width).min(QUERIES) / MAX_ROWS * MAX_ROWS;
        let mut phi = vec![0f32; block * width];
        let mut sums = vec![0f32; block * vw];
        let mut added = vec![0f32; vw];
        for first in rows.clone().step_by(block) {
            let n = block.min(rows.end - first);
            mapper.apply(s, first..first + n, &mut phi);
            let mut factors = [(0f32, 0f32); QUERIES];
            for (r, row) in phi.chunks_exact_mut(width).take(n).enumerate() {
                if map.map == Map::Gaussian {
                    mapper.exponentials_by_row(s, row);
                }
                factors[r] = read_out.factors(dot(s, row, &totals), count, head);
                mapper.rotate(first + r, &mut row[..features]);
            }
            let tiles = n.div_ceil(S::ROWS);
            phi[n * width..tiles * S::ROWS * width].fill(0.0);
            for p in 0..vw / panel::<S>() {
                for t in 0..tiles {
                    // SAFETY: tile t lies inside the block's rows, which are a multiple of ROWS; panel p has `features` rows.
                    unsafe {
                        let a = phi.as_ptr().add(t * S::ROWS * width);
                        let b = panels.as_ptr().add(p * features * panel::<S>());
                        let c = sums.as_mut_ptr().add(t * S::ROWS * vw + p * panel::<S>());
                        multiply_strided(s, features, a, width, b, panel::<S>(), c, vw, n - t * S::ROWS, false);
                    }
                }
            }
            for (r, row) in sums.chunks_exact_mut(vw).take(n).enumerate() {
                let (a, b) = factors[r];
                let (a, b) = (s.splat(a), s.splat(b));
                if let Some(add) = &add {
                    load_row(s, add, [batch, head, first + r], &mut added);
                }
                for d in (0..vw).step_by(S::LANES) {
                    // SAFETY: all three rows have vw floats, a multiple of LANES.
                    unsafe {
                        let x = s.mul(a, s.load(row.as_ptr().add(d)));
                        let x = s.fma(b, s.load(values.as_ptr().add(d)), x);
                        s.store(row.as_mut_ptr().add(d), s.add(x, s.load(added.as_ptr().add(d))));
                    }
                }
                store_row(out, [batch, head, first + r], &row[..value_dim]);
            }
        }
    }
}

/// Writes row `[batch, head, row]`, rounded to its dtype. Only the item that owns the row calls this.
#[inline(always)]
pub(super) fn store_row(to: &TensorViewMut, [batch, head, row]: [usize; 3], values: &[f32]) {
    assert!(values.len() == to.shape()[3]);
    with_element!(to.dtype(), T => {
        let to = to.row_ptr::<T>(batch, head, row);
        // SAFETY: the row has as many elements as there are values, and no other worker holds it.
        unsafe { narrow(values, to.cast(), T::DTYPE) };
    });
}

/// Reads sums with the queries `q`, `[batch, query heads, queries, dim]`, into `out`, `[batch, query heads, queries, value_dim]`, and
/// adds `add`, of its shape.
pub fn read(
    q: TensorView,
    map_of_queries: &FeatureMap,
    statistics: Sums,
    read_out: ReadOut,
    add: Option<TensorView>,
    out: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    map_of_queries.check("q", q.shape())?;
    let [batch, heads, queries, dim] = q.shape();
    let value_dim = out.shape()[3];
    let features = map_of_queries.features(dim);
    if out.shape() != [batch, heads, queries, value_dim] || value_dim == 0 {
        let expected = format!("[{batch}, {heads}, {queries}, at least 1]");
        return Err(Error::value("out", format!("shape {:?}", out.shape()), expected));
    }
    if let Some(add) = add.filter(|add| add.shape() != out.shape()) {
        return Err(Error::value("add", format!("shape {:?}", add.shape()), format!("{:?}", out.shape())));
    }
    let kv_heads = statistics.heads;
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(Error::value("q", format!("{heads} heads"), format!("a multiple of {kv_heads}")));
    }
    let lengths = [
        ("sums", statistics.sums.len(), batch * kv_heads * features * value_dim),
        ("totals", statistics.totals.len(), batch * kv_heads * features),
        ("values", statistics.values.len(), batch * kv_heads * value_dim),
        ("counts", statistics.counts.len(), batch),
    ];
    for (name, got, expected) in lengths {
        if got != expected {
            return Err(Error::value(name, format!("{got} numbers"), expected));
        }
    }
    if let ReadOut::Clamp { factors, .. } = read_out
        && factors.len() != heads
    {
        return Err(Error::value("factors", format!("{} numbers", factors.len()), heads));
    }
    if map_of_queries.map == Map::PositionSoftmax {
        return Err(Error::value("map", "a softmax over positions", "another map of queries"));
    }
    if queries == 0 {
        return Ok(());
    }
    let isa = simd::current();
    let stretches = queries.div_ceil(STRETCH);
    let out = &*out;
    for_each(execution, batch * heads * stretches, |i| {
        let (pair, first) = (i / stretches, i % stretches * STRETCH);
        let rows = first..(first + STRETCH).min(queries);
        let (batch, head) = (pair / heads, pair % heads);
        let map = map_of_queries;
        dispatch(isa, Stretch { q, map, statistics, read_out, add, batch, head, rows, out });
    })
}
