//! Picking the rows of most weight in one pass over the codes, which keeps nothing but what may be picked.
//!
//! ```text
//! sample    pieces of the candidates: roughly each head's mass, and the logit `least` that some times as many rows reach as are wanted
//! pass      tile by tile, in the first cache: mass, sums by value cluster, and the rows that reach the `least` of some head
//! pick      the rows of most weight among these, by the mass that the candidates turned out to have
//! ```
//! A row that was not kept is below the `least` of every head, and so weighs less than the mean of what these weigh. If all picked rows
//! weigh as much, they are those of most weight of all candidates; else all candidates must be weighed once their mass is known.

use super::chunks::Slots;
use super::cluster_sums::{BLOCK, BLOCKS, ClusterSums, Left, Turned, blocks, quads};
use super::scan::{CHUNK, CodeError, RowCodes, TILE, Weighing};
use super::select::{self, Budget, Weights};
use super::weigh::{Bulk, HeadWeight, Turn, moments};
use crate::dense::scratch::with_scratch;
use crate::index::{Ask, Pick, Seconds};
use crate::parallel::for_each;
use crate::simd::{self, Kernel, Simd, dispatch};
use std::f32::consts::LOG2_E;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Candidates from which on a sample is worth its time.
const SMALLEST: usize = 32 * 1024;

/// Candidates for each row that is wanted: with fewer, much would have to be kept.
const SPARSE: usize = 32;

/// Rows of a piece of the sample, one of so many pieces, and pieces at most.
const PIECE: usize = 64;
const EVERY: usize = 30;
const MOST_PIECES: usize = 128;

/// Rows that are kept for each head, for each row that is wanted, as the sample has it; and of these the fewest in the sample. More
/// where heads want different rows: then a row that is picked for all weighs less for each.
const SPARE: [usize; 2] = [2, 4];
const FEWEST: usize = 16;

/// Nats above the `least` from which on the sample's logits count as no larger: few rows must not decide how much there is of all.
const HEADROOM: f32 = 4.0;

/// Nats by which the sample may have taken the mass for larger than it is: what is left out of the clusters' sums counts by it.
const OVERRATED: f32 = 0.7;

/// Tiles of which the first is timed.
const TIMED: usize = 8;

/// Floats from one head's row of a tile to the next: rows that a power of two lies between would share few sets of the first cache.
const ROW: usize = TILE + 16;

/// Numbers of a tile's rows.
static NUMBERS: [f32; TILE] = {
    let (mut numbers, mut j) = ([0.0; TILE], 0);
    while j < TILE {
        numbers[j] = j as f32;
        j += 1;
    }
    numbers
};

/// What a sample says of a head.
struct Guess {
    head: HeadWeight,
    /// Rows are kept from this logit on.
    least: f32,
}

/// What a chunk of the candidates has.
struct Part {
    /// Sum of all shares of each head, and of what the rows would weigh unread but for a factor, by the guessed mass.
    mass: Vec<f64>,
    rest: Vec<f64>,
    /// Sums of each head's logits and of their squares, where its codes' error is no factor.
    moments: Vec<[f64; 2]>,
    /// `[clusters, group]`, likewise.
    sums: Vec<f32>,
    kept: Kept,
    scan: Duration,
    timed: Duration,
}

/// Rows of a chunk that may be picked.
struct Kept {
    places: Vec<u32>,
    /// `[group, rows]`.
    logits: Vec<f32>,
}

