//! Product quantisation: keys cut into subvectors, each replaced by the nearest of a few centroids of its own (PQCache and its kin).
//!
//! ```text
//! block of 64 keys:  4 bits: for each pair of subvectors 64 bytes, key k's at 4 (k % 16) + k / 16: the first's code in the low half
//!                    8 bits: for each subvector 64 bytes
//! ```
//! A query becomes a table: its products with every centroid. A key's score is the sum of the entries that its code names. Tables of 16
//! entries are rounded to bytes, so that a vector instruction looks up as many keys as it has bytes; sums of 16 bits, exact from there.
//!
//! The centroid of a cell is the mean of its keys, so scores are means of what they stand for and err by the spread inside cells:
//! `sigma^2 = sum_j q_j^T C_j q_j`, `C_j` the covariance of subvector j's residuals, one for all cells. The mean of `e^logit` in a cell
//! is then `e^(score + sigma^2 / 2)` as far as residuals are Gaussian.

mod scan;

use super::clusters::{Clusters, Pairs};
use super::head_rows::HeadRows;
use super::kmeans;
use super::snapshot::{Parameters, Saved};
use super::{Ask, Followed, Grow, Grown, Index, Pick, View, check_numbers, not_finite, numbers};
use crate::dense::rows::Strided;
use crate::kv::{KvStore, Reader};
use crate::parallel::{Execution, map};
use crate::retrieval::scan::{CodeError, RowCodes, pick};
use crate::simd::{self, Isa, dispatch};
use crate::tensor::{Element, Error, Result, TensorView, with_element};
use scan::{Entries, Scan, Tables};
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

/// Rows that a store must have before the first codes are made: fewer are always read exactly.
const FIRST_FIT: usize = 512;

/// Everything is fitted anew when the store has grown by this factor since.
const REFIT_GROWTH: usize = 4;

/// Keys of a block.
const BLOCK: usize = 64;

/// Rows that one item codes, whole blocks.
const CHUNK: usize = 2048;

/// Rows that centroids are fitted to.
const SAMPLE: usize = 16 * 1024;

const ITERATIONS: usize = 10;

/// The most subvectors of 4-bit codes: so many bytes add up in 15 bits.
const MAX_SUBVECTORS: usize = 128;

/// What the codes are made of.
#[derive(Clone, Debug)]
pub struct ProductOptions {
    /// Subvectors of a key; divides its width.
    pub subvectors: usize,
    /// Bits of a subvector's code: 4 or 8.
    pub bits: usize,
    /// Seed of the first centroids and of the value clusters.
    pub seed: u64,
    /// Matrices `[kv_heads, head_dim, head_dim]` that centred keys and queries are multiplied by (`y_o = sum_d m[o][d] x_d`), whose
    /// products keep inner products; `None` leaves both as they are.
    pub bases: Option<Bases>,
}

/// See [`ProductOptions::bases`].
#[derive(Clone, Debug)]
pub struct Bases {
    /// Of keys.
    pub keys: Vec<f32>,
    /// Of queries.
    pub queries: Vec<f32>,
}

#[derive(Clone, Default)]
struct Head {
    centre: Vec<f32>,
    /// `[subvectors, centroids, width]`.
    codebooks: Vec<f32>,
    /// `[subvectors, width, width]`: covariance of what the codes leave.
    residuals: Vec<f32>,
    codes: Vec<u8>,
    value_ids: Vec<u8>,
    values: Clusters,
}

#[derive(Clone)]
struct State {
    block_bytes: usize,
    /// Rows coded, whole blocks.
    coded: usize,
    /// Rows at the last fit.
    fitted: usize,
    heads: Vec<Head>,
}

impl State {
    fn forget(&mut self) {
        (self.coded, self.fitted) = (0, 0);
        self.heads.clear();
    }
}

impl Grow for State {
    fn wants(&self, len: usize) -> bool {
        let target = len / BLOCK * BLOCK;
        self.coded < target && (self.fitted > 0 || target >= FIRST_FIT)
    }

    fn cut(&mut self, len: usize) {
        let keep = len / BLOCK * BLOCK;
        if keep >= self.coded {
            return;
        }
        if keep < self.fitted / 2 || self.heads.iter_mut().any(|head| !head.values.take_back(keep)) {
            // Most of what was fitted is gone, or values that are gone have a part in the means.
            return self.forget();
        }
        self.coded = keep;
        for head in &mut self.heads {
            head.codes.truncate(keep / BLOCK * self.block_bytes);
            head.value_ids.truncate(keep);
        }
    }
}

