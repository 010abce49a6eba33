//! Lists of key blocks or of keys, and attention over those of keys.

use crate::dense::keys::Keys;
use crate::dense::run::{Job, RowBlock, push_row_blocks, run_blocks};
use crate::dense::scores::RowId;
use crate::dense::{Options, Problem, check_outputs};
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
pub(super) fn check_bounds(name: &'static str, bounds: &[usize], total: usize) -> Result<()> {
    if bounds.first() == Some(&0) && bounds.last() == Some(&total) && bounds.is_sorted() {
        return Ok(());
    }
    Err(Error::value(name, format!("{} bounds", bounds.len()), format!("bounds that rise from 0 to {total}")))
}

impl<'a> Lists<'a> {
    pub(super) fn query_blocks(&self) -> usize {
        self.query_bounds.len() - 1
    }

    /// Whether the lists fit the problem and hold ascending numbers below `limit`.
    pub(super) fn check(&self, problem: &Problem, limit: usize) -> Result<()> {
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

    pub(super) fn list(&self, list: usize) -> &'a [u32] {
        &self.indices[self.range(list)]
    }

    /// The list of a row, whose query is in block `block`.
    pub(super) fn of(&self, problem: &Problem, id: RowId, block: u32) -> &'a [u32] {
        let head = id.batch.min(self.batch - 1) * self.heads + id.head / (problem.query_heads / self.heads);
        self.list(head * self.query_blocks() + block as usize)
    }

    /// Blocks of queries of one of the heads that have lists, neighbours with the same list as one: so the block sizes of masks
    /// that were put together do not matter where the masks do not differ.
    pub(super) fn runs(&self, head: usize, same: impl Fn(usize, usize) -> bool) -> Vec<Range<usize>> {
        let first = head * self.query_blocks();
        let mut runs: Vec<Range<usize>> = Vec::new();
        for block in 0..self.query_blocks() {
            match runs.last_mut() {
                Some(run) if same(first + run.start, first + block) => run.end = block + 1,
                _ => runs.push(block..block + 1),
            }
        }
        runs
    }

    /// Whether two lists hold the same numbers.
    pub(super) fn are_equal(&self, one: usize, other: usize) -> bool {
        self.list(one) == self.list(other)
    }

    /// Row blocks of all lists; `keys` says what a list, by its number, stands for, and `same` whether two of them are the same.
    pub(super) fn row_blocks(
        &self,
        problem: &Problem,
        same: impl Fn(usize, usize) -> bool,
        keys: impl Fn(usize) -> Keys<'a>,
    ) -> Vec<RowBlock<'a>> {
        let mut blocks = Vec::new();
        let sharing = problem.query_heads / self.heads;
        // Heads that share a KV head and lists.
        let together = sharing.min(problem.group);
        for batch in 0..problem.batch {
            for first in (0..problem.query_heads).step_by(together.max(1)) {
                let head = batch.min(self.batch - 1) * self.heads + first / sharing;
                for run in self.runs(head, &same) {
                    let keys = keys(head * self.query_blocks() + run.start);
                    let (heads, queries) =
                        (first..first + together, self.query_bounds[run.start]..self.query_bounds[run.end]);
                    push_row_blocks(0, problem, batch, heads, queries, &keys, &mut blocks);
                }
            }
        }
        blocks
    }
}

pub(super) fn check_options(options: &Options) -> Result<()> {
    if options.qk_int8 {
        return Err(Error::value("qk_int8", true, "false: lists of keys are not offered in bytes"));
    }
    Ok(())
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
    let of = |list| bias.map(|bias| &bias[lists.range(list)]);
    let same = |one, other| lists.are_equal(one, other) && of(one) == of(other);
    let row_blocks = lists.row_blocks(&problem, same, |list| Keys::Rows { index: lists.list(list), bias: of(list) });
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