/// Picks rows among some places; nothing where that takes more than one pass.
pub(super) fn pick<C: RowCodes>(codes: &C, ask: &Ask, candidates: &Range<usize>, rows: usize) -> Option<Pick> {
    if rows == 0 || candidates.len() < SMALLEST || rows * SPARSE > candidates.len() || codes.block() > PIECE {
        return None;
    }
    let (isa, group, block, n) = (ask.isa, ask.queries.len(), codes.block(), candidates.len());
    let start = Instant::now();
    let queries = codes.group(isa, ask.head, ask.queries);
    let errors: Vec<CodeError> = (0..group).map(|g| codes.error(ask.head, &queries, g)).collect();
    let guesses = guess(codes, ask, &queries, &errors, candidates, rows)?;
    let (heads, least): (Vec<HeadWeight>, Vec<f32>) =
        guesses.into_iter().map(|guess| (guess.head, guess.least)).unzip();
    let values = if ask.rest { codes.values(ask.head) } else { None };
    let (ids, clusters) = values.map_or((&[][..], 0), |(values, ids)| (ids, values.len()));
    let (base, end) = (candidates.start / block * block, candidates.end.next_multiple_of(block));
    let chunks = (end - base).div_ceil(CHUNK);
    let parts = Slots::new(chunks);
    let work = |c: usize| {
        let mut memory = with_scratch(|scratch| std::mem::take(&mut scratch.extra));
        let stride = CHUNK + simd::MAX_LANES;
        let [scores, shares, weights, numbers, logits] =
            memory.carve([group * ROW, group * ROW, ROW, ROW, group * stride]);
        let mut part = Part::new(group, clusters);
        let mut kept = Keeping { places: Vec::with_capacity(CHUNK / 8), numbers, logits, stride };
        let mut sums = ClusterSums::new(clusters, group);
        let chunk = base + c * CHUNK..(base + (c + 1) * CHUNK).min(end);
        for (t, first) in chunk.clone().step_by(TILE).enumerate() {
            let places = first..(first + TILE).min(chunk.end);
            let timed = t % TIMED == 0;
            let starting = timed.then(Instant::now);
            codes.scan(isa, ask.head, places.start / block..places.end / block, &queries, scores, ROW, None);
            let scanned = timed.then(Instant::now);
            let tile = Tile {
                inside: candidates.start.max(first) - first..candidates.end.min(places.end) - first,
                ids: if clusters > 0 { &ids[places.clone()] } else { &[] },
                number: (first - base) / TILE,
                left: Left::of(n),
                places,
                heads: &heads,
                least: &least,
                scores,
                shares,
                weights,
                part: &mut part,
                kept: &mut kept,
                sums: &mut sums,
            };
            dispatch(isa, tile);
            if let (Some(starting), Some(scanned)) = (starting, scanned) {
                part.scan += scanned - starting;
                part.timed += starting.elapsed();
            }
        }
        part.sums = sums.times(&vec![1.0; group]);
        part.kept = kept.finish();
        with_scratch(|scratch| scratch.extra = memory);
        parts.set(c, part);
    };
    match ask.parallel {
        // A cancelled call's results are never seen.
        Some(execution) => drop(for_each(execution, chunks, work)),
        None => (0..chunks).for_each(work),
    }
    let passed = start.elapsed().as_secs_f32();
    let (mut all, mut kept) = (Part::new(group, clusters), Vec::with_capacity(chunks));
    for part in parts.into_values() {
        all.add(&part);
        kept.push(part.kept);
    }

    // The same weights by the mass that there is, for what was summed by them, and those by the moments that there are.
    let (mut settled, mut exact) = (Vec::with_capacity(group), Vec::with_capacity(group));
    let (mut rest, mut sums) = (all.rest, all.sums);
    for (g, head) in heads.iter().enumerate() {
        let bulk = Bulk::of_all(head.log_total, all.mass[g], all.moments[g]);
        let now = head.settled(&bulk, ask.steady[g]);
        let larger = head.log_total - now.log_total;
        if !(larger <= OVERRATED && all.mass[g].is_finite() && rest[g].is_finite()) {
            return None;
        }
        let times = head.of_logits().factor * larger.exp();
        rest[g] *= f64::from(times);
        sums.iter_mut().skip(g).step_by(group).for_each(|sum| *sum *= times);
        exact.push(if now.is_sloped() { HeadWeight::new(&bulk, ask.steady[g], errors[g], n, false) } else { now });
        settled.push(now);
    }

    let selecting = Instant::now();
    let picked = of_most_weight(&kept, ask, &exact, &least, rows)?;
    let select = selecting.elapsed().as_secs_f32();
    let Kept { places, logits } = gather(&kept, &picked, group);
    let mass: Vec<f64> = settled.iter().map(|head| head.mass).collect();
    let of_rows = |g: usize| settled[g].of_rows(isa, logits[g * rows..][..rows].iter().copied());
    let weighing = Weighing { heads: &settled, mass: &mass, rest: &rest, sums, clusters };
    let mut pick = weighing.without(codes, ask, &queries, candidates, &places, of_rows);
    let scan = passed * (all.scan.as_secs_f32() / all.timed.as_secs_f32().max(f32::MIN_POSITIVE)).min(1.0);
    pick.seconds = Seconds { scan, weigh: passed - scan, select };
    pick.bytes = (end - base) / block * codes.block_bytes() + if clusters > 0 { end - base } else { 0 };
    pick.rows = places;
    Some(pick)
}

