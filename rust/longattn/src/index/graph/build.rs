//! Making and mending a graph. Every round works against the graph as it was before the round and is applied in the order of the
//! rows, so the result does not depend on the threads.

use super::links::Links;
use super::neighbours::{Nearest, QUERIES};
use super::prune::{Space, prune};
use super::search::{rank, row_of, search, with_memory};
use crate::index::rotation::Random;
use crate::parallel::{Execution, map};
use crate::simd::{Isa, Kernel, Simd, dispatch};
use crate::tensor::{Element, Result};
use std::ops::Range;

/// Rows that one item links.
const ITEM: usize = 32;

/// Rows of a round: they do not see each other.
const ROUND: usize = 2048;

/// Candidates of one row that pruning looks at, the nearest ones.
const POOL: usize = 512;

/// Shape of a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Links of a row that pruning leaves.
    pub(super) neighbours: usize,
    /// Nearest rows of each training query.
    pub(super) query_neighbours: usize,
    /// Beam of the searches that link rows.
    pub(super) beam: usize,
    pub(super) seed: u64,
}

/// Links over the rows of a head, and where searches begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Graph {
    pub(super) links: Links,
    pub(super) entry: u32,
    /// Of each training query the nearest row, and the rank that a new row must exceed to be among its nearest.
    pub(super) pivots: Vec<(u32, u64)>,
}

impl Graph {
    /// Forgets the rows from `rows` on.
    pub(super) fn cut(&mut self, rows: usize) {
        self.links.cut(rows);
        // No rank is above the largest: a query whose pivot is gone asks for nothing.
        self.pivots.iter_mut().filter(|pivot| pivot.0 as usize >= rows).for_each(|pivot| *pivot = (0, u64::MAX));
    }
}

/// Builds and grows graphs over some rows.
///
/// `space.rows` must yield readable rows for all that a method names, which whoever makes a builder vouches for.
pub(super) struct Builder<'a, T> {
    space: Space<'a, T>,
    shape: Shape,
    isa: Isa,
    execution: &'a Execution,
}

impl<'a, T: Element> Builder<'a, T> {
    /// # Safety
    /// `space.rows` yields `dim` readable elements for every row that the builder is used with.
    pub(super) unsafe fn new(space: Space<'a, T>, shape: Shape, isa: Isa, execution: &'a Execution) -> Self {
        Self { space, shape, isa, execution }
    }

    /// A graph of the rows `0..rows`, around `queries`, `[n, dim]`, if there are any.
    pub(super) fn build(&self, rows: usize, entry: u32, width: usize, queries: &[f32]) -> Result<Graph> {
        let mut graph = Graph { links: Links::new(width), entry, pivots: Vec::new() };
        graph.links.grow(rows);
        if !queries.is_empty() {
            self.project(&mut graph, rows, queries)?;
        }
        // Neighbours in a sequence are alike: linked in order, the rows of a round would miss their nearest.
        let mut order: Vec<u32> = (0..rows as u32).collect();
        let mut random = Random::new(self.shape.seed);
        for i in (1..rows).rev() {
            order.swap(i, random.below(i + 1));
        }
        order.retain(|&row| row != entry);
        self.link(&mut graph, 1, &order)?;
        self.connect(&mut graph)?;
        Ok(graph)
    }

    /// Adds the rows from the graph's end up to `rows`; `queries` are those of the build.
    pub(super) fn extend(&self, graph: &mut Graph, rows: usize, queries: &[f32]) -> Result<()> {
        let first = graph.links.len();
        graph.links.grow(rows);
        if !queries.is_empty() {
            self.adopt(graph, first..rows, queries)?;
        }
        let new: Vec<u32> = (first as u32..rows as u32).collect();
        self.link(graph, first, &new)?;
        self.connect(graph)
    }

    /// Links rows that queries like together: the row nearest to a query with the others that are near it.
    fn project(&self, graph: &mut Graph, rows: usize, queries: &[f32]) -> Result<()> {
        let nearest = self.nearest(0..rows, queries)?;
        let mut pairs: Vec<(u32, u32)> = Vec::new();
        for list in &nearest {
            let (&pivot, others) = list.split_first().expect("a graph has rows");
            pairs.extend(others.iter().map(|&other| (row_of(pivot), row_of(other))));
            let whole = list.len() == self.shape.query_neighbours;
            graph.pivots.push((row_of(pivot), list.last().copied().filter(|_| whole).unwrap_or(0)));
        }
        self.fix(graph, pairs, 0)
    }

