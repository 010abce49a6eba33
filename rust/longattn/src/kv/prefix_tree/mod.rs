//! Keys and values of many sequences, what they have in common at the front stored once.
//!
//! Tokens come in *chunks* of a fixed size. A full chunk is a node of a tree and belongs to every sequence that begins with the
//! tokens on the path to it; the last, unfinished chunk of a sequence, its *tail*, is its own. So the tree is what the sequences
//! say, however they came about: a tail that becomes full is given up for an equal node, if there is one.

mod reader;
mod state;
#[cfg(test)]
mod tests;

use super::rows::{RowFormat, Rows, check_pair};
use crate::tensor::{DType, Error, KvView, Result, TensorView};
pub(crate) use reader::Path;
pub use reader::TreeReader;
use state::{ROOT, Sequence, State};
use std::collections::{HashMap, HashSet};
use std::sync::{RwLock, RwLockWriteGuard};

/// Keys and values of many sequences of one layer of a model, in chunks that sequences with equal beginnings share.
///
/// Every method takes `&self`; readers do not wait for each other.
pub struct PrefixTree {
    kv_heads: usize,
    chunk_size: usize,
    /// In chunks.
    capacity: usize,
    dtype: DType,
    keys: Rows,
    values: Rows,
    state: RwLock<State>,
}

impl PrefixTree {
    /// An empty tree for up to `capacity` tokens (rounded up to chunks). Reserves address space, commits no memory.
    pub fn new(
        kv_heads: usize,
        head_dim: usize,
        value_dim: usize,
        dtype: DType,
        chunk_size: usize,
        capacity: usize,
    ) -> Result<Self> {
        let sizes = [("kv_heads", kv_heads), ("head_dim", head_dim), ("value_dim", value_dim)];
        for (argument, n) in sizes.into_iter().chain([("chunk_size", chunk_size), ("capacity", capacity)]) {
            if n == 0 {
                return Err(Error::value(argument, n, "at least 1"));
            }
        }
        let rows = capacity.checked_next_multiple_of(chunk_size).filter(|&n| n <= u32::MAX as usize);
        let Some(rows) = rows else {
            let got = format!("{capacity} tokens in chunks of {chunk_size}");
            return Err(Error::value("capacity", got, "fewer than 2^32 tokens"));
        };
        let numbers = |dim| RowFormat::Numbers { dtype, dim };
        Ok(Self {
            kv_heads,
            chunk_size,
            capacity: rows / chunk_size,
            dtype,
            keys: Rows::new(kv_heads, rows, numbers(head_dim), "the keys of a prefix tree")?,
            values: Rows::new(kv_heads, rows, numbers(value_dim), "the values of a prefix tree")?,
            state: RwLock::new(State::new()),
        })
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

    /// Element type of the stored rows.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Tokens of a chunk.
    pub fn chunk_size(&self) -> usize {
        self.chunk_size
    }

    /// Most tokens that chunks can be had for.
    pub fn capacity(&self) -> usize {
        self.capacity * self.chunk_size
    }

    /// Committed bytes: per head, keys and values each in steps of 2 MiB (of the head's whole capacity if that is smaller).
    pub fn nbytes(&self) -> usize {
        self.keys.nbytes() + self.values.nbytes()
    }

    /// The tree at one moment: whoever changes it waits until the reader is dropped.
    pub fn read(&self) -> TreeReader<'_> {
        // A change that panics has not yet touched what is published; see `grow`.
        TreeReader { tree: self, state: self.state.read().unwrap_or_else(|e| e.into_inner()) }
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(|e| e.into_inner())
    }

    /// How many rows `k` or `v` has, if the rest of its shape is right.
    /// Takes chunks and commits their memory, or changes nothing.
    fn take_chunks(&self, state: &mut State, count: usize) -> Result<Vec<u32>> {
        let taken = state.chunks.take(count, self.capacity).ok_or_else(|| {
            let got = format!("{count} more chunks of {} tokens on top of {}", self.chunk_size, state.chunks.used());
            Error::value("tokens", got, format!("no more than the capacity of {} chunks", self.capacity))
        })?;
        let rows = state.chunks.high as usize * self.chunk_size;
        if let Err(error) = self.keys.commit(rows).and_then(|()| self.values.commit(rows)) {
            taken.into_iter().for_each(|chunk| state.chunks.give_back(chunk));
            return Err(error);
        }
        Ok(taken)
    }

    /// Gives memory back that lies well above the last chunk in use.
    fn trim(&self, state: &State) {
        let rows = state.chunks.high as usize * self.chunk_size;
        self.keys.decommit(rows);
        self.values.decommit(rows);
    }

    /// Writes rows of `k` and `v` from row `offset` of a chunk on, and into the chunks after it.
    ///
    /// # Safety
    /// The chunks are committed, and no sequence has the rows that are written; the sources lie elsewhere.
    unsafe fn write_rows(&self, chunk: u32, offset: usize, k: &TensorView, v: &TensorView) -> Result<()> {
        let at = chunk as usize * self.chunk_size + offset;
        // SAFETY: the caller's promise.
        unsafe {
            self.keys.write(at, k, None)?;
            self.values.write(at, v, None)
        }
    }

