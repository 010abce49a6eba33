//! Attention over lists of key blocks or of keys.

use super::gathered::Gathering;
use crate::dense::backward::{ListedTile, ROWS, listed_backward};
use crate::dense::keys::Keys;
use crate::dense::packed::{PackedHeads, PackedRoom, Packing};
use crate::dense::run::{Job, RowBlock, push_row_blocks, run_blocks};
use crate::dense::scores::RowId;
use crate::dense::{Forward, Gradients, Options, Problem, check_outputs};
use crate::parallel::Execution;
use crate::simd;
use crate::tensor::{Error, KvView, Result, TensorView, TensorViewMut};
use std::ops::Range;

/// Ascending lists of numbers, one per batch, head and block of queries, one after another.
#[derive(Clone, Copy, Debug)]
pub struct Lists<'a> {
    /// Where lists begin in `indices`, `[batch, heads, query blocks]` and the end.
    pub indptr: &'a [i64],
    /// Their numbers.
    pub indices: &'a [u32],
    /// 1 (the same lists for all), or that of the problem.
    pub batch: usize,
    /// A divisor of the query heads that is a multiple or a divisor of the KV heads: query heads that follow one another share lists.
    pub heads: usize,
    /// Where query blocks begin, and the number of queries.
    pub query_bounds: &'a [usize],
}

/// Lists of key blocks.
#[derive(Clone, Copy, Debug)]
pub struct BlockLists<'a> {
    /// Of key blocks.
    pub lists: Lists<'a>,
    /// Where key blocks begin, and the number of keys.
    pub key_bounds: &'a [usize],
}

/// Lists of keys.
#[derive(Clone, Copy, Debug)]
pub struct RowLists<'a> {
    /// Of keys.
    pub lists: Lists<'a>,
    /// Added to the logits, a number for each of `indices`; minus infinity hides a key.
    pub bias: Option<&'a [f32]>,
}

/// Bounds of blocks that cover `0..total`, in order.
fn check_bounds(name: &'static str, bounds: &[usize], total: usize) -> Result<()> {
    if bounds.first() == Some(&0) && bounds.last() == Some(&total) && bounds.is_sorted() {
        return Ok(());
    }
    Err(Error::value(name, format!("{} bounds", bounds.len()), format!("bounds that rise from 0 to {total}")))
}

impl<'a> Lists<'a> {
    fn query_blocks(&self) -> usize {
        self.query_bounds.len() - 1
    }

    /// Whether the lists fit the problem and hold ascending numbers below `limit`.
    fn check(&self, problem: &Problem, limit: usize) -> Result<()> {
        check_bounds("query blocks", self.query_bounds, problem.queries)?;
        if self.batch != 1 && self.batch != problem.batch {
            return Err(Error::value("lists", format!("batch {}", self.batch), format!("1 or {}", problem.batch)));
        }
        let (heads, q, kv) = (self.heads, problem.query_heads, problem.kv_heads);
        if heads == 0 || q % heads != 0 || (heads % kv.max(1) != 0 && kv % heads != 0) {
            let expected = format!("1, {kv} (KV heads), {q} (query heads), or what lies between and divides them");
            return Err(Error::value("lists", format!("{heads} heads"), expected));
        }
        let count = self.batch * heads * self.query_blocks();
        let end = self.indices.len() as i64;
        if self.indptr.len() != count + 1
            || self.indptr[0] != 0
            || self.indptr[count] != end
            || !self.indptr.is_sorted()
        {
            let expected = format!("{} numbers that rise from 0 to {end}", count + 1);
            return Err(Error::value("indptr", format!("{} numbers", self.indptr.len()), expected));
        }
        for list in 0..count {
            let list = self.list(list);
            let fine = list.windows(2).all(|pair| pair[0] < pair[1]);
            if !fine || list.last().is_some_and(|&last| last as usize >= limit) {
                let expected = format!("each list ascending, without repetition, below {limit}");
                return Err(Error::value("indices", format!("{list:?}"), expected));
            }
        }
        Ok(())
    }

    fn range(&self, list: usize) -> Range<usize> {
        self.indptr[list] as usize..self.indptr[list + 1] as usize
    }

    fn list(&self, list: usize) -> &'a [u32] {
        &self.indices[self.range(list)]
    }

    /// The list of a row, whose query is in block `block`.
    pub(super) fn of(&self, problem: &Problem, id: RowId, block: u32) -> &'a [u32] {
        let head = id.batch.min(self.batch - 1) * self.heads + id.head / (problem.query_heads / self.heads);
        self.list(head * self.query_blocks() + block as usize)
    }

    /// Row blocks of all lists; `keys` says what a list, by its number, stands for.
    fn row_blocks(&self, problem: &Problem, keys: impl Fn(usize) -> Keys<'a>) -> Vec<RowBlock<'a>> {
        let mut blocks = Vec::new();
        let sharing = problem.query_heads / self.heads;
        // Heads that share a KV head and lists.
        let together = sharing.min(problem.group);
        for batch in 0..problem.batch {
            for first in (0..problem.query_heads).step_by(together.max(1)) {
                let head = batch.min(self.batch - 1) * self.heads + first / sharing;
                for (block, queries) in self.query_bounds.windows(2).enumerate() {
                    let keys = keys(head * self.query_blocks() + block);
                    let heads = first..first + together;
                    push_row_blocks(0, problem, batch, heads, queries[0]..queries[1], &keys, &mut blocks);
                }
            }
        }
        blocks
    }
}

