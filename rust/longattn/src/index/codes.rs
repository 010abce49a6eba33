//! Codes of keys, packed in blocks, and their scan.
//!
//! A key's code is a grid point `y` of `bits` bits per dimension, the nearest in angle to the rotated, centred key `x`, and one factor
//! `f = |x|^2 / <y, x>`, which makes `f <q, y>` an unbiased estimate of `<q, x>` over random rotations (RaBitQ, Gao and Long, 2024;
//! Gao et al., 2025).
//!
//! ```text
//! block of 16 keys:  padded_dim / (4 F) groups of 64 bytes, F = 8 / bits,  then 16 factors in f16
//! byte 4 key + t of group g holds, in field f (bits f * bits..), dimension 4 F g + 4 f + t of that key
//! ```
//! so that shifting and masking a group yields four dimensions of 16 keys, ready for a byte dot product with four dimensions of the
//! query, broadcast.

use crate::simd::{Kernel, Simd, prefetch};
use half::f16;

/// Keys per block, whatever the instruction set.
pub(crate) const BLOCK: usize = 16;

/// Bytes ahead that a scan which goes on asks for: what memory brings while the scores of a tile are summed.
pub(crate) const AHEAD: usize = 16 * 1024;

/// Layout of the codes of one head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    /// 1, 2 or 4.
    pub(crate) bits: usize,
    /// Dimensions of the coded vectors.
    pub(crate) dim: usize,
}

impl Format {
    /// Dimensions that a group of 64 bytes covers.
    const fn group_dims(self) -> usize {
        32 / self.bits
    }

    /// Dimensions with padding.
    pub(crate) const fn padded_dim(self) -> usize {
        self.dim.next_multiple_of(self.group_dims())
    }

    const fn groups(self) -> usize {
        self.padded_dim() / self.group_dims()
    }

    /// Bytes of a block.
    pub(crate) const fn block_bytes(self) -> usize {
        self.groups() * 64 + BLOCK * 2
    }

    /// Groups whose products with a query's bytes, of at most 127, fit sums of 16 bits: two of them are added at a time.
    const fn short_groups(self) -> usize {
        i16::MAX as usize / (2 * 127 * ((1 << self.bits) - 1)) * self.bits / 8
    }

    /// Half the distance between the outermost grid points.
    pub(crate) const fn offset(self) -> f32 {
        ((1 << self.bits) - 1) as f32 / 2.0
    }

    /// Writes one key's code (`levels[d]` in `0..2^bits`, `padded_dim` of them) and factor into its block.
    pub(crate) fn write(self, block: &mut [u8], key: usize, levels: &[u8], factor: f16) {
        debug_assert!(block.len() == self.block_bytes() && key < BLOCK && levels.len() == self.padded_dim());
        let fields = 8 / self.bits;
        for (g, dims) in levels.chunks_exact(self.group_dims()).enumerate() {
            for t in 0..4 {
                block[g * 64 + 4 * key + t] =
                    (0..fields).fold(0, |byte, f| byte | (dims[4 * f + t] << (f * self.bits)));
            }
        }
        let at = self.groups() * 64 + 2 * key;
        block[at..at + 2].copy_from_slice(&factor.to_le_bytes());
    }
}

/// A query ready for the scan: signed bytes, and what turns a byte dot product into a score.
#[derive(Clone, Debug)]
pub(crate) struct ScanQuery {
    /// `padded_dim` signed bytes in quadruples.
    pub(crate) quads: Vec<i32>,
    /// Score of a key: `factor * scale * (dot - shift) + base`.
    pub(crate) scale: f32,
    pub(crate) shift: f32,
    pub(crate) base: f32,
    /// Length of the query that errors are a part of; 0 where they are not known.
    pub(crate) norm: f32,
}

