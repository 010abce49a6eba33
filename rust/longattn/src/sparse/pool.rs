//! Means of blocks and of lists of rows, and how alike the rows of a block are.

use crate::dense::rows::widen_row;
use crate::parallel::{Execution, map};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Error, Result, TensorView, with_element};

/// Blocks of one item.
const TOGETHER: usize = 64;

/// The mean of each block of rows of `x`, block b being the rows from `bounds[b]` to `bounds[b + 1]`, into `means`, `[batch, heads,
/// blocks, dim]`; zeros for a block without rows.
///
/// With `centre`, `[batch, heads, dim]`, rows are taken less it. `likeness`, `[batch, heads, blocks]`, receives the mean cosine of all
/// pairs of a block's rows (each with itself included); rows of zeros have the cosine 0 with any.
pub fn block_means(
    x: TensorView,
    bounds: &[usize],
    centre: Option<&[f32]>,
    means: &mut [f32],
    likeness: Option<&mut [f32]>,
    execution: &Execution,
) -> Result<()> {
    let blocks = check_blocks(&x, bounds)?;
    let [batch, heads, _, dim] = x.shape();
    check_len("centre", centre.map_or(batch * heads * dim, <[f32]>::len), batch * heads * dim)?;
    check_len("means", means.len(), batch * heads * blocks * dim)?;
    if let Some(likeness) = &likeness {
        check_len("likeness", likeness.len(), batch * heads * blocks)?;
    }
    let what = if likeness.is_some() { What::MeansAndLikeness { centre } } else { What::Means { centre } };
    let (found, likes) = walk(x, bounds, None, what, execution)?;
    means.copy_from_slice(&found);
    if let Some(likeness) = likeness {
        likeness.copy_from_slice(&likes);
    }
    Ok(())
}

/// The mean distance of each block's rows from the block's mean, in each number, `[batch, heads, blocks, dim]`; `means` are as
/// [`block_means`] makes them.
pub fn block_deviations(x: TensorView, bounds: &[usize], means: &[f32], execution: &Execution) -> Result<Vec<f32>> {
    let blocks = check_blocks(&x, bounds)?;
    let [batch, heads, _, dim] = x.shape();
    check_len("means", means.len(), batch * heads * blocks * dim)?;
    Ok(walk(x, bounds, None, What::Deviations { means }, execution)?.0)
}

/// The mean of the rows of `x` in each list, `indices[bounds[b]..bounds[b + 1]]`, into `means`, `[batch, heads, lists, dim]`; zeros for
/// an empty list.
pub fn listed_means(
    x: TensorView,
    bounds: &[usize],
    indices: &[u32],
    means: &mut [f32],
    execution: &Execution,
) -> Result<()> {
    let [batch, heads, rows, dim] = x.shape();
    if bounds.first() != Some(&0) || !bounds.is_sorted() || bounds.last() != Some(&indices.len()) {
        let expected = format!("bounds that rise from 0 to {}", indices.len());
        return Err(Error::value("bounds", format!("{} bounds", bounds.len()), expected));
    }
    if let Some(row) = indices.iter().find(|&&row| row as usize >= rows) {
        return Err(Error::value("indices", row, format!("rows below {rows}")));
    }
    check_len("means", means.len(), batch * heads * (bounds.len() - 1) * dim)?;
    means.copy_from_slice(&walk(x, bounds, Some(indices), What::Means { centre: None }, execution)?.0);
    Ok(())
}

/// Number of blocks that `bounds` make of the rows of `x`.
fn check_blocks(x: &TensorView, bounds: &[usize]) -> Result<usize> {
    let rows = x.shape()[2];
    if bounds.is_empty() || !bounds.is_sorted() || bounds.last().is_some_and(|&last| last > rows) {
        return Err(Error::value("bounds", format!("{} bounds", bounds.len()), format!("bounds that rise to {rows}")));
    }
    Ok(bounds.len() - 1)
}

fn check_len(name: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::value(name, format!("{got} numbers"), expected)) }
}