/// An index of product codes over every key of a store.
///
/// Memory: `subvectors * bits / 8 + 1` bytes per key and KV head, plus centroids.
pub struct ProductQuantisation {
    options: ProductOptions,
    /// Width of a subvector.
    width: usize,
    state: Followed<State>,
}

impl ProductQuantisation {
    /// An index over a store, empty until it is first read.
    pub fn new(store: Arc<KvStore>, options: ProductOptions) -> Result<Self> {
        check_numbers(&store)?;
        let dim = store.head_dim();
        if options.bits != 4 && options.bits != 8 {
            return Err(Error::value("bits", options.bits, "4 or 8"));
        }
        let m = options.subvectors;
        if m == 0 || !dim.is_multiple_of(m) {
            return Err(Error::value("subvectors", m, format!("a divisor of the head_dim, {dim}")));
        }
        if options.bits == 4 && m > MAX_SUBVECTORS {
            return Err(Error::value("subvectors", m, format!("at most {MAX_SUBVECTORS} with 4 bits")));
        }
        if let Some(Bases { keys, queries }) = &options.bases {
            for matrix in [keys, queries] {
                if matrix.len() != store.kv_heads() * dim * dim || !matrix.iter().all(|x| x.is_finite()) {
                    let got = format!("{} numbers, or some not finite", matrix.len());
                    return Err(Error::value("bases", got, format!("[{}, {dim}, {dim}]", store.kv_heads())));
                }
            }
        }
        let empty = State { block_bytes: block_bytes(&options), coded: 0, fitted: 0, heads: Vec::new() };
        Ok(Self { width: dim / m, options, state: Followed::new(store, empty) })
    }

    /// What the codes are made of.
    pub fn options(&self) -> &ProductOptions {
        &self.options
    }

    /// The index that was saved, over a store that has its rows.
    pub(crate) fn load(store: Arc<KvStore>, mut saved: Saved) -> Result<Self> {
        let (heads, dim, value_dim) = (store.kv_heads(), store.head_dim(), store.value_dim());
        let bases = if saved.flag("query_weighted")? {
            let shape = [heads, dim, dim];
            Some(Bases { keys: saved.take("key_bases", &shape)?, queries: saved.take("query_bases", &shape)? })
        } else {
            None
        };
        let options = ProductOptions {
            subvectors: saved.integer("subvectors")? as usize,
            bits: saved.integer("bits")? as usize,
            seed: saved.integer("seed")?,
            bases,
        };
        let mut index = Self::new(Arc::clone(&store), options)?;
        let coded = saved.rows;
        if coded == 0 {
            return Ok(index);
        }
        if !coded.is_multiple_of(BLOCK) {
            return Err(Error::value("path", format!("{coded} rows with codes"), format!("a multiple of {BLOCK}")));
        }
        let mut state = index.state.look().clone();
        (state.coded, state.fitted) = (coded, saved.integer("fitted")? as usize);
        let (m, width, centroids) = (index.options.subvectors, index.width, 1usize << index.options.bits);
        for h in 0..heads {
            let head = Head {
                centre: saved.take(&format!("centre.{h}"), &[dim])?,
                codebooks: saved.take(&format!("codebooks.{h}"), &[m, centroids, width])?,
                residuals: saved.take(&format!("residuals.{h}"), &[m, width, width])?,
                codes: saved.take(&format!("codes.{h}"), &[coded / BLOCK * state.block_bytes])?,
                value_ids: saved.take(&format!("value_ids.{h}"), &[coded])?,
                values: Clusters::load(&mut saved, &h.to_string(), dim, value_dim)?,
            };
            if head.value_ids.iter().any(|&id| usize::from(id) >= head.values.len()) {
                return Err(Error::value("path", "a row of a value cluster that is not there", "clusters as saved"));
            }
            state.heads.push(head);
        }
        index.state = Followed::new(store, state);
        Ok(index)
    }

