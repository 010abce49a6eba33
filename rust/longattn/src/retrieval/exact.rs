//! Picking rows by their exact logits: of a range of rows, or of rows that a search listed.

use super::scan::{Scored, pick_scored};
use crate::dense::rows::{Indexed, Rows, Strided};
use crate::dense::stream::{BlockScores, KEYS};
use crate::index::codes::BLOCK;
use crate::index::{Ask, Pick};
use crate::simd::{Kernel, MAX_LANES, Simd, dispatch};
use crate::tensor::with_element;
use std::ops::Range;

/// Keys that products are taken of together, whatever the instruction set and the number of queries.
const TOGETHER: usize = 8;

/// The group's queries one after another, padded with zeros.
fn padded_queries(ask: &Ask) -> Vec<f32> {
    let dim = ask.keys.shape()[3];
    let padded = dim.next_multiple_of(MAX_LANES);
    let mut queries = vec![0f32; ask.queries.len() * padded];
    for (to, query) in queries.chunks_exact_mut(padded).zip(ask.queries) {
        to[..dim].copy_from_slice(query);
    }
    queries
}

/// Picks among all candidates, each scored exactly. What is left unread is known, but for its values.
pub(crate) fn pick_all(ask: &Ask) -> Pick {
    let (queries, dim, n) = (padded_queries(ask), ask.keys.shape()[3], ask.queries.len());
    assert!(ask.candidates.end <= ask.keys.shape()[2]);
    let sigma = vec![[0.0; 2]; n];
    with_element!(ask.keys.dtype(), T => {
        let scan = |range: Range<usize>, scores: &mut [f32], stride: usize| {
            let k = Strided { base: ask.keys.head::<T>(0, ask.head), stride: ask.keys.row_stride() };
            // Scores beyond the candidates do not matter.
            let keys = range.start..range.end.min(ask.candidates.end);
            dispatch(ask.isa, KeyScores { queries: &queries, n, dim, k, keys, scores, stride });
        };
        let block_bytes = BLOCK * dim * size_of::<T>();
        let scored = Scored { scan: &scan, block_bytes, estimates: true, sigma: &sigma, values: None };
        pick_scored(&scored, ask, ask.candidates.clone())
    })
}

/// Picks among some candidates, ascending and each once, which are scored exactly. Nothing is said of the others.
pub(crate) fn pick_among(ask: &Ask, rows: &[u32]) -> Pick {
    let (queries, dim, n) = (padded_queries(ask), ask.keys.shape()[3], ask.queries.len());
    let inside = |row: Option<&u32>| row.is_none_or(|&row| ask.candidates.contains(&(row as usize)));
    assert!(ask.candidates.end <= ask.keys.shape()[2] && inside(rows.first()) && inside(rows.last()));
    assert!(rows.is_sorted());
    if rows.is_empty() {
        return Pick::default();
    }
    let sigma = vec![[0.0; 2]; n];
    let mut pick = with_element!(ask.keys.dtype(), T => {
        let scan = |range: Range<usize>, scores: &mut [f32], stride: usize| {
            let all = Strided { base: ask.keys.head::<T>(0, ask.head), stride: ask.keys.row_stride() };
            let k = Indexed { rows: all, index: rows };
            let keys = range.start..range.end.min(rows.len());
            dispatch(ask.isa, KeyScores { queries: &queries, n, dim, k, keys, scores, stride });
        };
        let block_bytes = BLOCK * dim * size_of::<T>();
        pick_scored(&Scored { scan: &scan, block_bytes, estimates: true, sigma: &sigma, values: None }, ask, 0..rows.len())
    });
    (pick.rest, pick.bound) = (None, None);
    pick.rows.iter_mut().for_each(|place| *place = rows[*place as usize]);
    pick
}

/// Products of the group's queries with some vectors of the keys' width: `[queries, vectors]`.
pub(crate) fn products(ask: &Ask, vectors: &[f32]) -> Vec<f32> {
    let (queries, dim, n) = (padded_queries(ask), ask.keys.shape()[3], ask.queries.len());
    let count = vectors.len() / dim;
    let k = Strided { base: vectors.as_ptr(), stride: dim as isize };
    let mut scores = vec![0f32; n * count];
    dispatch(ask.isa, KeyScores { queries: &queries, n, dim, k, keys: 0..count, scores: &mut scores, stride: count });
    scores
}

/// Scores of keys, all queries in one pass over them: `[queries, stride]`.
struct KeyScores<'a, K> {
    queries: &'a [f32],
    n: usize,
    dim: usize,
    /// Readable for all of `keys`, as whoever makes this vouches.
    k: K,
    keys: Range<usize>,
    scores: &'a mut [f32],
    stride: usize,
}

impl<K: Rows> Kernel for KeyScores<'_, K> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { queries, n, dim, k, keys, scores, stride } = self;
        let padded_dim = queries.len() / n;
        let mut block = vec![0f32; n * KEYS];
        for first in keys.clone().step_by(KEYS) {
            let part = first..(first + KEYS).min(keys.end);
            let (count, at) = (part.len(), first - keys.start);
            let whole = count / TOGETHER * TOGETHER;
            let next = (k, dim);
            if whole > 0 {
                let keys = first..first + whole;
                s.call(BlockScores { queries, padded_dim, rows: n, dim, k, keys, next, scores: &mut block });
            }
            for (g, row) in block.chunks_exact(KEYS).enumerate() {
                scores[g * stride + at..][..whole].copy_from_slice(&row[..whole]);
            }
            if whole < count {
                // A key's score must not depend on its place, so the last ones do not go one by one: equal keys tie.
                let index: [u32; TOGETHER] = std::array::from_fn(|j| (first + whole + j).min(keys.end - 1) as u32);
                let (k, keys) = (Indexed { rows: k, index: &index }, 0..TOGETHER);
                s.call(BlockScores { queries, padded_dim, rows: n, dim, k, keys, next: (k, dim), scores: &mut block });
                for (g, row) in block.chunks_exact(KEYS).enumerate() {
                    scores[g * stride + at + whole..][..count - whole].copy_from_slice(&row[..count - whole]);
                }
            }
        }
    }
}
