//! Picking rows with the graphs of one moment.

use super::build;
use super::search::{Metric, row_of, search, with_memory};
use super::{FIRST_BUILD, Graph, SearchBy, State};
use crate::dense::rows::Strided;
use crate::index::{Ask, Grown, Pick, Select, View};
use crate::parallel::map;
use crate::retrieval::exact::pick_among;
use crate::simd::{Kernel, MAX_LANES, Simd, dispatch};
use crate::tensor::{Element, TensorView, with_element};
use std::ops::Range;

/// Graphs at one moment.
pub(super) struct GraphView<'a> {
    pub(super) index: &'a Graph,
    pub(super) state: Grown<'a, State>,
}

impl View for GraphView<'_> {
    fn covered(&self) -> usize {
        self.state.checked
    }

    fn pick(&self, ask: &Ask) -> Pick {
        let Range { start, end } = ask.candidates;
        let Select::TopK(k) = ask.select else { unreachable!("refused: a graph does not know the mass of rows") };
        if k >= end - start {
            return Pick { rows: (start as u32..end as u32).collect(), ..Pick::default() };
        }
        let ef = self.index.options.ef.max(k);
        // Among few rows there is nothing to search for, and no beam could fill.
        let linked = self.state.linked.clamp(start, end);
        let linked = if linked - start < FIRST_BUILD / 2 { start } else { linked };
        let (mut rows, mut scored, mut bytes) = (Vec::new(), 0, 0);
        if linked > start {
            let dim = ask.keys.shape()[3];
            let mean: Vec<f32>;
            let of_mean: [&[f32]; 1];
            let queries = match self.index.options.search_by {
                SearchBy::Head => ask.queries,
                SearchBy::Mean => {
                    let sum = |d: usize| ask.queries.iter().map(|q| q[d]).sum::<f32>();
                    mean = (0..dim).map(|d| sum(d) / ask.queries.len() as f32).collect();
                    of_mean = [&mean];
                    &of_mean
                }
            };
            let graphs = &self.state.heads[ask.head].graphs;
            let wanted = start as u32..linked as u32;
            let one = |i: usize| {
                // Asked by other heads than it was trained for, an index still has a graph for each.
                let (query, graph) = (queries[i % queries.len()], &graphs[i % graphs.len()]);
                with_element!(ask.keys.dtype(), T => {
                    let rows = Strided { base: ask.keys.head::<T>(0, ask.head), stride: ask.keys.row_stride() };
                    dispatch(ask.isa, SearchGraph { rows, dim, graph, query, wanted: wanted.clone(), width: ef })
                })
            };
            // The mean query is looked for in every graph.
            let n = queries.len().max(if queries.len() == 1 { graphs.len() } else { 1 });
            let found: Vec<Found> = match ask.parallel {
                // A cancelled call's results are never seen.
                Some(execution) => map(execution, n, one).unwrap_or_default(),
                None => (0..n).map(one).collect(),
            };
            for Found { rows: found, scored: of_one, expanded } in found {
                rows.extend(found);
                scored += of_one;
                bytes += of_one * row_bytes(ask.keys) + expanded * 4 * self.index.options.max_degree;
            }
            rows.sort_unstable();
            rows.dedup();
        }
        rows.extend(linked as u32..end as u32);
        let mut pick = pick_among(ask, &rows);
        // What a search found was scored there.
        let tail = end - linked;
        pick.scored = scored + tail;
        pick.bytes = bytes + tail * row_bytes(ask.keys);
        pick
    }
}

/// Bytes of a key.
fn row_bytes(keys: &TensorView) -> usize {
    keys.shape()[3] * keys.dtype().size()
}

/// What a search found.
struct Found {
    rows: Vec<u32>,
    scored: usize,
    expanded: usize,
}

struct SearchGraph<'a, T> {
    rows: Strided<T>,
    dim: usize,
    graph: &'a build::Graph,
    query: &'a [f32],
    wanted: Range<u32>,
    width: usize,
}

impl<T: Element> Kernel for SearchGraph<'_, T> {
    type Output = Found;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Found {
        let Self { rows, dim, graph, query, wanted, width } = self;
        let mut padded = query.to_vec();
        padded.resize(dim.next_multiple_of(MAX_LANES), 0.0);
        with_memory(|memory| {
            let (links, entry, metric) = (&graph.links, graph.entry, Metric::PRODUCT);
            // SAFETY: rows of the graph are rows of the store that the view's reader sees.
            let [scored, expanded] =
                unsafe { search(s, rows, dim, links, entry, &padded, metric, wanted, width, memory) };
            Found { rows: memory.found.iter().map(|&rank| row_of(rank)).collect(), scored, expanded }
        })
    }
}
