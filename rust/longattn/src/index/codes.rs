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

use crate::simd::{Isa, Kernel, RepeatedQuad, Simd, asks_second_cache, dispatch, prefetch_into};
use half::f16;
use std::ops::Range;

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

    /// A level in the middle: all others are at most as far from it.
    const fn middle(self) -> i32 {
        1 << (self.bits - 1)
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

/// How a query's products are summed in 16 bits, two channels of each quadruple to a sum. Sums start at less by what levels in the
/// middle would amount to: on the way they are never further from 0 than the sizes of the query's bytes times that level, half of what
/// they may be from the lowest level on.
#[derive(Clone, Debug)]
struct ShortSums {
    /// Groups whose sums fit, wherever they begin.
    run: usize,
    /// [`ScanQuery::shift`] of sums that start there.
    shift: f32,
    /// What levels in the middle amount to in all groups before each one, in either sum.
    before: Vec<[i32; 2]>,
}

impl ShortSums {
    fn new(format: Format, query: &ScanQuery) -> Self {
        let (groups, middle) = (format.groups(), format.middle());
        let mut before = vec![[0i32; 2]; groups + 1];
        let mut sizes = vec![[0u32; 2]; groups + 1];
        for (g, quads) in query.quads.chunks_exact(8 / format.bits).enumerate() {
            (before[g + 1], sizes[g + 1]) = (before[g], sizes[g]);
            for (d, byte) in quads.iter().flat_map(|quad| quad.to_ne_bytes()).enumerate() {
                let (half, product) = (d % 4 / 2, i32::from(byte as i8) * middle);
                before[g + 1][half] += product;
                sizes[g + 1][half] += product.unsigned_abs();
            }
        }
        let fits = |run: usize| {
            sizes.iter().zip(&sizes[run..]).all(|(a, b)| (0..2).all(|half| b[half] - a[half] <= i16::MAX as u32))
        };
        let run = (1..=groups).rev().find(|&run| fits(run)).unwrap_or(1);
        // The middle level is half a step above the centre.
        let sum = query.shift / format.offset();
        Self { run, shift: -0.5 * sum, before }
    }

    /// Where the sums of some groups start, the second in the high half. No more than a run of them.
    #[inline(always)]
    fn start(&self, groups: Range<usize>) -> i32 {
        let (before, after) = (self.before[groups.start], self.before[groups.end]);
        let [low, high] = [before[0] - after[0], before[1] - after[1]];
        high << 16 | low & 0xffff
    }
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

/// Queries that scan together, with what an instruction set wants of them.
pub(crate) struct ScanGroup {
    pub(crate) queries: Vec<ScanQuery>,
    /// Of each query, where sums are short.
    short: Vec<ShortSums>,
    /// `[quadruples, queries]` of each pass, one pass after another, where there is [`Simd::code_dots`].
    repeated: Vec<RepeatedQuad>,
}

impl ScanGroup {
    pub(crate) fn new(isa: Isa, format: Format, queries: Vec<ScanQuery>) -> Self {
        struct Make(Format, Vec<ScanQuery>);
        impl Kernel for Make {
            type Output = ScanGroup;
            #[inline(always)]
            fn run<S: Simd>(self, _: S) -> ScanGroup {
                let Self(format, queries) = self;
                let (mut short, mut repeated) = (Vec::new(), Vec::new());
                if S::SHORT_SUMS {
                    short = queries.iter().map(|query| ShortSums::new(format, query)).collect();
                }
                let mut left = &queries[..];
                while S::CODE_DOTS && !left.is_empty() {
                    let (pass, after) = left.split_at(together(left.len()));
                    for i in 0..format.padded_dim() / 4 {
                        repeated.extend(pass.iter().map(|query| RepeatedQuad([query.quads[i]; 8])));
                    }
                    left = after;
                }
                ScanGroup { queries, short, repeated }
            }
        }
        dispatch(isa, Make(format, queries))
    }
}

/// Queries that go over the codes in one pass, of so many that are left.
const fn together(left: usize) -> usize {
    match left {
        0 | 1 => left,
        2 | 3 => 2,
        _ => 4,
    }
}

/// Scans blocks of codes for a query group: `scores[g][j]` for the `16 * blocks` keys of `codes`.
pub(crate) struct Scan<'a> {
    pub(crate) format: Format,
    pub(crate) codes: &'a [u8],
    /// Made for the same instruction set.
    pub(crate) group: &'a ScanGroup,
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
        let (queries, quads) = (&self.group.queries, self.format.padded_dim() / 4);
        let blocks = self.codes.len() / self.format.block_bytes();
        assert!(self.codes.len().is_multiple_of(self.format.block_bytes()) && self.stride >= blocks * BLOCK);
        assert!(self.scores.len() >= queries.len().saturating_sub(1) * self.stride + blocks * BLOCK);
        assert!(queries.iter().all(|q| q.quads.len() == quads));
        assert!(!S::SHORT_SUMS || self.group.short.len() == queries.len());
        assert!(!S::CODE_DOTS || self.group.repeated.len() == queries.len() * quads);
        let mut g = 0;
        while g < queries.len() {
            let together = together(queries.len() - g);
            match (self.format.bits, together) {
                (1, 1) => self.pass::<S, 1, 1>(s, g),
                (1, 2) => self.pass::<S, 1, 2>(s, g),
                (1, _) => self.pass::<S, 1, 4>(s, g),
                (2, 1) => self.pass::<S, 2, 1>(s, g),
                (2, 2) => self.pass::<S, 2, 2>(s, g),
                (2, _) => self.pass::<S, 2, 4>(s, g),
                (_, 1) => self.pass::<S, 4, 1>(s, g),
                (_, 2) => self.pass::<S, 4, 2>(s, g),
                (_, _) => self.pass::<S, 4, 4>(s, g),
            }
            g += together;
        }
    }
}

