//! Rows stored as small unsigned integers: `x = offset + scale * code`, a scale and an offset for each group of channels of a row.
//!
//! ```text
//! row:   codes, 8 bits: one byte each;  4 bits: byte b of a run of 16 holds channel b (low half) and channel b + 16 (high half)
//!        padded to a multiple of 32 channels
//!        scale, offset (f32) of each group
//! ```
//! The layout is the same for every instruction set.

use super::{DType, Error, Result};
use std::marker::PhantomData;

/// Channels that codes are padded to; a group is a multiple of it, or the whole row.
pub const CODE_STEP: usize = 32;

/// How rows are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeFormat {
    bits: usize,
    dim: usize,
    /// Channels per scale; at least `dim` where a row has one.
    group: usize,
}

impl CodeFormat {
    /// Rows of `dim` channels with `bits` (4 or 8) each, and a scale for each `group` of channels: a power of two of at least
    /// [`CODE_STEP`], or `None` for the whole row.
    pub fn new(bits: usize, dim: usize, group: Option<usize>) -> Result<Self> {
        if bits != 4 && bits != 8 {
            return Err(Error::value("bits", bits, "4 or 8"));
        }
        let group = group.unwrap_or(dim.next_power_of_two().max(CODE_STEP));
        if !group.is_power_of_two() || group < CODE_STEP {
            return Err(Error::value("group_size", group, format!("a power of two of at least {CODE_STEP}")));
        }
        Ok(Self { bits, dim, group })
    }

    /// Bits of a code.
    pub fn bits(&self) -> usize {
        self.bits
    }

    /// Channels of a row.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Channels that share a scale.
    pub fn group(&self) -> usize {
        self.group.min(self.dim)
    }

    /// Scales of a row.
    pub fn groups(&self) -> usize {
        self.dim.div_ceil(self.group)
    }

    /// Bytes of a row's codes.
    pub fn code_bytes(&self) -> usize {
        // In this order, as it is no overflow then where a dimension is none.
        self.dim.next_multiple_of(CODE_STEP) / 8 * self.bits
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.code_bytes() + 8 * self.groups()
    }

    /// log2 of the channels per scale.
    pub(crate) fn group_shift(&self) -> u32 {
        self.group.trailing_zeros()
    }

    fn largest(&self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    /// Codes one row. A group with a number that is not finite decodes to NaN.
    #[inline(always)]
    pub fn encode(&self, row: &[f32], to: &mut [u8]) {
        assert!(row.len() == self.dim && to.len() == self.row_bytes());
        let (codes, parameters) = to.split_at_mut(self.code_bytes());
        codes.fill(0);
        for (g, values) in row.chunks(self.group).enumerate() {
            // Lanes of their own, so that the loops become vector code.
            let (mut lows, mut highs, mut finite) = ([f32::INFINITY; 16], [f32::NEG_INFINITY; 16], [true; 16]);
            for values in values.chunks(16) {
                for (i, &x) in values.iter().enumerate() {
                    lows[i] = if x < lows[i] { x } else { lows[i] };
                    highs[i] = if x > highs[i] { x } else { highs[i] };
                    finite[i] &= x.is_finite();
                }
            }
            let low = lows.into_iter().fold(f32::INFINITY, f32::min);
            let high = highs.into_iter().fold(f32::NEG_INFINITY, f32::max);
            // A range may be more than a float holds; half of it is not.
            let half = if (high - low).is_finite() { 1.0 } else { 0.5 };
            let (mut scale, mut offset) = ((high * half - low * half) / (self.largest() * half), low);
            if finite.contains(&false) {
                (scale, offset) = (0.0, f32::NAN);
            }
            parameters[8 * g..8 * g + 4].copy_from_slice(&scale.to_ne_bytes());
            parameters[8 * g + 4..8 * g + 8].copy_from_slice(&offset.to_ne_bytes());
            let inverse = if scale > 0.0 { 1.0 / (scale * half) } else { 0.0 };
            // A scale among the subnormal numbers has no finite inverse.
            let inverse = if inverse.is_finite() { inverse } else { 0.0 };
            let start = offset * half;
            let first = g * self.group;
            // Conversions to bytes saturate, and make 0 of NaN.
            if self.bits == 8 {
                for (code, &x) in codes[first..].iter_mut().zip(values) {
                    *code = ((x * half - start) * inverse + 0.5) as u8;
                }
            } else {
                for (run, values) in codes[first / 2..].chunks_mut(16).zip(values.chunks(32)) {
                    let mut code = [0u8; 32];
                    for (code, &x) in code.iter_mut().zip(values) {
                        *code = (((x * half - start) * inverse + 0.5) as u8).min(15);
                    }
                    for (i, byte) in run.iter_mut().enumerate() {
                        *byte = code[i] | code[i + 16] << 4;
                    }
                }
            }
        }
    }

    /// The numbers that a row's codes stand for.
    pub fn decode(&self, from: &[u8], row: &mut [f32]) {
        assert!(row.len() == self.dim && from.len() == self.row_bytes());
        let (codes, parameters) = from.split_at(self.code_bytes());
        let number = |at: usize| f32::from_ne_bytes(parameters[at..at + 4].try_into().expect("4 bytes"));
        for (d, x) in row.iter_mut().enumerate() {
            let code = if self.bits == 8 { codes[d] } else { codes[d / 32 * 16 + d % 16] >> (d % 32 / 16 * 4) & 15 };
            let g = d / self.group;
            *x = f32::from(code).mul_add(number(8 * g), number(8 * g + 4));
        }
    }
}

/// A read-only view of coded rows, `[1, heads, length, dim]`, those of a head one after another.
#[derive(Clone, Copy, Debug)]
pub struct CodedView<'a> {
    base: *const u8,
    format: CodeFormat,
    heads: usize,
    len: usize,
    /// Bytes from one head to the next.
    lane: usize,
    /// Factors of the channels, `[heads, dim]`, that were divided out before coding.
    channels: Option<&'a [f32]>,
    memory: PhantomData<&'a [u8]>,
}