impl Part {
    fn new(group: usize, clusters: usize) -> Self {
        Self {
            mass: vec![0.0; group],
            rest: vec![0.0; group],
            moments: vec![[0.0; 2]; group],
            sums: vec![0.0; clusters * group],
            kept: Kept { places: Vec::new(), logits: Vec::new() },
            scan: Duration::ZERO,
            timed: Duration::ZERO,
        }
    }

    /// Adds the sums of another part.
    fn add(&mut self, part: &Self) {
        for (sums, others) in [(&mut self.mass, &part.mass), (&mut self.rest, &part.rest)] {
            sums.iter_mut().zip(others).for_each(|(sum, other)| *sum += other);
        }
        let moments = self.moments.as_flattened_mut().iter_mut();
        moments.zip(part.moments.as_flattened()).for_each(|(sum, other)| *sum += other);
        self.sums.iter_mut().zip(&part.sums).for_each(|(sum, other)| *sum += other);
        (self.scan, self.timed) = (self.scan + part.scan, self.timed + part.timed);
    }
}

/// Which of the kept rows, counted through all chunks, weigh most of all candidates, ascending; nothing where others may weigh more.
fn of_most_weight(kept: &[Kept], ask: &Ask, heads: &[HeadWeight], least: &[f32], rows: usize) -> Option<Vec<u32>> {
    let all: usize = kept.iter().map(|kept| kept.places.len()).sum();
    if all < rows {
        return None;
    }
    let mut weights = vec![0f32; all];
    let mut left = &mut weights[..];
    for Kept { places, logits } in kept.iter().filter(|kept| !kept.places.is_empty()) {
        let (of_chunk, after) = left.split_at_mut(places.len());
        left = after;
        for (head, logits) in heads.iter().zip(logits.chunks_exact(places.len())) {
            dispatch(ask.isa, AddWeights { turn: head.of_logits(), logits, weights: of_chunk });
        }
    }
    let others: f32 = heads.iter().zip(least).map(|(head, &least)| head.of_logits().weight(least)).sum();
    let mut totals = Weights::new(0, false);
    totals.count(&weights);
    let picked = select::select(ask.isa, &weights, &totals, 0..all, &Budget::Rows(rows));
    let last = picked.iter().fold(f32::INFINITY, |last, &i| weights[i as usize].min(last));
    (last > 0.0 && last >= others).then_some(picked)
}

/// Places and logits of rows, told by their numbers through all chunks, ascending.
fn gather(kept: &[Kept], rows: &[u32], group: usize) -> Kept {
    let mut found = Kept { places: Vec::with_capacity(rows.len()), logits: vec![0.0; group * rows.len()] };
    let (mut first, mut rest) = (0, rows);
    for Kept { places, logits } in kept {
        let (here, after) = rest.split_at(rest.partition_point(|&i| (i as usize) < first + places.len()));
        let at = found.places.len();
        found.places.extend(here.iter().map(|&i| places[i as usize - first]));
        for (to, logits) in found.logits.chunks_exact_mut(rows.len()).zip(logits.chunks_exact(places.len().max(1))) {
            to[at..].iter_mut().zip(here).for_each(|(to, &i)| *to = logits[i as usize - first]);
        }
        (first, rest) = (first + places.len(), after);
    }
    found
}

