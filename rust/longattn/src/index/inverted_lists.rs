//! Inverted lists: keys by their nearest centroid. The lists of the centroids that suit a query group are scanned exactly.

use super::flat::check_keys;
use super::{Followed, Grow, Grown, Index, Parameters, Saved, View, check_numbers, kmeans, numbers};
use crate::dense::rows::Strided;
use crate::index::{Ask, Pick, Select};
use crate::kv::{KvStore, Reader};
use crate::parallel::{Execution, map};
use crate::retrieval::exact::{pick_among, products};
use crate::simd::{self, dispatch};
use crate::tensor::{Element, Error, Result, TensorView, with_element};
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

/// Stores of fewer rows are scanned.
const FIRST_FIT: usize = 4096;

/// Growth since the last fit that makes centroids anew.
const REFIT_GROWTH: usize = 4;

/// Rows that may wait for a list; they are scanned meanwhile.
const TAIL: usize = 256;

/// Rows per list where their number is not given, up to [`MAX_LISTS`].
const ROWS_PER_LIST: usize = 128;
const MAX_LISTS: usize = 4096;

/// Rows per list that centroids are fitted to.
const SAMPLE: usize = 64;
const ITERATIONS: usize = 6;

/// Rows that one item assigns.
const CHUNK: usize = 4096;

/// How many lists are scanned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// So many.
    Lists(usize),
    /// As many as it takes for so many rows.
    Rows(usize),
}

/// How lists are made and probed.
#[derive(Clone, Copy, Debug)]
pub struct InvertedListOptions {
    /// Lists of a KV head; `None` is one for 128 rows, at most 4096.
    pub lists: Option<usize>,
    /// How many are scanned.
    pub probe: Probe,
    /// Seed of the centroids.
    pub seed: u64,
}

/// Lists of one KV head.
#[derive(Clone, Debug, Default)]
struct HeadLists {
    /// `[lists, dim]`.
    centroids: Vec<f32>,
    /// Rows of each, ascending.
    lists: Vec<Vec<u32>>,
}

#[derive(Clone, Debug, Default)]
struct State {
    /// Rows known to be finite.
    checked: usize,
    /// Rows in lists.
    listed: usize,
    /// Rows at the last fit.
    fitted: usize,
    heads: Vec<HeadLists>,
}

impl State {
    fn wants_lists(&self, len: usize) -> bool {
        len >= FIRST_FIT && len - self.listed.min(len) >= TAIL
    }
}

impl Grow for State {
    fn wants(&self, len: usize) -> bool {
        len > self.checked || self.wants_lists(len)
    }

    fn cut(&mut self, len: usize) {
        self.checked = self.checked.min(len);
        if len >= self.listed {
            return;
        }
        if len < FIRST_FIT || len < self.fitted / 2 {
            // Most of what the centroids stand for is gone.
            *self =
                Self { checked: self.checked, heads: vec![HeadLists::default(); self.heads.len()], ..Self::default() };
            return;
        }
        self.listed = len;
        for list in self.heads.iter_mut().flat_map(|head| &mut head.lists) {
            list.truncate(list.partition_point(|&row| (row as usize) < len));
        }
    }
}

/// An index of inverted lists.
pub struct InvertedLists {
    options: InvertedListOptions,
    state: Followed<State>,
}

impl InvertedLists {
    /// An index over a store, without lists until it is first read.
    pub fn new(store: Arc<KvStore>, options: InvertedListOptions) -> Result<Self> {
        check_numbers(&store)?;
        if store.capacity() >= u32::MAX as usize {
            return Err(Error::value("store", format!("capacity {}", store.capacity()), "fewer than 2^32 - 1 rows"));
        }
        if let Some(lists) = options.lists
            && !(1..=MAX_LISTS).contains(&lists)
        {
            return Err(Error::value("lists", lists, format!("1 to {MAX_LISTS}")));
        }
        let (Probe::Lists(n) | Probe::Rows(n)) = options.probe;
        if n == 0 {
            let argument = if matches!(options.probe, Probe::Rows(_)) { "probe_rows" } else { "nprobe" };
            return Err(Error::value(argument, 0, "at least 1"));
        }
        let heads = vec![HeadLists::default(); store.kv_heads()];
        let state = Followed::new(store, State { heads, ..State::default() });
        Ok(Self { options, state })
    }

    fn follow(&self, state: &mut State, reader: &Reader, execution: &Execution) -> Result<()> {
        let keys = numbers(reader.keys());
        let rows = reader.len();
        if rows > state.checked {
            check_keys(&keys, state.checked..rows, execution)?;
            state.checked = rows;
        }
        if !state.wants_lists(rows) {
            return Ok(());
        }
        let heads = keys.shape()[1];
        with_element!(keys.dtype(), T => {
            if state.fitted == 0 || rows >= REFIT_GROWTH * state.fitted {
                let fitted = map(execution, heads, |h| self.fit::<T>(&keys, h))?;
                for (head, centroids) in state.heads.iter_mut().zip(fitted) {
                    head.lists = vec![Vec::new(); centroids.len() / keys.shape()[3]];
                    head.centroids = centroids;
                }
                (state.listed, state.fitted) = (0, rows);
            }
            self.assign::<T>(state, &keys, execution)
        })
    }

