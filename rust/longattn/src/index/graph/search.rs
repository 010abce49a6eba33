//! Beam search: from the entry, always on from the best row seen so far.

use super::links::Links;
use crate::dense::dots::BlockScores;
use crate::dense::rows::{Indexed, Row, Rows, Strided};
use crate::simd::{Simd, prefetch};
use crate::tensor::Element;
use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

/// The most rows that are scored together; shorter lists of candidates are filled up.
const TOGETHER: usize = 8;

/// A score and its row in one number: the larger score first, of equal ones the lower row. NaN comes last.
#[inline(always)]
pub(super) fn rank(score: f32, row: u32) -> u64 {
    // -0 becomes 0.
    let bits = (score + 0.0).to_bits();
    let order = if score.is_nan() {
        0
    } else if bits >> 31 == 1 {
        !bits
    } else {
        bits | 1 << 31
    };
    u64::from(order) << 32 | u64::from(!row)
}

/// The row of a rank.
#[inline(always)]
pub(super) fn row_of(rank: u64) -> u32 {
    !(rank as u32)
}

/// How near rows are to each other, as seen from one of them: larger is nearer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyMetric {
    /// Inner product.
    Ip,
    /// Euclidean distance.
    L2,
    /// Angle.
    Cos,
}

/// A metric, and what it needs to know of each row beside the inner product.
#[derive(Clone, Copy)]
pub(super) struct Metric<'a> {
    pub(super) kind: KeyMetric,
    /// Half the squared norm of each row (`L2`), the inverse of its norm (`Cos`).
    pub(super) norms: &'a [f32],
}

impl Metric<'_> {
    /// What queries are compared by.
    pub(super) const PRODUCT: Self = Self { kind: KeyMetric::Ip, norms: &[] };

    /// Nearness of `row` to a vector with which it has this inner product.
    #[inline(always)]
    pub(super) fn nearness(&self, product: f32, row: u32) -> f32 {
        match self.kind {
            KeyMetric::Ip => product,
            KeyMetric::L2 => product - self.norms[row as usize],
            KeyMetric::Cos => product * self.norms[row as usize],
        }
    }
}

/// What a search needs beside the graph; kept per thread.
#[derive(Default)]
pub(super) struct Memory {
    /// Seen in this search where equal to `epoch`.
    seen: Vec<u8>,
    epoch: u8,
    frontier: BinaryHeap<u64>,
    best: BinaryHeap<Reverse<u64>>,
    batch: Vec<u32>,
    scores: Vec<f32>,
    /// What the last search found, best first.
    pub(super) found: Vec<u64>,
    /// For whoever uses the search: rows and a widened key.
    pub(super) list: Vec<u32>,
    pub(super) wide: Vec<f32>,
}

/// Runs `work` with this thread's memory.
pub(super) fn with_memory<R>(work: impl FnOnce(&mut Memory) -> R) -> R {
    thread_local!(static MEMORY: RefCell<Memory> = RefCell::default());
    MEMORY.with(|memory| match memory.try_borrow_mut() {
        Ok(mut memory) => work(&mut memory),
        Err(_) => work(&mut Memory::default()),
    })
}

impl Memory {
    fn begin(&mut self, rows: usize) {
        if self.seen.len() < rows {
            self.seen.resize(rows, 0);
        }
        if self.epoch == u8::MAX {
            self.seen.fill(0);
            self.epoch = 0;
        }
        self.epoch += 1;
        self.frontier.clear();
        self.best.clear();
        self.scores.resize(crate::dense::stream::KEYS, 0.0);
    }
}

/// Inner products of `query`, padded, with the rows of `list`, at most 128, in `scores`. Fills the list up meanwhile.
///
/// # Safety
/// `rows` yields `dim` readable elements for every row of the list.
#[inline(always)]
pub(super) unsafe fn products<S: Simd, T: Element>(
    s: S,
    rows: Strided<T>,
    dim: usize,
    query: &[f32],
    list: &mut Vec<u32>,
    scores: &mut [f32],
) {
    let count = list.len();
    let Some(&last) = list.last() else { return };
    // Few go one at a time, which is slow, and a row that was just read costs nothing.
    list.resize(count.max(TOGETHER), last);
    let k = Indexed { rows, index: &list[..] };
    let keys = 0..list.len();
    s.call(BlockScores { queries: query, padded_dim: query.len(), rows: 1, dim, k, keys, next: (k, dim), scores });
    list.truncate(count);
}

/// The rows of `wanted` nearest to `query` that a beam of `width` finds, best first, in `memory.found`; returns how many rows were
/// scored and of how many the links were followed. Rows outside `wanted` are walked over, and take no place in the beam.
///
/// # Safety
/// `rows` yields `dim` readable elements for every row of the graph.
#[inline(always)]
pub(super) unsafe fn search<S: Simd, T: Element>(
    s: S,
    rows: Strided<T>,
    dim: usize,
    links: &Links,
    entry: u32,
    query: &[f32],
    metric: Metric<'_>,
    wanted: Range<u32>,
    width: usize,
    memory: &mut Memory,
) -> [usize; 2] {
    memory.begin(links.len());
    let Memory { seen, epoch, frontier, best, batch, scores, found, .. } = memory;
    batch.clear();
    batch.push(entry);
    seen[entry as usize] = *epoch;
    let (mut scored, mut expanded) = (0, 0);
    loop {
        // SAFETY: rows of the graph, by the caller's promise.
        unsafe { products(s, rows, dim, query, batch, scores) };
        scored += batch.len();
        for (&row, &product) in batch.iter().zip(scores.iter()) {
            let rank = rank(metric.nearness(product, row), row);
            let full = best.len() >= width;
            if full && best.peek().is_some_and(|&Reverse(worst)| rank <= worst) {
                continue;
            }
            frontier.push(rank);
            if wanted.contains(&row) {
                if full {
                    best.pop();
                }
                best.push(Reverse(rank));
            }
        }
        batch.clear();
        // Rows whose neighbours were all seen lead nowhere; go on with the next.
        while batch.is_empty() {
            let Some(next) = frontier.pop() else { break };
            if best.len() >= width && best.peek().is_some_and(|&Reverse(worst)| next < worst) {
                break;
            }
            if let Some(&after) = frontier.peek() {
                for line in 0..4 {
                    prefetch(links.start(row_of(after)).wrapping_add(64 * line));
                }
            }
            expanded += 1;
            for &neighbour in links.of(row_of(next)) {
                if std::mem::replace(&mut seen[neighbour as usize], *epoch) != *epoch {
                    rows.row(neighbour as usize).prefetch(dim);
                    batch.push(neighbour);
                }
            }
        }
        if batch.is_empty() {
            break;
        }
    }
    found.clear();
    found.extend(best.drain().map(|Reverse(rank)| rank));
    found.sort_unstable_by_key(|&rank| Reverse(rank));
    [scored, expanded]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_order_by_score_then_row() {
        let order = [
            rank(f32::NAN, 0),
            rank(f32::NEG_INFINITY, 1),
            rank(-2.0, 7),
            rank(-1.0, 9),
            rank(0.0, 4),
            rank(-0.0, 3),
            rank(0.5, 8),
            rank(1.0, 6),
            rank(f32::INFINITY, 2),
        ];
        assert!(order.is_sorted());
        assert_eq!(row_of(order[3]), 9);
        assert_eq!(row_of(rank(1.0, u32::MAX - 1)), u32::MAX - 1);
    }
}
