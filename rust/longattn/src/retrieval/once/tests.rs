//! One pass picks what weighing all candidates picks.

use super::*;
use crate::index::clusters::Clusters;
use crate::index::{Random, Select};
use crate::kv::KvStore;
use crate::parallel::Execution;
use crate::retrieval::scan::pick_twice;
use crate::simd::Isa;
use crate::tensor::{DType, TensorView};
use std::sync::Arc;

const DIM: usize = 8;

/// Logits that lie there, `[group, n]`, for codes of 16 rows.
struct Given {
    logits: Vec<f32>,
    n: usize,
    noise: f32,
    values: Option<(Clusters, Vec<u8>)>,
}

impl RowCodes for Given {
    type Group = ();

    fn block(&self) -> usize {
        16
    }

    fn block_bytes(&self) -> usize {
        16
    }

    fn group(&self, _isa: Isa, _head: usize, _queries: &[&[f32]]) {}

    fn scan(
        &self,
        _isa: Isa,
        _head: usize,
        blocks: Range<usize>,
        _group: &(),
        scores: &mut [f32],
        stride: usize,
        _next: Option<usize>,
    ) {
        for (g, logits) in self.logits.chunks_exact(self.n).enumerate() {
            for (j, place) in (blocks.start * 16..blocks.end * 16).enumerate() {
                scores[g * stride + j] = logits.get(place).copied().unwrap_or(9.0);
            }
        }
    }

    fn error(&self, _head: usize, _group: &(), _query: usize) -> CodeError {
        CodeError::of_noise(self.noise)
    }

    fn largest_error(&self, _head: usize, _group: &(), _query: usize) -> Option<f32> {
        Some(self.noise)
    }

    fn values(&self, _head: usize) -> Option<(&Clusters, &[u8])> {
        self.values.as_ref().map(|(values, ids)| (values, &ids[..]))
    }
}

/// A store of `n` rows, whose values the clusters are of.
fn store(n: usize) -> Arc<KvStore> {
    let store = KvStore::new(1, DIM, DIM, DType::F32, n).unwrap();
    let mut random = Random::new(7);
    let rows: Vec<f32> = (0..n * DIM).map(|_| random.normal() as f32).collect();
    let rows = TensorView::new(&rows, [1, 1, n, DIM]).unwrap();
    store.append(&rows, &rows).unwrap();
    Arc::new(store)
}

struct Case<'a> {
    store: &'a KvStore,
    codes: Given,
    group: usize,
    steady: f32,
    candidates: Range<usize>,
    rows: usize,
}

impl Case<'_> {
    /// What both ways pick, on an instruction set.
    fn picks(&self, isa: Isa, parallel: Option<&Execution>) -> (Option<Pick>, Pick) {
        let reader = self.store.read();
        let (query, steady) = (vec![0.0; DIM], vec![self.steady; self.group]);
        let ask = Ask {
            head: 0,
            queries: &vec![&query[..]; self.group],
            steady: &steady,
            candidates: self.candidates.clone(),
            select: Select::TopK(self.rows),
            rest: self.codes.values.is_some(),
            keys: reader.keys(),
            values: reader.values(),
            isa,
            parallel,
        };
        (pick(&self.codes, &ask, &self.candidates, self.rows), pick_twice(&self.codes, &ask, self.candidates.clone()))
    }
}

fn close(a: f32, b: f32, tolerance: f32) -> bool {
    a == b || (a - b).abs() <= tolerance
}

/// `totals`: log of each head's whole mass; `rest`: by how much the mass of the rest may differ.
fn same(once: &Pick, twice: &Pick, totals: &[f64], rest: f32, what: &str) {
    let shared = once.rows.iter().filter(|row| twice.rows.binary_search(row).is_ok()).count();
    assert!(once.rows.len() == twice.rows.len() && shared == once.rows.len(), "{what}: {shared} rows are the same");
    assert_eq!((once.scored, once.bytes), (twice.scored, twice.bytes), "{what}");
    let (a, b) = (once.rest.as_ref().unwrap(), twice.rest.as_ref().unwrap());
    for ((a, b), total) in a.iter().zip(b).zip(totals) {
        assert!(close(a.log_mass, b.log_mass, rest), "{what}: rest {} and {}", a.log_mass, b.log_mass);
        assert_eq!(a.mean.len(), b.mean.len());
        // Which blocks are drawn depends on which weigh little. By moments of a sample others do: two draws, each off by a hundredth of
        // the values' spread at most as its standard deviation (see `Left::of`), differ by three hundredths in one of so many numbers.
        let drawn = if rest > 0.01 { 0.03 } else { 0.01 };
        let share = (f64::from(b.log_mass) - total).exp() as f32;
        let means = || a.mean.iter().zip(&b.mean);
        assert!(means().all(|(a, b)| close(a * share, b * share, drawn)), "{what}: {:?} and {:?}", a.mean, b.mean);
    }
    for (&a, &b) in once.bound.as_ref().unwrap().iter().zip(twice.bound.as_ref().unwrap()) {
        assert!(close(a, b, 1e-3), "{what}: bound {a} and {b}");
    }
}

