//! How an index keeps in step with its store.

use crate::kv::{KvStore, Reader};
use crate::parallel::Execution;
use crate::tensor::{Error, Result};
use std::ops::Deref;
use std::sync::{Arc, RwLock, RwLockReadGuard};

/// What an index holds of its store's rows.
pub(crate) trait Grow: Clone + Send + Sync {
    /// Whether a store of `len` rows has some that should be indexed now.
    fn wants(&self, len: usize) -> bool;

    /// Forgets rows from `len` on, or more; nothing where it has no such rows.
    fn cut(&mut self, len: usize);
}

struct State<G> {
    /// The store's epoch that the content belongs to.
    epoch: u64,
    content: G,
}

/// The content of an index, which follows a store.
pub(crate) struct Followed<G> {
    store: Arc<KvStore>,
    state: RwLock<State<G>>,
}

/// A content that does not change while this lives.
pub(crate) struct Grown<'a, G>(RwLockReadGuard<'a, State<G>>);

impl<G> Deref for Grown<'_, G> {
    type Target = G;
    fn deref(&self) -> &G {
        &self.0.content
    }
}

impl<G: Grow> Followed<G> {
    /// `content` belongs to the store as it is now.
    pub(crate) fn new(store: Arc<KvStore>, content: G) -> Self {
        let state = RwLock::new(State { epoch: store.epoch(), content });
        Self { store, state }
    }

    pub(crate) fn store(&self) -> &Arc<KvStore> {
        &self.store
    }

    /// The content as it is, up to date or not.
    pub(crate) fn look(&self) -> Grown<'_, G> {
        Grown(self.state.read().unwrap_or_else(|e| e.into_inner()))
    }

    /// The content of the rows that `reader` sees. `extend` indexes what is lacking; on an error it leaves the content as it was, or
    /// shorter.
    pub(crate) fn read(
        &self,
        reader: &Reader,
        execution: &Execution,
        extend: impl Fn(&mut G, &Reader, &Execution) -> Result<()>,
    ) -> Result<Grown<'_, G>> {
        loop {
            let grown = self.look();
            if grown.0.epoch == reader.epoch() && !grown.wants(reader.len()) {
                return Ok(grown);
            }
            drop(grown);
            let mut state = self.state.write().unwrap_or_else(|e| e.into_inner());
            let State { epoch, content } = &mut *state;
            if let Some(low) = self.store.low_water(*epoch) {
                content.cut(low);
            }
            *epoch = reader.epoch();
            if content.wants(reader.len()) {
                extend(content, reader, execution)?;
            }
        }
    }

    /// A copy for a fork of the store, as far as its rows are those that were indexed here.
    pub(crate) fn fork(&self, store: Arc<KvStore>) -> Result<Self> {
        let Some(origin) = store.origin().filter(|origin| origin.id == self.store.id()) else {
            return Err(Error::value("store", "a store of its own", "a fork of the indexed store"));
        };
        let epoch = store.epoch();
        let grown = self.look();
        let changed = [self.store.low_water(grown.0.epoch.min(origin.epoch)), store.low_water(0), Some(origin.len)];
        let limit = changed.into_iter().flatten().min().unwrap_or(0);
        let mut content = grown.clone();
        drop(grown);
        content.cut(limit);
        Ok(Self { store, state: RwLock::new(State { epoch, content }) })
    }
}