// SAFETY: a shared borrow of plain bytes, as `&[u8]`.
unsafe impl Send for CodedView<'_> {}
// SAFETY: as above.
unsafe impl Sync for CodedView<'_> {}

impl<'a> CodedView<'a> {
    /// A view of memory that somebody else owns.
    ///
    /// # Safety
    /// `base` is aligned to 4 bytes; `len` rows of `format.row_bytes()` are readable for `'a` at each multiple of `lane` bytes (a
    /// multiple of 4) below `heads * lane`, and nobody writes them meanwhile.
    pub unsafe fn from_raw(
        base: *const u8,
        format: CodeFormat,
        heads: usize,
        len: usize,
        lane: usize,
        channels: Option<&'a [f32]>,
    ) -> Self {
        assert!(channels.is_none_or(|c| c.len() == heads * format.dim));
        Self { base, format, heads, len, lane, channels, memory: PhantomData }
    }

    /// `[1, heads, length, dim]`.
    pub fn shape(&self) -> [usize; 4] {
        [1, self.heads, self.len, self.format.dim]
    }

    /// How the rows are coded.
    pub fn format(&self) -> CodeFormat {
        self.format
    }

    /// Factors of the channels, `[heads, dim]`: what a row decodes to times these is the row.
    pub fn channels(&self) -> Option<&'a [f32]> {
        self.channels
    }

    /// The bytes of a row.
    pub fn row(&self, head: usize, row: usize) -> &'a [u8] {
        assert!(head < self.heads && row < self.len);
        let bytes = self.format.row_bytes();
        // SAFETY: inside the rows that the view's maker vouched for.
        unsafe { std::slice::from_raw_parts(self.base.add(head * self.lane + row * bytes), bytes) }
    }

    /// Pointer to row 0 of a head.
    #[inline]
    pub(crate) fn head(&self, head: usize) -> *const u8 {
        debug_assert!(head < self.heads);
        self.base.wrapping_add(head * self.lane)
    }

    /// The row as numbers, channel factors included.
    pub fn decode(&self, head: usize, row: usize, to: &mut [f32]) {
        self.format.decode(self.row(head, row), to);
        if let Some(channels) = self.channels {
            to.iter_mut().zip(&channels[head * self.format.dim..]).for_each(|(x, c)| *x *= c);
        }
    }

    fn rows(&self, rows: std::ops::Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.len, "rows {rows:?} of {}", self.len);
        Self { base: self.base.wrapping_add(rows.start * self.format.row_bytes()), len: rows.len(), ..*self }
    }
}

/// Keys or values as attention takes them: numbers of the caller's, or coded rows of a store.
#[derive(Clone, Copy, Debug)]
pub enum KvView<'a> {
    /// Numbers, `[batch, heads, length, dim]`.
    Numbers(super::TensorView<'a>),
    /// Codes, `[1, heads, length, dim]`.
    Codes(CodedView<'a>),
}

/// In what form rows are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// Numbers of a dtype.
    Numbers(DType),
    /// Codes of so many bits.
    Codes(usize),
}

impl Storage {
    /// Bytes that so many elements take, scales aside.
    pub(crate) const fn bytes(self, elements: usize) -> usize {
        match self {
            Self::Numbers(dtype) => elements * dtype.size(),
            Self::Codes(bits) => elements * bits / 8,
        }
    }
}

