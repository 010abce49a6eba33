//! Retrieval attention against exact attention over the rows it read, in f64.

use super::*;
use crate::index::{HashOptions, Hashes, Index, Random, SignatureOptions, Signatures};
use crate::kv::KvStore;
use proptest::prelude::*;

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..n).map(|_| random.normal() as f32).collect()
}

struct Case {
    kv_heads: usize,
    group: usize,
    queries: usize,
    dim: usize,
    value_dim: usize,
    store: Arc<KvStore>,
    q: Vec<f32>,
}

/// Output, lse and statistics of a call.
type Found = (Vec<f32>, Vec<f32>, Vec<RowStats>);

impl Case {
    fn new([kv_heads, group, queries, keys, dim, value_dim]: [usize; 6], dtype: DType, seed: u64) -> Self {
        let store = KvStore::new(kv_heads, dim, value_dim, dtype, keys + 64).unwrap();
        let case = Self {
            kv_heads,
            group,
            queries,
            dim,
            value_dim,
            store: Arc::new(store),
            q: numbers(kv_heads * group * queries * dim, seed),
        };
        case.append(keys, seed + 1);
        case
    }

    fn append(&self, count: usize, seed: u64) {
        let (k, v) = (
            numbers(self.kv_heads * count * self.dim, seed),
            numbers(self.kv_heads * count * self.value_dim, seed + 1),
        );
        let k = TensorView::new(&k, [1, self.kv_heads, count, self.dim]).unwrap();
        let v = TensorView::new(&v, [1, self.kv_heads, count, self.value_dim]).unwrap();
        self.store.append(&k, &v).unwrap();
    }

    fn index(&self, bits: usize) -> Signatures {
        Signatures::new(Arc::clone(&self.store), SignatureOptions { bits, seed: 1 }).unwrap()
    }

    fn call(&self, index: &dyn Index, options: RetrievalOptions) -> Result<Found> {
        let heads = self.kv_heads * self.group;
        let (mut out, mut lse) =
            (vec![f32::NAN; heads * self.queries * self.value_dim], vec![f32::NAN; heads * self.queries]);
        let stats = retrieval_attention(
            TensorView::new(&self.q, [1, heads, self.queries, self.dim])?,
            index,
            options,
            &mut TensorViewMut::new(&mut out, [1, heads, self.queries, self.value_dim])?,
            &mut TensorViewMut::new(&mut lse, [1, heads, self.queries, 1])?,
            true,
            &Execution::default(),
        )?;
        Ok((out, lse, stats))
    }

    /// Softmax over the rows that `read` tells, for each query row: output, lse, and the share of the others' mass.
    fn expected(
        &self,
        sinks: Option<&[f32]>,
        read: impl Fn(usize, usize, usize) -> bool,
    ) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let reader = self.store.read();
        let wide = |view: TensorView, h, j| -> Vec<f64> {
            with_element!(view.dtype(), T => view.row::<T>(0, h, j).iter().map(|x| f64::from(x.to_f32())).collect())
        };
        let (mut out, mut lse, mut missed) = (Vec::new(), Vec::new(), Vec::new());
        for h in 0..self.kv_heads * self.group {
            for i in 0..self.queries {
                let q = &self.q[(h * self.queries + i) * self.dim..][..self.dim];
                let (mut sum, mut others) = (sinks.map_or(0.0, |s| f64::from(s[h]).exp()), 0.0);
                let mut row = vec![0.0; self.value_dim];
                for j in 0..reader.len() - self.queries + i + 1 {
                    let k = wide(reader.keys().numbers().unwrap(), h / self.group, j);
                    let s: f64 =
                        q.iter().zip(k).map(|(q, k)| f64::from(*q) * k).sum::<f64>() / (self.dim as f64).sqrt();
                    if read(h / self.group, i, j) {
                        sum += s.exp();
                        let v = wide(reader.values().numbers().unwrap(), h / self.group, j);
                        row.iter_mut().zip(v).for_each(|(o, v)| *o += s.exp() * v);
                    } else {
                        others += s.exp();
                    }
                }
                out.extend(row.iter().map(|o| o / sum));
                lse.push(sum.ln());
                missed.push(others / (sum + others));
            }
        }
        (out, lse, missed)
    }
}

fn options(select: Select, sinks: usize, window: usize, rest: Rest) -> RetrievalOptions<'static> {
    RetrievalOptions { select, by_head: None, sinks, window, scale: None, rest, sink_logits: None, sampling: None }
}

