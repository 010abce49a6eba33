//! Attention over lists of key blocks, of one sequence for each batch entry or of several one after another.

use super::gathered::Gathering;
use super::lists::{BlockLists, Lists, check_bounds, check_options};
use crate::dense::backward::{ListedTile, ROWS, listed_backward, store_sinks};
use crate::dense::keys::Keys;
use crate::dense::packed::{PackedHeads, Packing, with_room};
use crate::dense::run::{Job, RowBlock, run_blocks};
use crate::dense::scores::RowId;
use crate::dense::{Forward, Gradients, Options, Problem, check_outputs, check_packed};
use crate::parallel::Execution;
use crate::simd;
use crate::tensor::{Error, KvView, Result, TensorView, TensorViewMut};
use std::ops::Range;

/// Where sequences that lie one after another in a batch of 1 begin, and the end; blocks may reach over several.
#[derive(Clone, Copy, Debug)]
pub struct Sequences<'a> {
    /// Among the queries.
    pub query_ends: &'a [usize],
    /// Among the keys.
    pub key_ends: &'a [usize],
}

impl Sequences<'_> {
    fn check(&self, problem: &Problem, options: &Options) -> Result<()> {
        if problem.batch != 1 {
            return Err(Error::value("cu_seqlens_q", format!("a batch of {}", problem.batch), "1, which holds all"));
        }
        check_packed(problem.queries, problem.keys, self.query_ends, self.key_ends, options)
    }

    /// Queries and keys of each.
    fn parts(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        self.query_ends.windows(2).zip(self.key_ends.windows(2)).map(|(q, k)| (q[0]..q[1], k[0]..k[1]))
    }
}

/// Bounds of blocks as one sequence has them: those outside hold nothing.
fn inside(bounds: &[usize], part: &Range<usize>) -> Vec<usize> {
    bounds.iter().map(|bound| bound.clamp(&part.start, &part.end) - part.start).collect()
}

fn check(problem: &Problem, blocks: &BlockLists) -> Result<()> {
    check_bounds("key blocks", blocks.key_bounds, problem.keys)?;
    blocks.lists.check(problem, blocks.key_bounds.len() - 1)
}

/// Softmax attention of each block of queries over listed blocks of keys; otherwise as [`crate::dense::attention`]. With `sequences`
/// as [`crate::dense::attention_varlen`], the lists being over all of them.
pub fn block_sparse<'a>(
    q: TensorView<'a>,
    k: impl Into<KvView<'a>>,
    v: impl Into<KvView<'a>>,
    blocks: BlockLists,
    sequences: Option<Sequences>,
    options: Options<'a>,
    out: &mut TensorViewMut,
    lse: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let (k, v) = (k.into(), v.into());
    let problem = Problem::new(q, k, v, options)?;
    check_options(&options)?;
    check_outputs(&problem, out, lse)?;
    check(&problem, &blocks)?;
    let Some(sequences) = sequences else {
        return attend(problem, blocks, out, lse, execution);
    };
    sequences.check(&problem, &options)?;
    for (rows, keys) in sequences.parts() {
        let options = Options { state: options.state.map(|state| state.rows(rows.clone())), ..options };
        let problem = Problem::new(q.rows(rows.clone()), k.rows(keys.clone()), v.rows(keys.clone()), options)?;
        let bounds = (inside(blocks.lists.query_bounds, &rows), inside(blocks.key_bounds, &keys));
        let lists = Lists { query_bounds: &bounds.0, ..blocks.lists };
        let (out, lse) = (out.rows(rows.clone()), lse.rows(rows));
        attend(problem, BlockLists { lists, key_bounds: &bounds.1 }, &out, &lse, execution)?;
    }
    Ok(())
}

