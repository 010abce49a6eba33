//! LSH tables: rows are sampled for a query by the buckets they share with it, and weighted by the chance they had (MagicPIG).
//!
//! Each of `L` tables has `K` random directions; a key, less its head's mean key, is in the bucket that the `K` signs of its products
//! name. A key at angle `a` from a query shares one table's bucket with it with chance `p^K`, `p = 1 - a / pi`, and at least two with
//!
//! ```text
//! u = 1 - (1 - p^K)^L - L p^K (1 - p^K)^(L - 1)
//! ```
//! A row that does is read, with its logit raised by `-ln u`: the sums of the softmax are unbiased over the directions.

mod tables;

use super::project::{Coder, Multiply, Projection, code_rows};
use super::rotation::Random;
use super::snapshot::{Parameters, Saved};
use super::{Ask, Followed, Grow, Grown, Index, Pick, View, check_numbers, not_finite, numbers};
use crate::dense::rows::{Row, Rows, Strided};
use crate::kv::{KvStore, Reader};
use crate::parallel::{Execution, for_each, map};
use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Element, Error, Result, with_element};
use std::any::Any;
use std::sync::{Arc, Mutex};
use tables::{Meet, Tables};

/// Rows that a store must have before the tables are made: fewer are always read exactly.
const FIRST_FIT: usize = 512;

/// The mean key is fitted anew, and the tables made anew, when the store has grown by this factor since.
const REFIT_GROWTH: usize = 4;

/// Rows are hashed this many at a time.
const GRAIN: usize = 64;

/// Rows that are hashed before they join the tables.
const ROUND: usize = 4 * tables::TAIL;

/// What the tables are made of.
#[derive(Clone, Copy, Debug)]
pub struct LshOptions {
    /// Tables, 2 to 255.
    pub tables: usize,
    /// Bits of a bucket's number, at most 16. With none, all rows share the one bucket.
    pub bits: usize,
    /// Seed of the directions.
    pub seed: u64,
}

/// An index of hash tables, which samples rows.
///
/// Memory: `2 tables + 4` bytes per key and KV head, and the buckets' ends.
pub struct LshTables {
    options: LshOptions,
    /// `[tables * bits, head_dim]`, shared by the heads.
    directions: Arc<Vec<f32>>,
    chances: Arc<Chances>,
    content: Followed<Content>,
}

#[derive(Clone)]
struct Content {
    rows: usize,
    /// Rows at the last fit; 0 before the first.
    fitted: usize,
    heads: Vec<Head>,
}

#[derive(Clone)]
struct Head {
    centre: Vec<f32>,
    tables: Tables,
    /// Norms of the rows, less the centre.
    norms: Vec<f32>,
}

impl Grow for Content {
    fn wants(&self, len: usize) -> bool {
        self.rows < len / GRAIN * GRAIN && (self.fitted > 0 || len >= FIRST_FIT)
    }

    fn cut(&mut self, len: usize) {
        let len = len / GRAIN * GRAIN;
        if len >= self.rows {
            return;
        }
        if len < self.fitted / 2 {
            // Most of what the mean was fitted to is gone.
            (self.rows, self.fitted) = (0, 0);
            self.heads.clear();
            return;
        }
        self.rows = len;
        for head in &mut self.heads {
            head.tables.cut(len);
            head.norms.truncate(len);
        }
    }
}

/// Buckets and norms of some rows.
struct Buckets {
    options: LshOptions,
    /// `[rows, tables]`.
    buckets: Vec<u16>,
    norms: Vec<f32>,
}

impl Coder for Buckets {
    const NORM: bool = true;

    #[inline(always)]
    fn row<S: Simd>(&mut self, _: S, at: usize, x: &[f32], norm: f32) {
        let LshOptions { tables, bits, .. } = self.options;
        bucket_numbers(x, bits, &mut self.buckets[at * tables..(at + 1) * tables]);
        self.norms[at] = norm;
    }
}

#[inline(always)]
fn bucket_numbers(x: &[f32], bits: usize, buckets: &mut [u16]) {
    for (l, bucket) in buckets.iter_mut().enumerate() {
        let mut number = 0;
        for (t, &x) in x[l * bits..(l + 1) * bits].iter().enumerate() {
            number |= u16::from(x > 0.0) << t;
        }
        *bucket = number;
    }
}

