//! Clusters of a head's rows: what rows that are not read contribute is their weight times their cluster's mean value.
//!
//! That is right where the values of a cluster are alike, and where their weights are, which differences from the mean then cancel in.
//! So rows are clustered by their value and their key together, each as spread as the other.

use crate::dense::rows::{Rows, Strided, widen_row};
use crate::dense::scratch::Buffer;
use crate::index::head_rows::{self, HeadRows};
use crate::index::kmeans;
use crate::index::snapshot::Saved;
use crate::index::units::padded;
use crate::simd::{Isa, Kernel, Simd, dispatch};
use crate::tensor::{Element, Error, KvView, Result, with_element};
use std::ops::Range;

/// The most clusters: a row's cluster is one byte.
pub(crate) const MAX_CLUSTERS: usize = 256;

/// Rows per cluster below which more clusters would only copy rows.
const ROWS_PER_CLUSTER: usize = 32;

const SAMPLE: usize = 64 * MAX_CLUSTERS;
const ITERATIONS: usize = 6;

/// Rows that are assigned at a time: what is made of them stays in the cache.
const ROWS: usize = 512;

/// Rows that join the means at a time, and that settle at a time.
const SUM_STEP: usize = 4096;

/// Keys and values of some rows of a head.
#[derive(Clone, Copy)]
pub(crate) struct Pairs<T> {
    keys: Strided<T>,
    key_dim: usize,
    values: Strided<T>,
    value_dim: usize,
}

impl<T: Element> Pairs<T> {
    /// Rows of a head of a store.
    pub(crate) fn of(keys: &HeadRows, values: &HeadRows) -> Self {
        Self { keys: keys.strided(), key_dim: keys.dim(), values: values.strided(), value_dim: values.dim() }
    }

    /// Numbers of a value and a key together.
    fn width(self) -> usize {
        padded(self.value_dim) + padded(self.key_dim)
    }
}

/// Values of rows with their keys, times a scale, behind them: `[rows, width]`.
struct Join<'a, T> {
    pairs: Pairs<T>,
    /// Readable, as whoever makes this vouches.
    rows: &'a [usize],
    scale: f32,
    to: &'a mut [f32],
}

impl<T: Element> Kernel for Join<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { pairs: Pairs { keys, key_dim, values, value_dim }, rows, scale, to } = self;
        let (first, width) = (padded(value_dim), padded(value_dim) + padded(key_dim));
        assert!(to.len() == rows.len() * width);
        for (&j, to) in rows.iter().zip(to.chunks_exact_mut(width)) {
            let (value, key) = to.split_at_mut(first);
            // SAFETY: whoever made this vouches for the row; the parts have the padded lengths.
            unsafe {
                widen_row(s, values.row(j), value_dim, value.as_mut_ptr(), value.len());
                widen_row(s, keys.row(j), key_dim, key.as_mut_ptr(), key.len());
            }
            key.iter_mut().for_each(|x| *x *= scale);
        }
    }
}

/// Evenly spaced rows of `0..n`, or all.
fn sample(n: usize) -> impl Iterator<Item = usize> {
    let size = n.min(SAMPLE);
    (0..size).map(move |i| i * n / size)
}

/// Sum over the columns of their variance.
fn spread(rows: &[f32], width: usize, columns: Range<usize>) -> f64 {
    let n = (rows.len() / width).max(1) as f64;
    let (mut sums, mut squares) = (vec![0f64; columns.len()], vec![0f64; columns.len()]);
    for row in rows.chunks_exact(width) {
        for ((sum, square), &x) in sums.iter_mut().zip(&mut squares).zip(&row[columns.clone()]) {
            *sum += f64::from(x);
            *square += f64::from(x) * f64::from(x);
        }
    }
    // What is left of a constant is rounding.
    let variance = |(sum, square): (&f64, &f64)| {
        let variance = square / n - (sum / n).powi(2);
        if variance > 1e-9 * square / n { variance } else { 0.0 }
    };
    sums.iter().zip(&squares).map(variance).sum()
}

/// Centroids by k-means, and means of the members.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clusters {
    dim: usize,
    /// Of values and keys, what rows are assigned by; fixed until the next fit.
    centroids: Vec<f32>,
    /// What keys are multiplied by.
    key_scale: f32,
    /// All members, and those of the rows that are old enough not to be truncated any more.
    members: Members,
    settled: Members,
    /// `[clusters, dim]`, of all members.
    means: Vec<f32>,
}

