//! Asking memory for rows before they are computed with.

use super::rows::Rows;
use super::stream::KEYS;
use crate::simd::prefetch;
use std::ops::Range;

/// Bytes of rows asked for ahead of their use: what memory delivers while a request for more is on its way.
const AHEAD_BYTES: usize = 8 << 10;

/// Blocks of at most so many bytes are asked for as a whole while the block before them is computed with, which is faster by a quarter
/// where a row takes two cache lines.
const BLOCK_BYTES: usize = 16 << 10;

/// Keys asked for ahead of their use.
#[inline(always)]
pub(super) fn ahead(row_bytes: usize) -> usize {
    if KEYS * row_bytes <= BLOCK_BYTES { KEYS } else { (AHEAD_BYTES / row_bytes.max(1)).clamp(4, KEYS / 4) }
}

/// Rows to come, of which memory is asked for line by line while others are computed with: a burst of requests would stall loads.
#[derive(Clone, Copy)]
pub(super) struct Coming<const C: usize> {
    starts: [*const u8; C],
    bytes: usize,
}

impl<const C: usize> Coming<C> {
    /// What comes `ahead` after the keys `j..j + C`: rows of the block `keys` and, towards its end, the first of `next`, whose turn
    /// it is then. Nothing without `next`.
    #[inline(always)]
    pub(super) fn new<K: Rows, V: Rows>(
        rows: K,
        dim: usize,
        ahead: usize,
        j: usize,
        keys: &Range<usize>,
        next: Option<(V, usize)>,
    ) -> Self {
        let Some((next, next_dim)) = next else { return Self::none() };
        let mut starts = [std::ptr::null(); C];
        for (c, start) in starts.iter_mut().enumerate() {
            let coming = j + c + ahead;
            let inside = coming < keys.end;
            *start = if inside { rows.start(coming) } else { next.start(keys.start + (coming - keys.end)) };
        }
        let inside = j + ahead < keys.end;
        Self { starts, bytes: if inside { rows.row_bytes(dim) } else { next.row_bytes(next_dim) } }
    }

    /// Rows that come after the block: those from `j` on.
    #[inline(always)]
    pub(super) fn rows<V: Rows>(rows: V, dim: usize, j: usize) -> Self {
        let mut starts = [std::ptr::null(); C];
        for (c, start) in starts.iter_mut().enumerate() {
            *start = rows.start(j + c);
        }
        Self { starts, bytes: rows.row_bytes(dim) }
    }

    /// Nothing to ask for.
    #[inline(always)]
    pub(super) fn none() -> Self {
        Self { starts: [std::ptr::null(); C], bytes: 0 }
    }

    /// Asks for the lines from byte `from` up to byte `to` of each row.
    #[inline(always)]
    pub(super) fn ask(&self, from: usize, to: usize) {
        let mut at = from;
        while at < to.min(self.bytes) {
            for start in self.starts {
                prefetch(start.wrapping_add(at));
            }
            at += 64;
        }
    }
}