impl LshTables {
    /// An index over a store, empty until it is first read.
    pub fn new(store: Arc<KvStore>, options: LshOptions) -> Result<Self> {
        check_numbers(&store)?;
        if !(2..=255).contains(&options.tables) {
            return Err(Error::value("tables", options.tables, "2 to 255"));
        }
        if options.bits > 16 {
            return Err(Error::value("bits", options.bits, "0 to 16"));
        }
        let mut random = Random::new(options.seed);
        let numbers = options.tables * options.bits * store.head_dim();
        let directions = (0..numbers).map(|_| random.normal() as f32).collect();
        let content = Content { rows: 0, fitted: 0, heads: Vec::new() };
        Ok(Self {
            options,
            directions: Arc::new(directions),
            chances: Arc::new(Chances::new(options)),
            content: Followed::new(store, content),
        })
    }

    fn extend(&self, content: &mut Content, reader: &Reader, execution: &Execution) -> Result<()> {
        let target = reader.len() / GRAIN * GRAIN;
        if content.fitted == 0 || target >= REFIT_GROWTH * content.fitted {
            content.heads = self.fit(reader, target, execution)?;
            (content.rows, content.fitted) = (0, target);
        }
        let LshOptions { tables, bits, .. } = self.options;
        while content.rows < target {
            let end = (content.rows + ROUND).min(target);
            let make = |rows: usize| Buckets {
                options: self.options,
                buckets: vec![0; rows * tables],
                norms: vec![0.0; rows],
            };
            let centres: Vec<&[f32]> = content.heads.iter().map(|head| &head.centre[..]).collect();
            let project = |head: usize| Projection {
                matrix: &self.directions,
                outputs: tables * bits,
                centre: Some(centres[head]),
            };
            let coded = match code_rows(simd::current(), reader, content.rows..end, project, make, execution) {
                Ok(coded) => coded,
                Err(error) => {
                    if content.rows == 0 {
                        // The fit may rest on the very rows that could not be hashed.
                        content.fitted = 0;
                        content.heads.clear();
                    }
                    return Err(error);
                }
            };
            let work: Vec<_> = content.heads.iter_mut().zip(coded).map(Mutex::new).collect();
            // Not stopped in between: all heads have the same rows.
            for_each(&Execution::default(), work.len(), |h| {
                let mut work = work[h].lock().unwrap_or_else(|e| e.into_inner());
                let (head, pieces) = &mut *work;
                for piece in pieces.iter() {
                    head.tables.extend(&piece.buckets);
                    head.norms.extend_from_slice(&piece.norms);
                }
            })?;
            drop(work);
            content.rows = end;
        }
        Ok(())
    }

    /// Mean keys of the rows `0..n`, and empty tables.
    fn fit(&self, reader: &Reader, n: usize, execution: &Execution) -> Result<Vec<Head>> {
        let keys = numbers(reader.keys());
        let LshOptions { tables, bits, .. } = self.options;
        with_element!(keys.dtype(), T => {
            map(execution, keys.shape()[1], |h| {
                let mut sum = vec![0f64; keys.shape()[3]];
                for j in 0..n {
                    sum.iter_mut().zip(keys.row::<T>(0, h, j)).for_each(|(c, x)| *c += f64::from(x.to_f32()));
                }
                let centre: Vec<f32> = sum.iter().map(|c| (c / n as f64) as f32).collect();
                if !centre.iter().all(|x| x.is_finite()) {
                    let finite = |j: &usize| keys.row::<T>(0, h, *j).iter().all(|x| x.to_f32().is_finite());
                    return Err(not_finite((0..n).find(|j| !finite(j)).unwrap_or(0), h));
                }
                Ok(Head { centre, tables: Tables::new(tables, 1 << bits), norms: Vec::new() })
            })?
            .into_iter()
            .collect()
        })
    }

