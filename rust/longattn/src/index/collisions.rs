//! Collisions: keys are told apart by the signs of 8 rotated dimensions at a time; candidates are voted for, then ranked by 4-bit codes
//! (ParisKV).
//!
//! The centroids of a subspace of 8 dimensions are the 256 patterns of signs: nothing is fitted to the keys, so nothing drifts. A
//! query ranks the centroids of each subspace by their products with its own part; keys vote in six tiers:
//!
//! ```text
//! a centroid is in tier t if fewer than  n * collision_ratio * (0.05, 0.15, 0.3, 0.5, 0.75, 1)[t]  keys have better ones
//! a key's votes: the tiers that its centroids are in, over all subspaces
//! ```
//! The keys of most votes are candidates, of which the codes of `codes.rs` give an unbiased estimate of the product; the largest are
//! picked. All of it is done for the mean query of the group.

use super::codes::{Encode, Format, ScanQuery};
use super::lookup::{self, BLOCK, Tables, WHOLE};
use super::project::{Coder, Multiply, Projection, code_rows};
use super::rotation::orthogonal;
use super::snapshot::{Parameters, Saved};
use super::{Ask, Followed, Grow, Grown, Index, Pick, View, check_numbers};
use crate::kv::{KvStore, Reader};
use crate::parallel::Execution;
use crate::simd::{self, Kernel, MAX_LANES, Simd, dispatch, prefetch};
use crate::tensor::{Error, Result};
use std::any::Any;
use std::sync::Arc;

/// Dimensions of a subspace: a byte of signs.
const SUBSPACE: usize = 8;

/// Shares of the keys that the tiers reach to.
const TIERS: [f64; 6] = [0.05, 0.15, 0.3, 0.5, 0.75, 1.0];

/// Widest keys: the rotation takes `head_dim^2` numbers and `head_dim^3` operations to make.
const MAX_DIM: usize = 1024;

/// Rows that are coded before their codes join the others.
const ROUND: usize = 128 * 1024;

/// Signed bytes of a query are as many as whole vectors of any instruction set.
const VECTOR: usize = 4 * MAX_LANES;

/// What the codes are made of, and how keys vote.
#[derive(Clone, Copy, Debug)]
pub struct CollisionOptions {
    /// Seed of the rotation.
    pub seed: u64,
    /// Share of the keys that vote in a subspace, above 0 and at most 1; `None` goes by their number.
    pub collision_ratio: Option<f64>,
    /// Share of the keys that become candidates, above 0 and at most 1; `None` goes by their number.
    pub candidate_ratio: Option<f64>,
}

impl CollisionOptions {
    /// Both ratios, for so many keys.
    fn ratios(&self, keys: usize) -> (f64, f64) {
        let (collisions, candidates) = match keys {
            0..5_000 => (0.5, 0.5),
            5_000..10_000 => (0.3, 0.25),
            10_000..30_000 => (0.25, 0.2),
            _ => (0.2, 0.1),
        };
        (self.collision_ratio.unwrap_or(collisions), self.candidate_ratio.unwrap_or(candidates))
    }
}

/// An index of signs that collide. It ranks keys and estimates nothing.
///
/// Memory: `head_dim / 8 + head_dim / 2 + 4` bytes per key and KV head.
pub struct Collisions {
    options: CollisionOptions,
    /// `[head_dim, head_dim]`, shared by the heads.
    rotation: Arc<Vec<f32>>,
    codes: Followed<Content>,
}

#[derive(Clone)]
struct Content {
    dim: usize,
    /// Rows coded, a multiple of [`BLOCK`].
    rows: usize,
    heads: Vec<HeadCodes>,
}

#[derive(Clone)]
struct HeadCodes {
    /// As `lookup` wants them, a column per subspace.
    signs: Vec<u8>,
    /// `[rows, code_bytes]`: 4 bits per dimension.
    fine: Vec<u8>,
    /// What makes products with the codes unbiased.
    factors: Vec<f32>,
    /// `[subspaces, 256]`: keys of each centroid.
    counts: Vec<u32>,
}

fn subspaces(dim: usize) -> usize {
    dim.div_ceil(SUBSPACE)
}

