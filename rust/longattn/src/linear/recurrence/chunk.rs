//! One state head of one sequence, chunk by chunk, for some of its value columns.

use super::columns::Fade;
use super::rows::{Mapped, forgotten, load, load_numbers, multiply_rows, scale_row};
use super::scores::{BLOCK, Chunk, Pair, Sizes, add_up, dot, product};
use super::{Decay, Job};
use crate::dense::micro::panel;
use crate::dense::packing::pack_values;
use crate::dense::rows::{Strided, is_finite};
use crate::dense::scratch::Scratch;
use crate::dense::tile::KEYS;
use crate::kv::convert::narrow;
use crate::parallel::Cancel;
use crate::simd::{Kernel, MAX_LANES, Simd};
use crate::tensor::{Element, with_element};
use std::ops::Range;

/// The value columns `columns` of the state of one head of one sequence, over all its rows.
pub(super) struct Item<'a, 's> {
    pub(super) job: &'a Job<'a>,
    pub(super) sequence: usize,
    pub(super) head: usize,
    pub(super) columns: Range<usize>,
    pub(super) cancel: &'a Cancel,
    pub(super) scratch: &'s mut Scratch,
}

impl Kernel for Item<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        s.call(Body(self));
    }
}

/// [`Item`], compiled once for the base of an instruction set.
struct Body<'a, 's>(Item<'a, 's>);

/// Packs columns of rows of values into panels of [`KEYS`] rows.
struct Values<T> {
    from: Strided<T>,
    rows: Range<usize>,
    dim: usize,
    padded: usize,
    wide: *mut f32,
    to: *mut f32,
}

impl<T: Element> Kernel for Values<T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: `Body` has rows of `dim` numbers and buffers of `padded` floats and of the panels.
        unsafe { pack_values(s, self.from, self.rows, self.dim, self.padded, self.wide, KEYS, self.to) }
    }
}

