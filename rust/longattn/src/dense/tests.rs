//! Exact attention against a direct computation in f64, on every instruction set of this CPU.

use super::*;
use crate::simd::Isa;
use half::{bf16, f16};
use proptest::prelude::*;

/// Numbers like a normal distribution's, the same for the same seed.
fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut random = crate::index::Random::new(seed);
    (0..n).map(|_| random.normal() as f32).collect()
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    batch: usize,
    kv_heads: usize,
    group: usize,
    queries: usize,
    keys: usize,
    dim: usize,
    value_dim: usize,
}

/// Inputs of one call, rounded to their storage dtypes, each element also as f64.
struct Case {
    shape: Shape,
    q: Array,
    k: Array,
    v: Array,
}

/// A rank-4 array with room between its rows where `gap` says so.
struct Array {
    storage: Storage,
    shape: [usize; 4],
    strides: [isize; 4],
}

enum Storage {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Array {
    fn new(values: &[f32], shape: [usize; 4], dtype: DType, gap: usize) -> Self {
        let [_, h, l, d] = shape;
        let strides = [h * l * (d + gap), l * (d + gap), d + gap, 1].map(|s| s as isize);
        let mut wide = vec![f32::NAN; shape[0] * h * l * (d + gap)];
        for (to, from) in wide.chunks_exact_mut(d + gap).zip(values.chunks_exact(d)) {
            to[..d].copy_from_slice(from);
        }
        let storage = match dtype {
            DType::F32 => Storage::F32(wide),
            DType::F16 => Storage::F16(wide.into_iter().map(f16::from_f32).collect()),
            DType::BF16 => Storage::BF16(wide.into_iter().map(bf16::from_f32).collect()),
        };
        Self { storage, shape, strides }
    }

    fn view(&self) -> TensorView<'_> {
        match &self.storage {
            Storage::F32(x) => TensorView::strided(x, self.shape, self.strides),
            Storage::F16(x) => TensorView::strided(x, self.shape, self.strides),
            Storage::BF16(x) => TensorView::strided(x, self.shape, self.strides),
        }
        .unwrap()
    }

    fn row(&self, b: usize, h: usize, l: usize) -> Vec<f64> {
        let view = self.view();
        with_element!(view.dtype(), T => view.row::<T>(b, h, l).iter().map(|x| f64::from(x.to_f32())).collect())
    }
}

impl Case {
    fn new(shape: Shape, q: DType, kv: DType, gap: usize, seed: u64) -> Self {
        let Shape { batch, kv_heads, group, queries, keys, dim, value_dim } = shape;
        let array =
            |shape: [usize; 4], dtype, seed| Array::new(&numbers(shape.iter().product(), seed), shape, dtype, gap);
        Self {
            shape,
            q: array([batch, kv_heads * group, queries, dim], q, seed),
            k: array([batch, kv_heads, keys, dim], kv, seed + 1),
            v: array([batch, kv_heads, keys, value_dim], kv, seed + 2),
        }
    }

