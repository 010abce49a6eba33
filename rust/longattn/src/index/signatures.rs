//! Signatures: a few bits per dimension of every key, which grow with the store.

use super::clusters::{Clusters, Pairs};
use super::codes::{AHEAD, BLOCK, Encode, Format, Scan, ScanGroup, ScanQuery};
use super::head_rows::{HeadRows, parts};
use super::project::Multiply;
use super::rotation::orthogonal;
use super::snapshot::{Parameters, Saved};
use super::{Ask, Estimates, Followed, Grow, Grown, Index, Pick, View, not_finite};
use crate::dense::matrix::{PackedMatrix, ROWS};
use crate::dense::rows::Strided;
use crate::dense::scratch::Buffer;
use crate::kv::{KvStore, Reader, prefer_huge_pages};
use crate::parallel::{Execution, map};
use crate::retrieval::scan::{self, CodeError, RowCodes};
use crate::simd::{self, Isa, Kernel, Simd, dispatch};
use crate::tensor::{Element, Error, Result, with_element};
use half::f16;
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

/// Rows that a store must have before the first codes are made: fewer are always read exactly.
const FIRST_FIT: usize = 512;

/// Mean key, scale and value clusters are fitted anew when the store has grown by this factor since.
const REFIT_GROWTH: usize = 4;

/// Rows that one item codes.
const CHUNK: usize = 2048;

/// Rows that are coded before their codes join the others: what a large store's codes need beside themselves.
const ROUND: usize = 64 * CHUNK;

/// Widest keys: the rotation takes `head_dim^2` numbers and `head_dim^3` operations to make.
const MAX_DIM: usize = 1024;

/// The longest key of a fit is this many units long: its factor, at most 3 times that, is far from both ends of f16.
const UNITS: f64 = 256.0;

/// What the codes are made of.
#[derive(Clone, Debug)]
pub struct SignatureOptions {
    /// Bits per dimension: 1, 2 or 4.
    pub bits: usize,
    /// Seed of the rotation and of the value clusters.
    pub seed: u64,
}

/// Codes, statistics and value clusters of one KV head.
#[derive(Clone)]
pub(crate) struct HeadCodes {
    /// Blocks of [`BLOCK`] keys.
    pub(crate) codes: Vec<u8>,
    centre: Vec<f32>,
    /// Factors are stored in units of this power of two.
    unit: f32,
    /// Standard deviations of the keys' estimates for a query of norm 1, with those of rows that were cut since.
    deviations: Moments,
    /// Cluster of each row's value.
    pub(crate) value_ids: Vec<u8>,
    pub(crate) values: Clusters,
}

#[derive(Clone, Copy, Debug, Default)]
struct Moments {
    count: u64,
    squares: f64,
    largest: f32,
}

impl Moments {
    fn add(&mut self, x: f32) {
        self.count += 1;
        self.squares += f64::from(x) * f64::from(x);
        self.largest = self.largest.max(x);
    }

    fn join(&mut self, other: Self) {
        self.count += other.count;
        self.squares += other.squares;
        self.largest = self.largest.max(other.largest);
    }

    fn rms(&self) -> f32 {
        (self.squares / self.count.max(1) as f64).sqrt() as f32
    }
}

/// How a head's estimated logits err, for a query of norm 1 at scale 1.
#[derive(Clone, Copy, Debug)]
pub struct HeadStats {
    /// Root mean square of the error's standard deviation over the keys.
    pub sigma: f32,
    /// Largest standard deviation of any key.
    pub sigma_max: f32,
}

#[derive(Clone)]
struct State {
    format: Format,
    /// Rows coded, a multiple of [`BLOCK`].
    coded: usize,
    /// Rows at the last fit.
    fitted: usize,
    heads: Vec<HeadCodes>,
}

/// An index of codes over every key of a store.
///
/// Memory: `bits * head_dim / 8 + 3` bytes per key and KV head, plus the value clusters.
pub struct Signatures {
    options: SignatureOptions,
    format: Format,
    /// `[head_dim, head_dim]`: what a key, less its centre, is multiplied by before it is coded.
    map: Vec<f32>,
    codes: Followed<State>,
}

