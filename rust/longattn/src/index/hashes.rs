//! Hashes: plain sign codes of `k W`, ranked by Hamming distance (SimHash with random weights, HATA with learned ones).
//!
//! The distance of a key to a group of queries is the sum over the heads. As each bit of the key adds what that bit adds, whatever the
//! other bits are, the sum over heads is taken in the tables: a scan costs the same for any group.

use super::lookup::{self, BLOCK, HALVES, Tables};
use super::project::{Coder, Multiply, Projection, code_rows};
use super::snapshot::{Parameters, Saved};
use super::{Ask, Followed, Grow, Grown, Index, Pick, View, check_numbers};
use crate::kv::{KvStore, Reader};
use crate::parallel::Execution;
use crate::retrieval::select::{Budget, Weights, select};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Error, Result};
use half::f16;
use std::any::Any;
use std::sync::Arc;

/// Most bits of a code: distances summed over a group fit 16 bits.
const MAX_BITS: usize = 512;

/// Heads whose sums share a table: 8 bits of each fit a byte.
const HEADS: usize = 31;

/// Rows that are coded before their codes join the others.
const ROUND: usize = 128 * 1024;

/// What the codes are made of.
#[derive(Clone, Debug)]
pub struct HashOptions {
    /// `[kv_heads, head_dim, code_bits]`.
    pub weights: Vec<f32>,
    /// Bits of a code, 1 to 512.
    pub code_bits: usize,
    /// Rank by agreeing less differing bits, times the key's norm.
    pub use_norm: bool,
}

/// An index of sign codes. It ranks keys and estimates nothing.
///
/// Memory: `code_bits / 8` bytes per key and KV head, 2 more with norms.
pub struct Hashes {
    options: Arc<HashOptions>,
    /// `[kv_heads, code_bits, head_dim]`.
    map: Arc<Vec<f32>>,
    codes: Followed<Content>,
}

#[derive(Clone)]
struct Content {
    columns: usize,
    /// Rows coded, a multiple of [`BLOCK`].
    rows: usize,
    heads: Vec<HeadCodes>,
}

#[derive(Clone, Default)]
struct HeadCodes {
    /// As `lookup` wants them: bit t of byte c is bit 8 c + t of the code.
    codes: Vec<u8>,
    /// Norms in f16, or nothing.
    norms: Vec<f16>,
}

impl Grow for Content {
    fn wants(&self, len: usize) -> bool {
        self.rows < len / BLOCK * BLOCK
    }

    fn cut(&mut self, len: usize) {
        self.rows = self.rows.min(len / BLOCK * BLOCK);
        for head in &mut self.heads {
            head.codes.truncate(self.rows * self.columns);
            head.norms.truncate(self.rows);
        }
    }
}

/// Codes of some rows of a head.
struct Bits {
    code_bits: usize,
    codes: Vec<u8>,
    norms: Vec<f16>,
    use_norm: bool,
}

impl Coder for Bits {
    const NORM: bool = true;

    #[inline(always)]
    fn row<S: Simd>(&mut self, _: S, at: usize, x: &[f32], norm: f32) {
        let columns = self.code_bits.div_ceil(8);
        for (c, x) in x[..self.code_bits].chunks(8).enumerate() {
            let mut byte = 0;
            for (t, &x) in x.iter().enumerate() {
                byte |= u8::from(x > 0.0) << t;
            }
            self.codes[lookup::at(columns, at, c)] = byte;
        }
        if self.use_norm {
            // The largest f16 stands for all that are larger.
            self.norms[at] = f16::from_f32(norm.min(f16::MAX.to_f32()));
        }
    }
}

impl Hashes {
    /// An index over a store, empty until it is first read.
    pub fn new(store: Arc<KvStore>, options: HashOptions) -> Result<Self> {
        check_numbers(&store)?;
        let (heads, dim, bits) = (store.kv_heads(), store.head_dim(), options.code_bits);
        if bits == 0 || bits > MAX_BITS {
            return Err(Error::value("weights", format!("{bits} bits"), format!("1 to {MAX_BITS}")));
        }
        if options.weights.len() != heads * dim * bits {
            let got = format!("{} numbers", options.weights.len());
            return Err(Error::value("weights", got, format!("[{heads}, {dim}, {bits}]")));
        }
        if !options.weights.iter().all(|x| x.is_finite()) {
            return Err(Error::value("weights", "NaN or infinity", "finite weights"));
        }
        // [dim, bits] of each head becomes [bits, dim].
        let mut map = vec![0f32; options.weights.len()];
        for (to, from) in map.chunks_exact_mut(bits * dim).zip(options.weights.chunks_exact(bits * dim)) {
            for (i, x) in from.iter().enumerate() {
                to[i % bits * dim + i / bits] = *x;
            }
        }
        let content = Content { columns: bits.div_ceil(8), rows: 0, heads: vec![HeadCodes::default(); heads] };
        Ok(Self { options: Arc::new(options), map: Arc::new(map), codes: Followed::new(store, content) })
    }

