//! Sums of rows' weights by value cluster: blocks of rows that weigh little are left out, or one of several stands for all.

use super::sample::mix32;
use super::scan::TILE;
use crate::index::clusters::MAX_CLUSTERS;
use crate::simd::{self, Simd};

/// Heads that are weighed together: their weights of a row are added to its cluster's as one vector of four.
pub(super) const QUAD: usize = 4;

/// Calls a method for each quad of a group's heads, with the first, for their number and whether their scores are logits.
macro_rules! quads {
    ($group:expr, $sloped:expr, $object:ident . $work:ident :: <$simd:ty>($s:expr $(, $more:expr)*)) => {
        for first in (0..$group).step_by($crate::retrieval::cluster_sums::QUAD) {
            match ($sloped, $group - first) {
                (false, 1) => $object.$work::<$simd, 1, false>($s, first $(, $more)*),
                (false, 2) => $object.$work::<$simd, 2, false>($s, first $(, $more)*),
                (false, 3) => $object.$work::<$simd, 3, false>($s, first $(, $more)*),
                (false, _) => $object.$work::<$simd, 4, false>($s, first $(, $more)*),
                (true, 1) => $object.$work::<$simd, 1, true>($s, first $(, $more)*),
                (true, 2) => $object.$work::<$simd, 2, true>($s, first $(, $more)*),
                (true, 3) => $object.$work::<$simd, 3, true>($s, first $(, $more)*),
                (true, _) => $object.$work::<$simd, 4, true>($s, first $(, $more)*),
            }
        }
    };
}
pub(super) use quads;

/// Sums by cluster, rows taking turns: neighbours often share a cluster, and would wait for each other's sum.
type Tables = [[[f32; QUAD]; MAX_CLUSTERS]; 4];

/// Neighbouring rows that are left out of the clusters' sums together, or drawn together, whatever the instruction set.
pub(super) const BLOCK: usize = 16;

/// Blocks of a tile, as many as a word has bits.
pub(super) const BLOCKS: usize = TILE / BLOCK;
const _: () = assert!(BLOCKS == u64::BITS as usize);

/// Blocks of light rows of which one, drawn at random, stands for all in the clusters' sums.
const DRAWN: usize = 4;

/// Rows that may be left out of the clusters' sums: the rows of a block count by the largest of their weights. The mass counts in full
/// whatever is left out; the sums say how it is spread over the clusters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Left {
    /// Below this a block is left out.
    negligible: f32,
    /// Below this one block of [`DRAWN`] is drawn.
    light: f32,
}

impl Left {
    pub(super) const NOTHING: Self = Self { negligible: 0.0, light: 0.0 };

    /// Of so many candidates: a thousandth of the mass is left out at most, and what is drawn puts the mean value of the rest off by
    /// less than `sqrt((DRAWN - 1) * light)` = 0.95 % of the spread of the values; half of that where it was measured.
    pub(super) fn of(candidates: usize) -> Self {
        Self { negligible: 1e-3 / candidates as f32, light: 3e-5 }
    }
}

/// What the scores of `H` heads of a tile, rows of [`TILE`], become weights by: a factor, or slope and shift of logits in base 2.
#[derive(Clone, Copy)]
pub(super) struct Turned<S: Simd, const H: usize, const SLOPED: bool> {
    pub(super) scores: *const f32,
    /// Floats from one head's row to the next.
    pub(super) stride: usize,
    pub(super) slopes: [S::F32; H],
    pub(super) shifts: [S::F32; H],
}

impl<S: Simd, const H: usize, const SLOPED: bool> Turned<S, H, SLOPED> {
    /// Weights of the rows from `j` on.
    ///
    /// # Safety
    /// j + LANES <= TILE, and the heads' scores are readable.
    #[inline(always)]
    pub(super) unsafe fn of_rows(&self, s: S, j: usize) -> [S::F32; H] {
        let mut weights = [s.zero(); H];
        for (h, weight) in weights.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            let x = unsafe { s.load(self.scores.add(h * self.stride + j)) };
            *weight = if SLOPED { s.exp2(s.fma(x, self.slopes[h], self.shifts[h])) } else { s.mul(x, self.slopes[h]) };
        }
        weights
    }
}