    /// Centroids of a head's keys: k-means on an evenly spaced sample.
    fn fit<T: Element>(&self, keys: &TensorView, head: usize) -> Vec<f32> {
        let (rows, dim) = (keys.shape()[2], keys.shape()[3]);
        let lists = self.options.lists.unwrap_or((rows / ROWS_PER_LIST).clamp(1, MAX_LISTS)).min(rows);
        let size = rows.min(SAMPLE * lists);
        let mut sample = Vec::with_capacity(size * dim);
        for i in 0..size {
            // In 128 bits, as the product may be large.
            let row = (i as u128 * rows as u128 / size as u128) as usize;
            sample.extend(keys.row::<T>(0, head, row).iter().map(|x| x.to_f32()));
        }
        let seed = self.options.seed ^ head as u64;
        kmeans::fit(simd::current(), &sample, dim, lists, ITERATIONS, false, seed).centroids
    }

    /// Puts the rows that have no list yet into those of their nearest centroids.
    fn assign<T: Element>(&self, state: &mut State, keys: &TensorView, execution: &Execution) -> Result<()> {
        let [_, heads, rows, dim] = keys.shape();
        let (first, isa) = (state.listed, simd::current());
        let chunks = (rows - first).div_ceil(CHUNK);
        let nearest = map(execution, heads * chunks, |i| {
            let (h, start) = (i / chunks, first + i % chunks * CHUNK);
            let range = start..(start + CHUNK).min(rows);
            let rows = Strided { base: keys.head::<T>(0, h), stride: keys.row_stride() };
            dispatch(isa, kmeans::Assign { centroids: &state.heads[h].centroids, dim, rows, range })
        })?;
        for (head, nearest) in state.heads.iter_mut().zip(nearest.chunks(chunks.max(1))) {
            for (row, &list) in (first as u32..).zip(nearest.iter().flatten()) {
                head.lists[list as usize].push(row);
            }
        }
        state.listed = rows;
        Ok(())
    }

    fn saved(&self) -> Saved {
        let state = self.state.look();
        let mut saved = Saved::new(state.listed, self.parameters()).with("fitted", state.fitted);
        for (h, head) in state.heads.iter().enumerate().filter(|_| state.fitted > 0) {
            let n = head.lists.len();
            let lengths: Vec<u32> = head.lists.iter().map(|list| list.len() as u32).collect();
            saved = saved
                .tensor(format!("centroids.{h}"), &[n, self.store().head_dim()], head.centroids.clone())
                .tensor(format!("lengths.{h}"), &[n], lengths)
                .tensor(format!("rows.{h}"), &[state.listed], head.lists.concat());
        }
        saved
    }

    /// The index that was saved, over a store that has its rows.
    pub(crate) fn load(store: Arc<KvStore>, mut saved: Saved) -> Result<Self> {
        let wrong = |got: &str| Error::value("path", format!("{got:?} in inverted lists"), "as it was saved");
        let lists = saved.integer("lists").ok().map(|n| n as usize);
        let probe = match saved.integer("nprobe") {
            Ok(n) => Probe::Lists(n as usize),
            Err(_) => Probe::Rows(saved.integer("probe_rows")? as usize),
        };
        let options = InvertedListOptions { lists, probe, seed: saved.integer("seed")? };
        let mut index = Self::new(Arc::clone(&store), options)?;
        let (listed, fitted, dim) = (saved.rows, saved.integer("fitted")? as usize, store.head_dim());
        if fitted == 0 {
            return Ok(index);
        }
        let mut state = State { checked: listed, listed, fitted, heads: Vec::new() };
        for h in 0..store.kv_heads() {
            let lengths: Vec<u32> = saved.take_list(&format!("lengths.{h}"))?;
            let centroids = saved.take(&format!("centroids.{h}"), &[lengths.len(), dim])?;
            let rows: Vec<u32> = saved.take(&format!("rows.{h}"), &[listed])?;
            let (mut lists, mut rest, mut seen) = (Vec::new(), &rows[..], vec![false; listed]);
            for &length in &lengths {
                let (list, later) = rest.split_at_checked(length as usize).ok_or_else(|| wrong("lengths"))?;
                lists.push(list.to_vec());
                rest = later;
            }
            let once = |&row: &u32| seen.get_mut(row as usize).is_some_and(|seen| !std::mem::replace(seen, true));
            if lists.is_empty() || !rest.is_empty() || !rows.iter().all(once) || !lists.iter().all(|l| l.is_sorted()) {
                return Err(wrong("rows"));
            }
            state.heads.push(HeadLists { centroids, lists });
        }
        index.state = Followed::new(store, state);
        Ok(index)
    }
}

