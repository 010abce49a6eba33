//! One decode step over a long store: exact attention beside retrieval attention.
//!
//! ```text
//! cargo run --release --package longattn --example retrieval
//! ```

use longattn::dense::{self, Options};
use longattn::index::{Index, SignatureOptions, Signatures};
use longattn::kv::KvStore;
use longattn::parallel::Execution;
use longattn::retrieval::{Rest, RetrievalOptions, Select, retrieval_attention};
use longattn::tensor::{DType, Result, TensorView, TensorViewMut};
use std::sync::Arc;

const HEADS: usize = 8;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
const LENGTH: usize = 128 * 1024;
const TOPICS: usize = 128;

/// Numbers between -1 and 1, the same in every run.
fn noise(state: &mut u64) -> f32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

fn main() -> Result<()> {
    // The text changes its topic every 32 rows; a row's key and value follow its topic, and queries ask for one.
    let mut state = 1;
    let topics: Vec<f32> = (0..TOPICS * DIM).map(|_| noise(&mut state)).collect();
    let topic = |row: usize, d: usize| topics[row / 32 * 37 % TOPICS * DIM + d];
    let keys: Vec<f32> =
        (0..KV_HEADS * LENGTH * DIM).map(|i| topic(i / DIM % LENGTH, i % DIM) + 0.5 * noise(&mut state)).collect();
    let values: Vec<f32> = keys.iter().map(|x| x + 0.5 * noise(&mut state)).collect();
    let group = HEADS / KV_HEADS;
    let queries: Vec<f32> =
        (0..HEADS * DIM).map(|i| 3.0 * topic(96 * (i / DIM / group), i % DIM) + noise(&mut state)).collect();

    // A store for up to a million rows: address space is reserved, memory comes with the rows.
    let store = Arc::new(KvStore::new(KV_HEADS, DIM, DIM, DType::BF16, 1 << 20)?);
    let shape = [1, KV_HEADS, LENGTH, DIM];
    store.append(&TensorView::new(&keys, shape)?, &TensorView::new(&values, shape)?)?;

    let execution = Execution::default();
    let options = SignatureOptions { bits: 4, seed: 0 };
    let index = Signatures::new(Arc::clone(&store), options)?;
    index.update(&execution)?;
    println!("store {} MiB, index {} MiB", store.nbytes() >> 20, index.nbytes() >> 20);

    let q = TensorView::new(&queries, [1, HEADS, 1, DIM])?;
    let (mut exact, mut found, mut lse) = (vec![0f32; HEADS * DIM], vec![0f32; HEADS * DIM], vec![0f32; HEADS]);

    {
        let reader = store.read();
        let mut out = TensorViewMut::new(&mut exact, [1, HEADS, 1, DIM])?;
        let mut lse = TensorViewMut::new(&mut lse, [1, HEADS, 1, 1])?;
        let options = Options { causal: true, ..Options::default() };
        dense::attention(q, reader.keys(), reader.values(), options, &mut out, &mut lse, &execution)?;
    }

    let (select, rest) = (Select::TopK(1024), Rest::Estimated);
    let options = RetrievalOptions {
        select,
        by_head: None,
        sinks: 4,
        window: 512,
        scale: None,
        rest,
        sink_logits: None,
        sampling: None,
    };
    let mut out = TensorViewMut::new(&mut found, [1, HEADS, 1, DIM])?;
    let mut lse = TensorViewMut::new(&mut lse, [1, HEADS, 1, 1])?;
    let stats = retrieval_attention(q, &index, options, &mut out, &mut lse, false, &execution)?;

    let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
    let difference: Vec<f32> = exact.iter().zip(&found).map(|(a, b)| a - b).collect();
    println!("relative error of the output: {:.4}", norm(&difference) / norm(&exact));
    for (head, row) in stats.iter().enumerate() {
        println!("KV head {head}: read {} of {} rows", row.keys_attended, row.keys_total);
        println!("  mass not read, each query head: {:.3?} (at most {:.3?})", row.missed_mass, row.missed_mass_bound);
    }
    Ok(())
}
