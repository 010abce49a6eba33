//! Attention of a batch of decoding sequences over a prefix tree: chunks that several sequences share are read once for all of them.
//!
//! ```text
//! sequences, depth first: those below a chunk stand side by side
//! maximal runs of chunks with the same sequences          -> segments; rows = sequences x query group of a KV head
//! segments x row blocks x ranges of keys (fixed sizes)     -> parts, run by the pool: shared ones and private ones alike
//! parts of one sequence and KV head merged from the root   -> output and lse
//! ```
//! Keys are counted along a segment, wherever its chunks lie, and the cut depends on the tree only, so results depend neither on the
//! number of threads nor on which chunks were free.

use super::keys::{Keys, List};
use super::run::{Job, Partial};
use super::scores::{RowId, Running};
use super::scratch::with_scratch;
use super::stream::MAX_QUERY_ROWS;
use super::tile::{self, QUERY_ROWS};
use super::turns::Share;
use super::{Item, Options, Problem, check_outputs, finish_row, fold};
use crate::kv::PrefixTree;
use crate::kv::prefix_tree::Path;
use crate::parallel::{Execution, for_each, map};
use crate::simd::{self, Isa, Kernel, Simd, dispatch};
use crate::tensor::{Error, Result, TensorView, TensorViewMut};
use std::ops::Range;

/// Parameters of [`chunk_attention`].
#[derive(Clone, Copy, Debug)]
pub struct ChunkOptions<'a> {
    /// Factor of the dot products; `None` is `head_dim^-0.5`.
    pub scale: Option<f32>,
    /// `c * tanh(s / c)` when above 0.
    pub softcap: f32,
    /// A logit of each query head that takes part in the denominator only.
    pub sinks: Option<&'a [f32]>,
    /// Whether chunks are read once for all sequences that share them, or once for each.
    pub shared: bool,
}

/// Keys that the same sequences see.
struct Segment {
    /// Positions in depth-first order.
    sequences: Range<usize>,
    /// Where the keys lie.
    index: Vec<u32>,
    /// Query rows that go together, of `sequences x group`.
    block: usize,
    /// Keys that go together.
    piece: usize,
    /// Number of its first part; `[kv head][row block][piece]`.
    first_part: usize,
}

impl Segment {
    fn rows(&self, group: usize) -> usize {
        self.sequences.len() * group
    }

    fn blocks(&self, group: usize) -> usize {
        self.rows(group).div_ceil(self.block)
    }

    fn pieces(&self) -> usize {
        self.index.len().div_ceil(self.piece)
    }
}

/// Segments of sequences in depth-first order; those nearer to the root come first.
fn segments(paths: &[&Path], chunk_size: usize, shared: bool) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut push = |sequences: Range<usize>, chunks: &[u32], tail: Option<(u32, usize)>| {
        let whole = chunks.iter().map(|&chunk| (chunk, chunk_size));
        let index: Vec<u32> = whole
            .chain(tail)
            .flat_map(|(chunk, len)| {
                let first = chunk * chunk_size as u32;
                first..first + len as u32
            })
            .collect();
        if !index.is_empty() {
            segments.push(Segment { sequences, index, block: 0, piece: 0, first_part: 0 });
        }
    };
    // Sequences that have their first chunks in common, how many those are.
    let mut ahead = vec![(0..paths.len(), 0)];
    while let Some((sequences, depth)) = ahead.pop() {
        let mut start = sequences.start;
        while start < sequences.end {
            let at = |i: usize, depth: usize| paths[i].chunks.get(depth);
            let node = at(start, depth);
            let same = |i: &usize| shared && node.is_some() && at(*i, depth) == node;
            let end = (start + 1..sequences.end).find(|i| !same(i)).unwrap_or(sequences.end);
            let path = paths[start];
            if end - start == 1 {
                push(start..end, &path.chunks[depth..], path.tail);
            } else {
                // In depth-first order the first and the last have in common what all have.
                let both = path.chunks[depth..].iter().zip(&paths[end - 1].chunks[depth..]);
                let deeper = depth + both.take_while(|(a, b)| a == b).count();
                push(start..end, &path.chunks[depth..deeper], None);
                ahead.push((start..end, deeper));
            }
            start = end;
        }
    }
    segments
}

/// Cuts segments into parts of about equal work; returns the number of parts.
fn cut(segments: &mut [Segment], group: usize, kv_heads: usize) -> usize {
    const ENOUGH: usize = 64;
    const SHORTEST: usize = 1024;
    let work: usize = segments.iter().map(|segment| segment.rows(group) * segment.index.len() * kv_heads).sum();
    let mut parts = 0;
    for segment in segments {
        let rows = segment.rows(group);
        segment.block = if rows <= MAX_QUERY_ROWS { rows } else { QUERY_ROWS };
        let fair = work / (ENOUGH * rows.min(segment.block));
        segment.piece = fair.max(SHORTEST).next_multiple_of(tile::KEYS);
        segment.first_part = parts;
        parts += kv_heads * segment.blocks(group) * segment.pieces();
    }
    parts
}

