//! Sums over softmax weights that are never stored: a pass over queries and keys, without values.
//!
//! ```text
//! for each tile of rows, all KV heads together:                           memory: one tile's partial sums
//!     no lse given:  items (KV head, range of keys) leave running softmaxes, merged in order
//!     items (KV head, range of keys):
//!         for each block of keys: logits, weights; sums along rows and columns
//!     sums of rows merged over the ranges of keys in order; sums of columns added to those of earlier tiles
//! ```
//! A row's sums over a block, and a column's over 8 rows, are f32, beyond it f64. How the work is cut depends on shapes only.

use super::logits::{Normaliser, join, tile_rows};
use super::scores::{RowId, Running};
use super::scratch::with_scratch;
use super::sums::{Best, Part, Plan, SoftmaxItem, SumItem, larger};
use super::tile::{self, QUERY_ROWS};
use super::{Options, Problem};
use crate::parallel::{Execution, map};
use crate::simd::{self, Isa, dispatch};
use crate::tensor::{Error, KvView, Result, TensorView};
use std::ops::Range;

/// The most powers of the distance that [`prob_reduce`] averages.
pub const MAX_MOMENTS: usize = 4;

/// What [`prob_reduce`] computes: `P_ij` is the weight of key j in query row i, arrays are contiguous, `None` is not wanted.
#[derive(Debug, Default)]
pub struct Reductions<'a> {
    /// Log of each row's denominator, `[batch, query heads, queries]`; `None` is computed by a pass of its own.
    pub given_lse: Option<&'a [f32]>,
    /// The lse that was computed, as `given_lse`.
    pub lse: Option<&'a mut [f32]>,
    /// `sum_i w_i P_ij`, `[batch, query heads, keys]`.
    pub column_mass: Option<&'a mut [f32]>,
    /// `w_i`, `[batch, query heads, queries]`; `None` is 1.
    pub query_weights: Option<&'a [f32]>,
    /// `max_i P_ij`, `[batch, query heads, keys]`.
    pub column_max: Option<&'a mut [f32]>,
    /// `sum_{j in g} P_ij`, `[batch, query heads, queries, segments]`.
    pub segment_mass: Option<&'a mut [f32]>,
    /// Segment of each key, `[keys]` or `[batch, keys]`; negative is none.
    pub segment_ids: &'a [i32],
    /// Number of segments.
    pub segments: usize,
    /// `-sum_j P_ij ln P_ij`, `[batch, query heads, queries]`.
    pub entropy: Option<&'a mut [f32]>,
    /// `sum_j d^m P_ij` for m = 1.., `[batch, query heads, queries, moments]`; d is the row's position less the key's.
    pub distance_moments: Option<&'a mut [f32]>,
    /// Number of moments, at most [`MAX_MOMENTS`].
    pub moments: usize,
    /// Distances are clipped to `-limit..=limit`.
    pub distance_limit: Option<f32>,
    /// `max_j P_ij`, `[batch, query heads, queries]`.
    pub row_max: Option<&'a mut [f32]>,
    /// The key of the largest logit, the lower one of equals, -1 where a row sees none; `[batch, query heads, queries]`.
    pub row_max_key: Option<&'a mut [i64]>,
}

impl Reductions<'_> {
    fn check(&self, problem: &Problem) -> Result<()> {
        let Problem { batch, query_heads, queries, keys, .. } = *problem;
        let (rows, columns) = (batch * query_heads * queries, batch * query_heads * keys);
        let length = |x: &Option<&mut [f32]>| x.as_ref().map(|x| x.len());
        for (name, got, expected) in [
            ("lse", self.given_lse.map(<[f32]>::len), rows),
            ("lse", length(&self.lse), rows),
            ("column_mass", length(&self.column_mass), columns),
            ("query_weights", self.query_weights.map(<[f32]>::len), rows),
            ("column_max", length(&self.column_max), columns),
            ("segment_mass", length(&self.segment_mass), rows * self.segments),
            ("entropy", length(&self.entropy), rows),
            ("distance_moments", length(&self.distance_moments), rows * self.moments),
            ("row_max", length(&self.row_max), rows),
            ("row_max", self.row_max_key.as_ref().map(|x| x.len()), rows),
        ] {
            if let Some(got) = got.filter(|&got| got != expected) {
                return Err(Error::value(name, format!("{got} numbers"), expected));
            }
        }
        if self.segment_mass.is_some() {
            if self.segment_ids.len() != keys && self.segment_ids.len() != batch * keys {
                let expected = format!("[{keys}] or [{batch}, {keys}]");
                return Err(Error::value("segment_ids", format!("{} numbers", self.segment_ids.len()), expected));
            }
            if let Some(id) = self.segment_ids.iter().find(|&&id| id >= 0 && id as usize >= self.segments) {
                return Err(Error::value("segment_ids", id, format!("ids below {}", self.segments)));
            }
        }
        if self.moments > MAX_MOMENTS {
            return Err(Error::value("distance_moments", self.moments, format!("at most {MAX_MOMENTS}")));
        }
        Ok(())
    }
}

