//! Decode over bare codes: scores as sums of products of bytes, scales applied to scores and weights instead of to every element.
//!
//! With `k_j = offset_j + scale_j c_j` and a query `q`,
//!
//! ```text
//! q . k_j       = scale_j (q . c_j) + offset_j sum(q)
//! sum_j w_j v_j = sum_j (w_j scale_j) c_j + sum_j w_j offset_j
//! ```
//! Where the CPU multiplies bytes, `q . c_j` is an exact sum of integers, of the query rounded to 15 bits of its largest element:
//! `q = f (128 high + low)` with signed bytes `high` and `low`. Values by bytes are in `code_values.rs`.

use super::ahead::Coming;
use super::dots::rows_together;
use super::lanes::{LaneDots, Words, fill_lanes};
use super::rows::{BareRows, Rows};
use super::stream::{KEYS, MAX_QUERY_ROWS};
use crate::simd::{Kernel, LaneRows, MAX_LANES, Simd};
use crate::tensor::CODE_STEP;
use std::marker::PhantomData;
use std::ops::Range;

/// Channels of the widest rows whose sums of products of bytes fit 32 bits, whatever the bytes are.
pub(super) const fn widest(bits: usize) -> usize {
    i32::MAX as usize / (128 * ((1 << bits) - 1)) / 4 * 4
}

/// Query rows as bytes, in the order in which words of four bytes of codes of `BITS` bits meet them.
pub(super) struct ByteQueries {
    /// `[words of a row, halves (of the bytes, where codes have 4 bits)]`.
    words: Vec<Word>,
    factors: [f32; MAX_QUERY_ROWS],
    sums: [f32; MAX_QUERY_ROWS],
}

/// High and low bytes of four channels of each row.
type Word = [[[i8; 4]; 2]; MAX_QUERY_ROWS];

/// Makes [`ByteQueries`] of the rows of `queries`, `padded_dim` apart; without `bytes` their sums alone.
pub(super) struct RoundQueries<'a> {
    pub(super) queries: &'a [f32],
    pub(super) padded_dim: usize,
    pub(super) rows: usize,
    pub(super) dim: usize,
    pub(super) bits: usize,
    pub(super) bytes: bool,
}

impl Kernel for RoundQueries<'_> {
    type Output = ByteQueries;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> ByteQueries {
        let Self { queries, padded_dim, rows, dim, bits, bytes } = self;
        assert!(padded_dim.is_multiple_of(S::LANES) && rows <= MAX_QUERY_ROWS);
        let words = if bytes { dim.next_multiple_of(CODE_STEP) / 4 } else { 0 };
        let mut made = ByteQueries {
            words: vec![[[[0; 4]; 2]; MAX_QUERY_ROWS]; words],
            factors: [1.0; MAX_QUERY_ROWS],
            sums: [0.0; MAX_QUERY_ROWS],
        };
        for (r, query) in queries.chunks(padded_dim.max(1)).take(rows).enumerate() {
            let (mut sum, mut largest) = (s.zero(), s.zero());
            for x in query.chunks_exact(S::LANES) {
                // SAFETY: the chunk has LANES floats; those beyond `dim` are 0.
                let x = unsafe { s.load(x.as_ptr()) };
                sum = s.add(sum, x);
                largest = s.max(s.max(x, s.sub(s.zero(), x)), largest);
            }
            made.sums[r] = s.sum(sum);
            if !bytes {
                continue;
            }
            // A query with NaN has the sum NaN, and one with an infinity that factor: so are the scores, whatever the bytes are.
            // Of the normal numbers, so that it has an inverse.
            made.factors[r] = (s.max_lane(largest) / (127.0 * 128.0)).max(f32::MIN_POSITIVE);
            let inverse = 1.0 / made.factors[r];
            for (i, x) in query[..dim].chunks(4).enumerate() {
                // Channels 32 i + b and 32 i + 16 + b share byte 16 i + b.
                let word = if bits == 4 { i / 8 * 8 + i % 4 * 2 + i % 8 / 4 } else { i };
                let [high, low] = &mut made.words[word][r];
                for ((x, high), low) in x.iter().zip(high).zip(low) {
                    // The nearest integer is in the low bits of this sum, of which the lowest 16 would be 0.
                    let x = (x * inverse + 12_582_912.0).to_bits() as i32;
                    let part = x.wrapping_add(64) >> 7;
                    (*high, *low) = (part as i8, x.wrapping_sub(128 * (part as i8 as i32)) as i8);
                }
            }
        }
        made
    }
}