#[test]
fn one_pass_picks_the_rows_that_weigh_most_of_all() {
    let n = 40_000;
    let store = store(n);
    let reader = store.read();
    let mut random = Random::new(1);
    let ids: Vec<u8> = (0..n.next_multiple_of(16)).map(|_| random.below(40) as u8).collect();
    let execution = Execution::default();
    for (group, spread, noise, needles) in
        [(1, 1.0, 0.1, 0), (4, 1.0, 0.1, 0), (5, 3.0, 0.3, 30), (2, 2.0, 0.8, 0), (4, 1.0, 0.9, 10), (3, 0.2, 0.0, 500)]
    {
        // The heads of a group mostly want the same rows.
        let all: Vec<f32> = (0..n).map(|_| random.normal() as f32 * spread).collect();
        let mut logits: Vec<f32> = (0..group * n).map(|i| all[i % n] + random.normal() as f32 * spread * 0.5).collect();
        for _ in 0..needles {
            logits[random.below(group * n)] += 12.0;
        }
        let clusters = Clusters::of(Isa::available()[0], [&reader.keys(), &reader.values()], 0, n, 1);
        let values = (clusters.len() >= 40).then(|| (clusters, ids.clone()));
        assert!(values.is_some());
        let codes = Given { logits, n, noise, values };
        let mut case = Case { store: &store, codes, group, steady: 1.0, candidates: 0..0, rows: 0 };
        for (candidates, rows) in [(0..n, 500), (21..n - 333, 1000), (16..39_999, 64)] {
            (case.candidates, case.rows) = (candidates.clone(), rows);
            let what = format!("{group} heads, spread {spread}, noise {noise}, {needles} needles, {rows} rows");
            let total = |g: usize| {
                let logits = case.codes.logits[g * n..][candidates.clone()].iter();
                (f64::from(case.steady).exp() + logits.map(|&x| f64::from(x).exp()).sum::<f64>()).ln()
            };
            // How far logits' noise is taken out of them follows from the moments of the sample, here of 1,024 rows.
            let rest = if noise > 0.5 { 0.08 } else { 1e-3 };
            let totals: Vec<f64> = (0..group).map(total).collect();
            for isa in Isa::available() {
                let (once, twice) = case.picks(isa, None);
                let once = once.unwrap_or_else(|| panic!("{what}: one pass was not enough"));
                same(&once, &twice, &totals, rest, &what);
                let (again, _) = case.picks(isa, Some(&execution));
                let again = again.unwrap();
                assert_eq!(again.rows, once.rows, "{what}");
                for (a, b) in again.rest.unwrap().iter().zip(once.rest.as_ref().unwrap()) {
                    assert_eq!((a.log_mass, &a.mean), (b.log_mass, &b.mean), "{what}: threads");
                }
            }
        }
    }
}

#[test]
fn one_pass_says_where_it_is_not_enough() {
    let n = 40_000;
    let store = store(n);
    let mut random = Random::new(2);
    let case = |logits, steady| Case {
        store: &store,
        codes: Given { logits, n, noise: 0.1, values: None },
        group: 2,
        steady,
        candidates: 0..n,
        rows: 100,
    };
    let flat: Vec<f32> = (0..2 * n).map(|_| random.normal() as f32).collect();
    let isa = Isa::available()[0];
    // Heads that have nothing in common: what weighs most for all is not among the first of each.
    let many = (0..16 * n).map(|_| random.normal() as f32).collect();
    assert!(Case { group: 16, ..case(many, 0.0) }.picks(isa, None).0.is_none());
    assert!(case(flat.clone(), 0.0).picks(isa, None).0.is_some());
    // A head whose mass is in few rows, found by no sample; what weighs for the other head lies below the first one's guess.
    let mut hidden = flat.clone();
    (0..90).for_each(|i| hidden[37 + 401 * i] += 60.0);
    if let (Some(once), twice) = case(hidden, 0.0).picks(isa, None) {
        assert_eq!(once.rows, twice.rows);
    }
    // Fewer rows above the sample's threshold than are wanted: all that is large is in the sample's pieces or nowhere.
    let rising: Vec<f32> = (0..2 * n).map(|i| if i % n < n / 2 { 0.0 } else { -90.0 }).collect();
    if let (Some(once), twice) = case(rising, 0.0).picks(isa, None) {
        assert_eq!(once.rows, twice.rows);
    }
    for bad in [f32::NAN, f32::INFINITY] {
        let mut logits = flat.clone();
        logits[1234..1300].fill(bad);
        assert!(case(logits, 0.0).picks(isa, None).0.is_none());
        assert!(case(flat.iter().map(|_| bad).collect(), 0.0).picks(isa, None).0.is_none());
    }
    assert!(case(vec![f32::NEG_INFINITY; 2 * n], 0.0).picks(isa, None).0.is_none());
    let few = Case { candidates: 0..20_000, ..case(flat.clone(), 0.0) };
    assert!(few.picks(isa, None).0.is_none());
    let many = Case { rows: n / 20, ..case(flat, 0.0) };
    assert!(many.picks(isa, None).0.is_none());
}
