//! Rows in the order of their hashes, and lists of what stands side by side in it.

use super::scan::Selection;
use crate::dense::matrix::{self, PackedMatrix};
use crate::dense::rows::numbers;
use crate::dense::scratch::Buffer;
use crate::parallel::{Execution, map};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{DType, Error, KvView, Result, TensorView};

/// How hashes, whose bits are the signs of projections, are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HashOrder {
    /// By the inverse Gray code: neighbours differ in one bit.
    InverseGray,
    /// By the Gray code.
    Gray,
}

impl HashOrder {
    /// Rank of a hash.
    pub fn rank(self, hash: u32) -> u32 {
        match self {
            Self::Gray => hash ^ (hash >> 1),
            Self::InverseGray => {
                let mut rank = hash;
                for shift in [1, 2, 4, 8] {
                    rank ^= rank >> shift;
                }
                rank
            }
        }
    }
}

/// The most bits of a hash.
pub const MAX_BITS: usize = 16;

/// The rows of each head of `x` in the order of their hashes, equal ones in their own, `[batch, heads, length]`. Bit t of a hash is set
/// where the product with `directions[t]`, of `[bits, dim]`, is positive.
pub fn hash_order(x: TensorView, directions: &[f32], order: HashOrder, execution: &Execution) -> Result<Vec<u32>> {
    let [batch, heads, length, dim] = x.shape();
    let bits = directions.len() / dim.max(1);
    if dim == 0 || directions.len() != bits * dim || bits == 0 || bits > MAX_BITS {
        let expected = format!("1 to {MAX_BITS} rows of {dim}");
        return Err(Error::value("directions", format!("{} numbers", directions.len()), expected));
    }
    let isa = simd::current();
    let parts = map(execution, batch * heads, |i| {
        let hashes = dispatch(isa, Hashes { x, batch: i / heads, head: i % heads, directions, bits });
        let mut starts = vec![0u32; (1 << bits) + 1];
        let rank = |hash: u16| order.rank(u32::from(hash)) as usize & ((1 << bits) - 1);
        hashes.iter().for_each(|&hash| starts[rank(hash) + 1] += 1);
        for r in 1..starts.len() {
            starts[r] += starts[r - 1];
        }
        let mut sorted = vec![0u32; length];
        for (row, &hash) in (0u32..).zip(&hashes) {
            let place = &mut starts[rank(hash)];
            sorted[*place as usize] = row;
            *place += 1;
        }
        sorted
    })?;
    Ok(parts.concat())
}

struct Hashes<'a> {
    x: TensorView<'a>,
    batch: usize,
    head: usize,
    directions: &'a [f32],
    bits: usize,
}

impl Kernel for Hashes<'_> {
    type Output = Vec<u16>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<u16> {
        let Self { x, batch, head, directions, bits } = self;
        let [_, _, length, dim] = x.shape();
        let mut matrix = PackedMatrix::new(s, directions, bits, dim);
        let (stride, mut products) = (matrix.stride::<S>(), vec![0f32; matrix.result_len::<S>()]);
        let (mut wide, mut hashes) = (Buffer::default(), Vec::with_capacity(length));
        let view = KvView::from(x);
        for first in (0..length).step_by(matrix::ROWS) {
            let count = matrix::ROWS.min(length - first);
            macro_rules! apply {
                ($t:ty) => {{
                    let rows = numbers::<$t>(&view, batch, head);
                    // SAFETY: the rows exist and have `dim` elements.
                    unsafe { matrix.apply(s, rows, first, count, None, &mut wide, &mut products) }
                }};
            }
            match x.dtype() {
                DType::F32 => apply!(f32),
                DType::F16 => apply!(half::f16),
                DType::BF16 => apply!(half::bf16),
            }
            for row in products.chunks_exact(stride).take(count) {
                hashes.push(row[..bits].iter().enumerate().fold(0, |hash, (t, &x)| hash | u16::from(x > 0.0) << t));
            }
        }
        hashes
    }
}

/// What [`hash_lists`] makes lists of.
#[derive(Clone, Copy, Debug)]
pub struct HashLists<'a> {
    /// Keys in the order of their hashes, `[heads, keys]`.
    pub order: &'a [u32],
    /// Number of heads, batches included.
    pub heads: usize,
    /// Keys of a block.
    pub block: usize,
    /// Sampled keys, `[heads, samples]`, with repetitions.
    pub samples: &'a [u32],
    /// Whether the keys of the own block are listed.
    pub own: bool,
}

/// For each head and block of keys in hash order the keys of the block, and the sampled keys that are not in it; lists are `[heads,
/// blocks]`. With them come logs of weights: 0 in the block, `ln(count * keys / samples)` for a key sampled `count` times.
pub fn hash_lists(lists: HashLists, execution: &Execution) -> Result<(Selection, Vec<f32>)> {
    let HashLists { order, heads, block, samples, own } = lists;
    let (keys, sampled) = (order.len() / heads.max(1), samples.len() / heads.max(1));
    let whole = order.len() == heads * keys && samples.len() == heads * sampled;
    if heads == 0 || block == 0 || !whole || order.iter().chain(samples).any(|&j| j as usize >= keys) {
        return Err(Error::value("order", format!("{} numbers", order.len()), format!("keys of {heads} heads")));
    }
    let blocks = keys.div_ceil(block);
    let parts = map(execution, heads, |head| {
        let order = &order[head * keys..(head + 1) * keys];
        let mut block_of = vec![0u32; keys];
        for (place, &j) in order.iter().enumerate() {
            block_of[j as usize] = (place / block) as u32;
        }
        let mut drawn = samples[head * sampled..(head + 1) * sampled].to_vec();
        drawn.sort_unstable();
        let drawn: Vec<(u32, f32)> = drawn
            .chunk_by(|a, b| a == b)
            .map(|same| (same[0], (same.len() as f64 * keys as f64 / sampled as f64).ln() as f32))
            .collect();
        (0..blocks)
            .map(|b| {
                let inside = if own { &order[b * block..((b + 1) * block).min(keys)] } else { &[] };
                let outside = drawn.iter().filter(|&&(j, _)| block_of[j as usize] != b as u32).copied();
                let mut list: Vec<(u32, f32)> = inside.iter().map(|&j| (j, 0.0)).chain(outside).collect();
                list.sort_unstable_by_key(|&(j, _)| j);
                list
            })
            .collect::<Vec<_>>()
    })?;
    let all = || parts.iter().flatten();
    let bias = all().flatten().map(|&(_, weight)| weight).collect();
    Ok((all().map(|list| list.iter().map(|&(j, _)| j).collect::<Vec<u32>>()).collect(), bias))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_of_the_inverse_gray_order_differ_in_one_bit() {
        for bits in 1..=MAX_BITS {
            let mut hashes: Vec<u32> = (0..1 << bits).collect();
            hashes.sort_by_key(|&hash| HashOrder::InverseGray.rank(hash));
            assert!(hashes.windows(2).all(|pair| (pair[0] ^ pair[1]).count_ones() == 1));
        }
    }
}