    /// Output and lse by the formula, row by row.
    fn expected(&self, options: &Options) -> (Vec<f64>, Vec<f64>) {
        let Shape { batch, kv_heads, group, queries, keys, dim, value_dim } = self.shape;
        let heads = kv_heads * group;
        let scale = options.scale.map_or_else(|| (dim as f64).powf(-0.5), f64::from);
        let entries = options.relative_bias.map_or(0, |bias| bias.table.len() / heads);
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        for b in 0..batch {
            for h in 0..heads {
                for i in 0..queries {
                    let q = self.q.row(b, h, i);
                    let position = keys as i64 - queries as i64 + i as i64;
                    let visible = |j: i64| {
                        (!options.causal || j <= position)
                            && options.window_left.is_none_or(|w| j >= position - w as i64)
                            && options.window_right.is_none_or(|w| j <= position + w as i64)
                            && options
                                .segments
                                .is_none_or(|s| s.queries[b * queries + i] == s.keys[b * keys + j as usize])
                            && options.visible_until.is_none_or(|end| position < i64::from(end[b * keys + j as usize]))
                    };
                    // SAFETY: the row is inside the scales, which fit the problem.
                    let own = options.row_scales.map(|scales| f64::from(unsafe { *scales.row(b, h, i, 0).0 }));
                    let mut seen: Vec<(f64, usize)> = Vec::new();
                    for j in (0..keys).filter(|&j| visible(j as i64)) {
                        let mut s: f64 = own.unwrap_or(scale)
                            * q.iter().zip(self.k.row(b, h / group, j)).map(|(q, k)| q * k).sum::<f64>();
                        if options.softcap > 0.0 {
                            let cap = f64::from(options.softcap);
                            s = cap * (s / cap).tanh();
                        }
                        if let Some(slopes) = options.alibi_slopes {
                            s -= f64::from(slopes[b * heads + h]) * (position - j as i64).abs() as f64;
                        }
                        if let Some(bias) = options.relative_bias {
                            let entry = j as i64 - position + bias.zero as i64;
                            s += f64::from(bias.table[h * entries + entry.clamp(0, entries as i64 - 1) as usize]);
                        }
                        seen.push((s, j));
                    }
                    let sink = options.sinks.map(|sinks| f64::from(sinks[h]));
                    let state = options.state.map(|state| {
                        let out = with_element!(state.out.dtype(), T => {
                            state.out.row::<T>(b, h, i).iter().map(|x| f64::from(x.to_f32())).collect::<Vec<_>>()
                        });
                        (f64::from(state.lse.row::<f32>(b, h, i)[0]), out)
                    });
                    let logits = seen.iter().map(|&(s, _)| s).chain(sink).chain(state.iter().map(|(lse, _)| *lse));
                    let max = logits.fold(f64::NEG_INFINITY, f64::max);
                    let mut row = vec![0.0; value_dim];
                    let mut sum = sink.map_or(0.0, |s| (s - max).exp());
                    for (s, j) in seen {
                        let weight = (s - max).exp();
                        sum += weight;
                        row.iter_mut().zip(self.v.row(b, h / group, j)).for_each(|(o, v)| *o += weight * v);
                    }
                    if let Some((lse, state)) = state.filter(|(lse, _)| *lse != f64::NEG_INFINITY) {
                        let weight = (lse - max).exp();
                        sum += weight;
                        row.iter_mut().zip(state).for_each(|(o, x)| *o += weight * x);
                    }
                    out.extend(row.iter().map(|o| if sum == 0.0 { 0.0 } else { o / sum }));
                    lse.push(if sum == 0.0 { f64::NEG_INFINITY } else { max + sum.ln() });
                }
            }
        }
        (out, lse)
    }

    fn run(&self, isa: Isa, options: Options) -> (Vec<f32>, Vec<f32>) {
        let Shape { batch, kv_heads, group, queries, value_dim, .. } = self.shape;
        let rows = [batch, kv_heads * group, queries];
        let (mut out, mut lse) =
            (vec![f32::NAN; rows.iter().product::<usize>() * value_dim], vec![f32::NAN; rows.iter().product()]);
        let problem = Problem::new(self.q.view(), self.k.view().into(), self.v.view().into(), options).unwrap();
        {
            let out = TensorViewMut::new(&mut out, [rows[0], rows[1], rows[2], value_dim]).unwrap();
            let lse = TensorViewMut::new(&mut lse, [rows[0], rows[1], rows[2], 1]).unwrap();
            run(isa, &[Job::new(problem, &out, &lse)], &Execution::default()).unwrap();
        }
        (out, lse)
    }

    /// The largest product `scale |q| |k|`, which no logit exceeds before bias.
    fn logit_size(&self, options: &Options) -> f64 {
        let Shape { batch, kv_heads, group, queries, keys, dim, .. } = self.shape;
        let norm = |row: Vec<f64>| row.iter().map(|x| x * x).sum::<f64>().sqrt();
        let mut largest = 0f64;
        for (b, h) in (0..batch).flat_map(|b| (0..kv_heads * group).map(move |h| (b, h))) {
            let k = (0..keys).map(|j| norm(self.k.row(b, h / group, j))).fold(0.0, f64::max);
            for i in 0..queries {
                // SAFETY: the row is inside the scales, which fit the problem.
                let own = options.row_scales.map(|scales| f64::from(unsafe { *scales.row(b, h, i, 0).0 }));
                let scale = own.unwrap_or(options.scale.map_or((dim as f64).powf(-0.5), f64::from));
                largest = largest.max(scale.abs() * norm(self.q.row(b, h, i)) * k);
            }
        }
        largest
    }

