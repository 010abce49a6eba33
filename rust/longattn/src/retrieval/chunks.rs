//! Chunks of one row's candidates: who works on them shares a buffer and leaves a value each.

/// A buffer that several workers write disjoint parts of.
pub(super) struct Shared<'a> {
    ptr: *mut f32,
    len: usize,
    memory: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: parts are handed out by an unsafe method whose callers take disjoint ones.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(super) fn new(memory: &'a mut [f32]) -> Self {
        Self { ptr: memory.as_mut_ptr(), len: memory.len(), memory: std::marker::PhantomData }
    }

    /// # Safety
    /// No two parts alive at once overlap.
    #[allow(clippy::mut_from_ref, reason = "disjoint parts of one buffer, which is what this type is for")]
    pub(super) unsafe fn part(&self, start: usize, len: usize) -> &'a mut [f32] {
        assert!(start + len <= self.len);
        // SAFETY: inside the buffer, and disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(start), len) }
    }
}

/// One value per chunk, set by whoever ran it.
pub(super) struct Slots<T>(Vec<std::sync::Mutex<Option<T>>>);

impl<T> Slots<T> {
    pub(super) fn new(n: usize) -> Self {
        Self((0..n).map(|_| std::sync::Mutex::new(None)).collect())
    }

    pub(super) fn set(&self, i: usize, value: T) {
        *self.0[i].lock().unwrap_or_else(|e| e.into_inner()) = Some(value);
    }

    /// The values that were set, in order; a cancelled call has fewer.
    pub(super) fn into_values(self) -> impl Iterator<Item = T> {
        self.0.into_iter().filter_map(|slot| slot.into_inner().unwrap_or_else(|e| e.into_inner()))
    }
}