/// One attention call, its rows in depth-first order.
struct Call<'a, 'o> {
    job: Job<'a, 'o>,
    segments: Vec<Segment>,
    /// Row of `q` of each sequence.
    order: Vec<usize>,
}

impl Call<'_, '_> {
    fn id(&self, position: usize, kv_head: usize, g: usize) -> RowId {
        RowId { batch: 0, head: kv_head * self.job.problem.group + g, row: self.order[position] }
    }
}

/// Merges the parts of one sequence and KV head.
struct Finish<'a> {
    call: &'a Call<'a, 'a>,
    partials: &'a [Partial],
    position: usize,
    kv_head: usize,
    /// The segments of the sequence, from the root.
    path: &'a [usize],
}

impl Kernel for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { call, partials, position, kv_head, path } = self;
        let problem = &call.job.problem;
        let mut row = vec![0f32; problem.value_dim.next_multiple_of(S::LANES)];
        for g in 0..problem.group {
            row.fill(0.0);
            let mut running = Running::EMPTY;
            for &segment in path {
                let segment = &call.segments[segment];
                let r = (position - segment.sequences.start) * problem.group + g;
                let pieces = segment.pieces();
                let block = kv_head * segment.blocks(problem.group) + r / segment.block;
                let first = segment.first_part + block * pieces;
                for part in &partials[first..first + pieces] {
                    let width = part.outputs.len() / part.running.len();
                    let r = r % segment.block;
                    running = fold(s, running, &mut row, part.running[r], &part.outputs[r * width..(r + 1) * width]);
                }
            }
            let all = Keys::Range(0..problem.keys);
            finish_row(s, &call.job, call.id(position, kv_head, g), &all, running, &mut row);
        }
    }
}

/// Softmax attention of one query row of each of `ids` over all keys of its sequence in `tree`.
///
/// `q` is `[1, query heads, sequences, head_dim]`, row i that of `ids[i]` (all sequences, ascending, if none are named), `out` `[1,
/// query heads, sequences, value_dim]`, `lse` `[1, query heads, sequences, 1]` in f32. Sequences without keys give 0 and minus
/// infinity.
pub fn chunk_attention(
    q: TensorView,
    tree: &PrefixTree,
    ids: Option<&[u64]>,
    options: ChunkOptions,
    out: &mut TensorViewMut,
    lse: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    attend(simd::current(), q, tree, ids, options, out, lse, execution)
}