    fn extend(&self, state: &mut State, reader: &Reader, execution: &Execution) -> Result<()> {
        let target = reader.len() / BLOCK * BLOCK;
        let isa = simd::current();
        let (keys, values) = (numbers(reader.keys()), numbers(reader.values()));
        if state.fitted == 0 || target >= REFIT_GROWTH * state.fitted {
            state.heads = self.fit(isa, &keys, &values, target, execution)?;
            (state.coded, state.fitted) = (0, target);
        }
        let first = state.coded;
        let chunks = (target - first).div_ceil(CHUNK);
        let coded = map(execution, chunks * state.heads.len(), |i| {
            let (h, start) = (i / chunks, first + i % chunks * CHUNK);
            let range = start..(start + CHUNK).min(target);
            let codes = self.code(isa, &state.heads[h], &keys, h, range.clone())?;
            let (mut of_keys, mut of_values) = (Vec::new(), Vec::new());
            let keys = HeadRows::of(&reader.keys(), h, range.clone(), &mut of_keys);
            let values = HeadRows::of(&reader.values(), h, range.clone(), &mut of_values);
            let ids = with_element!(values.dtype(), T => {
                // SAFETY: the range lies inside the reader's rows.
                unsafe { state.heads[h].values.assign(isa, Pairs::<T>::of(&keys, &values), range) }
            });
            Ok((codes, ids))
        });
        let coded = match coded.and_then(|coded| coded.into_iter().collect::<Result<Vec<_>>>()) {
            Ok(coded) => coded,
            Err(error) => {
                if first == 0 {
                    // The fit may rest on the very rows that could not be coded.
                    state.forget();
                }
                return Err(error);
            }
        };
        for (i, (codes, ids)) in coded.iter().enumerate() {
            let head = &mut state.heads[i / chunks];
            head.codes.extend_from_slice(codes);
            head.value_ids.extend_from_slice(ids);
        }
        state.coded = target;
        for (h, head) in state.heads.iter_mut().enumerate() {
            head.values.keep_up(&reader.values(), h, &head.value_ids);
        }
        Ok(())
    }

    fn fit(
        &self,
        isa: Isa,
        keys: &TensorView,
        values: &TensorView,
        n: usize,
        execution: &Execution,
    ) -> Result<Vec<Head>> {
        let (heads, dim, size) = (keys.shape()[1], keys.shape()[3], n.min(SAMPLE));
        let (m, width) = (self.options.subvectors, self.width);
        let seed = |h: usize| self.options.seed ^ (h as u64) << 32;
        let samples = map(execution, heads, |h| {
            let rows: Vec<usize> = (0..size).map(|i| i * n / size).collect();
            let mut centre = vec![0f64; dim];
            with_element!(keys.dtype(), T => {
                for &j in &rows {
                    centre.iter_mut().zip(keys.row::<T>(0, h, j)).for_each(|(c, x)| *c += f64::from(x.to_f32()));
                }
            });
            let centre: Vec<f32> = centre.iter().map(|c| (c / size as f64) as f32).collect();
            if !centre.iter().all(|x| x.is_finite()) {
                return Err(first_not_finite(keys, h, n));
            }
            let sample = self.mapped(keys, h, rows.into_iter(), &centre)?;
            let values = Clusters::of(isa, [&(*keys).into(), &(*values).into()], h, n, seed(h));
            Ok((Head { centre, values, ..Head::default() }, sample))
        })?;
        let samples = samples.into_iter().collect::<Result<Vec<_>>>()?;
        let centroids = 1usize << self.options.bits;
        let fitted = map(execution, heads * m, |i| {
            let (h, j) = (i / m, i % m);
            let part: Vec<f32> =
                samples[h].1.chunks_exact(dim).flat_map(|row| &row[j * width..(j + 1) * width]).copied().collect();
            let fit = kmeans::fit(isa, &part, width, centroids, ITERATIONS, false, seed(h) ^ j as u64);
            let mut covariance = vec![0f64; width * width];
            let mut left = vec![0f64; width];
            for (row, &c) in part.chunks_exact(width).zip(&fit.nearest) {
                let centroid = &fit.centroids[c as usize * width..][..width];
                left.iter_mut().zip(row.iter().zip(centroid)).for_each(|(to, (x, c))| *to = f64::from(x - c));
                for (sums, a) in covariance.chunks_exact_mut(width).zip(&left) {
                    sums.iter_mut().zip(&left).for_each(|(sum, b)| *sum += a * b);
                }
            }
            (fit.centroids, covariance.into_iter().map(|x| (x / size as f64) as f32).collect::<Vec<_>>())
        })?;
        let mut made: Vec<Head> = samples.into_iter().map(|(head, _)| head).collect();
        for (i, (codebook, residual)) in fitted.into_iter().enumerate() {
            made[i / m].codebooks.extend(codebook);
            made[i / m].residuals.extend(residual);
        }
        Ok(made)
    }

