//! The machine's own limits, which benchmarks are measured against: read bandwidth and multiply-add peak.

use crate::simd::{self, Kernel, Simd, dispatch};
use crate::tensor::{Error, Result};
use std::time::Instant;

fn check(threads: usize) -> Result<()> {
    if (1..=4096).contains(&threads) { Ok(()) } else { Err(Error::value("threads", threads, "1 to 4096")) }
}

struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut acc = [s.zero(); 8];
        for chunk in self.0.chunks_exact(8 * S::LANES) {
            for (v, acc) in acc.iter_mut().enumerate() {
                // SAFETY: the chunk holds 8 vectors.
                *acc = s.add(*acc, unsafe { s.load(chunk.as_ptr().add(v * S::LANES)) });
            }
        }
        let mut total = s.zero();
        for acc in acc {
            total = s.add(total, acc);
        }
        s.sum(total)
    }
}

/// GB/s (1e9 bytes) at which `threads` threads read a buffer of `bytes` once: the median of five passes after a first one.
pub fn read_bandwidth(bytes: usize, threads: usize) -> Result<f64> {
    check(threads)?;
    let n = (bytes / 4).max(1 << 16).next_multiple_of(128 * threads);
    let mut data = Vec::new();
    data.try_reserve_exact(n).map_err(|_| Error::Memory { bytes: 4 * n, what: "the buffer to read" })?;
    data.resize(n, 1f32);
    let isa = simd::current();
    let mut seconds: Vec<f64> = (0..6)
        .map(|_| {
            let start = Instant::now();
            std::thread::scope(|scope| {
                for part in data.chunks(n / threads) {
                    scope.spawn(move || std::hint::black_box(dispatch(isa, Sum(part))));
                }
            });
            start.elapsed().as_secs_f64()
        })
        .skip(1)
        .collect();
    seconds.sort_by(f64::total_cmp);
    Ok(4.0 * n as f64 / seconds[2] / 1e9)
}

struct Multiply(usize);

impl Kernel for Multiply {
    /// Multiply-adds done, and a sum that keeps them from being left out.
    type Output = (f64, f32);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (f64, f32) {
        let (x, y) = (s.splat(0.999), s.splat(1e-3));
        // Chains that differ, or the compiler would run one for all.
        let mut acc = [s.zero(); 12];
        for (i, acc) in acc.iter_mut().enumerate() {
            *acc = s.splat(1.0 + i as f32);
        }
        for _ in 0..self.0 {
            for acc in &mut acc {
                *acc = s.fma(*acc, x, y);
            }
        }
        let mut total = s.zero();
        for acc in acc {
            total = s.add(total, acc);
        }
        ((self.0 * 12 * S::LANES) as f64, s.sum(total))
    }
}

/// GFLOP/s of f32 multiply-adds (two operations each) that `threads` threads reach in registers: the best of three runs.
pub fn fma_peak(threads: usize) -> Result<f64> {
    check(threads)?;
    let isa = simd::current();
    let run = || {
        let start = Instant::now();
        let done: f64 = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads)
                .map(|_| scope.spawn(move || std::hint::black_box(dispatch(isa, Multiply(4_000_000))).0))
                .collect();
            workers.into_iter().map(|w| w.join().expect("arithmetic does not panic")).sum()
        });
        2.0 * done / start.elapsed().as_secs_f64() / 1e9
    };
    Ok((0..3).map(|_| run()).fold(0.0, f64::max))
}
