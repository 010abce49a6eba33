//! One list of keys for all heads from each head's ranking.

use crate::parallel::{Execution, map};
use crate::tensor::{Error, Result};
use std::cmp::Ordering;
use std::ops::Range;

/// The first `count` distinct keys when the heads' rankings are read rank by rank: every head's best key in the order of heads, then
/// every head's second, and so on; ascending.
///
/// `scores` are `[heads, keys]`; only keys of `among` take part. A head ranks by score, equal ones by key; NaN comes last. All of
/// `among` where it has no more than `count`.
pub fn rank_union(
    scores: &[f32],
    heads: usize,
    among: Range<usize>,
    count: usize,
    execution: &Execution,
) -> Result<Vec<u32>> {
    let keys = scores.len().checked_div(heads).unwrap_or(0);
    if heads == 0 || scores.len() != heads * keys || among.start > among.end || among.end > keys {
        let got = format!("{} scores of {heads} heads, keys {among:?}", scores.len());
        return Err(Error::value("scores", got, "as many keys for each of at least one head, and some of them"));
    }
    if keys > u32::MAX as usize {
        return Err(Error::value("scores", format!("{keys} keys"), "fewer than 2^32"));
    }
    let count = count.min(among.len());
    let ranked = map(execution, heads, |head| {
        let scores = &scores[head * keys..(head + 1) * keys];
        let mut order: Vec<u32> = among.clone().map(|key| key as u32).collect();
        let better = |a: &u32, b: &u32| {
            let score = |key: &u32| scores[*key as usize];
            let (x, y) = (score(a), score(b));
            let by_score = y.partial_cmp(&x).unwrap_or_else(|| x.is_nan().cmp(&y.is_nan()));
            if by_score == Ordering::Equal { a.cmp(b) } else { by_score }
        };
        if count < order.len() {
            order.select_nth_unstable_by(count, better);
            order.truncate(count);
        }
        order.sort_unstable_by(better);
        order
    })?;
    let mut taken = vec![false; keys];
    let mut union = Vec::with_capacity(count);
    for key in (0..count).flat_map(|rank| ranked.iter().map(move |order| order[rank])) {
        if union.len() == count {
            break;
        }
        if !std::mem::replace(&mut taken[key as usize], true) {
            union.push(key);
        }
    }
    union.sort_unstable();
    Ok(union)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_read_before_heads() {
        let scores = [0.0, 9.0, 8.0, 7.0, 6.0, 0.0, 6.0, 9.0, f32::NAN, 8.0];
        let union = |count, among| rank_union(&scores, 2, among, count, &Execution::default()).unwrap();
        // Head 0: 1 2 3 4 0; head 1: 2 4 1 0 3.
        assert_eq!(union(3, 0..5), [1, 2, 4]);
        assert_eq!(union(2, 2..5), [2, 3]);
        assert_eq!(union(9, 0..5), [0, 1, 2, 3, 4]);
        assert!(union(0, 0..5).is_empty());
        assert!(rank_union(&scores, 3, 0..2, 1, &Execution::default()).is_err());
    }
}
