//! A graph over the keys of each head, searched by a beam instead of a scan.
//!
//! ```text
//! nearest    of each training query, its keys of largest product, exactly               (neighbours.rs)
//! project    the nearest key of a query is linked with the others, pruned and back      (build.rs, prune.rs)
//! link       every key, in rounds: with what a search for it finds, pruned and back     (search.rs)
//! connect    what the entry does not reach gets a link from near by that is never pruned
//! search     a beam from the entry, by product with the query                           (search.rs)
//! ```
//! Rows that are not linked yet are scored exactly beside what the search finds.

mod build;
mod links;
mod neighbours;
mod options;
mod prune;
mod search;
#[cfg(test)]
mod tests;
mod view;

use super::flat::check_keys;
use super::{Followed, Grow, Index, Parameters, Saved, View, check_store, numbers};
use crate::dense::rows::Strided;
use crate::kv::{KvStore, Reader};
use crate::parallel::{Execution, map};
use crate::simd;
use crate::tensor::{Element, Error, Result, TensorView, with_element};
use build::{Builder, Norms, Shape, central};
use links::{Links, SPARE};
pub use options::{GraphOptions, IndexPer, SearchBy};
use prune::Space;
pub use search::KeyMetric;
use search::Metric;
use std::any::Any;
use std::sync::Arc;
use view::GraphView;

/// Stores of fewer rows are scanned.
const FIRST_BUILD: usize = 4096;

/// Growth since the last build that makes a graph anew, around the training queries' nearest rows of now.
const REBUILD_GROWTH: usize = 4;

/// Widest keys.
const MAX_DIM: usize = 4096;

/// What is held of one KV head.
#[derive(Clone, Debug, Default)]
struct HeadGraphs {
    /// What the metric needs of each row; empty for inner products.
    norms: Vec<f32>,
    /// One, or one per query head.
    graphs: Vec<build::Graph>,
}

#[derive(Clone, Debug)]
struct State {
    tail_max: usize,
    /// Rows known to be finite, whose norms are known.
    checked: usize,
    /// Rows in the graphs.
    linked: usize,
    /// Rows at the last build.
    built: usize,
    /// Whether rows were cut away since the graphs were last connected.
    torn: bool,
    heads: Vec<HeadGraphs>,
}

impl State {
    fn forget(&mut self) {
        (self.linked, self.built, self.torn) = (0, 0, false);
        self.heads.iter_mut().for_each(|head| head.graphs.clear());
    }

    fn cut_links(&mut self, rows: usize) {
        for graph in self.heads.iter_mut().flat_map(|head| &mut head.graphs) {
            graph.cut(rows);
        }
        (self.linked, self.torn) = (rows, true);
    }

    /// Whether rows should be linked.
    fn wants_links(&self, len: usize) -> bool {
        len >= FIRST_BUILD && (self.torn || len - self.linked.min(len) > self.tail_max)
    }
}

impl Grow for State {
    fn wants(&self, len: usize) -> bool {
        len > self.checked || self.wants_links(len)
    }

    fn cut(&mut self, len: usize) {
        self.checked = self.checked.min(len);
        for head in &mut self.heads {
            head.norms.truncate(len);
        }
        if len < self.linked {
            if len < FIRST_BUILD || len < self.built / 2 {
                // Most of what the graphs were built around is gone.
                self.forget();
            } else {
                self.cut_links(len);
            }
        }
    }
}

/// An index of graphs over the keys of a store.
pub struct Graph {
    options: GraphOptions,
    state: Followed<State>,
}

