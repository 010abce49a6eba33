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
    mut likeness: Option<&mut [f32]>,
    execution: &Execution,
) -> Result<()> {
    let [batch, heads, rows, dim] = x.shape();
    if bounds.is_empty() || !bounds.is_sorted() || bounds.last().is_some_and(|&last| last > rows) {
        return Err(Error::value("bounds", format!("{} bounds", bounds.len()), format!("bounds that rise to {rows}")));
    }
    let blocks = bounds.len() - 1;
    let lengths = [
        ("centre", centre.map(<[f32]>::len), batch * heads * dim),
        ("means", Some(means.len()), batch * heads * blocks * dim),
        ("likeness", likeness.as_deref().map(<[f32]>::len), batch * heads * blocks),
    ];
    for (name, got, expected) in lengths {
        if let Some(got) = got.filter(|&got| got != expected) {
            return Err(Error::value(name, format!("{got} numbers"), expected));
        }
    }
    if blocks == 0 {
        return Ok(());
    }
    let (isa, pieces) = (simd::current(), blocks.div_ceil(TOGETHER));
    let parts = map(execution, batch * heads * pieces, |i| {
        let (first, head) = (i % pieces * TOGETHER, i / pieces);
        let bounds = &bounds[first..=(first + TOGETHER).min(blocks)];
        let centre = centre.map(|centre| &centre[head * dim..(head + 1) * dim]);
        let wants_likeness = likeness.is_some();
        dispatch(isa, Means { x, batch: head / heads, head: head % heads, bounds, centre, wants_likeness })
    })?;
    let (mut at, mut like_at) = (0, 0);
    for (part, likes) in parts {
        means[at..at + part.len()].copy_from_slice(&part);
        at += part.len();
        if let Some(likeness) = &mut likeness {
            likeness[like_at..like_at + likes.len()].copy_from_slice(&likes);
            like_at += likes.len();
        }
    }
    Ok(())
}

/// The mean distance of each block's rows from the block's mean, in each number, `[batch, heads, blocks, dim]`; `means` are as
/// [`block_means`] makes them.
pub fn block_deviations(x: TensorView, bounds: &[usize], means: &[f32], execution: &Execution) -> Result<Vec<f32>> {
    let [batch, heads, rows, dim] = x.shape();
    if bounds.is_empty() || !bounds.is_sorted() || bounds.last().is_some_and(|&last| last > rows) {
        return Err(Error::value("bounds", format!("{} bounds", bounds.len()), format!("bounds that rise to {rows}")));
    }
    let blocks = bounds.len() - 1;
    if means.len() != batch * heads * blocks * dim {
        return Err(Error::value("means", format!("{} numbers", means.len()), batch * heads * blocks * dim));
    }
    let (isa, pieces) = (simd::current(), blocks.div_ceil(TOGETHER).max(1));
    let parts = map(execution, batch * heads * pieces, |i| {
        let (first, head) = (i % pieces * TOGETHER, i / pieces);
        let bounds = &bounds[first..=(first + TOGETHER).min(blocks)];
        let means = &means[(head * blocks + first) * dim..][..(bounds.len() - 1) * dim];
        dispatch(isa, Deviations { x, batch: head / heads, head: head % heads, bounds, means })
    })?;
    Ok(parts.concat())
}

struct Deviations<'a> {
    x: TensorView<'a>,
    batch: usize,
    head: usize,
    bounds: &'a [usize],
    means: &'a [f32],
}