fn close(got: &[f32], expected: &[f64], tolerance: f64) -> bool {
    got.len() == expected.len()
        && got.iter().zip(expected).all(|(&a, b)| (f64::from(a) - b).abs() <= tolerance * (1.0 + b.abs()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rows_read_are_exact_and_the_bound_holds(
        (kv_heads, group, queries) in (1usize..3, prop_oneof![1usize..6, Just(9)], 1usize..4),
        keys in prop_oneof![3usize..40, 500usize..900],
        (dim, value_dim) in (prop_oneof![1usize..40, Just(64)], prop_oneof![1usize..20, Just(70)]),
        bits in prop_oneof![Just(1usize), Just(2), Just(4)],
        (sinks, window) in (0usize..20, prop_oneof![0usize..100, Just(5000)]),
        select in prop_oneof![(1usize..60).prop_map(Select::TopK), (0.05f32..0.95).prop_map(Select::TopP)],
        dtype in prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)],
        seed in any::<u32>(),
    ) {
        let case = Case::new([kv_heads, group, queries, keys, dim, value_dim], dtype, u64::from(seed));
        let index = case.index(bits);
        let (out, lse, stats) = case.call(&index, options(select, sinks, window, Rest::Ignored)).unwrap();
        let coded = index.len();
        prop_assert_eq!(coded, if keys < 512 { 0 } else { keys / 16 * 16 });
        let read = |h: usize, i: usize, j: usize| {
            let (total, stats) = (keys - queries + i + 1, &stats[h * queries + i]);
            j < sinks || j + window >= total || j >= coded || stats.selected.binary_search(&(j as u32)).is_ok()
        };
        let (expected, expected_lse, missed) = case.expected(None, read);
        prop_assert!(close(&out, &expected, 2e-5) && close(&lse, &expected_lse, 2e-5));
        for (i, stats) in stats.iter().enumerate() {
            let (h, row) = (i / queries, i % queries);
            let total = keys - queries + row + 1;
            prop_assert_eq!(stats.keys_total, total);
            prop_assert_eq!(stats.keys_attended, (0..total).filter(|&j| read(h, row, j)).count());
            prop_assert!(stats.selected.is_sorted());
            for g in 0..group {
                let truth = missed[(h * group + g) * queries + row];
                // One dimension has no error that a deviation could tell but that of the factor's rounding.
                let slack = if dim == 1 { 1e-3 } else { 1e-5 };
                prop_assert!(truth <= f64::from(stats.missed_mass_bound[g]) + slack, "{} above {}", truth, stats.missed_mass_bound[g]);
                prop_assert!(stats.missed_mass[g] <= stats.missed_mass_bound[g] && stats.missed_mass[g] >= 0.0);
            }
        }
    }

    #[test]
    fn enough_rows_are_all_rows(
        (kv_heads, group, queries) in (1usize..3, 1usize..6, 1usize..4),
        keys in prop_oneof![3usize..40, 500usize..900],
        (sinks, window) in (0usize..20, 0usize..100),
        estimated in any::<bool>(),
        seed in any::<u32>(),
    ) {
        let case = Case::new([kv_heads, group, queries, keys, 20, 13], DType::BF16, u64::from(seed));
        let sink_logits = numbers(kv_heads * group, 9);
        let rest = if estimated { Rest::Estimated } else { Rest::Ignored };
        let mut all = options(Select::TopK(keys), sinks, window, rest);
        all.sink_logits = Some(&sink_logits);
        let (out, lse, stats) = case.call(&case.index(2), all).unwrap();
        let (expected, expected_lse, _) = case.expected(Some(&sink_logits), |_, _, _| true);
        prop_assert!(close(&out, &expected, 2e-5) && close(&lse, &expected_lse, 2e-5));
        for stats in stats {
            prop_assert_eq!(stats.keys_attended, stats.keys_total);
            prop_assert!(stats.missed_mass.iter().chain(&stats.missed_mass_bound).all(|&x| x == 0.0));
        }
    }
}