impl Graph {
    /// An index over a store, without links until it is first read.
    pub fn new(store: Arc<KvStore>, options: GraphOptions) -> Result<Self> {
        check_store(&store)?;
        let (dim, heads) = (store.head_dim(), store.kv_heads());
        if dim > MAX_DIM {
            return Err(Error::value("store", format!("head_dim {dim}"), format!("at most {MAX_DIM}")));
        }
        let o = &options;
        for (argument, got, low, high) in [
            ("neighbours", o.neighbours, 1, 100),
            ("max_degree", o.max_degree, o.neighbours + 2 * SPARE, 128),
            ("query_neighbours", o.query_neighbours, 2, 4096),
            ("beam", o.beam, 1, 1 << 20),
            ("ef", o.ef, 1, u32::MAX as usize),
        ] {
            if !(low..=high).contains(&got) {
                return Err(Error::value(argument, got, format!("{low} to {high}")));
            }
        }
        if store.capacity() >= u32::MAX as usize {
            return Err(Error::value("store", format!("capacity {}", store.capacity()), "fewer than 2^32 - 1 rows"));
        }
        let whole = if o.query_heads == 0 {
            o.queries.is_empty()
        } else {
            o.query_heads.is_multiple_of(heads) && o.queries.len().is_multiple_of(o.query_heads * dim)
        };
        if !whole {
            let got = format!("{} numbers of {} query heads", o.queries.len(), o.query_heads);
            return Err(Error::value("queries", got, format!("[a multiple of {heads}, queries, {dim}]")));
        }
        if !o.queries.iter().all(|x| x.is_finite()) {
            return Err(Error::value("queries", "NaN or infinity", "finite numbers"));
        }
        if o.per == IndexPer::QueryHead && o.queries.is_empty() {
            return Err(Error::value("index_per", "query_head without queries", "queries, or kv_head"));
        }
        let content = State {
            tail_max: options.tail_max,
            checked: 0,
            linked: 0,
            built: 0,
            torn: false,
            heads: vec![HeadGraphs::default(); heads],
        };
        Ok(Self { options, state: Followed::new(store, content) })
    }

    fn shape(&self) -> Shape {
        let GraphOptions { neighbours, query_neighbours, beam, seed, .. } = self.options;
        Shape { neighbours, query_neighbours, beam, seed }
    }

    /// Training queries of each graph of a KV head.
    fn queries_of(&self, head: usize, heads: usize) -> Vec<&[f32]> {
        let all = &self.options.queries;
        let group = all.len() / heads;
        let of_head = &all[head * group..(head + 1) * group];
        match self.options.per {
            IndexPer::KvHead => vec![of_head],
            IndexPer::QueryHead => of_head.chunks(group / (self.options.query_heads / heads)).collect(),
        }
    }

    /// Brings checks and links up to `reader`.
    fn follow(&self, state: &mut State, reader: &Reader, execution: &Execution) -> Result<()> {
        let keys = numbers(reader.keys());
        let rows = reader.len();
        if rows > state.checked {
            self.check(state, &keys, execution)?;
        }
        if !state.wants_links(rows) {
            return Ok(());
        }
        let before = state.linked;
        let grown = state.built == 0 || rows >= REBUILD_GROWTH * state.built;
        let done = with_element!(keys.dtype(), T => {
            if grown { self.build::<T>(state, &keys, execution) } else { self.extend::<T>(state, &keys, execution) }
        });
        match done {
            Ok(()) => {
                (state.linked, state.torn) = (rows, false);
                if grown {
                    state.built = rows;
                }
            }
            Err(_) if !grown => state.cut_links(before),
            Err(_) => {}
        }
        done
    }

    /// Looks at new rows: each must be finite, and the metric may need its norm.
    fn check(&self, state: &mut State, keys: &TensorView, execution: &Execution) -> Result<()> {
        let [_, heads, rows, dim] = keys.shape();
        let range = state.checked..rows;
        check_keys(keys, range.clone(), execution)?;
        let kind = self.options.kk_metric;
        if kind != KeyMetric::Ip {
            let norms = with_element!(keys.dtype(), T => {
                map(execution, heads, |h| {
                    let rows = Strided { base: keys.head::<T>(0, h), stride: keys.row_stride() };
                    // SAFETY: rows of the reader.
                    unsafe { Norms { rows, dim, range: range.clone(), kind }.run() }.map_err(|row| {
                        let got = format!("key {row} of head {h}, whose squared norm is beyond float32");
                        Error::value("store", got, "shorter keys, or kk_metric ip")
                    })
                })?
            });
            let norms: Vec<Vec<f32>> = norms.into_iter().collect::<Result<_>>()?;
            for (head, norms) in state.heads.iter_mut().zip(norms) {
                head.norms.extend(norms);
            }
        }
        state.checked = rows;
        Ok(())
    }