    /// The index that was saved, over a store that has its rows.
    pub(crate) fn load(store: Arc<KvStore>, mut saved: Saved) -> Result<Self> {
        let options = LshOptions {
            tables: saved.integer("tables")? as usize,
            bits: saved.integer("bits")? as usize,
            seed: saved.integer("seed")?,
        };
        let mut index = Self::new(Arc::clone(&store), options)?;
        let (rows, fitted, tables) = (saved.rows, saved.integer("fitted")? as usize, options.tables);
        if (rows == 0) != (fitted == 0) {
            return Err(Error::value("path", format!("{rows} rows of a fit to {fitted}"), "both or none"));
        }
        let mut content = Content { rows, fitted, heads: Vec::new() };
        for h in 0..if rows > 0 { store.kv_heads() } else { 0 } {
            let buckets: Vec<u16> = saved.take(&format!("buckets.{h}"), &[tables, rows])?;
            if buckets.iter().any(|&bucket| usize::from(bucket) >> options.bits != 0) {
                return Err(Error::value("path", "a bucket that is not there", format!("{} bits", options.bits)));
            }
            let mut head = Head {
                centre: saved.take(&format!("centre.{h}"), &[store.head_dim()])?,
                tables: Tables::new(tables, 1 << options.bits),
                norms: saved.take(&format!("norms.{h}"), &[rows])?,
            };
            let by_row: Vec<u16> =
                (0..rows).flat_map(|r| (0..tables).map(move |l| (l, r))).map(|(l, r)| buckets[l * rows + r]).collect();
            head.tables.extend(&by_row);
            content.heads.push(head);
        }
        index.content = Followed::new(store, content);
        Ok(index)
    }
}

impl Index for LshTables {
    fn store(&self) -> &Arc<KvStore> {
        self.content.store()
    }

    fn kind(&self) -> &'static str {
        "lsh"
    }

    fn estimates(&self) -> bool {
        false
    }

    fn len(&self) -> usize {
        self.content.look().rows
    }

    fn nbytes(&self) -> usize {
        let bytes = |head: &Head| head.tables.nbytes() + 4 * (head.norms.len() + head.centre.len());
        self.content.look().heads.iter().map(bytes).sum::<usize>() + 4 * self.directions.len()
    }

    fn pending_operations(&self) -> f64 {
        let store = self.store();
        let rows = store.len().saturating_sub(self.len()) * store.kv_heads();
        rows as f64 * (self.directions.len() + 16 * self.options.tables) as f64
    }

    fn read<'a>(&'a self, reader: &'a Reader<'a>, execution: &Execution) -> Result<Box<dyn View + 'a>> {
        let content = self
            .content
            .read(reader, execution, |content, reader, execution| self.extend(content, reader, execution))?;
        Ok(Box::new(Snapshot { index: self, content }))
    }

    fn fork(&self, store: Arc<KvStore>) -> Result<Arc<dyn Index>> {
        let content = self.content.fork(store)?;
        let (directions, chances) = (Arc::clone(&self.directions), Arc::clone(&self.chances));
        Ok(Arc::new(Self { options: self.options, directions, chances, content }))
    }

    fn parameters(&self) -> Parameters {
        let mut parameters = Parameters::new();
        parameters.insert("tables".into(), self.options.tables.into());
        parameters.insert("bits".into(), self.options.bits.into());
        parameters.insert("seed".into(), self.options.seed.into());
        parameters
    }

    fn save(&self) -> Saved {
        let content = self.content.look();
        let mut saved = Saved::new(content.rows, self.parameters()).with("fitted", content.fitted);
        for (h, head) in content.heads.iter().enumerate() {
            saved = saved
                .tensor(format!("buckets.{h}"), &[self.options.tables, content.rows], head.tables.all())
                .tensor(format!("centre.{h}"), &[head.centre.len()], head.centre.clone())
                .tensor(format!("norms.{h}"), &[content.rows], head.norms.clone());
        }
        saved
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The tables at one moment.
struct Snapshot<'a> {
    index: &'a LshTables,
    content: Grown<'a, Content>,
}

/// A row that was met: by which query, in how many tables.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Met {
    row: u32,
    query: u8,
    tables: u8,
}