/// Scores of all rows for a block of keys, from sums of products of bytes.
pub(super) struct ByteScores<'a, K, V> {
    pub(super) queries: &'a ByteQueries,
    pub(super) rows: usize,
    pub(super) k: K,
    pub(super) keys: Range<usize>,
    pub(super) next: (V, usize),
    pub(super) words: &'a mut Words,
    pub(super) scores: &'a mut [f32],
}

impl<K: BareRows, V: Rows> Kernel for ByteScores<'_, K, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { queries, rows: n, k, keys, next, words, scores } = self;
        let bytes = k.code_bytes();
        assert!(queries.words.len() * K::BITS >= 2 * bytes && n <= MAX_QUERY_ROWS);
        assert!(keys.len() <= KEYS && scores.len() >= n * KEYS);
        let dots = ByteLanes { queries, bytes, of: PhantomData::<K> };
        let mut r = 0;
        while r < n {
            let together = rows_together::<S>(n - r);
            let next = (r == 0).then_some(next);
            let (keys, scores) = (keys.clone(), &mut scores[r * KEYS..]);
            // SAFETY: the queries are there by the assertion, whoever made this vouches for the keys.
            unsafe {
                match together {
                    1 => fill_lanes::<S, _, _, V, 1>(s, dots, k, r, keys, next, words, scores),
                    2 => fill_lanes::<S, _, _, V, 2>(s, dots, k, r, keys, next, words, scores),
                    4 => fill_lanes::<S, _, _, V, 4>(s, dots, k, r, keys, next, words, scores),
                    _ => fill_lanes::<S, _, _, V, 8>(s, dots, k, r, keys, next, words, scores),
                }
            }
            r += together;
        }
    }
}

/// Products of bytes.
#[derive(Clone, Copy)]
struct ByteLanes<'a, K> {
    queries: &'a ByteQueries,
    bytes: usize,
    of: PhantomData<K>,
}

impl<K: BareRows> LaneDots for ByteLanes<'_, K> {
    /// `scale_j f (128 high . c_j + low . c_j) + offset_j sum(q)`.
    #[inline(always)]
    unsafe fn lane_dots<S: Simd, const R: usize>(
        self,
        s: S,
        first: usize,
        rows: &LaneRows,
        coming: Coming<MAX_LANES>,
        words: &mut Words,
    ) -> [S::F32; R] {
        let Self { queries, bytes, .. } = self;
        let step = 4 * S::LANES;
        let halves = if K::BITS == 4 { 2 } else { 1 };
        let low_halves = s.splat_i32(0x0f0f_0f0f);
        let mut acc = [[s.splat_i32(0); 2]; R];
        let mut at = 0;
        while at < bytes {
            let n = (bytes - at).min(step);
            // SAFETY: the rows have `bytes` bytes, and there are queries for as many.
            unsafe {
                s.transpose_words(rows, at, n, words.0.as_mut_ptr().cast());
                let queries = queries.words.as_ptr().add(at / 4 * halves).cast::<i32>().add(2 * first);
                for t in 0..n.div_ceil(4) {
                    let x = s.load_bytes(words.0.as_ptr().cast::<u8>().add(t * step));
                    for half in 0..halves {
                        let codes = match (K::BITS, half) {
                            (4, 0) => s.and(x, low_halves),
                            (4, _) => s.and(s.shift_right_16::<4>(x), low_halves),
                            _ => x,
                        };
                        let queries = queries.add((t * halves + half) * 2 * MAX_QUERY_ROWS);
                        for (r, acc) in acc.iter_mut().enumerate() {
                            for (part, acc) in acc.iter_mut().enumerate() {
                                let q = queries.add(2 * r + part).read_unaligned();
                                *acc = s.dot4(*acc, codes, s.splat_i32(q));
                            }
                        }
                    }
                }
            }
            coming.ask(at, at + step);
            at += step;
        }
        coming.ask(at, usize::MAX);
        // SAFETY: a scale and an offset follow a row's codes.
        let [scales, offsets] = unsafe { s.load_pairs(rows, bytes) };
        let mut sums = [s.zero(); R];
        for (r, (sum, &[high, low])) in (first..).zip(sums.iter_mut().zip(&acc)) {
            let dot = s.fma(s.to_f32(high), s.splat(128.0), s.to_f32(low));
            let (scales, offsets) =
                (s.mul(scales, s.splat(queries.factors[r])), s.mul(offsets, s.splat(queries.sums[r])));
            *sum = s.fma(dot, scales, offsets);
        }
        sums
    }

    /// Rows of codes are short: while a block's keys are computed with, all of its values come, whose scales are wanted first.
    #[inline(always)]
    fn coming<V: Rows>(self, j: usize, _: &Range<usize>, next: Option<(V, usize)>) -> Coming<MAX_LANES> {
        next.map_or(Coming::none(), |(next, dim)| Coming::rows(next, dim, j))
    }
}

