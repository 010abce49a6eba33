//! Attention of a few query rows over many keys: one pass over K and V, which is all the time there is.
//!
//! ```text
//! for each block of keys:
//!     S = Q K^T          dot products along contiguous rows, 16 accumulators (12 or 8 where registers are few): 4 query rows x 4 keys;
//!                        of bytes with a key in each lane (codes.rs); of bf16 by matrix registers (register_scores.rs)
//!     modify, mask, online softmax                       (scores.rs)
//!     O = O * factor + P V                                16 accumulators: 4 query rows x 4 vectors of columns
//! ```
//! While K is read, memory is asked for the rows of K to come and then for the first of V, and the other way round, so that it is
//! never idle.
//! All rows of a KV head's query group go together, so each K and V byte is read once per group.

use super::Problem;
use super::code_values::{ByteValues, ByteWeights, RoundWeights};
use super::codes::{ByteScores, RoundQueries, ScaleScores, ScaleWeights, widest};
use super::dots::BlockScores;
use super::keys::List;
use super::lanes::Words;
use super::pairs::{PairQueries, PairScores, PairValues};
use super::register_scores::{RegisterQueries, RegisterScores};
use super::rows::{BareRows, Rows};
use super::scores::{RowId, Running, is_negligible, modify, online_softmax};
use super::values::BlockValues;
use crate::simd::{Kernel, Simd};
use crate::tensor::DType;
use std::ops::Range;

/// Keys per block: their scores, K and V stay in the L1 and L2 caches.
pub(crate) const KEYS: usize = 128;

/// The most query rows that go together; more are worth packing (tile.rs).
pub(crate) const MAX_QUERY_ROWS: usize = 8;

/// Query rows and what they accumulate.
pub(crate) struct RowState<'a> {
    /// Scaled queries, `[rows, padded_dim]`, zeros beyond `dim`.
    pub(crate) queries: &'a [f32],
    pub(crate) padded_dim: usize,
    /// `[rows, padded_value_dim]`.
    pub(crate) outputs: &'a mut [f32],
    pub(crate) padded_value_dim: usize,
    pub(crate) running: &'a mut [Running],
}

/// Turns a block's scores into weights: modifications, masks, online softmax; rescales what the rows accumulated before. The output
/// is whether the block counts: one whose weights are all negligible may be left out, and then the rows stay as they are.
struct BlockWeights<'a, 'b> {
    problem: &'a Problem<'a>,
    ids: &'a [RowId],
    keys: Range<usize>,
    seen: Seen<'a>,
    state: &'a mut RowState<'b>,
    scores: &'a mut [f32],
    skips: bool,
}

impl Kernel for BlockWeights<'_, '_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> bool {
        let Self { problem, ids, keys: Range { start, end }, seen, state, scores, skips } = self;
        let padded = (end - start).next_multiple_of(S::LANES);
        let visible_of = |r: usize| {
            let visible = match &seen {
                Seen::ByPosition => problem.visible(ids[r].row),
                Seen::Places(places) => places.clone(),
                Seen::Listed(list) => list.visible[r].clone(),
            };
            visible.start.clamp(start, end) - start..visible.end.clamp(start, end) - start
        };
        let biased = matches!(seen, Seen::Listed(list) if list.changes_scores());
        if biased || !problem.options.is_plain() {
            for (r, &id) in ids.iter().enumerate() {
                let row = &mut scores[r * KEYS..r * KEYS + padded];
                let list = if let Seen::Listed(list) = seen { Some(list) } else { None };
                modify(s, problem, id, row, list, start..end);
            }
        }
        if skips {
            let mut all = true;
            for r in 0..ids.len() {
                all &= is_negligible(problem, &scores[r * KEYS..][..padded], visible_of(r), state.running[r]);
            }
            if all {
                return false;
            }
        }
        for r in 0..ids.len() {
            let row = &mut scores[r * KEYS..r * KEYS + padded];
            let (running, factor) = online_softmax(s, row, visible_of(r), state.running[r]);
            state.running[r] = running;
            if factor != 1.0 {
                scale_row(s, &mut state.outputs[r * state.padded_value_dim..][..state.padded_value_dim], factor);
            }
        }
        true
    }
}