/// Attends in one sequence for each batch entry, in the way that takes least.
fn attend(
    problem: Problem,
    blocks: BlockLists,
    out: &TensorViewMut,
    lse: &TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let (isa, BlockLists { lists, key_bounds: bounds }) = (simd::current(), blocks);
    let problem = problem.on(isa);
    if let Some(gathering) = Gathering::new(&problem, blocks) {
        return gathering.run(isa, &Job::new(problem, out, lse), execution);
    }
    let same = |one, other| lists.are_equal(one, other);
    let row_blocks = lists.row_blocks(&problem, same, |list| Keys::Blocks { blocks: lists.list(list), bounds });
    let packing = Packing::new(isa, &problem);
    if !pays(&problem, packing, &row_blocks) {
        return run_blocks(isa, &[Job::new(problem, out, lse)], &row_blocks, execution);
    }
    let together = packing.heads_together();
    with_room(|room| {
        for part in row_blocks.chunk_by(|a, b| a.kv_head(&problem) / together == b.kv_head(&problem) / together) {
            let first = part[0].kv_head(&problem) / together * together;
            let heads = first..(first + together).min(problem.batch * problem.kv_heads);
            let packed = PackedHeads::new(isa, &problem, packing, heads, room, execution)?;
            let problem = Problem { packed: Some(&packed), ..problem };
            run_blocks(isa, &[Job::new(problem, out, lse)], part, execution)?;
        }
        Ok(())
    })
}

/// Those of the blocks of a list of which causality and a window leave query row `row` something.
pub(super) fn visible_blocks<'a>(problem: &Problem, list: &'a [u32], bounds: &[usize], row: usize) -> &'a [u32] {
    let visible = problem.visible(row);
    let start = list.partition_point(|&block| bounds[block as usize + 1] <= visible.start);
    let end = list.partition_point(|&block| bounds[block as usize] < visible.end);
    &list[start..end.max(start)]
}

/// Whether packing each head as a whole takes less than packing what each block of queries picks, and what these pick are whole
/// panels.
fn pays(problem: &Problem, packing: Packing, row_blocks: &[RowBlock]) -> bool {
    let picked: usize = row_blocks.iter().map(RowBlock::packed_keys).sum();
    picked >= 2 * problem.keys * problem.kv_heads * problem.batch
        && picked > 0
        && row_blocks.iter().all(|block| block.packed_keys() == 0 || block.has_whole_panels(packing.panel))
}

/// Gradients of [`block_sparse`]; those of [`attention_backward`](crate::dense::attention_backward) over the listed blocks.
pub fn block_sparse_backward(
    forward: Forward,
    blocks: BlockLists,
    sequences: Option<Sequences>,
    gradients: &mut Gradients,
    execution: &Execution,
) -> Result<()> {
    let problem = Problem::new(forward.q, forward.k.into(), forward.v.into(), forward.options)?;
    check(&problem, &blocks)?;
    let Some(sequences) = sequences else {
        let d_sinks = backward(forward, blocks, gradients, execution)?;
        store_sinks(gradients, &d_sinks);
        return Ok(());
    };
    sequences.check(&problem, &forward.options)?;
    let mut total = vec![0f64; problem.query_heads];
    for (rows, keys) in sequences.parts() {
        let bounds = (inside(blocks.lists.query_bounds, &rows), inside(blocks.key_bounds, &keys));
        let lists = Lists { query_bounds: &bounds.0, ..blocks.lists };
        let part = Forward {
            q: forward.q.rows(rows.clone()),
            k: forward.k.rows(keys.clone()),
            v: forward.v.rows(keys.clone()),
            options: forward.options,
            out: forward.out.rows(rows.clone()),
            lse: forward.lse.rows(rows.clone()),
            d_out: forward.d_out.rows(rows.clone()),
            d_lse: forward.d_lse.map(|x| x.rows(rows.clone())),
        };
        let own = Gradients {
            dq: gradients.dq.rows(rows),
            dk: gradients.dk.rows(keys.clone()),
            dv: gradients.dv.rows(keys),
            d_sinks: None,
        };
        let d_sinks = backward(part, BlockLists { lists, key_bounds: &bounds.1 }, &own, execution)?;
        total.iter_mut().zip(d_sinks).for_each(|(to, x)| *to += x);
    }
    store_sinks(gradients, &total);
    Ok(())
}

/// Gradients in one sequence for each batch entry; returns those of the sinks.
fn backward(forward: Forward, blocks: BlockLists, gradients: &Gradients, execution: &Execution) -> Result<Vec<f64>> {
    let problem = Problem::new(forward.q, forward.k.into(), forward.v.into(), forward.options)?;
    let BlockLists { lists, key_bounds: bounds } = blocks;
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