    fn map_of(&self, head: usize) -> &[f32] {
        let size = self.options.code_bits * self.codes.store().head_dim();
        &self.map[head * size..(head + 1) * size]
    }

    fn extend(&self, content: &mut Content, reader: &Reader, execution: &Execution) -> Result<()> {
        let HashOptions { code_bits, use_norm, .. } = *self.options;
        let target = reader.len() / BLOCK * BLOCK;
        while content.rows < target {
            let end = (content.rows + ROUND).min(target);
            let columns = content.columns;
            let make = |rows: usize| Bits {
                code_bits,
                codes: vec![0; rows * columns],
                norms: vec![f16::ZERO; if use_norm { rows } else { 0 }],
                use_norm,
            };
            let project = |head| Projection { matrix: self.map_of(head), outputs: code_bits, centre: None };
            let coded = code_rows(simd::current(), reader, content.rows..end, project, make, execution)?;
            for (head, pieces) in content.heads.iter_mut().zip(coded) {
                head.codes.reserve_exact((end - content.rows).max(head.codes.len() / BLOCK / 8) * columns);
                for piece in pieces {
                    head.codes.extend_from_slice(&piece.codes);
                    head.norms.extend_from_slice(&piece.norms);
                }
            }
            content.rows = end;
        }
        Ok(())
    }

    /// The index that was saved, over a store that has its rows.
    pub(crate) fn load(store: Arc<KvStore>, mut saved: Saved) -> Result<Self> {
        let code_bits = saved.integer("code_bits")? as usize;
        let weights = saved.take("weights", &[store.kv_heads(), store.head_dim(), code_bits])?;
        let use_norm = saved.flag("use_norm")?;
        let mut index = Self::new(Arc::clone(&store), HashOptions { weights, code_bits, use_norm })?;
        let (rows, columns) = (saved.rows, code_bits.div_ceil(8));
        if rows % BLOCK != 0 {
            return Err(Error::value("path", format!("{rows} rows with codes"), format!("a multiple of {BLOCK}")));
        }
        let mut content = Content { columns, rows, heads: Vec::new() };
        for h in 0..store.kv_heads() {
            let codes = saved.take(&format!("codes.{h}"), &[rows * columns])?;
            let norms: Vec<u16> = saved.take(&format!("norms.{h}"), &[if use_norm { rows } else { 0 }])?;
            content.heads.push(HeadCodes { codes, norms: norms.into_iter().map(f16::from_bits).collect() });
        }
        index.codes = Followed::new(store, content);
        Ok(index)
    }
}

impl Index for Hashes {
    fn store(&self) -> &Arc<KvStore> {
        self.codes.store()
    }

    fn kind(&self) -> &'static str {
        "hashes"
    }

    fn estimates(&self) -> bool {
        false
    }

    fn len(&self) -> usize {
        self.codes.look().rows
    }

    fn nbytes(&self) -> usize {
        let bytes = |head: &HeadCodes| head.codes.len() + 2 * head.norms.len();
        self.codes.look().heads.iter().map(bytes).sum::<usize>() + 4 * self.map.len()
    }

    fn pending_operations(&self) -> f64 {
        let store = self.store();
        let rows = store.len().saturating_sub(self.len()) * store.kv_heads();
        (rows * store.head_dim() * self.options.code_bits) as f64
    }

    fn read<'a>(&'a self, reader: &'a Reader<'a>, execution: &Execution) -> Result<Box<dyn View + 'a>> {
        let content =
            self.codes.read(reader, execution, |content, reader, execution| self.extend(content, reader, execution))?;
        Ok(Box::new(Snapshot { index: self, content }))
    }

    fn fork(&self, store: Arc<KvStore>) -> Result<Arc<dyn Index>> {
        let codes = self.codes.fork(store)?;
        Ok(Arc::new(Self { options: Arc::clone(&self.options), map: Arc::clone(&self.map), codes }))
    }

    fn parameters(&self) -> Parameters {
        let mut parameters = Parameters::new();
        parameters.insert("code_bits".into(), self.options.code_bits.into());
        parameters.insert("use_norm".into(), self.options.use_norm.into());
        parameters
    }

    fn save(&self) -> Saved {
        let content = self.codes.look();
        let shape = [self.store().kv_heads(), self.store().head_dim(), self.options.code_bits];
        let mut saved =
            Saved::new(content.rows, self.parameters()).tensor("weights", &shape, self.options.weights.clone());
        for (h, head) in content.heads.iter().enumerate() {
            let norms: Vec<u16> = head.norms.iter().map(|x| x.to_bits()).collect();
            saved = saved.tensor(format!("codes.{h}"), &[head.codes.len()], head.codes.clone()).tensor(
                format!("norms.{h}"),
                &[norms.len()],
                norms,
            );
        }
        saved
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The codes at one moment.
struct Snapshot<'a> {
    index: &'a Hashes,
    content: Grown<'a, Content>,
}