/// Adds `e^(slope * logit + shift)` to the weights.
struct AddWeights<'a> {
    turn: Turn,
    logits: &'a [f32],
    weights: &'a mut [f32],
}

impl Kernel for AddWeights<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { turn: Turn { slope, shift, .. }, logits, weights } = self;
        assert!(logits.len() == weights.len());
        let (n, slope, shift) = (logits.len(), s.splat(slope), s.splat(shift));
        for j in (0..n).step_by(S::LANES) {
            let count = S::LANES.min(n - j);
            if count == S::LANES {
                // SAFETY: LANES of both lie behind j.
                unsafe {
                    let to = weights.as_mut_ptr().add(j);
                    s.store(to, s.add(s.load(to), s.exp(s.fma(s.load(logits.as_ptr().add(j)), slope, shift))));
                }
            } else {
                let mut row = [0f32; simd::MAX_LANES];
                row[..count].copy_from_slice(&logits[j..]);
                // SAFETY: the row has MAX_LANES floats.
                unsafe { s.store(row.as_mut_ptr(), s.exp(s.fma(s.load(row.as_ptr()), slope, shift))) };
                weights[j..].iter_mut().zip(row).for_each(|(weight, x)| *weight += x);
            }
        }
    }
}

/// What a sample of the candidates says of each head; nothing if it is not finite.
fn guess<C: RowCodes>(
    codes: &C,
    ask: &Ask,
    queries: &C::Group,
    errors: &[CodeError],
    candidates: &Range<usize>,
    rows: usize,
) -> Option<Vec<Guess>> {
    const PER_TILE: usize = TILE / PIECE;
    let (isa, group, block, n) = (ask.isa, ask.queries.len(), codes.block(), candidates.len());
    let pieces = (n / (EVERY * PIECE)).min(MOST_PIECES) / PER_TILE * PER_TILE;
    let first = candidates.start.next_multiple_of(block);
    // Not a power of 2, with which the rows of a text may repeat.
    let stride = ((candidates.end - first - PIECE) / pieces / block - 1) / 2 * 2 * block + block;
    let mut memory = with_scratch(|scratch| std::mem::take(&mut scratch.extra));
    let scores = memory.take(pieces / PER_TILE * group * TILE);
    for (i, start) in (0..pieces).map(|i| (i, (first + i * stride) / block)) {
        let to = &mut scores[i / PER_TILE * group * TILE + i % PER_TILE * PIECE..];
        let next = Some(start + stride / block);
        codes.scan(isa, ask.head, start..start + PIECE / block, queries, to, TILE, next);
    }
    let scaled = errors.iter().all(|error| error.is_one_factor());
    let sampled = pieces * PIECE;
    let scores = &scores[..sampled * group];
    let of_head = |(g, &error): (usize, &CodeError), spare: usize| {
        let rank = (spare * rows * sampled / n).max(FEWEST);
        let Sampled { least, mass, moments } = dispatch(isa, Sample { scores, group, g, rank })?;
        let bulk = Bulk::of_sample(least + HEADROOM, mass, moments, n as f64 / sampled as f64);
        Some(Guess { head: HeadWeight::new(&bulk, ask.steady[g], error, n, scaled), least })
    };
    let enough = |guesses: &Vec<Guess>| {
        // Rows of the sample that would be known to weigh more than all that are not kept: a quarter more than will be picked of it.
        let mut weights = vec![0f32; sampled];
        for (tile, weights) in scores.chunks_exact(group * TILE).zip(weights.chunks_exact_mut(TILE)) {
            for (guess, logits) in guesses.iter().zip(tile.chunks_exact(TILE)) {
                dispatch(isa, AddWeights { turn: guess.head.of_logits(), logits, weights });
            }
        }
        let others: f32 = guesses.iter().map(|guess| guess.head.of_logits().weight(guess.least)).sum();
        weights.iter().filter(|&&weight| weight >= others).count() >= rows * 5 * sampled / (4 * n)
    };
    let guesses = SPARE.iter().find_map(|&spare| {
        let guesses = errors.iter().enumerate().map(|of| of_head(of, spare)).collect::<Option<Vec<_>>>()?;
        enough(&guesses).then_some(guesses)
    });
    with_scratch(|scratch| scratch.extra = memory);
    guesses
}

