//! The keys and values of one sequence.

use super::rows::{RowFormat, Rows, check_pair};
use crate::tensor::{CodeFormat, DType, Error, KvView, Result, Storage, TensorView, with_element};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

/// In what form a store keeps its rows.
#[derive(Clone, Debug, PartialEq)]
pub enum Format {
    /// As numbers of a dtype.
    Numbers(DType),
    /// As codes of 4 or 8 bits, with a scale and an offset for each group of channels of each row.
    Codes {
        /// Bits of a code, 4 or 8.
        bits: usize,
        /// Channels that share a scale: a power of two of at least 32, or all of a row.
        group_size: Option<usize>,
        /// Whether the channels of keys are brought to one size first.
        channel_scales: ChannelScales,
    },
}

/// Factors that the channels of keys are divided by before they are coded, so that a few large channels do not cost the others their
/// precision.
#[derive(Clone, Debug, PartialEq)]
pub enum ChannelScales {
    /// None.
    Off,
    /// The largest magnitude of each channel among the rows of the first append, kept from then on.
    FirstRows,
    /// These, `[kv_heads, head_dim]`, positive.
    Given(Vec<f32>),
}

impl From<DType> for Format {
    fn from(dtype: DType) -> Self {
        Self::Numbers(dtype)
    }
}

impl Format {
    /// In what form rows are stored, without the details.
    pub fn storage(&self) -> Storage {
        match self {
            Self::Numbers(dtype) => Storage::Numbers(*dtype),
            Self::Codes { bits, .. } => Storage::Codes(*bits),
        }
    }

    fn rows(&self, dim: usize) -> Result<RowFormat> {
        Ok(match self {
            Self::Numbers(dtype) => RowFormat::Numbers { dtype: *dtype, dim },
            Self::Codes { bits, group_size, .. } => RowFormat::Codes(CodeFormat::new(*bits, dim, *group_size)?),
        })
    }

    fn channel_scales(&self) -> &ChannelScales {
        match self {
            Self::Numbers(_) => &ChannelScales::Off,
            Self::Codes { channel_scales, .. } => channel_scales,
        }
    }
}

/// Keys and values of one sequence, `[kv_heads, len, dim]` each, in host memory.
///
/// Every method takes `&self`, so that a store can be shared between threads in an `Arc`. Writers take turns. Appended rows are
/// written beyond the length and then published, so readers never wait for an append nor see half of one; only
/// [`truncate`](Self::truncate) waits until no [`Reader`] is alive.
pub struct KvStore {
    id: u64,
    kv_heads: usize,
    capacity: usize,
    format: Format,
    /// Factors of the channels of keys, `[kv_heads, head_dim]`, where keys are coded with them: set by the first rows at the latest.
    channels: OnceLock<Vec<f32>>,
    keys: Rows,
    values: Rows,
    len: AtomicUsize,
    /// Held by whoever appends or truncates. Taken after `gate` where both are.
    writer: Mutex<()>,
    gate: Mutex<Gate>,
    gate_changed: Condvar,
    origin: Option<Origin>,
}

/// The store that a fork was copied from, and how that was at that moment.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// [`KvStore::id`].
    pub id: u64,
    /// Rows copied.
    pub len: usize,
    /// [`KvStore::epoch`].
    pub epoch: u64,
}

/// How long a new reader lets a waiting truncate go first.
const COURTESY: Duration = Duration::from_millis(20);

/// What readers and truncates agree on. Not a `RwLock`: there a second reader waits for a waiting writer, and a thread that already
/// holds a reader would wait for itself. Here it waits no longer than [`COURTESY`], which keeps truncates from starving.
#[derive(Default)]
struct Gate {
    readers: usize,
    waiting_truncates: usize,
    truncates: TruncateLog,
}

/// How far the store was ever cut back, as far as an index that lags behind needs to know.
#[derive(Default)]
struct TruncateLog {
    epoch: u64,
    /// `(epoch, length)` of truncates to a length that no later truncate undercut; both increase.
    lows: Vec<(u64, usize)>,
}

