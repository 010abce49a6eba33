//! Picking the rows of most weight: a histogram over the weights' leading bits, then an exact pick inside one bin.

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
    /// Two histograms, even and odd rows: neighbours often share a bin, and would wait for each other's count.
    counts: Box<[[u32; BINS]; 2]>,
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

impl Weights {
    pub(crate) fn new(heads: usize, with_mass: bool) -> Self {
        Self {
            counts: Box::new([[0; BINS]; 2]),
            bin_mass: if with_mass { vec![0.0; BINS * heads] } else { Vec::new() },
            mass: vec![0.0; heads],
            rest: vec![0.0; heads],
        }
    }

    /// Counts some rows; `rest` holds each head's weights of these rows, `stride` apart.
    #[inline(always)]
    pub(crate) fn count(&mut self, weights: &[f32], rest: &[f32], stride: usize) {
        let [even, odd] = &mut *self.counts;
        let (pairs, last) = weights.as_chunks::<2>();
        for &[a, b] in pairs {
            even[bin(a)] += 1;
            odd[bin(b)] += 1;
        }
        for &w in last {
            even[bin(w)] += 1;
        }
        if !self.bin_mass.is_empty() {
            let heads = self.mass.len();
            for (j, &w) in weights.iter().enumerate() {
                for (g, mass) in self.bin_mass[bin(w) * heads..][..heads].iter_mut().enumerate() {
                    *mass += f64::from(rest[g * stride + j]);
                }
            }
        }
    }

    pub(super) fn join(&mut self, other: &Self) {
        for (to, from) in self.counts.iter_mut().zip(other.counts.iter()) {
            to.iter_mut().zip(from).for_each(|(a, b)| *a += b);
        }
        for (a, b) in
            [(&mut self.bin_mass, &other.bin_mass), (&mut self.mass, &other.mass), (&mut self.rest, &other.rest)]
        {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        }
    }

    /// Rows of a weight above 0 (of those too small for a bin of their own, none).
    pub(super) fn positive(&self) -> usize {
        self.counts.iter().flat_map(|counts| &counts[1..]).map(|&n| n as usize).sum()
    }

    /// The bin that fills the budget, and how many rows to take of it (`None`: all).
    fn threshold(&self, budget: &Budget) -> (usize, Option<usize>) {
        match budget {
            Budget::Rows(rows) => {
                let mut above = 0;
                for b in (0..BINS).rev() {
                    let here = (self.counts[0][b] + self.counts[1][b]) as usize;
                    if above + here >= *rows {
                        return (b, Some(rows - above));
                    }
                    above += here;
                }
                (0, None)
            }
            Budget::Mass(wanted) => {
                let heads = self.mass.len();
                let mut left = wanted.clone();
                for b in (0..BINS).rev() {
                    if left.iter().all(|&x| x <= 0.0) {
                        return (b + 1, None);
                    }
                    left.iter_mut().zip(&self.bin_mass[b * heads..]).for_each(|(left, mass)| *left -= mass);
                }
                (0, None)
            }
        }
    }
}

/// Indices into `weights`, inside `range`, of the rows that fill the budget, ascending. Ties go to the lower index.
pub(crate) fn select(weights: &[f32], totals: &Weights, range: Range<usize>, budget: &Budget) -> Vec<u32> {
    if matches!(budget, Budget::Rows(rows) if *rows >= range.len()) {
        return (range.start as u32..range.end as u32).collect();
    }
    let (threshold, of_bin) = totals.threshold(budget);
    let lowest = match threshold {
        0 => f32::NEG_INFINITY,
        BINS => f32::INFINITY,
        b => f32::from_bits((b as u32) << SHIFT),
    };
    let mut picked = Vec::new();
    let mut tied = Vec::new();
    const STEP: usize = 32;
    for (c, chunk) in weights[range.clone()].chunks(STEP).enumerate() {
        // Most chunks hold no row of enough weight.
        if chunk.iter().fold(f32::NEG_INFINITY, |a, &w| if w > a { w } else { a }) < lowest {
            continue;
        }
        for (j, &w) in chunk.iter().enumerate() {
            if w >= lowest {
                let row = (range.start + c * STEP + j) as u32;
                if of_bin.is_some() && bin(w) == threshold { tied.push(row) } else { picked.push(row) }
            }
        }
    }
    if let Some(n) = of_bin {
        if n < tied.len() {
            let order = |&a: &u32, &b: &u32| weights[b as usize].total_cmp(&weights[a as usize]).then(a.cmp(&b));
            tied.select_nth_unstable_by(n, order);
            tied.truncate(n);
        }
        picked.extend_from_slice(&tied);
        picked.sort_unstable();
    }
    picked
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Random;

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
            let mut totals = Weights::new(1, false);
            totals.count(&w, &w, n);
            let mut order: Vec<u32> = (range.start as u32..range.end as u32).collect();
            order.sort_by(|&a, &b| w[b as usize].total_cmp(&w[a as usize]).then(a.cmp(&b)));
            for k in [1, 2, n / 3, n - 6, n] {
                // Rows outside the range are counted like hidden ones: with weight 0.
                let mut hidden = w.clone();
                hidden[..3].fill(0.0);
                hidden[n - 2..].fill(0.0);
                let mut totals = Weights::new(1, false);
                totals.count(&hidden, &hidden, n);
                let mut expected = order[..k.min(range.len())].to_vec();
                expected.sort_unstable();
                assert_eq!(select(&hidden, &totals, range.clone(), &Budget::Rows(k)), expected, "n {n} k {k}");
            }
        }
    }

    #[test]
    fn top_p_holds_the_mass_and_little_more() {
        let w = weights(4096, 4);
        let total: f64 = w.iter().map(|&x| f64::from(x)).sum();
        let mut totals = Weights::new(1, true);
        totals.count(&w, &w, w.len());
        for p in [0.1, 0.5, 0.9, 0.999] {
            let rows = select(&w, &totals, 0..w.len(), &Budget::Mass(vec![p * total]));
            let held: f64 = rows.iter().map(|&j| f64::from(w[j as usize])).sum();
            assert!(held >= p * total * (1.0 - 1e-6));
            // Whole bins are taken: the lightest bin could be left out only by falling short.
            let least = rows.iter().map(|&j| bin(w[j as usize])).min().unwrap();
            let without: f64 =
                rows.iter().filter(|&&j| bin(w[j as usize]) > least).map(|&j| f64::from(w[j as usize])).sum();
            assert!(without < p * total);
        }
        assert!(select(&w, &totals, 0..w.len(), &Budget::Mass(vec![-0.1])).is_empty());
    }
}