/// The codes of a store at one moment.
pub(crate) struct Snapshot<'a> {
    index: &'a Signatures,
    state: Grown<'a, State>,
}

impl Signatures {
    /// An index over a store, empty until it is first read.
    pub fn new(store: Arc<KvStore>, options: SignatureOptions) -> Result<Self> {
        let dim = store.head_dim();
        if ![1, 2, 4].contains(&options.bits) {
            return Err(Error::value("bits", options.bits, "1, 2 or 4"));
        }
        if dim > MAX_DIM {
            return Err(Error::value("store", format!("head_dim {dim}"), format!("at most {MAX_DIM}")));
        }
        let (format, map) = (Format { bits: options.bits, dim }, orthogonal(dim, options.seed));
        let state = State { format, coded: 0, fitted: 0, heads: Vec::new() };
        Ok(Self { options, format, map, codes: Followed::new(store, state) })
    }

    /// What the codes are made of.
    pub fn options(&self) -> &SignatureOptions {
        &self.options
    }

    /// Error of each head's estimates; empty before the first codes.
    pub fn head_stats(&self) -> Vec<HeadStats> {
        let state = self.codes.look();
        (0..state.heads.len()).map(|h| state.stats(h)).collect()
    }

    fn store(&self) -> &Arc<KvStore> {
        self.codes.store()
    }

    fn saved(&self) -> Saved {
        let grown = self.codes.look();
        let mut saved = Saved::new(grown.coded, self.parameters()).with("fitted", grown.fitted);
        for (h, head) in grown.heads.iter().enumerate() {
            let Moments { count, squares, largest } = head.deviations;
            saved = saved
                .tensor(format!("codes.{h}"), &[head.codes.len()], head.codes.clone())
                .tensor(format!("centre.{h}"), &[head.centre.len()], head.centre.clone())
                .tensor(format!("value_ids.{h}"), &[head.value_ids.len()], head.value_ids.clone())
                .tensor(format!("unit.{h}"), &[1], vec![head.unit])
                .tensor(format!("deviations.{h}"), &[3], vec![count as f64, squares, f64::from(largest)]);
            saved = head.values.save(saved, &h.to_string());
        }
        saved
    }

    /// The index that was saved, over a store that has its rows.
    pub(crate) fn load(store: Arc<KvStore>, mut saved: Saved) -> Result<Self> {
        let (heads, dim, value_dim) = (store.kv_heads(), store.head_dim(), store.value_dim());
        let options = SignatureOptions { bits: saved.integer("bits")? as usize, seed: saved.integer("seed")? };
        let mut index = Self::new(Arc::clone(&store), options)?;
        let (format, coded) = (index.format, saved.rows);
        if coded == 0 {
            return Ok(index);
        }
        if coded % BLOCK != 0 {
            return Err(Error::value("path", format!("{coded} rows with codes"), format!("a multiple of {BLOCK}")));
        }
        let mut state = State { format, coded, fitted: saved.integer("fitted")? as usize, heads: Vec::new() };
        for h in 0..heads {
            let deviations: Vec<f64> = saved.take(&format!("deviations.{h}"), &[3])?;
            let unit: Vec<f32> = saved.take(&format!("unit.{h}"), &[1])?;
            let head = HeadCodes {
                codes: saved.take(&format!("codes.{h}"), &[coded / BLOCK * format.block_bytes()])?,
                centre: saved.take(&format!("centre.{h}"), &[dim])?,
                unit: unit[0],
                deviations: Moments {
                    count: deviations[0] as u64,
                    squares: deviations[1],
                    largest: deviations[2] as f32,
                },
                value_ids: saved.take(&format!("value_ids.{h}"), &[coded])?,
                values: Clusters::load(&mut saved, &h.to_string(), dim, value_dim)?,
            };
            if head.value_ids.iter().any(|&id| usize::from(id) >= head.values.len()) {
                return Err(Error::value("path", "a row of a value cluster that is not there", "clusters as saved"));
            }
            state.heads.push(head);
        }
        index.codes = Followed::new(store, state);
        Ok(index)
    }

