//! Asking memory for rows before they are computed with.

use super::rows::{Rows, prefetch_bytes};
use super::stream::{KEYS, MAX_QUERY_ROWS};
use crate::simd::{LINE_BYTES, Next, asks_second_cache, prefetch, prefetch_into};
use std::ops::Range;

/// Bytes of rows asked for ahead of their use: what memory delivers while a request for more is on its way.
const AHEAD_BYTES: usize = 8 << 10;

/// Blocks of at most so many bytes are asked for as a whole while the block before them is computed with, which is faster by a quarter
/// where a row takes two cache lines. Codes are wanted whole, as the scales of all values of a block are read before any value: rows of
/// 128 bytes and their scales are in it.
const BLOCK_BYTES: usize = 17 << 10;

/// The same where they come into the second cache.
const SECOND_CACHE_BLOCK_BYTES: usize = 128 << 10;

/// Keys asked for ahead of their use.
#[inline(always)]
pub(super) fn ahead(row_bytes: usize) -> usize {
    let whole = if asks_second_cache() { SECOND_CACHE_BLOCK_BYTES } else { BLOCK_BYTES };
    if KEYS * row_bytes <= whole { KEYS } else { (AHEAD_BYTES / row_bytes.max(1)).clamp(4, KEYS / 4) }
}

/// `bytes` from `start` on in so many equal parts, where these are no more than `most` bytes each and come into the first cache.
#[inline(always)]
pub(super) fn in_parts(start: *const u8, bytes: usize, parts: usize, most: usize) -> Option<Next> {
    let pace = bytes.div_ceil(parts.max(1));
    (bytes > 0 && parts > 0 && pace <= most && !asks_second_cache()).then_some(Next { start, pace })
}

/// Rows to come, of which memory is asked for line by line while others are computed with: a burst of requests would stall loads.
#[derive(Clone, Copy)]
pub(super) struct Coming<const C: usize> {
    rows: Places<C>,
    bytes: usize,
}

/// Where rows start.
#[derive(Clone, Copy)]
enum Places<const C: usize> {
    /// Anywhere; or few rows, whose addresses fit registers.
    Listed([*const u8; C]),
    /// The first row and the distance from each to the next.
    Spaced(*const u8, isize),
}

impl<const C: usize> Coming<C> {
    /// What comes `ahead` after the keys `j..j + C`: rows of the block `keys` or, towards its end, the first of `next`, whose turn it is
    /// then. Nothing without `next`.
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
        let coming = j + ahead;
        // Which it is, the first of them decides for all.
        if coming < keys.end {
            Self::rows(rows, dim, coming)
        } else {
            Self::rows(next, next_dim, keys.start + (coming - keys.end))
        }
    }

    /// Rows that come after the block: those from `j` on.
    #[inline(always)]
    pub(super) fn rows<V: Rows>(rows: V, dim: usize, j: usize) -> Self {
        let bytes = rows.row_bytes(dim);
        if V::SCATTERED || C <= MAX_QUERY_ROWS {
            return Self { rows: Places::Listed(rows.starts(j)), bytes };
        }
        let [first, second] = rows.starts(j);
        Self { rows: Places::Spaced(first, second.addr().wrapping_sub(first.addr()) as isize), bytes }
    }

    /// Nothing to ask for.
    #[inline(always)]
    pub(super) fn none() -> Self {
        if C <= MAX_QUERY_ROWS {
            return Self { rows: Places::Listed([std::ptr::null(); C]), bytes: 0 };
        }
        Self { rows: Places::Spaced(std::ptr::null(), 0), bytes: 0 }
    }

    /// The rows [`in_parts`], where nothing is between them.
    #[inline(always)]
    pub(super) fn evenly(&self, parts: usize, most: usize) -> Option<Next> {
        let Places::Listed(starts) = self.rows else { return None };
        let start = starts[0];
        let distance = |row: *const u8| row.addr().wrapping_sub(start.addr());
        let nothing_between = distance(starts[C - 1]) == (C - 1) * self.bytes && distance(starts[1 % C]) == self.bytes;
        in_parts(start, C * self.bytes, parts, most).filter(|_| nothing_between)
    }

    /// Asks for the line at byte `at` of each row.
    #[inline(always)]
    pub(super) fn ask_line(&self, at: usize) {
        let Places::Listed(starts) = self.rows else { return self.ask(at, at + LINE_BYTES) };
        if at < self.bytes {
            let second_cache = asks_second_cache();
            for start in starts {
                prefetch_into(second_cache, start.wrapping_add(at));
            }
        }
    }

    /// Asks for the lines from byte `from` up to byte `to` of each row. Of rows with nothing between them it is as many bytes, one line
    /// after the other: a line that has parts of two rows is asked for once.
    #[inline(always)]
    pub(super) fn ask(&self, from: usize, to: usize) {
        let to = to.min(self.bytes);
        match self.rows {
            Places::Listed(starts) => {
                for start in starts {
                    prefetch_bytes(start.wrapping_add(from), to.saturating_sub(from));
                }
            }
            Places::Spaced(first, distance) if distance == self.bytes as isize => {
                for at in (C * from..C * to).step_by(LINE_BYTES) {
                    prefetch(first.wrapping_add(at));
                }
            }
            Places::Spaced(first, distance) => {
                for at in (from..to).step_by(LINE_BYTES) {
                    for i in 0..C as isize {
                        prefetch(first.wrapping_offset(i * distance).wrapping_add(at));
                    }
                }
            }
        }
    }
}