    fn build<T: Element>(&self, state: &mut State, keys: &TensorView, execution: &Execution) -> Result<()> {
        let [_, heads, rows, dim] = keys.shape();
        let mut made = Vec::with_capacity(heads);
        for (h, head) in state.heads.iter().enumerate() {
            let builder = self.builder::<T>(keys, h, &head.norms, execution);
            let strided = Strided { base: keys.head::<T>(0, h), stride: keys.row_stride() };
            let entry = central(strided, rows, dim);
            let graphs = self.queries_of(h, heads).into_iter();
            let build = |queries| builder.build(rows, entry, self.options.max_degree, queries);
            made.push(graphs.map(build).collect::<Result<Vec<_>>>()?);
        }
        for (head, graphs) in state.heads.iter_mut().zip(made) {
            head.graphs = graphs;
        }
        Ok(())
    }

    fn extend<T: Element>(&self, state: &mut State, keys: &TensorView, execution: &Execution) -> Result<()> {
        let [_, heads, rows, dim] = keys.shape();
        let linked = state.linked;
        for (h, head) in state.heads.iter_mut().enumerate() {
            let builder = self.builder::<T>(keys, h, &head.norms, execution);
            let strided = Strided { base: keys.head::<T>(0, h), stride: keys.row_stride() };
            for (graph, queries) in head.graphs.iter_mut().zip(self.queries_of(h, heads)) {
                if state.torn {
                    if graph.entry as usize >= linked {
                        graph.entry = central(strided, linked, dim);
                    }
                    builder.connect(graph)?;
                }
                if rows > linked {
                    builder.extend(graph, rows, queries)?;
                }
            }
        }
        Ok(())
    }

    fn builder<'a, T: Element>(
        &self,
        keys: &TensorView,
        head: usize,
        norms: &'a [f32],
        execution: &'a Execution,
    ) -> Builder<'a, T> {
        let rows = Strided { base: keys.head::<T>(0, head), stride: keys.row_stride() };
        let metric = Metric { kind: self.options.kk_metric, norms };
        let space = Space { rows, dim: keys.shape()[3], metric };
        // SAFETY: the builder is used with rows of the keys, which a reader keeps.
        unsafe { Builder::new(space, self.shape(), simd::current(), execution) }
    }

    fn saved(&self) -> Saved {
        let (state, o) = (self.state.look(), &self.options);
        let heads = self.store().kv_heads();
        let mut saved = Saved::new(state.linked, self.parameters()).with("built", state.built);
        saved = saved.with("query_heads", o.query_heads).with("torn", state.torn);
        saved = saved.tensor("queries", &[o.queries.len()], o.queries.clone());
        for (h, head) in state.heads.iter().enumerate().take(if state.linked > 0 { heads } else { 0 }) {
            for (g, graph) in head.graphs.iter().enumerate() {
                let (ids, fixed) = graph.links.parts();
                saved = saved
                    .tensor(format!("links.{h}.{g}"), &[fixed.len(), o.max_degree], ids.to_vec())
                    .tensor(format!("fixed.{h}.{g}"), &[fixed.len()], fixed.to_vec())
                    .tensor(format!("entry.{h}.{g}"), &[1], vec![graph.entry])
                    .tensor(format!("pivots.{h}.{g}"), &[graph.pivots.len()], column(graph, |p| p.0))
                    .tensor(format!("least.{h}.{g}"), &[graph.pivots.len()], column(graph, |p| p.1));
            }
        }
        saved
    }

    /// The index that was saved, over a store that has its rows.
    pub(crate) fn load(store: Arc<KvStore>, mut saved: Saved) -> Result<Self> {
        let integer = |name| saved.integer(name).map(|n| n as usize);
        let wrong = |got: &str| Error::value("path", format!("{got:?} in an index of kind graph"), "as it was saved");
        let mut options = GraphOptions {
            neighbours: integer("neighbours")?,
            max_degree: integer("max_degree")?,
            query_neighbours: integer("query_neighbours")?,
            beam: integer("beam")?,
            ef: integer("ef")?,
            kk_metric: KeyMetric::from_name(saved.text("kk_metric")?).ok_or_else(|| wrong("kk_metric"))?,
            per: IndexPer::from_name(saved.text("index_per")?).ok_or_else(|| wrong("index_per"))?,
            search_by: SearchBy::from_name(saved.text("search_by")?).ok_or_else(|| wrong("search_by"))?,
            tail_max: integer("tail_max")?,
            seed: saved.integer("seed")?,
            queries: Vec::new(),
            query_heads: integer("query_heads")?,
        };
        let (built, torn, linked) = (integer("built")?, saved.flag("torn")?, saved.rows);
        options.queries = saved.take_list("queries")?;
        let mut index = Self::new(Arc::clone(&store), options)?;
        if linked == 0 {
            return Ok(index);
        }
        let mut state = (*index.state.look()).clone();
        (state.linked, state.built, state.torn) = (linked, built, torn);
        let heads = store.kv_heads();
        for h in 0..heads {
            let width = index.options.max_degree;
            for (g, queries) in index.queries_of(h, heads).into_iter().enumerate() {
                let n = queries.len() / store.head_dim();
                let pivots: Vec<u32> = saved.take(&format!("pivots.{h}.{g}"), &[n])?;
                let least: Vec<u64> = saved.take(&format!("least.{h}.{g}"), &[n])?;
                if pivots.iter().any(|&row| row as usize >= linked) {
                    return Err(wrong("pivots"));
                }
                let pivots = pivots.into_iter().zip(least).collect();
                let ids = saved.take(&format!("links.{h}.{g}"), &[linked, width])?;
                let fixed = saved.take(&format!("fixed.{h}.{g}"), &[linked])?;
                let entry: Vec<u32> = saved.take(&format!("entry.{h}.{g}"), &[1])?;
                let links = Links::from_parts(width, ids, fixed).ok_or_else(|| wrong("links"))?;
                if entry[0] as usize >= linked && !torn {
                    return Err(wrong("entry"));
                }
                state.heads[h].graphs.push(build::Graph { links, entry: entry[0], pivots });
            }
        }
        index.state = Followed::new(store, state);
        Ok(index)
    }
}

