//! The best entries of rows of scores, by number or by share, and lists of what lies along lines.

use super::scan::{RowWork, Selection, map_rows};
use super::select::{check_len, descending};
use crate::dense::scores::RowId;
use crate::dense::{Options, Problem};
use crate::parallel::{Execution, map};
use crate::simd::Simd;
use crate::tensor::{Error, Result, TensorView};
use std::ops::Range;

/// How [`choose`] chooses among the entries of a row, or of several rows together.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    /// Each row's entries below this can be chosen.
    pub limits: &'a [usize],
    /// Entries of each row that are chosen whatever their score, as far as they are below the limit.
    pub forced: &'a [Range<usize>],
    /// So many first entries of each row are, too.
    pub sinks: usize,
    /// Further ones, `[rows, columns]`, or none.
    pub marks: &'a [bool],
    /// For each scope, the share of the sum of its scores that the chosen entries have at least; from 1 on, all are chosen.
    pub share: &'a [f32],
    /// Chosen entries of a scope are at least so many, and
    pub least: usize,
    /// at most so many, but for the forced ones.
    pub most: usize,
    /// Whether forced entries count to share and numbers; else they come on top.
    pub counts: bool,
    /// At least so many that are not forced.
    pub others: usize,
    /// Rows that make a scope.
    pub together: usize,
    /// Whether scores are first moved and scaled to 0 to 1 within the scope.
    pub spread: bool,
}

impl Choice<'_> {
    fn check(&self, rows: usize, columns: usize) -> Result<()> {
        check_len("limits", self.limits.len(), rows)?;
        check_len("forced", self.forced.len(), rows)?;
        if self.together == 0 || !rows.is_multiple_of(self.together) {
            return Err(Error::value("together", self.together, format!("a divisor of {rows} rows")));
        }
        check_len("share", self.share.len(), rows / self.together)?;
        if !self.marks.is_empty() {
            check_len("marks", self.marks.len(), rows * columns)?;
        }
        if self.limits.iter().any(|&limit| limit > columns) {
            return Err(Error::value("limits", "entries that are not there", format!("at most {columns}")));
        }
        Ok(())
    }

    /// Whether an entry is forced.
    fn is_forced(&self, row: usize, column: usize, columns: usize) -> bool {
        column < self.sinks
            || self.forced[row].contains(&column)
            || self.marks.get(row * columns + column).is_some_and(|&mark| mark)
    }

    /// Marks what is chosen of a scope, the rows from `first` on; `scores` and `taken` are `[together, columns]`.
    fn of_scope(&self, first: usize, columns: usize, scores: &[f32], taken: &mut [bool]) {
        let value = |i: u32| if scores[i as usize].is_nan() { f32::NEG_INFINITY } else { scores[i as usize] };
        let (mut among, mut forced) = (Vec::new(), 0usize);
        let (mut low, mut high) = (f32::INFINITY, f32::NEG_INFINITY);
        for r in 0..self.together {
            for column in 0..self.limits[first + r] {
                let i = (r * columns + column) as u32;
                (low, high) = (low.min(value(i)), high.max(value(i)));
                taken[i as usize] = self.is_forced(first + r, column, columns);
                forced += usize::from(taken[i as usize]);
                if !taken[i as usize] || !self.counts {
                    among.push(i);
                }
            }
        }
        let share = f64::from(self.share[first / self.together]);
        let every = among.len();
        let (shift, unit) = match (self.spread, high - low > 1e-6) {
            (true, true) => (f64::from(low), 1.0 / (f64::from(high) - f64::from(low))),
            (true, false) => (f64::from(low), 1.0),
            _ => (0.0, 1.0),
        };
        let weight = |i: u32| ((f64::from(value(i)) - shift) * unit).max(0.0);
        let (have, mut sum) = match self.counts {
            true => (forced, (0..taken.len() as u32).filter(|&i| taken[i as usize]).map(weight).sum::<f64>()),
            false => (0, 0.0),
        };
        let (least, most) = (self.least.saturating_sub(have), self.most.saturating_sub(have));
        if share >= 1.0 && most >= every {
            among.iter().for_each(|&i| taken[i as usize] = true);
            return;
        }
        let least = least.max(self.others).min(every);
        if share <= 0.0 && least < every {
            // Numbers alone: no need for the order of all.
            if least > 0 {
                let rank = |&a: &u32, &b: &u32| value(b).total_cmp(&value(a)).then(a.cmp(&b));
                among.select_nth_unstable_by(least - 1, rank);
                among[..least].iter().for_each(|&i| taken[i as usize] = true);
            }
            return;
        }
        let needed = if share > 0.0 {
            let rest: f64 = among.iter().map(|&i| weight(i)).sum();
            share * (sum + rest)
        } else {
            f64::NEG_INFINITY
        };
        let order = descending(scores, among.into_iter());
        let most = most.max(least);
        for (n, &i) in order.iter().enumerate() {
            let reached = share < 1.0 && sum >= needed;
            if n >= most || (reached && n >= least) {
                break;
            }
            sum += weight(i);
            taken[i as usize] = true;
        }
    }
}