/// Members of the clusters among the rows `0..rows`.
#[derive(Clone, Debug, Default)]
struct Members {
    rows: usize,
    /// `[clusters, dim]`.
    sums: Vec<f64>,
    counts: Vec<u32>,
    /// Sum of the squared norms.
    squares: f64,
}

impl Members {
    fn none(clusters: usize, dim: usize) -> Self {
        Self { rows: 0, sums: vec![0.0; clusters * dim], counts: vec![0; clusters], squares: 0.0 }
    }

    /// Adds the rows up to `ids.len()`.
    ///
    /// # Safety
    /// `rows` yields `dim` readable elements for each of them.
    unsafe fn extend<T: Element>(&mut self, rows: Strided<T>, ids: &[u8], dim: usize) {
        for (j, &id) in ids.iter().enumerate().skip(self.rows) {
            let id = usize::from(id);
            // SAFETY: the caller vouches for the row.
            let row = unsafe { std::slice::from_raw_parts(rows.row(j), dim) };
            self.counts[id] += 1;
            for (sum, x) in self.sums[id * dim..(id + 1) * dim].iter_mut().zip(row) {
                let x = f64::from(x.to_f32());
                *sum += x;
                self.squares += x * x;
            }
        }
        self.rows = ids.len().max(self.rows);
    }
}

impl Clusters {
    /// Number of clusters.
    pub(crate) fn len(&self) -> usize {
        self.members.counts.len()
    }

    /// Mean value of each cluster, `[clusters, dim]`.
    pub(crate) fn means(&self) -> &[f32] {
        &self.means
    }

    /// Root mean square norm of the members.
    pub(crate) fn norm(&self) -> f32 {
        (self.members.squares / self.members.rows.max(1) as f64).sqrt() as f32
    }

    pub(crate) fn nbytes(&self) -> usize {
        4 * (self.centroids.len() + self.means.len()) + 2 * (8 * self.members.sums.len() + 4 * self.len())
    }

    /// k-means on an evenly spaced sample of the rows `0..n` of a head, which exist; the sums are empty afterwards.
    pub(crate) fn of(isa: Isa, [keys, values]: [&KvView; 2], head: usize, n: usize, seed: u64) -> Self {
        let (mut of_keys, mut of_values) = (Vec::new(), Vec::new());
        assert!(n <= keys.shape()[2].min(values.shape()[2]));
        let (keys, values, n) = match (keys, values) {
            (KvView::Codes(keys), KvView::Codes(values)) => {
                let rows: Vec<usize> = sample(n).collect();
                let keys = head_rows::gathered(keys, head, &rows, &mut of_keys);
                // Their own sample is all of them.
                (keys, head_rows::gathered(values, head, &rows, &mut of_values), rows.len())
            }
            _ => {
                let keys = HeadRows::of(keys, head, 0..n, &mut of_keys);
                (keys, HeadRows::of(values, head, 0..n, &mut of_values), n)
            }
        };
        with_element!(keys.dtype(), T => {
            // SAFETY: there are n rows, by the assertion.
            unsafe { Self::fit(isa, Pairs::<T>::of(&keys, &values), n, seed) }
        })
    }

    /// # Safety
    /// Every row of `0..n` is readable.
    unsafe fn fit<T: Element>(isa: Isa, pairs: Pairs<T>, n: usize, seed: u64) -> Self {
        let k = (n / ROWS_PER_CLUSTER).clamp(1, MAX_CLUSTERS);
        let (dim, width) = (pairs.value_dim, pairs.width());
        let rows: Vec<usize> = sample(n).collect();
        let mut sample = vec![0f32; rows.len() * width];
        dispatch(isa, Join { pairs, rows: &rows, scale: 1.0, to: &mut sample });
        let key_scale = (spread(&sample, width, 0..dim) / spread(&sample, width, padded(dim)..width)).sqrt() as f32;
        // Keys that are all the same, or whose squares overflow, say nothing.
        let key_scale = if key_scale.is_finite() { key_scale } else { 0.0 };
        sample.chunks_exact_mut(width).for_each(|row| row[padded(dim)..].iter_mut().for_each(|x| *x *= key_scale));
        let centroids = kmeans::fit(isa, &sample, width, k, ITERATIONS, false, seed).centroids;
        let members = Members::none(k, dim);
        let means = vec![0.0; k * dim];
        let mut clusters = Self { dim, settled: members.clone(), members, means, centroids, key_scale };
        clusters.renew();
        clusters
    }