impl Index for Graph {
    fn store(&self) -> &Arc<KvStore> {
        self.state.store()
    }

    fn kind(&self) -> &'static str {
        "graph"
    }

    fn estimates(&self) -> bool {
        false
    }

    fn len(&self) -> usize {
        self.state.look().linked
    }

    fn nbytes(&self) -> usize {
        let state = self.state.look();
        let graphs = |head: &HeadGraphs| {
            head.graphs.iter().map(|graph| graph.links.nbytes() + 12 * graph.pivots.len()).sum::<usize>()
        };
        let heads: usize = state.heads.iter().map(|head| 4 * head.norms.len() + graphs(head)).sum();
        heads + 4 * self.options.queries.len()
    }

    fn pending_operations(&self) -> f64 {
        let (state, store) = (self.state.look(), self.store());
        let (rows, dim) = (store.len(), store.head_dim());
        if !state.wants(rows) || rows < FIRST_BUILD {
            return (rows.saturating_sub(state.checked) * store.kv_heads() * dim) as f64;
        }
        let graphs = if self.options.per == IndexPer::KvHead { store.kv_heads() } else { self.options.query_heads };
        // A search looks at some dozens of rows for each of its beam.
        let linking = (rows - state.linked.min(rows)) * graphs * self.options.beam * 40 * dim;
        let queries = if state.built == 0 { self.options.queries.len() * rows } else { 0 };
        (linking + queries) as f64
    }

    fn read<'a>(&'a self, reader: &'a Reader<'a>, execution: &Execution) -> Result<Box<dyn View + 'a>> {
        let follow = |state: &mut State, reader: &Reader, execution: &Execution| self.follow(state, reader, execution);
        Ok(Box::new(GraphView { index: self, state: self.state.read(reader, execution, follow)? }))
    }

    fn fork(&self, store: Arc<KvStore>) -> Result<Arc<dyn Index>> {
        Ok(Arc::new(Self { options: self.options.clone(), state: self.state.fork(store)? }))
    }

    fn parameters(&self) -> Parameters {
        let o = &self.options;
        let mut parameters = Parameters::new();
        for (name, value) in [
            ("neighbours", o.neighbours),
            ("max_degree", o.max_degree),
            ("query_neighbours", o.query_neighbours),
            ("beam", o.beam),
            ("ef", o.ef),
            ("tail_max", o.tail_max),
        ] {
            parameters.insert(name.into(), value.into());
        }
        parameters.insert("seed".into(), o.seed.into());
        parameters.insert("kk_metric".into(), o.kk_metric.name().into());
        parameters.insert("index_per".into(), o.per.name().into());
        parameters.insert("search_by".into(), o.search_by.name().into());
        parameters
    }

    fn save(&self) -> Saved {
        self.saved()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// One number of each training query.
fn column<N>(graph: &build::Graph, of: impl Fn(&(u32, u64)) -> N) -> Vec<N> {
    graph.pivots.iter().map(of).collect()
}
