//! Scores of tiles from queries and keys of 8 bits, in the manner of SageAttention.
//!
//! ```text
//! once:           c = mean key of each head                          (finite numbers only)
//! query row r:    q_r ~ f_r a_r            a_r signed bytes, f_r = max |q_r| / 127
//! key j:          k_j - c ~ g_j b_j        b_j signed bytes, g_j = max |k_j - c| / 127
//! score:          q_r . k_j ~ f_r g_j (a_r . b_j) + q_r . c
//! ```
//! The mean holds what all keys have in common, often a few large channels, which would take the other channels' precision; what it
//! adds to a row's scores is exact. CPUs multiply unsigned bytes by signed ones: `a_r + 128` is stored, and 128 times the sum of
//! `b_j` taken off.

use super::Problem;
use super::micro::Product;
use super::rows::{Row, Rows, Strided, widen_row, with_rows};
use super::scores::RowId;
use super::tile::MAX_ITEM_ROWS;
use crate::parallel::{Execution, map};
use crate::simd::{Isa, Kernel, Simd, dispatch};
use crate::tensor::Result;
use std::ops::Range;

/// Largest magnitude of the finite numbers of a row, infinite or NaN where one is.
#[inline(always)]
fn largest(row: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    for chunk in row.chunks(16) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            let x = x.abs();
            // A NaN stays.
            *lane = if x <= *lane { *lane } else { x };
        }
    }
    lanes.into_iter().fold(0.0, |m, x| if x <= m { m } else { x })
}

/// Rounds `row / scale` to signed bytes; returns `scale = max |row| / levels`, and the sum of the bytes.
#[inline(always)]
fn to_bytes(row: &[f32], levels: f32, to: &mut [i8]) -> (f32, i32) {
    let scale = largest(row) / levels;
    let inverse = if scale > 0.0 { (1.0 / scale).min(f32::MAX) } else { 0.0 };
    let mut sums = [0i32; 16];
    for (to, row) in to.chunks_mut(16).zip(row.chunks(16)) {
        for (i, (to, x)) in to.iter_mut().zip(row).enumerate() {
            // Adding 1.5 * 2^23 leaves the nearest integer in the low bits: vector code, which a saturating conversion is not.
            *to = (x * inverse + 12_582_912.0).to_bits() as i8;
            sums[i] += i32::from(*to);
        }
    }
    (scale, sums.iter().sum())
}

/// What turns sums of byte products into the scores of a tile's rows.
pub(crate) struct ByteRows {
    factors: [f32; MAX_ITEM_ROWS],
    constants: [f32; MAX_ITEM_ROWS],
}

impl ByteRows {
    pub(super) fn new() -> Self {
        Self { factors: [0.0; MAX_ITEM_ROWS], constants: [0.0; MAX_ITEM_ROWS] }
    }

    /// Row `r` of scaled queries, padded to the length of `rest`, as unsigned bytes, four to a float; less the mean query of its head
    /// where there is one. `rest` is working memory.
    #[inline(always)]
    pub(super) fn load(&mut self, r: usize, query: &[f32], keys: HeadBytes, rest: &mut [f32], to: &mut [f32]) {
        to.fill(0.0);
        let bytes = as_bytes(to);
        rest.copy_from_slice(query);
        if let Some(mean) = keys.mean_query {
            rest.iter_mut().zip(mean).for_each(|(x, m)| *x -= m);
        }
        (self.factors[r], _) = to_bytes(rest, keys.levels, bytes);
        for byte in &mut bytes[..query.len()] {
            // The same bits as 128 more.
            *byte = (*byte as u8 ^ 0x80) as i8;
        }
        let mut lanes = [0f32; 16];
        for (q, c) in query.chunks(16).zip(keys.mean.chunks(16)) {
            for (lane, (q, c)) in lanes.iter_mut().zip(q.iter().zip(c)) {
                *lane += q * c;
            }
        }
        self.constants[r] = lanes.iter().sum();
    }

    /// The numbers that row `r` of `words` stands for.
    #[inline(always)]
    pub(super) fn decode(&self, r: usize, words: &mut [f32], to: &mut [f32]) {
        for (x, byte) in to.iter_mut().zip(as_bytes(words)) {
            *x = self.factors[r] * f32::from((*byte as u8 ^ 0x80) as i8);
        }
    }

    /// What the mean key adds to row `r`.
    #[inline(always)]
    pub(super) fn constant(&self, r: usize) -> f32 {
        self.constants[r]
    }
}

/// All keys of a problem as bytes: made once, packed by every tile.
pub(crate) struct ByteKeys<'a> {
    /// Mean key of every head, `[batch * kv heads, dim]`.
    means: Vec<f32>,
    /// `[batch * kv heads, keys, words]`, four bytes to a word.
    words: Vec<f32>,
    /// `[batch * kv heads, stride]`: zeros beyond the keys, so that whole panels can be read.
    factors: Vec<f32>,
    corrections: Vec<i32>,
    stride: usize,
    keys: usize,
    dim: usize,
    levels: f32,
    /// Mean query of every query head, scaled, `[batch * query heads, dim]`, or nothing.
    mean_queries: &'a [f32],
}