fn check_options(options: &Options) -> Result<()> {
    if options.qk_int8 {
        return Err(Error::value("qk_int8", true, "false: lists of keys are not offered in bytes"));
    }
    Ok(())
}

/// Softmax attention of each block of queries over listed blocks of keys; otherwise as [`crate::dense::attention`].
pub fn block_sparse<'a>(
    q: TensorView<'a>,
    k: impl Into<KvView<'a>>,
    v: impl Into<KvView<'a>>,
    blocks: BlockLists<'a>,
    options: Options<'a>,
    out: &mut TensorViewMut,
    lse: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let problem = Problem::new(q, k.into(), v.into(), options)?;
    check_options(&options)?;
    check_outputs(&problem, out, lse)?;
    let BlockLists { lists, key_bounds: bounds } = blocks;
    check_bounds("key blocks", bounds, problem.keys)?;
    lists.check(&problem, bounds.len() - 1)?;
    let isa = simd::current();
    if let Some(gathering) = Gathering::new(&problem, blocks) {
        return gathering.run(isa, &Job::new(problem, out, lse), execution);
    }
    let row_blocks = lists.row_blocks(&problem, |list| Keys::Blocks { blocks: lists.list(list), bounds });
    let packing = Packing::new(isa, &problem);
    if !pays(&problem, packing, bounds, &row_blocks) {
        return run_blocks(isa, &[Job::new(problem, out, lse)], &row_blocks, execution);
    }
    let (together, mut room) = (packing.heads_together(), PackedRoom::default());
    for part in row_blocks.chunk_by(|a, b| a.kv_head(&problem) / together == b.kv_head(&problem) / together) {
        let first = part[0].kv_head(&problem) / together * together;
        let heads = first..(first + together).min(problem.batch * problem.kv_heads);
        let packed = PackedHeads::new(isa, &problem, packing, heads, &mut room, execution)?;
        let problem = Problem { packed: Some(&packed), ..problem };
        run_blocks(isa, &[Job::new(problem, out, lse)], part, execution)?;
    }
    Ok(())
}

/// Those of the blocks of a list of which causality and a window leave query row `row` something.
pub(super) fn visible_blocks<'a>(problem: &Problem, list: &'a [u32], bounds: &[usize], row: usize) -> &'a [u32] {
    let visible = problem.visible(row);
    let start = list.partition_point(|&block| bounds[block as usize + 1] <= visible.start);
    let end = list.partition_point(|&block| bounds[block as usize] < visible.end);
    &list[start..end.max(start)]
}

/// Whether packing each head as a whole takes less than packing what each block of queries picks, and blocks are whole panels.
fn pays(problem: &Problem, packing: Packing, bounds: &[usize], row_blocks: &[RowBlock]) -> bool {
    let inner = &bounds[..bounds.len() - 1];
    let picked: usize = row_blocks.iter().map(RowBlock::packed_keys).sum();
    inner.iter().all(|bound| bound.is_multiple_of(packing.panel))
        && picked >= 2 * problem.keys * problem.kv_heads * problem.batch
        && picked > 0
}

/// Gradients of [`block_sparse`]; those of [`attention_backward`](crate::dense::attention_backward) over the listed blocks.
pub fn block_sparse_backward(
    forward: Forward,
    blocks: BlockLists,
    gradients: &mut Gradients,
    execution: &Execution,
) -> Result<()> {
    let problem = Problem::new(forward.q, forward.k.into(), forward.v.into(), forward.options)?;
    let BlockLists { lists, key_bounds: bounds } = blocks;
    check_bounds("key blocks", bounds, problem.keys)?;
    lists.check(&problem, bounds.len() - 1)?;
    let sharing = problem.query_heads / lists.heads;
    let together = sharing.min(problem.group).max(1);
    // Part of a group's heads, block of queries, and rows of these (queries times heads) of each tile.
    let mut tiles: Vec<(usize, usize, Range<usize>)> = Vec::new();
    for part in 0..problem.group / together {
        for (block, queries) in lists.query_bounds.windows(2).enumerate() {
            let (first, end) = (queries[0] * together, queries[1] * together);
            tiles.extend((first..end).step_by(ROWS).map(|row| (part, block, row..end.min(row + ROWS))));
        }
    }
    let visit = |[batch, kv_head]: [usize; 2], tile: usize, with: &mut dyn FnMut(ListedTile)| {
        let (part, block, rows) = &tiles[tile];
        let first = kv_head * problem.group + part * together;
        let list = (batch.min(lists.batch - 1) * lists.heads + first / sharing) * lists.query_blocks() + block;
        let id = |r: usize| RowId { batch, head: first + r % together, row: r / together };
        let ids: Vec<RowId> = rows.clone().map(id).collect();
        with(ListedTile { ids: &ids, keys: &Keys::Blocks { blocks: lists.list(list), bounds } });
    };
    let counts = vec![tiles.len(); problem.batch * problem.kv_heads];
    listed_backward(forward, gradients, None, &counts, &visit, execution)
}