/// The chosen entries of each row of `scores`, `[rows, columns]`.
pub fn choose(scores: &[f32], columns: usize, choice: Choice, execution: &Execution) -> Result<Selection> {
    let rows = choice.limits.len();
    check_len("scores", scores.len(), rows * columns)?;
    choice.check(rows, columns)?;
    let size = choice.together * columns;
    if u32::try_from(size).is_err() {
        return Err(Error::value("scores", format!("{size} entries of a scope"), "fewer than 2^32"));
    }
    let scopes = map(execution, rows / choice.together, |scope| {
        let mut taken = vec![false; size];
        choice.of_scope(scope * choice.together, columns, &scores[scope * size..(scope + 1) * size], &mut taken);
        let lists = (0..choice.together).map(|r| listed(&taken[r * columns..(r + 1) * columns]));
        lists.collect::<Vec<_>>()
    })?;
    Ok(scopes.into_iter().flatten().collect())
}

fn listed(taken: &[bool]) -> Vec<u32> {
    (0u32..).zip(taken).filter(|&(_, &taken)| taken).map(|(i, _)| i).collect()
}

struct BestForced<'a> {
    limits: &'a [usize],
    forced: &'a [Range<usize>],
    most: usize,
}

impl RowWork for BestForced<'_> {
    type Output = Vec<u32>;

    #[inline(always)]
    fn row<S: Simd>(&self, _: S, id: RowId, logits: &[f32]) -> Vec<u32> {
        let mut taken = vec![false; logits.len()];
        let choice = Choice {
            limits: &self.limits[id.row..=id.row],
            forced: &self.forced[id.row..=id.row],
            sinks: 0,
            marks: &[],
            share: &[0.0],
            least: self.most,
            most: self.most,
            counts: true,
            others: 0,
            together: 1,
            spread: false,
        };
        choice.of_scope(0, logits.len(), logits, &mut taken);
        listed(&taken)
    }
}

/// The `most` entries of each query row with the largest logits, those that are forced among them; lists are `[batch, query heads,
/// queries]`.
pub fn best_forced(
    q: TensorView,
    k: TensorView,
    limits: &[usize],
    forced: &[Range<usize>],
    most: usize,
    execution: &Execution,
) -> Result<Selection> {
    let problem = Problem::new(q, k.into(), k.into(), Options { scale: Some(1.0), ..Options::default() })?;
    check_len("limits", limits.len(), problem.queries)?;
    check_len("forced", forced.len(), problem.queries)?;
    if limits.iter().any(|&limit| limit > problem.keys) {
        return Err(Error::value("limits", "entries that are not there", format!("at most {}", problem.keys)));
    }
    Ok(map_rows(&problem, &BestForced { limits, forced, most }, execution)?.into_iter().collect())
}

/// Keys of each block of queries that lie on vertical lines, which are keys, or on slanted ones, which are distances from the query's
/// position to the key's, as far as a query of the block sees them. `columns` and `distances` are lists per head; the result's are
/// `[heads, query blocks]`. `bounds` are positions.
pub fn line_lists(
    columns: &Selection,
    distances: &Selection,
    bounds: &[usize],
    execution: &Execution,
) -> Result<Selection> {
    let heads = columns.indptr.len().saturating_sub(1);
    check_len("distances", distances.indptr.len(), heads + 1)?;
    columns.check("columns")?;
    distances.check("distances")?;
    if bounds.is_empty() || !bounds.is_sorted() {
        return Err(Error::value("bounds", format!("{} bounds", bounds.len()), "bounds that rise"));
    }
    let blocks = bounds.len() - 1;
    let lists = map(execution, heads * blocks, |i| {
        let (head, block) = (i / blocks, i % blocks);
        let (start, end) = (bounds[block], bounds[block + 1]);
        let mut taken = vec![false; end];
        for &column in columns.list(head).iter().take_while(|&&column| (column as usize) < end) {
            taken[column as usize] = true;
        }
        for &distance in distances.list(head).iter().take_while(|&&distance| (distance as usize) < end) {
            let distance = distance as usize;
            taken[start.saturating_sub(distance)..end - distance].fill(true);
        }
        listed(&taken)
    })?;
    Ok(lists.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(choice: Choice) -> Vec<u32> {
        let made = choose(&[0.1, 0.4, 0.05, 0.3, 0.15], 5, choice, &Execution::default()).unwrap();
        made.indices
    }

    #[test]
    fn shares_numbers_and_forced_entries() {
        let forced = 2..3;
        let plain = Choice {
            limits: &[5],
            forced: std::slice::from_ref(&forced),
            sinks: 0,
            marks: &[],
            share: &[0.0],
            least: 0,
            most: usize::MAX,
            counts: true,
            others: 0,
            together: 1,
            spread: false,
        };
        assert_eq!(chosen(plain), [2]);
        assert_eq!(chosen(Choice { least: 2, most: 2, ..plain }), [1, 2]);
        assert_eq!(chosen(Choice { least: 2, most: 2, counts: false, ..plain }), [1, 2, 3]);
        assert_eq!(chosen(Choice { share: &[0.7], ..plain }), [1, 2, 3]);
        assert_eq!(chosen(Choice { share: &[0.8], ..plain }), [1, 2, 3, 4]);
        assert_eq!(chosen(Choice { share: &[0.8], most: 2, ..plain }), [1, 2]);
        assert_eq!(chosen(Choice { share: &[1.0], limits: &[3], ..plain }), [0, 1, 2]);
        assert_eq!(chosen(Choice { others: 1, sinks: 1, ..plain }), [0, 1, 2]);
    }
}