impl ScanQuery {
    /// Rounds a query (already in the codes' space, times the softmax scale) to signed bytes.
    pub(crate) fn new(format: Format, query: &[f32], base: f32) -> Self {
        let largest = query.iter().fold(0f32, |a, x| a.max(x.abs()));
        let step = if largest > 0.0 { largest / 127.0 } else { 1.0 };
        let mut bytes = vec![0i8; format.padded_dim()];
        for (byte, x) in bytes.iter_mut().zip(query) {
            *byte = (x / step).round() as i8;
        }
        let sum: f32 = bytes.iter().map(|&b| f32::from(b)).sum();
        let quads = bytes.chunks_exact(4).map(|q| i32::from_ne_bytes([0, 1, 2, 3].map(|t| q[t] as u8))).collect();
        Self { quads, scale: step, shift: format.offset() * sum, base, norm: 0.0 }
    }
}

/// Scans blocks of codes for a query group: `scores[g][j]` for the `16 * blocks` keys of `codes`.
pub(crate) struct Scan<'a> {
    pub(crate) format: Format,
    pub(crate) codes: &'a [u8],
    pub(crate) queries: &'a [ScanQuery],
    /// `[queries, stride]`, the last row as long as the blocks need.
    pub(crate) scores: &'a mut [f32],
    pub(crate) stride: usize,
    /// How far behind each byte is the one that memory is asked for meanwhile.
    pub(crate) ahead: usize,
}

impl Kernel for Scan<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let blocks = self.codes.len() / self.format.block_bytes();
        assert!(self.codes.len().is_multiple_of(self.format.block_bytes()) && self.stride >= blocks * BLOCK);
        assert!(self.scores.len() >= self.queries.len().saturating_sub(1) * self.stride + blocks * BLOCK);
        assert!(self.queries.iter().all(|q| q.quads.len() * 4 == self.format.padded_dim()));
        let mut g = 0;
        while g < self.queries.len() {
            let left = self.queries.len() - g;
            match (self.format.bits, left) {
                (1, 1) => self.pass::<S, 1, 1>(s, g),
                (1, 2 | 3) => self.pass::<S, 1, 2>(s, g),
                (1, _) => self.pass::<S, 1, 4>(s, g),
                (2, 1) => self.pass::<S, 2, 1>(s, g),
                (2, 2 | 3) => self.pass::<S, 2, 2>(s, g),
                (2, _) => self.pass::<S, 2, 4>(s, g),
                (_, 1) => self.pass::<S, 4, 1>(s, g),
                (_, 2 | 3) => self.pass::<S, 4, 2>(s, g),
                (_, _) => self.pass::<S, 4, 4>(s, g),
            }
            g += if left >= 4 { 4 } else { left.min(2) };
        }
    }
}