    /// As [`Self::project`], for rows that come later.
    fn adopt(&self, graph: &mut Graph, new: Range<usize>, queries: &[f32]) -> Result<()> {
        let nearest = self.nearest(new.clone(), queries)?;
        let mut pairs: Vec<(u32, u32)> = Vec::new();
        for (&(pivot, least), list) in graph.pivots.iter().zip(&nearest) {
            pairs.extend(list.iter().take_while(|&&rank| rank > least).map(|&rank| (pivot, row_of(rank))));
        }
        self.fix(graph, pairs, new.start as u32)
    }

    /// Adds fixed links, `(pivot, row)`, and those back from rows that come at `first` or later.
    fn fix(&self, graph: &mut Graph, mut pairs: Vec<(u32, u32)>, first: u32) -> Result<()> {
        // All that belongs to a pivot, whichever of its queries it comes from.
        pairs.sort_unstable();
        pairs.dedup();
        let lists = self.fixed_lists(graph, &pairs)?;
        let mut back: Vec<(u32, u32)> = Vec::new();
        for (owner, list) in &lists {
            back.extend(list.iter().filter(|&&row| row >= first).map(|&row| (row, *owner)));
        }
        self.set_fixed(graph, lists);
        back.sort_unstable();
        let lists = self.fixed_lists(graph, &back)?;
        self.set_fixed(graph, lists);
        Ok(())
    }

    /// For each owner in `pairs`, `(owner, row)` in order, its fixed links with these rows, pruned.
    fn fixed_lists(&self, graph: &Graph, pairs: &[(u32, u32)]) -> Result<Vec<(u32, Vec<u32>)>> {
        let groups: Vec<&[(u32, u32)]> = pairs.chunk_by(|a, b| a.0 == b.0).collect();
        let most = self.shape.neighbours;
        map(self.execution, groups.len(), |i| {
            let owner = groups[i][0].0;
            let fixed = graph.links.fixed(owner);
            let new = groups[i].iter().map(|pair| pair.1).filter(|row| !fixed.contains(row));
            let pairs: Vec<(u32, u32)> = fixed.iter().copied().chain(new).map(|row| (owner, row)).collect();
            if pairs.len() <= most {
                return (owner, pairs.into_iter().map(|pair| pair.1).collect());
            }
            (owner, self.prune_list(&pairs, &[], most, most))
        })
    }

    /// Replaces fixed links; the others stay as far as there is room.
    fn set_fixed(&self, graph: &mut Graph, lists: Vec<(u32, Vec<u32>)>) {
        let room = graph.links.room();
        for (owner, mut list) in lists {
            let fixed = list.len();
            let others = &graph.links.of(owner)[graph.links.fixed(owner).len()..];
            let others: Vec<u32> = others.iter().copied().filter(|row| !list.contains(row)).collect();
            list.extend(&others[..others.len().min(room.saturating_sub(fixed))]);
            graph.links.set(owner, &list, fixed);
        }
    }

    /// Of each query, `[n, dim]`, the ranks of the rows of a range nearest to it, best first.
    fn nearest(&self, among: Range<usize>, queries: &[f32]) -> Result<Vec<Vec<u64>>> {
        let items: Vec<&[f32]> = queries.chunks(QUERIES * self.space.dim).collect();
        Ok(map(self.execution, items.len(), |i| self.nearest_of(among.clone(), items[i]))?
            .into_iter()
            .flatten()
            .collect())
    }

    fn nearest_of(&self, among: Range<usize>, queries: &[f32]) -> Vec<Vec<u64>> {
        let (rows, dim, count) = (self.space.rows, self.space.dim, self.shape.query_neighbours);
        dispatch(self.isa, Nearest { rows, dim, among, queries, count })
    }

    /// The links of one owner, `pairs[_].0`, out of `pairs[_].1`, after those in `kept`.
    fn prune_list(&self, pairs: &[(u32, u32)], kept: &[u32], most: usize, least: usize) -> Vec<u32> {
        dispatch(self.isa, PruneList { space: self.space, pairs, kept, most, least })
    }

    /// Links the rows of `order` with what a search for each of them finds, and back. `linked` rows are in the graph already.
    fn link(&self, graph: &mut Graph, mut linked: usize, order: &[u32]) -> Result<()> {
        let mut rest = order;
        while !rest.is_empty() {
            let (round, later) = rest.split_at((linked / 4).clamp(1, ROUND).min(rest.len()));
            let items: Vec<&[u32]> = round.chunks(ITEM).collect();
            let frozen = &*graph;
            let lists = map(self.execution, items.len(), |i| {
                dispatch(self.isa, LinkRows { space: self.space, shape: self.shape, graph: frozen, rows: items[i] })
            })?;
            let mut reverse: Vec<(u32, u32)> = Vec::new();
            for (&row, list) in round.iter().zip(lists.iter().flatten()) {
                let fixed = graph.links.fixed(row).len();
                reverse.extend(list[fixed..].iter().map(|&other| (other, row)));
                graph.links.set(row, list, fixed);
            }
            self.link_back(graph, reverse)?;
            linked += round.len();
            rest = later;
        }
        Ok(())
    }