/// Softmax attention of each block of queries over listed keys; otherwise as [`crate::dense::attention`]. `max`, shaped as `lse`,
/// receives the largest logit of each row, minus infinity where it sees no key.
pub fn index_sparse<'a>(
    q: TensorView<'a>,
    k: impl Into<KvView<'a>>,
    v: impl Into<KvView<'a>>,
    rows: RowLists<'a>,
    options: Options<'a>,
    out: &mut TensorViewMut,
    lse: &mut TensorViewMut,
    max: Option<&mut TensorViewMut>,
    execution: &Execution,
) -> Result<()> {
    let problem = Problem::new(q, k.into(), v.into(), options)?;
    check_options(&options)?;
    check_outputs(&problem, out, lse)?;
    if let Some(max) = &max {
        check_outputs(&problem, out, max)?;
    }
    let RowLists { lists, bias } = rows;
    lists.check(&problem, problem.keys)?;
    if let Some(bias) = bias
        && bias.len() != lists.indices.len()
    {
        return Err(Error::value("bias", format!("{} numbers", bias.len()), format!("{}", lists.indices.len())));
    }
    let row_blocks = lists.row_blocks(&problem, |list| Keys::Rows {
        index: lists.list(list),
        bias: bias.map(|bias| &bias[lists.range(list)]),
    });
    let job = Job { max: max.as_deref(), ..Job::new(problem, out, lse) };
    run_blocks(simd::current(), &[job], &row_blocks, execution)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: usize = 3;
    const KEYS: usize = 4;

    /// One head of equal keys, value j all j: outputs are means of the listed keys' numbers.
    fn means(rows: RowLists) -> Result<Vec<f32>> {
        let (q, k) = ([1f32; ROWS * 8], [1f32; KEYS * 8]);
        let v: Vec<f32> = (0..KEYS * 8).map(|i| (i / 8) as f32).collect();
        let (mut out, mut lse) = ([9f32; ROWS * 8], [9f32; ROWS]);
        index_sparse(
            TensorView::new(&q, [1, 1, ROWS, 8])?,
            TensorView::new(&k, [1, 1, KEYS, 8])?,
            TensorView::new(&v, [1, 1, KEYS, 8])?,
            rows,
            Options::default(),
            &mut TensorViewMut::new(&mut out, [1, 1, ROWS, 8])?,
            &mut TensorViewMut::new(&mut lse, [1, 1, ROWS, 1])?,
            None,
            &Execution::default(),
        )?;
        Ok(out.iter().step_by(8).copied().collect())
    }

    fn lists<'a>(indptr: &'a [i64], indices: &'a [u32], query_bounds: &'a [usize]) -> RowLists<'a> {
        RowLists { lists: Lists { indptr, indices, batch: 1, heads: 1, query_bounds }, bias: None }
    }

    #[test]
    fn rows_get_the_mean_of_their_list() {
        let found = means(lists(&[0, 2, 2, 5], &[0, 3, 0, 1, 2], &[0, 1, 2, 3])).unwrap();
        assert!(found.iter().zip([1.5, 0.0, 1.0]).all(|(x, y)| (x - y).abs() < 1e-6), "{found:?}");
    }

    #[test]
    fn lists_that_do_not_fit_are_refused() {
        let bounds = [0, 3];
        assert!(means(lists(&[0, 2], &[1, 3], &bounds)).is_ok());
        for indices in [&[3, 1][..], &[1, 1], &[1, 4]] {
            assert!(means(lists(&[0, 2], indices, &bounds)).is_err(), "{indices:?}");
        }
        assert!(means(lists(&[0, 1], &[1, 3], &bounds)).is_err());
        assert!(means(lists(&[0, 2, 1], &[1], &[0, 2, 3])).is_err());
        assert!(means(lists(&[0, 2], &[1, 3], &[0, 2])).is_err());
        assert!(means(lists(&[0, 2], &[1, 3], &[])).is_err());
        assert!(means(RowLists { bias: Some(&[0.0]), ..lists(&[0, 2], &[1, 3], &bounds) }).is_err());
    }
}