    /// Adds a sequence of `tokens` and returns its number, which no other sequence of this tree ever has.
    ///
    /// `k`, `[1, kv_heads, T, head_dim]`, and `v`, `[1, kv_heads, T, value_dim]`, are the rows of the last `T` tokens: all of them,
    /// or fewer, down to those that are not [stored](TreeReader::stored) yet. What is stored is not written again. On an error
    /// nothing changes.
    pub fn add(&self, tokens: &[i64], k: &TensorView, v: &TensorView) -> Result<u64> {
        let mut state = self.write();
        let empty = Sequence { node: ROOT, depth: 0, tail: Vec::new(), tail_chunk: None };
        let sequence = self.grow(&mut state, empty, tokens, k, v)?;
        let id = state.next;
        state.next += 1;
        state.sequences.insert(id, sequence);
        Ok(id)
    }

    /// Appends `tokens` to one sequence; `k` and `v` as in [`add`](Self::add). On an error nothing changes.
    pub fn extend(&self, id: u64, tokens: &[i64], k: &TensorView, v: &TensorView) -> Result<()> {
        let mut state = self.write();
        let sequence = state.get("sequence", id)?.clone();
        let grown = self.grow(&mut state, sequence, tokens, k, v)?;
        state.sequences.insert(id, grown);
        self.trim(&state);
        Ok(())
    }

    /// `sequence` with more tokens. Chunks are taken and rows written first, so that an error or a panic leaves the tree as it was.
    fn grow(
        &self,
        state: &mut State,
        mut sequence: Sequence,
        tokens: &[i64],
        k: &TensorView,
        v: &TensorView,
    ) -> Result<Sequence> {
        let rows = check_pair(k, v, self.kv_heads, [self.head_dim(), self.value_dim()])?;
        let (size, had) = (self.chunk_size, sequence.tail.len());
        let all = [&sequence.tail, tokens].concat();
        let (matched, node) = state.descend(sequence.node, &all, size);
        // Tokens of `all` whose rows are there: those of the matched chunks, or of the tail as long as it is kept.
        let stored = if matched > 0 { matched * size } else { had };
        let fresh = all.len() - stored;
        if rows < fresh || rows > tokens.len() {
            let expected =
                format!("the rows of the last {fresh} to {} tokens, as {} are stored", tokens.len(), stored - had);
            return Err(Error::value("k", format!("{rows} rows"), expected));
        }
        let keep = sequence.tail_chunk.filter(|_| matched == 0);
        let chunks = (all.len() - matched * size).div_ceil(size);
        let taken = self.take_chunks(state, chunks - usize::from(keep.is_some()))?;
        let used: Vec<u32> = keep.into_iter().chain(taken.iter().copied()).collect();
        let mut written = Ok(());
        let mut i = 0;
        for run in used.chunk_by(|a, b| a + 1 == *b) {
            let start = (matched + i) * size;
            let (from, to) = (start.max(stored), (start + run.len() * size).min(all.len()));
            let last = |token: usize| token + rows - all.len();
            let (k, v) = (k.rows(last(from)..last(to)), v.rows(last(from)..last(to)));
            // SAFETY: the chunks were taken just now, or are the sequence's own tail, which ends at `from`; under the state's
            // lock nobody else uses them. Rows of the tree are never handed out, so the sources are not among them.
            written = written.and_then(|()| unsafe { self.write_rows(run[0], from - start, &k, &v) });
            i += run.len();
        }
        if let Err(error) = written {
            taken.into_iter().for_each(|chunk| state.chunks.give_back(chunk));
            return Err(error);
        }
        if keep.is_none()
            && let Some(tail) = sequence.tail_chunk
        {
            state.chunks.give_back(tail);
        }
        let above = sequence.node;
        sequence.node = node;
        let mut rest = all[matched * size..].chunks_exact(size);
        let mut used = used.into_iter();
        for (chunk_tokens, chunk) in rest.by_ref().zip(used.by_ref()) {
            sequence.node = state.add_child(sequence.node, chunk_tokens, chunk);
        }
        state.enter(sequence.node, above, 1);
        sequence.depth += all.len() / size;
        sequence.tail = rest.remainder().to_vec();
        sequence.tail_chunk = used.next();
        Ok(sequence)
    }

