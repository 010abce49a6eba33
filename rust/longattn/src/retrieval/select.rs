//! Picking the rows of most weight: a histogram over the weights' leading bits bounds the least of them, then an exact pick.

use crate::simd::{Isa, Kernel, Simd, dispatch};
use std::ops::Range;

/// Sign, exponent and three bits of the mantissa: bins an eighth to a sixteenth apart.
const SHIFT: u32 = 20;
pub(super) const BINS: usize = 1 << (31 - SHIFT);

/// How many rows to pick.
pub(crate) enum Budget {
    Rows(usize),
    /// The fewest that hold this much of each head's weight.
    Mass(Vec<f64>),
}

/// Histogram of weights, with what each bin holds of each head where a mass budget needs it.
pub(crate) struct Weights {
    /// Rows by their weight, or sets of rows by their largest.
    counts: Box<[u32; BINS]>,
    /// `[bins, heads]`, or empty.
    bin_mass: Vec<f64>,
    /// Sum of the shares of each head, and of the unread rows' weights.
    pub(super) mass: Vec<f64>,
    pub(super) rest: Vec<f64>,
}

/// Larger weights have larger bins; what is not positive has bin 0.
#[inline(always)]
pub(super) fn bin(weight: f32) -> usize {
    // A positive float has no sign bit; the mask says so to the compiler.
    (weight.max(0.0).to_bits() >> SHIFT) as usize & (BINS - 1)
}

/// The least weight of a bin.
fn least(bin: usize) -> f32 {
    match bin {
        0 => f32::NEG_INFINITY,
        BINS => f32::INFINITY,
        b => f32::from_bits((b as u32) << SHIFT),
    }
}

impl Weights {
    pub(crate) fn new(heads: usize, with_mass: bool) -> Self {
        Self {
            counts: Box::new([0; BINS]),
            bin_mass: if with_mass { vec![0.0; BINS * heads] } else { Vec::new() },
            mass: vec![0.0; heads],
            rest: vec![0.0; heads],
        }
    }

    /// Whether a mass budget is to be filled.
    #[inline(always)]
    pub(super) fn has_mass(&self) -> bool {
        !self.bin_mass.is_empty()
    }

    /// Counts rows, or sets of rows that no other set shares a row with, of which `weights` are the largest. A budget of rows is
    /// filled sooner the smaller the sets.
    #[inline(always)]
    pub(crate) fn count(&mut self, weights: &[f32]) {
        for &w in weights {
            self.counts[bin(w)] += 1;
        }
    }

    /// Adds to each bin what its rows hold of each head: `rest` has the heads' weights of these rows, `stride` apart.
    pub(super) fn count_mass(&mut self, weights: &[f32], rest: &[f32], stride: usize) {
        let heads = self.mass.len();
        for (j, &w) in weights.iter().enumerate() {
            for (g, mass) in self.bin_mass[bin(w) * heads..][..heads].iter_mut().enumerate() {
                *mass += f64::from(rest[g * stride + j]);
            }
        }
    }

    pub(super) fn join(&mut self, other: &Self) {
        self.counts.iter_mut().zip(other.counts.iter()).for_each(|(a, b)| *a += b);
        for (a, b) in
            [(&mut self.bin_mass, &other.bin_mass), (&mut self.mass, &other.mass), (&mut self.rest, &other.rest)]
        {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        }
    }

    /// What was counted of a weight above 0 (of those too small for a bin of their own, none): as many rows at least.
    pub(super) fn positive(&self) -> usize {
        self.counts[1..].iter().map(|&n| n as usize).sum()
    }

    /// The bin from which on `rows` were counted, and so at least as many rows weigh; 0 if there were fewer.
    fn reached(&self, rows: usize) -> usize {
        let mut above = 0;
        (1..BINS)
            .rev()
            .find(|&b| {
                above += self.counts[b] as usize;
                above >= rows
            })
            .unwrap_or(0)
    }

    /// The bin from which on rows hold the mass wanted of each head.
    fn holding(&self, wanted: &[f64]) -> usize {
        let heads = self.mass.len();
        let mut left = wanted.to_vec();
        for b in (0..BINS).rev() {
            // What is not a number, of a query that is none, is not looked for.
            if !left.iter().any(|&x| x > 0.0) {
                return b + 1;
            }
            left.iter_mut().zip(&self.bin_mass[b * heads..]).for_each(|(left, mass)| *left -= mass);
        }
        0
    }
}