/// Bytes of a key's 4-bit code: byte j holds dimension j, and dimension j + that many in its high half.
fn code_bytes(dim: usize) -> usize {
    dim.div_ceil(2).next_multiple_of(16)
}

impl HeadCodes {
    fn new(dim: usize) -> Self {
        let counts = vec![0; subspaces(dim) * WHOLE];
        Self { signs: Vec::new(), fine: Vec::new(), factors: Vec::new(), counts }
    }

    /// Counts the keys of some blocks in, or out.
    fn count(&mut self, first: usize, end: usize, dim: usize, step: u32) {
        let columns = subspaces(dim);
        for (i, group) in self.signs[first * columns..end * columns].chunks_exact(BLOCK).enumerate() {
            let counts = &mut self.counts[i % columns * WHOLE..][..WHOLE];
            for &byte in group {
                counts[usize::from(byte)] = counts[usize::from(byte)].wrapping_add(step);
            }
        }
    }
}

impl Grow for Content {
    fn wants(&self, len: usize) -> bool {
        self.rows < len / BLOCK * BLOCK
    }

    fn cut(&mut self, len: usize) {
        let (keep, dim) = (len / BLOCK * BLOCK, self.dim);
        if keep >= self.rows {
            return;
        }
        for head in &mut self.heads {
            head.count(keep, self.rows, dim, u32::MAX);
            head.signs.truncate(keep * subspaces(dim));
            head.fine.truncate(keep * code_bytes(dim));
            head.factors.truncate(keep);
        }
        self.rows = keep;
    }
}

/// Codes of some rows of a head.
struct Codes {
    dim: usize,
    levels: Vec<u8>,
    signs: Vec<u8>,
    fine: Vec<u8>,
    factors: Vec<f32>,
}

fn format(dim: usize) -> Format {
    Format { bits: 4, dim }
}

impl Coder for Codes {
    const NORM: bool = false;

    #[inline(always)]
    fn row<S: Simd>(&mut self, s: S, at: usize, x: &[f32], _: f32) {
        let dim = self.dim;
        let (columns, bytes) = (subspaces(dim), code_bytes(dim));
        for (c, x) in x[..dim].chunks(SUBSPACE).enumerate() {
            let mut byte = 0;
            for (t, &x) in x.iter().enumerate() {
                byte |= u8::from(x >= 0.0) << t;
            }
            self.signs[lookup::at(columns, at, c)] = byte;
        }
        let padded = format(dim).padded_dim();
        let (factor, _) = Encode { format: format(dim), x, levels: &mut self.levels[..padded] }.run(s);
        self.factors[at] = factor;
        let (low, high) = self.levels.split_at(bytes);
        for (j, to) in self.fine[at * bytes..(at + 1) * bytes].iter_mut().enumerate() {
            *to = low[j] | (high[j] << 4);
        }
    }
}

impl Collisions {
    /// An index over a store, empty until it is first read.
    pub fn new(store: Arc<KvStore>, options: CollisionOptions) -> Result<Self> {
        check_numbers(&store)?;
        let dim = store.head_dim();
        if dim > MAX_DIM {
            return Err(Error::value("store", format!("head_dim {dim}"), format!("at most {MAX_DIM}")));
        }
        for (name, ratio) in
            [("collision_ratio", options.collision_ratio), ("candidate_ratio", options.candidate_ratio)]
        {
            if let Some(ratio) = ratio.filter(|ratio| !(*ratio > 0.0 && *ratio <= 1.0)) {
                return Err(Error::value(name, ratio, "above 0 and at most 1"));
            }
        }
        let content = Content { dim, rows: 0, heads: vec![HeadCodes::new(dim); store.kv_heads()] };
        Ok(Self { options, rotation: Arc::new(orthogonal(dim, options.seed)), codes: Followed::new(store, content) })
    }

