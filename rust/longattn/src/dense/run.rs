//! How attention is cut into items, and how they run.
//!
//! ```text
//! row blocks x ranges of their keys (fixed sizes)      -> items, run by the pool, the long ones first
//! partials of one row block merged in order            -> output and lse
//! ```

use super::keys::{Keys, List};
use super::scores::{RowId, Running};
use super::scratch::with_scratch;
use super::stream::MAX_QUERY_ROWS;
use super::tile::{self, QUERY_ROWS};
use super::turns::Share;
use super::{Item, Problem, finish_row, fold};
use crate::parallel::{Execution, for_each};
use crate::simd::{Isa, Kernel, Simd, dispatch};
use crate::tensor::{Result, TensorViewMut};
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Mutex;

/// One attention problem and where its results go; `lse` has shape `[batch, query heads, queries, 1]`.
pub(crate) struct Job<'a, 'o> {
    pub(crate) problem: Problem<'a>,
    pub(crate) out: &'o TensorViewMut<'o>,
    pub(crate) lse: &'o TensorViewMut<'o>,
    /// Where each row's largest logit goes, shaped as `lse`, if it is asked for.
    pub(crate) max: Option<&'o TensorViewMut<'o>>,
}

impl<'a, 'o> Job<'a, 'o> {
    pub(crate) fn new(problem: Problem<'a>, out: &'o TensorViewMut<'o>, lse: &'o TensorViewMut<'o>) -> Self {
        Self { problem, out, lse, max: None }
    }

    /// The job as it runs on an instruction set.
    pub(crate) fn on(&self, isa: Isa) -> Self {
        Self { problem: self.problem.on(isa), ..*self }
    }
}

/// Query rows of heads that share a KV head, and their keys: row r is query `r / heads` of head `r % heads` of these.
pub(crate) struct RowBlock<'a> {
    job: usize,
    batch: usize,
    heads: Range<usize>,
    rows: Range<usize>,
    keys: Keys<'a>,
    /// Number of keys.
    count: usize,
}

impl RowBlock<'_> {
    /// The KV head, counted over batches.
    pub(crate) fn kv_head(&self, problem: &Problem) -> usize {
        self.batch * problem.kv_heads + self.heads.start / problem.group
    }

    /// Keys that it would pack, if it packs any.
    pub(crate) fn packed_keys(&self) -> usize {
        if self.rows.len() > MAX_QUERY_ROWS { self.count } else { 0 }
    }

    /// `length` of its keys, counted along its list if it has one, from the one on that comes `start` after the first; or as many as there
    /// are.
    fn piece(&self, start: usize, length: usize) -> Range<usize> {
        let first = match &self.keys {
            Keys::Range(keys) => keys.start,
            _ => 0,
        };
        first + start..first + (start + length).min(self.count).max(start)
    }

    /// Whether its keys, blocks of them, are whole panels wherever some that follow one another begin and end, but for the last.
    pub(crate) fn has_whole_panels(&self, panel: usize) -> bool {
        let Keys::Blocks { blocks, bounds } = &self.keys else { return false };
        let mut end = 0;
        blocks.iter().all(|&block| {
            let (start, before) = (bounds[block as usize], end);
            end = bounds[block as usize + 1];
            start == before || (start.is_multiple_of(panel) && before.is_multiple_of(panel))
        })
    }

    fn id(&self, r: usize) -> RowId {
        let r = self.rows.start + r;
        RowId { batch: self.batch, head: self.heads.start + r % self.heads.len(), row: r / self.heads.len() }
    }
}

/// What an item leaves for the merge: running softmax and unnormalised outputs of its rows.
pub(crate) struct Partial {
    pub(crate) running: Vec<Running>,
    pub(crate) outputs: Vec<f32>,
}

