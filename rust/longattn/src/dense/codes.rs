//! Decode over bare codes: scores as sums of products of bytes, scales applied to scores and weights instead of to every element.
//!
//! With `k_j = offset_j + scale_j c_j` and a query `q`,
//!
//! ```text
//! q . k_j       = scale_j (q . c_j) + offset_j sum(q)
//! sum_j w_j v_j = sum_j (w_j scale_j) c_j + sum_j w_j offset_j
//! ```
//! Where the CPU multiplies bytes, `q . c_j` is an exact sum of integers, of the query rounded to 15 bits of its largest element:
//! `q = f (128 high + low)` with signed bytes `high` and `low`.

use super::rows::{BareRows, Rows};
use super::stream::{Coming, Dots, KEYS, MAX_QUERY_ROWS, fill_scores};
use crate::simd::{Kernel, Simd};
use std::ops::Range;

/// Bytes that one vector of bytes has at most: queries are padded to a multiple of it.
const CHUNK: usize = 64;

/// Channels of the widest rows whose sums of products of bytes fit the 32 bits of one of `lanes`, whatever the bytes are.
pub(super) const fn widest(lanes: usize, bits: usize) -> usize {
    // Four channels go to a lane at a time.
    i32::MAX as usize / (128 * 128 * ((1 << bits) - 1)) / 4 * 4 * lanes
}

/// Query rows as bytes, in the order in which the codes of `BITS` bits lie.
pub(super) struct ByteQueries {
    /// `[rows, 2 (high, low), bytes]`.
    bytes: Vec<i8>,
    /// Bytes of one part of a row.
    stride: usize,
    factors: [f32; MAX_QUERY_ROWS],
    sums: [f32; MAX_QUERY_ROWS],
}

impl ByteQueries {
    /// The rows of `queries`, `padded_dim` apart, for rows of keys with `code_bytes` bytes.
    pub(super) fn new(queries: &[f32], padded_dim: usize, rows: usize, dim: usize, bits: usize, bytes: bool) -> Self {
        // A vector of 4-bit codes is one vector of low halves and one of high halves.
        let stride = if bits == 4 { 2 * dim.div_ceil(128) * CHUNK } else { dim.next_multiple_of(CHUNK) };
        let mut made = Self {
            bytes: vec![0; if bytes { 2 * stride * rows } else { 0 }],
            stride,
            factors: [1.0; MAX_QUERY_ROWS],
            sums: [0.0; MAX_QUERY_ROWS],
        };
        for (r, query) in queries.chunks(padded_dim.max(1)).take(rows).enumerate() {
            let query = &query[..dim];
            made.sums[r] = query.iter().sum();
            if !bytes {
                continue;
            }
            // A query with NaN has the sum NaN, and one with an infinity that factor: so are the scores, whatever the bytes are.
            let largest = query.iter().fold(0f32, |m, x| m.max(x.abs()));
            // Of the normal numbers, so that it has an inverse.
            made.factors[r] = (largest / (127.0 * 128.0)).max(f32::MIN_POSITIVE);
            let inverse = 1.0 / made.factors[r];
            let (high, low) = made.bytes[2 * r * stride..2 * (r + 1) * stride].split_at_mut(stride);
            for (d, x) in query.iter().enumerate() {
                let x = (x * inverse).round() as i32;
                let part = (x + 64) >> 7;
                let at = if bits == 4 {
                    // Channels 32 i + b and 32 i + 16 + b share a byte; 64 such bytes make a vector.
                    d / 128 * 2 * CHUNK + d % 32 / 16 * CHUNK + d % 128 / 32 * 16 + d % 16
                } else {
                    d
                };
                (high[at], low[at]) = (part as i8, (x - 128 * part) as i8);
            }
        }
        made
    }
}

/// Scores of all rows for a block of keys, before scales: sums of products of bytes.
pub(super) struct ByteScores<'a, K, V> {
    pub(super) queries: &'a ByteQueries,
    pub(super) rows: usize,
    pub(super) dim: usize,
    pub(super) k: K,
    pub(super) keys: Range<usize>,
    pub(super) next: (V, usize),
    pub(super) scores: &'a mut [f32],
}

