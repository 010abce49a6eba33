//! Scores of product codes: tables of a query group's products with the centroids, and looking them up.

use super::BLOCK;
use crate::simd::{Kernel, Simd};

/// Query heads that are looked up together where codes have 8 bits.
const MAX_TOGETHER: usize = 8;

/// The tables of a query group.
pub(crate) struct Tables {
    /// Products of each query with the head's centre.
    pub(super) bases: Vec<f32>,
    pub(super) entries: Entries,
    /// Standard deviations of the scores' errors.
    pub(super) errors: Vec<f32>,
}

pub(crate) enum Entries {
    /// `[queries, subvectors, 64]` bytes, the 16 of a table four times; what a unit of their sums is worth.
    Bytes { tables: Vec<u8>, steps: Vec<f32> },
    /// `[slabs, subvectors, 256, together]`.
    Floats { tables: Vec<f32>, together: usize },
}

impl Entries {
    /// Tables of `centroids` entries rounded to bytes; what all entries of one are more than 0 by goes to the queries' `bases`.
    pub(super) fn rounded(tables: &[Vec<f32>], bases: &mut [f32], centroids: usize) -> Self {
        let (mut bytes, mut steps) = (Vec::new(), Vec::new());
        for (table, base) in tables.iter().zip(bases) {
            let ends: Vec<(f32, f32)> = table
                .chunks_exact(centroids)
                .map(|t| t.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), &x| (a.min(x), b.max(x))))
                .collect();
            let widest = ends.iter().fold(0f32, |a, (low, high)| a.max(high - low));
            let step = if widest > 0.0 { widest / 255.0 } else { 1.0 };
            for (t, (low, _)) in table.chunks_exact(centroids).zip(&ends) {
                *base += low;
                let rounded: Vec<u8> = t.iter().map(|x| ((x - low) / step).round() as u8).collect();
                (0..BLOCK / centroids).for_each(|_| bytes.extend_from_slice(&rounded));
            }
            steps.push(step);
        }
        Self::Bytes { tables: bytes, steps }
    }

    /// Tables of floats, those of some queries side by side.
    pub(super) fn interleaved(tables: &[Vec<f32>]) -> Self {
        let together = tables.len().next_power_of_two().min(MAX_TOGETHER);
        let size = tables.first().map_or(0, Vec::len) * together;
        let mut slabs = vec![0f32; tables.len().div_ceil(together) * size];
        for (g, table) in tables.iter().enumerate() {
            let slab = &mut slabs[g / together * size..];
            table.iter().enumerate().for_each(|(i, &x)| slab[i * together + g % together] = x);
        }
        Self::Floats { tables: slabs, together }
    }
}

/// Scores of every key of some blocks: `[queries, stride]`, the last row as long as the blocks need.
pub(super) struct Scan<'a> {
    pub(super) codes: &'a [u8],
    pub(super) m: usize,
    pub(super) block_bytes: usize,
    pub(super) tables: &'a Tables,
    pub(super) scores: &'a mut [f32],
    pub(super) stride: usize,
}

impl Kernel for Scan<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { codes, m, block_bytes, tables: Tables { bases, entries, .. }, scores, stride } = self;
        let (blocks, group) = (codes.len() / block_bytes, bases.len());
        assert!(blocks * BLOCK <= stride && codes.len() == blocks * block_bytes);
        assert!(scores.len() >= group.saturating_sub(1) * stride + blocks * BLOCK);
        match entries {
            Entries::Bytes { tables, steps } => {
                assert!(tables.len() == group * m * BLOCK && block_bytes == m.div_ceil(2) * BLOCK);
                for (b, block) in codes.chunks_exact(block_bytes).enumerate() {
                    let mut g = 0;
                    while g < group {
                        let together = if group - g >= 4 { 4 } else { 1 };
                        let tables = &tables[g * m * BLOCK..];
                        let (bases, steps) = (&bases[g..], &steps[g..]);
                        let scores = &mut scores[g * stride + b * BLOCK..];
                        if together == 4 {
                            look_up::<S, 4>(s, block, m, tables, bases, steps, scores, stride);
                        } else {
                            look_up::<S, 1>(s, block, m, tables, bases, steps, scores, stride);
                        }
                        g += together;
                    }
                }
            }
            Entries::Floats { tables, together } => {
                let slab = m * 256 * together;
                for (first, table) in (0..group).step_by(*together).zip(tables.chunks_exact(slab)) {
                    let bases = &bases[first..(first + together).min(group)];
                    let scores = &mut scores[first * stride..];
                    match together {
                        1 => gather::<1>(codes, block_bytes, table, bases, scores, stride),
                        2 => gather::<2>(codes, block_bytes, table, bases, scores, stride),
                        4 => gather::<4>(codes, block_bytes, table, bases, scores, stride),
                        _ => gather::<MAX_TOGETHER>(codes, block_bytes, table, bases, scores, stride),
                    }
                }
            }
        }
    }
}