impl Kernel for Deviations<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let Self { x, batch, head, bounds, means } = self;
        let dim = x.shape()[3];
        let mut deviations = vec![0f32; means.len()];
        let mut row = vec![0f32; dim.next_multiple_of(S::LANES)];
        for (b, sums) in deviations.chunks_exact_mut(dim).enumerate() {
            let mean = &means[b * dim..(b + 1) * dim];
            for j in bounds[b]..bounds[b + 1] {
                with_element!(x.dtype(), T => {
                    let from = x.row::<T>(batch, head, j);
                    // SAFETY: the row has `dim` elements, and `row` its padded length.
                    unsafe { widen_row(s, from.as_ptr(), dim, row.as_mut_ptr(), row.len()) };
                });
                for ((sum, x), m) in sums.iter_mut().zip(&row).zip(mean) {
                    *sum += (x - m).abs();
                }
            }
            let inverse = 1.0 / (bounds[b + 1] - bounds[b]).max(1) as f32;
            sums.iter_mut().for_each(|x| *x *= inverse);
        }
        deviations
    }
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
    let lists = bounds.len() - 1;
    if means.len() != batch * heads * lists * dim {
        return Err(Error::value("means", format!("{} numbers", means.len()), batch * heads * lists * dim));
    }
    if means.is_empty() {
        return Ok(());
    }
    let (isa, pieces) = (simd::current(), lists.div_ceil(TOGETHER));
    let parts = map(execution, batch * heads * pieces, |i| {
        let (first, head) = (i % pieces * TOGETHER, i / pieces);
        let bounds = &bounds[first..=(first + TOGETHER).min(lists)];
        dispatch(isa, ListedMeans { x, batch: head / heads, head: head % heads, bounds, indices })
    })?;
    for (to, part) in means.chunks_mut(lists * dim).zip(parts.chunks(pieces)) {
        to.copy_from_slice(&part.concat());
    }
    Ok(())
}

struct ListedMeans<'a> {
    x: TensorView<'a>,
    batch: usize,
    head: usize,
    bounds: &'a [usize],
    indices: &'a [u32],
}

impl Kernel for ListedMeans<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let Self { x, batch, head, bounds, indices } = self;
        let dim = x.shape()[3];
        let mut means = vec![0f32; (bounds.len() - 1) * dim];
        let mut row = vec![0f32; dim.next_multiple_of(S::LANES)];
        for (mean, list) in means.chunks_exact_mut(dim).zip(bounds.windows(2)) {
            for &j in &indices[list[0]..list[1]] {
                with_element!(x.dtype(), T => {
                    let from = x.row::<T>(batch, head, j as usize);
                    // SAFETY: the row has `dim` elements, and `row` its padded length.
                    unsafe { widen_row(s, from.as_ptr(), dim, row.as_mut_ptr(), row.len()) };
                });
                for (sum, x) in mean.iter_mut().zip(&row) {
                    *sum += x;
                }
            }
            let inverse = 1.0 / (list[1] - list[0]).max(1) as f32;
            for x in mean {
                *x *= inverse;
            }
        }
        means
    }
}

struct Means<'a> {
    x: TensorView<'a>,
    batch: usize,
    head: usize,
    bounds: &'a [usize],
    centre: Option<&'a [f32]>,
    wants_likeness: bool,
}

impl Kernel for Means<'_> {
    type Output = (Vec<f32>, Vec<f32>);

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let Self { x, batch, head, bounds, centre, wants_likeness } = self;
        let dim = x.shape()[3];
        let blocks = bounds.len() - 1;
        let (mut means, mut likeness) = (vec![0f32; blocks * dim], Vec::new());
        let mut row = vec![0f32; dim.next_multiple_of(S::LANES)];
        let mut directions = vec![0f32; dim];
        for (b, mean) in means.chunks_exact_mut(dim).enumerate() {
            let n = bounds[b + 1] - bounds[b];
            directions.fill(0.0);
            for j in bounds[b]..bounds[b + 1] {
                with_element!(x.dtype(), T => {
                    let from = x.row::<T>(batch, head, j);
                    // SAFETY: the row has `dim` elements, and `row` its padded length.
                    unsafe { widen_row(s, from.as_ptr(), dim, row.as_mut_ptr(), row.len()) };
                });
                if let Some(centre) = centre {
                    for (x, c) in row.iter_mut().zip(centre) {
                        *x -= c;
                    }
                }
                for (sum, x) in mean.iter_mut().zip(&row) {
                    *sum += x;
                }
                if wants_likeness {
                    let norm = squares(&row[..dim]).sqrt();
                    let inverse = if norm > 0.0 { 1.0 / norm } else { 0.0 };
                    for (sum, x) in directions.iter_mut().zip(&row) {
                        *sum += inverse * x;
                    }
                }
            }
            let inverse = 1.0 / n.max(1) as f32;
            for x in mean {
                *x *= inverse;
            }
            if wants_likeness {
                likeness.push(squares(&directions) * inverse * inverse);
            }
        }
        (means, likeness)
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