#[test]
fn the_rest_is_estimated_well_on_a_flat_head() {
    let case = Case::new([2, 3, 1, 4000, 32, 16], DType::F32, 3);
    let index = case.index(4);
    let (exact, exact_lse, _) = case.expected(None, |_, _, _| true);
    let error = |rest| {
        let (out, lse, stats) = case.call(&index, options(Select::TopK(40), 4, 32, rest)).unwrap();
        assert!(stats.iter().all(|s| s.missed_mass.iter().all(|&x| x > 0.5)));
        let squares: f64 = out.iter().zip(&exact).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum();
        let of_lse = lse.iter().zip(&exact_lse).map(|(&a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max);
        (squares.sqrt(), of_lse)
    };
    let ((estimated, estimated_lse), (ignored, ignored_lse)) = (error(Rest::Estimated), error(Rest::Ignored));
    assert!(estimated < 0.5 * ignored, "{estimated} {ignored}");
    assert!(estimated_lse < 0.02 && ignored_lse > 0.5, "{estimated_lse} {ignored_lse}");
}

#[test]
fn codes_follow_appends_and_truncates() {
    let case = Case::new([2, 2, 1, 1100, 24, 24], DType::F32, 5);
    let index = case.index(4);
    for (step, (cut, add)) in
        [(1100, 0), (1090, 50), (700, 300), (100, 300), (400, 200), (10, 900)].into_iter().enumerate()
    {
        case.store.truncate(cut);
        if add > 0 {
            case.append(add, 100 + step as u64);
        }
        let keys = case.store.len();
        let (out, lse, stats) = case.call(&index, options(Select::TopK(30), 2, 20, Rest::Ignored)).unwrap();
        let coded = index.len();
        let read = |h: usize, _: usize, j: usize| {
            j < 2 || j + 20 >= keys || j >= coded || stats[h].selected.binary_search(&(j as u32)).is_ok()
        };
        let (expected, expected_lse, missed) = case.expected(None, read);
        assert!(close(&out, &expected, 2e-5) && close(&lse, &expected_lse, 2e-5), "step {step}");
        // Stale codes would be far off.
        let estimated: Vec<f32> = stats.iter().flat_map(|s| s.missed_mass.clone()).collect();
        assert!(close(&estimated, &missed, 0.03), "step {step}: {estimated:?} {missed:?}");
    }
}

#[test]
fn hash_codes_select_by_agreeing_bits() {
    // W is the identity: the codes are the signs.
    let (keys, dim) = (600, 16);
    let case = Case::new([1, 2, 1, keys, dim, 4], DType::F32, 7);
    let identity: Vec<f32> = (0..dim * dim).map(|i| if i % (dim + 1) == 0 { 1.0 } else { 0.0 }).collect();
    for use_norm in [false, true] {
        let options_of = HashOptions { weights: identity.clone(), code_bits: dim, use_norm };
        let index = Hashes::new(Arc::clone(&case.store), options_of).unwrap();
        let (_, _, stats) = case.call(&index, options(Select::TopK(25), 0, 0, Rest::Ignored)).unwrap();
        let reader = case.store.read();
        let mut order: Vec<(f32, usize)> = (0..576)
            .map(|j| {
                let key = reader.keys().numbers().unwrap().row::<f32>(0, 0, j);
                let cosine: i32 = (case.q.iter().zip(key.iter().cycle()))
                    .map(|(q, k)| if (*q > 0.0) == (*k > 0.0) { 1 } else { -1 })
                    .sum();
                let norm = key.iter().map(|x| x * x).sum::<f32>().sqrt();
                (cosine as f32 * if use_norm { half::f16::from_f32(norm).to_f32() } else { 1.0 }, j)
            })
            .collect();
        order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut expected: Vec<u32> = order[..25].iter().map(|&(_, j)| j as u32).collect();
        expected.sort_unstable();
        assert_eq!(stats[0].selected, expected, "use_norm {use_norm}");
        assert!(stats[0].missed_mass == [1.0, 1.0]);
    }
}

#[test]
fn keys_that_are_not_finite_are_named() {
    let case = Case::new([2, 1, 1, 592, 8, 8], DType::F32, 9);
    let index = case.index(2);
    index.update(&Execution::default()).unwrap();
    let (mut k, v) = (numbers(2 * 16 * 8, 1), numbers(2 * 16 * 8, 2));
    k[(16 + 11) * 8 + 3] = f32::NAN;
    let view = |x| TensorView::new(x, [1, 2, 16, 8]).unwrap();
    case.store.append(&view(&k), &view(&v)).unwrap();
    let message = case.call(&index, options(Select::TopK(3), 0, 0, Rest::Estimated)).unwrap_err().to_string();
    assert!(message.contains("key 603 of head 1"), "{message}");
    case.store.truncate(592);
    assert!(case.call(&index, options(Select::TopK(3), 0, 0, Rest::Estimated)).is_ok());
}

#[test]
fn wrong_arguments_are_named() {
    let case = Case::new([2, 2, 3, 520, 8, 8], DType::F32, 11);
    let index = case.index(4);
    let message = |index: &dyn Index, options| case.call(index, options).unwrap_err().to_string();
    assert!(message(&index, options(Select::TopK(0), 0, 0, Rest::Ignored)).starts_with("top_k:"));
    assert!(message(&index, options(Select::TopP(1.0), 0, 0, Rest::Ignored)).starts_with("top_p:"));
    assert!(message(&index, options(Select::TopP(f32::NAN), 0, 0, Rest::Ignored)).starts_with("top_p:"));
    let nan = RetrievalOptions { scale: Some(f32::NAN), ..options(Select::TopK(1), 0, 0, Rest::Ignored) };
    assert!(message(&index, nan).starts_with("scale:"));
    let weights = numbers(2 * 8 * 32, 1);
    let hashed = Hashes::new(Arc::clone(&case.store), HashOptions { weights, code_bits: 32, use_norm: false }).unwrap();
    assert!(message(&hashed, options(Select::TopP(0.5), 0, 0, Rest::Ignored)).starts_with("top_p:"));
    assert!(message(&hashed, options(Select::TopK(5), 0, 0, Rest::Estimated)).starts_with("rest:"));
    case.store.truncate(2);
    assert!(message(&index, options(Select::TopK(5), 0, 0, Rest::Ignored)).starts_with("q:"));
}
