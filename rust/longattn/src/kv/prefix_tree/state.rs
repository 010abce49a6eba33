//! The tree itself: nodes, sequences and which chunks are in use. Knows nothing of keys and values.

use crate::tensor::{Error, Result};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// The node that is no chunk: every sequence starts there.
pub(super) const ROOT: u32 = 0;

/// A full chunk.
pub(super) struct Node {
    pub(super) parent: u32,
    pub(super) chunk: u32,
    /// Sequences that begin with it.
    pub(super) sequences: usize,
    pub(super) tokens: Arc<[i64]>,
    pub(super) children: HashMap<Arc<[i64]>, u32>,
}

#[derive(Clone)]
pub(super) struct Sequence {
    /// The last full chunk.
    pub(super) node: u32,
    /// Full chunks.
    pub(super) depth: usize,
    /// Tokens of the unfinished chunk, and the chunk if there are any.
    pub(super) tail: Vec<i64>,
    pub(super) tail_chunk: Option<u32>,
}

/// Which chunks are in use: the lowest numbers, as far as possible.
#[derive(Default)]
pub(super) struct Chunks {
    /// Below `high`.
    pub(super) free: BTreeSet<u32>,
    /// No chunk from here on is in use.
    pub(super) high: u32,
}

impl Chunks {
    pub(super) fn used(&self) -> usize {
        self.high as usize - self.free.len()
    }

    /// Takes `count` chunks of `capacity`, if there are so many.
    pub(super) fn take(&mut self, count: usize, capacity: usize) -> Option<Vec<u32>> {
        if count > capacity - self.used() {
            return None;
        }
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            taken.push(self.free.pop_first().unwrap_or_else(|| {
                self.high += 1;
                self.high - 1
            }));
        }
        Some(taken)
    }

    pub(super) fn give_back(&mut self, chunk: u32) {
        self.free.insert(chunk);
        while self.high > 0 && self.free.remove(&(self.high - 1)) {
            self.high -= 1;
        }
    }
}

pub(super) struct State {
    /// By number; a node without sequences is waiting to be used again (except the root).
    pub(super) nodes: Vec<Node>,
    pub(super) unused_nodes: Vec<u32>,
    pub(super) sequences: BTreeMap<u64, Sequence>,
    pub(super) next: u64,
    pub(super) chunks: Chunks,
}

impl State {
    /// No sequences.
    pub(super) fn new() -> Self {
        let root = Node { parent: ROOT, chunk: 0, sequences: 0, tokens: Arc::new([]), children: HashMap::new() };
        Self {
            nodes: vec![root],
            unused_nodes: Vec::new(),
            sequences: BTreeMap::new(),
            next: 0,
            chunks: Chunks::default(),
        }
    }

    pub(super) fn get(&self, argument: &'static str, id: u64) -> Result<&Sequence> {
        self.sequences.get(&id).ok_or_else(|| Error::value(argument, id, "a sequence of this tree"))
    }

    /// How many leading whole chunks of `tokens` hang below `node`, and the last of them.
    pub(super) fn descend(&self, mut node: u32, tokens: &[i64], chunk_size: usize) -> (usize, u32) {
        let mut matched = 0;
        for chunk in tokens.chunks_exact(chunk_size) {
            let Some(&child) = self.nodes[node as usize].children.get(chunk) else { break };
            node = child;
            matched += 1;
        }
        (matched, node)
    }

    /// Chunks of the nodes from the root to `node`.
    pub(super) fn path(&self, mut node: u32, depth: usize) -> Vec<u32> {
        let mut chunks = vec![0; depth];
        for slot in chunks.iter_mut().rev() {
            let Node { parent, chunk, .. } = self.nodes[node as usize];
            *slot = chunk;
            node = parent;
        }
        chunks
    }

    pub(super) fn add_child(&mut self, parent: u32, tokens: &[i64], chunk: u32) -> u32 {
        let tokens: Arc<[i64]> = tokens.into();
        let node = Node { parent, chunk, sequences: 0, tokens: Arc::clone(&tokens), children: HashMap::new() };
        let number = if let Some(number) = self.unused_nodes.pop() {
            self.nodes[number as usize] = node;
            number
        } else {
            self.nodes.push(node);
            (self.nodes.len() - 1) as u32
        };
        self.nodes[parent as usize].children.insert(tokens, number);
        number
    }

    /// Counts `count` more sequences on the way from `node` up to `above`, which is not counted.
    pub(super) fn enter(&mut self, mut node: u32, above: u32, count: usize) {
        while node != above {
            self.nodes[node as usize].sequences += count;
            node = self.nodes[node as usize].parent;
        }
    }

    /// Takes a sequence off the nodes from `node` to the root; chunks that nobody needs any more are free.
    pub(super) fn leave(&mut self, mut node: u32) {
        while node != ROOT {
            let Node { parent, chunk, ref mut sequences, .. } = self.nodes[node as usize];
            *sequences -= 1;
            if *sequences == 0 {
                let tokens = Arc::clone(&self.nodes[node as usize].tokens);
                self.nodes[parent as usize].children.remove(&tokens);
                self.unused_nodes.push(node);
                self.chunks.give_back(chunk);
            }
            node = parent;
        }
    }

    /// Turns a full tail into a node, or gives it up for an equal one.
    pub(super) fn finish_tail(&mut self, sequence: &mut Sequence) {
        let Some(chunk) = sequence.tail_chunk.take() else { return };
        let above = sequence.node;
        let tokens = std::mem::take(&mut sequence.tail);
        sequence.node = if let Some(&equal) = self.nodes[above as usize].children.get(tokens.as_slice()) {
            self.chunks.give_back(chunk);
            equal
        } else {
            self.add_child(above, &tokens, chunk)
        };
        self.enter(sequence.node, above, 1);
        sequence.depth += 1;
    }

    pub(super) fn len(&self, sequence: &Sequence, chunk_size: usize) -> usize {
        sequence.depth * chunk_size + sequence.tail.len()
    }
}
