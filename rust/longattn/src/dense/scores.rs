//! What happens to a row of raw scores between QK and PV: score modifications, masks, online softmax.

use super::keys::List;
use super::{Problem, RelativeBias};
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

    /// The denominator with one more logit.
    pub(crate) fn with_logit(self, logit: f32) -> Self {
        let max = self.max.max(logit);
        if max == f32::NEG_INFINITY {
            return self;
        }
        Self { max, sum: self.sum * exp_difference(self.max, max) + exp_difference(logit, max) }
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

/// `e^x` for a difference of maxima, of which both may be minus infinity. Mostly there is none.
#[inline(always)]
pub(crate) fn exp_difference(old: f32, new: f32) -> f32 {
    if old == f32::NEG_INFINITY {
        0.0
    } else if old == new {
        1.0
    } else {
        (old - new).exp()
    }
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

/// Applies softcap, biases and masks to `scores`, the scaled logits of the keys `keys`, counted along `list` if there is one.
#[inline(always)]
pub(crate) fn modify<S: Simd>(
    s: S,
    problem: &Problem,
    id: RowId,
    scores: &mut [f32],
    list: Option<&List>,
    keys: Range<usize>,
) {
    match list {
        None => modify_range(s, problem, id, scores, keys.start),
        Some(list) => modify_listed(s, problem, id, scores, list, keys),
    }
}

/// [`modify`] of the keys of the problem from `first_key` on.
///
/// `scores` reaches up to a multiple of `LANES`; what lies beyond the row's visible range is overwritten afterwards by
/// [`online_softmax`]. Biases and masks go key by key over slices, which the compiler turns into vector code.
#[inline(always)]
fn modify_range<S: Simd>(s: S, problem: &Problem, id: RowId, scores: &mut [f32], first_key: usize) {
    let options = &problem.options;
    cap(s, options.softcap, scores);
    let n = scores.len() / S::LANES * S::LANES;
    let p = scores.as_mut_ptr();
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
    // The others exist for the keys of the problem only, not for the padding of the buffer.
    let keys = scores.len().min(problem.keys - first_key);
    modify_by_key(problem, id, &mut scores[..keys], first_key);
}

/// [`modify`] of the keys `keys` of a list.
#[inline(always)]
fn modify_listed<S: Simd>(s: S, problem: &Problem, id: RowId, scores: &mut [f32], list: &List, keys: Range<usize>) {
    cap(s, problem.options.softcap, scores);
    let scores = &mut scores[..keys.len()];
    if problem.options.looks_at_keys() {
        let index = &list.index[keys.clone()];
        let mut start = 0;
        // Keys that follow one another go together.
        while start < index.len() {
            let first = index[start] as usize;
            let run = index[start..].iter().zip(first..).take_while(|&(&j, next)| j as usize == next).count();
            let scores = &mut scores[start..start + run];
            if let Some(slopes) = problem.options.alibi_slopes {
                let slope = slopes[id.batch * problem.query_heads + id.head];
                let distance = first as f32 - problem.position(id.row) as f32;
                for (j, score) in scores.iter_mut().enumerate() {
                    *score -= slope * (distance + j as f32).abs();
                }
            }
            modify_by_key(problem, id, scores, first);
            start += run;
        }
    }
    if let Some(bias) = list.bias {
        add(scores, &bias[keys.clone()]);
    }
    if let Some(patch) = list.patch {
        patch.modify(problem.query_heads, problem.queries, id, scores, keys);
    }
}

/// `c * tanh(s / c)` of every score, if `c` is above 0.
#[inline(always)]
fn cap<S: Simd>(s: S, softcap: f32, scores: &mut [f32]) {
    if softcap > 0.0 {
        let (cap, inverse) = (s.splat(softcap), s.splat(1.0 / softcap));
        for part in scores.chunks_exact_mut(S::LANES) {
            let p = part.as_mut_ptr();
            // SAFETY: the part has LANES floats.
            unsafe { s.store(p, s.mul(cap, s.tanh(s.mul(s.load(p), inverse)))) };
        }
    }
}

/// The biases and masks that have an entry for each key, on the scores of the keys from `first_key` on.
#[inline(always)]
fn modify_by_key(problem: &Problem, id: RowId, scores: &mut [f32], first_key: usize) {
    let (options, keys) = (&problem.options, scores.len());
    if let Some(bias) = &options.relative_bias {
        add_relative(scores, bias, problem, id, first_key);
    }
    if let Some(bias) = &options.bias {
        let (row, stride) = bias.row(id.batch, id.head, id.row, first_key);
        if stride == 1 {
            // SAFETY: keys first_key.. are inside the bias, whose shape was checked against the problem.
            add(scores, unsafe { std::slice::from_raw_parts(row, keys) });
        } else {
            for (j, score) in scores.iter_mut().enumerate() {
                // SAFETY: as above.
                *score += unsafe { *row.wrapping_offset(j as isize * stride) };
            }
        }
    }
    if let Some(mask) = &options.mask {
        let (row, stride) = mask.row(id.batch, id.head, id.row, first_key);
        if stride == 1 {
            // SAFETY: keys first_key.. are inside the mask, whose shape was checked against the problem.
            hide(scores, unsafe { std::slice::from_raw_parts(row, keys) }, |seen| seen == 0);
        } else {
            for (j, score) in scores.iter_mut().enumerate() {
                // SAFETY: as above.
                if unsafe { *row.wrapping_offset(j as isize * stride) } == 0 {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
    }
    let first = id.batch * problem.keys + first_key;
    let of_keys = first..first + keys;
    if let Some(segments) = &options.segments {
        let own = segments.queries[id.batch * problem.queries + id.row];
        hide(scores, &segments.keys[of_keys.clone()], |segment| segment != own);
    }
    if let Some(until) = options.visible_until {
        let position = problem.position(id.row) as i32;
        hide(scores, &until[of_keys], |until| until <= position);
    }
}

/// Adds the entries of a row's head at the distances of the keys `first_key..`: the table inside its range, its ends beyond.
#[inline(always)]
fn add_relative(scores: &mut [f32], bias: &RelativeBias, problem: &Problem, id: RowId, first_key: usize) {
    let table = bias.of_head(id.head, problem.query_heads);
    // Entry of the first key; may lie far outside.
    let first = first_key as isize - problem.position(id.row) + bias.zero as isize;
    let keys = scores.len() as isize;
    let inside = (-first).clamp(0, keys)..(table.len() as isize - first).clamp(0, keys);
    let (before, rest) = scores.split_at_mut(inside.start as usize);
    let (within, after) = rest.split_at_mut((inside.end - inside.start) as usize);
    let (low, high) = (table[0], table[table.len() - 1]);
    for score in before {
        *score += low;
    }
    if !within.is_empty() {
        add(within, &table[(first + inside.start) as usize..]);
    }
    for score in after {
        *score += high;
    }
}

/// Adds the numbers of the keys.
#[inline(always)]
fn add(scores: &mut [f32], of_keys: &[f32]) {
    for (score, &number) in scores.iter_mut().zip(of_keys) {
        *score += number;
    }
}

/// Minus infinity wherever `hidden` holds for what belongs to the key.
#[inline(always)]
fn hide<T: Copy>(scores: &mut [f32], of_keys: &[T], hidden: impl Fn(T) -> bool) {
    for (score, &key) in scores.iter_mut().zip(of_keys) {
        *score = if hidden(key) { f32::NEG_INFINITY } else { *score };
    }
}

/// Whether a block of scores is left out of a row's softmax: every visible score is below the running maximum by more than the
/// threshold allows. A NaN is not below; nothing is below a maximum of minus infinity.
#[inline(always)]
pub(crate) fn is_negligible(problem: &Problem, scores: &[f32], visible: Range<usize>, running: Running) -> bool {
    let bound = running.max + problem.log_skip;
    let mut below = true;
    for &score in &scores[visible] {
        below &= score < bound;
    }
    below
}

/// Where a row's weights go.
pub(crate) trait Weights<S: Simd> {
    /// Takes the weights of the keys from `j` on, a multiple of `LANES`.
    ///
    /// # Safety
    /// The row of scores has those keys.
    unsafe fn take(&mut self, s: S, j: usize, weights: S::F32);

    /// Takes the weights of the keys from `j` on, a multiple of `2 * LANES`.
    ///
    /// # Safety
    /// The row of scores has those keys.
    #[inline(always)]
    unsafe fn take_two(&mut self, s: S, j: usize, weights: [S::F32; 2]) {
        // SAFETY: the caller's promise.
        unsafe {
            self.take(s, j, weights[0]);
            self.take(s, j + S::LANES, weights[1]);
        }
    }
}

/// In the place of the scores.
struct InPlace(*mut f32);

impl<S: Simd> Weights<S> for InPlace {
    #[inline(always)]
    unsafe fn take(&mut self, s: S, j: usize, weights: S::F32) {
        // SAFETY: the caller's promise.
        unsafe { s.store(self.0.add(j), weights) };
    }
}

/// One block's step of the online softmax: turns `scores[visible]` into `exp(s - max)`, everything else into 0, and returns the
/// new running state with the factor that rescales what was accumulated before.
#[inline(always)]
pub(crate) fn online_softmax<S: Simd>(s: S, scores: &mut [f32], visible: Range<usize>, old: Running) -> (Running, f32) {
    let max = largest_logit::<S, false>(s, scores, visible.clone(), 1.0, old);
    let (p, n) = (scores.as_mut_ptr(), scores.len());
    // SAFETY: the row of scores, where weights take the place of what was read.
    unsafe { weights_below::<S, _, false>(s, p, n, visible, 1.0, max, old, false, &mut InPlace(p)) }
}

/// Largest logit of a block and of what a row saw before. `scores` are logits, or with `SCALED` want the factor `scale`; those that are not visible
/// are overwritten by what no logit is below.
#[inline(always)]
pub(crate) fn largest_logit<S: Simd, const SCALED: bool>(
    s: S,
    scores: &mut [f32],
    visible: Range<usize>,
    scale: f32,
    old: Running,
) -> f32 {
    let n = scores.len();
    debug_assert!(n.is_multiple_of(S::LANES) && visible.end <= n);
    if visible.is_empty() {
        return old.max;
    }
    let hidden = if scale < 0.0 { f32::INFINITY } else { f32::NEG_INFINITY };
    if visible.start > 0 {
        scores[..visible.start].fill(hidden);
    }
    if visible.end < n {
        scores[visible.end..].fill(hidden);
    }
    // Rounding keeps the order, so that the logit of the largest score is the largest, or with a scale below 0 that of the smallest.
    let down = SCALED && scale < 0.0;
    let p = scores.as_ptr();
    // Two, so that one need not wait for the other.
    let mut extremes = [s.splat(if down { f32::INFINITY } else { f32::NEG_INFINITY }); 2];
    macro_rules! find {
        ($which:ident) => {
            for j in (0..n).step_by(2 * S::LANES) {
                // SAFETY: n is a multiple of LANES; the last vector may be taken twice.
                let x = unsafe { [s.load(p.add(j)), s.load(p.add((j + S::LANES).min(n - S::LANES)))] };
                extremes = [s.$which(x[0], extremes[0]), s.$which(x[1], extremes[1])];
            }
        };
    }
    if down {
        find!(min);
    } else {
        find!(max);
    }
    let extreme = match down {
        true => -s.max_lane(s.sub(s.zero(), s.min(extremes[0], extremes[1]))),
        false => s.max_lane(s.max(extremes[0], extremes[1])),
    };
    (if SCALED { scale * extreme } else { extreme }).max(old.max)
}

/// Weights of a block, `exp(score - max)`, with `SCALED` `exp(scale * score - max)`, for the `max` of [`largest_logit`], 0 for what is not visible; they go to `to`.
/// `rough` ones, up to 1e-6 and 2^-23 of `max` off, take less time. Returns the new running state and the factor that rescales what was accumulated
/// before.
///
/// # Safety
/// `scores` is readable for `n` floats, a multiple of `LANES`, `visible` lies inside them, and `to` may take as many weights. It may
/// overwrite scores with the weights that come of them.
#[inline(always)]
pub(crate) unsafe fn weights_below<S: Simd, W: Weights<S>, const SCALED: bool>(
    s: S,
    scores: *const f32,
    n: usize,
    visible: Range<usize>,
    scale: f32,
    max: f32,
    old: Running,
    rough: bool,
    to: &mut W,
) -> (Running, f32) {
    if visible.is_empty() || max == f32::NEG_INFINITY {
        let mut nan = false;
        for j in visible {
            // SAFETY: j is inside the row.
            nan |= unsafe { *scores.add(j) }.is_nan();
        }
        let mut j = 0;
        while j < n {
            // SAFETY: n is a multiple of LANES.
            unsafe {
                if j + 2 * S::LANES <= n {
                    to.take_two(s, j, [s.zero(); 2]);
                } else {
                    to.take(s, j, s.zero());
                }
            }
            j += 2 * S::LANES;
        }
        // Nothing visible but -inf, unless a NaN hides here (the vector maximum passes over them).
        return (if nan { Running { max: 0.0, sum: f32::NAN } } else { old }, 1.0);
    }
    let log2_e = std::f32::consts::LOG2_E;
    let (factor, shift) = (s.splat(scale), s.splat(max));
    let (factor2, shift2) = (s.splat(scale * log2_e), s.splat(-max * log2_e));
    // A macro, not a closure: vectors pass through.
    macro_rules! weights {
        ($j:expr) => {{
            // SAFETY: n is a multiple of LANES, and j below n.
            unsafe {
                let x = s.load(scores.add($j));
                match rough {
                    true => s.exp2_rough(s.fma(x, factor2, shift2)),
                    false if SCALED => s.exp(s.sub(s.mul(x, factor), shift)),
                    false => s.exp(s.sub(x, shift)),
                }
            }
        }};
    }
    let mut sums = [s.zero(); 2];
    let mut j = 0;
    // Side by side where the constants of both fit the registers.
    while S::SUMS == 16 && j + 2 * S::LANES <= n {
        let two = [weights!(j), weights!(j + S::LANES)];
        // SAFETY: the row has both vectors.
        unsafe { to.take_two(s, j, two) };
        sums = [s.add(sums[0], two[0]), s.add(sums[1], two[1])];
        j += 2 * S::LANES;
    }
    while j < n {
        let one = weights!(j);
        // SAFETY: the row has this vector.
        unsafe { to.take(s, j, one) };
        sums[0] = s.add(sums[0], one);
        j += S::LANES;
    }
    let factor = exp_difference(old.max, max);
    (Running { max, sum: old.sum * factor + s.sum(s.add(sums[0], sums[1])) }, factor)
}