    /// Adds links, `(from, to)`; lists that grow too long are pruned.
    fn link_back(&self, graph: &mut Graph, mut pairs: Vec<(u32, u32)>) -> Result<()> {
        pairs.sort_unstable();
        let groups: Vec<&[(u32, u32)]> = pairs.chunk_by(|a, b| a.0 == b.0).collect();
        let items: Vec<&[&[(u32, u32)]]> = groups.chunks(ITEM).collect();
        let (frozen, room) = (&*graph, graph.links.room());
        let lists = map(self.execution, items.len(), |i| {
            let list_of = |group: &&[(u32, u32)]| {
                let owner = group[0].0;
                let (links, fixed) = (frozen.links.of(owner), frozen.links.fixed(owner));
                let new = || group.iter().map(|pair| pair.1).filter(|row| !links.contains(row));
                let mut list = links.to_vec();
                list.extend(new());
                if list.len() <= room {
                    return list;
                }
                // Down to less than what fits, so that the next links do not prune again at once.
                let free = room.saturating_sub(fixed.len());
                let most = fixed.len() + (free - free / 4).min(self.shape.neighbours);
                let pairs: Vec<(u32, u32)> = list[fixed.len()..].iter().map(|&row| (owner, row)).collect();
                self.prune_list(&pairs, fixed, most, 0)
            };
            items[i].iter().map(list_of).collect::<Vec<_>>()
        })?;
        for (group, list) in groups.iter().zip(lists.iter().flatten()) {
            let fixed = graph.links.fixed(group[0].0).len();
            graph.links.set(group[0].0, list, fixed);
        }
        Ok(())
    }

    /// Brings every row within reach of the entry.
    pub(super) fn connect(&self, graph: &mut Graph) -> Result<()> {
        let rows = graph.links.len();
        let mut reached = vec![false; rows];
        reached[graph.entry as usize] = true;
        graph.links.reach(&mut reached, vec![graph.entry]);
        // Rows below this have no room any more, or are not reached themselves: only looked at where a search offers none.
        for row in 0..rows as u32 {
            if reached[row as usize] {
                continue;
            }
            if row.is_multiple_of(256) && self.execution.cancel.is_cancelled() {
                return Err(crate::tensor::Error::Cancelled);
            }
            let near = dispatch(self.isa, FindNear { space: self.space, shape: self.shape, graph, row });
            let anywhere = (0..rows as u32).filter(|&other| reached[other as usize]);
            let from = near.into_iter().chain(anywhere).find(|&other| graph.links.bridge(other, row));
            debug_assert!(from.is_some(), "each row keeps room for SPARE bridges");
            reached[row as usize] = true;
            graph.links.reach(&mut reached, vec![row]);
        }
        Ok(())
    }
}

/// Prunes one list.
struct PruneList<'a, T> {
    space: Space<'a, T>,
    pairs: &'a [(u32, u32)],
    kept: &'a [u32],
    most: usize,
    least: usize,
}

impl<T: Element> Kernel for PruneList<'_, T> {
    type Output = Vec<u32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<u32> {
        let Self { space, pairs, kept, most, least } = self;
        let owner = pairs[0].0;
        with_memory(|memory| {
            let mut links = kept.to_vec();
            // SAFETY: the builder's promise on the rows of the graph.
            unsafe {
                let mut candidates = Vec::with_capacity(pairs.len());
                let mut owner_row = Vec::new();
                space.widen(s, owner, &mut owner_row);
                let mut scores = [0f32; crate::dense::stream::KEYS];
                for part in pairs.chunks(64) {
                    memory.list.clear();
                    memory.list.extend(part.iter().map(|pair| pair.1));
                    super::search::products(s, space.rows, space.dim, &owner_row, &mut memory.list, &mut scores);
                    for (&row, &product) in memory.list.iter().zip(&scores) {
                        candidates.push(rank(space.metric.nearness(product, row), row));
                    }
                }
                candidates.sort_unstable_by(|a, b| b.cmp(a));
                candidates.truncate(POOL);
                let (wide, spare) = (&mut memory.wide, &mut memory.list);
                prune(s, space, owner, &candidates, most, least, &mut links, wide, spare);
            }
            links
        })
    }
}