/// What the rows see of the keys that are gone through.
#[derive(Clone, Debug)]
pub(crate) enum Seen<'a> {
    /// What causality and window leave.
    ByPosition,
    /// These, which are counted otherwise than in the problem; what options say of a key, they say of its place.
    Places(Range<usize>),
    /// What the list says; keys are counted along it, and `k` and `v` are its rows.
    Listed(&'a List<'a>),
}

/// Sees every block of scores on its way: as products, and as the weights that they become.
pub(crate) trait Watch {
    /// Scaled products of all rows with the keys from `start` on, a row's [`KEYS`] after that of the row before.
    fn products(&mut self, start: usize, keys: usize, scores: &[f32]);
    /// Their weights `e^(logit - running.max)`, likewise.
    fn weights(&mut self, start: usize, keys: usize, weights: &[f32], running: &[Running]);
}

/// Looks away.
struct Unwatched;

impl Watch for Unwatched {
    #[inline(always)]
    fn products(&mut self, _start: usize, _keys: usize, _scores: &[f32]) {}
    #[inline(always)]
    fn weights(&mut self, _start: usize, _keys: usize, _weights: &[f32], _running: &[Running]) {}
}

/// Attends from the rows of `state` to the keys `keys`, `ids[r]` being row r.
///
/// `visible` stands in for what causality and window leave each row, where keys are counted otherwise than in the problem.
/// `careful` never multiplies a value by a weight of 0, so that NaN in keys a row does not see cannot reach it; slower.
///
/// # Safety
/// `k` and `v` yield readable rows for every key of `keys`; `state` is padded as its fields say.
#[inline(always)]
pub(crate) unsafe fn attend<S: Simd, K: Rows, V: Rows>(
    s: S,
    problem: &Problem,
    ids: &[RowId],
    k: K,
    v: V,
    keys: Range<usize>,
    visible: Option<Range<usize>>,
    state: &mut RowState,
    scores: &mut [f32],
    careful: bool,
) {
    let seen = visible.map_or(Seen::ByPosition, Seen::Places);
    // SAFETY: the caller's promise.
    unsafe { attend_seen(s, problem, ids, k, v, keys, seen, state, scores, careful) }
}

/// [`attend`] to what `seen` says.
///
/// # Safety
/// As [`attend`].
#[inline(always)]
pub(crate) unsafe fn attend_seen<S: Simd, K: Rows, V: Rows>(
    s: S,
    problem: &Problem,
    ids: &[RowId],
    k: K,
    v: V,
    keys: Range<usize>,
    seen: Seen,
    state: &mut RowState,
    scores: &mut [f32],
    careful: bool,
) {
    // SAFETY: the caller's promise.
    unsafe { attend_watched(s, problem, ids, k, v, keys, seen, state, scores, careful, &mut Unwatched) }
}