    fn check(&self, options: Options) -> std::result::Result<(), TestCaseError> {
        let (out, lse) = self.expected(&options);
        // A logit errs by a few units of roundoff of its size, and the output by twice that of the largest value (about 4).
        let atol = 2e-5 + 8.0 * 4.0 * 2f64.powi(-24) * self.logit_size(&options);
        let bf16 = self.q.view().dtype() == DType::BF16 && self.k.view().dtype() == DType::BF16;
        for isa in Isa::available() {
            let (got, got_lse) = self.run(isa, options);
            // Weights of as many rows of pairs are rounded to bf16, and of all that matrix registers multiply.
            let rows = self.shape.group * self.shape.queries;
            let last = rows % tile::QUERY_ROWS;
            let tiles = isa == Isa::Amx && rows > MAX_QUERY_ROWS;
            let pairs = bf16 && (tiles || isa >= Isa::Avx512Bf16 && last == MAX_QUERY_ROWS);
            let weights = if pairs { 4.0 * 2f64.powi(-8) } else { 0.0 };
            for (kind, got, expected, atol) in [("out", &got, &out, atol + weights), ("lse", &got_lse, &lse, atol)] {
                for (i, (&x, &y)) in got.iter().zip(expected).enumerate() {
                    let close = (f64::from(x) - y).abs() <= atol + 2e-5 * y.abs() || f64::from(x) == y;
                    prop_assert!(close, "{} {kind}[{i}]: {x} for {y}, {:?} {options:?}", isa.name(), self.shape);
                }
            }
        }
        Ok(())
    }
}

fn dtype() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)]
}

