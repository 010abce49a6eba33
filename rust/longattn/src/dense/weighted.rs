//! Attention whose weights are functions of a logit instead of a softmax: they may be negative and need not add up to 1.
//!
//! ```text
//! tiles of query rows, all keys of each:
//!     a pass for what a weight needs of its whole row:    log-sum-exp of the logits, or the mean distance
//!     for each block of keys:
//!         pack K^T and V;  S = Q K^T, and sums of |Q - K| where distances count       micro-kernel of tile.rs
//!         weights in the place of S;  O = O + W V
//! ```

use super::micro::{Product, multiply, multiply_by, panel};
use super::packing::{PackKeys, PackValues};
use super::rows::{Rows, is_finite, widen_row, with_rows};
use super::scores::{RowId, Running, modify, online_softmax};
use super::scratch::{Scratch, with_scratch};
use super::tile::{KEYS, QUERY_ROWS};
use super::{Options, Problem, load_query};
use crate::kv::convert::narrow;
use crate::parallel::{Execution, for_each};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Element, Error, Result, TensorView, TensorViewMut, with_element};
use std::ops::Range;

/// What becomes of the product `x` of a query and a key.
#[derive(Clone, Copy, Debug)]
pub enum Weights {
    /// `tanh(similarity * x) * sigmoid(-distance * |q - k|_1)`.
    Signed {
        /// Factor of the product.
        similarity: f32,
        /// Factor of the distance; at 0 none is computed.
        distance: f32,
        /// The mean of a row's distances is subtracted from them.
        centred: bool,
        /// The sigmoid counts twice.
        doubled: bool,
    },
    /// `clip(m + contrast * (w - m), 0, 1)` of the softmax weights `w` of the scaled products, whose mean `m` is.
    Contrast {
        /// Factor of what a weight differs from the mean by.
        contrast: f32,
    },
}

impl Weights {
    /// Whether a weight needs more of its row than its own logit.
    fn looks_at_rows(self) -> bool {
        match self {
            Self::Signed { centred, distance, .. } => centred && distance != 0.0,
            Self::Contrast { .. } => true,
        }
    }

    fn distances(self) -> bool {
        matches!(self, Self::Signed { distance, .. } if distance != 0.0)
    }
}

/// Sums of values by [`Weights`]. Options are causality, `mask` and, for [`Weights::Contrast`], `scale`; without a scale, products of
/// [`Weights::Signed`] are taken as they are.
pub fn weighted_attention<'a>(
    q: TensorView<'a>,
    k: TensorView<'a>,
    v: TensorView<'a>,
    weights: Weights,
    options: Options<'a>,
    out: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let scale = match weights {
        Weights::Signed { .. } => Some(1.0),
        Weights::Contrast { .. } => options.scale,
    };
    let problem = Problem::new(q, k.into(), v.into(), Options { scale, ..options })?;
    let Problem { batch, query_heads, kv_heads, group, queries, value_dim, .. } = problem;
    let shape = [batch, query_heads, queries, value_dim];
    if out.shape() != shape {
        return Err(Error::value("out", format!("shape {:?}", out.shape()), format!("{shape:?}")));
    }
    let rows = queries * group;
    let tiles = rows.div_ceil(QUERY_ROWS);
    let (isa, out, problem) = (simd::current(), &*out, &problem);
    for_each(execution, batch * kv_heads * tiles, |i| {
        let (first, head) = (i % tiles * QUERY_ROWS, i / tiles);
        let ids: Vec<RowId> =
            (first..rows.min(first + QUERY_ROWS)).map(|r| problem.id(head / kv_heads, head % kv_heads, r)).collect();
        let tile = |ids: &[RowId], careful: bool| {
            with_scratch(|scratch| dispatch(isa, Tile { problem, weights, ids, careful, out, scratch }))
        };
        // Zeros of hidden keys may have met values that are not finite.
        for id in tile(&ids, false) {
            tile(&[id], true);
        }
    })
}

/// Sums of the magnitudes of differences.
#[derive(Clone, Copy)]
struct Distances;

impl<S: Simd> Product<S> for Distances {
    type Sum = S::F32;
    type Part = S::F32;