fn attend(
    isa: Isa,
    q: TensorView,
    tree: &PrefixTree,
    ids: Option<&[u64]>,
    options: ChunkOptions,
    out: &mut TensorViewMut,
    lse: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let reader = tree.read();
    let all;
    let ids = match ids {
        Some(ids) => ids,
        None => {
            all = reader.sequences();
            &all
        }
    };
    if q.shape()[2] != ids.len() {
        return Err(Error::value(
            "q",
            format!("{} rows", q.shape()[2]),
            format!("one of each of {} sequences", ids.len()),
        ));
    }
    let dense = Options { scale: options.scale, softcap: options.softcap, sinks: options.sinks, ..Options::default() };
    let problem = Problem::new(q, reader.keys().into(), reader.values().into(), dense)?.on(isa);
    check_outputs(&problem, out, lse)?;
    let paths = reader.paths(ids)?;
    let mut order: Vec<usize> = (0..ids.len()).collect();
    order.sort_by(|&a, &b| paths[a].chunks.cmp(&paths[b].chunks).then(ids[a].cmp(&ids[b])));
    let sorted: Vec<&Path> = order.iter().map(|&i| &paths[i]).collect();
    let mut segments = segments(&sorted, tree.chunk_size(), options.shared);
    let (group, kv_heads) = (problem.group, problem.kv_heads);
    let parts = cut(&mut segments, group, kv_heads);
    let mut path_of: Vec<Vec<usize>> = vec![Vec::new(); ids.len()];
    // (segment, kv head, row block, piece) of each part
    let mut place = Vec::with_capacity(parts);
    for (i, segment) in segments.iter().enumerate() {
        segment.sequences.clone().for_each(|position| path_of[position].push(i));
        for rest in 0..kv_heads * segment.blocks(group) * segment.pieces() {
            let (block, piece) = (rest / segment.pieces(), rest % segment.pieces());
            place.push((i, block / segment.blocks(group), block % segment.blocks(group), piece));
        }
    }
    let (out, lse) = (&*out, &*lse);
    let call = Call { job: Job::new(problem, out, lse), segments, order };
    let part = |&(i, kv_head, block, piece): &(usize, usize, usize, usize)| {
        let segment = &call.segments[i];
        let rows = block * segment.block..((block + 1) * segment.block).min(segment.rows(group));
        let keys = piece * segment.piece..((piece + 1) * segment.piece).min(segment.index.len());
        (segment, kv_head, rows, keys)
    };
    // The long ones first.
    let mut turns: Vec<usize> = (0..parts).collect();
    turns.sort_by_key(|&i| {
        let (_, _, rows, keys) = part(&place[i]);
        std::cmp::Reverse(rows.len() * keys.len())
    });
    let done = map(execution, parts, |turn| {
        let (segment, kv_head, rows, keys) = part(&place[turns[turn]]);
        let mut ids = [RowId { batch: 0, head: 0, row: 0 }; QUERY_ROWS];
        for (id, r) in ids.iter_mut().zip(rows.clone()) {
            *id = call.id(segment.sequences.start + r / group, kv_head, r % group);
        }
        let visible = vec![0..segment.index.len(); rows.len()];
        let list = Some(List { index: &segment.index, bias: None, visible: &visible, patch: None });
        let (problem, ids) = (&call.job.problem, &ids[..rows.len()]);
        with_scratch(|scratch| {
            dispatch(isa, Item { problem, shares: &[Share { ids, keys, list, finish: None }], scratch })
        })
    })?;
    let mut partials: Vec<Option<Partial>> = (0..parts).map(|_| None).collect();
    for (turn, partial) in turns.into_iter().zip(done) {
        partials[turn] = partial;
    }
    let partials: Vec<Partial> = partials.into_iter().flatten().collect();
    for_each(execution, call.order.len() * kv_heads, |i| {
        let (position, kv_head) = (i / kv_heads, i % kv_heads);
        let path = &path_of[position];
        dispatch(isa, Finish { call: &call, partials: &partials, position, kv_head, path });
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    #[test]
    fn segments_are_maximal_and_come_from_the_root() {
        let path = |chunks: &[u32], tail| Path { chunks: chunks.to_vec(), tail };
        let paths = [
            path(&[], None),
            path(&[0, 1], None),
            path(&[0, 1, 2], Some((9, 1))),
            path(&[0, 1, 2], None),
            path(&[0, 5], None),
        ];
        let paths: Vec<&Path> = paths.iter().collect();
        let found = |shared| {
            let mut found: Vec<_> = segments(&paths, 2, shared).into_iter().map(|s| (s.sequences, s.index)).collect();
            found.sort_by_key(|(sequences, index)| (sequences.start, std::cmp::Reverse(sequences.end), index.len()));
            found
        };
        let expected =
            [(1..5, vec![0, 1]), (1..4, vec![2, 3]), (2..4, vec![4, 5]), (2..3, vec![18]), (4..5, vec![10, 11])];
        assert_eq!(found(true), expected);
        let alone = [
            (1..2, vec![0, 1, 2, 3]),
            (2..3, vec![0, 1, 2, 3, 4, 5, 18]),
            (3..4, vec![0, 1, 2, 3, 4, 5]),
            (4..5, vec![0, 1, 10, 11]),
        ];
        assert_eq!(found(false), alone);
    }

    #[test]
    fn equal_values_are_their_own_mean() {
        let (sequences, heads, dim) = (5, 6, 20);
        for dtype in [DType::F32, DType::BF16] {
            let tree = PrefixTree::new(2, dim, dim, dtype, 4, 1 << 12).unwrap();
            for n in 0..sequences {
                let tokens: Vec<i64> = (0..21).chain([n as i64]).collect();
                let rows = vec![0.5f32; 2 * tokens.len() * dim];
                let rows = TensorView::new(&rows, [1, 2, tokens.len(), dim]).unwrap();
                tree.add(&tokens, &rows, &rows).unwrap();
            }
            let q: Vec<f32> = (0..heads * sequences * dim).map(|i| (i % 7) as f32 - 3.0).collect();
            let q = TensorView::new(&q, [1, heads, sequences, dim]).unwrap();
            for isa in Isa::available() {
                for shared in [true, false] {
                    let (mut out, mut lse) = (vec![0f32; heads * sequences * dim], vec![0f32; heads * sequences]);
                    let options = ChunkOptions { scale: Some(0.0), softcap: 0.0, sinks: None, shared };
                    let mut out_view = TensorViewMut::new(&mut out, [1, heads, sequences, dim]).unwrap();
                    let mut lse_view = TensorViewMut::new(&mut lse, [1, heads, sequences, 1]).unwrap();
                    let execution = Execution::default();
                    attend(isa, q, &tree, None, options, &mut out_view, &mut lse_view, &execution).unwrap();
                    assert!(out.iter().all(|x| (x - 0.5).abs() < 1e-6), "{isa:?} {dtype} {shared}");
                    assert!(lse.iter().all(|x| (x - 22f32.ln()).abs() < 1e-5), "{isa:?} {dtype} {shared}");
                }
            }
        }
    }
}
