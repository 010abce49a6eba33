//! Clusters of keys: k-means in each segment of the store, clusters read as a whole or weighed as a whole (RetroInfer and its kin).
//!
//! Rows come in segments; each has centroids of its own, so that new rows never join clusters that were made for old ones (rotary
//! positions turn keys away from those). Rows after the last whole segment are clustered in smaller parts, which one clustering
//! replaces when the segment is full; the last few are read exactly:
//!
//! ```text
//! 0 ............. 8192 ............. 16384 ... 17408 ... 18432 .. 18700
//!      segment            segment         tail      tail     read exactly
//! ```
//! What is clustered together depends on the number of rows alone, not on how they came.

use super::head_rows::HeadRows;
use super::kmeans::{self, Fit};
use super::snapshot::{Parameters, Saved};
use super::units::{HeadUnits, Members, UnitScore, table_storage};
use super::{Ask, Followed, Grow, Grown, Index, Pick, View, not_finite};
use crate::kv::{KvStore, Reader};
use crate::parallel::{Execution, map};
use crate::retrieval::units::{Units, pick};
use crate::simd::{self, Isa};
use crate::tensor::{Element, Error, Result, Storage, with_element};
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

/// How keys are clustered and how clusters are scored.
#[derive(Clone, Copy, Debug)]
pub struct KeyClusterOptions {
    /// Rows that are clustered together.
    pub segment: usize,
    /// Rows that are clustered together after the last whole segment; divides it.
    pub tail: usize,
    /// Rows of a cluster, on average.
    pub keys_per_cluster: usize,
    /// Steps of k-means, fewer where nothing changes any more.
    pub iterations: usize,
    /// Cluster by the angle from the segment's mean key instead of by distance.
    pub spherical: bool,
    /// How a cluster is scored.
    pub score: UnitScore,
    /// Whether what is kept of clusters is coded, 8 bits a number; only of scores that are no bounds.
    pub coded: bool,
    /// Seed of the first centroids.
    pub seed: u64,
}

/// Clusters of one KV head.
#[derive(Clone)]
struct Head {
    units: HeadUnits,
    /// Rows, cluster after cluster, ascending in each.
    rows: Vec<u32>,
    /// Where each cluster's rows start, and where the last one's end.
    starts: Vec<u32>,
    /// Clusters up to the end of each part.
    parts: Vec<u32>,
}

impl Head {
    fn truncate(&mut self, parts: usize) {
        self.parts.truncate(parts);
        let units = self.parts.last().map_or(0, |&n| n as usize);
        self.starts.truncate(units + 1);
        self.rows.truncate(self.starts[units] as usize);
        self.units.truncate(units);
    }

    fn append(&mut self, part: &Part) {
        self.units.append(&part.units);
        self.rows.extend_from_slice(&part.rows);
        for size in &part.sizes {
            self.starts.push(self.starts[self.starts.len() - 1] + size);
        }
        self.parts.push(self.starts.len() as u32 - 1);
    }

    fn nbytes(&self) -> usize {
        self.units.nbytes() + 4 * (self.rows.len() + self.starts.len() + self.parts.len())
    }
}

/// The clusters of one head in one part of the rows.
struct Part {
    units: HeadUnits,
    rows: Vec<u32>,
    sizes: Vec<u32>,
}

#[derive(Clone)]
struct State {
    options: KeyClusterOptions,
    /// Where each part ends.
    ends: Vec<usize>,
    heads: Vec<Head>,
}

impl State {
    fn covered(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Ends of the parts of `len` rows.
    fn layout(options: &KeyClusterOptions, len: usize) -> Vec<usize> {
        let full = len / options.segment;
        let tails = (len - full * options.segment) / options.tail;
        let segments = (1..=full).map(|i| i * options.segment);
        segments.chain((1..=tails).map(|i| full * options.segment + i * options.tail)).collect()
    }

    fn truncate(&mut self, parts: usize) {
        self.ends.truncate(parts);
        self.heads.iter_mut().for_each(|head| head.truncate(parts));
    }
}

impl Grow for State {
    fn wants(&self, len: usize) -> bool {
        len / self.options.tail * self.options.tail > self.covered()
    }

