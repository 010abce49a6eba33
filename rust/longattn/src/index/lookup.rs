//! Sums of table entries: a code is some bytes per key, a query a table for each of them, a score the sum of the entries looked up.
//!
//! ```text
//! block of 64 keys:  `columns` groups of 64 bytes;  byte 2 i + h of a group belongs to key i + 32 h
//! ```
//! so that the even bytes of a vector are neighbouring keys, and its odd bytes too: sums of 16 bits come out in order.

use crate::parallel::{Execution, for_each};
use crate::simd::{Isa, Kernel, Simd, dispatch};
use std::ops::Range;
use std::sync::Mutex;

/// Keys per block, whatever the instruction set.
pub(crate) const BLOCK: usize = 64;

/// Keys that one item scans, a multiple of [`BLOCK`].
const CHUNK: usize = 16 * 1024;

/// Vectors that share the loads of a table.
const VECTORS: usize = 4;

/// Entries of a table that is looked up by each half of a byte: 16 for the low half, 16 for the high one, which are added.
pub(crate) const HALVES: usize = 32;

/// Entries of a table that is looked up by whole bytes.
pub(crate) const WHOLE: usize = 256;

/// Where the byte of a key and column lies.
#[inline(always)]
pub(crate) fn at(columns: usize, key: usize, column: usize) -> usize {
    let (block, key) = (key / BLOCK, key % BLOCK);
    (block * columns + column) * BLOCK + 2 * (key % (BLOCK / 2)) + key / (BLOCK / 2)
}

/// Tables of a query: `ENTRIES` is [`HALVES`] or [`WHOLE`].
pub(crate) struct Tables<const ENTRIES: usize> {
    terms: Vec<Term<ENTRIES>>,
    /// Terms whose sums fit a byte, one run after another.
    runs: Vec<Range<usize>>,
    largest: usize,
}

struct Term<const ENTRIES: usize> {
    column: usize,
    table: [u8; ENTRIES],
}

impl<const ENTRIES: usize> Tables<ENTRIES> {
    /// Tables by column; a column may have several. No sum may exceed `u16::MAX`, and no sum of two halves a byte.
    pub(crate) fn new(terms: impl IntoIterator<Item = (usize, [u8; ENTRIES])>) -> Self {
        let terms: Vec<_> = terms.into_iter().map(|(column, table)| Term { column, table }).collect();
        let (mut runs, mut first, mut sum, mut largest) = (Vec::new(), 0, 0, 0);
        for (i, term) in terms.iter().enumerate() {
            let max = |entries: &[u8]| usize::from(entries.iter().copied().max().unwrap_or(0));
            let most =
                if ENTRIES == HALVES { max(&term.table[..16]) + max(&term.table[16..]) } else { max(&term.table) };
            assert!(most <= 255);
            if sum + most > 255 {
                runs.push(first..i);
                (first, sum) = (i, 0);
            }
            sum += most;
            largest += most;
        }
        runs.push(first..terms.len());
        assert!(largest <= usize::from(u16::MAX));
        Self { terms, runs, largest }
    }

    /// No sum is larger.
    pub(crate) fn largest(&self) -> usize {
        self.largest
    }
}

/// Sums of every key of `codes`, whole blocks.
struct Sum<'a, const ENTRIES: usize> {
    tables: &'a Tables<ENTRIES>,
    columns: usize,
    codes: &'a [u8],
    sums: &'a mut [u16],
}

impl<const ENTRIES: usize> Kernel for Sum<'_, ENTRIES> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        struct Inner<'a, const ENTRIES: usize>(Sum<'a, ENTRIES>);
        impl<const ENTRIES: usize> Kernel for Inner<'_, ENTRIES> {
            type Output = ();
            #[inline(always)]
            fn run<S: Simd>(self, s: S) {
                self.0.blocks(s);
            }
        }
        if ENTRIES == WHOLE { s.call_tables(Inner(self)) } else { self.blocks(s) }
    }
}

impl<const ENTRIES: usize> Sum<'_, ENTRIES> {
    #[inline(always)]
    fn blocks<S: Simd>(self, s: S) {
        let Self { tables, columns, codes, sums } = self;
        let blocks = sums.len() / BLOCK;
        assert!(sums.len() == blocks * BLOCK && codes.len() == blocks * columns * BLOCK);
        assert!(tables.terms.iter().all(|term| term.column < columns));
        let (codes, sums) = (codes.as_ptr(), sums.as_mut_ptr());
        let mut b = 0;
        // SAFETY: the blocks of each call lie inside what was checked above.
        unsafe {
            while b + VECTORS <= blocks {
                tables.add_up::<S, VECTORS>(s, columns, codes.add(b * columns * BLOCK), sums.add(b * BLOCK));
                b += VECTORS;
            }
            while b < blocks {
                tables.add_up::<S, 1>(s, columns, codes.add(b * columns * BLOCK), sums.add(b * BLOCK));
                b += 1;
            }
        }
    }
}