/// The keys of one head in [`ByteKeys`].
#[derive(Clone, Copy)]
pub(crate) struct HeadBytes<'a> {
    mean: &'a [f32],
    /// Scaled mean of the query head that is asked for.
    mean_query: Option<&'a [f32]>,
    levels: f32,
    words: &'a [f32],
    factors: &'a [f32],
    corrections: &'a [i32],
    width: usize,
}

impl HeadBytes<'_> {
    /// The rows of words.
    #[inline(always)]
    pub(super) fn rows(&self) -> Strided<f32> {
        Strided { base: self.words.as_ptr(), stride: self.width as isize }
    }

    /// The numbers, less the mean, that key `j` stands for.
    #[inline(always)]
    pub(super) fn decode(&self, j: usize, to: &mut [f32]) {
        for (d, x) in to.iter_mut().enumerate() {
            let byte = self.words[j * self.width + d / 4].to_ne_bytes()[d % 4];
            *x = self.factors[j] * f32::from(byte as i8);
        }
    }
}

/// Four bytes to a float: floats that a row of `dim` takes.
#[inline(always)]
pub(super) fn words(dim: usize) -> usize {
    dim.div_ceil(4)
}

impl<'a> ByteKeys<'a> {
    /// Rounds the keys of every head, less their mean, to whole numbers of magnitude up to `levels`, which queries are rounded to
    /// as well, less `mean_queries` (scaled, `[batch * query heads, dim]`) if there are such.
    pub(crate) fn new(
        isa: Isa,
        problem: &Problem,
        levels: f32,
        mean_queries: &'a [f32],
        execution: &Execution,
    ) -> Result<Self> {
        let (heads, keys, dim) = (problem.batch * problem.kv_heads, problem.keys, problem.dim);
        let means = map(execution, heads, |i| {
            let (batch, head) = (i / problem.kv_heads, i % problem.kv_heads);
            with_rows!(problem, batch, head, |k, _v| dispatch(isa, Mean { k, keys, dim }))
        })?
        .concat();
        let chunks = keys.div_ceil(CHUNK);
        let parts = map(execution, heads * chunks, |i| {
            let (i, first) = (i / chunks, i % chunks * CHUNK);
            let (batch, head, mean) = (i / problem.kv_heads, i % problem.kv_heads, &means[i * dim..(i + 1) * dim]);
            let rows = first..(first + CHUNK).min(keys);
            with_rows!(problem, batch, head, |k, _v| dispatch(isa, Round { k, keys: rows.clone(), dim, mean, levels }))
        })?;
        let stride = keys.next_multiple_of(CHUNK) + CHUNK;
        let mut made = Self {
            means,
            words: Vec::with_capacity(heads * keys * words(dim)),
            factors: vec![0.0; heads * stride],
            corrections: vec![0; heads * stride],
            stride,
            keys,
            dim,
            levels,
            mean_queries,
        };
        for (i, part) in parts.into_iter().enumerate() {
            let at = i / chunks * stride + i % chunks * CHUNK;
            made.words.extend_from_slice(&part.words);
            made.factors[at..at + part.factors.len()].copy_from_slice(&part.factors);
            made.corrections[at..at + part.corrections.len()].copy_from_slice(&part.corrections);
        }
        Ok(made)
    }

    /// The mean query of a head, if there is one, times the mean key.
    pub(crate) fn mean_product(&self, problem: &Problem, id: RowId) -> f32 {
        let head = self.of(problem, id);
        head.mean_query.map_or(0.0, |query| query.iter().zip(head.mean).map(|(q, c)| q * c).sum())
    }

    /// The keys that a query head reads.
    #[inline(always)]
    pub(super) fn of(&self, problem: &Problem, id: RowId) -> HeadBytes<'_> {
        let i = id.batch * problem.kv_heads + id.head / problem.group;
        let first = (id.batch * problem.query_heads + id.head) * self.dim;
        let (width, rows) = (words(self.dim), i * self.stride..(i + 1) * self.stride);
        HeadBytes {
            mean: &self.means[i * self.dim..(i + 1) * self.dim],
            mean_query: (!self.mean_queries.is_empty()).then(|| &self.mean_queries[first..first + self.dim]),
            levels: self.levels,
            words: &self.words[i * self.keys * width..(i + 1) * self.keys * width],
            factors: &self.factors[rows.clone()],
            corrections: &self.corrections[rows],
            width,
        }
    }
}

/// Keys that one item rounds, a multiple of every panel.
const CHUNK: usize = 512;

struct Rounded {
    words: Vec<f32>,
    factors: Vec<f32>,
    corrections: Vec<i32>,
}

/// Rounds rows of keys, less `mean`, to bytes.
struct Round<'a, K> {
    k: K,
    keys: Range<usize>,
    dim: usize,
    mean: &'a [f32],
    levels: f32,
}

