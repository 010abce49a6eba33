//! What gradients of scores and of decayed rows are to queries, keys and the decays between them.
//!
//! A score is a product of two rows times the decay between them, so its gradient times itself is what it gives to each decay between
//! the two; likewise the products of rows with the states before and after the chunk. Decays per row count those products, which
//! leaves nothing to cancel. Decays per channel take them from the gradients of the rows: what channel `d` of a reader's gradient is
//! times the reader's, less the same of the key.

use super::Decay;
use super::products::{Multiply, Part, Turn};
use super::rows::{multiply_rows, scale_row};
use super::scores::{Sizes, WHOLE_BLOCK, dot};
use super::work::{CHANNELS, Work};
use crate::simd::{Kernel, Simd};

impl Work<'_, '_> {
    /// With no decay, or one per row. `whole` is what the chunk's decay is to the state after it.
    #[inline(always)]
    pub(super) fn through_tokens<S: Simd>(&mut self, s: S, n: usize, whole: f64) {
        let Sizes { dim, rows: room, across, group, .. } = self.sizes;
        let delta = self.job.inputs.of.delta;
        let wide = self.wide;
        if matches!(self.job.inputs.of.decay, Decay::Token(_)) {
            self.of_decays(s, n, whole);
        } else if delta {
            for row in self.d_reads.chunks_exact_mut(wide).take(n) {
                scale_row(s, row, -1.0);
            }
        }
        let keys = if self.job.inputs.of.beta.is_some() && !delta { &*self.scaled } else { &*self.keys };
        for g in 0..group + usize::from(delta) {
            let own = g == group;
            let to = if own { &mut *self.d_reads } else { &mut self.d_queries[g * room * wide..] };
            let d_scores = &self.d_scores[g * room * across..];
            let (a, b, c) = ((d_scores, across), (keys, wide), (to, wide));
            s.call(Multiply { part: Part::Lower, rows: n, columns: dim, depth: n, a, b, c, add: true });
            s.call(Turn { rows: n, columns: n, from: (d_scores, across), to: (&mut *self.d_turned, across) });
            let readers = if own { &*self.keys } else { &self.queries[g * room * wide..] };
            let (a, b, c) = ((&*self.d_turned, across), (readers, wide), (&mut *self.d_keys, wide));
            s.call(Multiply { part: Part::Upper, rows: n, columns: dim, depth: n, a, b, c, add: true });
        }
    }

    /// Gradients of decays per row; gradients of scores and of decayed rows become those without the decay.
    #[inline(always)]
    fn of_decays<S: Simd>(&mut self, s: S, n: usize, whole: f64) {
        let Sizes { padded, rows: room, across, group, .. } = self.sizes;
        let of = &self.job.inputs.of;
        let wide = self.wide;
        let (each, rest) = self.decay.split_at_mut(across);
        let (before, rest) = rest.split_at_mut(across);
        let (after, between) = rest.split_at_mut(across);
        // Of pairs of rows, by the later and by the earlier row; of rows and the states before and after the chunk.
        let [mut later, mut earlier] = [[0f64; super::MAX_CHUNK]; 2];
        let [mut reads, mut writes] = [[0f64; super::MAX_CHUNK]; 2];
        between[..across].fill(0.0);
        for i in 0..n {
            let seen = (i + 1).next_multiple_of(S::LANES);
            scale_row(s, &mut between[..seen], each[i]);
            between[i] = 1.0;
            for g in 0..group + usize::from(of.delta) {
                let own = g == group;
                let d = &mut self.d_scores[(g * room + i) * across..][..across];
                let scores = if own { &self.own[i * across..] } else { &self.scores[(g * room + i) * across..] };
                // Products of keys come times the factor of the later row.
                let factor = if own && of.beta.is_some() { 1.0 / f64::from(self.beta[i]) } else { 1.0 };
                let mut sum = 0f64;
                for j in 0..i {
                    let both = factor * f64::from(d[j]) * f64::from(scores[j]);
                    sum += both;
                    earlier[j] += both;
                }
                later[i] += sum;
                multiply_rows(s, &mut d[..seen], &between[..seen]);
            }
            for g in 0..group {
                let row = &mut self.d_queries[(g * room + i) * wide..][..padded];
                reads[i] += f64::from(dot(s, &self.q[(g * room + i) * padded..][..padded], row));
                scale_row(s, row, before[i]);
            }
            if of.delta {
                let row = &mut self.d_reads[i * wide..][..padded];
                reads[i] += f64::from(dot(s, &self.k[i * padded..][..padded], row));
                scale_row(s, row, -before[i]);
            }
            let row = &mut self.d_keys[i * wide..][..padded];
            writes[i] = f64::from(dot(s, &self.last[i * wide..][..padded], row));
            scale_row(s, row, after[i]);
        }
        // A decay is part of what rows from its own on read of the state before the chunk, of what rows before it give to the state
        // after it, and of all pairs around it.
        let mut written: f64 = writes[..n].iter().sum();
        let (mut read, mut pairs) = (0f64, 0f64);
        for t in (0..n).rev() {
            read += reads[t];
            written -= writes[t];
            pairs += later[t] - earlier[t];
            self.dg[t * padded] = if each[t] == 0.0 { 0.0 } else { (whole + read + written + pairs) as f32 };
        }
    }