impl<const ENTRIES: usize> Tables<ENTRIES> {
    /// Sums of `N` blocks.
    ///
    /// # Safety
    /// `codes` has `N` blocks of more columns than any term names, `sums` room for their keys.
    #[inline(always)]
    unsafe fn add_up<S: Simd, const N: usize>(&self, s: S, columns: usize, codes: *const u8, sums: *mut u16) {
        let (bytes, half) = (s.splat_i32(0x00ff_00ff), s.splat_i32(0x0f0f_0f0f));
        let width = 4 * S::LANES;
        for part in (0..BLOCK).step_by(width) {
            let (mut even, mut odd) = ([s.splat_i32(0); N], [s.splat_i32(0); N]);
            for run in &self.runs {
                let mut sum = [s.splat_i32(0); N];
                for term in &self.terms[run.start..run.end] {
                    let mut x = [s.splat_i32(0); N];
                    // SAFETY: the caller's promise; a table has ENTRIES bytes.
                    unsafe {
                        for (n, x) in x.iter_mut().enumerate() {
                            *x = s.load_bytes(codes.add((n * columns + term.column) * BLOCK + part));
                        }
                        if ENTRIES == WHOLE {
                            let found = s.lookup256(term.table.as_ptr(), x);
                            for n in 0..N {
                                sum[n] = s.add_i32(sum[n], found[n]);
                            }
                        } else {
                            let low = s.load_table16(term.table.as_ptr());
                            let high = s.load_table16(term.table.as_ptr().add(16));
                            for n in 0..N {
                                sum[n] = s.add_i32(sum[n], s.lookup16(low, s.and(x[n], half)));
                                let x = s.and(s.shift_right_16::<4>(x[n]), half);
                                sum[n] = s.add_i32(sum[n], s.lookup16(high, x));
                            }
                        }
                    }
                }
                for n in 0..N {
                    even[n] = s.add_i32(even[n], s.and(sum[n], bytes));
                    odd[n] = s.add_i32(odd[n], s.and(s.shift_right_16::<8>(sum[n]), bytes));
                }
            }
            for n in 0..N {
                // SAFETY: half a vector's keys from each half of the block.
                unsafe {
                    let to = sums.add(n * BLOCK + part / 2);
                    s.store_bytes(to.cast(), even[n]);
                    s.store_bytes(to.add(BLOCK / 2).cast(), odd[n]);
                }
            }
        }
    }
}

/// Sums of the keys of some blocks, in chunks that threads share.
pub(crate) fn sums<const ENTRIES: usize>(
    isa: Isa,
    tables: &Tables<ENTRIES>,
    columns: usize,
    codes: &[u8],
    parallel: Option<&Execution>,
) -> Vec<u16> {
    let mut sums = vec![0u16; codes.len() / columns];
    let parts: Vec<_> = sums.chunks_mut(CHUNK).zip(codes.chunks(CHUNK * columns)).map(Mutex::new).collect();
    let work = |i: usize| {
        let mut part = parts[i].lock().unwrap_or_else(|e| e.into_inner());
        let (sums, codes) = &mut *part;
        dispatch(isa, Sum { tables, columns, codes, sums });
    };
    match parallel {
        // A cancelled call's results are never seen.
        Some(execution) => drop(for_each(execution, parts.len(), work)),
        None => (0..parts.len()).for_each(work),
    }
    drop(parts);
    sums
}

/// The indices inside `range` of the `k` largest sums, ascending; ties go to the lower index. No sum exceeds `largest`.
pub(crate) fn largest(isa: Isa, sums: &[u16], range: Range<usize>, k: usize, largest: usize) -> Vec<u32> {
    if k >= range.len() {
        return (range.start as u32..range.end as u32).collect();
    }
    // Neighbours often share a count, and would wait for each other in one histogram.
    let mut counts = vec![[0u32; 4]; largest + 1];
    let (fours, rest) = sums[range.clone()].as_chunks::<4>();
    for four in fours {
        for (i, &sum) in four.iter().enumerate() {
            counts[usize::from(sum)][i] += 1;
        }
    }
    for &sum in rest {
        counts[usize::from(sum)][0] += 1;
    }
    let (mut threshold, mut above) = (largest, 0);
    loop {
        let here = counts[threshold].iter().map(|&n| n as usize).sum::<usize>();
        if above + here >= k {
            break;
        }
        above += here;
        threshold -= 1;
    }
    dispatch(isa, Collect { sums, range, threshold: threshold as u16, ties: k - above, k })
}