    fn extend(&self, content: &mut Content, reader: &Reader, execution: &Execution) -> Result<()> {
        let (dim, target) = (content.dim, reader.len() / BLOCK * BLOCK);
        let (columns, bytes) = (subspaces(dim), code_bytes(dim));
        while content.rows < target {
            let end = (content.rows + ROUND).min(target);
            let make = |rows: usize| Codes {
                dim,
                levels: vec![0; format(dim).padded_dim().max(2 * bytes)],
                signs: vec![0; rows * columns],
                fine: vec![0; rows * bytes],
                factors: vec![0.0; rows],
            };
            let project = |_| Projection { matrix: &self.rotation, outputs: dim, centre: None };
            let coded = code_rows(simd::current(), reader, content.rows..end, project, make, execution)?;
            let coming = (end - content.rows).max(content.rows / BLOCK / 8 * BLOCK);
            for (head, pieces) in content.heads.iter_mut().zip(coded) {
                head.signs.reserve_exact(coming * columns);
                head.fine.reserve_exact(coming * bytes);
                for piece in pieces {
                    head.signs.extend_from_slice(&piece.signs);
                    head.fine.extend_from_slice(&piece.fine);
                    head.factors.extend_from_slice(&piece.factors);
                }
                head.count(content.rows, end, dim, 1);
            }
            content.rows = end;
        }
        Ok(())
    }

    /// The index that was saved, over a store that has its rows.
    pub(crate) fn load(store: Arc<KvStore>, mut saved: Saved) -> Result<Self> {
        let ratio = |name: &str| saved.number(name).ok();
        let options = CollisionOptions {
            seed: saved.integer("seed")?,
            collision_ratio: ratio("collision_ratio"),
            candidate_ratio: ratio("candidate_ratio"),
        };
        let mut index = Self::new(Arc::clone(&store), options)?;
        let (rows, dim) = (saved.rows, store.head_dim());
        if rows % BLOCK != 0 {
            return Err(Error::value("path", format!("{rows} rows with codes"), format!("a multiple of {BLOCK}")));
        }
        let mut content = Content { dim, rows, heads: Vec::new() };
        for h in 0..store.kv_heads() {
            let mut head = HeadCodes {
                signs: saved.take(&format!("signs.{h}"), &[rows * subspaces(dim)])?,
                fine: saved.take(&format!("fine.{h}"), &[rows * code_bytes(dim)])?,
                factors: saved.take(&format!("factors.{h}"), &[rows])?,
                ..HeadCodes::new(dim)
            };
            head.count(0, rows, dim, 1);
            content.heads.push(head);
        }
        index.codes = Followed::new(store, content);
        Ok(index)
    }
}

impl Index for Collisions {
    fn store(&self) -> &Arc<KvStore> {
        self.codes.store()
    }

    fn kind(&self) -> &'static str {
        "collisions"
    }

    fn estimates(&self) -> bool {
        false
    }

    fn len(&self) -> usize {
        self.codes.look().rows
    }

    fn nbytes(&self) -> usize {
        let bytes =
            |head: &HeadCodes| head.signs.len() + head.fine.len() + 4 * (head.factors.len() + head.counts.len());
        self.codes.look().heads.iter().map(bytes).sum::<usize>() + 4 * self.rotation.len()
    }

    fn pending_operations(&self) -> f64 {
        let store = self.store();
        let rows = store.len().saturating_sub(self.len()) * store.kv_heads();
        // Finding the best grid takes a few passes more.
        (rows * store.head_dim() * (store.head_dim() + 32)) as f64
    }

    fn read<'a>(&'a self, reader: &'a Reader<'a>, execution: &Execution) -> Result<Box<dyn View + 'a>> {
        let content =
            self.codes.read(reader, execution, |content, reader, execution| self.extend(content, reader, execution))?;
        Ok(Box::new(Snapshot { index: self, content }))
    }

    fn fork(&self, store: Arc<KvStore>) -> Result<Arc<dyn Index>> {
        let codes = self.codes.fork(store)?;
        Ok(Arc::new(Self { options: self.options, rotation: Arc::clone(&self.rotation), codes }))
    }

    fn parameters(&self) -> Parameters {
        let CollisionOptions { seed, collision_ratio, candidate_ratio } = self.options;
        let mut parameters = Parameters::new();
        parameters.insert("seed".into(), seed.into());
        for (name, ratio) in [("collision_ratio", collision_ratio), ("candidate_ratio", candidate_ratio)] {
            if let Some(ratio) = ratio {
                parameters.insert(name.into(), ratio.into());
            }
        }
        parameters
    }

    fn save(&self) -> Saved {
        let content = self.codes.look();
        let mut saved = Saved::new(content.rows, self.parameters());
        for (h, head) in content.heads.iter().enumerate() {
            saved = saved
                .tensor(format!("signs.{h}"), &[head.signs.len()], head.signs.clone())
                .tensor(format!("fine.{h}"), &[head.fine.len()], head.fine.clone())
                .tensor(format!("factors.{h}"), &[head.factors.len()], head.factors.clone());
        }
        saved
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The codes at one moment.
struct Snapshot<'a> {
    index: &'a Collisions,
    content: Grown<'a, Content>,
}

