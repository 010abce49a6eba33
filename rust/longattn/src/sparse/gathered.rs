//! Lists of key blocks that every few queries have for themselves: rows go together by the block that they pick.
//!
//! ```text
//! a KV head, some queries of all its heads                      -> an item, with a softmax state for each of these rows
//! blocks of keys, in order; up to 192 rows that picked a block  -> dense kernels, folded into the rows' states
//! ```
//! List by list a block would be read once for each of its rows; so it is read, and packed, once for many.

use super::blocks::visible_blocks;
use super::lists::BlockLists;
use crate::dense::keys::Keys;
use crate::dense::run::{Job, Partial};
use crate::dense::scores::{RowId, Running};
use crate::dense::scratch::with_scratch;
use crate::dense::tile::QUERY_ROWS;
use crate::dense::turns::Share;
use crate::dense::{Item, Problem, finish_row, fold};
use crate::parallel::{Execution, for_each};
use crate::simd::{Isa, Kernel, MAX_LANES, PANEL_VECTORS, Simd, dispatch};
use crate::tensor::Result;
use std::ops::Range;

/// Floats of an item's outputs: what a second-level cache holds beside a block of keys.
const ROOM: usize = 1 << 18;

/// Rows that share a list from which on lists are taken one by one.
const MANY: usize = 48;

/// Rows of an item and block, on average, from which on gathering them pays.
const ENOUGH: usize = 12;

/// How a call's rows are cut into items.
pub(super) struct Gathering<'a> {
    blocks: BlockLists<'a>,
    /// Block of queries that each query is in.
    of_query: Vec<u32>,
    /// Queries of an item.
    step: usize,
    /// Floats between the outputs of two rows.
    stride: usize,
}

impl<'a> Gathering<'a> {
    /// `None` where lists are shared by many rows as they are, or where too few rows of an item pick the same blocks.
    pub(super) fn new(problem: &Problem, blocks: BlockLists<'a>) -> Option<Self> {
        let lists = blocks.lists;
        let together = (problem.query_heads / lists.heads).min(problem.group).max(1);
        let longest = lists.query_bounds.windows(2).map(|x| x[1] - x[0]).max()?;
        if longest * together >= MANY {
            return None;
        }
        let heads = lists.batch * lists.heads;
        let some = |run: &Range<usize>| lists.query_bounds[run.start] < lists.query_bounds[run.end];
        let runs = (0..heads).flat_map(|head| lists.runs(head, |a, b| lists.are_equal(a, b))).filter(some).count();
        if problem.queries * heads * together >= MANY * runs {
            return None;
        }
        let stride = problem.value_dim.next_multiple_of(PANEL_VECTORS * MAX_LANES).max(1);
        let step = (ROOM / stride / problem.group.max(1)).max(1);
        let mut of_query = Vec::with_capacity(problem.queries);
        for (block, queries) in lists.query_bounds.windows(2).enumerate() {
            of_query.resize(of_query.len() + queries[1] - queries[0], block as u32);
        }
        let gathering = Self { blocks, of_query, step, stride };
        let (mut met, mut pairs, mut pieces) = (vec![0usize; blocks.key_bounds.len() - 1], 0, 0);
        // Lists of heads that share a KV head meet in its items; those of one batch stand for all that share them.
        for item in 0..lists.batch * problem.kv_heads * gathering.ranges(problem) {
            let (queries, batch, kv_head) = gathering.item(problem, item);
            for query in queries {
                for head in (kv_head * problem.group..(kv_head + 1) * problem.group).step_by(together) {
                    for &block in gathering.list(problem, RowId { batch, head, row: query }) {
                        let last = &mut met[block as usize];
                        pieces += usize::from(*last != item + 1);
                        *last = item + 1;
                        pairs += together;
                    }
                }
            }
        }
        (pairs >= ENOUGH * pieces && pairs > 0).then_some(gathering)
    }

    /// Ranges of queries of each KV head.
    fn ranges(&self, problem: &Problem) -> usize {
        problem.queries.div_ceil(self.step)
    }

    /// Queries, batch entry and KV head of an item; later queries, which see more keys, come first.
    fn item(&self, problem: &Problem, item: usize) -> (Range<usize>, usize, usize) {
        let ranges = self.ranges(problem);
        let (first, pair) = ((ranges - 1 - item % ranges) * self.step, item / ranges);
        (first..(first + self.step).min(problem.queries), pair / problem.kv_heads, pair % problem.kv_heads)
    }

