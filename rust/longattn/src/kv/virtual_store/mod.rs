//! The keys and values of a batch of requests in all layers of a model, each contiguous at an address that never changes.
//!
//! Every layer has two *planes*, one of keys and one of values. A plane is reserved address space for `max_requests` slots of
//! `max_tokens` rows; a request owns the same slot of every plane, and memory is committed at its front in granules.

mod planes;
#[cfg(test)]
mod tests;

use super::convert::convert;
use super::region::{STEP, page_size};
use crate::tensor::{DType, Error, Result, TensorView};
pub use planes::Planes;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

/// Sizes and policies of a [`VirtualStore`].
#[derive(Clone, Copy, Debug)]
pub struct VirtualOptions {
    /// Layers of the model.
    pub layers: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Width of a key.
    pub head_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
    /// Element type of the stored rows.
    pub dtype: DType,
    /// Most requests at a time.
    pub max_requests: usize,
    /// Most tokens of a request.
    pub max_tokens: usize,
    /// Bytes of one commit: a power of two from a page to 2 MiB.
    pub granule: usize,
    /// Whether a slot keeps its memory when its request is freed, for the next request.
    pub deferred_reclaim: bool,
    /// Free slots that are kept with memory committed: a granule of each plane, or what deferred reclaim left there.
    pub eager: usize,
    /// Whether a thread commits one granule more than requests have asked for, ahead of time.
    pub background: bool,
}

/// Where the rows of a request lie in one layer, `[tokens, kv_heads, head_dim or value_dim]` without gaps.
#[derive(Clone)]
pub struct RequestRows {
    /// Keeps the memory mapped.
    pub memory: Arc<Planes>,
    /// Address of the first key.
    pub keys: *const u8,
    /// Address of the first value.
    pub values: *const u8,
    /// Rows that the request has asked for.
    pub tokens: usize,
}

struct Slot {
    live: bool,
    tokens: usize,
    /// Tells requests that had the same slot apart.
    generation: u64,
    /// Bytes committed at the front of the slot, by plane.
    committed: Vec<usize>,
}

/// Slots without a request.
struct Free {
    /// With memory; the back goes first.
    ready: VecDeque<usize>,
    /// Without; the back goes first.
    bare: Vec<usize>,
}

/// What the store and its background thread share.
struct Shared {
    options: VirtualOptions,
    memory: Arc<Planes>,
    /// A slot's lock is held for no longer than one commit by the background thread. Taken after `free` where both are.
    slots: Vec<Mutex<Slot>>,
    free: Mutex<Free>,
    committed: AtomicUsize,
    queue: Mutex<Queue>,
    queue_changed: Condvar,
}

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    busy: bool,
    closed: bool,
}

#[derive(Clone, Copy)]
enum Task {
    /// One granule more for a request.
    Grow { slot: usize, generation: u64 },
    /// Memory for free slots.
    Prepare,
}