impl View for Snapshot<'_> {
    fn covered(&self) -> usize {
        self.content.rows
    }

    fn pick(&self, ask: &Ask) -> Pick {
        let super::Select::TopK(k) = ask.select else { unreachable!("collisions estimate no mass") };
        let (head, dim, n) = (&self.content.heads[ask.head], self.content.dim, ask.candidates.len());
        let columns = subspaces(dim);
        let (collision_ratio, candidate_ratio) = self.index.options.ratios(n);
        let mut mean = vec![0f32; dim];
        for query in ask.queries {
            mean.iter_mut().zip(*query).for_each(|(m, x)| *m += x / ask.queries.len() as f32);
        }
        let query = dispatch(ask.isa, Multiply { matrix: &self.index.rotation, query: &mean });

        let blocks = ask.candidates.start / BLOCK..ask.candidates.end.div_ceil(BLOCK);
        let base = blocks.start * BLOCK;
        let inside = ask.candidates.start - base..ask.candidates.end - base;
        let signs = &head.signs[base * columns..blocks.end * BLOCK * columns];
        let reach = self.content.rows as f64 * collision_ratio;
        let tables = Tables::new(
            query.chunks(SUBSPACE).zip(head.counts.chunks_exact(WHOLE)).map(|(q, c)| votes(q, c, reach)).enumerate(),
        );
        let sums = lookup::sums(ask.isa, &tables, columns, signs, ask.parallel);
        let chosen = ((n as f64 * candidate_ratio).ceil() as usize).max(k);
        let mut rows = lookup::largest(ask.isa, &sums, inside, chosen, tables.largest());
        rows.iter_mut().for_each(|row| *row += base as u32);
        let mut bytes = signs.len();
        if rows.len() > k {
            bytes += rows.len() * (code_bytes(dim) + 4);
            rows = self.rerank(ask, &query, rows, k);
        }
        Pick { rows, scored: n, bytes, ..Pick::default() }
    }
}

/// Votes of each centroid of a subspace for a query's part `q`, when the tiers reach to `reach` keys.
fn votes(q: &[f32], counts: &[u32], reach: f64) -> [u8; WHOLE] {
    // Sum of the signed elements: each pattern differs by one sign from an earlier one.
    let mut scores = [0f32; WHOLE];
    scores[0] = -q.iter().sum::<f32>();
    for pattern in 1..WHOLE {
        let bit = pattern.trailing_zeros() as usize;
        scores[pattern] = scores[pattern & (pattern - 1)] + 2.0 * q.get(bit).copied().unwrap_or(0.0);
    }
    // Best first, ties to the lower pattern, as integers of the same order.
    let mut order = [0u64; WHOLE];
    for (pattern, (order, score)) in order.iter_mut().zip(scores).enumerate() {
        // + 0.0 makes one zero of both.
        let bits = (score + 0.0).to_bits();
        let rising = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
        *order = u64::from(!rising) << 8 | pattern as u64;
    }
    order.sort_unstable();
    let targets = TIERS.map(|tier| (reach * tier).ceil());
    let mut votes = [0u8; WHOLE];
    let mut better = 0u64;
    for order in order {
        let pattern = (order & 255) as usize;
        let tiers = targets.iter().filter(|&&target| (better as f64) < target).count();
        if tiers == 0 {
            break;
        }
        votes[pattern] = tiers as u8;
        better += u64::from(counts[pattern]);
    }
    votes
}

