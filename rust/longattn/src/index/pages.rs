//! Pages: runs of neighbouring rows, scored by their mean key, by the range of their keys, or by one of them (Quest and its kin).

use super::head_rows::HeadRows;
use super::snapshot::{Parameters, Saved};
use super::units::{HeadUnits, Members, UnitScore, table_storage};
use super::{Ask, Followed, Grow, Grown, Index, Pick, View};
use crate::kv::{KvStore, Reader};
use crate::parallel::{Execution, map};
use crate::retrieval::units::{Units, pick};
use crate::simd;
use crate::tensor::{Error, Result};
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

/// Pages that one item summarises.
const ITEM: usize = 256;

/// What pages are and how they are scored.
#[derive(Clone, Copy, Debug)]
pub struct PageOptions {
    /// Rows of a page.
    pub page_size: usize,
    /// How a page is scored.
    pub score: UnitScore,
}

#[derive(Clone)]
struct State {
    options: PageOptions,
    /// Of each KV head.
    heads: Vec<HeadUnits>,
}

impl State {
    fn covered(&self) -> usize {
        self.pages() * self.options.page_size
    }

    fn pages(&self) -> usize {
        self.heads[0].vectors.len()
    }
}

impl Grow for State {
    fn wants(&self, len: usize) -> bool {
        len / self.options.page_size > self.pages()
    }

    fn cut(&mut self, len: usize) {
        let keep = (len / self.options.page_size).min(self.pages());
        self.heads.iter_mut().for_each(|head| head.truncate(keep));
    }
}

/// An index of pages. Rows of an unfinished page are read exactly.
///
/// Memory per page and KV head: one or two rows of keys, and a row of values where unread pages are weighed.
pub struct Pages {
    options: PageOptions,
    state: Followed<State>,
}

impl Pages {
    /// An index over a store, empty until it is first read.
    pub fn new(store: Arc<KvStore>, options: PageOptions) -> Result<Self> {
        let empty = Self::empty(&store, options)?;
        Ok(Self { options, state: Followed::new(store, empty) })
    }

    fn empty(store: &KvStore, options: PageOptions) -> Result<State> {
        if options.page_size == 0 || options.page_size > u32::MAX as usize {
            return Err(Error::value("page_size", options.page_size, "1 to 2^32 - 1"));
        }
        if let UnitScore::Landmark(place) = options.score
            && place >= options.page_size
        {
            return Err(Error::value("landmark", place, format!("a place in a page of {} rows", options.page_size)));
        }
        let head = HeadUnits::new(options.score, table_storage(store.storage()), store.head_dim(), store.value_dim());
        Ok(State { options, heads: vec![head; store.kv_heads()] })
    }

    /// What the pages are.
    pub fn options(&self) -> &PageOptions {
        &self.options
    }

    /// The index that was saved, over a store that has its rows.
    pub(crate) fn load(store: Arc<KvStore>, mut saved: Saved) -> Result<Self> {
        let place = saved.integer("landmark").unwrap_or(0) as usize;
        let score = UnitScore::from_parts(saved.text("score")?, place)?;
        let options = PageOptions { page_size: saved.integer("page_size")? as usize, score };
        let mut state = Self::empty(&store, options)?;
        if !saved.rows.is_multiple_of(options.page_size) {
            let expected = format!("whole pages of {} rows", options.page_size);
            return Err(Error::value("path", format!("{} rows", saved.rows), expected));
        }
        let pages = saved.rows / options.page_size;
        for (h, head) in state.heads.iter_mut().enumerate() {
            *head = head.load(&mut saved, h, pages)?;
        }
        Ok(Self { options, state: Followed::new(store, state) })
    }

    fn extend(&self, state: &mut State, reader: &Reader, execution: &Execution) -> Result<()> {
        let (keys, values) = (reader.keys(), reader.values());
        let size = self.options.page_size;
        let (first, pages) = (state.pages(), reader.len() / size);
        let items = (pages - first).div_ceil(ITEM);
        let isa = simd::current();
        let made = map(execution, items * state.heads.len(), |i| {
            let start = first + i % items * ITEM;
            let end = (start + ITEM).min(pages);
            let units: Vec<Members> = (start..end).map(|p| Members::Range(p * size..(p + 1) * size)).collect();
            let (mut of_keys, mut of_values, rows) = (Vec::new(), Vec::new(), start * size..end * size);
            let keys = HeadRows::of(&keys, i / items, rows.clone(), &mut of_keys);
            let values = HeadRows::of(&values, i / items, rows, &mut of_values);
            HeadUnits::build(isa, self.options.score, &keys, &values, &units)
        })?;
        let made = made.into_iter().collect::<Result<Vec<_>>>()?;
        for (i, made) in made.iter().enumerate() {
            state.heads[i / items].append(made);
        }
        Ok(())
    }
}

impl Index for Pages {
    fn store(&self) -> &Arc<KvStore> {
        self.state.store()
    }

    fn kind(&self) -> &'static str {
        "pages"
    }

    fn estimates(&self) -> bool {
        self.options.score.estimates()
    }

    fn len(&self) -> usize {
        self.state.look().covered()
    }

    fn nbytes(&self) -> usize {
        self.state.look().heads.iter().map(HeadUnits::nbytes).sum()
    }

    fn pending_operations(&self) -> f64 {
        let store = self.store();
        let rows = store.len().saturating_sub(self.len()) * store.kv_heads();
        (rows * 4 * (store.head_dim() + store.value_dim())) as f64
    }

    fn read<'a>(&'a self, reader: &'a Reader<'a>, execution: &Execution) -> Result<Box<dyn View + 'a>> {
        let state =
            self.state.read(reader, execution, |state, reader, execution| self.extend(state, reader, execution))?;
        Ok(Box::new(Snapshot(state)))
    }

    fn fork(&self, store: Arc<KvStore>) -> Result<Arc<dyn Index>> {
        Ok(Arc::new(Self { options: self.options, state: self.state.fork(store)? }))
    }

    fn parameters(&self) -> Parameters {
        let (score, landmark) = self.options.score.to_parts();
        let mut made = Parameters::new();
        made.insert("page_size".into(), self.options.page_size.into());
        made.insert("score".into(), score.into());
        if let UnitScore::Landmark(_) = self.options.score {
            made.insert("landmark".into(), landmark.into());
        }
        made
    }

    fn save(&self) -> Saved {
        let state = self.state.look();
        let saved = Saved::new(state.covered(), self.parameters());
        state.heads.iter().enumerate().fold(saved, |saved, (h, head)| head.save(saved, h))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

struct Snapshot<'a>(Grown<'a, State>);

impl View for Snapshot<'_> {
    fn covered(&self) -> usize {
        self.0.covered()
    }

    fn pick(&self, ask: &Ask) -> Pick {
        let PageOptions { page_size, score } = self.0.options;
        pick(&Runs(page_size), &self.0.heads[ask.head], score, ask)
    }
}

/// Units that are runs of this many rows.
struct Runs(usize);

impl Units for Runs {
    fn within(&self, candidates: &Range<usize>) -> Range<usize> {
        candidates.start / self.0..candidates.end.div_ceil(self.0)
    }

    fn whole(&self, candidates: &Range<usize>) -> Range<usize> {
        candidates.start.div_ceil(self.0)..candidates.end / self.0
    }

    fn members(&self, page: usize) -> Members<'_> {
        Members::Range(page * self.0..(page + 1) * self.0)
    }
}