impl TruncateLog {
    /// Above this the two oldest entries become one, which may make [`TruncateLog::low_water`] lower than need be, never higher.
    const MAX: usize = 64;

    fn push(&mut self, len: usize) {
        self.epoch += 1;
        while self.lows.pop_if(|(_, low)| *low >= len).is_some() {}
        self.lows.push((self.epoch, len));
        if self.lows.len() > Self::MAX {
            self.lows[1].1 = self.lows[0].1;
            self.lows.remove(0);
        }
    }

    fn low_water(&self, since: u64) -> Option<usize> {
        self.lows.iter().find(|(epoch, _)| *epoch > since).map(|(_, low)| *low)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing under these locks is left half done by a panic: lengths are published last.
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl KvStore {
    /// An empty store for up to `capacity` rows. Reserves address space, commits no memory.
    pub fn new(
        kv_heads: usize,
        head_dim: usize,
        value_dim: usize,
        format: impl Into<Format>,
        capacity: usize,
    ) -> Result<Self> {
        let format = format.into();
        static NEXT: AtomicU64 = AtomicU64::new(1);
        for (argument, n) in
            [("kv_heads", kv_heads), ("head_dim", head_dim), ("value_dim", value_dim), ("capacity", capacity)]
        {
            if n == 0 {
                return Err(Error::value(argument, n, "at least 1"));
            }
        }
        let channels = OnceLock::new();
        if let ChannelScales::Given(scales) = format.channel_scales() {
            let fine = scales.len() == kv_heads.saturating_mul(head_dim)
                && scales.iter().all(|c| c.is_normal() && *c > 0.0 && (1.0 / c).is_normal());
            if !fine {
                let got = format!("{} numbers", scales.len());
                return Err(Error::value("channel_scales", got, format!("{kv_heads} x {head_dim} positive numbers")));
            }
            channels.get_or_init(|| scales.clone());
        }
        Ok(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            kv_heads,
            capacity,
            channels,
            keys: Rows::new(kv_heads, capacity, format.rows(head_dim)?, "the keys of a store")?,
            values: Rows::new(kv_heads, capacity, format.rows(value_dim)?, "the values of a store")?,
            format,
            len: AtomicUsize::new(0),
            writer: Mutex::new(()),
            gate: Mutex::default(),
            gate_changed: Condvar::new(),
            origin: None,
        })
    }

    /// A number that no other store of this process has.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Heads of keys and values.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Width of a key.
    pub fn head_dim(&self) -> usize {
        self.keys.format().dim()
    }

    /// Width of a value.
    pub fn value_dim(&self) -> usize {
        self.values.format().dim()
    }

    /// In what form the rows are kept.
    pub fn format(&self) -> &Format {
        &self.format
    }

    /// In what form the rows are kept, without the details.
    pub fn storage(&self) -> Storage {
        self.format.storage()
    }

    /// Factors of the channels of keys, `[kv_heads, head_dim]`, where keys are coded with them and the first rows were seen.
    pub fn channel_scales(&self) -> Option<&[f32]> {
        self.channels.get().map(Vec::as_slice)
    }

    pub(super) fn set_channel_scales(&self, scales: Vec<f32>) {
        self.channels.get_or_init(|| scales);
    }

    /// Bytes of a row of keys and of one of values, per head.
    pub fn row_bytes(&self) -> (usize, usize) {
        let bytes = |rows: &Rows| rows.format().row_bytes().expect("checked when the store was made");
        (bytes(&self.keys), bytes(&self.values))
    }

    /// Most rows the store can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Rows stored now. With other writers about, take a [`Reader`] instead.
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    /// Whether no row is stored.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Committed bytes: per head, keys and values each in steps of 2 MiB (of the head's whole lane if that is smaller).
    pub fn nbytes(&self) -> usize {
        self.keys.nbytes() + self.values.nbytes()
    }

    /// Appends rows `k`, `[1, kv_heads, T, head_dim]`, and `v`, `[1, kv_heads, T, value_dim]`, converted to the store's dtype, and
    /// returns the new length. On an error nothing changes.
    pub fn append(&self, k: &TensorView, v: &TensorView) -> Result<usize> {
        let count = check_pair(k, v, self.kv_heads, [self.head_dim(), self.value_dim()])?;
        let _writer = lock(&self.writer);
        let len = self.len();
        let Some(new_len) = len.checked_add(count).filter(|&n| n <= self.capacity) else {
            let got = format!("{count} rows on top of {len}");
            return Err(Error::value("k", got, format!("no more than the capacity of {} rows", self.capacity)));
        };
        if count == 0 {
            return Ok(len);
        }
        for (argument, source) in [("k", k), ("v", v)] {
            if self.keys.free_rows_overlap(source, len) || self.values.free_rows_overlap(source, len) {
                let got = "a view of this store's own rows taken before they were truncated";
                return Err(Error::value(argument, got, "rows that the append does not overwrite"));
            }
        }
        self.keys.commit(new_len)?;
        self.values.commit(new_len)?;
        if *self.format.channel_scales() == ChannelScales::FirstRows {
            self.channels.get_or_init(|| largest_of_channels(k));
        }
        // SAFETY: the rows are committed; rows from `len` on are the writer's alone, and that is this thread; the sources were
        // found to be elsewhere.
        unsafe {
            self.keys.write(len, k, self.channel_scales())?;
            self.values.write(len, v, None)?;
        }
        self.len.store(new_len, Ordering::Release);
        Ok(new_len)
    }

    /// The rows stored now, frozen: appends go on beyond them, truncates wait until the reader is dropped. A thread that holds a
    /// reader must not truncate the same store, as it would wait for itself.
    pub fn read(&self) -> Reader<'_> {
        let gate = lock(&self.gate);
        let polite = self.gate_changed.wait_timeout_while(gate, COURTESY, |gate| gate.waiting_truncates > 0);
        let (mut gate, _) = polite.unwrap_or_else(|e| e.into_inner());
        gate.readers += 1;
        Reader { store: self, len: self.len(), epoch: gate.truncates.epoch }
    }