    /// Brings the codes up to `reader`. Leaves them as they were, or shorter, on an error.
    fn follow(&self, state: &mut State, reader: &Reader, execution: &Execution) -> Result<()> {
        let target = reader.len() / BLOCK * BLOCK;
        let isa = simd::current();
        let grown = state.fitted == 0 || target >= REFIT_GROWTH * state.fitted;
        if grown || !self.code(isa, state, reader, target, execution)? {
            state.heads = self.fit(isa, reader, target, execution)?;
            (state.coded, state.fitted) = (0, target);
            let coded = self.code(isa, state, reader, target, execution);
            if coded.is_err() {
                // The fit may rest on the very rows that could not be coded.
                state.forget();
            }
            assert!(coded?, "a fresh unit fits every key");
        }
        self.average(state, reader);
        Ok(())
    }

    /// Brings the value clusters' means up to the rows coded.
    fn average(&self, state: &mut State, reader: &Reader) {
        for (h, head) in state.heads.iter_mut().enumerate() {
            head.values.keep_up(&reader.values(), h, &head.value_ids);
        }
    }

    /// Centres, scales and value clusters of the rows `0..n`.
    fn fit(&self, isa: Isa, reader: &Reader, n: usize, execution: &Execution) -> Result<Vec<HeadCodes>> {
        let (keys, values) = (reader.keys(), reader.values());
        let [_, heads, _, dim] = keys.shape();
        let made = map(execution, heads, |h| {
            let mut centre = vec![0f64; dim];
            let mut memory = Vec::new();
            for part in parts(&keys, 0..n) {
                let rows = HeadRows::of(&keys, h, part.clone(), &mut memory);
                with_element!(rows.dtype(), T => for j in part {
                    centre.iter_mut().zip(rows.row::<T>(j)).for_each(|(c, x)| *c += f64::from(x.to_f32()));
                });
            }
            let centre: Vec<f32> = centre.iter().map(|c| (c / n as f64) as f32).collect();
            let (mut longest, mut bad) = (0f64, None);
            let all_finite = centre.iter().all(|x| x.is_finite());
            for part in parts(&keys, 0..n) {
                let rows = HeadRows::of(&keys, h, part.clone(), &mut memory);
                with_element!(rows.dtype(), T => for j in part {
                    let row = rows.row::<T>(j);
                    if all_finite {
                        let square = row.iter().zip(&centre).map(|(x, c)| f64::from(x.to_f32() - c).powi(2)).sum();
                        longest = longest.max(square);
                    } else if !row.iter().all(|x| x.to_f32().is_finite()) {
                        bad = bad.or(Some(j));
                    }
                });
            }
            if !all_finite {
                return Err(not_finite(bad.unwrap_or(0), h));
            }
            let longest = longest.sqrt();
            let unit =
                if longest.is_finite() { (longest / UNITS).log2().round().clamp(-100.0, 100.0).exp2() } else { 1.0 };
            Ok(HeadCodes {
                codes: Vec::new(),
                centre,
                unit: unit as f32,
                deviations: Moments::default(),
                value_ids: Vec::new(),
                values: Clusters::of(isa, [&keys, &values], h, n, self.options.seed ^ h as u64),
            })
        })?;
        made.into_iter().collect()
    }