/// Logits of a sample, `[tiles, group, TILE]`, of which one head is looked at.
struct Sample<'a> {
    scores: &'a [f32],
    group: usize,
    g: usize,
    rank: usize,
}

struct Sampled {
    /// As many logits as the rank are at least this, or some more.
    least: f32,
    /// Sum of `e^(logit - least - HEADROOM)`, of each 1 at most.
    mass: f32,
    /// Sums of the logits and of their squares.
    moments: [f64; 2],
}

impl Sample<'_> {
    #[inline(always)]
    fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.scores.chunks_exact(self.group * TILE).map(|tile| &tile[self.g * TILE..][..TILE])
    }

    /// How many logits are at least `x`.
    #[inline(always)]
    fn count<S: Simd>(&self, s: S, x: f32) -> usize {
        let (mut count, x) = (0, s.splat(x));
        for row in self.rows() {
            for j in (0..TILE).step_by(S::LANES) {
                // SAFETY: the row has TILE floats, a multiple of LANES.
                count += s.at_least(unsafe { s.load(row.as_ptr().add(j)) }, x).count_ones();
            }
        }
        count as usize
    }
}

impl Kernel for Sample<'_> {
    type Output = Option<Sampled>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Option<Sampled> {
        let n = self.scores.len() / self.group;
        let origin = self.scores[self.g * TILE];
        let (mut low, mut high) = (s.splat(f32::INFINITY), s.splat(f32::NEG_INFINITY));
        let (mut sum, mut squares) = (s.zero(), s.zero());
        for row in self.rows() {
            for j in (0..TILE).step_by(S::LANES) {
                // SAFETY: the row has TILE floats, a multiple of LANES.
                let x = unsafe { s.load(row.as_ptr().add(j)) };
                (low, high) = (s.min(x, low), s.max(x, high));
                let d = s.sub(x, s.splat(origin));
                sum = s.add(sum, d);
                squares = s.fma(d, d, squares);
            }
        }
        let (sum, squares) = (f64::from(s.sum(sum)), f64::from(s.sum(squares)));
        let (mut least, mut above) = (-s.max_lane(s.sub(s.zero(), low)), s.max_lane(high));
        if !(squares.is_finite() && least.is_finite() && above.is_finite()) {
            return None;
        }
        for _ in 0..20 {
            let middle = least + (above - least) / 2.0;
            let count = self.count(s, middle);
            if count >= self.rank {
                least = middle;
                if count <= self.rank + self.rank / 8 {
                    break;
                }
            } else {
                above = middle;
            }
        }
        let cap = least + HEADROOM;
        let (mut mass, log2_e, shift) = (s.zero(), s.splat(LOG2_E), s.splat(-cap * LOG2_E));
        for row in self.rows() {
            for j in (0..TILE).step_by(S::LANES) {
                // SAFETY: as above.
                let x = s.min(unsafe { s.load(row.as_ptr().add(j)) }, s.splat(cap));
                mass = s.add(mass, s.exp2_rough(s.fma(x, log2_e, shift)));
            }
        }
        let (n, o) = (n as f64, f64::from(origin));
        Some(Sampled { least, mass: s.sum(mass), moments: [sum + n * o, squares + 2.0 * o * sum + n * o * o] })
    }
}