impl std::fmt::Display for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Numbers(dtype) => dtype.fmt(f),
            Self::Codes(bits) => write!(f, "int{bits}"),
        }
    }
}

impl<'a> From<super::TensorView<'a>> for KvView<'a> {
    fn from(view: super::TensorView<'a>) -> Self {
        Self::Numbers(view)
    }
}

impl<'a> From<CodedView<'a>> for KvView<'a> {
    fn from(view: CodedView<'a>) -> Self {
        Self::Codes(view)
    }
}

impl<'a> KvView<'a> {
    /// `[batch, heads, length, dim]`.
    pub fn shape(&self) -> [usize; 4] {
        match self {
            Self::Numbers(view) => view.shape(),
            Self::Codes(view) => view.shape(),
        }
    }

    /// In what form the rows are stored.
    pub fn storage(&self) -> Storage {
        match self {
            Self::Numbers(view) => Storage::Numbers(view.dtype()),
            Self::Codes(view) => Storage::Codes(view.format.bits),
        }
    }

    /// The numbers, if they are not codes.
    pub fn numbers(&self) -> Option<super::TensorView<'a>> {
        match self {
            Self::Numbers(view) => Some(*view),
            Self::Codes(_) => None,
        }
    }

    /// The rows `rows` of every head.
    pub fn rows(&self, rows: std::ops::Range<usize>) -> Self {
        match self {
            Self::Numbers(view) => Self::Numbers(view.rows(rows)),
            Self::Codes(view) => Self::Codes(view.rows(rows)),
        }
    }

    /// One entry of the batch, as a batch of 1.
    pub(crate) fn batch(&self, batch: usize) -> Self {
        match self {
            Self::Numbers(view) => Self::Numbers(view.batch(batch)),
            Self::Codes(view) => {
                assert!(batch == 0, "batch {batch} of 1");
                Self::Codes(*view)
            }
        }
    }

    /// Factors of the channels of a head, by which queries are multiplied beforehand.
    pub(crate) fn channels(&self, head: usize) -> Option<&'a [f32]> {
        match self {
            Self::Codes(CodedView { channels: Some(c), format, .. }) => Some(&c[head * format.dim..][..format.dim]),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_within_half_a_step() {
        for (bits, dim, group) in [(8, 64, None), (4, 64, Some(32)), (4, 100, Some(64)), (8, 5, None), (4, 7, None)] {
            let format = CodeFormat::new(bits, dim, group).unwrap();
            let row: Vec<f32> = (0..dim).map(|d| ((d * 37 % 19) as f32 - 7.0) * (1.0 + d as f32 / 50.0)).collect();
            let (mut bytes, mut back) = (vec![0; format.row_bytes()], vec![0.0; dim]);
            format.encode(&row, &mut bytes);
            format.decode(&bytes, &mut back);
            for (values, back) in row.chunks(format.group).zip(back.chunks(format.group)) {
                let high = values.iter().copied().fold(f32::MIN, f32::max);
                let low = values.iter().copied().fold(f32::MAX, f32::min);
                let step = (high - low) / format.largest();
                for (x, y) in values.iter().zip(back) {
                    assert!((x - y).abs() <= 0.5001 * step, "{x} became {y}, step {step}");
                }
            }
        }
    }

    #[test]
    fn constant_huge_tiny_and_non_finite_rows() {
        let format = CodeFormat::new(8, 4, None).unwrap();
        let mut bytes = vec![0; format.row_bytes()];
        let mut code = |row: [f32; 4]| {
            let mut back = [0.0; 4];
            format.encode(&row, &mut bytes);
            format.decode(&bytes, &mut back);
            back
        };
        assert_eq!(code([3.5; 4]), [3.5; 4]);
        assert_eq!(code([0.0; 4]), [0.0; 4]);
        let wide = [f32::MAX, f32::MIN, f32::MAX / 3.0, f32::MIN / 3.0];
        for (x, y) in wide.into_iter().zip(code(wide)) {
            assert!((x / 255.0 - y / 255.0).abs() <= f32::MAX / 255.0 / 254.0, "{x} became {y}");
        }
        assert!(code([1e-45, 0.0, 0.0, 0.0]).iter().all(|x| x.abs() <= 2e-45));
        assert!(code([f32::NAN, 0.0, 1.0, 2.0]).iter().all(|x| x.is_nan()));
        assert!(code([f32::INFINITY, 0.0, 1.0, 2.0]).iter().all(|x| x.is_nan()));
    }

    #[test]
    fn formats_that_do_not_exist_are_refused() {
        assert!(CodeFormat::new(3, 64, None).is_err());
        assert!(CodeFormat::new(4, 64, Some(16)).is_err());
        assert!(CodeFormat::new(4, 64, Some(48)).is_err());
    }
}
