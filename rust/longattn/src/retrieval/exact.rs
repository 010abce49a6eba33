//! Picking rows by their exact logits: of a range of rows, or of rows that a search listed.

use super::scan::{self, CodeError, RowCodes};
use crate::dense::dots::BlockScores;
use crate::dense::rows::{Indexed, Rows, Strided};
use crate::dense::stream::KEYS;
use crate::index::clusters::Clusters;
use crate::index::codes::BLOCK;
use crate::index::{Ask, Pick, numbers};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd, dispatch};
use crate::tensor::{Element, with_element};
use std::marker::PhantomData;
use std::ops::Range;

/// The most keys that products are taken of together, whatever the instruction set and the number of queries.
const TOGETHER: usize = 8;

/// The queries one after another, padded with zeros.
fn padded_queries(queries: &[&[f32]]) -> Vec<f32> {
    let dim = queries[0].len();
    let padded = dim.next_multiple_of(MAX_LANES);
    let mut long = vec![0f32; queries.len() * padded];
    for (to, query) in long.chunks_exact_mut(padded).zip(queries) {
        to[..dim].copy_from_slice(query);
    }
    long
}

/// Keys that are their own codes: those of all rows, or of a list of rows.
struct Exactly<'a, T> {
    ask: &'a Ask<'a>,
    list: Option<&'a [u32]>,
    element: PhantomData<fn() -> T>,
}

impl<T: Element> RowCodes for Exactly<'_, T> {
    type Group = Vec<f32>;

    fn block(&self) -> usize {
        BLOCK
    }

    fn block_bytes(&self) -> usize {
        BLOCK * self.ask.keys.shape()[3] * size_of::<T>()
    }

    fn group(&self, _isa: Isa, _head: usize, queries: &[&[f32]]) -> Vec<f32> {
        padded_queries(queries)
    }

    fn scan(
        &self,
        isa: Isa,
        head: usize,
        blocks: Range<usize>,
        queries: &Vec<f32>,
        scores: &mut [f32],
        stride: usize,
        _next: Option<usize>,
    ) {
        let Self { ask, list, .. } = self;
        let (dim, n) = (ask.keys.shape()[3], ask.queries.len());
        let rows = numbers(ask.keys);
        let all = Strided { base: rows.head::<T>(0, head), stride: rows.row_stride() };
        // Scores beyond the candidates do not matter.
        let end = list.map_or(ask.candidates.end, <[u32]>::len);
        let keys = blocks.start * BLOCK..(blocks.end * BLOCK).min(end);
        match list {
            None => dispatch(isa, KeyScores { queries, n, dim, k: all, keys, scores, stride }),
            Some(index) => {
                let k = Indexed { rows: all, index };
                dispatch(isa, KeyScores { queries, n, dim, k, keys, scores, stride });
            }
        }
    }

    fn error(&self, _head: usize, _queries: &Vec<f32>, _query: usize) -> CodeError {
        CodeError::of_noise(0.0)
    }

    fn largest_error(&self, _head: usize, _queries: &Vec<f32>, _query: usize) -> Option<f32> {
        Some(0.0)
    }

    fn values(&self, _head: usize) -> Option<(&Clusters, &[u8])> {
        None
    }
}

/// Picks among all candidates, each scored exactly. What is left unread is known, but for its values.
pub(crate) fn pick_all(ask: &Ask) -> Pick {
    assert!(ask.candidates.end <= ask.keys.shape()[2]);
    with_element!(numbers(ask.keys).dtype(), T => scan::pick(&Exactly::<T> { ask, list: None, element: PhantomData }, ask))
}

/// Picks among some candidates, ascending and each once, which are scored exactly. Nothing is said of the others.
pub(crate) fn pick_among(ask: &Ask, rows: &[u32]) -> Pick {
    let inside = |row: Option<&u32>| row.is_none_or(|&row| ask.candidates.contains(&(row as usize)));
    assert!(ask.candidates.end <= ask.keys.shape()[2] && inside(rows.first()) && inside(rows.last()));
    assert!(rows.is_sorted());
    if rows.is_empty() {
        return Pick::default();
    }
    let mut pick = with_element!(numbers(ask.keys).dtype(), T => {
        scan::pick_places(&Exactly::<T> { ask, list: Some(rows), element: PhantomData }, ask, 0..rows.len())
    });
    (pick.rest, pick.bound) = (None, None);
    pick.rows.iter_mut().for_each(|place| *place = rows[*place as usize]);
    pick
}

/// Products of the group's queries with some vectors of the keys' width: `[queries, vectors]`.
pub(crate) fn products(ask: &Ask, vectors: &[f32]) -> Vec<f32> {
    let (queries, dim, n) = (padded_queries(ask.queries), ask.keys.shape()[3], ask.queries.len());
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
            if count >= TOGETHER {
                let (keys, next) = (part, (k, dim));
                s.call(BlockScores { queries, padded_dim, rows: n, dim, k, keys, next, scores: &mut block });
            } else {
                // A key's score must not depend on its place, so few do not go one by one: equal keys tie.
                let index: [u32; TOGETHER] = std::array::from_fn(|j| (first + j).min(keys.end - 1) as u32);
                let (k, keys) = (Indexed { rows: k, index: &index }, 0..TOGETHER);
                s.call(BlockScores { queries, padded_dim, rows: n, dim, k, keys, next: (k, dim), scores: &mut block });
            }
            for (g, row) in block.chunks_exact(KEYS).enumerate() {
                scores[g * stride + at..][..count].copy_from_slice(&row[..count]);
            }
        }
    }
}
