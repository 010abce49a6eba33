//! Feature maps: what rows of queries and keys become before they are multiplied.
//!
//! A map is applied to a block of rows as they are widened to f32, so that no mapped array exists. Its steps, each of which may be
//! left out, in this order:
//!
//! ```text
//! x = row + shift                 x *= scale * factor of the head         x normalised            x = W x
//! y = map(x) + offset             y *= factors of the channels            powers that keep the length
//! y *= factor of the row          (sums of features are taken here)       pairs of features rotated
//! ```

use super::rows::{dot, each, exponential, largest, multiply_row, raise, softmax};
use crate::dense::backward::load_row;
use crate::dense::matrix::{self, PackedMatrix};
use crate::dense::micro::panel;
use crate::dense::rows::Strided;
use crate::dense::scratch::Buffer;
use crate::simd::Simd;
use crate::tensor::{Error, Result, TensorView};
use std::ops::Range;

/// The function that makes features.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Map {
    /// `x`.
    Identity,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)^2`.
    ReluSquared,
    /// `elu(x) + 1`: `x + 1` above 0, else `e^x`.
    Elu1,
    /// `e^x`.
    Exp,
    /// `x / (1 + e^-x)`.
    Silu,
    /// Softmax over the channels.
    Softmax,
    /// Softmax over the channels of `x`, then of `-x`: twice as many features.
    SoftmaxPair,
    /// Of keys: softmax of each channel over all rows.
    PositionSoftmax,
    /// `e^(w x - |x|^2 / 2)` for each row `w` of the projection, up to a factor per row of queries and per head of keys.
    Gaussian,
    /// 1, channels and, with order 2, products of two channels, such that the product of two rows of features is
    /// `c0 + c1 s + c2 s^2` of the product `s` of the rows. One side of the product has the coefficients, the other has ones.
    Taylor {
        /// 1 or 2.
        order: usize,
        /// `c0`, `c1`, `c2`; none on the side without them.
        coefficients: Option<[f32; 3]>,
    },
}

/// How rows are normalised before they are mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RowNorm {
    /// Not at all.
    #[default]
    None,
    /// Divided by their length.
    Length,
    /// Less their mean, divided by their standard deviation.
    Standard,
    /// Less their largest number, where it is finite.
    Largest,
}

/// Powers of positive features.
#[derive(Clone, Copy, Debug)]
pub struct Power {
    /// The exponent.
    pub exponent: f32,
    /// Give each row the length back that it had.
    pub keep_length: bool,
}

/// A map of the rows of one tensor `[batch, heads, rows, dim]`.
#[derive(Clone, Copy, Debug)]
pub struct FeatureMap<'a> {
    /// Added to the rows, `[1 or batch, heads, rows, dim]`.
    pub shift: Option<TensorView<'a>>,
    /// Factor on all rows.
    pub scale: f32,
    /// Factors of the heads, `[batch, heads]`.
    pub head_factors: Option<&'a [f32]>,
    /// How rows are normalised.
    pub norm: RowNorm,
    /// Matrices `[1 or heads, outputs, dim]`, and their outputs.
    pub projection: Option<(&'a [f32], usize)>,
    /// What makes features.
    pub map: Map,
    /// Added to all features.
    pub offset: f32,
    /// Factors of the features, `[heads, features]`.
    pub channel_factors: Option<&'a [f32]>,
    /// Powers of the features.
    pub power: Option<Power>,
    /// Factors of the rows, `[batch, heads, rows]`.
    pub row_factors: Option<&'a [f32]>,
    /// Cosine and sine of the angle of each pair of features, `[rows, features / 2, 2]`.
    pub rotation: Option<&'a [f32]>,
}

impl Default for FeatureMap<'_> {
    fn default() -> Self {
        Self {
            shift: None,
            scale: 1.0,
            head_factors: None,
            norm: RowNorm::None,
            projection: None,
            map: Map::Identity,
            offset: 0.0,
            channel_factors: None,
            power: None,
            row_factors: None,
            rotation: None,
        }
    }
}

impl FeatureMap<'_> {
    /// Features of a row of `dim` channels.
    pub fn features(&self, dim: usize) -> usize {
        let channels = self.projection.map_or(dim, |(_, outputs)| outputs);
        match self.map {
            Map::SoftmaxPair => 2 * channels,
            Map::Taylor { order: 1, .. } => 1 + channels,
            Map::Taylor { .. } => 1 + channels + channels * (channels + 1) / 2,
            _ => channels,
        }
    }

    /// Whether the map's arrays fit rows of `x`, which the caller knows as `name`.
    pub(crate) fn check(&self, name: &'static str, shape: [usize; 4]) -> Result<()> {
        let [batch, heads, rows, dim] = shape;
        let features = self.features(dim);
        if dim == 0 || features == 0 {
            return Err(Error::value(name, format!("shape {shape:?}"), "at least one channel and one feature"));
        }
        if let Some(shift) = self.shift {
            let [first, rest @ ..] = shift.shape();
            if (first != 1 && first != batch) || rest != [heads, rows, dim] {
                let expected = format!("[1 or {batch}, {heads}, {rows}, {dim}]");
                return Err(Error::value("shift", format!("shape {:?}", shift.shape()), expected));
            }
        }
        if let Some((matrix, outputs)) = self.projection {
            let one = outputs * dim;
            if matrix.len() != one && matrix.len() != heads * one {
                return Err(Error::value(
                    "projection",
                    format!("{} numbers", matrix.len()),
                    format!("{one} per matrix"),
                ));
            }
        }
        if let Map::Taylor { order, .. } = self.map
            && order != 1
            && order != 2
        {
            return Err(Error::value("order", order, "1 or 2"));
        }
        if self.map == Map::Gaussian && self.projection.is_none() {
            return Err(Error::value("projection", "none", "a matrix of directions"));
        }
        if self.rotation.is_some() && !features.is_multiple_of(2) {
            return Err(Error::value("rotation", format!("{features} features"), "an even number"));
        }
        let lengths = [
            ("head_factors", self.head_factors, batch * heads),
            ("channel_factors", self.channel_factors, heads * features),
            ("row_factors", self.row_factors, batch * heads * rows),
            ("rotation", self.rotation, rows * features),
        ];
        for (name, given, expected) in lengths {
            if let Some(given) = given.filter(|given| given.len() != expected) {
                return Err(Error::value(name, format!("{} numbers", given.len()), expected));
            }
        }
        Ok(())
    }
}

/// Rows of one head on their way to features.
pub(crate) struct Mapper<'a> {
    map: &'a FeatureMap<'a>,
    x: TensorView<'a>,
    batch: usize,
    head: usize,
    dim: usize,
    /// `dim`, padded.
    dim_width: usize,
    /// Features of a row, and floats between two rows of them.
    pub(crate) features: usize,
    pub(crate) width: usize,
    projection: Option<PackedMatrix>,
    raw: Buffer,
    wide: Buffer,
    products: Buffer,
}

impl<'a> Mapper<'a> {
    #[inline(always)]
    pub(crate) fn new<S: Simd>(s: S, map: &'a FeatureMap<'a>, x: TensorView<'a>, batch: usize, head: usize) -> Self {
        let dim = x.shape()[3];
        let features = map.features(dim);
        let projection = map.projection.map(|(matrix, outputs)| {
            let one = outputs * dim;
            let at = if matrix.len() == one { 0 } else { head * one };
            PackedMatrix::new(s, &matrix[at..at + one], outputs, dim)
        });
        Self {
            map,
            x,
            batch,
            head,
            dim,
            dim_width: dim.next_multiple_of(panel::<S>()),
            features,
            width: features.next_multiple_of(panel::<S>()),
            projection,
            raw: Buffer::default(),
            wide: Buffer::default(),
            products: Buffer::default(),
        }
    }

    /// A row, widened, shifted, scaled and normalised; zeros in the padding.
    #[inline(always)]
    fn prepare<S: Simd>(&self, s: S, row: usize, to: &mut [f32]) {
        let Self { map, batch, head, dim, .. } = *self;
        let [_, heads, ..] = self.x.shape();
        load_row(s, &self.x, [batch, head, row], to);
        if let Some(shift) = map.shift {
            // Shifts are rare: their row is added by one scratch row at most.
            let batch = if shift.shape()[0] == 1 { 0 } else { batch };
            crate::tensor::with_element!(shift.dtype(), T => {
                for (x, &y) in to.iter_mut().zip(shift.row::<T>(batch, head, row)) {
                    *x += crate::tensor::Element::to_f32(y);
                }
            });
        }
        let factor = map.scale * map.head_factors.map_or(1.0, |factors| factors[batch * heads + head]);
        if factor != 1.0 {
            multiply_row(s, to, factor);
        }
        match map.norm {
            RowNorm::None => {}
            RowNorm::Length => {
                let length = dot(s, to, to).sqrt();
                multiply_row(s, to, 1.0 / length.max(1e-12));
            }
            RowNorm::Standard => {
                let mut sum = s.zero();
                for chunk in to.chunks_exact(S::LANES) {
                    // SAFETY: the chunk has LANES floats.
                    sum = s.add(sum, unsafe { s.load(chunk.as_ptr()) });
                }
                let mean = s.splat(s.sum(sum) / dim as f32);
                each!(s, to, x => s.sub(x, mean));
                to[dim..].fill(0.0);
                let deviation = (dot(s, to, to) / dim as f32).sqrt();
                multiply_row(s, to, 1.0 / deviation.max(1e-12));
            }
            RowNorm::Largest => {
                to[dim..].fill(f32::NEG_INFINITY);
                let most = largest(s, to);
                if most.is_finite() {
                    let most = s.splat(most);
                    each!(s, to, x => s.sub(x, most));
                }
                to[dim..].fill(0.0);
            }
        }
    }

    /// Features of the rows `rows`, before rotation, into `to`, `[rows, width]`, zeros in the padding. Of maps that take
    /// exponentials less a maximum over rows or features, the exponents.
    #[inline(always)]
    pub(crate) fn apply<S: Simd>(&mut self, s: S, rows: Range<usize>, to: &mut [f32]) {
        let (dim_width, width, features) = (self.dim_width, self.width, self.features);
        let map = self.map;
        assert!(to.len() >= rows.len() * width);
        let direct = self.projection.is_none() && !matches!(map.map, Map::SoftmaxPair | Map::Taylor { .. });
        if direct {
            for (row, to) in rows.clone().zip(to.chunks_exact_mut(width)) {
                self.prepare(s, row, to);
            }
        } else {
            let mut raw = std::mem::take(&mut self.raw);
            let all = raw.take(rows.len() * dim_width);
            for (row, to) in rows.clone().zip(all.chunks_exact_mut(dim_width)) {
                self.prepare(s, row, to);
            }
            if let Some(projection) = &mut self.projection {
                let stride = projection.stride::<S>();
                let results = self.products.take(rows.len().next_multiple_of(matrix::ROWS) * stride);
                for first in (0..rows.len()).step_by(matrix::ROWS) {
                    let count = matrix::ROWS.min(rows.len() - first);
                    let from = Strided { base: all.as_ptr(), stride: dim_width as isize };
                    let to = &mut results[first * stride..(first + matrix::ROWS) * stride];
                    // SAFETY: `all` has a row of `dim` floats for each of the rows.
                    unsafe { projection.apply(s, from, first, count, None, &mut self.wide, to) };
                }
                let outputs = map.projection.map_or(0, |(_, outputs)| outputs);
                for (r, to) in to.chunks_exact_mut(width).take(rows.len()).enumerate() {
                    let from = &mut results[r * stride..(r + 1) * stride];
                    from[outputs..].fill(0.0);
                    let raw = &all[r * dim_width..(r + 1) * dim_width];
                    Self::expand(s, map.map, from, outputs, raw, to);
                }
            } else {
                for (raw, to) in all.chunks_exact_mut(dim_width).zip(to.chunks_exact_mut(width)).take(rows.len()) {
                    let (from, dim) = (raw, self.dim);
                    Self::expand(s, map.map, from, dim, &[], to);
                }
            }
            self.raw = raw;
        }
        for (row, to) in rows.zip(to.chunks_exact_mut(width)) {
            match map.map {
                Map::Relu => each!(s, to, x => s.max(x, s.zero())),
                Map::ReluSquared => each!(s, to, x => {
                    let x = s.max(x, s.zero());
                    s.mul(x, x)
                }),
                Map::Elu1 => each!(s, to, x => {
                    let below = s.exp(s.min(x, s.zero()));
                    s.select_less(s.zero(), x, s.add(x, s.splat(1.0)), below)
                }),
                Map::Exp => exponential(s, to, 0.0),
                Map::Silu => each!(s, to, x => {
                    let e = s.exp(s.sub(s.zero(), x));
                    s.div(x, s.add(s.splat(1.0), e))
                }),
                Map::Softmax => softmax(s, to, features),
                _ => {}
            }
            if map.offset != 0.0 {
                let offset = s.splat(map.offset);
                each!(s, to, x => s.add(x, offset));
            }
            if let Some(factors) = map.channel_factors {
                let factors = &factors[self.head * features..(self.head + 1) * features];
                for (x, factor) in to.iter_mut().zip(factors) {
                    *x *= factor;
                }
            }
            to[features..].fill(0.0);
            if let Some(power) = map.power {
                self.powers(s, power, to);
            }
            if let Some(factors) = map.row_factors {
                let [_, heads, length, _] = self.x.shape();
                multiply_row(s, to, factors[(self.batch * heads + self.head) * length + row]);
            }
        }
    }

    /// Features that are not one per channel, of the `n` numbers in front of `from`; `raw` is the row before its projection.
    #[inline(always)]
    fn expand<S: Simd>(s: S, map: Map, from: &mut [f32], n: usize, raw: &[f32], to: &mut [f32]) {
        match map {
            Map::SoftmaxPair => {
                // The second half first: the first leaves its softmax where the numbers are.
                each!(s, from, x => s.sub(s.zero(), x));
                to[..n].copy_from_slice(&from[..n]);
                softmax(s, from, n);
                let (first, second) = to.split_at_mut(n);
                second[..n].copy_from_slice(&from[..n]);
                for (x, y) in from.iter_mut().zip(first.iter()) {
                    *x = -y;
                }
                softmax(s, from, n);
                first.copy_from_slice(&from[..n]);
                to[2 * n..].fill(0.0);
            }
            Map::Gaussian => {
                let half = s.splat(0.5 * dot(s, raw, raw));
                each!(s, from, x => s.sub(x, half));
                to[..n].copy_from_slice(&from[..n]);
                to[n..].fill(0.0);
            }
            Map::Taylor { order, coefficients } => {
                let [c0, c1, c2] = coefficients.unwrap_or([1.0; 3]);
                let (diagonal, off) = if coefficients.is_some() { (c2, 2.0 * c2) } else { (1.0, 1.0) };
                to[0] = c0;
                for (to, x) in to[1..=n].iter_mut().zip(&from[..n]) {
                    *to = c1 * x;
                }
                let mut at = 1 + n;
                if order == 2 {
                    for a in 0..n {
                        let x = from[a];
                        let (scaled, rest) = (off * x, &from[a..n]);
                        for (to, y) in to[at..at + rest.len()].iter_mut().zip(rest) {
                            *to = scaled * y;
                        }
                        to[at] = diagonal * x * x;
                        at += rest.len();
                    }
                }
                to[at..].fill(0.0);
            }
            _ => {
                to[..n].copy_from_slice(&from[..n]);
                to[n..].fill(0.0);
            }
        }
    }

    #[inline(always)]
    fn powers<S: Simd>(&self, s: S, power: Power, row: &mut [f32]) {
        let Power { exponent, keep_length } = power;
        if !keep_length {
            raise(s, &mut row[..], exponent, 1.0);
            row[self.features..].fill(0.0);
            return;
        }
        let mut most = s.zero();
        for chunk in row.chunks_exact(S::LANES) {
            // SAFETY: the chunk has LANES floats.
            let x = unsafe { s.load(chunk.as_ptr()) };
            most = s.max(s.max(x, s.sub(s.zero(), x)), most);
        }
        let most = s.max_lane(most);
        if most > 0.0 {
            // Numbers of at most 1 neither overflow nor vanish as a whole.
            multiply_row(s, row, 1.0 / most);
            let length = dot(s, row, row).sqrt() * most;
            raise(s, &mut row[..], exponent, 1.0);
            row[self.features..].fill(0.0);
            let raised = dot(s, row, row).sqrt();
            multiply_row(s, row, length / raised);
        }
    }

    /// Turns the exponents of rows of queries into features, each row less its largest exponent.
    #[inline(always)]
    pub(crate) fn exponentials_by_row<S: Simd>(&self, s: S, row: &mut [f32]) {
        row[self.features..].fill(f32::NEG_INFINITY);
        let most = largest(s, row);
        exponential(s, row, most);
        row[self.features..].fill(0.0);
    }

    /// Rotates the features of row `row`.
    #[inline(always)]
    pub(crate) fn rotate(&self, row: usize, features: &mut [f32]) {
        if let Some(rotation) = self.map.rotation {
            let table = &rotation[row * self.features..(row + 1) * self.features];
            for (pair, angle) in features.chunks_exact_mut(2).zip(table.chunks_exact(2)) {
                let (a, b, cosine, sine) = (pair[0], pair[1], angle[0], angle[1]);
                pair[0] = a * cosine - b * sine;
                pair[1] = a * sine + b * cosine;
            }
        }
    }
}