    /// Codes the rows `state.coded..target`. Returns false where a key is too long for its head's unit.
    fn code(&self, isa: Isa, state: &mut State, reader: &Reader, target: usize, execution: &Execution) -> Result<bool> {
        while state.coded < target {
            let end = (state.coded + ROUND).min(target);
            if !self.code_round(isa, state, reader, end, execution)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// As [`Self::code`], all rows or none.
    fn code_round(
        &self,
        isa: Isa,
        state: &mut State,
        reader: &Reader,
        target: usize,
        execution: &Execution,
    ) -> Result<bool> {
        let (keys, values) = (reader.keys(), reader.values());
        let heads = keys.shape()[1];
        let first = state.coded;
        let chunks = (target - first).div_ceil(CHUNK);
        let coded: Option<Vec<_>> = map(execution, heads * chunks, |i| {
            let (h, chunk) = (i / chunks, i % chunks);
            let start = first + chunk * CHUNK;
            let range = start..(start + CHUNK).min(target);
            let (mut of_keys, mut of_values) = (Vec::new(), Vec::new());
            let keys = HeadRows::of(&keys, h, range.clone(), &mut of_keys);
            let values = HeadRows::of(&values, h, range.clone(), &mut of_values);
            with_element!(keys.dtype(), T => {
                let rows = keys.strided::<T>();
                let coded = dispatch(isa, CodeRows { index: self, head: h, state, rows, range: range.clone() })?;
                let Some(coded) = coded else { return Ok(None) };
                // SAFETY: the range lies inside the reader's rows.
                let ids = unsafe { state.heads[h].values.assign(isa, Pairs::<T>::of(&keys, &values), range) };
                Ok(Some((coded, ids)))
            })
        })?
        .into_iter()
        .collect::<Result<_>>()?;
        let Some(coded) = coded else { return Ok(false) };
        for (i, ((codes, deviations), ids)) in coded.into_iter().enumerate() {
            let head = &mut state.heads[i / chunks.max(1)];
            extend(&mut head.codes, &codes, (target - first) / BLOCK * self.format.block_bytes());
            head.deviations.join(deviations);
            extend(&mut head.value_ids, &ids, target - first);
        }
        state.coded = target;
        Ok(true)
    }
}

/// Appends to a long vector that grows by an eighth, not by doubling: `coming` bytes are on their way, these among them.
fn extend(to: &mut Vec<u8>, bytes: &[u8], coming: usize) {
    if to.capacity() - to.len() < bytes.len() {
        to.reserve_exact(coming.max(to.len() / 8));
        prefer_huge_pages(to.spare_capacity_mut());
    }
    to.extend_from_slice(bytes);
}

type Coded = (Vec<u8>, Moments);

/// Codes the rows of one head; `None` where a factor is beyond f16.
struct CodeRows<'a, T> {
    index: &'a Signatures,
    head: usize,
    state: &'a State,
    rows: Strided<T>,
    range: Range<usize>,
}

impl<T: Element> Kernel for CodeRows<'_, T> {
    type Output = Result<Option<Coded>>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Result<Option<Coded>> {
        let Self { index, head, state, rows, range } = self;
        let (format, codes) = (index.format, &state.heads[head]);
        let mut matrix = PackedMatrix::new(s, &index.map, format.dim, format.dim);
        let (mut out, mut wide) = (vec![0f32; matrix.result_len::<S>()], Buffer::default());
        let mut packed = vec![0u8; range.len() / BLOCK * format.block_bytes()];
        let mut levels = vec![0u8; format.padded_dim()];
        let mut deviations = Moments::default();
        let width = format.dim.next_multiple_of(S::LANES);
        for first in range.clone().step_by(ROWS) {
            let count = ROWS.min(range.end - first);
            // SAFETY: the range lies inside the rows that the caller's reader sees.
            unsafe { matrix.apply(s, rows, first, count, Some(&codes.centre), &mut wide, &mut out) };
            for r in 0..count {
                let x = &out[r * matrix.stride::<S>()..][..width];
                let (f, kappa) = Encode { format, x, levels: &mut levels }.run(s);
                deviations.add(f * kappa);
                let factor = f / codes.unit;
                if !factor.is_finite() || x[..format.dim].iter().any(|x| !x.is_finite()) {
                    return Err(not_finite(first + r, head));
                }
                let factor = f16::from_f32(factor);
                if factor.is_infinite() {
                    return Ok(None);
                }
                let at = first - range.start + r;
                let block = &mut packed[at / BLOCK * format.block_bytes()..][..format.block_bytes()];
                format.write(block, at % BLOCK, &levels, factor);
            }
        }
        Ok(Some((packed, deviations)))
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
            head.codes.truncate(keep / BLOCK * self.format.block_bytes());
            head.value_ids.truncate(keep);
        }
    }
}

impl State {
    /// Forgets everything.
    fn forget(&mut self) {
        (self.coded, self.fitted) = (0, 0);
        self.heads.clear();
    }

    fn stats(&self, head: usize) -> HeadStats {
        let deviations = &self.heads[head].deviations;
        HeadStats { sigma: deviations.rms(), sigma_max: deviations.largest }
    }
}

impl Index for Signatures {
    fn store(&self) -> &Arc<KvStore> {
        self.codes.store()
    }