    /// With a decay per channel. The first row of `channels` holds what the chunk's decays are to the state after it.
    #[inline(always)]
    pub(super) fn through_channels<S: Simd>(&mut self, s: S, n: usize) {
        let Sizes { dim, padded, rows: room, across, group } = self.sizes;
        let of = &self.job.inputs.of;
        let (sets, wide) = (self.sets, self.wide);
        let readers = group + usize::from(self.solves);
        let (first, second) = self.keys.split_at(room * wide);
        let keys = [if of.beta.is_some() && !of.delta { &*self.scaled } else { first }, second];
        // Rows that read before they write: by the delta rule keys, after their decay; else before it.
        let early = of.pair.is_some();
        let reads = if early { &*self.asks } else { first };
        let place = |set: usize, reader: usize| (set * (group + 1) + reader) * room * across;
        let (total, rest) = self.channels.split_at_mut(wide);
        let (along, rest) = rest.split_at_mut(wide);
        let (whole, rest) = rest.split_at_mut(wide);
        let (before, rest) = rest.split_at_mut(wide);
        let (block_rows, moved) = rest.split_at_mut((CHANNELS - 4) * wide);
        for set in 0..sets {
            let from = set * room * wide;
            let (d_keys, last) = (self.d_keys[from..].chunks_exact(wide), self.last[from..].chunks_exact(wide));
            for (d, last) in d_keys.zip(last).take(n) {
                add_products(s, &mut total[..padded], &d[..padded], &last[..padded]);
            }
            for reader in 0..readers {
                let from = (&self.d_scores[place(set, reader)..], across);
                let to = (&mut self.d_turned[place(set, reader)..], across);
                s.call(Turn { rows: n, columns: n, from, to });
            }
        }
        // Keys, from the last block to the first: gradients of keys times the decay up to the start of the block at hand.
        for start in (0..n).step_by(WHOLE_BLOCK).rev() {
            let end = (start + WHOLE_BLOCK).min(n);
            whole.fill(1.0);
            for i in (start..end).rev() {
                for set in 0..sets {
                    multiply_rows(s, &mut self.d_keys[(set * room + i) * wide..][..padded], whole);
                }
                multiply_rows(s, whole, &self.g[i * padded..][..padded]);
            }
            for set in 0..sets {
                for row in self.d_keys[set * room * wide..].chunks_exact_mut(wide).take(start) {
                    multiply_rows(s, &mut row[..padded], whole);
                }
            }
            for reader in 0..readers {
                let own = reader == group;
                let rows = if own { reads } else { &self.queries[reader * room * wide..] };
                along.fill(1.0);
                for i in start..end {
                    let to = &mut block_rows[(i - start) * wide..][..padded];
                    to.copy_from_slice(&rows[i * wide..][..padded]);
                    if own && early {
                        multiply_rows(s, to, along);
                    }
                    multiply_rows(s, along, &self.g[i * padded..][..padded]);
                    if !(own && early) {
                        multiply_rows(s, to, along);
                    }
                }
                for set in 0..sets {
                    let a = (&self.d_turned[place(set, reader) + start..], across);
                    let (b, c) = ((&*block_rows, wide), (&mut self.d_keys[set * room * wide..], wide));
                    let depth = end - start;
                    s.call(Multiply { part: Part::Whole, rows: start, columns: dim, depth, a, b, c, add: true });
                }
            }
        }
        // Readers, from the first block to the last: keys before the block times the decay up to its start.
        before.fill(1.0);
        for start in (0..n).step_by(WHOLE_BLOCK) {
            let end = (start + WHOLE_BLOCK).min(n);
            for reader in 0..readers {
                let own = reader == group;
                let to = if own { &mut *self.d_reads } else { &mut self.d_queries[reader * room * wide..] };
                for i in start..end {
                    let row = &mut to[i * wide..][..padded];
                    multiply_rows(s, row, before);
                    if own && !early {
                        scale_row(s, row, -1.0);
                    }
                }
                for set in 0..sets {
                    let a = (&self.d_scores[place(set, reader) + start * across..], across);
                    let (b, c) = ((&moved[set * room * wide..], wide), (&mut to[start * wide..], wide));
                    let rows = end - start;
                    s.call(Multiply { part: Part::Whole, rows, columns: dim, depth: start, a, b, c, add: true });
                }
                along.fill(1.0);
                for i in start..end {
                    let row = &mut to[i * wide..][..padded];
                    if own && early {
                        multiply_rows(s, row, along);
                    }
                    multiply_rows(s, along, &self.g[i * padded..][..padded]);
                    if !(own && early) {
                        multiply_rows(s, row, along);
                    }
                }
            }
            for (set, &keys) in keys.iter().enumerate().take(sets) {
                s.call(Pairs {
                    rows: [start, end],
                    sizes: self.sizes,
                    wide,
                    decays: &*self.g,
                    d_scores: &self.d_scores[place(set, 0)..],
                    queries: &*self.queries,
                    reads: self.solves.then_some(reads),
                    early,
                    keys,
                    d_queries: &mut *self.d_queries,
                    d_reads: &mut *self.d_reads,
                    d_keys: &mut self.d_keys[set * room * wide..],
                });
            }
            whole.fill(1.0);
            for i in (start..end).rev() {
                for (set, keys) in keys.iter().enumerate().take(sets) {
                    let to = &mut moved[(set * room + i) * wide..][..padded];
                    to.copy_from_slice(&keys[i * wide..][..padded]);
                    multiply_rows(s, to, whole);
                }
                multiply_rows(s, whole, &self.g[i * padded..][..padded]);
            }
            for set in 0..sets {
                for row in moved[set * room * wide..].chunks_exact_mut(wide).take(start) {
                    multiply_rows(s, &mut row[..padded], whole);
                }
            }
            multiply_rows(s, before, whole);
        }
        // Decays: those of all rows from each on. Products of a row with itself have no decay between them and come after.
        for i in (0..n).rev() {
            let place_of = |set: usize| (set * room + i) * wide;
            for g in 0..group {
                let at = (g * room + i) * wide;
                add_products(s, &mut total[..padded], &self.queries[at..][..padded], &self.d_queries[at..][..padded]);
            }
            let own = i * wide;
            if self.solves && !early {
                add_products(s, &mut total[..padded], &reads[own..][..padded], &self.d_reads[own..][..padded]);
            }
            for (set, keys) in keys.iter().enumerate().take(sets) {
                let d_key = &self.d_keys[place_of(set)..][..padded];
                for ((total, key), d) in total.iter_mut().zip(&keys[i * wide..][..padded]).zip(d_key) {
                    *total -= key * d;
                }
            }
            let decays = &self.g[i * padded..][..padded];
            for ((to, total), decay) in self.dg[i * padded..][..padded].iter_mut().zip(&*total).zip(decays) {
                *to = if *decay == 0.0 { 0.0 } else { *total };
            }
            if early {
                add_products(s, &mut total[..padded], &reads[own..][..padded], &self.d_reads[own..][..padded]);
            }
            for (set, keys) in keys.iter().enumerate().take(sets) {
                let key = &keys[i * wide..][..padded];
                let d_key = &mut self.d_keys[place_of(set)..][..padded];
                for g in 0..group {
                    let weight = self.d_scores[place(set, g) + i * across + i];
                    let at = (g * room + i) * wide;
                    let (q, d) = (&self.queries[at..][..padded], &mut self.d_queries[at..][..padded]);
                    for (((d, q), key), d_key) in d.iter_mut().zip(q).zip(key).zip(&mut *d_key) {
                        *d += weight * key;
                        *d_key += weight * q;
                    }
                }
            }
        }
    }
}