    /// Drops all rows from row `len` on; nothing if there are none. Memory well above the new length goes back to the system.
    ///
    /// Views taken through a raw pointer (not a [`Reader`]) stay readable, but the dropped rows in them are no longer defined.
    pub fn truncate(&self, len: usize) {
        if len >= self.len() {
            return;
        }
        let mut gate = lock(&self.gate);
        gate.waiting_truncates += 1;
        let mut gate = self.gate_changed.wait_while(gate, |gate| gate.readers > 0).unwrap_or_else(|e| e.into_inner());
        gate.waiting_truncates -= 1;
        // Only now, so that a thread that holds a reader can append while a truncate waits for it.
        let writer = lock(&self.writer);
        if len < self.len() {
            self.len.store(len, Ordering::Release);
            gate.truncates.push(len);
            self.keys.decommit(len);
            self.values.decommit(len);
        }
        drop((writer, gate));
        self.gate_changed.notify_all();
    }

    /// Drops all rows.
    pub fn clear(&self) {
        self.truncate(0);
    }

    /// A copy of the store with the same rows and capacity. The rows are copied, so the two share nothing.
    pub fn fork(&self) -> Result<Self> {
        let format = self.format.clone();
        let mut copy = Self::new(self.kv_heads, self.head_dim(), self.value_dim(), format, self.capacity)?;
        let reader = self.read();
        let (len, heads) = (reader.len(), self.kv_heads);
        let mut sources = reader.heads();
        for rows in copy.rows_mut(len)? {
            for head in 0..heads {
                let source = sources.next().expect("keys and values have as many heads");
                rows.head_bytes_mut(head, len).copy_from_slice(source);
            }
        }
        drop(sources);
        if let Some(scales) = self.channel_scales() {
            copy.set_channel_scales(scales.to_vec());
        }
        copy.publish(len);
        copy.origin = Some(Origin { id: self.id, len, epoch: reader.epoch() });
        Ok(copy)
    }