impl<K: BareRows, V: Rows> Kernel for ByteScores<'_, K, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { queries, rows: n, dim, k, keys, next, scores } = self;
        assert!(queries.bytes.len() >= 2 * n * queries.stride);
        // SAFETY: the queries are there by the assertion; whoever made this vouches for the keys.
        unsafe { fill_scores(s, ByteDots { queries, k }, n, k, dim, keys, next, scores) }
    }
}

/// `128 high . c_j + low . c_j`.
#[derive(Clone, Copy)]
struct ByteDots<'a, K> {
    queries: &'a ByteQueries,
    k: K,
}

impl<K: BareRows> Dots for ByteDots<'_, K> {
    #[inline(always)]
    unsafe fn dots<S: Simd, const R: usize, const C: usize>(
        self,
        s: S,
        first: usize,
        j: usize,
        coming: Coming<C>,
    ) -> [[f32; C]; R] {
        let Self { queries, k } = self;
        let (bytes, step) = (k.code_bytes(), 4 * S::LANES);
        // 4-bit codes: two vectors of the query for one of bytes, which come in chunks of 64.
        let halves = if K::BITS == 4 { 2 } else { 1 };
        let low_halves = s.splat_i32(0x0f0f_0f0f);
        let mut acc = [[s.splat_i32(0); C]; R];
        for part in 0..2 {
            let mut at = 0;
            while at < bytes {
                let mut x = [s.splat_i32(0); C];
                for (c, x) in x.iter_mut().enumerate() {
                    let codes = k.start(j + c).wrapping_add(at);
                    // SAFETY: the row has `bytes` bytes.
                    *x = unsafe {
                        if at + step <= bytes { s.load_bytes(codes) } else { s.load_bytes_first(codes, bytes - at) }
                    };
                }
                for half in 0..halves {
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let row = (2 * (first + r) + part) * queries.stride;
                        let q = row + at / CHUNK * CHUNK * halves + half * CHUNK + at % CHUNK;
                        // SAFETY: queries are padded to whole chunks.
                        let q = unsafe { s.load_bytes(queries.bytes.as_ptr().add(q).cast()) };
                        for (acc, &x) in acc.iter_mut().zip(&x) {
                            let codes = match (K::BITS, half) {
                                (4, 0) => s.and(x, low_halves),
                                (4, _) => s.and(s.shift_right_16::<4>(x), low_halves),
                                _ => x,
                            };
                            *acc = s.dot4(*acc, codes, q);
                        }
                    }
                }
                if part == 0 {
                    coming.ask(at, at + step);
                }
                at += step;
            }
            if part == 0 {
                coming.ask(at, usize::MAX);
                for acc in acc.as_flattened_mut() {
                    *acc = s.times128(*acc);
                }
            }
        }
        let mut sums = [[s.zero(); C]; R];
        for (sums, acc) in sums.iter_mut().zip(&acc) {
            for (sum, &acc) in sums.iter_mut().zip(acc) {
                *sum = s.to_f32(acc);
            }
        }
        s.sums(sums)
    }
}

/// Turns products with bare codes into scores.
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
    fn run<S: Simd>(self, _: S) {
        let Self { queries, rows, k, keys, scores } = self;
        let n = keys.len();
        let (scales, offsets) = scales_and_offsets(k, keys);
        for (r, scores) in scores.chunks_exact_mut(KEYS).take(rows).enumerate() {
            let (factor, sum) = (queries.factors[r], queries.sums[r]);
            for (score, (scale, offset)) in scores[..n].iter_mut().zip(scales.iter().zip(&offsets)) {
                *score = scale * factor * *score + offset * sum;
            }
        }
    }
}

#[inline(always)]
fn scales_and_offsets<K: BareRows>(rows: K, keys: Range<usize>) -> ([f32; KEYS], [f32; KEYS]) {
    let (mut scales, mut offsets) = ([0f32; KEYS], [0f32; KEYS]);
    for ((key, scale), offset) in keys.zip(&mut scales).zip(&mut offsets) {
        // SAFETY: `keys` are rows that whoever started the kernel vouched for.
        [*scale, *offset] = unsafe { rows.scale_and_offset(key) };
    }
    (scales, offsets)
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
    fn run<S: Simd>(self, _: S) {
        let Self { weights, rows, v, keys, outputs, padded_dim } = self;
        let n = keys.len();
        let (scales, offsets) = scales_and_offsets(v, keys);
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