    /// The nearest centroid of each row of the range.
    ///
    /// # Safety
    /// Every row of the range is readable.
    pub(crate) unsafe fn assign<T: Element>(&self, isa: Isa, pairs: Pairs<T>, range: Range<usize>) -> Vec<u8> {
        let (dim, mut joined, mut ids) = (pairs.width(), Buffer::default(), Vec::with_capacity(range.len()));
        let rows: Vec<usize> = range.collect();
        for rows in rows.chunks(ROWS) {
            let to = &mut joined.take(ROWS * dim)[..rows.len() * dim];
            dispatch(isa, Join { pairs, rows, scale: self.key_scale, to });
            let rows = Strided { base: to.as_ptr(), stride: dim as isize };
            let range = 0..to.len() / dim;
            let nearest = dispatch(isa, kmeans::Assign { centroids: &self.centroids, dim, rows, range });
            ids.extend(nearest.into_iter().map(|id| id as u8));
        }
        ids
    }

    /// Whether the means lack `step` of the rows `0..rows`, or were taken back and not renewed since.
    fn lack(&self, rows: usize, step: usize) -> bool {
        rows > self.members.rows && (self.members.rows == self.settled.rows || rows - self.members.rows >= step)
    }

    /// Adds the rows that are not there yet, up to `ids.len()`, and renews the means; a cluster without members keeps its centroid as
    /// mean. The rows before `settled` can no longer be taken back.
    ///
    /// # Safety
    /// `rows` yields `dim` readable elements for every row of `0..ids.len()` that is not settled.
    pub(crate) unsafe fn add<T: Element>(&mut self, rows: Strided<T>, ids: &[u8], settled: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            self.members.extend(rows, ids, self.dim);
            self.settled.extend(rows, &ids[..settled], self.dim);
        }
        self.renew();
    }

    /// Brings the means up to the rows that have a cluster, once enough came. The newest of them stay out of what is settled, so that a
    /// truncate of a few undoes little. `values` has these rows.
    pub(crate) fn keep_up(&mut self, values: &KvView, head: usize, ids: &[u8]) {
        if !self.lack(ids.len(), SUM_STEP) {
            return;
        }
        assert!(ids.len() <= values.shape()[2]);
        let settled = ids.len().saturating_sub(SUM_STEP) / SUM_STEP * SUM_STEP;
        let mut memory = Vec::new();
        for part in head_rows::parts(values, self.members.rows..ids.len()) {
            // Rows that only settle now are needed once more.
            let values = HeadRows::of(values, head, self.settled.rows..part.end, &mut memory);
            let ids = &ids[..part.end];
            with_element!(values.dtype(), T => {
                // SAFETY: rows from the settled ones on, which exist by the assertion.
                unsafe { self.add(values.strided::<T>(), ids, settled.min(ids.len())) };
            });
        }
    }

    /// Takes back the rows from `keep` on: false where some of them are settled. The rows that are neither settled nor taken back must
    /// be added again.
    pub(crate) fn take_back(&mut self, keep: usize) -> bool {
        if keep < self.settled.rows {
            return false;
        }
        if keep < self.members.rows {
            self.members.clone_from(&self.settled);
            self.renew();
        }
        true
    }

    /// Adds what is needed to have them again to an index as data, under names that end in `suffix`.
    pub(crate) fn save(&self, saved: Saved, suffix: &str) -> Saved {
        let (n, dim) = (self.len(), self.dim);
        let name = |part: &str| format!("{part}.{suffix}");
        let width = self.centroids.len() / n.max(1);
        let saved = saved.tensor(name("centroids"), &[n, width], self.centroids.clone()).tensor(
            name("key_scale"),
            &[1],
            vec![self.key_scale],
        );
        let rows = vec![self.members.rows as u64, self.settled.rows as u64];
        let squares = vec![self.members.squares, self.settled.squares];
        let saved = saved.tensor(name("member_rows"), &[2], rows).tensor(name("member_squares"), &[2], squares);
        [("members", &self.members), ("settled", &self.settled)].into_iter().fold(saved, |saved, (part, members)| {
            saved.tensor(name(&format!("{part}_sums")), &[n, dim], members.sums.clone()).tensor(
                name(&format!("{part}_counts")),
                &[n],
                members.counts.clone(),
            )
        })
    }

    /// What [`Self::save`] saved: at most 256 clusters of keys of `key_dim` and values of `dim` numbers.
    pub(crate) fn load(saved: &mut Saved, suffix: &str, key_dim: usize, dim: usize) -> Result<Self> {
        let name = |part: &str| format!("{part}.{suffix}");
        let member_rows: Vec<u64> = saved.take(&name("member_rows"), &[2])?;
        let member_squares: Vec<f64> = saved.take(&name("member_squares"), &[2])?;
        let mut members = Vec::new();
        for (i, part) in ["members", "settled"].into_iter().enumerate() {
            let counts: Vec<u32> = saved.take_list(&name(&format!("{part}_counts")))?;
            let sums = saved.take(&name(&format!("{part}_sums")), &[counts.len(), dim])?;
            members.push(Members { rows: member_rows[i] as usize, sums, counts, squares: member_squares[i] });
        }
        let (settled, members) = (members.pop().expect("two"), members.pop().expect("two"));
        let n = members.counts.len();
        if n > MAX_CLUSTERS || settled.counts.len() != n || settled.rows > members.rows {
            return Err(Error::value("path", format!("{n} value clusters"), "clusters as they are saved"));
        }
        let centroids: Vec<f32> = saved.take(&name("centroids"), &[n, padded(dim) + padded(key_dim)])?;
        let key_scale: Vec<f32> = saved.take(&name("key_scale"), &[1])?;
        let means = vec![0.0; n * dim];
        let mut clusters = Self { dim, means, centroids, key_scale: key_scale[0], members, settled };
        if n > 0 {
            clusters.renew();
        }
        Ok(clusters)
    }

    fn renew(&mut self) {
        let Members { sums, counts, .. } = &self.members;
        let width = self.centroids.len() / counts.len();
        let means = self.means.chunks_exact_mut(self.dim).zip(self.centroids.chunks_exact(width));
        for (((mean, centroid), sum), &count) in means.zip(sums.chunks_exact(self.dim)).zip(counts) {
            if count == 0 {
                mean.copy_from_slice(&centroid[..self.dim]);
            } else {
                mean.iter_mut().zip(sum).for_each(|(mean, sum)| *mean = (sum / f64::from(count)) as f32);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Random;

    #[test]
    fn separated_groups_are_found() {
        let mut random = Random::new(1);
        let (n, dim) = (512, 24);
        let centre = |g: usize, d: usize| if d == g { 10.0 } else { 0.0 };
        let rows: Vec<f32> = (0..n)
            .flat_map(|i| (0..dim).map(|d| centre(i % 16, d) + 0.1 * random.normal() as f32).collect::<Vec<_>>())
            .collect();
        let strided = Strided { base: rows.as_ptr(), stride: dim as isize };
        // Keys that tell nothing.
        let keys = vec![1f32; n];
        let pairs =
            Pairs { keys: Strided { base: keys.as_ptr(), stride: 1 }, key_dim: 1, values: strided, value_dim: dim };
        for isa in Isa::available() {
            // SAFETY: n rows of dim floats.
            let (clusters, ids) = unsafe {
                let mut clusters = Clusters::fit(isa, pairs, n, 5);
                let ids = clusters.assign(isa, pairs, 0..n);
                clusters.add(strided, &ids, 0);
                (clusters, ids)
            };
            assert_eq!(clusters.len(), 16);
            // Every row is far nearer to its cluster's mean than to the origin of another group.
            for (i, &id) in ids.iter().enumerate() {
                let mean = &clusters.means()[usize::from(id) * dim..][..dim];
                let distance: f32 = rows[i * dim..][..dim].iter().zip(mean).map(|(a, b)| (a - b) * (a - b)).sum();
                assert!(distance < 60.0, "{} row {i}: {distance}", isa.name());
            }
        }
    }
}