impl Kernel for Body<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Item { job, sequence, head, columns, cancel, scratch } = self.0;
        let of = &job.of;
        let (batch, rows) = job.sequence(sequence);
        let readers = job.readers(head);
        let (panel, group, delta) = (panel::<S>(), readers.len(), of.delta);
        let chunk = of.chunk.min(rows.len());
        let sizes = Sizes::new::<S>(chunk, job.dim, group);
        let Sizes { dim, padded, rows: room, across, .. } = sizes;
        let width = columns.len().next_multiple_of(panel);
        let panels = width / panel;
        let state_rows = dim.next_multiple_of(S::ROWS);
        let (by_channel, channel_room) = match of.decay {
            Decay::Channel(_) => (room * padded, sizes.channel_room()),
            _ => (0, 0),
        };
        let solves = delta || of.pair.is_some();
        // Sizes of what only a pair of keys has.
        let second = |n: usize| if of.pair.is_some() { n } else { 0 };
        let fades = if matches!(of.decay, Decay::Value { .. }) { panels * KEYS * panel } else { 0 };
        let [
            q,
            k,
            turned,
            scores,
            own,
            inverse,
            values,
            updates,
            states,
            out,
            g,
            working,
            decay,
            beta,
            sums,
            wide,
            reads,
            b,
            b_turned,
            b_scores,
            b_own,
            gathered,
            fading,
            bonus,
        ] = scratch.extra.carve([
            group * room * padded,
            room * padded,
            sizes.channels::<S>() * across,
            group * room * across,
            if solves { room * across } else { 0 },
            if solves { room * across } else { 0 },
            panels * KEYS * panel,
            if solves { room * panel } else { 0 },
            panels * state_rows * panel,
            group * room * width,
            by_channel,
            channel_room,
            4 * across,
            across,
            padded,
            width,
            second(room * padded),
            second(room * padded),
            second(sizes.channels::<S>() * across),
            second(group * room * across),
            second(room * across),
            second(room * panel),
            fades,
            padded,
        ]);
        turned.fill(0.0);
        b_turned.fill(0.0);
        if let Some(given) = of.bonus {
            bonus[..dim].copy_from_slice(&given[head * dim..][..dim]);
            bonus[dim..].fill(0.0);
        }
        let mut map_k = match (of.maps[1], of.k) {
            (Some(map), Some(k)) => Some(Mapped::new(s, map, k, [batch, job.key_head(head)], false)),
            _ => None,
        };
        let mut maps_q = vec![];
        if let Some(map) = of.maps[0] {
            for reader in readers.clone() {
                maps_q.push(Mapped::new(s, map, of.q, [batch, reader], true));
            }
        }
        states.fill(0.0);
        if let Some(first) = &job.first {
            for d in 0..dim {
                let row = &first.row::<f32>(sequence, head, d)[columns.clone()];
                for (p, from) in row.chunks(panel).enumerate() {
                    states[(p * state_rows + d) * panel..][..from.len()].copy_from_slice(from);
                }
            }
        }
        if of.normaliser.is_some() {
            let first = (sequence * job.heads + head) * dim;
            sums.fill(0.0);
            sums[..dim].copy_from_slice(&job.sums[first..first + dim]);
        }

        let mut at = rows.start;
        // Up to here, rows are taken one by one: some hold numbers that are not finite, which may reach no row before them.
        let mut one_by_one = at;
        while at < rows.end {
            if cancel.is_cancelled() {
                return;
            }
            let n = if at < one_by_one { 1 } else { chunk.min(rows.end - at) };
            let now = at..at + n;
            let tiles = n.next_multiple_of(S::ROWS);
            // Queries, keys, values and gates of the chunk.
            let mut finite = true;
            for (i, reader) in readers.clone().enumerate() {
                let to = &mut q[i * room * padded..][..room * padded];
                finite &= match maps_q.get_mut(i) {
                    Some(map) => map.load(s, now.clone(), to, padded, of.scale),
                    None => load(s, &of.q, [batch, reader], now.clone(), to, padded, of.unit, of.scale),
                };
                to[n * padded..tiles * padded].fill(0.0);
            }
            if let Decay::Channel(view) = &of.decay {
                load(s, view, [batch, head], now.clone(), g, padded, None, 1.0);
            }
            match &of.k {
                Some(view) => {
                    finite &= match &mut map_k {
                        Some(map) => map.load(s, now.clone(), k, padded, 1.0),
                        None => load(s, view, [batch, job.key_head(head)], now.clone(), k, padded, of.unit, 1.0),
                    };
                }
                None => forgotten(s, &g[..n * padded], &mut k[..n * padded]),
            }
            k[n * padded..(tiles + MAX_LANES) * padded].fill(0.0);
            if let Some(views) = &of.pair {
                for (view, to) in views.iter().zip([&mut *reads, &mut *b]) {
                    finite &= load(s, view, [batch, job.key_head(head)], now.clone(), to, padded, None, 1.0);
                    to[n * padded..(tiles + MAX_LANES) * padded].fill(0.0);
                }
            }
            let panels_of = [(Some(of.v), &mut *values), (of.decay.of_values(), &mut *fading)];
            for (view, to) in panels_of {
                let Some(view) = view else { continue };
                with_element!(view.dtype(), T => {
                    let base = view.head::<T>(batch, head).wrapping_add(columns.start);
                    let from = Strided { base, stride: view.row_stride() };
                    let (wide, to) = (wide.as_mut_ptr(), to.as_mut_ptr());
                    s.call(Values { from, rows: now.clone(), dim: columns.len(), padded: width, wide, to });
                });
            }
            for p in 0..panels {
                finite &= is_finite(s, &values[p * KEYS * panel..][..n * panel]);
            }
            if n > 1 && !finite && !of.squares {
                one_by_one = at + n;
                continue;
            }
            let beta = of.beta.map(|view| {
                load_numbers(&view, [batch, head], now.clone(), &mut beta[..n]);
                beta[n..].fill(0.0);
                &beta[..]
            });
            if let Some(beta) = beta
                && !delta
            {
                for (row, &beta) in k.chunks_exact_mut(padded).zip(&beta[..n]) {
                    scale_row(s, row, beta);
                }
            }

            let bonus = of.bonus.map(|_| &*bonus);
            let pair = of.pair.map(|_| Pair {
                reads: &mut *reads,
                b: &mut *b,
                turned: &mut *b_turned,
                scores: &mut *b_scores,
                own: &mut *b_own,
            });
            let mut rows_of = Chunk { sizes, n, q, k, turned, scores, delta, inverse, own, beta, bonus, pair };
            let mut total = 1.0;
            match &of.decay {
                Decay::None | Decay::Value { .. } => {
                    rows_of.by_tokens(s, None);
                    if of.squares {
                        rows_of.square(s);
                    }
                }
                Decay::Token(view) => {
                    load_numbers(view, [batch, head], now.clone(), &mut decay[..n]);
                    total = rows_of.by_tokens(s, Some(&mut *decay));
                }
                Decay::Channel(_) => rows_of.by_channels(s, g, working),
            }
            for p in 0..panels {
                let state = &mut states[p * state_rows * panel..][..state_rows * panel];
                let value = &mut values[p * KEYS * panel..][..KEYS * panel];
                if delta {
                    // What the state does not hold of the values, rows one after another.
                    product(s, [0, n], dim, false, k, padded, state, panel, value, panel, true);
                    product(s, [0, n], n, true, inverse, across, value, panel, updates, panel, false);
                }
                if let Decay::Value { fills, .. } = of.decay {
                    let logs = &mut fading[p * KEYS * panel..][..KEYS * panel];
                    let fade = Fade { sizes, n, width, fills, q, scores, turned, logs };
                    fade.panel(s, value, state, &mut out[p * panel..]);
                    continue;
                }
                if of.pair.is_some() {
                    // What is read of the state, by the state before the chunk, its own keys, and what is read for rows before.
                    product(s, [0, n], dim, false, reads, padded, state, panel, gathered, panel, false);
                    product(s, [0, n], n, true, own, across, value, panel, gathered, panel, true);
                    product(s, [0, n], n, true, inverse, across, gathered, panel, updates, panel, false);
                }
                let value = if delta { &*updates } else { &*value };
                for i in 0..group {
                    let out = &mut out[i * room * width + p * panel..];
                    if let Some(skip) = of.skip {
                        for row in 0..n {
                            let to = &mut out[row * width..][..panel];
                            to.copy_from_slice(&value[row * panel..][..panel]);
                            scale_row(s, to, skip[head]);
                        }
                    }
                    let q = &q[i * room * padded..];
                    product(s, [0, n], dim, false, q, padded, state, panel, out, width, of.skip.is_some());
                    let scores = &scores[i * room * across..];
                    product(s, [0, n], n, true, scores, across, value, panel, out, width, true);
                    if of.pair.is_some() {
                        let scores = &b_scores[i * room * across..];
                        product(s, [0, n], n, true, scores, across, updates, panel, out, width, true);
                    }
                }
                match of.decay {
                    Decay::None | Decay::Value { .. } => {}
                    Decay::Token(_) => scale_row(s, &mut state[..dim * panel], total),
                    Decay::Channel(_) => {
                        for (row, &factor) in state.chunks_exact_mut(panel).zip(&working[..dim]) {
                            scale_row(s, row, factor);
                        }
                    }
                }
                product(s, [0, dim], n, false, turned, across, value, panel, state, panel, true);
                if of.pair.is_some() {
                    product(s, [0, dim], n, false, b_turned, across, updates, panel, state, panel, true);
                }
            }
            if let Some(eps) = of.normaliser {
                for i in 0..group {
                    for row in 0..n {
                        let scores = &scores[(i * room + row) * across..][..=row];
                        let q = &q[(i * room + row) * padded..][..padded];
                        let mass = add_up(s, scores) + dot(s, q, &sums[..padded]) + eps;
                        let factor = if mass == 0.0 { 0.0 } else { 1.0 / mass };
                        scale_row(s, &mut out[(i * room + row) * width..][..width], factor);
                    }
                }
                match of.decay {
                    Decay::None | Decay::Value { .. } => {}
                    Decay::Token(_) => scale_row(s, sums, total),
                    Decay::Channel(_) => multiply_rows(s, sums, &working[..padded]),
                }
                for (sum, row) in sums.iter_mut().zip(turned.chunks_exact(across)).take(dim) {
                    *sum += add_up(s, &row[..n]);
                }
            }
            for i in 0..group {
                for row in 0..n {
                    let from = &out[(i * room + row) * width..][..columns.len()];
                    with_element!(job.out.dtype(), T => {
                        let to = job.out.row_ptr::<T>(batch, job.out_head(head, i), at + row);
                        // SAFETY: the row has value_dim >= columns.end numbers, and these columns of it are this item's alone.
                        unsafe { narrow(from, to.add(columns.start).cast(), T::DTYPE) };
                    });
                }
            }
            at += n;
        }
        for d in 0..dim {
            let to = job.state.row_ptr::<f32>(sequence, head, d);
            for (p, first) in columns.clone().step_by(panel).enumerate() {
                let n = panel.min(columns.end - first);
                let from = &states[(p * state_rows + d) * panel..][..n];
                // SAFETY: the row has the columns first..first + n <= columns.end, which are this item's alone.
                unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.add(first), n) };
            }
            if of.normaliser.is_some() && columns.start == 0 {
                // SAFETY: with a normaliser, rows of states have one number more than values, which the first item writes.
                unsafe { to.add(job.value_dim).write(sums[d]) };
            }
        }
    }
}

const _: () = assert!(super::MAX_CHUNK.is_multiple_of(BLOCK) && super::MAX_CHUNK <= KEYS);