    /// Rows of keys, less the centre, in the codes' space: `[rows, head_dim]`.
    fn mapped(
        &self,
        keys: &TensorView,
        head: usize,
        rows: impl ExactSizeIterator<Item = usize>,
        centre: &[f32],
    ) -> Result<Vec<f32>> {
        let dim = centre.len();
        let mut out = Vec::with_capacity(rows.len() * dim);
        let bases = self.options.bases.as_ref().map(|bases| &bases.keys[head * dim * dim..(head + 1) * dim * dim]);
        let mut x = vec![0f32; dim];
        for j in rows {
            with_element!(keys.dtype(), T => {
                let row = keys.row::<T>(0, head, j);
                x.iter_mut().zip(row.iter().zip(centre)).for_each(|(to, (x, c))| *to = x.to_f32() - c);
            });
            if !x.iter().all(|x| x.is_finite()) {
                return Err(not_finite(j, head));
            }
            match bases {
                Some(basis) => out.extend(basis.chunks_exact(dim).map(|row| dot(row, &x))),
                None => out.extend_from_slice(&x),
            }
        }
        Ok(out)
    }

    /// Codes of some rows, whole blocks.
    fn code(&self, isa: Isa, of: &Head, keys: &TensorView, head: usize, range: Range<usize>) -> Result<Vec<u8>> {
        let (n, width, dim) = (range.len(), self.width, of.centre.len());
        let (centroids, block_bytes) = (1usize << self.options.bits, block_bytes(&self.options));
        let x = self.mapped(keys, head, range, &of.centre)?;
        let mut codes = vec![0u8; n / BLOCK * block_bytes];
        for j in 0..self.options.subvectors {
            let rows = Strided { base: x[j * width..].as_ptr(), stride: dim as isize };
            let centroids = &of.codebooks[j * centroids * width..(j + 1) * centroids * width];
            let nearest = dispatch(isa, kmeans::Assign { centroids, dim: width, rows, range: 0..n });
            for (i, &code) in nearest.iter().enumerate() {
                let block = &mut codes[i / BLOCK * block_bytes..(i / BLOCK + 1) * block_bytes];
                if self.options.bits == 4 {
                    block[j / 2 * BLOCK + place(i % BLOCK)] |= (code as u8) << (4 * (j % 2));
                } else {
                    block[j * BLOCK + i % BLOCK] = code as u8;
                }
            }
        }
        Ok(codes)
    }
}

/// The byte of a key's 4-bit codes in a row of 64: sums of the bytes of each place in 32-bit lanes are those of neighbouring keys.
fn place(key: usize) -> usize {
    4 * (key % 16) + key / 16
}

/// Bytes of a block of codes.
fn block_bytes(options: &ProductOptions) -> usize {
    BLOCK * if options.bits == 4 { options.subvectors.div_ceil(2) } else { options.subvectors }
}

fn first_not_finite(keys: &TensorView, head: usize, n: usize) -> Error {
    let finite =
        |j: &usize| with_element!(keys.dtype(), T => keys.row::<T>(0, head, *j).iter().all(|x| x.to_f32().is_finite()));
    not_finite((0..n).find(|j| !finite(j)).unwrap_or(0), head)
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Index for ProductQuantisation {
    fn store(&self) -> &Arc<KvStore> {
        self.state.store()
    }

    fn kind(&self) -> &'static str {
        "product_quantisation"
    }

    fn estimates(&self) -> bool {
        true
    }

    fn len(&self) -> usize {
        self.state.look().coded
    }

    fn nbytes(&self) -> usize {
        let floats = |h: &Head| h.centre.len() + h.codebooks.len() + h.residuals.len();
        let bytes = |h: &Head| h.codes.len() + h.value_ids.len() + h.values.nbytes() + 4 * floats(h);
        let bases = self.options.bases.as_ref().map_or(0, |bases| 4 * (bases.keys.len() + bases.queries.len()));
        self.state.look().heads.iter().map(bytes).sum::<usize>() + bases
    }

    fn pending_operations(&self) -> f64 {
        let store = self.store();
        let rows = store.len().saturating_sub(self.len()) * store.kv_heads();
        let turns = if self.options.bases.is_some() { store.head_dim() } else { 0 };
        rows as f64 * store.head_dim() as f64 * ((1 << self.options.bits) + 2048 + turns) as f64
    }

    fn read<'a>(&'a self, reader: &'a Reader<'a>, execution: &Execution) -> Result<Box<dyn View + 'a>> {
        let state =
            self.state.read(reader, execution, |state, reader, execution| self.extend(state, reader, execution))?;
        Ok(Box::new(Snapshot { index: self, state }))
    }

    fn fork(&self, store: Arc<KvStore>) -> Result<Arc<dyn Index>> {
        Ok(Arc::new(Self { options: self.options.clone(), width: self.width, state: self.state.fork(store)? }))
    }

    fn parameters(&self) -> Parameters {
        let ProductOptions { subvectors, bits, seed, bases } = &self.options;
        let mut made = Parameters::new();
        made.insert("subvectors".into(), (*subvectors).into());
        made.insert("bits".into(), (*bits).into());
        made.insert("query_weighted".into(), bases.is_some().into());
        made.insert("seed".into(), (*seed).into());
        made
    }

    fn save(&self) -> Saved {
        let state = self.state.look();
        let mut saved = Saved::new(state.coded, self.parameters()).with("fitted", state.fitted);
        let (heads, dim) = (self.store().kv_heads(), self.store().head_dim());
        if let Some(Bases { keys, queries }) = &self.options.bases {
            let shape = [heads, dim, dim];
            saved = saved.tensor("key_bases", &shape, keys.clone()).tensor("query_bases", &shape, queries.clone());
        }
        let (m, width, centroids) = (self.options.subvectors, self.width, 1usize << self.options.bits);
        for (h, head) in state.heads.iter().enumerate() {
            saved = saved
                .tensor(format!("centre.{h}"), &[dim], head.centre.clone())
                .tensor(format!("codebooks.{h}"), &[m, centroids, width], head.codebooks.clone())
                .tensor(format!("residuals.{h}"), &[m, width, width], head.residuals.clone())
                .tensor(format!("codes.{h}"), &[head.codes.len()], head.codes.clone())
                .tensor(format!("value_ids.{h}"), &[head.value_ids.len()], head.value_ids.clone());
            saved = head.values.save(saved, &h.to_string());
        }
        saved
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

struct Snapshot<'a> {
    index: &'a ProductQuantisation,
    state: Grown<'a, State>,
}

