//! What one worker does at a time: rows with keys of their own, and the order in which they get these.

use super::keys::{Keys, List};
use super::run::Job;
use super::scores::RowId;
use super::tile::KEYS;
use std::ops::Range;

/// Some rows of one KV head and the keys that they attend to.
pub(crate) struct Share<'a> {
    pub(crate) ids: &'a [RowId],
    /// Keys of the problem, or of the list.
    pub(crate) keys: Range<usize>,
    pub(crate) list: Option<List<'a>>,
    /// Where the results go, and the keys once more, if this is all there is of the rows.
    pub(crate) finish: Option<(&'a Job<'a, 'a>, &'a Keys<'a>)>,
}

/// The order in which shares get their keys: a block of them at a time for the share that is furthest behind, so that keys that several
/// list come from memory once. A share on its own gets all of its keys at once.
pub(super) struct Turns<'a> {
    shares: &'a [Share<'a>],
    left: Vec<Range<usize>>,
}

impl<'a> Turns<'a> {
    pub(super) fn new(shares: &'a [Share<'a>]) -> Self {
        Self { shares, left: shares.iter().map(|share| share.keys.clone()).collect() }
    }
}

impl Iterator for Turns<'_> {
    /// A share, by number, and keys of it.
    type Item = (usize, Range<usize>);

    fn next(&mut self) -> Option<Self::Item> {
        let next_key = |i: usize, left: &Range<usize>| {
            self.shares[i].list.as_ref().map_or(left.start, |list| list.index[left.start] as usize)
        };
        let unfinished = self.left.iter_mut().enumerate().filter(|(_, left)| left.start < left.end);
        let (i, left) = unfinished.min_by_key(|(i, left)| next_key(*i, left))?;
        let end = if self.shares.len() == 1 { left.end } else { left.end.min(left.start + KEYS) };
        let keys = left.start..end;
        left.start = end;
        Some((i, keys))
    }
}
