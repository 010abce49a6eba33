//! Decode over bare codes of values where the CPU multiplies bytes: a block's sums are sums of integers.
//!
//! The weights of a block, times the scales of their values, are rounded to 23 bits of the largest of them:
//! `w_j scale_j = f (65536 a_j + 256 b_j + c_j) + e_j` with signed bytes, `f = max / (127 * 65536)` and `|e_j| <= f / 2`. The bytes
//! of four keys are interleaved, so that each lane sums up products with four keys of one channel. The three sums are below `2^24`
//! and become floats without rounding.
//!
//! What rounding the weights does to an output, `sum_j e_j code_j`, is at most `f / 2 * 255 * 128`, which is `max / 512`: the
//! heaviest value's code may be off by half a step, 256 times as much. As the `e_j` have either sign it is mostly below `2^-24` of
//! what that value may add, the rounding of a float. With two bytes, of 15 bits, it would show where one key has most of the weight.
//! Offsets are added in f32.

use super::codes::Parameters;
use super::rows::{BareRows, Row, Rows};
use super::stream::{KEYS, MAX_QUERY_ROWS};
use crate::simd::{Kernel, Simd};
use std::ops::Range;

/// Bytes of a rounded weight.
const PARTS: usize = 3;

/// The largest rounded weight; one of a little more still has a first byte of 127.
const LARGEST: f32 = (127 << 16) as f32;

/// A block's weights as bytes.
#[repr(align(64))]
pub(super) struct ByteWeights {
    /// `[rows, fours of keys, parts (the last weighs most), keys]`; 0 beyond the last key, up to a whole vector. A fourth part has no
    /// meaning.
    bytes: [[[[i8; 4]; 4]; KEYS / 4]; MAX_QUERY_ROWS],
    factors: [f32; MAX_QUERY_ROWS],
}

impl ByteWeights {
    pub(super) const NONE: Self =
        Self { bytes: [[[[0; 4]; 4]; KEYS / 4]; MAX_QUERY_ROWS], factors: [0.0; MAX_QUERY_ROWS] };
}

/// Rounds a block's weights, times the scales of the values, and adds what the offsets contribute to the outputs.
pub(super) struct RoundWeights<'a, V> {
    /// Rows of [`KEYS`]; 0 beyond the last key, up to a whole vector.
    pub(super) weights: &'a [f32],
    pub(super) rows: usize,
    pub(super) v: V,
    pub(super) keys: Range<usize>,
    pub(super) outputs: &'a mut [f32],
    pub(super) padded_dim: usize,
    pub(super) to: &'a mut ByteWeights,
}

impl<V: BareRows> Kernel for RoundWeights<'_, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { weights, rows, v, keys, outputs, padded_dim, to } = self;
        let n = keys.len();
        assert!(rows <= MAX_QUERY_ROWS && KEYS.is_multiple_of(S::LANES));
        let mut parameters = Parameters::NONE;
        parameters.read(s, v, keys);
        let (scales, offsets) = (parameters.scales.as_ptr(), parameters.offsets.as_ptr());
        for (r, (bytes, factor)) in to.bytes.iter_mut().zip(&mut to.factors).enumerate().take(rows) {
            let weights = &weights[r * KEYS..r * KEYS + n.next_multiple_of(S::LANES)];
            let (mut sum, mut largest) = (s.zero(), s.zero());
            for (j, w) in weights.chunks_exact(S::LANES).enumerate() {
                // SAFETY: all three have LANES floats from there on.
                unsafe {
                    let w = s.load(w.as_ptr());
                    sum = s.fma(w, s.load(offsets.add(j * S::LANES)), sum);
                    largest = s.max(s.mul(w, s.load(scales.add(j * S::LANES))), largest);
                }
            }
            // NaN in a weight or an offset is in this sum; the bytes may then be any.
            let sum = s.sum(sum);
            outputs[r * padded_dim..(r + 1) * padded_dim].iter_mut().for_each(|x| *x += sum);
            // Of the normal numbers, so that it has an inverse.
            *factor = (s.max_lane(largest) / LARGEST).max(f32::MIN_POSITIVE);
            let inverse = s.splat(1.0 / *factor);
            let to = bytes.as_mut_ptr().cast::<u8>();
            for (j, w) in weights.chunks_exact(S::LANES).enumerate() {
                // SAFETY: all three have LANES floats from there on, and the bytes have four for each.
                unsafe {
                    let w = s.mul(s.load(w.as_ptr()), s.load(scales.add(j * S::LANES)));
                    s.store_bytes(to.add(4 * j * S::LANES), s.digits(s.mul(w, inverse)));
                }
            }
        }
    }
}