/// Blocks of a tile's rows, by the mean over the group of their weights, that are added to the sums of their clusters, a bit each: all
/// of the heavy ones, and those drawn from the others.
#[inline(always)]
pub(super) fn blocks<S: Simd>(s: S, weights: &[f32], tile: usize, left: Left) -> [u64; 2] {
    let (negligible, light) = (s.splat(left.negligible), s.splat(left.light));
    let (mut some, mut heavy) = (0, 0);
    for (b, block) in weights.chunks_exact(BLOCK).enumerate() {
        let mut largest = s.zero();
        for lane in (0..BLOCK).step_by(S::LANES) {
            // SAFETY: LANES divides BLOCK.
            largest = s.max(unsafe { s.load(block.as_ptr().add(lane)) }, largest);
        }
        some |= u64::from(s.at_least(largest, negligible) != 0) << b;
        heavy |= u64::from(s.at_least(largest, light) != 0) << b;
    }
    // Two random bits say which block of each four stands for all.
    let (random, mut drawn) = (mix32(tile as u32), 0);
    for set in 0..BLOCKS / DRAWN {
        drawn |= 1 << (set * DRAWN + (random >> (2 * set)) as usize % DRAWN);
    }
    [some & heavy, some & !heavy & drawn]
}

/// Sums of a chunk's rows.
pub(super) struct ClusterSums {
    /// Value clusters, 0 if the sums are not asked for.
    clusters: usize,
    group: usize,
    /// Of each [`QUAD`] of heads.
    tables: Vec<Tables>,
}

impl ClusterSums {
    pub(super) fn new(clusters: usize, group: usize) -> Self {
        let quads = if clusters > 0 { group.div_ceil(QUAD) } else { 0 };
        Self { clusters, group, tables: vec![[[[0.0; QUAD]; MAX_CLUSTERS]; 4]; quads] }
    }

    /// Whether sums are asked for.
    pub(super) fn wanted(&self) -> bool {
        self.clusters > 0
    }

    /// The sums, `[clusters, group]`, each head's times its factor.
    pub(super) fn times(&self, factors: &[f32]) -> Vec<f32> {
        let mut sums = vec![0.0; self.clusters * self.group];
        for ((q, factors), tables) in factors.chunks(QUAD).enumerate().zip(&self.tables) {
            for (c, sums) in sums.chunks_exact_mut(self.group).enumerate() {
                for (h, (sum, factor)) in sums[q * QUAD..].iter_mut().zip(factors).enumerate() {
                    *sum = tables.iter().map(|table| table[c][h]).sum::<f32>() * factor;
                }
            }
        }
        sums
    }

    /// Adds the weights of `H` heads from `first` on, of the blocks of rows that are told, to the sums of the rows' clusters.
    ///
    /// # Safety
    /// The blocks lie inside the tile, and the heads' scores are readable.
    #[inline(always)]
    pub(super) unsafe fn add<S: Simd, const H: usize, const SLOPED: bool>(
        &mut self,
        s: S,
        first: usize,
        by: &Turned<S, H, SLOPED>,
        ids: &[u8],
        [heavy, drawn]: [u64; 2],
    ) {
        let tables = &mut self.tables[first / QUAD];
        for (mut left, times) in [(heavy, 1.0), (drawn, DRAWN as f32)] {
            let times = s.splat(times);
            while left != 0 {
                let start = left.trailing_zeros() as usize * BLOCK;
                left &= left - 1;
                for j in (start..start + BLOCK).step_by(S::LANES) {
                    // SAFETY: the caller's promise.
                    let weights = unsafe { by.of_rows(s, j) };
                    let mut quad = [s.zero(); QUAD];
                    for h in 0..H {
                        quad[h] = s.mul(weights[h], times);
                    }
                    add_rows(s, tables, &ids[j..j + S::LANES], quad);
                }
            }
        }
    }
}

/// A quad's weights of some rows, in whole lines of cache: a load waits longer for a store that lies in two.
#[repr(align(64))]
struct QuadRows([[f32; QUAD]; simd::MAX_LANES]);

/// Adds a quad's weights of some rows to the sums of their clusters.
#[inline(always)]
fn add_rows<S: Simd>(s: S, tables: &mut Tables, ids: &[u8], weights: [S::F32; QUAD]) {
    let mut rows = QuadRows([[0.0; QUAD]; simd::MAX_LANES]);
    for (t, turned) in s.turn4(weights).into_iter().enumerate() {
        // SAFETY: four vectors of LANES floats are LANES rows of a quad.
        unsafe { s.store(rows.0.as_mut_ptr().cast::<f32>().add(t * S::LANES), turned) };
    }
    // Kept in memory, where a row is one load: the compiler would take the turned vectors apart again.
    let QuadRows(rows) = std::hint::black_box(&rows);
    for (q, ids) in ids.as_chunks::<4>().0.iter().enumerate() {
        for t in 0..4 {
            // Quarter q of vector t is row 4 q + t.
            let row = rows[t * (S::LANES / 4) + q];
            let sum = &mut tables[t][usize::from(ids[t])];
            for h in 0..QUAD {
                sum[h] += row[h];
            }
        }
    }
}