    #[inline(always)]
    unsafe fn start(self, s: S, _c: *const f32, _column: usize) -> S::F32 {
        s.zero()
    }
    #[inline(always)]
    unsafe fn row(self, s: S, a: *const f32) -> S::F32 {
        // SAFETY: the caller's promise.
        s.splat(unsafe { *a })
    }
    #[inline(always)]
    unsafe fn column(self, s: S, b: *const f32) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { s.load(b) }
    }
    #[inline(always)]
    fn add(self, s: S, sum: S::F32, row: S::F32, column: S::F32) -> S::F32 {
        let difference = s.sub(row, column);
        s.add(sum, s.max(s.sub(s.zero(), difference), difference))
    }
    #[inline(always)]
    fn finish(self, _: S, sum: S::F32, _r: usize, _column: usize) -> S::F32 {
        sum
    }
}

/// What a pass over all keys found out about a row.
#[derive(Clone, Copy)]
struct OfRow {
    running: Running,
    distance: f64,
    seen: usize,
}

/// Some rows of a KV head's group, over all keys. Returns the rows that did not come out finite though keys are hidden from them.
struct Tile<'a, 's> {
    problem: &'a Problem<'a>,
    weights: Weights,
    ids: &'a [RowId],
    /// Values are only touched where the weight is not 0.
    careful: bool,
    out: &'a TensorViewMut<'a>,
    scratch: &'s mut Scratch,
}

impl Kernel for Tile<'_, '_> {
    type Output = Vec<RowId>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<RowId> {
        let Self { problem, weights, ids, careful, out, scratch } = self;
        let (panel, n) = (panel::<S>(), ids.len());
        let rows = n.next_multiple_of(S::ROWS);
        let (dp, vp) = (problem.dim.next_multiple_of(S::LANES), problem.value_dim.next_multiple_of(panel));
        let Scratch { queries, keys: packed, values, scores, outputs, extra } = scratch;
        let queries = queries.take(rows * dp);
        for (r, &id) in ids.iter().enumerate() {
            load_query(s, problem, id, &mut queries[r * dp..(r + 1) * dp]);
        }
        queries[n * dp..rows * dp].fill(0.0);
        let packed = packed.take(KEYS * dp);
        let values = values.take(KEYS * vp);
        let [products, distances] = scores.carve([rows * KEYS, if weights.distances() { rows * KEYS } else { 0 }]);
        let sums = outputs.take(rows * vp);
        sums[..rows * vp].fill(0.0);
        let wide = extra.take((panel * dp).max(vp));
        let (batch, kv_head) = (ids[0].batch, ids[0].head / problem.group);
        let plain = problem.options.is_plain();
        let mut of_rows = [OfRow { running: Running::EMPTY, distance: 0.0, seen: 0 }; QUERY_ROWS];

        for last in usize::from(!weights.looks_at_rows())..2 {
            for start in (0..problem.keys).step_by(KEYS) {
                let keys = start..(start + KEYS).min(problem.keys);
                let visible = |r: usize| {
                    let visible = problem.visible(ids[r].row);
                    visible.start.clamp(start, keys.end) - start..visible.end.clamp(start, keys.end) - start
                };
                let sees = |t: usize| (t * S::ROWS..n.min((t + 1) * S::ROWS)).any(|r| !visible(r).is_empty());
                if (0..rows / S::ROWS).all(|t| !sees(t)) {
                    continue;
                }
                let columns = keys.len().next_multiple_of(panel);
                with_rows!(problem, batch, kv_head, |k, v| {
                    let (keys, padded_dim, wide) = (keys.clone(), dp, wide.as_mut_ptr());
                    let (dim, to) = (problem.dim, packed.as_mut_ptr());
                    s.call(PackKeys { k, keys: keys.clone(), dim, padded_dim, wide, to });
                    if last == 1 && !careful {
                        let (dim, padded_dim, to) = (problem.value_dim, vp, values.as_mut_ptr());
                        s.call(PackValues { v, keys, dim, padded_dim, wide, between: KEYS, to });
                    }
                });
                for p in 0..columns / panel {
                    for t in 0..rows / S::ROWS {
                        if !sees(t) {
                            continue;
                        }
                        // SAFETY: queries and scores hold `rows` rows and KEYS columns, of which these are a tile and a panel.
                        unsafe {
                            let a = queries.as_ptr().add(t * S::ROWS * dp);
                            let b = packed.as_ptr().add(p * dp * panel);
                            let at = t * S::ROWS * KEYS + p * panel;
                            multiply(s, problem.dim, a, dp, b, products.as_mut_ptr().add(at), KEYS, false);
                            if weights.distances() {
                                let c = distances.as_mut_ptr().add(at);
                                multiply_by(s, Distances, problem.dim, a, dp, b, c, KEYS, S::ROWS);
                            }
                        }
                    }
                }
                for (r, &id) in ids.iter().enumerate() {
                    let visible = visible(r);
                    let row = &mut products[r * KEYS..r * KEYS + columns];
                    if !sees(r / S::ROWS) {
                        continue;
                    }
                    if !plain {
                        modify(s, problem, id, row, None, keys.clone());
                    }
                    row[..visible.start].fill(f32::NEG_INFINITY);
                    row[visible.end..].fill(f32::NEG_INFINITY);
                    let apart: &[f32] =
                        if weights.distances() { &distances[r * KEYS..r * KEYS + columns] } else { &[] };
                    let of_row = &mut of_rows[r];
                    if last == 1 {
                        weigh(s, weights, of_row, row, apart);
                        continue;
                    }
                    match weights {
                        Weights::Signed { .. } => {
                            let (sum, count) = sum_seen(s, row, apart);
                            of_row.distance += f64::from(sum);
                            of_row.seen += count;
                        }
                        Weights::Contrast { .. } => {
                            of_row.seen += row.iter().filter(|&&x| x != f32::NEG_INFINITY).count();
                            of_row.running = online_softmax(s, row, visible, of_row.running).0;
                        }
                    }
                }
                if last == 0 {
                    continue;
                }
                if careful {
                    with_rows!(problem, batch, kv_head, |_k, v| {
                        add_carefully(s, &products[..keys.len()], v, keys.clone(), problem.value_dim, wide, sums);
                    });
                    continue;
                }
                for p in 0..vp / panel {
                    for t in 0..rows / S::ROWS {
                        if sees(t) {
                            // SAFETY: the weights of a tile's rows, a panel of values, and the rows' sums.
                            unsafe {
                                let a = products.as_ptr().add(t * S::ROWS * KEYS);
                                let b = values.as_ptr().add(p * KEYS * panel);
                                let c = sums.as_mut_ptr().add(t * S::ROWS * vp + p * panel);
                                multiply(s, keys.len(), a, KEYS, b, c, vp, true);
                            }
                        }
                    }
                }
            }
        }
        let mut again = Vec::new();
        for (r, &id) in ids.iter().enumerate() {
            let row = &sums[r * vp..r * vp + problem.value_dim];
            if !careful && !is_finite(s, row) {
                again.push(id);
            }
            with_element!(out.dtype(), O => {
                let to = out.row_ptr::<O>(id.batch, id.head, id.row);
                // SAFETY: the output row has value_dim numbers, and no other worker holds it.
                unsafe { narrow(row, to.cast(), O::DTYPE) };
            });
        }
        again
    }
}