/// Adds a block's values to the outputs of all rows.
pub(super) struct ByteValues<'a, K, V> {
    pub(super) weights: &'a ByteWeights,
    pub(super) rows: usize,
    pub(super) v: V,
    pub(super) keys: Range<usize>,
    pub(super) next: (K, usize),
    pub(super) outputs: &'a mut [f32],
    pub(super) padded_dim: usize,
}

impl<K: Rows, V: BareRows> Kernel for ByteValues<'_, K, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { weights, rows, v, keys, next, outputs, padded_dim } = self;
        assert!(keys.len() <= KEYS && rows <= MAX_QUERY_ROWS && outputs.len() >= rows * padded_dim);
        // Bytes of codes that make four vectors, a code to a byte.
        let (bytes, step) = (v.code_bytes(), V::BITS * S::LANES / 2);
        let passes = bytes.div_ceil(step) * rows.div_ceil(2);
        let coming = Ahead { rows: next.0, dim: next.1, next: keys.start + KEYS, steps: 0, passes };
        let mut block = Passes { weights, v, keys, outputs, padded_dim, coming };
        for at in (0..bytes).step_by(step) {
            let n = (bytes - at).min(step);
            for r in (0..rows).step_by(2) {
                // SAFETY: rows r.. exist by the assertion; whoever made this vouches for the values.
                unsafe {
                    if r + 1 < rows {
                        block.add::<S, 2>(s, at, n, r);
                    } else {
                        block.add::<S, 1>(s, at, n, r);
                    }
                }
            }
        }
    }
}

/// Rows of the next block of keys, which memory is asked for evenly in all passes over the values.
#[derive(Clone, Copy)]
struct Ahead<K> {
    rows: K,
    dim: usize,
    next: usize,
    /// Keys passed since a row was asked for.
    steps: usize,
    passes: usize,
}

impl<K: Rows> Ahead<K> {
    /// Asks for what is due after four more keys of a pass.
    #[inline(always)]
    fn four_more(&mut self) {
        self.steps += 4;
        while self.steps >= self.passes {
            self.steps -= self.passes;
            self.rows.row(self.next).prefetch(self.dim);
            self.next += 1;
        }
    }
}

/// Passes over the values of a block.
struct Passes<'a, K, V> {
    weights: &'a ByteWeights,
    v: V,
    keys: Range<usize>,
    outputs: &'a mut [f32],
    padded_dim: usize,
    coming: Ahead<K>,
}