/// The links of some rows: what they have, and what a search finds.
struct LinkRows<'a, T> {
    space: Space<'a, T>,
    shape: Shape,
    graph: &'a Graph,
    rows: &'a [u32],
}

impl<T: Element> Kernel for LinkRows<'_, T> {
    type Output = Vec<Vec<u32>>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<Vec<u32>> {
        let Self { space, shape, graph, rows } = self;
        let mut lists = Vec::with_capacity(rows.len());
        with_memory(|memory| {
            for &row in rows {
                let links = &graph.links;
                let fixed = links.fixed(row);
                let mut list = fixed.to_vec();
                // SAFETY: the builder's promise on the rows of the graph.
                unsafe {
                    let mut query = std::mem::take(&mut memory.wide);
                    space.widen(s, row, &mut query);
                    let all = 0..links.len() as u32;
                    let metric = space.metric;
                    search(s, space.rows, space.dim, links, graph.entry, &query, metric, all, shape.beam, memory);
                    memory.wide = query;
                    let mut found = std::mem::take(&mut memory.found);
                    found.retain(|&rank| row_of(rank) != row);
                    let room = links.room().saturating_sub(list.len()).min(shape.neighbours);
                    let most = list.len() + room;
                    let least = (list.len() + shape.neighbours / 4).min(most);
                    let (wide, spare) = (&mut memory.wide, &mut memory.list);
                    prune(s, space, row, &found, most, least, &mut list, wide, spare);
                    memory.found = found;
                }
                lists.push(list);
            }
        });
        lists
    }
}

/// Rows of the graph near one that it does not reach.
struct FindNear<'a, T> {
    space: Space<'a, T>,
    shape: Shape,
    graph: &'a Graph,
    row: u32,
}

impl<T: Element> Kernel for FindNear<'_, T> {
    type Output = Vec<u32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<u32> {
        let Self { space, shape, graph, row } = self;
        with_memory(|memory| {
            let mut query = Vec::new();
            let all = 0..graph.links.len() as u32;
            // SAFETY: the builder's promise on the rows of the graph.
            unsafe {
                space.widen(s, row, &mut query);
                let (rows, dim, metric) = (space.rows, space.dim, space.metric);
                search(s, rows, dim, &graph.links, graph.entry, &query, metric, all, shape.beam, memory);
            }
            memory.found.iter().map(|&rank| row_of(rank)).collect()
        })
    }
}

/// What a key metric keeps of each row of `range`; the error is a row that is not finite, or too long for a float's square.
pub(super) struct Norms<T> {
    pub(super) rows: crate::dense::rows::Strided<T>,
    pub(super) dim: usize,
    pub(super) range: Range<usize>,
    pub(super) kind: super::search::KeyMetric,
}

impl<T: Element> Norms<T> {
    /// # Safety
    /// The rows of the range have `dim` readable elements.
    pub(super) unsafe fn run(self) -> std::result::Result<Vec<f32>, usize> {
        use super::search::KeyMetric;
        let row = |j: usize| {
            let start = crate::dense::rows::Rows::row(self.rows, j);
            // SAFETY: the caller's promise.
            let row = unsafe { std::slice::from_raw_parts(start, self.dim) };
            let square = row.iter().map(|x| x.to_f32() * x.to_f32()).sum::<f32>();
            match self.kind {
                _ if !square.is_finite() => Err(j),
                KeyMetric::Ip => Ok(0.0),
                KeyMetric::L2 => Ok(0.5 * square),
                KeyMetric::Cos => Ok(if square > 0.0 { square.sqrt().recip() } else { 0.0 }),
            }
        };
        self.range.clone().map(row).collect()
    }
}

/// The row of `0..rows` nearest to their mean, and that mean.
pub(super) fn central<T: Element>(rows: crate::dense::rows::Strided<T>, n: usize, dim: usize) -> u32 {
    let row = |j: usize| {
        let start = crate::dense::rows::Rows::row(rows, j);
        // SAFETY: rows of the builder's space.
        unsafe { std::slice::from_raw_parts(start, dim) }
    };
    let mut mean = vec![0f64; dim];
    for j in 0..n {
        mean.iter_mut().zip(row(j)).for_each(|(m, x)| *m += f64::from(x.to_f32()));
    }
    let mean: Vec<f32> = mean.iter().map(|m| (m / n as f64) as f32).collect();
    let distance = |j: usize| row(j).iter().zip(&mean).map(|(x, m)| (x.to_f32() - m).powi(2)).sum::<f32>();
    (0..n).map(|j| (distance(j), j)).min_by(|a, b| a.0.total_cmp(&b.0)).map_or(0, |(_, j)| j as u32)
}
