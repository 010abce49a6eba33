//! What happens to a row of raw scores between QK and PV: score modifications, masks, online softmax.

use super::Problem;
use crate::simd::{MAX_LANES, Simd};
use std::ops::Range;

/// Running softmax of one query row: `sum_j exp(s_j - max)`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Running {
    pub(crate) max: f32,
    pub(crate) sum: f32,
}

impl Running {
    pub(crate) const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };

    /// The denominator with one more logit, which has no value.
    pub(crate) fn with_sink(self, sink: f32) -> Self {
        let max = self.max.max(sink);
        if max == f32::NEG_INFINITY {
            return self;
        }
        Self { max, sum: self.sum * exp_difference(self.max, max) + exp_difference(sink, max) }
    }

    /// What turns outputs accumulated with this state into those over the denominator `total`; 0 where nothing was seen.
    pub(crate) fn normalise(self, total: Self) -> f32 {
        if self.sum == 0.0 { 0.0 } else { exp_difference(self.max, total.max) / total.sum }
    }

    /// ln sum_j exp(s_j).
    pub(crate) fn lse(self) -> f32 {
        if self.sum == 0.0 { f32::NEG_INFINITY } else { self.max + self.sum.ln() }
    }
}

/// `e^x` for a difference of maxima, of which both may be minus infinity.
#[inline(always)]
pub(crate) fn exp_difference(old: f32, new: f32) -> f32 {
    if old == f32::NEG_INFINITY { 0.0 } else { (old - new).exp() }
}

/// Which query row a row of scores belongs to.
#[derive(Clone, Copy)]
pub(crate) struct RowId {
    pub(crate) batch: usize,
    /// Query head.
    pub(crate) head: usize,
    /// Query row.
    pub(crate) row: usize,
}

/// Applies softcap, ALiBi, bias and mask to `scores`, the scaled logits of the keys `first_key..`.
///
/// Whole vectors are processed: `scores` reaches up to a multiple of `LANES`; what lies beyond the row's visible range is
/// overwritten afterwards by [`online_softmax`].
#[inline(always)]
pub(crate) fn modify<S: Simd>(s: S, problem: &Problem, id: RowId, scores: &mut [f32], first_key: usize) {
    let options = &problem.options;
    let n = scores.len() / S::LANES * S::LANES;
    let p = scores.as_mut_ptr();
    if options.softcap > 0.0 {
        let (cap, inverse) = (s.splat(options.softcap), s.splat(1.0 / options.softcap));
        for j in (0..n).step_by(S::LANES) {
            // SAFETY: j + LANES <= n <= scores.len().
            unsafe { s.store(p.add(j), s.mul(cap, s.tanh(s.mul(s.load(p.add(j)), inverse)))) };
        }
    }
    if let Some(slopes) = options.alibi_slopes {
        let slope = slopes[id.batch * problem.query_heads + id.head];
        let position = problem.position(id.row) as f32;
        let iota: [f32; MAX_LANES] = std::array::from_fn(|i| i as f32);
        // SAFETY: iota holds MAX_LANES floats.
        let iota = unsafe { s.load(iota.as_ptr()) };
        for j in (0..n).step_by(S::LANES) {
            let distance = s.sub(s.add(s.splat((first_key + j) as f32), iota), s.splat(position));
            let distance = s.max(distance, s.sub(s.zero(), distance));
            // SAFETY: j + LANES <= n <= scores.len().
            unsafe { s.store(p.add(j), s.fma(s.splat(-slope), distance, s.load(p.add(j)))) };
        }
    }
    // Bias and mask exist for the keys of the problem only, not for the padding of the buffer.
    let keys = scores.len().min(problem.keys - first_key);
    if let Some(bias) = &options.bias {
        let (row, stride) = bias.row(id.batch, id.head, id.row, first_key);
        for (j, score) in scores[..keys].iter_mut().enumerate() {
            // SAFETY: key first_key + j is inside the bias, whose shape was checked against the problem.
            *score += unsafe { *row.wrapping_offset(j as isize * stride) };
        }
    }
    if let Some(mask) = &options.mask {
        let (row, stride) = mask.row(id.batch, id.head, id.row, first_key);
        for (j, score) in scores[..keys].iter_mut().enumerate() {
            // SAFETY: key first_key + j is inside the mask, whose shape was checked against the problem.
            if unsafe { *row.wrapping_offset(j as isize * stride) } == 0 {
                *score = f32::NEG_INFINITY;
            }
        }
    }
}

/// One block's step of the online softmax: turns `scores[visible]` into `exp(s - max)`, everything else into 0, and returns the
/// new running state with the factor that rescales what was accumulated before.
#[inline(always)]
pub(crate) fn online_softmax<S: Simd>(s: S, scores: &mut [f32], visible: Range<usize>, old: Running) -> (Running, f32) {
    let n = scores.len();
    debug_assert!(n.is_multiple_of(S::LANES) && visible.end <= n);
    if visible.is_empty() {
        scores.fill(0.0);
        return (old, 1.0);
    }
    scores[..visible.start].fill(f32::NEG_INFINITY);
    scores[visible.end..].fill(f32::NEG_INFINITY);
    let p = scores.as_mut_ptr();
    let mut largest = s.splat(f32::NEG_INFINITY);
    for j in (0..n).step_by(S::LANES) {
        // SAFETY: n is a multiple of LANES.
        largest = s.max(unsafe { s.load(p.add(j)) }, largest);
    }
    let max = s.max_lane(largest).max(old.max);
    if max == f32::NEG_INFINITY {
        // Nothing visible but -inf, unless a NaN hides here (the vector maximum passes over them).
        let nan = scores[visible].iter().any(|x| x.is_nan());
        scores.fill(0.0);
        return (if nan { Running { max: 0.0, sum: f32::NAN } } else { old }, 1.0);
    }
    let shift = s.splat(max);
    let mut sum = s.zero();
    for j in (0..n).step_by(S::LANES) {
        // SAFETY: n is a multiple of LANES.
        unsafe {
            let e = s.exp(s.sub(s.load(p.add(j)), shift));
            s.store(p.add(j), e);
            sum = s.add(sum, e);
        }
    }
    let factor = exp_difference(old.max, max);
    (Running { max, sum: old.sum * factor + s.sum(sum) }, factor)
}
