//! Inverted lists: for each feature the rows that have it, and how strongly.

use crate::parallel::{Execution, map};
use crate::tensor::{Error, Result};
use half::f16;
use std::ops::Range;

/// Rows whose scores one item adds up.
const CHUNK: usize = 1 << 16;

/// Rows of one feature, ascending, with their activations.
#[derive(Clone, Default)]
struct List {
    rows: Vec<u32>,
    activations: Vec<f16>,
}

/// Lists of every feature. Rows are numbered as they are added.
#[derive(Clone)]
pub struct Postings {
    lists: Vec<List>,
    rows: usize,
}

impl Postings {
    /// Empty lists of `features` features.
    pub fn new(features: usize) -> Self {
        Self { lists: vec![List::default(); features], rows: 0 }
    }

    /// Number of features.
    pub fn features(&self) -> usize {
        self.lists.len()
    }

    /// Rows added.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Adds rows: `entries` of one row after another, `per_row` each. An activation of 0 is no entry; others are rounded to f16.
    /// A feature occurs at most once in a row and is one of [`Self::features`].
    pub(crate) fn add(&mut self, entries: &[(u32, f32)], per_row: usize) {
        for (r, row) in entries.chunks_exact(per_row.max(1)).enumerate() {
            for &(feature, activation) in row {
                if activation != 0.0 {
                    let list = &mut self.lists[feature as usize];
                    list.rows.push((self.rows + r) as u32);
                    list.activations.push(f16::from_f32(activation));
                }
            }
        }
        self.rows += entries.len() / per_row.max(1);
    }