impl View for Snapshot<'_> {
    fn covered(&self) -> usize {
        self.content.rows
    }

    fn pick(&self, ask: &Ask) -> Pick {
        let super::Select::TopK(k) = ask.select else { unreachable!("tables estimate no mass") };
        let (index, head, group) = (self.index, &self.content.heads[ask.head], ask.queries.len());
        let LshOptions { tables, bits, .. } = index.options;
        let meet = |g: usize| {
            let products = dispatch(ask.isa, Multiply { matrix: &index.directions, query: ask.queries[g] });
            let mut query = vec![0; tables];
            bucket_numbers(&products, bits, &mut query);
            dispatch(ask.isa, Meet { tables: &head.tables, query: &query, inside: ask.candidates.clone() })
        };
        let found = match ask.parallel {
            // A cancelled call's results are never seen.
            Some(execution) => map(execution, group, meet).unwrap_or_default(),
            None => (0..group).map(meet).collect(),
        };
        let mut entries = 0;
        let mut met: Vec<Met> = Vec::new();
        for (g, (rows, looked_at)) in found.into_iter().enumerate() {
            entries += looked_at;
            met.extend(rows.into_iter().map(|(row, tables)| Met { row, query: g as u8, tables }));
        }
        met.sort_unstable();
        let mut rows: Vec<u32> = met.iter().map(|met| met.row).collect();
        rows.dedup();
        if rows.len() > k {
            rows = most_met(&met, rows.len(), k);
            met.retain(|met| rows.binary_search(&met.row).is_ok());
        }
        let log_weights = self.log_weights(ask, &rows, &met);
        let bytes = 2 * entries + group * 8 * tables * (1 + self.content.rows / tables::TAIL);
        Pick { rows, log_weights: Some(log_weights), scored: ask.candidates.len(), bytes, ..Pick::default() }
    }
}

/// The `k` of `n` rows that are met in the most tables by the queries together, ascending; ties go to the lower row.
fn most_met(met: &[Met], n: usize, k: usize) -> Vec<u32> {
    let mut totals: Vec<(std::cmp::Reverse<u32>, u32)> = Vec::with_capacity(n);
    for of_row in met.chunk_by(|a, b| a.row == b.row) {
        totals.push((std::cmp::Reverse(of_row.iter().map(|met| u32::from(met.tables)).sum()), of_row[0].row));
    }
    totals.select_nth_unstable(k);
    let mut rows: Vec<u32> = totals[..k].iter().map(|(_, row)| *row).collect();
    rows.sort_unstable();
    rows
}

impl Snapshot<'_> {
    /// `[queries, rows]`: minus the log of the chance with which a query meets a row, where it met it.
    fn log_weights(&self, ask: &Ask, rows: &[u32], met: &[Met]) -> Vec<f32> {
        let head = &self.content.heads[ask.head];
        let keys = numbers(ask.keys);
        let dots = with_element!(keys.dtype(), T => {
            let keys = Strided { base: keys.head::<T>(0, ask.head), stride: keys.row_stride() };
            dispatch(ask.isa, Dots { queries: ask.queries, keys, rows })
        });
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let with_centre: Vec<f32> = ask.queries.iter().map(|q| dot(q, &head.centre) as f32).collect();
        let norms: Vec<f32> = ask.queries.iter().map(|q| dot(q, q).sqrt() as f32).collect();
        let mut weights = vec![f32::NEG_INFINITY; dots.len()];
        let mut at = 0;
        for met in met {
            while rows[at] < met.row {
                at += 1;
            }
            let (g, place) = (usize::from(met.query), usize::from(met.query) * rows.len() + at);
            let (q, k) = (norms[g], head.norms[met.row as usize]);
            let cosine = match (q > 0.0, k > 0.0) {
                (true, true) => ((dots[place] - with_centre[g]) / (q * k)).clamp(-1.0, 1.0),
                // A zero vector is always in bucket 0, where another is with chance 1/2 a bit, and another zero always.
                (false, false) => 1.0,
                _ => 0.0,
            };
            weights[place] = -self.index.chances.log(cosine);
        }
        weights
    }
}

/// Products of queries and some keys, `[queries, rows]`.
struct Dots<'a, T> {
    queries: &'a [&'a [f32]],
    keys: Strided<T>,
    rows: &'a [u32],
}