/// Indices of the sums above a threshold, and of the first `ties` at it.
struct Collect<'a> {
    sums: &'a [u16],
    range: Range<usize>,
    threshold: u16,
    ties: usize,
    k: usize,
}

impl Kernel for Collect<'_> {
    type Output = Vec<u32>;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Vec<u32> {
        const STEP: usize = 64;
        let Self { sums, range, threshold, mut ties, k } = self;
        let mut picked = Vec::with_capacity(k);
        for (c, chunk) in sums[range.clone()].chunks(STEP).enumerate() {
            // Most chunks hold nothing.
            let mut most = 0;
            for &sum in chunk {
                most = if sum > most { sum } else { most };
            }
            if most < threshold {
                continue;
            }
            for (i, &sum) in chunk.iter().enumerate() {
                if sum > threshold || (sum == threshold && ties > 0) {
                    ties -= usize::from(sum == threshold);
                    picked.push((range.start + c * STEP + i) as u32);
                }
            }
        }
        picked
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Random;

    fn expected<const E: usize>(terms: &[(usize, [u8; E])], columns: usize, codes: &[u8], key: usize) -> u16 {
        let entry = |column: usize, table: &[u8; E]| {
            let byte = usize::from(codes[at(columns, key, column)]);
            let entry = |i: usize| u16::from(table[i]);
            if E == HALVES { entry(byte & 15) + entry(16 + (byte >> 4)) } else { entry(byte) }
        };
        terms.iter().map(|(column, table)| entry(*column, table)).sum()
    }

    fn check<const E: usize>(columns: usize, blocks: usize, most: usize, terms: usize) {
        let mut random = Random::new(3);
        let codes: Vec<u8> = (0..columns * blocks * BLOCK).map(|_| random.next_u64() as u8).collect();
        let terms: Vec<(usize, [u8; E])> = (0..terms)
            .map(|_| (random.below(columns), std::array::from_fn(|_| random.below(most + 1) as u8)))
            .collect();
        let tables = Tables::new(terms.iter().copied());
        for isa in Isa::available() {
            let found = sums(isa, &tables, columns, &codes, None);
            assert_eq!(found.len(), blocks * BLOCK);
            for (key, &sum) in found.iter().enumerate() {
                assert_eq!(sum, expected(&terms, columns, &codes, key), "{} key {key}", isa.name());
                assert!(usize::from(sum) <= tables.largest());
            }
        }
    }

    #[test]
    fn sums_of_entries() {
        for blocks in [0, 1, 3, 4, 9] {
            check::<HALVES>(5, blocks, 127, 12);
            check::<HALVES>(16, blocks, 16, 16);
            check::<WHOLE>(5, blocks, 255, 12);
            check::<WHOLE>(16, blocks, 6, 16);
        }
        check::<WHOLE>(1, 2, 6, 0);
    }

    #[test]
    fn every_key_has_its_own_byte() {
        let mut seen: Vec<usize> = (0..3 * BLOCK).flat_map(|key| (0..5).map(move |c| at(5, key, c))).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..15 * BLOCK).collect::<Vec<_>>());
    }

    #[test]
    fn largest_is_a_stable_sort() {
        let mut random = Random::new(4);
        for n in [1, 63, 64, 1000, 5000] {
            let sums: Vec<u16> = (0..n).map(|_| random.below(50) as u16 * 3).collect();
            for range in [0..n, n / 3..n, n / 4..n - n / 5] {
                let mut order: Vec<u32> = (range.start as u32..range.end as u32).collect();
                order.sort_by_key(|&i| (std::cmp::Reverse(sums[i as usize]), i));
                for k in [0, 1, 2, n / 7, n / 2, n - 1, n + 3] {
                    let mut expected = order[..k.min(range.len())].to_vec();
                    expected.sort_unstable();
                    for isa in Isa::available() {
                        assert_eq!(largest(isa, &sums, range.clone(), k, 150), expected, "n {n} k {k} {range:?}");
                    }
                }
            }
        }
    }
}