/// Adds the blocks of the queries `queries` of `heads`, which share a KV head, with those of `keys` that some of them may see.
pub(crate) fn push_row_blocks<'a>(
    job: usize,
    problem: &Problem,
    batch: usize,
    heads: Range<usize>,
    queries: Range<usize>,
    keys: &Keys<'a>,
    blocks: &mut Vec<RowBlock<'a>>,
) {
    let (n, rows) = (heads.len(), heads.len() * queries.len());
    if rows == 0 {
        return;
    }
    let step = match rows {
        ..=MAX_QUERY_ROWS => rows,
        _ if matches!(keys, Keys::Range(_)) => problem.item_rows(),
        // Lists are short and blocks of like length make the most of the keys that each has to pack.
        _ => rows.div_ceil(rows.div_ceil(QUERY_ROWS)).next_multiple_of(problem.row_step()),
    };
    let (first_row, last_row) = (queries.start * n, queries.end * n);
    for first in (first_row..last_row).step_by(step) {
        let last = (first + step).min(last_row);
        let (start, end) = (problem.visible(first / n), problem.visible((last - 1) / n));
        let keys = keys.within(start.start..end.end.max(start.start));
        blocks.push(RowBlock { job, batch, heads: heads.clone(), rows: first..last, count: keys.len(), keys });
    }
}

/// The row blocks of a problem in which every query may see all keys.
fn dense_row_blocks<'a>(job: usize, problem: &Problem, blocks: &mut Vec<RowBlock<'a>>) {
    for batch in 0..problem.batch {
        for kv_head in 0..problem.kv_heads {
            let heads = kv_head * problem.group..(kv_head + 1) * problem.group;
            push_row_blocks(job, problem, batch, heads, 0..problem.queries, &Keys::Range(0..problem.keys), blocks);
        }
    }
}

/// Row blocks that are enough to share out among threads.
pub(super) const ENOUGH: usize = 32;

/// Keys per item: all of a row block where there are enough of these, else fixed pieces.
pub(super) fn split_length(blocks: usize, longest: usize) -> usize {
    const SHORTEST: usize = 1024;
    if blocks >= ENOUGH {
        return longest.max(1);
    }
    (longest * blocks / (2 * ENOUGH)).max(SHORTEST).next_multiple_of(tile::KEYS)
}

struct MergeParts<'a> {
    job: &'a Job<'a, 'a>,
    block: &'a RowBlock<'a>,
    parts: Vec<Partial>,
}

impl Kernel for MergeParts<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { job, block, mut parts } = self;
        let n = block.rows.len();
        let width = parts.first().map_or(0, |p| p.outputs.len() / n);
        let (first, rest) = parts.split_first_mut().expect("a split block has parts");
        for r in 0..n {
            let row = &mut first.outputs[r * width..(r + 1) * width];
            let mut running = first.running[r];
            for part in rest.iter() {
                running = fold(s, running, row, part.running[r], &part.outputs[r * width..(r + 1) * width]);
            }
            finish_row(s, job, block.id(r), &block.keys, running, row);
        }
    }
}

/// Runs several problems, in which every query may see all keys, as one pool of work.
pub(crate) fn run(isa: Isa, jobs: &[Job], execution: &Execution) -> Result<()> {
    let jobs: Vec<_> = jobs.iter().map(|job| job.on(isa)).collect();
    let mut blocks = Vec::new();
    for (j, job) in jobs.iter().enumerate() {
        dense_row_blocks(j, &job.problem, &mut blocks);
    }
    run_blocks(isa, &jobs, &blocks, execution)
}

/// What a worker does at a time.
enum Work {
    /// A row block, and one of the pieces of its keys.
    Piece(usize, usize),
    /// Row blocks of one KV head that follow one another, and all of their keys.
    Blocks(Range<usize>),
}

/// Row blocks that are worked on together: those over lists of packed keys, as many rows as an item may have while there are enough
/// items.
pub(super) fn groups(jobs: &[Job], blocks: &[RowBlock]) -> Vec<Range<usize>> {
    let all: usize = blocks.iter().map(|block| block.rows.len()).sum();
    let mut groups: Vec<Range<usize>> = Vec::new();
    let mut rows = 0;
    for (b, block) in blocks.iter().enumerate() {
        let problem = &jobs[block.job].problem;
        let more = block.rows.len().next_multiple_of(problem.row_step());
        let joins = |group: &Range<usize>| {
            let first = &blocks[group.start];
            let packed = |block: &RowBlock| block.rows.len() > MAX_QUERY_ROWS && problem.packed.is_some();
            let same_head = (first.job, first.kv_head(problem)) == (block.job, block.kv_head(problem));
            same_head && packed(first) && packed(block) && rows + more <= problem.item_rows().min(all / ENOUGH)
        };
        match groups.last_mut() {
            Some(group) if joins(group) => group.end = b + 1,
            _ => {
                rows = 0;
                groups.push(b..b + 1);
            }
        }
        rows += more;
    }
    groups
}