/// Rows `rows` of every KV head (row r being query `r / group` of head `r % group`), their keys cut into ranges.
struct Wave {
    rows: Range<usize>,
    pieces: Vec<Range<usize>>,
}

impl Wave {
    fn new(problem: &Problem, rows: Range<usize>) -> Self {
        let (mut start, mut end) = (problem.keys, 0);
        for row in rows.start / problem.group..=(rows.end - 1) / problem.group {
            let visible = problem.visible(row);
            if !visible.is_empty() {
                (start, end) = (start.min(visible.start), end.max(visible.end));
            }
        }
        // About 64 items, whose partial sums are what takes memory.
        let length = (problem.keys * problem.batch * problem.kv_heads / 64).max(512).next_multiple_of(tile::KEYS);
        Self { rows, pieces: (start..end).step_by(length).map(|first| first..(first + length).min(end)).collect() }
    }

    /// Runs `work` for each (batch, KV head) and range of keys.
    fn map<T: Send>(
        &self,
        problem: &Problem,
        execution: &Execution,
        work: impl Fn(&[RowId], Range<usize>, usize) -> T + Sync,
    ) -> Result<Vec<T>> {
        let pieces = self.pieces.len();
        map(execution, problem.batch * problem.kv_heads * pieces, |i| {
            let (head, keys) = (i / pieces, self.pieces[i % pieces].clone());
            let mut ids = [RowId { batch: 0, head: 0, row: 0 }; QUERY_ROWS];
            for (id, r) in ids.iter_mut().zip(self.rows.clone()) {
                *id = problem.id(head / problem.kv_heads, head % problem.kv_heads, r);
            }
            work(&ids[..self.rows.len()], keys, head)
        })
    }
}

/// Sums over the softmax weights of `q` and `k`; see [`Reductions`] for what there is.
///
/// The weights of a row sum to 1 less what the sink takes, those of a row that sees no key are 0.
pub fn prob_reduce<'a>(
    q: TensorView<'a>,
    k: impl Into<KvView<'a>>,
    options: Options<'a>,
    reductions: Reductions,
    execution: &Execution,
) -> Result<()> {
    let k = k.into();
    let problem = Problem::new(q, k, k, options)?;
    reductions.check(&problem)?;
    reduce(simd::current(), &problem, reductions, execution)
}

fn reduce(isa: Isa, problem: &Problem, mut reductions: Reductions, execution: &Execution) -> Result<()> {
    let segmented = reductions.segment_mass.is_some();
    let plan = Plan {
        problem,
        query_weights: reductions.query_weights,
        column_mass: reductions.column_mass.is_some(),
        column_max: reductions.column_max.is_some(),
        entropy: reductions.entropy.is_some(),
        row_max: reductions.row_max.is_some() || reductions.row_max_key.is_some(),
        moments: if reductions.distance_moments.is_some() { reductions.moments } else { 0 },
        distance_limit: reductions.distance_limit,
        segment_ids: reductions.segment_ids,
        segments: if segmented { reductions.segments } else { 0 },
    };
    let heads = problem.batch * problem.query_heads;
    let mut mass = vec![0f64; if plan.column_mass { heads * problem.keys } else { 0 }];
    if let Some(column_max) = &mut reductions.column_max {
        column_max.fill(0.0);
    }
    let rows = problem.queries * problem.group;
    for first in (0..rows).step_by(tile_rows(rows)) {
        let wave = Wave::new(problem, first..(first + tile_rows(rows)).min(rows));
        let normalisers = normalisers(isa, problem, &wave, &mut reductions, execution)?;
        let parts = wave.map(problem, execution, |ids, keys, head| {
            let normalisers = &normalisers[head * ids.len()..(head + 1) * ids.len()];
            with_scratch(|scratch| dispatch(isa, SumItem { plan, ids, normalisers, keys, scratch }))
        })?;
        merge_columns(problem, &wave, &parts, &mut mass, reductions.column_max.as_deref_mut());
        write_rows(&plan, &wave, &parts, &mut reductions);
    }
    if let Some(column_mass) = reductions.column_mass {
        column_mass.iter_mut().zip(mass).for_each(|(to, sum)| *to = sum as f32);
    }
    Ok(())
}

