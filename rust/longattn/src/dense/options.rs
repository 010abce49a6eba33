//! What callers may ask of the scores, and whether it fits the problem.

use crate::tensor::{DType, Error, Result, TensorView};
use std::marker::PhantomData;
use std::ops::Range;

/// An array `[batch, query heads, queries, keys]` of which any axis may repeat (stride 0).
#[derive(Clone, Copy, Debug)]
pub struct Broadcast<'a, T> {
    ptr: *const T,
    shape: [usize; 4],
    strides: [isize; 4],
    memory: PhantomData<&'a [T]>,
}

// SAFETY: a shared borrow of plain numbers, as `&[T]`.
unsafe impl<T: Sync> Send for Broadcast<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Broadcast<'_, T> {}

impl<'a, T> Broadcast<'a, T> {
    /// A contiguous array; axes of length 1 repeat.
    pub fn new(data: &'a [T], shape: [usize; 4]) -> Result<Self> {
        if shape.iter().product::<usize>() != data.len() {
            return Err(Error::value("shape", format!("{shape:?} over {} elements", data.len()), "the slice's length"));
        }
        let [_, h, l, d] = shape.map(|n| n as isize);
        let mut strides = [h * l * d, l * d, d, 1];
        for (stride, &n) in strides.iter_mut().zip(&shape) {
            if n == 1 {
                *stride = 0;
            }
        }
        Ok(Self { ptr: data.as_ptr(), shape, strides, memory: PhantomData })
    }

    /// An array of somebody else's memory; strides in elements, 0 where an axis repeats.
    ///
    /// # Safety
    /// Every element that the shape and strides reach from `ptr` is readable for `'a`, aligned, and not written meanwhile.
    pub unsafe fn from_raw(ptr: *const T, shape: [usize; 4], strides: [isize; 4]) -> Self {
        Self { ptr, shape, strides, memory: PhantomData }
    }

    fn check(&self, name: &'static str, shape: [usize; 4]) -> Result<()> {
        if self.shape.iter().zip(&self.strides).zip(&shape).all(|((&n, &s), &m)| n == m || (n == 1 && s == 0)) {
            return Ok(());
        }
        Err(Error::value(name, format!("shape {:?}", self.shape), format!("{shape:?}, axes may be 1")))
    }

    /// `[batch, query heads, queries, keys]`, or what the axes of another use are.
    pub(crate) fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Pointer to an element and the stride along the keys.
    #[inline(always)]
    pub(crate) fn row(&self, batch: usize, head: usize, row: usize, key: usize) -> (*const T, isize) {
        let s = &self.strides;
        let offset = batch as isize * s[0] + head as isize * s[1] + row as isize * s[2] + key as isize * s[3];
        (self.ptr.wrapping_offset(offset), s[3])
    }
}

/// A bias that depends on the distance between key and position.
#[derive(Clone, Copy, Debug)]
pub struct RelativeBias<'a, F = f32> {
    /// `[query heads, entries]`; entry `key - position + zero`, or the nearest there is, is added to the logit.
    pub table: &'a [F],
    /// The entry of the key at the query's own position.
    pub zero: usize,
}

impl<'a, F> RelativeBias<'a, F> {
    /// Entries of one of `heads` heads.
    #[inline(always)]
    pub(crate) fn of_head(&self, head: usize, heads: usize) -> &'a [F] {
        let entries = self.table.len() / heads;
        &self.table[head * entries..(head + 1) * entries]
    }
}

/// Numbers of queries and keys: a query sees keys of its own number only.
#[derive(Clone, Copy, Debug)]
pub struct Segments<'a> {
    /// `[batch, queries]`.
    pub queries: &'a [i32],
    /// `[batch, keys]`.
    pub keys: &'a [i32],
}

/// The result over other keys, which enters the softmax as one more part.
#[derive(Clone, Copy, Debug)]
pub struct State<'a> {
    /// Output, `[batch, query heads, queries, value_dim]`.
    pub out: TensorView<'a>,
    /// Its log-sum-exp, `[batch, query heads, queries, 1]` in f32; where it is minus infinity the output does not count, whatever
    /// it holds.
    pub lse: TensorView<'a>,
}

impl State<'_> {
    /// The state of the query rows `rows`.
    pub(crate) fn rows(&self, rows: Range<usize>) -> Self {
        Self { out: self.out.rows(rows.clone()), lse: self.lse.rows(rows) }
    }
}

