//! Occlusion pruning: a link is worth having unless a link that is there already leads nearer to its target.

use super::search::{Metric, products, row_of};
use crate::dense::rows::{Rows, Strided, widen_row};
use crate::dense::stream::KEYS;
use crate::simd::{MAX_LANES, Simd};
use crate::tensor::Element;

/// Rows whose nearness is looked at before it is known whether the others matter.
const STEP: usize = 8;

/// Rows of one head, and how near they are to each other.
#[derive(Clone, Copy)]
pub(super) struct Space<'a, T> {
    pub(super) rows: Strided<T>,
    pub(super) dim: usize,
    pub(super) metric: Metric<'a>,
}

// SAFETY: rows of a store that nobody writes while they are read; whoever loads from them vouches for that.
unsafe impl<T: Element> Sync for Space<'_, T> {}

impl<T: Element> Space<'_, T> {
    /// Row `row` as floats, padded.
    ///
    /// # Safety
    /// `rows` yields `dim` readable elements for this row.
    #[inline(always)]
    pub(super) unsafe fn widen<S: Simd>(&self, s: S, row: u32, to: &mut Vec<f32>) {
        let padded = self.dim.next_multiple_of(MAX_LANES);
        to.resize(padded, 0.0);
        // SAFETY: the caller's promise; `to` has the padded length.
        unsafe { widen_row(s, self.rows.row(row as usize), self.dim, to.as_mut_ptr(), padded) }
    }
}

/// Adds to `links`, the links of `owner`, those of `candidates` (nearest first) that no link occludes, up to `most` links in all;
/// where fewer than `least` are left, the nearest occluded ones as well. `spare` and `wide` are working memory.
///
/// # Safety
/// `space.rows` yields readable elements for the owner, its links and the candidates.
#[inline(always)]
pub(super) unsafe fn prune<S: Simd, T: Element>(
    s: S,
    space: Space<'_, T>,
    owner: u32,
    candidates: &[u64],
    most: usize,
    least: usize,
    links: &mut Vec<u32>,
    wide: &mut Vec<f32>,
    spare: &mut Vec<u32>,
) {
    let mut scores = [0f32; KEYS];
    let mut compared = Vec::with_capacity(STEP);
    spare.clear();
    for &candidate in candidates {
        if links.len() >= most {
            return;
        }
        let row = row_of(candidate);
        if row == owner || links.contains(&row) {
            continue;
        }
        // SAFETY: the caller's promise.
        unsafe { space.widen(s, row, wide) };
        // The owner is compared with first, then the links by steps.
        let (mut to_owner, mut at, mut occluded) = (f32::NAN, 0, false);
        while !occluded && (at == 0 || at <= links.len()) {
            let first = at.saturating_sub(1);
            let last = (at + STEP - 1).min(links.len());
            compared.clear();
            if at == 0 {
                compared.push(owner);
            }
            compared.extend_from_slice(&links[first..last]);
            let others = &mut compared;
            // SAFETY: as above.
            unsafe { products(s, space.rows, space.dim, wide, others, &mut scores) };
            for (&other, &product) in others.iter().zip(&scores) {
                let nearness = space.metric.nearness(product, other);
                if at == 0 && other == owner {
                    to_owner = nearness;
                } else {
                    occluded |= nearness >= to_owner;
                }
            }
            at += STEP;
        }
        if occluded { spare.push(row) } else { links.push(row) }
    }
    for &row in spare.iter() {
        if links.len() >= least {
            break;
        }
        links.push(row);
    }
}