/// [`attend_seen`], every block of which is shown to `watch`.
///
/// # Safety
/// As [`attend`].
#[inline(always)]
pub(crate) unsafe fn attend_watched<S: Simd, K: Rows, V: Rows, W: Watch>(
    s: S,
    problem: &Problem,
    ids: &[RowId],
    k: K,
    v: V,
    keys: Range<usize>,
    seen: Seen,
    state: &mut RowState,
    scores: &mut [f32],
    careful: bool,
    watch: &mut W,
) {
    let n = ids.len();
    assert!(n == state.running.len());
    if let Seen::Listed(list) = &seen {
        assert!(list.visible.len() == n && list.bias.is_none_or(|bias| bias.len() >= keys.end));
    }
    let skips = problem.options.skip_threshold > 0.0 && !careful;
    let bits = <K::Bare as BareRows>::BITS;
    let dot_bytes = S::DOT_BYTES && problem.dim <= widest(bits);
    let byte_queries = k.bare().map(|_| {
        let (queries, padded_dim, dim) = (state.queries, state.padded_dim, problem.dim);
        s.call(RoundQueries { queries, padded_dim, rows: n, dim, bits, bytes: dot_bytes })
    });
    // Matrix registers take keys as they lie; where there are such, pairs are no faster than floats, which cost no conversion.
    let pairs = S::DOT2_BF16 && problem.tiles.is_none() && K::BF16 && problem.q.dtype() == DType::BF16;
    let pair_queries = pairs.then(|| PairQueries::new(problem, ids));
    // An infinite key would make another one's product NaN.
    let by_registers = K::BF16 && !K::SCATTERED && !V::SCATTERED && problem.q.dtype() == DType::BF16 && !careful;
    let mut register_queries = if by_registers { RegisterQueries::new(problem, ids) } else { None };
    let (mut words, mut byte_weights) = (Words::NONE, ByteWeights::NONE);
    let mut start = keys.start;
    while start < keys.end {
        let end = (start + KEYS).min(keys.end);
        // The caller vouches for the rows of `keys`, which the parts of this kernel read.
        let keys = start..end;
        let (next, dim) = ((v, problem.value_dim), problem.dim);
        let whole = if keys.len() == KEYS { register_queries.as_mut() } else { None };
        match (whole, k.bare(), &byte_queries, &pair_queries) {
            (Some(queries), ..) => s.call(RegisterScores { queries, rows: n, k, start, next, scores }),
            (_, Some(k), Some(queries), _) => {
                if dot_bytes {
                    let words = &mut words;
                    s.call_bytes(ByteScores { queries, rows: n, k, keys: keys.clone(), next, words, scores });
                } else {
                    s.call(BlockScores::of(state, dim, k, keys.clone(), next, scores));
                    s.call(ScaleScores { queries, rows: n, k, keys: keys.clone(), scores });
                }
            }
            (_, _, _, Some(queries)) => {
                let words = &mut words;
                s.call_pairs(PairScores { queries, rows: n, dim, k, keys: keys.clone(), next, words, scores });
            }
            _ => s.call(BlockScores::of(state, dim, k, keys.clone(), next, scores)),
        }
        watch.products(start, keys.len(), scores);
        let weights = BlockWeights { problem, ids, keys: keys.clone(), seen: seen.clone(), state, scores, skips };
        if s.call(weights) {
            watch.weights(start, keys.len(), scores, state.running);
            let (next, dim) = ((k, problem.dim), problem.value_dim);
            let (outputs, padded_dim) = (&mut *state.outputs, state.padded_value_dim);
            match v.bare() {
                Some(v) if !careful && S::DOT_BYTES => {
                    let to = &mut byte_weights;
                    s.call(RoundWeights { weights: scores, rows: n, v, keys: keys.clone(), outputs, padded_dim, to });
                    let weights = &byte_weights;
                    s.call_bytes(ByteValues { weights, rows: n, v, keys, next, outputs, padded_dim });
                }
                Some(v) if !careful => {
                    s.call(ScaleWeights { weights: scores, rows: n, v, keys: keys.clone(), outputs, padded_dim });
                    s.call(BlockValues { weights: scores, rows: n, dim, v, keys, next, outputs, padded_dim, careful });
                }
                _ if pairs && V::BF16 && n == MAX_QUERY_ROWS && !careful => {
                    s.call_pairs(PairValues { weights: scores, dim, v, keys, next, outputs, padded_dim });
                }
                _ => s.call(BlockValues { weights: scores, rows: n, dim, v, keys, next, outputs, padded_dim, careful }),
            }
        }
        start = end;
    }
}

/// `row *= factor`; the row's length is a multiple of `LANES`.
#[inline(always)]
pub(crate) fn scale_row<S: Simd>(s: S, row: &mut [f32], factor: f32) {
    let f = s.splat(factor);
    for chunk in row.chunks_exact_mut(S::LANES) {
        // SAFETY: the chunk has LANES floats.
        unsafe { s.store(chunk.as_mut_ptr(), s.mul(s.load(chunk.as_ptr()), f)) };
    }
}
