//! No index: every candidate is scored exactly, over the store's own rows.

use super::{Followed, Grow, Grown, Index, Parameters, Saved, View, check_numbers, not_finite, numbers};
use crate::index::{Ask, Pick};
use crate::kv::{KvStore, Reader};
use crate::parallel::{Execution, map};
use crate::retrieval::exact::pick_all;
use crate::tensor::{Element, Result, TensorView, with_element};
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

/// Rows that one item looks through.
const CHUNK: usize = 4096;

/// Refuses keys that are not finite among some rows of every head.
pub(super) fn check_keys(keys: &TensorView, rows: Range<usize>, execution: &Execution) -> Result<()> {
    let chunks = rows.len().div_ceil(CHUNK);
    let found = map(execution, keys.shape()[1] * chunks, |i| {
        let (head, start) = (i / chunks, rows.start + i % chunks * CHUNK);
        with_element!(keys.dtype(), T => {
            // A sum is finite only where all its terms are.
            let finite = |j: &usize| keys.row::<T>(0, head, *j).iter().all(|x| x.to_f32().is_finite());
            (start..(start + CHUNK).min(rows.end)).find(|j| !finite(j)).map(|j| not_finite(j, head))
        })
    })?;
    found.into_iter().flatten().next().map_or(Ok(()), Err)
}

/// Rows known to be finite.
#[derive(Clone, Debug, Default)]
struct Checked(usize);

impl Grow for Checked {
    fn wants(&self, len: usize) -> bool {
        len > self.0
    }

    fn cut(&mut self, len: usize) {
        self.0 = self.0.min(len);
    }
}

/// The exact scan: what other indexes are measured by. It needs no memory and no build, and reads all keys at each step.
pub struct Flat {
    rows: Followed<Checked>,
}

impl Flat {
    /// A scan over a store of numbers.
    pub fn new(store: Arc<KvStore>) -> Result<Self> {
        check_numbers(&store)?;
        Ok(Self { rows: Followed::new(store, Checked::default()) })
    }

    pub(crate) fn load(store: Arc<KvStore>, saved: Saved) -> Result<Self> {
        check_numbers(&store)?;
        Ok(Self { rows: Followed::new(store, Checked(saved.rows)) })
    }
}

impl Index for Flat {
    fn store(&self) -> &Arc<KvStore> {
        self.rows.store()
    }

    fn kind(&self) -> &'static str {
        "flat"
    }

    fn estimates(&self) -> bool {
        // The mass of unread rows is known, their values are not.
        false
    }

    fn knows_mass(&self) -> bool {
        true
    }

    fn len(&self) -> usize {
        self.rows.look().0
    }

    fn nbytes(&self) -> usize {
        0
    }

    fn pending_operations(&self) -> f64 {
        let store = self.store();
        (store.len().saturating_sub(self.len()) * store.kv_heads() * store.head_dim()) as f64
    }

    fn read<'a>(&'a self, reader: &'a Reader<'a>, execution: &Execution) -> Result<Box<dyn View + 'a>> {
        let checked = self.rows.read(reader, execution, |checked, reader, execution| {
            check_keys(&numbers(reader.keys()), checked.0..reader.len(), execution)?;
            checked.0 = reader.len();
            Ok(())
        })?;
        Ok(Box::new(FlatView(checked)))
    }

    fn fork(&self, store: Arc<KvStore>) -> Result<Arc<dyn Index>> {
        Ok(Arc::new(Self { rows: self.rows.fork(store)? }))
    }

    fn parameters(&self) -> Parameters {
        Parameters::new()
    }

    fn save(&self) -> Saved {
        Saved::new(self.len(), self.parameters())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

struct FlatView<'a>(Grown<'a, Checked>);

impl View for FlatView<'_> {
    fn covered(&self) -> usize {
        self.0.0
    }

    fn pick(&self, ask: &Ask) -> Pick {
        pick_all(ask)
    }
}