/// Turns floats' products with bare codes into scores.
pub(super) struct ScaleScores<'a, K> {
    pub(super) queries: &'a ByteQueries,
    pub(super) rows: usize,
    pub(super) k: K,
    pub(super) keys: Range<usize>,
    pub(super) scores: &'a mut [f32],
}

impl<K: BareRows> Kernel for ScaleScores<'_, K> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { queries, rows, k, keys, scores } = self;
        let n = keys.len();
        let mut parameters = Parameters::NONE;
        parameters.read(s, k, keys);
        let Parameters { scales, offsets } = &parameters;
        for (r, scores) in scores.chunks_exact_mut(KEYS).take(rows).enumerate() {
            let (factor, sum) = (queries.factors[r], queries.sums[r]);
            for (score, (scale, offset)) in scores[..n].iter_mut().zip(scales.iter().zip(offsets)) {
                *score = scale * factor * *score + offset * sum;
            }
        }
    }
}

/// Scales and offsets of a block's rows; the last row's stand for those after it, up to a whole vector.
pub(super) struct Parameters {
    pub(super) scales: [f32; KEYS],
    pub(super) offsets: [f32; KEYS],
}

impl Parameters {
    pub(super) const NONE: Self = Self { scales: [0.0; KEYS], offsets: [0.0; KEYS] };

    /// Reads those of the rows `keys`.
    #[inline(always)]
    pub(super) fn read<S: Simd, K: BareRows>(&mut self, s: S, rows: K, keys: Range<usize>) {
        const { assert!(KEYS.is_multiple_of(MAX_LANES)) };
        let Self { scales, offsets } = self;
        let mut lanes = LaneRows::NONE;
        let blocks = scales.chunks_exact_mut(S::LANES).zip(offsets.chunks_exact_mut(S::LANES));
        for (j, (scales, offsets)) in keys.clone().step_by(S::LANES).zip(blocks) {
            lanes.go_to::<S, K>(rows, j..keys.end);
            // SAFETY: `keys` are rows that whoever started the kernel vouched for, with a scale and an offset after their codes; both
            // chunks have LANES floats.
            unsafe {
                let [scale, offset] = s.load_pairs(&lanes, rows.code_bytes());
                s.store(scales.as_mut_ptr(), scale);
                s.store(offsets.as_mut_ptr(), offset);
            }
        }
    }
}

/// Multiplies a block's weights by the scales of the values and adds what the offsets contribute to the outputs.
pub(super) struct ScaleWeights<'a, V> {
    pub(super) weights: &'a mut [f32],
    pub(super) rows: usize,
    pub(super) v: V,
    pub(super) keys: Range<usize>,
    pub(super) outputs: &'a mut [f32],
    pub(super) padded_dim: usize,
}

impl<V: BareRows> Kernel for ScaleWeights<'_, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { weights, rows, v, keys, outputs, padded_dim } = self;
        let n = keys.len();
        let mut parameters = Parameters::NONE;
        parameters.read(s, v, keys);
        let Parameters { scales, offsets } = &parameters;
        for r in 0..rows {
            let weights = &mut weights[r * KEYS..(r + 1) * KEYS];
            // Lanes of their own, so that the loop becomes vector code.
            let mut sums = [0f32; 16];
            let parameters = scales.as_chunks::<16>().0.iter().zip(offsets.as_chunks::<16>().0);
            for (weights, (scales, offsets)) in weights[..n].chunks_mut(16).zip(parameters) {
                for (((sum, weight), scale), offset) in sums.iter_mut().zip(weights).zip(scales).zip(offsets) {
                    *sum += *weight * offset;
                    *weight *= scale;
                }
            }
            let sum: f32 = sums.iter().sum();
            outputs[r * padded_dim..(r + 1) * padded_dim].iter_mut().for_each(|x| *x += sum);
        }
    }
}
