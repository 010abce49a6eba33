//! A look at a tree while nobody changes it.

use super::state::{ROOT, State};
use super::{PrefixTree, check_distinct, view};
use crate::tensor::{Error, Result, TensorView, TensorViewMut, with_element};
use std::sync::RwLockReadGuard;

/// Where the rows of a sequence are.
#[derive(Clone, Debug)]
pub(crate) struct Path {
    /// Full chunks, from the first; sequences share those they have in common.
    pub(crate) chunks: Vec<u32>,
    /// The unfinished chunk and its length.
    pub(crate) tail: Option<(u32, usize)>,
}

/// A [`PrefixTree`] at one moment; see [`PrefixTree::read`].
pub struct TreeReader<'a> {
    pub(super) tree: &'a PrefixTree,
    pub(super) state: RwLockReadGuard<'a, State>,
}

impl TreeReader<'_> {
    /// The tree it reads.
    pub fn tree(&self) -> &PrefixTree {
        self.tree
    }

    /// Numbers of all sequences, ascending.
    pub fn sequences(&self) -> Vec<u64> {
        self.state.sequences.keys().copied().collect()
    }

    /// Tokens of a sequence.
    pub fn tokens(&self, id: u64) -> Result<Vec<i64>> {
        let sequence = self.state.get("sequence", id)?;
        let mut chunks = Vec::with_capacity(sequence.depth);
        let mut node = sequence.node;
        while node != ROOT {
            chunks.push(&self.state.nodes[node as usize].tokens);
            node = self.state.nodes[node as usize].parent;
        }
        let mut tokens = Vec::with_capacity(self.state.len(sequence, self.tree.chunk_size));
        chunks.iter().rev().for_each(|chunk| tokens.extend_from_slice(chunk));
        tokens.extend_from_slice(&sequence.tail);
        Ok(tokens)
    }

    /// Number of tokens of a sequence.
    pub fn len(&self, id: u64) -> Result<usize> {
        Ok(self.state.len(self.state.get("sequence", id)?, self.tree.chunk_size))
    }

    /// How many of the first `tokens` are stored in chunks that a new sequence would share.
    pub fn stored(&self, tokens: &[i64]) -> usize {
        self.state.descend(ROOT, tokens, self.tree.chunk_size).0 * self.tree.chunk_size
    }

    /// Tokens of all sequences, those that several share counted for each.
    pub fn total_len(&self) -> usize {
        self.state.sequences.values().map(|sequence| self.state.len(sequence, self.tree.chunk_size)).sum()
    }

    /// Chunks in use.
    pub fn chunks(&self) -> usize {
        self.state.chunks.used()
    }

    /// Tokens stored, those that several sequences share counted once.
    pub fn tokens_stored(&self) -> usize {
        let tails: usize = self.state.sequences.values().map(|sequence| sequence.tail.len()).sum();
        (self.state.nodes.len() - 1 - self.state.unused_nodes.len()) * self.tree.chunk_size + tails
    }

    /// Where the rows of a sequence are.
    pub(crate) fn path(&self, id: u64) -> Result<Path> {
        let sequence = self.state.get("sequences", id)?;
        let tail = sequence.tail_chunk.map(|chunk| (chunk, sequence.tail.len()));
        Ok(Path { chunks: self.state.path(sequence.node, sequence.depth), tail })
    }

    /// Paths of distinct sequences, in their order.
    pub(crate) fn paths(&self, ids: &[u64]) -> Result<Vec<Path>> {
        check_distinct(ids)?;
        ids.iter().map(|&id| self.path(id)).collect()
    }

    /// All sequences, depth first: those that share a chunk stand next to each other.
    pub fn order(&self) -> Vec<u64> {
        let mut paths: Vec<(Vec<u32>, u64)> = self
            .state
            .sequences
            .iter()
            .map(|(&id, sequence)| (self.state.path(sequence.node, sequence.depth), id))
            .collect();
        paths.sort();
        paths.into_iter().map(|(_, id)| id).collect()
    }

    fn rows(&self) -> usize {
        self.state.chunks.high as usize * self.tree.chunk_size
    }

    /// Keys of all chunks, `[1, kv_heads, rows, head_dim]`; rows that belong to no sequence hold anything.
    pub(crate) fn keys(&self) -> TensorView<'_> {
        // SAFETY: the rows are committed, and while this reader lives nobody writes.
        unsafe { view(&self.tree.keys, self.rows()) }
    }

    /// Values of all chunks, likewise.
    pub(crate) fn values(&self) -> TensorView<'_> {
        // SAFETY: as in `keys`.
        unsafe { view(&self.tree.values, self.rows()) }
    }

    /// Copies the first rows of a sequence to `k`, `[1, kv_heads, T, head_dim]`, and `v`, `[1, kv_heads, T, value_dim]`, of the
    /// tree's dtype.
    pub fn copy_rows(&self, id: u64, k: &mut TensorViewMut, v: &mut TensorViewMut) -> Result<()> {
        let (len, size) = (self.len(id)?, self.tree.chunk_size);
        let path = self.path(id)?;
        let (k, v) = (&*k, &*v);
        for (argument, to, from) in [("k", k, self.keys()), ("v", v, self.values())] {
            let [batch, heads, count, dim] = to.shape();
            if (batch, heads, dim) != (1, from.shape()[1], from.shape()[3]) || count > len || to.dtype() != from.dtype()
            {
                let got = format!("{} {:?}", to.dtype(), to.shape());
                let expected = format!("{} [1, {}, at most {len}, {}]", from.dtype(), from.shape()[1], from.shape()[3]);
                return Err(Error::value(argument, got, expected));
            }
            with_element!(from.dtype(), T => {
                for head in 0..heads {
                    for row in 0..count {
                        let chunk = path.chunks.get(row / size).copied().or(path.tail.map(|(chunk, _)| chunk));
                        let row_in_pool = chunk.map_or(0, |chunk| chunk as usize * size + row % size);
                        let source = from.row::<T>(0, head, row_in_pool);
                        // SAFETY: the target's row has `dim` elements as the source has, and is borrowed uniquely.
                        unsafe { to.row_ptr::<T>(0, head, row).copy_from_nonoverlapping(source.as_ptr(), dim) };
                    }
                }
            });
        }
        Ok(())
    }
}