    fn cut(&mut self, len: usize) {
        self.truncate(self.ends.partition_point(|&end| end <= len));
    }
}

/// An index of clusters of keys.
///
/// Memory per KV head: a row of keys and one of values for each cluster, and 4 bytes a row.
pub struct KeyClusters {
    options: KeyClusterOptions,
    state: Followed<State>,
}

impl KeyClusters {
    /// An index over a store, empty until it is first read.
    pub fn new(store: Arc<KvStore>, options: KeyClusterOptions) -> Result<Self> {
        let empty = Self::empty(&store, options)?;
        Ok(Self { options, state: Followed::new(store, empty) })
    }

    fn empty(store: &KvStore, options: KeyClusterOptions) -> Result<State> {
        if options.segment == 0 || options.segment > 1 << 20 {
            return Err(Error::value("segment", options.segment, "1 to 2^20"));
        }
        if options.tail == 0 || !options.segment.is_multiple_of(options.tail) {
            return Err(Error::value("tail", options.tail, format!("a divisor of the segment, {}", options.segment)));
        }
        if options.keys_per_cluster == 0 {
            return Err(Error::value("keys_per_cluster", 0, "at least 1"));
        }
        if matches!(options.score, UnitScore::Landmark(_)) {
            return Err(Error::value("score", "landmark", "a score of clusters, which have no key of their own"));
        }
        if options.coded && options.score.bounds() {
            let got = format!("int8 with the score {}", options.score.to_parts().0);
            return Err(Error::value("tables", got, "a score by means: codes are no bounds"));
        }
        let storage = if options.coded { Storage::Codes(8) } else { table_storage(store.storage()) };
        let units = HeadUnits::new(options.score, storage, store.head_dim(), store.value_dim());
        let head = Head { units, rows: Vec::new(), starts: vec![0], parts: Vec::new() };
        Ok(State { options, ends: Vec::new(), heads: vec![head; store.kv_heads()] })
    }

    /// How keys are clustered.
    pub fn options(&self) -> &KeyClusterOptions {
        &self.options
    }

    /// Clusters of each KV head.
    pub fn counts(&self) -> Vec<usize> {
        self.state.look().heads.iter().map(|head| head.starts.len() - 1).collect()
    }

    /// The rows of each cluster of a KV head, ascending.
    pub fn clusters(&self, head: usize) -> Result<Vec<Vec<u32>>> {
        let state = self.state.look();
        let Some(head) = state.heads.get(head) else {
            return Err(Error::value("head", head, format!("0 to {}", state.heads.len() - 1)));
        };
        Ok(head.starts.windows(2).map(|w| head.rows[w[0] as usize..w[1] as usize].to_vec()).collect())
    }

    /// The index that was saved, over a store that has its rows.
    pub(crate) fn load(store: Arc<KvStore>, mut saved: Saved) -> Result<Self> {
        let size = |saved: &Saved, name: &str| saved.integer(name).map(|n| n as usize);
        let options = KeyClusterOptions {
            segment: size(&saved, "segment")?,
            tail: size(&saved, "tail")?,
            keys_per_cluster: size(&saved, "keys_per_cluster")?,
            iterations: size(&saved, "iterations")?,
            spherical: saved.flag("spherical")?,
            score: UnitScore::from_parts(saved.text("score")?, 0)?,
            coded: saved.flag("coded")?,
            seed: saved.integer("seed")?,
        };
        let mut state = Self::empty(&store, options)?;
        state.ends = State::layout(&options, saved.rows);
        let broken = || Error::value("path", "clusters that do not fit together", "clusters as saved");
        if state.covered() != saved.rows {
            return Err(broken());
        }
        for (h, head) in state.heads.iter_mut().enumerate() {
            head.starts = saved.take_list(&format!("starts.{h}"))?;
            head.rows = saved.take(&format!("rows.{h}"), &[saved.rows])?;
            head.parts = saved.take(&format!("parts.{h}"), &[state.ends.len()])?;
            let units = head.starts.len().checked_sub(1).ok_or_else(broken)?;
            head.units = head.units.load(&mut saved, h, units)?;
            // Every row of a part is in one of its clusters, once.
            let rising = head.starts[0] == 0 && head.starts.windows(2).all(|w| w[0] < w[1]);
            let mut first = 0;
            let mut fits = rising && head.starts[units] as usize == saved.rows && state.ends.len() == head.parts.len();
            let mut seen = vec![false; saved.rows];
            for (part, &end) in state.ends.iter().enumerate() {
                let last = head.parts[part] as usize;
                fits &= (first..=units).contains(&last) && head.starts[last.min(units)] as usize == end;
                let start = part.checked_sub(1).map_or(0, |before| state.ends[before]);
                for unit in first..last.min(units) {
                    let rows = head.rows.get(head.starts[unit] as usize..head.starts[unit + 1] as usize);
                    for &row in rows.unwrap_or_default() {
                        fits &= (start..end).contains(&(row as usize));
                        if let Some(seen) = seen.get_mut(row as usize) {
                            fits &= !std::mem::replace(seen, true);
                        }
                    }
                    fits &= rows.is_some_and(|rows| rows.is_sorted());
                }
                first = last;
            }
            if !fits {
                return Err(broken());
            }
        }
        Ok(Self { options, state: Followed::new(store, state) })
    }