impl Scan<'_> {
    /// One pass over the codes for `G` queries from `first` on.
    #[inline(always)]
    fn pass<S: Simd, const BITS: usize, const G: usize>(&mut self, s: S, first: usize) {
        let queries: [&ScanQuery; G] = std::array::from_fn(|g| &self.group.queries[first + g]);
        let (groups, bytes) = (self.format.groups(), self.format.block_bytes());
        let short = if S::SHORT_SUMS { &self.group.short[first..first + G] } else { &[] };
        let run = short.iter().fold(groups, |run, short| run.min(short.run));
        let mut shifts = queries.map(|query| query.shift);
        shifts.iter_mut().zip(short).for_each(|(shift, short)| *shift = short.shift);
        let repeated = self.group.repeated.as_ptr().wrapping_add(first * self.format.padded_dim() / 4);
        let (quads, second_cache) = (queries.map(|query| query.quads.as_ptr()), asks_second_cache());
        let pass = Pass::<BITS, G> { quads, short, repeated, ahead: self.ahead, second_cache };
        let (starts, out) = (pass.starts(0..run), self.scores.as_mut_ptr());
        for (b, block) in self.codes.chunks_exact(bytes).enumerate() {
            for part in (0..BLOCK).step_by(Vectors::<S>::keys()) {
                // SAFETY: run() checked the lengths: a block has `groups` groups of 64 bytes and 16 factors, a query
                // 8 / BITS quadruples per group, as many repeated ones for each, and scores a row of `stride` floats per query.
                unsafe {
                    let mut dots = pass.dots(s, block, part, 0..run, starts);
                    let mut from = run;
                    while S::SHORT_SUMS && from < groups {
                        let to = (from + run).min(groups);
                        let more = pass.dots(s, block, part, from..to, pass.starts(from..to));
                        for (dots, more) in dots.iter_mut().zip(&more) {
                            dots.add(s, more);
                        }
                        from = to;
                    }
                    for v in 0..Vectors::<S>::NUMBER {
                        let key = part + v * S::LANES;
                        let factor = s.load_f16(block.as_ptr().add(groups * 64 + 2 * key).cast());
                        for (g, q) in queries.iter().enumerate() {
                            let dot = s.sub(s.to_f32(dots[g].0[v]), s.splat(shifts[g]));
                            let score = s.fma(s.mul(dot, s.splat(q.scale)), factor, s.splat(q.base));
                            s.store(out.add((first + g) * self.stride + b * BLOCK + key), score);
                        }
                    }
                }
            }
        }
    }
}

