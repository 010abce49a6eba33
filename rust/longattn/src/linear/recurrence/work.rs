//! The buffers of one head whose gradients are computed.

use super::Decay;
use super::backward::Backward;
use super::scores::Sizes;
use crate::dense::micro::panel;
use crate::dense::scratch::Scratch;
use crate::simd::{MAX_LANES, Simd};
use std::ops::Range;

/// Floats between rows of `n` numbers: whole panels, and an odd number of cache lines.
#[inline(always)]
fn pitch<S: Simd>(n: usize) -> usize {
    16 * (n.next_multiple_of(panel::<S>()).div_ceil(16) | 1)
}

/// A head: where it lies, and its buffers. Rows of keys are `wide` floats apart, those of values `across_values`, those of scores
/// `sizes.across`.
pub(super) struct Work<'a, 's> {
    pub(super) job: &'a Backward<'a>,
    pub(super) batch: usize,
    pub(super) head: usize,
    pub(super) readers: Range<usize>,
    pub(super) sizes: Sizes,
    /// Columns of states.
    pub(super) columns: usize,
    pub(super) wide: usize,
    pub(super) across_values: usize,
    /// Queries and keys as [`Chunk`] has them.
    pub(super) q: &'s mut [f32],
    pub(super) k: &'s mut [f32],
    pub(super) turned: &'s mut [f32],
    pub(super) scores: &'s mut [f32],
    pub(super) own: &'s mut [f32],
    pub(super) inverse: &'s mut [f32],
    /// Queries and keys themselves, of length 1 where they shall be, and what keys and queries were multiplied by for it.
    pub(super) queries: &'s mut [f32],
    pub(super) keys: &'s mut [f32],
    pub(super) lengths: &'s mut [f32],
    /// Keys times the factors of updates, without the delta rule.
    pub(super) scaled: &'s mut [f32],
    /// Keys times the decay up to the chunk's end.
    pub(super) last: &'s mut [f32],
    /// Values, or what the state does not hold of them; what is written by the delta rule.
    pub(super) values: &'s mut [f32],
    pub(super) updates: &'s mut [f32],
    /// Gradients of outputs, of what is written and of values.
    pub(super) d_out: &'s mut [f32],
    pub(super) d_update: &'s mut [f32],
    pub(super) d_value: &'s mut [f32],
    /// The state before the chunk, the gradient of that after it, and both with rows as columns.
    pub(super) state: &'s mut [f32],
    pub(super) d_state: &'s mut [f32],
    pub(super) state_turned: &'s mut [f32],
    pub(super) d_state_turned: &'s mut [f32],
    /// What is written, with rows as columns.
    pub(super) updates_turned: &'s mut [f32],
    /// Gradients of scores, those of keys with themselves last; and all with rows as columns.
    pub(super) d_scores: &'s mut [f32],
    pub(super) d_turned: &'s mut [f32],
    /// Queries or keys with rows as columns.
    pub(super) reads_turned: &'s mut [f32],
    /// Gradients of queries, of keys as they read, of keys as they are written.
    pub(super) d_queries: &'s mut [f32],
    pub(super) d_reads: &'s mut [f32],
    pub(super) d_keys: &'s mut [f32],
    /// Log decays per channel, afterwards the decays; gradients of the logarithms.
    pub(super) g: &'s mut [f32],
    pub(super) dg: &'s mut [f32],
    pub(super) working: &'s mut [f32],
    /// As [`Chunk::by_tokens`] leaves it.
    pub(super) decay: &'s mut [f32],
    pub(super) beta: &'s mut [f32],
    /// A row of values; rows of channels, for a block.
    pub(super) row: &'s mut [f32],
    pub(super) channels: &'s mut [f32],
}

/// Rows of channels that [`super::decays`] works with.
pub(super) const CHANNELS: usize = 4 + MAX_LANES;

impl<'a, 's> Work<'a, 's> {
    #[inline(always)]
    pub(super) fn new<S: Simd>(
        _: S,
        item: &'s mut Scratch,
        job: &'a Backward<'a>,
        sequence: usize,
        head: usize,
    ) -> Self {
        let inputs = &job.inputs;
        let of = &inputs.of;
        let (batch, rows) = inputs.sequence(sequence);
        let readers = inputs.readers(head);
        let sizes = Sizes::new::<S>(of.chunk.min(rows.len()).max(1), inputs.dim, readers.len());
        let columns = inputs.value_dim + usize::from(of.normaliser.is_some());
        let (wide, across_values) = (pitch::<S>(inputs.dim), pitch::<S>(columns));
        let Sizes { dim, padded, rows: room, across, group } = sizes;
        let high = |n: usize| n.next_multiple_of(S::ROWS).max(n.next_multiple_of(MAX_LANES));
        let is_delta = |n: usize| if of.delta { n } else { 0 };
        let by_channel = |n: usize| if matches!(of.decay, Decay::Channel(_)) { n } else { 0 };
        let pieces = item.extra.carve([
            group * room * padded,
            room * padded,
            sizes.channels::<S>().max(high(dim)) * across,
            group * room * across,
            is_delta(room * across),
            is_delta(room * across),
            group * room * wide,
            room * wide,
            (group + 1) * room,
            room * wide,
            room * wide,
            room * across_values,
            is_delta(room * across_values),
            group * room * across_values,
            room * across_values,
            is_delta(room * across_values),
            high(dim) * across_values,
            high(dim) * across_values,
            high(columns) * wide,
            high(columns) * wide,
            high(columns) * across,
            (group + 1) * room * across,
            (group + 1) * room * across,
            high(dim) * across,
            group * room * wide,
            is_delta(room * wide),
            room * wide,
            by_channel(room * padded),
            room * padded,
            by_channel(sizes.channel_room()),
            4 * across,
            across,
            across_values,
            CHANNELS * wide + by_channel(room * wide),
        ]);
        let [
            q,
            k,
            turned,
            scores,
            own,
            inverse,
            queries,
            keys,
            lengths,
            scaled,
            last,
            values,
            updates,
            d_out,
            d_update,
            d_value,
            state,
            d_state,
            state_turned,
            d_state_turned,
            updates_turned,
            d_scores,
            d_turned,
            reads_turned,
            d_queries,
            d_reads,
            d_keys,
            g,
            dg,
            working,
            decay,
            beta,
            row,
            channels,
        ] = pieces.map(|piece| {
            // Numbers beyond the rows and columns of a matrix must be finite.
            piece.fill(0.0);
            piece
        });
        Self {
            job,
            batch,
            head,
            readers,
            sizes,
            columns,
            wide,
            across_values,
            q,
            k,
            turned,
            scores,
            own,
            inverse,
            queries,
            keys,
            lengths,
            scaled,
            last,
            values,
            updates,
            d_out,
            d_update,
            d_value,
            state,
            d_state,
            state_turned,
            d_state_turned,
            updates_turned,
            d_scores,
            d_turned,
            reads_turned,
            d_queries,
            d_reads,
            d_keys,
            g,
            dg,
            working,
            decay,
            beta,
            row,
            channels,
        }
    }
}