/// Scores of a block of 4-bit codes for `G` queries.
#[inline(always)]
fn look_up<S: Simd, const G: usize>(
    s: S,
    block: &[u8],
    m: usize,
    tables: &[u8],
    bases: &[f32],
    steps: &[f32],
    scores: &mut [f32],
    stride: usize,
) {
    assert!(block.len() == m.div_ceil(2) * BLOCK && tables.len() >= G * m * BLOCK && bases.len() >= G);
    assert!(steps.len() >= G && scores.len() >= (G - 1) * stride + BLOCK);
    let nibble = s.splat_i32(0x0f0f_0f0f);
    let even_bytes = s.splat_i32(0x00ff_00ff);
    let (low_half, high_half) = (s.splat_i32(0xffff), s.splat_i32(0xffff_0000_u32 as i32));
    for part in (0..BLOCK).step_by(4 * S::LANES) {
        // Sums of the even and of the odd bytes, 16 bits each.
        let mut even = [s.splat_i32(0); G];
        let mut odd = [s.splat_i32(0); G];
        for pair in 0..m.div_ceil(2) {
            // SAFETY: the block has 64 bytes for each pair of subvectors, each query's tables 64 for each subvector; the last pair
            // has no second one where their number is odd.
            unsafe {
                let codes = s.load_bytes(block.as_ptr().add(pair * BLOCK + part));
                let first = s.and(codes, nibble);
                for g in 0..G {
                    let found = s.lookup16(s.load_bytes(tables.as_ptr().add((g * m + 2 * pair) * BLOCK)), first);
                    even[g] = s.add_16(even[g], s.and(found, even_bytes));
                    odd[g] = s.add_16(odd[g], s.shift_right_16::<8>(found));
                }
                if 2 * pair + 1 < m {
                    let second = s.and(s.shift_right_16::<4>(codes), nibble);
                    for g in 0..G {
                        let table = s.load_bytes(tables.as_ptr().add((g * m + 2 * pair + 1) * BLOCK));
                        let found = s.lookup16(table, second);
                        even[g] = s.add_16(even[g], s.and(found, even_bytes));
                        odd[g] = s.add_16(odd[g], s.shift_right_16::<8>(found));
                    }
                }
            }
        }
        for g in 0..G {
            let (base, step) = (s.splat(bases[g]), s.splat(steps[g]));
            // A sum in the upper half of a lane counts 2^16 times; it has no sign, as sums stay below 2^15.
            let high_step = s.splat(steps[g] / 65536.0);
            let to = scores[g * stride + part / 4..].as_mut_ptr();
            // SAFETY: 64 scores of each query were asserted; the lanes of byte t of each are the keys from 16 t on.
            unsafe {
                s.store(to, s.fma(s.to_f32(s.and(even[g], low_half)), step, base));
                s.store(to.add(16), s.fma(s.to_f32(s.and(odd[g], low_half)), step, base));
                s.store(to.add(32), s.fma(s.to_f32(s.and(even[g], high_half)), high_step, base));
                s.store(to.add(48), s.fma(s.to_f32(s.and(odd[g], high_half)), high_step, base));
            }
        }
    }
}

/// Scores of 8-bit codes for at most `G` queries, whose tables lie interleaved.
#[inline(always)]
fn gather<const G: usize>(
    codes: &[u8],
    block_bytes: usize,
    table: &[f32],
    bases: &[f32],
    scores: &mut [f32],
    stride: usize,
) {
    let (entries, _) = table.as_chunks::<G>();
    for (b, block) in codes.chunks_exact(block_bytes).enumerate() {
        let mut sums = [[0f32; G]; BLOCK];
        for (codes, entries) in block.chunks_exact(BLOCK).zip(entries.chunks_exact(256)) {
            for (sum, &code) in sums.iter_mut().zip(codes) {
                let entry = &entries[usize::from(code)];
                for g in 0..G {
                    sum[g] += entry[g];
                }
            }
        }
        for (g, base) in bases.iter().enumerate() {
            let to = &mut scores[g * stride + b * BLOCK..][..BLOCK];
            to.iter_mut().zip(&sums).for_each(|(to, sum)| *to = base + sum[g]);
        }
    }
}
