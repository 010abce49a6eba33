//! The rows of a block with one another where each channel decays by itself: a key's row is multiplied by the decays of the rows after
//! it, one after the other, and each of these reads it on the way.

use super::scores::{BLOCK, dot, dot3};
use crate::simd::{Kernel, Simd};

/// Keys that are decayed and read side by side.
const KEYS: usize = 4;

/// What of a block's rows is to be computed. Rows are `padded` floats apart.
pub(super) struct Block<'a> {
    /// Rows, at most [`BLOCK`].
    pub(super) n: usize,
    pub(super) padded: usize,
    /// Decays and keys of the rows.
    pub(super) decays: &'a [f32],
    pub(super) keys: &'a [f32],
    /// Queries of each head, the first of the block's rows; heads are `apart` floats apart.
    pub(super) queries: &'a [f32],
    pub(super) group: usize,
    pub(super) apart: usize,
    /// Queries read keys before their own row's decay, and their own row's key times this.
    pub(super) bonus: Option<&'a [f32]>,
    /// Rows that read earlier keys and write, and whether before their own decay.
    pub(super) own: Option<(&'a [f32], bool)>,
    /// Gets the keys times the decays up to the block's end.
    pub(super) tail: &'a mut [f32],
    /// Gets the products, `[reader][row][key]`, [`BLOCK`] rows and keys; those of `own` after those of the heads.
    pub(super) pairs: &'a mut [f32],
}

/// When a row reads keys: never, before its own decay, or after it.
const NEVER: u8 = 0;
const BEFORE: u8 = 1;
const AFTER: u8 = 2;

impl Kernel for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { n, padded, decays, keys, queries, group, apart, bonus, own, tail, pairs } = self;
        let row = |rows: &[f32], i: usize| rows[i * padded..][..padded].as_ptr();
        assert!(n <= BLOCK && padded.is_multiple_of(S::LANES) && tail.len() >= n * padded);
        assert!(pairs.len() >= (group + 1) * BLOCK * BLOCK);
        let query = |head: usize| &queries[head * apart..];
        let (mine, early) = own.unwrap_or((keys, false));
        for i in 0..n {
            let at = |reader: usize| (reader * BLOCK + i) * BLOCK;
            for first in (0..i).step_by(KEYS) {
                let count = KEYS.min(i - first);
                let tail = &mut tail[first * padded..][..count * padded];
                if bonus.is_some() {
                    for head in 1..group {
                        read_one(s, &query(head)[i * padded..][..padded], tail, &mut pairs[at(head) + first..]);
                    }
                }
                let rows = [row(decays, i), row(query(0), i), row(mine, i)];
                // SAFETY: all rows have `padded` floats, as many as were sliced; there are `count` keys.
                let [of_query, of_own] = unsafe {
                    let key = tail.as_mut_ptr();
                    match (bonus.is_some(), own.is_some(), early) {
                        (true, ..) => read_all::<S, BEFORE, NEVER>(s, padded, rows, count, key),
                        (_, false, _) => read_all::<S, AFTER, NEVER>(s, padded, rows, count, key),
                        (_, true, true) => read_all::<S, AFTER, BEFORE>(s, padded, rows, count, key),
                        (_, true, false) => read_all::<S, AFTER, AFTER>(s, padded, rows, count, key),
                    }
                };
                pairs[at(0) + first..][..count].copy_from_slice(&of_query[..count]);
                if own.is_some() {
                    pairs[at(group) + first..][..count].copy_from_slice(&of_own[..count]);
                }
                if bonus.is_none() {
                    for head in 1..group {
                        read_one(s, &query(head)[i * padded..][..padded], tail, &mut pairs[at(head) + first..]);
                    }
                }
            }
            let key = &keys[i * padded..][..padded];
            for head in 0..group {
                let query = &query(head)[i * padded..][..padded];
                pairs[at(head) + i] = match bonus {
                    None => dot(s, query, key),
                    Some(bonus) => dot3(s, query, key, &bonus[..padded]),
                };
            }
            tail[i * padded..][..padded].copy_from_slice(key);
        }
    }
}

/// Products of a row with keys, which follow one another.
#[inline(always)]
fn read_one<S: Simd>(s: S, query: &[f32], keys: &[f32], to: &mut [f32]) {
    for (key, to) in keys.chunks_exact(query.len()).zip(to) {
        *to = dot(s, query, key);
    }
}

/// Multiplies `count` keys, at most [`KEYS`], by the decays of a row, and returns what its query and another row of it read of them.
///
/// # Safety
/// `rows` (decays, query, other) and the keys, one after another, have `padded` floats, a multiple of `LANES`.
#[inline(always)]
unsafe fn read_all<S: Simd, const QUERY: u8, const OWN: u8>(
    s: S,
    padded: usize,
    rows: [*const f32; 3],
    count: usize,
    keys: *mut f32,
) -> [[f32; KEYS]; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        match count {
            1 => read::<S, QUERY, OWN, 1>(s, padded, rows, keys),
            2 => read::<S, QUERY, OWN, 2>(s, padded, rows, keys),
            3 => read::<S, QUERY, OWN, 3>(s, padded, rows, keys),
            _ => read::<S, QUERY, OWN, KEYS>(s, padded, rows, keys),
        }
    }
}

/// # Safety
/// As [`read_all`], of `N` keys.
#[inline(always)]
unsafe fn read<S: Simd, const QUERY: u8, const OWN: u8, const N: usize>(
    s: S,
    padded: usize,
    [decays, query, own]: [*const f32; 3],
    keys: *mut f32,
) -> [[f32; KEYS]; 2] {
    let mut sums = [[s.zero(); KEYS]; 2];
    for d in (0..padded).step_by(S::LANES) {
        // SAFETY: the caller's promise.
        unsafe {
            let (decay, query) = (s.load(decays.add(d)), s.load(query.add(d)));
            let own = if OWN == NEVER { query } else { s.load(own.add(d)) };
            let [of_query, of_own] = &mut sums;
            for j in 0..N {
                let at = keys.add(j * padded + d);
                let key = s.load(at);
                let decayed = s.mul(key, decay);
                s.store(at, decayed);
                of_query[j] = s.fma(query, if QUERY == BEFORE { key } else { decayed }, of_query[j]);
                if OWN != NEVER {
                    of_own[j] = s.fma(own, if OWN == BEFORE { key } else { decayed }, of_own[j]);
                }
            }
        }
    }
    s.sums(sums)
}