/// `to += a b`, number by number.
#[inline(always)]
fn add_products<S: Simd>(s: S, to: &mut [f32], a: &[f32], b: &[f32]) {
    for ((to, a), b) in to.chunks_exact_mut(S::LANES).zip(a.chunks_exact(S::LANES)).zip(b.chunks_exact(S::LANES)) {
        // SAFETY: the chunks have LANES floats.
        unsafe { s.store(to.as_mut_ptr(), s.fma(s.load(a.as_ptr()), s.load(b.as_ptr()), s.load(to.as_ptr()))) };
    }
}

/// Pairs of different rows of a block, channel by channel.
struct Pairs<'a> {
    /// The first row and that after the last.
    rows: [usize; 2],
    sizes: Sizes,
    wide: usize,
    decays: &'a [f32],
    d_scores: &'a [f32],
    queries: &'a [f32],
    /// Rows that read before they write, and whether they do so before their decay.
    reads: Option<&'a [f32]>,
    early: bool,
    keys: &'a [f32],
    d_queries: &'a mut [f32],
    d_reads: &'a mut [f32],
    d_keys: &'a mut [f32],
}

impl Kernel for Pairs<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rows: [start, end], sizes, wide, decays, d_scores, queries, reads, keys, .. } = self;
        let Self { d_queries, d_reads, d_keys, early, .. } = self;
        let Sizes { padded, rows: room, across, group, .. } = sizes;
        let last = (end - 1) * wide + padded;
        let heads = (group - 1) * room * wide;
        assert!(decays.len() >= end * padded && keys.len() >= last && d_keys.len() >= last && padded <= wide);
        assert!(queries.len() >= heads + last && d_queries.len() >= heads + last);
        assert!(reads.is_none_or(|reads| reads.len() >= last && d_reads.len() >= last));
        for at in (0..padded).step_by(S::LANES) {
            for j in start..end {
                // SAFETY: vectors from `at` on of rows below `end`, which all of these have by the assertions above.
                unsafe {
                    let key = s.load(keys.as_ptr().add(j * wide + at));
                    let to = d_keys.as_mut_ptr().add(j * wide + at);
                    let mut d_key = s.load(to);
                    let mut decay = s.splat(1.0);
                    for i in j + 1..end {
                        let before = decay;
                        decay = s.mul(decay, s.load(decays.as_ptr().add(i * padded + at)));
                        let moved = s.mul(decay, key);
                        let mut back = s.zero();
                        for g in 0..group {
                            let weight = s.splat(d_scores[(g * room + i) * across + j]);
                            let place = (g * room + i) * wide + at;
                            let d = d_queries.as_mut_ptr().add(place);
                            s.store(d, s.fma(weight, moved, s.load(d)));
                            back = s.fma(weight, s.load(queries.as_ptr().add(place)), back);
                        }
                        if let Some(reads) = reads {
                            let weight = s.splat(d_scores[(group * room + i) * across + j]);
                            let between = if early { before } else { decay };
                            let d = d_reads.as_mut_ptr().add(i * wide + at);
                            s.store(d, s.fma(weight, s.mul(between, key), s.load(d)));
                            let read = s.mul(weight, s.load(reads.as_ptr().add(i * wide + at)));
                            d_key = s.fma(between, read, d_key);
                        }
                        d_key = s.fma(decay, back, d_key);
                    }
                    s.store(to, d_key);
                }
            }
        }
    }
}