/// Place of a row in arrays `[batch, query heads, queries]`.
#[inline(always)]
pub(super) fn flat(problem: &Problem, id: RowId) -> usize {
    (id.batch * problem.query_heads + id.head) * problem.queries + id.row
}

/// Normalisers of a wave's rows, `[batch, kv heads, rows]`: by the lse that was given, else by a pass over the keys.
fn normalisers(
    isa: Isa,
    problem: &Problem,
    wave: &Wave,
    reductions: &mut Reductions,
    execution: &Execution,
) -> Result<Vec<Normaliser>> {
    let ids: Vec<RowId> = (0..problem.batch * problem.kv_heads)
        .flat_map(|head| wave.rows.clone().map(move |r| (head, r)))
        .map(|(head, r)| problem.id(head / problem.kv_heads, head % problem.kv_heads, r))
        .collect();
    if let Some(lse) = reductions.given_lse {
        return Ok(ids.iter().map(|&id| Normaliser::of_lse(lse[flat(problem, id)])).collect());
    }
    let parts = wave.map(problem, execution, |ids, keys, _| {
        with_scratch(|scratch| dispatch(isa, SoftmaxItem { problem, ids, keys, scratch }))
    })?;
    let n = wave.rows.len();
    Ok(ids
        .iter()
        .enumerate()
        .map(|(i, &id)| {
            let (head, r) = (i / n, i % n);
            let of_row = parts[head * wave.pieces.len()..(head + 1) * wave.pieces.len()].iter().map(|part| part[r]);
            let running = of_row.fold(Running::EMPTY, join);
            let total = problem.denominator(id, running);
            if let Some(lse) = &mut reductions.lse {
                lse[flat(problem, id)] = total.lse();
            }
            Normaliser::of_running(running, total)
        })
        .collect())
}

/// Adds the column sums of a wave to those of the waves before.
fn merge_columns(problem: &Problem, wave: &Wave, parts: &[Part], mass: &mut [f64], mut max: Option<&mut [f32]>) {
    for (i, part) in parts.iter().enumerate() {
        let (head, piece) = (i / wave.pieces.len(), &wave.pieces[i % wave.pieces.len()]);
        for g in 0..problem.group {
            let to = (head * problem.group + g) * problem.keys;
            let (to, from) = (to + piece.start..to + piece.end, g * piece.len()..(g + 1) * piece.len());
            if !part.mass.is_empty() {
                mass[to.clone()].iter_mut().zip(&part.mass[from.clone()]).for_each(|(to, x)| *to += x);
            }
            if let Some(max) = &mut max {
                max[to].iter_mut().zip(&part.column_max[from]).for_each(|(to, &x)| *to = larger(*to, x));
            }
        }
    }
}

