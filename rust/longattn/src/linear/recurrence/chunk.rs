//! One state head of one sequence, chunk by chunk, for some of its value columns.

use super::columns::Fade;
use super::coming::Coming;
use super::products::{COMPUTED, Factor, Multiplier, Part};
use super::rows::{Mapped, forgotten, load, load_numbers, multiply_rows, scale_row};
use super::scores::{Chunk, Pair, Parts, Sides, Sizes, WHOLE_BLOCK, add_up, dot};
use super::{Decay, Job};
use crate::dense::micro::panel;
use crate::dense::packing::pack_values;
use crate::dense::parts::parts_of;
use crate::dense::rows::{Strided, is_finite};
use crate::dense::scratch::Scratch;
use crate::dense::tile::KEYS;
use crate::kv::convert::narrow;
use crate::parallel::Cancel;
use crate::simd::tiles::{STEP, TILE, Tiles};
use crate::simd::{Kernel, MAX_LANES, Simd};
use crate::tensor::{DType, Element, with_element};
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
        match self.job.tiles {
            Some(tiles) if S::DOT2_BF16 && self.fills_registers() => {
                s.call_pairs(Body { item: self, tiles: Some(tiles) });
            }
            _ => s.call(Body { item: self, tiles: None }),
        }
    }
}

impl Item<'_, '_> {
    /// Whether matrix registers are worth it: for arrays of bf16 and f16, as three parts of floats take as long as vectors; where they,
    /// 32 numbers wide, are filled to two thirds; without decays per value column, which vectors compute. The same for all items of a
    /// sequence, so that the number of threads changes no bit.
    fn fills_registers(&self) -> bool {
        let of = &self.job.of;
        let fills = |n: usize| 2 * n.next_multiple_of(STEP) <= 3 * n;
        let chunk = of.chunk.min(self.job.sequence(self.sequence).1.len());
        let mut arrays = of.k.iter().chain(of.pair.iter().flatten()).chain([&of.q, &of.v]);
        arrays.all(|x| x.dtype() != DType::F32)
            && of.decay.of_values().is_none()
            && fills(self.job.dim)
            && fills(self.job.value_dim)
            && fills(chunk)
    }

    /// In how many parts registers multiply.
    fn parts(&self) -> Parts {
        let of = &self.job.of;
        let came = |x: DType, as_it_is: bool| if as_it_is { parts_of(x) } else { COMPUTED };
        let (plain, scales_keys) = (of.unit.is_none(), of.beta.is_some() && !of.delta);
        Parts {
            q: came(of.q.dtype(), plain && of.maps[0].is_none() && of.scale == 1.0),
            k: of.k.map_or(COMPUTED, |k| came(k.dtype(), plain && of.maps[1].is_none() && !scales_keys)),
            v: parts_of(of.v.dtype()),
        }
    }
}

