//! Clusters of a head's values: what rows that are not read contribute is their weight times their cluster's mean value.

use crate::dense::rows::{Rows, Strided};
use crate::index::kmeans;
use crate::index::snapshot::Saved;
use crate::simd::{Isa, dispatch};
use crate::tensor::{Element, Error, Result};
use std::ops::Range;

/// The most clusters: a row's cluster is one byte.
pub(crate) const MAX_CLUSTERS: usize = 256;

/// Rows per cluster below which more clusters would only copy rows.
const ROWS_PER_CLUSTER: usize = 32;

const SAMPLE: usize = 64 * MAX_CLUSTERS;
const ITERATIONS: usize = 6;

/// Rows that join the means at a time, and that settle at a time.
const SUM_STEP: usize = 4096;

/// Centroids by k-means, and means of the members.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clusters {
    dim: usize,
    /// `[clusters, dim]`, what rows are assigned by; fixed until the next fit.
    centroids: Vec<f32>,
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

    /// k-means on an evenly spaced sample of the rows `0..n`; the sums are empty afterwards.
    ///
    /// # Safety
    /// `rows` yields `dim` readable elements for every row of `0..n`.
    pub(crate) unsafe fn fit<T: Element>(isa: Isa, rows: Strided<T>, n: usize, dim: usize, seed: u64) -> Self {
        let k = (n / ROWS_PER_CLUSTER).clamp(1, MAX_CLUSTERS);
        let size = n.min(SAMPLE);
        let mut sample = Vec::with_capacity(size * dim);
        for i in 0..size {
            let row = rows.row(i * n / size);
            // SAFETY: i * n / size < n.
            let row = unsafe { std::slice::from_raw_parts(row, dim) };
            sample.extend(row.iter().map(|x| x.to_f32()));
        }
        let centroids = kmeans::fit(isa, &sample, dim, k, ITERATIONS, false, seed).centroids;
        let members = Members::none(k, dim);
        Self { dim, settled: members.clone(), members, means: centroids.clone(), centroids }
    }

    /// The nearest centroid of each row of the range.
    ///
    /// # Safety
    /// `rows` yields `dim` readable elements for every row of the range.
    pub(crate) unsafe fn assign<T: Element>(&self, isa: Isa, rows: Strided<T>, range: Range<usize>) -> Vec<u8> {
        let nearest = dispatch(isa, kmeans::Assign { centroids: &self.centroids, dim: self.dim, rows, range });
        nearest.into_iter().map(|id| id as u8).collect()
    }

    /// Whether the means lack `step` of the rows `0..rows`, or were taken back and not renewed since.
    fn lack(&self, rows: usize, step: usize) -> bool {
        rows > self.members.rows && (self.members.rows == self.settled.rows || rows - self.members.rows >= step)
    }

    /// Adds the rows that are not there yet, up to `ids.len()`, and renews the means; a cluster without members keeps its centroid as
    /// mean. The rows before `settled` can no longer be taken back.
    ///
    /// # Safety
    /// `rows` yields `dim` readable elements for every row of `0..ids.len()`.
    pub(crate) unsafe fn add<T: Element>(&mut self, rows: Strided<T>, ids: &[u8], settled: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            self.members.extend(rows, ids, self.dim);
            self.settled.extend(rows, &ids[..settled], self.dim);
        }
        self.renew();
    }

    /// Brings the means up to the rows that have a cluster, once enough came. The newest of them stay out of what is settled, so that a
    /// truncate of a few undoes little.
    ///
    /// # Safety
    /// As [`Self::add`].
    pub(crate) unsafe fn keep_up<T: Element>(&mut self, rows: Strided<T>, ids: &[u8]) {
        if self.lack(ids.len(), SUM_STEP) {
            // SAFETY: the caller's promise.
            unsafe { self.add(rows, ids, ids.len().saturating_sub(SUM_STEP) / SUM_STEP * SUM_STEP) };
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
        let saved = saved.tensor(name("centroids"), &[n, dim], self.centroids.clone());
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

    /// What [`Self::save`] saved: at most 256 clusters of width `dim`.
    pub(crate) fn load(saved: &mut Saved, suffix: &str, dim: usize) -> Result<Self> {
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
        let centroids: Vec<f32> = saved.take(&name("centroids"), &[n, dim])?;
        let mut clusters = Self { dim, means: centroids.clone(), centroids, members, settled };
        if n > 0 {
            clusters.renew();
        }
        Ok(clusters)
    }

    fn renew(&mut self) {
        let Members { sums, counts, .. } = &self.members;
        let means = self.means.chunks_exact_mut(self.dim).zip(self.centroids.chunks_exact(self.dim));
        for (((mean, centroid), sum), &count) in means.zip(sums.chunks_exact(self.dim)).zip(counts) {
            if count == 0 {
                mean.copy_from_slice(centroid);
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
        for isa in Isa::available() {
            // SAFETY: n rows of dim floats.
            let (clusters, ids) = unsafe {
                let mut clusters = Clusters::fit(isa, strided, n, dim, 5);
                let ids = clusters.assign(isa, strided, 0..n);
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