/// Merges the row sums of a wave over its ranges of keys, and writes them.
fn write_rows(plan: &Plan, wave: &Wave, parts: &[Part], reductions: &mut Reductions) {
    let (problem, n, stride) = (plan.problem, wave.rows.len(), plan.sums());
    let mut sums = vec![0f64; stride];
    for head in 0..problem.batch * problem.kv_heads {
        let parts = &parts[head * wave.pieces.len()..(head + 1) * wave.pieces.len()];
        for r in 0..n {
            let row = flat(problem, problem.id(head / problem.kv_heads, head % problem.kv_heads, wave.rows.start + r));
            sums.fill(0.0);
            let mut best = Best::NONE;
            for part in parts {
                sums.iter_mut().zip(&part.sums[r * stride..(r + 1) * stride]).for_each(|(sum, x)| *sum += x);
                if plan.row_max {
                    best.raise(part.best[r]);
                }
            }
            let (entropy, moments, segments) = plan.split(&sums);
            for (to, from) in [
                (&mut reductions.entropy, entropy),
                (&mut reductions.distance_moments, moments),
                (&mut reductions.segment_mass, segments),
            ] {
                if let Some(to) = to {
                    let to = &mut to[row * from.len()..(row + 1) * from.len()];
                    to.iter_mut().zip(from).for_each(|(to, &sum)| *to = sum as f32);
                }
            }
            if let Some(row_max) = &mut reductions.row_max {
                row_max[row] = best.weight;
            }
            if let Some(key) = &mut reductions.row_max_key {
                key[row] = best.key;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four rows of two heads over three equal keys, causal.
    fn run(isa: Isa, reductions: Reductions) -> Result<()> {
        let (q, k) = (vec![1f32; 2 * 4 * 5], vec![1f32; 3 * 5]);
        let (q, k) = (TensorView::new(&q, [1, 2, 4, 5])?, TensorView::new(&k, [1, 1, 3, 5])?.into());
        let problem = Problem::new(q, k, k, Options { causal: true, ..Options::default() })?;
        reductions.check(&problem)?;
        reduce(isa, &problem, reductions, &Execution::default())
    }

    #[test]
    fn equal_keys_weigh_the_same() {
        for isa in Isa::available() {
            let (mut mass, mut entropy, mut moments) = (vec![9f32; 6], vec![9f32; 8], vec![9f32; 16]);
            let (mut max, mut key, mut segments) = (vec![9f32; 8], vec![9i64; 8], vec![9f32; 8]);
            let reductions = Reductions {
                column_mass: Some(&mut mass),
                entropy: Some(&mut entropy),
                distance_moments: Some(&mut moments),
                moments: 2,
                row_max: Some(&mut max),
                row_max_key: Some(&mut key),
                segment_mass: Some(&mut segments),
                segment_ids: &[-1, 0, 0],
                segments: 1,
                ..Reductions::default()
            };
            run(isa, reductions).unwrap();
            let close = |got: &[f32], expected: &[f32]| {
                assert_eq!(got.len(), 2 * expected.len());
                for (x, y) in got.iter().zip(expected.iter().chain(expected)) {
                    assert!((x - y).abs() < 1e-6, "{got:?} {expected:?}");
                }
            };
            // Row 0 lies before the first key.
            close(&mass, &[1.0 + 0.5 + 1.0 / 3.0, 0.5 + 1.0 / 3.0, 1.0 / 3.0]);
            close(&entropy, &[0.0, 0.0, 2f32.ln(), 3f32.ln()]);
            close(&moments, &[0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 1.0, 5.0 / 3.0]);
            close(&max, &[0.0, 1.0, 0.5, 1.0 / 3.0]);
            close(&segments, &[0.0, 0.0, 0.5, 2.0 / 3.0]);
            assert_eq!(key, [-1, 0, 0, 0, -1, 0, 0, 0]);
        }
    }

    #[test]
    fn arrays_of_another_size_are_refused() {
        let (mut short, lse) = (vec![0f32; 5], vec![0f32; 7]);
        assert!(run(simd::current(), Reductions { column_mass: Some(&mut short), ..Reductions::default() }).is_err());
        assert!(run(simd::current(), Reductions { entropy: Some(&mut short), ..Reductions::default() }).is_err());
        assert!(run(simd::current(), Reductions { given_lse: Some(&lse), ..Reductions::default() }).is_err());
        let mut mass = vec![0f32; 8];
        for ids in [&[0, 0][..], &[0, 1, 0]] {
            let reductions =
                Reductions { segment_mass: Some(&mut mass), segment_ids: ids, segments: 1, ..Reductions::default() };
            assert!(run(simd::current(), reductions).is_err(), "{ids:?}");
        }
    }
}