/// [`Item`], compiled once for vectors of the base of an instruction set, and once for matrix registers where it has some.
struct Body<'a, 's> {
    item: Item<'a, 's>,
    tiles: Option<Tiles>,
}

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
        let parts = self.item.parts();
        let Item { job, sequence, head, columns, cancel, scratch } = self.item;
        let mut m = Multiplier::new(self.tiles);
        let of = &job.of;
        let (batch, rows) = job.sequence(sequence);
        let readers = job.readers(head);
        let (panel, group, delta) = (panel::<S>(), readers.len(), of.delta);
        let chunk = of.chunk.min(rows.len());
        let sizes = Sizes::new::<S>(chunk, job.dim, group);
        let Sizes { dim, padded, rows: room, across, .. } = sizes;
        let width = columns.len().next_multiple_of(panel);
        let panels = width / panel;
        let state_rows = dim.next_multiple_of(S::ROWS).max(dim.next_multiple_of(TILE));
        let (by_channel, channel_room) = match of.decay {
            Decay::Channel(_) => (room * padded, sizes.channel_room()),
            _ => (0, 0),
        };
        let solves = delta || of.pair.is_some();
        // Sizes of what only a pair of keys has.
        let second = |n: usize| if of.pair.is_some() { n } else { 0 };
        // What registers multiply: rows by channels, channels by rows, rows by rows, and panels of the state and of rows.
        let most = COMPUTED;
        let (across_rows, across_channels) = (m.left_room(chunk, dim, most), m.left_room(dim, chunk, most));
        let (square, state_panel) = (m.left_room(chunk, chunk, most), m.right_room(dim, panel, most));
        let row_panel = m.right_room(chunk, panel, most);
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
            q_side,
            k_side,
            turned_side,
            keys_side,
            scores_side,
            own_side,
            inverse_side,
            b_turned_side,
            b_scores_side,
            state_side,
            value_side,
            update_side,
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
            group * across_rows,
            if solves { across_rows } else { 0 },
            across_channels,
            m.right_room(dim, chunk, most),
            group * square,
            second(square),
            if solves { square } else { 0 },
            second(across_channels),
            second(group * square),
            state_panel,
            row_panel,
            if solves { row_panel } else { 0 },
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

        let mut read: Vec<_> = readers.clone().map(|reader| (&of.q, [batch, reader])).collect();
        read.extend(of.k.iter().chain(of.pair.iter().flatten()).map(|view| (view, [batch, job.key_head(head)])));
        read.push((&of.v, [batch, head]));
        if let Decay::Channel(view) = &of.decay {
            read.push((view, [batch, head]));
        }
        let coming = Coming::new(read.into_iter(), rows.end);
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
            let sides = Sides {
                multiplier: &mut m,
                parts,
                q: &mut *q_side,
                k: &mut *k_side,
                turned: &mut *keys_side,
                apart: across_rows,
            };
            let mut rows_of = Chunk { sizes, n, q, k, turned, scores, delta, inverse, own, beta, bonus, pair, sides };
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
                Decay::Channel(_) => rows_of.by_channels(s, g, working, (&coming, at + n)),
            }
            // Sides that stand left of all panels. Without decays queries and keys are as they were.
            let as_they_were = matches!(of.decay, Decay::None | Decay::Value { .. });
            let came = |parts: usize| if as_they_were { parts } else { most };
            let (by_channels, by_rows) = ([n, dim], [n, n]);
            for i in 0..group {
                let (q, scores) = (&q[i * room * padded..], &scores[i * room * across..]);
                m.left(s, Part::Whole, by_channels, (q, padded), came(parts.q), &mut q_side[i * across_rows..]);
                m.left(s, Part::Lower, by_rows, (scores, across), most, &mut scores_side[i * square..]);
                if of.pair.is_some() {
                    let scores = &b_scores[i * room * across..];
                    m.left(s, Part::Lower, by_rows, (scores, across), most, &mut b_scores_side[i * square..]);
                }
            }
            let turned_of = m.left(s, Part::Whole, [dim, n], (turned, across), came(parts.k), turned_side);
            let b_turned_of =
                of.pair.map(|_| m.left(s, Part::Whole, [dim, n], (b_turned, across), most, b_turned_side));
            let inverse_of = solves.then(|| m.left(s, Part::Lower, by_rows, (inverse, across), most, inverse_side));
            // Rows that read the state before they write.
            let reader = if of.pair.is_some() { &*reads } else { &*k };
            let reader_of = solves.then(|| m.left(s, Part::Whole, by_channels, (reader, padded), most, k_side));
            let own_of = of.pair.map(|_| m.left(s, Part::Lower, by_rows, (own, across), most, own_side));
            let solving = reader_of.zip(inverse_of);
            for p in 0..panels {
                let state = &mut states[p * state_rows * panel..][..state_rows * panel];
                let value = &mut values[p * KEYS * panel..][..KEYS * panel];
                if let Decay::Value { fills, .. } = of.decay {
                    let logs = &mut fading[p * KEYS * panel..][..KEYS * panel];
                    let fade = Fade { sizes, n, width, fills, q, scores, turned, logs };
                    fade.panel(s, value, state, &mut out[p * panel..]);
                    continue;
                }
                let state_of = m.right(s, [dim, panel], (state, panel), most, state_side);
                let (from_state, from_rows) = ([n, panel, dim], [n, panel, n]);
                let size = [n, panel];
                let (value_of, second_of) = match (solving, own_of) {
                    (Some((reader, inverse)), None) => {
                        // What the state does not hold of the values, rows one after another.
                        m.multiply(s, Part::Whole, from_state, reader, state_of, (&mut *value, panel), true);
                        let read = m.right(s, size, (value, panel), most, value_side);
                        m.multiply(s, Part::Lower, from_rows, inverse, read, (&mut *updates, panel), false);
                        (m.right(s, size, (updates, panel), most, value_side), None)
                    }
                    (Some((reader, inverse)), Some(own)) => {
                        // What is read of the state, by the state before the chunk, its own keys, and what is read for rows before.
                        let value_of = m.right(s, size, (value, panel), parts.v, value_side);
                        m.multiply(s, Part::Whole, from_state, reader, state_of, (&mut *gathered, panel), false);
                        m.multiply(s, Part::Lower, from_rows, own, value_of, (&mut *gathered, panel), true);
                        let read = m.right(s, size, (gathered, panel), most, update_side);
                        m.multiply(s, Part::Lower, from_rows, inverse, read, (&mut *updates, panel), false);
                        (value_of, Some(m.right(s, size, (updates, panel), most, update_side)))
                    }
                    (None, _) => (m.right(s, size, (value, panel), parts.v, value_side), None),
                };
                for i in 0..group {
                    let out = &mut out[i * room * width + p * panel..];
                    if let Some(skip) = of.skip {
                        for row in 0..n {
                            let to = &mut out[row * width..][..panel];
                            to.copy_from_slice(&value[row * panel..][..panel]);
                            scale_row(s, to, skip[head]);
                        }
                    }
                    let a =
                        Factor::packed((&q[i * room * padded..], padded), &q_side[i * across_rows..], came(parts.q));
                    m.multiply(s, Part::Whole, from_state, a, state_of, (&mut *out, width), of.skip.is_some());
                    let a = Factor::packed((&scores[i * room * across..], across), &scores_side[i * square..], most);
                    m.multiply(s, Part::Lower, from_rows, a, value_of, (&mut *out, width), true);
                    if let Some(update_of) = second_of {
                        let scores = &b_scores[i * room * across..];
                        let a = Factor::packed((scores, across), &b_scores_side[i * square..], most);
                        m.multiply(s, Part::Lower, from_rows, a, update_of, (&mut *out, width), true);
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
                let to_state = [dim, panel, n];
                m.multiply(s, Part::Whole, to_state, turned_of, value_of, (&mut *state, panel), true);
                if let Some((b, update_of)) = b_turned_of.zip(second_of) {
                    m.multiply(s, Part::Whole, to_state, b, update_of, (&mut *state, panel), true);
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

const _: () = assert!(super::MAX_CHUNK.is_multiple_of(WHOLE_BLOCK) && super::MAX_CHUNK <= KEYS);