    fn extend(&self, state: &mut State, reader: &Reader, execution: &Execution) -> Result<()> {
        let (keys, values) = (reader.keys(), reader.values());
        let ends = State::layout(&self.options, reader.len());
        let kept = ends.iter().zip(&state.ends).take_while(|(a, b)| a == b).count();
        let (isa, parts) = (simd::current(), ends.len() - kept);
        let made = map(execution, parts * state.heads.len(), |i| {
            let part = kept + i % parts;
            let start = part.checked_sub(1).map_or(0, |before| ends[before]);
            let (mut of_keys, mut of_values, rows) = (Vec::new(), Vec::new(), start..ends[part]);
            let keys = HeadRows::of(&keys, i / parts, rows.clone(), &mut of_keys);
            let values = HeadRows::of(&values, i / parts, rows.clone(), &mut of_values);
            cluster(isa, &self.options, &keys, &values, rows)
        })?;
        let made = made.into_iter().collect::<Result<Vec<_>>>()?;
        state.truncate(kept);
        for (i, part) in made.iter().enumerate() {
            state.heads[i / parts].append(part);
        }
        state.ends = ends;
        Ok(())
    }
}

/// Clusters some rows of a head.
fn cluster(
    isa: Isa,
    options: &KeyClusterOptions,
    keys: &HeadRows,
    values: &HeadRows,
    range: Range<usize>,
) -> Result<Part> {
    let (n, dim, head) = (range.len(), keys.dim(), keys.head());
    let mut rows = Vec::with_capacity(n * dim);
    with_element!(keys.dtype(), T => {
        for j in range.clone() {
            rows.extend(keys.row::<T>(j).iter().map(|x| x.to_f32()));
        }
    });
    if let Some(at) = rows.iter().position(|x| !x.is_finite()) {
        return Err(not_finite(range.start + at / dim, head));
    }
    // Distances are the same from any origin; numbers are smaller, and angles mean something, from the mean.
    let mut centre = vec![0f64; dim];
    for row in rows.chunks_exact(dim) {
        centre.iter_mut().zip(row).for_each(|(c, &x)| *c += f64::from(x));
    }
    centre.iter_mut().for_each(|c| *c /= n as f64);
    for row in rows.chunks_exact_mut(dim) {
        row.iter_mut().zip(&centre).for_each(|(x, c)| *x = (f64::from(*x) - c) as f32);
        if options.spherical {
            let length = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            if length > 0.0 {
                row.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
            }
        }
    }
    let k = (n / options.keys_per_cluster).clamp(1, n);
    // Another draw for each segment and head.
    let seed = options.seed ^ (range.start as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ ((head as u64) << 48);
    let clusters = kmeans::fit(isa, &rows, dim, k, options.iterations, options.spherical, seed);
    let mut members = members_of(&clusters, k, range.start as u32);
    drop(rows);
    members.retain(|rows| !rows.is_empty());
    let units: Vec<Members> = members.iter().map(|rows| Members::List(rows)).collect();
    let units = HeadUnits::build(isa, options.score, keys, values, &units)?;
    let sizes = members.iter().map(|rows| rows.len() as u32).collect();
    Ok(Part { units, sizes, rows: members.concat() })
}

/// The rows of each of `k` clusters, counted from `first`.
fn members_of(fit: &Fit, k: usize, first: u32) -> Vec<Vec<u32>> {
    let mut members = vec![Vec::new(); k];
    for (row, &c) in (first..).zip(&fit.nearest) {
        members[c as usize].push(row);
    }
    members
}

impl Index for KeyClusters {
    fn store(&self) -> &Arc<KvStore> {
        self.state.store()
    }

    fn kind(&self) -> &'static str {
        "clusters"
    }

    fn estimates(&self) -> bool {
        self.options.score.estimates()
    }

    fn len(&self) -> usize {
        self.state.look().covered()
    }

    fn nbytes(&self) -> usize {
        let state = self.state.look();
        state.heads.iter().map(Head::nbytes).sum::<usize>() + 8 * state.ends.len()
    }

    fn pending_operations(&self) -> f64 {
        let (store, options) = (self.store(), &self.options);
        let rows = store.len().saturating_sub(self.len()) * store.kv_heads();
        let clusters = (options.segment / options.keys_per_cluster).max(1);
        rows as f64 * store.head_dim() as f64 * ((options.iterations + 1) * clusters + 8) as f64
    }

    fn read<'a>(&'a self, reader: &'a Reader<'a>, execution: &Execution) -> Result<Box<dyn View + 'a>> {
        let state =
            self.state.read(reader, execution, |state, reader, execution| self.extend(state, reader, execution))?;
        Ok(Box::new(Snapshot(state)))
    }

    fn fork(&self, store: Arc<KvStore>) -> Result<Arc<dyn Index>> {
        Ok(Arc::new(Self { options: self.options, state: self.state.fork(store)? }))
    }

    fn parameters(&self) -> Parameters {
        let KeyClusterOptions { spherical, score, coded, seed, .. } = self.options;
        let mut made = Parameters::new();
        let sizes = [
            ("segment", self.options.segment),
            ("tail", self.options.tail),
            ("keys_per_cluster", self.options.keys_per_cluster),
            ("iterations", self.options.iterations),
        ];
        for (name, size) in sizes {
            made.insert(name.into(), size.into());
        }
        made.insert("spherical".into(), spherical.into());
        made.insert("coded".into(), coded.into());
        made.insert("score".into(), score.to_parts().0.into());
        made.insert("seed".into(), seed.into());
        made
    }

    fn save(&self) -> Saved {
        let state = self.state.look();
        let mut saved = Saved::new(state.covered(), self.parameters());
        for (h, head) in state.heads.iter().enumerate() {
            saved = saved
                .tensor(format!("starts.{h}"), &[head.starts.len()], head.starts.clone())
                .tensor(format!("rows.{h}"), &[head.rows.len()], head.rows.clone())
                .tensor(format!("parts.{h}"), &[head.parts.len()], head.parts.clone());
            saved = head.units.save(saved, h);
        }
        saved
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

struct Snapshot<'a>(Grown<'a, State>);