    fn kind(&self) -> &'static str {
        "signatures"
    }

    fn estimates(&self) -> bool {
        true
    }

    fn weighs_rows(&self) -> bool {
        true
    }

    fn len(&self) -> usize {
        self.codes.look().coded
    }

    fn nbytes(&self) -> usize {
        let grown = self.codes.look();
        let bytes = |h: &HeadCodes| h.codes.len() + h.value_ids.len() + h.values.nbytes() + 4 * h.centre.len();
        grown.heads.iter().map(bytes).sum::<usize>() + 4 * self.map.len()
    }

    fn pending_operations(&self) -> f64 {
        // Coding costs about head_dim multiply-adds per number of the new keys, the clusters' fit a few times that.
        let store = self.store();
        let rows = store.len().saturating_sub(self.len()) * store.kv_heads();
        (rows * store.head_dim() * (store.head_dim() + 2048)) as f64
    }

    fn read<'a>(&'a self, reader: &'a Reader<'a>, execution: &Execution) -> Result<Box<dyn View + 'a>> {
        let state =
            self.codes.read(reader, execution, |state, reader, execution| self.follow(state, reader, execution))?;
        Ok(Box::new(Snapshot { index: self, state }))
    }

    fn fork(&self, store: Arc<KvStore>) -> Result<Arc<dyn Index>> {
        let codes = self.codes.fork(store)?;
        Ok(Arc::new(Self { options: self.options.clone(), format: self.format, map: self.map.clone(), codes }))
    }

    fn parameters(&self) -> Parameters {
        let SignatureOptions { bits, seed } = &self.options;
        let mut parameters = Parameters::new();
        parameters.insert("bits".into(), (*bits).into());
        parameters.insert("seed".into(), (*seed).into());
        parameters
    }

    fn save(&self) -> Saved {
        self.saved()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl View for Snapshot<'_> {
    fn covered(&self) -> usize {
        self.state.coded
    }

    fn pick(&self, ask: &Ask) -> Pick {
        scan::pick(self, ask)
    }

    fn weigh<'a>(&'a self, ask: &Ask) -> Option<Box<dyn Estimates + 'a>> {
        scan::weigh(self, ask)
    }
}

impl RowCodes for Snapshot<'_> {
    type Group = ScanGroup;

    fn block(&self) -> usize {
        BLOCK
    }

    fn block_bytes(&self) -> usize {
        self.index.format.block_bytes()
    }

    fn group(&self, isa: Isa, head: usize, queries: &[&[f32]]) -> ScanGroup {
        let queries = queries.iter().map(|query| self.query(isa, head, query)).collect();
        ScanGroup::new(isa, self.index.format, queries)
    }

    fn scan(
        &self,
        isa: Isa,
        head: usize,
        blocks: Range<usize>,
        group: &ScanGroup,
        scores: &mut [f32],
        stride: usize,
        next: Option<usize>,
    ) {
        let (format, bytes) = (self.index.format, self.block_bytes());
        let ahead = next.map_or(AHEAD, |next| (next - blocks.start) * bytes);
        let codes = &self.state.heads[head].codes[blocks.start * bytes..blocks.end * bytes];
        dispatch(isa, Scan { format, codes, group, scores, stride, ahead });
    }

    fn error(&self, head: usize, group: &ScanGroup, query: usize) -> CodeError {
        CodeError::of_noise(self.state.stats(head).sigma * group.queries[query].norm)
    }

    fn largest_error(&self, head: usize, group: &ScanGroup, query: usize) -> Option<f32> {
        Some(self.state.stats(head).sigma_max * group.queries[query].norm)
    }

    fn values(&self, head: usize) -> Option<(&Clusters, &[u8])> {
        let of_head = &self.state.heads[head];
        Some((&of_head.values, &of_head.value_ids))
    }
}

impl Snapshot<'_> {
    /// A scaled query made ready for the scan of a head's codes.
    fn query(&self, isa: Isa, head: usize, query: &[f32]) -> ScanQuery {
        let codes = &self.state.heads[head];
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let mapped = dispatch(isa, Multiply { matrix: &self.index.map, query });
        let mut scan = ScanQuery::new(self.index.format, &mapped, dot(query, &codes.centre));
        scan.scale *= codes.unit;
        scan.norm = dot(query, query).sqrt();
        scan
    }
}