/// A pass over blocks of codes for some queries.
struct Pass<'a, const BITS: usize, const G: usize> {
    quads: [*const i32; G],
    short: &'a [ShortSums],
    repeated: *const RepeatedQuad,
    ahead: usize,
    second_cache: bool,
}

impl<const BITS: usize, const G: usize> Pass<'_, BITS, G> {
    /// Where sums of some groups start from.
    #[inline(always)]
    fn starts(&self, groups: Range<usize>) -> [i32; G] {
        let mut starts = [0; G];
        for (start, short) in starts.iter_mut().zip(self.short) {
            *start = short.start(groups.clone());
        }
        starts
    }

    /// Dot products of some groups of a block's keys from `part` on: of levels, or of levels counted from the middle one where sums are
    /// short and start as [`Self::starts`] says.
    ///
    /// # Safety
    /// The block and the queries have these groups.
    #[inline(always)]
    unsafe fn dots<S: Simd>(
        &self,
        s: S,
        block: &[u8],
        part: usize,
        groups: Range<usize>,
        starts: [i32; G],
    ) -> [Vectors<S>; G] {
        let mut sums = [Vectors::splat(s, 0); G];
        if S::SHORT_SUMS {
            for (sums, start) in sums.iter_mut().zip(starts) {
                *sums = Vectors::splat(s, start);
            }
        }
        if S::CODE_DOTS {
            const { assert!(!S::CODE_DOTS || S::SHORT_SUMS && Vectors::<S>::keys() == BLOCK) };
            let mut all = [[s.splat_i32(0); 2]; G];
            for (all, sums) in all.iter_mut().zip(&sums) {
                *all = sums.0;
            }
            let codes = block.as_ptr().wrapping_add(groups.start * 64);
            let quads = self.repeated.wrapping_add(groups.start * (8 / BITS) * G);
            // SAFETY: the caller's promise.
            all = unsafe { s.code_dots::<BITS, G>(all, groups.len(), codes, self.ahead, self.second_cache, quads) };
            for (sums, all) in sums.iter_mut().zip(all) {
                sums.0 = all;
            }
        } else {
            for group in groups {
                let at = block.as_ptr().wrapping_add(group * 64);
                if part == 0 {
                    prefetch_into(self.second_cache, at.wrapping_add(self.ahead));
                }
                // SAFETY: the caller's promise.
                unsafe { self.add_group(s, Vectors::load(s, at.add(4 * part)), group * (8 / BITS), &mut sums) };
            }
        }
        for sums in &mut sums {
            sums.lengthen(s);
        }
        sums
    }

    /// Adds a group's dot products, one field of the bytes after another.
    ///
    /// # Safety
    /// Every query has `8 / BITS` quadruples from number `first` on.
    #[inline(always)]
    unsafe fn add_group<S: Simd>(&self, s: S, packed: Vectors<S>, first: usize, sums: &mut [Vectors<S>; G]) {
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
                    for (sums, quads) in sums.iter_mut().zip(&self.quads) {
                        // SAFETY: the caller's promise.
                        let quad = s.splat_i32(unsafe { *quads.add(first + $f) });
                        for v in 0..Vectors::<S>::NUMBER {
                            sums.0[v] = s.dot4_short(sums.0[v], levels.0[v], quad);
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
    fn splat(s: S, x: i32) -> Self {
        Self([s.splat_i32(x); 2])
    }

    /// # Safety
    /// `p` is readable for four bytes of every key.
    #[inline(always)]
    unsafe fn load(s: S, p: *const u8) -> Self {
        let mut all = Self::splat(s, 0);
        for (v, x) in all.0.iter_mut().enumerate().take(Self::NUMBER) {
            // SAFETY: the caller's promise.
            *x = unsafe { s.load_bytes(p.add(v * 4 * S::LANES)) };
        }
        all
    }

    #[inline(always)]
    fn add(&mut self, s: S, others: &Self) {
        for (x, &other) in self.0.iter_mut().zip(&others.0).take(Self::NUMBER) {
            *x = s.add_i32(*x, other);
        }
    }

    /// Makes sums of what [`Simd::dot4_short`] left.
    #[inline(always)]
    fn lengthen(&mut self, s: S) {
        for x in self.0.iter_mut().take(Self::NUMBER) {
            *x = s.lengthen(*x);
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
                let prepared = queries.iter().map(|q| ScanQuery::new(format, q, 0.5)).collect();
                let group = ScanGroup::new(isa, format, prepared);
                let mut scores = vec![0f32; 3 * 1024];
                let scan =
                    Scan { format, codes: &codes, group: &group, scores: &mut scores, stride: 1024, ahead: AHEAD };
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
            for (sign, level) in [(1.0, most), (-1.0, most), (1.0, 0), (-1.0, 0)] {
                let mut codes = vec![0; format.block_bytes()];
                for key in 0..BLOCK {
                    format.write(&mut codes, key, &vec![level; padded], f16::ONE);
                }
                let query = ScanQuery::new(format, &vec![sign; dim], 0.0);
                let expected = sign * dim as f32 * (f32::from(level) - format.offset());
                for isa in Isa::available() {
                    let (mut scores, group) = ([0f32; BLOCK], ScanGroup::new(isa, format, vec![query.clone()]));
                    let (stride, ahead, group) = (BLOCK, 0, &group);
                    dispatch(isa, Scan { format, codes: &codes, group, scores: &mut scores, stride, ahead });
                    for score in scores {
                        assert!((score - expected).abs() <= 1e-4 * expected.abs(), "{} {bits} {score}", isa.name());
                    }
                }
            }
        }
    }

    #[test]
    fn every_isa_scans_the_same_scores() {
        // Queries of one size alone fill sums of 16 bits in fewer groups.
        for (bits, dim, flat) in
            [(1, 40, 0), (2, 128, 3), (4, 17, 0), (4, 128, 0), (4, 128, 7), (4, 264, 1), (2, 520, 6), (1, 1000, 7)]
        {
            let format = Format { bits, dim };
            let keys = vectors(64, dim, 3);
            let mut queries = vectors(7, dim, 4);
            queries[7 - flat..].iter_mut().flatten().for_each(|x| *x = x.signum());
            let queries: Vec<_> = queries.iter().map(|q| ScanQuery::new(format, q, 0.0)).collect();
            let (codes, _) = dispatch(Isa::Scalar, EncodeAll(format, &keys));
            let scan = |isa, n: usize| {
                let (mut scores, group) = (vec![0f32; n * 64], ScanGroup::new(isa, format, queries[7 - n..].to_vec()));
                let (stride, ahead, group) = (64, AHEAD, &group);
                dispatch(isa, Scan { format, codes: &codes, group, scores: &mut scores, stride, ahead });
                scores
            };
            for n in 1..=7 {
                let expected = scan(Isa::Scalar, n);
                for isa in Isa::available() {
                    assert_eq!(scan(isa, n), expected, "{}: {bits} bits, {dim}, {flat} of {n}", isa.name());
                }
            }
        }
    }
}
