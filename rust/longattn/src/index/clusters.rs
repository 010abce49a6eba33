//! Clusters of a head's values: what rows that are not read contribute is their weight times their cluster's mean value.

use crate::dense::matrix::{PackedMatrix, ROWS};
use crate::dense::rows::{Rows, Strided};
use crate::dense::scratch::Buffer;
use crate::index::rotation::Random;
use crate::simd::{Isa, Kernel, Simd, dispatch};
use crate::tensor::Element;
use std::ops::Range;

/// The most clusters: a row's cluster is one byte.
pub(crate) const MAX_CLUSTERS: usize = 256;

/// Rows per cluster below which more clusters would only copy rows.
const ROWS_PER_CLUSTER: usize = 32;

const SAMPLE: usize = 64 * MAX_CLUSTERS;
const ITERATIONS: usize = 6;

/// Centroids by k-means, and sums of the members.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clusters {
    dim: usize,
    /// `[clusters, dim]`, what rows are assigned by; fixed until the next fit.
    centroids: Vec<f32>,
    /// `[clusters, dim]` and `[clusters]` of the rows summed so far.
    sums: Vec<f64>,
    counts: Vec<u32>,
    /// `[clusters, dim]`.
    means: Vec<f32>,
}

struct Assign<'a, T> {
    clusters: &'a Clusters,
    rows: Strided<T>,
    range: Range<usize>,
}

impl<T: Element> Kernel for Assign<'_, T> {
    type Output = Vec<u8>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<u8> {
        let Self { clusters, rows, range } = self;
        let (n, dim) = (clusters.len(), clusters.dim);
        let mut matrix = PackedMatrix::new(s, &clusters.centroids, n, dim);
        let half_norms: Vec<f32> =
            clusters.centroids.chunks_exact(dim).map(|c| 0.5 * c.iter().map(|x| x * x).sum::<f32>()).collect();
        let (mut out, mut wide) = (vec![0f32; matrix.result_len::<S>()], Buffer::default());
        let mut ids = Vec::with_capacity(range.len());
        for first in range.clone().step_by(ROWS) {
            let count = ROWS.min(range.end - first);
            // SAFETY: the caller of `assign` vouches for the rows of the range.
            unsafe { matrix.apply(s, rows, first, count, None, &mut wide, &mut out) };
            for r in 0..count {
                let dots = &out[r * matrix.stride::<S>()..][..n];
                let mut best = (f32::NEG_INFINITY, 0);
                for (c, (dot, half)) in dots.iter().zip(&half_norms).enumerate() {
                    if dot - half > best.0 {
                        best = (dot - half, c);
                    }
                }
                ids.push(best.1 as u8);
            }
        }
        ids
    }
}

impl Clusters {
    /// Number of clusters.
    pub(crate) fn len(&self) -> usize {
        self.counts.len()
    }

    /// Mean value of each cluster, `[clusters, dim]`.
    pub(crate) fn means(&self) -> &[f32] {
        &self.means
    }

    pub(crate) fn nbytes(&self) -> usize {
        4 * (self.centroids.len() + 2 * self.sums.len() + self.means.len() + self.counts.len())
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
        let mut random = Random::new(seed);
        let mut picks: Vec<usize> = (0..size).collect();
        for i in 0..k {
            picks.swap(i, i + random.below(size - i));
        }
        let centroids = picks[..k].iter().flat_map(|&i| sample[i * dim..(i + 1) * dim].iter().copied()).collect();
        let empty = |centroids: Vec<f32>| Self {
            dim,
            sums: vec![0.0; k * dim],
            counts: vec![0; k],
            means: centroids.clone(),
            centroids,
        };
        let mut clusters = empty(centroids);
        let sampled = Strided { base: sample.as_ptr(), stride: dim as isize };
        for _ in 0..ITERATIONS {
            // SAFETY: the sample has `size` rows.
            unsafe {
                let ids = clusters.assign(isa, sampled, 0..size);
                clusters.add(sampled, 0, &ids);
            }
            clusters = empty(clusters.means);
        }
        clusters
    }

    /// The nearest centroid of each row of the range.
    ///
    /// # Safety
    /// `rows` yields `dim` readable elements for every row of the range.
    pub(crate) unsafe fn assign<T: Element>(&self, isa: Isa, rows: Strided<T>, range: Range<usize>) -> Vec<u8> {
        dispatch(isa, Assign { clusters: self, rows, range })
    }

    /// Adds the rows `first..first + ids.len()` to their clusters' sums and renews the means; a cluster without members keeps its
    /// centroid as mean.
    ///
    /// # Safety
    /// `rows` yields `dim` readable elements for those rows.
    pub(crate) unsafe fn add<T: Element>(&mut self, rows: Strided<T>, first: usize, ids: &[u8]) {
        for (i, &id) in ids.iter().enumerate() {
            let id = usize::from(id);
            // SAFETY: the caller vouches for the row.
            let row = unsafe { std::slice::from_raw_parts(rows.row(first + i), self.dim) };
            self.counts[id] += 1;
            for (sum, x) in self.sums[id * self.dim..(id + 1) * self.dim].iter_mut().zip(row) {
                *sum += f64::from(x.to_f32());
            }
        }
        for (c, &count) in self.counts.iter().enumerate() {
            if count > 0 {
                let range = c * self.dim..(c + 1) * self.dim;
                for (mean, sum) in self.means[range.clone()].iter_mut().zip(&self.sums[range]) {
                    *mean = (sum / f64::from(count)) as f32;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
                clusters.add(strided, 0, &ids);
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