/// Weights in the place of a row's products; minus infinity weighs 0.
#[inline(always)]
fn weigh<S: Simd>(s: S, weights: Weights, of_row: &OfRow, row: &mut [f32], apart: &[f32]) {
    assert!(row.len().is_multiple_of(S::LANES) && (apart.is_empty() || apart.len() == row.len()));
    let hidden = s.splat(f32::MIN);
    let p = row.as_mut_ptr();
    match weights {
        Weights::Signed { similarity, distance, centred, doubled } => {
            let mean = if centred && of_row.seen > 0 { of_row.distance / of_row.seen as f64 } else { 0.0 };
            let (similarity, shift) = (s.splat(similarity), s.splat(-distance * mean as f32));
            let (distance, factor) = (s.splat(distance), s.splat(if doubled { 2.0 } else { 1.0 }));
            for j in (0..row.len()).step_by(S::LANES) {
                // SAFETY: both rows are whole vectors.
                unsafe {
                    let x = s.load(p.add(j));
                    let d = if apart.is_empty() { s.zero() } else { s.load(apart.as_ptr().add(j)) };
                    // Where the exponential would overflow the weight is below what float32 holds.
                    let exponent = s.min(s.splat(88.0), s.fma(distance, d, shift));
                    let gate = s.div(factor, s.add(s.splat(1.0), s.exp(exponent)));
                    let weight = s.mul(s.tanh(s.mul(similarity, x)), gate);
                    s.store(p.add(j), s.select_less(x, hidden, s.zero(), weight));
                }
            }
        }
        Weights::Contrast { contrast } => {
            let mean = 1.0 / of_row.seen.max(1) as f32;
            let lse = of_row.running.lse();
            if lse == f32::NEG_INFINITY {
                row.fill(0.0);
                return;
            }
            let (shift, factor, rest) = (s.splat(lse), s.splat(contrast), s.splat((1.0 - contrast) * mean));
            for j in (0..row.len()).step_by(S::LANES) {
                // SAFETY: the row is whole vectors.
                unsafe {
                    let x = s.load(p.add(j));
                    let weight = s.fma(factor, s.exp(s.sub(x, shift)), rest);
                    let weight = s.min(s.splat(1.0), s.max(s.zero(), weight));
                    s.store(p.add(j), s.select_less(x, hidden, s.zero(), weight));
                }
            }
        }
    }
}