/// Keys and values of many requests; see the module's description.
///
/// Every method takes `&self`. A method of one request waits for another of the same request.
pub struct VirtualStore {
    shared: Arc<Shared>,
    /// The background thread and the process that it runs in.
    helper: Option<(JoinHandle<()>, u32)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing under these locks is left half done by a panic: numbers change after what they stand for.
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Shared {
    /// Commits every plane of a slot up to `bytes(plane)`, at most the slot. On an error the slot is as before.
    fn commit(&self, index: usize, slot: &mut Slot, bytes: impl Fn(usize) -> usize) -> Result<()> {
        let before = slot.committed.clone();
        for plane in 0..before.len() {
            let want = bytes(plane).min(self.memory.planes[plane].slot);
            if want <= before[plane] {
                continue;
            }
            if let Err(error) = self.memory.commit(plane, index, before[plane]..want) {
                for (plane, &keep) in before.iter().enumerate() {
                    self.decommit(index, slot, plane, keep);
                }
                return Err(error);
            }
            slot.committed[plane] = want;
            self.committed.fetch_add(want - before[plane], Ordering::Relaxed);
        }
        Ok(())
    }

    fn decommit(&self, index: usize, slot: &mut Slot, plane: usize, keep: usize) {
        let have = slot.committed[plane];
        if keep < have && self.memory.decommit(plane, index, keep..have) {
            slot.committed[plane] = keep;
            self.committed.fetch_sub(have - keep, Ordering::Relaxed);
        }
    }

    /// Zeroes a slot's memory, and gives it back where the system does that.
    fn release(&self, index: usize, slot: &mut Slot) {
        for plane in 0..slot.committed.len() {
            self.decommit(index, slot, plane, 0);
        }
    }

    /// Gives free slots memory until `eager` of them have some. Others may take slots in between.
    fn prepare(&self) -> Result<()> {
        loop {
            let mut free = lock(&self.free);
            let Some(&index) = free.bare.last().filter(|_| free.ready.len() < self.options.eager) else {
                return Ok(());
            };
            self.commit(index, &mut lock(&self.slots[index]), |_| self.options.granule)?;
            free.bare.pop();
            free.ready.push_front(index);
        }
    }

    /// What the background thread aims at for a request.
    fn ahead(&self, plane: usize, tokens: usize) -> usize {
        (self.memory.needed(plane, tokens) + self.options.granule).min(self.memory.planes[plane].slot)
    }

    fn run(&self, task: Task) {
        match task {
            // Memory that the system refuses is refused again when it is needed, to somebody who can be told.
            Task::Prepare => drop(self.prepare()),
            Task::Grow { slot: index, generation } => {
                for plane in 0..self.memory.planes.len() {
                    let mut slot = lock(&self.slots[index]);
                    if !slot.live || slot.generation != generation {
                        return;
                    }
                    let (have, want) = (slot.committed[plane], self.ahead(plane, slot.tokens));
                    if have < want && self.memory.commit(plane, index, have..want).is_ok() {
                        slot.committed[plane] = want;
                        self.committed.fetch_add(want - have, Ordering::Relaxed);
                    }
                }
            }
        }
    }

    /// The background thread.
    fn serve(&self) {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(task) = queue.tasks.pop_front() {
                queue.busy = true;
                drop(queue);
                self.run(task);
                queue = lock(&self.queue);
                queue.busy = false;
                self.queue_changed.notify_all();
            } else if queue.closed {
                return;
            } else {
                queue = self.queue_changed.wait(queue).unwrap_or_else(|e| e.into_inner());
            }
        }
    }
}

impl VirtualStore {
    /// An empty store. Reserves address space, and commits memory for `eager` slots only.
    pub fn new(options: VirtualOptions) -> Result<Self> {
        let VirtualOptions { layers, kv_heads, head_dim, value_dim, max_requests, max_tokens, granule, .. } = options;
        let sizes = [("layers", layers), ("kv_heads", kv_heads), ("head_dim", head_dim), ("value_dim", value_dim)];
        for (argument, n) in sizes.into_iter().chain([("max_requests", max_requests), ("max_tokens", max_tokens)]) {
            if n == 0 {
                return Err(Error::value(argument, n, "at least 1"));
            }
        }
        if !granule.is_power_of_two() || granule < page_size() || granule > STEP {
            let expected = format!("a power of two from a page, {} bytes, to {STEP}", page_size());
            return Err(Error::value("granule", granule, expected));
        }
        let memory = Arc::new(Planes::reserve(&options)?);
        let slot = || Mutex::new(Slot { live: false, tokens: 0, generation: 0, committed: vec![0; 2 * layers] });
        let free = Free { ready: VecDeque::new(), bare: (0..max_requests).rev().collect() };
        let shared = Shared {
            options,
            memory,
            slots: (0..max_requests).map(|_| slot()).collect(),
            free: Mutex::new(free),
            committed: AtomicUsize::new(0),
            queue: Mutex::default(),
            queue_changed: Condvar::new(),
        };
        shared.prepare()?;
        let shared = Arc::new(shared);
        let helper = if options.background {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name("longattn-commit".into()).spawn(move || shared.serve());
            let refused = |_| Error::Memory { bytes: 0, what: "the background thread of a virtual store" };
            Some((thread.map_err(refused)?, std::process::id()))
        } else {
            None
        };
        Ok(Self { shared, helper })
    }

    /// Sizes and policies.
    pub fn options(&self) -> &VirtualOptions {
        &self.shared.options
    }

    /// Whether there is a background thread: a forked child has none.
    fn helped(&self) -> bool {
        self.helper.as_ref().is_some_and(|(_, process)| *process == std::process::id())
    }

    fn send(&self, task: Task) {
        lock(&self.shared.queue).tasks.push_back(task);
        self.shared.queue_changed.notify_all();
    }

