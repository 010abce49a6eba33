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

/// Rows of channels that [`super::decays`] works with.
pub(super) const CHANNELS: usize = 4 + MAX_LANES;

/// Numbers from which the lengths of buffers are made.
struct Room {
    group: usize,
    room: usize,
    padded: usize,
    across: usize,
    across_values: usize,
    wide: usize,
    /// Rows of keys as columns, of states, of states with rows as columns.
    turned: usize,
    state_rows: usize,
    state_columns: usize,
    working: usize,
    /// Keys of a row: two with a second pair.
    sets: usize,
    solves: bool,
    has_channels: bool,
}

impl Room {
    /// What only rules need that read the state before they write.
    #[inline(always)]
    fn solving(&self, n: usize) -> usize {
        if self.solves { n } else { 0 }
    }

    /// What only a second pair of keys needs.
    #[inline(always)]
    fn second(&self, n: usize) -> usize {
        if self.sets == 2 { n } else { 0 }
    }

    /// What only decays per channel need.
    #[inline(always)]
    fn by_channel(&self, n: usize) -> usize {
        if self.has_channels { n } else { 0 }
    }
}

/// A head: where it lies, and its buffers, each with the floats that it has.
macro_rules! work {
    ({ $($place:ident: $type:ty,)* } |$room:ident| { $($(#[$doc:meta])* $name:ident: $floats:expr,)* }) => {
        /// A head: where it lies, and its buffers. Rows of keys are `wide` floats apart, those of values `across_values`, those of
        /// scores `sizes.across`.
        pub(super) struct Work<'a, 's> {
            $(pub(super) $place: $type,)*
            $($(#[$doc])* pub(super) $name: &'s mut [f32],)*
        }

        impl<'a, 's> Work<'a, 's> {
            /// Buffers of zeros: numbers beyond the rows and columns of a matrix must be finite.
            #[inline(always)]
            fn carve(item: &'s mut Scratch, $room: &Room, $($place: $type,)*) -> Self {
                let [$($name),*] = item.extra.carve([$($floats),*]).map(|piece| {
                    piece.fill(0.0);
                    piece
                });
                Self { $($place,)* $($name,)* }
            }
        }
    };
}

work! {
    {
        job: &'a Backward<'a>,
        batch: usize,
        head: usize,
        readers: Range<usize>,
        sizes: Sizes,
        columns: usize,
        wide: usize,
        across_values: usize,
        sets: usize,
        solves: bool,
    }
    |r| {
        /// Queries and keys as [`Chunk`] has them, and of a second pair the rows that read and those that are written. What there is
        /// of keys is there for each of a row's, those of one after those of the other.
        q: r.group * r.room * r.padded,
        k: r.room * r.padded,
        reads: r.second(r.room * r.padded),
        b: r.second(r.room * r.padded),
        turned: r.sets * r.turned * r.across,
        scores: r.sets * r.group * r.room * r.across,
        own: r.solving(r.sets * r.room * r.across),
        inverse: r.solving(r.room * r.across),
        /// Queries, keys and rows that read, themselves, of length 1 where they shall be, and what keys and queries were multiplied by
        /// for it.
        queries: r.group * r.room * r.wide,
        keys: r.sets * r.room * r.wide,
        asks: r.second(r.room * r.wide),
        lengths: (r.group + 1) * r.room,
        /// Keys times the factors of updates, without the delta rule.
        scaled: r.room * r.wide,
        /// Keys times the decay up to the chunk's end.
        last: r.sets * r.room * r.wide,
        /// Values, or what the state does not hold of them; what is written by the delta rule, or by a second key.
        values: r.room * r.across_values,
        updates: r.solving(r.room * r.across_values),
        /// Gradients of outputs, of what is written by each key, and of what that is solved from.
        d_out: r.group * r.room * r.across_values,
        d_update: r.sets * r.room * r.across_values,
        d_value: r.solving(r.room * r.across_values),
        /// The state before the chunk, the gradient of that after it, and both with rows as columns.
        state: r.state_rows * r.across_values,
        d_state: r.state_rows * r.across_values,
        state_turned: r.state_columns * r.wide,
        d_state_turned: r.state_columns * r.wide,
        /// What a key writes, with rows as columns.
        updates_turned: r.state_columns * r.across,
        /// Gradients of scores, those of rows that read last; and all with rows as columns.
        d_scores: r.sets * (r.group + 1) * r.room * r.across,
        d_turned: r.sets * (r.group + 1) * r.room * r.across,
        /// Queries or keys with rows as columns.
        reads_turned: r.state_rows * r.across,
        /// Gradients of queries, of rows that read, of keys as they are written.
        d_queries: r.group * r.room * r.wide,
        d_reads: r.solving(r.room * r.wide),
        d_keys: r.sets * r.room * r.wide,
        /// Log decays per channel, afterwards the decays; gradients of the logarithms.
        g: r.by_channel(r.room * r.padded),
        dg: r.room * r.padded,
        working: r.by_channel(r.working),
        /// As [`Chunk::by_tokens`] leaves it.
        decay: 4 * r.across,
        beta: r.across,
        /// A row of values; rows of channels, for a block.
        row: r.across_values,
        channels: CHANNELS * r.wide + r.by_channel(r.sets * r.room * r.wide),
    }
}

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
        let (sets, solves) = (1 + usize::from(of.pair.is_some()), of.delta || of.pair.is_some());
        let room = Room {
            group,
            room,
            padded,
            across,
            across_values,
            wide,
            turned: sizes.channels::<S>().max(high(dim)),
            state_rows: high(dim),
            state_columns: high(columns),
            working: sizes.channel_room(),
            sets,
            solves,
            has_channels: matches!(of.decay, Decay::Channel(_)),
        };
        Self::carve(item, &room, job, batch, head, readers, sizes, columns, wide, across_values, sets, solves)
    }
}