impl Snapshot<'_> {
    /// Tables of agreeing bits, summed over the group, less a number that is the same for all keys and comes second.
    fn tables(&self, ask: &Ask) -> (Tables<HALVES>, usize) {
        let (bits, columns) = (self.index.options.code_bits, self.content.columns);
        let mut terms = Vec::new();
        let mut base = 0;
        for group in ask.queries.chunks(HEADS) {
            // Heads whose bit is set.
            let mut ones = vec![0usize; columns * 8];
            for query in group {
                let products = dispatch(ask.isa, Multiply { matrix: self.index.map_of(ask.head), query });
                ones.iter_mut().zip(products).for_each(|(ones, x)| *ones += usize::from(x > 0.0));
            }
            for (c, ones) in ones.chunks_exact(8).enumerate() {
                let mut table = [0u8; HALVES];
                for t in (0..8).filter(|t| 8 * c + t < bits) {
                    let (set, clear) = (ones[t], group.len() - ones[t]);
                    let least = set.min(clear);
                    base += least;
                    for i in 0..16 {
                        let agreeing = if i >> (t % 4) & 1 == 1 { set } else { clear };
                        table[t / 4 * 16 + i] += (agreeing - least) as u8;
                    }
                }
                terms.push((c, table));
            }
        }
        (Tables::new(terms), base)
    }
}

impl View for Snapshot<'_> {
    fn covered(&self) -> usize {
        self.content.rows
    }

    fn pick(&self, ask: &Ask) -> Pick {
        let super::Select::TopK(k) = ask.select else { unreachable!("hashes estimate no mass") };
        let (head, columns) = (&self.content.heads[ask.head], self.content.columns);
        let blocks = ask.candidates.start / BLOCK..ask.candidates.end.div_ceil(BLOCK);
        let base = blocks.start * BLOCK;
        let inside = ask.candidates.start - base..ask.candidates.end - base;
        let (tables, least) = self.tables(ask);
        let codes = &head.codes[base * columns..blocks.end * BLOCK * columns];
        let sums = lookup::sums(ask.isa, &tables, columns, codes, ask.parallel);
        let mut bytes = codes.len();
        let mut rows = if self.index.options.use_norm {
            bytes += 2 * inside.len();
            let all = ask.queries.len() * self.index.options.code_bits;
            let norms = &head.norms[base..blocks.end * BLOCK];
            let scores = dispatch(ask.isa, ByNorm { sums: &sums, norms, offset: 2.0 * least as f32 - all as f32 });
            let mut totals = Weights::new(1, false);
            totals.count(&scores[inside.clone()]);
            select(ask.isa, &scores, &totals, inside, &Budget::Rows(k))
        } else {
            lookup::largest(ask.isa, &sums, inside, k, tables.largest())
        };
        rows.iter_mut().for_each(|row| *row += base as u32);
        Pick { rows, scored: ask.candidates.len(), bytes, ..Pick::default() }
    }
}

/// `(2 sum + offset) * norm` of each key: agreeing less differing bits, times the norm.
struct ByNorm<'a> {
    sums: &'a [u16],
    norms: &'a [f16],
    offset: f32,
}

impl Kernel for ByNorm<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let Self { sums, norms, offset } = self;
        assert!(sums.len() == norms.len() && sums.len().is_multiple_of(BLOCK));
        let mut scores = vec![0f32; sums.len()];
        for (score, &sum) in scores.iter_mut().zip(sums) {
            *score = 2.0 * f32::from(sum) + offset;
        }
        for j in (0..scores.len()).step_by(S::LANES) {
            // SAFETY: both are whole blocks, a multiple of any vector.
            unsafe {
                let to = scores.as_mut_ptr().add(j);
                s.store(to, s.mul(s.load(to), s.load_f16(norms.as_ptr().add(j))));
            }
        }
        scores
    }
}