/// The sum of `numbers` where `row` is not minus infinity, and how many these are.
#[inline(always)]
fn sum_seen<S: Simd>(s: S, row: &[f32], numbers: &[f32]) -> (f32, usize) {
    assert!(row.len() == numbers.len() && row.len().is_multiple_of(S::LANES));
    let (mut sum, hidden) = (s.zero(), s.splat(f32::MIN));
    for j in (0..row.len()).step_by(S::LANES) {
        // SAFETY: both rows are whole vectors.
        unsafe {
            let seen = s.select_less(s.load(row.as_ptr().add(j)), hidden, s.zero(), s.load(numbers.as_ptr().add(j)));
            sum = s.add(sum, seen);
        }
    }
    (s.sum(sum), row.iter().filter(|&&x| x != f32::NEG_INFINITY).count())
}

/// `sums += sum_j weights[j] v_j` over the weights that are not 0.
#[inline(always)]
fn add_carefully<S: Simd, V: Rows>(
    s: S,
    weights: &[f32],
    v: V,
    keys: Range<usize>,
    dim: usize,
    wide: &mut [f32],
    sums: &mut [f32],
) {
    for (&weight, key) in weights.iter().zip(keys) {
        if weight != 0.0 {
            // SAFETY: the key is one of the problem's, and `wide` holds a padded row of values.
            unsafe { widen_row(s, v.row(key), dim, wide.as_mut_ptr(), dim.next_multiple_of(S::LANES)) };
            sums.iter_mut().zip(&wide[..dim]).for_each(|(sum, x)| *sum += weight * x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let (q, k) = ([1f32; 2 * 8], [1f32; 3 * 8]);
        let mut out = [0f32; 3 * 8];
        let (q, k) = (TensorView::new(&q, [1, 1, 2, 8]).unwrap(), TensorView::new(&k, [1, 1, 3, 8]).unwrap());
        let mut to = TensorViewMut::new(&mut out, [1, 1, 3, 8]).unwrap();
        let weights = Weights::Contrast { contrast: 1.0 };
        let execution = Execution::default();
        assert!(weighted_attention(q, k, k, weights, Options::default(), &mut to, &execution).is_err());
    }

    #[test]
    fn hidden_values_that_are_not_finite_do_not_count() {
        // One channel: |q - k| is 1 for the first key and 0 for the second, and only the last row sees the third.
        let (q, k, v) = ([1f32; 2], [0f32, 1.0, 1.0], [1f32, 2.0, f32::NAN]);
        let mut out = [0f32; 2];
        let view = |x| TensorView::new(x, [1, 1, 3, 1]).unwrap();
        let weights = Weights::Signed { similarity: 1.0, distance: 1.0, centred: false, doubled: true };
        let options = Options { causal: true, ..Options::default() };
        let mut to = TensorViewMut::new(&mut out, [1, 1, 2, 1]).unwrap();
        let q = TensorView::new(&q, [1, 1, 2, 1]).unwrap();
        weighted_attention(q, view(&k), view(&v), weights, options, &mut to, &Execution::default()).unwrap();
        assert!((out[0] - 2.0 * 1f32.tanh()).abs() < 1e-5 && out[1].is_nan(), "{out:?}");
    }
}
