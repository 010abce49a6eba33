//! Decode scores of bf16 queries with bf16 keys by matrix registers, which read the keys as they lie in memory.
//!
//! ```text
//! for 32 keys:   sums = [K of the first 16] [q | 0] + [K of the others] [0 | q]       16 keys x (8 query rows of each half)
//! ```
//! A block of keys is four such sums, each in a register, so that none waits for another; they are transposed into rows of scores.

use super::Problem;
use super::rows::Rows;
use super::scores::RowId;
use super::stream::{KEYS, MAX_QUERY_ROWS};
use crate::simd::tiles::{Registers, STEP, SUMS, TILE};
use crate::simd::{Kernel, Simd, prefetch};
use half::bf16;

const _: () = assert!(KEYS == SUMS * 2 * TILE && 2 * MAX_QUERY_ROWS == TILE);

/// Fewer query rows take longer by registers than by vectors.
pub(super) const LEAST_QUERY_ROWS: usize = 5;

/// Words of the two blocks of columns that a step multiplies with.
const COLUMNS: usize = 2 * TILE * TILE;

#[derive(Clone, Copy)]
#[repr(align(64))]
struct Columns([u32; COLUMNS]);

/// Query rows as columns of pairs, unscaled, and the sums of a block of keys.
pub(super) struct RegisterQueries {
    registers: Registers,
    columns: Vec<Columns>,
    scales: [f32; MAX_QUERY_ROWS],
    sums: Box<Sums>,
}

#[repr(align(64))]
struct Sums([f32; KEYS * MAX_QUERY_ROWS]);

impl RegisterQueries {
    /// The rows `ids` of a problem with bf16 queries and keys, if there are registers and all numbers of a row fill them.
    #[inline(always)]
    pub(super) fn new(problem: &Problem, ids: &[RowId]) -> Option<Self> {
        let tiles = problem.tiles?;
        if !problem.dim.is_multiple_of(STEP) || !(LEAST_QUERY_ROWS..=MAX_QUERY_ROWS).contains(&ids.len()) {
            return None;
        }
        let mut columns = vec![Columns([0; COLUMNS]); problem.dim / STEP];
        let mut scales = [0.0; MAX_QUERY_ROWS];
        for (r, (&id, scale)) in ids.iter().zip(&mut scales).enumerate() {
            *scale = problem.row_scale(id);
            let pairs = problem.q.row::<bf16>(id.batch, id.head, id.row).as_chunks::<2>().0;
            for (columns, pairs) in columns.iter_mut().zip(pairs.chunks_exact(TILE)) {
                for (i, &[a, b]) in pairs.iter().enumerate() {
                    let pair = u32::from(a.to_bits()) | u32::from(b.to_bits()) << 16;
                    columns.0[i * TILE + r] = pair;
                    columns.0[(TILE + i) * TILE + MAX_QUERY_ROWS + r] = pair;
                }
            }
        }
        let sums = Box::new(Sums([0.0; KEYS * MAX_QUERY_ROWS]));
        Some(Self { registers: tiles.registers(), columns, scales, sums })
    }
}

/// Scores of all rows for the [`KEYS`] keys from `start` on; the values of the same keys are asked for.
pub(super) struct RegisterScores<'a, K, V> {
    pub(super) queries: &'a mut RegisterQueries,
    pub(super) rows: usize,
    pub(super) k: K,
    pub(super) start: usize,
    pub(super) next: (V, usize),
    pub(super) scores: &'a mut [f32],
}

impl<K: Rows, V: Rows> Kernel for RegisterScores<'_, K, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { queries: RegisterQueries { registers, columns, scales, sums }, rows, k, start, next, scores } = self;
        if !K::BF16 || K::SCATTERED {
            unreachable!("asked for where rows are read as they lie");
        }
        assert!(rows <= MAX_QUERY_ROWS && scores.len() >= rows * KEYS);
        let [first, second] = k.starts(start);
        let (steps, row_bytes) = (columns.len(), second.addr().wrapping_sub(first.addr()));
        // Lines to come, a few for each pair of sixteen keys and a step.
        let [coming, after] = next.0.starts(start);
        let (distance, bytes) = (after.addr().wrapping_sub(coming.addr()), next.0.row_bytes(next.1));
        let lines = bytes.div_ceil(64);
        let turns = steps * KEYS / TILE;
        let each = (KEYS * lines).div_ceil(turns);
        let (mut row, mut line) = (coming, 0);
        let meanwhile = || {
            for _ in 0..each {
                prefetch(row.wrapping_add(64 * line));
                line += 1;
                if line == lines {
                    (row, line) = (row.wrapping_add(distance), 0);
                }
            }
        };
        // SAFETY: whoever made this vouches for the keys; the columns have as many steps as the keys, and there is room for all sums.
        unsafe {
            registers.multiply_rows(first, row_bytes, steps, columns.as_ptr().cast(), sums.0.as_mut_ptr(), meanwhile);
        }
        for (i, sums) in sums.0.as_chunks_mut::<{ TILE * TILE }>().0.iter_mut().enumerate() {
            let mut turned = [0f32; TILE * TILE];
            // SAFETY: both hold sixteen rows of sixteen, and a row of scores has 32 keys from 32 i on.
            unsafe {
                s.transpose(sums.as_ptr(), TILE, turned.as_mut_ptr(), TILE);
                for (r, &scale) in scales.iter().enumerate().take(rows) {
                    let scale = s.splat(scale);
                    for half in 0..2 {
                        for lane in (0..TILE).step_by(S::LANES) {
                            let x = s.load(turned.as_ptr().add((half * MAX_QUERY_ROWS + r) * TILE + lane));
                            let to = scores.as_mut_ptr().add(r * KEYS + (2 * i + half) * TILE + lane);
                            s.store(to, s.mul(x, scale));
                        }
                    }
                }
            }
        }
    }
}