/// A tile whose scores were made just now.
struct Tile<'a, 'b> {
    /// `[group, TILE]`, rows [`ROW`] apart.
    scores: &'a mut [f32],
    /// Likewise, written: what each row would weigh unread, but for a factor.
    shares: &'a mut [f32],
    /// `[TILE]`, written: the mean of these over the group.
    weights: &'a mut [f32],
    places: Range<usize>,
    /// Where the candidates are.
    inside: Range<usize>,
    /// Value cluster of each row, empty if not asked for.
    ids: &'a [u8],
    number: usize,
    left: Left,
    heads: &'a [HeadWeight],
    least: &'a [f32],
    part: &'a mut Part,
    kept: &'a mut Keeping<'b>,
    sums: &'a mut ClusterSums,
}

/// Rows that are kept, chunk by chunk.
struct Keeping<'a> {
    places: Vec<u32>,
    /// Of a tile's kept rows.
    numbers: &'a mut [f32],
    /// `[group, stride]`, of which as many are used as there are places.
    logits: &'a mut [f32],
    stride: usize,
}

impl Keeping<'_> {
    fn finish(self) -> Kept {
        let rows = self.places.len();
        let mut logits = Vec::with_capacity(self.logits.len() / self.stride * rows);
        self.logits.chunks_exact(self.stride).for_each(|of_head| logits.extend_from_slice(&of_head[..rows]));
        Kept { places: self.places, logits }
    }
}

impl Kernel for Tile<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (group, len) = (self.heads.len(), self.places.len());
        assert!(len.is_multiple_of(BLOCK) && len <= TILE && self.inside.end <= len && self.weights.len() >= TILE);
        assert!(self.scores.len() >= group * ROW && self.shares.len() >= group * ROW && self.least.len() == group);
        assert!(!self.sums.wanted() || self.ids.len() >= len);
        // Weights of unread rows that are not shares but for a factor.
        let sloped = self.heads.iter().any(HeadWeight::is_sloped);
        for (row, all) in self.scores.chunks_exact_mut(ROW).zip(self.part.moments.as_mut_slice()) {
            if sloped {
                let [sum, squares] = moments(s, &mut row[..len], self.inside.clone());
                *all = [all[0] + sum, all[1] + squares];
            }
            row[..self.inside.start].fill(f32::NEG_INFINITY);
            row[self.inside.end..len].fill(f32::NEG_INFINITY);
        }
        let mut reach = [0; BLOCKS];
        quads!(group, sloped, self.weights::<S>(s, &mut reach));
        if self.sums.wanted() {
            let blocks = blocks(s, &self.weights[..len], self.number, self.left);
            quads!(group, false, self.clusters::<S>(s, blocks));
        }
        self.keep(s, &reach);
    }
}