    /// Waits until the background thread has nothing left to do.
    pub fn settle(&self) {
        if self.helped() {
            let queue = lock(&self.shared.queue);
            let idle = self.shared.queue_changed.wait_while(queue, |queue| queue.busy || !queue.tasks.is_empty());
            drop(idle.unwrap_or_else(|e| e.into_inner()));
        }
    }

    /// Gives a new request a slot, whose number it returns. One that has memory goes first, the latest freed before others.
    pub fn alloc(&self) -> Result<usize> {
        let mut free = lock(&self.shared.free);
        let Some(index) = free.ready.pop_back().or_else(|| free.bare.pop()) else {
            let expected = format!("no more than max_requests, {}, at a time", self.shared.slots.len());
            return Err(Error::value("alloc", "one more request", expected));
        };
        let mut slot = lock(&self.shared.slots[index]);
        slot.live = true;
        slot.tokens = 0;
        slot.generation += 1;
        drop(slot);
        self.refill(free);
        Ok(index)
    }

    /// Takes a request's slot back. Its rows are given up at once, or when the next request overwrites them.
    pub fn free(&self, request: usize) -> Result<()> {
        let mut free = lock(&self.shared.free);
        let mut slot = self.live(request)?;
        slot.live = false;
        slot.tokens = 0;
        if !self.shared.options.deferred_reclaim {
            self.shared.release(request, &mut slot);
        }
        if slot.committed.iter().any(|&bytes| bytes > 0) {
            free.ready.push_back(request);
        } else {
            free.bare.push(request);
        }
        drop(slot);
        self.refill(free);
        Ok(())
    }

    fn refill(&self, free: MutexGuard<Free>) {
        let enough = free.ready.len() >= self.shared.options.eager || free.bare.is_empty();
        drop(free);
        if enough {
            return;
        }
        if self.helped() {
            self.send(Task::Prepare);
        } else {
            // What is refused here is refused again, to somebody who needs it, when a request grows.
            let _ = self.shared.prepare();
        }
    }

    /// Gives the memory of slots without a request back.
    pub fn reclaim(&self) {
        let mut free = lock(&self.shared.free);
        for index in std::mem::take(&mut free.ready) {
            self.shared.release(index, &mut lock(&self.shared.slots[index]));
            free.bare.push(index);
        }
    }