impl Scan<'_> {
    /// One pass over the codes for `G` queries from `first` on.
    #[inline(always)]
    fn pass<S: Simd, const BITS: usize, const G: usize>(&mut self, s: S, first: usize) {
        let queries: [&ScanQuery; G] = std::array::from_fn(|g| &self.queries[first + g]);
        let quads: [*const i32; G] = queries.map(|q| q.quads.as_ptr());
        let (groups, bytes) = (self.format.groups(), self.format.block_bytes());
        let together = if S::SHORT_SUMS { self.format.short_groups() } else { groups.max(1) };
        let out = self.scores.as_mut_ptr();
        for (b, block) in self.codes.chunks_exact(bytes).enumerate() {
            for part in (0..BLOCK).step_by(Vectors::<S>::keys()) {
                let mut acc = [Vectors::zero(s); G];
                // SAFETY: run() checked the lengths: a block has `groups` groups of 64 bytes and 16 factors, a query
                // 8 / BITS quadruples per group, and scores a row of `stride` floats per query.
                unsafe {
                    for first in (0..groups).step_by(together) {
                        let mut sums = [Vectors::zero(s); G];
                        for group in first..(first + together).min(groups) {
                            if part == 0 {
                                prefetch(block.as_ptr().wrapping_add(group * 64 + self.ahead));
                            }
                            let packed = Vectors::load(s, block.as_ptr().add(group * 64 + 4 * part));
                            self.fields::<S, BITS, G>(s, packed, &quads, group * (8 / BITS), &mut sums);
                        }
                        for (acc, sums) in acc.iter_mut().zip(&sums) {
                            acc.add(s, sums);
                        }
                    }
                    for v in 0..Vectors::<S>::NUMBER {
                        let key = part + v * S::LANES;
                        let factor = s.load_f16(block.as_ptr().add(groups * 64 + 2 * key).cast());
                        for (g, q) in queries.iter().enumerate() {
                            let dot = s.sub(s.to_f32(acc[g].0[v]), s.splat(q.shift));
                            let score = s.fma(s.mul(dot, s.splat(q.scale)), factor, s.splat(q.base));
                            s.store(out.add((first + g) * self.stride + b * BLOCK + key), score);
                        }
                    }
                }
            }
        }
    }

    /// Adds a group's dot products, one field of the bytes after another.
    ///
    /// # Safety
    /// Every query has `8 / BITS` quadruples from number `first` on.
    #[inline(always)]
    unsafe fn fields<S: Simd, const BITS: usize, const G: usize>(
        &self,
        s: S,
        packed: Vectors<S>,
        quads: &[*const i32; G],
        first: usize,
        sums: &mut [Vectors<S>; G],
    ) {
        let mask = s.splat_i32(i32::from_ne_bytes([((1u32 << BITS) - 1) as u8; 4]));
        macro_rules! field {
            ($($f:literal)*) => {$(
                if $f * BITS < 8 {
                    let mut levels = packed;
                    for level in levels.0.iter_mut().take(Vectors::<S>::NUMBER) {
                        let shifted = match $f * BITS {
                            0 => *level,
                            1 => s.shift_right_16::<1>(*level),
                            2 => s.shift_right_16::<2>(*level),
                            3 => s.shift_right_16::<3>(*level),
                            4 => s.shift_right_16::<4>(*level),
                            5 => s.shift_right_16::<5>(*level),
                            6 => s.shift_right_16::<6>(*level),
                            _ => s.shift_right_16::<7>(*level),
                        };
                        *level = s.and(shifted, mask);
                    }
                    for g in 0..G {
                        // SAFETY: the caller's promise.
                        let quad = s.splat_i32(unsafe { *quads[g].add(first + $f) });
                        for v in 0..Vectors::<S>::NUMBER {
                            sums[g].0[v] = s.dot4_short(sums[g].0[v], levels.0[v], quad);
                        }
                    }
                }
            )*};
        }
        field!(0 1 2 3 4 5 6 7);
    }
}

/// What is known of some keys, four bytes each, or of a block where a vector holds one; two vectors otherwise, which share the loads of
/// a query's bytes.
#[derive(Clone, Copy)]
struct Vectors<S: Simd>([S::I32; 2]);

impl<S: Simd> Vectors<S> {
    const NUMBER: usize = if S::LANES < BLOCK { 2 } else { 1 };

    const fn keys() -> usize {
        Self::NUMBER * S::LANES
    }

    #[inline(always)]
    fn zero(s: S) -> Self {
        Self([s.splat_i32(0); 2])
    }

    /// # Safety
    /// `p` is readable for four bytes of every key.
    #[inline(always)]
    unsafe fn load(s: S, p: *const u8) -> Self {
        let mut all = Self::zero(s);
        for (v, x) in all.0.iter_mut().enumerate().take(Self::NUMBER) {
            // SAFETY: the caller's promise.
            *x = unsafe { s.load_bytes(p.add(v * 4 * S::LANES)) };
        }
        all
    }

    /// Adds sums that [`Simd::dot4_short`] left.
    #[inline(always)]
    fn add(&mut self, s: S, sums: &Self) {
        for (x, &sum) in self.0.iter_mut().zip(&sums.0).take(Self::NUMBER) {
            *x = s.add_i32(*x, s.lengthen(sum));
        }
    }
}