/// Indices into `weights`, inside `range`, of the rows that fill the budget, ascending. Ties go to the lower index. What was counted in
/// `totals` are the weights of rows in `range`, and others that are not positive.
pub(crate) fn select(isa: Isa, weights: &[f32], totals: &Weights, range: Range<usize>, budget: &Budget) -> Vec<u32> {
    let rows = match budget {
        Budget::Mass(wanted) => return heavy(isa, weights, range, least(totals.holding(wanted))),
        Budget::Rows(rows) => *rows,
    };
    if rows >= range.len() {
        return (range.start as u32..range.end as u32).collect();
    }
    let mut reached = totals.reached(rows);
    if reached == 0 {
        // Sets that are too large for so many rows.
        let mut single = Weights::new(0, false);
        single.count(&weights[range.clone()]);
        reached = single.reached(rows);
    }
    let mut picked = heavy(isa, weights, range, least(reached));
    if rows == 0 {
        picked.clear();
    } else if rows < picked.len() {
        // The last of the best, then all that come before it: they stay in the order of the rows.
        let key = |row: u32| u64::from(!ascending(weights[row as usize])) << 32 | u64::from(row);
        let mut keys: Vec<u64> = picked.iter().map(|&row| key(row)).collect();
        let (_, &mut last, _) = keys.select_nth_unstable(rows - 1);
        picked.retain(|&row| key(row) <= last);
    }
    picked
}

/// An integer for each float, in the same order.
#[inline(always)]
fn ascending(x: f32) -> u32 {
    let bits = x.to_bits();
    bits ^ if bits >> 31 == 0 { 1 << 31 } else { u32::MAX }
}

/// Rows in `range` of at least some weight, ascending.
fn heavy(isa: Isa, weights: &[f32], range: Range<usize>, least: f32) -> Vec<u32> {
    struct Heavy<'a>(&'a [f32], u32, f32);
    impl Kernel for Heavy<'_> {
        type Output = Vec<u32>;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Vec<u32> {
            let Self(weights, first, least) = self;
            let mut found = Vec::new();
            let whole = weights.len() / S::LANES * S::LANES;
            for j in (0..whole).step_by(S::LANES) {
                // SAFETY: j + LANES <= whole, which the weights have.
                let mut bits = s.at_least(unsafe { s.load(weights.as_ptr().add(j)) }, s.splat(least));
                while bits != 0 {
                    found.push(first + j as u32 + bits.trailing_zeros());
                    bits &= bits - 1;
                }
            }
            for (j, &w) in weights.iter().enumerate().skip(whole) {
                if w >= least {
                    found.push(first + j as u32);
                }
            }
            found
        }
    }
    dispatch(isa, Heavy(&weights[range.clone()], range.start as u32, least))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Random;
    use crate::simd;

    fn weights(n: usize, seed: u64) -> Vec<f32> {
        let mut random = Random::new(seed);
        // Many ties, zeros and a wide range.
        (0..n)
            .map(|_| ((random.below(40) as f32) * 0.7 - 14.0).exp() * if random.below(5) == 0 { 0.0 } else { 1.0 })
            .collect()
    }

    #[test]
    fn top_k_is_a_stable_sort() {
        for (n, seed) in [(10, 1), (1000, 2), (4096, 3)] {
            let w = weights(n, seed);
            let range = 3..n - 2;
            let mut order: Vec<u32> = (range.start as u32..range.end as u32).collect();
            order.sort_by(|&a, &b| w[b as usize].total_cmp(&w[a as usize]).then(a.cmp(&b)));
            // Rows outside the range are counted like hidden ones: with weight 0.
            let mut hidden = w.clone();
            hidden[..3].fill(0.0);
            hidden[n - 2..].fill(0.0);
            for (set, isa) in
                [1, 16, 700].into_iter().flat_map(|set| Isa::available().into_iter().map(move |i| (set, i)))
            {
                let mut totals = Weights::new(1, false);
                let largest: Vec<f32> = hidden.chunks(set).map(|set| set.iter().copied().fold(0.0, f32::max)).collect();
                totals.count(&largest);
                for k in [1, 2, n / 3, n - 6, n] {
                    let mut expected = order[..k.min(range.len())].to_vec();
                    expected.sort_unstable();
                    let picked = select(isa, &hidden, &totals, range.clone(), &Budget::Rows(k));
                    assert_eq!(picked, expected, "{} n {n} k {k} sets of {set}", isa.name());
                }
            }
        }
    }

    #[test]
    fn top_p_holds_the_mass_and_little_more() {
        let w = weights(4096, 4);
        let total: f64 = w.iter().map(|&x| f64::from(x)).sum();
        let mut totals = Weights::new(1, true);
        totals.count_mass(&w, &w, w.len());
        for p in [0.1, 0.5, 0.9, 0.999] {
            let rows = select(simd::current(), &w, &totals, 0..w.len(), &Budget::Mass(vec![p * total]));
            let held: f64 = rows.iter().map(|&j| f64::from(w[j as usize])).sum();
            assert!(held >= p * total * (1.0 - 1e-6));
            // Whole bins are taken: the lightest bin could be left out only by falling short.
            let least = rows.iter().map(|&j| bin(w[j as usize])).min().unwrap();
            let without: f64 =
                rows.iter().filter(|&&j| bin(w[j as usize]) > least).map(|&j| f64::from(w[j as usize])).sum();
            assert!(without < p * total);
        }
        assert!(select(simd::current(), &w, &totals, 0..w.len(), &Budget::Mass(vec![-0.1])).is_empty());
    }
}