fn shape() -> impl Strategy<Value = Shape> {
    let widths = (prop_oneof![1usize..20, Just(64), Just(130)], prop_oneof![1usize..20, Just(64), Just(130)]);
    // Few rows take the streaming kernel, more the packed one; both sides of the blocks' edges.
    let lengths = (prop_oneof![1usize..4, 5usize..60], prop_oneof![0usize..40, 120usize..300]);
    (1usize..3, 1usize..3, 1usize..6, lengths, widths).prop_map(
        |(batch, kv_heads, group, (queries, keys), (dim, value_dim))| Shape {
            batch,
            kv_heads,
            group,
            queries,
            keys,
            dim,
            value_dim,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_shape_dtype_and_mask(
        shape in shape(),
        (q, kv) in (dtype(), dtype()),
        gap in 0usize..3,
        causal in any::<bool>(),
        left in prop::option::of(0usize..50),
        right in prop::option::of(0usize..50),
        (softcap, scale) in (prop_oneof![Just(0f32), 1f32..20.0], prop::option::of(-1f32..1.0)),
        (alibi, sinks) in (any::<bool>(), any::<bool>()),
        seed in any::<u32>(),
    ) {
        let case = Case::new(shape, q, kv, gap, u64::from(seed));
        let heads = shape.kv_heads * shape.group;
        let slopes: Vec<f32> = numbers(shape.batch * heads, 5).iter().map(|x| 0.05 * x.abs()).collect();
        let logits = numbers(heads, 6);
        case.check(Options {
            scale,
            causal,
            window_left: left,
            window_right: right,
            softcap,
            alibi_slopes: alibi.then_some(&slopes),
            sinks: sinks.then_some(&logits),
            ..Options::default()
        })?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_scales_tables_segments_and_states(
        shape in shape(),
        (q, kv) in (dtype(), dtype()),
        causal in any::<bool>(),
        per_row in any::<bool>(),
        entries in 1usize..80,
        zero in any::<prop::sample::Index>(),
        (table, segments, until, state) in any::<(bool, bool, bool, bool)>(),
        seed in any::<u32>(),
    ) {
        let case = Case::new(shape, q, kv, 1, u64::from(seed));
        let Shape { batch, queries, keys, value_dim, .. } = shape;
        let heads = shape.kv_heads * shape.group;
        let below = |n: usize, seed, limit: i32| -> Vec<i32> {
            numbers(n, seed).iter().map(|x| (x.abs() * 1e3) as i32 % limit).collect()
        };
        let rows = if per_row { queries } else { 1 };
        let scales = numbers(batch * heads * rows, 5);
        let biases = numbers(heads * entries, 6);
        let (own, others) = (below(batch * queries, 7, 3), below(batch * keys, 8, 3));
        let ends = below(batch * keys, 9, keys as i32 + 2);
        let (out, mut lse) = (numbers(batch * heads * queries * value_dim, 10), numbers(batch * heads * queries, 11));
        lse.iter_mut().step_by(3).for_each(|x| *x = f32::NEG_INFINITY);
        case.check(Options {
            row_scales: Some(Broadcast::new(&scales, [batch, heads, rows, 1]).unwrap()),
            causal,
            relative_bias: table.then_some(RelativeBias { table: &biases, zero: zero.index(entries) }),
            segments: segments.then_some(Segments { queries: &own, keys: &others }),
            visible_until: until.then_some(&ends),
            state: state.then(|| State {
                out: TensorView::new(&out, [batch, heads, queries, value_dim]).unwrap(),
                lse: TensorView::new(&lse, [batch, heads, queries, 1]).unwrap(),
            }),
            ..Options::default()
        })?;
    }
}

#[test]
fn blocks_of_small_weights_are_left_out() {
    // 256 keys of logit 0, then 400 of logit -5: e^-5 = 0.0067.
    let bias: Vec<f32> = (0..656).map(|j| if j < 256 { 0.0 } else { -5.0 }).collect();
    let bias = Some(Broadcast::new(&bias, [1, 1, 1, 656]).unwrap());
    let options = Options { scale: Some(0.0), bias, ..Options::default() };
    for queries in [1, 30] {
        let shape = Shape { batch: 1, kv_heads: 1, group: 2, queries, keys: 656, dim: 8, value_dim: 8 };
        let case = Case::new(shape, DType::F32, DType::F32, 0, 51);
        for isa in Isa::available() {
            let lse = |skip_threshold| f64::from(case.run(isa, Options { skip_threshold, ..options }).1[0]);
            assert!((lse(0.007) - 256f64.ln()).abs() < 1e-5, "{}", isa.name());
            assert!((lse(0.006) - (256.0 + 400.0 * (-5f64).exp()).ln()).abs() < 1e-5, "{}", isa.name());
            assert_eq!(case.run(isa, options), case.run(isa, Options { skip_threshold: 0.006, ..options }));
        }
    }
}

#[test]
fn long_ranges_are_split_and_merged() {
    // One query row over several pieces of keys, and rows whose window lies inside one piece.
    let shape = Shape { batch: 1, kv_heads: 1, group: 3, queries: 2, keys: 5000, dim: 24, value_dim: 20 };
    let case = Case::new(shape, DType::F32, DType::BF16, 1, 3);
    let sinks = [0.5, -2.0, f32::NEG_INFINITY];
    case.check(Options::default()).unwrap();
    case.check(Options { causal: true, sinks: Some(&sinks), ..Options::default() }).unwrap();
    case.check(Options { causal: true, window_left: Some(1500), ..Options::default() }).unwrap();
    case.check(Options { window_left: Some(0), window_right: Some(0), ..Options::default() }).unwrap();
}

#[test]
fn decode_of_any_group_at_the_edges_of_blocks() {
    let dtypes = [DType::F32, DType::F16, DType::BF16];
    let mut n = 0;
    for group in 1..=8 {
        for (dim, value_dim) in [(32, 32), (64, 80), (96, 64), (130, 160)] {
            for keys in [1, 2, 3, 5, 6, 127, 130, 133, 300] {
                n += 1;
                let shape = Shape { batch: 1, kv_heads: 1, group, queries: 1, keys, dim, value_dim };
                // Rows with nothing between them, and others.
                let case = Case::new(shape, dtypes[n % 3], dtypes[n / 3 % 3], n / 9 % 2, n as u64);
                case.check(Options::default()).unwrap();
            }
        }
    }
}

/// Whole steps of bf16 are packed where they lie, if keys lie whole words apart; tails and other distances are not.
#[test]
fn keys_and_values_of_bf16_at_any_distance() {
    for (dim, gap, keys) in [(32, 0, 64), (64, 1, 71), (32, 2, 70), (40, 0, 64)] {
        let shape = Shape { batch: 1, kv_heads: 2, group: 2, queries: 20, keys, dim, value_dim: dim };
        let case = Case::new(shape, DType::BF16, DType::BF16, gap, 11);
        case.check(Options::default()).unwrap();
        case.check(Options { causal: true, scale: Some(-0.3), ..Options::default() }).unwrap();
    }
}

/// Where there are many rows, items of matrix registers have more of them.
#[test]
fn rows_of_large_items() {
    let shape = Shape { batch: 1, kv_heads: 16, group: 1, queries: 800, keys: 70, dim: 32, value_dim: 32 };
    let case = Case::new(shape, DType::BF16, DType::BF16, 0, 12);
    let problem = |isa| {
        Problem::new(case.q.view(), case.k.view().into(), case.v.view().into(), Options::default()).unwrap().on(isa)
    };
    for isa in Isa::available() {
        let rows = if isa == Isa::Amx { MAX_ITEM_ROWS } else { tile::QUERY_ROWS };
        assert_eq!(problem(isa).item_rows(), rows);
    }
    case.check(Options { causal: true, ..Options::default() }).unwrap();
}

/// Bits do not depend on which lists are attended to together.
#[test]
fn lists_of_packed_keys_together_and_one_by_one() {
    let shape = Shape { batch: 1, kv_heads: 2, group: 1, queries: 3000, keys: 1000, dim: 64, value_dim: 40 };
    let bounds: Vec<usize> = (0..=shape.keys.div_ceil(64)).map(|b| (b * 64).min(shape.keys)).collect();
    let mut random = crate::index::Random::new(3);
    // Of few blocks, of many, of none.
    let lists: Vec<Vec<u32>> = (0..2 * shape.queries.div_ceil(64))
        .map(|list| (0..bounds.len() as u32 - 1).filter(|_| random.normal() > [1.5, -0.5, 9.0][list % 3]).collect())
        .collect();
    for (dtype, causal) in [(DType::F32, false), (DType::BF16, true), (DType::F16, false)] {
        let case = Case::new(shape, dtype, dtype, 0, 14);
        let options = Options { causal, ..Options::default() };
        for isa in Isa::available() {
            let problem =
                Problem::new(case.q.view(), case.k.view().into(), case.v.view().into(), options).unwrap().on(isa);
            let (mut room, execution) = (packed::PackedRoom::default(), Execution::default());
            let packing = packed::Packing::new(isa, &problem);
            let heads = PackedHeads::new(isa, &problem, packing, 0..2, &mut room, &execution).unwrap();
            let problem = Problem { packed: Some(&heads), ..problem };
            let mut blocks = Vec::new();
            for (list, picked) in lists.iter().enumerate() {
                let (head, block) = (list * 2 / lists.len(), list % (lists.len() / 2));
                let (queries, keys) = (
                    block * 64..(block * 64 + 64).min(shape.queries),
                    keys::Keys::Blocks { blocks: picked, bounds: &bounds },
                );
                run::push_row_blocks(0, &problem, 0, head..head + 1, queries, &keys, &mut blocks);
            }
            let run = |together: bool| {
                let rows = shape.kv_heads * shape.queries;
                let (mut out, mut lse) = (vec![f32::NAN; rows * shape.value_dim], vec![f32::NAN; rows]);
                let out_view = TensorViewMut::new(&mut out, [1, 2, shape.queries, shape.value_dim]).unwrap();
                let lse_view = TensorViewMut::new(&mut lse, [1, 2, shape.queries, 1]).unwrap();
                let jobs = [Job::new(problem, &out_view, &lse_view)];
                if together {
                    assert!(run::groups(&jobs, &blocks).len() < blocks.len());
                    run::run_blocks(isa, &jobs, &blocks, &execution).unwrap();
                } else {
                    for block in &blocks {
                        run::run_blocks(isa, &jobs, std::slice::from_ref(block), &execution).unwrap();
                    }
                }
                [out, lse].map(|x| x.into_iter().map(f32::to_bits).collect::<Vec<_>>())
            };
            assert_eq!(run(true), run(false), "{} {dtype}", isa.name());
        }
    }
}

#[test]
fn rows_that_see_nothing_are_zero() {
    let shape = Shape { batch: 1, kv_heads: 2, group: 2, queries: 30, keys: 9, dim: 8, value_dim: 5 };
    let case = Case::new(shape, DType::F16, DType::F32, 0, 8);
    for isa in Isa::available() {
        let (out, lse) = case.run(isa, Options { causal: true, ..Options::default() });
        // The first 21 positions lie before every key.
        assert!(out[..21 * 5].iter().all(|&x| x == 0.0) && lse[..21].iter().all(|&x| x == f32::NEG_INFINITY));
        assert!(lse[21..30].iter().all(|x| x.is_finite()));
    }
    case.check(Options { causal: true, ..Options::default() }).unwrap();
}

#[test]
fn values_of_hidden_keys_never_matter() {
    for queries in [1, 40] {
        let shape = Shape { batch: 1, kv_heads: 1, group: 2, queries, keys: 300, dim: 16, value_dim: 12 };
        let mut case = Case::new(shape, DType::F32, DType::F32, 0, 11);
        let options = Options { causal: true, window_left: Some(20), ..Options::default() };
        let clean: Vec<_> = Isa::available().into_iter().map(|isa| case.run(isa, options)).collect();
        // NaN and infinity in every key and value that no row sees.
        let first = 300 - queries - 20;
        for array in [&mut case.k, &mut case.v] {
            let width = array.shape[3];
            let Storage::F32(numbers) = &mut array.storage else { unreachable!() };
            numbers[..first * width].iter_mut().enumerate().for_each(|(i, x)| *x = [f32::NAN, f32::INFINITY][i % 2]);
        }
        for (isa, (out, lse)) in Isa::available().into_iter().zip(clean) {
            let dirty = case.run(isa, options);
            assert_eq!(dirty.1, lse, "{} {queries}", isa.name());
            assert!(dirty.0.iter().zip(&out).all(|(a, b)| (a - b).abs() <= 1e-6), "{} {queries}", isa.name());
        }
    }
}

#[test]
fn broadcast_bias_and_mask() {
    let shape = Shape { batch: 2, kv_heads: 1, group: 2, queries: 9, keys: 140, dim: 16, value_dim: 16 };
    let case = Case::new(shape, DType::F32, DType::F32, 0, 21);
    let bias = numbers(9 * 140, 22);
    let mask: Vec<u8> = (0..140).map(|j| u8::from(j % 3 != 0)).collect();
    let options = Options {
        bias: Some(Broadcast::new(&bias, [1, 1, 9, 140]).unwrap()),
        mask: Some(Broadcast::new(&mask, [1, 1, 1, 140]).unwrap()),
        ..Options::default()
    };
    for isa in Isa::available() {
        let (out, lse) = case.run(isa, options);
        for b in 0..2 {
            for h in 0..2 {
                for i in 0..9 {
                    let q = case.q.row(b, h, i);
                    let weights: Vec<f64> = (0..140)
                        .map(|j| {
                            let dot: f64 = q.iter().zip(case.k.row(b, 0, j)).map(|(q, k)| q * k).sum();
                            if mask[j] == 0 { 0.0 } else { (0.25 * dot + f64::from(bias[i * 140 + j])).exp() }
                        })
                        .collect();
                    let sum: f64 = weights.iter().sum();
                    let at = (b * 2 + h) * 9 + i;
                    assert!((f64::from(lse[at]) - sum.ln()).abs() < 2e-5, "{}", isa.name());
                    let first: f64 =
                        weights.iter().enumerate().map(|(j, w)| w * case.v.row(b, 0, j)[0]).sum::<f64>() / sum;
                    assert!((f64::from(out[at * 16]) - first).abs() < 2e-5, "{}", isa.name());
                }
            }
        }
    }
}

#[test]
fn packed_sequences_are_calls_of_their_own() {
    let (heads, dim) = (2, 12);
    let (query_ends, key_ends) = ([0, 3, 3, 20, 21], [0, 40, 45, 45, 300]);
    let (q, k, v) = (numbers(heads * 21 * dim, 1), numbers(300 * dim, 2), numbers(300 * dim, 3));
    let views = (
        TensorView::new(&q, [1, heads, 21, dim]).unwrap(),
        TensorView::new(&k, [1, 1, 300, dim]).unwrap(),
        TensorView::new(&v, [1, 1, 300, dim]).unwrap(),
    );
    let options = Options { causal: true, ..Options::default() };
    let (mut out, mut lse) = (vec![f32::NAN; heads * 21 * dim], vec![f32::NAN; heads * 21]);
    attention_varlen(
        views.0,
        views.1,
        views.2,
        &query_ends,
        &key_ends,
        options,
        &mut TensorViewMut::new(&mut out, [1, heads, 21, dim]).unwrap(),
        &mut TensorViewMut::new(&mut lse, [1, heads, 21, 1]).unwrap(),
        &Execution::default(),
    )
    .unwrap();
    for s in 0..4 {
        let (rows, keys) = (query_ends[s]..query_ends[s + 1], key_ends[s]..key_ends[s + 1]);
        let n = rows.len();
        let (mut one, mut one_lse) = (vec![f32::NAN; heads * n * dim], vec![f32::NAN; heads * n]);
        attention(
            views.0.rows(rows.clone()),
            views.1.rows(keys.clone()),
            views.2.rows(keys),
            options,
            &mut TensorViewMut::new(&mut one, [1, heads, n, dim]).unwrap(),
            &mut TensorViewMut::new(&mut one_lse, [1, heads, n, 1]).unwrap(),
            &Execution::default(),
        )
        .unwrap();
        for h in 0..heads {
            for (i, row) in rows.clone().enumerate() {
                let (a, b) = (&out[(h * 21 + row) * dim..][..dim], &one[(h * n + i) * dim..][..dim]);
                assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5), "sequence {s} head {h} row {i}");
                let (a, b) = (lse[h * 21 + row], one_lse[h * n + i]);
                assert!(a == b || (a - b).abs() < 1e-5);
            }
        }
    }
    let bad = attention_varlen(
        views.0,
        views.1,
        views.2,
        &[0, 22],
        &[0, 300],
        options,
        &mut TensorViewMut::new(&mut out, [1, heads, 21, dim]).unwrap(),
        &mut TensorViewMut::new(&mut lse, [1, heads, 21, 1]).unwrap(),
        &Execution::default(),
    );
    assert!(matches!(bad, Err(Error::Value { .. })));
}

#[test]
fn parts_of_the_keys_merge_to_the_whole() {
    let shape = Shape { batch: 1, kv_heads: 2, group: 2, queries: 5, keys: 230, dim: 16, value_dim: 9 };
    let case = Case::new(shape, DType::F32, DType::F32, 0, 31);
    let (expected, expected_lse) = case.expected(&Options::default());
    let rows = [1, 4, 5];
    let mut parts = Vec::new();
    for range in [0..100, 100..100, 100..230] {
        let (mut out, mut lse) = (vec![f32::NAN; 4 * 5 * 9], vec![f32::NAN; 4 * 5]);
        attention(
            case.q.view(),
            case.k.view().rows(range.clone()),
            case.v.view().rows(range),
            Options::default(),
            &mut TensorViewMut::new(&mut out, [1, 4, 5, 9]).unwrap(),
            &mut TensorViewMut::new(&mut lse, [1, 4, 5, 1]).unwrap(),
            &Execution::default(),
        )
        .unwrap();
        parts.push((out, lse));
    }
    // A part without keys adds nothing, whatever its output holds.
    parts[1].0.fill(f32::NAN);
    let views: Vec<_> = parts
        .iter()
        .map(|(out, lse)| {
            let out = TensorView::new(out, [rows[0], rows[1], rows[2], 9]).unwrap();
            (out, TensorView::new(lse, [rows[0], rows[1], rows[2], 1]).unwrap())
        })
        .collect();
    let (mut out, mut lse) = (vec![f32::NAN; 4 * 5 * 9], vec![f32::NAN; 4 * 5]);
    merge(
        &views,
        &mut TensorViewMut::new(&mut out, [1, 4, 5, 9]).unwrap(),
        &mut TensorViewMut::new(&mut lse, [1, 4, 5, 1]).unwrap(),
        &Execution::default(),
    )
    .unwrap();
    assert!(out.iter().zip(&expected).all(|(&a, b)| (f64::from(a) - b).abs() < 1e-5));
    assert!(lse.iter().zip(&expected_lse).all(|(&a, b)| (f64::from(a) - b).abs() < 1e-5));
}

#[test]
fn wrong_arguments_are_named_and_nothing_is_written() {
    let x = numbers(2 * 4 * 8, 1);
    let (mut out, mut lse) = (vec![7f32; 2 * 4 * 8], vec![7f32; 2 * 4]);
    let q = TensorView::new(&x, [1, 2, 4, 8]).unwrap();
    let mut call = |q, k, v, options| {
        let mut out = TensorViewMut::new(&mut out, [1, 2, 4, 8]).unwrap();
        let mut lse = TensorViewMut::new(&mut lse, [1, 2, 4, 1]).unwrap();
        attention(q, k, v, options, &mut out, &mut lse, &Execution::default()).unwrap_err().to_string()
    };
    let narrow = TensorView::new(&x, [1, 2, 8, 4]).unwrap();
    let three = TensorView::new(&x[..96 / 2], [1, 3, 2, 8]).unwrap();
    let plain = Options::default();
    assert!(call(q, narrow, q, plain).starts_with("k:"));
    assert!(call(q, q, narrow, plain).starts_with("v:"));
    assert!(call(q, three, three, plain).starts_with("q:"));
    assert!(call(q, q, q, Options { scale: Some(f32::NAN), ..plain }).starts_with("scale:"));
    assert!(call(q, q, q, Options { softcap: -1.0, ..plain }).starts_with("softcap:"));
    assert!(call(q, q, q, Options { sinks: Some(&[0.0]), ..plain }).starts_with("sinks:"));
    assert!(call(q, q, q, Options { alibi_slopes: Some(&[0.0; 3]), ..plain }).starts_with("alibi_slopes:"));
    let mask = [1u8; 5];
    let mask = Some(Broadcast::new(&mask, [1, 1, 1, 5]).unwrap());
    assert!(call(q, q, q, Options { mask, ..plain }).starts_with("mask:"));
    let scales = [1f32; 2];
    let row_scales = Some(Broadcast::new(&scales, [1, 1, 2, 1]).unwrap());
    assert!(call(q, q, q, Options { row_scales, ..plain }).starts_with("scale:"));
    for (table, zero) in [(&[0f32; 4][..], 2), (&[0f32; 3][..], 0), (&[][..], 0)] {
        let relative_bias = Some(RelativeBias { table, zero });
        assert!(call(q, q, q, Options { relative_bias, ..plain }).starts_with("relative_bias:"));
    }
    let segments = Some(Segments { queries: &[0; 4], keys: &[0; 3] });
    assert!(call(q, q, q, Options { segments, ..plain }).starts_with("segments:"));
    assert!(call(q, q, q, Options { visible_until: Some(&[0; 5]), ..plain }).starts_with("visible_until:"));
    for skip_threshold in [-0.1, 1.0, f32::NAN] {
        assert!(call(q, q, q, Options { skip_threshold, ..plain }).starts_with("skip_threshold:"));
    }
    let state = Some(State { out: q, lse: TensorView::new(&x[..4], [1, 1, 4, 1]).unwrap() });
    assert!(call(q, q, q, Options { state, ..plain }).starts_with("state:"));
    assert!(out.iter().chain(&lse).all(|&x| x == 7.0));
}

#[test]
fn a_cancelled_call_says_so() {
    let shape = Shape { batch: 1, kv_heads: 1, group: 1, queries: 400, keys: 400, dim: 8, value_dim: 8 };
    let case = Case::new(shape, DType::F32, DType::F32, 0, 41);
    let execution = Execution::default();
    execution.cancel.cancel();
    let (mut out, mut lse) = (vec![0f32; 400 * 8], vec![0f32; 400]);
    let result = attention(
        case.q.view(),
        case.k.view(),
        case.v.view(),
        Options::default(),
        &mut TensorViewMut::new(&mut out, [1, 1, 400, 8]).unwrap(),
        &mut TensorViewMut::new(&mut lse, [1, 1, 400, 1]).unwrap(),
        &execution,
    );
    assert!(matches!(result, Err(Error::Cancelled)));
}