    fn live(&self, request: usize) -> Result<MutexGuard<'_, Slot>> {
        let slot = self.shared.slots.get(request).map(lock).filter(|slot| slot.live);
        slot.ok_or_else(|| Error::value("r", request, "a request that alloc gave and free has not taken back"))
    }

    fn fits(&self, argument: &'static str, tokens: usize) -> Result<()> {
        let most = self.shared.options.max_tokens;
        if tokens <= most { Ok(()) } else { Err(Error::value(argument, tokens, format!("at most max_tokens, {most}"))) }
    }

    /// Makes room for `tokens` rows of a request in every layer; less than it has changes nothing. Rows that were never written
    /// are zero, or what an earlier request left where reclaim is deferred. On an error nothing changes.
    pub fn ensure(&self, request: usize, tokens: usize) -> Result<()> {
        self.fits("n_tokens", tokens)?;
        let mut slot = self.live(request)?;
        if tokens <= slot.tokens {
            return Ok(());
        }
        let shared = &self.shared;
        shared.commit(request, &mut slot, |plane| shared.memory.needed(plane, tokens))?;
        slot.tokens = tokens;
        let behind = (0..slot.committed.len()).any(|plane| slot.committed[plane] < shared.ahead(plane, tokens));
        let generation = slot.generation;
        drop(slot);
        if behind && self.helped() {
            self.send(Task::Grow { slot: request, generation });
        }
        Ok(())
    }

    /// Rows that a request has asked for.
    pub fn tokens(&self, request: usize) -> Result<usize> {
        Ok(self.live(request)?.tokens)
    }

    fn check_layer(&self, layer: usize) -> Result<()> {
        let layers = self.shared.options.layers;
        if layer < layers { Ok(()) } else { Err(Error::value("layer", layer, format!("less than layers, {layers}"))) }
    }

    /// Where the rows of a request lie. They stay readable after it is freed, but are then no longer defined.
    pub fn rows(&self, request: usize, layer: usize) -> Result<RequestRows> {
        self.check_layer(layer)?;
        let tokens = self.live(request)?.tokens;
        let memory = Arc::clone(&self.shared.memory);
        let (keys, values) = (memory.at(2 * layer, request), memory.at(2 * layer + 1, request));
        Ok(RequestRows { memory, keys, values, tokens })
    }

    /// Writes `k`, `[1, T, kv_heads, head_dim]`, and `v` likewise, converted to the store's dtype, over the rows from row `start` on
    /// in one layer. On an error nothing changes.
    pub fn write(&self, request: usize, layer: usize, start: usize, k: &TensorView, v: &TensorView) -> Result<()> {
        self.check_layer(layer)?;
        let VirtualOptions { kv_heads, head_dim, value_dim, dtype, .. } = self.shared.options;
        let count = k.shape()[1];
        for (argument, rows, dim) in [("k", k, head_dim), ("v", v, value_dim)] {
            let [batch, tokens, heads, width] = rows.shape();
            if (batch, tokens, heads, width) != (1, count, kv_heads, dim) {
                let expected = format!("[{count}, {kv_heads}, {dim}]");
                return Err(Error::value(argument, format!("shape [{tokens}, {heads}, {width}]"), expected));
            }
        }
        let slot = self.live(request)?;
        if start.checked_add(count).is_none_or(|end| end > slot.tokens) {
            let got = format!("{count} rows from row {start} on");
            return Err(Error::value("start", got, format!("rows within the {} ensured", slot.tokens)));
        }
        let memory = &self.shared.memory;
        let target = |plane: usize| memory.at(plane, request).wrapping_add(start * memory.planes[plane].row);
        for (argument, rows) in [("k", k), ("v", v)] {
            for plane in [2 * layer, 2 * layer + 1] {
                let (from, to) = (rows.addresses(), target(plane) as usize);
                if from.start < to + count * memory.planes[plane].row && to < from.end {
                    let got = "a view of the rows that are written";
                    return Err(Error::value(argument, got, "an array that does not overlap them"));
                }
            }
        }
        for (plane, rows, dim) in [(2 * layer, k, head_dim), (2 * layer + 1, v, value_dim)] {
            let [_, token_stride, head_stride, _] = rows.strides();
            let (from, to, row) = (rows.as_ptr(), target(plane), memory.planes[plane].row);
            let size = rows.dtype().size() as isize;
            // SAFETY: inside the shape of the source, and inside rows that are committed, since the slot's tokens are; the slot's
            // lock keeps other writers away, and the two were found not to overlap.
            unsafe {
                for token in 0..count {
                    let from = from.wrapping_offset(token as isize * token_stride * size);
                    let to = to.add(token * row);
                    if head_stride == dim as isize {
                        convert(from, rows.dtype(), to, dtype, kv_heads * dim);
                        continue;
                    }
                    for head in 0..kv_heads {
                        let from = from.wrapping_offset(head as isize * head_stride * size);
                        convert(from, rows.dtype(), to.add(head * dim * dtype.size()), dtype, dim);
                    }
                }
            }
        }
        Ok(())
    }

    /// Committed bytes of all requests and free slots.
    pub fn committed_bytes(&self) -> usize {
        self.shared.committed.load(Ordering::Relaxed)
    }

    /// Reserved bytes of address space.
    pub fn reserved_bytes(&self) -> usize {
        self.shared.memory.bytes()
    }

    /// Requests now, and slots without one.
    pub fn slots(&self) -> (usize, usize) {
        let free = lock(&self.shared.free);
        let n = free.ready.len() + free.bare.len();
        (self.shared.slots.len() - n, n)
    }
}

impl Drop for VirtualStore {
    fn drop(&mut self) {
        let helped = self.helped();
        let Some((thread, _)) = self.helper.take() else { return };
        if helped {
            let mut queue = lock(&self.shared.queue);
            queue.closed = true;
            queue.tasks.clear();
            drop(queue);
            self.shared.queue_changed.notify_all();
            // A panic there has nobody left to tell.
            let _ = thread.join();
        } else {
            // In a forked child the thread does not exist, and cannot be waited for.
            std::mem::forget(thread);
        }
    }
}

impl std::fmt::Debug for VirtualStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = f.debug_struct("VirtualStore");
        text.field("options", &self.shared.options).field("committed_bytes", &self.committed_bytes()).finish()
    }
}