/// Codes one centred, rotated vector: writes its levels and returns `(f, kappa)`: the factor, and the ratio of the estimate's standard
/// deviation per unit `|q| f`.
pub(crate) struct Encode<'a> {
    pub(crate) format: Format,
    /// `dim` floats, padded with zeros to a multiple of the vector.
    pub(crate) x: &'a [f32],
    pub(crate) levels: &'a mut [u8],
}

impl Encode<'_> {
    #[inline(always)]
    pub(crate) fn run<S: Simd>(self, s: S) -> (f32, f32) {
        let Self { format, x, levels } = self;
        let dim = format.dim;
        debug_assert!(x.len() % S::LANES == 0 && x.len() >= dim);
        let mut squares = s.zero();
        for chunk in x.chunks_exact(S::LANES) {
            // SAFETY: the chunk has LANES floats.
            let v = unsafe { s.load(chunk.as_ptr()) };
            squares = s.fma(v, v, squares);
        }
        let norm2 = s.sum(squares);
        levels.fill(0);
        if norm2 == 0.0 {
            return (0.0, 0.0);
        }
        let unit = (dim as f32 / norm2).sqrt();
        // Grid steps relative to the rms coordinate; the best depends on the vector's shape.
        let steps: &[f32] = match format.bits {
            1 => &[1.0],
            2 => &[0.6, 0.8, 1.0, 1.2, 1.45, 1.7],
            _ => &[0.22, 0.27, 0.32, 0.37, 0.42],
        };
        let top = format.offset();
        let (low, high) = (s.splat(-top), s.splat(top));
        let (mut best, mut best_step, mut best_xy, mut best_yy) = (-1f32, 1f32, 1f32, 1f32);
        let ragged = x.len() - dim;
        for &step in steps {
            let factor = s.splat(unit / step);
            let (mut xy, mut yy) = (s.zero(), s.zero());
            for chunk in x.chunks_exact(S::LANES) {
                // SAFETY: the chunk has LANES floats.
                let v = unsafe { s.load(chunk.as_ptr()) };
                let y = s.add(s.round(s.fma(v, factor, s.splat(-0.5))), s.splat(0.5));
                let y = s.min(high, s.max(low, y));
                xy = s.fma(v, y, xy);
                yy = s.fma(y, y, yy);
            }
            // The padding's zeros land on grid points of +-0.5, which count in |y|.
            let (xy, yy) = (s.sum(xy), s.sum(yy) - 0.25 * ragged as f32);
            let cos = xy / (yy * norm2).sqrt();
            if cos > best {
                (best, best_step, best_xy, best_yy) = (cos, step, xy, yy);
            }
        }
        let factor = unit / best_step;
        for (level, &x) in levels.iter_mut().zip(&x[..dim]) {
            // The same rounding as in the vectors: to nearest, ties to even.
            let y = (x.mul_add(factor, -0.5).round_ties_even() + 0.5).clamp(-top, top);
            *level = (y + top) as u8;
        }
        let f = norm2 / best_xy;
        let sine = (1.0 - best * best).max(0.0).sqrt();
        let kappa = best_yy.sqrt() * sine / (dim.max(2) as f32 - 1.0).sqrt();
        (f, kappa)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::rotation::Random;
    use crate::simd::{Isa, dispatch};

    struct EncodeAll<'a>(Format, &'a [Vec<f32>]);

    impl Kernel for EncodeAll<'_> {
        type Output = (Vec<u8>, Vec<(f32, f32)>);
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let Self(format, vectors) = self;
            let mut codes = vec![0; vectors.len() / BLOCK * format.block_bytes()];
            let mut levels = vec![0; format.padded_dim()];
            let mut factors = vec![];
            for (j, v) in vectors.iter().enumerate() {
                let mut x = v.clone();
                x.resize(v.len().next_multiple_of(16), 0.0);
                let (f, kappa) = Encode { format, x: &x, levels: &mut levels }.run(s);
                let at = j / BLOCK * format.block_bytes();
                format.write(&mut codes[at..at + format.block_bytes()], j % BLOCK, &levels, f16::from_f32(f));
                factors.push((f, kappa));
            }
            (codes, factors)
        }
    }

    fn vectors(n: usize, dim: usize, seed: u64) -> Vec<Vec<f32>> {
        let mut random = Random::new(seed);
        (0..n).map(|_| (0..dim).map(|_| random.normal() as f32).collect()).collect()
    }

    #[test]
    fn estimates_are_unbiased_and_as_spread_as_predicted() {
        for (bits, dim) in [(1, 128), (2, 64), (4, 80)] {
            let format = Format { bits, dim };
            let keys = vectors(1024, dim, 1);
            let queries = vectors(3, dim, 2);
            for isa in Isa::available() {
                let (codes, factors) = dispatch(isa, EncodeAll(format, &keys));
                let prepared: Vec<_> = queries.iter().map(|q| ScanQuery::new(format, q, 0.5)).collect();
                let mut scores = vec![0f32; 3 * 1024];
                let scan =
                    Scan { format, codes: &codes, queries: &prepared, scores: &mut scores, stride: 1024, ahead: AHEAD };
                dispatch(isa, scan);
                let (mut sum, mut squares) = (0f64, 0f64);
                for (g, q) in queries.iter().enumerate() {
                    let norm = q.iter().map(|x| x * x).sum::<f32>().sqrt();
                    for (j, k) in keys.iter().enumerate() {
                        let exact: f32 = q.iter().zip(k).map(|(a, b)| a * b).sum();
                        let sigma = norm * factors[j].0 * factors[j].1;
                        let z = f64::from((scores[g * 1024 + j] - 0.5 - exact) / sigma);
                        sum += z;
                        squares += z * z;
                    }
                }
                let n = 3.0 * 1024.0;
                assert!((sum / n).abs() < 0.1, "{} bits {bits}: bias {}", isa.name(), sum / n);
                let rms = (squares / n).sqrt();
                assert!((0.9..1.1).contains(&rms), "{} bits {bits}: spread {rms}", isa.name());
            }
        }
    }

    #[test]
    fn the_largest_codes_and_queries_fit_the_sums() {
        for (bits, dim) in [(1, 1024), (2, 520), (4, 264)] {
            let format = Format { bits, dim };
            let (most, padded) = ((1 << bits) - 1, format.padded_dim());
            let mut codes = vec![0; format.block_bytes()];
            for key in 0..BLOCK {
                format.write(&mut codes, key, &vec![most; padded], f16::ONE);
            }
            for sign in [1.0, -1.0] {
                let query = ScanQuery::new(format, &vec![sign; dim], 0.0);
                let expected = sign * dim as f32 * format.offset();
                for isa in Isa::available() {
                    let (mut scores, queries) = ([0f32; BLOCK], std::slice::from_ref(&query));
                    dispatch(
                        isa,
                        Scan { format, codes: &codes, queries, scores: &mut scores, stride: BLOCK, ahead: 0 },
                    );
                    for score in scores {
                        assert!((score - expected).abs() <= 1e-4 * expected.abs(), "{} {bits} {score}", isa.name());
                    }
                }
            }
        }
    }

    #[test]
    fn every_isa_scans_the_same_scores() {
        for (bits, dim) in [(1, 40), (2, 128), (4, 17)] {
            let format = Format { bits, dim };
            let keys = vectors(64, dim, 3);
            let queries: Vec<_> = vectors(7, dim, 4).iter().map(|q| ScanQuery::new(format, q, 0.0)).collect();
            let (codes, _) = dispatch(Isa::Scalar, EncodeAll(format, &keys));
            let scan = |isa| {
                let mut scores = vec![0f32; 7 * 64];
                let scan =
                    Scan { format, codes: &codes, queries: &queries, scores: &mut scores, stride: 64, ahead: AHEAD };
                dispatch(isa, scan);
                scores
            };
            let expected = scan(Isa::Scalar);
            for isa in Isa::available() {
                for (a, b) in scan(isa).iter().zip(&expected) {
                    assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{}", isa.name());
                }
            }
        }
    }
}