impl<K: Rows> Kernel for Round<'_, K> {
    type Output = Rounded;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Rounded {
        let Self { k, keys, dim, mean, levels } = self;
        let (n, width) = (keys.len(), words(dim));
        let mut made = Rounded { words: vec![0.0; n * width], factors: vec![0.0; n], corrections: vec![0; n] };
        let mut row = vec![0f32; dim.next_multiple_of(S::LANES)];
        for (i, j) in keys.enumerate() {
            // SAFETY: `j` is a key of the problem; `row` is padded to a multiple of LANES.
            unsafe { widen_row(s, k.row(j), dim, row.as_mut_ptr(), row.len()) };
            for (x, m) in row[..dim].iter_mut().zip(mean) {
                *x -= m;
            }
            let (factor, sum) = to_bytes(&row[..dim], levels, as_bytes(&mut made.words[i * width..(i + 1) * width]));
            (made.factors[i], made.corrections[i]) = (factor, -128 * sum);
        }
        made
    }
}

/// The bytes of some floats.
#[inline(always)]
fn as_bytes(words: &mut [f32]) -> &mut [i8] {
    // SAFETY: a float is four bytes, any four bytes are a float, and bytes need no alignment.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), 4 * words.len()) }
}

/// Sums of byte products for the micro-kernel.
#[derive(Clone, Copy)]
pub(super) struct ByteProduct<'a> {
    pub(super) rows: &'a ByteRows,
    pub(super) keys: HeadBytes<'a>,
    /// The tile's first row and the panel's first key in them.
    pub(super) first_row: usize,
    pub(super) first_key: usize,
}

impl ByteProduct<'_> {
    /// Scores of row `r` for the keys from `column` on from their sums of products, integers that `row` holds; its length is a multiple
    /// of `LANES`.
    #[inline(always)]
    pub(super) fn finish_row<S: Simd>(self, s: S, r: usize, column: usize, row: &mut [f32]) {
        for (i, part) in row.chunks_exact_mut(S::LANES).enumerate() {
            let column = column + i * S::LANES;
            let p = part.as_mut_ptr();
            // SAFETY: the part has LANES floats or integers.
            unsafe {
                let sum = s.add_i32(s.load_bytes(p.cast()), Product::start(self, s, p, column));
                s.store(p, self.finish(s, sum, r, column));
            }
        }
    }
}

impl<S: Simd> Product<S> for ByteProduct<'_> {
    type Sum = S::I32;
    type Part = S::I32;

    #[inline(always)]
    unsafe fn start(self, s: S, _c: *const f32, column: usize) -> S::I32 {
        let corrections = &self.keys.corrections[self.first_key + column..][..S::LANES];
        // SAFETY: LANES integers are 4 * LANES bytes.
        unsafe { s.load_bytes(corrections.as_ptr().cast()) }
    }
    #[inline(always)]
    unsafe fn row(self, s: S, a: *const f32) -> S::I32 {
        // SAFETY: the caller's promise; a float's four bytes.
        s.splat_i32(unsafe { *a.cast::<i32>() })
    }
    #[inline(always)]
    unsafe fn column(self, s: S, b: *const f32) -> S::I32 {
        // SAFETY: the caller's promise.
        unsafe { s.load_bytes(b.cast()) }
    }
    #[inline(always)]
    fn add(self, s: S, sum: S::I32, row: S::I32, column: S::I32) -> S::I32 {
        s.dot4(sum, row, column)
    }
    #[inline(always)]
    fn finish(self, s: S, sum: S::I32, r: usize, column: usize) -> S::F32 {
        let factors = &self.keys.factors[self.first_key + column..][..S::LANES];
        // SAFETY: LANES floats.
        let factors = unsafe { s.load(factors.as_ptr()) };
        let sum = s.mul(s.to_f32(sum), s.splat(self.rows.factors[self.first_row + r]));
        s.fma(sum, factors, s.splat(self.rows.constants[self.first_row + r]))
    }
}

struct Mean<K> {
    k: K,
    keys: usize,
    dim: usize,
}

impl<K: Rows> Kernel for Mean<K> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let Self { k, keys, dim } = self;
        let padded = dim.next_multiple_of(S::LANES);
        let (mut row, mut sums, mut totals) = (vec![0f32; padded], vec![0f32; padded], vec![0f64; padded]);
        for first in (0..keys).step_by(256) {
            sums.fill(0.0);
            for j in first..(first + 256).min(keys) {
                k.row(j + 8).prefetch(dim);
                // SAFETY: rows below `keys` exist.
                unsafe { widen_row(s, k.row(j), dim, row.as_mut_ptr(), padded) };
                for (sum, &x) in sums.iter_mut().zip(&row) {
                    *sum += if x.is_finite() { x } else { 0.0 };
                }
            }
            for (total, &sum) in totals.iter_mut().zip(&sums) {
                *total += f64::from(sum);
            }
        }
        totals[..dim].iter().map(|&x| (x / keys.max(1) as f64) as f32).collect()
    }
}
