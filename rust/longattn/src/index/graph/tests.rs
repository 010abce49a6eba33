use super::build::{Builder, Graph, Norms, Shape, central};
use super::prune::Space;
use super::search::{KeyMetric, Metric, row_of, search, with_memory};
use crate::dense::rows::Strided;
use crate::index::Random;
use crate::parallel::{Execution, num_threads, set_num_threads};
use crate::simd::{Isa, Kernel, Simd, dispatch};

const SHAPE: Shape = Shape { neighbours: 24, query_neighbours: 60, beam: 60, seed: 1 };

/// Keys in clusters, and queries that look elsewhere.
fn rows(n: usize, dim: usize, seed: u64, offset: f32) -> Vec<f32> {
    let mut random = Random::new(seed);
    let centres: Vec<f32> = (0..32 * dim).map(|_| 1.5 * random.normal() as f32).collect();
    (0..n)
        .flat_map(|_| {
            let c = random.below(32);
            (0..dim).map(|d| centres[c * dim + d] + random.normal() as f32 + offset).collect::<Vec<_>>()
        })
        .collect()
}

struct Found<'a> {
    keys: &'a [f32],
    dim: usize,
    graph: &'a Graph,
    query: &'a [f32],
    width: usize,
}

impl Kernel for Found<'_> {
    type Output = (Vec<u32>, usize);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (Vec<u32>, usize) {
        let Self { keys, dim, graph, query, width } = self;
        let rows = Strided { base: keys.as_ptr(), stride: dim as isize };
        let mut padded = query.to_vec();
        padded.resize(dim.next_multiple_of(16), 0.0);
        with_memory(|memory| {
            let all = 0..graph.links.len() as u32;
            // SAFETY: the graph has as many rows as keys.
            let [scored, _] = unsafe {
                let metric = Metric::PRODUCT;
                search(s, rows, dim, &graph.links, graph.entry, &padded, metric, all, width, memory)
            };
            (memory.found.iter().map(|&rank| row_of(rank)).collect(), scored)
        })
    }
}

fn exact(keys: &[f32], dim: usize, query: &[f32], count: usize) -> Vec<u32> {
    let score = |row: &[f32]| row.iter().zip(query).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let scores: Vec<f64> = keys.chunks_exact(dim).map(score).collect();
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]));
    order.truncate(count);
    order
}

fn with_builder<R>(isa: Isa, keys: &[f32], dim: usize, kind: KeyMetric, work: impl FnOnce(&Builder<f32>) -> R) -> R {
    let rows = Strided { base: keys.as_ptr(), stride: dim as isize };
    // SAFETY: the keys are rows of `dim` floats.
    unsafe {
        let norms = Norms { rows, dim, range: 0..keys.len() / dim, kind }.run().unwrap();
        let space = Space { rows, dim, metric: Metric { kind, norms: &norms } };
        work(&Builder::new(space, SHAPE, isa, &Execution::default()))
    }
}

fn reached(graph: &Graph) -> usize {
    let mut marked = vec![false; graph.links.len()];
    marked[graph.entry as usize] = true;
    graph.links.reach(&mut marked, vec![graph.entry]);
    marked.iter().filter(|&&m| m).count()
}

#[test]
fn graphs_reach_all_rows_and_find_the_nearest() {
    let (n, dim) = (3000, 20);
    let (keys, queries, asked) = (rows(n, dim, 1, 0.5), rows(300, dim, 2, -0.5), rows(40, dim, 2, -0.5));
    let strided = Strided { base: keys.as_ptr(), stride: dim as isize };
    for isa in Isa::available() {
        for kind in [KeyMetric::Ip, KeyMetric::L2, KeyMetric::Cos] {
            for trained in [&queries[..], &[]] {
                let graph = with_builder(isa, &keys, dim, kind, |builder| {
                    let mut graph = builder.build(2700, central(strided, 2700, dim), 48, trained).unwrap();
                    builder.extend(&mut graph, n, trained).unwrap();
                    graph
                });
                assert_eq!(reached(&graph), n);
                let mut hits = 0;
                for query in asked.chunks_exact(dim) {
                    let best = exact(&keys, dim, query, 10);
                    let (found, scored) = dispatch(isa, Found { keys: &keys, dim, graph: &graph, query, width: 100 });
                    assert!(found.len() == 100 && scored < n);
                    hits += found[..10].iter().filter(|row| best.contains(row)).count();
                    // A beam of every row misses none.
                    let (found, scored) = dispatch(isa, Found { keys: &keys, dim, graph: &graph, query, width: n });
                    assert_eq!(scored, n);
                    assert_eq!(found[..10], best[..10]);
                }
                let recall = hits as f64 / 400.0;
                assert!(recall > 0.8, "{} {kind:?} {} {recall}", isa.name(), trained.len());
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_graph() {
    let (n, dim) = (2000, 16);
    let (keys, queries) = (rows(n, dim, 5, 0.2), rows(250, dim, 6, -1.0));
    let before = num_threads();
    let graphs: Vec<Graph> = [1, 2, 5]
        .into_iter()
        .map(|threads| {
            set_num_threads(threads).unwrap();
            with_builder(crate::simd::current(), &keys, dim, KeyMetric::L2, |builder| {
                let mut graph = builder.build(1500, 3, 40, &queries).unwrap();
                builder.extend(&mut graph, n, &queries).unwrap();
                graph
            })
        })
        .collect();
    set_num_threads(before).unwrap();
    assert_eq!(graphs[0], graphs[1]);
    assert_eq!(graphs[0], graphs[2]);
}

#[test]
fn equal_keys_are_all_within_reach() {
    let dim = 4;
    for keys in [vec![0.0; 700 * dim], vec![1.5; 700 * dim]] {
        for kind in [KeyMetric::Ip, KeyMetric::L2, KeyMetric::Cos] {
            let graph = with_builder(crate::simd::current(), &keys, dim, kind, |builder| {
                builder.build(700, 0, 40, &rows(20, dim, 3, 0.0)).unwrap()
            });
            assert_eq!(reached(&graph), 700);
        }
    }
}

#[test]
fn what_is_cut_is_mended() {
    let (n, dim) = (1500, 12);
    let keys = rows(n, dim, 8, 0.3);
    with_builder(crate::simd::current(), &keys, dim, KeyMetric::L2, |builder| {
        let queries = rows(100, dim, 9, -0.3);
        let mut graph = builder.build(n, 2, 36, &queries).unwrap();
        graph.cut(900);
        builder.connect(&mut graph).unwrap();
        assert_eq!((graph.links.len(), reached(&graph)), (900, 900));
        builder.extend(&mut graph, n, &queries).unwrap();
        assert_eq!(reached(&graph), n);
    });
}