impl View for Snapshot<'_> {
    fn covered(&self) -> usize {
        self.state.coded
    }

    fn pick(&self, ask: &Ask) -> Pick {
        pick(self, ask)
    }
}

impl RowCodes for Snapshot<'_> {
    type Group = Tables;

    fn block(&self) -> usize {
        BLOCK
    }

    fn block_bytes(&self) -> usize {
        self.state.block_bytes
    }

    fn group(&self, _isa: Isa, head: usize, queries: &[&[f32]]) -> Tables {
        let (of, width, m) = (&self.state.heads[head], self.index.width, self.index.options.subvectors);
        let (dim, centroids) = (of.centre.len(), 1usize << self.index.options.bits);
        let (mut bases, mut errors, mut tables) = (Vec::new(), Vec::new(), Vec::new());
        for q in queries {
            bases.push(dot(q, &of.centre));
            let turned: Vec<f32> = match &self.index.options.bases {
                Some(maps) => {
                    maps.queries[head * dim * dim..].chunks_exact(dim).take(dim).map(|row| dot(row, q)).collect()
                }
                None => q.to_vec(),
            };
            let mut table = Vec::with_capacity(m * centroids);
            let mut variance = 0f32;
            for (j, part) in turned.chunks_exact(width).enumerate() {
                let book = &of.codebooks[j * centroids * width..(j + 1) * centroids * width];
                table.extend(book.chunks_exact(width).map(|centroid| dot(centroid, part)));
                let covariance = &of.residuals[j * width * width..(j + 1) * width * width];
                variance += covariance.chunks_exact(width).zip(part).map(|(row, q)| q * dot(row, part)).sum::<f32>();
            }
            errors.push(variance.max(0.0).sqrt());
            tables.push(table);
        }
        let entries = if self.index.options.bits == 4 {
            Entries::rounded(&tables, &mut bases, centroids)
        } else {
            Entries::interleaved(&tables)
        };
        Tables { bases, entries, errors }
    }

    fn scan(
        &self,
        isa: Isa,
        head: usize,
        blocks: Range<usize>,
        tables: &Tables,
        scores: &mut [f32],
        stride: usize,
        _next: Option<usize>,
    ) {
        let bytes = self.state.block_bytes;
        let codes = &self.state.heads[head].codes[blocks.start * bytes..blocks.end * bytes];
        let m = self.index.options.subvectors;
        dispatch(isa, Scan { codes, m, block_bytes: bytes, tables, scores, stride });
    }

    fn error(&self, _head: usize, tables: &Tables, query: usize) -> CodeError {
        CodeError::of_means(tables.errors[query])
    }

    fn largest_error(&self, _head: usize, _tables: &Tables, _query: usize) -> Option<f32> {
        None
    }

    fn values(&self, head: usize) -> Option<(&Clusters, &[u8])> {
        Some((&self.state.heads[head].values, &self.state.heads[head].value_ids))
    }
}
