//! Sums of softmax weights over blocks of keys, over single keys and along diagonals, without a matrix of weights.

use super::scan::{RowWork, map_rows};
use super::select::check_len;
use crate::dense::logits::Normaliser;
use crate::dense::scores::RowId;
use crate::dense::{Options, Problem};
use crate::parallel::Execution;
use crate::simd::Simd;
use crate::tensor::{Error, Result, TensorView};
use std::ops::Range;

/// What [`block_mass`] sums over.
#[derive(Clone, Copy, Debug)]
pub struct BlockMass<'a> {
    /// Where blocks of rows begin, and the number of rows.
    pub row_bounds: &'a [usize],
    /// Keys of each block, which may overlap.
    pub blocks: &'a [Range<usize>],
    /// Every block is summed so many times, each time one key earlier.
    pub shifts: usize,
    /// Each row sees the keys before these.
    pub limits: &'a [usize],
    /// Softmax weights, or the logits as they are.
    pub weigh: bool,
    /// Whether the query heads that share a KV head are summed.
    pub shared: bool,
}

/// Sum of a row, in lanes.
#[inline(always)]
fn sum(row: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    for chunk in row.chunks(16) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x;
        }
    }
    lanes.iter().sum()
}

/// Softmax weights of the first `limit` of `logits`, padded to whole vectors with zeros; all zeros where there is none.
#[inline(always)]
fn weights_of<S: Simd>(s: S, logits: &[f32], limit: usize) -> Vec<f32> {
    let padded = logits.len().next_multiple_of(S::LANES);
    let mut seen = vec![f32::NEG_INFINITY; padded];
    seen[..limit].copy_from_slice(&logits[..limit]);
    let mut weights = vec![0f32; padded];
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in seen.chunks(16) {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    let shift = lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total = Normaliser { shift, factor: 1.0 }.weigh(s, &seen, &mut weights);
    let factor = if total > 0.0 { 1.0 / total } else { 0.0 };
    weights.iter_mut().for_each(|w| *w *= factor);
    weights
}

struct MassOfRow<'a>(BlockMass<'a>);

impl RowWork for MassOfRow<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn row<S: Simd>(&self, s: S, id: RowId, logits: &[f32]) -> Vec<f32> {
        let BlockMass { blocks, shifts, limits, weigh, .. } = self.0;
        let limit = limits[id.row].min(logits.len());
        let weighed;
        let row = if weigh {
            weighed = weights_of(s, logits, limit);
            &weighed[..logits.len()]
        } else {
            logits
        };
        let mut sums = Vec::with_capacity(blocks.len());
        for block in blocks {
            let mut total = 0.0;
            for shift in 0..shifts {
                let (start, end) = (block.start.saturating_sub(shift), block.end.saturating_sub(shift));
                total += sum(&row[start.min(row.len())..end.min(row.len())]);
            }
            sums.push(total);
        }
        sums
    }
}

/// Softmax weights of the rows of `q` over the keys `k`, summed over blocks of rows and blocks of keys, `[batch, query heads, row blocks,
/// key blocks]`, or with KV heads in place of query heads where these are summed.
pub fn block_mass(
    q: TensorView,
    k: TensorView,
    scale: f32,
    mass: BlockMass,
    execution: &Execution,
) -> Result<Vec<f32>> {
    let problem = Problem::new(q, k.into(), k.into(), Options { scale: Some(scale), ..Options::default() })?;
    check_len("limits", mass.limits.len(), problem.queries)?;
    let bounds = mass.row_bounds;
    if bounds.first() != Some(&0) || bounds.last() != Some(&problem.queries) || !bounds.is_sorted() {
        let expected = format!("bounds that rise from 0 to {}", problem.queries);
        return Err(Error::value("row_bounds", format!("{} bounds", bounds.len()), expected));
    }
    let together = if mass.shared { problem.group.max(1) } else { 1 };
    let (columns, blocks) = (mass.blocks.len(), bounds.len() - 1);
    let heads = problem.batch * problem.query_heads / together;
    let mut sums = vec![0f32; heads * blocks * columns];
    let rows = map_rows(&problem, &MassOfRow(mass), execution)?;
    let mut block_of = vec![0; problem.queries];
    for (block, rows) in bounds.windows(2).enumerate() {
        block_of[rows[0]..rows[1]].fill(block);
    }
    for (i, row) in rows.iter().enumerate() {
        let (head, block) = (i / problem.queries / together, block_of[i % problem.queries]);
        let to = &mut sums[(head * blocks + block) * columns..][..columns];
        to.iter_mut().zip(row).for_each(|(to, x)| *to += x);
    }
    Ok(sums)
}

struct WeightsOfRow<'a>(&'a Problem<'a>);

impl RowWork for WeightsOfRow<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn row<S: Simd>(&self, s: S, id: RowId, logits: &[f32]) -> Vec<f32> {
        weights_of(s, logits, self.0.visible(id.row).end)
    }
}

/// Causal softmax weights of the rows of `q`, the last ones, summed over the rows: for each key, and for each distance from the query to
/// the key; each `[batch, query heads, keys]`.
pub fn line_mass(q: TensorView, k: TensorView, scale: f32, execution: &Execution) -> Result<(Vec<f32>, Vec<f32>)> {
    let options = Options { scale: Some(scale), causal: true, ..Options::default() };
    let problem = Problem::new(q, k.into(), k.into(), options)?;
    let (rows, keys) = (problem.queries, problem.keys);
    if rows > keys {
        return Err(Error::value("q", format!("{rows} queries"), format!("at most as many as keys, {keys}")));
    }
    let heads = problem.batch * problem.query_heads;
    let (mut columns, mut diagonals) = (vec![0f32; heads * keys], vec![0f32; heads * keys]);
    for (i, weights) in map_rows(&problem, &WeightsOfRow(&problem), execution)?.iter().enumerate() {
        let (head, row) = (i / rows, i % rows);
        let seen = &weights[..keys - rows + row + 1];
        let column = &mut columns[head * keys..(head + 1) * keys];
        column.iter_mut().zip(seen).for_each(|(to, x)| *to += x);
        // From the far end: distance 0 is the last.
        let diagonal = &mut diagonals[head * keys + rows - 1 - row..(head + 1) * keys];
        diagonal.iter_mut().zip(seen).for_each(|(to, x)| *to += x);
    }
    if keys > 0 {
        diagonals.chunks_exact_mut(keys).for_each(<[f32]>::reverse);
    }
    Ok((columns, diagonals))
}