    /// Of a fork: the store it was copied from, as that was then.
    pub fn origin(&self) -> Option<Origin> {
        self.origin
    }

    /// Counts the truncates that dropped rows. An index built at some length is valid as long as the epoch is the same.
    pub fn epoch(&self) -> u64 {
        lock(&self.gate).truncates.epoch
    }

    /// The smallest length that truncates after epoch `since` left (a lower bound of it, if very many came since); `None` if none
    /// came. Rows below it are still the ones that were there.
    pub fn low_water(&self, since: u64) -> Option<usize> {
        lock(&self.gate).truncates.low_water(since)
    }

    /// Commits and hands out the first `len` rows for writing, then to be published by [`Self::publish`].
    pub(super) fn rows_mut(&mut self, len: usize) -> Result<[&mut Rows; 2]> {
        self.keys.commit(len)?;
        self.values.commit(len)?;
        Ok([&mut self.keys, &mut self.values])
    }

    pub(super) fn publish(&mut self, len: usize) {
        assert!(len <= self.capacity);
        *self.len.get_mut() = len;
    }
}

impl std::fmt::Debug for KvStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvStore")
            .field("id", &self.id)
            .field("kv_heads", &self.kv_heads)
            .field("head_dim", &self.head_dim())
            .field("value_dim", &self.value_dim())
            .field("format", &self.format)
            .field("capacity", &self.capacity)
            .field("len", &self.len())
            .finish()
    }
}

/// The rows of a [`KvStore`] at one moment; see [`KvStore::read`].
pub struct Reader<'a> {
    store: &'a KvStore,
    len: usize,
    epoch: u64,
}

impl Reader<'_> {
    /// The store it reads.
    pub fn store(&self) -> &KvStore {
        self.store
    }

    /// Rows stored when the reader was taken.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there were none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// [`KvStore::epoch`], which stays the same while the reader lives.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The keys, `[1, kv_heads, len, head_dim]`.
    pub fn keys(&self) -> KvView<'_> {
        // SAFETY: rows below the length are published, and only a truncate, which waits for this reader, lets them be rewritten.
        unsafe { self.store.keys.view(self.len, self.store.channel_scales()) }
    }

    /// The values, `[1, kv_heads, len, value_dim]`.
    pub fn values(&self) -> KvView<'_> {
        // SAFETY: as in `keys`.
        unsafe { self.store.values.view(self.len, None) }
    }

    /// Keys, then values, head by head, as bytes.
    pub(crate) fn heads(&self) -> impl Iterator<Item = &[u8]> {
        let rows = [&self.store.keys, &self.store.values];
        // SAFETY: as in `keys`.
        rows.into_iter()
            .flat_map(move |rows| (0..self.store.kv_heads).map(move |head| unsafe { rows.head_bytes(head, self.len) }))
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        let mut gate = lock(&self.store.gate);
        gate.readers -= 1;
        if gate.readers == 0 {
            self.store.gate_changed.notify_all();
        }
    }
}

/// The largest magnitude of each channel, `[heads, dim]`; 1 for a channel of zeros, or one that is not finite.
fn largest_of_channels(rows: &TensorView) -> Vec<f32> {
    let [_, heads, count, dim] = rows.shape();
    let mut largest = vec![0f32; heads * dim];
    with_element!(rows.dtype(), T => {
        for (head, largest) in largest.chunks_exact_mut(dim.max(1)).enumerate() {
            for row in 0..count {
                for (largest, x) in largest.iter_mut().zip(rows.row::<T>(0, head, row)) {
                    *largest = largest.max(crate::tensor::Element::to_f32(*x).abs());
                }
            }
        }
    });
    // Within what has a finite inverse.
    largest.iter_mut().for_each(|c| *c = if *c > 0.0 && c.is_finite() { c.clamp(1e-30, 1e30) } else { 1.0 });
    largest
}