    /// [`Self::add`] of numbers and activations that may be unfit: then an error, and nothing is added.
    pub fn extend(&mut self, features: &[u32], activations: &[f32], per_row: usize) -> Result<()> {
        if features.len() != activations.len() || per_row == 0 || !features.len().is_multiple_of(per_row) {
            let got = format!("{} features and {} activations", features.len(), activations.len());
            return Err(Error::value("features", got, format!("as many, {per_row} to a row")));
        }
        if let Some(&feature) = features.iter().find(|&&f| f as usize >= self.lists.len()) {
            return Err(Error::value("features", feature, format!("below {}", self.lists.len())));
        }
        if let Some(&activation) = activations.iter().find(|a| a.is_nan() || a.abs() > f16::MAX.to_f32()) {
            return Err(Error::value("activations", activation, "finite numbers up to 65504"));
        }
        let mut sorted = Vec::new();
        for (row, strengths) in features.chunks_exact(per_row).zip(activations.chunks_exact(per_row)) {
            sorted.clear();
            sorted.extend(row.iter().zip(strengths).filter(|&(_, &a)| a != 0.0).map(|(&f, _)| f));
            sorted.sort_unstable();
            if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(Error::value("features", format!("{} twice in a row", pair[0]), "each once"));
            }
        }
        let entries: Vec<_> = features.iter().copied().zip(activations.iter().copied()).collect();
        self.add(&entries, per_row);
        Ok(())
    }

    /// [`Self::score`] of all rows by sums of activations, see [`Self::weighted`], shared out over threads.
    pub fn search(
        &self,
        sums: &[(u32, f32)],
        idf: bool,
        stop_share: f32,
        scores: &mut [f32],
        execution: &Execution,
    ) -> Result<usize> {
        if scores.len() != self.rows {
            return Err(Error::value("scores", format!("{} rows", scores.len()), format!("{}", self.rows)));
        }
        if let Some((feature, _)) = sums.iter().find(|(f, _)| *f as usize >= self.lists.len()) {
            return Err(Error::value("features", feature, format!("below {}", self.lists.len())));
        }
        let weights = self.weighted(sums, idf, stop_share);
        let parts = map(execution, self.rows.div_ceil(CHUNK), |i| {
            let range = i * CHUNK..((i + 1) * CHUNK).min(self.rows);
            let mut part = vec![0f32; range.len()];
            let read = self.score(&weights, range, &mut part);
            (part, read)
        })?;
        let mut total = 0;
        for (to, (part, read)) in scores.chunks_mut(CHUNK).zip(parts) {
            to.iter_mut().zip(part).for_each(|(to, x)| *to += x);
            total += read;
        }
        Ok(total)
    }

    /// Forgets rows from `rows` on.
    pub(crate) fn truncate(&mut self, rows: usize) {
        if rows >= self.rows {
            return;
        }
        for list in &mut self.lists {
            let keep = list.rows.partition_point(|&row| (row as usize) < rows);
            list.rows.truncate(keep);
            list.activations.truncate(keep);
        }
        self.rows = rows;
    }

    /// Rows that have a feature.
    pub fn count(&self, feature: usize) -> usize {
        self.lists[feature].rows.len()
    }

    /// Adds `weight * activation` of each weighted feature to the scores of its rows in `range`; `scores` begins with the range.
    /// Returns the entries read. Features are taken in order, so that a row's score does not depend on the range.
    pub fn score(&self, weights: &[(u32, f32)], range: Range<usize>, scores: &mut [f32]) -> usize {
        let mut read = 0;
        for &(feature, weight) in weights {
            let list = &self.lists[feature as usize];
            let first = list.rows.partition_point(|&row| (row as usize) < range.start);
            let last = first + list.rows[first..].partition_point(|&row| (row as usize) < range.end);
            for (&row, activation) in list.rows[first..last].iter().zip(&list.activations[first..last]) {
                scores[row as usize - range.start] += weight * activation.to_f32();
            }
            read += last - first;
        }
        read
    }

    /// Weights of a query's features, from the sums of their activations over the query's rows: without those that more than
    /// `stop_share` of the rows have, times `ln((rows - n + 1/2) / (n + 1/2) + 1)` with `idf`, for a feature that `n` rows have.
    pub fn weighted(&self, sums: &[(u32, f32)], idf: bool, stop_share: f32) -> Vec<(u32, f32)> {
        let all = self.rows as f64;
        let mut weights = Vec::new();
        for &(feature, sum) in sums {
            let with = self.count(feature as usize) as f64;
            if sum != 0.0 && with <= f64::from(stop_share) * all {
                let rarity = ((all - with + 0.5) / (with + 0.5) + 1.0).ln() as f32;
                weights.push((feature, if idf { sum * rarity } else { sum }));
            }
        }
        weights
    }

    /// Bytes of the entries.
    pub fn nbytes(&self) -> usize {
        let bytes = |list: &List| 4 * list.rows.capacity() + 2 * list.activations.capacity() + size_of::<List>();
        self.lists.iter().map(bytes).sum()
    }

    /// Lengths of the lists, then rows and activations of one list after another.
    pub(crate) fn flat(&self) -> (Vec<u32>, Vec<u32>, Vec<u16>) {
        let counts = self.lists.iter().map(|list| list.rows.len() as u32).collect();
        let rows = self.lists.iter().flat_map(|list| list.rows.iter().copied()).collect();
        let activations = self.lists.iter().flat_map(|list| list.activations.iter().map(|a| a.to_bits())).collect();
        (counts, rows, activations)
    }

    /// What [`Self::flat`] gave of lists of `rows` rows; `None` where that cannot be.
    pub(crate) fn from_flat(counts: &[u32], of_rows: &[u32], activations: &[u16], rows: usize) -> Option<Self> {
        let total = counts.iter().map(|&n| n as usize).sum::<usize>();
        if of_rows.len() != total || activations.len() != total {
            return None;
        }
        let (mut lists, mut at) = (Vec::with_capacity(counts.len()), 0);
        for &count in counts {
            let own = at..at + count as usize;
            at = own.end;
            let list = List {
                rows: of_rows[own.clone()].to_vec(),
                activations: activations[own].iter().map(|&bits| f16::from_bits(bits)).collect(),
            };
            let rises = list.rows.windows(2).all(|pair| pair[0] < pair[1]);
            if !rises || list.rows.last().is_some_and(|&row| row as usize >= rows) {
                return None;
            }
            lists.push(list);
        }
        Some(Self { lists, rows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled() -> Postings {
        let mut postings = Postings::new(5);
        postings.add(&[(0, 1.0), (3, 2.0), (1, 0.5), (0, 0.0)], 2);
        postings.add(&[(3, -1.0), (4, 4.0)], 2);
        postings
    }

    #[test]
    fn scores_add_up_over_ranges() {
        let postings = filled();
        assert_eq!((postings.rows(), postings.count(0), postings.count(3)), (3, 1, 2));
        let weights = [(0, 1.0), (1, 2.0), (3, 10.0)];
        let mut whole = [0.0; 3];
        assert_eq!(postings.score(&weights, 0..3, &mut whole), 4);
        assert_eq!(whole, [21.0, 1.0, -10.0]);
        let mut part = [0.0; 2];
        assert_eq!(postings.score(&weights, 1..3, &mut part), 2);
        assert_eq!(part, [1.0, -10.0]);
    }

    #[test]
    fn what_is_cut_is_gone() {
        let mut postings = filled();
        postings.truncate(1);
        assert_eq!((postings.rows(), postings.count(0), postings.count(1), postings.count(3)), (1, 1, 0, 1));
        postings.truncate(7);
        assert_eq!(postings.rows(), 1);
    }

    #[test]
    fn flat_and_back() {
        let postings = filled();
        let (counts, rows, activations) = postings.flat();
        let again = Postings::from_flat(&counts, &rows, &activations, 3).expect("as it was");
        assert_eq!(again.flat(), postings.flat());
        assert!(Postings::from_flat(&counts, &rows, &activations, 2).is_none());
        assert!(Postings::from_flat(&counts, &rows[1..], &activations, 3).is_none());
    }
}