impl View for Snapshot<'_> {
    fn covered(&self) -> usize {
        self.0.covered()
    }

    fn pick(&self, ask: &Ask) -> Pick {
        let head = &self.0.heads[ask.head];
        pick(&Lists { head, ends: &self.0.ends }, &head.units, self.0.options.score, ask)
    }
}

/// Units that are clusters of a head.
struct Lists<'a> {
    head: &'a Head,
    ends: &'a [usize],
}

impl Lists<'_> {
    fn units(&self, parts: Range<usize>) -> Range<usize> {
        let until = |part: usize| part.checked_sub(1).map_or(0, |last| self.head.parts[last] as usize);
        until(parts.start)..until(parts.end.max(parts.start))
    }
}

impl Units for Lists<'_> {
    fn within(&self, candidates: &Range<usize>) -> Range<usize> {
        let first = self.ends.partition_point(|&end| end <= candidates.start);
        let last = self.ends.partition_point(|&end| end < candidates.end);
        self.units(first..(last + 1).min(self.ends.len()))
    }

    fn whole(&self, candidates: &Range<usize>) -> Range<usize> {
        // The part that begins before the candidates do is not whole.
        let before = self.ends.partition_point(|&end| end < candidates.start);
        let first = if candidates.start == 0 { 0 } else { before + 1 };
        let last = self.ends.partition_point(|&end| end <= candidates.end);
        self.units(first.min(self.ends.len())..last)
    }

    fn members(&self, unit: usize) -> Members<'_> {
        let starts = &self.head.starts;
        Members::List(&self.head.rows[starts[unit] as usize..starts[unit + 1] as usize])
    }
}