impl<K: Rows, V: BareRows> Passes<'_, K, V> {
    /// The `n` bytes of codes from byte `at` on of the four keys from `j` on, a code to a byte, the keys' bytes beside each other.
    ///
    /// # Safety
    /// The values exist; the last stands for those after it, with weight 0.
    #[inline(always)]
    unsafe fn four<S: Simd>(&self, s: S, at: usize, n: usize, j: usize) -> [S::I32; 4] {
        let (first, end) = (self.keys.start + j, self.keys.end);
        let mut starts: [_; 4] = self.v.starts(first);
        if first + 4 > end {
            for (c, start) in starts.iter_mut().enumerate() {
                *start = self.v.start((first + c).min(end - 1));
            }
        }
        let mut x = [s.splat_i32(0); 4];
        for (x, start) in x.iter_mut().zip(starts) {
            let row = start.wrapping_add(at);
            // SAFETY: the row of values has these bytes.
            *x = unsafe {
                if V::BITS == 4 {
                    s.load_halves(row, n)
                } else if n == 4 * S::LANES {
                    s.load_bytes(row)
                } else {
                    s.load_bytes_first(row, n)
                }
            };
        }
        s.interleave(x)
    }

    /// Adds the `n` bytes of codes from byte `at` on to `R` rows of outputs.
    ///
    /// # Safety
    /// The values and rows exist.
    #[inline(always)]
    unsafe fn add<S: Simd, const R: usize>(&mut self, s: S, at: usize, n: usize, first: usize) {
        let mut coming = self.coming;
        let mut acc = [[[s.splat_i32(0); 4]; PARTS]; R];
        // SAFETY: the caller's promise.
        unsafe {
            let weight_bytes = self.weights.bytes.as_ptr().add(first).cast::<i8>();
            for j in (0..self.keys.len()).step_by(4) {
                coming.four_more();
                let x = self.four(s, at, n, j);
                for (r, acc) in acc.iter_mut().enumerate() {
                    for (part, acc) in acc.iter_mut().enumerate() {
                        let four = weight_bytes.add(4 * (r * KEYS + j) + 4 * part).cast::<i32>().read_unaligned();
                        let w = s.splat_i32(four);
                        for (acc, &x) in acc.iter_mut().zip(&x) {
                            *acc = s.dot4(*acc, x, w);
                        }
                    }
                }
            }
        }
        self.coming = coming;
        for (r, [c, b, a]) in acc.iter().enumerate() {
            let row = &mut self.outputs[(first + r) * self.padded_dim..(first + r + 1) * self.padded_dim];
            let factor = s.splat(self.weights.factors[first + r]);
            let mut sums = [s.zero(); 4];
            for (((sum, &a), &b), &c) in sums.iter_mut().zip(a).zip(b).zip(c) {
                *sum = s.fma(s.to_f32(b), s.splat(256.0), s.to_f32(c));
                *sum = s.fma(s.to_f32(a), s.splat(65536.0), *sum);
            }
            for (t, &sum) in s.in_order(sums).iter().enumerate() {
                let place = t * S::LANES;
                let d = if V::BITS == 4 {
                    // Channels 32 i + b and 32 i + 16 + b share byte 16 i + b, the latter in its high half.
                    let (half, byte) = (place / (2 * S::LANES), at + place % (2 * S::LANES));
                    byte / 16 * 32 + 16 * half + byte % 16
                } else {
                    at + place
                };
                if let Some(to) = row.get_mut(d..d + S::LANES) {
                    // SAFETY: there are LANES floats.
                    unsafe { s.store(to.as_mut_ptr(), s.fma(factor, sum, s.load(to.as_ptr()))) };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dense::rows::Coded;
    use crate::simd::{Isa, dispatch};
    use crate::tensor::CodeFormat;

    /// Outputs of `rows` rows over the keys from `first` on, or none where the instruction set multiplies no bytes.
    struct Add<'a> {
        format: CodeFormat,
        codes: &'a [u8],
        first: usize,
        weights: &'a [f32],
        rows: usize,
    }

    impl Kernel for Add<'_> {
        type Output = Option<(usize, Vec<f32>)>;

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let Self { format, codes, first, weights, rows } = self;
            if !S::DOT_BYTES {
                return None;
            }
            let keys = first..codes.len() / format.row_bytes();
            let padded_dim = format.dim().next_multiple_of(S::LANES);
            let mut outputs = vec![0.25; rows * padded_dim];
            if format.bits() == 4 {
                let v = Coded::<4>::new(codes.as_ptr(), format).bare()?;
                add(s, v, keys, weights, rows, &mut outputs, padded_dim);
            } else {
                let v = Coded::<8>::new(codes.as_ptr(), format).bare()?;
                add(s, v, keys, weights, rows, &mut outputs, padded_dim);
            }
            Some((padded_dim, outputs))
        }
    }

    #[inline(always)]
    fn add<S: Simd, V: BareRows>(
        s: S,
        v: V,
        keys: Range<usize>,
        weights: &[f32],
        rows: usize,
        outputs: &mut [f32],
        padded_dim: usize,
    ) {
        let mut bytes = ByteWeights::NONE;
        let (to, of_keys) = (&mut bytes, keys.clone());
        s.call(RoundWeights { weights, rows, v, keys: of_keys, outputs: &mut *outputs, padded_dim, to });
        let (weights, next) = (&bytes, (v, 0));
        s.call_bytes(ByteValues { weights, rows, v, keys, next, outputs, padded_dim });
    }

    /// Numbers from 0 to 1.
    fn random(seed: &mut u64) -> f32 {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Sums over the decoded values in f64, and what the rounding of weights (as this module's head says) and floats may change.
    fn check(format: CodeFormat, codes: &[u8], first: usize, weights: &[f32], rows: usize) {
        let (dim, keys) = (format.dim(), codes.len() / format.row_bytes());
        let most = ((1 << format.bits()) - 1) as f32;
        let mut values = vec![vec![0f32; dim]; keys];
        for (value, row) in values.iter_mut().zip(codes.chunks(format.row_bytes())) {
            format.decode(row, value);
        }
        let parameters = |j: usize| {
            let at = j * format.row_bytes() + format.code_bytes();
            let number = |at: usize| f32::from_ne_bytes(codes[at..at + 4].try_into().unwrap());
            (number(at), number(at + 4))
        };
        for isa in Isa::available() {
            let add = Add { format, codes, first, weights, rows };
            let Some((padded_dim, outputs)) = dispatch(isa, add) else { continue };
            for r in 0..rows {
                let weights = &weights[r * KEYS..][..keys - first];
                let (mut heaviest, mut terms) = (0f64, 0.25);
                for (j, &w) in (first..keys).zip(weights) {
                    let (scale, offset) = parameters(j);
                    heaviest = heaviest.max(f64::from(w * scale));
                    terms += f64::from(w) * f64::from(scale * most + offset.abs());
                }
                let allowed = heaviest / 512.0 / 255.0 * f64::from(most) + 16.0 * 2f64.powi(-24) * terms;
                for d in 0..dim {
                    let sum: f64 =
                        (first..keys).zip(weights).map(|(j, &w)| f64::from(w) * f64::from(values[j][d])).sum();
                    let error = (f64::from(outputs[r * padded_dim + d]) - 0.25 - sum).abs();
                    assert!(
                        error <= allowed + 1e-34,
                        "{}: {format:?}, {} keys, row {r} of {rows}, channel {d}: {error:e} off, allowed {allowed:e}",
                        isa.name(),
                        keys - first
                    );
                }
            }
        }
    }

    #[test]
    fn sums_are_those_of_the_decoded_values() {
        let mut seed = 1;
        for (bits, dim) in [(8, 64), (4, 64), (8, 128), (4, 128), (8, 1), (4, 1), (8, 40), (4, 40), (8, 130), (4, 330)]
        {
            let format = CodeFormat::new(bits, dim, None).unwrap();
            for (rows, first, keys) in
                [(1, 0, 128), (2, 3, 4), (3, 0, 1), (4, 0, 127), (5, 7, 23), (6, 1, 129), (7, 0, 66), (8, 0, 128)]
            {
                let mut codes = vec![0; keys * format.row_bytes()];
                for (j, row) in codes.chunks_mut(format.row_bytes()).enumerate() {
                    // Rows of zeros, rows of one number, and rows of sizes far apart.
                    let size = [0.0, 1.0, 1e-6, 1e5, 1e-38, 1.0, 2.0][j % 7];
                    let spread = if j % 7 == 5 { 0.0 } else { 1.0 };
                    let row_of: Vec<f32> = (0..dim).map(|_| size * (random(&mut seed) * spread - 0.3)).collect();
                    format.encode(&row_of, row);
                }
                // Even weights, weights of very different sizes, one that is all there is, none.
                for kind in 0..4 {
                    let mut weight = |i: usize| match kind {
                        0 => 1.0 - random(&mut seed) / 4.0,
                        1 => (-80.0 * random(&mut seed)).exp(),
                        2 => f32::from(i.is_multiple_of(KEYS)),
                        _ => 0.0,
                    };
                    let mut weights: Vec<f32> = (0..rows * KEYS).map(&mut weight).collect();
                    weights.chunks_mut(KEYS).for_each(|row| row[keys - first..].fill(0.0));
                    check(format, &codes, first, &weights, rows);
                }
            }
        }
    }

    #[test]
    fn a_value_that_is_not_finite_reaches_all_channels() {
        let format = CodeFormat::new(8, 40, None).unwrap();
        let mut codes = vec![0; 9 * format.row_bytes()];
        for (j, row) in codes.chunks_mut(format.row_bytes()).enumerate() {
            let x: Vec<f32> = (0..40).map(|d| if (j, d) == (4, 7) { f32::INFINITY } else { d as f32 }).collect();
            format.encode(&x, row);
        }
        let weights: Vec<f32> = (0..2 * KEYS).map(|i| if i % KEYS < 9 { 0.5 } else { 0.0 }).collect();
        for isa in Isa::available() {
            let add = Add { format, codes: &codes, first: 0, weights: &weights, rows: 2 };
            if let Some((_, outputs)) = dispatch(isa, add) {
                assert!(outputs.iter().all(|x| x.is_nan()), "{}", isa.name());
            }
        }
    }
}