impl<T: Element> Kernel for Dots<'_, T> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let Self { queries, keys, rows } = self;
        let mut dots = vec![0f32; queries.len() * rows.len()];
        let dim = queries.first().map_or(0, |q| q.len());
        let (whole, rest) = (dim / S::LANES * S::LANES, dim % S::LANES);
        for (i, &row) in rows.iter().enumerate() {
            keys.row(rows[(i + 8).min(rows.len() - 1)] as usize).prefetch(dim);
            let key = keys.row(row as usize);
            for (g, four) in queries.chunks(4).enumerate() {
                let mut sums = [[s.zero(); 4]; 1];
                // SAFETY: the rows are candidates, rows of the store of `dim` numbers, as many as every query has.
                unsafe {
                    for d in (0..whole).step_by(S::LANES) {
                        let k = key.load(s, d);
                        for (n, q) in four.iter().enumerate() {
                            sums[0][n] = s.fma(k, s.load(q.as_ptr().add(d)), sums[0][n]);
                        }
                    }
                    if rest > 0 {
                        let k = key.load_first(s, whole, rest);
                        for (n, q) in four.iter().enumerate() {
                            sums[0][n] = s.fma(k, s.load_first(q.as_ptr().add(whole), rest), sums[0][n]);
                        }
                    }
                }
                let sums = s.sums(sums);
                for n in 0..four.len() {
                    dots[(4 * g + n) * rows.len() + i] = sums[0][n];
                }
            }
        }
        dots
    }
}

/// Logarithms of the chance to meet in at least two tables.
struct Chances {
    options: LshOptions,
    /// At `sin(angle / 2) = i / STEPS`.
    logs: Vec<f32>,
}

impl Chances {
    const STEPS: usize = 4096;
    /// Nearly opposite vectors, whose chance changes too fast to interpolate.
    const EXACT: f32 = 0.9;

    fn new(options: LshOptions) -> Self {
        let mut chances = Self { options, logs: Vec::new() };
        let angle = |i: usize| 2.0 * (i as f64 / Self::STEPS as f64).asin();
        chances.logs = (0..=Self::STEPS).map(|i| chances.exact(angle(i)) as f32).collect();
        chances
    }

    fn log(&self, cosine: f32) -> f32 {
        let sine = ((1.0 - cosine) * 0.5).sqrt();
        if sine > Self::EXACT {
            return self.exact(f64::from(cosine).acos()) as f32;
        }
        let at = sine * Self::STEPS as f32;
        let (i, part) = (at as usize, at.fract());
        self.logs[i] + part * (self.logs[i + 1] - self.logs[i])
    }

    /// `ln u` of an angle.
    fn exact(&self, angle: f64) -> f64 {
        let (l, k) = (self.options.tables as f64, self.options.bits as f64);
        // What met has some chance, whatever rounding says.
        let p = (1.0 - angle / std::f64::consts::PI).max(1e-9);
        // Chance of one table.
        let q = p.powf(k);
        let u = if l * q < 1e-3 {
            // The first terms of the sum over 2, 3, ... tables: the closed form would cancel.
            l * (l - 1.0) / 2.0 * q * q * (1.0 - 2.0 * (l - 2.0) / 3.0 * q)
        } else if q < 1.0 {
            let none = ((l - 1.0) * (-q).ln_1p()).exp();
            1.0 - none * (1.0 - q) - l * q * none
        } else {
            1.0
        };
        u.ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chances_are_sums_of_binomial_terms() {
        for (tables, bits) in [(2, 1), (20, 4), (150, 10), (255, 16), (3, 0)] {
            let chances = Chances::new(LshOptions { tables, bits, seed: 0 });
            for i in 0..=1000 {
                let cosine = (i as f32 / 500.0 - 1.0).max(-0.9999);
                let q = (1.0 - f64::from(cosine).acos() / std::f64::consts::PI).powi(bits as i32);
                let mut term = (1.0 - q).powi(tables as i32);
                let mut u = 0.0;
                if q == 1.0 {
                    u = 1.0;
                } else {
                    for j in 1..=tables {
                        term *= (tables + 1 - j) as f64 / j as f64 * q / (1.0 - q);
                        u += if j >= 2 { term } else { 0.0 };
                    }
                }
                let found = chances.log(cosine);
                let tolerance = 2e-4 + 1e-6 * u.ln().abs();
                assert!((f64::from(found) - u.ln()).abs() < tolerance, "{tables} {bits} {cosine}: {found} {}", u.ln());
            }
        }
    }
}