/// Runs row blocks, which hold every query row of the jobs once; the problems are [`Problem::on`] the instruction set.
pub(crate) fn run_blocks(isa: Isa, jobs: &[Job], blocks: &[RowBlock], execution: &Execution) -> Result<()> {
    let longest = blocks.iter().map(|b| b.count).max().unwrap_or(0);
    let length = split_length(blocks.len(), longest);
    let pieces_of = |b: usize| blocks[b].count.div_ceil(length).max(1);
    let mut items: Vec<Work> = Vec::new();
    for group in groups(jobs, blocks) {
        match group.len() {
            1 => items.extend((0..pieces_of(group.start)).map(|piece| Work::Piece(group.start, piece))),
            _ => items.push(Work::Blocks(group)),
        }
    }
    // The long ones first.
    items.sort_by_key(|work| {
        std::cmp::Reverse(match work {
            &Work::Piece(b, piece) => blocks[b].piece(piece * length, length).len() * blocks[b].rows.len(),
            Work::Blocks(group) => blocks[group.clone()].iter().map(|block| block.count * block.rows.len()).sum(),
        })
    });
    let pieces: Vec<Mutex<Vec<Option<Partial>>>> = blocks.iter().map(|_| Mutex::default()).collect();
    for_each(execution, items.len(), |i| {
        let (group, piece) = match &items[i] {
            &Work::Piece(b, piece) => (b..b + 1, (pieces_of(b) > 1).then_some(piece)),
            Work::Blocks(group) => (group.clone(), None),
        };
        let first = group.start;
        let blocks = &blocks[group];
        let job = &jobs[blocks[0].job];
        let problem = &job.problem;
        let rows: Vec<Rows> = blocks.iter().map(|block| Rows::new(problem, block)).collect();
        let shares: Vec<Share> = blocks
            .iter()
            .zip(&rows)
            .map(|(block, rows)| Share {
                ids: &rows.ids,
                keys: piece.map_or_else(|| block.piece(0, block.count), |piece| block.piece(piece * length, length)),
                list: rows.list(&block.keys),
                finish: piece.is_none().then_some((job, &block.keys)),
            })
            .collect();
        let partial = with_scratch(|scratch| dispatch(isa, Item { problem, shares: &shares, scratch }));
        if let Some(piece) = piece {
            let mut slots = pieces[first].lock().unwrap_or_else(|e| e.into_inner());
            slots.resize_with(pieces_of(first), || None);
            slots[piece] = partial;
            // The last piece to arrive merges them all, in their order.
            if slots.iter().all(Option::is_some) {
                let parts = std::mem::take(&mut *slots).into_iter().flatten().collect();
                dispatch(isa, MergeParts { job, block: &blocks[0], parts });
            }
        }
    })
}

/// The query rows of a row block, the list that its keys are, and what each row sees of that.
struct Rows<'a> {
    ids: Vec<RowId>,
    index: Option<Cow<'a, [u32]>>,
    visible: Vec<Range<usize>>,
}

impl<'a> Rows<'a> {
    fn new(problem: &Problem, block: &RowBlock<'a>) -> Self {
        let ids: Vec<_> = (0..block.rows.len()).map(|r| block.id(r)).collect();
        let index = block.keys.index();
        let visible = match &index {
            Some(index) => ids.iter().map(|id| block.keys.visible(problem, index, id.row)).collect(),
            None => Vec::new(),
        };
        Self { ids, index, visible }
    }

    fn list<'b>(&'b self, keys: &'b Keys) -> Option<List<'b>> {
        let index = self.index.as_deref()?;
        Some(List { index, bias: keys.bias(), visible: &self.visible, patch: keys.patch() })
    }
}