/// What is found out about the rows of a block; numbers of all heads.
#[derive(Clone, Copy)]
enum What<'a> {
    /// Their mean, less the head's centre.
    Means { centre: Option<&'a [f32]> },
    /// Their mean cosine, too.
    MeansAndLikeness { centre: Option<&'a [f32]> },
    /// Their mean distance from the block's mean.
    Deviations { means: &'a [f32] },
}

/// Goes through the rows of every block, or with `indices` through the rows that these name: `[batch, heads, blocks, dim]` numbers, and
/// the likeness of each block's rows where it is asked for.
fn walk(
    x: TensorView,
    bounds: &[usize],
    indices: Option<&[u32]>,
    what: What,
    execution: &Execution,
) -> Result<(Vec<f32>, Vec<f32>)> {
    let [batch, heads, _, dim] = x.shape();
    let blocks = bounds.len() - 1;
    let (isa, pieces) = (simd::current(), blocks.div_ceil(TOGETHER));
    let parts = map(execution, batch * heads * pieces, |i| {
        let (first, head) = (i % pieces * TOGETHER, i / pieces);
        let bounds = &bounds[first..=(first + TOGETHER).min(blocks)];
        let centre = |centre: Option<&'_ [f32]>| centre.map(|centre| centre[head * dim..(head + 1) * dim].to_vec());
        let (centre, likeness, means) = match what {
            What::Means { centre: of_heads } => (centre(of_heads), false, None),
            What::MeansAndLikeness { centre: of_heads } => (centre(of_heads), true, None),
            What::Deviations { means } => {
                (None, false, Some(&means[(head * blocks + first) * dim..][..(bounds.len() - 1) * dim]))
            }
        };
        let (batch, head, centre) = (head / heads, head % heads, centre.as_deref());
        dispatch(isa, Blocks { x, batch, head, bounds, indices, centre, likeness, means })
    })?;
    let (numbers, likes): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    Ok((numbers.concat(), likes.concat()))
}

/// Some blocks of a head.
struct Blocks<'a> {
    x: TensorView<'a>,
    batch: usize,
    head: usize,
    bounds: &'a [usize],
    indices: Option<&'a [u32]>,
    /// Taken off each row.
    centre: Option<&'a [f32]>,
    likeness: bool,
    /// Of the blocks: distances from them are summed instead of rows.
    means: Option<&'a [f32]>,
}

impl Kernel for Blocks<'_> {
    type Output = (Vec<f32>, Vec<f32>);

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let Self { x, batch, head, bounds, indices, centre, likeness, means } = self;
        let dim = x.shape()[3];
        let (mut found, mut likes) = (vec![0f32; (bounds.len() - 1) * dim], Vec::new());
        let mut row = vec![0f32; dim.next_multiple_of(S::LANES)];
        let mut directions = vec![0f32; dim];
        for (b, sums) in found.chunks_exact_mut(dim).enumerate() {
            directions.fill(0.0);
            for j in bounds[b]..bounds[b + 1] {
                let j = indices.map_or(j, |indices| indices[j] as usize);
                with_element!(x.dtype(), T => {
                    let from = x.row::<T>(batch, head, j);
                    // SAFETY: the row has `dim` elements, and `row` its padded length.
                    unsafe { widen_row(s, from.as_ptr(), dim, row.as_mut_ptr(), row.len()) };
                });
                if let Some(means) = means {
                    for ((sum, x), m) in sums.iter_mut().zip(&row).zip(&means[b * dim..(b + 1) * dim]) {
                        *sum += (x - m).abs();
                    }
                    continue;
                }
                if let Some(centre) = centre {
                    for (x, c) in row.iter_mut().zip(centre) {
                        *x -= c;
                    }
                }
                for (sum, x) in sums.iter_mut().zip(&row) {
                    *sum += x;
                }
                if likeness {
                    let norm = squares(&row[..dim]).sqrt();
                    let inverse = if norm > 0.0 { 1.0 / norm } else { 0.0 };
                    for (sum, x) in directions.iter_mut().zip(&row) {
                        *sum += inverse * x;
                    }
                }
            }
            let inverse = 1.0 / (bounds[b + 1] - bounds[b]).max(1) as f32;
            sums.iter_mut().for_each(|x| *x *= inverse);
            if likeness {
                likes.push(squares(&directions) * inverse * inverse);
            }
        }
        (found, likes)
    }
}

/// Sum of squares.
#[inline(always)]
fn squares(row: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    for chunk in row.chunks(16) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x * x;
        }
    }
    lanes.iter().sum()
}