/// What changes the scores. Logits are `scale * q . k`, then softcap, then ALiBi, relative bias and bias, then masks. `F` is the type
/// of the arithmetic.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a, F = f32> {
    /// Factor of the dot products; `None` is `head_dim^-0.5`.
    pub scale: Option<F>,
    /// Factors of each query row's dot products in place of `scale`, `[batch, query heads, queries, 1]`.
    pub row_scales: Option<Broadcast<'a, F>>,
    /// Query row i, at position `keys - queries + i`, sees keys up to its own position.
    pub causal: bool,
    /// Keys that a row sees before its position; `None` is all.
    pub window_left: Option<usize>,
    /// Keys that a row sees after its position; `None` is all.
    pub window_right: Option<usize>,
    /// `c * tanh(s / c)` when above 0.
    pub softcap: F,
    /// Added to the logits.
    pub bias: Option<Broadcast<'a, F>>,
    /// Added to the logits by distance.
    pub relative_bias: Option<RelativeBias<'a, F>>,
    /// Non-zero where a row sees a key.
    pub mask: Option<Broadcast<'a, u8>>,
    /// Segments that keep to themselves.
    pub segments: Option<Segments<'a>>,
    /// The first position that does not see a key any more, `[batch, keys]`.
    pub visible_until: Option<&'a [i32]>,
    /// `-slope * |position - key|`, `[batch, query heads]`.
    pub alibi_slopes: Option<&'a [F]>,
    /// A logit of each query head that takes part in the denominator only.
    pub sinks: Option<&'a [F]>,
    /// Blocks of keys are left out of a row's softmax whose weights all lie below this, relative to the largest weight the row met
    /// before; 0 leaves out none. Several rows go together, and a block is left out for all of them or for none.
    ///
    /// A key left out weighs at most this, the row's largest 1: `n` keys left out are a share of at most `n * skip_threshold`.
    pub skip_threshold: f32,
    /// Scores of more than 8 query rows per KV head come from queries and keys rounded to 8 bits, keys less their mean
    /// (`dense/bytes.rs`), where the CPU multiplies bytes; elsewhere from floats.
    pub qk_int8: bool,
    /// The result over other keys that these are added to.
    pub state: Option<State<'a>>,
}

impl Options<'_> {
    /// Whether raw scaled dot products are the logits.
    #[inline(always)]
    pub(crate) fn is_plain(&self) -> bool {
        self.softcap == 0.0 && !self.looks_at_keys()
    }

    /// Whether logits depend on which keys they are of, other than by what causality and window hide.
    #[inline(always)]
    pub(crate) fn looks_at_keys(&self) -> bool {
        self.bias.is_some()
            || self.mask.is_some()
            || self.alibi_slopes.is_some()
            || self.relative_bias.is_some()
            || self.segments.is_some()
            || self.visible_until.is_some()
    }
}

impl<F: Copy + Into<f64>> Options<'_, F> {
    /// Whether the options fit scores of this shape, `[batch, query heads, queries, keys]`, and outputs of `value_dim` numbers.
    pub(crate) fn check(&self, scores: [usize; 4], value_dim: usize) -> Result<()> {
        let [batch, heads, queries, keys] = scores;
        let (scale, softcap): (f64, f64) = (self.scale.map_or(1.0, Into::into), self.softcap.into());
        if !scale.is_finite() {
            return Err(Error::value("scale", scale, "a finite number"));
        }
        if !(softcap >= 0.0 && softcap.is_finite()) {
            return Err(Error::value("softcap", softcap, "0 (off) or a positive number"));
        }
        if !(0.0..1.0).contains(&self.skip_threshold) {
            return Err(Error::value("skip_threshold", self.skip_threshold, "0 (off) or a number below 1"));
        }
        if let Some(scales) = &self.row_scales {
            scales.check("scale", [batch, heads, queries, 1])?;
        }
        if let Some(bias) = &self.bias {
            bias.check("bias", scores)?;
        }
        if let Some(mask) = &self.mask {
            mask.check("mask", scores)?;
        }
        let lengths = [
            ("alibi_slopes", self.alibi_slopes.map(<[F]>::len), batch * heads),
            ("sinks", self.sinks.map(<[F]>::len), heads),
            ("segments", self.segments.map(|s| s.queries.len()), batch * queries),
            ("segments", self.segments.map(|s| s.keys.len()), batch * keys),
            ("visible_until", self.visible_until.map(<[i32]>::len), batch * keys),
        ];
        for (name, got, expected) in lengths {
            if let Some(got) = got.filter(|&got| got != expected) {
                let per = format!("{expected} for batch {batch}, {heads} heads, {queries} queries and {keys} keys");
                return Err(Error::value(name, format!("{got} numbers"), per));
            }
        }
        if let Some(bias) = &self.relative_bias
            && heads > 0
            && (bias.table.len() % heads != 0 || bias.zero >= bias.table.len() / heads)
        {
            let got = format!("{} numbers with distance 0 at entry {}", bias.table.len(), bias.zero);
            return Err(Error::value("relative_bias", got, format!("rows of {heads} heads that reach that entry")));
        }
        if self.visible_until.is_some() && keys > i32::MAX as usize {
            return Err(Error::value("k", format!("{keys} keys"), "fewer than 2^31 with visible_until"));
        }
        if let Some(state) = &self.state {
            let rows = [batch, heads, queries];
            if state.out.shape() != [batch, heads, queries, value_dim] {
                let expected = format!("an output {rows:?} x {value_dim}");
                return Err(Error::value("state", format!("an output {:?}", state.out.shape()), expected));
            }
            if state.lse.dtype() != DType::F32 || state.lse.shape() != [batch, heads, queries, 1] {
                let got = format!("an lse {} {:?}", state.lse.dtype(), state.lse.shape());
                return Err(Error::value("state", got, format!("float32 {rows:?} x 1")));
            }
        }
        Ok(())
    }
}