    /// Appends one token to each of `ids` (all sequences, ascending, if none are named), in their order: `k`, `[1, kv_heads, ids,
    /// head_dim]`, and `v`, `[1, kv_heads, ids, value_dim]`. On an error nothing changes.
    pub fn append(&self, ids: Option<&[u64]>, tokens: &[i64], k: &TensorView, v: &TensorView) -> Result<()> {
        let rows = check_pair(k, v, self.kv_heads, [self.head_dim(), self.value_dim()])?;
        let mut state = self.write();
        let all: Vec<u64>;
        let ids = match ids {
            Some(ids) => ids,
            None => {
                all = state.sequences.keys().copied().collect();
                &all
            }
        };
        if rows != ids.len() || tokens.len() != ids.len() {
            let got = format!("{} tokens and {rows} rows for {} sequences", tokens.len(), ids.len());
            return Err(Error::value("tokens", got, "one token and one row for each sequence"));
        }
        check_distinct(ids)?;
        let mut without = Vec::new();
        for &id in ids {
            if state.get("sequences", id)?.tail_chunk.is_none() {
                without.push(id);
            }
        }
        let taken = self.take_chunks(&mut state, without.len())?;
        let chunk_of: HashMap<u64, u32> = without.into_iter().zip(taken.iter().copied()).collect();
        let mut written = Ok(());
        for (i, id) in ids.iter().enumerate() {
            let sequence = &state.sequences[id];
            let (k, v) = (k.rows(i..i + 1), v.rows(i..i + 1));
            if let Some(chunk) = sequence.tail_chunk.or_else(|| chunk_of.get(id).copied()) {
                // SAFETY: as in `grow`; the tail ends at its length.
                written = written.and_then(|()| unsafe { self.write_rows(chunk, sequence.tail.len(), &k, &v) });
            }
        }
        if let Err(error) = written {
            taken.into_iter().for_each(|chunk| state.chunks.give_back(chunk));
            return Err(error);
        }
        for (id, &token) in ids.iter().zip(tokens) {
            let Some(mut sequence) = state.sequences.remove(id) else { continue };
            sequence.tail.push(token);
            sequence.tail_chunk = sequence.tail_chunk.or_else(|| chunk_of.get(id).copied());
            if sequence.tail.len() == self.chunk_size {
                state.finish_tail(&mut sequence);
            }
            state.sequences.insert(*id, sequence);
        }
        self.trim(&state);
        Ok(())
    }

    /// `n` sequences that begin as `id` does now, and share its full chunks; the unfinished one is copied. On an error nothing
    /// changes.
    pub fn fork(&self, id: u64, n: usize) -> Result<Vec<u64>> {
        let mut state = self.write();
        let sequence = state.get("sequence", id)?.clone();
        let tail = sequence.tail.len();
        let taken = self.take_chunks(&mut state, if tail > 0 { n } else { 0 })?;
        if let Some(chunk) = sequence.tail_chunk {
            let start = chunk as usize * self.chunk_size;
            // SAFETY: rows of the tail are written, and nobody writes them under the state's lock.
            let (k, v) = unsafe { (view(&self.keys, start + tail), view(&self.values, start + tail)) };
            let (k, v) = (k.rows(start..start + tail), v.rows(start..start + tail));
            // SAFETY: as in `grow`; the chunks were taken just now.
            let copied = taken.iter().try_for_each(|&copy| unsafe { self.write_rows(copy, 0, &k, &v) });
            if let Err(error) = copied {
                taken.into_iter().for_each(|chunk| state.chunks.give_back(chunk));
                return Err(error);
            }
        }
        state.enter(sequence.node, ROOT, n);
        let first = state.next;
        state.next += n as u64;
        for (i, id) in (first..state.next).enumerate() {
            let copy = Sequence { tail_chunk: taken.get(i).copied(), ..sequence.clone() };
            state.sequences.insert(id, copy);
        }
        Ok((first..state.next).collect())
    }

    /// Drops a sequence; chunks that it shared with nobody are free again.
    pub fn remove(&self, id: u64) -> Result<()> {
        let mut state = self.write();
        let Sequence { node, tail_chunk, .. } = state.get("sequence", id)?.clone();
        state.sequences.remove(&id);
        if let Some(chunk) = tail_chunk {
            state.chunks.give_back(chunk);
        }
        state.leave(node);
        self.trim(&state);
        Ok(())
    }
}

/// The first `len` rows of all heads.
///
/// # Safety
/// As [`Rows::view`].
unsafe fn view(rows: &Rows, len: usize) -> TensorView<'_> {
    // SAFETY: the caller's promise.
    match unsafe { rows.view(len, None) } {
        KvView::Numbers(view) => view,
        KvView::Codes(_) => unreachable!("a tree keeps numbers"),
    }
}

fn check_distinct(ids: &[u64]) -> Result<()> {
    let mut seen = HashSet::new();
    match ids.iter().find(|id| !seen.insert(**id)) {
        Some(id) => Err(Error::value("sequences", format!("{id} twice"), "each sequence at most once")),
        None => Ok(()),
    }
}

impl std::fmt::Debug for PrefixTree {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let reader = self.read();
        f.debug_struct("PrefixTree")
            .field("kv_heads", &self.kv_heads)
            .field("head_dim", &self.head_dim())
            .field("value_dim", &self.value_dim())
            .field("dtype", &self.dtype)
            .field("chunk_size", &self.chunk_size)
            .field("sequences", &reader.state.sequences.len())
            .field("chunks", &reader.chunks())
            .finish()
    }
}
