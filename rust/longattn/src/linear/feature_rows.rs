//! Features of rows on their own: written down, or their lengths.

use super::features::{FeatureMap, Map, Mapper, Power};
use super::rows::{dot, exponential, raise};
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Error, Result, TensorView};
use std::sync::Mutex;

/// Rows of one item.
const ROWS: usize = 1024;

/// Squared lengths of the features of each row, `[batch, heads, rows]`: before powers are taken, and after (the same without
/// powers). Lengths are not kept and row factors not applied, whatever the map says.
pub fn feature_norms(
    x: TensorView,
    map: &FeatureMap,
    before: &mut [f32],
    after: &mut [f32],
    execution: &Execution,
) -> Result<()> {
    map.check("x", x.shape())?;
    let [batch, heads, rows, _] = x.shape();
    for (name, to) in [("before", &before), ("after", &after)] {
        if to.len() != batch * heads * rows {
            return Err(Error::value(name, format!("{} numbers", to.len()), batch * heads * rows));
        }
    }
    if rows == 0 {
        return Ok(());
    }
    let isa = simd::current();
    let pieces = rows.div_ceil(ROWS);
    let parts: Vec<_> = before.chunks_mut(rows).zip(after.chunks_mut(rows)).collect();
    let parts: Vec<_> = parts
        .into_iter()
        .flat_map(|(before, after)| before.chunks_mut(ROWS).zip(after.chunks_mut(ROWS)))
        .map(Mutex::new)
        .collect();
    for_each(execution, parts.len(), |i| {
        let (head, first) = (i / pieces, i % pieces * ROWS);
        let mut part = parts[i].lock().unwrap_or_else(|e| e.into_inner());
        let (before, after) = &mut *part;
        let item = Norms { x, map, batch: head / heads, head: head % heads, first, before, after };
        dispatch(isa, item);
    })
}

struct Norms<'a, 'o> {
    x: TensorView<'a>,
    map: &'a FeatureMap<'a>,
    batch: usize,
    head: usize,
    first: usize,
    before: &'o mut [f32],
    after: &'o mut [f32],
}

impl Kernel for Norms<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, map, batch, head, first, before, after } = self;
        let plain = FeatureMap { power: None, row_factors: None, ..*map };
        let mut mapper = Mapper::new(s, &plain, x, batch, head);
        let width = mapper.width;
        let mut row = vec![0f32; width];
        for (r, (before, after)) in before.iter_mut().zip(after.iter_mut()).enumerate() {
            mapper.apply(s, first + r..first + r + 1, &mut row);
            *before = dot(s, &row, &row);
            *after = *before;
            if let Some(Power { exponent, .. }) = map.power {
                raise(s, &mut row[..], exponent, 1.0);
                row[mapper.features..].fill(0.0);
                *after = dot(s, &row, &row);
            }
        }
    }
}

/// Rows that are mapped together.
const BLOCK: usize = 32;

/// Writes the features of the rows of `x` to `out`, `[batch, heads, rows, features]`. Exponents of [`Map::Gaussian`] are taken as they
/// are; [`Map::PositionSoftmax`], which is no map of single rows, is refused.
pub fn write_features(x: TensorView, map: &FeatureMap, out: &mut [f32], execution: &Execution) -> Result<()> {
    map.check("x", x.shape())?;
    let [batch, heads, rows, dim] = x.shape();
    let features = map.features(dim);
    if map.map == Map::PositionSoftmax {
        return Err(Error::value("map", "position_softmax", "a map of single rows"));
    }
    if out.len() != batch * heads * rows * features {
        return Err(Error::value("out", format!("{} numbers", out.len()), batch * heads * rows * features));
    }
    if out.is_empty() {
        return Ok(());
    }
    let isa = simd::current();
    let pieces = rows.div_ceil(ROWS);
    let parts: Vec<_> =
        out.chunks_mut(rows * features).flat_map(|head| head.chunks_mut(ROWS * features)).map(Mutex::new).collect();
    for_each(execution, parts.len(), |i| {
        let (head, first) = (i / pieces, i % pieces * ROWS);
        let mut to = parts[i].lock().unwrap_or_else(|e| e.into_inner());
        dispatch(isa, Write { x, map, batch: head / heads, head: head % heads, first, to: &mut to });
    })
}

struct Write<'a, 'o> {
    x: TensorView<'a>,
    map: &'a FeatureMap<'a>,
    batch: usize,
    head: usize,
    first: usize,
    to: &'o mut [f32],
}

impl Kernel for Write<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, map, batch, head, mut first, to } = self;
        let mut mapper = Mapper::new(s, map, x, batch, head);
        let (features, width) = (mapper.features, mapper.width);
        let mut wide = vec![0f32; BLOCK * width];
        for to in to.chunks_mut(BLOCK * features) {
            let count = to.len() / features;
            let block = &mut wide[..count * width];
            mapper.apply(s, first..first + count, block);
            for (r, (row, to)) in block.chunks_exact_mut(width).zip(to.chunks_exact_mut(features)).enumerate() {
                if map.map == Map::Gaussian {
                    exponential(s, row, 0.0);
                }
                mapper.rotate(first + r, &mut row[..features]);
                to.copy_from_slice(&row[..features]);
            }
            first += count;
        }
    }
}