impl Tile<'_, '_> {
    /// Adds up what the rows weigh for `H` heads and tells which of each block's rows reach the `least` of one of them.
    #[inline(always)]
    fn weights<S: Simd, const H: usize, const SLOPED: bool>(&mut self, s: S, first: usize, reach: &mut [u32; BLOCKS]) {
        let [mut slopes, mut shifts, mut plain, mut least] = [[s.zero(); H]; 4];
        for h in 0..H {
            let (head, turn) = (&self.heads[first + h], self.heads[first + h].of_logits());
            (slopes[h], shifts[h]) = (s.splat(turn.slope * LOG2_E), s.splat(turn.shift * LOG2_E));
            (plain[h], least[h]) = (s.splat(-head.log_total * LOG2_E), s.splat(self.least[first + h]));
        }
        let (scores, shares) = (self.scores[first * ROW..].as_ptr(), self.shares[first * ROW..].as_mut_ptr());
        let (log2_e, part) = (s.splat(LOG2_E), s.splat(1.0 / self.heads.len() as f32));
        let (mut rest, mut mass) = ([s.zero(); H], [s.zero(); H]);
        for (b, reach) in reach[..self.places.len() / BLOCK].iter_mut().enumerate() {
            if first == 0 {
                // The next tile's clusters.
                simd::prefetch(self.ids.as_ptr().wrapping_add(TILE + b * BLOCK));
            }
            for lane in (0..BLOCK).step_by(S::LANES) {
                let j = b * BLOCK + lane;
                // SAFETY: j + LANES <= len <= TILE, which the weights and each head's scores have.
                unsafe {
                    let to = self.weights.as_mut_ptr().add(j);
                    let mut mean = if first == 0 { s.zero() } else { s.load(to) };
                    let mut bits = 0;
                    for h in 0..H {
                        let x = s.load(scores.add(h * ROW + j));
                        bits |= s.at_least(x, least[h]);
                        let weight = s.exp2_rough(s.fma(x, slopes[h], shifts[h]));
                        s.store(shares.add(h * ROW + j), weight);
                        rest[h] = s.add(rest[h], weight);
                        mean = s.fma(weight, part, mean);
                        if SLOPED {
                            mass[h] = s.add(mass[h], s.exp2_rough(s.fma(x, log2_e, plain[h])));
                        }
                    }
                    s.store(to, mean);
                    *reach |= bits << lane;
                }
            }
        }
        for h in 0..H {
            let sum = f64::from(s.sum(rest[h]));
            self.part.rest[first + h] += sum;
            self.part.mass[first + h] += if SLOPED { f64::from(s.sum(mass[h])) } else { sum };
        }
    }

    /// Adds the weights of `H` heads to the sums of the rows' clusters.
    #[inline(always)]
    fn clusters<S: Simd, const H: usize, const SLOPED: bool>(&mut self, s: S, first: usize, blocks: [u64; 2]) {
        let (scores, slopes, shifts) = (self.shares[first * ROW..].as_ptr(), [s.splat(1.0); H], [s.zero(); H]);
        let by: Turned<S, H, SLOPED> = Turned { scores, stride: ROW, slopes, shifts };
        // SAFETY: the blocks are those of the tile's rows, and the heads are of the group.
        unsafe { self.sums.add(s, first, &by, self.ids, blocks) };
    }

    /// Keeps the rows of each block whose bits are set.
    #[inline(always)]
    fn keep<S: Simd>(&mut self, s: S, reach: &[u32; BLOCKS]) {
        let Keeping { places, numbers, logits, stride } = &mut *self.kept;
        let (stride, group, before) = (*stride, self.heads.len(), places.len());
        let rows: usize = reach.iter().map(|bits| bits.count_ones() as usize).sum();
        assert!(before + rows + simd::MAX_LANES <= stride && logits.len() >= group * stride);
        assert!(rows + simd::MAX_LANES <= numbers.len());
        let mut n = 0;
        for (b, &bits) in reach.iter().enumerate().filter(|(_, bits)| **bits != 0) {
            for lane in (0..BLOCK).step_by(S::LANES) {
                let (j, some) = (b * BLOCK + lane, (bits >> lane) & ((1u64 << S::LANES) - 1) as u32);
                if some == 0 {
                    continue;
                }
                // SAFETY: j + LANES <= TILE, which each head's scores and the numbers have; no more places are written than were counted,
                // and a vector fits behind them.
                unsafe {
                    for g in 0..group {
                        let x = s.load(self.scores.as_ptr().add(g * ROW + j));
                        s.store_some(logits.as_mut_ptr().add(g * stride + before + n), x, some);
                    }
                    s.store_some(numbers.as_mut_ptr().add(n), s.load(NUMBERS.as_ptr().add(j)), some);
                }
                n += some.count_ones() as usize;
            }
        }
        let first = self.places.start as u32;
        places.extend(numbers[..n].iter().map(|&number| first + number as u32));
    }
}

#[cfg(test)]
mod tests;
