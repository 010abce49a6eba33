//! k-means of rows: where centroids come from, whatever they are used for.

use super::Random;
use crate::dense::matrix::{PackedMatrix, ROWS};
use crate::dense::rows::Strided;
use crate::dense::scratch::Buffer;
use crate::simd::{Isa, Kernel, Simd, dispatch};
use crate::tensor::Element;
use std::ops::Range;

/// Places of `k` of `n` rows, drawn without replacement.
pub(crate) fn draw(n: usize, k: usize, seed: u64) -> Vec<usize> {
    let mut random = Random::new(seed);
    let mut picks: Vec<usize> = (0..n).collect();
    for i in 0..k {
        picks.swap(i, i + random.below(n - i));
    }
    picks.truncate(k);
    picks
}

/// The nearest of some centroids for each row of a range; the first of several.
pub(crate) struct Assign<'a, T> {
    /// `[clusters, dim]`.
    pub(crate) centroids: &'a [f32],
    pub(crate) dim: usize,
    /// Readable for every row of the range, as whoever makes this vouches.
    pub(crate) rows: Strided<T>,
    pub(crate) range: Range<usize>,
}

impl<T: Element> Kernel for Assign<'_, T> {
    type Output = Vec<u32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<u32> {
        let Self { centroids, dim, rows, range } = self;
        let n = centroids.len() / dim;
        let mut matrix = PackedMatrix::new(s, centroids, n, dim);
        let stride = matrix.stride::<S>();
        // Beyond the last centroid no row is near.
        let mut half_norms = vec![f32::INFINITY; stride];
        for (half, centroid) in half_norms.iter_mut().zip(centroids.chunks_exact(dim)) {
            *half = 0.5 * centroid.iter().map(|x| x * x).sum::<f32>();
        }
        let (mut out, mut wide) = (vec![0f32; matrix.result_len::<S>()], Buffer::default());
        let mut nearest = Vec::with_capacity(range.len());
        for first in range.clone().step_by(ROWS) {
            let count = ROWS.min(range.end - first);
            // SAFETY: whoever made this vouches for the rows of the range.
            unsafe { matrix.apply(s, rows, first, count, None, &mut wide, &mut out) };
            for dots in out.chunks_exact_mut(stride).take(count) {
                let mut best = s.splat(f32::NEG_INFINITY);
                for j in (0..stride).step_by(S::LANES) {
                    // SAFETY: the stride, which both have, is a multiple of LANES.
                    unsafe {
                        let near = s.sub(s.load(dots.as_ptr().add(j)), s.load(half_norms.as_ptr().add(j)));
                        s.store(dots.as_mut_ptr().add(j), near);
                        best = s.max(near, best);
                    }
                }
                let best = s.max_lane(best);
                // No row is nearest to a centroid where numbers overflow: the first one stands in.
                nearest.push(dots[..n].iter().position(|&near| near == best).unwrap_or(0) as u32);
            }
        }
        nearest
    }
}

/// Centroids, and the nearest of them for each row.
pub(crate) struct Fit {
    /// `[clusters, dim]`; one without rows is where it was before it lost them.
    pub(crate) centroids: Vec<f32>,
    pub(crate) nearest: Vec<u32>,
}

/// k-means of all `rows`, `[n, dim]`, from `k` of them. With `spherical`, centroids are brought to length 1 each time: for rows of
/// length 1, whose nearest centroid is then the one nearest in angle.
pub(crate) fn fit(isa: Isa, rows: &[f32], dim: usize, k: usize, iterations: usize, spherical: bool, seed: u64) -> Fit {
    let n = rows.len() / dim;
    let strided = Strided { base: rows.as_ptr(), stride: dim as isize };
    let assign = |centroids: &[f32]| dispatch(isa, Assign { centroids, dim, rows: strided, range: 0..n });
    let mut centroids: Vec<f32> =
        draw(n, k, seed).iter().flat_map(|&i| rows[i * dim..(i + 1) * dim].iter().copied()).collect();
    let mut nearest = assign(&centroids);
    for _ in 0..iterations {
        let (mut sums, mut counts) = (vec![0f32; k * dim], vec![0u32; k]);
        for (row, &c) in rows.chunks_exact(dim).zip(&nearest) {
            let c = c as usize;
            counts[c] += 1;
            sums[c * dim..(c + 1) * dim].iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
        for ((centroid, sum), &count) in centroids.chunks_exact_mut(dim).zip(sums.chunks_exact(dim)).zip(&counts) {
            if count == 0 {
                continue;
            }
            let length = if spherical { sum.iter().map(|x| x * x).sum::<f32>().sqrt() } else { count as f32 };
            if length > 0.0 {
                centroid.iter_mut().zip(sum).for_each(|(x, sum)| *x = sum / length);
            }
        }
        let now = assign(&centroids);
        if now == nearest {
            break;
        }
        nearest = now;
    }
    Fit { centroids, nearest }
}