    /// The blocks that a row picks.
    fn list(&self, problem: &Problem, id: RowId) -> &'a [u32] {
        let lists = self.blocks.lists;
        visible_blocks(problem, lists.of(problem, id, self.of_query[id.row]), self.blocks.key_bounds, id.row)
    }

    /// Attends.
    pub(super) fn run(&self, isa: Isa, job: &Job, execution: &Execution) -> Result<()> {
        let problem = &job.problem;
        for_each(execution, problem.batch * problem.kv_heads * self.ranges(problem), |item| {
            let (queries, batch, kv_head) = self.item(problem, item);
            let group = problem.group;
            let id = |r: usize| RowId { batch, head: kv_head * group + r % group, row: queries.start + r / group };
            let rows = queries.len() * group;
            let bounds = self.blocks.key_bounds;
            // Rows of each block, block after block.
            let mut ends = vec![0u32; bounds.len()];
            for r in 0..rows {
                self.list(problem, id(r)).iter().for_each(|&block| ends[block as usize + 1] += 1);
            }
            for block in 1..ends.len() {
                ends[block] += ends[block - 1];
            }
            let mut members = vec![0u32; ends[ends.len() - 1] as usize];
            for r in 0..rows {
                for &block in self.list(problem, id(r)) {
                    // Becomes where the next block begins.
                    members[ends[block as usize] as usize] = r as u32;
                    ends[block as usize] += 1;
                }
            }
            let mut running = vec![Running::EMPTY; rows];
            let mut outputs = vec![0f32; rows * self.stride];
            let mut start = 0;
            for (block, &end) in ends[..ends.len() - 1].iter().enumerate() {
                let members = &members[start..end as usize];
                start = end as usize;
                if members.is_empty() {
                    continue;
                }
                let size =
                    members.len().div_ceil(members.len().div_ceil(QUERY_ROWS)).next_multiple_of(problem.row_step());
                for members in members.chunks(size) {
                    let mut ids = [RowId { batch: 0, head: 0, row: 0 }; QUERY_ROWS];
                    for (to, &r) in ids.iter_mut().zip(members) {
                        *to = id(r as usize);
                    }
                    let (ids, keys) = (&ids[..members.len()], bounds[block]..bounds[block + 1]);
                    let partial = with_scratch(|scratch| {
                        dispatch(
                            isa,
                            Item { problem, shares: &[Share { ids, keys, list: None, finish: None }], scratch },
                        )
                    });
                    let partial = partial.expect("rows that are not finished leave what they have");
                    let (running, outputs) = (&mut running[..], &mut outputs[..]);
                    dispatch(isa, Fold { partial, members, running, outputs, stride: self.stride });
                }
            }
            for r in 0..rows {
                let id = id(r);
                let lists = self.blocks.lists;
                let keys = Keys::Blocks { blocks: lists.of(problem, id, self.of_query[id.row]), bounds };
                let outputs = &mut outputs[r * self.stride..(r + 1) * self.stride];
                dispatch(isa, Finish { job, id, keys, running: running[r], outputs });
            }
        })
    }
}

/// Adds what rows found in a block to what they have.
struct Fold<'a> {
    partial: Partial,
    members: &'a [u32],
    running: &'a mut [Running],
    outputs: &'a mut [f32],
    stride: usize,
}

impl Kernel for Fold<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { partial, members, running, outputs, stride } = self;
        let width = partial.outputs.len() / members.len();
        for (n, &r) in members.iter().enumerate() {
            let r = r as usize;
            let row = &mut outputs[r * stride..(r + 1) * stride];
            running[r] = fold(s, running[r], row, partial.running[n], &partial.outputs[n * width..(n + 1) * width]);
        }
    }
}

/// Writes a row.
struct Finish<'a, 'o> {
    job: &'a Job<'a, 'a>,
    id: RowId,
    keys: Keys<'a>,
    running: Running,
    outputs: &'o mut [f32],
}

impl Kernel for Finish<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { job, id, keys, running, outputs } = self;
        finish_row(s, job, id, &keys, running, outputs);
    }
}