impl Index for InvertedLists {
    fn store(&self) -> &Arc<KvStore> {
        self.state.store()
    }

    fn kind(&self) -> &'static str {
        "inverted_lists"
    }

    fn estimates(&self) -> bool {
        false
    }

    fn len(&self) -> usize {
        self.state.look().listed
    }

    fn nbytes(&self) -> usize {
        let state = self.state.look();
        let lists = |head: &HeadLists| head.lists.iter().map(|list| 4 * list.len()).sum::<usize>();
        state.heads.iter().map(|head| 4 * head.centroids.len() + lists(head)).sum()
    }

    fn pending_operations(&self) -> f64 {
        let (state, store) = (self.state.look(), self.store());
        let (rows, heads, dim) = (store.len(), store.kv_heads(), store.head_dim());
        if !state.wants_lists(rows) {
            return (rows.saturating_sub(state.checked) * heads * dim) as f64;
        }
        let fits = state.fitted == 0 || rows >= REFIT_GROWTH * state.fitted;
        let fitted = if fits { rows } else { state.fitted };
        let lists = self.options.lists.unwrap_or((fitted / ROWS_PER_LIST).clamp(1, MAX_LISTS));
        let new = if fits { rows + ITERATIONS * rows.min(SAMPLE * lists) } else { rows - state.listed.min(rows) };
        (new * heads * lists * dim) as f64
    }

    fn read<'a>(&'a self, reader: &'a Reader<'a>, execution: &Execution) -> Result<Box<dyn View + 'a>> {
        let follow = |state: &mut State, reader: &Reader, execution: &Execution| self.follow(state, reader, execution);
        Ok(Box::new(ListView { probe: self.options.probe, state: self.state.read(reader, execution, follow)? }))
    }

    fn fork(&self, store: Arc<KvStore>) -> Result<Arc<dyn Index>> {
        Ok(Arc::new(Self { options: self.options, state: self.state.fork(store)? }))
    }

    fn parameters(&self) -> Parameters {
        let mut parameters = Parameters::new();
        if let Some(lists) = self.options.lists {
            parameters.insert("lists".into(), lists.into());
        }
        match self.options.probe {
            Probe::Lists(n) => parameters.insert("nprobe".into(), n.into()),
            Probe::Rows(n) => parameters.insert("probe_rows".into(), n.into()),
        };
        parameters.insert("seed".into(), self.options.seed.into());
        parameters
    }

    fn save(&self) -> Saved {
        self.saved()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Lists at one moment.
struct ListView<'a> {
    probe: Probe,
    state: Grown<'a, State>,
}

impl View for ListView<'_> {
    fn covered(&self) -> usize {
        self.state.checked
    }

    fn pick(&self, ask: &Ask) -> Pick {
        let Range { start, end } = ask.candidates;
        let Select::TopK(k) = ask.select else { unreachable!("refused: lists do not know the mass of rows") };
        if k >= end - start {
            return Pick { rows: (start as u32..end as u32).collect(), ..Pick::default() };
        }
        let listed = self.state.listed.clamp(start, end);
        let listed = if listed - start < FIRST_FIT / 2 { start } else { listed };
        let mut rows = Vec::new();
        let mut centroids = 0;
        if listed > start {
            let head = &self.state.heads[ask.head];
            centroids = head.lists.len();
            for (probed, list) in (1..).zip(best_lists(head, ask)) {
                let list = &head.lists[list];
                let place = |row: usize| list.partition_point(|&x| (x as usize) < row);
                rows.extend_from_slice(&list[place(start)..place(listed)]);
                let enough = match self.probe {
                    Probe::Lists(n) => probed >= n,
                    Probe::Rows(n) => rows.len() >= n,
                };
                if enough && rows.len() >= k {
                    break;
                }
            }
            rows.sort_unstable();
        }
        let of_lists = rows.len();
        rows.extend(listed as u32..end as u32);
        let mut pick = pick_among(ask, &rows);
        pick.scored += centroids;
        pick.bytes += centroids * 4 * ask.keys.shape()[3] + 4 * of_lists;
        pick
    }
}

/// Lists in the order in which the group should look into them: by the mean over its queries of the share that their centroid would have
/// among all centroids.
fn best_lists(head: &HeadLists, ask: &Ask) -> Vec<usize> {
    let n = head.lists.len();
    let scores = products(ask, &head.centroids);
    // Shares, and the largest logarithm of one, which orders those that are too small for a number.
    let mut ranks = vec![(0f64, f64::NEG_INFINITY); n];
    for scores in scores.chunks_exact(n) {
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let total: f64 = scores.iter().map(|s| f64::from(s - max).exp()).sum();
        for ((share, log), s) in ranks.iter_mut().zip(scores) {
            *share += f64::from(s - max).exp() / total;
            *log = log.max(f64::from(s - max) - total.ln());
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| {
        let (x, y) = (ranks[a], ranks[b]);
        y.0.total_cmp(&x.0).then(y.1.total_cmp(&x.1)).then(a.cmp(&b))
    });
    order
}