impl Snapshot<'_> {
    /// The `k` of some rows whose codes give the largest products with a rotated query, ascending; ties go to the lower row.
    fn rerank(&self, ask: &Ask, query: &[f32], rows: Vec<u32>, k: usize) -> Vec<u32> {
        let (head, dim) = (&self.content.heads[ask.head], self.content.dim);
        let scan = ScanQuery::new(format(dim), query, 0.0);
        let scores = dispatch(
            ask.isa,
            Rerank { query: &scan, fine: &head.fine, factors: &head.factors, rows: &rows, code_bytes: code_bytes(dim) },
        );
        let mut order: Vec<u32> = (0..rows.len() as u32).collect();
        let by_score = |&a: &u32, &b: &u32| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b));
        order.select_nth_unstable_by(k, by_score);
        let mut picked: Vec<u32> = order[..k].iter().map(|&i| rows[i as usize]).collect();
        picked.sort_unstable();
        picked
    }
}

/// Estimated products of a query with some keys.
struct Rerank<'a> {
    query: &'a ScanQuery,
    fine: &'a [u8],
    factors: &'a [f32],
    rows: &'a [u32],
    code_bytes: usize,
}

impl Kernel for Rerank<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let Self { query, fine, factors, rows, code_bytes } = self;
        let width = 4 * S::LANES;
        let vectors = code_bytes.div_ceil(width);
        // The query in the codes' order, its two halves padded to whole vectors.
        let mut halves = vec![0u8; 2 * code_bytes.next_multiple_of(VECTOR)];
        let second = halves.len() / 2;
        for (d, byte) in query.quads.iter().flat_map(|quad| quad.to_ne_bytes()).enumerate().take(2 * code_bytes) {
            halves[if d < code_bytes { d } else { second + d - code_bytes }] = byte;
        }
        let mask = s.splat_i32(0x0f0f_0f0f);
        let mut scores = Vec::with_capacity(rows.len());
        for (i, &row) in rows.iter().enumerate() {
            let next = rows[(i + 12).min(rows.len() - 1)] as usize;
            prefetch(fine.as_ptr().wrapping_add(next * code_bytes));
            prefetch(factors.as_ptr().wrapping_add(next));
            let codes = &fine[row as usize * code_bytes..][..code_bytes];
            let mut sum = s.splat_i32(0);
            for v in 0..vectors {
                // SAFETY: the vector's bytes lie inside the code; the halves of the query are padded.
                unsafe {
                    let at = codes.as_ptr().add(v * width);
                    let left = code_bytes - v * width;
                    let packed = if left < width { s.load_bytes_first(at, left) } else { s.load_bytes(at) };
                    let (low, high) = (s.and(packed, mask), s.and(s.shift_right_16::<4>(packed), mask));
                    sum = s.dot4(sum, low, s.load_bytes(halves.as_ptr().add(v * width)));
                    sum = s.dot4(sum, high, s.load_bytes(halves.as_ptr().add(second + v * width)));
                }
            }
            scores.push(factors[row as usize] * query.scale * (s.sum(s.to_f32(sum)) - query.shift));
        }
        scores
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Random;

    #[test]
    fn votes_follow_their_definition() {
        let mut random = Random::new(6);
        for dims in [1, 3, 8] {
            let q: Vec<f32> = (0..dims).map(|_| random.normal() as f32).collect();
            let counts: Vec<u32> =
                (0..WHOLE).map(|p| if p >> dims == 0 { random.below(20) as u32 } else { 0 }).collect();
            let n: u32 = counts.iter().sum();
            for ratio in [0.01, 0.2, 1.0] {
                let found = votes(&q, &counts, f64::from(n) * ratio);
                let score = |p: usize| {
                    (0..dims).map(|d| if p >> d & 1 == 1 { f64::from(q[d]) } else { -f64::from(q[d]) }).sum::<f64>()
                };
                for (p, &found) in found.iter().enumerate().take(1 << dims) {
                    let better = |o: &usize| score(*o) > score(p) + 1e-6;
                    let before: u32 = (0..1 << dims).filter(better).map(|o| counts[o]).sum();
                    let tiers =
                        TIERS.iter().filter(|&&t| f64::from(before) < (f64::from(n) * ratio * t).ceil()).count();
                    assert_eq!(usize::from(found), tiers, "{dims} {ratio} {p}");
                }
            }
        }
        // Nothing to rank by: all tie, and the lower pattern comes first.
        assert_eq!(votes(&[0.0; 8], &[1; WHOLE], 20.0)[..4], [6, 5, 5, 4]);
    }
}
